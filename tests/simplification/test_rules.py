"""Simplification: values stay, flops never rise, any order ends alike, and each case simplifies as far as it can."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensor import ConvSpec, Pattern, ops, parse
from lensor.lowering import STRATEGIES, lower
from lensor.simplification.engine import PHASES, apply_rules
from lensor.simplification.recompose import compose, share
from tests.support.cases import BUILDERS, SPECS, assert_close, bound, operands_of, random_network
from tests.support.dense import evaluate_dense

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
def test_whole_patterns_and_shared_positions_keep_values(seed: int) -> None:
    net = random_network(seed)
    operands = operands_of(net, seed)
    expected = evaluate_dense(net, operands)
    assert_close(evaluate_dense(compose(net.simplify()), operands), expected)
    assert_close(evaluate_dense(share(net.simplify()), operands), expected)


@pytest.mark.parametrize(
    "hyper",
    [
        {"stride": 2, "dilation": 2, "padding": 1},
        {"stride": 3, "padding": 1},
        {"dilation": 4, "padding": 2},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": 1, "stride": 2, "dilation": 2, "padding_mode": "circular"},
    ],
)
def test_a_pattern_taken_apart_is_put_together_again(hyper: dict[str, Any]) -> None:
    net = ops.conv(ConvSpec(2, 3, 11, 3, **hyper))
    (whole,) = [node for node in compose(net.simplify()).nodes if isinstance(node, Pattern)]
    (given_pattern,) = [node for node in net.nodes if isinstance(node, Pattern)]
    assert np.array_equal(whole.pattern.materialize(), given_pattern.pattern.materialize())


def test_one_sided_sub_tensors_of_a_gram_matrix_share_its_halves() -> None:
    """A few rows of ggn_mini_blocks: the Jacobian is computed once, the rows are read from the triangle's matrix."""
    net = bound(ops.ggn_mini_blocks(ConvSpec(4, 6, (7, 6), 3)), 3)
    narrow = net.narrow("c_in", 0, 3)
    assert min(lower(narrow.simplify(), strategy).flops for strategy in STRATEGIES) <= min(
        lower(net.simplify(), strategy).flops for strategy in STRATEGIES
    )


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", BUILDERS)
def test_flops_never_rise(op: str, spec: str) -> None:
    """By the best strategy, the simplified network costs at most what the network as it is costs by its best."""
    net = bound(BUILDERS[op](SPECS[spec]), 3)
    plain = min(lower(net, strategy).flops for strategy in STRATEGIES)
    assert min(lower(net.simplify(), strategy).flops for strategy in STRATEGIES) <= plain


RISES = {41, 138, 157, 237, 419, 429, 477, 572, 645, 657, 763, 781, 785, 802, 818, 830, 835, 883, 910}
"""Random networks below 1,000 that cost more when simplified: see the known gaps in docs/limits.md."""


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_flops_of_random_networks_rise_in_known_cases_only(start: int) -> None:
    risen = set()
    for seed in range(start, start + 100):
        net = random_network(seed)
        plain, simple = (min(lower(one, strategy).flops for strategy in STRATEGIES) for one in (net, net.simplify()))
        if simple > plain:
            risen.add(seed)
    assert risen == {seed for seed in RISES if start <= seed < start + 100}


@settings(max_examples=150)
@given(SEEDS, st.integers(0, 1000))
def test_any_order_ends_in_the_same_network(seed: int, order: int) -> None:
    for term in random_network(seed).terms:
        assert apply_rules(term, random.Random(order)) == apply_rules(term)


def patterns_left(net: Any) -> list[Pattern]:
    """Patterns that are not crops."""
    nodes = [node for term in net.simplify().terms for node in term.nodes]
    return [node for node in nodes if isinstance(node, Pattern) and not node.pattern.is_crop]


UNSIMPLIFIED_ELSEWHERE = {
    "K1 S2, I odd": ConvSpec(2, 3, 9, 1, stride=2),
    "K1 S2, P1": ConvSpec(2, 3, 8, 1, stride=2, padding=1),
    "K1, D2": ConvSpec(2, 3, 8, 1, dilation=2),
    "K=I, S1": ConvSpec(2, 3, 8, 8),
    "K2 S2, I9": ConvSpec(2, 3, 9, 2, stride=2),
    "K2 S3, I8": ConvSpec(2, 3, 8, 2, stride=3),
}


@pytest.mark.parametrize("case", UNSIMPLIFIED_ELSEWHERE)
@pytest.mark.parametrize("op", ["conv", "conv_weight_vjp", "conv_input_vjp", "kfac_input_factor", "unfold", "fold"])
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


# ------------------------------------------------------------------------------------------------------- rule by rule
P = "IndexPattern"
RULE_BY_RULE = [
    # rule, its number, a network, what it becomes
    (
        "index of size 1 squeezed",
        "structural",
        "X[n i] W[(g c) i] δ[g h] 1[m] -> n (g c) h m where n=8, i=4, g=1, c=3, h=1, m=1",
        "X[n i] W[c i] -> n c () () where n=8, i=4, c=3",
    ),
    (
        "delta contracted",
        "structural",
        "X[n a] δ[a b d] W[b c] -> n c d where n=8, a=3, c=4",
        "X[n d] W[d c] -> n c d where n=8, d=3, c=4",
    ),
    (
        "ones dropped",
        "structural",
        "X[n i] 1[i] 1[j] 1[n] 1[m] -> n m where n=8, i=3, j=5, m=2",
        "5 X[n i] 1[m] -> n m where n=8, i=3, m=2",
    ),
    (
        "parallel indices merged",
        "structural",
        "X[n (g c) i] W[g c] V[(c g)] Y[j k l] U[j k] -> n l where n=8, g=2, c=3, i=5, j=2, k=3, l=4",
        "X[n (g c) i] W[g c] V[(c g)] Y[j k l] U[j k] -> n l where n=8, g=2, c=3, i=5, j=2, k=3, l=4",
    ),
    (
        "parallel indices merged",
        "structural",
        "X[n (g c)] W[(g c) o] -> n o where n=8, g=2, c=3, o=5",
        "X[n c] W[c o] -> n o where n=8, c=6, o=5",
    ),
    (
        "irrelevant parameters normalised",
        "7, 8",
        f"X[i] Π1[i o k] -> o k where Π1={P}(8, 1, dilation=2, padding=1)",
        f"X[i] Π1[i o ()] -> o () where Π1={P}(8, 1, padding=1)",
    ),
    (
        "one output position: kernel and output swapped",
        "4, 7",
        f"X[i] Π1[i o k] W[k] -> o where Π1={P}(8, 8, stride=3, padding=1)",
        f"X[i] Π1[i k ()] W[k] -> () where Π1={P}(8, 1, padding=(1, -1))",
    ),
    (
        "one output position: kernel and output swapped",
        "4, 7",
        f"X[i] Π1[i o k] W[k] -> o where Π1={P}(7, 3, dilation=3)",
        f"X[i] Π1[i k ()] W[k] -> () where Π1={P}(7, 1, stride=3)",
    ),
    (
        "one input position: read the other way round",
        "7",
        f"Π1[i o ()] Y[o] -> i where Π1={P}(1, 1, padding=(2, 3))",
        f"Π1[o () ()] Y[o] -> () where Π1={P}(6, 1, padding=(-2, -3))",
    ),
    (
        "one position of a group: one position of each of its indices",
        "7",
        f"Π1[(o k) () ()] Y[k o] -> where Π1={P}(6, 1, padding=(-4, -1)), o=2, k=3",
        f"Π1[o () ()] Π2[k () ()] Y[k o] -> where Π1={P}(2, 1, padding=(-1, 0)), Π2={P}(3, 1, padding=(-1, -1))",
    ),
    (
        "pattern at one position of a leg",
        "8",
        f"X[i] Π1[i o k] Π2[o () ()] -> k where Π1={P}(8, 3, stride=2), Π2={P}(3, 1, padding=(-1, -1))",
        f"X[i] Π1[i k ()] -> k where Π1={P}(8, 1, padding=(-2, -3))",
    ),
    (
        "pattern at one position of a leg",
        "8",
        f"X[i] Π1[i o k] Π2[k () ()] -> o where Π1={P}(9, 3, dilation=2), Π2={P}(3, 1, padding=(-2, 0))",
        f"X[i] Π1[i o ()] -> o where Π1={P}(9, 1, padding=(-4, 0))",
    ),
    (
        "one position of a shared index: one of each holder's own",
        "8",
        f"A[x] B[x] Π1[x () ()] -> where Π1={P}(4, 1, padding=(-1, -2))",
        f"A[x] Π1[x () ()] B[y] Π1[y () ()] -> where Π1={P}(4, 1, padding=(-1, -2))",
    ),
    (
        "identity pattern contracted",
        "1, 7",
        f"X[n i] Π1[i o ()] W[o] -> n o where Π1={P}(8, 1), n=2",
        "X[n o] W[o] -> n o where o=8, n=2",
    ),
    (
        "identity pattern contracted",
        "1, 7",
        f"X[n i] Π1[i o k] W[c k] -> n c o where Π1={P}(8, 8), n=2, c=3",
        "X[n k] W[c k] -> n c () where k=8, n=2, c=3",
    ),
    (
        "crop composed with a pattern",
        "23",
        f"X[i] Π1[i o k] Π2[o p ()] -> p k where Π1={P}(8, 3, padding=1), Π2={P}(8, 1, stride=2)",
        f"X[i] Π1[i p k] -> p k where Π1={P}(8, 3, stride=2, padding=(1, 0))",
    ),
    (
        "crop composed with a pattern",
        "23",
        f"X[i] Π1[i o k] Π2[k l ()] -> o l where Π1={P}(8, 5, padding=1), Π2={P}(5, 1, stride=2, padding=(-1, 0))",
        f"X[i] Π1[i o l] -> o l where Π1={P}(8, 2, dilation=2, output_size=6)",
    ),
    (
        "padding or cropping composed with a pattern",
        "8, 23",
        f"X[i] Π1[i j ()] Π2[j o k] -> o k where Π1={P}(8, 1, padding=(1, 2)), Π2={P}(11, 3, stride=2)",
        f"X[i] Π1[i o k] -> o k where Π1={P}(8, 3, stride=2, padding=(1, 2))",
    ),
    (
        "crop of the input taken into the pattern",
        "8",
        f"Π1[i o k] Y[o k] Π2[i j ()] -> j where Π1={P}(8, 3, padding=1), Π2={P}(8, 1, padding=-2)",
        f"Π1[j o k] Y[o k] -> j where Π1={P}(4, 3, padding=3)",
    ),
    *(
        (
            "two patterns that share two legs",
            "19",
            f"Π1[{one}] Π1[{two}] A[a] B[b] -> {rest} where Π1={P}(8, 3, stride=2, padding=1)",
            f"Π1[{one}] A[a] B[a] -> {rest} where Π1={P}(8, 3, stride=2, padding=1)",
        )
        for one, two, rest in [("i o a", "i o b", "i o"), ("i a k", "i b k", "i k"), ("a o k", "b o k", "o k")]
    ),
    (
        "two patterns that share two legs",
        "19",
        f"Π1[i o k] Π1[i o k] Y[i k] -> o where Π1={P}(8, 3, stride=2)",
        f"Π1[i o k] Y[i k] -> o where Π1={P}(8, 3, stride=2)",
    ),
    (
        "pattern and one position of itself",
        "19",
        f"Π1[i o k] Π2[i o ()] A[k] -> i o where Π1={P}(8, 2), Π2={P}(8, 1, padding=(0, -1))",
        f"Π2[i o ()] A[k] Π3[k () ()] -> i o where Π2={P}(8, 1, padding=(0, -1)), Π3={P}(2, 1, padding=(0, -1))",
    ),
    (
        "leg sum that is constant",
        "16, 17",
        f"Π1[i o k] W[k] -> where Π1={P}(8, 3)",
        "6 W[k] -> where k=3",
    ),
    (
        "leg sum that is constant",
        "16, 17",
        f"Π1[i o k] W[c k] -> c o where Π1={P}(8, 3, stride=2), c=4",
        "1[o] W[c k] -> c o where c=4, k=3, o=3",
    ),
    (
        "crop summed over its input: a mask",
        "16",
        f"Π1[i o ()] V[o] -> where Π1={P}(8, 1, stride=2, padding=1)",
        f"Π1[i o ()] V[o] -> where Π1={P}(4, 1, padding=(1, 0))",
    ),
    (
        "padding mode split from its pattern",
        "modes",
        f"X[i] Π1[i o k] W[k] -> o where Π1={P}(8, 3, stride=2, padding=(1, 2), padding_mode='reflect')",
        f"X[i] Π1[i j ()] Π2[j o k] W[k] -> o where Π1={P}(8, 1, padding=(1, 2), padding_mode='reflect'), "
        f"Π2={P}(11, 3, stride=2)",
    ),
    (
        "common divisor of stride and dilation taken out",
        "11",
        f"X[i] Π1[i o k] W[k] -> o where Π1={P}(9, 3, stride=2, dilation=2, padding=1)",
        # a = (−1) mod 2 = 1: positions 1, 3, 5, 7 are read, with padding (1 + 1)/2 = 1.
        f"X[i] Π1[i j ()] Π2[j o k] W[k] -> o where Π1={P}(9, 1, stride=2, padding=(-1, 0)), "
        f"Π2={P}(4, 3, padding=(1, 1))",
    ),
    (
        "dense or block pattern into regrouping",
        "6",
        f"X[i] Π1[i o k] W[k] -> o where Π1={P}(9, 2, stride=2)",
        f"X[i] Π1[i (o k) ()] W[k] -> o where Π1={P}(9, 1, padding=(0, -1)), o=4, k=2",
    ),
    (
        "dense or block pattern into regrouping",
        "6",
        f"X[i] Π1[i o k] W[k] -> o where Π1={P}(8, 2, stride=3)",
        f"X[i] Π1[i (o s) ()] Π2[s k ()] W[k] -> o where Π1={P}(8, 1, padding=(0, 1)), Π2={P}(3, 1, padding=(0, -1)), "
        "o=3, s=3",
    ),
    (
        "dense or block pattern into regrouping",
        "6",
        f"Π1[i o k] Y[o k] -> i where Π1={P}(10, 3, stride=3, padding=1)",
        f"Π1[i (o k) ()] Y[o k] -> i where Π1={P}(10, 1, padding=(1, 1)), o=4, k=3",
    ),
    (
        "dense or block pattern after the swap into regrouping",
        "4, 6",
        f"X[i] Π1[i o k] W[k] -> o where Π1={P}(9, 3, dilation=3)",
        "X[(k o)] W[k] -> o where k=3, o=3",
    ),
]


@pytest.mark.parametrize(
    ("rule", "number", "before", "after"), RULE_BY_RULE, ids=[f"{case[0]}, {case[2]}" for case in RULE_BY_RULE]
)
def test_rule_by_rule(rule: str, number: str, before: str, after: str) -> None:
    net, expected = parse(before), parse(after)
    simple = net.simplify()
    assert simple == expected
    operands = operands_of(net)
    shapes = {name: array.reshape(operands_of(expected)[name].shape) for name, array in operands.items()}
    assert_close(evaluate_dense(net, operands), evaluate_dense(expected, shapes))
    if before != after:
        assert (rule, number) in [(firing.rule, firing.number) for firing in simple.trace]
    else:
        assert simple.trace == ()


def test_every_rule_has_its_test() -> None:
    rules = {(rule.name, rule.number) for phase in PHASES for rule in phase}
    tested = {case[:2] for case in RULE_BY_RULE}
    assert rules - tested == {("pattern that reads nothing: the network is zero", "8")}


def test_a_pattern_that_reads_nothing() -> None:
    """[7 = 2·o] is never: the scale becomes 0, and only the shapes of operands and result stay."""
    net = parse(f"Π1[i o ()] Y[n o] Π2[i () ()] -> n where Π1={P}(8, 1, stride=2), Π2={P}(8, 1, padding=(-7, 0)), n=3")
    simple = net.simplify()
    assert simple.scale.factor == 0
    assert not [node for node in simple.nodes if isinstance(node, Pattern)]
    assert "pattern that reads nothing: the network is zero" in [firing.rule for firing in simple.trace]
    y = np.ones((3, 4))
    assert_close(net(Y=y), np.zeros(3), 0)
    with pytest.raises(ValueError, match="Y"):
        net(Y=np.ones((3, 5)))


# ----------------------------------------------------------------------------------------------------- known hard ones
def test_a_position_of_a_pattern_whose_partner_shares_its_kernel_in_any_order() -> None:
    """Which of two patterns that share k is taken at its one position first makes no difference."""
    pattern = f"{P}(2, 2, stride=4, padding=3)"
    net = parse(f"X[n o] Π1[i o k] S[v n i] X[n p] Π1[j p k] S[v n j] -> n k where Π1={pattern}, n=2, v=2")
    for seed in range(8):
        assert apply_rules(net, random.Random(seed)) == apply_rules(net)


@pytest.mark.parametrize("dims", [1, 2])
def test_reduce_sums_patterns_over_positions_first(dims: int) -> None:
    """Π is summed over o before it meets X: every constant of the plan is a matrix [I, K], never I×O×K."""
    spec = ConvSpec(2, 3, (12, 10)[:dims], (3, 4)[:dims], stride=(2, 1)[:dims], padding=1, dilation=(1, 2)[:dims])
    net = bound(ops.kfac_input_factor(spec, "reduce"))
    sizes = {(pattern.input_size, pattern.kernel_size) for pattern in spec.patterns}
    for plan in [lower(net.simplify(), strategy) for strategy in STRATEGIES if strategy.name == "dense"]:
        constants = {shape for step, shape in zip(plan.steps, plan.shapes, strict=True) if step.name == "pattern"}
        assert constants == sizes
    chosen = net.plan(**operands_of(net))
    assert all(
        len(shape) == 2 for step, shape in zip(chosen.steps, chosen.shapes, strict=True) if step.name == "pattern"
    )
    assert max(math.prod(shape) for shape in chosen.shapes) <= math.prod(net.output_shape) + 2 * 2 * 12 * 10


def test_input_vjp_of_down_sampling_is_an_embedding() -> None:
    """K1 S2: zero-filling and a matrix product, no pattern besides the crop into the output."""
    net = bound(ops.conv_input_vjp(ConvSpec(2, 3, (9, 8), 1, stride=2))).simplify()
    patterns = [node.pattern for node in net.nodes if isinstance(node, Pattern)]
    assert [(p.input_size, p.output_size, p.stride) for p in patterns] == [(9, 5, 2), (8, 4, 2)]
    plan = net.plan(**operands_of(net))
    assert plan.flops == 2 * 2 * 3 * 2 * 5 * 4
