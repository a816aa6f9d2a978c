"""Lowering of a network to a plan: lower each term with the stages of a strategy, then add the terms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from lensor.lowering.contraction import contract
from lensor.lowering.crops import finish_late
from lensor.lowering.intake import take_nodes
from lensor.lowering.sampled import place
from lensor.lowering.slicing import Parts, Slices, axis_of
from lensor.lowering.state import State, Tensor
from lensor.lowering.strategies import Strategy
from lensor.lowering.toeplitz import finish_toeplitz
from lensor.network import AnyNetwork, Network, to_text
from lensor.plan import Plan, Program
from lensor.plan import steps as s

_ONE = Fraction(1)


def lower(net: AnyNetwork, strategy: Strategy, prepared: AnyNetwork | None = None, text: str | None = None) -> Plan:
    """Lower a simplified network with one strategy.

    Args:
        net: the network.
        strategy: the strategy.
        prepared: `strategy.prepared(net)`, if it is known.
        text: `to_text(net)`, if it is known.
    """
    program = Program()
    prepared = strategy.prepared(net) if prepared is None else prepared
    result, in_turn = _lower_terms(program, prepared, strategy), len(prepared.terms) > 1
    return _pruned(text or to_text(net), program, result, strategy.name, in_turn=in_turn)


def lower_in_parts(net: AnyNetwork, strategy: Strategy, index: str, count: int, parts: Parts | None = None) -> Plan:
    """Lower a network to a plan that divides an index into parts, to use less memory.

    If the index is summed, the results for its parts are added. If it is an output index, it must be the first index of
    its leg, and the results are concatenated.

    Args:
        net: the network, before simplification.
        strategy: the strategy for all parts.
        index: the index to divide.
        count: the number of parts.
        parts: `Parts(net, index, count)`, if it is known.
    """
    parts = parts or Parts(net, index, count)
    if parts.slices is not None:
        lengths = {length for _, length in parts.bounds}
        return joined(parts, {length: lower_part(parts, strategy, length) for length in lengths})
    program = Program()
    values = (_lower_terms(program, strategy.prepared(*parts.simplified(*bounds)), strategy) for bounds in parts.bounds)
    return _joined(program, parts, strategy.name, values)


def lower_part(parts: Parts, strategy: Strategy, length: int) -> Plan:
    """Lower a part with this many positions of the index, for slices of the operands."""
    simplified, known = parts.simplified(0, length)
    return lower(simplified, strategy, strategy.prepared(simplified, known))


def joined(parts: Parts, plans: Mapping[int, Plan]) -> Plan:
    """The plan for a network in parts, given the plans of a strategy for parts of each length."""
    program, strategy = Program(), next(iter(plans.values())).strategy
    values = (_repeated(program, parts, start, plans[length]) for start, length in parts.bounds)
    return _joined(program, parts, strategy, values)


def first_parts(plan: Plan, count: int, slices: Slices) -> Plan | None:
    """The plan for the first parts of a plan from `joined` whose parts have size 1, or None.

    This is the plan for a shorter index, if it has no factor that depends on its size. The values of the parts must be
    added, and each operand must have the index on one axis, since its other axes are not sliced.
    """
    assert plan.parts is not None
    if any(len(axes) > 1 for axes in slices.values()):
        return None
    result = plan.result
    for _ in range(plan.parts[1] - count):
        if not isinstance(plan.steps[result], s.Add):
            return None
        result = plan.steps[result].takes[0]
    steps, shapes = list(plan.steps[: result + 1]), list(plan.shapes[: result + 1])
    for at, step in enumerate(steps):
        if isinstance(step, s.Input):
            steps[at] = step = _with_positions(step, slices, count)
            shapes[at] = step.size
    return replace(plan, steps=tuple(steps), shapes=tuple(shapes), result=result, parts=(plan.parts[0], count))


def _repeated(program: Program, parts: Parts, start: int, plan: Plan) -> int:
    """Add the steps of a part that starts here, which slice the operands; return the place of its value."""
    assert parts.slices is not None
    size = parts.net.sizes[parts.index] or 0
    places: list[int] = []
    for step, shape in zip(plan.steps, plan.shapes, strict=True):
        if isinstance(step, s.Input):
            place = program.add(_with_positions(step, parts.slices, size))
            for axis, each in parts.slices.get(step.operand, ()):
                place = program.add(s.Slice((place,), axis, start * each, 1, shape[axis]))
        elif step.is_view and not step.takes:
            place = program.add(step)  # a pattern, which all parts share
        else:
            place = program.append(step.taking(tuple([places[at] for at in step.takes])), shape)
        places.append(place)
    return places[plan.result]


def _with_positions(step: s.Input, slices: Slices, count: int) -> s.Input:
    """The operand with this many positions of the index that `slices` divides."""
    size = list(step.size)
    for axis, each in slices.get(step.operand, ()):
        size[axis] = count * each
    return replace(step, size=tuple(size))


def _joined(program: Program, parts: Parts, strategy: str, values: Iterable[int]) -> Plan:
    """The plan for a network in parts, given the places of their values."""
    axis = axis_of(parts.net, parts.index)
    found: list[int] = []
    for value in values:
        found.append(value)
        if axis is None and len(found) > 1:
            found = [_added(program, found)]
    if len(found) > 1:
        assert axis is not None
        found = [program.add(s.Concat(tuple(found), axis))]
    return _pruned(to_text(parts.net), program, found[0], strategy, (parts.index, parts.count))


def _lower_terms(program: Program, net: AnyNetwork, strategy: Strategy) -> int:
    if len(net.terms) == 1:
        return _lower_term(program, net.terms[0], strategy, _ONE)
    # If several terms share a factor, multiply their sum by it.
    factors = Counter(term.scale.factor for term in net.terms)
    common, count = factors.most_common(1)[0]
    later = common if common and count > 1 else _ONE
    values = [_lower_term(program, term, strategy, later) for term in net.terms]
    if later == 1:
        return _added(program, values)
    if all(map(program.is_scaled_for_free, values)):
        return _added(program, [program.scaled(value, later) for value in values])
    return program.scaled(_added(program, values), later)


def _lower_term(program: Program, term: Network, strategy: Strategy, later: Fraction) -> int:
    state = State(program, term, later)
    take_nodes(state)
    if state.factor == 0:
        return _zeros(state)
    for stage in strategy.stages:
        stage(state)
    contracted = contract(state, strategy.contraction)
    return _finish(state, finish_late(state, finish_toeplitz(state, contracted)))


def _zeros(state: State) -> int:
    """Zeros that depend on every operand, so that the gradient with respect to each operand is zero."""
    state.factor = _ONE
    waiting, state.selections = state.selections, []
    for selection in waiting:
        place(state, selection)
    program = state.program
    value = program.add(s.Fill((), (), Fraction(0)))
    for tensor in state.tensors:
        nothing = tensor.value
        if tensor.indices:
            nothing = program.along(s.Slice((nothing,), 0, 0, 1, 0))
            nothing = program.add(s.SumAxes((nothing,), tuple(range(len(tensor.indices)))))
        value = program.add(s.Multiply((value, nothing)))
    state.expanded = list(state.term.output_indices)
    return _finish(state, Tensor(value, ()))


def _finish(state: State, tensor: Tensor) -> int:
    """Finish a term: order its axes as in the output, scale it, add the axes of ones, and group the axes into legs."""
    program, value = state.program, tensor.value
    order = [index for index in state.term.output_indices if index in tensor.indices]
    if tuple(order) != tensor.indices:
        value = program.transpose(value, [tensor.indices.index(index) for index in order])
    if state.factor != 1:
        value = program.scaled(value, state.factor)
    if state.expanded:
        every = state.term.output_indices
        value = program.reshape(value, tuple(1 if i in state.expanded else state.sizes[i] for i in every))
        value = program.add(s.Expand((value,), state.shape(every)))
    return program.reshape(value, tuple([state.size(leg) for leg in state.term.output]))


def _added(program: Program, values: Sequence[int]) -> int:
    result = values[0]
    final = program.shapes[result]
    for value in values[1:]:
        part, shape, starts = program.unpadded(value)
        if program.shapes[part] == shape:
            result = program.add(s.Add((result, value)))
        else:
            result = program.add(s.AddAt((program.reshape(result, shape), part), starts))
            result = program.reshape(result, final)
    return result


def _pruned(
    text: str,
    program: Program,
    result: int,
    strategy: str,
    parts: tuple[str, int] | None = None,
    in_turn: bool = False,
) -> Plan:
    """A plan with the steps that the result needs, and with all position vectors, which are checked even if unused.

    With `in_turn`, each term of a sum is added before the next one is computed, so that its memory is free again.
    """
    needed = {result, *[at for at, step in enumerate(program.steps) if step.is_checked]}
    for at in range(len(program.steps) - 1, -1, -1):
        if at in needed:
            needed.update(program.steps[at].takes)
    kept = _depth_first(program, result, needed) if in_turn else sorted(needed)
    new = {place: at for at, place in enumerate(kept)}
    steps = [step.taking(tuple([new[at] for at in step.takes])) for step in map(program.steps.__getitem__, kept)]
    shapes = tuple([program.shapes[place] for place in kept])
    owning = {at: own for at, step in enumerate(steps) if (own := step.owning()) is not None}
    if owning:
        users: list[set[int]] = [set() for _ in steps]
        for at, step in enumerate(steps):
            for value in step.takes:
                users[value].add(at)
        for at, own in owning.items():
            if _is_owned(steps, users, own.takes[0], at, new[result]):
                steps[at] = own
    return Plan(text, tuple(steps), shapes, new[result], strategy, parts)


def _depth_first(program: Program, result: int, needed: set[int]) -> list[int]:
    """The needed places in an order in which each value is computed just before its first use; sources are first."""
    order = [place for place in sorted(needed) if not program.steps[place].takes]
    done = set(order)
    todo = [*sorted(needed), result]
    while todo:
        place = todo[-1]
        missing = [at for at in program.steps[place].takes if at not in done]
        if missing:
            todo.append(missing[0])
            continue
        todo.pop()
        if place not in done:
            done.add(place)
            order.append(place)
    return order


def _is_owned(steps: Sequence[s.Step], users: Sequence[set[int]], value: int, user: int, result: int) -> bool:
    """Whether a step may overwrite a value: it is not an operand or pattern, and no other step uses it."""
    while True:
        if users[value] != {user} or value == result:
            return False
        step = steps[value]
        if not step.is_view:
            return not isinstance(step, s.Fill)
        if not step.takes or step.overlaps:
            return False
        user, value = value, step.takes[0]
