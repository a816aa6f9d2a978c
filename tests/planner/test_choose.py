"""The choice: the least estimate, within a memory limit if there is one, and a reason that says so."""

from __future__ import annotations

import pytest

import lensor
from lensor import ConvSpec, ops
from lensor.planner import choose
from lensor.planner.settings import Settings
from tests.support.cases import BUILDERS, SPECS, bound

SPEC = ConvSpec(8, 8, (16, 16), 3, padding=1)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", BUILDERS)
def test_the_least_estimate_is_chosen(op: str, spec: str) -> None:
    plan = choose(bound(BUILDERS[op](SPECS[spec])), Settings())
    seconds = [one.estimated for one in plan.candidates]
    assert seconds == sorted(seconds)
    assert (plan.candidates[0].name, plan.candidates[0].flops) == (plan.name, plan.flops)


def test_a_memory_limit_excludes_candidates_then_slices_an_index() -> None:
    net = bound(ops.kfac_input_factor(SPEC), 16)
    free = choose(net, Settings())
    least = min(one.peak_size for one in free.candidates)
    smallest = choose(net, Settings(max_bytes=8 * least))
    assert (smallest.peak_size, smallest.parts) == (least, None)
    assert smallest.reason.endswith(f"within {8 * least:,} bytes")
    sliced = choose(net, Settings(max_bytes=8 * least - 1))
    assert sliced.peak_size < least
    assert sliced.parts is not None


def test_a_limit_below_the_result_is_an_error() -> None:
    net = bound(ops.kfac_input_factor(SPEC), 16)
    with pytest.raises(ValueError, match=r"max_bytes is 100, expected at least \d+"):
        choose(net, Settings(max_bytes=100))


def test_a_preferred_limit_takes_the_smallest_where_nothing_fits() -> None:
    net = bound(ops.conv(SPEC), 16)
    plan = choose(net, Settings(preferred_bytes=1))
    assert plan.peak_size <= min(one.peak_size for one in choose(net, Settings()).candidates)


def test_the_only_candidate_says_so() -> None:
    plan = choose(lensor.contraction("i -> i", "X").bind({"i": 3}), Settings())
    assert plan.reason == "the only candidate"
