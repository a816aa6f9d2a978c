"""The positions that an index pattern reads, as piecewise affine functions instead of a table.

A table of reads has one entry per pair (o, k). For long inputs and large kernels, that is far more entries than the
operands have. A `Reading` is compact: T[o,k] = outer(rows(o) + columns(k)), where all three functions are `Line`s.
Comparing two readings, or finding the steps of a reading, loops only over the shorter of the legs o and k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np

_NOWHERE = -(1 << 61)
"""The value of a line where it is not defined; adding two such values does not overflow."""

_SMALL = 1 << 12
"""Tables with at most this many entries are compared entry by entry, which is faster."""

_MOST_TRIES = 1 << 12
"""Maximum number of pairs of steps to try if the reads give only one equation for the two steps."""


class Piece(NamedTuple):
    """The function slope·x + offset on the range start ≤ x < stop."""

    start: int
    stop: int
    slope: int
    offset: int


Line: TypeAlias = tuple[Piece, ...]
"""A piecewise affine function of integers with sorted, disjoint pieces; it is undefined outside the pieces."""


def affine(size: int, slope: int, offset: int = 0) -> Line:
    """The line slope·x + offset for 0 ≤ x < size.

    Example:
        >>> affine(3, 2)
        (Piece(start=0, stop=3, slope=2, offset=0),)
    """
    return (Piece(0, size, slope, offset),)


def after(outer: Line, inner: Line) -> Line:
    """The composition x ↦ outer(inner(x)).

    Example:
        >>> after(affine(3, 1), affine(3, 2))
        (Piece(start=0, stop=2, slope=2, offset=0),)
    """
    found: list[Piece] = []
    for start, stop, slope, offset in inner:
        pieces = []
        for low, high, outer_slope, outer_offset in outer:
            first, last = _between(slope, offset, low, high, start, stop)
            if first < last:
                pieces.append(Piece(first, last, outer_slope * slope, outer_slope * offset + outer_offset))
        for piece in sorted(pieces):
            before = found[-1] if found else None
            if before is not None and before[1:] == (piece.start, *piece[2:]):
                found[-1] = Piece(before.start, *piece[1:])
            else:
                found.append(piece)
    return tuple(found)


def _between(slope: int, offset: int, low: int, high: int, start: int, stop: int) -> tuple[int, int]:
    """The range (first, last + 1) of all x with start ≤ x < stop and low ≤ slope·x + offset < high."""
    if slope == 0:
        return (start, stop) if low <= offset < high else (start, start)
    if slope > 0:
        return max(start, -((offset - low) // slope)), min(stop, -((offset - high) // slope))
    return max(start, (offset - high) // -slope + 1), min(stop, (offset - low) // -slope + 1)


def values(line: Line, x: np.ndarray) -> np.ndarray:
    """The int64 values of a line; a large negative number where the line is not defined."""
    found = np.full(x.shape, _NOWHERE, np.int64)
    for start, stop, slope, offset in line:
        np.copyto(found, slope * x + offset, where=(x >= start) & (x < stop))
    return found


def progressions(line: Line) -> list[tuple[int, int, int]]:
    """The values of a line as arithmetic progressions (start, step, length), each as long as possible.

    Lines with equal values have equal progressions.

    Example:
        >>> progressions((Piece(0, 3, -1, 2), Piece(3, 9, 1, -2)))  # 2 1 0 1 2 3 4 5 6
        [(2, -1, 3), (1, 1, 6)]
    """
    found: list[tuple[int, int, int]] = []
    for start, stop, slope, offset in line:
        value, left = slope * start + offset, stop - start
        while left:
            first, step, length = found[-1] if found else (0, 0, 0)
            if length == 1:
                found[-1] = (first, value - first, 2)
                taken = 1
            elif length and value == first + step * length:
                taken = left if slope == step else 1
                found[-1] = (first, step, length + taken)
            else:
                taken = left
                found.append((value, slope if left > 1 else 0, left))
            value, left = value + slope * taken, left - taken
    return found


class Run(NamedTuple):
    """Valid reads in each line of a table: slope·x + offset for low ≤ x < high; each field has one entry per line."""

    low: np.ndarray
    high: np.ndarray
    slope: np.ndarray | int
    offset: np.ndarray

    def at(self, line: int) -> tuple[int, int, int, int]:
        """(low, high, slope, offset) for one line."""
        slope = self.slope if isinstance(self.slope, int) else int(self.slope[line])
        return int(self.low[line]), int(self.high[line]), slope, int(self.offset[line])


class Reads(Protocol):
    """Any representation of a table of reads, in which −1 means no read."""

    @property
    def shape(self) -> tuple[int, int]:
        """(number of lines, number of positions along a line)."""
        ...

    def transposed(self) -> Reads:
        """The table with lines and positions swapped."""
        ...

    def at(self, lines: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Entries of the table; −1 for positions outside the table."""
        ...

    def runs(self) -> list[Run] | None:
        """Disjoint runs that cover all valid entries; None if the entries cannot be covered by such runs."""
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """T[o,k] = outer(rows(o) + columns(k)), and −1 where one of the three is not defined.

    Args:
        rows: function of the output position.
        columns: function of the kernel position.
        outer: function of their sum; its values are not negative.
        shape: numbers of output and kernel positions.

    Example:
        >>> import lensor
        >>> reading = lensor.IndexPattern(4, 3, padding=1).reading()
        >>> reading.table()
        array([[-1,  0,  1],
               [ 0,  1,  2],
               [ 1,  2,  3],
               [ 2,  3, -1]])
    """

    rows: Line
    columns: Line
    outer: Line
    shape: tuple[int, int]

    def transposed(self) -> Reading:
        """The table with output and kernel positions swapped."""
        return Reading(self.columns, self.rows, self.outer, (self.shape[1], self.shape[0]))

    def at(self, lines: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Entries of the table; −1 for positions outside the table."""
        return np.maximum(values(self.outer, values(self.rows, lines) + values(self.columns, positions)), -1)

    def table(self) -> np.ndarray:
        """All entries, as an int64 array [output_size, kernel_size]."""
        return self.at(np.arange(self.shape[0])[:, None], np.arange(self.shape[1]))

    def runs(self) -> list[Run]:
        """Disjoint runs that cover the valid entries of each line."""
        starts = values(self.rows, np.arange(self.shape[0]))
        found = []
        for start, stop, slope, offset in self.columns:
            bases = starts + offset
            for low, high, outer_slope, outer_offset in self.outer:
                if slope == 0:
                    inside = (bases >= low) & (bases < high)
                    first, last = np.full_like(bases, start), np.where(inside, stop, start)
                elif slope > 0:
                    first, last = -((bases - low) // slope), -((bases - high) // slope)
                else:
                    first, last = (bases - high) // -slope + 1, (bases - low) // -slope + 1
                first = np.clip(first, start, stop)
                last = np.maximum(np.clip(last, start, stop), first)
                if (last > first).any():
                    found.append(Run(first, last, outer_slope * slope, outer_slope * bases + outer_offset))
        return found

    def through(self, outer: Line) -> Reading:
        """The reading outer(T[o,k])."""
        return Reading(self.rows, self.columns, after(outer, self.outer), self.shape)


@dataclass(frozen=True, slots=True)
class Table:
    """A table of reads stored as an array.

    Args:
        reads: int64 array [lines, positions]; −1 means no read.
    """

    reads: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(number of lines, number of positions along a line)."""
        return self.reads.shape[0], self.reads.shape[1]

    def transposed(self) -> Table:
        """The table with lines and positions swapped."""
        return Table(self.reads.T)

    def at(self, lines: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Entries of the table; −1 for positions outside the table."""
        outputs, kernels = self.shape
        inside = (lines >= 0) & (lines < outputs) & (positions >= 0) & (positions < kernels)
        return np.where(inside, self.reads[np.clip(lines, 0, outputs - 1), np.clip(positions, 0, kernels - 1)], -1)

    def runs(self) -> list[Run] | None:
        """A run for each line; None if a line has gaps or unequal steps."""
        valid, count = self.reads >= 0, self.shape[1]
        totals = valid.sum(1)
        if not totals.any():
            return []
        low = np.where(totals, valid.argmax(1), 0)
        every = np.arange(len(low))
        first, second = self.reads[every, low], self.reads[every, np.minimum(low + 1, count - 1)]
        slope = np.where(totals > 1, second - first, 0)
        run = Run(low, low + totals, slope, first - slope * low)
        positions = np.arange(count)
        inside = (positions >= low[:, None]) & (positions < run.high[:, None])
        expected = np.where(inside, slope[:, None] * positions + run.offset[:, None], -1)
        return [run] if np.array_equal(expected, np.maximum(self.reads, -1)) else None


def same(one: Reads, two: Reads) -> bool:
    """Whether two tables have equal entries, determined by comparing them where a run of either table begins or ends.

    Between two such places, each table is affine or empty, so the tables agree there if they agree at both ends.

    Example:
        >>> import lensor
        >>> one, two = lensor.IndexPattern(6, 1, padding=6, padding_mode="circular"), lensor.IndexPattern(6, 1)
        >>> same(one.reading(), two.reading())
        False
    """
    if one.shape != two.shape:
        return False
    if one.shape[0] > one.shape[1]:
        one, two = one.transposed(), two.transposed()
    lines, count = np.arange(one.shape[0]), one.shape[1]
    runs = None if len(lines) * count <= _SMALL else (one.runs(), two.runs())
    if runs is None or runs[0] is None or runs[1] is None:
        places = lines[:, None], np.arange(count)
        return np.array_equal(one.at(*places), two.at(*places))
    for run in (*runs[0], *runs[1]):
        for places in (run.low - 1, run.low, run.high - 1, run.high):
            positions = np.clip(places, 0, count - 1)
            if not np.array_equal(one.at(lines, positions), two.at(lines, positions)):
                return False
    return True


class Steps(NamedTuple):
    """The parameters of an affine table: entry [o,k] is k·dilation + o·stride − left if this is an input position."""

    stride: int
    left: int
    dilation: int


def steps_of(reads: Reads, input_size: int, affine: Callable[[Steps], Reads]) -> Steps | None:
    """The parameters of a table with at least one valid read, or None if it is not affine.

    If the reads do not determine a step (no line contains two reads), a small step that fits is chosen; it is the same
    for all tables with equal entries. Time and memory are at most linear in the longer leg.

    Args:
        reads: the table.
        input_size: number of input positions.
        affine: function that creates the table for given parameters.
    """
    turned = reads.shape[0] > reads.shape[1]
    for across, along, (line, position, value) in _candidates(reads.transposed() if turned else reads, input_size):
        stride, dilation = (along, across) if turned else (across, along)
        o, k = (position, line) if turned else (line, position)
        steps = Steps(stride, k * dilation + o * stride - value, dilation)
        if same(affine(steps), reads):
            return steps
    return None


Read: TypeAlias = tuple[int, int, int]
"""(line, position, value)."""

Candidate: TypeAlias = tuple[int, int, Read]
"""(step between lines, step along lines, a valid read)."""


def _candidates(reads: Reads, input_size: int) -> Iterable[Candidate]:
    """Candidates for the two steps of a table."""
    runs = reads.runs()
    if runs is None:
        return ()
    (lines, positions), total = reads.shape, np.zeros(reads.shape[0], np.int64)
    for run in runs:
        total += run.high - run.low
    along, across = _along(runs, total), _across(runs)
    if along == 0 or across == 0:
        return ()
    valid = np.flatnonzero(total)
    line, position, value = first = next(_reads_in(runs, int(valid[0])))
    if along is not None and across is not None:
        return ((across, along, first),)
    if across is not None:
        turned = _candidates(reads.transposed(), input_size)
        return ((one, two, (position, line, value)) for two, one, (line, position, value) in turned)
    if along is not None:
        if len(valid) > 1:
            line_, position_, value_ = next(_reads_in(runs, int(valid[-1])))
            step, rest = divmod(value_ - value - (position_ - position) * along, line_ - line)
            return ((step, along, first),) if rest == 0 and step > 0 else ()
        # All other lines must read outside the input: later lines beyond its end, earlier lines before its start.
        base = value - position * along
        step = max(1, (line < lines - 1) * (input_size - base), (line > 0) * (base + (positions - 1) * along + 1))
        return ((step, along, first),)
    points = [point for at in valid.tolist() for point in _reads_in(runs, at)]
    if len(points) == 1:
        return ((*_around(first, reads.shape, input_size), first),)
    return _tied(points)


def _reads_in(runs: list[Run], line: int) -> Iterator[Read]:
    """The valid reads of one line, in order."""
    for low, high, slope, offset in sorted(run.at(line) for run in runs):
        for position in range(low, high):
            yield line, position, slope * position + offset


def _along(runs: list[Run], total: np.ndarray) -> int | None:
    """The step along lines: None if no line has two valid reads, 0 if the step is not a positive integer."""
    if not (total > 1).any():
        return None
    reads = _reads_in(runs, int((total > 1).argmax()))
    (_, one, value), (_, two, other) = next(reads), next(reads)
    step, rest = divmod(other - value, two - one)
    return step if rest == 0 and step > 0 else 0


def _across(runs: list[Run]) -> int | None:
    """The step between lines: None if no position has two valid reads, 0 if the step is not a positive integer."""
    columns = []
    for run in runs:
        line = np.flatnonzero(run.high > run.low)
        slope = np.broadcast_to(run.slope, run.low.shape)
        columns.append(np.stack([run.low[line], run.high[line], line, slope[line], run.offset[line]]))
    held = np.concatenate(columns, axis=1)
    held = held[:, np.argsort(held[0], kind="stable")]
    overlaps = np.flatnonzero(held[0, 1:] < np.maximum.accumulate(held[1])[:-1])
    if not len(overlaps):
        return None
    at = int(overlaps[0]) + 1
    position = int(held[0, at])
    lines, slopes, offsets = held[2:, [at, int(held[1, :at].argmax())]].tolist()
    (one, value), (two, other) = sorted(
        (line, slope * position + offset) for line, slope, offset in zip(lines, slopes, offsets, strict=True)
    )
    step, rest = divmod(other - value, two - one)
    return step if rest == 0 and step > 0 else 0


def _around(point: Read, shape: tuple[int, int], input_size: int) -> tuple[int, int]:
    """Steps for which the given read is the only valid one."""
    (line, position, value), (lines, positions) = point, shape
    across = max(1, (line < lines - 1) * (input_size - value), (line > 0) * (value + 1))
    low, high = value - line * across, value + (lines - 1 - line) * across
    along = max(1, (position < positions - 1) * (input_size - low), (position > 0) * (high + 1))
    return across, along


def _tied(points: list[Read]) -> Iterable[Candidate]:
    """Pairs of steps that fit several reads, no two of which are in the same line or at the same position."""
    first, *others = points
    lines, positions, apart = (b - a for a, b in zip(first, others[-1], strict=True))
    for point in others[:-1]:
        line, position, value = (b - a for a, b in zip(first, point, strict=True))
        area = lines * position - positions * line
        if area:
            across, rest = divmod(apart * position - value * positions, area)
            along, other = divmod(lines * value - line * apart, area)
            return ((across, along, first),) if rest == other == 0 < min(across, along) else ()
    return _on_one_line(first, lines, positions, apart)


def _on_one_line(first: Read, lines: int, positions: int, apart: int) -> Iterator[Candidate]:
    """Pairs of steps with lines·across + positions·along = apart, in increasing order of `across`."""
    common, every = math.gcd(lines, positions), abs(positions) // math.gcd(lines, positions)
    if apart % common:
        return
    start = (apart // common * pow(lines // common, -1, every) - 1) % every + 1
    for across in range(start, start + _MOST_TRIES * every, every):
        along = (apart - lines * across) // positions
        if along > 0:
            yield across, along, first
        elif positions > 0:
            return
