"""Steps for products of two arrays."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from lensor.plan.steps.base import Laid, Rate, Shape, Step
from lensor.plan.steps.views import viewed


@dataclass(frozen=True, slots=True)
class Multiply(Step):
    """The elementwise product; axes of length 1 are repeated."""

    name: ClassVar[str] = "multiply"

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return tuple(b if a == 1 else a for a, b in zip(*shapes, strict=True))

    def fixed(self, rank: int) -> Iterable[int]:
        return ()

    def fits(self, shapes: Sequence[Shape], result: Shape) -> bool:
        return all(a == b or 1 in (a, b) for a, b in zip(*shapes, strict=True))

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(result)


@dataclass(frozen=True, slots=True)
class MatMul(Step):
    """Batched matrix products [*b, m, k] · [*b, k, n] -> [*b, m, n]; batch axes of length 1 are repeated."""

    name: ClassVar[str] = "matmul"
    resized: ClassVar[tuple[str, ...]] = ("factor",)
    is_product: ClassVar[bool] = True
    factor: Fraction = Fraction(1)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        batch = (a if b == 1 else b for a, b in zip(shapes[0][:-2], shapes[1][:-2], strict=True))
        return (*batch, shapes[0][-2], shapes[1][-1])

    def fixed(self, rank: int) -> Iterable[int]:
        return ()

    def fits(self, shapes: Sequence[Shape], result: Shape) -> bool:
        batch = zip(shapes[0][:-2], shapes[1][:-2], strict=True)
        return shapes[0][-1] == shapes[1][-2] and all(a == b or 1 in (a, b) for a, b in batch)

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return 2 * math.prod(result) * shapes[0][-1]

    def copies(self, taken: Sequence[Laid]) -> tuple[int, int]:
        return product_copies(*taken)

    def rate(self, shapes: Sequence[Shape], result: Shape) -> Rate:
        (*_, m, k), (*_, n) = shapes
        # Products with a short side do not reach the rate of large products.
        return Rate(_kind(shapes[0]), min(1.0, m / 16, n / 16, max(k / 16, 0.1)) * _aligned(n))

    def traffic(self, taken: Sequence[Laid], result: Shape) -> int:
        return 2 * self.copies(taken)[0] + _repeated([one.shape for one in taken])


@dataclass(frozen=True, slots=True)
class Gram(Step):
    """The Gram matrices of rows, [*b, m, k] -> [*b, m, m]; they are symmetric, so computing one triangle suffices."""

    name: ClassVar[str] = "gram"
    resized: ClassVar[tuple[str, ...]] = ("factor",)
    is_product: ClassVar[bool] = True
    factor: Fraction = Fraction(1)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0][:-1], shapes[0][-2])

    def fixed(self, rank: int) -> Iterable[int]:
        return ()

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(result[:-1]) * (result[-1] + 1) * shapes[0][-1]

    def copies(self, taken: Sequence[Laid]) -> tuple[int, int]:
        (*batch, rows, columns), strides = taken[0]
        return product_copies(taken[0], Laid((*batch, columns, rows), (*strides[:-2], strides[-1], strides[-2])))

    def rate(self, shapes: Sequence[Shape], result: Shape) -> Rate:
        *_, m, k = shapes[0]
        return Rate(_kind(shapes[0]), _SHARES[self.depth(m, k)] * min(1.0, m / 16, max(k / 16, 0.1)))

    def depth(self, rows: int, length: int) -> int:
        """How many times CPUs halve the rows, to compute fewer entries twice; each time doubles the number of calls."""
        if rows < _MANY or length < _LONG:
            return 0
        return bisect(_DEPTHS, 2 * rows**2 * length)

    def barriers(self, shapes: Sequence[Shape], result: Shape) -> float:
        *batch, m, k = shapes[0]
        depth = self.depth(m, k)
        # Products of halves, one by one for each Gram matrix, and copies of those below the diagonal.
        return math.prod(batch) * (3 * 2**depth - 2) if depth else Step.barriers(self, shapes, result)

    def traffic(self, taken: Sequence[Laid], result: Shape) -> int:
        return 2 * self.copies(taken)[0]


def _aligned(length: int) -> float:
    """The share of the rate for rows of this length: lower if most rows begin between the vectors of a register."""
    return 1.0 if length % 8 == 0 else 0.85 if length < 1024 else 0.6


_MANY, _LONG = 192, 256
"""A Gram matrix with fewer rows, or with shorter rows, is computed as a whole: halving it would save too little."""

_DEPTHS = (3e8, 5e9, 4e10)
"""The flops of a whole product from which halving its rows once, twice or three times is worth the calls.

More calls would be faster on a quiet machine; if other processes use the cores, each call waits for them.
"""

_SHARES = (0.5, 0.57, 0.63, 0.66)
"""The share of the rate of whole products, for entries on and below the diagonal, by the number of halvings."""


def _kind(shape: Shape) -> str:
    return "batched" if math.prod(shape[:-2]) > 1 else "products"


_SMALL_PRODUCT = 400
"""Batched products with fewer multiplications run entry by entry and accept operands with any strides."""


def product_copies(one: Laid, two: Laid) -> tuple[int, int]:
    """Number of entries that frameworks copy to multiply [batch, m, k] and [batch, k, n]: (in total, alive at once).

    Frameworks multiply over a single batch axis and require matrices with a contiguous axis. An operand whose batch
    axes cannot be merged, because of their strides or because an axis is repeated, is copied with all repetitions.
    Matrices with overlapping or gapped rows are copied one at a time.
    """
    (a, a_strides), (b, b_strides) = one, two
    rank = max(len(a), len(b)) - 2
    sizes = [(1,) * (rank + 2 - len(shape)) + tuple(shape[:-2]) for shape in (a, b)]
    batch = tuple(max(sides) for sides in zip(*sizes, strict=True))
    in_all = alive = 0
    for shape, strides in ((a, a_strides), (b, b_strides)):
        own = (0,) * (rank + 2 - len(shape)) + tuple(
            0 if size == 1 else stride for size, stride in zip(shape[:-2], strides[:-2], strict=True)
        )
        (rows, columns), (down, across) = shape[-2:], strides[-2:]
        by_rows = (across == 1 or columns == 1) and (down >= columns or rows == 1)
        by_columns = (down == 1 or rows == 1) and (across >= rows or columns == 1)
        if rank > 1 and viewed(batch, own, (math.prod(batch),)) is None:
            in_all += math.prod(batch) * rows * columns
            alive += math.prod(batch) * rows * columns
        elif not (by_rows or by_columns) and (rank == 0 or a[-2] * a[-1] * b[-1] >= _SMALL_PRODUCT):
            in_all += math.prod(batch) * rows * columns
            alive += rows * columns
    return in_all, alive


_KEPT = 1 << 18
"""A matrix with at most this many entries stays in the cache while a batch is processed."""


def _repeated(shapes: Sequence[Shape]) -> int:
    """Number of entries of a factor that are reread for each batch element of the other, if too many for the cache."""
    batches = [math.prod(shape[:-2]) for shape in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    most = max(batches)
    return sum((most - 1) * size for batch, size in zip(batches, sizes, strict=True) if batch == 1 and size > _KEPT)
