"""Two halves of a term that are alike up to names of indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from lensor.lowering.state import Tensor
from lensor.network import Pattern, indices_of

Item: TypeAlias = Tensor | Pattern

_LARGEST = 24
"""Two equal halves are looked for among at most this many tensors and patterns."""

_MOST_PAIRS = 2_000
"""Two equal halves are looked for by trying at most this many pairs of items."""


def two_halves(items: Sequence[Item], wanted: Sequence[str]) -> tuple[list[Item], list[Item]] | None:
    """The items in two lists that are alike up to names of indices, or None; indices in `wanted` are of the output."""
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
    """Tensors by their value, patterns by their parameters, both by how indices are grouped."""
    if isinstance(item, Pattern):
        return item.pattern, [len(leg) for leg in item.legs]
    return item.value, [len(item.indices)]


def _flat(item: Item) -> list[str]:
    return list(item.indices) if isinstance(item, Tensor) else list(indices_of(item))


def _extended(there: dict[str, str], one: Item, two: Item, wanted: Sequence[str]) -> dict[str, str] | None:
    """The bijection from the names of the first half to those of the second with two more items."""
    there = dict(there)
    for a, b in zip(_flat(one), _flat(two), strict=True):
        if there.setdefault(a, b) != b or (a in wanted) != (b in wanted):
            return None
    back = {b: a for a, b in there.items()}
    mixed = any(a != b and (a in back or b in there) for a, b in there.items())
    return None if len(back) < len(there) or mixed else there
