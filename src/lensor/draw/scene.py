"""The scene of a network: sizes, smooth lines, names beside lines, and shades.

Boxes stand in columns. Lines are horizontal within a column and curved between columns, so that they do not cover
boxes. A scene grows until no name covers anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from lensor.draw.graph import CUT, DOT, END, GROUP, LOOP, ONES, Graph
from lensor.draw.layers import Edge, Place, settle
from lensor.draw.layout import Layout, laid_out
from lensor.draw.shapes import (
    LETTER,
    Box,
    Label,
    Point,
    Scene,
    Shade,
    Shape,
    Stroke,
    array,
    bridged,
    corners_of,
    cuts,
    overlaps,
    row,
)
from lensor.draw.tex import width_of

HEIGHT, LABEL = 24.0, 12.0
"""Heights of boxes and of names."""

_PORT, _THIN, _LEG, _GAP, _BETWEEN = 7.0, 8.0, 16.0, 40.0, 8.0
"""Distance between lines at a box, space above and below a line, length of an upright leg, space between columns, and
space above and below a box."""

_GROWTH, _TRIES, _PATIENCE = 1.15, 14, 2
"""Factor by which a drawing grows until no name covers anything, maximum number of times, and number of times without
an improvement after which it stops growing."""

_SHARES = (0.5, 0.42, 0.58, 0.34, 0.66, 0.26, 0.74, 0.18, 0.82, 0.12, 0.88)
"""Possible positions of a name along its line."""

_PADS = (10.0, 8.0, 6.0, 4.5, 3.0, 2.0, 1.0)
"""Possible distances that a shade extends beyond its vertices and lines; smaller ones are used to avoid other
vertices."""


def scene_of(graph: Graph, shade: Sequence[Collection[int]] = ()) -> Scene:
    """Draw a graph at the first size where its names cover nothing, or else at the size where they cover least.

    Args:
        graph: the graph.
        shade: sets of the network's nodes to shade.
    """
    parts = []
    for part in graph.components():
        drawn = _growing(graph, laid_out(graph, part))
        parts.append(bridged(*min(drawn, key=lambda found: found[0])[1:]))
    whole = row(parts, 12.0)
    order = [at for part in graph.components() for at in part]
    shapes = dict(zip(order, whole.shapes, strict=True))
    shades = tuple(_shaded(graph, shapes, whole.strokes, nodes) for nodes in shade)
    kept = tuple(shapes[at] for at in sorted(shapes) if shapes[at].kind != LOOP)
    return replace(whole, shapes=kept, shades=shades)


_Parts = tuple[int, list[Shape], list[Stroke], list[Label]]
"""How often something is covered; vertices, lines and names."""


def _growing(graph: Graph, layout: Layout) -> Iterator[_Parts]:
    """Yield drawings of increasing size, up to one where nothing is covered or growth does not help."""
    least, tries = math.inf, 0
    for growth in range(_TRIES):
        found = _Drawn(graph, layout, _GROWTH**growth).parts()
        yield found
        tries = 0 if found[0] < least else tries + 1
        least = min(least, found[0])
        if least == 0 or tries == _PATIENCE:
            return


class _Drawn:
    """A connected part of a graph at one size."""

    def __init__(self, graph: Graph, layout: Layout, scale: float) -> None:
        self.graph, self.layout, self.scale = graph, layout, scale
        self.vertex = {place: at for at, place in layout.places.items()}
        self.rows = {place: at for layer in layout.layers for at, place in enumerate(layer)}
        self.sizes = {at: self._size(at) for at in layout.places}
        self.sides = {at: self._sides(at) for at in layout.places}
        self.line = {end: number for number, line in enumerate(graph.lines) for end in (line.first, line.second)}
        self._make_room()
        settle(layout.layers)
        self._set_columns()

    def _size(self, at: int) -> tuple[float, float]:
        vertex, place = self.graph.vertices[at], self.layout.places[at]
        match vertex.shape:
            case "dot":
                return 7.0, 7.0
            case "group":
                return 12.0, 12.0
            case "end":
                return 1.0, 1.0
        lines = [sum(self.graph.lines[edge.line].times for edge in side) for side in (place.before, place.after)]
        height = max(HEIGHT, _PORT * max(lines) + 4.0)
        if vertex.shape == ONES:
            return 20.0, 20.0
        return max(width_of(vertex.text, LETTER) + 16.0, 30.0), height

    def _label(self, leaf: int) -> str:
        return next(line.label for line in self.graph.lines if leaf in (line.first, line.second))

    def _sides(self, at: int) -> tuple[list[int], list[int]]:
        """The leaves above and below a vertex."""
        place, leaves = self.layout.places[at], self.layout.upright.get(at, [])
        above = any(self.rows[one] < self.rows[place] for one in place.beside)
        below = any(self.rows[one] > self.rows[place] for one in place.beside)
        layer = self.layout.layers[place.layer]
        first, last = layer[0] is place, layer[-1] is place
        if above != below or first != last:
            up = not above if above != below else first
            return (leaves, []) if up else ([], leaves)
        if self.graph.vertices[at].shape == DOT and len(leaves) == 1:
            return [], leaves
        if len(leaves) == 1:
            return (leaves, []) if place.rank <= 0 else ([], leaves)
        half = (len(leaves) + 1) // 2
        return leaves[:half], leaves[half:]

    def _slots(self, at: int, up: bool) -> list[tuple[int, float]]:
        """The leaves on one side of a vertex, with their distances from its middle."""
        leaves, place = self.sides[at][not up], self.layout.places[at]
        taken = any((self.rows[one] < self.rows[place]) == up for one in place.beside)
        wide = max((width_of(self._label(leaf)) + 5.0 for leaf in leaves), default=0.0) * self.scale
        wide = max(wide, 16.0)
        start = wide if taken else -(len(leaves) - 1) / 2 * wide
        return [(leaf, start + number * wide) for number, leaf in enumerate(leaves)]

    def _make_room(self) -> None:
        """Set the ports of edges, and the space that each place takes."""
        for place in self.rows:
            place.above = place.below = _THIN * self.scale
            at = self.vertex.get(place)
            if at is None:
                continue
            width, height = self.sizes[at]
            for side, other in ((place.before, "left"), (place.after, "right")):
                side.sort(key=lambda edge: self.rows[getattr(edge, other)])
                times = [self.graph.lines[edge.line].times for edge in side]
                step = _PORT if height >= HEIGHT else 0.0
                start = -(sum(times) - 1) / 2 * step
                for edge, count in zip(side, times, strict=True):
                    setattr(edge, "enters" if other == "left" else "leaves", start + (count - 1) / 2 * step)
                    start += count * step
            ends = [abs(x) for up in (True, False) for _, x in self._slots(at, up)]
            if height >= HEIGHT and ends:
                self.sizes[at] = (max(width, 2 * max(ends) + 12.0), height)
            free = height / 2 + (_BETWEEN if height >= HEIGHT else 3.0) * self.scale
            tall = height / 2 + _LEG * self.scale + LABEL + 5.0
            place.above = tall if self.sides[at][0] else free
            place.below = tall if self.sides[at][1] else free
            if place.beside:
                place.above, place.below = (max(one, free + LABEL / 2) for one in (place.above, place.below))

    def _wide(self, place: Place) -> float:
        """The width that a place needs in its column."""
        at = self.vertex.get(place)
        if at is None:
            return 0.0
        if self.graph.vertices[at].shape == END:
            return width_of(self._label(at)) + 3.0
        found = [self.sizes[at][0]]
        for up in (True, False):
            found += [2 * abs(x) + width_of(self._label(leaf)) + 4.0 for leaf, x in self._slots(at, up)]
        for number, route in self.layout.routes.items():
            if place.beside and place in route and not self.layout.edges[number]:
                found.append(2 * width_of(self.graph.lines[number].label) + 12.0)
        return max(found)

    def _set_columns(self) -> None:
        """Set the left and right sides of every column."""
        layers, gaps = self.layout.layers, []
        widths = [max(map(self._wide, layer)) for layer in layers]
        for layer in layers:
            edges = [edge for place in layer for edge in place.before]
            steep = max((abs(e.left.y + e.leaves - e.right.y - e.enters) for e in edges), default=0.0)
            names = [width_of(self.graph.lines[e.line].label) for e in edges if not self._is_end(e)]
            gaps.append(max(_GAP, 0.55 * min(steep, 110.0), max(names, default=0.0) + 12.0) * self.scale**0.7)
        if any(place.twin for place in self.rows):
            widths = [max(pair) for pair in zip(widths, widths[::-1], strict=True)]
            gaps[1:] = [max(pair) for pair in zip(gaps[1:], gaps[:0:-1], strict=True)]
        lefts = np.cumsum([0.0, *(gap + width for gap, width in zip(gaps[1:], widths, strict=False))])
        self.columns = [(float(left), float(left) + width) for left, width in zip(lefts, widths, strict=True)]

    def _is_end(self, edge: Edge) -> bool:
        line = self.graph.lines[edge.line]
        return END in (self.graph.vertices[line.first].shape, self.graph.vertices[line.second].shape)

    def _centre(self, place: Place) -> Point:
        left, right = self.columns[place.layer]
        return (left + right) / 2, place.y

    # ------------------------------------------------------------------------------------------------------------ lines
    def _strokes(self, number: int) -> Iterator[Stroke]:
        """The lines of a line of the graph: as many as it has parallel ones."""
        line, edges = self.graph.lines[number], self.layout.edges[number]
        dashed = CUT in (self.graph.vertices[line.first].shape, self.graph.vertices[line.second].shape)
        for copy in range(line.times):
            aside = (copy - (line.times - 1) / 2) * _PORT
            if not edges:
                one, other = map(self._centre, self.layout.routes[number])
                yield Stroke.straight(
                    (one[0] + aside, one[1]), (other[0] + aside, other[1]), dashed=dashed, line=number
                )
                continue
            points: list[Point] = []
            for edge in edges:
                shifts = [aside if self._spreads(place) else 0.0 for place in (edge.left, edge.right)]
                start, end = edge.left.y + edge.leaves + shifts[0], edge.right.y + edge.enters + shifts[1]
                left, right = self.columns[edge.left.layer][1], self.columns[edge.right.layer][0]
                if not points:
                    points = [(self._edge(edge.left, 1.0), start)]
                middle = (left + right) / 2
                points += [points[-1], (left, start), (left, start)]
                points += [(middle, start), (middle, end), (right, end)]
            end = (self._edge(edges[-1].right, -1.0), points[-1][1])
            yield Stroke((*points, points[-1], end, end), dashed, number)

    def _spreads(self, place: Place) -> bool:
        at = self.vertex.get(place)
        return at is None or self.sizes[at][1] >= HEIGHT

    def _edge(self, place: Place, side: float) -> float:
        """The x at which lines meet a vertex: under the side of a box, or the middle of a dot."""
        at, x = self.vertex[place], self._centre(place)[0]
        if self.graph.vertices[at].shape == END:
            return x + side * self._wide(place) / 2
        return x + side * max(self.sizes[at][0] / 2 - 8.0, 0.0)

    def _upright(self) -> Iterator[tuple[int, Stroke, Shape, Label]]:
        """The lines, ends and names of the leaves above and below vertices."""
        for at in self.layout.places:
            for up in (True, False):
                sign, (x, y) = (-1 if up else 1), self._centre(self.layout.places[at])
                for leaf, aside in self._slots(at, up):
                    shape, number = self.graph.vertices[leaf].shape, self.line[leaf]
                    far = x + aside
                    root = (far, y + sign * (self.sizes[at][1] / 2 - 1.0))
                    if self.sizes[at][1] < HEIGHT:
                        root = (x, y)
                    tip = y + sign * (self.sizes[at][1] / 2 + _LEG * self.scale)
                    dashed = self.graph.vertices[at].shape == CUT
                    stroke = Stroke.straight(root, (far, tip), dashed=dashed, line=number)
                    if shape == LOOP:
                        near, top = root[1], root[1] + (tip - root[1]) * 4 / 3
                        bow = ((far - 4, near), (far - 14, top), (far + 14, top), (far + 4, near))
                        stroke = Stroke(bow, dashed, number)
                    size = 7.0 if shape == DOT else 1.0
                    text = self.graph.lines[number].label
                    reach = sign * (size / 2 + LABEL / 2 + 1.5)
                    label = Label(text, Box(far, tip + reach, width_of(text), LABEL), line=number)
                    yield leaf, stroke, Shape(shape, Box(far, tip, size, size), ""), label

    def parts(self) -> _Parts:
        """How often something is covered; vertices, lines and names."""
        graph = self.graph
        shapes: dict[int, Shape] = {}
        strokes = [stroke for number in self.layout.routes for stroke in self._strokes(number)]
        labels: list[Label] = []
        for leaf, stroke, shape, label in self._upright():
            shapes[leaf] = shape
            strokes.append(stroke)
            labels.append(label)
        for at, place in self.layout.places.items():
            vertex, (x, y) = graph.vertices[at], self._centre(place)
            box = Box(x, y, *self.sizes[at])
            if vertex.shape == END:
                edge = -1.0 if place.before else 1.0
                box = Box(self._edge(place, edge), y, 1.0, 1.0)
                text = self._label(at)
                name = Box(box.x - edge * (width_of(text) / 2 + 3.0), y, width_of(text), LABEL)
                labels.append(Label(text, name, line=self.line[at]))
            shapes[at] = Shape(vertex.shape, box, vertex.text, vertex.node, self._angle(place))
        ordered = [shapes[at] for at in sorted(shapes)]
        named = {label.line for label in labels}
        waiting = [number for number in self.layout.routes if number not in named]
        waiting.sort(key=lambda number: len(self.layout.routes[number]))  # short lines have few places for names
        pieces = {stroke: stroke.pieces() for stroke in strokes}
        solid = [shape.box for shape in ordered if shape.kind not in (END, LOOP)]
        boxes = array(solid + [one.box for one in labels])
        faults = int(np.triu(overlaps(boxes, boxes, 0.0), 1).sum())
        faults += int(
            sum(
                cuts(found, array(one.box for one in labels if one.line != line.line)).sum()
                for line, found in pieces.items()
            )
        )
        for number in waiting:
            found, label = _named(graph.lines[number].label, number, pieces, solid, labels)
            faults += found
            labels.append(label)
        return faults, ordered, strokes, labels

    def _angle(self, place: Place) -> float:
        """The direction of a triangle: away from its lines."""
        if bool(place.before) != bool(place.after):
            return 0.0 if place.before else math.pi
        if place.beside and not place.before:
            return math.pi / 2 if self.rows[place.beside[0]] < self.rows[place] else -math.pi / 2
        return -math.pi / 2 if self.layout.layers[place.layer][0] is place else math.pi / 2


_GAP = 2.0
"""Distance between a name and its line."""


def _named(
    text: str, number: int, pieces: dict[Stroke, np.ndarray], solid: Sequence[Box], labels: Sequence[Label]
) -> tuple[int, Label]:
    """The name of a line at the best place on or beside it, and how much it covers there."""
    size = (width_of(text), LABEL)
    own = [found for stroke, found in pieces.items() if stroke.line == number]
    options, costs = [], []
    for worse, share in enumerate(_SHARES):
        for path in own:
            lengths = np.linalg.norm(path[:, 2:] - path[:, :2], axis=1)
            reached = np.cumsum(lengths)
            at = int(np.searchsorted(reached, share * reached[-1]))
            step = (path[at, 2:] - path[at, :2]) / max(lengths[at], 1e-9)
            x, y = path[at, 2:] - step * (reached[at] - share * reached[-1])
            ux, uy = map(abs, step)
            away = (uy * size[0] + ux * size[1]) / 2 + _GAP
            for side, cost in ((-1.0, 0.0), (1.0, 0.6), (0.0, 3.0)):
                normal = (-step[1], step[0]) if step[0] >= 0 else (step[1], -step[0])
                options.append(Box(float(x + side * away * normal[0]), float(y + side * away * normal[1]), *size))
                costs.append(0.4 * worse + cost + (3.0 * min(ux, uy) if side else 0.0))
    boxes = array(options)
    low, high = (boxes[:, :2] - boxes[:, 2:]).min(0), (boxes[:, :2] + boxes[:, 2:]).max(0)
    others = [found for stroke, found in pieces.items() if stroke.line != number]
    lines = np.concatenate([np.zeros((0, 4)), *others])
    ends = lines.reshape(-1, 2, 2)
    lines = lines[((ends.max(1) > low) & (ends.min(1) < high)).all(1)]
    faults = 10 * overlaps(boxes, array([*solid, *(one.box for one in labels)]), 1.0).sum(1)
    faults += cuts(lines, boxes, 0.5).sum(1)
    beside = np.arange(len(options)) % 3 < 2
    faults += np.where(beside, cuts(np.concatenate(own), boxes).any(1), 0)
    best = int((1000 * faults + np.array(costs)).argmin())
    return int(faults[best]), Label(text, options[best], line=number)


# --------------------------------------------------------------------------------------------------------------- shades
def _shaded(graph: Graph, shapes: dict[int, Shape], strokes: Sequence[Stroke], nodes: Collection[int]) -> Shade:
    """The hull of some nodes; if it meets other vertices, one shape per node and thick bands along their lines."""
    near = graph.neighbours()
    own = {at for at, vertex in enumerate(graph.vertices) if vertex.node in nodes}
    # Include dots and groups between the nodes, and the nodes' loops. A dot with one line is an index summed elsewhere.
    own |= {
        at
        for at, vertex in enumerate(graph.vertices)
        if near[at] <= own and (vertex.shape == LOOP or (vertex.shape in (DOT, GROUP) and len(near[at]) > 1))
    }
    boxes = {at: shapes[at].box for at in sorted(own)}
    others = [shape.box for at, shape in shapes.items() if at not in own and shape.kind not in (LOOP, END)]

    def widest(areas: Iterable[np.ndarray]) -> list[tuple[Point, ...]]:
        """The first area that meets no other vertex."""
        for corners in areas:
            piece = _hull(corners)
            if not any(map(Shade((piece,)).overlaps, others)):
                return [piece]
        return []

    def around(some: Iterable[Box]) -> Iterator[np.ndarray]:
        some = list(some)
        return (np.concatenate([corners_of(box, pad - Shade.MARGIN) for box in some]) for pad in _PADS)

    pieces = widest(around(boxes.values()))
    if not pieces:
        pieces = [piece for box in boxes.values() for piece in widest(around([box]))]
        for stroke in strokes:
            if {graph.lines[stroke.line].first, graph.lines[stroke.line].second} <= own:
                for one, other in itertools.pairwise(stroke.sampled()):
                    pieces += widest(_band(one, other, max(pad - Shade.MARGIN, 0.1)) for pad in _PADS)
    return Shade(tuple(pieces))


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
