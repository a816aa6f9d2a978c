"""Toeplitz matrices: patterns over whose input and kernel leg an array on the output leg is spread."""

from __future__ import annotations

from lensor.lowering.state import State, Tensor, has_repeats
from lensor.network import Pattern
from lensor.plan import steps as s


def defer_toeplitz(state: State) -> None:
    """Defer each pattern of stride 1 that only spreads the result: Σ_o Π[i,o,k] z[o] = z[i + P − k·D].

    Everything else is contracted with the output leg o in place of the two other legs, which have more entries.
    """
    for node in list(state.patterns):
        if not _only_spreads(state, node):  # deferring a pattern puts its output leg into the result
            continue
        i, o, k = node.legs
        state.toeplitz.append((node, tuple(state.open)))
        place = state.open.index(i[0])
        before = [index for index in state.open[:place] if index not in (*i, *k)]
        state.open = [*before, *o, *(index for index in state.open[place:] if index not in (*i, *k))]
        state.drop(node)


def _only_spreads(state: State, node: Pattern) -> bool:
    pattern, (i, o, k) = node.pattern, node.legs
    if (
        pattern.padding_mode != "zeros"
        or pattern.stride > 1
        or pattern.is_crop
        or has_repeats(node)
        or not all((i, o, k))
    ):
        return False
    inside = state.tensors_on((*i, *k)) or state.patterns_on((*i, *k), node)
    held = all(state.tensors_on((index,)) or state.patterns_on((index,), node) for index in o)
    return not inside and {*i, *k} <= set(state.open) and not set(o) & set(state.open) and held


def finish_toeplitz(state: State, tensor: Tensor) -> Tensor:
    """Apply the deferred patterns: the values for one k after another, in reverse order, are the windows of z."""
    for node, order in reversed(state.toeplitz):
        pattern, (i, o, k) = node.pattern, node.legs
        value, axis, rest = state.merged(tensor, o)
        reach = pattern.dilation * (pattern.kernel_size - 1)
        value = state.shifted(value, axis, pattern.padding[0] - reach, pattern.input_size + reach)
        window = s.Window((value,), axis, pattern.input_size, pattern.kernel_size, 1, pattern.dilation)
        found = state.ungrouped(state.program.add(window), (*rest[:axis], *i, *rest[axis:]), k, ())
        indices = [index for index in order if index in found.indices]
        value = state.program.transpose(found.value, [found.indices.index(index) for index in indices])
        axes = tuple(at for at, index in enumerate(indices) if index in k)
        tensor = Tensor(state.program.add(s.Flip((value,), axes)), tuple(indices))
    return tensor
