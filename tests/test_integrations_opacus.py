"""Opacus with functions of Lensor, against Opacus itself, against loops over examples and against Lensor."""

from __future__ import annotations

import copy
import importlib
import sys
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import lensor.nn
from lensor.curvature import clipped_gradients

opacus = pytest.importorskip("opacus")

from opacus.grad_sample import GradSampleModule  # noqa: E402
from opacus.grad_sample.conv import compute_conv_grad_sample  # noqa: E402
from opacus.grad_sample.grad_sample_module import GradSampleHooks  # noqa: E402
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (  # noqa: E402
    GradSampleHooksFastGradientClipping,
)

from examples.opacus_training import train  # noqa: E402
from lensor.integrations.opacus import LAYERS, grad_samples, norm_samples, register  # noqa: E402

N = 4


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


def loop(layer: Any, x: Tensor, v: Tensor, **options: Any) -> dict[nn.Parameter, Tensor]:
    """The gradients of each example, one after the other."""
    parameters = [one for one in layer.parameters() if one.requires_grad]
    found = [
        torch.autograd.grad(layer(x[n : n + 1], **options), parameters, v[n : n + 1], allow_unused=True)
        for n in range(len(x))
    ]
    return dict(zip(parameters, [torch.stack(list(one)) for one in zip(*found, strict=True)], strict=True))


def check(layer: Any, x: Tensor, **options: Any) -> None:
    """Gradients and norms agree with the loop."""
    v = torch.randn_like(layer(x, **options))
    expected = loop(layer, x, v, **options)
    found, norms = grad_samples(layer, [x], v), norm_samples(layer, [x], v)
    assert set(found) == set(norms) == set(expected)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(norms[parameter], gradient.flatten(1).norm(dim=1), rtol=1e-9, atol=1e-9)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, Tensor]:
    dims = draw(st.integers(1, 3))
    own = draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = [groups * draw(st.integers(1, 2)) for _ in range(2)]

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation = each(1, 3), each(1, 2)
    named = {"dilation": dilation, "groups": groups, "bias": draw(st.booleans()), "dtype": torch.float64}
    if draw(st.booleans()):
        stride = each(1, 3)
        extra = tuple(min(one, s - 1) for one, s in zip(each(0, 2), stride, strict=True))
        named |= {"stride": stride, "padding": each(0, 1), "output_padding": extra}
        name, least = f"ConvTranspose{dims}d", 3
    else:
        padding: Any = draw(st.sampled_from(["same", "valid", None]))
        named["padding"] = each(0, 2) if padding is None else padding
        if padding != "same":
            named["stride"] = each(1, 3)
        named["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        name, least = f"Conv{dims}d", 5
    layer = getattr(lensor.nn if own else nn, name)(*channels, kernel, **named)
    size = each(least, least + 2)
    return layer, torch.randn(draw(st.integers(1, N)), channels[0], *size, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_all_hyper_parameters(case: tuple[Any, Tensor]) -> None:
    check(*case)


@pytest.mark.parametrize("size", [7, 8])
def test_output_size_of_a_transposed_convolution(size: int) -> None:
    layer = nn.ConvTranspose1d(2, 3, 3, stride=2, dtype=torch.float64)
    check(layer, torch.randn(N, 2, 3, dtype=torch.float64), output_size=(size,))


def test_pairs_of_paddings_and_four_dimensions() -> None:
    check(lensor.nn.ConvNd(2, 3, (2,), padding=((0, 2),), dtype=torch.float64), torch.randn(N, 2, 5).double())
    layer = lensor.nn.ConvNd(1, 2, 2, padding=1, padding_mode="circular", dims=4, dtype=torch.float64)
    check(layer, torch.randn(2, 1, 3, 3, 3, 3, dtype=torch.float64))


@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_opacus_own(dims: int, groups: int, padding: Any) -> None:
    layer: Any = getattr(nn, f"Conv{dims}d")(2, 4, 3, padding=padding, groups=groups, dilation=2, dtype=torch.float64)
    x = torch.randn(N, 2, *[6] * dims, dtype=torch.float64)
    v = torch.randn_like(layer(x))
    own, theirs = grad_samples(layer, [x], v), compute_conv_grad_sample(layer, [x], v)
    assert set(own) == set(theirs)
    for parameter, expected in theirs.items():
        torch.testing.assert_close(own[parameter], expected)


def test_opacus_ignores_the_padding_mode() -> None:
    """The reason why results differ from those of Opacus: fails when Opacus supports padding modes."""
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", dtype=torch.float64)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    v = torch.randn_like(layer(x))
    assert not torch.allclose(compute_conv_grad_sample(layer, [x], v)[layer.weight], loop(layer, x, v)[layer.weight])


def test_frozen_parameters_and_empty_batches() -> None:
    layer = nn.Conv1d(2, 3, 3)
    layer.weight.requires_grad_(False)
    assert set(grad_samples(layer, [torch.randn(N, 2, 5)], torch.randn(N, 3, 3))) == {layer.bias}
    layer = nn.Conv1d(2, 3, 3)
    empty = [torch.randn(0, 2, 5)], torch.randn(0, 3, 3)
    assert [tuple(one.shape) for one in grad_samples(layer, *empty).values()] == [(0, 3, 2, 3), (0, 3)]
    assert [tuple(one.shape) for one in norm_samples(layer, *empty).values()] == [(0,), (0,)]


def test_half_precision() -> None:
    layer = nn.Conv1d(2, 3, 3, dtype=torch.bfloat16)
    x, v = torch.randn(N, 2, 9).bfloat16(), torch.randn(N, 3, 7).bfloat16()
    wide = copy.deepcopy(layer).float()
    expected = loop(wide, x.float(), v.float())[wide.weight]
    found, norms = grad_samples(layer, [x], v)[layer.weight], norm_samples(layer, [x], v)[layer.weight]
    assert (found.dtype, norms.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found, expected.bfloat16())
    torch.testing.assert_close(norms, expected.flatten(1).norm(dim=1))


def test_errors() -> None:
    layer = nn.Conv1d(2, 3, 3)
    with pytest.raises(ValueError, match=r"input of Conv1d has shape \(2, 5\).*expected 3 axes"):
        grad_samples(layer, [torch.randn(2, 5)], torch.randn(3, 3))
    with pytest.raises(ValueError, match="same number of examples"):
        norm_samples(layer, [torch.randn(2, 2, 5)], torch.randn(4, 3, 3))
    layer = nn.Conv1d(2, 3, 3, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"Conv1d computes with torch\.complex64, expected real numbers"):
        grad_samples(layer, [torch.randn(2, 2, 5)], torch.randn(2, 3, 3))


# ------------------------------------------------------------------------------------------------------- registrations
def tables() -> list[dict[Any, Any]]:
    hooks, ghost = GradSampleHooks, GradSampleHooksFastGradientClipping
    return [dict(hooks.GRAD_SAMPLERS), dict(ghost.GRAD_SAMPLERS), dict(ghost.NORM_SAMPLERS)]


def test_registrations_are_undone() -> None:
    before = tables()
    with register():
        assert all(GradSampleHooks.GRAD_SAMPLERS[layer].func is grad_samples for layer in LAYERS)
        inner = register()
        inner.remove()
        inner.remove()
        assert GradSampleHooksFastGradientClipping.NORM_SAMPLERS[nn.Conv2d].func is norm_samples
    assert tables() == before
    with register(norms=False):
        assert nn.Conv2d not in GradSampleHooksFastGradientClipping.NORM_SAMPLERS
    assert tables() == before


def test_later_registrations_of_others_stay() -> None:
    before, other = tables(), object()
    registered = register()
    kept = GradSampleHooks.GRAD_SAMPLERS
    kept[nn.Conv1d] = other
    registered.remove()
    assert kept[nn.Conv1d] is other
    kept[nn.Conv1d] = compute_conv_grad_sample
    assert tables() == before


def test_missing_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    monkeypatch.delitem(sys.modules, "lensor.integrations.opacus")
    with pytest.raises(ImportError, match=r"lensor.integrations.opacus requires Opacus 1.6 \(pip install opacus\)"):
        importlib.import_module("lensor.integrations.opacus")


# -------------------------------------------------------------------------------------------------------- whole models
def network(mode: Any = "zeros") -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode=mode),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 4, 3, stride=3, dilation=2),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).double()


INPUTS = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.arange(8) % 3


def private(mode: str, net: nn.Module, count: int = len(INPUTS)) -> dict[str, Tensor]:
    """The gradients of one step of an engine without noise, for the first examples."""
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(INPUTS, LABELS), batch_size=8)
    made = opacus.PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        criterion=nn.CrossEntropyLoss(),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=0.05,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    model, optimizer, criterion = made[:3] if mode == "ghost" else (*made[:2], nn.CrossEntropyLoss())
    model.train()
    optimizer.zero_grad()
    criterion(model(INPUTS[:count]), LABELS[:count]).backward()
    optimizer.step()
    return {name.removeprefix("_module."): one.grad for name, one in model.named_parameters()}


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_private_training(mode: str) -> None:
    with register():
        found = private(mode, network())
    theirs = private("hooks", network())
    expected = clipped_gradients(network(), nn.CrossEntropyLoss(), (INPUTS, LABELS), 0.05)
    assert (expected.norms > 0.05).any()
    for name, gradient in expected.gradients.items():
        # Opacus divides by the norm plus 1e-6.
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(found[name], theirs[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_private_training_with_a_padding_mode(mode: str) -> None:
    with register():
        found = private(mode, network("reflect"))
    expected = clipped_gradients(network("reflect"), nn.CrossEntropyLoss(), (INPUTS, LABELS), 0.05).gradients
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_empty_batches_of_poisson_sampling(mode: str) -> None:
    """Opacus' own functions raise an error for the transposed convolution."""
    with register():
        found = private(mode, network(), 0)
    assert all(not one.any() for one in found.values())


def test_tied_layers_without_norms() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1)
    tied = nn.Sequential(layer, nn.Tanh(), layer, nn.Flatten(), nn.Linear(36, 3)).double()
    expected = clipped_gradients(tied, nn.CrossEntropyLoss(), (INPUTS, LABELS), 0.05).gradients
    with register(norms=False):
        found = private("ghost", copy.deepcopy(tied))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-8)


def test_autocast() -> None:
    layer = nn.Conv2d(1, 4, 3)
    x = INPUTS.float()
    with register():
        model = GradSampleModule(layer, loss_reduction="sum")
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).square().sum()
        loss.backward()
    found: Any = layer.weight.grad_sample
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(0), layer.weight.grad, rtol=0.05, atol=0.5)


# -------------------------------------------------------------------------------------------------------------- example
def test_the_example_trains_in_less_memory() -> None:
    theirs, own = (train(*one, epochs=1, noise=1.0, batch=64) for one in (("Opacus", "ghost"), ("Lensor", "ghost")))
    assert own.accuracy == pytest.approx(theirs.accuracy, abs=0.02)
    assert own.epsilon == pytest.approx(theirs.epsilon)
    assert own.peak < 0.5 * theirs.peak


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_registrations_are_removed_in_any_order(order: tuple[int, int]) -> None:
    samplers = GradSampleHooks.GRAD_SAMPLERS
    own = dict(samplers)
    registrations = register(), register()
    registrations[order[0]].remove()
    assert samplers[nn.Conv1d] is not own[nn.Conv1d]
    registrations[order[1]].remove()
    assert samplers == own
