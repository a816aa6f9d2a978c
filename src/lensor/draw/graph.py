"""A network as a graph for drawing, with shapes as vertices and labelled lines between them.

An index shared by two nodes is a line between them. An index shared by more nodes (a hyperindex) is a dot with a line
to each node, and so is a delta. An index that appears twice on a node is a loop (a trace), or two lines from the node
to the dot (a diagonal). An output leg is an open end; a leg that groups indices is a triangle where their lines meet.
Operands that are cut out, the arguments of a Jacobian, remain as ghosts, whose lines are legs of the Jacobian.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from lensor.network import Delta, Network, Ones, Operand, Pattern, Select
from lensor.network.text import pattern_names

TENSOR, CUT, PATTERN, SELECTION, ONES, DOT, END, GROUP, LOOP, STEP = (
    *("tensor", "cut", "pattern", "selection", "ones", "dot", "end", "group"),
    *("loop", "step"),
)
"""The shapes of vertices; a loop's vertex is the turning point of a trace's line."""

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
    """Vertices and lines; each pair of vertices has at most one line."""

    vertices: list[Vertex] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

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
