"""Toeplitz matrices: patterns on whose output leg a tensor is spread over the input and the kernel leg."""

from __future__ import annotations

from lensor.lowering.state import State, Tensor, has_repeats
from lensor.network import Pattern
from lensor.plan import steps as s


def read_toeplitz(state: State) -> None:
    """Replace each pattern of stride 1 whose output leg is summed by windows with the kernel positions reversed.

    Σ_o Π[i,o,k] z[o] = z[i + P − k·D]: for k in reverse order, these are the windows of z.
    """
    groups: dict[int, list[Pattern]] = {}
    for node in state.patterns:
        tensor = _tensor(state, node)
        if tensor is not None:
            groups.setdefault(state.tensors.index(tensor), []).append(node)
    found = [(state.tensors[at], nodes) for at, nodes in groups.items()]
    for tensor, nodes in found:
        state.replace(tensor, _windows(state, tensor, nodes))
        state.drop(*nodes)


def _tensor(state: State, node: Pattern) -> Tensor | None:
    """The only tensor on the output leg of a pattern whose other legs are not on tensors; None in other cases."""
    pattern, (i, o, k) = node.pattern, node.legs
    if pattern.padding_mode != "zeros" or pattern.stride > 1 or pattern.is_crop or has_repeats(node):
        return None
    if not all(node.legs) or set(o) & set(state.open) or state.patterns_on(o, node) or state.tensors_on((*i, *k)):
        return None
    holders = state.tensors_on(o)
    if len(holders) != 1 or not set(o) <= set(holders[0].indices):
        return None
    return holders[0] if state.used_elsewhere(i, node) and state.used_elsewhere(k, node) else None


def _windows(state: State, tensor: Tensor, nodes: list[Pattern]) -> Tensor:
    """The windows along one axis after another, the last axis first: then the next copies have longer runs."""
    places = {index: at for at, index in enumerate(state.open)}
    for node in nodes:  # until its turn, the output leg of a pattern stays where the input leg will be
        i, o, _ = node.legs
        places |= dict.fromkeys(o, places.get(i[0], len(places)))

    def place(index: str) -> int:
        return places.get(index, len(state.open))

    for node in sorted(nodes, key=lambda node: -place(node.legs[0][0])):
        pattern, (i, o, k) = node.pattern, node.legs
        value, axis, rest = state.merged(tensor, o)
        reach = pattern.dilation * (pattern.kernel_size - 1)
        value = state.shifted(value, axis, pattern.padding[0] - reach, pattern.input_size + reach)
        window = s.Window((value,), axis, pattern.input_size, pattern.kernel_size, 1, pattern.dilation)
        found = state.ungrouped(state.program.add(window), (*rest[:axis], *i, *rest[axis:]), k, ())
        order = sorted(found.indices, key=place)
        value = state.program.transpose(found.value, [found.indices.index(index) for index in order])
        axes = tuple(at for at, index in enumerate(order) if index in k)
        tensor = Tensor(state.program.add(s.Flip((value,), axes)), tuple(order))
    return tensor
