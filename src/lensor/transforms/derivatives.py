"""Derivatives: remove an operand from the network and turn its legs into output legs (equation 7 of the paper)."""

from __future__ import annotations

from lensor.errors import NetworkError
from lensor.network import AnyNetwork, Delta, Group, Network, Node, Ones, Operand, indices_of, sum_of
from lensor.transforms._transform import require_operand
from lensor.transforms.indices import contract_deltas


def _occurrences(net: Network, name: str) -> list[int]:
    return [at for at, node in enumerate(net.nodes) if isinstance(node, Operand) and node.name == name]


def _require_array(net: AnyNetwork, name: str) -> None:
    require_operand(net, name)
    if name in net.selections:
        raise NetworkError(f"operand {name!r} is a selection, expected an array: positions have no derivative")


def _require_new(net: AnyNetwork, name: str, argument: str) -> None:
    if name in net.operand_names:
        raise NetworkError(
            f"{argument} {name!r} is an operand already, expected a new name: operands are {list(net.operand_names)}"
        )


def cut(net: Network, at: int, output: tuple[Group, ...], extra: tuple[Node, ...] = ()) -> Network:
    """Remove the operand at node `at` and append its legs to `output`, with deltas for indices already in `output`.

    Equation 7 of the paper: ∂/∂[A]_S' replaces A by the delta between S and a copy S'. An index that is not in the
    output needs no copy, since summing over it contracts the delta.
    """
    operand = net.nodes[at]
    taken = {index for leg in output for index in leg}
    nodes: list[Node] = [*net.nodes[:at], *net.nodes[at + 1 :], *extra]
    sizes = dict(net.sizes)
    legs: list[Group] = []
    for leg in operand.legs:
        group = []
        for index in leg:
            name = index
            if index in taken:
                name = net.fresh(index + "_", [*sizes, *taken])
                sizes[name] = sizes[index]
                nodes.append(Delta((index, name)))
            taken.add(name)
            group.append(name)
        legs.append(tuple(group))
    held = {index for node in nodes for index in indices_of(node)}
    nodes += [Ones(index) for leg in (*output, *legs) for index in leg if index not in held]
    return contract_deltas(Network.make(nodes, (*output, *legs), sizes, net.scale))


def jacobian(net: AnyNetwork, operand: str) -> AnyNetwork:
    """The Jacobian with respect to an operand, with the output legs followed by the operand's legs.

    If the operand occurs more than once, the result is a sum with one term per occurrence, by the product rule. If you
    only need products with a vector, use `vjp` or `jvp`.

    Example:
        >>> import lensor
        >>> print(lensor.ops.conv(lensor.ConvSpec(2, 2, 5, 3)).jacobian("W"))
        X[n (g c_in) i1] Π1[i1 o1 k1] δ[g g_] δ[c_out c_out_] -> n (g c_out) o1 (g_ c_out_) c_in k1

    Raises:
        NetworkError: if the operand does not exist, or is a selection.
    """
    _require_array(net, operand)
    found = [cut(term, at, term.output) for term in net.terms for at in _occurrences(term, operand)]
    return sum_of([term for one in found for term in one.terms])


def vjp(net: AnyNetwork, operand: str, cotangent: str = "V") -> AnyNetwork:
    """The vector-Jacobian product: the Jacobian contracted with a new operand `cotangent` with the legs of the output.

    Example:
        >>> import lensor
        >>> print(lensor.ops.conv(lensor.ConvSpec(2, 2, 5, 3)).vjp("W"))
        X[n (g c_in) i1] Π1[i1 o1 k1] V[n (g c_out) o1] -> (g c_out) c_in k1

    Raises:
        NetworkError: if the operand does not exist or is a selection, or if the new operand's name is in use.
    """
    _require_array(net, operand)
    _require_new(net, cotangent, "cotangent")
    found = [
        cut(term, at, (), (Operand(cotangent, term.output),))
        for term in net.terms
        for at in _occurrences(term, operand)
    ]
    return sum_of([term for one in found for term in one.terms])


def jvp(net: AnyNetwork, operand: str, tangent: str = "T") -> AnyNetwork:
    """The Jacobian-vector product: replace the operand by a new operand `tangent`, one occurrence at a time.

    Example:
        >>> import lensor
        >>> print(lensor.ops.conv(lensor.ConvSpec(2, 2, 5, 3)).jvp("X"))
        T[n (g c_in) i1] Π1[i1 o1 k1] W[(g c_out) c_in k1] -> n (g c_out) o1

    Raises:
        NetworkError: if the operand does not exist or is a selection, or if the new operand's name is in use.
    """
    _require_array(net, operand)
    _require_new(net, tangent, "tangent")
    found = []
    for term in net.terms:
        for at in _occurrences(term, operand):
            nodes = (*term.nodes[:at], Operand(tangent, term.nodes[at].legs), *term.nodes[at + 1 :])
            found.append(term.replace(nodes=nodes))
    return sum_of(found)
