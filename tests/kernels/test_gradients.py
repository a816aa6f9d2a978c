"""Gradients of evaluated networks, of first and second order, under every plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import lensor
from lensor import ConvSpec, IndexPattern, ops
from lensor.kernels import load
from lensor.lowering import STRATEGIES, lower
from lensor.plan.steps import Convolution, Gather
from lensor.runtime import run
from tests.support.cases import BUILDERS, SMALL, SPEC, SPECS, assert_close, bound, operands_of, tensors
from tests.support.dense import evaluate_dense

# ----------------------------------------------------------------------------------------------------------- gradients
GRADIENT_CASES = [
    ("conv", "1-d"),
    ("conv", "circular"),
    ("conv", "transposed"),
    ("conv", "down-sampling"),
    ("unfold", "1-d"),
    ("fold", "1-d"),
    ("conv_weight_vjp", "1-d"),
    ("conv_input_vjp", "depthwise"),
    ("kfac_input_factor", "circular"),
    ("kfac_input_factor, reduce", "circular"),
    ("kfac_input_factor, bias", "circular"),
    ("ggn_diagonal", "depthwise"),
    ("hessian_backprop", "depthwise"),
    ("hessian_diagonal_input", "circular"),
    ("kfac_output_factor", "depthwise"),
    ("unfolded_kernel", "depthwise"),
]


@pytest.mark.parametrize(("op", "spec"), GRADIENT_CASES)
def test_gradients_of_first_and_second_order(op: str, spec: str) -> None:
    net = bound(BUILDERS[op](SPECS[spec]), 1)
    ours = tensors(operands_of(net), requires_grad=True)
    names = list(ours)

    def call(*values: torch.Tensor) -> torch.Tensor:
        return net(**dict(zip(names, values, strict=True)))

    result = call(*ours.values())
    assert result.requires_grad
    assert gradcheck(call, tuple(ours.values()), fast_mode=True)
    assert gradgradcheck(call, tuple(ours.values()), fast_mode=True)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_by_every_candidate(spec: str) -> None:
    """Whatever plan is chosen, autograd's gradient is the network's own VJP."""
    for op in ("conv", "conv_weight_vjp", "kfac_input_factor"):
        net = bound(BUILDERS[op](SPECS[spec]))
        operands = operands_of(net)
        cotangent = np.random.default_rng(2).standard_normal(net.output_shape)
        for name in operands:
            given = dict(operands, U=cotangent)
            vjp_ = net.vjp(name, "U")
            expected = evaluate_dense(vjp_, {key: given[key] for key in vjp_.operand_names})
            for strategy in STRATEGIES:
                plan = lower(net.simplify(), strategy)
                plan = type(plan)(
                    plan.subscripts, plan.steps, plan.shapes, plan.result, plan.name, runner=lensor.evaluate.run
                )
                ours = tensors(operands, requires_grad=True)
                (found,) = torch.autograd.grad(plan(**ours), ours[name], torch.tensor(cotangent))
                assert_close(found, expected)


def test_no_gradient_where_none_is_asked_for() -> None:
    net = ops.conv(SPEC)
    ours = tensors(operands_of(bound(net)))
    assert not net(**ours).requires_grad
    ours["W"].requires_grad_()
    with torch.no_grad():
        assert not net(**ours).requires_grad
    with torch.inference_mode():
        inside = net(**ours)
    assert_close(net(**ours).detach(), inside)
    lensor.clear_caches()
    with torch.inference_mode():  # constants made here serve gradients later
        ops.kfac_input_factor(SPEC, "reduce")(X=ours["X"])
        ops.conv(SPECS["circular"])(
            X=torch.ones(2, 2, 6, dtype=torch.double), W=torch.ones(4, 2, 3, dtype=torch.double)
        )
    x = ours["X"].clone().requires_grad_()
    ops.kfac_input_factor(SPEC, "reduce")(X=x).sum().backward()
    assert x.grad is not None
    y = torch.ones(2, 2, 6, dtype=torch.double, requires_grad=True)
    ops.conv(SPECS["circular"])(X=y, W=torch.ones(4, 2, 3, dtype=torch.double)).sum().backward()
    assert y.grad is not None


def conv(x: Any, w: Any) -> Any:
    return torch.nn.functional.conv2d(x, w, None, (2, 1), (1, 0), 1, 2)


def test_function_transforms_over_a_call() -> None:
    net = ops.conv(SPEC)
    ours = tensors(operands_of(bound(net)))
    x, w = ours["X"], ours["W"]

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return net(X=x, W=w)

    def loss(function: Any) -> Any:
        return lambda x, w: function(x, w).pow(3).sum()

    for argument in (0, 1):
        assert_close(grad(loss(call), argument)(x, w), grad(loss(conv), argument)(x, w))
        assert_close(jacrev(call, argument)(x, w), jacrev(conv, argument)(x, w))
        assert_close(jacfwd(call, argument)(x, w), jacfwd(conv, argument)(x, w))
    assert_close(hessian(loss(call), 1)(x, w), hessian(loss(conv), 1)(x, w))
    tangents = (torch.randn_like(x), torch.randn_like(w))
    for found, expected in zip(jvp(call, (x, w), tangents), jvp(conv, (x, w), tangents), strict=True):
        assert_close(found, expected)
    xs, ws = torch.randn(3, *x.shape, dtype=x.dtype), torch.randn(*w.shape, 3, dtype=x.dtype)
    assert_close(vmap(call, (0, None))(xs, w), vmap(conv, (0, None))(xs, w))
    assert_close(vmap(call, (None, -1))(x, ws), vmap(conv, (None, -1))(x, ws))
    assert_close(vmap(call, (0, -1), 1)(xs, ws), vmap(conv, (0, -1), 1)(xs, ws))
    # Gradients of every example, of which vmap is made for.
    one = vmap(grad(lambda w, x: loss(call)(x[None], w)), (None, 0))(w, x)
    assert_close(one, vmap(grad(lambda w, x: loss(conv)(x[None], w)), (None, 0))(w, x))
    # Transforms inside each other.
    inner = vmap(lambda t: jvp(grad(loss(call), 1), (x, w), (torch.zeros_like(x), t))[1])(ws.movedim(-1, 0))
    assert_close(
        inner, vmap(lambda t: jvp(grad(loss(conv), 1), (x, w), (torch.zeros_like(x), t))[1])(ws.movedim(-1, 0))
    )


def test_a_net_inside_a_module() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(6, 2, 3, 2, dtype=torch.double))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.conv(SPEC)(X=x, W=self.weight)

    layer = Layer()
    x = torch.randn(2, 4, 6, 5, dtype=torch.double)
    found = grad(lambda p: functional_call(layer, p, (x,)).square().sum())({"weight": layer.weight.detach()})
    layer(x).square().sum().backward()
    assert_close(found["weight"], layer.weight.grad)
    assert_close(layer.weight.grad, grad(lambda w: conv(x, w).square().sum())(layer.weight.detach()))


def test_complex_gradients_follow_torch() -> None:
    """Gradients through a call are conjugated as torch's are; the network's own VJP is the transpose."""
    net = ops.conv(SMALL)
    rng = np.random.default_rng(3)
    x = torch.tensor(rng.standard_normal((2, 2, 5)) + 1j * rng.standard_normal((2, 2, 5)), requires_grad=True)
    w = torch.tensor(rng.standard_normal((2, 1, 3)) + 1j * rng.standard_normal((2, 1, 3)), requires_grad=True)
    assert gradcheck(lambda x, w: net(X=x, W=w), (x, w), fast_mode=True)


@given(
    size=st.integers(1, 9),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(-2, 8), st.integers(-2, 8)),
    mode=st.sampled_from(["circular", "reflect", "replicate"]),
    backend=st.sampled_from(["numpy", "torch"]),
)
def test_gathers_read_in_runs(size: int, stride: int, padding: tuple[int, int], mode: str, backend: str) -> None:
    longest = {"circular": size, "reflect": size - 1, "replicate": 8}[mode]
    padding = tuple(min(side, longest) for side in padding)
    assume(size + sum(padding) >= 1)
    try:
        pattern = IndexPattern(size, 1, stride, padding=padding, padding_mode=mode)
    except ValueError:
        reject()
    reads = pattern.reads()[:, 0]
    assume((reads >= 0).all())
    step = Gather((0,), 1, pattern)
    spelled = [start + step * at for start, step, length in step.runs() for at in range(length)]
    assert spelled == list(reads)
    x = np.random.default_rng(0).normal(size=(2, size, 3))
    found = load(backend).steps[Gather](step)(torch.tensor(x) if backend == "torch" else x)
    np.testing.assert_array_equal(np.asarray(found), x[:, reads])


@pytest.mark.parametrize("op", BUILDERS)
def test_convolution_steps_have_three_dimensions_at_most(op: str) -> None:
    spec = ConvSpec(
        *(3, 6, (2, 1, 2, 2, 2), (2, 2, 1, 2, 1), (1, 4, 2, 1, 2)),
        dilation=(1, 1, 2, 1, 2),
        groups=3,
        transposed=True,
        output_padding=(0, 2, 0, 0, 1),
    )
    net = bound(BUILDERS[op](spec), 2)
    operands = operands_of(net)
    expected = evaluate_dense(net, operands) if op != "hessian_backprop" else None
    for strategy in STRATEGIES:
        plan = lower(net.simplify(), strategy)
        assert all(len(step.stride) <= 3 for step in plan.steps if isinstance(step, Convolution))
        if expected is not None:
            assert_close(run(plan, tensors(operands)), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_convolutions_take_no_more_memory_than_torch_s(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from lensor_bench.measure import peak_bytes

    spec = ConvSpec(16, 16, (31, 30), 3, stride=2, padding=1, groups=2)
    shapes = (2, *spec.input_shape), spec.weight_shape, (2, *spec.output_shape)
    x, w, v = (torch.randn(shape, dtype=getattr(torch, dtype)) for shape in shapes)
    hyper = ([2, 2], [1, 1], [1, 1], False, [0, 0], 2)
    own = (
        lambda: lensor.functional.conv_input_vjp(x.shape, w, v, 2, 1, 1, 2),
        lambda: lensor.functional.conv_weight_vjp(x, w.shape, v, 2, 1, 1, 2),
    )
    for of, call in enumerate(own):
        asked = [of == 0, of == 1, False]
        with torch.no_grad():
            call()  # plans
            most, expected = peak_bytes(
                lambda asked=asked: torch.ops.aten.convolution_backward(v, x, w, None, *hyper, asked)[asked.index(True)]
            )
            peak, found = peak_bytes(call)
        torch.testing.assert_close(found, expected)
        assert peak <= most
