"""Composition of networks: batching, substitution, products, and connected parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from lensor.errors import NetworkError, require_type
from lensor.network import AnyNetwork, Group, Network, Node, Ones, Operand, Scale, Sum, indices_of, new_name, sum_of
from lensor.network.subscripts import parse_subscripts
from lensor.transforms._transform import require_index, require_operand
from lensor.transforms.indices import contract_deltas, equate


def batch(net: AnyNetwork, index: str, operands: Sequence[str], size: int | None = None) -> AnyNetwork:
    """Add a leading index to some operands and to the output, like vmap: there is one result per position of the index.

    Example:
        >>> import lensor
        >>> print(lensor.ops.conv(lensor.ConvSpec(1, 1, 9, 3)).vjp("W").batch("v", ["V"]))
        X[n (g c_in) i1] Π1[i1 o1 k1] V[v n (g c_out) o1] -> v (g c_out) c_in k1

    Raises:
        NetworkError: if the index already exists, an operand does not exist, or an operand is a selection.
        TypeError: if `operands` is a single name instead of a sequence of names.
    """
    if isinstance(operands, str):
        raise TypeError(f"operands is the str {operands!r}, expected a sequence of names")
    if index in net.sizes:
        raise NetworkError(f"index {index!r} exists already, expected a new name: indices are {sorted(net.sizes)}")
    for name in operands:
        require_operand(net, name)
        if name in net.selections:
            raise NetworkError(
                f"operand {name!r} is a selection, expected an array: all examples share one vector of positions"
            )
    terms = []
    for term in net.terms:
        nodes = [
            Operand(node.name, ((index,), *node.legs)) if isinstance(node, Operand) and node.name in operands else node
            for node in term.nodes
        ]
        if not any(index in indices_of(node) for node in nodes):
            nodes.append(Ones(index))
        terms.append(term.replace(nodes=nodes, output=((index,), *term.output), sizes={index: size}))
    return sum_of(terms)


def _apart(net: AnyNetwork, other: Any, keep: Sequence[str] = ()) -> Any:
    """Append `_` to the indices of `other` whose names also appear in `net`, except those in `keep`.

    An index has the same new name in all terms of a sum.
    """
    used = {*net.sizes, *other.sizes}
    names = {index: new_name(index, used) for index in other.sizes if index not in keep and index in net.sizes}
    return other.rename(names) if names else other


def substitute(net: AnyNetwork, operand: str, network: AnyNetwork) -> AnyNetwork:
    """Replace an operand by a network, such as a weight by a CP, Tucker or tensor-train kernel.

    Each output leg of the network is matched with a leg of the operand. If their groups differ, indices are split.
    Operands with equal names denote the same array.

    Example:
        >>> import lensor
        >>> net = lensor.ops.conv(lensor.ConvSpec(4, 6, 9, 3))
        >>> cp = lensor.contraction("o r, i r, k r -> o i k", "A", "B", "C", o=6, i=4, k=3, r=2)
        >>> print(net.substitute("W", cp).simplify())
        X[n c_in i1] Π1[i1 o1 k1] A[c_out r] B[c_in r] C[k1 r] -> n c_out o1

    Raises:
        NetworkError: if the operand does not exist, or if its legs and the network's output do not match.
    """
    require_operand(net, operand)
    require_type(network, "network", Network, Sum)
    terms: list[Network] = []
    for term in net.terms:
        times = sum(isinstance(node, Operand) and node.name == operand for node in term.nodes)
        for choice in product(network.terms, repeat=times):
            terms.append(_substitute_term(term, operand, choice))
    return sum_of(terms)


def _substitute_term(term: Network, operand: str, choice: Sequence[Network]) -> Network:
    taken = {name for net in (term, *choice) for name in net.operand_names}
    mark = operand
    marks = []
    nodes = list(term.nodes)
    for at, node in enumerate(nodes):
        if isinstance(node, Operand) and node.name == operand:
            while mark in taken:
                mark += "_"
            taken.add(mark)
            marks.append(mark)
            nodes[at] = Operand(mark, node.legs)
    net = term.replace(nodes=nodes)
    for mark, inner in zip(marks, choice, strict=True):
        at = next(at for at, node in enumerate(net.nodes) if isinstance(node, Operand) and node.name == mark)
        legs = net.nodes[at].legs
        if len(legs) != len(inner.output):
            raise NetworkError(
                f"network has {len(inner.output)} output legs, expected {len(legs)} as operand {operand!r}"
            )
        inner = _apart(net, inner)
        for place, (leg, other) in enumerate(zip(legs, inner.output, strict=True)):
            sizes = net.group_size(leg), inner.group_size(other)
            if None not in sizes and sizes[0] != sizes[1]:
                raise NetworkError(
                    f"output leg {place} of network, {other}, has size {sizes[1]}, expected {sizes[0]} as leg {place}"
                    f" of operand {operand!r}, {leg}"
                )
        joined = net.replace(
            nodes=(*net.nodes[: at + 1], *inner.nodes, *net.nodes[at + 1 :]),
            scale=net.scale * inner.scale,
            sizes=inner.sizes,
        )
        # Add a temporary copy of the operand with the network's legs, to identify its legs with the operand's.
        twin = Operand(mark, inner.output)
        joined = joined.replace(nodes=(*joined.nodes, twin))
        for place in range(len(legs)):
            copies = [node for node in joined.nodes if isinstance(node, Operand) and node.name == mark]
            left, right = copies[0].legs[place], copies[1].legs[place]
            tied = equate(joined, left, right)
            if tied is None:
                unknown = [index for index in (*left, *right) if joined.sizes.get(index) is None]
                hint = f": the sizes of {', '.join(unknown)} are unknown, give them" if unknown else ""
                raise NetworkError(
                    f"output leg {place} of network is grouped differently from leg {place} of operand {operand!r},"
                    f" expected groups with a common refinement{hint}"
                )
            joined = tied
        rest = [node for node in joined.nodes if not (isinstance(node, Operand) and node.name == mark)]
        held = {index for node in rest for index in indices_of(node)}
        gone = {index for node in joined.nodes for index in indices_of(node)} - held
        rest += [Ones(index) for index in sorted(gone)]
        net = contract_deltas(joined.replace(nodes=rest))
    return net


def merge(net: AnyNetwork, other: AnyNetwork, share: Sequence[str] = (), output: str | None = None) -> AnyNetwork:
    """Multiply two networks that share some indices.

    If an index of `other` is not shared but has the same name as an index of `net`, `_` is appended to its name.

    Args:
        net: the first factor.
        other: the second factor; operands with equal names denote the same array.
        share: indices that both factors have in common; a shared index that is not in `output` is summed.
        output: output legs of the product, as subscripts; by default the legs of `net`, followed by those of `other`
            without the shared indices.

    Example:
        >>> import lensor
        >>> patches = lensor.ops.unfold(lensor.ConvSpec(2, 1, 9, 3))
        >>> print(patches.merge(patches, share=["n", "o1"], output="(c_in k1) (c_in_ k1_)"))
        X[n c_in i1] Π1[i1 o1 k1] X[n c_in_ i1_] Π1[i1_ o1 k1_] -> (c_in k1) (c_in_ k1_)

    Raises:
        NetworkError: if a factor lacks a shared index, the sizes of a shared index differ, or an output index is
            unknown.
    """
    require_type(other, "other", Network, Sum)
    if isinstance(share, str):
        raise TypeError(f"share is the str {share!r}, expected a sequence of names")
    other = _apart(net, other, share)
    return sum_of([_merge_terms(one, two, share, output) for one, two in product(net.terms, other.terms)])


def _merge_terms(one: Network, two: Network, share: Sequence[str], output: str | None) -> Network:
    for index in share:
        require_index(one, index)
        require_index(two, index)
        sizes = one.sizes[index], two.sizes[index]
        if None not in sizes and sizes[0] != sizes[1]:
            raise NetworkError(
                f"shared index {index!r} has sizes {sizes[0]} and {sizes[1]} in the two networks, expected equal sizes"
            )
    sizes = {
        index: one.sizes.get(index) if one.sizes.get(index) is not None else two.sizes.get(index) for index in share
    }
    if output is None:
        behind = [tuple(index for index in leg if index not in share) for leg in two.output]
        legs: tuple[Group, ...] = (*one.output, *(leg for leg in behind if leg))
    else:
        text = f"{' '.join(dict.fromkeys([*one.sizes, *two.sizes]))} -> {output}"
        legs = parse_subscripts(text).output
    nodes = (*one.nodes, *two.nodes)
    return contract_deltas(Network.make(nodes, legs, {**one.sizes, **two.sizes, **sizes}, one.scale * two.scale))


def components(net: AnyNetwork) -> tuple[Network, ...]:
    """Split a network into its connected parts, whose outer product it is; the first part includes the scale.

    Example:
        >>> import lensor
        >>> for part in lensor.ops.conv_weight_jacobian(lensor.ConvSpec(2, 3, 5, 3)).simplify().components():
        ...     print(part)
        X[n c_in i1] Π1[i1 o1 k1] -> n o1 c_in k1
        δ[c_out c_out_] -> c_out c_out_

    Raises:
        NetworkError: if `net` is a sum of networks.
    """
    if not isinstance(net, Network):
        raise NetworkError("net is a Sum, expected a Network: call components on the terms of the sum")
    parts: list[tuple[set[str], list[Node]]] = []
    seen: set[int] = set()
    for start in range(len(net.nodes)):
        if start in seen:
            continue
        seen.add(start)
        places, todo, held = [], [start], set()
        while todo:
            places.append(todo.pop())
            new = set(indices_of(net.nodes[places[-1]])) - held
            held |= new
            near = {at for index in new for at in net.holders[index]} - seen - {-1}
            seen |= near
            todo += near
        parts.append((held, [net.nodes[at] for at in sorted(places)]))
    return tuple(
        Network.make(
            nodes,
            [(index,) for index in net.output_indices if index in indices],
            net.sizes,
            net.scale if at == 0 else Scale(),
        )
        for at, (indices, nodes) in enumerate(parts)
    )
