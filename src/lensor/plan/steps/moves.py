"""Steps that only copy entries to other places."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lensor.affine import progressions
from lensor.pattern import IndexPattern
from lensor.plan.steps.base import SCATTERED, Laid, Shape, Step, with_axis

_SHORT = 8
"""Rows with fewer entries than this are copied slowly."""

_SINGLE = 4
"""Each scattered read of a single entry costs as much as moving this many extra entries."""


@dataclass(frozen=True, slots=True)
class Pad(Step):
    """Pad both sides of an axis with zeros."""

    name: ClassVar[str] = "pad"
    computes: ClassVar[bool] = False
    axis: int
    left: int
    right: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        size = shapes[0][self.axis] + self.left + self.right
        return with_axis(shapes[0], self.axis, size)

    def fixed(self, rank: int) -> Iterable[int]:
        return (self.axis,)

    def settings(self) -> str:
        return f"axis {self.axis} by {self.left}, {self.right}"


@dataclass(frozen=True, slots=True)
class Stuff(Step):
    """Insert zeros between the positions of an axis (the adjoint of a strided slice)."""

    name: ClassVar[str] = "embed"
    computes: ClassVar[bool] = False
    axis: int
    step: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        size = (shapes[0][self.axis] - 1) * self.step + 1
        return with_axis(shapes[0], self.axis, size)

    def fixed(self, rank: int) -> Iterable[int]:
        return (self.axis,)

    def settings(self) -> str:
        return f"axis {self.axis} step {self.step}"


@dataclass(frozen=True, slots=True)
class Gather(Step):
    """Apply a crop in any padding mode to an axis; all its reads are inside the axis."""

    name: ClassVar[str] = "gather"
    computes: ClassVar[bool] = False
    axis: int
    pattern: IndexPattern

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return with_axis(shapes[0], self.axis, self.pattern.output_size)

    def fixed(self, rank: int) -> Iterable[int]:
        return (self.axis,)

    def runs(self) -> list[tuple[int, int, int]]:
        """The positions read, as consecutive runs (start, step, length) with a constant step, which may be 0."""
        return progressions(self.pattern.line())

    def settings(self) -> str:
        return f"axis {self.axis} by {self.pattern}"


@dataclass(frozen=True, slots=True)
class Pick(Step):
    """Read an axis at the positions listed in the second operand, a vector."""

    name: ClassVar[str] = "pick"
    computes: ClassVar[bool] = False
    axis: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return with_axis(shapes[0], self.axis, *shapes[1])

    def settings(self) -> str:
        return f"axis {self.axis}"


@dataclass(frozen=True, slots=True)
class Through:
    """One axis of a `Read`, which is a leg of a pattern and is read at given positions of the other two legs.

    Args:
        pattern: the pattern.
        target: the leg (0: i, 1: o, 2: k) that corresponds to the axis.
        first: the leg of which all positions are used.
        second: the leg whose positions are chosen.
        positions: the place of the vector of chosen positions among the step's operands.
    """

    pattern: IndexPattern
    target: int
    first: int
    second: int
    positions: int

    @property
    def sizes(self) -> Shape:
        """The sizes of the legs i, o, k."""
        return (self.pattern.input_size, self.pattern.output_size, self.pattern.kernel_size)


@dataclass(frozen=True, slots=True)
class Read(Step):
    """Read adjacent axes, each through a pattern, with zeros where a pattern does not read an entry.

    Args:
        takes: the array, followed by the vectors of positions.
        axes: how each axis is read.
        axis: the first of the adjacent axes.
        chosen_first: whether the result's axes for the chosen legs precede those for the other legs.
    """

    name: ClassVar[str] = "read"
    computes: ClassVar[bool] = False
    axes: tuple[Through, ...]
    axis: int
    chosen_first: bool

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        firsts = [axis.sizes[axis.first] for axis in self.axes]
        seconds = [math.prod(shapes[axis.positions]) for axis in self.axes]
        sizes = [*seconds, *firsts] if self.chosen_first else [*firsts, *seconds]
        return (*shapes[0][: self.axis], *sizes, *shapes[0][self.axis + len(self.axes) :])

    def settings(self) -> str:
        chosen = " ".join("iok"[axis.second] for axis in self.axes)
        return f"axis {self.axis} at chosen {chosen} of {' '.join(str(axis.pattern) for axis in self.axes)}"

    def scratch(self, taken: Sequence[Laid], result: Shape) -> int:
        return math.prod(taken[0].shape)

    def traffic(self, taken: Sequence[Laid], result: Shape) -> int:
        shape = taken[0].shape
        row = math.prod(shape[self.axis + len(self.axes) :])
        return math.prod(shape) + (_SINGLE * math.prod(result) if row == 1 else 0)


@dataclass(frozen=True, slots=True)
class Concat(Step):
    """Concatenate arrays along an axis."""

    name: ClassVar[str] = "concat"
    computes: ClassVar[bool] = False
    axis: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        size = sum(shape[self.axis] for shape in shapes)
        return with_axis(shapes[0], self.axis, size)

    def fixed(self, rank: int) -> Iterable[int]:
        return (self.axis,)

    def settings(self) -> str:
        return f"axis {self.axis}"


@dataclass(frozen=True, slots=True)
class Flip(Step):
    """The positions of some axes in reverse order."""

    name: ClassVar[str] = "flip"
    computes: ClassVar[bool] = False
    most_copies: ClassVar[int] = 128
    """With at most this many positions to flip, they are copied one after another, which keeps the last axis whole."""
    axes: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def fixed(self, rank: int) -> Iterable[int]:
        return self.axes

    def settings(self) -> str:
        return f"axes {self.axes}"

    def calls(self, shapes: Sequence[Shape], result: Shape) -> float:
        return self.pieces(result) or 1

    def pieces(self, shape: Shape) -> int:
        """The number of copies, one for each combination of positions; 0 if the framework flips in one call."""
        count = math.prod(shape[axis] for axis in self.axes)
        return 0 if len(shape) - 1 in self.axes or count > self.most_copies else count

    def traffic(self, taken: Sequence[Laid], result: Shape) -> int:
        return SCATTERED * math.prod(result) if result[-1] < _SHORT or taken[0].strides[-1] != 1 else 0
