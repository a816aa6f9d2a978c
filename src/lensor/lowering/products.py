"""Products of two tensors: elementwise products, matrix products and Gram matrices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

from lensor.lowering.state import State, Tensor
from lensor.plan import steps as s

Product: TypeAlias = Callable[[State, Tensor, Tensor, Sequence[str], Sequence[str]], Tensor | None]
"""A function that multiplies two tensors, given the batch (kept) and contracted indices, or returns None."""


def multiply(state: State, ways: Sequence[Product], a: Tensor, b: Tensor, needed: set[str]) -> Tensor:
    """Multiply two tensors, keeping the shared indices in `needed` and contracting the others."""
    shared = [index for index in a.indices if index in b.indices]
    batch = [index for index in shared if index in needed]
    contracted = [index for index in shared if index not in needed]
    if a == b and contracted:
        kept = tuple(index for index in a.indices if index not in contracted)
        return Tensor(_squares(state, a.value, [a.indices.index(index) for index in contracted]), kept)
    if not contracted:
        free_a, free_b = (_as_wanted(state, tensor, batch, []) for tensor in (a, b))
        left = state.matrix(a, [*batch, *free_a], (*state.shape([*batch, *free_a]), *[1] * len(free_b)))
        ones = [1] * len(free_a)
        right = state.matrix(b, [*batch, *free_b], (*state.shape(batch), *ones, *state.shape(free_b)))
        return Tensor(state.program.add(s.Multiply((left, right))), (*batch, *free_a, *free_b))
    for way in ways:
        found = way(state, a, b, batch, contracted)
        if found is not None:
            return found
    return _product(state, a, b, batch, contracted)


def _squares(state: State, value: int, axes: Sequence[int]) -> int:
    """Sum the squares of a value over some axes, in the kernel that computes the value if it can."""
    before = state.program.steps[value]
    fused = before.squares(axes) if isinstance(before, s.PatternProduct) else None
    return state.program.add(fused or s.SumSquares((value,), tuple(axes)))


def _product(state: State, a: Tensor, b: Tensor, batch: Sequence[str], contracted: Sequence[str]) -> Tensor:
    """Multiply two tensors as matrices [batch, free, contracted]."""
    free_a, free_b = (_as_wanted(state, tensor, batch, contracted) for tensor in (a, b))
    if _is_result(state, batch, free_b, free_a) and not _is_result(state, batch, free_a, free_b):
        a, b, free_a, free_b = b, a, free_b, free_a
    indices = (*batch, *free_a, *free_b)
    left = _operand(state, a, batch, free_a, contracted)
    right = _operand(state, b, batch, free_b, contracted)
    if left == right and free_a:
        value = state.program.add(s.Gram((left,)))
        return Tensor(state.program.reshape(value, state.shape(indices)), indices)
    axes = len(state.program.shapes[right])
    right = state.program.transpose(right, [*range(axes - 2), axes - 1, axes - 2])
    value = state.program.add(s.MatMul((left, right)))
    return Tensor(state.program.reshape(value, state.shape(indices)), indices)


def _is_result(state: State, *groups: Sequence[str]) -> bool:
    """Whether the indices are in the order of the result, ignoring indices that do not affect the memory layout."""
    found, wanted = (
        [index for index in order if state.sizes[index] != 1 and index not in state.expanded]
        for order in (itertools.chain(*groups), state.open)
    )
    return found == wanted


def _as_wanted(state: State, tensor: Tensor, batch: Sequence[str], contracted: Sequence[str]) -> list[str]:
    """The free indices of a factor, in the order of the result if they are at least as large as the contracted ones."""
    free = [index for index in tensor.indices if index not in batch and index not in contracted]
    larger = state.size(free) >= state.size(contracted)
    return sorted(free, key=state.open.index) if larger and set(free) <= set(state.open) else free


def _operand(state: State, tensor: Tensor, batch: Sequence[str], free: Sequence[str], contracted: Sequence[str]) -> int:
    """The tensor as [batch, free, contracted], or as a transposed view if its axes are [batch, contracted, free].

    Both factors of a product use this form, so that the two factors of a Gram matrix are the same value.
    """
    front = [state.size(batch)] if batch else []
    if list(tensor.indices) == [*batch, *contracted, *free] and contracted and free:
        value = state.matrix(tensor, [*batch, *contracted, *free], (*front, state.size(contracted), state.size(free)))
        axes = len(front) + 2
        return state.program.transpose(value, [*range(axes - 2), axes - 1, axes - 2])
    return state.matrix(tensor, [*batch, *free, *contracted], (*front, state.size(free), state.size(contracted)))


# ----------------------------------------------------------------------- products that avoid copies for merging axes
def broadcast(state: State, a: Tensor, b: Tensor, batch: Sequence[str], contracted: Sequence[str]) -> Tensor | None:
    """If free indices surround the contracted ones, turn those in front into batch axes of both factors."""
    return _broadcast(state, a, b, batch, contracted) or _broadcast(state, b, a, batch, contracted)


def _broadcast(
    state: State, big: Tensor, small: Tensor, batch: Sequence[str], contracted: Sequence[str]
) -> Tensor | None:
    places = sorted(big.indices.index(index) for index in contracted)
    low, high = places[0], places[-1] + 1
    front, inner, after = big.indices[:low], big.indices[low:high], big.indices[high:]
    if len(inner) > len(contracted) or not after or not set(batch) < set(front):
        return None
    blocks = [(held, list(group)) for held, group in itertools.groupby(front, lambda index: index in batch)]
    free = [index for index in small.indices if index not in batch and index not in contracted]
    indices = (*front, *free, *after)
    last = set(indices) == set(state.open) and list(indices) != sorted(indices, key=state.open.index)
    if last and state.size(indices) > state.size(big.indices):
        return None  # reordering the result would cost more than the copy that this avoids
    own = [index for index in front if index in batch]
    axes = tuple(state.size(group) if held else 1 for held, group in blocks)
    left = state.matrix(small, [*own, *free, *inner], (*axes, state.size(free), state.size(inner)))
    axes = tuple(state.size(group) for _, group in blocks)
    right = state.matrix(big, list(big.indices), (*axes, state.size(inner), state.size(after)))
    value = state.program.add(s.MatMul((left, right)))
    return Tensor(state.program.reshape(value, state.shape(indices)), indices)


def added_up(state: State, a: Tensor, b: Tensor, batch: Sequence[str], contracted: Sequence[str]) -> Tensor | None:
    """If contracted indices surround the free ones, add one product for each value of those in front."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a.indices, b.indices, strict=False))
    front = [index for index, _ in pairs]
    inner = [index for index in contracted if index not in front]
    added = [index for index in front if index not in batch]
    if not inner or not added or not set(batch) <= set(front):
        return None
    if all(tensor.indices[len(front)] in inner for tensor in (a, b)):
        return None
    return state.summed(_product(state, a, b, front, inner), {*a.indices, *b.indices} - {*added})
