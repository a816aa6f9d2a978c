"""Indices that a network can be worked through part by part."""

from __future__ import annotations

import itertools

from lensor.network import AnyNetwork, Operand, indices_of


def sliceable(net: AnyNetwork) -> list[str]:
    """Indices that can be worked through part by part, the largest first."""
    leading = {leg[0] for leg in net.output if leg}
    known = net.sizes
    fits = [
        index
        for index in known
        if (known[index] or 0) > 1
        and all(term.sizes.get(index) == known[index] for term in net.terms)
        and (index in leading or index not in net.output_indices)
    ]
    return sorted(fits, key=lambda index: (-(known[index] or 0), index))


def summed_by_all(net: AnyNetwork) -> str | None:
    """A summed index that every operand has, the largest of them."""
    held = [set(indices_of(node)) for term in net.terms for node in term.nodes if isinstance(node, Operand)]
    found = [index for index in sliceable(net) if index not in net.output_indices and all(index in one for one in held)]
    return found[0] if found else None


def parts_of(net: AnyNetwork, index: str, count: int) -> list[AnyNetwork]:
    """Networks over about equal parts of an index, `count` of them or as many as it has positions.

    Their values, added up if the index is summed, else put side by side along `axis_of`, are the network's.
    """
    size = net.sizes[index] or 0
    count = min(count, size)
    bounds = [size * at // count for at in range(count + 1)]
    return [net.narrow(index, low, high - low) for low, high in itertools.pairwise(bounds)]


def axis_of(net: AnyNetwork, index: str) -> int | None:
    """The axis of the result that an index leads; None if it is summed."""
    if index not in net.output_indices:
        return None
    return next(axis for axis, leg in enumerate(net.output) if leg[:1] == (index,))
