"""Plans as diagrams: steps in layers, from the operands on the left to the result on the right.

A value that a later layer uses has its own place in each layer in between. Barycentre sweeps choose the order within a
layer; heights are as close to the heights of neighbours as the spacing allows. Within a layer, lines are horizontal and
do not cross steps; all crossings are between layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lensor.draw.graph import STEP, TENSOR
from lensor.draw.scene import (
    BRIDGE,
    HEIGHT,
    LABEL,
    LETTER,
    SMALL,
    Box,
    Label,
    Scene,
    Segment,
    Shape,
    meetings,
)
from lensor.plan import Plan
from lensor.plan.steps import Input

ARROW = "arrow"
"""The shape of an arrowhead, which shows the direction of values."""

_LEAST, _MOST = 22.0, 90.0
"""Minimum and maximum space between two layers; the slope of the lines determines the actual space."""

_HEAD, _TAIL = 9.0, 5.0
"""Space before a step for the arrowhead (also its size), and after a step for the line before it slants."""

_ABOVE, _BELOW, _THIN = 16.0, 28.0, 8.0
"""Space above and below the middle of a step (with the shape text under it), and around a passing line."""

_SWEEPS = 13


@dataclass(eq=False)
class _Place:
    """A step in its layer or, without a step, a value that passes through the layer."""

    layer: int
    step: int | None = None
    before: list[_Place] = field(default_factory=list)
    after: list[_Place] = field(default_factory=list)
    y: float = 0.0

    @property
    def above(self) -> float:
        return _THIN if self.step is None else _ABOVE

    @property
    def below(self) -> float:
        return _THIN if self.step is None else _BELOW


def scene_of_plan(plan: Plan) -> Scene:
    """Draw a plan; steps that only reinterpret memory (reshape, transpose) are omitted."""
    takes = _shown(plan)
    layers = _layers(takes)
    _order(layers)
    _raise(layers)
    return _scene(plan, layers)


def _shown(plan: Plan) -> dict[int, list[int]]:
    """The steps that are drawn, with the steps whose values they use."""
    steps = plan.steps
    shown = [at for at, step in enumerate(steps) if not step.is_view or isinstance(step, Input) or not step.takes]
    if plan.result not in shown:
        shown.append(plan.result)

    def sources(at: int) -> list[int]:
        found: list[int] = []
        for one in steps[at].takes:
            found += [one] if one in shown else sources(one)
        return list(dict.fromkeys(found))

    return {at: sources(at) for at in shown}


def _layers(takes: Mapping[int, Sequence[int]]) -> list[list[_Place]]:
    """Put each step after its inputs, and operands right before their first use; all uses of a value share a line."""
    depth: dict[int, int] = {}
    for at, sources in takes.items():
        depth[at] = 1 + max((depth[one] for one in sources), default=-1)
    users = {at: [user for user, sources in takes.items() if at in sources] for at in takes}
    for at, sources in takes.items():
        if not sources and users[at]:
            depth[at] = min(depth[user] for user in users[at]) - 1
    places = {at: _Place(depth[at], at) for at in takes}
    layers: list[list[_Place]] = [[] for _ in range(max(depth.values()) + 1)]
    for place in places.values():
        layers[place.layer].append(place)
    for at in takes:
        last = places[at]
        for layer in range(depth[at] + 1, max((depth[user] for user in users[at]), default=0) + 1):
            ending = [places[user] for user in users[at] if depth[user] == layer]
            passing = [_Place(layer)] if any(depth[user] > layer for user in users[at]) else []
            layers[layer] += passing
            for place in (*ending, *passing):
                last.after.append(place)
                place.before.append(last)
            last = passing[0] if passing else last
    return layers


def _order(layers: list[list[_Place]]) -> None:
    """Sort every layer by the mean of its neighbours, in both directions; keep the order with the fewest crossings."""
    best, least = [list(layer) for layer in layers], _inversions(layers)
    for sweep in range(_SWEEPS):
        forth = sweep % 2 == 0
        for at in range(1, len(layers)) if forth else range(len(layers) - 2, -1, -1):
            row = _rows(layers)
            near = {place: (place.before if forth else place.after) or [place] for place in layers[at]}
            middle = {place: sum(row[one] for one in own) / len(own) for place, own in near.items()}
            layers[at].sort(key=middle.__getitem__)
        _swap(layers)
        count = _inversions(layers)
        if count < least:
            best, least = [list(layer) for layer in layers], count
    layers[:] = best


def _swap(layers: Sequence[list[_Place]]) -> None:
    """Swap neighbours in a layer if this reduces crossings."""
    row = _rows(layers)
    for layer in layers:
        for at in range(len(layer) - 1):
            one, other = layer[at : at + 2]
            pairs = [*itertools.product(one.before, other.before), *itertools.product(one.after, other.after)]
            if sum((row[a] > row[b]) - (row[a] < row[b]) for a, b in pairs) > 0:
                layer[at : at + 2] = [other, one]
                row[one], row[other] = row[other], row[one]


def _rows(layers: Sequence[Sequence[_Place]]) -> dict[_Place, int]:
    return {place: row for layer in layers for row, place in enumerate(layer)}


def _inversions(layers: Sequence[Sequence[_Place]]) -> int:
    """Number of crossings in this order: pairs of lines where one line starts above and ends below the other."""
    row, count = _rows(layers), 0
    for layer in layers:
        starts, ends = np.array([(row[one], row[after]) for one in layer for after in one.after]).reshape(-1, 2).T
        count += int(((starts[:, None] < starts) & (ends[:, None] > ends)).sum())
    return count


def _raise(layers: Sequence[Sequence[_Place]]) -> None:
    """Set the height of every place as close to the mean of its neighbours as its layer allows."""
    for layer in layers:
        _settle(layer, [0.0] * len(layer))
    for sweep in range(_SWEEPS):
        forth = sweep % 2 == 0
        for layer in layers if forth else layers[::-1]:
            near = [(place.before if forth else place.after) or [place] for place in layer]
            _settle(layer, [sum(one.y for one in own) / len(own) for own in near])


def _settle(layer: Sequence[_Place], wanted: Sequence[float]) -> None:
    """Set the heights closest to the desired ones that preserve order and spacing, by isotonic regression."""
    offsets = [0.0]
    for one, other in itertools.pairwise(layer):
        offsets.append(offsets[-1] + one.below + other.above)
    blocks: list[tuple[float, int]] = []  # mean and number of places for each block of touching places
    for goal, offset in zip(wanted, offsets, strict=True):
        mean, count = goal - offset, 1
        while blocks and blocks[-1][0] > mean:
            last, several = blocks.pop()
            mean, count = (mean * count + last * several) / (count + several), count + several
        blocks.append((mean, count))
    means = [mean for mean, count in blocks for _ in range(count)]
    for place, mean, offset in zip(layer, means, offsets, strict=True):
        place.y = round(mean + offset, 1)


def _scene(plan: Plan, layers: Sequence[Sequence[_Place]]) -> Scene:
    """Draw boxes with shape texts under them, horizontal lines within layers, and slanted lines between layers."""
    boxes: dict[_Place, Box] = {}
    labels: list[Label] = []
    sides: dict[_Place, tuple[float, float]] = {}
    left = 0.0
    for layer in layers:
        texts = {place: _texts(plan, place.step) for place in layer if place.step is not None}
        widths = {place: (LETTER * len(name) + 14, SMALL * len(shape) + 3) for place, (name, shape) in texts.items()}
        width = max(max(pair) for pair in widths.values())
        steep = max((abs(one.y - place.y) for place in layer for one in place.before), default=0.0)
        left += min(max(_LEAST, steep / 2), _MOST) if sides else 0.0
        start, end = left, left + _HEAD + width + _TAIL
        for place in layer:
            sides[place] = (start, end)
            if place in widths:
                middle = start + _HEAD + width / 2
                boxes[place] = Box(middle, place.y, widths[place][0], HEIGHT)
                labels.append(Label(texts[place][1], Box(middle, place.y + 19.0, widths[place][1], LABEL)))
        left = end
    segments: list[Segment] = []

    def line(x1: float, y1: float, x2: float, y2: float) -> None:
        if (x1, y1) != (x2, y2):
            segments.append(Segment(x1, y1, x2, y2))

    for place, (start, end) in sides.items():
        box = boxes.get(place)
        if place.before:
            line(start, place.y, box.x if box else end, place.y)
        if box and place.after:
            line(box.x, place.y, end, place.y)
        for after in place.after:
            line(end, place.y, sides[after][0], after.y)
    met = meetings(segments)
    bridges = [segments[second].around(*at, BRIDGE) for (_, second), at in met.items()]
    shapes = [_shape(plan, place.step, box) for place, box in boxes.items() if place.step is not None]
    shapes.sort(key=lambda shape: shape[0])
    heads = [
        Shape(ARROW, Box(box.x - box.width / 2 - _HEAD / 2, box.y, _HEAD, _HEAD), "")
        for place, box in boxes.items()
        if place.before
    ]
    return Scene(
        (*(shape for _, shape in shapes), *heads), tuple(segments), tuple(labels), (), tuple(bridges), len(met)
    )


def _texts(plan: Plan, step: int) -> tuple[str, str]:
    """The text of a step, and the shape of its result."""
    what = plan.steps[step]
    name = what.settings() if isinstance(what, Input) else what.name
    return name, "×".join(map(str, plan.shapes[step])) or "scalar"


def _shape(plan: Plan, step: int, box: Box) -> tuple[int, Shape]:
    return step, Shape(TENSOR if isinstance(plan.steps[step], Input) else STEP, box, _texts(plan, step)[0])
