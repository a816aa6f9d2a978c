"""Steps that sum or scale entries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

from lensor.pattern import IndexPattern
from lensor.plan.steps.base import SCATTERED, SHORT_RUN, Laid, Shape, Step, with_axis

_LARGE = 1 << 22
"""Overlapping patches with at least this many entries, which exceed every cache, are added slowly."""


@dataclass(frozen=True, slots=True)
class ScatterAdd(Step):
    """The adjoint of `Gather`: add each entry along an axis to the position that the crop reads there."""

    name: ClassVar[str] = "scatter-add"
    adds_in_several: ClassVar[bool] = True
    axis: int
    pattern: IndexPattern

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return with_axis(shapes[0], self.axis, self.pattern.input_size)

    def fixed(self, rank: int) -> Iterable[int]:
        return (self.axis,)

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(shapes[0])

    def settings(self) -> str:
        return f"axis {self.axis} by {self.pattern}"


@dataclass(frozen=True, slots=True)
class Put(Step):
    """The adjoint of `Pick`: add an axis into an axis of size `size` at the positions listed in the second operand."""

    name: ClassVar[str] = "put"
    adds_in_several: ClassVar[bool] = True
    axis: int
    size: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return with_axis(shapes[0], self.axis, self.size)

    def settings(self) -> str:
        return f"axis {self.axis}"


@dataclass(frozen=True, slots=True)
class OverlapAdd(Step):
    """The adjoint of `Window`: sum overlapping patches, with positions on `axis` and the kernel on the last axis."""

    name: ClassVar[str] = "overlap-add"
    adds_in_several: ClassVar[bool] = True
    axis: int
    length: int
    stride: int
    dilation: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0][: self.axis], self.length, *shapes[0][self.axis + 1 : -1])

    def fixed(self, rank: int) -> Iterable[int]:
        return (self.axis, rank - 1)

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(shapes[0])

    def settings(self) -> str:
        return f"axis {self.axis}, stride {self.stride}, dilation {self.dilation}"

    def scratch(self, taken: Sequence[Laid], result: Shape) -> int:
        return 2 * math.prod(result)

    def traffic(self, taken: Sequence[Laid], result: Shape) -> int:
        size = math.prod(taken[0].shape)
        return (SCATTERED if size < _LARGE else 4 * SCATTERED) * size

    def calls(self, shapes: Sequence[Shape], result: Shape) -> float:
        return 3 * shapes[0][-1]


@dataclass(frozen=True, slots=True)
class SumAxes(Step):
    """The sum over some axes."""

    name: ClassVar[str] = "sum"
    axes: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return tuple(size for axis, size in enumerate(shapes[0]) if axis not in self.axes)

    def fixed(self, rank: int) -> Iterable[int]:
        return ()

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(shapes[0])

    def settings(self) -> str:
        return f"over {self.axes}"


@dataclass(frozen=True, slots=True)
class SumSquares(Step):
    """The sum of squared entries over some axes, without conjugation."""

    name: ClassVar[str] = "sum of squares"
    most_terms: ClassVar[int] = 256
    """With at most this many terms, frameworks add one after another, without an array for all squares."""
    axes: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return tuple(size for axis, size in enumerate(shapes[0]) if axis not in self.axes)

    def fixed(self, rank: int) -> Iterable[int]:
        return ()

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return 2 * math.prod(shapes[0])

    def settings(self) -> str:
        return f"over {self.axes}"

    def calls(self, shapes: Sequence[Shape], result: Shape) -> float:
        terms = math.prod(shapes[0]) // max(math.prod(result), 1)
        return terms if terms <= self.most_terms else 2


@dataclass(frozen=True, slots=True)
class Add(Step):
    """The sum of two arrays with the same shape."""

    name: ClassVar[str] = "add"
    owned: bool = False
    """Whether no other step uses the first array, so that the second array may be added to it in place."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def fixed(self, rank: int) -> Iterable[int]:
        return ()

    def fits(self, shapes: Sequence[Shape], result: Shape) -> bool:
        return shapes[0] == shapes[1]

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(result)

    @property
    def in_place(self) -> bool:
        return self.owned

    def owning(self) -> Step:
        return replace(self, owned=True)


@dataclass(frozen=True, slots=True)
class AddAt(Step):
    """The first array, with the second, which is smaller, added to the part that begins at `starts`."""

    name: ClassVar[str] = "add at"
    starts: Shape
    owned: bool = False
    """Whether no other step uses the first array, so that the second array may be added to it in place."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(shapes[1])

    def part(self, small: Shape) -> tuple[slice, ...]:
        """The part of the first array to which an array of shape `small` is added."""
        return tuple(slice(start, start + size) for start, size in zip(self.starts, small, strict=True))

    def settings(self) -> str:
        return f"from {self.starts}"

    @property
    def in_place(self) -> bool:
        return self.owned

    def owning(self) -> Step:
        return replace(self, owned=True)

    def traffic(self, taken: Sequence[Laid], result: Shape) -> int:
        part = taken[1].shape
        run = 1
        for size, whole in zip(reversed(part), reversed(result), strict=True):
            run *= size
            if size < whole:
                break
        return (2 if run >= SHORT_RUN else 2 + SCATTERED) * math.prod(part)


@dataclass(frozen=True, slots=True)
class Multiple(Step):
    """The product of a number and an array."""

    name: ClassVar[str] = "scale"
    resized: ClassVar[tuple[str, ...]] = ("factor",)
    adds_in_several: ClassVar[bool] = True
    factor: Fraction
    owned: bool = False
    """Whether no other step uses the array, so that it may be scaled in place."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def fixed(self, rank: int) -> Iterable[int]:
        return ()

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(result)

    def settings(self) -> str:
        return f"by {self.factor}"

    @property
    def in_place(self) -> bool:
        return self.owned

    def owning(self) -> Step:
        return replace(self, owned=True)
