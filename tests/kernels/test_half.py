"""Half precision against double precision: whatever fits into the result does not overflow on the way."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lensor
import lensor.functional as F
from lensor.kernels import load
from lensor.lowering import candidates
from lensor.runtime import Runnable, bytes_needed, one_sum

LARGEST = 65504.0


def quantities(draw: Any) -> dict[str, Any]:
    """Every curvature quantity and derivative of one random layer, as functions of arrays."""
    n, v, groups, dims = (draw(st.integers(1, most)) for most in (40, 4, 2, 2))
    c_in, c_out = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 3))
    size, kernel = draw(st.integers(3, 12)), draw(st.integers(1, 3))
    stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, kernel - 1))
    spec = lensor.ConvSpec(c_in, c_out, (size,) * dims, kernel, stride=stride, padding=padding, groups=groups)
    weight = (c_out, c_in // groups, *(kernel,) * dims)
    hyper: dict[str, Any] = {"stride": stride, "padding": padding, "groups": groups}
    return {
        "shapes": {
            "x": (n, c_in, *(size,) * dims),
            "w": weight,
            "v": (n, c_out, *spec.output_size),
            "s": (v, n, c_out, *spec.output_size),
        },
        "functions": {
            "A expand": lambda a: F.kfac_input_factor(a["x"], (kernel,) * dims, approx="expand", **hyper),
            "A reduce": lambda a: F.kfac_input_factor(a["x"], (kernel,) * dims, approx="reduce", **hyper),
            "A root": lambda a: F.kfac_input_factor(a["x"], (kernel,) * dims, approx="reduce", form="root", **hyper),
            "B expand": lambda a: F.kfac_output_factor(a["s"], groups, approx="expand"),
            "B reduce": lambda a: F.kfac_output_factor(a["s"], groups, approx="reduce"),
            "B asdl": lambda a: F.kfac_output_factor(a["s"], 1, approx="expand", convention="asdl"),
            "diagonal": lambda a: F.ggn_diagonal(a["x"], weight, a["s"], **hyper),
            "diagonal, per example": lambda a: F.ggn_diagonal(a["x"], weight, a["s"], per_example=True, **hyper),
            "gram": lambda a: F.ggn_gram(a["x"], weight, a["s"], **hyper),
            "weight": lambda a: F.conv_weight_vjp(a["x"], weight, a["v"], **hyper),
            "weight, per example": lambda a: F.conv_weight_vjp_per_example(a["x"], weight, a["v"], **hyper),
            "input": lambda a: F.conv_input_vjp(a["x"].shape, a["w"], a["v"], **hyper),
            "conv": lambda a: F.conv(a["x"], a["w"], **hyper),
        },
    }


@given(st.data())
@settings(max_examples=40)
def test_what_fits_does_not_overflow(data: st.DataObject) -> None:
    """Inputs so large that sums of squares leave the range of float16 long before they are averaged."""
    layer = quantities(data.draw)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    scales = {name: 2.0 ** data.draw(st.integers(-6, 6)) for name in layer["shapes"]}
    spread = data.draw(st.booleans())
    arrays = {
        name: ((rng.standard_normal(shape) if spread else np.ones(shape)) * scales[name]).astype(np.float16)
        for name, shape in layer["shapes"].items()
    }
    exact = {name: torch.tensor(array).double() for name, array in arrays.items()}
    for name in data.draw(st.lists(st.sampled_from(sorted(layer["functions"])), min_size=3, max_size=3, unique=True)):
        function = layer["functions"][name]
        expected = function(exact).numpy()
        if not expected.size or np.abs(expected).max() > LARGEST:
            continue
        for found in (function({n: torch.tensor(a) for n, a in arrays.items()}).numpy(), function(arrays)):
            assert found.dtype == np.float16
            # Entries of float16, or what is left of sums of float32 whose terms cancel.
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_averages_of_ones(approx: str) -> None:
    for ones in (torch.ones(64, 4, 32, 32).half(), np.ones((64, 4, 32, 32), np.float16)):
        factor = F.kfac_input_factor(ones, 3, approx=approx)
        assert float(factor[0, 0, 0]) == (1 if approx == "reduce" else 900)
        factor = F.kfac_output_factor(ones[None] / 32, approx=approx)
        if approx == "expand":
            assert float(factor[0, 0, 0]) == 64 / 1024


def test_derivatives_in_half_precision() -> None:
    """torch's gradients through a factor, and under automatic casts."""
    x = torch.full((32, 2, 16, 16), 4.0).half().requires_grad_()
    factor = F.kfac_input_factor(x, 3, approx="reduce")
    assert factor.dtype is torch.float16
    assert float(factor.max()) == 16
    (gradient,) = torch.autograd.grad(factor.sum(), x)
    double = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(F.kfac_input_factor(double, 3, approx="reduce").sum(), double)
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-3, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(F.kfac_input_factor(x.detach(), 3, approx="reduce").max()) == 16


def test_networks_and_plans_in_half_precision() -> None:
    net = lensor.contraction("n i, n j -> i j", "X", "X").scaled(Fraction(1, 1000), {"n": -1})
    for x in (torch.full((100, 3), 200.0).half(), np.full((100, 3), 200.0, np.float16)):
        assert float(net(X=x)[0, 0]) == pytest.approx(40, rel=1e-3)
        assert float(net.plan(X=(100, 3))(X=x)[0, 0]) == pytest.approx(40, rel=1e-3)  # planned for another dtype
    twice = lensor.contraction("i j, j k, k l -> i l", "A", "B", "C")
    a = np.full((2, 2), 200.0, np.float16)
    c = np.array([[1, 1], [-1, -1]], np.float16)
    assert (np.asarray(twice(A=a, B=a, C=c)) == 0).all()


def test_all_candidates_in_half_precision() -> None:
    spec = lensor.ConvSpec(2, 3, (9,), 3, stride=2, padding=1)
    for net in (lensor.ops.kfac_input_factor(spec, "reduce"), lensor.ops.ggn_diagonal(spec)):
        bound = lensor.evaluate.bind_shapes(
            net, {name: shape for name, shape in _shapes(spec).items() if name in net.operand_names}
        )
        arrays = {name: np.full(_shapes(spec)[name], 12.0, np.float16) for name in net.operand_names}
        expected = float(np.abs(np.asarray(net(**{n: a.astype(np.float64) for n, a in arrays.items()}))).max())
        assert expected < LARGEST * 100
        for plan in candidates(bound):
            for backend, convert in (("numpy", np.asarray), ("torch", torch.tensor)):
                found = Runnable(plan, load(backend))({name: convert(array) for name, array in arrays.items()})
                if expected < LARGEST:
                    assert float(abs(found).max()) == pytest.approx(expected, rel=2e-3)


def _shapes(spec: lensor.ConvSpec) -> dict[str, tuple[int, ...]]:
    return {"X": (5, 2, 9), "S": (2, 5, 3, *spec.output_size)}


def test_memory_of_half_precision_is_counted() -> None:
    plan = lensor.contraction("i j, j k, k l -> i l", "A", "B", "C").plan(A=(4, 5), B=(5, 6), C=(6, 7))
    assert one_sum(plan) is None
    copies = math.prod((4, 5)) + math.prod((5, 6)) + math.prod((6, 7))
    assert bytes_needed(plan, 2) == 4 * (plan.peak_size + copies) + 2 * 28
    assert bytes_needed(plan, 4) == 4 * plan.peak_size
    product = lensor.contraction("i j, j k -> i k", "A", "B").plan(A=(4, 5), B=(5, 6))
    assert one_sum(product) is not None
    assert bytes_needed(product, 2) == 2 * product.peak_size
