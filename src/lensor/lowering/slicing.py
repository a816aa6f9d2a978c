"""Division of an index of a network into parts."""

from __future__ import annotations

import itertools

from lensor.network import AnyNetwork, Node, Operand, Pattern, Sum, indices_of
from lensor.pattern import IndexPattern


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


def simplified_parts(net: AnyNetwork, index: str, count: int) -> list[AnyNetwork]:
    """The networks of `parts_of`, simplified.

    Parts of equal size differ in the start of crops. If the index is only on operands, the rules do not depend on it.
    Then two parts of each size are simplified, and the others follow from the places in which these two differ.
    """
    parts = parts_of(net, index, count)
    size = net.sizes[index] or 0
    bounds = itertools.pairwise(size * at // len(parts) for at in range(len(parts) + 1))
    crops = [
        IndexPattern(size, 1, padding=(-low, high - size), output_size=high - low).normalize() for low, high in bounds
    ]
    on_patterns = any(
        isinstance(node, Pattern) and index in indices_of(node) for term in net.terms for node in term.nodes
    )
    done: dict[int, AnyNetwork] = {}
    for at, part in enumerate(parts):
        alike = [other for other in done if crops[other].output_size == crops[at].output_size][:2]
        moved = None
        if len(alike) == 2 and not on_patterns:
            moved = _moved([(done[other], crops[other]) for other in alike], crops[at])
        done[at] = part.simplify() if moved is None else moved
    return [done[at] for at in range(len(parts))]


def _moved(parts: list[tuple[AnyNetwork, IndexPattern]], crop: IndexPattern) -> AnyNetwork | None:
    """The part with another crop, given two parts with theirs; None if these differ in anything else."""
    (one, first), (two, second) = parts
    terms = []
    for term, other in zip(one.terms, two.terms, strict=False):
        nodes: list[Node] = []
        for node, twin in zip(term.nodes, other.nodes, strict=False):
            if node != twin:
                if not isinstance(node, Pattern) or node.pattern != first or twin != Pattern(second, node.legs):
                    return None
                node = Pattern(crop, node.legs)
            nodes.append(node)
        shapes = [(len(found.nodes), found.output, found.scale) for found in (term, other)]
        if shapes[0] != shapes[1]:
            return None
        terms.append(term.replace(nodes=nodes))
    if len(one.terms) != len(two.terms):
        return None
    return terms[0] if len(terms) == 1 else Sum(tuple(terms))


def axis_of(net: AnyNetwork, index: str) -> int | None:
    """The axis of the result that starts with this index; None if the index is summed."""
    if index not in net.output_indices:
        return None
    return next(axis for axis, leg in enumerate(net.output) if leg[:1] == (index,))
