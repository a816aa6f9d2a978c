"""Reads without tables: piecewise affine functions against tables spelled out, and sums against dense patterns."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from lensor import affine
from lensor.affine import Table, progressions, same, values
from lensor.pattern import PADDING_MODES, IndexPattern
from lensor.simplification.patterns import _picked, read_through
from lensor.simplification.recompose import _composed
from tests.test_pattern import loops, patterns

KEYS = ("padding", "dilation", "stride")


@pytest.fixture(autouse=True, scope="module")
def _no_tables() -> Any:
    """Compare along lines, however small the tables are."""
    before, affine._SMALL = affine._SMALL, 0
    yield
    affine._SMALL = before


def table_of(pattern: IndexPattern) -> np.ndarray:
    """The reads by the definition, −1 for none."""
    dense = loops(pattern)
    return np.where(dense.any(0), dense.argmax(0), -1)


@given(patterns())
def test_a_reading_spells_out_the_table(pattern: IndexPattern) -> None:
    found = pattern.reading()
    expected = table_of(pattern)
    assert np.array_equal(found.table(), expected)
    assert np.array_equal(found.transposed().table(), expected.T)
    if pattern.is_crop:
        outputs = np.arange(pattern.output_size)
        assert np.array_equal(np.maximum(values(pattern.line(), outputs), -1), expected[:, 0])
        valid = np.flatnonzero(expected[:, 0] >= 0)
        assert pattern.span() == ((int(valid[0]), len(valid)) if len(valid) else (0, 0))
        runs = progressions(pattern.line())
        spelled = [start + step * at for start, step, length in runs for at in range(length)]
        assert spelled == expected[valid, 0].tolist()
    else:
        with pytest.raises(ValueError, match="expected 1"):
            pattern.line()


@given(patterns())
def test_runs_hold_all_valid_reads_once(pattern: IndexPattern) -> None:
    for reads in (pattern.reading(), pattern.reading().transposed()):
        found = np.full(reads.shape, -1)
        for run in reads.runs():
            for line in range(reads.shape[0]):
                low, high, slope, offset = run.at(line)
                assert (found[line, low:high] == -1).all()
                found[line, low:high] = slope * np.arange(low, high) + offset
        assert np.array_equal(found, reads.table())


def random_pattern(draw: random.Random, modes: Sequence[str] = PADDING_MODES, **fixed: int) -> IndexPattern:
    """A valid pattern with some of its input size, kernel size and output size given."""
    while True:
        size, kernel = fixed.get("input_size", draw.randint(1, 9)), fixed.get("kernel_size", draw.randint(1, 4))
        outputs = fixed.get("output_size", draw.choice([None, draw.randint(1, 6)]))
        padding = draw.randint(-3, 7), draw.randint(-3, 7)
        if draw.random() < 0.5:
            padding = abs(padding[0]) % 3, abs(padding[1]) % 3
        try:
            stride, dilation, mode = draw.randint(1, 5), draw.randint(1, 4), draw.choice(modes)
            return IndexPattern(size, kernel, stride, padding, dilation, mode, outputs)
        except ValueError:
            continue


@pytest.mark.parametrize("seed", range(4))
def test_tables_are_compared_where_runs_end(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(200):
        one = random_pattern(draw)
        near = {"padding": one.padding, "dilation": one.dilation, "stride": one.stride, draw.choice(KEYS): None}
        two = random_pattern(draw, output_size=one.output_size, kernel_size=one.kernel_size)
        with suppress(ValueError):
            given = {name: value for name, value in near.items() if value is not None}
            two = replace(two, **given) if draw.random() < 0.7 else two
        expected = np.array_equal(table_of(one), table_of(two))
        assert same(one.reading(), two.reading()) == expected
        assert same(one.reading(), Table(table_of(two))) == expected


@given(patterns())
def test_the_pattern_of_a_reading_is_that_of_its_table(pattern: IndexPattern) -> None:
    table = table_of(pattern)
    fitted = pattern.fitted()
    assert fitted == IndexPattern.from_reads(table, pattern.input_size)
    assert pattern.padding_mode != "zeros" or fitted is not None
    if fitted is not None:
        assert fitted.padding_mode == "zeros"
        assert np.array_equal(table_of(fitted), table)
        assert fitted.fitted() == fitted


@pytest.mark.parametrize("seed", range(4))
def test_equal_tables_have_one_pattern(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(40):
        one = random_pattern(draw, modes=("zeros",))
        for left, stride, dilation in itertools.product(range(-4, 9), range(1, 6), range(1, 6)):
            sizes = one.input_size, one.kernel_size
            two = IndexPattern(*sizes, stride, (left, 0), dilation, output_size=one.output_size)
            if np.array_equal(two.reads(), one.reads()):
                assert one.fitted() == two.fitted()


def expect(found: IndexPattern | None, reads: np.ndarray, size: int) -> None:
    """The pattern that was found is the one with these reads, or there is none."""
    assert found == IndexPattern.from_reads(np.ascontiguousarray(reads), size)
    assert found is None or np.array_equal(found.reads(), reads)


@pytest.mark.parametrize("seed", range(4))
def test_composed_reads(seed: int) -> None:
    """Every way in which rules put two patterns together, against tables."""
    draw = random.Random(seed)
    for _ in range(100):
        pattern = random_pattern(draw)
        table = table_of(pattern)
        selection = random_pattern(draw, input_size=pattern.output_size, kernel_size=1)
        at = table_of(selection)[:, 0]
        expect(_picked(pattern, selection, "positions"), np.where(at[:, None] >= 0, table[at], -1), pattern.input_size)
        selection = random_pattern(draw, input_size=pattern.kernel_size, kernel_size=1)
        at = table_of(selection)[:, 0]
        expect(_picked(pattern, selection, "kernel"), np.where(at >= 0, table[:, at], -1), pattern.input_size)
        outer = random_pattern(draw, output_size=pattern.input_size, kernel_size=1)
        through = np.where(table >= 0, table_of(outer)[:, 0][table], -1)
        expect(read_through(outer, pattern), through, outer.input_size)
        whole = _composed(outer, pattern)
        assert whole is None or np.array_equal(whole.reads(), through)


@pytest.mark.parametrize("seed", range(4))
def test_composed_blocks(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        view = random_pattern(draw, kernel_size=1)
        reads = table_of(view)[:, 0]
        size = draw.choice([size for size in range(1, len(reads) + 1) if len(reads) % size == 0])
        selection = random_pattern(draw, input_size=size, kernel_size=1)
        at = table_of(selection)[:, 0]
        blocks = np.where(at[:, None] >= 0, reads.reshape(size, -1)[at], -1)
        expect(_picked(view, selection, "blocks"), blocks, view.input_size)
        within = np.where(at >= 0, reads.reshape(-1, size)[:, at], -1)
        expect(_picked(view, selection, "within"), within, view.input_size)


@given(patterns())
def test_sums_over_any_legs(pattern: IndexPattern) -> None:
    dense = loops(pattern).astype(int)
    for count in range(4):
        for legs in itertools.combinations(range(3), count):
            expected = dense.sum(axis=legs)
            found = pattern.summed(legs)
            assert found.shape == expected.shape
            assert np.array_equal(found, expected)
            if count:
                value = int(expected.flat[0])
                is_constant = value > 0 and (expected == value).all()
                assert pattern.constant_sum(legs) == (value if is_constant else None)
    assert pattern.constant_sum(()) is None
    assert pattern.reads_everywhere == bool((dense.sum(0) > 0).all())


@given(patterns(modes=("zeros",)))
def test_columns_are_equal_where_reads_are(pattern: IndexPattern) -> None:
    keys, columns = pattern.columns(), table_of(pattern).T.tolist()
    for one, two in itertools.product(range(len(keys)), repeat=2):
        assert (keys[one] == keys[two]) == (columns[one] == columns[two])


@pytest.mark.parametrize("mode", PADDING_MODES)
def test_long_patterns_take_neither_time_nor_memory(mode: str) -> None:
    pattern = IndexPattern(10**6, 1001, padding=500, padding_mode=mode)  # 10⁹ reads
    tracemalloc.start()
    assert (pattern.fitted() is not None) == (mode == "zeros")
    assert pattern.constant_sum((1,)) == {"circular": 1}.get(mode)
    assert pattern.constant_sum((0,)) == (None if mode == "zeros" else 1)
    assert not pattern.is_zero
    assert int(pattern.summed((1, 2)).sum()) == pattern.nnz
    assert tracemalloc.get_traced_memory()[1] < 150e6
    tracemalloc.stop()
