"""PathCosts of contraction: every path is a path, and what the orders cost is what they cost."""

from __future__ import annotations

import math
import pickle
import random

import numpy as np
import opt_einsum
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lensor
from lensor.plan import paths as orders
from lensor.plan.paths import PATHS, find_path
from tests.support.cases import BUILDERS, SPECS, bound, operands_of


@given(seed=st.integers(0, 2**32 - 1), order=st.sampled_from(["auto", "cotengra", *PATHS]))
def test_every_order_contracts_in_pairs_to_the_right_result(seed: int, order: str) -> None:
    rng = random.Random(seed)
    names = "abcdefghij"[: rng.randint(1, 10)]
    inputs = [frozenset(rng.sample(names, rng.randint(0, min(3, len(names))))) for _ in range(rng.randint(1, 10))]
    held = sorted(frozenset().union(*inputs))
    output = frozenset(rng.sample(held, rng.randint(0, min(3, len(held)))))
    sizes = {index: rng.randint(1, 3) for index in held}
    with pytest.MonkeyPatch.context() as patch:
        if order == "cotengra":
            pytest.importorskip("cotengra")
            patch.setattr(orders, "_MOST_FOR_OPT_EINSUM", 1)
        path = find_path(inputs, output, sizes, "auto" if order == "cotengra" else order)
    assert [len(pair) for pair in path] == [2] * (len(inputs) - 1)
    arrays = np.random.default_rng(seed)
    values = [arrays.normal(size=[sizes[index] for index in sorted(own)]) for own in inputs]
    subscripts = f"{','.join(''.join(sorted(own)) for own in inputs)}->{''.join(sorted(output))}"
    found = opt_einsum.contract(subscripts, *values, optimize=path or "auto")
    np.testing.assert_allclose(found, np.einsum(subscripts, *values), rtol=1e-10, atol=1e-10)


def test_left_to_right_takes_the_tensors_as_they_stand() -> None:
    tensors = [frozenset("ab"), frozenset("bc"), frozenset("cd"), frozenset("de")]
    assert find_path(tensors, frozenset("ae"), dict.fromkeys("abcde", 2), "left to right") == [(0, 1), (0, 2), (0, 1)]


def test_the_orders_of_a_matrix_product() -> None:
    net = lensor.contraction("a b, b c, c d -> a d", "A", "B", "C", a=2, b=3, c=5, d=7)
    table = net.plan(A=(2, 3), B=(3, 5), C=(5, 7)).compare()
    assert table["Feynman"].flops == 3 * 2 * 3 * 5 * 7
    assert table["Feynman"].peak_size == 2 * 7
    assert table["left to right"].flops == 2 * (2 * 3 * 5 + 2 * 5 * 7)
    assert table["left to right"].peak_size == 2 * 5 + 2 * 7
    assert table["optimal"].flops == min(2 * (2 * 3 * 5 + 2 * 5 * 7), 2 * (3 * 5 * 7 + 2 * 3 * 7))
    assert [row.name for row in table] == ["Feynman", *PATHS, "planner"]
    assert [line.split("  ")[0] for line in str(table).splitlines()][1:] == [row.name for row in table]
    with pytest.raises(KeyError, match="the path is 'best', expected one of"):
        table["best"]


@pytest.mark.parametrize("spec", ["2-d", "dense", "depthwise"])
@pytest.mark.parametrize("op", BUILDERS)
def test_every_plan_lists_its_orders(op: str, spec: str) -> None:
    net = bound(BUILDERS[op](SPECS[spec]))
    plan = net.plan(**operands_of(net))
    table = plan.compare()
    assert table["optimal"].flops <= min(table["greedy"].flops, table["left to right"].flops)
    assert all(row.peak_size >= math.prod(plan.shape) for row in (table["Feynman"], table["left to right"]))
    assert (table["planner"].flops, table["planner"].peak_size) == (plan.flops, plan.peak_size)
    assert pickle.loads(pickle.dumps(plan)).compare() == table
