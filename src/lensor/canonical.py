"""Canonical forms: one key for all networks that differ only by index names and the order of their nodes.

The indices of a network are coloured by what can be said of them without names (size, places in the output, places
in nodes), the colours are refined by the colours of their neighbours until nothing changes, and ties are broken by
trying every index of the first tied class and keeping the smallest key. Automorphisms found on the way cut branches
that can only repeat an earlier one. Indices whose colour is their own hold the rest together only by name: what falls
into pieces without them is searched piece by piece, so that networks of many equal parts stay cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lensor.reading import progressions

if TYPE_CHECKING:
    from lensor.network import Network


def _ranked(keys: dict[str, Any]) -> dict[str, int]:
    order = {key: rank for rank, key in enumerate(sorted(set(keys.values()), key=repr))}
    return {index: order[key] for index, key in keys.items()}


def _encode(node: Any, colour: dict[str, int]) -> tuple:
    """A node with its indices replaced by numbers."""
    legs = tuple(tuple(colour[index] for index in leg) for leg in node.legs)
    kind = type(node).__name__
    if kind == "Delta":
        return (kind, tuple(sorted(legs)))
    if kind in ("Operand", "Select"):
        return (kind, node.name, legs)
    if kind == "Pattern":
        p = node.pattern
        if p.kernel_size == p.stride == 1 and p.padding_mode == "zeros" and not legs[2]:
            # A shift [i = o − P] reads the same from both ends.
            ends = ((p.input_size, p.padding[0], legs[0]), (p.output_size, -p.padding[0], legs[1]))
            return ("Shift", *sorted(ends))
        if p.kernel_size == 1 and p.padding_mode != "zeros":
            return ("Reads", p.input_size, tuple(progressions(p.line())), legs)  # the steps may be ambiguous
        # Padding on the right is irrelevant once the output size is given.
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


class _Search:
    """The smallest key of one connected part of a network.

    Args:
        net: the network.
        nodes: the nodes of the part.
        indices: the indices of the part that are to be numbered.
        labels: numbers, all negative, of the other indices of its nodes.
    """

    def __init__(self, net: Network, nodes: list[Any], indices: list[str], labels: dict[str, int]) -> None:
        self.net, self.nodes, self.indices, self.sizes, self.labels = net, nodes, indices, net.sizes, labels
        self.places = {index: (leg, at) for leg, group in enumerate(net.output) for at, index in enumerate(group)}
        self.powers = dict(net.scale.powers)
        self.holders: dict[str, list[Any]] = {index: [] for index in indices}
        for node in nodes:
            for index in {index for leg in node.legs for index in leg} - labels.keys():
                self.holders[index].append(node)
        self.best: tuple | None = None
        self.best_order: dict[str, int] = {}
        self.automorphisms: list[dict[str, str]] = []

    def known(self, index: str) -> tuple:
        """What can be said of an index without names."""
        return (self.sizes[index], self.places.get(index), self.powers.get(index, 0))

    def start(self) -> dict[str, int]:
        return _ranked({index: self.known(index) for index in self.indices})

    def refine(self, colour: dict[str, int]) -> dict[str, int]:
        classes = len(set(colour.values()))
        while classes < len(colour):
            seen, numbers = {}, {**self.labels, **colour}
            for index, nodes in self.holders.items():
                around = sorted(
                    (
                        (
                            _encode(node, numbers),
                            tuple((at, p) for at, leg in enumerate(node.legs) for p, i in enumerate(leg) if i == index),
                        )
                        if type(node).__name__ != "Delta"
                        else (_encode(node, numbers), ())
                        for node in nodes
                    ),
                    key=repr,
                )
                # Ranks are zero-padded so that sorting by text keeps the order of the colours before.
                seen[index] = (f"{colour[index]:09d}", tuple(around))
            colour = _ranked(seen)
            found = len(set(colour.values()))
            if found == classes:
                break
            classes = found
        return colour

    def certificate(self, colour: dict[str, int]) -> tuple:
        by_rank = sorted(self.indices, key=colour.__getitem__)
        numbers = {**self.labels, **colour}
        return (
            tuple(sorted((_encode(node, numbers) for node in self.nodes), key=repr)),
            tuple(self.known(index) for index in by_rank),
        )

    def descend(self, colour: dict[str, int], fixed: tuple[str, ...]) -> None:
        colour = self.refine(colour)
        cells: dict[int, list[str]] = {}
        for index, rank in colour.items():
            cells.setdefault(rank, []).append(index)
        tied = [cells[rank] for rank in sorted(cells) if len(cells[rank]) > 1]
        alone = [cells[rank][0] for rank in sorted(cells) if len(cells[rank]) == 1]
        pieces = self.pieces(alone) if tied else []
        if len(pieces) != 1:
            self.leaf(self.numbered(alone, pieces, colour))
            return
        tried: set[str] = set()
        for index in tied[0]:
            if tried and self.orbit(index, fixed) & tried:
                continue
            tried.add(index)
            chosen = {other: 2 * rank + 1 for other, rank in colour.items()}
            chosen[index] -= 1
            self.descend(chosen, (*fixed, index))

    def pieces(self, alone: list[str]) -> list[tuple[list[Any], list[str]]]:
        """The parts that are left without some indices."""
        return _connected([node for node in self.nodes if node.legs], set(self.indices).difference(alone))

    def numbered(
        self, alone: list[str], pieces: list[tuple[list[Any], list[str]]], colour: dict[str, int]
    ) -> dict[str, int]:
        """Numbers for all indices: those whose colour is their own first, then piece by piece."""
        labels = {**self.labels, **{index: -1 - len(self.labels) - at for at, index in enumerate(alone)}}
        found = []
        for nodes, indices in pieces:
            held = {index for node in nodes for leg in node.legs for index in leg}
            search = _Search(self.net, nodes, indices, {index: labels[index] for index in held - {*indices}})
            search.descend(_ranked({index: colour[index] for index in indices}), ())
            assert search.best is not None
            classes = tuple(sorted(colour[index] for index in indices))
            found.append((repr((classes, search.best)), search.best_order))
        order = {index: at for at, index in enumerate(alone)}
        for _, numbers in sorted(found, key=lambda piece: piece[0]):
            for index in sorted(numbers, key=numbers.__getitem__):
                order[index] = len(order)
        return order

    def leaf(self, colour: dict[str, int]) -> None:
        found = self.certificate(colour)
        if self.best is None or repr(found) < repr(self.best):
            self.best, self.best_order = found, colour
        elif found == self.best:
            by_rank = {rank: index for index, rank in self.best_order.items()}
            self.automorphisms.append({index: by_rank[rank] for index, rank in colour.items()})

    def orbit(self, index: str, fixed: tuple[str, ...]) -> set[str]:
        """Indices that automorphisms which keep `fixed` in place move `index` to."""
        maps = [a for a in self.automorphisms if all(a[f] == f for f in fixed)]
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
    """(nodes, indices) of each part that hangs together by some indices; nodes that hold none of them are left out."""
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
            for other in (other for index in held[at] for other in holders[index]):
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        found.sort()
        parts.append(([nodes[at] for at in found], list(dict.fromkeys(i for at in found for i in held[at]))))
    return parts


def _parts(net: Network) -> list[tuple[list[Any], list[str]]]:
    """Nodes and indices of each connected part; nodes without indices and indices without nodes are parts, too."""
    parts = _connected(list(net.nodes), set(net.sizes))
    held = {index for _, indices in parts for index in indices}
    bare = [([node], []) for node in net.nodes if not any(node.legs)]
    return [*parts, *bare, *(([], [index]) for index in net.sizes if index not in held)]


def canonical_form(net: Network) -> tuple[tuple, dict[str, int]]:
    """The smallest key of a network over all consistent numberings of its indices, and the numbering.

    Connected parts are numbered one by one and sorted, so that many equal parts cost no more than one each.
    """
    found = []
    for nodes, indices in _parts(net):
        search = _Search(net, nodes, indices, {})
        search.descend(search.start(), ())
        assert search.best is not None
        found.append((repr(search.best), search.best, search.best_order))
    found.sort(key=lambda part: part[0])
    order: dict[str, int] = {}
    for _, _, numbers in found:
        for index in sorted(numbers, key=numbers.__getitem__):
            order[index] = len(order)
    shape = tuple(len(leg) for leg in net.output)
    return (tuple(key for _, key, _ in found), shape, net.scale.factor), order
