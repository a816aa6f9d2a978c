"""Plans as diagrams: steps in layers, from the operands on the left to the result on the right.

A value that a later layer uses has its own place in each layer in between. Barycentre sweeps choose the order within a
layer; heights are as close to the heights of neighbours as the spacing allows. Within a layer, lines are horizontal and
do not cross steps; all crossings are between layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lensor.draw.graph import ARROW, STEP, TENSOR
from lensor.draw.layers import Place, arrange, join, settle
from lensor.draw.scene import HEIGHT, LABEL
from lensor.draw.shapes import Box, Label, Scene, Shape, Stroke, bridged
from lensor.draw.tex import width_of
from lensor.plan import Plan
from lensor.plan.steps import Input

_LETTER = 7.6
"""Width of a letter in a step."""

_LEAST, _MOST = 22.0, 90.0
"""Minimum and maximum space between two layers; the slope of the lines determines the actual space."""

_HEAD, _TAIL = 9.0, 5.0
"""Space before a step for the arrowhead (also its size), and after a step for the line before it slants."""

_ABOVE, _BELOW = 16.0, 28.0
"""Space above and below the middle of a step (with the shape text under it)."""


def scene_of_plan(plan: Plan) -> Scene:
    """Draw a plan; steps that only reinterpret memory (reshape, transpose) are omitted."""
    takes = _shown(plan)
    layers, steps = _layers(takes)
    arrange(layers)
    settle(layers)
    return _scene(plan, layers, steps)


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


def _layers(takes: Mapping[int, Sequence[int]]) -> tuple[list[list[Place]], dict[Place, int]]:
    """Put each step after its inputs, and operands right before their first use; all uses of a value share a line."""
    depth: dict[int, int] = {}
    for at, sources in takes.items():
        depth[at] = 1 + max((depth[one] for one in sources), default=-1)
    users = {at: [user for user, sources in takes.items() if at in sources] for at in takes}
    for at, sources in takes.items():
        if not sources and users[at]:
            depth[at] = min(depth[user] for user in users[at]) - 1
    places = {at: Place(depth[at], above=_ABOVE, below=_BELOW) for at in takes}
    layers: list[list[Place]] = [[] for _ in range(max(depth.values()) + 1)]
    for place in places.values():
        layers[place.layer].append(place)
    for at in takes:
        last = places[at]
        for layer in range(depth[at] + 1, max((depth[user] for user in users[at]), default=0) + 1):
            ending = [places[user] for user in users[at] if depth[user] == layer]
            passing = [Place(layer, solid=False)] if any(depth[user] > layer for user in users[at]) else []
            layers[layer] += passing
            for place in (*ending, *passing):
                join(last, place)
            last = passing[0] if passing else last
    return layers, {place: at for at, place in places.items()}


def _scene(plan: Plan, layers: Sequence[Sequence[Place]], steps: Mapping[Place, int]) -> Scene:
    """Draw boxes with shape texts under them, horizontal lines within layers, and curves between layers."""
    boxes: dict[Place, Box] = {}
    labels: list[Label] = []
    columns: list[tuple[float, float]] = []
    right = 0.0
    for layer in layers:
        texts = {place: _texts(plan, steps[place]) for place in layer if place in steps}
        widths = {place: (_LETTER * len(name) + 14, width_of(shape) + 3) for place, (name, shape) in texts.items()}
        width = max(max(pair) for pair in widths.values())
        steep = max((abs(edge.left.y - place.y) for place in layer for edge in place.before), default=0.0)
        left = right + min(max(_LEAST, steep / 2), _MOST) * bool(columns)
        right = left + _HEAD + width + _TAIL
        columns.append((left, right))
        for place, (name, shape) in widths.items():
            middle = left + _HEAD + width / 2
            boxes[place] = Box(middle, place.y, name, HEIGHT)
            labels.append(Label(texts[place][1], Box(middle, place.y + 19.0, shape, LABEL)))
    strokes = []
    for place in (place for layer in layers for place in layer):
        y, (left, right) = place.y, columns[place.layer]
        box = boxes.get(place)
        if place.before:
            strokes.append(Stroke.straight((left, y), (box.x if box else right, y)))
        if box and place.after:
            strokes.append(Stroke.straight((box.x, y), (right, y)))
        for edge in place.after:
            end, other = columns[place.layer + 1][0], edge.right.y
            middle = (right + end) / 2
            strokes.append(Stroke(((right, y), (middle, y), (middle, other), (end, other))))
    shapes = [_shape(plan, steps[place], boxes[place]) for place in sorted(boxes, key=steps.__getitem__)]
    heads = [
        Shape(ARROW, Box(box.x - box.width / 2 - _HEAD / 2, box.y, _HEAD, _HEAD), "")
        for place, box in boxes.items()
        if place.before
    ]
    return bridged([*shapes, *heads], strokes, labels)


def _texts(plan: Plan, step: int) -> tuple[str, str]:
    """The text of a step, and the shape of its result."""
    what = plan.steps[step]
    name = what.settings() if isinstance(what, Input) else what.name
    return name, "×".join(map(str, plan.shapes[step])) or "scalar"


def _shape(plan: Plan, step: int, box: Box) -> Shape:
    return Shape(TENSOR if isinstance(plan.steps[step], Input) else STEP, box, _texts(plan, step)[0])
