"""The layers of a network: inputs on the left, kernels on the right, the patterns between them in rows.

The halves of a symmetric network mirror each other. Dots and triangles move to the layers where lines cross least and
are shortest. Several assignments of layers are tried, and the best one is drawn. A planar network that still has
crossings takes its layers and its order from a planar layout of networkx.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from lensor.draw.graph import DOT, END, GROUP, LOOP, PATTERN, Graph
from lensor.draw.layers import CROSSING, FAULT, Edge, Place, arrange, join

_SPAN, _INNER = 4, 30
"""Cost of a line per layer, and of an output leg between boxes."""

_MOST_MAPPINGS, _MOST_MATCHES, _MOST_MOVED = 400, 20_000, 40
"""Maximum number of symmetries to examine, of comparisons to find them, and of lines in a graph whose dots move."""

_WEIGHTS = {DOT: 0.2, GROUP: 0.5}
"""How much lines to dots and triangles should be straight, compared with other lines."""

_ROUNDS = 4
"""Number of orders to start from, for a layout with crossings."""

_FEW = 9
"""Number of vertices below which a layout with one vertex in each layer is tried even if others are possible."""

_MOST_UPRIGHT = 4
"""Maximum number of open ends above and below a box."""

Layers = dict[int, int]
"""The layer of each vertex; boxes have even layers, dots and triangles odd ones."""


@dataclass(frozen=True)
class Layout:
    """A connected part of a graph in layers.

    Args:
        layers: the places of every layer, in order.
        places: the place of each vertex that has one.
        routes: for each line, its places from left to right; two places in one layer for a vertical line.
        edges: for each line, its edges from left to right.
        upright: for each vertex, its open ends, loops and sums that are above or below it.
        cost: a measure of crossings and lengths.
    """

    layers: list[list[Place]]
    places: dict[int, Place]
    routes: dict[int, list[Place]]
    edges: dict[int, list[Edge]]
    upright: dict[int, list[int]]
    cost: float


def laid_out(graph: Graph, part: Sequence[int]) -> Layout:
    """The best layout of a connected part."""
    leaves = _leaves(graph, part)
    core = [at for at in part if at not in leaves]
    whole = nx.Graph([(line.first, line.second) for line in graph.lines if line.first in core and line.second in core])
    whole.add_nodes_from(core)
    planar, mirrored = nx.check_planarity(whole)[0], False
    best: Layout | None = None
    for layers, twins in _candidates(graph, part, core, whole):
        if best is not None and not twins and best.cost < (CROSSING if planar or not mirrored else FAULT):
            break
        if best is None or len({*layers.values()}) < len(core) or len(core) < _FEW or best.cost >= FAULT:
            found = _moved(graph, core, leaves, layers, twins)
            if best is None or found.cost < best.cost:
                best, mirrored = found, bool(twins)
    assert best is not None
    if planar and best.cost >= CROSSING:
        found = _planar(graph, core, leaves, whole)
        best = min(best, found, key=lambda one: one.cost // CROSSING)
    return best


def _leaves(graph: Graph, part: Iterable[int]) -> dict[int, int]:
    """The open ends, loops and sums over one index, each with its only neighbour."""
    near, found = graph.neighbours(), {}
    thick = {at for line in graph.lines if line.times > 1 for at in (line.first, line.second)}
    for at in part:
        shape = graph.vertices[at].shape
        if len(near[at]) == 1 and (shape in (END, LOOP) or (shape == DOT and at not in thick)):
            (owner,) = near[at]
            if owner not in found and (shape != DOT or graph.vertices[owner].shape != END):
                found[at] = owner
    return found


def _is_box(graph: Graph, at: int) -> bool:
    return graph.vertices[at].shape not in (DOT, GROUP)


# --------------------------------------------------------------------------------------------------------------- layers
def _candidates(
    graph: Graph, part: Sequence[int], core: Sequence[int], whole: nx.Graph
) -> Iterator[tuple[Layers, dict[int, int]]]:
    """Assignments of layers to boxes, with the vertices that mirror each other; others follow in `_moved`."""
    boxes = [at for at in core if _is_box(graph, at)] or list(core[:1])
    mirror = _mirror(graph, part)
    half = _half(graph, whole, mirror)
    if half:
        own = [at for at in boxes if at in half]
        fixed = [at for at in boxes if mirror[at] == at]
        levels = _levels(graph, own, whole)
        options = [levels, {at: -level for at, level in levels.items()}]
        if len(own) < 4:
            options.append(dict.fromkeys(own, 0))
        for option in options:
            low, high = min(option.values()), max(option.values())
            layers = {at: 2 * (level - low) for at, level in option.items()}
            middle = 2 * (high - low) + 4
            layers |= dict.fromkeys(fixed, middle)
            yield layers | {mirror[at]: 2 * middle - layers[at] for at in own}, mirror
    levels = _levels(graph, boxes, whole)
    yield {at: 2 * level for at, level in levels.items()}, {}
    if not graph.arrows:
        for start in boxes[:3]:
            yield {at: 2 * level for at, level in _levels(graph, boxes, whole, start).items()}, {}
    if len(boxes) < 4:
        yield dict.fromkeys(boxes, 0), {}
    near = {at: [levels[one] for one in (at, *whole[at]) if one in levels] or [0] for at in core}
    order = sorted(core, key=lambda at: (sum(near[at]) / len(near[at]), at))
    yield {at: 2 * place for place, at in enumerate(order)}, {}  # no line within a layer


def _levels(graph: Graph, boxes: Sequence[int], whole: nx.Graph, start: int | None = None) -> dict[int, int]:
    """The level of each box: after all boxes that belong to its left, others next to their neighbours."""
    arrows = nx.DiGraph()
    for one, other in graph.arrows:
        if (
            one in boxes
            and other in boxes
            and not (other in arrows and one in arrows and nx.has_path(arrows, other, one))
        ):
            arrows.add_edge(one, other)
    levels: dict[int, int] = {}
    for at in nx.topological_sort(arrows):
        levels[at] = 1 + max((levels[one] for one in arrows.predecessors(at)), default=-1)
    direct = nx.Graph()
    direct.add_nodes_from(boxes)
    for at in whole:
        near = [one for one in whole[at] if one in boxes]
        direct.add_edges_from(((at, one) for one in near) if at in boxes else itertools.combinations(near, 2))
    if not levels:
        ends = nx.single_source_shortest_path_length(direct, boxes[0])
        first = boxes[0] if len(direct[boxes[0]]) < 2 else max(ends, key=ends.__getitem__)
        levels = {first if start is None else start: 0}
    todo = list(levels)
    while todo or len(levels) < len(boxes):
        if not todo:
            todo = [next(at for at in boxes if at not in levels)]
            levels[todo[0]] = 0
        one = todo.pop(0)
        for other in direct[one]:
            if other not in levels:
                levels[other] = levels[one] + 1
                todo.append(other)
    return {at: levels[at] for at in boxes}


def _moved(
    graph: Graph, core: Sequence[int], leaves: Mapping[int, int], boxes: Layers, twins: Mapping[int, int]
) -> Layout:
    """Put dots and triangles where the cost is least, one after the other."""
    layers = dict(boxes)
    near = graph.neighbours()
    low, high = min(layers.values()), max(layers.values())
    middle = (low + high) // 2
    free: list[int] = []
    waiting = [at for at in core if at not in layers]
    while waiting:
        at = next((at for at in waiting if near[at] & layers.keys()), waiting[0])
        around = sorted(layers[one] for one in near[at] if one in layers) or [0]
        twin = twins.get(at, at)
        if twins and twin == at:
            layers[at] = middle
        else:
            layers[at] = high + 1 if graph.vertices[at].shape == GROUP else around[-1] + 1
            if low == high and graph.vertices[at].shape == GROUP and low - 1 not in layers.values():
                layers[at] = low - 1  # one output on either side of a single column
            if twins:
                level = around[0] - 1 if around[0] < middle else around[-1] + 1
                layers |= {at: level, twin: 2 * middle - level}
            free.append(at)
        waiting = [one for one in waiting if one not in (at, twin)]
    best = _built(graph, core, leaves, layers, twins, 1)
    for rounds in (1, _ROUNDS) if len(graph.lines) <= _MOST_MOVED else ():
        for at in free if rounds == 1 or best.cost >= CROSSING else ():
            twin = twins.get(at, at)
            step = 2 if graph.vertices[at].shape == GROUP else 1
            for level in range(low - 1, middle if twins else high + 2, step):
                other = {at: level} | ({twin: 2 * middle - level} if twins else {})
                if level != layers[at] and 2 * middle - level != layers[at]:
                    found = _built(graph, core, leaves, layers | other, twins, rounds)
                    if found.cost < best.cost:
                        best, layers = found, layers | other
    return best if best.cost < CROSSING else _built(graph, core, leaves, layers, twins, 2 * _ROUNDS)


def _planar(graph: Graph, core: Sequence[int], leaves: Mapping[int, int], whole: nx.Graph) -> Layout:
    """The layers and the order of a planar layout."""
    points = {at: (float(x), float(y)) for at, (x, y) in nx.planar_layout(whole).items()}
    columns = {x: at for at, x in enumerate(sorted({round(x, 9) for x, _ in points.values()}))}
    layers = {at: 2 * columns[round(x, 9)] for at, (x, _) in points.items()}
    return _built(graph, core, leaves, layers, {}, 1, points)


def _built(
    graph: Graph,
    core: Sequence[int],
    leaves: Mapping[int, int],
    layers: Layers,
    twins: Mapping[int, int],
    rounds: int,
    points: Mapping[int, tuple[float, float]] | None = None,
) -> Layout:
    """Make the places of vertices and lines, and arrange them; `points` determine the order if there are any."""
    layers = {at: layers[at] for at in core}
    upright = _put_aside(graph, leaves, layers, twins)
    numbers = {layer: at for at, layer in enumerate(sorted({*layers.values()}))}
    own: list[list[Place]] = [[] for _ in numbers]
    places: dict[int, Place] = {}
    ranks: dict[int, list[float]] = {}
    for line in graph.lines:
        for at in (line.first, line.second):
            ranks.setdefault(at, []).extend(graph.ranks.get(index, 0.0) for index in line.indices)
    for at, layer in layers.items():
        rank = sum(ranks.get(at, [0])) / len(ranks.get(at, [0])) if graph.vertices[at].shape != DOT else max(ranks[at])
        rank = rank if graph.vertices[at].shape in (PATTERN, DOT) else 0.0
        places[at] = Place(numbers[layer], rank if points is None else points[leaves.get(at, at)][1])
        own[numbers[layer]].append(places[at])
    routes: dict[int, list[Place]] = {}
    edges: dict[int, list[Edge]] = {}
    for number, line in enumerate(graph.lines):
        if line.first not in places or line.second not in places:
            continue
        one, other = sorted((line.first, line.second), key=lambda at: places[at].layer)
        route = [places[one]]
        for layer in range(places[one].layer + 1, places[other].layer):
            rank = sum(graph.ranks.get(index, 0.0) for index in line.indices) / len(line.indices)
            if points is not None:
                (x1, y1), (x2, y2) = points[one], points[other]
                x = sorted({round(x, 9) for x, _ in points.values()})[layer]
                rank = y1 + (y2 - y1) * (x - x1) / (x2 - x1)
            route.append(Place(layer, rank, False))
            own[layer].append(route[-1])
        route.append(places[other])
        routes[number] = route
        if len(route) == 2 and route[0].layer == route[1].layer:
            route[0].beside.append(route[1])
            route[1].beside.append(route[0])
            edges[number] = []
            continue
        weight = min(_WEIGHTS.get(graph.vertices[at].shape, 1.0) for at in (one, other))
        edges[number] = [
            join(a, b, number, weight * (1 + 2 * (not a.solid) + 2 * (not b.solid)))
            for a, b in itertools.pairwise(route)
        ]
    if twins:
        _pair(graph, places, routes, twins)
    cost = (
        arrange(own, rounds)
        + _SPAN * sum(len(one) for one in edges.values())
        + sum(
            9
            if GROUP in (graph.vertices[graph.lines[at].first].shape, graph.vertices[graph.lines[at].second].shape)
            else 1
            for at, one in edges.items()
            if not one
        )
    )
    boxes = [layer for at, layer in layers.items() if at in upright and _is_box(graph, at)] or [0]
    inner = sum(min(boxes) < layer < max(boxes) for at, layer in layers.items() if graph.vertices[at].shape == GROUP)
    return Layout(own, places, routes, edges, upright, cost + _SPAN * len(own) + _INNER * inner)


def _pair(
    graph: Graph,
    places: Mapping[int, Place],
    routes: Mapping[int, list[Place]],
    twins: Mapping[int, int],
) -> None:
    """Set the twins of all places."""
    number = {frozenset((line.first, line.second)): at for at, line in enumerate(graph.lines)}

    def twin(at: int) -> int:
        return twins.get(at, at)

    for at, place in places.items():
        place.twin = places[twin(at)]
    for at, route in routes.items():
        ends = graph.lines[at].first, graph.lines[at].second
        other = routes[number[frozenset(map(twin, ends))]]
        for one, two in zip(route[1:-1], other[-2:0:-1], strict=True):
            one.twin = two


def _put_aside(
    graph: Graph, leaves: Mapping[int, int], layers: Layers, twins: Mapping[int, int]
) -> dict[int, list[int]]:
    """Put open ends next to the outermost vertices into their own layers; return the ends above and below vertices."""
    middle = (min(layers.values()) + max(layers.values())) / 2
    near, aside = graph.neighbours(), dict[int, list[int]]()
    levels = dict(sorted(layers.items(), key=lambda one: one[1]))
    for owner, level in levels.items():
        own = _own(leaves, owner)
        sides = [at for at in own if graph.vertices[at].shape == END and _is_box(graph, owner)]
        first, last = (not any(sign * levels.get(one, level) > sign * level for one in near[owner]) for sign in (-1, 1))
        if len(own) <= _MOST_UPRIGHT:  # the first index of an input is its batch
            start = 1 if first and graph.arrows else 0
            sides = sides[start:][-1:] if first or last else []
        if twins and level >= middle:
            sides = [twins[at] for at in aside[twins[owner]]] if level > middle else []
        aside[owner] = sides
        left = level < middle if twins else first and not last
        layers.update(dict.fromkeys(sides, level + (-1 if left else 1)))
    return {owner: [at for at in _own(leaves, owner) if at not in aside[owner]] for owner in levels}


def _own(leaves: Mapping[int, int], owner: int) -> list[int]:
    return sorted(at for at, other in leaves.items() if other == owner)


# ------------------------------------------------------------------------------------------------------------- symmetry
class _TooManyMatchesError(Exception):
    """Raised when finding the symmetries of a graph would take too long."""


def _mirror(graph: Graph, part: Sequence[int]) -> dict[int, int]:
    """The self-inverse symmetry of a part that moves the most vertices; empty if it moves no box."""
    named = nx.Graph()
    for at in part:
        named.add_node(at, what=(graph.vertices[at].shape, graph.vertices[at].text))
    named.add_edges_from((line.first, line.second) for line in graph.lines if line.first in named)
    matches = itertools.count()

    def alike(one: dict[str, object], other: dict[str, object]) -> bool:
        if next(matches) >= _MOST_MATCHES:
            raise _TooManyMatchesError
        return one["what"] == other["what"]

    matcher = nx.isomorphism.GraphMatcher(named, named, node_match=alike)
    best: dict[int, int] = {}
    moved = 0
    with contextlib.suppress(_TooManyMatchesError):
        for mapping in itertools.islice(matcher.isomorphisms_iter(), _MOST_MAPPINGS):
            count = sum(a != b for a, b in mapping.items())
            if count > moved and all(mapping[b] == a for a, b in mapping.items()):
                best, moved = mapping, count
    return best if any(a != b and graph.vertices[a].text for a, b in best.items()) else {}


def _half(graph: Graph, whole: nx.Graph, mirror: Mapping[int, int]) -> set[int]:
    """The vertices of the first half; empty if lines other than those between twins join the halves."""
    rest = whole.subgraph([at for at in whole if mirror.get(at, at) != at]).copy()
    rest.remove_edges_from([(a, b) for a, b in rest.edges if mirror[a] == b])
    found: set[int] = set()
    for part in sorted(map(set, nx.connected_components(rest)), key=min):
        twins = {mirror[at] for at in part}
        if twins & part:
            return set()
        if not twins & found:
            found |= part
    return found
