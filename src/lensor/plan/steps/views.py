"""Steps whose result is a view of their operand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lensor.plan.steps.base import Laid, Shape, Step, Strides, contiguous, with_axis


@dataclass(frozen=True, slots=True)
class Reshape(Step):
    """The same entries with a different shape."""

    name: ClassVar[str] = "reshape"
    resized: ClassVar[tuple[str, ...]] = ("size",)
    is_view: ClassVar[bool] = True
    computes: ClassVar[bool] = False
    size: Shape

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.size

    def fixed(self, rank: int) -> Iterable[int]:
        return ()

    def fits(self, shapes: Sequence[Shape], result: Shape) -> bool:
        return math.prod(shapes[0]) == math.prod(result)

    def strides(self, taken: Laid, result: Shape) -> Strides | None:
        return viewed(taken.shape, taken.strides, result)


@dataclass(frozen=True, slots=True)
class Transpose(Step):
    """The same array with its axes in a different order."""

    name: ClassVar[str] = "transpose"
    is_view: ClassVar[bool] = True
    computes: ClassVar[bool] = False
    order: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return tuple(shapes[0][axis] for axis in self.order)

    def fixed(self, rank: int) -> Iterable[int]:
        return ()

    def settings(self) -> str:
        return str(self.order)

    def strides(self, taken: Laid, result: Shape) -> Strides | None:
        return tuple(taken.strides[axis] for axis in self.order)


@dataclass(frozen=True, slots=True)
class Slice(Step):
    """`count` positions of an axis: start, start + step, ..."""

    name: ClassVar[str] = "slice"
    is_view: ClassVar[bool] = True
    computes: ClassVar[bool] = False
    axis: int
    start: int
    step: int
    count: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return with_axis(shapes[0], self.axis, self.count)

    def fixed(self, rank: int) -> Iterable[int]:
        return (self.axis,)

    def settings(self) -> str:
        return f"axis {self.axis} from {self.start} step {self.step}"

    def strides(self, taken: Laid, result: Shape) -> Strides | None:
        return with_axis(taken.strides, self.axis, taken.strides[self.axis] * self.step)


@dataclass(frozen=True, slots=True)
class Window(Step):
    """The patches along an axis as a strided view, with positions on this axis and the kernel on a new last axis."""

    name: ClassVar[str] = "window"
    is_view: ClassVar[bool] = True
    overlaps: ClassVar[bool] = True
    computes: ClassVar[bool] = False
    axis: int
    positions: int
    kernel: int
    stride: int
    dilation: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0][: self.axis], self.positions, *shapes[0][self.axis + 1 :], self.kernel)

    def fixed(self, rank: int) -> Iterable[int]:
        return (self.axis,)

    def settings(self) -> str:
        return f"axis {self.axis}, kernel {self.kernel}, stride {self.stride}, dilation {self.dilation}"

    def strides(self, taken: Laid, result: Shape) -> Strides | None:
        step = taken.strides[self.axis]
        return (*with_axis(taken.strides, self.axis, step * self.stride), step * self.dilation)


@dataclass(frozen=True, slots=True)
class Diagonal(Step):
    """The diagonal of two axes of equal length, as the last axis."""

    name: ClassVar[str] = "diagonal"
    is_view: ClassVar[bool] = True
    overlaps: ClassVar[bool] = True
    computes: ClassVar[bool] = False
    first: int
    second: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        rest = [size for axis, size in enumerate(shapes[0]) if axis not in (self.first, self.second)]
        return (*rest, shapes[0][self.first])

    def fixed(self, rank: int) -> Iterable[int]:
        return ()

    def strides(self, taken: Laid, result: Shape) -> Strides | None:
        rest = [step for axis, step in enumerate(taken.strides) if axis not in (self.first, self.second)]
        return (*rest, taken.strides[self.first] + taken.strides[self.second])


@dataclass(frozen=True, slots=True)
class Expand(Step):
    """Repeat axes of length 1 to obtain the shape `size`."""

    name: ClassVar[str] = "expand"
    resized: ClassVar[tuple[str, ...]] = ("size",)
    is_view: ClassVar[bool] = True
    overlaps: ClassVar[bool] = True
    computes: ClassVar[bool] = False
    size: Shape

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.size

    def fixed(self, rank: int) -> Iterable[int]:
        return ()

    def fits(self, shapes: Sequence[Shape], result: Shape) -> bool:
        return all(before in (1, after) for before, after in zip(shapes[0], result, strict=True))

    def strides(self, taken: Laid, result: Shape) -> Strides | None:
        pairs = zip(taken.shape, result, taken.strides, strict=True)
        return tuple(0 if before == 1 != after else step for before, after, step in pairs)


def viewed(shape: Shape, strides: Strides, new: Shape) -> Strides | None:
    """The strides of an array reshaped as a view; None if its entries must be copied."""
    if 0 in shape:
        return contiguous(new)
    axes = [(size, step) for size, step in zip(shape, strides, strict=True) if size != 1]
    blocks: list[tuple[int, int]] = []  # (size, fastest stride) for each run of axes that can be merged
    for size, step in axes:
        if blocks and blocks[-1][1] == size * step:
            blocks[-1] = (blocks[-1][0] * size, step)
        else:
            blocks.append((size, step))
    found: list[int] = []
    left, step = 1, 1
    for size in reversed(new):
        if size == 1:
            found.append(step * left if blocks else 1)
            continue
        if left == 1:
            if not blocks:
                return None
            left, step = blocks.pop()
        if left % size:
            return None
        found.append(step)
        step, left = step * size, left // size
    return tuple(reversed(found))
