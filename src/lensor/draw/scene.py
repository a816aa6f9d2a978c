"""A drawing as shapes with sizes and places, in points: what SVG, TikZ and PNG are written from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lensor.draw.graph import CUT, DOT, END, GROUP, ONES, STEP, Graph, Line
from lensor.draw.layout import Positions, crossings, positions

UNIT = 58.0
"""The length of a line that is 1 long."""

_LETTER, _SMALL = 7.6, 5.6
"""The widths of letters in nodes and of those at lines."""

_HEIGHT, _LABEL = 24.0, 11.0
_ALONG = (0.5, 0.42, 0.58, 0.34, 0.66, 0.27, 0.73, 0.2, 0.8)
"""Where along its line a label may stand."""

_BRIDGE = 6.0
"""How far a bridge reaches to both sides of a crossing."""

_GROWTH, _TRIES = 1.1, 30
"""A drawing is made larger by this factor until no label overlaps anything."""


@dataclass(frozen=True)
class Box:
    """A rectangle around a centre."""

    x: float
    y: float
    width: float
    height: float

    def overlaps(self, other: Box, gap: float = 0.0) -> bool:
        """Whether two boxes come nearer than a gap."""
        apart = abs(self.x - other.x) >= (self.width + other.width) / 2 + gap
        return not apart and abs(self.y - other.y) < (self.height + other.height) / 2 + gap


@dataclass(frozen=True)
class Shape:
    """A vertex in its place.

    Args:
        kind: one of the shapes of `lensor.draw.graph`.
        box: where it is.
        text: what stands in it.
        node: the number of the network's node, if it is one.
        angle: where a triangle points to, in radians.
    """

    kind: str
    box: Box
    text: str
    node: int | None = None
    angle: float = 0.0


@dataclass(frozen=True)
class Segment:
    """A line from one point to another, dashed if it leads to what is cut out."""

    x1: float
    y1: float
    x2: float
    y2: float
    dashed: bool = False

    def moved(self, x: float, y: float) -> Segment:
        """The line at another place."""
        return Segment(self.x1 + x, self.y1 + y, self.x2 + x, self.y2 + y, self.dashed)

    def around(self, x: float, y: float, reach: float) -> Segment:
        """The piece of the line around one of its points."""
        length = math.hypot(self.x2 - self.x1, self.y2 - self.y1)
        ux, uy = reach * (self.x2 - self.x1) / length, reach * (self.y2 - self.y1) / length
        return Segment(x - ux, y - uy, x + ux, y + uy, self.dashed)


@dataclass(frozen=True)
class Label:
    """A text beside or on a line; large ones are signs between networks."""

    text: str
    box: Box
    large: bool = False


@dataclass(frozen=True)
class Scene:
    """Everything that is drawn.

    Args:
        shapes: the vertices.
        segments: the lines.
        labels: the names of indices, and signs.
        shades: areas behind the rest.
        bridges: where two lines cross, a piece of the one that passes above.
        crossings: how many pairs of lines cross.
    """

    shapes: tuple[Shape, ...] = ()
    segments: tuple[Segment, ...] = ()
    labels: tuple[Label, ...] = ()
    shades: tuple[Box, ...] = ()
    bridges: tuple[Segment, ...] = ()
    crossings: int = 0

    def boxes(self) -> Iterable[Box]:
        """The boxes of all shapes, labels and shades."""
        yield from (shape.box for shape in self.shapes)
        yield from (label.box for label in self.labels)
        yield from self.shades

    def bounds(self, margin: float = 8.0) -> tuple[float, float, float, float]:
        """Left, top, width and height of everything."""
        boxes = list(self.boxes()) or [Box(0, 0, 1, 1)]
        left = min(box.x - box.width / 2 for box in boxes) - margin
        right = max(box.x + box.width / 2 for box in boxes) + margin
        top = min(box.y - box.height / 2 for box in boxes) - margin
        bottom = max(box.y + box.height / 2 for box in boxes) + margin
        return left, top, right - left, bottom - top

    def moved(self, x: float, y: float) -> Scene:
        """The scene at another place."""

        def box(one: Box) -> Box:
            return replace(one, x=one.x + x, y=one.y + y)

        return replace(
            self,
            shapes=tuple(replace(one, box=box(one.box)) for one in self.shapes),
            segments=tuple(one.moved(x, y) for one in self.segments),
            bridges=tuple(one.moved(x, y) for one in self.bridges),
            labels=tuple(replace(one, box=box(one.box)) for one in self.labels),
            shades=tuple(map(box, self.shades)),
        )


@dataclass
class _Placing:
    """Labels while they find their places."""

    taken: list[Box] = field(default_factory=list)

    def put(self, options: Iterable[Box]) -> Box | None:
        for box in options:
            if not any(box.overlaps(other, 1.0) for other in self.taken):
                self.taken.append(box)
                return box
        return None


def scene_of(graph: Graph, shade: Sequence[Collection[int]] = ()) -> Scene:
    """A graph laid out, large enough for its labels.

    Args:
        graph: the graph.
        shade: sets of the network's nodes to shade.
    """
    place = positions(graph)
    place[:, 1] *= -1  # downwards, as on a page
    count = crossings(graph, place)
    scale = UNIT
    for _ in range(_TRIES):
        found = _at_scale(graph, place * scale, count)
        if found is not None:
            return replace(found, shades=tuple(_shaded(found, nodes) for nodes in shade))
        scale *= _GROWTH
    raise RuntimeError("no room for all labels was found")


def _size(kind: str, text: str) -> tuple[float, float]:
    if kind in (END, DOT):
        return (1.0, 1.0) if kind == END else (7.0, 7.0)
    if kind == GROUP:
        return (12.0, 12.0)
    if kind == ONES:
        return (18.0, 18.0)
    return (max(_LETTER * len(text) + (16 if kind != STEP else 12), 28.0), _HEIGHT)


def _at_scale(graph: Graph, place: Positions, count: int) -> Scene | None:
    """The scene with vertices at these points; None if something overlaps."""
    shapes = []
    near = graph.neighbours()
    for at, vertex in enumerate(graph.vertices):
        x, y = map(float, place[at])
        angle = 0.0
        if vertex.shape == GROUP and near[at]:
            inwards = place[list(near[at])].mean(0) - place[at]
            angle = math.atan2(-inwards[1], -inwards[0])
        shapes.append(
            Shape(vertex.shape, Box(x, y, *_size(vertex.shape, vertex.text)), vertex.text, vertex.node, angle)
        )
    for one, other in itertools.combinations(shapes, 2):
        if one.box.overlaps(other.box, 3.0):
            return None
    segments = [
        Segment(*map(float, place[line.first]), *map(float, place[line.second]), dashed=_is_cut(graph, line))
        for line in graph.lines
    ]
    for (first, second), segment in zip(ends_of(graph), segments, strict=True):
        for at, shape in enumerate(shapes):
            if count == 0 and at not in (first, second) and _cuts(segment, shape.box):
                return None
    placing = _Placing([shape.box for shape in shapes])
    labels = []
    # Short lines first: they leave the least choice.
    order = sorted(range(len(segments)), key=lambda at: (_length(segments[at]), at))
    for at in order:
        line, segment = graph.lines[at], segments[at]
        size = (_SMALL * len(line.label) + 3, _LABEL)
        open_end = next((end for end in (line.first, line.second) if graph.vertices[end].shape == END), None)
        if open_end is not None:
            options = _beyond(segment, size, open_end == line.first)
        else:
            options = (
                Box(segment.x1 + t * (segment.x2 - segment.x1), segment.y1 + t * (segment.y2 - segment.y1), *size)
                for t in _ALONG
            )
        box = placing.put(options)
        if box is None:
            return None
        labels.append(Label(line.label, box))
    bridges = tuple(
        segments[second].around(*point, _BRIDGE) for (first, second), point in meetings(graph, segments).items()
    )
    return Scene(tuple(shapes), tuple(segments), tuple(labels), (), bridges, count)


def _is_cut(graph: Graph, line: Line) -> bool:
    return CUT in (graph.vertices[line.first].shape, graph.vertices[line.second].shape)


def meetings(graph: Graph, segments: Sequence[Segment]) -> dict[tuple[int, int], tuple[float, float]]:
    """Where lines without a common vertex meet."""
    found = {}
    for (i, one), (j, two) in itertools.combinations(enumerate(segments), 2):
        if {graph.lines[i].first, graph.lines[i].second} & {graph.lines[j].first, graph.lines[j].second}:
            continue
        ax, ay, bx, by = one.x2 - one.x1, one.y2 - one.y1, two.x2 - two.x1, two.y2 - two.y1
        area = ax * by - ay * bx
        if abs(area) < 1e-9:
            continue
        t = ((two.x1 - one.x1) * by - (two.y1 - one.y1) * bx) / area
        u = ((two.x1 - one.x1) * ay - (two.y1 - one.y1) * ax) / area
        if 0 <= t <= 1 and 0 <= u <= 1:
            found[i, j] = (one.x1 + t * ax, one.y1 + t * ay)
    return found


def ends_of(graph: Graph) -> list[tuple[int, int]]:
    """The vertices that each line joins."""
    return [(line.first, line.second) for line in graph.lines]


def _length(segment: Segment) -> float:
    return math.hypot(segment.x2 - segment.x1, segment.y2 - segment.y1)


def _beyond(segment: Segment, size: tuple[float, float], at_first: bool) -> Iterable[Box]:
    """Boxes behind the open end of a line, and beside it."""
    (x, y), (fx, fy) = (segment.x2, segment.y2), (segment.x1, segment.y1)
    if at_first:
        (x, y), (fx, fy) = (fx, fy), (x, y)
    length = math.hypot(x - fx, y - fy) or 1.0
    ux, uy = (x - fx) / length, (y - fy) / length
    width, height = size
    reach = min(width / 2 / max(abs(ux), 1e-6), height / 2 / max(abs(uy), 1e-6)) + 3
    yield Box(x + ux * reach, y + uy * reach, width, height)
    for t in (0.75, 0.6, 0.5, 0.4):
        yield Box(fx + t * (x - fx), fy + t * (y - fy), width, height)


def _cuts(segment: Segment, box: Box) -> bool:
    """Whether a line runs through a box."""
    x, y = np.array([segment.x1, segment.x2]), np.array([segment.y1, segment.y2])
    low, high = 0.0, 1.0
    for start, step, centre, half in (
        (x[0], x[1] - x[0], box.x, box.width / 2),
        (y[0], y[1] - y[0], box.y, box.height / 2),
    ):
        if abs(step) < 1e-9:
            if abs(start - centre) > half:
                return False
            continue
        one, other = sorted(((centre - half - start) / step, (centre + half - start) / step))
        low, high = max(low, one), min(high, other)
    return low < high


def _shaded(scene: Scene, nodes: Collection[int]) -> Box:
    boxes = [shape.box for shape in scene.shapes if shape.node in nodes]
    left, right = min(b.x - b.width / 2 for b in boxes), max(b.x + b.width / 2 for b in boxes)
    top, bottom = min(b.y - b.height / 2 for b in boxes), max(b.y + b.height / 2 for b in boxes)
    return Box((left + right) / 2, (top + bottom) / 2, right - left + 14, bottom - top + 14)


def row(parts: Sequence[Scene | str], gap: float = 16.0) -> Scene:
    """Scenes and signs side by side, centred on one line."""
    right, count = 0.0, 0
    shapes: list[Shape] = []
    segments: list[Segment] = []
    labels: list[Label] = []
    shades: list[Box] = []
    bridges: list[Segment] = []
    for part in parts:
        if isinstance(part, str):
            width = _LETTER * 1.3 * len(part) + 4
            labels.append(Label(part, Box(right + width / 2, 0.0, width, 18.0), large=True))
            right += width + gap
            continue
        left, top, width, height = part.bounds(0.0)
        moved = part.moved(right - left, -(top + height / 2))
        shapes += moved.shapes
        segments += moved.segments
        labels += moved.labels
        shades += moved.shades
        bridges += moved.bridges
        count += part.crossings
        right += width + gap
    return Scene(tuple(shapes), tuple(segments), tuple(labels), tuple(shades), tuple(bridges), count)
