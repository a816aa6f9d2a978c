"""The memory that plans predict is what torch's allocator sees: bytes are the same in every run."""

from __future__ import annotations

import pytest
import torch
from lensor_bench.measure import peak_bytes

import lensor
from lensor import ConvSpec
from lensor import functional as F
from lensor.lowering import STRATEGIES, lower
from lensor.plan.steps import Convolution
from lensor.planner import preferring
from lensor.runtime import run
from tests.support.cases import BUILDERS, bound, operands_of

SPECS = {
    "general": ConvSpec(8, 16, (12, 10), 3, padding=1),
    "stride": ConvSpec(8, 8, (13,), 3, stride=2, groups=2),
    "dense": ConvSpec(8, 16, (8, 8), 2, stride=2),
    "depthwise": ConvSpec(8, 8, (12,), 5, padding=2, groups=8),
    "circular": ConvSpec(4, 8, (12,), 3, padding=2, padding_mode="circular"),
    "dilation": ConvSpec(6, 6, (9, 9), 3, padding=2, dilation=2),
}
LARGE = {
    "hessian_backprop",
    "unfolded_kernel",
    "conv_input_jacobian",
    "conv_weight_jacobian",
    "mixed_second_derivative",
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", BUILDERS)
def test_predicted_memory_is_what_is_allocated(op: str, spec: str) -> None:
    """Within 10 %, for every plan without a framework's convolution."""
    if op in LARGE and len(SPECS[spec].input_size) == 2:
        spec = "stride"  # two-dimensional Jacobians are out of proportion
    net = bound(BUILDERS[op](SPECS[spec]), 4).simplify()
    operands = {name: torch.tensor(array) for name, array in operands_of(net).items()}
    seen = set()
    for strategy in STRATEGIES:
        plan = lower(net, strategy)
        if plan.steps in seen or any(isinstance(step, Convolution) for step in plan.steps):
            continue
        seen.add(plan.steps)
        run(plan, operands)  # patterns are kept from the first run on
        found, _ = peak_bytes(lambda plan=plan: run(plan, operands))
        assert found == pytest.approx(8 * plan.peak_size, rel=0.1, abs=64), strategy.name


@pytest.mark.parametrize(("channels", "size"), [(64, 56), (96, 35), (32, 64)])
def test_lags_take_a_fraction_of_the_unfolded_input(channels: int, size: int) -> None:
    x = torch.randn(2, channels, size, size)
    with lensor.planning(max_bytes=x.nbytes * 9):  # no patches
        F.kfac_input_factor(x, 3, padding=1)
        found, factor = peak_bytes(lambda: F.kfac_input_factor(x, 3, padding=1))
    assert found - factor.nbytes <= 0.5 * 9 * x.nbytes


def test_a_preferred_limit_chooses_what_fits_or_else_the_smallest() -> None:
    net = bound(BUILDERS["ggn_diagonal"](SPECS["general"]), 4)
    shapes = {name: array.shape for name, array in operands_of(net).items()}
    sizes = sorted(one.peak_size for one in net.plan(**shapes).candidates)
    with preferring(4 * sizes[0]):  # shapes alone stand for float32
        assert net.plan(**shapes).peak_size == sizes[0]
    with preferring(1):
        smallest = net.plan(**shapes)
        assert smallest.peak_size <= sizes[0]
        with pytest.raises(ValueError, match=r"max_bytes is 2, expected at least .* for the smallest plan"):
            net.plan(**shapes, max_bytes=2)
    free = net.plan(**shapes)
    with preferring(4 * sizes[-1]):
        assert net.plan(**shapes).name == free.name
