"""The memory layout of a plan's values: strides, views and peak size."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import NamedTuple

from lensor.plan import steps as s


class Value(NamedTuple):
    """The layout of one value: its strides, the value whose memory it uses, and whether it allocates memory."""

    strides: s.Strides
    source: int
    copied: bool


def layouts(steps: Sequence[s.Step], shapes: Sequence[s.Shape]) -> list[Value]:
    """The layout of each value of a program, for operands in row-major order."""
    values: list[Value] = []
    for place, (step, shape) in enumerate(zip(steps, shapes, strict=True)):
        own = None
        if step.is_view and step.takes:
            before = values[step.takes[0]]
            strides = step.strides(s.Laid(shapes[step.takes[0]], before.strides), shape)
            own = None if strides is None else Value(strides, before.source, False)
        elif step.in_place:
            before = values[step.takes[0]]
            own = Value(before.strides, before.source, False)
        values.append(own or Value(s.contiguous(shape), place, bool(step.takes) or not step.is_view))
    return values


def last_uses(steps: Sequence[s.Step], result: int) -> list[int]:
    """For each value, the place of the last step that uses it."""
    last = list(range(len(steps)))
    for place, step in enumerate(steps):
        for at in step.takes:
            last[at] = place
    last[result] = len(steps)
    return last


def peak_size(
    steps: Sequence[s.Step],
    shapes: Sequence[s.Shape],
    result: int,
    values: Sequence[Value],
    constants: Container[int] = (),
) -> int:
    """Maximum number of entries alive at once, including the result but not operands, patterns and other constants."""
    last = list(range(len(values)))
    for place, until in enumerate(last_uses(steps, result)):
        last[values[place].source] = max(last[values[place].source], until)
    ends: dict[int, int] = {}
    alive = peak = 0
    for place, value in enumerate(values):
        if value.copied and place not in constants:
            size = math.prod(shapes[place])
            alive += size
            taken = [s.Laid(shapes[at], values[at].strides) for at in steps[place].takes]
            peak = max(peak, alive + steps[place].scratch(taken, shapes[place]))
            ends[last[place]] = ends.get(last[place], 0) + size
        alive -= ends.pop(place, 0)
    return max(peak, alive + put_in_order(shapes, values, result))


def moved(steps: Sequence[s.Step], shapes: Sequence[s.Shape], result: int, values: Sequence[Value]) -> list[int]:
    """The number of entries that each step reads and writes (its operands and result); 0 if the result is a view.

    The last step includes copying the result into row-major order, if it is not already in this order.
    """
    sizes = [math.prod(shape) for shape in shapes]
    found = [
        sizes[place] + sum([sizes[at] for at in step.takes]) if value.copied else 0
        for place, (step, value) in enumerate(zip(steps, values, strict=True))
    ]
    found[result] += 2 * put_in_order(shapes, values, result)
    return found


def put_in_order(shapes: Sequence[s.Shape], values: Sequence[Value], result: int) -> int:
    """The number of entries to copy to put a result into row-major order; 0 if it already is in this order."""
    shape = shapes[result]
    ordered = all(
        size == 1 or found == wanted
        for size, found, wanted in zip(shape, values[result].strides, s.contiguous(shape), strict=True)
    )
    return 0 if ordered else math.prod(shape)
