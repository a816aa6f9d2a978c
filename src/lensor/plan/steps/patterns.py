"""The step for products of arrays that are read through index patterns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, NamedTuple

from lensor.affine import Line, Piece, after
from lensor.plan.steps.base import Laid, Rate, Shape, Step

_UNLIMITED = 1 << 60

IDENTITY: Line = (Piece(0, _UNLIMITED, 1, 0),)
"""The line x ↦ x for all positions; it does not depend on the size of an index."""

WORKSPACE = 1 << 22
"""Kernels store partial sums with at most this many entries in addition to one result."""

MOST_SPLITS = 64
"""At most this many programs share a sum."""


_TILE = 16
"""Tiles of a product have at least this many rows and columns."""


class Term(NamedTuple):
    """The contribution of one index to a position.

    Args:
        number: the number of the index.
        line: its contribution; where it is not defined, the array is not read.
    """

    number: int
    line: Line


@dataclass(frozen=True, slots=True)
class Axis:
    """How one axis of an array is read: at the position `outer(Σ line(index))`, and as zero where this is not defined.

    With a term for an output index, one for a kernel index, and padding in `outer`, this is an index pattern. With one
    term and no `outer`, it is a plain axis. Several terms without `outer` are an axis that merges several indices. A
    position that is defined must lie in the array.

    Args:
        terms: the contributions of the indices.
        outer: the function of their sum; None for the identity.
    """

    terms: tuple[Term, ...]
    outer: Line | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the axis has one index, or merges several, and all its positions are read in order."""
        return self.outer is None and all(
            len(line) == 1 and line[0].stop == _UNLIMITED and line[0].offset == 0 and line[0].slope > 0
            for _, line in self.terms
        )

    @property
    def can_be_added(self) -> bool:
        """Whether the position is a sum of contributions of indices, so that another sum can be added to it."""
        return self.outer is None

    def times(self, factor: int) -> Axis:
        """The positions times a factor, for an axis that can be added."""
        scaled = [
            Term(at, tuple(Piece(a, b, factor * c, factor * d) for a, b, c, d in line)) for at, line in self.terms
        ]
        return Axis(tuple(scaled))

    def through(self, line: Line) -> Axis:
        """The axis with positions `line(position)`."""
        if len(self.terms) == 1 and self.outer is None:
            ((index, inner),) = self.terms
            return Axis((Term(index, after(line, inner)),))
        return Axis(self.terms, after(line, self.outer or IDENTITY))

    def renamed(self, new: dict[int, int]) -> Axis:
        """The axis with other numbers of the indices."""
        return Axis(tuple([Term(new.get(index, index), line) for index, line in self.terms]), self.outer)

    def reach(self, sizes: Sequence[int]) -> int:
        """One more than the last position of a plain axis."""
        return 1 + sum(line[0].slope * (sizes[index] - 1) for index, line in self.terms)

    def is_full(self, sizes: Sequence[int]) -> bool:
        """Whether every combination of the indices reads an entry."""
        low = high = 0
        for index, line in self.terms:
            if not _covers(line, 0, sizes[index]):
                return False
            ends = [slope * x + offset for a, b, slope, offset in line for x in (a, min(b, sizes[index]) - 1)]
            low, high = low + min(ends), high + max(ends)
        return self.outer is None or _covers(self.outer, low, high + 1)


def _covers(line: Line, start: int, stop: int) -> bool:
    """Whether a line is defined for start ≤ x < stop."""
    for low, high, *_ in line:
        if low <= start < high:
            start = high
    return start >= stop


@dataclass(frozen=True, slots=True)
class PatternProduct(Step):
    """A product of two arrays read through index patterns: C[b, r, c] = Σ_s L[b, r, s] R[b, s, c].

    Here b, r, c and s are groups of indices. L and R are not stored: their entries are read from the two operands at
    the positions that `left` and `right` describe, so unfolded patches need no memory.

    With `squared` indices, the result is the sum of the squares of C over these indices, for example the diagonal of a
    GGN (squares summed over examples) or the squared norms of per-example gradients (squares summed over r and c).

    Args:
        takes: the two operands.
        sizes: the sizes of all indices.
        batch: the numbers of the indices b; an operand that does not have such an index is repeated along it.
        rows: the numbers of the indices r.
        columns: the numbers of the indices c.
        order: the indices of the result, in order.
        left: how each axis of the first operand is read.
        right: how each axis of the second operand is read.
        factor: a factor of the result.

    The other indices are s, or if they are in `batch`, `rows` or `columns`, squared. Either all indices of rows and
    columns are squared or none. Each index occurs in an operand.
    """

    name: ClassVar[str] = "pattern product"
    resized: ClassVar[tuple[str, ...]] = ("sizes", "factor")
    accumulates: ClassVar[bool] = True
    sizes: Shape
    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]
    left: tuple[Axis, ...]
    right: tuple[Axis, ...]
    factor: Fraction = Fraction(1)

    @property
    def free(self) -> tuple[int, ...]:
        """The indices of C."""
        return (*self.batch, *self.rows, *self.columns)

    @property
    def summed(self) -> tuple[int, ...]:
        """The indices s."""
        free = self.free
        return tuple([index for index in range(len(self.sizes)) if index not in free])

    @property
    def squared(self) -> tuple[int, ...]:
        """The indices over which squares are summed."""
        return tuple([index for index in self.free if index not in self.order])

    @property
    def is_gram(self) -> bool:
        """Whether C is symmetric in r and c because both operands are the same."""
        if self.takes[0] != self.takes[1] or self.squared or len(self.rows) != len(self.columns):
            return False
        new = dict(zip(self.rows, self.columns, strict=True))
        same = all(self.sizes[a] == self.sizes[b] for a, b in new.items())
        return same and tuple([axis.renamed(new) for axis in self.left]) == self.right

    def squares(self, axes: Iterable[int]) -> PatternProduct | None:
        """The sum of squares of the result over some of its axes, computed in the same step; None if it is scaled.

        Squared indices of r or c become indices of b, unless all indices of r and c are squared.
        """
        if self.squared or self.factor != 1:
            return None
        gone = {self.order[axis] for axis in axes}
        order = tuple([index for index in self.order if index not in gone])
        if {*self.rows, *self.columns} <= gone:
            return replace(self, order=order)
        rows, columns = (tuple([index for index in group if index not in gone]) for group in (self.rows, self.columns))
        moved = [index for index in (*self.rows, *self.columns) if index in gone]
        return replace(self, batch=(*self.batch, *moved), rows=rows, columns=columns, order=order)

    def size(self, indices: Iterable[int]) -> int:
        """The product of the sizes of the indices."""
        return math.prod([self.sizes[index] for index in indices])

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return tuple([self.sizes[index] for index in self.order])

    def fixed(self, rank: int) -> Iterable[int]:
        return {
            at
            for axes in (self.left, self.right)
            if len(axes) == rank
            for at, axis in enumerate(axes)
            if not axis.is_plain
        }

    def fits(self, shapes: Sequence[Shape], result: Shape) -> bool:
        return all(
            axis.reach(self.sizes) == size
            for axes, shape in zip((self.left, self.right), shapes, strict=True)
            for axis, size in zip(axes, shape, strict=True)
            if axis.is_plain
        )

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        batch, rows, columns, summed = map(self.size, (self.batch, self.rows, self.columns, self.summed))
        entries = rows * (rows + 1) // 2 if self.is_gram else rows * columns
        return 2 * batch * entries * (summed + bool(self.squared))

    def settings(self) -> str:
        sizes = [self.size(group) for group in (self.batch, self.rows, self.columns, self.summed)]
        text = "{}×{}×{}, sums of {}".format(*sizes)
        if self.is_gram:
            return f"{text}, one triangle"
        return f"{text}, squares summed over {self.size(self.squared)}" if self.squared else text

    def scratch(self, taken: Sequence[Laid], result: Shape) -> int:
        size = math.prod(result)
        tables = 4 * sum(map(self.size, (self.batch, self.rows, self.columns)))
        return min(MOST_SPLITS * size, WORKSPACE + size) + tables

    def rate(self, shapes: Sequence[Shape], result: Shape) -> Rate:
        rows, columns, summed = map(self.size, (self.rows, self.columns, self.summed))
        share = 0.6 * min(1.0, rows / _TILE, columns / _TILE, max(summed / _TILE, 0.1))
        # With too few rows for each position of a kernel, each entry is checked for itself.
        sides = ((self.rows, self.left), (self.columns, self.right))
        return Rate("products", share * math.prod(0.7 for side in sides if not self._fills_tiles(*side)))

    def _fills_tiles(self, group: tuple[int, ...], axes: Sequence[Axis]) -> bool:
        """Whether the rows or columns are all plain, or fill tiles for each combination of the other ones."""
        read = {index for axis in axes if not axis.is_plain for index, _ in axis.terms}
        return read.isdisjoint(group) or self.size(index for index in group if index not in read) >= _TILE
