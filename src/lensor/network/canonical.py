"""Canonical forms: one key for all networks that differ only in index names and the order of their nodes.

The algorithm colours the indices by their properties other than names (size, place in the output, places in nodes) and
refines each colour by the colours of the neighbours until nothing changes. It breaks ties by trying every index of the
first tied class and choosing the smallest key. Interchangeable indices are numbered in any order, and automorphisms
found by the search prune branches that would repeat a previous branch. If the graph splits into components once the
indices with a unique colour are removed, each component is searched separately, so the search stays fast for networks
with many equal parts.

Refinement takes O(E log E) steps for E legs. The search is bounded: if the ties of a network are not broken within
`EFFORT` steps, the network equals only networks with the same names.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lensor.affine import progressions

if TYPE_CHECKING:
    from lensor.network.network import Network

EFFORT = 3_000_000
"""Number of legs that the search for one network's key may visit before it gives up."""

_LARGE = 64
"""In nodes with more legs than this, only the indices of a delta are treated as interchangeable."""

Label = tuple[int, ...]
"""Numbers that describe the place of an index in a node; equal for indices that the node does not distinguish."""


class _TooSymmetricalError(Exception):
    """The search has reached its limit of steps."""


def _encode(node: Any, colour: dict[str, int]) -> tuple:
    """Describe a node by a tuple in which numbers replace its indices."""
    legs = tuple([tuple([colour[index] for index in leg]) for leg in node.legs])
    kind = type(node).__name__
    if kind == "Delta":
        return (kind, tuple(sorted(legs)))
    if kind in ("Operand", "Select"):
        return (kind, node.name, legs)
    if kind == "Pattern":
        p = node.pattern
        if p.kernel_size == p.stride == 1 and p.padding_mode == "zeros" and not legs[2]:
            # A shift [i = o − P] is symmetric in i and o.
            ends = ((p.input_size, p.padding[0], legs[0]), (p.output_size, -p.padding[0], legs[1]))
            return ("Shift", *sorted(ends))
        if p.kernel_size == 1 and p.padding_mode != "zeros":
            return ("Reads", p.input_size, tuple(progressions(p.line())), legs)  # the steps may be ambiguous
        # The output size is explicit, so the right padding is irrelevant.
        return (
            kind,
            p.input_size,
            p.output_size,
            p.kernel_size,
            p.stride,
            p.padding[0],
            p.dilation,
            p.padding_mode,
            legs,
        )
    return (kind, legs)


def _legs(node: Any) -> tuple[tuple, list[tuple[str, Label]]]:
    """A node without its indices, and an (index, label) pair for each of them."""
    blank = _encode(node, _Zeros())
    if type(node).__name__ == "Delta":
        return blank, [(index, ()) for index in node.indices]
    if blank[0] == "Shift":
        p = node.pattern
        ends = ((p.input_size, p.padding[0], node.legs[0]), (p.output_size, -p.padding[0], node.legs[1]))
        return blank, [(index, (size, left, len(leg), at)) for size, left, leg in ends for at, index in enumerate(leg)]
    return blank, [(index, (number, at)) for number, leg in enumerate(node.legs) for at, index in enumerate(leg)]


class _Zeros(dict[str, int]):
    """A mapping from every index to 0."""

    def __missing__(self, index: str) -> int:
        return 0


class _Facts:
    """The data shared by all searches in one network."""

    def __init__(self, net: Network) -> None:
        self.net, self.effort = net, EFFORT
        self.places = {index: (leg, at) for leg, group in enumerate(net.output) for at, index in enumerate(group)}
        self.powers = dict(net.scale.powers)
        self.legs = {id(node): _legs(node) for node in net.nodes}

    def known(self, index: str) -> tuple:
        """The properties of an index other than its name."""
        return (self.net.sizes[index], self.places.get(index), self.powers.get(index, 0))

    def start(self, nodes: Sequence[Any], indices: Sequence[str]) -> dict[str, int]:
        """Initial colours: the properties of each index, and its place among the indices interchangeable with it."""
        holders: dict[str, list[Any]] = {index: [] for index in indices}
        for node in nodes:
            for index in dict.fromkeys(i for leg in node.legs for i in leg):
                holders[index].append(node)
        numbers = {index: at for at, index in enumerate(indices)}
        known = {index: self.known(index) for index in indices}
        alone = {properties for properties, count in Counter(known.values()).items() if count == 1}
        place: dict[str, int] = {}
        classes: dict[tuple, int] = {}
        for index in indices:
            if known[index] in alone:
                place[index] = 0
                continue
            own, numbers[index] = numbers[index], -1
            alike: list[tuple] = [known[index]]
            found: list[str] = []
            on_deltas = any(type(node).__name__ == "Delta" for node in holders[index])
            for inside in (False, True):
                # Two indices are interchangeable if swapping them exchanges the nodes that they appear on, or if they
                # appear on the same deltas.
                if not inside or on_deltas:
                    found = sorted([repr(self.beside(node, numbers, inside)) for node in holders[index]])
                alike.append(tuple(found))
            numbers[index] = own
            keys = [(alike[0], inside, alike[1 + inside]) for inside in (False, True)]
            key = max(keys, key=lambda key: classes.get(key, 0))
            place[index] = classes.get(key, 0)
            for one in keys if not place[index] else [key]:
                classes[one] = place[index] + 1
        return _ranked({index: (*known[index], place[index]) for index in indices})

    @staticmethod
    def beside(node: Any, numbers: dict[str, int], inside: bool) -> tuple:
        """Describe a node except for the index numbered −1; with `inside`, describe a delta only by its identity."""
        large = len(node.legs) > _LARGE
        if type(node).__name__ == "Delta" and (inside or large):
            return ("Delta", id(node))
        if large:
            return ("large", id(node), tuple(legs for legs in node.legs if any(numbers[index] < 0 for index in legs)))
        return _encode(node, numbers)


def _ranked(keys: dict[str, Any]) -> dict[str, int]:
    order = {key: rank for rank, key in enumerate(sorted(set(keys.values()), key=repr))}
    return {index: order[key] for index, key in keys.items()}


class _Partition:
    """A partition of vertices into ordered cells; a cell's number is the number of vertices in the cells before it."""

    def __init__(self, colour: list[int], cells: dict[int, dict[int, None]]) -> None:
        self.colour, self.cells = colour, cells

    @staticmethod
    def of(keys: Sequence[Any]) -> _Partition:
        """Partition the vertices by their keys, in the order of the keys."""
        cells: dict[Any, dict[int, None]] = {}
        for vertex, key in enumerate(keys):
            cells.setdefault(key, {})[vertex] = None
        found, colour, start = {}, [0] * len(keys), 0
        for key in sorted(cells):
            found[start] = cells[key]
            for vertex in cells[key]:
                colour[vertex] = start
            start += len(cells[key])
        return _Partition(colour, found)

    def copy(self) -> _Partition:
        return _Partition(list(self.colour), {start: dict(cell) for start, cell in self.cells.items()})

    def alone(self, vertex: int) -> int:
        """Move a vertex into a separate cell before the rest of its cell; return the number of the new cell."""
        start = self.colour[vertex]
        rest = self.cells[start]
        del rest[vertex]
        self.cells[start], self.cells[start + 1] = {vertex: None}, rest
        for other in rest:
            self.colour[other] = start + 1
        return start

    def split(self, start: int, groups: Sequence[list[int]]) -> list[int]:
        """Split groups of vertices off a cell into new cells after it, in order; return the numbers of all parts."""
        cell = self.cells[start]
        moved = groups if sum(map(len, groups)) < len(cell) else groups[1:]
        at = start + len(cell) - sum(map(len, moved))
        found = [start]
        for group in moved:
            for vertex in group:
                del cell[vertex]
                self.colour[vertex] = at
            self.cells[at] = dict.fromkeys(group)
            found.append(at)
            at += len(group)
        return found


class _Search:
    """The search for the smallest key of one connected part of a network.

    Args:
        facts: data that all searches of the network share.
        nodes: the nodes of the part.
        indices: the indices of the part, to which the search assigns numbers.
        labels: negative numbers of the nodes' other indices.
    """

    def __init__(self, facts: _Facts, nodes: list[Any], indices: list[str], labels: dict[str, int]) -> None:
        self.facts, self.nodes, self.indices, self.labels = facts, nodes, indices, labels
        number = {index: at for at, index in enumerate(indices)}
        self.number = number
        self.neighbours: list[list[tuple[int, Label]]] = [[] for _ in range(len(indices) + len(nodes))]
        self.kinds: list[tuple] = []
        for at, node in enumerate(nodes, start=len(indices)):
            blank, legs = facts.legs[id(node)]
            for index, label in legs:
                if index in number:
                    self.neighbours[at].append((number[index], label))
                    self.neighbours[number[index]].append((at, label))
            fixed = sorted((label, labels[index]) for index, label in legs if index not in number)
            self.kinds.append((blank, tuple(fixed)))
        self.best: tuple | None = None
        self.best_text = ""
        self.best_order: dict[str, int] = {}
        self.automorphisms: list[dict[str, str]] = []

    def run(self, start: dict[str, int]) -> None:
        """Search, starting from initial colours of the indices."""
        ranks = {kind: rank for rank, kind in enumerate(sorted(set(self.kinds), key=repr))}
        keys = [(0, start[index]) for index in self.indices] + [(1, ranks[kind]) for kind in self.kinds]
        partition = _Partition.of(keys)
        self.descend(partition, sorted(partition.cells), ())

    def refine(self, partition: _Partition, cells: Iterable[int]) -> None:
        """Split cells until all members of a cell have the same number of neighbours of each kind in every cell.

        Splitting starts from `cells`.
        """
        waiting = deque(cells)
        held = set(waiting)
        while waiting:
            start = waiting.popleft()
            held.discard(start)
            touched: dict[int, list[Label]] = {}
            for vertex in partition.cells[start]:
                for other, label in self.neighbours[vertex]:
                    touched.setdefault(other, []).append(label)
                self.facts.effort -= len(self.neighbours[vertex])
            if self.facts.effort < 0:
                raise _TooSymmetricalError
            by_cell: dict[int, list[int]] = {}
            for other in touched:
                by_cell.setdefault(partition.colour[other], []).append(other)
            for cell in sorted(by_cell):
                size = len(partition.cells[cell])
                if size == 1:
                    continue
                groups: dict[tuple[Label, ...], list[int]] = {}
                for other in by_cell[cell]:
                    groups.setdefault(tuple(sorted(touched[other])), []).append(other)
                if len(groups) == 1 and len(by_cell[cell]) == size:
                    continue
                found = partition.split(cell, [groups[key] for key in sorted(groups)])
                if cell not in held:
                    # Splitting by the other parts also covers the largest one.
                    found.remove(max(found, key=lambda part: len(partition.cells[part])))
                waiting.extend(part for part in found if part not in held)
                held.update(found)

    def certificate(self, order: dict[str, int]) -> tuple:
        by_rank = sorted(self.indices, key=order.__getitem__)
        numbers = {**self.labels, **order}
        return (
            tuple(sorted((_encode(node, numbers) for node in self.nodes), key=repr)),
            tuple(self.facts.known(index) for index in by_rank),
        )

    def descend(self, partition: _Partition, cells: Iterable[int], fixed: tuple[str, ...]) -> None:
        self.refine(partition, cells)
        count = len(self.indices)
        own = sorted(start for start in partition.cells if start < count)
        tied = [start for start in own if len(partition.cells[start]) > 1]
        alone = [self.indices[next(iter(partition.cells[start]))] for start in own if len(partition.cells[start]) == 1]
        if not tied:
            self.leaf({index: at for at, index in enumerate(alone)})
            return
        pieces = self.pieces(alone)
        if len(pieces) != 1:
            self.leaf(self.numbered(alone, pieces, partition))
            return
        tried: set[str] = set()
        for vertex in sorted(partition.cells[tied[0]]):
            index = self.indices[vertex]
            if tried and self.orbit(index, fixed) & tried:
                continue
            tried.add(index)
            chosen = partition.copy()
            self.descend(chosen, [chosen.alone(vertex)], (*fixed, index))

    def pieces(self, alone: list[str]) -> list[tuple[list[Any], list[str]]]:
        """The connected parts that remain if the indices in `alone` are removed."""
        return _connected([node for node in self.nodes if node.legs], set(self.indices).difference(alone))

    def numbered(
        self, alone: list[str], pieces: list[tuple[list[Any], list[str]]], partition: _Partition
    ) -> dict[str, int]:
        """Number all indices: first those with a unique colour, then those of each piece."""
        labels = {**self.labels, **{index: -1 - len(self.labels) - at for at, index in enumerate(alone)}}
        found = []
        for nodes, indices in pieces:
            held = {index for node in nodes for leg in node.legs for index in leg}
            search = _Search(self.facts, nodes, indices, {index: labels[index] for index in held - {*indices}})
            colours = {index: partition.colour[self.number[index]] for index in indices}
            search.run(colours)
            assert search.best is not None
            found.append((repr((tuple(sorted(colours.values())), search.best)), search.best_order))
        order = {index: at for at, index in enumerate(alone)}
        for _, numbers in sorted(found, key=lambda piece: piece[0]):
            for index in sorted(numbers, key=numbers.__getitem__):
                order[index] = len(order)
        return order

    def leaf(self, order: dict[str, int]) -> None:
        self.facts.effort -= len(self.indices) + len(self.nodes)
        found = self.certificate(order)
        text = repr(found)
        if self.best is None or text < self.best_text:
            self.best, self.best_text, self.best_order = found, text, order
        elif text == self.best_text:
            by_rank = {rank: index for index, rank in self.best_order.items()}
            self.automorphisms.append({index: by_rank[rank] for index, rank in order.items()})

    def orbit(self, index: str, fixed: tuple[str, ...]) -> set[str]:
        """The images of `index` under the known automorphisms that fix `fixed`."""
        maps = [a for a in self.automorphisms if all(a[f] == f for f in fixed)]
        self.facts.effort -= len(self.automorphisms) + len(self.indices) * len(maps) // 8
        maps += [{new: old for old, new in a.items()} for a in maps]
        orbit, todo = {index}, [index]
        while todo:
            at = todo.pop()
            for automorphism in maps:
                if automorphism[at] not in orbit:
                    orbit.add(automorphism[at])
                    todo.append(automorphism[at])
        return orbit


def _connected(nodes: list[Any], indices: set[str]) -> list[tuple[list[Any], list[str]]]:
    """A (nodes, indices) pair for each part connected by `indices`; nodes without such an index are omitted."""
    holders: dict[str, list[int]] = {}
    held = [
        [index for index in dict.fromkeys(i for leg in node.legs for i in leg) if index in indices] for node in nodes
    ]
    for at, own in enumerate(held):
        for index in own:
            holders.setdefault(index, []).append(at)
    seen: set[int] = set()
    parts = []
    for start, own in enumerate(held):
        if start in seen or not own:
            continue
        found, todo = [], [start]
        seen.add(start)
        while todo:
            at = todo.pop()
            found.append(at)
            for other in (other for index in held[at] for other in holders.pop(index, ())):
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        found.sort()
        parts.append(([nodes[at] for at in found], list(dict.fromkeys(i for at in found for i in held[at]))))
    return parts


def _parts(net: Network) -> list[tuple[list[Any], list[str]]]:
    """A (nodes, indices) pair for each connected part, including nodes without indices and indices without nodes."""
    parts = _connected(list(net.nodes), set(net.sizes))
    held = {index for _, indices in parts for index in indices}
    bare = [([node], []) for node in net.nodes if not any(node.legs)]
    return [*parts, *bare, *(([], [index]) for index in net.sizes if index not in held)]


def canonical_form(net: Network) -> tuple[tuple, dict[str, int]]:
    """The smallest key of a network over all consistent numberings of its indices, and the numbering.

    Connected parts are numbered separately and sorted, so the cost is linear in the number of equal parts. If a network
    is too symmetrical for the search, its key includes its names.
    """
    try:
        return _searched(net)
    except (_TooSymmetricalError, RecursionError):
        nodes = tuple(sorted(net.nodes, key=repr))
        key = ("with names", nodes, net.output, net.dimensions, net.scale)
        return key, {index: at for at, index in enumerate(net.sizes)}


def invariant(net: Network) -> Hashable:
    """A key that is equal for networks with equal canonical forms, and takes much less work.

    It consists of the nodes without their indices, the sizes of the indices, the output without its indices, and the
    scale.
    """
    zeros = dict.fromkeys(net.sizes, 0)
    nodes, sizes = Counter([_encode(node, zeros) for node in net.nodes]), Counter(net.sizes.values())
    return (
        frozenset(nodes.items()),
        frozenset(sizes.items()),
        tuple([len(leg) for leg in net.output]),
        net.scale.factor,
    )


def _searched(net: Network) -> tuple[tuple, dict[str, int]]:
    facts = _Facts(net)
    found = []
    for nodes, indices in _parts(net):
        search = _Search(facts, nodes, indices, {})
        search.run(facts.start(nodes, indices))
        found.append((search.best_text, search.best, search.best_order))
    found.sort(key=lambda part: part[0])
    order: dict[str, int] = {}
    for _, _, numbers in found:
        for index in sorted(numbers, key=numbers.__getitem__):
            order[index] = len(order)
    shape = tuple(len(leg) for leg in net.output)
    return (tuple(key for _, key, _ in found), shape, net.scale.factor), order
