"""A drawing as shapes with sizes and positions, in points; the source of SVG, TikZ and PNG."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

LETTER, SMALL = 8.5, 6.2
"""Widths of letters in nodes and in names of indices."""

BRIDGE = 6.0
"""Reach of a bridge on both sides of a crossing."""

_PIECES = 11
"""Number of straight pieces for each cubic curve where geometry is computed."""

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
class Stroke:
    """A line as cubic curves.

    Args:
        points: the start, then three points for each curve: two control points and its end.
        dashed: whether the line leads to an operand that is cut out.
        line: the number of the line in the network's graph.
    """

    points: tuple[Point, ...]
    dashed: bool = False
    line: int = 0

    @classmethod
    def straight(cls, *corners: Point, dashed: bool = False, line: int = 0) -> Stroke:
        """A line through some corners."""
        points = [corners[0]]
        for one, other in itertools.pairwise(corners):
            points += [one, other, other]
        return cls(tuple(points), dashed, line)

    def sampled(self) -> np.ndarray:
        """[points, 2]: points on the line."""
        points, found = np.array(self.points), [np.array(self.points[:1])]
        t = np.linspace(0.0, 1.0, _PIECES + 1)[1:, None]
        for at in range(0, len(points) - 1, 3):
            a, b, c, d = points[at : at + 4]
            level = abs(np.linalg.det([b - a, d - a])) + abs(np.linalg.det([c - a, d - a])) < 1e-6
            curve = (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d
            found.append(d[None] if level else curve)
        return np.concatenate(found)

    def pieces(self) -> np.ndarray:
        """[pieces, 4]: the line as straight pieces."""
        points = self.sampled()
        return np.concatenate([points[:-1], points[1:]], 1)


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
        around = corners_of(box, self.MARGIN)
        return any(_share_a_point(np.array(piece), around) for piece in self.pieces)


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
        strokes: the lines.
        labels: names of indices, and signs.
        shades: areas behind everything else.
        bridges: for each crossing, the piece of the line that passes above.
        crossings: number of crossings of lines.
    """

    shapes: tuple[Shape, ...] = ()
    strokes: tuple[Stroke, ...] = ()
    labels: tuple[Label, ...] = ()
    shades: tuple[Shade, ...] = ()
    bridges: tuple[Stroke, ...] = ()
    crossings: int = 0

    def boxes(self) -> Iterable[Box]:
        """The boxes of all shapes, labels and shades."""
        yield from (one.box for one in (*self.shapes, *self.labels, *self.shades))

    def bounds(self, margin: float = 8.0) -> tuple[float, float, float, float]:
        """Left, top, width and height of everything."""
        points = (Box(float(x), float(y), 0.0, 0.0) for one in self.strokes for x, y in one.sampled())
        boxes = [*self.boxes(), *points] or [Box(0, 0, 1, 1)]
        left = min(box.x - box.width / 2 for box in boxes) - margin
        right = max(box.x + box.width / 2 for box in boxes) + margin
        top = min(box.y - box.height / 2 for box in boxes) - margin
        bottom = max(box.y + box.height / 2 for box in boxes) + margin
        return left, top, right - left, bottom - top

    def moved(self, x: float, y: float) -> Scene:
        """The scene, shifted."""

        def boxed(one: Shape | Label) -> Shape | Label:
            return replace(one, box=replace(one.box, x=one.box.x + x, y=one.box.y + y))

        def points(some: Iterable[Point]) -> tuple[Point, ...]:
            return tuple((one + x, other + y) for one, other in some)

        return replace(
            self,
            shapes=tuple(map(boxed, self.shapes)),
            labels=tuple(map(boxed, self.labels)),
            strokes=tuple(replace(one, points=points(one.points)) for one in self.strokes),
            bridges=tuple(replace(one, points=points(one.points)) for one in self.bridges),
            shades=tuple(Shade(tuple(map(points, one.pieces))) for one in self.shades),
        )


def row(parts: Sequence[Scene | str], gap: float = 16.0) -> Scene:
    """Place scenes and signs next to each other, centred on one line."""
    right, found = 0.0, Scene()
    for part in parts:
        if isinstance(part, str):
            width = LETTER * len(part) + 4
            part = Scene(labels=(Label(part, Box(0.0, 0.0, width, 18.0), large=True),))
        left, top, width, height = part.bounds(0.0)
        moved = part.moved(right - left, -(top + height / 2))
        right += width + gap
        found = Scene(
            found.shapes + moved.shapes,
            found.strokes + moved.strokes,
            found.labels + moved.labels,
            found.shades + moved.shades,
            found.bridges + moved.bridges,
            found.crossings + moved.crossings,
        )
    return found


def bridged(shapes: Iterable[Shape], strokes: Sequence[Stroke], labels: Iterable[Label]) -> Scene:
    """A scene with a bridge at each crossing."""
    pieces = [one.pieces() for one in strokes]
    bridges = []
    for lower, upper in itertools.combinations(range(len(strokes)), 2):
        for i, j in zip(*np.nonzero(_meet(pieces[lower], pieces[upper])), strict=True):
            one, other = pieces[lower][i, :2], pieces[upper][j, :2]
            along, across = pieces[lower][i, 2:] - one, pieces[upper][j, 2:] - other
            point = one + np.linalg.det([other - one, across]) / np.linalg.det([along, across]) * along
            reach = BRIDGE * across / np.linalg.norm(across)
            start, end = ((float(x), float(y)) for x, y in (point - reach, point + reach))
            bridges.append(Stroke.straight(start, end, line=strokes[upper].line))
    return Scene(tuple(shapes), tuple(strokes), tuple(labels), (), tuple(bridges), len(bridges))


# ------------------------------------------------------------------------------------------------------------- geometry
def array(boxes: Iterable[Box]) -> np.ndarray:
    """[boxes, 4]: centres and sizes."""
    return np.array([(box.x, box.y, box.width, box.height) for box in boxes]).reshape(-1, 4)


def overlaps(boxes: np.ndarray, others: np.ndarray, gap: float) -> np.ndarray:
    """[boxes, others]: whether the distance between two boxes is below a gap."""
    apart = np.abs(boxes[:, None, :2] - others[None, :, :2])
    return np.all(apart < (boxes[:, None, 2:] + others[None, :, 2:]) / 2 + gap, axis=-1)


def cuts(lines: np.ndarray, boxes: np.ndarray, gap: float = 0.0) -> np.ndarray:
    """[boxes, lines]: whether the distance between a line and a box is below a gap."""
    start, step = lines[None, :, :2], lines[None, :, 2:] - lines[None, :, :2]
    step = np.where(np.abs(step) < 1e-9, 1e-9, step)
    centre, half = boxes[:, None, :2], boxes[:, None, 2:] / 2 + gap
    one, other = (centre - half - start) / step, (centre + half - start) / step
    enter, leave = np.minimum(one, other).max(-1), np.maximum(one, other).min(-1)
    return np.maximum(enter, 0.0) < np.minimum(leave, 1.0)


def _meet(lines: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[lines, others]: whether two lines cross, except at their ends."""
    lows, highs = ([found(at.reshape(-1, 2), 0) for at in (lines, others)] for found in (np.min, np.max))
    if (lows[0] > highs[1]).any() or (lows[1] > highs[0]).any():
        return np.zeros((0, 0))

    def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        step = a[..., 2:] - a[..., :2]
        one, other = b[..., :2] - a[..., :2], b[..., 2:] - a[..., :2]
        sides = [step[..., 0] * to[..., 1] - step[..., 1] * to[..., 0] for to in (one, other)]
        return (sides[0] * sides[1] < 0) & (np.minimum(*map(np.abs, sides)) > 1e-6)

    return apart(lines[:, None], others[None]) & apart(others[None], lines[:, None])


def corners_of(box: Box, margin: float) -> np.ndarray:
    """[4, 2]: the corners of a box, extended by a margin."""
    half = np.array([box.width, box.height]) / 2 + margin
    return np.array([box.x, box.y]) + half * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])


def _share_a_point(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two convex polygons intersect: no side of either separates them."""
    for polygon in (one, other):
        sides = np.roll(polygon, -1, 0) - polygon
        normals = np.stack([-sides[:, 1], sides[:, 0]], 1)
        first, second = one @ normals.T, other @ normals.T
        if ((first.max(0) <= second.min(0)) | (second.max(0) <= first.min(0))).any():
            return False
    return True
