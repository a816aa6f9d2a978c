"""Launches of the kernel for pattern products: its tables, its grid, and its settings for a device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from triton import knobs

from lensor.cache import Cache
from lensor.kernels import reading
from lensor.kernels.torch.tensors import allows_tf32
from lensor.kernels.torch.triton.kernels import pattern_product
from lensor.kernels.torch.triton.tiles import INTERPRETED, Side, Tile, fitting, tiles_for
from lensor.plan import steps as s
from lensor.plan.steps.patterns import MOST_SPLITS, WORKSPACE

IS_INTERPRETED = bool(knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels, on tensors of any device."""

_kernel: Any = pattern_product  # its arguments are not those of a function

_WAVES = 2
"""A sum is split among programs if there are fewer tiles than this many for each multiprocessor."""

_LEAST_SUMS = 4
"""Each program that shares a sum takes at least this many steps of the loop."""

MOST_ADDED = 64 * 64
"""Larger tiles are stored and added later, since adding them atomically needs too many registers."""

_MOST_LAUNCHES = 8
"""A launcher keeps the tables for at most this many kinds of operands, such as memory orders."""

_MOST_TRIED = 4
"""At most this many tiles are timed."""

_tuned = Cache(maxsize=1024)
"""The fastest tile for each step and setting for which tiles were timed."""

_is_tuning: ContextVar[bool] = ContextVar("lensor.tuning", default=False)


@contextmanager
def tuning() -> Iterator[None]:
    """Let each launch inside the `with` block time its tiles once and keep the fastest."""
    token = _is_tuning.set(True)
    try:
        yield
    finally:
        _is_tuning.reset(token)


class Setting(NamedTuple):
    """What a launch depends on besides the step: operands and global settings of torch."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_tf32: bool
    is_deterministic: bool

    @staticmethod
    def of(left: torch.Tensor, right: torch.Tensor) -> Setting:
        is_tf32 = left.dtype is torch.float32 and allows_tf32()
        deterministic = torch.are_deterministic_algorithms_enabled()
        return Setting(left.stride(), right.stride(), left.dtype, left.device, is_tf32, deterministic)


class Launcher:
    """Runs a pattern product with Triton; tables are made for the first call with each kind of operands.

    Raises:
        ValueError: if rows or columns are squared, but not both.

    Args:
        step: the step.
        tile: settings of the kernel; by default, chosen by the size of the product.
        splits: the number of programs that share a sum; by default, enough to use the device.
    """

    def __init__(self, step: s.PatternProduct, tile: Tile | None = None, splits: int | None = None) -> None:
        squared = {*step.rows, *step.columns} & {*step.squared}
        if squared and squared != {*step.rows, *step.columns}:
            raise ValueError(f"indices {sorted(squared)} of rows and columns are squared, expected all of them or none")
        self.step, self.tile, self.splits = step, tile, splits
        self._launches: dict[Setting, _Launch] = {}

    def __call__(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        setting = Setting.of(left, right)
        launch = self._launches.get(setting)
        if launch is None or _is_tuning.get():
            while len(self._launches) >= _MOST_LAUNCHES:
                self._launches.pop(next(iter(self._launches)), None)
            launch = self._launches[setting] = self._made(setting, left, right)
        return launch(left, right)

    def _made(self, setting: Setting, left: torch.Tensor, right: torch.Tensor) -> _Launch:
        takes = (0, int(self.step.takes[0] != self.step.takes[1]))  # a Gram matrix needs other tiles
        key = (replace(self.step, takes=takes, factor=Fraction(1)), setting)
        tile = self.tile or _tuned.get(key)
        if tile is not None:
            return _Launch(_Tables(self.step, setting, tile), tile, self.splits)
        tiles = _tiles(self.step, setting)[: _MOST_TRIED if _is_tuning.get() else 1]
        found = [_Launch(_Tables(self.step, setting, tile), tile, self.splits) for tile in tiles]
        if not _is_tuning.get():
            return found[0]
        fastest = min(found, key=lambda launch: _seconds(launch, left, right))
        _tuned.put(key, fastest.tile)
        return fastest


def _tiles(step: s.PatternProduct, setting: Setting) -> list[Tile]:
    """The tiles for a step on a device, the one with the least estimated time first."""
    if setting.device.type != "cuda":
        tiles = INTERPRETED
    else:
        is_exact = setting.dtype is torch.float32 and not setting.is_tf32
        tiles = tiles_for(torch.cuda.get_device_capability(setting.device), is_exact)
    rows = _side(step, step.rows, step.left, setting.left)
    columns = _side(step, step.columns, step.right, setting.right)
    return fitting(tiles, rows, columns, is_gram=step.is_gram, is_square=bool(step.squared))


def _side(step: s.PatternProduct, group: s.Shape, axes: Sequence[s.Axis], strides: Sequence[int]) -> Side:
    """The rows or columns of a step, as a side of tiles."""
    checked, plain = _divided(step, group, axes)
    checks = sum(_is_checked(axis, step.sizes) for axis in axes)
    apart = _distances(axes, strides)

    def least(indices: s.Shape) -> float:
        return min((apart.get(index, math.inf) for index in indices if step.sizes[index] > 1), default=math.inf)

    has_tables = any(axis.outer is not None and len(axis.outer) > 1 for axis in axes) or checks > reading.MOST_CHECKED
    return Side(step.size(checked), step.size(plain), checks, least(plain) < least(step.summed), has_tables)


def _is_checked(axis: s.Axis, sizes: s.Shape) -> bool:
    return axis.outer is not None or not axis.is_full(sizes)


def _divided(step: s.PatternProduct, group: s.Shape, axes: Sequence[s.Axis]) -> tuple[s.Shape, s.Shape]:
    """The indices of a group on checked axes, and the others."""
    on_checked = {index for axis in axes if _is_checked(axis, step.sizes) for index, _ in axis.terms}
    checked = tuple([index for index in group if index in on_checked])
    return checked, tuple([index for index in group if index not in on_checked])


def _seconds(launch: _Launch, left: torch.Tensor, right: torch.Tensor, repeats: int = 5) -> float:
    """The shortest time of a launch, by events on the device."""
    launch(left, right)
    if left.device.type != "cuda":
        return 0.0  # the time of an interpreter says nothing
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        launch(left, right)
        event.record()
    events[-1].synchronize()
    return min(one.elapsed_time(two) for one, two in itertools.pairwise(events))


class _Tables:
    """The tables of a step for operands with given strides, on their device."""

    def __init__(self, step: s.PatternProduct, setting: Setting, tile: Tile) -> None:
        self.step, self.setting = step, setting
        sizes = step.sizes
        kept = reading.kept_batch(step)
        self.batch = (*kept, *(index for index in step.batch if index not in kept))
        apart = [
            _distances(axes, strides) for axes, strides in ((step.left, setting.left), (step.right, setting.right))
        ]
        rows = _side(step, step.rows, step.left, setting.left)
        columns = _side(step, step.columns, step.right, setting.right)
        self.is_uniform = [rows.is_uniform(tile.rows), columns.is_uniform(tile.columns)]
        order_r = _ordered(_divided(step, step.rows, step.left), apart[0], self.is_uniform[0])
        order_c = _ordered(_divided(step, step.columns, step.right), apart[1], self.is_uniform[1])
        if step.is_gram:
            pairs = dict(zip(step.rows, step.columns, strict=True))
            order_c = tuple([pairs[index] for index in order_r])
        plain, inner = _summed(step, apart[0])
        left = reading.reads_for(step.left, setting.left, sizes, (self.batch, order_r, plain, inner))
        right = reading.reads_for(step.right, setting.right, sizes, (self.batch, order_c, plain, inner))
        out = reading.outputs_for(step, kept, order_r, order_c)
        for at, (side, length, reads) in enumerate(((rows, tile.rows, left), (columns, tile.columns, right))):
            if self.is_uniform[at] and side.checks:
                reads.groups[1] = reads.groups[1].padded(side.groups, side.padded(length) // side.groups)
                out[1 + at] = reading.padded(out[1 + at], side.groups, side.padded(length) // side.groups, -1)
        self.sizes = [step.size(kept), len(out[1]), len(out[2]), step.size(plain), step.size(inner)]
        self.squared = step.size(self.batch) // max(self.sizes[0], 1)
        self.shape = step.shape(())
        self.length = math.prod(self.shape)
        self.by_rows = [rows.is_by_rows, columns.is_by_rows]
        self.modes = [_modes(one) for one in (left, right)]
        is_wide = max(_last(left), _last(right), WORKSPACE, self.length) >= 1 << 31
        self._dtype = np.int64 if is_wide else np.int32
        self.left, self.right = ([self._on_device(group.table()) for group in one.groups] for one in (left, right))
        self._kept = out[0]
        self.out = [self._on_device(one) for one in out]
        self.checked = [
            self._on_device(np.zeros(1, np.int64) if check.table is None else check.table)
            for one in (left, right)
            for check in _filled(one.checks)
        ]
        self.lengths = [check.size for one in (left, right) for check in _filled(one.checks)]

    def _on_device(self, table: np.ndarray) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.from_numpy(np.ascontiguousarray(table, self._dtype)).to(self.setting.device)

    def partial_out(self, tiles: int) -> torch.Tensor:
        """Offsets of kept b in an array with one entry for each of them and each tile."""
        return self._on_device(self._kept * tiles)


def _ordered(divided: tuple[s.Shape, s.Shape], apart: dict[int, int], is_uniform: bool) -> s.Shape:
    """The indices of a group, those whose positions are close in memory last; the checked ones first if uniform."""
    checked, plain = divided
    if is_uniform:
        return (*_by_distance(checked, apart), *_by_distance(plain, apart))
    return _by_distance((*checked, *plain), apart)


def _filled(checks: Sequence[reading.Check]) -> list[reading.Check]:
    return [*checks, *[reading.Check(0, None)] * (reading.MOST_CHECKED - len(checks))]


def _modes(reads: reading.OperandTables) -> list[int]:
    """For each checked axis, 1 if its coordinates are only compared with its size, 2 if it has a table; 0: none."""
    found = [1 if check.table is None else 2 for check in reads.checks]
    return found + [0] * (reading.MOST_CHECKED - len(found))


def _distances(axes: Sequence[s.Axis], strides: Sequence[int]) -> dict[int, int]:
    """For each index, about how far apart in memory its positions are."""
    found: dict[int, int] = {}
    for axis, stride in zip(axes, strides, strict=True):
        for index, line in axis.terms:
            slope = max((abs(piece.slope) for piece in line), default=0)
            found[index] = found.get(index, 0) + stride * slope
    return found


def _by_distance(group: s.Shape, apart: dict[int, int]) -> s.Shape:
    """The indices of a group, those whose positions are close in memory last."""
    return tuple(sorted(group, key=lambda index: -apart.get(index, 0)))


def _summed(step: s.PatternProduct, apart: dict[int, int]) -> tuple[s.Shape, s.Shape]:
    """The summed indices, as those that need no checks, and the others; both parts have at least one index, if any."""
    checked = {*_divided(step, step.summed, step.left)[0], *_divided(step, step.summed, step.right)[0]}
    every = _by_distance(step.summed, apart)
    inner = tuple([index for index in every if index in checked]) or every[-1:]
    return tuple([index for index in every if index not in inner]), inner


def _last(reads: reading.OperandTables) -> int:
    """About the largest offset of an operand."""
    tables = sum(int(check.table.max(initial=0)) for check in reads.checks if check.table is not None)
    return tables + sum(int(np.abs(group.offsets).max(initial=0)) for group in reads.groups)


class _Launch:
    """A launch for tensors of one kind: everything that the kernel needs except the tensors."""

    def __init__(self, tables: _Tables, tile: Tile, splits: int | None) -> None:
        step, setting = tables.step, tables.setting
        if step.is_gram and tile.rows != tile.columns:
            raise ValueError(
                f"a tile of a Gram matrix has {tile.rows} rows and {tile.columns} columns, expected equal numbers"
            )
        self.tables, self.tile = tables, tile
        batch, rows, columns, plain, inner = tables.sizes
        down, across = -(-rows // tile.rows), -(-columns // tile.columns)
        self.tiles = down * (down + 1) // 2 if step.is_gram else down * across
        is_square = bool(step.squared)
        self.is_reduced = is_square and not ({*step.rows, *step.columns} & {*step.order})
        steps = tables.squared if is_square else -(-plain * inner // tile.sums)
        if splits is None:
            splits = _splits(setting.device, batch * self.tiles, steps if is_square else steps // _LEAST_SUMS)
            each = tables.length * (self.tiles if self.is_reduced else 1)
            splits = max(min(splits, WORKSPACE // max(each, 1) + 1), 1)
        self.splits = max(min(splits, steps), 1)
        self.is_partial = self.splits > 1 or (self.is_reduced and self.tiles > 1)
        may_add = setting.dtype is torch.float32 and not setting.is_deterministic
        self.is_atomic = self.is_partial and may_add and tile.rows * tile.columns <= MOST_ADDED
        self.is_empty = 0 in tables.sizes or not self.tiles
        self.grid = (batch * self.tiles * self.splits,)
        if max(*self.grid, batch * tables.squared, plain * inner + tile.sums) >= 1 << 31:
            raise reading.TooLarge("the product has more than 2³¹ programs, batch positions or terms of a sum")
        self.entries = self.tiles if self.is_reduced else 1  # results of a split, for each entry of the result
        out = [tables.partial_out(self.entries), *tables.out[1:]] if self.is_partial else tables.out
        if self.is_atomic:
            out = tables.out
        self.arguments = (
            *tables.left,
            *tables.right,
            *out,
            *tables.checked,
            *tables.lengths,
            *(batch, tables.squared, rows, columns, plain, inner),
            *(across, self.tiles, self.splits, tables.length * self.entries, float(step.factor)),
        )
        is_narrow = setting.dtype is not torch.float32
        self._is_new = True
        self.options: dict[str, Any] = {
            "LEFT_CHECKS": sum(mode > 0 for mode in tables.modes[0]),
            "RIGHT_CHECKS": sum(mode > 0 for mode in tables.modes[1]),
            **{
                f"{side}_MODE{at}": mode
                for side, modes in zip(("LEFT", "RIGHT"), tables.modes, strict=True)
                for at, mode in enumerate(modes)
            },
            "LEFT_UNIFORM": tables.is_uniform[0],
            "RIGHT_UNIFORM": tables.is_uniform[1],
            "LEFT_BY_ROWS": tables.by_rows[0],
            "RIGHT_BY_ROWS": tables.by_rows[1],
            "SQUARE": is_square,
            "REDUCE": self.is_reduced,
            "GRAM": step.is_gram,
            "ATOMIC": self.is_atomic,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "SUMS": tile.sums,
            "STAGES": tile.stages,
            "PRECISION": "tf32" if setting.is_tf32 else "ieee",
            "WIDEN": is_narrow and IS_INTERPRETED,
            "num_warps": tile.warps,
        }

    def __call__(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        shape, dtype = self.tables.shape, left.dtype
        if self.is_empty:
            return left.new_zeros(shape)
        out, compiled = self._launched(left, right)
        if self._is_new:
            self._is_new = False
            for limit in limits(getattr(compiled, "n_regs", 0)):
                if not getattr(compiled, "n_spills", 0):
                    break
                self.options["maxnreg"] = limit
                out, compiled = self._launched(left, right)
        return out if self.is_atomic or not self.is_partial else out.sum((0, 2)).to(dtype).reshape(shape)

    def _launched(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Launch the kernel: the array with its results or parts of them, and the compiled kernel."""
        if self.is_atomic:
            out = left.new_zeros(self.tables.shape)
        elif self.is_partial:
            out = left.new_empty((self.splits, self.tables.length, self.entries), dtype=torch.float32)
        else:
            out = left.new_empty(self.tables.shape)
        if left.device.type == "cuda" and left.device.index != torch.cuda.current_device():
            with torch.cuda.device(left.device):
                return out, _kernel[self.grid](left, right, out, *self.arguments, **self.options)
        return out, _kernel[self.grid](left, right, out, *self.arguments, **self.options)


def limits(registers: int) -> tuple[int, ...]:
    """The limits with which to compile a kernel again that spills some of its registers, one after the other.

    NVIDIA's assembler then fits one more block into a multiprocessor and misses by a few bytes. If it is told to use as
    many registers as it has chosen, or a few more, it spills less, mostly nothing.
    """
    return registers, registers + 16


def _splits(device: torch.device, programs: int, most: int) -> int:
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(min(-(-_WAVES * processors // max(programs, 1)), most, MOST_SPLITS), 1)
