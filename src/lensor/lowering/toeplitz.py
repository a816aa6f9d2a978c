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
    for node in nodes:
        pattern, (i, o, k) = node.pattern, node.legs
        value, axis, rest = state.merged(tensor, o)
        reach = pattern.dilation * (pattern.kernel_size - 1)
        value = state.shifted(value, axis, pattern.padding[0] - reach, pattern.input_size + reach)
        window = s.Window((value,), axis, pattern.input_size, pattern.kernel_size, 1, pattern.dilation)
        tensor = state.ungrouped(state.program.add(window), (*rest[:axis], *i, *rest[axis:]), k, ())
    # Reverse the kernel positions when the axes are in the order of the output, so that this is the only copy.
    order = [index for index in state.open if index in tensor.indices]
    order += [index for index in tensor.indices if index not in order]
    value = state.program.transpose(tensor.value, [tensor.indices.index(index) for index in order])
    kernel = {index for node in nodes for index in node.legs[2]}
    axes = tuple(at for at, index in enumerate(order) if index in kernel)
    return Tensor(state.program.add(s.Flip((value,), axes)), tuple(order))
