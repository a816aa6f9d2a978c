"""The interface of steps: data with methods for shape, flops, memory and rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self, TypeAlias

Shape: TypeAlias = tuple[int, ...]


def with_axis(shape: Shape, axis: int, *sizes: int) -> Shape:
    """Replace one axis of a shape by axes of the given sizes."""
    return (*shape[:axis], *sizes, *shape[axis + 1 :])


Strides: TypeAlias = tuple[int, ...]


class Laid(NamedTuple):
    """The memory layout of an array.

    Args:
        shape: shape of the array.
        strides: for each axis, the number of entries from one position to the next.
    """

    shape: Shape
    strides: Strides


class Rate(NamedTuple):
    """The speed of a step, as a multiple of a device's rate.

    Args:
        of: the kind of calls whose rate to use, a field of the planner's `Speeds`.
        share: the step's rate with its shapes, divided by the device's rate.
    """

    of: str
    share: float


PARALLEL = 1 << 15
"""Frameworks use several threads for arrays with more entries than this."""

SCATTERED = 3
"""Each entry copied in short runs costs as much as moving this many extra entries."""

SHORT_RUN = 16
"""Runs with fewer entries than this are short."""


def contiguous(shape: Shape) -> Strides:
    """The strides, in entries, of an array in row-major order."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * (shape[axis] or 1)
    return tuple(strides)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its name, the values that it uses, and (in subclasses) its settings.

    The methods provide everything that the planner and the runtime need, so neither depends on the type of a step.
    Sizes are in entries.
    """

    name: ClassVar[str] = "step"
    is_view: ClassVar[bool] = False
    """Whether the result is a view of the first operand, if its strides allow it."""
    overlaps: ClassVar[bool] = False
    """Whether several entries of the view may share the same memory."""
    computes: ClassVar[bool] = True
    """Whether the result's entries are sums or products; if not, they are copied from operands, or zeros or ones."""
    adds_in_several: ClassVar[bool] = False
    """Whether kernels compute a sum in several operations, each of which rounds."""
    accumulates: ClassVar[bool] = False
    """Whether kernels add, square and scale in float32 and only then round to the dtype of the operands."""
    is_product: ClassVar[bool] = False
    """Whether a bias can be added to the result without more rounding than in the step alone."""
    resized: ClassVar[tuple[str, ...]] = ()
    """The settings that are sizes of axes, or factors that may contain such a size."""
    is_checked: ClassVar[bool] = False
    """Whether plans keep the step even if nothing uses its value, since running it checks an operand."""
    takes: tuple[int, ...]

    def taking(self, takes: tuple[int, ...]) -> Self:
        """The same step for other values."""
        if takes == self.takes:
            return self
        return type(self)(takes, *[getattr(self, name) for name in self.__match_args__[1:]])  # faster than `replace`

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of the result for operands with these shapes."""
        raise NotImplementedError

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        """Number of additions and multiplications (a multiply-add counts as 2)."""
        return 0

    def settings(self) -> str:
        """The settings as text."""
        return ""

    # -------------------------------------------------------------------------------------------------------- sizes
    def fixed(self, rank: int) -> Iterable[int]:
        """The axes, of operands and result with `rank` axes, whose sizes the settings determine."""
        return range(rank)

    def fits(self, shapes: Sequence[Shape], result: Shape) -> bool:
        """Whether operands with these shapes give a result of this shape, as far as the settings leave it open."""
        return True

    # ------------------------------------------------------------------------------------------------------- memory
    @property
    def in_place(self) -> bool:
        """Whether the result overwrites the first operand."""
        return False

    def owning(self) -> Step | None:
        """The same step, overwriting the first operand; None if impossible. Used if no other step uses the operand."""
        return None

    def strides(self, taken: Laid, result: Shape) -> Strides | None:
        """The strides of the result as a view of the first operand; None if its entries must be copied."""
        return None

    def copies(self, taken: Sequence[Laid]) -> tuple[int, int]:
        """The number of entries that frameworks copy before the step: (in total, alive at once)."""
        return 0, 0

    def scratch(self, taken: Sequence[Laid], result: Shape) -> int:
        """Number of entries alive while the step runs, in addition to operands and result."""
        return self.copies(taken)[1]

    # --------------------------------------------------------------------------------------------------------- time
    def rate(self, shapes: Sequence[Shape], result: Shape) -> Rate:
        """The speed of the step."""
        return Rate("products", 1 / 16)

    def traffic(self, taken: Sequence[Laid], result: Shape) -> int:
        """Number of entries moved in addition to reading the operands once and writing the result once."""
        return 0

    def rewrites(self, shapes: Sequence[Shape], result: Shape) -> float:
        """The number of additional times that the result is read and written."""
        return 0

    def calls(self, shapes: Sequence[Shape], result: Shape) -> float:
        """The number of framework calls."""
        return 1

    def barriers(self, shapes: Sequence[Shape], result: Shape) -> float:
        """The number of calls that several threads share, and whose end all of them await."""
        size = max(math.prod(result), *(math.prod(shape) for shape in shapes), 0) if shapes else math.prod(result)
        return self.calls(shapes, result) if size > PARALLEL else 0
