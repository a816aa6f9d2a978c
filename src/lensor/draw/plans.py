"""Plans as diagrams: steps in layers, from the operands on the left to the result on the right."""

from __future__ import annotations

from lensor.draw.graph import STEP, TENSOR
from lensor.draw.scene import Box, Label, Scene, Segment, Shape
from lensor.plan import Plan
from lensor.steps import Input

_ACROSS, _DOWN, _LETTER = 34.0, 46.0, 7.6


def scene_of_plan(plan: Plan) -> Scene:
    """Steps that only look at memory in another way (reshape, transpose) are left out: lines run through them."""
    steps = plan.steps
    shown = [at for at, step in enumerate(steps) if not step.is_view or isinstance(step, Input) or not step.takes]
    if plan.result not in shown:
        shown.append(plan.result)

    def sources(at: int) -> list[int]:
        found: list[int] = []
        for one in steps[at].takes:
            found += [one] if one in shown else sources(one)
        return list(dict.fromkeys(found))

    depth: dict[int, int] = {}
    for at in shown:
        depth[at] = 1 + max((depth[one] for one in sources(at)), default=-1)
    texts = {at: step.settings() if isinstance(step := steps[at], Input) else step.name for at in shown}
    columns: list[list[int]] = [[] for _ in range(max(depth.values()) + 1)]
    for at in shown:
        columns[depth[at]].append(at)
    place: dict[int, tuple[float, float]] = {}
    right = 0.0
    shapes: list[Shape] = []
    for column in columns:
        # Each step near what it takes, which keeps lines short and mostly apart.
        own = sorted(column, key=lambda at: _mean([place[one][1] for one in sources(at)]) if sources(at) else 1e9)
        width = max(_LETTER * len(texts[at]) + 14 for at in own)
        for row, at in enumerate(own):
            place[at] = (right + width / 2, (row - (len(own) - 1) / 2) * _DOWN)
            kind = TENSOR if isinstance(steps[at], Input) else STEP
            shapes.append(Shape(kind, Box(*place[at], _LETTER * len(texts[at]) + 14, 24.0), texts[at]))
        right += width + _ACROSS
    segments = [Segment(*place[one], *place[at]) for at in shown for one in sources(at)]
    labels = []
    for at in shown:
        text = "×".join(map(str, plan.shapes[at])) or "scalar"
        x, y = place[at]
        labels.append(Label(text, Box(x, y + 19.0, 5.6 * len(text) + 3, 11.0)))
    return Scene(tuple(shapes), tuple(segments), tuple(labels))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
