"""Drawings in layers from left to right: the order of places within a layer, and their heights.

A line that spans several layers has a place in each layer in between. Within a layer, lines are horizontal and pass
between the boxes; all crossings are between layers. The second half of a symmetric drawing mirrors the first half.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

CROSSING, THROUGH, RANK, FAULT = 10_000, 12_000, 1, 1_000_000
"""Costs of a crossing, of a line across a line within its layer, of two places against their ranks, and of a line
through a box."""

_HEIGHTS, _SIFTS, _WORK, _SLACK = 120, 12, 20_000, 1.5
"""Rounds that improve heights, most rounds that improve an order, limit on the number of orders to start from times the
number of pairs of places, and the distance below which a line counts as straight."""


@dataclass(eq=False)
class Place:
    """A vertex in its layer or, if it is not solid, a line that passes through the layer.

    Args:
        layer: number of the layer.
        rank: preferred place in the layer, from the top.
        solid: whether lines must not pass through it.
        above: space above its height.
        below: space below its height.
    """

    layer: int
    rank: float = 0.0
    solid: bool = True
    above: float = 8.0
    below: float = 8.0
    before: list[Edge] = field(default_factory=list)
    after: list[Edge] = field(default_factory=list)
    beside: list[Place] = field(default_factory=list)
    twin: Place | None = None
    y: float = 0.0

    def near(self) -> list[tuple[float, float]]:
        """The heights at which its lines would be straight, with weights."""
        found = [(edge.left.y + edge.leaves - edge.enters, edge.weight) for edge in self.before]
        found += [(edge.right.y + edge.enters - edge.leaves, edge.weight) for edge in self.after]
        # The sum of distances, rather than of their squares, makes most lines straight.
        return [(goal, weight / max(abs(goal - self.y), _SLACK)) for goal, weight in found]


@dataclass(eq=False)
class Edge:
    """A piece of a line between neighbouring layers.

    Args:
        left: its start.
        right: its end.
        line: the number of its line.
        weight: how much it should be horizontal.
        leaves: height of its start above the height of the place.
        enters: the same for its end.
    """

    left: Place
    right: Place
    line: int = 0
    weight: float = 1.0
    leaves: float = 0.0
    enters: float = 0.0


def join(left: Place, right: Place, line: int = 0, weight: float = 1.0) -> Edge:
    """Join two places of neighbouring layers."""
    edge = Edge(left, right, line, weight)
    left.after.append(edge)
    right.before.append(edge)
    return edge


def _gap(layer: Sequence[Place], row: dict[Place, int]) -> int:
    """Number of crossings between a layer and the next one."""
    ends, count = list[int](), 0
    for place in layer:
        for end in sorted(row[edge.right] for edge in place.after):
            count += len(ends) - bisect_right(ends, end)
            insort(ends, end)
    return count


def _within(layer: Sequence[Place]) -> int:
    """Cost of the lines within a layer."""
    row, cost = {place: at for at, place in enumerate(layer)}, 0
    for place in layer:
        for other in place.beside:
            if row[place] < row[other]:
                between = layer[row[place] + 1 : row[other]]
                cost += sum(FAULT if one.solid else THROUGH for one in between)
    return cost


class _Order:
    """The order of the places in every layer, and its cost."""

    def __init__(self, layers: list[list[Place]]) -> None:
        self.layers, self.mirrored = layers, any(place.twin for layer in layers for place in layer)
        self.row = {place: at for layer in layers for at, place in enumerate(layer)}

    def set(self, at: int, layer: list[Place]) -> None:
        """Set a layer and the one that mirrors it."""
        self.layers[at] = layer
        other = len(self.layers) - 1 - at
        if self.mirrored and other != at:
            self.layers[other] = [place.twin for place in layer if place.twin]
        for one in {at, other} if self.mirrored else {at}:
            self.row.update((place, row) for row, place in enumerate(self.layers[one]))

    def total(self) -> int:
        """The cost of the whole order."""
        pairs = (pair for layer in self.layers for pair in itertools.combinations(layer, 2))
        cost = RANK * sum(one.rank > other.rank for one, other in pairs)
        return cost + sum(CROSSING * _gap(layer, self.row) + _within(layer) for layer in self.layers)

    def _worse(self, one: Place, other: Place) -> int:
        """The cost of two places in this order, apart from lines within the layer."""
        sides = [([edge.right for edge in place.after], [edge.left for edge in place.before]) for place in (one, other)]
        crossings = sum(
            self.row[a] > self.row[b]
            for near, far in zip(*sides, strict=True)
            for a in near
            for b in far
            if a is not one.twin or b is not other.twin
        )
        return CROSSING * crossings + RANK * (one.rank > other.rank)

    def sift(self, at: int) -> bool:
        """Move each place of a layer to its best row; says whether any moved."""
        layer = self.layers[at]
        worse = {(one, other): self._worse(one, other) for one, other in itertools.permutations(layer, 2)}
        beside = any(place.beside for place in layer)
        was = layer
        for place in list(layer):
            rest = [one for one in layer if one is not place]
            cost = sum(worse[place, one] for one in rest)
            least, best = 1 << 60, layer
            for row in range(len(layer)):
                tried = [*rest[:row], place, *rest[row:]]
                full = cost + (_within(tried) if beside else 0)
                if full < least or (full == least and layer[row] is place):
                    least, best = full, tried
                if row < len(rest):
                    cost += worse[rest[row], place] - worse[place, rest[row]]
            layer = best
        if layer != was:
            self.set(at, layer)
        return layer != was

    def sweep(self, at: int, forth: bool) -> None:
        """Sort a layer by the mean row of its neighbours on one side."""

        def mean(place: Place) -> float:
            near = [edge.left for edge in place.before] if forth else [edge.right for edge in place.after]
            return sum(self.row[one] for one in near) / len(near) if near else self.row[place]

        self.set(at, sorted(self.layers[at], key=mean))


def arrange(layers: list[list[Place]], rounds: int = 8) -> int:
    """Sort every layer so that few lines cross, starting from several orders; returns the cost."""
    order, random = _Order(layers), Random(0)
    own = range((len(layers) + 1) // 2 if order.mirrored else len(layers))
    best, least = [list(layer) for layer in layers], 1 << 60
    rounds = min(rounds, max(_WORK // sum(len(layer) ** 2 for layer in layers), 1))
    for turn in range(rounds):
        for at in own:  # by rank, with passing lines at the top, then at random
            keys = {place: (place.rank, 0.0) for place in layers[at]}
            if turn:
                keys = {place: (-9.0 * (turn == 1 and not place.solid), random.random()) for place in layers[at]}
            order.set(at, sorted(layers[at], key=keys.__getitem__))
        for forth in (True, False, True) if turn else ():
            for at in own if forth else reversed(own):
                order.sweep(at, forth)
        for _ in range(_SIFTS):
            moved = [order.sift(at) for at in own]
            if not any(moved):
                break
        cost = order.total()
        if cost < least:
            best, least = [list(layer) for layer in layers], cost
        if least < CROSSING:
            break
    layers[:] = best
    return least


def settle(layers: Sequence[Sequence[Place]]) -> None:
    """Set the heights so that lines are as straight as the spacing allows."""
    for layer in layers:
        _settle(layer, [(0.0, 1.0)] * len(layer))
    for turn in range(_HEIGHTS):
        for layer in layers if turn % 2 else layers[::-1]:
            goals = []
            for place in layer:
                near = place.near() or [(place.y, 1.0)]
                weight = sum(one for _, one in near)
                goals.append((sum(y * one for y, one in near) / weight, weight))
            _settle(layer, goals)
            for place in layer:
                if place.twin:
                    place.twin.y = place.y
    for place in itertools.chain(*layers):
        place.y = round(place.y, 1)


def _settle(layer: Sequence[Place], goals: Sequence[tuple[float, float]]) -> None:
    """Set the heights closest to the desired ones that preserve order and spacing, by isotonic regression."""
    offsets = [0.0]
    for one, other in itertools.pairwise(layer):
        offsets.append(offsets[-1] + one.below + other.above)
    blocks: list[tuple[float, float, int]] = []  # mean, weight and number of places of each block of touching places
    for (goal, weight), offset in zip(goals, offsets, strict=True):
        mean, count = goal - offset, 1
        while blocks and blocks[-1][0] > mean:
            last, heavy, several = blocks.pop()
            mean = (mean * weight + last * heavy) / (weight + heavy)
            weight, count = weight + heavy, count + several
        blocks.append((mean, weight, count))
    means = [mean for mean, _, count in blocks for _ in range(count)]
    for place, mean, offset in zip(layer, means, offsets, strict=True):
        place.y = mean + offset
