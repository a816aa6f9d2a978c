"""Contraction of pairs of tensors through patterns, using the framework's convolution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lensor.lowering.state import Leg, State, Tensor, has_repeats
from lensor.lowering.windows import length_of
from lensor.network import Group, Pattern
from lensor.plan import steps as s

_MOST_DIMENSIONS = 3
"""Maximum number of spatial dimensions of a framework's convolution."""

_MOST_COPIES = 16
"""A tensor is repeated at most this many times to make a convolution depthwise."""

_MOST_PADDING = 3
"""Frameworks have no fast algorithm for depthwise convolutions with more padding than this."""


def convolve(state: State) -> None:
    """Contract pairs of tensors connected by patterns, using the framework's convolution and its gradients."""
    _apply(state, gradients=True)


def convolve_forward(state: State) -> None:
    """Contract like `convolve`, but replace weight gradients by forward convolutions with kernel and output swapped."""
    _apply(state, gradients=False)


def convolve_depthwise(state: State) -> None:
    """Contract like `convolve`, but compute weight gradients of depthwise convolutions for each example.

    They are forward convolutions with kernel and output swapped, whose channels are all channels of all examples. The
    results are small and are added later. If each input channel has several output channels, it is repeated. Frameworks
    are slow for depthwise weight gradients, in particular for large kernels, and fast for depthwise convolutions.
    """
    _apply(state, gradients=True, depthwise=True)


def _apply(state: State, gradients: bool, depthwise: bool = False) -> None:
    progress = True
    while progress:
        every = [tie for node in state.patterns if (tie := _tie(state, node)) is not None]
        progress = any(
            (ties := _ties(tie, every)) is not None and _contract(state, ties, gradients, depthwise) for tie in every
        )


@dataclass(frozen=True, slots=True)
class _Tie:
    """A pattern that connects two tensors, with the leg that it shares with each of them.

    The leg shared with the first tensor is the input leg, or the output leg if neither tensor has the input leg.
    """

    node: Pattern
    one: Tensor
    two: Tensor
    first: Leg
    second: Leg

    @property
    def free(self) -> Leg:
        """The leg that appears on neither tensor."""
        return Leg.third(self.first, self.second)


def _tie(state: State, node: Pattern) -> _Tie | None:
    """The two tensors on summed legs of a pattern; None unless there are exactly two."""
    if node.pattern.padding_mode != "zeros" or not all(node.legs) or has_repeats(node):
        return None
    ends: list[tuple[Tensor, Leg]] = []
    for leg in Leg:
        group = node.legs[leg]
        if state.patterns_on(group, node) or set(group) & set(state.open):
            continue
        holders = state.tensors_on(group)
        if len(holders) == 1 and set(group) <= set(holders[0].indices):
            ends.append((holders[0], leg))
    if len(ends) != 2 or ends[0][0] is ends[1][0]:
        return None
    (one, first), (two, second) = ends
    free = set(node.legs[Leg.third(first, second)])
    return None if free & {*one.indices, *two.indices} else _Tie(node, one, two, first, second)


def _ties(mine: _Tie, every: Sequence[_Tie]) -> list[_Tie] | None:
    """All ties between the same tensors in the same roles as `mine`; None if one step cannot contract them."""
    same = [tie for tie in every if (tie.one, tie.two) == (mine.one, mine.two)]
    flat = [index for tie in same for leg in tie.node.legs for index in leg]
    if len(set(flat)) < len(flat) or len(same) > _MOST_DIMENSIONS:
        return None
    # A framework's convolution requires that all input legs are free (the output legs are then on the first
    # tensor) or none.
    adjoint = mine.free == Leg.INPUT
    return None if adjoint and any(tie.free != Leg.INPUT for tie in same) else same


@dataclass(frozen=True, slots=True)
class _Dimension:
    """One spatial dimension of a convolution step.

    Args:
        first: the first tensor's indices in this dimension.
        second: the second tensor's indices in this dimension.
        out: the result's indices in this dimension.
        stride: stride, as in frameworks.
        padding: padding on both sides.
        dilation: dilation of the kernel.
        result: the size of the result.
        shift: start and length of the range to which the first tensor is padded or cropped before the convolution.
        crop: start and length of the range to which the result is padded or cropped after the convolution.
    """

    first: Group
    second: Group
    out: Group
    stride: int
    padding: int
    dilation: int
    result: int
    shift: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None


def _contract(state: State, ties: Sequence[_Tie], gradients: bool, depthwise: bool) -> bool:
    """Contract two tensors through patterns in one step; return False if this is not possible."""
    one, two = ties[0].one, ties[0].two
    spatial = {index for tie in ties for leg in tie.node.legs for index in leg}
    rest = [tensor for tensor in state.tensors if tensor is not one and tensor is not two]
    nodes = [tie.node for tie in ties]
    needed = state.needed_beside(one, two, *nodes)
    one, two = (
        state.summed(one, needed | set(two.indices) | spatial),
        state.summed(two, needed | set(one.indices) | spatial),
    )
    shared = [index for index in one.indices if index in two.indices]
    group = [index for index in shared if index in needed]
    inner = [index for index in shared if index not in needed]
    free_one = [index for index in one.indices if index not in shared and index not in spatial]
    free_two = [index for index in two.indices if index not in shared and index not in spatial]
    adjoint = ties[0].first == Leg.OUTPUT  # the output leg takes the place of the input
    gradient = ties[0].second == Leg.OUTPUT and gradients
    apart = gradient and depthwise and state.size(group) > 1 == state.size(free_one)
    apart = apart and state.size(free_two) <= _MOST_COPIES
    if apart:
        if free_two:
            one = _repeated(state, one, free_two)
        group = [index for index in two.indices if index in shared or index in free_two]
        gradient, inner, free_two = False, [], []
    found = [_dimension(tie, adjoint, gradient) for tie in ties]
    dimensions = [one for one in found if one is not None]
    if len(dimensions) < len(ties):
        return False
    room = _MOST_DIMENSIONS - len(dimensions)
    whole = _whole_axes(one, spatial, inner if gradient else free_one, room)
    if whole:
        # Use kernels of size 1 along these axes, since moving the axes into the batch would require copies.
        dimensions += [_whole(state.sizes[index], index, gradient) for index in whole]
        dimensions.sort(key=lambda dimension: one.indices.index(dimension.first[0]))
        inner, free_one = ([index for index in pool if index not in whole] for pool in (inner, free_one))
    g, c, f1, f2 = (state.size(indices) for indices in (group, inner, free_one, free_two))
    if 0 in (g, c, f1, f2):
        return False  # frameworks treat empty arrays differently
    first = [index for dimension in dimensions for index in dimension.first]
    second = [index for dimension in dimensions for index in dimension.second]
    sizes_one = [state.size(dimension.first) for dimension in dimensions]
    sizes_two = [state.size(dimension.second) for dimension in dimensions]
    if gradient:
        left = state.matrix(one, [*inner, *group, *free_one, *first], (c, g * f1, *sizes_one))
        right = state.matrix(two, [*inner, *group, *free_two, *second], (c, g * f2, *sizes_two))
        shape, indices = (g * f2, f1), [*group, *free_two, *free_one]
    else:
        if not adjoint and g == 1 < min(c, f2) and all(map(_is_point, dimensions, sizes_two)):
            # With kernels of size 1, a forward pass is an input gradient for the transposed weight.
            adjoint = [index for index in two.indices if index in inner or index in free_two] == [*inner, *free_two]
        left = state.matrix(one, [*free_one, *group, *inner, *first], (f1, g * c, *sizes_one))
        order = [*group, *inner, *free_two] if adjoint else [*group, *free_two, *inner]
        right = state.matrix(two, [*order, *second], (g * (c if adjoint else f2), f2 if adjoint else c, *sizes_two))
        shape, indices = (f1, g * f2), [*free_one, *group, *free_two]
    if apart:
        dimensions = [_padded_before(*pair) for pair in zip(dimensions, sizes_one, strict=True)]
    exchanged = gradient and _takes_fewer_exchanged(dimensions, sizes_one, sizes_two)
    if exchanged:
        left, right, shape = right, left, (g * f1, f2)
        indices = [*group, *free_one, *free_two]
        dimensions = [_exchanged(*one) for one in zip(dimensions, sizes_one, sizes_two, strict=True)]
    half = None
    if (gradient and (left, f1) == (right, f2)) or (apart and _are_equal(state, one, two, group, first, second)):
        half = next((axis for axis, one in enumerate(dimensions) if one.result > 1), None)
        if half is not None and all(map(_is_symmetric, dimensions, sizes_one)):
            dimensions[half] = _from_middle(dimensions[half], sizes_one[half])
        else:
            half = None
    for axis, dimension in enumerate(dimensions, start=2):
        if dimension.shift is not None:
            left = state.shifted(left, axis, *dimension.shift)
    step = s.Convolution(
        (left, right),
        "weight_grad" if gradient else "input_grad" if adjoint else "forward",
        tuple(dimension.stride for dimension in dimensions),
        tuple(dimension.padding for dimension in dimensions),
        tuple(dimension.dilation for dimension in dimensions),
        g,
        (*shape, *(dimension.result for dimension in dimensions)),
    )
    value = state.program.add(step)
    if half is not None:
        if apart:
            value = state.program.reshape(value, (g, 1, *state.program.shapes[value][2:]))
        value = _mirrored(state, value, g, half)
    if exchanged:
        value = state.program.add(s.Flip((value,), tuple(range(2, 2 + len(dimensions)))))
    for axis, dimension in enumerate(dimensions, start=2):
        if dimension.crop is not None:
            value = state.shifted(value, axis, *dimension.crop)
    indices += [index for dimension in dimensions for index in dimension.out]
    new = Tensor(state.program.reshape(value, state.shape(indices)), tuple(indices))
    state.set([*rest, new], [node for node in state.patterns if all(node is not other for other in nodes)])
    return True


def _takes_fewer_exchanged(dimensions: Sequence[_Dimension], one: Sequence[int], two: Sequence[int]) -> bool:
    """Whether a weight gradient takes fewer multiplications if input and output exchange their roles.

    With stride 1, i = o + d k − l is o = i + d (K−1−k) − (d (K−1) − l): the same gradient, at reversed positions of the
    kernel, is that of a convolution from output to input, which has one multiplication for each input instead of each
    output. With more padding than "same", there are more outputs than inputs.
    """
    return all(dimension.stride == 1 for dimension in dimensions) and math.prod(one) < math.prod(two)


def _exchanged(dimension: _Dimension, one: int, two: int) -> _Dimension:
    """A dimension of a weight gradient with stride 1 whose input and output, of the given sizes, are exchanged."""
    reach = dimension.dilation * (dimension.result - 1)
    start, length = dimension.shift or (-dimension.padding, one + 2 * dimension.padding)
    left, right = reach + start, reach - (start + length - one)
    found = replace(dimension, first=dimension.second, second=dimension.first, padding=0, shift=None)
    if left == right >= 0:
        return replace(found, padding=left)
    return replace(found, shift=(-left, left + two + right))


def _repeated(state: State, tensor: Tensor, indices: Sequence[str]) -> Tensor:
    """The tensor with further indices, along which it has equal entries."""
    every = (*indices, *tensor.indices)
    value = state.program.reshape(tensor.value, (*[1] * len(indices), *state.shape(tensor.indices)))
    return Tensor(state.program.add(s.Expand((value,), state.shape(every))), every)


def _are_equal(
    state: State, one: Tensor, two: Tensor, group: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> bool:
    """Whether two tensors are the same array if the indices `first` of one are those in `second` of the other."""
    shapes = state.shape(first), state.shape(second)
    if shapes[0] != shapes[1] or len(one.indices) != len(two.indices):
        return False
    values = [
        state.matrix(tensor, [*group, *rest], (state.size(group), *state.shape(rest)))
        for tensor, rest in ((one, first), (two, second))
    ]
    return values[0] == values[1]


def _is_point(dimension: _Dimension, size: int) -> bool:
    """Whether a dimension of a forward pass has a kernel of one position and reads each position of the input once."""
    return (size, dimension.stride, dimension.padding, dimension.shift, dimension.crop) == (1, 1, 0, None, None)


def _padded_before(dimension: _Dimension, size: int) -> _Dimension:
    """The same dimension with a wide padding as a step before the convolution."""
    padding = dimension.padding
    if padding <= _MOST_PADDING:
        return dimension
    return replace(dimension, padding=0, shift=(-padding, size + 2 * padding))


def _is_symmetric(dimension: _Dimension, size: int) -> bool:
    """Whether the results of a gradient at the positions m and −m from the middle belong together.

    This is the case if both tensors have the same number of positions and the padding is that of "same".
    """
    middle, odd = divmod(dimension.result, 2)
    left, length = dimension.shift or (-dimension.padding, size + 2 * dimension.padding)
    reach = dimension.dilation * middle
    return odd == 1 and dimension.stride == 1 and (left, length) == (-reach, size + 2 * reach)


def _from_middle(dimension: _Dimension, size: int) -> _Dimension:
    """The part of a symmetric dimension from the middle on."""
    middle = dimension.result // 2
    return replace(dimension, padding=0, result=middle + 1, shift=(0, size + dimension.dilation * middle))


def _mirrored(state: State, value: int, groups: int, axis: int) -> int:
    """Complete the gradient of a convolution of a tensor with itself, which was computed from the middle of an axis on.

    Σ_i x_a[i] x_b[i+m] = Σ_i x_b[i] x_a[i−m], so the other half has the channels exchanged and all positions reversed.
    """
    program = state.program
    channels, _, *sizes = program.shapes[value]
    if sizes[axis] == 1:
        return value
    rank = len(sizes)
    split = program.reshape(value, (groups, channels // groups, channels // groups, *sizes))
    other = program.transpose(split, (0, 2, 1, *range(3, 3 + rank)))
    other = program.reshape(other, program.shapes[value])
    other = program.along(s.Slice((other,), 2 + axis, 1, 1, sizes[axis] - 1))
    other = program.add(s.Flip((other,), tuple(range(2, 2 + rank))))
    return program.add(s.Concat((other, value), 2 + axis))


def _whole_axes(tensor: Tensor, spatial: set[str], pool: list[str], room: int) -> list[str]:
    """Indices from `pool` on the last axes of a tensor, next to its spatial axes; empty if more than `room`."""
    tail = list(itertools.takewhile(lambda index: index in spatial or index in pool, reversed(tensor.indices)))
    found = [index for index in tail if index in pool]
    return found if len(found) <= room and len(found) < len(pool) else []


def _whole(size: int, index: str, gradient: bool) -> _Dimension:
    """A dimension with a kernel of size 1; for a gradient, a dimension that is summed completely."""
    if gradient:
        return _Dimension((index,), (index,), (), 1, 0, 1, 1)
    return _Dimension((index,), (), (index,), 1, 0, 1, size)


def _dimension(tie: _Tie, adjoint: bool, gradient: bool) -> _Dimension | None:
    """The dimension of a convolution step for a tie; None if frameworks do not support it."""
    pattern, legs = tie.node.pattern, tie.node.legs
    groups = legs[tie.first], legs[tie.second], legs[tie.free]
    if (tie.first == Leg.OUTPUT) != adjoint:
        return None
    if not adjoint and (tie.second == Leg.OUTPUT) != gradient:
        pattern = pattern.swap()  # use the tensor on the output leg as the kernel
    size, kernel, positions = pattern.input_size, pattern.kernel_size, pattern.output_size
    stride, dilation, left = pattern.stride, pattern.dilation, pattern.padding[0]
    length = length_of(pattern)
    if -left >= size or length - left <= 0:
        return None
    if adjoint:
        extra = size - (length - 2 * left)
        if left >= 0 and 0 <= extra < max(stride, dilation):
            return _Dimension(*groups, stride, left, dilation, size)
        return _Dimension(*groups, stride, 0, dilation, length, crop=(left, size))
    result = kernel if gradient else positions
    if left >= 0 and 1 + (size + 2 * left - dilation * (kernel - 1) - 1) // stride == positions:
        return _Dimension(*groups, stride, left, dilation, result)
    return _Dimension(*groups, stride, 0, dilation, result, shift=(-left, length))
