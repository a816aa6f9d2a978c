"""The inverse of the decompositions, which restores whole patterns for strategies that need them.

Simplification decomposes patterns into regrouping, crops and smaller patterns, which suits views and matrix products. A
framework's convolution and a materialized pattern handle the whole pattern in one step, where its parts would need an
intermediate array.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lensor.affine import Reading, affine, after, same
from lensor.cache import Cache
from lensor.network import AnyNetwork, Group, Network, Operand, Pattern, indices_of, sum_of
from lensor.pattern import IndexPattern
from lensor.simplification.engine import run_phases
from lensor.simplification.patterns import (
    apart,
    fresh_beside,
    one_hots,
    only_in,
    pattern_nodes,
    read_through,
    swap_nodes,
)
from lensor.simplification.rule import RuleList, rule
from lensor.simplification.structural import STRUCTURAL_RULES
from lensor.transforms.indices import equate


@rule("crop taken into the pattern that reads it", "11, modes")
def compose_input(net: Network) -> Network | None:
    """Σ_j Π1[i,j] Π2[j,o,k] = Π[i,o,k] if a single pattern has the composed reads."""
    for one, outer, (i, j, unit) in pattern_nodes(net):
        if not outer.is_crop or unit or not j:
            continue
        for two, inner, (inputs, o, k) in pattern_nodes(net):
            if one == two or inputs != j or not only_in(net, j, [one, two]) or not apart((i, j, o, k)):
                continue
            whole = _composed(outer, inner)
            if whole is not None:
                return swap_nodes(net, [one, two], [Pattern(whole, (i, o, k))])
    return None


def _composed(outer: IndexPattern, inner: IndexPattern) -> IndexPattern | None:
    """The composition of a crop with a zeros-mode pattern on its output, as one pattern, or None."""
    if inner.padding_mode != "zeros":
        return None
    fitted = read_through(outer, inner)
    if fitted is not None or outer.padding_mode == "zeros":
        return fitted
    return _in_mode.get_or_make((outer, inner), lambda: (_composed_in_mode(outer, inner),))[0]


_in_mode = Cache(maxsize=4096)


def _composed_in_mode(outer: IndexPattern, inner: IndexPattern) -> IndexPattern | None:
    """The composition as one pattern in the crop's padding mode, or None."""
    stride, dilation = outer.stride * inner.stride, outer.stride * inner.dilation
    left = outer.padding[0] + outer.stride * inner.padding[0]
    length = (inner.output_size - 1) * stride + dilation * (inner.kernel_size - 1) + 1
    sides = (left, length - outer.input_size - left)
    if min(sides) < 0 or max(sides) > max(outer.padding):
        return None
    whole = IndexPattern(
        outer.input_size, inner.kernel_size, stride, sides, dilation, outer.padding_mode, inner.output_size
    )
    return whole.normalize() if same(whole.reading(), inner.reading().through(outer.line())) else None


@rule("regrouping taken back into a pattern", "6")
def compose_blocks(net: Network) -> Network | None:
    """Π1[i,(o s)] Π2[s,k] = Π[i,o,k] and Π1[i,(o k)] = Π[i,o,k], if a single pattern has these reads."""
    for one, view, (i, positions, unit) in pattern_nodes(net):
        if not view.is_crop or unit or len(positions) < 2:
            continue
        for split in range(1, len(positions)):
            o, s = positions[:split], positions[split:]
            count = net.group_size(o) or 0
            size = view.output_size // count
            blocks, outer = affine(count, view.stride * size), view.reading().outer
            within = affine(size, view.stride, -view.padding[0])
            for two, first, (inputs, k, kernel) in pattern_nodes(net):
                inside = one != two and first.is_crop and not kernel and inputs == s
                if inside and only_in(net, s, [one, two]) and apart((i, o, s, k)):
                    picked = Reading(blocks, after(within, first.line()), outer, (count, first.output_size))
                    whole = IndexPattern.from_reads(picked, view.input_size)
                    if whole is not None:
                        return swap_nodes(net, [one, two], [Pattern(whole, (i, o, k))])
            reading = Reading(blocks, within, outer, (count, size))
            whole = IndexPattern.from_reads(reading, view.input_size) if apart((i, o, s)) else None
            if whole is not None:
                return swap_nodes(net, [one], [Pattern(whole, (i, o, s))])
    return None


@rule("equal positions of copies: one index", "8")
def share_position(net: Network) -> Network | None:
    """e_a[x] f(x) e_a[y] g(y) = e_a[x] f(x) g(x) if f = g or copies of f and g share an index in these places."""
    places = {index: _places(net, index) for index in net.sizes}
    found = [(at, place, x) for at, place, x in one_hots(net) if _only_operands(net, x, at)]
    for at, (_, place, x) in enumerate(found):
        for two, other, y in found[at + 1 :]:
            if place != other or x == y or net.sizes[x] != net.sizes[y]:
                continue
            if any(places[x] & held and places[y] & held for index, held in places.items() if index != y):
                merged = equate(swap_nodes(net, [two], []), (x,), (y,))
                if merged is not None:
                    return merged
    return None


def _only_operands(net: Network, index: str, one_hot: int) -> bool:
    """Whether an index appears only on operands and on the pattern `one_hot`."""
    holders = [node for at, node in enumerate(net.nodes) if at != one_hot and index in indices_of(node)]
    return index not in net.output_indices and all(isinstance(node, Operand) for node in holders)


def _places(net: Network, index: str) -> set[tuple[str, int]]:
    """An (operand, place among its indices) pair for each occurrence of an index on an operand."""
    operands = [node for node in net.nodes if isinstance(node, Operand)]
    return {(node.name, at) for node in operands for at, held in enumerate(indices_of(node)) if held == index}


@rule("part of a pattern's kernel: the whole pattern and a crop", "23")
def widen(net: Network) -> Network | None:
    """Π'[i,o,k] = Σ_l Π[i',o',l] [l = k·s + a] if Π, on another copy of the operand, includes all reads of Π'."""
    for one, wide, (i, _, _) in pattern_nodes(net):
        for two, part, (j, o, k) in pattern_nodes(net):
            sizes = (wide.input_size, wide.output_size) == (part.input_size, part.output_size)
            if one == two or not sizes or part.kernel_size >= wide.kernel_size or not o or not j:
                continue
            if part.padding_mode != "zeros" or wide.padding_mode != "zeros" or i == j:
                continue
            if not _names(net, i) & _names(net, j):
                continue
            first = {column: place for place, column in reversed(list(enumerate(wide.columns())))}
            places = [first.get(column, -1) for column in part.columns()]
            picked = IndexPattern.from_reads(np.array(places)[:, None], wide.kernel_size) if min(places) >= 0 else None
            if picked is not None:
                name = fresh_beside(net, k or o, "wide")
                put = [Pattern(wide, (j, o, (name,))), Pattern(picked, ((name,), k, ()))]
                return swap_nodes(net, [two], put, sizes={name: wide.kernel_size})
    return None


def _names(net: Network, group: Group) -> set[str]:
    """The operands on which an index of the group appears."""
    return {node.name for node in net.nodes if isinstance(node, Operand) and set(group) & set(indices_of(node))}


@rule("regrouping as a pattern", "6")
def undo_blocks(net: Network) -> Network | None:
    """f(.., (o k), ..) = Σ_i f(.., i, ..) Π[i,o,k] with S = K, if o and k each occur in one other place."""
    for place, legs in _all_legs(net):
        for number, leg in enumerate(legs):
            for split in range(1, len(leg)):
                o, k = leg[:split], leg[split:]
                elsewhere = [_other_places(net, part, place) for part in (o, k)]
                size, kernel = net.group_size(leg), net.group_size(k)
                if None in elsewhere or elsewhere[0] == elsewhere[1] or not size or not kernel:
                    continue
                name = fresh_beside(net, o, "whole")
                whole = Pattern(IndexPattern(size, kernel, stride=kernel), ((name,), o, k))
                return _with_leg(net, place, number, (name,), whole, {name: size})
    return None


@rule("axis as a pattern of kernel size 1", "6")
def undo_unit_kernel(net: Network) -> Network | None:
    """f(.., x, ..) g(.., 1, ..) = f(.., i, ..) Π[i,x,k] g(.., k, ..) with K = 1, if f and g are contracted."""
    for at, kernel in enumerate(net.nodes):
        if not isinstance(kernel, Operand) or () not in kernel.legs:
            continue
        units = [number for number, leg in enumerate(kernel.legs) if not leg]
        for other, image in enumerate(net.nodes):
            contracted = set(indices_of(image)) & set(indices_of(kernel)) - set(net.output_indices)
            if not isinstance(image, Operand) or other == at or not contracted:
                continue
            axes = [found for leg in image.legs if (found := _axis(net, leg, other)) is not None]
            if len(axes) < len(units):
                continue
            through, x = axes[-len(units)]
            name = net.fresh("unit")
            legs = tuple((name,) if number == units[0] else leg for number, leg in enumerate(kernel.legs))
            net = net.replace(
                nodes=[replace(kernel, legs=legs) if place == at else node for place, node in enumerate(net.nodes)],
                sizes={name: 1},
            )
            if through is not None:
                pattern = net.nodes[through]
                assert isinstance(pattern, Pattern)
                return swap_nodes(net, [through], [Pattern(pattern.pattern, (*pattern.legs[:2], (name,)))])
            i, size = net.fresh(f"{x}_whole"), net.sizes[x] or 0
            number = next(number for number, leg in enumerate(image.legs) if leg == (x,))
            whole = Pattern(IndexPattern(size, 1), ((i,), (x,), (name,)))
            return _with_leg(net, other, number, (i,), whole, {i: size})
    return None


def _axis(net: Network, leg: Group, node: int) -> tuple[int | None, str] | None:
    """For a spatial axis, the crop from the axis to the output (None if there is none) and the index; else None."""
    if len(leg) != 1 or not net.sizes[leg[0]]:
        return None
    holders = [at for at, other in enumerate(net.nodes) if at != node and leg[0] in indices_of(other)]
    if leg[0] in net.output_indices:
        return None if holders else (None, leg[0])
    if len(holders) != 1:
        return None
    crop = net.nodes[holders[0]]
    if not isinstance(crop, Pattern) or not crop.pattern.is_crop or crop.legs[2]:
        return None
    ends = [side for side in crop.legs[:2] if side != leg]
    return (holders[0], leg[0]) if len(ends) == 1 and set(ends[0]) <= set(net.output_indices) else None


def _all_legs(net: Network) -> list[tuple[int | None, tuple[Group, ...]]]:
    """A (node, legs) pair for each operand, and (None, legs) for the output."""
    return [*((at, node.legs) for at, node in enumerate(net.nodes) if isinstance(node, Operand)), (None, net.output)]


def _other_places(net: Network, group: Group, place: int | None) -> int | str | None:
    """The single operand, or "output", other than `place` that contains a group's indices; None if it is not unique."""
    found: list[int | str] = [
        at for at, node in enumerate(net.nodes) if at != place and set(group) & {*indices_of(node)}
    ]
    if place is not None and set(group) & set(net.output_indices):
        found.append("output")
    if len(found) != 1:
        return None
    held = net.output_indices if found[0] == "output" else tuple(indices_of(net.nodes[int(found[0])]))
    operand = found[0] == "output" or isinstance(net.nodes[int(found[0])], Operand)
    return found[0] if operand and set(group) <= set(held) else None


def _with_leg(
    net: Network, place: int | None, number: int, leg: Group, added: Pattern, sizes: dict[str, int]
) -> Network:
    """Replace one leg of an operand or of the output, and add a pattern."""

    def replaced(legs: tuple[Group, ...]) -> tuple[Group, ...]:
        return (*legs[:number], leg, *legs[number + 1 :])

    nodes = list(net.nodes)
    if place is not None:
        node = nodes[place]
        assert isinstance(node, Operand)
        nodes[place] = replace(node, legs=replaced(node.legs))
    output = replaced(net.output) if place is None else net.output
    return net.replace(nodes=[*nodes, added], output=output, sizes=sizes)


COMPOSITION_RULES: RuleList = (compose_input, compose_blocks)
SHARING_RULES: RuleList = (share_position, widen)
UNDOING_RULES: RuleList = (undo_blocks, undo_unit_kernel)


def compose(net: AnyNetwork) -> AnyNetwork:
    """Restore the whole patterns of a simplified network.

    Example:
        >>> import lensor
        >>> net = lensor.ops.conv(lensor.ConvSpec(4, 8, (10,), kernel_size=2, stride=3)).simplify()
        >>> print(net.subscripts)
        n c_in i1, i1 (o1 k1_stride) (), k1_stride k1 (), c_out c_in k1 -> n c_out o1
        >>> print(compose(net).subscripts)
        n c_in i1, i1 o1 k1, c_out c_in k1 -> n c_out o1
    """
    return sum_of([run_phases(term, (STRUCTURAL_RULES, COMPOSITION_RULES)) for term in net.terms])


def undo(net: AnyNetwork) -> AnyNetwork:
    """Restore the patterns replaced by regrouping, after `compose`, for steps that work on whole axes.

    Example:
        >>> import lensor
        >>> net = lensor.ops.conv(lensor.ConvSpec(4, 8, (10,), kernel_size=2, stride=2)).simplify()
        >>> print(net.subscripts)
        n c_in (o1 k1), c_out c_in k1 -> n c_out o1
        >>> print(undo(compose(net)).subscripts)
        n c_in o1_whole, c_out c_in k1, o1_whole o1 k1 -> n c_out o1
    """
    return sum_of([run_phases(term, (UNDOING_RULES,)) for term in net.terms])


def share(net: AnyNetwork) -> AnyNetwork:
    """Make the copies of an operand equal again after simplification, even if only part of the result is needed."""
    return sum_of([run_phases(term, (SHARING_RULES,)) for term in net.terms])
