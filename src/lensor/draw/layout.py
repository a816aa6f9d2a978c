"""Positions of the vertices of a drawing.

The layout minimises stress: distances in the drawing should equal distances in the graph. The layout of a planar graph
starts from Tutte drawings, where every vertex is at the mean of its neighbours, for several choices of the outer face;
open ends point into the widest gaps. Vertices then move towards their optimal positions, but never across a line. If a
graph is not suitable for this, the layout starts from a circle, from layers and from random positions, and majorisation
minimises its stress. The two halves of a symmetric network are mirrored and move together. Layouts are ranked by their
number of crossings, then by space, symmetry and stress.

A nearly planar graph is made planar first: lines are inserted as long as the graph stays planar, each remaining line
then crosses as few lines as possible, and every crossing becomes a vertex with four lines. The result is drawn as a
planar graph. The inserted vertices then become crossings again; lines are straight where this adds no crossing, and
bent elsewhere. A graph with many crossings is drawn with straight lines only. Larger graphs get fewer moves; the result
is deterministic.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np

from lensor.draw.graph import DOT, END, GROUP, LOOP, Graph

Positions = np.ndarray
"""[vertices, 2]; a line of the graph has a length of about 1."""

Route = tuple[int, ...]
"""The numbers of the points on a line."""

_Bent = tuple[tuple[int, int, int, float], Positions, list[Route]]
"""The cost of a drawing with bends (lower is better), its points, and the routes of its lines."""

_ROUNDS = 150
"""Number of majorisation rounds."""

_CLEAR = 0.28
"""Minimum distance between a vertex and lines that do not end at it."""

_MOVES, _FEWEST_MOVES, _WORK = 40, 6, 20_000
"""Maximum and minimum number of rounds that move vertices without crossings; the limit on rounds × vertices² reduces
the number for large graphs."""

_ANNEALED, _ATTEMPTS, _OPTIONS = 3, 350, 8
"""Number of layouts that are annealed (the best ones, if even the best has crossings or touching vertices), number of
moves for each, and number of options for each move."""

_CROSSING = 3
"""Cost of a crossing, relative to the cost of a vertex on a line."""

_FACES = 3
"""Number of faces that are tried as the outer face."""

_ORDERS, _LINES, _CUT, _CUT_LENGTH = 12, 400, 2, 0.6
"""Number of orders in which lines are inserted into a planar graph, limit on the total number of inserted lines, number
of results that are drawn, and desired length of the pieces."""

_MOST_MAPPINGS, _MOST_MATCHES = 400, 20_000
"""Maximum number of symmetries of a graph to examine, and of vertex comparisons to find them."""

_MOST_CUTS = 20
"""Maximum number of places where lines are cut; above it, a graph is drawn with straight lines that cross."""

_MOST_WORK = 8_000_000
"""Maximum number of pairs of vertices and lines to examine while improving a layout; more would take seconds."""

_RADIAL, _LEG_GAP = 12, 0.35
"""If a vertex has only open ends, and more than this number, they are placed on a circle, this distance apart."""


@dataclass(frozen=True)
class Layout:
    """Positions of all vertices and bends.

    Args:
        place: the points of the vertices.
        bends: the bend points of each line.
    """

    place: Positions
    bends: tuple[Positions, ...]


def laid_out(graph: Graph) -> Layout:
    """The layout of a graph; connected parts are placed next to each other."""
    found = np.zeros((len(graph.vertices), 2))
    bends = [np.zeros((0, 2))] * len(graph.lines)
    right = 0.0
    for part in graph.components():
        points, routes = _part(graph, part)
        points = points - points.min(0)
        points += np.array([right, -points[:, 1].max() / 2])
        found[part] = points[: len(part)]
        for line, route in routes.items():
            bends[line] = points[list(route[1:-1])]
        right = points[:, 0].max() + 0.9
    return Layout(found, tuple(bends))


def _networkx(graph: Graph, part: Sequence[int] | None = None) -> nx.Graph:
    found = nx.Graph()
    kept = range(len(graph.vertices)) if part is None else part
    found.add_nodes_from(kept)
    found.add_edges_from((line.first, line.second) for line in graph.lines if line.first in found)
    return found


def _part(graph: Graph, part: Sequence[int]) -> tuple[Positions, dict[int, Route]]:
    """The points of one connected part, and the routes of its lines."""
    number = {vertex: at for at, vertex in enumerate(part)}
    lines = [at for at, line in enumerate(graph.lines) if line.first in number]
    ends = [(number[graph.lines[at].first], number[graph.lines[at].second]) for at in lines]
    if len(part) == 1:
        return np.zeros((1, 2)), {}
    planar = nx.check_planarity(_networkx(graph, part))[0]
    bent = None if planar else _bent(_distances(graph, part, np.array(ends)), ends)
    points, routes = (_straight(graph, part, np.array(ends)), ends) if bent is None else bent
    return points, dict(zip(lines, routes, strict=True))


def _straight(graph: Graph, part: Sequence[int], ends: np.ndarray) -> Positions:
    """The points of a part with straight lines only."""
    if len(ends) > _RADIAL and len(hub := set(ends[0]).intersection(*map(set, ends))) == 1:
        return _radial(len(part), hub.pop())
    count, wanted = len(part), _distances(graph, part, ends)
    mirror = _mirror(graph, part, ends)
    tried: list[tuple[tuple[int, int, bool, float], Positions]] = []

    def keep(place: Positions, symmetric: bool) -> None:
        score = _crossings(ends, place), _touching(ends, place), not symmetric, float(_stress(place, wanted))
        tried.append((score, place))

    for start, symmetric in _planar_starts(count, ends, mirror):
        relaxed = _relaxed(start, wanted, ends, mirror if symmetric else None)
        keep(relaxed, symmetric)
    for start in _starts(count, ends, mirror):
        place = _majorised(start, wanted)
        keep(place, False)
        if mirror is not None:
            keep(_mirrored(place, mirror), True)
    tried.sort(key=lambda one: one[0])
    for score, place in tried[:_ANNEALED] if tried[0][0][:2] != (0, 0) else ():
        keep(_annealed(place, wanted, ends, None if score[2] else mirror), not score[2])
    best = min(tried, key=lambda one: one[0])
    return _turned(best[1], not best[0][2])


def _radial(count: int, hub: int) -> Positions:
    """Place all other vertices on a circle around one vertex."""
    angles = 2 * np.pi * np.arange(count - 1) / (count - 1)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1) * (count - 1) * _LEG_GAP / (2 * np.pi)
    return np.insert(circle, hub, 0.0, axis=0)


def _distances(graph: Graph, part: Sequence[int], ends: np.ndarray) -> np.ndarray:
    """The lengths of the shortest paths; lines to open ends and dots are shorter than other lines."""
    shapes = [graph.vertices[vertex].shape for vertex in part]
    lengths = [0.75 if {shapes[a], shapes[b]} & {END, GROUP, DOT, LOOP} else 1.0 for a, b in ends]
    return _shortest(len(part), ends, lengths)


def _shortest(count: int, ends: np.ndarray, lengths: Sequence[float]) -> np.ndarray:
    """[vertices, vertices]: the lengths of the shortest paths."""
    found = np.full((count, count), np.inf)
    np.fill_diagonal(found, 0.0)
    found[ends[:, 0], ends[:, 1]] = found[ends[:, 1], ends[:, 0]] = lengths
    for middle in range(count):
        found = np.minimum(found, found[:, middle, None] + found[None, middle])
    return found


def _starts(count: int, ends: np.ndarray, mirror: np.ndarray | None) -> Iterator[Positions]:
    angles = 2 * np.pi * np.arange(count) / count
    circle = np.stack([np.cos(angles), np.sin(angles)], 1) * count / 4
    if mirror is not None:
        half = circle.copy()
        for at in range(count):
            other = mirror[at]
            if other == at:
                half[at] = (0.0, at - count / 2)
            elif at < other:
                half[at] = (-1.0 - 0.1 * at, at - count / 2)
                half[other] = (1.0 + 0.1 * at, at - count / 2)
        yield half
        half = half[:, ::-1].copy()
        yield half + 0.01 * circle
    yield circle
    order = np.random.default_rng(0)
    for _ in range(6):
        yield order.normal(size=(count, 2)) * count / 4
    layers = np.zeros((count, 2))
    # Start from one of the vertices farthest from the first vertex: a chain then starts straight and stays straight.
    depth = _depths(count, ends, int(_depths(count, ends, 0).argmax()))
    for level in range(depth.max() + 1):
        own = np.flatnonzero(depth == level)
        layers[own, 0] = level
        layers[own, 1] = np.arange(len(own)) - (len(own) - 1) / 2
    yield layers


def _depths(count: int, ends: np.ndarray, first: int) -> np.ndarray:
    """The number of steps from a vertex to each other vertex."""
    near: list[list[int]] = [[] for _ in range(count)]
    for one, other in ends.tolist():
        near[one].append(other)
        near[other].append(one)
    depth = np.full(count, -1)
    depth[first], level = 0, [first]
    while level:
        level = list(dict.fromkeys(other for one in level for other in near[one] if depth[other] < 0))
        depth[level] = depth.max() + 1
    return depth


def _majorised(place: Positions, wanted: np.ndarray) -> Positions:
    """Stress majorisation with weights 1/d²."""
    weights = 1 / np.maximum(wanted, 1e-9) ** 2
    np.fill_diagonal(weights, 0.0)
    laplacian = np.diag(weights.sum(1)) - weights
    inverse = np.linalg.pinv(laplacian)
    for _ in range(_ROUNDS):
        gaps = np.linalg.norm(place[:, None] - place[None], axis=-1)
        ratio = weights * wanted / np.maximum(gaps, 1e-6)
        np.fill_diagonal(ratio, 0.0)
        place = inverse @ ((np.diag(ratio.sum(1)) - ratio) @ place)
    return place


def _stress(place: Positions, wanted: np.ndarray) -> np.ndarray:
    """[...]: the deviation of the distances from the desired ones."""
    weights = 1 / np.maximum(wanted, 1e-9) ** 2
    np.fill_diagonal(weights, 0.0)
    return (weights * (_gaps(place) - wanted) ** 2).sum((-1, -2)).round(6)


# ------------------------------------------------------------------------------------------------------------- symmetry
class _TooManyMatchesError(Exception):
    """Raised when finding the symmetries of a graph would take too long."""


def _mirror(graph: Graph, part: Sequence[int], ends: np.ndarray) -> np.ndarray | None:
    """The self-inverse symmetry of the graph that moves the most vertices; None if there is none."""
    named = nx.Graph()
    for at, vertex in enumerate(part):
        one = graph.vertices[vertex]
        named.add_node(at, what=(one.shape, one.text))
    named.add_edges_from(map(tuple, ends))
    matches = itertools.count()

    def alike(one: dict[str, object], other: dict[str, object]) -> bool:
        if next(matches) >= _MOST_MATCHES:
            raise _TooManyMatchesError
        return one["what"] == other["what"]

    matcher = nx.isomorphism.GraphMatcher(named, named, node_match=alike)
    best, moved = None, 0
    with contextlib.suppress(_TooManyMatchesError):
        for mapping in itertools.islice(matcher.isomorphisms_iter(), _MOST_MAPPINGS):
            count = sum(a != b for a, b in mapping.items())
            if count > moved and all(mapping[b] == a for a, b in mapping.items()):
                best, moved = mapping, count
    tensors = [at for at, vertex in enumerate(part) if graph.vertices[vertex].text]
    if best is None or not any(best[at] != at for at in tensors):
        return None
    return np.array([best[at] for at in range(len(part))])


def _mirrored(place: Positions, mirror: np.ndarray) -> Positions:
    """Make the positions symmetric about the best axis, which becomes vertical."""
    place = place - place.mean(0)
    moved = place - place[mirror]
    values, vectors = np.linalg.eigh(moved.T @ moved)
    across = vectors[:, 1] if values[1] > 0 else np.array([1.0, 0.0])
    along = np.array([-across[1], across[0]])
    x, y = place @ across, place @ along
    return np.stack([(x - x[mirror]) / 2, (y + y[mirror]) / 2], 1)


def _turned(place: Positions, symmetric: bool) -> Positions:
    """Rotate the positions to be wide rather than tall; a symmetry axis stays vertical or becomes horizontal."""
    place = place - place.mean(0)
    if symmetric:
        high, wide = np.ptp(place[:, 1]), np.ptp(place[:, 0])
        return place if wide >= 0.6 * high else place[:, ::-1].copy()
    _, vectors = np.linalg.eigh(place.T @ place)
    place = place @ vectors[:, ::-1]
    flip = np.where(place[0] > 0, -1.0, 1.0)  # put the first vertex on the left
    return place * flip


# ------------------------------------------------------------------------------------------------------------ crossings
def _sides(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (c[..., 0] - a[..., 0])


def _crossing_pairs(ends: np.ndarray, place: Positions) -> np.ndarray:
    """[..., lines, lines]: whether two lines without a common vertex meet."""
    a, b = place[..., ends[:, 0], :], place[..., ends[:, 1], :]
    a1, b1, a2, b2 = a[..., :, None, :], b[..., :, None, :], a[..., None, :, :], b[..., None, :, :]
    one = _sides(a1, b1, a2) * _sides(a1, b1, b2)
    two = np.swapaxes(one, -1, -2)
    shared = (ends[:, None, :, None] == ends[None, :, None, :]).any((-1, -2))
    return (one <= 0) & (two <= 0) & ~shared & ((one < 0) | (two < 0))


def _crossings(ends: np.ndarray, place: Positions) -> int:
    return int(np.triu(_crossing_pairs(ends, place), 1).sum()) if len(ends) > 1 else 0


def _meets_last(ends: np.ndarray, place: Positions) -> bool:
    """Whether the last line meets another line without a common vertex."""
    others, last = ends[:-1], ends[-1]
    a1, b1, a2, b2 = place[others[:, 0]], place[others[:, 1]], place[last[0]], place[last[1]]
    one, two = _sides(a1, b1, a2) * _sides(a1, b1, b2), _sides(a2, b2, a1) * _sides(a2, b2, b1)
    shared = (others[:, :, None] == last).any((-1, -2))
    return bool(((one <= 0) & (two <= 0) & ~shared & ((one < 0) | (two < 0))).any())


def _clearances(ends: np.ndarray, place: Positions, only: int | None = None) -> np.ndarray:
    """[..., vertices, lines]: distances from all vertices, or from a single one, to lines that do not end there."""
    numbers = np.arange(place.shape[-2]) if only is None else np.array([only])
    a, b = place[..., None, ends[:, 0], :], place[..., None, ends[:, 1], :]
    along, points = b - a, place[..., numbers, None, :]
    t = ((points - a) * along).sum(-1) / np.maximum((along**2).sum(-1), 1e-12)
    near = a + np.clip(t, 0, 1)[..., None] * along
    gaps = np.linalg.norm(points - near, axis=-1)
    own = (numbers[:, None, None] == ends[None]).any(-1)
    return np.where(own, np.inf, gaps)


def _gaps(place: Positions) -> np.ndarray:
    """[..., vertices, vertices]: distances between vertices; a large value on the diagonal."""
    return np.linalg.norm(place[..., :, None, :] - place[..., None, :, :], axis=-1) + 9 * np.eye(place.shape[-2])


def _touching(ends: np.ndarray, place: Positions) -> int:
    """Number of vertices that lie on a line or on another vertex."""
    gaps = _gaps(place)
    return int((_clearances(ends, place) < _CLEAR).sum()) + int((gaps < _CLEAR).sum()) // 2


def _work(place: Positions, ends: np.ndarray) -> int:
    """Number of pairs to examine when judging one layout."""
    return (len(place) + len(ends)) ** 2


def _relaxed(place: Positions, wanted: np.ndarray, ends: np.ndarray, mirror: np.ndarray | None) -> Positions:
    """Move vertices one by one to reduce stress, as long as nothing crosses or touches."""
    lengths = np.linalg.norm(place[ends[:, 0]] - place[ends[:, 1]], axis=-1)
    place = place / max(float(np.median(lengths)), 1e-9) * 1.2
    weights = 1 / np.maximum(wanted, 1e-9) ** 2
    np.fill_diagonal(weights, 0.0)

    def room(at: Positions) -> float:
        return min(float(_clearances(ends, at).min(initial=9.0)), float(_gaps(at).min()))

    rounds = max(min(_MOVES, _WORK // len(place) ** 2), _FEWEST_MOVES)
    rounds = min(rounds, _MOST_WORK // (len(place) * _work(place, ends)))
    least, most = room(place), _crossings(ends, place)
    for _ in range(rounds):
        moved = False
        for vertex in range(len(place)):
            away = place[vertex] - place
            gaps = np.maximum(np.linalg.norm(away, axis=-1, keepdims=True), 1e-6)
            target = place + away / gaps * wanted[vertex][:, None]
            goal = (weights[vertex][:, None] * target).sum(0) / weights[vertex].sum()
            for step in (1.0, 0.4):
                after = place.copy()
                after[vertex] += step * (goal - place[vertex])
                if mirror is not None and mirror[vertex] == vertex:
                    after[vertex, 0] = 0.0
                elif mirror is not None:
                    after[mirror[vertex]] = after[vertex] * (-1.0, 1.0)
                if np.linalg.norm(after[vertex] - place[vertex]) < 5e-3:
                    break
                space = room(after)
                if space >= min(least, _CLEAR) and _crossings(ends, after) <= most:
                    place, moved, least = after, True, max(least, min(space, _CLEAR))
                    break
        if not moved:
            break
    return place


def _annealed(place: Positions, wanted: np.ndarray, ends: np.ndarray, mirror: np.ndarray | None) -> Positions:
    """Reduce crossings, touching vertices and stress by random moves with decreasing length and temperature.

    Each move of a vertex is drawn from several options; options with a lower cost are more likely (a heat bath).
    """
    random = np.random.default_rng(0)

    def costs(at: Positions) -> np.ndarray:
        near = np.maximum(_CLEAR - _clearances(ends, at), 0).sum((-1, -2)) / _CLEAR
        near += np.maximum(2 * _CLEAR - _gaps(at), 0).sum((-1, -2)) / _CLEAR
        return _CROSSING * _crossing_pairs(ends, at).sum((-1, -2)) / 2 + near + 0.02 * _stress(at, wanted)

    best, least = place, np.inf
    attempts = min(_ATTEMPTS, _MOST_WORK // (_OPTIONS * _work(place, ends)))
    for length, heat in zip(np.geomspace(1.0, 0.05, attempts), np.geomspace(0.3, 0.005, attempts), strict=True):
        vertex = int(random.integers(len(place)))
        options = np.repeat(place[None], _OPTIONS, 0)
        options[1:, vertex] += random.normal(size=(_OPTIONS - 1, 2)) * length
        if mirror is not None and mirror[vertex] == vertex:
            options[:, vertex, 0] = 0.0
        elif mirror is not None:
            options[:, mirror[vertex]] = options[:, vertex] * (-1.0, 1.0)
        found = costs(options)
        chosen = int((found - heat * random.gumbel(size=_OPTIONS)).argmin())
        place = options[chosen]
        if found[chosen] < least:
            best, least = place, found[chosen]
    return best


# -------------------------------------------------------------------------------------------------------- planar starts
def _planar_starts(count: int, ends: np.ndarray, mirror: np.ndarray | None) -> Iterator[tuple[Positions, bool]]:
    """Tutte drawings for several outer faces, and whether each is symmetric; none for a graph that is not planar.

    If parts attached at a single vertex would collapse to a point, a grid drawing is used instead.
    """
    degree = np.bincount(ends.ravel(), minlength=count)
    leaves = [at for at in range(count) if degree[at] == 1 and count > 2]
    core = nx.Graph()
    core.add_nodes_from(at for at in range(count) if at not in leaves)
    core.add_edges_from((int(a), int(b)) for a, b in ends if a in core and b in core)
    planar, embedding = nx.check_planarity(core)
    if not planar or len(core) < 3:
        return
    faces, seen = [], set[tuple[int, int]]()
    for edge in embedding.edges():
        if edge not in seen:
            faces.append(embedding.traverse_face(*edge, mark_half_edges=seen))
    simple = [face for face in faces if len(set(face)) == len(face) >= 3]
    carriers = {int(b if a in leaves else a) for a, b in ends if (a in leaves) != (b in leaves)}
    simple.sort(key=lambda face: (-len(carriers & set(face)), -len(face), face))
    collapsed = True
    for outer in simple[:_FACES]:
        own = mirror is not None and {int(mirror[at]) for at in outer} == set(outer)
        for symmetric in (True, False) if own else (False,):
            place = _tutte(core, faces, outer, count, mirror if symmetric else None)
            if place is None:
                continue
            full = _with_leaves(place, leaves, ends, mirror if symmetric else None)
            if _crossings(ends, full) == 0:
                collapsed = False
                yield full, symmetric
    if collapsed:
        whole = nx.empty_graph(count)
        whole.add_edges_from(ends.tolist())
        grid = nx.planar_layout(whole)
        yield np.array([grid[at] for at in range(count)]), False


def _tutte(
    core: nx.Graph, faces: Sequence[list[int]], outer: list[int], count: int, mirror: np.ndarray | None
) -> Positions | None:
    """Place every vertex at the mean of its neighbours, with the outer face as a regular polygon."""
    place = np.zeros((count, 2))
    angles = 2 * np.pi * np.arange(len(outer)) / len(outer)
    if mirror is not None:
        first = outer.index(int(mirror[outer[0]]))
        angles = angles + np.pi / 2 - (angles[0] + angles[first]) / 2
        images = np.array([angles[outer.index(int(mirror[at]))] for at in outer])
        if not np.allclose(np.cos(np.pi - angles), np.cos(images), atol=1e-6):
            return None  # the symmetry rotates the face instead of reflecting it
    size = len(core) / 3
    place[outer] = np.stack([np.cos(angles), np.sin(angles)], 1) * size
    inner = [face for face in faces if set(face) != set(outer)]
    near: list[set[int]] = [set() for _ in range(count + len(inner))]
    for a, b in core.edges:
        near[a].add(b)
        near[b].add(a)
    for at, face in enumerate(inner, start=count):
        for vertex in face:
            near[at].add(vertex)
            near[vertex].add(at)
    free = [at for at in (*core.nodes, *range(count, len(near))) if at not in outer]
    number = {vertex: at for at, vertex in enumerate(free)}
    matrix, right = np.zeros((len(free), len(free))), np.zeros((len(free), 2))
    for vertex in free:
        matrix[number[vertex], number[vertex]] = max(len(near[vertex]), 1)
        for other in near[vertex]:
            if other in number:
                matrix[number[vertex], number[other]] -= 1
            else:
                right[number[vertex]] += place[other]
    if free:
        solved = np.linalg.lstsq(matrix, right, rcond=None)[0]
        for vertex in free:
            if vertex < count:
                place[vertex] = solved[number[vertex]]
    if mirror is not None:
        place = (place + place[mirror] * (-1.0, 1.0)) / 2
    return place


def _with_leaves(place: Positions, leaves: Sequence[int], ends: np.ndarray, mirror: np.ndarray | None) -> Positions:
    """Put open ends into the widest gaps around their vertex, unless a line is in the way."""
    place, done, waiting = place.copy(), set[int](), set(leaves)
    owner = {a: b for one, other in ends.tolist() for a, b in ((one, other), (other, one)) if a in waiting}
    there = [(a, b) for a, b in ends.tolist() if a not in waiting and b not in waiting]
    for leaf in leaves:
        if leaf in done:
            continue
        own = owner[leaf]
        twin = leaf if mirror is None else int(mirror[leaf])
        placed = np.array([*there, (own, leaf)])
        around = [b if a == own else a for a, b in there if own in (a, b)]
        angles = sorted(float(np.arctan2(*(place[other] - place[own])[::-1])) for other in around)
        gaps = [(angles[(at + 1) % len(angles)] - angle) % (2 * np.pi) or 2 * np.pi for at, angle in enumerate(angles)]
        tries = [
            (angles[at] + share * gaps[at], length)
            for at in sorted(range(len(gaps)), key=lambda at: -gaps[at])
            for length in (0.75, 0.45, 0.25, 0.12)
            for share in (0.5, 0.35, 0.65)
        ] or [(0.0, 0.75)]
        if twin == leaf and mirror is not None:  # on the axis
            tries = [(sign * np.pi / 2, length) for length in (0.75, 0.45, 0.25, 0.12) for sign in (1, -1)]
        for angle, length in tries:
            place[leaf] = place[own] + length * np.array([np.cos(angle), np.sin(angle)])
            if not _meets_last(placed, place) and _clearances(placed, place, leaf).min() > 0.02:
                break
        done.add(leaf)
        there.append((own, leaf))
        if twin != leaf:
            place[twin] = place[leaf] * (-1.0, 1.0)
            done.add(twin)
            there.append((owner[twin], twin))
    return place


# ------------------------------------------------------------------------------------------------------- planarisations
def _bent(wanted: np.ndarray, ends: Sequence[Route]) -> tuple[Positions, list[Route]] | None:
    """The points of a part that is not planar (vertices, then bends), and the routes of its lines.

    None if the part has so many crossings that bends would not help.
    """
    count, random = len(wanted), np.random.default_rng(0)
    if len(ends) - (3 * count - 6) > _MOST_CUTS:
        return None
    orders = [random.permutation(len(ends)).tolist() for _ in range(min(_ORDERS, max(_CUT, _LINES // len(ends))))]
    found = (_cut_lines(count, ends, order) for order in orders)
    cut: list[list[Route]] = sorted((routes for routes in found if routes is not None), key=_bends)
    if not cut:
        return None
    tried: list[_Bent] = []
    for routes in cut[:_CUT]:
        for start, _ in _planar_starts(int(_pieces(routes).max()) + 1, _pieces(routes), None):
            tried.append(_improved(_relaxed, start, routes, wanted))
    tried.sort(key=lambda one: one[0])
    tried += [_improved(_annealed, points, routes, wanted) for _, points, routes in tried[:_CUT]]
    _, points, routes = min(tried, key=lambda one: one[0])
    return _turned(points, symmetric=False), routes


def _improved(move: Callable[..., Positions], points: Positions, routes: Sequence[Route], wanted: np.ndarray) -> _Bent:
    """Reduce stress by moves and remove unnecessary bends; returns the cost, the points and the routes."""
    count, pieces = len(wanted), _pieces(routes)
    lengths = [float(wanted[a, b]) if max(a, b) < count else _CUT_LENGTH for a, b in pieces]
    points = move(points, _shortest(len(points), pieces, lengths), pieces, None)
    points, routes = _straightened(points, routes, count)
    return (*_faults(points, routes), float(_stress(points[:count], wanted))), points, routes


def _pieces(routes: Iterable[Route]) -> np.ndarray:
    """[pieces, 2]: the end points of all straight pieces."""
    return np.array([piece for route in routes for piece in itertools.pairwise(route)])


def _bends(routes: Iterable[Route]) -> int:
    return sum(len(route) - 2 for route in routes)


def _faults(points: Positions, routes: Sequence[Route]) -> tuple[int, int, int]:
    """The numbers of crossings (including those where both lines bend), touching vertices and bends."""
    both = sum(times - 1 for times in Counter(vertex for route in routes for vertex in route[1:-1]).values())
    pieces = _pieces(routes)
    return _crossings(pieces, points) + both, _touching(pieces, points) + both, _bends(routes)


def _straightened(points: Positions, routes: Sequence[Route], count: int) -> tuple[Positions, list[Route]]:
    """Remove unnecessary bends from points and routes; at each cut, at most one line still bends."""
    routes = list(routes)
    for bend in range(len(points) - 1, count - 1, -1):
        lines = [at for at, route in enumerate(routes) if bend in route]
        options = [_freed(points, routes, bend, freed) for freed in (lines, *([line] for line in lines))]
        if len(lines) == 1:
            options.append((points, routes))
        points, routes = min(options, key=lambda option: _faults(*option))
    return points, routes


def _freed(points: Positions, routes: list[Route], bend: int, lines: Sequence[int]) -> tuple[Positions, list[Route]]:
    """Stop some lines from bending at a point; the point is removed if no other line bends there."""
    routes = [tuple(vertex for vertex in route if vertex != bend or at not in lines) for at, route in enumerate(routes)]
    if any(bend in route for route in routes):
        return points, routes
    after = [tuple(vertex - (vertex > bend) for vertex in route) for route in routes]
    return np.delete(points, bend, 0), after


def _cut_lines(count: int, ends: Sequence[Route], order: Sequence[int]) -> list[Route] | None:
    """Route lines through new vertices where they cut others: first a maximal planar part, then the remaining lines.

    Returns None if there are too many cuts.
    """
    graph, left = nx.empty_graph(count), []
    routes = [list(pair) for pair in ends]
    for line in order:
        graph.add_edge(*ends[line], line=line)
        if not nx.check_planarity(graph)[0]:
            graph.remove_edge(*ends[line])
            left.append(line)
    for line in left:
        _insert(graph, routes, line)
        if len(graph) - count > _MOST_CUTS:
            return None
    return [tuple(route) for route in routes]


def _insert(graph: nx.Graph, routes: list[list[int]], line: int) -> None:
    """Insert a line into a planar graph through the fewest faces; a new vertex cuts each line on the way."""
    _, embedding = nx.check_planarity(graph)
    side: dict[tuple[int, int], int] = {}
    for number, edge in enumerate(embedding.edges()):
        if edge not in side:
            face = embedding.traverse_face(*edge)
            side.update(dict.fromkeys(zip(face, [*face[1:], face[0]], strict=True), number))
    faces = nx.Graph()
    for (a, b), face in side.items():
        faces.add_edge(face, side[b, a], cut=(a, b))
    start, stop = routes[line]
    for vertex, name in ((start, "start"), (stop, "stop")):
        faces.add_edges_from((name, side[vertex, other]) for other in graph[vertex])
    route = [start]
    for face, other in itertools.pairwise(nx.shortest_path(faces, "start", "stop")[1:-1]):
        a, b = faces.edges[face, other]["cut"]
        owner, crossing = graph.edges[a, b]["line"], len(graph)
        graph.remove_edge(a, b)
        graph.add_edges_from([(a, crossing), (crossing, b)], line=owner)
        cut = routes[owner]
        cut.insert(max(cut.index(a), cut.index(b)), crossing)
        route.append(crossing)
    route.append(stop)
    graph.add_edges_from(itertools.pairwise(route), line=line)
    routes[line] = route
