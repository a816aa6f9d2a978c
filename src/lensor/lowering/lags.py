"""Gram matrices of patches, computed from lags without forming the patches."""

from __future__ import annotations

from dataclasses import dataclass

from lensor.lowering.state import State, Tensor
from lensor.network import Pattern
from lensor.plan import steps as s

_MOST_OFFSETS = 512
"""Maximum kernel size for which lags are used, since each pair of kernel positions requires a call."""


def take_patch_grams(state: State) -> None:
    """Contract two copies of a tensor whose patterns share an output leg, without forming patches."""
    while any(
        one.value == two.value and _patch_gram(state, one, two)
        for at, one in enumerate(state.tensors)
        for two in state.tensors[at + 1 :]
    ):
        pass


@dataclass(frozen=True, slots=True)
class _Twins:
    """Two equal patterns with the same output leg, on two copies of a tensor."""

    first: Pattern
    second: Pattern

    @property
    def indices(self) -> list[str]:
        """All indices of both patterns; those of the shared output leg are listed once."""
        legs = (*self.first.legs, self.second.legs[0], self.second.legs[2])
        return [index for leg in legs for index in leg]


def _twins(state: State, one: Tensor, two: Tensor, node: Pattern) -> _Twins | None:
    """A pattern and its twin, if both are contracted only with the two tensors, else None."""
    (i, o, k), pattern = node.legs, node.pattern
    twin = next((t for t in state.patterns if t is not node and t.legs[1] == o and t.pattern == pattern), None)
    if twin is None or not set(i) <= set(one.indices) or not i or not k or not o:
        return None
    copy = tuple(two.indices[one.indices.index(index)] for index in i)
    if pattern.kernel_size > _MOST_OFFSETS or pattern.stride != 1 or pattern.padding_mode != "zeros":
        return None
    if twin.legs[0] != copy or copy == i:
        return None
    found, inner = _Twins(node, twin), {*i, *o, *copy}
    if len(set(found.indices)) < len(found.indices) or {*k, *twin.legs[2]} & {*one.indices, *two.indices}:
        return None
    others = [tensor for tensor in state.tensors_on(inner) if tensor is not one and tensor is not two]
    if others or [other for other in state.patterns_on(inner) if other not in (node, twin)] or inner & set(state.open):
        return None
    return found


def _patch_gram(state: State, one: Tensor, two: Tensor) -> bool:
    pairs = [found for node in state.patterns if (found := _twins(state, one, two, node)) is not None]
    flat = [index for pair in pairs for index in pair.indices]
    if not pairs or len(set(flat)) < len(flat):
        return False
    spatial = [index for pair in pairs for index in pair.first.legs[0]]
    taken = [node for pair in pairs for node in (pair.first, pair.second)]
    needed = state.needed_beside(one, two, *taken)
    shared = [i for i, j in zip(one.indices, two.indices, strict=True) if i == j]
    group = [index for index in shared if index in needed]
    inner = [index for index in shared if index not in needed]
    rest = [(i, j) for i, j in zip(one.indices, two.indices, strict=True) if i != j and i not in spatial]
    first, second = [i for i, _ in rest], [j for _, j in rest]
    if not {*first, *second} <= needed or set(first) & set(second):
        return False
    sizes = [*(state.size(indices) for indices in (inner, group, first))]
    sizes += [state.size(pair.first.legs[0]) for pair in pairs]
    value = state.matrix(one, [*inner, *group, *first, *spatial], tuple(sizes))
    value = state.program.add(s.PatchGram((value,), tuple(pair.first.pattern for pair in pairs)))
    kernel = [index for pair in pairs for index in pair.first.legs[2]]
    other_kernel = [index for pair in pairs for index in pair.second.legs[2]]
    indices = (*group, *first, *kernel, *second, *other_kernel)
    new = Tensor(state.program.reshape(value, state.shape(indices)), indices)
    state.set(
        [*(tensor for tensor in state.tensors if tensor is not one and tensor is not two), new],
        [node for node in state.patterns if all(node is not other for other in taken)],
    )
    return True
