"""What a step is: data that knows its own shape, flops, memory and rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

Shape: TypeAlias = tuple[int, ...]


def with_axis(shape: Shape, axis: int, *sizes: int) -> Shape:
    """A shape with one axis of another size, or several for one."""
    return (*shape[:axis], *sizes, *shape[axis + 1 :])


Strides: TypeAlias = tuple[int, ...]


class Laid(NamedTuple):
    """How an array lies in memory.

    Args:
        shape: its shape.
        strides: entries from one position of each axis to the next.
    """

    shape: Shape
    strides: Strides


class Rate(NamedTuple):
    """How fast a step computes: a share of a rate of the machine.

    Args:
        of: "products" or "convolutions", as in `Machine`.
        share: what of it the step reaches.
    """

    of: str
    share: float


SCATTERED = 3
"""Entries that are copied in short runs cost this many more each."""


def contiguous(shape: Shape) -> Strides:
    """Strides, in entries, of an array in row-major order."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True)
class Step:
    """One step: a name, the values it takes, and (in subclasses) its settings.

    A step says all that the rest of the planner and the runtime want to know of it, so that none of them asks for its
    type. Sizes are in entries.
    """

    name: ClassVar[str] = "step"
    is_view: ClassVar[bool] = False
    """Whether the result is the memory of the first array that is taken, where its strides allow it."""
    overlaps: ClassVar[bool] = False
    """Whether entries of the view may lie in one place of memory."""
    computes: ClassVar[bool] = True
    """Whether results are sums or products; else entries are those of what is taken, or zeros and ones."""
    adds_in_several: ClassVar[bool] = False
    """Whether kernels add up in several operations, each of which rounds."""
    is_product: ClassVar[bool] = False
    """Whether adding a bias to the result is a part of it, as far as rounding is concerned."""
    takes: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of the result for operands of these shapes."""
        raise NotImplementedError

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        """Additions and multiplications (a multiply-add counts 2)."""
        return 0

    def settings(self) -> str:
        """The settings as text."""
        return ""

    # ------------------------------------------------------------------------------------------------------- memory
    @property
    def in_place(self) -> bool:
        """Whether the result is written into the first array that is taken."""
        return False

    def strides(self, taken: Laid, result: Shape) -> Strides | None:
        """The strides of a view of the first array that is taken; None where its entries must be copied."""
        return None

    def copies(self, taken: Sequence[Laid]) -> tuple[int, int]:
        """Entries that frameworks copy first: in all, and alive at once."""
        return 0, 0

    def scratch(self, taken: Sequence[Laid], result: Shape) -> int:
        """Entries alive while it runs, besides what it takes and its result."""
        return self.copies(taken)[1]

    # --------------------------------------------------------------------------------------------------------- time
    def rate(self, shapes: Sequence[Shape], result: Shape) -> Rate:
        """How fast it computes."""
        return Rate("products", 1 / 16)

    def traffic(self, taken: Sequence[Laid], result: Shape) -> int:
        """Entries moved, besides reading once what is taken and writing the result once."""
        return 0

    def rewrites(self, shapes: Sequence[Shape], result: Shape) -> float:
        """How many times more the result is read and written."""
        return 0

    def calls(self, shapes: Sequence[Shape], result: Shape) -> float:
        """Calls of the framework."""
        return 1
