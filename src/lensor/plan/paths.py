"""Contraction paths: finding them, and comparing their costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from opt_einsum import paths

from lensor.cache import Cache
from lensor.network import AnyNetwork, Network

PATHS = ("left to right", "greedy", "optimal")
"""The paths that `Plan.compare` lists in addition to Feynman's path and the plan."""

_MOST_FOR_OPT_EINSUM = 8
"""For networks with more tensors than this, cotengra finds the path if it is installed."""

_MOST_FOR_ALL_TREES = 7
"""For up to this many tensors, all trees are tried; for more, dynamic programming finds the best tree without outer
products."""

_MOST_CONNECTED_SETS = 600
"""The optimal path is searched for only if a network has at most this many connected sets of tensors."""


def has_best_path(net: AnyNetwork) -> bool:
    """Whether the optimal path can be found in bounded time, judged by the number of connected sets of nodes.

    Example:
        >>> import lensor
        >>> has_best_path(lensor.contraction("a b, b c, c d -> a d", "X", "Y", "Z"))
        True
    """
    return all(_has_few_connected_sets(term) for term in net.terms)


def _has_few_connected_sets(term: Network) -> bool:
    near = [0] * len(term.nodes)
    for places in term.holders.values():
        inside = sum(1 << at for at in places if at >= 0)
        for at in places:
            if at >= 0:
                near[at] |= inside
    todo = [(1 << at, near[at]) for at in range(len(near))]
    seen = {one for one, _ in todo}
    while todo:
        inside, reach = todo.pop()
        for at in range(len(near)):
            larger = inside | 1 << at
            if reach >> at & 1 and larger not in seen:
                seen.add(larger)
                todo.append((larger, reach | near[at]))
                if len(seen) > _MOST_CONNECTED_SETS:
                    return False
    return True


def find_path(
    inputs: Sequence[frozenset[str]], output: frozenset[str], sizes: Mapping[str, int], order: str = "auto"
) -> list[tuple[int, ...]]:
    """Find a contraction path, as a list of pairs in the format of `opt_einsum.contract_path`.

    Args:
        inputs: the indices of each tensor.
        output: the indices of the result.
        sizes: the size of every index, at least 1.
        order: `"auto"`, as in plans, or one of `PATHS`.

    Example:
        >>> tensors = [frozenset("ab"), frozenset("bc"), frozenset("c")]
        >>> find_path(tensors, frozenset("a"), dict(a=9, b=9, c=9), "optimal")
        [(1, 2), (0, 1)]
    """
    if len(inputs) <= 2:
        return [(0, 1)] if len(inputs) == 2 else []
    key = (tuple(inputs), output, tuple([sizes[index] for index in sorted(output.union(*inputs))]), order)
    return _paths.get_or_make(key, lambda: _find_path(inputs, output, sizes, order))


_paths = Cache(maxsize=256)


def _find_path(
    inputs: Sequence[frozenset[str]], output: frozenset[str], sizes: Mapping[str, int], order: str
) -> list[tuple[int, ...]]:
    if order == "left to right":
        # Each result is appended at the end, so the next pair is the first remaining tensor and the last result.
        return [(0, 1), *((0, left - 1) for left in range(len(inputs) - 1, 1, -1))]
    # opt_einsum identifies intermediates with equal indices, although their remaining sums may differ. To distinguish
    # them, add one index of size 1 per input, which stays in the output.
    marks = [f"input {at}" for at in range(len(inputs))]
    told_apart = [own | {mark} for own, mark in zip(inputs, marks, strict=True)]
    every: dict[str, int] = {**sizes, **dict.fromkeys(marks, 1)}
    wanted = output.union(marks)
    if order == "greedy":
        found: Any = paths.greedy(told_apart, wanted, every)
    elif order == "optimal" and len(inputs) <= _MOST_FOR_ALL_TREES:
        found = paths.optimal(told_apart, wanted, every)
    elif order == "optimal":
        found = paths.DynamicProgramming(minimize="flops")(told_apart, wanted, every)
    elif len(inputs) > _MOST_FOR_OPT_EINSUM and find_spec("cotengra") is not None:
        import cotengra

        found = cotengra.array_contract_path(list(inputs), output, sizes, optimize="greedy", cache=False)
    else:
        found = paths.auto(told_apart, wanted, every)
    return _pairs(found, len(inputs))


def _pairs(path: Sequence[Sequence[int]], count: int) -> list[tuple[int, ...]]:
    """Drop the path's single-tensor steps, which only sum over indices of one tensor."""
    theirs, ours = list(range(count)), list(range(count))
    pairs = []
    for step, places in enumerate(path):
        held = [theirs.pop(place) for place in sorted(places, reverse=True)]
        if len(held) == 1:
            theirs.append(held[0])
            continue
        pairs.append(tuple(sorted(ours.index(one) for one in held)))
        ours = [*(one for one in ours if one not in held), count + step]
        theirs.append(count + step)
    return pairs


@dataclass(frozen=True, slots=True)
class PathCost:
    """The cost of a network for one contraction path.

    Args:
        name: `"Feynman"` (all sums as nested loops), one of `PATHS`, or `"planner"` (the plan).
        flops: number of additions and multiplications.
        peak_size: maximum number of entries alive at once, including the result but not operands and patterns.
    """

    name: str
    flops: int
    peak_size: int


@dataclass(frozen=True, slots=True)
class PathCosts:
    """The costs of one network for several paths; prints as a table.

    Args:
        rows: one `PathCost` per path.
    """

    rows: tuple[PathCost, ...]

    def __iter__(self) -> Iterator[PathCost]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> PathCost:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"the path is {name!r}, expected one of {[row.name for row in self.rows]}")

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'path':<{width}} {'flops':>20} {'peak size':>16}"]
        lines += [f"{row.name:<{width}} {row.flops:>20,} {row.peak_size:>16,}" for row in self.rows]
        return "\n".join(lines)


def feynman(net: AnyNetwork) -> PathCost:
    """The cost of computing all sums as nested loops over all indices, without intermediate results."""
    flops = sum(_loops(term) * max(len(term.nodes), 1) for term in net.terms)
    return PathCost("Feynman", flops, math.prod(size or 0 for size in net.output_shape))


def _loops(term: Network) -> int:
    return math.prod(size or 0 for size in term.sizes.values())
