"""Steps without operands: inputs, patterns, and constant arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from lensor.pattern import IndexPattern
from lensor.plan.steps.base import Shape, Step


@dataclass(frozen=True, slots=True)
class Input(Step):
    """An operand of the network."""

    name: ClassVar[str] = "operand"
    resized: ClassVar[tuple[str, ...]] = ("size",)
    is_view: ClassVar[bool] = True
    computes: ClassVar[bool] = False
    operand: str
    size: Shape

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.size

    def fixed(self, rank: int) -> Iterable[int]:
        return ()

    def settings(self) -> str:
        return self.operand


@dataclass(frozen=True, slots=True)
class Positions(Input):
    """An operand that is a vector of positions below a given size."""

    name: ClassVar[str] = "positions"
    is_checked: ClassVar[bool] = True
    below: int


@dataclass(frozen=True, slots=True)
class Constant(Step):
    """A materialized pattern, summed over some of its legs (0: i, 1: o, 2: k); created once and cached."""

    name: ClassVar[str] = "pattern"
    is_view: ClassVar[bool] = True
    computes: ClassVar[bool] = False
    pattern: IndexPattern
    summed: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        sizes = (self.pattern.input_size, self.pattern.output_size, self.pattern.kernel_size)
        return tuple(size for leg, size in enumerate(sizes) if leg not in self.summed)

    def settings(self) -> str:
        return str(self.pattern) + (f" summed over {''.join('iok'[leg] for leg in self.summed)}" if self.summed else "")


@dataclass(frozen=True, slots=True)
class Fill(Step):
    """An array with all entries equal to one number."""

    name: ClassVar[str] = "fill"
    resized: ClassVar[tuple[str, ...]] = ("size", "value")
    computes: ClassVar[bool] = False
    size: Shape
    value: Fraction

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.size

    def fixed(self, rank: int) -> Iterable[int]:
        return ()


@dataclass(frozen=True, slots=True)
class Identity(Step):
    """The identity matrix for a delta between two output indices."""

    name: ClassVar[str] = "identity matrix"
    resized: ClassVar[tuple[str, ...]] = ("size",)
    computes: ClassVar[bool] = False
    size: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return (self.size, self.size)

    def fixed(self, rank: int) -> Iterable[int]:
        return ()
