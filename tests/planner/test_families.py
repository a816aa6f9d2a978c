"""Families: plans for other sizes of open indices are right, and do not depend on what was planned before."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lensor
from lensor import ConvSpec, IndexPattern, contraction, ops
from lensor.cache import weigh
from lensor.evaluate import _weigh_plan
from lensor.lowering import BY_NAME, candidates, lower, lower_in_parts
from lensor.network import Delta, Network, Pattern, indices_of
from lensor.plan.resizable import resizable
from lensor.planner import families, machine
from lensor.planner.families import Family, Target, equal_sizes, family_of
from lensor.runtime import run
from tests.support.cases import BUILDERS, DRAWN, SPECS, assert_close, operands_of
from tests.support.dense import evaluate_dense
from tests.support.strategies import random_spec
from tests.transforms.test_names import draw_network, draw_sizes

SPEC = ConvSpec(4, 6, (9, 8), 3, stride=2, padding=1, groups=2)


def open_indices(net: Any) -> list[str]:
    return [index for index, size in net.sizes.items() if size is None]


def random_open_network(seed: int) -> Any:
    """A random operation on a random spec, with random access to indices of known size; the batch sizes are open."""
    rng, choose = np.random.default_rng(seed), random.Random(seed)
    net = BUILDERS[choose.choice(DRAWN)](lensor.ConvSpec(**random_spec(rng, max_ndim=2)))
    for _ in range(choose.choice([0, 0, 1])):
        known = sorted(index for index in net.output_indices if net.sizes[index] is not None)
        if known:
            index = choose.choice(known)
            start = choose.randrange(net.sizes[index])
            net = net.slice(index, start, choose.randint(start + 1, net.sizes[index]), choose.randint(1, 2))
    return net


def no_plan(sizes: Any) -> Any:
    raise AssertionError("estimates are known")


TARGET = Target(None, (), machine())


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(4, 9), min_size=2, max_size=2))
def test_every_candidate_of_a_family_gives_the_value_by_definition(seed: int, drawn: list[int]) -> None:
    net = random_open_network(seed)
    equal = equal_sizes(net)
    assert equal is not None
    firsts = dict(zip(dict.fromkeys(equal.values()), drawn, strict=False))
    sizes = {index: firsts[first] for index, first in equal.items()}
    family = family_of(net, sizes, TARGET)
    if not sizes:
        assert family is None
        return
    assert family is not None
    bound = net.bind(sizes)
    operands = operands_of(bound, seed)
    expected = evaluate_dense(bound, operands)
    for member in family.members:
        plan = member.at(sizes)
        assert_close(run(plan, operands), expected)
        assert all(
            step.shape([plan.shapes[at] for at in step.takes]) == shape
            for step, shape in zip(plan.steps, plan.shapes, strict=True)
        )


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", ["conv", "kfac_input_factor", "conv_weight_vjp", "conv_weight_vjp_per_example"])
def test_a_resized_plan_has_the_steps_of_a_lowered_one(op: str, spec: str) -> None:
    net = BUILDERS[op](SPECS[spec])
    (index,) = open_indices(net)
    for plan in candidates(net.bind({index: 101}), in_parts=False):
        form = resizable(plan, {index: 101})
        assert form is not None
        found = form.at({index: 97})
        expected = lower(net.bind({index: 97}).simplify(), BY_NAME[plan.strategy])
        assert (found.steps, found.shapes) == (expected.steps, expected.shapes)


def test_a_plan_does_not_depend_on_what_was_planned_before() -> None:
    net = ops.kfac_input_factor(SPEC)
    shape = {"X": (13, 4, 9, 8)}
    lensor.clear_caches()
    first = net.plan(**shape)
    for others in ((8,), (16, 9), (15, 14, 100, 3)):
        lensor.clear_caches()
        for batch in others:
            net.plan(X=(batch, 4, 9, 8))
        again = net.plan(**shape)
        assert (again.steps, again.shapes, again.name) == (first.steps, first.shapes, first.name)
        assert [*again.candidates] == [*first.candidates]
        assert again.subscripts == first.subscripts


def test_another_batch_size_is_not_lowered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    whole = families.whole
    monkeypatch.setattr(
        families, "whole", lambda net, *known, **which: calls.append(net) or whole(net, *known, **which)
    )
    lensor.clear_caches()
    net = ops.kfac_input_factor(SPEC, "reduce")
    for batch in range(8, 16):
        plan = net.plan(X=(batch, 4, 9, 8))
        assert plan.subscripts == to_be(net, batch)
    assert len(calls) == 1
    net.plan(X=(16, 4, 9, 8))
    assert len(calls) == 2


def to_be(net: Any, batch: int) -> str:
    return str(net.bind({"n": batch}).simplify()).split(" where ")[0]


def test_candidates_in_parts_are_lowered_only_if_they_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = []
    divided = families.divided
    monkeypatch.setattr(families, "divided", lambda parts, name: lowered.append(name) or divided(parts, name))
    lensor.clear_caches()
    net = ops.ggn_diagonal(ConvSpec(64, 64, (28, 28), 3, padding=1))
    plan = net.plan(X=(8, 64, 28, 28), S=(4, 8, 64, 28, 28))
    assert lowered == [plan.strategy] * (plan.parts is not None)
    family = family_of(net, {"n": 8, "v": 4}, TARGET)
    assert family is not None
    estimates = family.estimates({"n": 8, "v": 4}, TARGET)
    in_parts = [
        (member, seconds)
        for member, seconds in zip(family.members, estimates, strict=True)
        if not isinstance(member, families._Whole)
    ]
    assert in_parts
    for member, seconds in in_parts:
        assert seconds == pytest.approx(TARGET.estimate(member.at({"n": 8, "v": 4})), rel=0.25)


SQUARES = {
    "sum": contraction("n i -> i", "X") + contraction("n i, n i -> i", "X", "Y").scaled(2),
    "mean": contraction("n i, n i -> i", "X", "X").scaled("3/2", {"n": -1}),
    "shared leg": contraction("(n a) i, n i -> i a", "X", "Y", a=3),
    "diagonal": contraction("n n i, n i -> i", "X", "Y"),
    "last in a leg": contraction("(a n) i, n i -> i a", "X", "Y", a=3),
}


@pytest.mark.parametrize("name", SQUARES)
def test_parts_with_the_steps_of_the_whole(name: str) -> None:
    """The divided index may be averaged, share a leg with others, or be in several terms."""
    net = SQUARES[name].bind(i=4)
    one = in_parts(net)
    for sizes in ({"n": 9}, {"n": 15}, {"n": 12}, {"n": 8}, {"n": 41}):
        operands = operands_of(net.bind(sizes))
        expected = evaluate_dense(net.bind(sizes), operands)
        plan = one.at(sizes)
        assert_close(run(plan, operands), expected)
        assert (plan.steps, plan.shapes) == ((fresh := in_parts(net).at(sizes)).steps, fresh.shapes)


LEGS = st.sampled_from(["n i", "i n", "(n a) i", "(a n) i", "n n i"])


@settings(max_examples=60)
@given(
    st.lists(st.lists(LEGS, min_size=1, max_size=3), min_size=1, max_size=2),
    st.integers(-2, 1),
    st.lists(st.integers(8, 40), min_size=2, max_size=4),
)
def test_parts_do_not_depend_on_the_sizes_before(terms: list[list[str]], power: int, batches: list[int]) -> None:
    nets = [
        contraction(f"{', '.join(legs)} -> i", *(f"{'XY'[at]}{leg}" for leg in range(len(legs))), i=3).scaled(
            1, {"n": power}
        )
        for at, legs in enumerate(terms)
    ]
    net = sum(nets[1:], start=nets[0])
    net = net.bind({index: 2 for index in open_indices(net) if index != "n"})
    one = in_parts(net)
    for batch in batches:
        plan, fresh = one.at({"n": batch}), in_parts(net).at({"n": batch})
        assert (plan.steps, plan.shapes, plan.subscripts) == (fresh.steps, fresh.shapes, fresh.subscripts)
        operands = operands_of(net.bind({"n": batch}))
        assert_close(run(plan, operands), evaluate_dense(net.bind({"n": batch}), operands))


def in_parts(net: Any) -> families._InParts:
    """A candidate in parts of the open index n."""
    opened, marks = families._Open(net, {"n": "n"}), next(families._marks(net, {"n": 8}))
    marked = opened.bind(marks)
    whole = families._whole(opened, lower(marked.simplify(), BY_NAME["windows"]), marks, [])
    assert whole.form is not None
    return families._InParts(whole, families._Parts(opened, marked, {"n": 15}), "windows")


def test_the_first_parts_of_a_plan_are_the_plan_for_a_shorter_index(monkeypatch: pytest.MonkeyPatch) -> None:
    net = ops.ggn_diagonal(SPEC).bind({"v": 4})
    one, built = in_parts(net), []
    joined = families.joined
    monkeypatch.setattr(families, "joined", lambda parts, plans: built.append(parts.count) or joined(parts, plans))
    for batch in (9, 12, 14, 8, 11):
        found, expected = one.at({"n": batch}), in_parts(net).at({"n": batch})
        for plan in (found, expected):
            assert plan.parts == ("n", batch)
        assert (found.steps, found.shapes, found.result) == (expected.steps, expected.shapes, expected.result)
        assert found.subscripts == expected.subscripts
    assert built == [9, 9, 15, 12, 14, 8, 11]  # `one` builds plans for 9 and 15 only, each new candidate builds its own


def test_the_candidate_with_the_least_interpolated_estimate_is_best() -> None:
    corners = {(8,): [1.0, 2.0], (16,): [5.0, 3.0]}
    family = Family({"n": 8}, (no_plan, no_plan), corners=corners)  # type: ignore[arg-type]
    assert family.estimates({"n": 8}, TARGET) == [1.0, 2.0]
    assert family.estimates({"n": 10}, TARGET) == [2.0, 2.25]
    assert family.estimates({"n": 12}, TARGET) == [3.0, 2.5]


def test_two_open_indices_are_interpolated_between_four_corners() -> None:
    corners = {(8, 4): [1.0], (8, 8): [2.0], (16, 4): [3.0], (16, 8): [6.0]}
    family = Family({"n": 8, "v": 4}, (no_plan,), corners=corners)  # type: ignore[arg-type]
    assert family.estimates({"n": 12, "v": 6}, TARGET) == [3.0]


def test_plans_that_cut_a_marked_index_are_not_resized() -> None:
    net = ops.kfac_input_factor(ConvSpec(3, 4, (7,), 2)).bind({"n": 11})
    plan = lower_in_parts(net, BY_NAME["windows"], "n", 2)
    assert resizable(plan, {"n": 11}) is None


def test_a_padded_length_that_contains_the_mark_is_not_taken_for_the_batch() -> None:
    net = ops.conv_weight_vjp(ConvSpec(2, 3, (9,), 3, padding=1))
    for plan in candidates(net.bind({"n": 11})):
        form = resizable(plan, {"n": 11})
        if form is not None:
            found = form.at({"n": 6})
            operands = operands_of(net.bind({"n": 6}))
            assert_close(run(found, operands), evaluate_dense(net.bind({"n": 6}), operands))


@pytest.mark.parametrize("sizes", [{"n": 3}, {"n": 0}])
def test_short_indices_are_lowered_for_their_size(sizes: dict[str, int]) -> None:
    assert family_of(ops.conv(SPEC), sizes, TARGET) is None


def test_memory_limits_hold_for_resized_plans() -> None:
    net = ops.kfac_input_factor(SPEC)
    free = net.plan(X=(13, 4, 9, 8))
    least = min(one.peak_size for one in free.candidates)
    plan = net.plan(X=(13, 4, 9, 8), max_bytes=4 * least)
    assert plan.peak_size <= least
    with pytest.raises(ValueError, match="max_bytes is 8, expected at least"):
        net.plan(X=(13, 4, 9, 8), max_bytes=8)


@pytest.mark.parametrize("op", ["conv", "kfac_input_factor", "ggn_diagonal"])
def test_the_weight_of_a_plan_is_about_what_it_keeps_alive(op: str) -> None:
    net = BUILDERS[op](SPEC)
    shapes = {
        name: tuple(net.bind(dict.fromkeys(open_indices(net), 8)).group_size(leg) for leg in legs)
        for name, legs in net.operand_legs.items()
    }
    plan = net.plan(**shapes)
    plan(**{name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    assert 0.5 < _weigh_plan((None, plan)) / weigh((plan.steps, plan.shapes, plan.network, plan.compiled)) < 2


@pytest.mark.parametrize(
    "op", ["conv", "kfac_input_factor", "kfac_input_factor, reduce", "conv_weight_vjp_per_example", "ggn_diagonal"]
)
def test_the_weight_of_a_family_is_about_what_it_keeps_alive(op: str) -> None:
    net = BUILDERS[op](SPEC)
    net = net.bind({index: 4 for index in open_indices(net) if index != "n"})
    family = family_of(net, {"n": 8}, TARGET)
    assert family is not None
    family.estimates({"n": 12}, TARGET)
    family.members[-1].at({"n": 12})
    assert 0.5 < families._weigh((None, families._Found(family))) / weigh((net, family)) < 2


# --------------------------------------------------------------------------------------- numbers that contain the mark
def assert_right(net: Any, **operands: np.ndarray) -> None:
    lensor.clear_caches()
    assert_close(net(**operands), evaluate_dense(net, operands))


@pytest.mark.parametrize("batch", [4, 5, 7, 9, 12, 15])
def test_like_terms_whose_scales_contain_the_batch_size_differently(batch: int) -> None:
    x, array = contraction("n i -> n i", "X", i=3), np.random.default_rng(0).standard_normal((batch, 3))
    assert_right(x.scaled(1, {"n": -1}) + x, X=array)
    assert_right(x.scaled(1, {"n": 1}) + x.scaled(-1), X=array)
    both = contraction("n i, m i -> n m", "X", "Y", i=3)
    assert_right(both.scaled(1, {"n": -1}) + both.scaled(1, {"m": -1}), X=array, Y=array[:4])


@pytest.mark.parametrize("pattern", [IndexPattern(10, 3, padding=(0, 1)), IndexPattern(5, 3, padding=1)])
def test_a_number_of_pattern_entries_that_contains_the_mark(pattern: IndexPattern) -> None:
    net = contraction("n c, i o k -> n", "X", pattern, c=2)
    for batch in (5, 9, 12, 17):
        assert_right(net, X=np.random.default_rng(0).standard_normal((batch, 2)))


# ------------------------------------------------------------------------------------------------- which index is which
def test_equal_networks_whose_open_indices_have_other_names() -> None:
    one = contraction("n i, m i -> n m", "X", "Y", i=3)
    two = contraction("m i, n i -> m n", "X", "Y", i=3)
    assert one == two
    short, long = np.ones((8, 3)), np.ones((16, 3))
    assert_close(one(X=short, Y=long), 3 * np.ones((8, 16)))
    assert_close(two(X=long, Y=short), 3 * np.ones((16, 8)))


def test_an_operand_may_be_called_output() -> None:
    net = contraction("n i, m -> n m", "output", "W")
    assert_right(net, output=np.ones((6, 5)), W=np.ones(7))


def test_a_size_that_one_term_of_a_sum_knows() -> None:
    net = contraction("n i -> n i", "X", n=5) + contraction("n i -> n i", "Y")
    assert_right(net, X=np.ones((5, 6)), Y=np.ones((5, 6)))
    assert_right(
        contraction("n i -> n i", "Y") + contraction("n i -> n i", "X", n=5), X=np.ones((5, 6)), Y=np.eye(5, 6)
    )


@settings(max_examples=100)
@given(st.randoms(note_method_calls=False), st.sampled_from([4, 5, 6, 9, 11, 13]), st.integers(-2, 2))
def test_random_networks_with_an_open_index(rng: random.Random, size: int, power: int) -> None:
    """Groups, repeated operands, deltas, ones, loose patterns; a second term with another power of the open size."""
    net = draw_network(rng, draw_sizes(rng), ["H", "H", "M"])
    held = {index for node in net.nodes if isinstance(node, (Pattern, Delta)) for index in indices_of(node)}
    index = rng.choice(sorted(net.sizes))
    if index in held:
        return
    opened = Network.make(net.nodes, net.output, {**net.sizes, index: None}, net.scale)
    every: Any = opened + opened.scaled(rng.choice([1, -1, 2]), {index: power}) if rng.random() < 0.5 else opened
    equal = equal_sizes(every)
    if equal is None:
        return
    sizes = dict.fromkeys(equal, size)
    family = family_of(every, sizes, TARGET)
    bound = every.bind(sizes)
    operands = operands_of(bound)
    expected = evaluate_dense(bound, operands)
    for member in () if family is None else family.members:
        assert_close(run(member.at(sizes), operands), expected)
