"""Plans: what they print and predict, wrong operands, memory limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.func import grad

import lensor
from lensor import ConvSpec, ops
from lensor.lowering import STRATEGIES, lower
from tests.support.cases import BUILDERS, SMALL, SPEC, SPECS, assert_close, bound, operands_of, tensors
from tests.support.dense import evaluate_dense


# --------------------------------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize("op", BUILDERS)
def test_plans_print_themselves(op: str) -> None:
    net = bound(BUILDERS[op](SPECS["1-d"]))
    plan = net.plan(**operands_of(net))
    lines = str(plan).splitlines()
    peak = f"peak size {plan.peak_size:,} ({8 * plan.peak_size:,} bytes)"
    assert lines[0] == f"plan: {plan.flops:,} flops, {plan.bytes:,} bytes moved, {peak}, by {plan.name}"
    assert lines[1] == f"  network: {plan.subscripts}"
    assert lines.pop(2) == f"  chosen: {plan.reason}"
    considered = [line for line in lines if line.startswith("  considered: ")]
    assert len(considered) == len(plan.candidates) >= 1
    assert considered[0].startswith(f"  considered: {plan.name}: {plan.flops:,} flops")
    table = lines[2 + len(considered) :]
    assert table[0].split() == ["value", "step", "takes", "shape", "flops", "bytes", "settings"]
    assert len(table) == 1 + len(plan.steps)
    for place, (line, step) in enumerate(zip(table[1:], plan.steps, strict=True)):
        assert line.startswith(f"  %{place} ")
        assert step.name in line
        assert f"{plan.step_flops(place):,}" in line
        assert f"{plan.step_bytes(place):,}" in line
        assert line == line.rstrip()
        assert all(at < place for at in step.takes)
    assert plan.flops == sum(plan.step_flops(place) for place in range(len(plan.steps)))
    assert plan.bytes == sum(plan.step_bytes(place) for place in range(len(plan.steps)))
    assert plan.shape == net.output_shape
    assert set(plan.operands) == set(net.operand_names)


def test_plans_say_why_they_were_chosen() -> None:
    net = ops.conv(SPEC)
    operands = {name: array.shape for name, array in operands_of(bound(net)).items()}
    plan = net.plan(**operands)
    count = len(plan.candidates)
    assert plan.reason == f"the least estimated time of {count} candidates"
    arrays = {name: np.ones(shape) for name, shape in operands.items()}
    assert net.plan(**arrays, effort="measure").reason == f"the least measured time of {count} candidates"
    smallest = min(candidate.peak_size for candidate in plan.candidates)
    assert net.plan(**arrays, max_bytes=8 * smallest).reason.endswith(f"within {8 * smallest:,} bytes")


def test_plans_of_shapes_are_plans_of_arrays() -> None:
    net = ops.conv(SPEC)
    operands = operands_of(bound(net))
    shapes = {name: array.shape for name, array in operands.items()}
    plan = net.plan(**shapes)
    assert_close(plan(**operands), net(**operands))
    assert_close(net.plan(X=operands["X"], W=shapes["W"])(**operands), net(**operands))
    assert net.plan(X=list(shapes["X"]), W=torch.Size(shapes["W"])).steps == plan.steps
    free = lensor.contraction("n i, m -> n m", "X", "1")
    assert free.plan(X=(2, 3), m=4).shape == (2, 4)
    assert free.plan(X=(2, 3), m=np.int64(4)).shape == (2, 4)


def test_flops_of_a_matrix_product() -> None:
    plan = lensor.contraction("n i, i m -> n m", "X", "W").plan(X=(3, 4), W=(4, 5))
    assert plan.flops == 2 * 3 * 4 * 5
    assert plan.peak_size >= 15


ERRORS = [
    (TypeError, "operand 'W' is missing", lambda net, x, w, run: run(X=x)),
    (TypeError, "operand 'Z' is unknown", lambda net, x, w, run: run(X=x, W=w, Z=x)),
    (TypeError, "operand 'X' is missing", lambda net, x, w, run: run(Y=x, W=w)),
    (ValueError, "'i1' has size 7", lambda net, x, w, run: run(X=np.ones((2, 4, 7, 5)), W=w)),
    (ValueError, "X has 3 axes .*expected 4", lambda net, x, w, run: run(X=x[0], W=w)),
    (ValueError, "W has 5 axes", lambda net, x, w, run: run(X=x, W=w[None])),
    (ValueError, r"has size 5 in W|'c_out' .* 5|size 5, expected", lambda net, x, w, run: run(X=x, W=w[:5])),
    (ValueError, "'c_in' is 5, expected 2|'c_in' has size", lambda net, x, w, run: run(X=x, W=w, c_in=5)),
]


@pytest.mark.parametrize(("kind", "message", "call"), ERRORS, ids=[case[1] for case in ERRORS])
def test_wrong_operands(kind: type[Exception], message: str, call: Any) -> None:
    net = ops.conv(SPEC)
    x, w = np.ones((2, 4, 6, 5)), np.ones((6, 2, 3, 2))
    with pytest.raises(kind, match=message):
        call(net, x, w, net)
    with pytest.raises(kind, match=message):
        call(net, x, w, net.plan)


def test_an_unknown_size_is_asked_for() -> None:
    net = ops.conv_input_jacobian(SMALL)
    w = np.ones((2, 1, 3))
    for call in (net, net.plan):
        with pytest.raises(ValueError, match=r"size of index 'n' does not follow .*: give it as a keyword, n=\.\.\."):
            call(W=w)
        with pytest.raises(ValueError, match="'n' is -1, expected at least 0"):
            call(W=w, n=-1)
        with pytest.raises(TypeError):
            call(W=w, n=2.5)
    assert net(W=w, n=2).shape == net.bind(n=2)(W=w).shape == (2, 2, 3, 2, 2, 5)
    assert net(W=w, n=0).shape == (0, 2, 3, 0, 2, 5)


def test_wrong_operands_of_a_plan() -> None:
    net = ops.conv(SPEC)
    operands = operands_of(bound(net))
    x, w = operands["X"], operands["W"]
    plan = net.plan(X=x, W=w)
    with pytest.raises(TypeError, match="operand 'W' is missing"):
        plan(X=x)
    with pytest.raises(TypeError, match="operand 'Z' is unknown"):
        plan(X=x, W=w, Z=x)
    with pytest.raises(ValueError, match=r"operand 'X' has shape \(1, 4, 6, 5\), expected \(2, 4, 6, 5\)"):
        plan(X=x[:1], W=w)
    with pytest.raises(TypeError, match="arrays of numpy and torch, expected one framework"):
        plan(X=x, W=torch.tensor(w))
    with pytest.raises(ValueError, match="effort is 'guess', expected one of 'estimate', 'measure', 'remember'"):
        net.plan(X=x, W=w, effort="guess")
    with pytest.raises(ValueError, match=r"max_bytes is 8, expected at least .* for the smallest plan"):
        net.plan(X=x, W=w, max_bytes=8)
    with pytest.raises(ValueError, match="max_bytes is 0, expected at least 1"):
        net.plan(X=x, W=w, max_bytes=0)


def test_measured_plans_give_the_same() -> None:
    net = ops.conv_weight_vjp(SPEC)
    operands = operands_of(bound(net))
    plan = net.plan(effort="measure", **operands)
    assert plan.candidates[0].measured is not None
    assert "measured" in str(plan)
    assert_close(plan(**operands), evaluate_dense(net, operands))
    with lensor.planning(effort="measure"):
        assert net.plan(**operands) is plan
        assert_close(net(**tensors(operands)), evaluate_dense(net, operands))
        gradient = grad(lambda x: net(X=x, V=torch.tensor(operands["V"])).square().sum())(torch.tensor(operands["X"]))
    assert_close(
        gradient,
        grad(lambda x: net(X=x, V=torch.tensor(operands["V"])).square().sum())(torch.tensor(operands["X"])),
    )


@pytest.mark.parametrize("op", ["kfac_input_factor", "ggn_diagonal"])
def test_plans_within_a_memory_limit(op: str) -> None:
    net = bound(BUILDERS[op](ConvSpec(4, 6, (12,), 3, padding=1)), 6)
    operands = operands_of(net)
    expected = evaluate_dense(net, operands)
    smallest = min(lower(net.simplify(), strategy).peak_size for strategy in STRATEGIES)
    limit = 8 * smallest - 1  # none of the candidates fits: an index is worked through part by part
    assert limit >= expected.nbytes
    plan = net.plan(max_bytes=limit, **operands)
    assert 8 * plan.peak_size <= limit
    assert "parts" in plan.name
    assert_close(plan(**operands), expected)
    assert_close(plan(**tensors(operands)), expected)
