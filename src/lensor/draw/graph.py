"""A network as a graph for drawing, with shapes as vertices and labelled lines between them.

An index shared by two nodes is a line between them. An index shared by more nodes (a hyperindex) is a dot with a line
to each node, and so is a delta. An index that appears twice on a node is a loop (a trace), or two lines from the node
to the dot (a diagonal). An output leg is an open end; a leg that groups indices is a triangle where their lines meet.
Operands that are cut out, the arguments of a Jacobian, remain as ghosts, whose lines are legs of the Jacobian.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lensor.network import Delta, Network, Ones, Operand, Pattern, Select
from lensor.network.text import pattern_names

TENSOR, CUT, PATTERN, SELECTION, ONES, DOT, END, GROUP, LOOP, STEP, ARROW = (
    *("tensor", "cut", "pattern", "selection", "ones", "dot", "end", "group"),
    *("loop", "step", "arrow"),
)
"""The shapes of vertices; a loop's vertex is the turning point of a trace's line, and arrows show where values go."""

_MOST_NAMES = 4
"""Maximum number of names in a label."""


@dataclass
class Vertex:
    """A vertex of a drawing.

    Args:
        shape: one of the shapes of this module.
        text: the text inside the vertex.
        node: the number of the node in the network, if the vertex represents a node.
    """

    shape: str
    text: str = ""
    node: int | None = None


@dataclass
class Line:
    """A line between two vertices.

    Args:
        first: the start vertex.
        second: the end vertex.
        indices: names of the indices on the line.
        times: number of parallel lines, which is the number of legs of the first vertex that carry one of the indices.
    """

    first: int
    second: int
    indices: tuple[str, ...]
    times: int = 1

    @property
    def label(self) -> str:
        """The names, separated by spaces; if there are many, only the first and the last."""
        many = len(self.indices) > _MOST_NAMES
        return f"{self.indices[0]} … {self.indices[-1]}" if many else " ".join(self.indices)


@dataclass
class Graph:
    """Vertices and lines; each pair of vertices has at most one line.

    Args:
        vertices: the vertices.
        lines: the lines.
        arrows: pairs of vertices, of which the first belongs to the left of the second: an input, a pattern, a kernel.
        ranks: for each index, its preferred height: the spatial dimensions in rows around 0, groups below.
    """

    vertices: list[Vertex] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    arrows: list[tuple[int, int]] = field(default_factory=list)
    ranks: dict[str, float] = field(default_factory=dict)

    def add(self, vertex: Vertex) -> int:
        """Add a vertex and return its number."""
        self.vertices.append(vertex)
        return len(self.vertices) - 1

    def join(self, first: int, second: int, index: str, times: int = 1) -> None:
        """Join two vertices by an index; all indices between the same vertices share a line."""
        for line in self.lines:
            if {line.first, line.second} == {first, second}:
                line.indices, line.times = (*line.indices, index), max(line.times, times)
                return
        self.lines.append(Line(first, second, (index,), times))

    def loop(self, vertex: int, index: str) -> None:
        """Join a vertex to itself; all traces of a vertex share one loop."""
        near = self.neighbours()[vertex]
        turn = next((other for other in near if self.vertices[other].shape == LOOP), None)
        self.join(vertex, self.add(Vertex(LOOP)) if turn is None else turn, index, 2)

    def neighbours(self) -> list[set[int]]:
        """The neighbours of every vertex."""
        found: list[set[int]] = [set() for _ in self.vertices]
        for line in self.lines:
            found[line.first].add(line.second)
            found[line.second].add(line.first)
        return found

    def components(self) -> list[list[int]]:
        """The vertices of each connected part, in order."""
        near, seen, parts = self.neighbours(), set[int](), []
        for start in range(len(self.vertices)):
            if start in seen:
                continue
            part, todo = {start}, [start]
            while todo:
                for other in near[todo.pop()] - part:
                    part.add(other)
                    todo.append(other)
            seen |= part
            parts.append(sorted(part))
        return parts


def graph_of(net: Network, cut: Collection[str] = (), names: Mapping[Pattern, str] | None = None) -> Graph:
    """The graph of a network.

    Args:
        net: the network.
        cut: operands that are cut out.
        names: names for the patterns; by default as in the network's text.
    """
    graph, holders = Graph(), dict[str, list[int]]()
    names = pattern_names([net]) if names is None else names
    shapes = {Operand: TENSOR, Select: SELECTION, Pattern: PATTERN, Ones: ONES, Delta: DOT}
    for at, node in enumerate(net.nodes):
        match node:
            case Operand():
                text = node.name
            case Pattern():
                text = names[node]
            case Ones():
                text = "1"
            case _:
                text = ""
        shape = CUT if isinstance(node, Operand) and node.name in cut else shapes[type(node)]
        vertex = graph.add(Vertex(shape, text, node=at))
        for leg in node.legs:
            for index in leg:
                holders.setdefault(index, []).append(vertex)
    for leg in net.output:
        if not leg:
            continue
        end = graph.add(Vertex(END if len(leg) == 1 else GROUP))
        for index in leg:
            holders.setdefault(index, []).append(end)
    _add_roles(graph, net, holders)
    for index, vertices in holders.items():
        times = Counter(vertices)
        if len(vertices) == 1:  # a summed index on one node only
            graph.join(vertices[0], graph.add(Vertex(DOT)), index)
        elif len(vertices) == 2 and len(times) == 1:
            graph.loop(vertices[0], index)
        elif len(vertices) == 2:
            graph.join(vertices[0], vertices[1], index)
        else:
            # A delta with this index serves as the index's dot.
            dot = next((one for one in times if graph.vertices[one].shape == DOT), None)
            dot = graph.add(Vertex(DOT)) if dot is None else dot
            for one in times:
                if one != dot:
                    graph.join(one, dot, index, times[one])
    return graph


def _add_roles(graph: Graph, net: Network, holders: Mapping[str, Sequence[int]]) -> None:
    """Set the arrows and ranks of a graph, from the index patterns and the groups of indices."""
    rows: Counter[tuple[int, ...]] = Counter()
    spatial: dict[str, int] = {}
    for at, node in enumerate(net.nodes):
        if isinstance(node, Pattern):
            i, o, k = ([*_others(graph, net, holders, at, leg)] for leg in range(3))
            left, right = (i, o + k) if i else (o, k)
        elif isinstance(node, Select):
            left, right = ([*_others(graph, net, holders, at, leg)] for leg in (1, 0))
        else:
            continue
        graph.arrows += [(one, at) for one in left] + [(at, one) for one in right]
        if isinstance(node, Pattern):
            key = tuple(one for one in (*left, *right) if isinstance(net.nodes[one], Operand))
            rows[key] += 1
            for index in (index for leg in node.legs for index in leg):
                spatial.setdefault(index, rows[key])
    middle = (max(spatial.values(), default=1) + 1) / 2 if len({*spatial.values()}) > 1 else 1.5
    legs = [leg for node in net.nodes if isinstance(node, Operand) for leg in node.legs]
    graph.ranks = {leg[0]: 9.0 for leg in legs if len(leg) > 1 and spatial.keys().isdisjoint(leg)}
    graph.ranks |= {index: row - middle for index, row in spatial.items()}


def _others(graph: Graph, net: Network, holders: Mapping[str, Sequence[int]], at: int, leg: int) -> Iterator[int]:
    """The other nodes with an index of a leg, except patterns that have it on the same leg."""
    for index in net.nodes[at].legs[leg]:
        for other in holders[index]:
            if other == at or other >= len(net.nodes) or graph.vertices[other].shape == DOT:
                continue
            node = net.nodes[other]
            if not isinstance(node, Pattern) or index not in node.legs[leg]:
                yield other
