"""The last stage: contract the remaining tensors and patterns pairwise, along a path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from lensor.lowering.halves import two_halves
from lensor.lowering.products import Product, multiply
from lensor.lowering.state import State, Tensor, kept_indices, loose_legs
from lensor.network import Pattern
from lensor.plan import steps as s
from lensor.plan.paths import find_path

Meeting: TypeAlias = Callable[[State, Tensor, Pattern, set[str]], Tensor | None]
"""A function that multiplies a tensor by a pattern, keeping the given indices; None if it does not apply."""


@dataclass(frozen=True, slots=True)
class Contraction:
    """How a strategy contracts the tensors and patterns that remain after its stages.

    Args:
        meetings: contractions of a tensor with a pattern that do not materialize the pattern, tried in order.
        products: special products of two tensors, tried in order before the general one.
        halves: whether to contract two equal halves of a term along the same path, so that they share one computation.
        path: source of the contraction path, as in `find_path`.
        tables_first: whether to multiply the patterns that remain with each other before anything else, so that each
            operand is read once.
    """

    meetings: tuple[Meeting, ...] = ()
    products: tuple[Product, ...] = ()
    halves: bool = False
    path: str = "auto"
    tables_first: bool = False


def contract(state: State, way: Contraction) -> Tensor:
    """Contract everything to one tensor with the output indices, except those that appear only on ones."""
    items = [*state.tensors, *state.patterns]
    wanted = [index for index in state.open if index not in state.expanded]
    if not items:
        factor, state.factor = state.factor, Fraction(1)
        return Tensor(state.program.add(s.Fill((), (), factor)), ())
    halves = two_halves(items, wanted) if way.halves else None
    if halves is None:
        last = _joined(state, way, items, _path(state, way, items, set(wanted)), set(wanted))
    else:
        one, two = halves
        needed = [set(wanted).union(*map(kept_indices, half)) for half in (two, one)]
        path = _path(state, way, one, needed[0])
        first, second = (_joined(state, way, half, path, kept) for half, kept in zip(halves, needed, strict=True))
        last = _pair(state, way, first, second, set(wanted))
    return Tensor(state.matrix(last, wanted, state.shape(wanted)), tuple(wanted))


def _joined(
    state: State,
    way: Contraction,
    items: Sequence[Tensor | Pattern],
    path: Sequence[tuple[int, ...]],
    wanted: set[str],
) -> Tensor:
    """Contract the items along a path, keeping the indices in `wanted`."""
    items = list(items)
    for places in path:
        taken = [items[at] for at in places]
        items = [item for at, item in enumerate(items) if at not in places]
        needed = wanted.union(*map(kept_indices, items))
        merged = taken[0]
        for step, item in enumerate(taken[1:], start=2):
            merged = _pair(state, way, merged, item, needed.union(*map(kept_indices, taken[step:])))
        items.append(merged)
    return state.summed(_as_tensor(state, items[0]), wanted)


def _path(state: State, way: Contraction, items: Sequence[Tensor | Pattern], wanted: set[str]) -> list[tuple[int, ...]]:
    held = [frozenset(kept_indices(item)) for item in items]
    inputs = []
    for at, item in enumerate(items):
        used = wanted.union(*held[:at], *held[at + 1 :])
        loose = [item.legs[leg] for leg in loose_legs(item, used)] if isinstance(item, Pattern) else []
        inputs.append(held[at].difference(*loose))
    sizes = {index: max(size, 1) for index, size in state.sizes.items()}
    tables = [at for at, item in enumerate(items) if isinstance(item, Pattern)]
    product = frozenset().union(*(inputs[at] for at in tables))
    if way.tables_first and 1 < len(tables) < len(items) and state.size(product) <= state.limit:
        inputs = [held for at, held in enumerate(inputs) if at not in tables] + [product]
        return [tuple(tables), *find_path(inputs, frozenset(wanted), sizes, way.path)]
    return find_path(inputs, frozenset(wanted), sizes, way.path)


def _as_tensor(state: State, item: Tensor | Pattern, loose: Sequence[int] = ()) -> Tensor:
    """Materialize a pattern, summed over the legs in `loose`; return a tensor unchanged."""
    if isinstance(item, Tensor):
        return item
    value = state.program.add(s.Constant((), item.pattern, tuple(loose)))
    indices = [index for leg, group in enumerate(item.legs) if leg not in loose for index in group]
    return state.without_repeats(state.program.reshape(value, state.shape(indices)), indices)


def _pair(state: State, way: Contraction, one: Tensor | Pattern, two: Tensor | Pattern, needed: set[str]) -> Tensor:
    """Contract two items, keeping the indices in `needed`."""
    for tensor, pattern in ((one, two), (two, one)):
        if isinstance(tensor, Tensor) and isinstance(pattern, Pattern):
            for meet in way.meetings:
                found = meet(state, tensor, pattern, needed)
                if found is not None:
                    return found
    a, b = (
        item
        if isinstance(item, Tensor)
        else _as_tensor(state, item, loose_legs(item, needed.union(kept_indices(other))))
        for item, other in ((one, two), (two, one))
    )
    a = state.summed(a, needed.union(b.indices))
    b = state.summed(b, needed.union(a.indices))
    return multiply(state, way.products, a, b, needed)
