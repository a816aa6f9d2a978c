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
    def is_small(self) -> bool:
        """Whether a tile leaves enough registers to sum squares, or to check each entry."""
        return self.rows * self.columns <= 64 * 64

    @property
    def is_large(self) -> bool:
        """Whether a tile leaves too few registers to transpose the operands, or to read tables."""
        return self.rows * self.columns > 128 * 64

    @property
    def share(self) -> float:
        """About the share of the peak rate that a tile can reach: small tiles read more entries for each product."""
        return self.rows * self.columns / (self.rows * self.columns + 24 * (self.rows + self.columns))


_WITH_TENSOR_CORES = (
    Tile(128, 128, 32, 8, 3),
    Tile(128, 64, 32, 8, 3),
    Tile(64, 128, 32, 8, 3),
    Tile(64, 64, 32, 8, 4),
    Tile(64, 32, 32, 4, 3),
    Tile(32, 64, 32, 4, 3),
    Tile(32, 32, 32, 8, 3),
    Tile(64, 16, 32, 4, 3),
    Tile(16, 64, 32, 4, 3),
    Tile(16, 16, 64, 4, 3),
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
"""Tiles for products in float32, which do not use tensor cores."""

INTERPRETED = (Tile(16, 16, 16, 4, 1), Tile(32, 32, 16, 4, 1), Tile(32, 16, 32, 4, 1))
"""Tiles for Triton's interpreter, which runs kernels on CPUs to test them."""


def tiles_for(capability: tuple[int, int], has_exact_products: bool) -> tuple[Tile, ...]:
    """The tiles for a GPU, for exact float32 products or for products on tensor cores (compute capability 8.0)."""
    return _WITH_TENSOR_CORES if capability >= (8, 0) and not has_exact_products else _WITHOUT_TENSOR_CORES


_SLOWER = 2.0
"""Tiles whose rows have different coordinates take about this many times as long: each entry is checked for itself."""

_MOST_PADDED = 2.0
"""Gaps may make the rows at most this many times as many."""


class Side(NamedTuple):
    """The rows or the columns of a product, as one side of its tiles.

    Args:
        groups: the number of combinations of the indices on checked axes.
        each: the number of rows for each of them.
        checks: the number of checked axes.
        is_by_rows: whether neighbouring rows are closer in memory than neighbouring terms of the sum.
        has_tables: whether a checked axis has a table.
    """

    groups: int
    each: int
    checks: int
    is_by_rows: bool = False
    has_tables: bool = False

    def is_uniform(self, length: int) -> bool:
        """Whether tiles of this length contain rows of one group only, which leaves gaps after the last one of each."""
        return not self.checks or self.groups == 1 or self.padded(length) <= _MOST_PADDED * self.groups * self.each

    def padded(self, length: int) -> int:
        """The number of rows if each group fills its last tile."""
        return self.groups * -(-self.each // length) * length

    def rows(self, length: int) -> int:
        """The number of rows, including gaps, in tiles of this length."""
        return self.padded(length) if self.checks and self.is_uniform(length) else self.groups * self.each

    def cost(self, length: int) -> float:
        return -(-self.rows(length) // length) * length * (1.0 if self.is_uniform(length) else _SLOWER)


def fitting(tiles: Sequence[Tile], rows: Side, columns: Side, *, is_gram: bool, is_square: bool) -> list[Tile]:
    """The tiles for a product, the ones with the least estimated time first.

    Args:
        tiles: the tiles to choose from.
        rows: the rows of the product.
        columns: the columns.
        is_gram: whether tiles must be square.
        is_square: whether the kernel sums squares.
    """

    def allowed(tile: Tile) -> bool:
        if is_gram and tile.rows != tile.columns:
            return False
        is_light = rows.is_uniform(tile.rows) and columns.is_uniform(tile.columns) and not is_square
        if tile.is_large and any(side.is_by_rows or side.has_tables for side in (rows, columns)):
            return False
        return is_light or tile.is_small

    found = [tile for tile in tiles if allowed(tile)]
    return sorted(found, key=lambda tile: rows.cost(tile.rows) * columns.cost(tile.columns) / tile.share)
