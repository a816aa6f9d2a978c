"""Identifying, splitting and contracting indices: the building blocks of transforms and simplification rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lensor.network import Delta, Group, Network, Ones, indices_of, relabel_node


def refine(net: Network, parts: Mapping[str, Mapping[str, int | None]]) -> Network:
    """Split indices: replace each index by the group of its parts, and likewise the indices joined to it by deltas.

    Args:
        net: the network.
        parts: the parts of each index, slowest first, with their sizes, whose product must be the size of the index.
    """
    mapping: dict[str, Group] = {index: tuple(new) for index, new in parts.items()}
    sizes = {name: size for new in parts.values() for name, size in new.items()}
    todo = list(parts)
    while todo:
        index = todo.pop()
        for node in net.nodes:
            if isinstance(node, Delta) and index in node.indices:
                for partner in node.indices:
                    if partner not in mapping:
                        names = []
                        for part in mapping[index]:
                            names.append(net.fresh(part + "_", sizes))
                            sizes[names[-1]] = sizes[part]
                        mapping[partner] = tuple(names)
                        todo.append(partner)
    return net.relabel(mapping, sizes)


def equate(net: Network, left: Group, right: Group) -> Network | None:
    """Identify two groups of equal size, splitting indices where the boundaries of the groups differ.

    Identified output indices are joined by a delta. Returns None if the boundaries of the two groups have no common
    refinement: groups with sizes 4·6 and 8·3 have one, groups with sizes 2·3 and 3·2 do not.
    """
    while True:
        a, b = list(left), list(right)
        pairs: list[tuple[str, str]] = []
        split: dict[str, dict[str, int | None]] | None = None
        # The slowest index comes last, so that boundaries are compared from the fastest end.
        while a and b:
            if a[-1] == b[-1]:
                a.pop()
                b.pop()
                continue
            p, q = net.sizes[a[-1]], net.sizes[b[-1]]
            if p == q or ((p is None or q is None) and len(a) == len(b) == 1):
                pairs.append((a.pop(), b.pop()))
                continue
            if p is None or q is None:
                return None
            big, big_size, small_size = (a[-1], p, q) if p > q else (b[-1], q, p)
            if small_size == 0 or big_size % small_size:
                return None
            outer = net.fresh(big + "a")
            inner = net.fresh(big + "b", [outer])
            split = {big: {outer: big_size // small_size, inner: small_size}}
            break
        if split is not None:
            big, parts = next(iter(split.items()))
            before = net
            net = refine(net, split)
            swap = {big: tuple(parts)}
            # The groups may also contain an index that shares a delta with the split index.
            if len(net.sizes) > len(before.sizes) + 1:
                return _equate_after_split(net, left, right, swap)
            left = tuple(new for index in left for new in swap.get(index, (index,)))
            right = tuple(new for index in right for new in swap.get(index, (index,)))
            continue
        if any(net.sizes[index] != 1 for index in (*a, *b)):
            return None
        pairs = [(one, other) for one, other in pairs if one != other]
        sizes = {}
        for one, other in pairs:
            sizes[one] = sizes[other] = net.sizes[one] if net.sizes[one] is not None else net.sizes[other]
        # Add all deltas at once, since an index may occur in several pairs.
        return contract_deltas(net.replace(nodes=(*net.nodes, *(Delta(pair) for pair in pairs)), sizes=sizes))


def _equate_after_split(after: Network, left: Group, right: Group, swap: Mapping[str, Group]) -> Network | None:
    gone = (set(left) | set(right)) - set(after.sizes) - set(swap)
    if gone:
        return None  # this function does not split indices that share a delta with the split index
    return equate(
        after,
        tuple(new for index in left for new in swap.get(index, (index,))),
        tuple(new for index in right for new in swap.get(index, (index,))),
    )


def contract_deltas(net: Network) -> Network:
    """Contract every delta as far as possible.

    Σ_b δ[a,b] f(b) = f(a): all indices that deltas join become one index, named after the first of them in the output.
    A delta remains only between two or more output indices; other nodes then carry only the first of these indices.
    """
    deltas = [node for node in net.nodes if isinstance(node, Delta)]
    if not deltas:
        return net
    classes = _classes(deltas)
    nodes = [node for node in net.nodes if not isinstance(node, Delta)]
    kept: list[Delta | Ones] = []
    places = {index: at for at, index in enumerate(net.output_indices)}
    mapping: dict[str, Group] = {}
    sizes: dict[str, int | None] = {}
    for joined in classes:
        open_ = sorted((index for index in joined if index in places), key=places.__getitem__)
        first = open_[0] if open_ else joined[0]
        size = next((net.sizes[index] for index in joined if net.sizes[index] is not None), None)
        sizes.update(dict.fromkeys(joined, size))
        mapping.update({index: (first,) for index in joined if index != first})
        if len(open_) > 1:
            kept.append(Delta(tuple(open_)))
        else:
            kept.append(Ones(first))
    renamed = [new for node in nodes for new in relabel_node(node, mapping)]
    held = {index for node in renamed for index in indices_of(node)}
    kept = [node for node in kept if isinstance(node, Delta) or node.index not in held]
    scale = net.scale.bind({**net.sizes, **sizes}).relabel(mapping)
    return net.replace(nodes=(*renamed, *kept), scale=scale, sizes=sizes)


def _classes(deltas: Sequence[Delta]) -> list[list[str]]:
    """The classes of indices that deltas join, directly or indirectly; each starts with its representative."""
    classes: dict[int, list[str]] = {}
    named: dict[int, str] = {}
    where: dict[str, int] = {}  # smaller classes are merged into the largest, under a number that preserves their order
    alias: dict[int, int] = {}
    for number, delta in enumerate(deltas):
        hit = sorted({alias[where[index]] for index in delta.indices if index in where})
        new = [index for index in delta.indices if index not in where]
        name = named[hit[-1]] if hit else new[0]
        found = sorted((classes.pop(known) for known in hit), key=len)
        joined = found.pop() if found else []
        home = where[joined[0]] if joined else number
        for index in (*(index for part in found for index in part), *new):
            where[index] = home
            joined.append(index)
        alias[home], classes[number], named[number] = number, joined, name
    return [[named[number], *(index for index in classes[number] if index != named[number])] for number in classes]
