"""Unsimplified networks, contracted as in the paper: pairwise along opt_einsum's path, with patterns as dense tensors.

Only the contraction is timed; the path and the patterns are computed beforehand. `simplified`, the paper's second
implementation, contracts the network after simplification by Lensor's rules; crops of an operand become slices. Neither
uses windows, convolutions or lags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import opt_einsum
import torch

from lensor.evaluate import bind_shapes
from lensor.inspect.operations import OPERATIONS
from lensor.network import Delta, Network, Node, Ones, Operand, Pattern, indices_of
from lensor.spec import ConvSpec
from lensor_bench.standard import Operands

Tensor = torch.Tensor


def network(operation: str, simplified: bool) -> Callable[[Operands, ConvSpec], Callable[[], Tensor]]:
    """Prepare the contraction of an operation's network, as written or simplified."""

    def way(given: Operands, spec: ConvSpec) -> Callable[[], Tensor]:
        shapes = {name: tuple(array.shape) for name, array in given.items()}
        net = bind_shapes(OPERATIONS[operation].network(spec), shapes)
        terms = (net.simplify() if simplified else net).terms
        like = next(iter(given.values()))
        calls = [_contraction(term, given, like, slicing=simplified) for term in terms]

        def call() -> Tensor:
            found = calls[0]()
            for term in calls[1:]:
                found = found + term()
            return found

        return call

    return way


def _sliced(net: Network) -> tuple[list[Node], dict[int, dict[str, tuple[str, slice]]]]:
    """The nodes without crops that only slice operands; these slices: {operand position: {index: (index, slice)}}."""
    nodes, slices = list(net.nodes), {}
    for node in net.nodes:
        if not isinstance(node, Pattern) or not node.pattern.is_crop or node.pattern.padding_mode != "zeros":
            continue
        pattern, (i, o, k) = node.pattern, node.legs
        holders = [other for other in net.nodes if other is not node and set(i) & {*indices_of(other)}]
        reads = pattern.reads()[:, 0]
        plain = len(i) == len(o) == 1 and not k and i[0] not in net.output_indices and min(reads) >= 0
        if not plain or not holders or not all(isinstance(other, Operand) for other in holders):
            continue
        if any({*o} & {*indices_of(other)} for other in holders):
            continue
        nodes.remove(node)
        cut = slice(int(reads[0]), int(reads[-1]) + 1, pattern.stride if len(reads) > 1 else 1)
        for other in holders:
            slices.setdefault(id(other), {})[i[0]] = (o[0], cut)
    return nodes, {nodes.index(node): slices[id(node)] for node in nodes if id(node) in slices}


def _contraction(net: Network, given: Operands, like: Tensor, slicing: bool) -> Callable[[], Tensor]:
    """Prepare a contraction that gives operands one axis per index, and the result one axis per group."""
    sizes = {index: size for index, size in net.sizes.items() if size is not None}
    nodes, slices = _sliced(net) if slicing else (list(net.nodes), {})
    letters = {index: opt_einsum.get_symbol(at) for at, index in enumerate(sizes)}

    def letters_of(indices: Sequence[str]) -> str:
        return "".join(letters[index] for index in indices)

    shapes, constants, inputs = [], [], []
    arrays: list[tuple[str, tuple[int, ...], tuple[slice, ...]]] = []
    for at, node in enumerate(nodes):
        mine = slices.get(at, {})
        new = [mine[index][0] if index in mine else index for index in indices_of(node)]
        inputs.append(letters_of(new))
        shape = tuple(sizes[index] for index in indices_of(node))
        if isinstance(node, Operand):
            cuts = tuple(mine[index][1] if index in mine else slice(None) for index in indices_of(node))
            arrays.append((node.name, shape, cuts))
            shapes.append(tuple(sizes[index] for index in new))
        else:
            shapes.append(_dense(node, sizes, like).reshape(shape))
            constants.append(at)
    output = [index for leg in net.output for index in leg]
    equation = f"{','.join(inputs)}->{letters_of(output)}"
    contract = opt_einsum.contract_expression(equation, *shapes, constants=constants)
    shape, scale = net.output_shape, float(net.scale.factor)

    def call() -> Tensor:
        parts = [given[name].reshape(size)[cuts] for name, size, cuts in arrays]
        found = contract(*parts, backend="torch").reshape(shape)
        return found if scale == 1 else found * scale

    return call


def _dense(node: Node, sizes: dict[str, int], like: Tensor) -> Tensor:
    """The tensor of a node that is not an operand."""
    match node:
        case Pattern(pattern):
            return torch.from_numpy(pattern.materialize()).to(like)
        case Delta(indices):
            found = torch.zeros([sizes[index] for index in indices])
            places = torch.arange(sizes[indices[0]])
            found[(places,) * len(indices)] = 1.0
            return found.to(like)
        case Ones(index):
            return torch.ones(sizes[index]).to(like)
    raise TypeError(f"node is {node}, expected one with a known tensor")
