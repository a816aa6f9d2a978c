"""torch's own transforms of functions: compile, export, vmap, grad, jvp, jacrev, autocast, meta tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.func import grad, jacrev, jvp, vmap  # noqa: E402

from lensor import functional as F  # noqa: E402
from lensor import nn as lensor_nn  # noqa: E402
from lensor.functional import _captured_call  # noqa: E402

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
@pytest.mark.parametrize("name", CALLS)
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
