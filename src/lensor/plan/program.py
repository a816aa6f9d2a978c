"""Programs: the steps of a plan under construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from lensor.plan.steps import (
    Concat,
    Flip,
    Gather,
    Gram,
    MatMul,
    Multiple,
    Multiply,
    Pad,
    PatternProduct,
    Reshape,
    Shape,
    Slice,
    Step,
    Transpose,
    Window,
)

_COPIES = (Concat, Flip, Gather, Pad, Reshape, Slice, Transpose, Window)
"""Steps that only copy entries or insert zeros, so that their operands can be scaled instead of their results."""


class Program:
    """Steps under construction, with hash-consing: a step that already exists is not added again."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.shapes: list[Shape] = []
        self._known: dict[Step, int] = {}

    def add(self, step: Step) -> int:
        """Add a step and return the place of its value; equal steps share one value."""
        place = self._known.setdefault(step, len(self.steps))
        if place == len(self.steps):
            self.shapes.append(step.shape([self.shapes[at] for at in step.takes]))
            self.steps.append(step)
        return place

    def append(self, step: Step, shape: Shape) -> int:
        """Add a step with a value of this shape, even if an equal step exists; return the place of its value."""
        self.shapes.append(shape)
        self.steps.append(step)
        return len(self.steps) - 1

    def along(self, step: Slice | Pad | Gather) -> int:
        """Add a step along one axis; consecutive steps of this kind are sorted by axis, to share equal values."""
        before = self.steps[step.takes[0]]
        if not isinstance(before, (Slice, Pad, Gather)) or before.axis <= step.axis:
            return self.add(step)
        inner = self.along(step.taking(before.takes))
        return self.add(before.taking((inner,)))

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
            case MatMul() | Gram() | PatternProduct():
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
            case Multiple():
                factor *= step.factor
                return step.takes[0] if factor == 1 else self.add(Multiple(step.takes, factor))
        if self._has_small_sources(value):
            return self._with_sources(value, {at: self.scaled(at, factor) for at in self._sources(value)})
        return self.add(Multiple((value,), factor))

    def _has_small_sources(self, value: int) -> bool:
        """Whether a value is made of values that have fewer entries in total, by copies, views and zeros only."""
        return sum(math.prod(self.shapes[at]) for at in self._sources(value)) < math.prod(self.shapes[value])

    def _sources(self, value: int) -> set[int]:
        """The values whose entries a value consists of: it is computed from them by copies, views and zeros only."""
        step = self.steps[value]
        if step.computes or not isinstance(step, _COPIES):
            return {value}
        return set().union(*(self._sources(at) for at in step.takes))

    def _with_sources(self, value: int, new: dict[int, int]) -> int:
        """Add the copies and views from which a value is made again, with other sources."""
        if value in new:
            return new[value]
        step = self.steps[value]
        return self.add(step.taking(tuple([self._with_sources(at, new) for at in step.takes])))

    def is_scaled_for_free(self, value: int) -> bool:
        """Whether `scaled` changes a product, or scales fewer entries than the value has."""
        step = self.steps[value]
        if isinstance(step, (Reshape, Transpose)):
            return self.is_scaled_for_free(step.takes[0])
        return isinstance(step, (MatMul, Gram, PatternProduct, Multiple)) or self._has_small_sources(value)

    def unpadded(self, value: int) -> tuple[int, Shape, Shape]:
        """The part of a value that is not padding, the shape of the whole, and the start of the part in the whole.

        The shape of the whole may differ from that of the value by a regrouping of axes.
        """
        part, starts = self._part(value)
        step = self.steps[value]
        if part == value and isinstance(step, Reshape):
            (value,) = step.takes
            part, starts = self._part(value)
        return part, self.shapes[value], tuple(starts)

    def _part(self, value: int) -> tuple[int, list[int]]:
        """The part of a value that is not padding, with as many axes as the value, and its start along each axis."""
        step, shape = self.steps[value], self.shapes[value]
        whole = value, [0] * len(shape)
        if not isinstance(step, (Pad, Transpose, Reshape)):
            return whole
        (before,) = step.takes
        part, starts = self._part(before)
        if isinstance(step, Pad):
            starts[step.axis] += step.left
            return part, starts
        if part == before:
            return whole
        if isinstance(step, Transpose):
            return self.transpose(part, step.order), [starts[axis] for axis in step.order]
        # Only axes of length 1 may be inserted: then each other axis has its place.
        sizes, parts = iter(self.shapes[before]), iter(zip(starts, self.shapes[part], strict=True))
        new: list[tuple[int, int]] = []
        ahead = next(sizes, None)
        for size in shape:
            if size == ahead:
                new.append(next(parts))
                ahead = next(sizes, None)
            elif size == 1:
                new.append((0, 1))
            else:
                return whole
        if ahead is not None:
            return whole
        return self.reshape(part, tuple(size for _, size in new)), [start for start, _ in new]
