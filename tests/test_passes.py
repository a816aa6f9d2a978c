"""Simplification: values stay, flops never rise, any order ends alike, and each case simplifies as far as it can."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensor import ConvSpec, Pattern, ops
from lensor.execute import evaluate_dense
from lensor.lower import STRATEGIES, lower
from lensor.passes.engine import apply_rules
from tests.cases import assert_close, bound, operands_of, random_network

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=250)
@given(SEEDS)
def test_values_stay(seed: int) -> None:
    net = random_network(seed)
    operands = operands_of(net, seed)
    expected = evaluate_dense(net, operands)
    assert_close(evaluate_dense(net.simplify(), operands), expected)
    assert_close(net(**operands), expected)


@settings(max_examples=120)
@given(SEEDS)
def test_flops_never_rise(seed: int) -> None:
    """By every strategy, the simplified network costs at most what the network as it is costs by the best of them."""
    net = random_network(seed)
    plain = min(lower(net, strategy).flops for strategy in STRATEGIES)
    assert min(lower(net.simplify(), strategy).flops for strategy in STRATEGIES) <= plain


@settings(max_examples=150)
@given(SEEDS, st.integers(0, 1000))
def test_any_order_ends_in_the_same_network(seed: int, order: int) -> None:
    for term in random_network(seed).terms:
        assert apply_rules(term, random.Random(order)) == apply_rules(term)


def patterns_left(net: Any) -> list[Pattern]:
    """Patterns that are no selections."""
    nodes = [node for term in net.simplify().terms for node in term.nodes]
    return [node for node in nodes if isinstance(node, Pattern) and not node.pattern.is_selection]


UNSIMPLIFIED_ELSEWHERE = {
    "K1 S2, I odd": ConvSpec(2, 3, 9, 1, stride=2),
    "K1 S2, P1": ConvSpec(2, 3, 8, 1, stride=2, padding=1),
    "K1, D2": ConvSpec(2, 3, 8, 1, dilation=2),
    "K=I, S1": ConvSpec(2, 3, 8, 8),
    "K2 S2, I9": ConvSpec(2, 3, 9, 2, stride=2),
    "K2 S3, I8": ConvSpec(2, 3, 8, 2, stride=3),
}


@pytest.mark.parametrize("case", UNSIMPLIFIED_ELSEWHERE)
@pytest.mark.parametrize("op", ["conv", "weight_vjp", "input_vjp", "kfac_input_factor", "unfold", "fold"])
def test_block_patterns_disappear(case: str, op: str) -> None:
    net = bound(getattr(ops, op)(UNSIMPLIFIED_ELSEWHERE[case]))
    assert not patterns_left(net)
    operands = operands_of(net)
    assert_close(net(**operands), evaluate_dense(net, operands))


def test_overlapping_patterns_stay_one_pattern() -> None:
    """K4 S2 overlaps: the pattern stays, and reduce sums it over positions before anything else."""
    spec = ConvSpec(2, 3, (16, 16), 4, stride=2)
    assert len(patterns_left(ops.conv(spec))) == 2
    plan = next(
        lower(bound(ops.kfac_input_factor(spec, "reduce")).simplify(), strategy)
        for strategy in STRATEGIES
        if strategy.name == "dense"
    )
    constants = [shape for step, shape in zip(plan.steps, plan.shapes, strict=True) if step.name == "pattern"]
    assert constants
    assert all(shape == (16, 4) for shape in constants)


def test_the_trace_names_rule_and_number() -> None:
    trace = ops.conv(ConvSpec(2, 3, (9, 9), 3, stride=3)).simplify().trace
    assert [firing.rule for firing in trace if firing.number == "6"] == ["dense or block pattern into regrouping"] * 2
    assert all(firing.before != firing.after for firing in trace)
    assert "->" in str(trace[0])


def test_simplified_networks_are_kept() -> None:
    net = ops.conv(ConvSpec(2, 3, (9, 9), 3, stride=3))
    assert net.simplify() is net.simplify()
    assert net.simplify().simplify() == net.simplify()
