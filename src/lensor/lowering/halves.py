"""The search for two halves of a term that are equal up to index names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from lensor.lowering.state import Tensor
from lensor.network import Pattern, indices_of

Item: TypeAlias = Tensor | Pattern

_LARGEST = 24
"""Maximum number of tensors and patterns in a term that is searched for two equal halves."""

_MOST_PAIRS = 2_000
"""Maximum number of pairs of items that the search tries."""


def two_halves(items: Sequence[Item], wanted: Sequence[str]) -> tuple[list[Item], list[Item]] | None:
    """Split the items into two lists, equal up to index names, or return None; `wanted` are the output indices."""
    tries = iter(range(_MOST_PAIRS))

    def search(left: Sequence[Item], there: dict[str, str]) -> list[tuple[Item, Item]] | None:
        if not left:
            return []
        first, rest = left[0], left[1:]
        for at, other in enumerate(rest):
            if _what(first) != _what(other):
                continue
            for pair in ((first, other), (other, first)):
                if next(tries, None) is None:
                    return None
                more = _extended(there, *pair, wanted)
                found = None if more is None else search([*rest[:at], *rest[at + 1 :]], more)
                if found is not None:
                    return [pair, *found]
        return None

    pairs = search(items, {}) if len(items) % 2 == 0 and len(items) <= _LARGEST else None
    return None if pairs is None else ([one for one, _ in pairs], [two for _, two in pairs])


def _what(item: Item) -> tuple[object, list[int]]:
    """A description of an item without index names: its value or pattern, and the number of indices on each leg."""
    if isinstance(item, Pattern):
        return item.pattern, [len(leg) for leg in item.legs]
    return item.value, [len(item.indices)]


def _flat(item: Item) -> list[str]:
    return list(item.indices) if isinstance(item, Tensor) else list(indices_of(item))


def _extended(there: dict[str, str], one: Item, two: Item, wanted: Sequence[str]) -> dict[str, str] | None:
    """Extend the bijection between the index names of the two halves by one more pair of items; None if impossible."""
    there = dict(there)
    for a, b in zip(_flat(one), _flat(two), strict=True):
        if there.setdefault(a, b) != b or (a in wanted) != (b in wanted):
            return None
    back = {b: a for a, b in there.items()}
    mixed = any(a != b and (a in back or b in there) for a, b in there.items())
    return None if len(back) < len(there) or mixed else there
