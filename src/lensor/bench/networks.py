"""A network contracted as it stands: patterns as dense tensors, pairs along a path of opt_einsum, as the paper does.

What is measured is the contraction alone; the path and the patterns are made before. `simplified` contracts what
Lensor's rules leave of the network, which is the paper's second way. Neither knows of windows, convolutions or lags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import opt_einsum
import torch

from lensor.bench.operations import OPERATIONS
from lensor.bench.standard import Operands
from lensor.execute import bind_shapes
from lensor.network import Delta, Network, Node, Ones, Operand, Pattern, indices_of
from lensor.spec import ConvSpec

Tensor = torch.Tensor


def network(operation: str, simplified: bool) -> Callable[[Operands, ConvSpec], Callable[[], Tensor]]:
    """The way that contracts an operation's network, as written or simplified."""

    def way(given: Operands, spec: ConvSpec) -> Callable[[], Tensor]:
        shapes = {name: tuple(array.shape) for name, array in given.items()}
        net = bind_shapes(OPERATIONS[operation].network(spec), shapes)
        terms = (net.simplify() if simplified else net).terms
        like = next(iter(given.values()))
        calls = [_contraction(term, given, like) for term in terms]

        def call() -> Tensor:
            found = calls[0]()
            for term in calls[1:]:
                found = found + term()
            return found

        return call

    return way


def _contraction(net: Network, given: Operands, like: Tensor) -> Callable[[], Tensor]:
    """One contraction, prepared: operands get an axis for each index, the result an axis for each group."""
    sizes = {index: size for index, size in net.sizes.items() if size is not None}
    letters = {index: opt_einsum.get_symbol(at) for at, index in enumerate(sizes)}

    def letters_of(indices: Sequence[str]) -> str:
        return "".join(letters[index] for index in indices)

    names = [node.name for node in net.nodes if isinstance(node, Operand)]
    shapes, constants, inputs = [], [], []
    for at, node in enumerate(net.nodes):
        inputs.append(letters_of(tuple(indices_of(node))))
        shape = tuple(sizes[index] for index in indices_of(node))
        if isinstance(node, Operand):
            shapes.append(shape)
        else:
            shapes.append(_dense(node, sizes, like).reshape(shape))
            constants.append(at)
    output = [index for leg in net.output for index in leg]
    equation = f"{','.join(inputs)}->{letters_of(output)}"
    contract = opt_einsum.contract_expression(equation, *shapes, constants=constants)
    axes = [shape for node, shape in zip(net.nodes, shapes, strict=True) if isinstance(node, Operand)]
    shape, scale = net.output_shape, float(net.scale.factor)

    def call() -> Tensor:
        arrays = [given[name].reshape(size) for name, size in zip(names, axes, strict=True)]
        found = contract(*arrays, backend="torch").reshape(shape)
        return found if scale == 1 else found * scale

    return call


def _dense(node: Node, sizes: dict[str, int], like: Tensor) -> Tensor:
    """The tensor of a node that is no operand."""
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
    raise TypeError(f"no tensor is known for {node}")
