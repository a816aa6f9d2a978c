"""Sub-tensors: diagonals, slices and samples of indices, and results without the sum over an index."""

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
    """Remove an index from the output, including its leg if the leg contains only this index."""
    return tuple(tuple(i for i in leg if i != index) for leg in output if leg != (index,))


@transform
def diagonal(net: Network, first: str, second: str) -> Network:
    """Take the diagonal of two output indices of equal size: `first` remains in the output, `second` is removed.

    To take diagonal blocks, use `block_diagonal`.

    Example:
        >>> import lensor
        >>> print(lensor.contraction("n i, n j -> i j", "X", "X").bind(i=3, j=3).diagonal("i", "j"))
        X[n i] X[n i] -> i

    Raises:
        NetworkError: if `first` or `second` is not an output index, or if their sizes differ.
    """
    for index in (first, second):
        require_index(net, index, net.output_indices, "output index")
    if first == second:
        raise NetworkError(f"the indices of a diagonal are {first!r} and {second!r}, expected two different ones")
    sizes = net.sizes[first], net.sizes[second]
    if None not in sizes and sizes[0] != sizes[1]:
        raise NetworkError(
            f"the indices {first!r} and {second!r} of a diagonal have sizes {sizes[0]} and {sizes[1]}, expected one"
        )
    size = sizes[0] if sizes[0] is not None else sizes[1]
    both = {first: size, second: size}
    inner = net.replace(output=_without(net.output, second), sizes=both)
    return contract_deltas(inner.relabel({second: (first,)}, both, join=True))


@transform
def block_diagonal(net: Network, first: str, second: str, block_size: int) -> Network:
    """Take the diagonal blocks of two output indices: `first` becomes two legs, the block and the position in it.

    Example:
        >>> import lensor
        >>> print(lensor.contraction("n i, n j -> i j", "X", "X").bind(i=6, j=6).block_diagonal("i", "j", 2))
        X[n (i_block i)] X[n (i_block j)] -> i_block i j

    Raises:
        NetworkError: if `first` or `second` is not an output index, their sizes differ, or the block size does not
            divide the sizes.
    """
    for index in (first, second):
        require_index(net, index, net.output_indices, "output index")
    sizes = require_size(net, first), require_size(net, second)
    block = as_integer(block_size, "block_size")
    if sizes[0] != sizes[1] or block < 1 or sizes[0] % block:
        raise NetworkError(
            f"block_size is {block} for indices {first!r} and {second!r} of sizes {sizes}, expected equal sizes that it"
            " divides"
        )
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
    """Restrict an index to positions start, start + step, ... by a crop."""
    size = require_size(net, index)
    crop = IndexPattern(
        size, 1, stride=step, padding=(-start, start + (count - 1) * step + 1 - size), output_size=count
    )
    full = net.fresh(f"{index}_full")
    nodes = [new for node in net.nodes for new in relabel_node(node, {index: (full,)})]
    nodes.append(Pattern(crop, ((full,), (index,), ())))
    return contract_deltas(
        net.replace(nodes=nodes, sizes={full: size, index: count}, scale=net.scale.bind({index: size}))
    )


def slice(net: AnyNetwork, index: str, start: int, stop: int, step: int = 1) -> AnyNetwork:
    """Restrict an index to positions start, start + step, ... below stop; if it is summed, sum only over these.

    Example:
        >>> import lensor
        >>> net = lensor.ops.conv(lensor.ConvSpec(1, 1, 9, 3)).slice("o1", 1, 7, 2)
        >>> net.sizes["o1"], str(net.simplify())
        (3, 'X[n () i1] Π1[i1 o1 k1] W[() () k1] -> n () o1')

    Raises:
        NetworkError: if the index is unknown, has no size, or has different sizes in the terms of a sum, or if the
            range of positions is empty or exceeds the size.
    """
    require_index(net, index)
    size = require_size(net, index)
    start, stop, step = as_integer(start, "start"), as_integer(stop, "stop"), as_integer(step, "step")
    if step < 1 or not 0 <= start < stop <= size:
        raise NetworkError(
            f"the slice of index {index!r} has start {start}, stop {stop} and step {step}, expected"
            f" 0 <= start < stop <= {size} and step >= 1"
        )
    count = math.ceil((stop - start) / step)
    return sum_of([_pick(term, index, start, step, count) if index in term.sizes else term for term in net.terms])


def narrow(net: AnyNetwork, index: str, start: int, length: int) -> AnyNetwork:
    """Restrict an index to positions start to start + length − 1, like `torch.narrow`; see `slice`.

    Example:
        >>> import lensor
        >>> lensor.ops.conv(lensor.ConvSpec(1, 1, 9, 3)).narrow("o1", 2, 4).sizes["o1"]
        4

    Raises:
        NetworkError: if the index is unknown, has no size, or has different sizes in the terms of a sum, or if the
            range of positions is empty or exceeds the size.
    """
    return net.slice(index, start, as_integer(start, "start") + as_integer(length, "length"))


def select(net: AnyNetwork, index: str, position: int) -> AnyNetwork:
    """Fix an index to one position and remove it from the output; negative positions count from the end.

    Example:
        >>> import lensor
        >>> print(lensor.contraction("n i -> i n", "X").bind(i=3).select("i", -1).simplify())
        X[n i_full] Π1[i_full () ()] -> n

    Raises:
        NetworkError: if the index is unknown, has no size, or has different sizes in the terms of a sum, or if the
            position is out of range.
    """
    require_index(net, index)
    size = require_size(net, index)
    at = as_integer(position, "position")
    if not -size <= at < size:
        raise NetworkError(f"position is {at}, expected {-size} <= position < {size} for index {index!r}")
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
    """Restrict an index to positions that you pass at run time, for sampling.

    If each position is kept with probability `keep`, this is the paper's unbiased column-row sampling. For a summed
    index, the expected result is the full sum. For an output index, it is the full tensor if you scatter the result
    into an array of zeros at the sampled positions.

    If the positions are known in advance, use `slice`.

    Args:
        net: the network; in a sum, terms without the index are left unchanged.
        index: any index; its name then denotes the sampled positions, and `{index}_full` denotes all positions.
        keep: probability by which the result is divided; None for no division.
        positions: name of the operand with the positions, an integer vector; `{index}_positions` by default.
        weights: optional name of an operand that contains one factor per sampled position.
        stored: operands with this index that you pass already restricted to the sampled positions.

    Example:
        >>> import lensor
        >>> net = lensor.ops.conv_weight_vjp(lensor.ConvSpec(1, 1, 9, 3)).sample("i1", 0.25, stored=["X"])
        >>> print(net)
        4 X[n (g c_in) i1] Π1[i1_full o1 k1] V[n (g c_out) o1] select i1_positions[i1_full i1] -> (g c_out) c_in k1

    Raises:
        NetworkError: if the index is unknown, `keep` is outside (0, 1], a new name is already in use, or a stored
            operand does not have the index.
    """
    require_index(net, index)
    share = None if keep is None else require_share(keep, "keep", NetworkError)
    if isinstance(stored, str):
        raise TypeError(f"stored is the str {stored!r}, expected a sequence of names")
    chosen = positions or f"{index}_positions"
    for name in (chosen, weights):
        if name is not None and name in net.operand_names:
            raise NetworkError(
                f"operand {name!r} exists already, expected a new name: operands are {list(net.operand_names)}"
            )
    for name in stored:
        if not any(_holds(node, name, index) for term in net.terms for node in term.nodes):
            raise NetworkError(f"stored operand {name!r} does not have index {index!r}, expected operands with it")
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
    """Keep a summed index instead of summing over it: the index becomes the output leg at `position`.

    Example:
        >>> import lensor
        >>> print(lensor.ops.conv(lensor.ConvSpec(1, 1, 9, 3)).vjp("W").keep("n"))
        X[n (g c_in) i1] Π1[i1 o1 k1] V[n (g c_out) o1] -> n (g c_out) c_in k1

    Raises:
        NetworkError: if the index is not a summed index, or the position is not between 0 and the number of output
            legs.
    """
    if index in net.output_indices:
        raise NetworkError(
            f"index {index!r} is an output index already, expected a summed index, one of {list(net.inner_indices)}"
        )
    require_index(net, index, net.inner_indices, "summed index")
    legs = list(net.output)
    at = as_integer(position, "position")
    if not 0 <= at <= len(legs):
        raise NetworkError(f"position is {at}, expected 0 <= position <= {len(legs)}, the number of output legs")
    legs.insert(at, (index,))
    return net.replace(output=tuple(legs))
