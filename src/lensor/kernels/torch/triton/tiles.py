"""Tiles: how much of a pattern product one program computes, and how it loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Tile(NamedTuple):
    """The settings with which the kernel is compiled.

    Args:
        rows: rows of a tile, a power of two, at least 16.
        columns: columns of a tile; Gram matrices need as many as rows.
        sums: terms of the sum that are read at once.
        warps: groups of 32 threads.
        stages: how many steps of the loop are in flight.
    """

    rows: int
    columns: int
    sums: int
    warps: int
    stages: int

    @property
    def entries(self) -> int:
        """The number of entries of both operands that are read at once."""
        return self.sums * (self.rows + self.columns)

    @property
    def share(self) -> float:
        """About the share of the peak rate that a tile can reach: small tiles read more entries for each product."""
        return self.rows * self.columns / (self.rows * self.columns + 24 * (self.rows + self.columns))


_WITH_TENSOR_CORES = (
    Tile(128, 128, 16, 8, 4),
    Tile(128, 64, 32, 8, 4),
    Tile(64, 128, 32, 8, 4),
    Tile(128, 64, 16, 8, 4),
    Tile(64, 128, 16, 8, 4),
    Tile(64, 64, 32, 4, 4),
    Tile(64, 32, 32, 4, 4),
    Tile(32, 64, 32, 4, 4),
    Tile(32, 32, 32, 4, 4),
    Tile(64, 16, 32, 4, 4),
    Tile(16, 64, 32, 4, 4),
    Tile(16, 16, 64, 4, 4),
)
"""Tiles for products in TF32, float16 and bfloat16 on GPUs with compute capability 8.0 or higher."""

_WITHOUT_TENSOR_CORES = (
    Tile(128, 64, 16, 8, 3),
    Tile(64, 128, 16, 8, 3),
    Tile(64, 64, 16, 4, 3),
    Tile(64, 32, 16, 4, 3),
    Tile(32, 64, 16, 4, 3),
    Tile(32, 32, 16, 4, 3),
    Tile(64, 16, 16, 4, 3),
    Tile(16, 64, 16, 4, 3),
    Tile(16, 16, 32, 4, 3),
)
"""Tiles for float32, and for all dtypes on older GPUs, for which Triton does not use tensor cores."""

INTERPRETED = (Tile(16, 16, 16, 4, 1), Tile(32, 32, 16, 4, 1), Tile(32, 16, 32, 4, 1))
"""Tiles for Triton's interpreter, which runs kernels on CPUs to test them."""


def has_tensor_cores(capability: tuple[int, int]) -> bool:
    """Whether Triton uses the tensor cores of a GPU."""
    return capability >= (8, 0)


def tiles_for(capability: tuple[int, int], has_exact_products: bool) -> tuple[Tile, ...]:
    """The tiles for a GPU, for exact float32 products or for products on tensor cores."""
    return _WITH_TENSOR_CORES if has_tensor_cores(capability) and not has_exact_products else _WITHOUT_TENSOR_CORES


_MOST_ENTRIES = 3072
"""Variants of the kernel that need many registers read at most this many entries of both operands at once."""


def fitting(
    tiles: Sequence[Tile], rows: int, columns: int, *, is_gram: bool = False, is_heavy: bool = False
) -> list[Tile]:
    """The tiles for a product with this many rows and columns, the ones with the least estimated time first.

    Args:
        tiles: the tiles to choose from.
        rows: number of rows.
        columns: number of columns.
        is_gram: whether tiles must be square.
        is_heavy: whether the kernel sums squares, reads tables, or checks three axes, and so needs many registers.
    """

    def cost(tile: Tile) -> float:
        computed = -(-rows // tile.rows) * tile.rows * (-(-columns // tile.columns)) * tile.columns
        return computed / tile.share

    found = [tile for tile in tiles if tile.rows == tile.columns or not is_gram]
    if is_heavy:
        found = [tile for tile in found if tile.entries <= _MOST_ENTRIES] or found[-1:]
    return sorted(found, key=cost)
