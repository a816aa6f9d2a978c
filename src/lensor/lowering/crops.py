"""Crops: patterns with kernel size 1, which slice, pad, crop or spread an axis without arithmetic operations."""

from __future__ import annotations

from fractions import Fraction

from lensor.lowering.state import Late, State, Tensor, has_repeats
from lensor.network import Group, Pattern, indices_of
from lensor.pattern import IndexPattern
from lensor.plan import steps as s


def read_crops(state: State) -> None:
    """Apply every crop to the tensors that carry its input leg, or defer it until everything is contracted."""
    _apply(state, late=False)


def read_crops_late(state: State) -> None:
    """Apply crops like `read_crops`, but defer a crop that applies to only one of two copies of a tensor or pattern.

    The two copies can then share one computation.
    """
    _apply(state, late=True)


def _apply(state: State, late: bool) -> None:
    progress = True
    while progress:
        progress = False
        crops = [node for node in state.patterns if node.pattern.is_crop and not node.legs[2]]
        for node in sorted(crops, key=lambda node: _order(state, node)):
            if (late and _read_late(state, node)) or _gather(state, node) or _put_off(state, node):
                state.drop(node)
                progress = True


def _order(state: State, node: Pattern) -> tuple[bool, int]:
    """Sort crops to one position first, then by axis, so that copies of an operand are cropped in the same order."""
    i, o, _ = node.legs
    places = [tensor.indices.index(index) for tensor in state.tensors for index in i if index in tensor.indices]
    return bool(o), min(places, default=0)


def carriers(state: State, node: Pattern, repeats: bool = False) -> list[Tensor] | None:
    """The tensors that carry the input leg of a pattern; None if another pattern or the output also contains it.

    With `repeats`, the tensors may also carry the other legs of the pattern.
    """
    i, o, k = node.legs
    if not i or has_repeats(node) or set(i) & set(state.open) or state.patterns_on(i, node):
        return None
    holders = state.tensors_on(i)
    others = {*o, *k}
    fits = all(set(i).issubset(one.indices) and (repeats or others.isdisjoint(one.indices)) for one in holders)
    return holders if holders and fits else None


def _gather(state: State, node: Pattern) -> bool:
    """Apply a crop to the tensors that carry its input leg: Σ_i f(i) g(i) [i = r(o)] = f(r(o)) g(r(o))."""
    i, o, _ = node.legs
    holders = carriers(state, node, repeats=True)
    if holders is None or node.pattern.is_zero:
        return False
    for tensor in holders:
        value, axis, rest = state.merged(tensor, i)
        new = state.ungrouped(read(state, value, axis, node.pattern), rest[:axis], o, rest[axis:])
        state.replace(tensor, state.without_repeats(new.value, new.indices))
    return True


def read(state: State, value: int, axis: int, pattern: IndexPattern) -> int:
    """Apply a crop to an axis of a value."""
    if pattern.padding_mode != "zeros":
        return state.program.along(s.Gather((value,), axis, pattern))
    low, count = pattern.span()
    start = low * pattern.stride - pattern.padding[0]
    if (start, pattern.stride, count) != (0, 1, pattern.input_size):
        value = state.program.along(s.Slice((value,), axis, start, pattern.stride, count))
    right = pattern.output_size - low - count
    return state.program.along(s.Pad((value,), axis, low, right)) if low or right else value


def _exchange(state: State, group: Group, new: Group, at_end: bool = False) -> None:
    """Replace the indices of one group by those of a new group in the output."""
    at = len(state.open) if at_end and not group else state.open.index(group[0])
    rest = [index for index in state.open if index not in group]
    at -= sum(index in group for index in state.open[:at])
    state.open = [*rest[:at], *new, *rest[at:]]


def _put_off(state: State, node: Pattern) -> bool:
    """Defer a crop whose input leg is in the output until everything is contracted."""
    pattern, (i, o, _) = node.pattern, node.legs
    if pattern.is_zero or not i or len({*i, *o}) < len((*i, *o)):
        return False
    inside = state.tensors_on(i) or state.patterns_on(i, node)
    if inside or not set(i) <= set(state.open) or set(o) & set(state.open) or set(i) & set(o):
        return False
    if o and not state.tensors_on(o) and not state.patterns_on(o, node):
        return False
    for index in o:
        if not state.tensors_on((index,)) and not state.patterns_on((index,), node):
            value = state.program.add(s.Fill((), state.shape([index]), Fraction(1)))
            state.add(Tensor(value, (index,)))
    _exchange(state, i, o)
    state.late.append(Late(pattern, o, i, reads=False))
    return True


def _read_late(state: State, node: Pattern) -> bool:
    """Defer a crop whose output leg is in the output, so that two copies of a part share one computation."""
    pattern, (i, o, _) = node.pattern, node.legs
    if not i or len({*i, *o}) < len((*i, *o)) or pattern.is_zero or set(i) & set(state.open):
        return False
    if not _is_one_sided(state, node):
        return False
    if not set(o) <= set(state.open) or state.tensors_on(o) or state.patterns_on(o, node):
        return False
    if not all(state.tensors_on((index,)) or state.patterns_on((index,), node) for index in i):
        return False
    _exchange(state, o, i, at_end=True)
    state.late.append(Late(pattern, i, o, reads=True))
    return True


def _is_one_sided(state: State, crop: Pattern) -> bool:
    """Whether a crop applies to one copy of a tensor or pattern but not to another copy."""
    read = set(crop.legs[0])
    tensors: dict[bool, set[int]] = {True: set(), False: set()}
    patterns: dict[bool, set[IndexPattern]] = {True: set(), False: set()}
    for tensor in state.tensors:
        tensors[bool(read & set(tensor.indices))].add(tensor.value)
    for node in state.patterns:
        if node is not crop:
            patterns[bool(read & set(indices_of(node)))].add(node.pattern)
    return bool(tensors[True] & tensors[False] or patterns[True] & patterns[False])


def finish_late(state: State, tensor: Tensor) -> Tensor:
    """Apply the deferred crops in reverse order."""
    for late in reversed(state.late):
        if late.reads:
            value, axis, rest = state.merged(tensor, late.before)
            tensor = state.ungrouped(read(state, value, axis, late.pattern), rest[:axis], late.after, rest[axis:])
        else:
            tensor = spread(state, tensor, late.pattern, late.before, late.after)
    return tensor


def spread(state: State, tensor: Tensor, pattern: IndexPattern, before: Group, after: Group) -> Tensor:
    """The adjoint of `read`: move the entries along `before` to the positions of `after` that the crop reads."""
    if before:
        value, axis, rest = state.merged(tensor, before)
    else:  # put a single entry at one position
        value, axis, rest = tensor.value, len(tensor.indices), tensor.indices
        value = state.program.reshape(value, (*state.shape(rest), 1))
    if pattern.padding_mode != "zeros":
        value = state.program.add(s.ScatterAdd((value,), axis, pattern))
        return state.ungrouped(value, rest[:axis], after, rest[axis:])
    low, count = pattern.span()
    if count != pattern.output_size:
        value = state.program.along(s.Slice((value,), axis, low, 1, count))
    if pattern.stride > 1 and count > 1:
        value = state.program.add(s.Stuff((value,), axis, pattern.stride))
    left = low * pattern.stride - pattern.padding[0]
    right = pattern.input_size - left - state.program.shapes[value][axis]
    if left or right:
        value = state.program.along(s.Pad((value,), axis, left, right))
    return state.ungrouped(value, rest[:axis], after, rest[axis:])
