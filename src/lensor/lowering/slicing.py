"""Division of an index of a network into parts."""

from __future__ import annotations

import itertools

from lensor.network import AnyNetwork, Operand, indices_of


def sliceable(net: AnyNetwork) -> list[str]:
    """The indices that can be divided into parts, largest first."""
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
    """The largest summed index that appears on every operand, or None."""
    held = [set(indices_of(node)) for term in net.terms for node in term.nodes if isinstance(node, Operand)]
    found = [index for index in sliceable(net) if index not in net.output_indices and all(index in one for one in held)]
    return found[0] if found else None


def parts_of(net: AnyNetwork, index: str, count: int) -> list[AnyNetwork]:
    """Split an index into `count` parts of about equal size, or into its positions: one network per part.

    If the index is summed, the value of the network is the sum of the values of all parts; otherwise it is their
    concatenation along `axis_of(net, index)`.
    """
    size = net.sizes[index] or 0
    count = min(count, size)
    bounds = [size * at // count for at in range(count + 1)]
    return [net.narrow(index, low, high - low) for low, high in itertools.pairwise(bounds)]


def axis_of(net: AnyNetwork, index: str) -> int | None:
    """The axis of the result that starts with this index; None if the index is summed."""
    if index not in net.output_indices:
        return None
    return next(axis for axis, leg in enumerate(net.output) if leg[:1] == (index,))
