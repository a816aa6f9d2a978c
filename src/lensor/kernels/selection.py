"""Reading of arrays through patterns at positions that are known only at run time, for all frameworks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lensor.plan import steps as s


def read_at(
    step: s.Read,
    positions: Sequence[Any],
    everywhere: Callable[[int], Any],
    where: Callable[[Any, Any, Any], Any],
) -> Any:
    """The flat positions to read within the axes, in the order of the result; the axes' total size stands for no entry.

    Args:
        step: the step.
        positions: the vectors of positions, one per axis.
        everywhere: function that returns 0, ..., n − 1 as an array of the framework.
        where: the framework's elementwise choice between two arrays, or an array and a number.
    """
    count, flat, inside, total = len(step.axes), 0, True, 1
    for at, axis in enumerate(step.axes):
        before, behind, others = (1,) * at, (1,) * (count - 1 - at), (1,) * count
        free, chosen = everywhere(axis.sizes[axis.first]), positions[at]
        if step.chosen_first:
            first, second = free.reshape(*others, *before, -1, *behind), chosen.reshape(*before, -1, *behind, *others)
        else:
            first, second = free.reshape(*before, -1, *behind, *others), chosen.reshape(*others, *before, -1, *behind)
        place, valid = _position(axis, {axis.first: first, axis.second: second}, where)
        size = axis.sizes[axis.target]
        flat, inside, total = flat * size + place, valid & inside, total * size
    return where(inside, flat, total).reshape(-1)


def in_mode(places: Any, size: int, mode: str, where: Callable[[Any, Any, Any], Any]) -> Any:
    """Map positions, which may be outside 0 to size − 1, to the positions that a padding mode reads."""
    if mode == "circular":
        return places % size
    if mode == "reflect":
        places = where(places < 0, -places, places)
        return where(places >= size, 2 * (size - 1) - places, places)
    return places.clip(0, size - 1)


def _position(axis: s.Through, at: dict[int, Any], where: Callable[[Any, Any, Any], Any]) -> tuple[Any, Any]:
    """The position on the target leg for positions on the other two legs, and whether it exists."""
    pattern, left = axis.pattern, axis.pattern.padding[0]
    if axis.target == 0:
        place = at[2] * pattern.dilation + at[1] * pattern.stride - left
        if pattern.padding_mode != "zeros":
            place = in_mode(place, pattern.input_size, pattern.padding_mode, where)
        return place, (place >= 0) & (place < pattern.input_size)
    if axis.target == 1:
        unit, found = pattern.stride, at[0] + left - at[2] * pattern.dilation
    else:
        unit, found = pattern.dilation, at[0] + left - at[1] * pattern.stride
    return found // unit, (found >= 0) & (found < axis.sizes[axis.target] * unit) & (found % unit == 0)
