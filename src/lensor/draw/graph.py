"""A network as a graph that can be drawn: vertices with a shape, lines with labels.

An index of two nodes is a line between them; one of more is a dot that lines lead to (a hyperindex), and so is a delta.
An output leg is an open end; a leg that groups indices is a triangle at which their lines meet. Operands that are cut
out, the arguments of a Jacobian, stay as ghosts: their lines are legs of the Jacobian.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from lensor.network import Delta, Network, Ones, Operand, Pattern, Select
from lensor.notation import pattern_names

TENSOR, CUT, PATTERN, SELECTION, ONES, DOT, END, GROUP, STEP = (
    *("tensor", "cut", "pattern", "selection", "ones", "dot", "end", "group"),
    "step",
)
"""The shapes of vertices."""


@dataclass
class Vertex:
    """A vertex of a drawing.

    Args:
        shape: one of the shapes of this module.
        text: what stands in it.
        node: the number of the network's node, if it is one.
    """

    shape: str
    text: str = ""
    node: int | None = None


@dataclass
class Line:
    """A line between two vertices, with the names of its indices."""

    first: int
    second: int
    indices: tuple[str, ...]

    @property
    def label(self) -> str:
        """The names, side by side."""
        return " ".join(self.indices)


@dataclass
class Graph:
    """Vertices and lines; no two lines join the same vertices."""

    vertices: list[Vertex] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

    def add(self, vertex: Vertex) -> int:
        """Add a vertex; its number."""
        self.vertices.append(vertex)
        return len(self.vertices) - 1

    def join(self, first: int, second: int, index: str) -> None:
        """Join two vertices by an index; side by side with others that join them."""
        for line in self.lines:
            if {line.first, line.second} == {first, second}:
                line.indices = (*line.indices, index)
                return
        self.lines.append(Line(first, second, (index,)))

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


def graph_of(net: Network, cut: Collection[str] = ()) -> Graph:
    """The graph of a network, with some operands cut out."""
    graph, holders = Graph(), dict[str, list[int]]()
    names = pattern_names([net])
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
        ends = list(dict.fromkeys(vertices))
        if len(ends) == 2 and len(vertices) == 2:
            graph.join(ends[0], ends[1], index)
        elif len(vertices) == 1:  # summed over alone
            graph.join(ends[0], graph.add(Vertex(DOT)), index)
        else:
            dot = next((one for one in ends if graph.vertices[one].shape == DOT and len(vertices) > 2), None)
            dot = graph.add(Vertex(DOT)) if dot is None else dot
            for one in ends:
                if one != dot:
                    graph.join(one, dot, index)
    return graph
