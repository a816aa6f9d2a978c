"""Gram matrices of patches by lags: every rewriting has the value of its network."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lensor
from lensor import ConvSpec, IndexPattern, ops
from lensor.lowering import BY_NAME, candidates, lower
from lensor.network import AnyNetwork
from lensor.plan import Plan
from lensor.plan import steps as s
from lensor.runtime import run
from lensor.simplification.lags import has_lags, lags
from tests.support.cases import assert_close, bound, operands_of
from tests.support.dense import evaluate_dense

OPERATIONS = {
    "kfac": ops.kfac_input_factor,
    "kfac, bias": lambda spec: ops.kfac_input_factor(spec, bias=True),
    "gram": ops.ggn_gram,
    "mini-blocks": ops.ggn_mini_blocks,
}


def by_lags(net: AnyNetwork) -> Plan:
    return lower(net.simplify(), BY_NAME["lags"])


@st.composite
def specs(draw: Any) -> ConvSpec:
    ndim = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2]))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "replicate"]))
    try:
        return ConvSpec(
            groups * draw(st.integers(1, 2)),
            groups,
            tuple(draw(st.integers(2, 7)) for _ in range(ndim)),
            tuple(draw(st.integers(1, 4)) for _ in range(ndim)),
            stride=draw(st.sampled_from([1, 1, 2])),
            padding=tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(ndim)),
            dilation=draw(st.sampled_from([1, 2])),
            groups=groups,
            padding_mode=mode,
        )
    except ValueError:
        assume(False)
        raise


@settings(max_examples=150)
@given(specs(), st.sampled_from(list(OPERATIONS)))
def test_values_stay(spec: ConvSpec, op: str) -> None:
    net = bound(OPERATIONS[op](spec), 2)
    operands = operands_of(net)
    assume(np.prod([array.size for array in operands.values()], dtype=float) < 1e9)
    expected = evaluate_dense(net, operands)
    assert_close(evaluate_dense(lags(net.simplify()), operands), expected)
    for arrays in (operands, {name: torch.tensor(array) for name, array in operands.items()}):
        assert_close(np.asarray(run(by_lags(net), arrays)), expected)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("padding", [0, 1, 2, (2, 0), 5])
def test_a_term_for_each_position_that_the_pattern_lacks(kernel: int, dilation: int, padding: Any) -> None:
    pattern = IndexPattern(19, kernel, 1, padding, dilation)
    net = lensor.contraction("n i, i o k, n j, j o l -> k l", "X", pattern, "X", pattern)
    reach = dilation * (kernel - 1)
    left, right = pattern.padding
    lacking = max(reach - left, 0) + max(reach - right, 0)
    assert len(lags(net).terms) == 1 + lacking


def test_two_different_tensors() -> None:
    pattern = IndexPattern(9, 3, padding=1)
    net = lensor.contraction("n i, i o k, n j, j o l -> k l", "X", pattern, "Y", pattern).bind({"n": 2})
    operands = operands_of(net)
    assert has_lags(net)
    assert_close(evaluate_dense(lags(net), operands), evaluate_dense(net, operands))
    assert_close(run(by_lags(net), operands), evaluate_dense(net, operands))
    assert "lags" in {plan.strategy for plan in candidates(net)}


@pytest.mark.parametrize("hyper", [{"stride": 2}, {"kernel_size": 1}])
def test_other_networks_stay(hyper: dict[str, Any]) -> None:
    net = bound(ops.kfac_input_factor(ConvSpec(2, 2, 9, **{"kernel_size": 3, **hyper})), 2).simplify()
    assert not has_lags(net)
    assert lags(net) is net


@pytest.mark.parametrize("groups", [1, 2])
def test_one_weight_gradient_of_half_the_lags(groups: int) -> None:
    """The lags (l − k) of the first axis are taken from 0 on; the others follow by symmetry."""
    plan = by_lags(bound(ops.kfac_input_factor(ConvSpec(8, 8, (12, 11), (3, 5), padding="same", groups=groups)), 3))
    (step,) = [step for step in plan.steps if isinstance(step, s.Convolution)]
    assert (step.kind, step.size) == ("weight_grad", (8, 8 // groups, 3, 9))
    assert not any(isinstance(step, s.Constant) for step in plan.steps)
    # One step writes the whole result; the corrections are added in place where they belong.
    size = math.prod(plan.shape)
    views = (s.Reshape, s.Transpose, s.Window, s.AddAt)
    whole = [step for step, shape in zip(plan.steps, plan.shapes, strict=True) if math.prod(shape) >= size]
    assert [type(step) for step in whole if not isinstance(step, views)] == [s.Flip]
    added = [step for step in plan.steps if isinstance(step, s.AddAt)]
    assert len(added) == 2 + 4
    assert all(step.owned for step in added)


def test_derivatives_of_the_plan() -> None:
    """The gradient through the steps, without the derived network, is that of autograd through patches."""
    net = bound(ops.kfac_input_factor(ConvSpec(2, 2, (6, 5), 3, padding=1)), 2)
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    patches = torch.nn.functional.unfold(x, 3, padding=1).transpose(0, 1).flatten(1)
    weight = torch.randn(18, 18, dtype=torch.float64)
    (expected,) = torch.autograd.grad((patches @ patches.T * weight).sum() / 2, x)
    (found,) = torch.autograd.grad((run(by_lags(net), {"X": x})[0] * weight).sum(), x)
    assert_close(found.numpy(), expected.numpy())
