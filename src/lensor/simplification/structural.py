"""Rules that apply to all networks: deltas, ones, indices of size 1 and parallel indices."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

from lensor.network import Delta, Group, Network, Node, Ones, Scale, indices_of
from lensor.simplification.rule import RuleList, rule
from lensor.transforms.indices import contract_deltas


@rule("index of size 1 squeezed", "structural")
def squeeze(net: Network) -> Network | None:
    """Replace an index of size 1 by the empty group, which means an axis of length 1."""
    if 1 not in net.sizes.values():
        return None
    ones = {index: () for index, size in net.sizes.items() if size == 1}
    # A delta over indices of size 1 equals 1.
    nodes = [node for node in net.nodes if not (isinstance(node, Delta) and node.indices[0] in ones)]
    mapping: dict[str, Group] = dict(ones)
    held = {index for node in nodes for index in indices_of(node)}
    gone = {index for index, size in net.sizes.items() if index not in held and size == 1}
    bare = [Ones(index) for index in sorted(gone)]
    if bare or len(nodes) < len(net.nodes):
        net = net.replace(nodes=[*nodes, *bare])
    return net.relabel(mapping)


@rule("delta contracted", "structural")
def delta(net: Network) -> Network | None:
    """Σ_b δ[a,b] f(b) = f(a), and f(a) δ[a,b] = f(b) δ[a,b]."""
    after = contract_deltas(net)
    return None if after is net or after.exact == net.exact else after


@rule("ones dropped", "structural")
def ones(net: Network) -> Network | None:
    """Drop ones whose index also appears on another node; replace a sum over ones alone by the size of the index."""
    if not any(isinstance(node, Ones) for node in net.nodes):
        return None
    holders = Counter(index for node in net.nodes for index in set(indices_of(node)))
    kept: list[Node] = []
    scale = net.scale
    for node in net.nodes:
        if isinstance(node, Ones) and holders[node.index] > 1:
            holders[node.index] -= 1
        elif isinstance(node, Ones) and -1 not in net.holders[node.index]:
            scale = scale * Scale(powers=((node.index, 1),))
        else:
            kept.append(node)
    return None if len(kept) == len(net.nodes) else net.replace(nodes=kept, scale=scale.bind(net.sizes))


def _neighbours(legs: Iterable[Group], first: str, second: str) -> bool:
    """Whether two indices are adjacent, in this order, wherever either of them occurs."""
    for leg in legs:
        for at, index in enumerate(leg):
            if index == first and leg[at + 1 : at + 2] != (second,):
                return False
            if index == second and (at == 0 or leg[at - 1] != first):
                return False
    return True


@rule("parallel indices merged", "structural")
def merge_parallel(net: Network) -> Network | None:
    """Merge two indices that are adjacent wherever they occur into one index with the product of their sizes."""
    if not [leg for node in net.nodes for leg in node.legs if leg[1:]]:
        return None
    legs = [leg for node in net.nodes if not isinstance(node, (Delta, Ones)) for leg in node.legs]
    legs += net.output
    fixed = {index for node in net.nodes if isinstance(node, (Delta, Ones)) for index in indices_of(node)}
    fixed |= {index for index, _ in net.scale.powers}
    pairs = dict.fromkeys((a, b) for leg in legs for a, b in itertools.pairwise(leg))
    for first, second in pairs:
        sizes = net.sizes[first], net.sizes[second]
        if first == second or first in fixed or second in fixed or sizes[0] is None or sizes[1] is None:
            continue
        if _neighbours(legs, first, second):
            name = net.fresh(f"{first}_{second}")
            return net.relabel({first: (name,), second: ()}, {name: sizes[0] * sizes[1]})
    return None


STRUCTURAL_RULES: RuleList = (squeeze, delta, ones, merge_parallel)
