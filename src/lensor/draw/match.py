"""Occurrences of one network inside another, for shading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lensor.network import Group, Network, Node, Operand, Pattern


def occurrences(net: Network, part: Network) -> list[frozenset[int]]:
    """The sets of nodes in a network that match another network in operand names, patterns and connections.

    Index names may differ, and an output index of the part may correspond to a group of indices in the network. Indices
    that the part sums over must not appear on other nodes of the network.

    Example:
        >>> import lensor
        >>> from lensor.draw.match import occurrences
        >>> spec = lensor.ConvSpec(2, 4, (9,), 3)
        >>> [sorted(one) for one in occurrences(lensor.ops.kfac_input_factor(spec), lensor.ops.unfold(spec))]
        [[0, 1], [2, 3]]
    """
    kept = {index for leg in part.output for index in leg}
    found = []
    for nodes, names in _assigned(net, part, kept, [], {}):
        outside = [leg for at, node in enumerate(net.nodes) if at not in nodes for leg in node.legs]
        held = {index for leg in (*outside, *net.output) for index in leg}
        if not any(held & set(group) for index, group in names.items() if index not in kept):
            found.append(frozenset(nodes))
    return list(dict.fromkeys(found))


def _assigned(
    net: Network, part: Network, kept: set[str], nodes: list[int], names: dict[str, Group]
) -> Iterator[tuple[list[int], dict[str, Group]]]:
    """Match the part's nodes one by one to nodes of the network; yields the nodes and the mapping of indices."""
    if len(nodes) == len(part.nodes):
        yield nodes, names
        return
    wanted = part.nodes[len(nodes)]
    for at, node in enumerate(net.nodes):
        if at in nodes or not _alike(node, wanted, kept):
            continue
        joined = dict(names)
        pairs = [pair for legs in zip(wanted.legs, node.legs, strict=True) for pair in _pairs(*legs, kept)]
        if all(joined.setdefault(index, group) == group for index, group in pairs) and _are_apart(joined.values()):
            yield from _assigned(net, part, kept, [*nodes, at], joined)


def _pairs(wanted: Group, found: Group, kept: set[str]) -> list[tuple[str, Group]]:
    """Map each index of a leg to one index, or a leg's single output index to the whole leg."""
    if _may_group(wanted, kept):
        return [(wanted[0], found)]
    return [(index, (other,)) for index, other in zip(wanted, found, strict=True)]


def _may_group(leg: Group, kept: set[str]) -> bool:
    return len(leg) == 1 and leg[0] in kept


def _are_apart(groups: Iterable[Group]) -> bool:
    indices = [index for group in groups for index in group]
    return len(indices) == len(set(indices))


def _alike(node: Node, wanted: Node, kept: set[str]) -> bool:
    """Whether two nodes are equal except for their indices."""
    if type(node) is not type(wanted) or len(node.legs) != len(wanted.legs):
        return False
    if isinstance(node, Operand) and isinstance(wanted, Operand) and node.name != wanted.name:
        return False
    if isinstance(node, Pattern) and isinstance(wanted, Pattern) and node.pattern != wanted.pattern:
        return False
    legs = zip(node.legs, wanted.legs, strict=True)
    return all(len(ours) == len(theirs) or _may_group(theirs, kept) for ours, theirs in legs)
