"""Plans as functions: when values are dropped, what results may share, and what operands have to be."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import lensor
from lensor import ConvSpec, IndexPattern, ops
from lensor.kernels import load
from lensor.lowering import candidates
from lensor.plan import steps as s
from lensor.plan.constants import NONE, constants, largest_table
from lensor.plan.memory import last_uses
from lensor.runtime import Runnable, _fold, bytes_needed, one_sum, run
from tests.support.cases import BUILDERS, SPECS, bound, operands_of

SPEC = ConvSpec(3, 4, (7, 6), 3, stride=2, padding=1)


class Watching:
    """A backend whose steps check that arrays which no later step takes are gone."""

    def __init__(self, backend: Any, plan: lensor.Plan) -> None:
        self.backend, self.plan = backend, plan
        self.last = list(last_uses(plan.steps, plan.result))
        self.alive: dict[int, weakref.ref[np.ndarray]] = {}
        once = {*plan.constants.kept, *plan.constants.skipped}
        self.places = iter(
            [at for at, step in enumerate(plan.steps) if not isinstance(step, s.Input) and at not in once]
        )
        self.steps = {type(step): self.watched for step in plan.steps}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def watched(self, step: s.Step) -> Any:
        function, place = self.backend.steps[type(step)](step), next(self.places)
        assert self.plan.steps[place] is step

        def call(*arguments: Any) -> Any:
            for at, found in self.alive.items():
                if self.last[at] < place and found() is not None:
                    gc.collect()
                    assert found() is None, f"{self.plan.name}: {self.plan.steps[at]} is alive in step {place}"
            result = function(*arguments)
            kept = not step.takes  # constants stay in a cache
            scalar = isinstance(result, np.generic)  # cannot be referenced weakly
            if not scalar and result.base is None and not kept and not any(result is one for one in arguments):
                self.alive[place] = weakref.ref(result)
            for at, found in self.alive.items():
                owner = found()
                if owner is not None and np.may_share_memory(owner, result):  # a view keeps what it is a view of
                    self.last[at] = max(self.last[at], self.last[place])
            return result

        return call


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", BUILDERS)
def test_values_are_dropped_after_their_last_use(op: str, spec: str) -> None:
    net = bound(BUILDERS[op](SPECS[spec]))
    operands = operands_of(net)
    for plan in candidates(net):
        Runnable(plan, Watching(load("numpy"), plan))(operands)


def test_dropping_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    net = bound(ops.kfac_input_factor(SPEC))
    monkeypatch.setattr("lensor.runtime.last_uses", lambda steps, result: [len(steps)] * len(steps))
    plan = next(plan for plan in candidates(net) if sum(step.computes for step in plan.steps) > 2)
    runnable = Runnable(plan, Watching(load("numpy"), plan))
    with pytest.raises(AssertionError, match="is alive in step"):
        runnable(operands_of(net))


@pytest.mark.parametrize("spec", ["2-d", "reflect", "transposed"])
@pytest.mark.parametrize("op", BUILDERS)
def test_values_of_patterns_are_computed_once_and_stay_as_they_are(
    op: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = bound(BUILDERS[op](SPECS[spec]))
    operands = operands_of(net)
    most = sum(array.size for array in operands.values())
    for plan in candidates(net):
        runnable = Runnable(plan, load("torch"))
        arrays = {name: torch.from_numpy(array) for name, array in operands.items()}
        first = runnable(arrays)
        with monkeypatch.context() as patch:
            patch.setattr("lensor.runtime._fold", None)
            assert torch.equal(runnable(arrays), first)
        for place, key in plan.constants.kept.items():
            value = _fold(key, np.float64)
            assert value.shape == plan.shapes[place]
            assert value.size <= largest_table([most, first.numel()])


def test_sums_of_two_patterns_are_multiplied_once() -> None:
    net = bound(ops.kfac_input_root(ConvSpec(3, 4, (8, 6), 3, padding=1)))
    plan = next(plan for plan in candidates(net) if plan.strategy == "windows, tables first")
    ((place, key),) = plan.constants.kept.items()
    first, second = (IndexPattern(size, 3, padding=1).materialize().sum(1) for size in (8, 6))
    expected = np.einsum("ak,bl->abkl", first, second).reshape(plan.shapes[place])
    assert np.array_equal(np.sort(_fold(key, np.float64), axis=None), np.sort(expected, axis=None))
    assert {at for at, step in enumerate(plan.steps) if isinstance(step, s.Constant)} <= plan.constants.skipped


def test_values_that_may_be_written_into_are_computed_in_every_call() -> None:
    pattern = IndexPattern(4, 3)
    steps = [s.Constant((), pattern, (1,)), s.Transpose((0,), (1, 0)), s.Reshape((1,), (12,)), s.Input((), "X", (12,))]
    shapes = [(4, 3), (3, 4), (12,), (12,), (12,)]
    added = [*steps, s.Add((3, 2))]
    assert set(constants(added, shapes, 4).kept) == {2}
    assert constants([*steps, s.Add((2, 3), owned=True)], shapes, 4) == NONE
    assert constants(added, shapes, 4, varying={2}) == NONE  # its view may be written into


def test_operands_are_checked_by_name_and_shape() -> None:
    net = bound(ops.conv(SPEC))
    plan, operands = candidates(net)[0], operands_of(bound(ops.conv(SPEC)))
    with pytest.raises(TypeError, match="operand 'W' is missing"):
        run(plan, {"X": operands["X"]})
    with pytest.raises(TypeError, match="operand 'Y' is unknown"):
        run(plan, {**operands, "Y": operands["X"]})
    with pytest.raises(ValueError, match=r"operand 'X' has shape \(1, 3, 7, 6\), expected \(2, 3, 7, 6\)"):
        run(plan, {**operands, "X": operands["X"][:1]})


def test_results_are_not_views_of_operands() -> None:
    net = lensor.contraction("a b -> b a", "X").bind({"a": 3, "b": 4})
    x = np.arange(12.0).reshape(3, 4)
    for plan in candidates(net):
        found = run(plan, {"X": x})
        assert np.array_equal(found, x.T)
        assert not np.shares_memory(found, x)


def test_half_precision_needs_copies_where_several_steps_compute() -> None:
    product = candidates(lensor.contraction("i j, j k -> i k", "X", "W").bind({"i": 3, "j": 4, "k": 5}))[0]
    assert one_sum(product) is not None
    assert bytes_needed(product, 2) == 2 * product.peak_size
    chain = candidates(
        lensor.contraction("i j, j k, k l -> i l", "X", "Y", "Z").bind({"i": 3, "j": 4, "k": 5, "l": 6})
    )[0]
    assert one_sum(chain) is None
    assert bytes_needed(chain, 2) == 4 * (chain.peak_size + 3 * 4 + 4 * 5 + 5 * 6) + 2 * 3 * 6
