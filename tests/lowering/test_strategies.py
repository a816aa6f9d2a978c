"""Strategies: each gives the same values, and those that do not apply would add no candidate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lensor
from lensor import ConvSpec, IndexPattern, contraction, ops
from lensor.lowering import BY_NAME, FUSED, STRATEGIES, candidates, lower, lower_in_parts
from lensor.lowering.alternatives import fits
from lensor.lowering.assemble import lower_part
from lensor.lowering.slicing import sliceable
from lensor.lowering.state import State, Tensor
from lensor.network import Operand, Pattern, indices_of
from lensor.plan import steps as s
from lensor.plan.program import Program
from lensor.planner import estimate, machine
from lensor.runtime import run
from tests.support.cases import BUILDERS, SPECS, assert_close, bound, operands_of, random_network
from tests.support.dense import evaluate_dense

SEEDS = st.integers(0, 2**32 - 1)
SPEC = ConvSpec(4, 6, (9, 8), 3, stride=2, padding=1, groups=2)


@settings(max_examples=120)
@given(SEEDS)
def test_every_strategy_gives_the_same(seed: int) -> None:
    net = random_network(seed)
    operands = operands_of(net, seed)
    expected = evaluate_dense(net, operands)
    for strategy in STRATEGIES:
        for form in (net, net.simplify()):
            plan = lower(form, strategy)
            assert_close(run(plan, operands), expected)


@pytest.mark.parametrize(("op", "kind"), [("conv", "forward"), ("conv_input_vjp", "input_grad")])
@pytest.mark.parametrize("sizes", [(5,), (5, 3), (4, 2, 3)])
def test_convolutions_with_kernels_of_size_1_read_the_weight_as_it_is(
    op: str, kind: str, sizes: tuple[int, ...]
) -> None:
    net = BUILDERS[op](ConvSpec(4, 6, sizes, 1)).bind({"n": 2})
    plan = lower(net.simplify(), BY_NAME["convolution, undone"])
    assert [step.kind for step in plan.steps if isinstance(step, s.Convolution)] == [kind]
    assert not any(isinstance(step, s.Transpose) for step in plan.steps)
    operands = operands_of(net)
    assert_close(run(plan, operands), evaluate_dense(net, operands))


@pytest.mark.parametrize("op", ["conv", "conv_input_vjp"])
@pytest.mark.parametrize(("batch", "sizes"), [(1, (5, 3)), (1, (5,)), (2, (4, 1, 3)), (2, (1, 1))])
def test_convolutions_with_kernels_of_size_1_and_other_sizes_of_1(op: str, batch: int, sizes: tuple[int, ...]) -> None:
    net = BUILDERS[op](ConvSpec(4, 6, sizes, 1)).bind({"n": batch})
    operands = operands_of(net)
    for strategy in STRATEGIES:
        assert_close(run(lower(net.simplify(), strategy), operands), evaluate_dense(net, operands))


@pytest.mark.parametrize(("channels", "groups"), [((4, 6), 2), ((4, 4), 4), ((4, 1), 1)])
def test_other_convolutions_with_kernels_of_size_1_keep_their_direction(channels: tuple[int, int], groups: int) -> None:
    """Frameworks are slower for input gradients with groups; the order does not matter for one channel."""
    for op in ("conv", "conv_input_vjp"):
        net = BUILDERS[op](ConvSpec(*channels, (5, 3), 1, groups=groups)).bind({"n": 2})
        plan = lower(net.simplify(), BY_NAME["convolution, undone"])
        assert all(step.kind == "forward" for step in plan.steps if isinstance(step, s.Convolution))
        operands = operands_of(net)
        assert_close(run(plan, operands), evaluate_dense(net, operands))


@pytest.mark.parametrize("outputs", [1, 2, 17])
def test_depthwise_gradients_with_several_outputs_per_channel(outputs: int) -> None:
    net = ops.ggn_diagonal(ConvSpec(3, 3 * outputs, (9, 8), 5, stride=(1, 2), padding=2, groups=3)).bind(
        {"n": 2, "v": 3}
    )
    plan = lower(net.simplify(), BY_NAME["convolution, depthwise"])
    (step,) = (step for step in plan.steps if isinstance(step, s.Convolution))
    repeated = 3 * outputs <= 16  # with more copies, the framework's gradient remains
    assert (step.kind, step.groups) == (("forward", 2 * 3 * 3 * outputs) if repeated else ("weight_grad", 2 * 3))
    operands = operands_of(net)
    assert_close(run(plan, operands), evaluate_dense(net, operands))


def require_no_better_plan(net: Any) -> None:
    """A strategy that does not apply is better in no respect than the best of those that do."""
    simplified = net.simplify()
    plans = [lower(simplified, strategy) for strategy in STRATEGIES if strategy.applies(simplified)]
    for strategy in STRATEGIES:
        if not strategy.applies(simplified):
            plan = lower(simplified, strategy)
            assert plan.flops >= min(one.flops for one in plans), strategy.name
            assert plan.peak_size >= min(one.peak_size for one in plans), strategy.name
            assert estimate(plan, machine()) >= min(estimate(one, machine()) for one in plans), strategy.name


@settings(max_examples=120)
@given(SEEDS)
def test_a_strategy_that_does_not_apply_gives_no_better_plan(seed: int) -> None:
    require_no_better_plan(random_network(seed))


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_no_better_plan_for_networks_of_parts(kernel: int, stride: int, dilation: int) -> None:
    """Factorised kernels and slices of gradients, where crops that are applied at the end save the most."""
    spec = ConvSpec(16, 16, (32,), kernel, stride=stride, dilation=dilation)
    factors = lensor.contraction("(g o) r, r c, r k1 -> (g o) c k1", "A", "B", "C", g=1, o=16, r=4)
    require_no_better_plan(bound(ops.conv(spec).substitute("W", factors), 8))
    spec = ConvSpec(2, 3, (32,), kernel, stride=stride, dilation=dilation)
    require_no_better_plan(bound(ops.conv_weight_vjp(spec).narrow("c_in", 0, 1).keep("n"), 8))


def test_every_strategy_has_a_name_of_its_own_and_is_chosen_from() -> None:
    assert len(BY_NAME) == len(STRATEGIES) + len(FUSED)
    net = bound(ops.kfac_input_factor(ConvSpec(4, 6, (9,), 3, padding=1)), 3)
    found = {plan.strategy for plan in candidates(net)}
    assert {"windows", "dense", "lags"} <= found <= {strategy.name for strategy in STRATEGIES}
    fused = {plan.strategy for plan in candidates(net, fused=True)}
    assert {"patterns", "patterns, lags"} <= fused <= set(BY_NAME)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", BUILDERS)
def test_candidates_differ(op: str, spec: str) -> None:
    plans = candidates(bound(BUILDERS[op](SPECS[spec]), 2))
    assert len({plan.steps for plan in plans}) == len(plans)


def test_plain_products_are_lowered_by_few_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered: list[str] = []

    def counted(net: Any, strategy: Any, *known: Any) -> Any:
        lowered.append(strategy.name)
        return lower(net, strategy, *known)

    monkeypatch.setattr("lensor.lowering.alternatives.lower", counted)
    assert candidates(lensor.contraction("i j, j k -> i k", "X", "W").bind({"i": 3, "j": 4, "k": 5}))
    assert lowered == ["windows", "windows, batched", "convolution, undone"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", BUILDERS)
def test_strategies_that_are_skipped_would_give_known_plans(op: str, spec: str) -> None:
    net = bound(BUILDERS[op](SPECS[spec]), 2)
    simplified = net.simplify()
    every = [lower(simplified, strategy) for strategy in STRATEGIES if strategy.applies(simplified)]
    found = {plan.steps for plan in candidates(net, in_parts=False)}
    assert found >= {plan.steps for plan in every if fits(plan)}


def test_a_convolution_is_lowered_by_few_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered: list[str] = []
    monkeypatch.setattr(
        "lensor.lowering.alternatives.lower",
        lambda net, strategy, *known: lowered.append(strategy.name) or lower(net, strategy, *known),
    )
    candidates(bound(ops.conv(ConvSpec(4, 4, (9, 9), 3, padding=1)), 2))
    assert lowered == ["windows", "windows, batched", "windows, tables first", "dense", "convolution"]


def test_parts_of_squares() -> None:
    net = bound(ops.ggn_diagonal(SPEC), 8)
    whole, all_of_them = candidates(net, in_parts=False), candidates(net)
    assert all(plan.parts is None for plan in whole)
    for plan in all_of_them:
        if plan.parts is not None:
            index, count = plan.parts
            assert 1 < count <= net.sizes[index]
            assert plan.strategy in BY_NAME
            assert plan.peak_size < next(one for one in whole if one.strategy == plan.strategy).peak_size
    assert any(plan.parts is not None for plan in all_of_them)


# --------------------------------------------------------------------------------------------------------------- state
def test_a_state_finds_the_holders_of_indices() -> None:
    term = bound(ops.conv(SPEC), 2).terms[0]
    state = State(Program(), term)
    for node in term.nodes:
        if isinstance(node, Pattern):
            state.add_pattern(node)
    first, second = Tensor(0, ("n", "i1")), Tensor(1, ("n", "o1"))
    state.set(tensors=(first, second))
    assert state.tensors_on(["n"]) == [first, second]
    assert state.tensors_on(["i1"]) == [first]
    (pattern,) = state.patterns_on(["i1"])
    assert "i1" in indices_of(pattern)
    assert state.patterns_on(["i1"], pattern) == []
    state.replace(first, Tensor(2, ("n",)))
    assert state.tensors_on(["i1"]) == []
    state.drop(pattern)
    assert state.patterns_on(["i1"]) == []


def test_operands_are_read_once() -> None:
    """Both halves of a Gram matrix read one input step."""
    net = bound(ops.kfac_input_factor(SPEC), 3)
    copies = sum(isinstance(node, Operand) for node in net.terms[0].nodes)
    for plan in candidates(net):
        inputs = [step for step in plan.steps if isinstance(step, s.Input)]
        assert (copies, len(inputs)) == (2, 1)
        assert math.prod(inputs[0].size) == 3 * 4 * 9 * 8


def test_terms_of_a_sum_are_added_in_turn() -> None:
    """The memory of one term is free before the next one is computed, so more terms need no more memory."""
    one, *more = (contraction("n i, n j -> i j", "X", name, n=5, i=30, j=30) for name in "ABCDEFGH")
    few, many = one + more[0] + more[1], sum(more, start=one)
    peaks = [lower(net.simplify(), BY_NAME["windows"]).peak_size for net in (few, many)]
    assert peaks == [2 * 30 * 30, 2 * 30 * 30]
    for net in (few, many):
        operands = {
            name: np.random.default_rng(at).standard_normal((5, 30)) for at, name in enumerate(net.operand_names)
        }
        assert_close(run(lower(net.simplify(), BY_NAME["windows"]), operands), evaluate_dense(net, operands))


def test_lags_need_little_more_memory_than_their_largest_step() -> None:
    net = bound(ops.kfac_input_factor(ConvSpec(16, 16, (12, 12), 3)), 4).simplify()
    plan = lower(net, BY_NAME["lags"])
    assert plan.peak_size < 2 * math.prod(plan.shape)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("op", [ops.ggn_diagonal, ops.kfac_input_factor, ops.conv, ops.conv_input_vjp])
def test_parts_of_an_index_on_operands_are_lowered_once_for_each_length(
    op: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = bound(op(ConvSpec(4, 6, (7, 6), 3, stride=2, padding=1, groups=2, padding_mode=mode)), 7)
    operands, lengths = random_operands(net), []
    expected = evaluate_dense(net, operands)
    monkeypatch.setattr(
        "lensor.lowering.assemble.lower_part",
        lambda parts, strategy, length: lengths.append(length) or lower_part(parts, strategy, length),
    )
    for index, count in ((index, count) for index in sliceable(net) for count in (4, 7)):
        for strategy in STRATEGIES if index == "n" else STRATEGIES[:2]:
            lengths.clear()
            plan = lower_in_parts(net, strategy, index, count)
            assert_close(run(plan, operands), expected)
            assert plan.parts == (index, count)
            if index == "n":
                assert sorted(lengths) == ([1] if count == 7 else [1, 2])


def random_operands(net: Any, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal([net.group_size(leg) for leg in legs]) for name, legs in net.operand_legs.items()}


@pytest.mark.parametrize(
    "subscripts",
    [
        "n c i j, c n o p, i o k, j p l -> c k l",
        "n c i j, n c p o, i o k, j p l -> c k l",
        "n c i j, n c o p, i o k, j p l -> c k l",
    ],
)
def test_an_array_and_its_transpose_are_not_symmetric(subscripts: str) -> None:
    pattern = IndexPattern(7, 3, padding=1)
    net = contraction(subscripts, "X", "X", pattern, pattern, n=6, c=6)
    operands = random_operands(net)
    for strategy in STRATEGIES:
        assert_close(run(lower(net.simplify(), strategy), operands), evaluate_dense(net, operands))


@pytest.mark.parametrize("subscripts", ["o, o, i o k, j o l -> k i j l", "n o, m o, i o k, j o l -> n m k i j l"])
def test_two_patterns_that_spread_one_leg(subscripts: str) -> None:
    pattern = IndexPattern(5, 3)
    net = contraction(subscripts, "Y", "Y", pattern, pattern)
    net = net.bind({index: 2 for index in ("n", "m") if index in net.sizes})
    operands = random_operands(net)
    for strategy in STRATEGIES:
        assert_close(run(lower(net.simplify(), strategy), operands), evaluate_dense(net, operands))


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("kernel", [True, False])
def test_parts_of_an_index_that_a_delta_ties_to_a_pattern(mode: str, kernel: bool) -> None:
    pattern = IndexPattern(12, 2, padding=(0, 1), padding_mode=mode)
    subscripts = "c j, o q, j o k, k, q c -> c" if kernel else "c j, o q, j o k, q c -> c"
    net = contraction(subscripts, "X", "δ", pattern, *["W"] * kernel, "V", c=5).bind(q=12, o=12)
    operands = random_operands(net)
    for count in (2, 3, 4, 6, 12):
        for strategy in STRATEGIES[:2]:
            plan = lower_in_parts(net, strategy, "q", count)
            assert_close(run(plan, operands), evaluate_dense(net, operands))


# ------------------------------------------------------------------------------------------ exchanged weight gradients
SIDES = st.tuples(st.integers(0, 5), st.integers(0, 5))
DIMENSIONS = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 4), SIDES, st.integers(1, 2)), min_size=1, max_size=3)


@settings(max_examples=150)
@given(DIMENSIONS, st.sampled_from([1, 2]), st.integers(1, 2))
def test_weight_gradients_pass_over_the_smaller_of_input_and_output(
    dimensions: list[tuple[int, int, tuple[int, int], int]], stride: int, groups: int
) -> None:
    sizes, kernels, padding, dilation = map(tuple, zip(*dimensions, strict=True))
    fits = [
        d * (k - 1) < size + sum(sides) for size, k, sides, d in zip(sizes, kernels, padding, dilation, strict=True)
    ]
    assume(all(fits))
    hyper: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    spec = ConvSpec(2 * groups, 3 * groups, sizes, kernels, **hyper)
    net = ops.conv_weight_vjp(spec).bind(n=2)
    operands = operands_of(net)
    plan = lower(net, BY_NAME["convolution"])
    assert_close(run(plan, operands), evaluate_dense(net, operands))
    found = [step for step in plan.steps if isinstance(step, s.Convolution) and step.kind == "weight_grad"]
    if found and stride == 1:
        counts = [math.prod(plan.shapes[at][2:]) for at in found[0].takes]
        assert counts[1] <= counts[0]
