"""How the values of a plan lie in memory: strides, what is a view of what, and the peak size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lensor import steps as s

Strides = tuple[int, ...]


def contiguous(shape: s.Shape) -> Strides:
    """Strides, in entries, of an array in row-major order."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def viewed(shape: s.Shape, strides: Strides, new: s.Shape) -> Strides | None:
    """Strides of a reshape that is a view, None where entries must be copied."""
    if 0 in shape:
        return contiguous(new)
    axes = [(size, step) for size, step in zip(shape, strides, strict=True) if size != 1]
    blocks: list[tuple[int, int]] = []  # (size, fastest stride) of runs that are contiguous in themselves
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


@dataclass(frozen=True, slots=True)
class Value:
    """How one value of a plan lies in memory: strides, and the value whose memory it is a view of."""

    strides: Strides
    source: int
    copied: bool


def layouts(steps: Sequence[s.Step], shapes: Sequence[s.Shape]) -> list[Value]:
    """The layout of every value of a program whose operands are in row-major order."""
    values: list[Value] = []
    for place, (step, shape) in enumerate(zip(steps, shapes, strict=True)):
        own = Value(contiguous(shape), place, not isinstance(step, (s.Input, s.Constant)))
        if isinstance(step, s.Multiple) and step.owned:
            before = values[step.takes[0]]
            own = Value(before.strides, before.source, False)
        elif step.is_view and step.takes:
            before, old = values[step.takes[0]], shapes[step.takes[0]]
            strides = _view_strides(step, before.strides, old, shape)
            own = own if strides is None else Value(strides, before.source, False)
        values.append(own)
    return values


def _view_strides(step: s.Step, strides: Strides, old: s.Shape, new: s.Shape) -> Strides | None:
    match step:
        case s.Reshape():
            return viewed(old, strides, new)
        case s.Transpose(order=order):
            return tuple(strides[axis] for axis in order)
        case s.Slice(axis=axis, step=every):
            return (*strides[:axis], strides[axis] * every, *strides[axis + 1 :])
        case s.Window(axis=axis, stride=stride, dilation=dilation):
            return (*strides[:axis], strides[axis] * stride, *strides[axis + 1 :], strides[axis] * dilation)
        case s.Diagonal(first=first, second=second):
            rest = [s for axis, s in enumerate(strides) if axis not in (first, second)]
            return (*rest, strides[first] + strides[second])
        case s.Expand():
            return tuple(0 if a == 1 != b else s for a, b, s in zip(old, new, strides, strict=True))
    return None


def last_uses(steps: Sequence[s.Step], result: int) -> list[int]:
    """For each value the place of the last step that takes it."""
    last = list(range(len(steps)))
    for place, step in enumerate(steps):
        for at in step.takes:
            last[at] = place
    last[result] = len(steps)
    return last


def peak_size(steps: Sequence[s.Step], shapes: Sequence[s.Shape], result: int) -> int:
    """The most entries alive at once beside operands and patterns; the result is counted."""
    values = layouts(steps, shapes)
    last = list(range(len(values)))
    for place, until in enumerate(last_uses(steps, result)):
        last[values[place].source] = max(last[values[place].source], until)
    ends: dict[int, int] = {}
    alive = peak = 0
    for place, value in enumerate(values):
        if value.copied:
            size = math.prod(shapes[place])
            alive += size
            peak = max(peak, alive + _scratch(steps[place], [shapes[at] for at in steps[place].takes], shapes[place]))
            ends[last[place]] = ends.get(last[place], 0) + size
        alive -= ends.pop(place, 0)
    return peak


def _scratch(step: s.Step, shapes: Sequence[s.Shape], result: s.Shape) -> int:
    """Entries a step needs beside operands and result while it runs."""
    if isinstance(step, s.PatchGram):
        n, g, c, *sizes = shapes[0]
        padded = n * g * c * math.prod(size + pad for size, pad in zip(sizes, step.pad, strict=True))
        return padded + len(step.lags()) * g * c * c + math.prod(result)
    if isinstance(step, s.OverlapAdd):
        return 2 * math.prod(result)
    return 0
