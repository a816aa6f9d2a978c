"""Canonical forms: one key for all networks that differ only by index names and the order of their nodes.

The indices of a network are coloured by what can be said of them without names (size, places in the output, places
in nodes), the colours are refined by the colours of their neighbours until nothing changes, and ties are broken by
trying every index of the first tied class and keeping the smallest key. Automorphisms found on the way cut branches
that can only repeat an earlier one, so that networks of many equal parts stay cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    if kind == "Operand":
        return (kind, node.name, legs)
    if kind == "Pattern":
        p = node.pattern
        if p.kernel_size == p.stride == 1 and p.padding_mode == "zeros" and not legs[2]:
            # A shift [i = o − P] reads the same from both ends.
            ends = ((p.input_size, p.padding[0], legs[0]), (p.output_size, -p.padding[0], legs[1]))
            return ("Shift", *sorted(ends))
        if p.kernel_size == 1 and p.padding_mode != "zeros":
            return ("Reads", p.input_size, tuple(p.reads()[:, 0].tolist()), legs)  # the steps may be ambiguous
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
    def __init__(self, net: Network) -> None:
        self.net = net
        self.holders: dict[str, list[Any]] = {index: [] for index in net.sizes}
        for node in net.nodes:
            for index in {index for leg in node.legs for index in leg}:
                self.holders[index].append(node)
        self.best: tuple | None = None
        self.best_order: dict[str, int] = {}
        self.automorphisms: list[dict[str, str]] = []

    def start(self) -> dict[str, int]:
        places = {index: (leg, at) for leg, group in enumerate(self.net.output) for at, index in enumerate(group)}
        powers = dict(self.net.scale.powers)
        return _ranked({index: (size, places.get(index), powers.get(index, 0)) for index, size in self.net.dimensions})

    def refine(self, colour: dict[str, int]) -> dict[str, int]:
        classes = len(set(colour.values()))
        while classes < len(colour):
            seen = {}
            for index, nodes in self.holders.items():
                around = sorted(
                    (
                        (
                            _encode(node, colour),
                            tuple((at, p) for at, leg in enumerate(node.legs) for p, i in enumerate(leg) if i == index),
                        )
                        if type(node).__name__ != "Delta"
                        else (_encode(node, colour), ())
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
        net = self.net
        sizes = tuple(size for _, size in sorted((colour[index], size) for index, size in net.dimensions))
        return (
            tuple(tuple(colour[index] for index in leg) for leg in net.output),
            tuple(sorted((_encode(node, colour) for node in net.nodes), key=repr)),
            sizes,
            net.scale.factor,
            tuple(sorted((colour[index], power) for index, power in net.scale.powers)),
        )

    def descend(self, colour: dict[str, int], fixed: tuple[str, ...]) -> None:
        colour = self.refine(colour)
        cells: dict[int, list[str]] = {}
        for index, rank in colour.items():
            cells.setdefault(rank, []).append(index)
        tied = [cells[rank] for rank in sorted(cells) if len(cells[rank]) > 1]
        if not tied:
            self.leaf(colour)
            return
        tried: set[str] = set()
        for index in tied[0]:
            if tried and self.orbit(index, fixed) & tried:
                continue
            tried.add(index)
            chosen = {other: 2 * rank + 1 for other, rank in colour.items()}
            chosen[index] -= 1
            self.descend(chosen, (*fixed, index))

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


def canonical_form(net: Network) -> tuple:
    """The smallest key of a network over all consistent numberings of its indices."""
    search = _Search(net)
    search.descend(search.start(), ())
    assert search.best is not None
    return search.best
