"""Ways without tables: no array has more entries than the operands."""

from __future__ import annotations

import math

import numpy as np
import pytest

import lensor
from lensor import ConvSpec, IndexPattern, lowering, ops
from lensor.pattern import PADDING_MODES
from lensor.plan import steps as s
from lensor.runtime import run
from tests.support.cases import BUILDERS, SPECS, assert_close, bound, operands_of
from tests.support.dense import evaluate_dense


def no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every array made of a pattern were too large."""
    for name in ("state", "alternatives"):
        monkeypatch.setattr(f"lensor.lowering.{name}.largest_table", lambda sizes: 1)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", BUILDERS)
def test_every_operation_without_tables(op: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every pattern were too large an array: the values, and those of the derivatives, stay the same."""
    try:
        net = BUILDERS[op](SPECS[spec])
    except ValueError:
        pytest.skip("not defined for this convolution")
    no_tables(monkeypatch)
    derived = [net.vjp(name, "cotangent") for name in net.operand_names]
    for one in (net, *derived):
        one = bound(one)
        if math.prod(size or 1 for size in one.sizes.values()) > 3e8:
            continue
        simplified, operands = one.simplify(), operands_of(one)
        expected, seen = evaluate_dense(one, operands), set()
        for strategy in lowering.STRATEGIES:
            plan = lowering.lower(simplified, strategy)
            if plan.steps not in seen:
                seen.add(plan.steps)
                assert_close(run(plan, operands), expected)


CONTRACTIONS = {
    "i o, i o k -> k": True,
    "i k, i o k -> o": True,
    "o, i o k -> i": True,
    "k, i o k -> i": True,
    "i, i o k -> k": True,
    "i, i o k -> o": True,
    "k, i o k -> i o": True,
    "o, i o k -> i k": True,
    "b o, i o k -> b i": True,
    "b k c, i o k -> c i b o": True,
    "b i c o, i o k -> b k c": True,
    "i, i o k -> ": True,
    "i o k, i o k -> i": False,
    "i k, i o k -> i o": False,
}
"""Contractions with one pattern, and whether no plan needs a table for them."""


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("subscripts", CONTRACTIONS)
def test_contractions_without_tables(subscripts: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_tables(monkeypatch)
    rng = np.random.default_rng(0)
    for size, kernel, stride, padding, dilation in ((7, 3, 1, 1, 1), (9, 2, 3, (0, 2), 2), (6, 4, 1, (2, 0), 1)):
        pattern = IndexPattern(size, kernel, stride, padding, dilation, mode)
        dense = pattern.materialize().astype(float)
        sizes = dict(zip("iok", dense.shape, strict=True), b=2, c=3)
        first = subscripts.partition(",")[0].split()
        x = rng.standard_normal([sizes[index] for index in first])
        lensor.clear_caches()
        expected = np.einsum(subscripts.replace(" ", ""), x, dense)
        assert_close(lensor.einsum(subscripts, x, pattern), expected)
        net = lensor.contraction(subscripts, "X", pattern, **{index: sizes[index] for index in first})
        for strategy in lowering.STRATEGIES[:2]:
            plan = lowering.lower(net.simplify(), strategy)
            assert_close(run(plan, {"X": x}), expected)
            tables = [step for step in plan.steps if isinstance(step, s.Constant) and len(step.summed) < 2]
            assert not tables or not CONTRACTIONS[subscripts]


def test_dense_plans_are_left_out_where_a_table_would_be_larger_than_the_operands() -> None:
    small, large = (ops.conv(ConvSpec(4, 4, (size,), 3, padding=1)) for size in (100, 1000))
    names = [
        [candidate.name for candidate in net.plan(X=(8, 4, size), W=(4, 4, 3)).candidates]
        for net, size in ((small, 100), (large, 1000))
    ]
    assert "dense" in names[0]
    assert "dense" not in names[1]
