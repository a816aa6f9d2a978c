"""A drawing as shapes with sizes and positions, in points; the source of SVG, TikZ and PNG."""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from lensor.draw.graph import CUT, DOT, END, GROUP, LOOP, ONES, STEP, Graph, Line
from lensor.draw.layout import Layout, Positions, laid_out

UNIT = 58.0
"""Length in points of a line of length 1."""

LETTER, SMALL = 7.6, 5.6
"""Widths of letters in nodes and in line labels."""

HEIGHT, LABEL = 24.0, 11.0
_ALONG = (0.5, 0.42, 0.58, 0.34, 0.66, 0.27, 0.73, 0.2, 0.8, 0.14, 0.86)
"""Possible positions of a label along its line."""

_STRETCHES = (1.0, 1.2, 1.45, 1.75, 2.1, 2.6, 3.2)
"""Factors by which a leg may be lengthened to fit its label at its end."""

BRIDGE = 6.0
"""Reach of a bridge on both sides of a crossing."""

_APART, _PIECES = 16.0, 12
"""Distance between parallel lines at their middle; number of straight pieces in a bent line."""

_GROWTH, _TRIES = 1.1, 18
"""Factor by which a drawing is enlarged until no label covers anything, and maximum number of enlargements."""

_BOX_GAP, _LABEL_GAP = 3.0, 1.0
"""Space between vertices, and between labels and everything else."""

_PADS = (10.0, 8.0, 6.0, 4.5, 3.0, 2.0, 1.0)
"""Possible distances that a shade extends beyond its vertices and lines; smaller ones are used to avoid other
vertices."""

_WORSE = 10
"""Cost of overlapping boxes, or of a line through a vertex, relative to a line under a label."""


Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle around a centre."""

    x: float
    y: float
    width: float
    height: float

    def overlaps(self, other: Box, gap: float = 0.0) -> bool:
        """Whether the distance between two boxes is below a gap."""
        apart = abs(self.x - other.x) >= (self.width + other.width) / 2 + gap
        return not apart and abs(self.y - other.y) < (self.height + other.height) / 2 + gap


@dataclass(frozen=True)
class Shape:
    """A vertex at its position.

    Args:
        kind: one of the shapes of `lensor.draw.graph`.
        box: its rectangle.
        text: the text inside the vertex.
        node: the number of the node in the network, if the vertex represents a node.
        angle: direction of a triangle, in radians.
    """

    kind: str
    box: Box
    text: str
    node: int | None = None
    angle: float = 0.0


@dataclass(frozen=True)
class Segment:
    """A line, or a straight piece of a bent line.

    Args:
        x1: x of the start.
        y1: y of the start.
        x2: x of the end.
        y2: y of the end.
        dashed: whether the line leads to an operand that is cut out.
        line: the number of the line in the network's graph.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    dashed: bool = False
    line: int = 0

    def moved(self, x: float, y: float) -> Segment:
        """The line, shifted."""
        return replace(self, x1=self.x1 + x, y1=self.y1 + y, x2=self.x2 + x, y2=self.y2 + y)

    def around(self, x: float, y: float, reach: float) -> Segment:
        """The piece of the line around a point on it."""
        length = math.hypot(self.x2 - self.x1, self.y2 - self.y1)
        ux, uy = reach * (self.x2 - self.x1) / length, reach * (self.y2 - self.y1) / length
        return replace(self, x1=x - ux, y1=y - uy, x2=x + ux, y2=y + uy)


@dataclass(frozen=True)
class Shade:
    """A shaded area behind some vertices.

    Args:
        pieces: corners of convex polygons, which may overlap; all have the same orientation.
    """

    pieces: tuple[tuple[Point, ...], ...]

    MARGIN: ClassVar[float] = 4.0
    """Distance by which writers extend the area on all sides, with rounded corners."""

    @property
    def box(self) -> Box:
        """The bounding rectangle."""
        corners = np.array([corner for piece in self.pieces for corner in piece])
        low, high = corners.min(0) - self.MARGIN, corners.max(0) + self.MARGIN
        return Box(*map(float, (low + high) / 2), *map(float, high - low))

    def overlaps(self, box: Box) -> bool:
        """Whether the area overlaps a box."""
        around = _corners(box, self.MARGIN)
        return any(_share_a_point(np.array(piece), around) for piece in self.pieces)

    def moved(self, x: float, y: float) -> Shade:
        """The area, shifted."""
        return Shade(tuple(tuple((one + x, other + y) for one, other in piece) for piece in self.pieces))


@dataclass(frozen=True)
class Label:
    """A text on or next to a line, with the line's number; large texts are signs between networks."""

    text: str
    box: Box
    large: bool = False
    line: int = 0


@dataclass(frozen=True)
class Scene:
    """The whole drawing.

    Args:
        shapes: the vertices.
        segments: the lines.
        labels: names of indices, and signs.
        shades: areas behind everything else.
        bridges: for each crossing, the piece of the line that passes above.
        crossings: number of pairs of lines that cross.
    """

    shapes: tuple[Shape, ...] = ()
    segments: tuple[Segment, ...] = ()
    labels: tuple[Label, ...] = ()
    shades: tuple[Shade, ...] = ()
    bridges: tuple[Segment, ...] = ()
    crossings: int = 0

    def boxes(self) -> Iterable[Box]:
        """The boxes of all shapes, labels and shades."""
        yield from (shape.box for shape in self.shapes)
        yield from (label.box for label in self.labels)
        yield from (shade.box for shade in self.shades)

    def bounds(self, margin: float = 8.0) -> tuple[float, float, float, float]:
        """Left, top, width and height of everything."""
        # Bent lines may extend beyond all boxes.
        bends = (Box(line.x1, line.y1, 0.0, 0.0) for line in self.segments)
        boxes = [*self.boxes(), *bends] or [Box(0, 0, 1, 1)]
        left = min(box.x - box.width / 2 for box in boxes) - margin
        right = max(box.x + box.width / 2 for box in boxes) + margin
        top = min(box.y - box.height / 2 for box in boxes) - margin
        bottom = max(box.y + box.height / 2 for box in boxes) + margin
        return left, top, right - left, bottom - top

    def moved(self, x: float, y: float) -> Scene:
        """The scene, shifted."""

        def box(one: Box) -> Box:
            return replace(one, x=one.x + x, y=one.y + y)

        return replace(
            self,
            shapes=tuple(replace(one, box=box(one.box)) for one in self.shapes),
            segments=tuple(one.moved(x, y) for one in self.segments),
            bridges=tuple(one.moved(x, y) for one in self.bridges),
            labels=tuple(replace(one, box=box(one.box)) for one in self.labels),
            shades=tuple(one.moved(x, y) for one in self.shades),
        )


def scene_of(graph: Graph, shade: Sequence[Collection[int]] = ()) -> Scene:
    """Lay out a graph at the first size where its labels cover nothing, or else at the size where they cover least.

    Args:
        graph: the graph.
        shade: sets of the network's nodes to shade.
    """
    best = min(_growing(graph, laid_out(graph)), key=lambda found: found.faults)
    shapes = tuple(shape for shape in best.shapes if shape.kind != LOOP)
    segments = best.segments()
    met = meetings(segments)
    return Scene(
        shapes,
        segments,
        tuple(best.labels),
        tuple(_shaded(best, nodes) for nodes in shade),
        tuple(segments[second].around(*point, BRIDGE) for (_, second), point in met.items()),
        len(met),
    )


def _growing(graph: Graph, layout: Layout) -> Iterator[_Placing]:
    """Yield scenes of increasing size, up to the first one without faults."""
    for growth in range(_TRIES):
        scale = UNIT * _GROWTH**growth * np.array([1.0, -1.0])  # downwards, as on a page
        found = _at_scale(graph, layout.place * scale, [bends * scale for bends in layout.bends])
        yield found
        if found.faults == 0:
            return


def _size(kind: str, text: str) -> tuple[float, float]:
    if kind in (END, LOOP):
        return (1.0, 1.0)
    if kind == DOT:
        return (7.0, 7.0)
    if kind == GROUP:
        return (12.0, 12.0)
    if kind == ONES:
        return (18.0, 18.0)
    return (max(LETTER * len(text) + (16 if kind != STEP else 12), 28.0), HEIGHT)


@dataclass
class _Placing:
    """A scene under construction.

    Args:
        graph: the graph to draw.
        shapes: its vertices.
        paths: the points of each line and of all lines parallel to it.
        labels: the labels placed so far.
        faults: a measure of how much labels, boxes and lines cover each other.
    """

    graph: Graph
    shapes: list[Shape]
    paths: list[list[Positions]]
    labels: list[Label] = field(default_factory=list)
    faults: int = 0

    def boxes(self, without: Collection[int] = ()) -> np.ndarray:
        """[boxes, 4]: the boxes of the labels and of all vertices except those in `without`."""
        shapes = [shape.box for at, shape in enumerate(self.shapes) if at not in without and shape.kind != LOOP]
        return _array([*shapes, *(label.box for label in self.labels)])

    def pieces(self, lines: Iterable[int]) -> np.ndarray:
        """[pieces, 4]: the pieces of some lines."""
        found = [np.concatenate([path[:-1], path[1:]], 1) for at in lines for path in self.paths[at]]
        return np.concatenate([np.zeros((0, 4)), *found])

    def segments(self) -> tuple[Segment, ...]:
        """All pieces, with the numbers of their lines."""
        return tuple(
            Segment(*map(float, (*one, *other)), dashed=_is_cut(self.graph, line), line=at)
            for at, line in enumerate(self.graph.lines)
            for path in self.paths[at]
            for one, other in itertools.pairwise(path)
        )

    def put_label(self, at: int) -> None:
        """Put the label of a line where it covers least, at the first such position."""
        line = self.graph.lines[at]
        size = (SMALL * len(line.label) + 3, LABEL)
        end = next((end for end in (line.first, line.second) if self.graph.vertices[end].shape == END), None)
        legs = []
        if end is None:
            options = list(_boxes_on(self.paths[at], size))
        else:
            near = line.first + line.second - end
            legs, options = zip(*_beyond(self.shapes[near].box, self.shapes[end].box, size), strict=True)
        lines = self.pieces(other for other in range(len(self.paths)) if other != at)
        taken = self.boxes(() if end is None else {end})
        faults = _WORSE * _overlaps(_array(options), taken, _LABEL_GAP).sum(1)
        faults += _cuts(lines, _array(options), _LABEL_GAP).sum(1)
        if end is not None:
            legs = np.array(legs)
            faults += _cuts(legs, self.boxes({line.first, line.second})).sum(0) + _meet(legs, lines).sum(1)
        best = int(faults.argmin())
        self.faults += int(faults[best])
        self.labels.append(Label(line.label, options[best], line=at))
        if end is not None:
            x, y = map(float, legs[best][2:])
            self.shapes[end] = replace(self.shapes[end], box=replace(self.shapes[end].box, x=x, y=y))
            self.paths[at] = [legs[best].reshape(2, 2)]


def _at_scale(graph: Graph, place: Positions, bends: Sequence[Positions]) -> _Placing:
    """The scene with the vertices and bends at the given points."""
    paths = [_paths(graph, line, place, bent) for line, bent in zip(graph.lines, bends, strict=True)]
    found = _Placing(graph, _shapes(graph, place), paths)
    boxes = found.boxes()
    found.faults += _WORSE * int(np.triu(_overlaps(boxes, boxes, _BOX_GAP), 1).sum())
    for at, line in enumerate(graph.lines):
        foreign = found.boxes({line.first, line.second})
        found.faults += _WORSE * int(_cuts(found.pieces([at]), foreign).sum())

    # Place labels of legs first, because these have one position, then those of short lines, which have few.
    def order(at: int) -> tuple[bool, float, int]:
        line = graph.lines[at]
        is_leg = END in (graph.vertices[line.first].shape, graph.vertices[line.second].shape)
        return not is_leg, round(float(np.linalg.norm(place[line.first] - place[line.second])), 6), at

    for at in sorted(range(len(graph.lines)), key=order):
        found.put_label(at)
    return found


def _shapes(graph: Graph, place: Positions) -> list[Shape]:
    """Shapes for all vertices, at their points; triangles point away from their lines."""
    near, shapes = graph.neighbours(), []
    for at, vertex in enumerate(graph.vertices):
        angle = 0.0
        if vertex.shape == GROUP and near[at]:
            inwards = place[list(near[at])].mean(0) - place[at]
            angle = math.atan2(-inwards[1], -inwards[0])
        (x, y), size = place[at], _size(vertex.shape, vertex.text)
        box = Box(float(x), float(y), *size)
        shapes.append(Shape(vertex.shape, box, vertex.text, vertex.node, angle))
    return shapes


def _paths(graph: Graph, line: Line, place: Positions, bends: Positions) -> list[Positions]:
    """The points of a line, or of several parallel lines; a loop turns at the LOOP vertex."""
    start, stop = place[line.first], place[line.second]
    along = stop - start
    across = np.array([-along[1], along[0]])
    t = np.linspace(0.0, 1.0, _PIECES + 1)[:, None]
    if graph.vertices[line.second].shape == LOOP:
        width = _loop_width(graph, line, place)
        far, aside = start + 4 / 3 * along, width * across
        return [start + 3 * (1 - t) * t * (far - start + (1 - 2 * t) * aside)]
    if line.times == 1:
        return [np.concatenate([[start], bends, [stop]])]
    gap = _APART / max(float(np.linalg.norm(along)), 1.0)
    bows = gap * (np.arange(line.times) - (line.times - 1) / 2)
    return [start + t * along + 4 * t * (1 - t) * bow * across if bow else np.array([start, stop]) for bow in bows]


def _loop_width(graph: Graph, line: Line, place: Positions) -> float:
    """Maximum width of a loop of this length that avoids the other lines of its vertex."""
    near = [other for other in graph.neighbours()[line.first] if other != line.second]
    axis = complex(*(place[line.second] - place[line.first]))
    angles = [abs(cmath.phase(complex(*(place[other] - place[line.first])) / axis)) for other in near]
    return min(0.9, math.tan(min(*angles, 1.0, 1.0)))


def _is_cut(graph: Graph, line: Line) -> bool:
    return CUT in (graph.vertices[line.first].shape, graph.vertices[line.second].shape)


def meetings(segments: Sequence[Segment]) -> dict[tuple[int, int], tuple[float, float]]:
    """The points where lines meet, except at their ends."""
    lines = np.array([(one.x1, one.y1, one.x2, one.y2) for one in segments]).reshape(-1, 4)
    found = {}
    for i, j in zip(*np.nonzero(np.triu(_meet(lines, lines), 1)), strict=True):
        start, along, other, across = (
            lines[i, :2],
            lines[i, 2:] - lines[i, :2],
            lines[j, :2],
            lines[j, 2:] - lines[j, :2],
        )
        t = np.linalg.det([other - start, across]) / np.linalg.det([along, across])
        x, y = start + t * along
        found[int(i), int(j)] = float(x), float(y)
    return found


def _boxes_on(paths: Sequence[Positions], size: tuple[float, float]) -> Iterator[Box]:
    """Yield label boxes on the lines, then next to them."""
    spots = []
    for share in _ALONG:
        for path in paths:
            at = min(int(share * (len(path) - 1)), len(path) - 2)
            step = path[at + 1] - path[at]
            spots.append((path[at] + (share * (len(path) - 1) - at) * step, step / max(np.linalg.norm(step), 1e-9)))
    for (x, y), _ in spots:
        yield Box(float(x), float(y), *size)
    for (x, y), (ux, uy) in spots:
        away = (abs(uy) * size[0] + abs(ux) * size[1]) / 2 + _LABEL_GAP
        for side in (1.0, -1.0):
            yield Box(float(x - side * uy * away), float(y + side * ux * away), *size)


def _beyond(near: Box, end: Box, size: tuple[float, float]) -> Iterator[tuple[tuple[float, ...], Box]]:
    """Yield legs of increasing length, with a label box beyond each end."""
    length = math.hypot(end.x - near.x, end.y - near.y) or 1.0
    ux, uy = (end.x - near.x) / length, (end.y - near.y) / length
    reach = min(size[0] / 2 / max(abs(ux), 1e-6), size[1] / 2 / max(abs(uy), 1e-6)) + 3
    for stretch in _STRETCHES:
        x, y = near.x + stretch * length * ux, near.y + stretch * length * uy
        yield (near.x, near.y, x, y), Box(x + ux * reach, y + uy * reach, *size)


def _array(boxes: Iterable[Box]) -> np.ndarray:
    """[boxes, 4]: centres and sizes."""
    return np.array([(box.x, box.y, box.width, box.height) for box in boxes]).reshape(-1, 4)


def _overlaps(boxes: np.ndarray, others: np.ndarray, gap: float) -> np.ndarray:
    """[boxes, others]: whether the distance between two boxes is below a gap."""
    apart = np.abs(boxes[:, None, :2] - others[None, :, :2])
    return np.all(apart < (boxes[:, None, 2:] + others[None, :, 2:]) / 2 + gap, axis=-1)


def _cuts(lines: np.ndarray, boxes: np.ndarray, gap: float = 0.0) -> np.ndarray:
    """[boxes, lines]: whether the distance between a line and a box is below a gap."""
    start, step = lines[None, :, :2], lines[None, :, 2:] - lines[None, :, :2]
    step = np.where(np.abs(step) < 1e-9, 1e-9, step)
    centre, half = boxes[:, None, :2], boxes[:, None, 2:] / 2 + gap
    one, other = (centre - half - start) / step, (centre + half - start) / step
    enter, leave = np.minimum(one, other).max(-1), np.maximum(one, other).min(-1)
    return np.maximum(enter, 0.0) < np.minimum(leave, 1.0)


def _meet(lines: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[lines, others]: whether two lines cross, except at their ends."""

    def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        step = a[..., 2:] - a[..., :2]
        one, other = b[..., :2] - a[..., :2], b[..., 2:] - a[..., :2]
        sides = [step[..., 0] * to[..., 1] - step[..., 1] * to[..., 0] for to in (one, other)]
        return sides[0] * sides[1] < 0

    return apart(lines[:, None], others[None]) & apart(others[None], lines[:, None])


def _shaded(scene: _Placing, nodes: Collection[int]) -> Shade:
    """The hull of some nodes; if it meets other vertices, one shape per node and thick bands along their lines."""
    graph, near = scene.graph, scene.graph.neighbours()
    own = {at for at, vertex in enumerate(graph.vertices) if vertex.node in nodes}
    # Include dots and groups between the nodes, and the nodes' loops. A dot with one line is an index summed elsewhere.
    own |= {
        at
        for at, vertex in enumerate(graph.vertices)
        if near[at] <= own and (vertex.shape == LOOP or (vertex.shape in (DOT, GROUP) and len(near[at]) > 1))
    }
    boxes = {at: scene.shapes[at].box for at in sorted(own)}
    others = [shape.box for at, shape in enumerate(scene.shapes) if at not in own and shape.kind not in (LOOP, END)]

    def widest(areas: Iterable[np.ndarray]) -> list[tuple[Point, ...]]:
        """The first area that meets no other vertex."""
        for corners in areas:
            piece = _hull(corners)
            if not any(map(Shade((piece,)).overlaps, others)):
                return [piece]
        return []

    def around(some: Iterable[Box]) -> Iterator[np.ndarray]:
        some = list(some)
        return (np.concatenate([_corners(box, pad - Shade.MARGIN) for box in some]) for pad in _PADS)

    pieces = widest(around(boxes.values()))
    if not pieces:
        pieces = [piece for box in boxes.values() for piece in widest(around([box]))]
        for line, paths in zip(graph.lines, scene.paths, strict=True):
            for one, other in (pair for path in paths for pair in itertools.pairwise(path)):
                if {line.first, line.second} <= own:
                    pieces += widest(_band(one, other, max(pad - Shade.MARGIN, 0.1)) for pad in _PADS)
    return Shade(tuple(pieces))


def _corners(box: Box, margin: float) -> np.ndarray:
    """[4, 2]: the corners of a box, extended by a margin."""
    half = np.array([box.width, box.height]) / 2 + margin
    return np.array([box.x, box.y]) + half * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])


def _band(one: np.ndarray, other: np.ndarray, half: float) -> np.ndarray:
    """[4, 2]: the corners of a band along a line."""
    along = other - one
    across = half * np.array([-along[1], along[0]]) / max(float(np.linalg.norm(along)), 1e-9)
    return np.array([one + across, one - across, other - across, other + across])


def _hull(points: np.ndarray) -> tuple[Point, ...]:
    """The corners of the convex hull; all hulls have the same orientation."""

    def chain(points: Iterable[Point]) -> list[Point]:
        found: list[Point] = []
        for x, y in points:
            while len(found) > 1:
                (ax, ay), (bx, by) = found[-2:]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                found.pop()
            found.append((x, y))
        return found[:-1]

    ordered = sorted((float(x), float(y)) for x, y in points)
    return (*chain(ordered), *chain(reversed(ordered)))


def _share_a_point(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two convex polygons intersect: no side of either separates them."""
    for polygon in (one, other):
        sides = np.roll(polygon, -1, 0) - polygon
        normals = np.stack([-sides[:, 1], sides[:, 0]], 1)
        first, second = one @ normals.T, other @ normals.T
        if ((first.max(0) <= second.min(0)) | (second.max(0) <= first.min(0))).any():
            return False
    return True


def row(parts: Sequence[Scene | str], gap: float = 16.0) -> Scene:
    """Place scenes and signs next to each other, centred on one line."""
    right, count = 0.0, 0
    shapes: list[Shape] = []
    segments: list[Segment] = []
    labels: list[Label] = []
    shades: list[Shade] = []
    bridges: list[Segment] = []
    for part in parts:
        if isinstance(part, str):
            width = LETTER * 1.3 * len(part) + 4
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
