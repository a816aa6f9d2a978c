"""The cost model: what a plan is estimated to take, from what its steps say of themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lensor
from lensor import ConvSpec, Machine, ops
from lensor.lowering import candidates
from lensor.plan import steps as s
from lensor.planner import Speed, Speeds
from lensor.planner.cost import estimate
from tests.support.cases import BUILDERS, SPECS, bound, random_network

KINDS = Speeds.__dataclass_fields__


def device(
    rate: float, memory: float, call: float, barrier: float = 0.0, setup: float = 0.0, faults: float = 1.0
) -> Machine:
    """A device with one speed for all kinds of calls."""
    speeds = {"float32": Speeds(**dict.fromkeys(KINDS, Speed(rate, setup)))}
    return Machine("a device", 2, memory, 2 * memory, 1 << 20, faults, call, barrier, speeds)


MACHINE = device(1e9, 1e9, 1e-6, 1e-6, 1e-6, 2.0)
FREE = device(1e30, 1e30, 0.0)


def plan_of(net: object) -> lensor.Plan:
    return candidates(bound(net))[0]


def test_a_matrix_product_by_hand() -> None:
    net = lensor.contraction("i j, j k -> i k", "X", "W").bind({"i": 30, "j": 40, "k": 50})
    plan = candidates(net)[0]
    (step,) = [step for step in plan.steps if step.computes]
    shapes = [plan.shapes[at] for at in step.takes]
    assert step.flops(shapes, plan.shape) == 2 * 30 * 40 * 50
    rate = step.rate(shapes, plan.shape)
    assert rate.of == "products"
    # Flops alone, calls alone, set-up alone: the other constants are out of the way.
    work = estimate(plan, device(1e9, 1e30, 0.0))
    assert work == pytest.approx(2 * 30 * 40 * 50 / (1e9 * rate.share))
    views = [one for one in plan.steps if one is not step and not isinstance(one, s.Input)]
    assert not views
    assert estimate(plan, replace(FREE, call=1.0)) == pytest.approx(
        step.calls(shapes, plan.shape) + 0.25 * sum(isinstance(one, s.Input) for one in plan.steps)
    )
    assert estimate(plan, device(1e30, 1e30, 0.0, setup=3.0)) == pytest.approx(3.0)
    assert estimate(plan, replace(FREE, barrier=1.0)) == pytest.approx(0.0)  # too small for several threads


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10))
def test_a_faster_machine_takes_less_time_in_proportion(seed: int, factor: float) -> None:
    faster = device(1e9 * factor, 1e9 * factor, 1e-6 / factor, 1e-6 / factor, 1e-6 / factor, 2.0)
    for plan in candidates(random_network(seed)):
        assert estimate(plan, faster) == pytest.approx(estimate(plan, MACHINE) / factor)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", BUILDERS)
def test_no_constant_of_the_machine_lowers_the_estimate(op: str, spec: str) -> None:
    for plan in candidates(bound(BUILDERS[op](SPECS[spec]))):
        whole = estimate(plan, MACHINE)
        assert whole > 0
        for name in ("memory", "cache"):
            slower = replace(MACHINE, **{name: getattr(MACHINE, name) / 2})
            assert whole <= estimate(plan, slower) <= 2 * whole
        for name in ("call", "barrier"):
            slower = replace(MACHINE, **{name: getattr(MACHINE, name) * 2})
            assert whole <= estimate(plan, slower) <= 2 * whole
        for kind in KINDS:
            speeds = MACHINE.speeds["float32"]
            slow = {"float32": replace(speeds, **{kind: Speed(5e8, 2e-6)})}
            assert whole <= estimate(plan, replace(MACHINE, speeds=slow)) <= 2 * whole
        assert estimate(plan, MACHINE, itemsize=8) >= whole


@pytest.mark.parametrize("op", ["conv", "conv_weight_vjp", "kfac_input_factor"])
def test_a_larger_batch_takes_longer(op: str) -> None:
    net = getattr(ops, op)(ConvSpec(8, 8, (16, 16), 3, padding=1))
    times = [{plan.strategy: estimate(plan, MACHINE) for plan in candidates(bound(net, batch))} for batch in (1, 4, 16)]
    common = set(times[0]) & set(times[1]) & set(times[2])
    assert common
    assert min(times[0].values()) < min(times[1].values()) < min(times[2].values())
    for strategy in common:
        one, four, sixteen = (found[strategy] for found in times)
        assert one < four < sixteen


def test_costs_ask_steps_and_not_their_types() -> None:
    """A step that nobody has seen before is costed by its own methods."""

    class Slow(s.Add):
        def rate(self, shapes: object, result: object) -> s.Rate:
            return s.Rate("products", 1e-6)

        def flops(self, shapes: object, result: object) -> int:
            return 1000

    net = lensor.contraction("i -> i", "X") + lensor.contraction("i -> i", "Y")
    plan = candidates(net.bind({"i": 5}))[0]
    at = next(place for place, step in enumerate(plan.steps) if isinstance(step, s.Add))
    steps = list(plan.steps)
    steps[at] = Slow(steps[at].takes)
    slow = replace(plan, steps=tuple(steps))
    assert estimate(slow, device(1e6, 1e30, 0.0)) == pytest.approx(1000.0)


def test_parallel_calls_cost_barriers() -> None:
    net = bound(ops.kfac_input_factor(ConvSpec(64, 64, (28, 28), 3, padding=1)), 8)
    for plan in candidates(net):
        if plan.strategy == "lags":
            calls = estimate(plan, replace(FREE, barrier=1.0))
            # One weight gradient, and few copies and products at the borders, not a product for each lag.
            assert 5 <= calls <= 40
            assert estimate(plan, replace(FREE, barrier=1.0, threads=1)) == pytest.approx(0.0, abs=1e-9)
            return
    raise AssertionError("no plan by lags")


@pytest.mark.parametrize(
    ("channels", "size", "groups", "most"),
    [(64, 56, 1, 28), (128, 28, 1, 28), (256, 14, 1, 32), (256, 56, 32, 24), (144, 56, 144, 16)],
)
def test_parallel_calls_of_factors_by_lags(channels: int, size: int, groups: int, most: int) -> None:
    """Each such call waits for all threads; the convolution, which is one call, takes most of the time."""
    net = ops.kfac_input_factor(ConvSpec(channels, channels, (size, size), 3, padding=1, groups=groups))
    plan = net.plan(X=(8, channels, size, size))
    assert plan.strategy.startswith("lags")
    shared, convolutions = 0.0, 0
    for place, step in enumerate(plan.steps):
        if plan.layouts[place].copied:
            shared += step.barriers([plan.shapes[at] for at in step.takes], plan.shapes[place])
        convolutions += isinstance(step, s.Convolution)
    assert shared <= most
    assert convolutions == 1
