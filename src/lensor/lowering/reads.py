"""Values as reads: the positions at which a value reads an earlier value, through views, copies, pads and gathers.

A value that only copies entries of an earlier value, such as unfolded patches, is described by an `Axis` for each axis
of the earlier value. A step that reads through such axes does not need the copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lensor.affine import Piece, affine
from lensor.plan import Program
from lensor.plan import steps as s


class Reads(NamedTuple):
    """A value that is read, and how each of its axes is read."""

    value: int
    axes: tuple[s.Axis, ...]


def reads_of(program: Program, value: int, indices: Sequence[int]) -> Reads:
    """Describe a value, which has these indices on its axes, as reads of the earliest possible value."""
    found = Reads(value, tuple([s.Axis((s.Term(index, s.IDENTITY),)) for index in indices]))
    while True:
        step = program.steps[found.value]
        back = _BACK.get(type(step))
        if back is None:
            return found
        (before,) = step.takes
        axes = back(step, program.shapes[before], program.shapes[found.value], found.axes)
        if axes is None:
            return found
        found = Reads(before, tuple(axes))


_Axes = Sequence[s.Axis]

_NOTHING = s.Axis(())
"""The only position of an axis of length 1."""


def _through(step: Any, line: tuple[Piece, ...], axes: _Axes) -> _Axes:
    return [axis.through(line) if at == step.axis else axis for at, axis in enumerate(axes)]


def _slice(step: s.Slice, before: s.Shape, after: s.Shape, axes: _Axes) -> _Axes:
    return _through(step, affine(step.count, step.step, step.start), axes)


def _pad(step: s.Pad, before: s.Shape, after: s.Shape, axes: _Axes) -> _Axes:
    size = before[step.axis]
    return _through(step, (Piece(step.left, step.left + size, 1, -step.left),), axes)


def _stuff(step: s.Stuff, before: s.Shape, after: s.Shape, axes: _Axes) -> _Axes:
    return _through(
        step, tuple(Piece(at * step.step, at * step.step + 1, 0, at) for at in range(before[step.axis])), axes
    )


def _gather(step: s.Gather, before: s.Shape, after: s.Shape, axes: _Axes) -> _Axes:
    return _through(step, step.pattern.line(), axes)


def _flip(step: s.Flip, before: s.Shape, after: s.Shape, axes: _Axes) -> _Axes:
    return [
        axis.through((Piece(0, before[at], -1, before[at] - 1),)) if at in step.axes else axis
        for at, axis in enumerate(axes)
    ]


def _transpose(step: s.Transpose, before: s.Shape, after: s.Shape, axes: _Axes) -> _Axes:
    found = dict(zip(step.order, axes, strict=True))
    return [found[at] for at in range(len(axes))]


def _expand(step: s.Expand, before: s.Shape, after: s.Shape, axes: _Axes) -> _Axes | None:
    repeated = [a != b for a, b in zip(before, after, strict=True)]
    if any(not axis.is_plain for axis, gone in zip(axes, repeated, strict=True) if gone):
        return None  # it may not read some of the repetitions
    return [_NOTHING if gone else axis for axis, gone in zip(axes, repeated, strict=True)]


def _diagonal(step: s.Diagonal, before: s.Shape, after: s.Shape, axes: _Axes) -> _Axes:
    *others, last = axes
    rest = iter(others)
    return [last if at in (step.first, step.second) else next(rest) for at in range(len(before))]


def _window(step: s.Window, before: s.Shape, after: s.Shape, axes: _Axes) -> _Axes | None:
    *others, kernel = axes
    output = others[step.axis]
    if not (output.can_be_added and kernel.can_be_added):
        return None
    others[step.axis] = _sum(output.times(step.stride), kernel.times(step.dilation))
    return others


def _sum(one: s.Axis, two: s.Axis) -> s.Axis:
    return s.Axis((*one.terms, *two.terms))


def _reshape(step: s.Reshape, before: s.Shape, after: s.Shape, axes: _Axes) -> _Axes | None:
    """Read an axis that is split into several; give up where several axes are merged."""
    if any(size == 1 and not axis.is_plain for size, axis in zip(after, axes, strict=True)) or 0 in before:
        return None
    rest = [(size, axis) for size, axis in zip(after, axes, strict=True) if size != 1]
    found = []
    for size in before:
        parts, taken = [], 1
        while taken < size and rest:
            parts.append(rest.pop(0))
            taken *= parts[-1][0]
        if taken != size:
            return None
        whole = _NOTHING
        for at, (_, axis) in enumerate(parts):
            if len(parts) == 1:
                whole = axis
            elif not axis.can_be_added:
                return None
            else:
                whole = _sum(whole, axis.times(math.prod(size for size, _ in parts[at + 1 :])))
        found.append(whole)
    return found


_BACK: dict[type[s.Step], Callable[[Any, s.Shape, s.Shape, _Axes], _Axes | None]] = {
    s.Slice: _slice,
    s.Pad: _pad,
    s.Stuff: _stuff,
    s.Gather: _gather,
    s.Flip: _flip,
    s.Transpose: _transpose,
    s.Expand: _expand,
    s.Diagonal: _diagonal,
    s.Window: _window,
    s.Reshape: _reshape,
}
