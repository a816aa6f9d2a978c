"""Sub-tensors: diagonals, narrowing, selecting, slicing, keeping a summed index open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from lensor.errors import NetworkError, require_share
from lensor.network import (
    AnyNetwork,
    Group,
    Network,
    Node,
    Operand,
    Pattern,
    Scale,
    Select,
    indices_of,
    relabel_node,
    sum_of,
)
from lensor.pattern import IndexPattern, as_integer
from lensor.transforms._transform import require_index, require_size, transform
from lensor.transforms.indices import contract_deltas, refine


def _without(output: tuple[Group, ...], index: str) -> tuple[Group, ...]:
    """The output without an index; a leg that held nothing else goes with it."""
    return tuple(tuple(i for i in leg if i != index) for leg in output if leg != (index,))


@transform
def diagonal(net: Network, first: str, second: str) -> Network:
    """The diagonal over two output indices of one size: `second` becomes `first` and leaves the output.

    Example:
        >>> import lensor
        >>> print(lensor.contraction("n i, n j -> i j", "X", "X").bind(i=3, j=3).diagonal("i", "j"))
        X[n i] X[n i] -> i

    Raises:
        NetworkError: if one is no output index, or their sizes differ.
    """
    for index in (first, second):
        require_index(net, index, net.output_indices, "output index")
    if first == second:
        raise NetworkError(f"a diagonal needs two different output indices, got {first!r} twice")
    sizes = net.sizes[first], net.sizes[second]
    if None not in sizes and sizes[0] != sizes[1]:
        raise NetworkError(f"a diagonal needs indices of one size, {first!r} has {sizes[0]}, {second!r} has {sizes[1]}")
    size = sizes[0] if sizes[0] is not None else sizes[1]
    both = {first: size, second: size}
    inner = net.replace(output=_without(net.output, second), sizes=both)
    return contract_deltas(inner.relabel({second: (first,)}, both, join=True))


@transform
def block_diagonal(net: Network, first: str, second: str, block_size: int) -> Network:
    """The blocks of `block_size` on the diagonal of two output indices: `first` becomes (block, within).

    Example:
        >>> import lensor
        >>> print(lensor.contraction("n i, n j -> i j", "X", "X").bind(i=6, j=6).block_diagonal("i", "j", 2))
        X[n (i_block i)] X[n (i_block j)] -> i_block i j

    Raises:
        NetworkError: if one is no output index, their sizes differ, or the block size does not divide them.
    """
    for index in (first, second):
        require_index(net, index, net.output_indices, "output index")
    sizes = require_size(net, first), require_size(net, second)
    block = as_integer(block_size, "block_size")
    if sizes[0] != sizes[1] or block < 1 or sizes[0] % block:
        raise NetworkError(f"block_size must divide the sizes of {first!r} and {second!r}, got {block} for {sizes}")
    outer = net.fresh(f"{first}_block")
    copy = net.fresh(f"{second}_block", [outer])
    within = net.fresh(first, [outer, copy])
    within_copy = net.fresh(second, [outer, copy, within])
    split = refine(
        net,
        {
            first: {outer: sizes[0] // block, within: block},
            second: {copy: sizes[0] // block, within_copy: block},
        },
    )
    legs: list[Group] = []
    for leg in split.output:
        legs += [(outer,), (within,)] if leg == (outer, within) else [leg]
    result = split.replace(output=tuple(legs)).diagonal(outer, copy)
    return result.relabel(
        {within: (first,), within_copy: (second,)}, {first: result.sizes[within], second: result.sizes[within_copy]}
    )


def _pick(net: Network, index: str, start: int, step: int, count: int) -> Network:
    """Keep positions start, start + step, ... of an index: a pattern of kernel size 1 in front of it."""
    size = require_size(net, index)
    selection = IndexPattern(
        size, 1, stride=step, padding=(-start, start + (count - 1) * step + 1 - size), output_size=count
    )
    full = net.fresh(f"{index}_full")
    inner = net.replace(output=(), scale=net.scale.bind({index: size})).relabel({index: (full,)}, {full: size})
    return contract_deltas(
        inner.replace(
            nodes=(*inner.nodes, Pattern(selection, ((full,), (index,), ()))),
            output=net.output,
            sizes={**net.sizes, index: count},
        )
    )


def slice(net: AnyNetwork, index: str, start: int, stop: int, step: int = 1) -> AnyNetwork:
    """Positions start, start + step, ... below stop of an index; of a summed index, the sum over these.

    Example:
        >>> import lensor
        >>> net = lensor.ops.conv(lensor.ConvSpec(1, 1, 9, 3)).slice("o1", 1, 7, 2)
        >>> net.sizes["o1"], str(net.simplify())
        (3, 'X[n () i1] Π1[i1 o1 k1] W[() () k1] -> n () o1')

    Raises:
        NetworkError: for an unknown index, one without size or of several sizes in the terms of a sum, or if the
            positions are empty or outside it.
    """
    require_index(net, index)
    size = require_size(net, index)
    start, stop, step = as_integer(start, "start"), as_integer(stop, "stop"), as_integer(step, "step")
    if step < 1 or not 0 <= start < stop <= size:
        raise NetworkError(
            f"index {index!r} has positions 0 to {size - 1}: expected 0 <= start < stop <= {size} and step >= 1, "
            f"got start {start}, stop {stop}, step {step}"
        )
    count = math.ceil((stop - start) / step)
    return sum_of([_pick(term, index, start, step, count) if index in term.sizes else term for term in net.terms])


def narrow(net: AnyNetwork, index: str, start: int, length: int) -> AnyNetwork:
    """Positions start to start + length − 1 of an index, as torch.narrow; of a summed index, the sum over these.

    Example:
        >>> import lensor
        >>> lensor.ops.conv(lensor.ConvSpec(1, 1, 9, 3)).narrow("o1", 2, 4).sizes["o1"]
        4

    Raises:
        NetworkError: for an unknown index, one without size or of several sizes in the terms of a sum, or if the
            positions are empty or outside it.
    """
    return net.slice(index, start, as_integer(start, "start") + as_integer(length, "length"))


def select(net: AnyNetwork, index: str, position: int) -> AnyNetwork:
    """One position of an index, which leaves the output; negative positions count from its end.

    Example:
        >>> import lensor
        >>> print(lensor.contraction("n i -> i n", "X").bind(i=3).select("i", -1).simplify())
        X[n i_full] Π1[i_full () ()] -> n

    Raises:
        NetworkError: for an unknown index, one without size or of several sizes in the terms of a sum, or a position
            outside it.
    """
    require_index(net, index)
    size = require_size(net, index)
    at = as_integer(position, "position")
    if not -size <= at < size:
        raise NetworkError(f"index {index!r} has size {size}: expected {-size} <= position < {size}, got {at}")
    at %= size
    picked = net.slice(index, at, at + 1)
    return sum_of([term.replace(output=_without(term.output, index)) for term in picked.terms])


def sample(
    net: AnyNetwork,
    index: str,
    keep: Fraction | float | None = None,
    *,
    positions: str | None = None,
    weights: str | None = None,
    stored: Sequence[str] = (),
) -> AnyNetwork:
    """Sample an index: only positions that are given at run time are summed, or stand in the output.

    With positions that are kept with probability `keep`, and the factor 1/keep, this is the paper's unbiased column-row
    sampling: of a summed index the expectation of the sum is the whole sum, of an output index the expectation of the
    sub-tensor, put into zeros at its positions, is the whole tensor.

    Args:
        net: the network; in a sum, terms without the index stay as they are.
        index: any index; it keeps its name for the sampled positions, all positions are `{index}_full`.
        keep: the result is divided by this probability; None leaves it as it is.
        positions: the name of the operand that holds the positions, an integer vector; by default
            `{index}_positions`.
        weights: the name of an operand with one factor for each position kept, if there is to be one.
        stored: operands that hold the index and are given as their sub-tensor at these positions, already sampled.

    Example:
        >>> import lensor
        >>> net = lensor.ops.conv_weight_vjp(lensor.ConvSpec(1, 1, 9, 3)).sample("i1", 0.25, stored=["X"])
        >>> print(net)
        4 X[n (g c_in) i1] Π1[i1_full o1 k1] V[n (g c_out) o1] select i1_positions[i1_full i1] -> (g c_out) c_in k1

    Raises:
        NetworkError: for an unknown index, a keep outside (0, 1], a name that is taken, or stored operands that do not
            hold the index.
    """
    require_index(net, index)
    share = None if keep is None else require_share(keep, "keep", NetworkError)
    if isinstance(stored, str):
        raise TypeError(f"stored must be a sequence of names, found the str {stored!r}")
    chosen = positions or f"{index}_positions"
    for name in (chosen, weights):
        if name is not None and name in net.operand_names:
            raise NetworkError(f"operand {name!r} is there already; operands are {list(net.operand_names)}")
    for name in stored:
        if not any(_holds(node, name, index) for term in net.terms for node in term.nodes):
            raise NetworkError(f"stored operand {name!r} does not hold index {index!r}")
    return sum_of(
        [_sampled(term, index, share, chosen, weights, stored) if index in term.sizes else term for term in net.terms]
    )


def _holds(node: Node, name: str, index: str) -> bool:
    return isinstance(node, Operand) and node.name == name and index in indices_of(node)


def _sampled(
    net: Network, index: str, keep: Fraction | None, positions: str, weights: str | None, stored: Sequence[str]
) -> Network:
    size = net.sizes[index]
    if any(index == held for held, _ in net.scale.powers):
        size = require_size(net, index)
    full = net.fresh(f"{index}_full")
    nodes: list[Node] = []
    for node in net.nodes:
        kept = any(_holds(node, name, index) for name in stored)
        nodes += [node] if kept else relabel_node(node, {index: (full,)})
    nodes.append(Select(positions, ((full,), (index,))))
    if weights is not None:
        nodes.append(Operand(weights, ((index,),)))
    scale = net.scale.bind({index: size}) * Scale(1 / keep if keep is not None else Fraction(1))
    return contract_deltas(net.replace(nodes=nodes, sizes={full: size, index: None}, scale=scale))


@transform
def keep(net: Network, index: str, position: int = 0) -> Network:
    """Keep a summed index open: it becomes an output leg at `position`, and the result is not summed over it.

    Example:
        >>> import lensor
        >>> print(lensor.ops.conv(lensor.ConvSpec(1, 1, 9, 3)).vjp("W").keep("n"))
        X[n (g c_in) i1] Π1[i1 o1 k1] V[n (g c_out) o1] -> n (g c_out) c_in k1

    Raises:
        NetworkError: if there is no such summed index, or the position is not one of 0 to the number of output legs.
    """
    require_index(net, index, net.inner_indices, "summed index")
    legs = list(net.output)
    at = as_integer(position, "position")
    if not 0 <= at <= len(legs):
        raise NetworkError(f"the output has {len(legs)} legs: expected 0 <= position <= {len(legs)}, got {at}")
    legs.insert(at, (index,))
    return net.replace(output=tuple(legs))
