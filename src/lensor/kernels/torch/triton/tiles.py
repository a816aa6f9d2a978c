"""Tiles: how much of a pattern product one program computes, and how it loops."""

from __future__ import annotations

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
    def share(self) -> float:
        """About the share of the peak rate that a tile can reach: small tiles read more entries for each product."""
        return self.rows * self.columns / (self.rows * self.columns + 24 * (self.rows + self.columns))


WITH_TENSOR_CORES = (
    Tile(128, 128, 32, 8, 3),
    Tile(128, 64, 32, 4, 3),
    Tile(64, 128, 32, 4, 3),
    Tile(64, 64, 32, 4, 4),
    Tile(64, 32, 32, 4, 4),
    Tile(32, 64, 32, 4, 4),
    Tile(32, 32, 32, 4, 4),
    Tile(64, 16, 32, 4, 4),
    Tile(16, 64, 32, 4, 4),
    Tile(16, 16, 64, 4, 3),
)
"""Tiles for products in TF32, float16 and bfloat16 on GPUs with compute capability 8.0 or higher."""

WITHOUT_TENSOR_CORES = (
    Tile(128, 64, 16, 8, 2),
    Tile(64, 128, 16, 8, 2),
    Tile(64, 64, 16, 4, 2),
    Tile(64, 32, 16, 4, 2),
    Tile(32, 64, 16, 4, 2),
    Tile(32, 32, 16, 4, 2),
    Tile(64, 16, 32, 4, 2),
    Tile(16, 64, 32, 4, 2),
    Tile(16, 16, 32, 4, 2),
)
"""Tiles for float32, and for all dtypes on older GPUs."""

INTERPRETED = (Tile(16, 16, 16, 4, 1), Tile(32, 32, 16, 4, 1), Tile(32, 16, 32, 4, 1))
"""Tiles for Triton's interpreter, which runs kernels on CPUs to test them."""


def fitting(tiles: tuple[Tile, ...], rows: int, columns: int, is_gram: bool) -> list[Tile]:
    """The tiles for a product with this many rows and columns, the ones with the least estimated time first."""

    def cost(tile: Tile) -> float:
        computed = -(-rows // tile.rows) * tile.rows * (-(-columns // tile.columns)) * tile.columns
        return computed / tile.share

    return sorted((tile for tile in tiles if not is_gram or tile.rows == tile.columns), key=cost)
