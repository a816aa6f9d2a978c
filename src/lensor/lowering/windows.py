"""Products with patterns that are not materialized, computed from strided views of patches and from sums of patches."""

from __future__ import annotations

from dataclasses import dataclass

from lensor.lowering.crops import carriers, read, spread
from lensor.lowering.state import State, Tensor, has_repeats, loose_legs
from lensor.network import Group, Pattern
from lensor.pattern import IndexPattern
from lensor.plan import steps as s


def split_modes(state: State) -> None:
    """Split the padding off patterns that are not in zeros mode and would be too large if materialized."""
    found: list[Pattern] = []
    for node in state.patterns:
        (i, o, k), (padding, inner) = node.legs, node.pattern.split_padding()
        if padding is None or node.pattern.is_crop or not i:
            found.append(node)
            continue
        loose = [at for at, leg in enumerate(node.legs) if not state.used_elsewhere(leg, node)]
        if not state.is_large(node, loose):
            found.append(node)
            continue
        unit = f"{i[0]} with padding {len(state.sizes)}"  # not an identifier, so no index has this name
        state.sizes[unit] = inner.input_size
        found += [Pattern(padding.normalize(), (i, (unit,), ())), Pattern(inner.normalize(), ((unit,), o, k))]
    state.set(patterns=found)


def read_windows(state: State) -> None:
    """Replace each pattern whose input leg is summed and whose other legs are used by strided views of patches."""
    for node in state.patterns:
        pattern, (i, o, k) = node.pattern, node.legs
        if pattern.padding_mode != "zeros" or not o or not k or _reads_nothing(pattern):
            continue
        holders = carriers(state, node)
        if holders is None:
            continue
        if not state.used_elsewhere(o, node) or not state.used_elsewhere(k, node):
            continue
        for tensor in holders:
            value, axis, rest = state.merged(tensor, i)
            indices = (*rest[:axis], *o, *rest[axis:], *k)
            value = state.program.reshape(_window(state, value, axis, pattern), state.shape(indices))
            state.replace(tensor, Tensor(value, indices))
        state.drop(node)


def read_spread(state: State) -> None:
    """Replace each pattern whose output leg is summed and whose other legs are used: Σ_o Π[i,o,k] z[o].

    The entries of z are moved apart by the stride; then z[(i + P − k·D) / S] is a strided view with reversed k.
    """
    program = state.program
    for node in state.patterns:
        pattern, (i, o, k) = node.pattern, node.legs
        if pattern.padding_mode != "zeros" or pattern.is_crop or has_repeats(node) or not (i and o and k):
            continue
        if set(o) & set(state.open) or state.patterns_on(o, node):
            continue
        holders = state.tensors_on(o)
        others = {*i, *k}
        if not holders or not all(set(o) <= {*one.indices} and others.isdisjoint(one.indices) for one in holders):
            continue
        if not state.used_elsewhere(i, node) or not state.used_elsewhere(k, node):
            continue
        reach = pattern.dilation * (pattern.kernel_size - 1)
        for tensor in holders:
            value, axis, rest = state.merged(tensor, o)
            if pattern.stride > 1:
                value = program.add(s.Stuff((value,), axis, pattern.stride))
            value = state.shifted(value, axis, pattern.padding[0] - reach, pattern.input_size + reach)
            window = s.Window((value,), axis, pattern.input_size, pattern.kernel_size, 1, pattern.dilation)
            value = program.add(s.Flip((program.add(window),), (len(rest) + 1,)))
            indices = (*rest[:axis], *i, *rest[axis:], *k)
            state.replace(tensor, Tensor(program.reshape(value, state.shape(indices)), indices))
        state.drop(node)


def length_of(pattern: IndexPattern) -> int:
    """The number of positions from the first to the last position that a pattern reads."""
    return (pattern.output_size - 1) * pattern.stride + pattern.dilation * (pattern.kernel_size - 1) + 1


def _reads_nothing(pattern: IndexPattern) -> bool:
    """Whether all positions that a pattern reads are outside its input."""
    return -pattern.padding[0] >= pattern.input_size or length_of(pattern) <= pattern.padding[0]


def _window(state: State, value: int, axis: int, pattern: IndexPattern) -> int:
    """View the patches along an axis, with the kernel positions on the last axis."""
    value = state.shifted(value, axis, -pattern.padding[0], length_of(pattern))
    step = s.Window((value,), axis, pattern.output_size, pattern.kernel_size, pattern.stride, pattern.dilation)
    return state.program.add(step)


# ------------------------------------------------------------------------------ products of a tensor and a pattern
def overlap_add(state: State, tensor: Tensor, node: Pattern, needed: set[str]) -> Tensor | None:
    """Compute Σ_{o,k} Π[i,o,k] z[o,k] by adding shifted slices; None if the product has a different form."""
    pattern, (i, o, k) = node.pattern, node.legs
    held, summed = set(tensor.indices), {*o, *k}
    if pattern.padding_mode != "zeros" or not o or not k or summed & needed or set(i) & held:
        return None
    if has_repeats(node) or _reads_nothing(pattern):
        return None
    missing = [leg for leg in (o, k) if not set(leg) & held]
    if len(missing) == 1 and i and state.is_large(node, loose_legs(node, needed | held)):
        # Σ_k Π[i,o,k] is too large to materialize, so expand z to equal patches, which takes no memory.
        indices = (*tensor.indices, *missing[0])
        value = state.program.reshape(tensor.value, (*state.shape(tensor.indices), *[1] * len(missing[0])))
        tensor = Tensor(state.program.add(s.Expand((value,), state.shape(indices))), indices)
        if pattern.output_size < pattern.kernel_size:
            pattern, o, k = pattern.swap(), k, o
    if not summed <= set(tensor.indices):
        return None
    front = [index for index in tensor.indices if index not in k]
    value = state.matrix(tensor, [*front, *k], (*state.shape(front), pattern.kernel_size))
    unit = "the kernel"  # not an identifier, so no index has this name
    state.sizes[unit] = pattern.kernel_size
    value, axis, rest = state.merged(Tensor(value, (*front, unit)), o)
    value = state.program.add(s.OverlapAdd((value,), axis, length_of(pattern), pattern.stride, pattern.dilation))
    value = state.shifted(value, axis, pattern.padding[0], pattern.input_size)
    rest = rest[:-1]
    return state.summed(state.ungrouped(value, rest[:axis], i, rest[axis:]), needed | set(i))


def without_table(state: State, tensor: Tensor, node: Pattern, needed: set[str]) -> Tensor | None:
    """Multiply by a pattern that is too large to materialize, using views and copies; None if this is not possible."""
    pattern, (i, o, k) = node.pattern, node.legs
    held = set(tensor.indices)
    if not i or has_repeats(node) or pattern.is_zero:
        return None
    if not state.is_large(node, loose_legs(node, needed | held)):
        return None
    if set(i) <= held and not set(i) & needed:
        value, axis, rest = state.merged(tensor, i)
        if pattern.is_crop and not k:
            value, indices = read(state, value, axis, pattern), [*rest[:axis], *o, *rest[axis:]]
        elif pattern.padding_mode == "zeros":
            value, indices = _window(state, value, axis, pattern), [*rest[:axis], *o, *rest[axis:], *k]
        else:
            return None
        value = state.program.reshape(value, state.shape(indices))
        return state.summed(state.without_repeats(value, indices), needed)
    if set(i) & held:
        return None
    if pattern.is_crop and not k and o and set(o) <= held and not set(o) & needed:
        return state.summed(spread(state, tensor, pattern, o, i), needed)
    for way in (_Rows(pattern, i, o, k), _Rows(pattern.swap(), i, k, o)):
        whole = way.rows and way.kernel and set(way.kernel) <= held and not set(way.kernel) & needed
        if whole and not set(way.rows) & held and way.pattern.padding_mode == "zeros":
            return state.summed(_shifted_rows(state, tensor, way), needed)
    return None


@dataclass(frozen=True, slots=True)
class _Rows:
    """A pattern whose kernel leg is on a tensor; each output position becomes a row."""

    pattern: IndexPattern
    input: Group
    rows: Group
    kernel: Group


def _shifted_rows(state: State, tensor: Tensor, way: _Rows) -> Tensor:
    """Σ_k Π[i,o,k] z[k]: row o contains z, shifted by o times the stride, and zeros elsewhere.

    One row with z at its start is padded to the length of a result row plus the stride, and repeated. Concatenating
    the copies and cutting them into rows of the final length then shifts each row by the stride.
    """
    program, pattern = state.program, way.pattern
    stride, rows, length = pattern.stride, pattern.output_size, length_of(pattern)
    span = pattern.dilation * (pattern.kernel_size - 1) + 1
    front = [index for index in tensor.indices if index not in way.kernel]
    axis, shape = len(front), state.shape(front)
    value = state.matrix(tensor, [*front, *way.kernel], (*shape, pattern.kernel_size))
    if pattern.dilation > 1:
        value = program.add(s.Stuff((value,), axis, pattern.dilation))
    value = program.along(s.Pad((value,), axis, 0, length + stride - span))
    value = program.reshape(value, (*shape, 1, length + stride))
    value = program.add(s.Expand((value,), (*shape, rows, length + stride)))
    value = program.reshape(value, (*shape, rows * (length + stride)))
    value = program.along(s.Slice((value,), axis, 0, 1, rows * length))
    value = program.reshape(value, (*shape, rows, length))
    value = state.shifted(value, axis + 1, pattern.padding[0], pattern.input_size)
    return state.ungrouped(value, front, (*way.rows, *way.input), ())
