"""The positions that a pattern product reads, as arrays: for the reference kernels, and as tables for fused kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lensor.affine import values
from lensor.plan import steps as s

OUTSIDE = -(1 << 29)
"""A coordinate for positions that read nothing: sums of up to four coordinates with it are negative."""

_LARGEST = 1 << 27
"""Coordinates are less than this in absolute value."""

MOST_CHECKED = 3
"""Kernels check coordinates on at most this many axes of an operand; more axes are merged."""


def places(axis: s.Axis, sizes: Sequence[int], start: dict[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
    """The positions that an axis reads for all values of its indices, and whether they exist (None: all do).

    Args:
        axis: the axis.
        sizes: the sizes of all indices; the arrays have an axis for each, of length 1 if they do not depend on it.
        start: for some indices, the first value, if it is not 0.
    """
    found, inside = np.zeros((1,) * len(sizes), np.int64), None
    for index, line in axis.terms:
        low = start.get(index, 0)
        one = values(line, np.arange(low, low + sizes[index]))
        found = found + one.reshape([-1 if at == index else 1 for at in range(len(sizes))])
    if axis.outer is not None:
        found = values(axis.outer, found)
    if (found < 0).any():
        inside = found >= 0
        found = np.where(inside, found, 0)
    return found, inside


class TooLarge(ValueError):
    """A product has more positions than the kernels can count."""


@dataclass
class GroupTable:
    """What a group of indices contributes to the reads of an operand, for all combinations of its indices.

    Args:
        offsets: the contribution to the memory offset.
        coordinates: for each checked axis, the contribution to the coordinate.
    """

    offsets: np.ndarray
    coordinates: list[np.ndarray] = field(default_factory=list)

    def table(self) -> np.ndarray:
        """Offsets and coordinates as one array [1 + number of checked axes, size of the group]."""
        return np.stack([self.offsets, *self.coordinates])

    def padded(self, groups: int, length: int) -> GroupTable:
        """The same for rows that consist of several groups, each of which is followed by a gap up to this length."""
        coordinates = [padded(one, groups, length) for one in self.coordinates]
        return GroupTable(padded(self.offsets, groups, length), coordinates)


def padded(table: np.ndarray, groups: int, length: int, value: int | None = None) -> np.ndarray:
    """Fill each group of a table up to a length with a value, by default its first one, which can be read safely."""
    parts = table.reshape(groups, -1)
    whole = np.empty((groups, length), np.int64)
    whole[:] = parts[:, :1] if value is None else value
    whole[:, : parts.shape[1]] = parts
    return whole.reshape(-1)


class Check(NamedTuple):
    """A checked axis: coordinates from 0 to `size` − 1 exist. If there is a table, it contains offsets, or −1."""

    size: int
    table: np.ndarray | None


@dataclass
class OperandTables:
    """How a kernel reads an operand.

    The memory offset is the sum of the offsets of all groups and of the tables of the checked axes at the sums of the
    coordinates; the read is zero if a coordinate is outside its range or its table contains −1.

    Args:
        groups: the contribution of each group of indices.
        checks: the checked axes.
    """

    groups: list[GroupTable]
    checks: list[Check]


class _Checked(NamedTuple):
    """A checked axis under construction: coordinates by group, their range, and offsets as a table or a slope."""

    coordinates: list[np.ndarray]
    low: int
    high: int
    table: np.ndarray | None
    slope: int
    base: int


def reads_for(
    axes: Sequence[s.Axis], strides: Sequence[int], sizes: Sequence[int], groups: Sequence[s.Shape]
) -> OperandTables:
    """The tables for an operand with these strides; `groups` are the indices of each group.

    Raises:
        TooLarge: if a coordinate is too large for the kernels.
    """
    offsets = [np.zeros(math.prod(sizes[index] for index in group), np.int64) for group in groups]
    checked: list[_Checked] = []
    for axis, stride in zip(axes, strides, strict=True):
        totals = [_total(axis, sizes, group) for group in groups]
        if axis.outer is None and axis.is_full(sizes):
            for one, total in zip(offsets, totals, strict=True):
                one += stride * total
        else:
            checked.append(_checked(axis, stride, totals))
    while len(checked) > MOST_CHECKED:
        *rest, one, two = checked
        checked = [*rest, _merged(one, two)]
    found = [GroupTable(one) for one in offsets]
    checks = []
    for one in checked:
        size = one.high - one.low
        for at, (group, part) in enumerate(zip(found, one.coordinates, strict=True)):
            inside = part > OUTSIDE
            if (inside.any() and abs(part[inside]).max() >= _LARGEST) or size >= _LARGEST:
                raise TooLarge(f"coordinates of {size} positions are too large, expected fewer than {_LARGEST}")
            if one.table is None:
                group.offsets += np.where(inside, one.slope * part + (one.base if at == 0 else 0), 0)
            group.coordinates.append(np.where(inside, part - (one.low if at == 0 else 0), OUTSIDE))
        checks.append(Check(size, one.table))
    return OperandTables(found, checks)


def _total(axis: s.Axis, sizes: Sequence[int], group: s.Shape) -> np.ndarray:
    """The sum of the contributions of a group's indices, for all their combinations; OUTSIDE where one is undefined."""
    shape = [sizes[index] for index in group]
    total, inside = np.zeros(shape, np.int64), np.ones(shape, bool)
    for index, line in axis.terms:
        if index in group:
            one = values(line, np.arange(sizes[index]))
            along = [-1 if at == index else 1 for at in group]
            inside = inside & (one > OUTSIDE).reshape(along)
            total = total + one.reshape(along)
    return np.where(inside, total, OUTSIDE).reshape(-1)


def _checked(axis: s.Axis, stride: int, totals: list[np.ndarray]) -> _Checked:
    """A checked axis: with one range of valid coordinates if `outer` has one piece, else with a table."""
    pieces = axis.outer or s.IDENTITY
    low, high = _range(totals)
    low, high = max(low, min(piece.start for piece in pieces)), min(high, max(piece.stop for piece in pieces))
    high = max(high, low)
    if len(pieces) == 1:
        slope, offset = pieces[0].slope, pieces[0].offset
        return _Checked(totals, low, high, None, stride * slope, stride * offset)
    positions = values(pieces, np.arange(low, high))
    return _Checked(totals, low, high, np.where(positions < 0, -1, stride * positions), 0, 0)


def _range(totals: Sequence[np.ndarray]) -> tuple[int, int]:
    """The range of the sums of one defined entry of each array."""
    defined = [one[one > OUTSIDE] for one in totals]
    if not all(one.size for one in defined):
        return 0, 0
    return sum(int(one.min()) for one in defined), sum(int(one.max()) for one in defined) + 1


def _merged(one: _Checked, two: _Checked) -> _Checked:
    """Two checked axes as one with a table, whose coordinates are those of the first times a length plus the second's.

    Coordinates of the second outside its range must not reach the range of another coordinate of the first.
    """
    low, high = _range(two.coordinates)
    length = max(high - low, 1)
    coordinates = [
        np.where((a > OUTSIDE) & (b > OUTSIDE), a * length + b, OUTSIDE)
        for a, b in zip(one.coordinates, two.coordinates, strict=True)
    ]
    offsets = [np.full(max(rest, 0), -1, np.int64) for rest in (one.high - one.low, length)]
    for found, at, first in ((offsets[0], one, one.low), (offsets[1], two, low)):
        values_ = at.table if at.table is not None else at.slope * np.arange(at.low, at.high) + at.base
        found[at.low - first : at.high - first] = values_
    both = offsets[0][:, None] + offsets[1]
    table = np.where((offsets[0][:, None] < 0) | (offsets[1] < 0), -1, both).reshape(-1)
    return _Checked(coordinates, one.low * length + low, one.low * length + low + len(table), table, 0, 0)


def outputs_for(step: s.PatternProduct, *groups: s.Shape) -> list[np.ndarray]:
    """The contribution of each group of indices to the offset in the result, which is in row-major order."""
    strides, size = {}, 1
    for index in reversed(step.order):
        strides[index] = size
        size *= step.sizes[index]
    found = []
    for group in groups:
        total = np.zeros((1,) * len(group), np.int64)
        for place, index in enumerate(group):
            along = [-1 if at == place else 1 for at in range(len(group))]
            total = total + (np.arange(step.sizes[index]) * strides.get(index, 0)).reshape(along)
        found.append(total.reshape(-1))
    return found


def kept_batch(step: s.PatternProduct) -> s.Shape:
    """The indices of b that the result has."""
    return tuple([index for index in step.batch if index in step.order])
