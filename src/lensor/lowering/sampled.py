"""Selections of positions that are known only at run time, as in sampled backpropagation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lensor.lowering.intake import take
from lensor.lowering.state import Leg, Selection, State, Tensor, has_repeats
from lensor.network import Group, Ones, Pattern, indices_of
from lensor.plan import steps as s

_ROW = 16
"""Minimum number of entries in a row for which whole rows are read at the chosen positions."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """An axis of a tensor that is read through a pattern, at chosen positions of another leg of the pattern.

    Args:
        node: the pattern.
        target: the leg of the pattern that is an axis of the tensor.
        chosen: the leg whose positions are chosen.
        selection: the selection that chooses these positions.
    """

    node: Pattern
    target: Leg
    chosen: Leg
    selection: Selection

    @property
    def axis(self) -> Group:
        """The indices of the axis that is read."""
        return self.node.legs[self.target]


def read_chosen(state: State) -> None:
    """Read tensors at the chosen positions where possible; otherwise put the chosen entries into zeros."""
    _apply(state, placed=False)


def place_chosen(state: State) -> None:
    """Put the chosen entries at their positions in an array of zeros."""
    _apply(state, placed=True)


def _apply(state: State, placed: bool) -> None:
    readings: list[_Reading] = []
    waiting, state.selections = state.selections, []
    while waiting:
        selection = waiting.pop(0)
        full, chosen = selection.full, selection.chosen
        others = [leg for one in waiting for leg in (one.full, one.chosen)]
        if full and not set(full) & set(state.open) and not _is_held(state, full, others):
            # No other node uses the full index, and Σ_i [i = p_j] = 1.
            for index in chosen:
                if not _is_held(state, (index,), others):
                    take(state, Ones(index))
            continue
        found = None if placed else _readings(state, selection, others, readings)
        if found is None:
            place(state, selection)
            continue
        for tensor in [tensor for tensor in state.tensors_on(full) if set(full) <= set(tensor.indices)]:
            merged, axis, rest = state.merged(tensor, full)
            picked = state.program.add(s.Pick((merged, selection.positions), axis))
            new = state.ungrouped(picked, rest[:axis], chosen, rest[axis:])
            state.replace(tensor, state.without_repeats(new.value, new.indices))
        readings += found
        state.drop(*(reading.node for reading in found))
    for tensor in state.tensors:
        mine = [reading for reading in readings if set(reading.axis) & set(tensor.indices)]
        if mine:
            state.replace(tensor, _read(state, tensor, mine))


def _is_held(state: State, group: Group, others: Sequence[Group]) -> bool:
    """Whether an index of a group appears on a tensor, on a pattern, or in `others`."""
    return bool(state.tensors_on(group) or state.patterns_on(group) or any(set(group) & set(leg) for leg in others))


def _readings(
    state: State, selection: Selection, others: Sequence[Group], before: Sequence[_Reading]
) -> list[_Reading] | None:
    """Readings through all patterns on the selection's full index; None if a node on it cannot be read this way."""
    full, inner = selection.full, set(selection.full)
    taken = inner.union(*others)
    holders, held = state.tensors_on(full), state.patterns_on(full)
    if not full or inner & set(state.open) or any(not inner <= set(tensor.indices) for tensor in holders):
        return None
    if any(inner & set(leg) for leg in others) or not (holders or held):
        return None
    found = []
    for node in held:
        target = None
        if node.legs.count(full) == 1 and not has_repeats(node) and not set(indices_of(node)) & set(selection.chosen):
            chosen = Leg(node.legs.index(full))
            target = _target(state, node, chosen, {*selection.chosen, *taken}, [reading.node for reading in before])
            if target is not None:
                found.append(_Reading(node, target, chosen, selection))
        if target is None:
            return None
    return found


def _target(state: State, node: Pattern, chosen: Leg, taken: set[str], gone: Sequence[Pattern]) -> Leg | None:
    """If positions of the leg `chosen` are selected, the leg of the pattern that only tensors share, or None."""
    ways = {Leg.INPUT: (Leg.OUTPUT,), Leg.OUTPUT: (Leg.INPUT,), Leg.KERNEL: (Leg.INPUT, Leg.OUTPUT)}
    for target in ways[chosen]:
        if target == Leg.OUTPUT and node.pattern.padding_mode != "zeros":
            continue  # several outputs may read the same position
        leg, rest = set(node.legs[target]), set(node.legs[Leg.third(target, chosen)])
        if not leg or leg & {*state.open, *taken} or state.patterns_on(leg, node):
            continue
        if any(leg & set(indices_of(other)) for other in gone if other is not node):
            continue
        holders = state.tensors_on(leg)
        if holders and all(leg <= set(one.indices) and not {*taken, *rest} & set(one.indices) for one in holders):
            return target
    return None


def _read(state: State, tensor: Tensor, readings: Sequence[_Reading]) -> Tensor:
    """Read a tensor through patterns, at chosen positions of another leg of each pattern.

    If the innermost of the remaining axes is long enough, it stays last, so that whole rows are read instead of single
    entries. The chosen positions then precede the kernel positions, ready for a product over the kernel positions,
    unless another pattern reads the rows first.
    """
    readings = sorted(readings, key=lambda reading: tensor.indices.index(reading.axis[0]))
    axes = [reading.axis for reading in readings]
    rest = [index for index in tensor.indices if not any(index in axis for axis in axes)]
    row = [index for index in rest[-1:] if state.sizes[index] >= _ROW]
    rest = rest[: len(rest) - len(row)]
    order = [*rest, *(index for axis in axes for index in axis), *row]
    sizes = (*state.shape(rest), *(state.size(axis) for axis in axes), *state.shape(row))
    merged = state.matrix(tensor, order, sizes)
    chosen_first = bool(row) and not state.patterns_on(row)
    through, free, chosen = [], [], []
    for at, reading in enumerate(readings, start=1):
        third = Leg.third(reading.target, reading.chosen)
        through.append(s.Through(reading.node.pattern, reading.target, third, reading.chosen, at))
        free += reading.node.legs[third]
        chosen += reading.selection.chosen
    takes = (merged, *(reading.selection.positions for reading in readings))
    value = state.program.add(s.Read(takes, tuple(through), len(rest), chosen_first))
    found = [*rest, *(chosen + free if chosen_first else free + chosen), *row]
    return state.without_repeats(state.program.reshape(value, state.shape(found)), found)


def place(state: State, selection: Selection) -> None:
    """Put the selected entries into zeros if they are on one tensor only; otherwise add the selection as a matrix."""
    full, chosen, program = selection.full, selection.chosen, state.program
    size = state.size(full)
    holders = state.tensors_on(chosen)
    waiting = {index for one in state.selections for index in (*one.full, *one.chosen)}
    alone = len(holders) == 1 and not state.patterns_on(chosen) and not set(chosen) & waiting.union(state.open)
    fits = alone and set(chosen) <= set(holders[0].indices) and not set(full) & set(holders[0].indices)
    if full and chosen and fits:
        merged, axis, rest = state.merged(holders[0], chosen)
        put = program.add(s.Put((merged, selection.positions), axis, size))
        state.replace(holders[0], state.ungrouped(put, rest[:axis], full, rest[axis:]))
        return
    picked = program.add(s.Pick((program.add(s.Identity((), size)), selection.positions), 1))
    both = [*full, *chosen]
    state.add(state.without_repeats(program.reshape(picked, state.shape(both)), both))
