"""torch's own transforms of functions: compile, export, vmap, grad, jvp, jacrev, autocast, meta tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.func import grad, jacrev, jvp, vmap  # noqa: E402

import lensor  # noqa: E402
from lensor import functional as F  # noqa: E402
from lensor import nn as lensor_nn  # noqa: E402
from lensor.dispatch import _captured_call  # noqa: E402

X = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
W = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
V = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
S = torch.randn(3, 2, 6, 9, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

CALLS: dict[str, Callable[[Any], Any]] = {
    "conv": lambda x: F.conv(x, W, padding=1, groups=2),
    "conv, circular": lambda x: F.conv(x, W, padding=1, groups=2, padding_mode="circular"),
    "conv, stride": lambda x: F.conv(x, W, stride=3, groups=2),
    "conv_transpose": lambda x: F.conv_transpose(x, W.new_ones(4, 3, 3, 3), stride=2, padding=1, groups=2),
    "unfold and fold": lambda x: F.fold(F.unfold(x, 3, padding=1), (9, 8), 3, padding=1),
    "unfold_transpose": lambda x: F.unfold_transpose(x, 3, stride=2),
    "conv_input_vjp": lambda x: F.conv_input_vjp((2, 8, 9, 8), x.new_ones(4, 2, 3, 3), x, padding=1, groups=4),
    "conv_weight_vjp": lambda x: F.conv_weight_vjp(x, W.shape, V, padding=1, groups=2),
    "conv_weight_vjp_per_example": lambda x: F.conv_weight_vjp_per_example(x, W.shape, V, padding=1, groups=2),
    "kfac_input_factor, reduce": lambda x: F.kfac_input_factor(x, 3, padding=1, groups=2, approx="reduce"),
    "kfac_input_factor, root": lambda x: F.kfac_input_factor(x, 3, padding=1, approx="reduce", form="root"),
    "kfac_input_factor, expand": lambda x: F.kfac_input_factor(x, 3, padding=1, approx="expand"),
    "kfac_input_factor, reflect": lambda x: F.kfac_input_factor(
        x, 3, padding=1, approx="reduce", padding_mode="reflect"
    ),
    "kfac_output_factor": lambda x: F.kfac_output_factor(x[None], 2, approx="expand"),
    "ggn_diagonal": lambda x: F.ggn_diagonal(x, W.shape, S, padding=1, groups=2),
    "ggn_gram": lambda x: F.ggn_gram(x, W.shape, S, padding=1, groups=2),
}

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def value_and_gradient(function: Callable[[Any], Any], x: Any) -> tuple[Any, Any]:
    x = x.clone().requires_grad_()
    result = function(x)
    cotangent = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).reshape(result.shape)
    (gradient,) = torch.autograd.grad(result, x, cotangent)
    return result.detach(), gradient


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (at % 2)) for at, name in enumerate(CALLS)]
)
def test_compiles_into_one_graph(name: str, backend: str) -> None:
    torch._dynamo.reset()
    call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    fixed_batch = "vjp" in name or "ggn" in name
    for x in (X, X.flip(0), *(() if fixed_batch else (X[:1], torch.cat([X, X, X])))):
        for found, expected in zip(value_and_gradient(compiled, x), value_and_gradient(call, x), strict=True):
            assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_the_mark_of_constant_functions_is_torch_s_own() -> None:
    def function() -> None: ...

    marked = vars(torch.compiler.assume_constant_result(function))
    assert marked
    assert {name: vars(_captured_call).get(name) for name in marked} == marked


def model() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, stride=2, groups=2),
        torch.nn.ConvTranspose2d(8, 6, 2, stride=2),
        torch.nn.Conv2d(6, 4, 1),
        torch.nn.Flatten(),
        torch.nn.Linear(192, 5),
    )


def test_a_converted_model_compiles() -> None:
    ours, x = lensor_nn.convert(model()), X.float()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected, found = model()(x), compiled(x)
    assert torch.allclose(found, expected, atol=1e-5)
    compiled(x).square().sum().backward()
    reference = model()
    reference(x).square().sum().backward()
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-4)


@pytest.mark.parametrize("strict", [True, False])
def test_a_converted_model_exports(strict: bool) -> None:
    ours, x = lensor_nn.convert(model()), X.float()
    exported = torch.export.export(ours, (x,), strict=strict)
    assert torch.allclose(exported.module()(x), model()(x), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith(("kfac", "unfold"))])
def test_meta_tensors_tell_shapes(name: str) -> None:
    assert CALLS[name](X.to("meta")).shape == CALLS[name](X).shape


def test_a_converted_model_on_meta() -> None:
    assert lensor_nn.convert(model()).to("meta")(X.float().to("meta")).shape == (2, 5)


def test_autocast() -> None:
    ours, reference, x = lensor_nn.convert(model()), model(), X.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = ours(x), reference(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), atol=0.05)


@pytest.mark.parametrize("name", [name for name in CALLS if "vjp" not in name and "ggn" not in name])
def test_vmap_of_grad_is_a_loop_without_warnings(name: str) -> None:
    def loss(x: Any) -> Any:
        return CALLS[name](x[None]).square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = vmap(grad(loss))(X)
    for one, x in zip(found, X, strict=True):
        x = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(x), x)
        assert torch.allclose(one, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["conv, stride", "conv, circular", "kfac_input_factor, reduce", "unfold_transpose"])
def test_jvp_and_jacrev(name: str) -> None:
    small, call = X[:, :, :4, :4].contiguous(), CALLS[name]
    jacobian = jacrev(call)(small)
    tangent = torch.linspace(-1, 1, small.numel(), dtype=small.dtype).reshape(small.shape)
    _, along = jvp(call, (small,), (tangent,))
    assert torch.allclose(along, torch.einsum("...abcd,abcd->...", jacobian, tangent), rtol=1e-9, atol=1e-9)
    nearby = (call(small + 1e-6 * tangent) - call(small - 1e-6 * tangent)) / 2e-6
    assert torch.allclose(along, nearby, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ planned derivatives
@pytest.mark.parametrize("name", CALLS)
def test_derivatives_hold_against_differences(name: str) -> None:
    """First and second derivatives, in both modes and batched, against torch's finite differences."""
    call, x = CALLS[name], X.clone().requires_grad_()
    assert torch.autograd.gradcheck(call, x, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, x, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_complex_derivatives_hold_against_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator, dtype=torch.complex128) for shape in ((2, 2, 3, 3), (4, 1, 3, 2)))

    def call(x: Any, w: Any) -> Any:
        return F.conv(x, w, stride=(2, 1), padding=1, groups=2)

    pair = (x.requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(call, pair, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, pair)


def test_a_network_with_an_operand_twice_and_a_sum_of_terms() -> None:
    """The product rule; an operand called V, as cotangents are."""
    net = lensor.contraction("n i, n i, i o -> n o", "V", "V", "T").bind(n=2, i=3)
    net = net.jvp("V", "U")
    assert len(net.terms) == 2
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 3), (2, 3), (3, 4))]

    def call(v: Any, u: Any, t: Any) -> Any:
        return net(V=v, U=u, T=t)

    v, u, t = arrays
    torch.testing.assert_close(call(v, u, t), 2 * (v * u) @ t)
    arrays = tuple(array.requires_grad_() for array in arrays)
    assert torch.autograd.gradcheck(call, arrays, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, arrays)


def kept_for_the_gradient(call: Callable[[], Any]) -> tuple[Any, list[Any]]:
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda found: kept.append(found) or found, lambda found: found):
        result = call()
    return result, kept


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_what_is_kept_for_the_gradient_are_operands(approx: str) -> None:
    x = X.clone().requires_grad_()
    result, kept = kept_for_the_gradient(lambda: F.kfac_input_factor(x, 3, padding=1, approx=approx))
    assert [found.untyped_storage().data_ptr() for found in kept] == [x.untyped_storage().data_ptr()]
    assert result.grad_fn is not None


def test_what_the_gradient_does_not_need_is_not_kept() -> None:
    x, w = X.clone(), W.clone().requires_grad_()
    _, kept = kept_for_the_gradient(lambda: F.conv(x, w, padding=1, groups=2))
    assert [found.data_ptr() for found in kept] == [x.data_ptr()]
    _, kept = kept_for_the_gradient(lambda: F.unfold(x.requires_grad_(), 3, padding=1))
    assert kept == []


def test_gradients_are_planned_within_the_memory_limit() -> None:
    """A limit that no derivative meets is told, at the backward pass."""
    x, w = X[:, :2].clone().requires_grad_(), W[:1, :, :1, :1].clone()
    assert x.numel() * x.itemsize > 2000
    with lensor.planning(max_bytes=2000):
        result = F.conv(x, w, stride=8)
    with pytest.raises(ValueError, match="max_bytes is"):
        result.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast(dtype: Any) -> None:
    x, w = X.float(), W.float().requires_grad_()

    def gradient(call: Callable[[], Any]) -> Any:
        with torch.autocast("cpu", dtype):
            result = call()
        assert result.dtype == dtype
        return torch.autograd.grad(result.float().square().sum(), w)[0]

    found = gradient(lambda: F.conv(x, w, padding=1, groups=2))
    expected = gradient(lambda: torch.nn.functional.conv2d(x, w, None, 1, 1, 1, 2))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2 * float(expected.abs().max()))
