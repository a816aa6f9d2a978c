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
        if isinstance(step, (s.Multiple, s.Add)) and step.owned:
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


_SMALL_PRODUCT = 400
"""Batched products of fewer multiplications run entry by entry, on operands of any strides."""


def product_copies(a: s.Shape, a_strides: Strides, b: s.Shape, b_strides: Strides) -> tuple[int, int]:
    """Entries that frameworks copy to multiply [batch, m, k] and [batch, k, n]: (in all, alive at once).

    They know products over one batch axis, of matrices of which one axis is contiguous: batch axes that do not merge,
    because their strides do not or because one is repeated, are copied with all repetitions, matrices with overlapping
    or gapped rows one by one.
    """
    rank = max(len(a), len(b)) - 2
    sizes = [(1,) * (rank + 2 - len(shape)) + tuple(shape[:-2]) for shape in (a, b)]
    batch = tuple(max(one, two) for one, two in zip(*sizes, strict=True))
    in_all = alive = 0
    for shape, strides in ((a, a_strides), (b, b_strides)):
        own = (0,) * (rank + 2 - len(shape)) + tuple(
            0 if size == 1 else stride for size, stride in zip(shape[:-2], strides[:-2], strict=True)
        )
        (rows, columns), (down, across) = shape[-2:], strides[-2:]
        by_rows = (across == 1 or columns == 1) and (down >= columns or rows == 1)
        by_columns = (down == 1 or rows == 1) and (across >= rows or columns == 1)
        if rank > 1 and viewed(batch, own, (math.prod(batch),)) is None:
            in_all += math.prod(batch) * rows * columns
            alive += math.prod(batch) * rows * columns
        elif not (by_rows or by_columns) and (rank == 0 or a[-2] * a[-1] * b[-1] >= _SMALL_PRODUCT):
            in_all += math.prod(batch) * rows * columns
            alive += rows * columns
    return in_all, alive


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
            taken = [(shapes[at], values[at].strides) for at in steps[place].takes]
            peak = max(peak, alive + scratch(steps[place], taken, shapes[place]))
            ends[last[place]] = ends.get(last[place], 0) + size
        alive -= ends.pop(place, 0)
    return max(peak, alive + put_in_order(shapes, values, result))


def moved(steps: Sequence[s.Step], shapes: Sequence[s.Shape], result: int) -> list[int]:
    """Entries that each step reads and writes: operands and result, none where the result is a view.

    The result is put into row-major order at the end if it is not in that order.
    """
    values = layouts(steps, shapes)
    found = [
        math.prod(shapes[place]) + sum(math.prod(shapes[at]) for at in step.takes) if value.copied else 0
        for place, (step, value) in enumerate(zip(steps, values, strict=True))
    ]
    found[result] += 2 * put_in_order(shapes, values, result)
    return found


def put_in_order(shapes: Sequence[s.Shape], values: Sequence[Value], result: int) -> int:
    """Entries of a result that are copied because they are not in row-major order; 0 for one that is."""
    shape = shapes[result]
    ordered = all(
        size == 1 or found == wanted
        for size, found, wanted in zip(shape, values[result].strides, contiguous(shape), strict=True)
    )
    return 0 if ordered else math.prod(shape)


def step_copies(step: s.MatMul | s.Gram, taken: Sequence[tuple[s.Shape, Strides]]) -> tuple[int, int]:
    """`product_copies` of a step whose operands are given by shape and strides."""
    if isinstance(step, s.MatMul):
        return product_copies(*taken[0], *taken[1])
    (*batch, rows, columns), strides = taken[0]
    return product_copies(*taken[0], (*batch, columns, rows), (*strides[:-2], strides[-1], strides[-2]))


def scratch(step: s.Step, taken: Sequence[tuple[s.Shape, Strides]], result: s.Shape) -> int:
    """Entries a step needs beside its operands, given by shape and strides, and its result while it runs."""
    if isinstance(step, (s.MatMul, s.Gram)):
        return step_copies(step, taken)[1]
    if isinstance(step, s.PatchGram):
        return _patch_gram_scratch(step, taken[0][0])
    if isinstance(step, s.OverlapAdd):
        return 2 * math.prod(result)
    if isinstance(step, s.Read):
        return math.prod(taken[0][0])
    return 0


def _patch_gram_scratch(step: s.PatchGram, shape: s.Shape) -> int:
    """The padded row of positions, and beside it products of two blocks of channels for all lags, or for a border."""
    n, g, c, *sizes = shape
    row = n * g * c * math.prod(size + pad for size, pad in zip(sizes, step.pad, strict=True))
    if c == 1:
        return row + row
    blocks = step.blocks(c)
    block, lags = -(-c // blocks), len(step.lags())
    most = g * block**2 * (lags if blocks > 1 else (lags + 1) // 2)
    for border in step.borders():
        lines = padded = n * g * block
        for axis, (size, pad) in enumerate(zip(sizes, step.pad, strict=True)):
            if axis in dict(border.fixed):
                padded *= border.count[axis]
            else:
                lines, padded = lines * size, padded * (size + 2 * pad)
        count = math.prod(border.count)
        most = max(most, lines * count + padded, lines * (1 + count) + g * block**2 * count)
    return row + most
