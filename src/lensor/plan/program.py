"""Programs: the steps of a plan under construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from lensor.plan.steps import (
    Gather,
    Gram,
    MatMul,
    Multiple,
    Multiply,
    Pad,
    PatchGram,
    Reshape,
    Shape,
    Slice,
    Step,
    Transpose,
)


class Program:
    """Steps under construction, with hash-consing: a step that already exists is not added again."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.shapes: list[Shape] = []
        self._known: dict[Step, int] = {}

    def add(self, step: Step) -> int:
        """Add a step and return the place of its value; equal steps share one value."""
        place = self._known.get(step)
        if place is None:
            place = len(self.steps)
            self.steps.append(step)
            self.shapes.append(step.shape([self.shapes[at] for at in step.takes]))
            self._known[step] = place
        return place

    def along(self, step: Slice | Pad | Gather) -> int:
        """Add a step along one axis; consecutive steps of this kind are sorted by axis, to share equal values."""
        before = self.steps[step.takes[0]]
        if not isinstance(before, (Slice, Pad, Gather)) or before.axis <= step.axis:
            return self.add(step)
        inner = self.along(replace(step, takes=before.takes))
        return self.add(replace(before, takes=(inner,)))

    def reshape(self, value: int, size: Shape) -> int:
        """Reshape a value; return the value itself if it already has this shape."""
        before = self.steps[value]
        if isinstance(before, Reshape):
            (value,) = before.takes
        return value if self.shapes[value] == size else self.add(Reshape((value,), size))

    def transpose(self, value: int, order: Sequence[int]) -> int:
        """Permute the axes of a value; return the value itself if the order does not change."""
        order, before = tuple(order), self.steps[value]
        if isinstance(before, Transpose):
            order, (value,) = tuple(before.order[axis] for axis in order), before.takes
        return value if order == tuple(range(len(order))) else self.add(Transpose((value,), order))

    def scaled(self, value: int, factor: Fraction) -> int:
        """Multiply a value by a number; a matrix product includes the factor for free, an outer product cheaply."""
        step = self.steps[value]
        match step:
            case MatMul() | Gram() | PatchGram():
                return self.add(replace(step, factor=step.factor * factor))
            case Reshape(size=size):
                return self.reshape(self.scaled(step.takes[0], factor), size)
            case Transpose(order=order):
                return self.transpose(self.scaled(step.takes[0], factor), order)
            case Multiply(takes=takes):
                sizes = [math.prod(self.shapes[at]) for at in takes]
                if 2 * min(sizes) <= math.prod(self.shapes[value]):  # an outer product: scale the smaller factor
                    small = sizes.index(min(sizes))
                    scaled = [self.scaled(at, factor) if place == small else at for place, at in enumerate(takes)]
                    return self.add(Multiply(tuple(scaled)))
        return self.add(Multiple((value,), factor))
