"""Division of an index of a network into parts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TypeAlias

from lensor.network import AnyNetwork, Ones, Operand, indices_of, sum_of
from lensor.simplification.engine import simplify_untraced

Slices: TypeAlias = Mapping[str, tuple[tuple[int, int], ...]]
"""For each operand, the axes that start with an index, and the number of entries for each of its positions."""


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


def summed_by_all(net: AnyNetwork) -> list[str]:
    """The summed indices that appear on every operand, largest first; none if a term has no operands."""
    operands = [[node for node in term.nodes if isinstance(node, Operand)] for term in net.terms]
    held = [set(indices_of(node)) for nodes in operands for node in nodes]
    if not all(operands):
        return []
    return [index for index in sliceable(net) if index not in net.output_indices and all(index in one for one in held)]


def parts_of(net: AnyNetwork, index: str, count: int) -> list[AnyNetwork]:
    """Split an index into `count` parts of about equal size, or into its positions: one network per part.

    If the index is summed, the value of the network is the sum of the values of all parts; otherwise it is their
    concatenation along `axis_of(net, index)`.
    """
    return [net.narrow(index, start, length) for start, length in bounds_of(net, index, count)]


def bounds_of(net: AnyNetwork, index: str, count: int) -> list[tuple[int, int]]:
    """The (start, length) of each part of `parts_of`."""
    size = net.sizes[index] or 0
    count = min(count, size)
    return [(low, high - low) for low, high in itertools.pairwise(size * at // count for at in range(count + 1))]


class Parts:
    """An index of a network divided into parts as by `parts_of`, each of which is simplified when it is needed.

    Args:
        net: the network.
        index: the index to divide.
        count: the number of parts.
    """

    def __init__(self, net: AnyNetwork, index: str, count: int) -> None:
        self.net, self.index, self.count = net, index, count
        self.bounds = bounds_of(net, index, count)
        self.slices = slices_of(net, index)
        self._simplified: dict[tuple[int, int], tuple[AnyNetwork, dict[tuple, AnyNetwork]]] = {}

    def simplified(self, start: int, length: int) -> tuple[AnyNetwork, dict[tuple, AnyNetwork]]:
        """The network of one part, simplified, and a dictionary for what `Strategy.prepared` makes of it.

        If the operands are sliced, `start` is not used.
        """
        key = (0, length) if self.slices is not None else (start, length)
        if key not in self._simplified:
            net, index = self.net, self.index
            part = net.narrow(index, *key) if self.slices is None else _shortened(net, index, length)
            self._simplified[key] = simplify_untraced(part), {}
        return self._simplified[key]


def _shortened(net: AnyNetwork, index: str, length: int) -> AnyNetwork:
    """The network with another size of an index; the scale does not change."""
    terms = [term.replace(sizes={index: length}, scale=term.scale.bind(term.sizes)) for term in net.terms]
    return sum_of(terms)


def slices_of(net: AnyNetwork, index: str) -> Slices | None:
    """The slices of operands for which a part is the network with a shorter index; None if it is not."""
    found: dict[str, tuple[tuple[int, int], ...]] = {}
    for term, node in [(one, node) for one in net.terms for node in one.nodes]:
        if isinstance(node, Operand):
            legs = [(axis, leg) for axis, leg in enumerate(node.legs) if index in leg]
            if any(leg.index(index) or leg.count(index) > 1 for _, leg in legs):
                return None
            axes = tuple([(axis, term.group_size(leg[1:]) or 0) for axis, leg in legs])
            if found.setdefault(node.name, axes) != axes:
                return None
        elif not isinstance(node, Ones) and index in indices_of(node):
            return None
    return found


def axis_of(net: AnyNetwork, index: str) -> int | None:
    """The axis of the result that starts with this index; None if the index is summed."""
    if index not in net.output_indices:
        return None
    return next(axis for axis, leg in enumerate(net.output) if leg[:1] == (index,))
