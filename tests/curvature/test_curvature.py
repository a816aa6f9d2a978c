"""Curvature of whole models against explicit Jacobians and Hessians in double precision."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.utils.checkpoint import checkpoint

import lensor
from lensor import curvature
from lensor.curvature import KroneckerFactors, kfac
from lensor.curvature.block import _multiples, factor_of_identity, multiple_of_identity
from lensor.curvature.losses import LossRoot

N, CLASSES = 5, 3


def _models() -> dict[str, tuple[nn.Sequential, tuple[int, ...]]]:
    torch.manual_seed(0)
    return {
        "groups, circular, transposed": (
            nn.Sequential(
                nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2, padding_mode="circular"),
                nn.Tanh(),
                nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, output_padding=1),
                nn.ReLU(inplace=True),
                nn.Flatten(),
                nn.Linear(4 * 8 * 8, CLASSES),
            ).double(),
            (4, 6, 6),
        ),
        "1d, dilation, uneven same, shared linear": (
            nn.Sequential(
                nn.Conv1d(3, 4, 4, dilation=3, padding="same"),
                nn.Tanh(),
                nn.Linear(7, 5),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(20, CLASSES),
            ).double(),
            (3, 7),
        ),
        "3d, no bias": (
            nn.Sequential(
                nn.Conv3d(2, 4, 2, bias=False),
                nn.Tanh(),
                nn.ConvTranspose3d(4, 2, 2, bias=False),
                nn.Flatten(),
                nn.Linear(54, CLASSES, bias=False),
            ).double(),
            (2, 3, 3, 3),
        ),
        "depthwise, reflect": (
            nn.Sequential(
                nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"),
                nn.Softplus(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(4, CLASSES),
            ).double(),
            (4, 5, 4),
        ),
    }


MODELS = _models()
LOSSES: dict[str, nn.Module] = {
    "cross entropy": nn.CrossEntropyLoss(),
    "cross entropy, sum": nn.CrossEntropyLoss(reduction="sum"),
    "cross entropy, weights, smoothing": nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 1.0, 2.0]).double(), label_smoothing=0.2
    ),
    "cross entropy, ignored": nn.CrossEntropyLoss(ignore_index=1),
    "squared error": nn.MSELoss(),
    "squared error, sum": nn.MSELoss(reduction="sum"),
    "binary": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 1.0, 2.0]).double()),
    "binary, weights": nn.BCEWithLogitsLoss(weight=torch.tensor([0.5, 1.0, 2.0]).double()),
}


def data_for(shape: tuple[int, ...], loss: nn.Module, batch: int = N, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    if isinstance(loss, nn.CrossEntropyLoss):
        return x, torch.arange(batch) % CLASSES
    if isinstance(loss, nn.MSELoss):
        return x, torch.randn(batch, CLASSES, generator=generator, dtype=torch.float64)
    return x, torch.randint(2, (batch, CLASSES), generator=generator).double()


def close(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=atol)


def ggn(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], name: str) -> Tensor:
    """The block of a parameter of the GGN, from Jacobians and the loss's Hessian by the outputs."""
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    x, y = data

    def outputs(value: Tensor) -> Tensor:
        return functional_call(model, parameters | {name: value}, (x,))

    f = outputs(parameters[name])
    jacobian = jacrev(outputs)(parameters[name]).reshape(f.numel(), -1)
    curved = hessian(lambda out: loss(out, y))(f).reshape(f.numel(), f.numel())
    return jacobian.T @ curved @ jacobian


def own_gradients(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], name: str) -> Tensor:
    """Every example's part of the gradient: its rows of the outputs' Jacobian, times the loss's gradient there."""
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    x, y = data

    def outputs(value: Tensor) -> Tensor:
        return functional_call(model, parameters | {name: value}, (x,))

    f = outputs(parameters[name]).requires_grad_()
    (slope,) = torch.autograd.grad(loss(f, y), f)
    return torch.einsum("nc...,nc->n...", jacrev(outputs)(parameters[name]), slope)


# ---------------------------------------------------------------------------------------------------------- the factors
def explicit_factors(
    model: nn.Sequential, at: int, loss: nn.Module, data: tuple[Tensor, Tensor], approx: str, joint: bool
) -> tuple[Tensor, Tensor]:
    """A and B of a layer of a sequential model, from the layer's own Jacobian and the Hessian at its output."""
    layer: Any = model[at]
    x, y = data
    with torch.no_grad():
        before = copy.deepcopy(model[:at])(x)
        out = layer(before)
    weight, groups = layer.weight.detach(), getattr(layer, "groups", 1)
    transposed = getattr(layer, "transposed", False)
    linear = isinstance(layer, nn.Linear)
    places = out if not linear or out.ndim == 2 else out.movedim(-1, 1)
    positions = places.shape[2:].numel()
    channels = places.shape[1]

    def outputs(value: Tensor) -> Tensor:
        found = functional_call(layer, {"weight": value}, (before,))
        found = found if not linear or found.ndim == 2 else found.movedim(-1, 1)
        return found.reshape(len(x), groups, channels // groups, positions)[:, :, 0]  # the same for all rows of a group

    jacobian = jacrev(outputs)(weight)  # [n, g, o, *weight]
    if transposed:
        inner = weight.shape[0] // groups
        patches = torch.stack([jacobian[:, g, :, g * inner : (g + 1) * inner, 0].flatten(2) for g in range(groups)], 1)
    else:
        rows = channels // groups
        patches = torch.stack([jacobian[:, g, :, g * rows].flatten(2) for g in range(groups)], 1)  # [n, g, o, d]
    if joint and layer.bias is not None:
        patches = torch.cat([patches, torch.ones_like(patches[..., :1])], -1)
    rest = copy.deepcopy(model[at + 1 :])
    size = out.numel()
    curved = ggn_at_output(rest, loss, out, y).reshape(*(len(x), channels, positions) * 2)
    if linear and out.ndim > 2:
        curved = ggn_at_output(rest, loss, out, y).reshape(*(len(x), positions, channels) * 2).permute(0, 2, 1, 3, 5, 4)
    assert curved.numel() == size * size
    c = channels // groups
    curved = curved.reshape(*(len(x), groups, c, positions) * 2)
    if approx == "expand":
        a = torch.einsum("ngod,ngoe->gde", patches, patches) / len(x)
        b = torch.stack([torch.einsum("nconeo->ce", curved[:, g, :, :, :, g]) for g in range(groups)]) / positions
    else:
        mean = patches.mean(2)
        a = torch.einsum("ngd,nge->gde", mean, mean) / len(x)
        b = torch.stack([torch.einsum("nconep->ce", curved[:, g, :, :, :, g]) for g in range(groups)])
    return a, b


def ggn_at_output(rest: nn.Module, loss: nn.Module, out: Tensor, y: Tensor) -> Tensor:
    f = rest(out.clone()).detach()
    jacobian = jacrev(lambda value: rest(value.clone()))(out).reshape(f.numel(), out.numel())
    curved = hessian(lambda outputs: loss(outputs, y))(f).reshape(f.numel(), f.numel())
    return jacobian.T @ curved @ jacobian


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("model", MODELS)
def test_factors_are_their_definitions(model: str, bias: str, approx: str) -> None:
    net, shape = MODELS[model]
    loss = LOSSES["cross entropy, weights, smoothing"]
    data = data_for(shape, loss)
    found = kfac(net, loss, data, approx=approx, bias=bias)
    seen = 0
    for at, layer in enumerate(net):
        if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        a, b = explicit_factors(net, at, loss, data, approx, bias == "joint")
        block = found[f"{at}.weight"]
        close(block.A, a)
        close(block.B, b)
        seen += 1
        assert (f"{at}.bias" in found) == (bias == "separate" and layer.bias is not None)
    assert seen == len([name for name in found if name.endswith("weight")])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_factors_of_every_loss(loss: str, approx: str) -> None:
    net, shape = MODELS["1d, dilation, uneven same, shared linear"]
    data = data_for(shape, LOSSES[loss])
    found = kfac(net, LOSSES[loss], data, approx=approx)
    a, b = explicit_factors(net, 0, LOSSES[loss], data, approx, False)
    close(found["0.weight"].A, a)
    close(found["0.weight"].B, b)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_a_loader_is_one_batch_with_all_of_it(loss: str, approx: str, fisher: str) -> None:
    net, shape = MODELS["groups, circular, transposed"]
    x, y = data_for(shape, LOSSES[loss], batch=6)
    parts = [(x[:1], y[:1]), (x[1:2], y[1:2]), (x[2:], y[2:])]  # with "ignored" no target of the second counts
    whole = kfac(net, LOSSES[loss], (x, y), approx=approx, fisher=fisher)
    found = kfac(net, LOSSES[loss], parts, approx=approx, fisher=fisher)
    assert found.examples == 6
    for name, block in whole.items():
        close(found[name].A, block.A)
        close(found[name].B, block.B)


def _ekfac(net: nn.Module, loss: nn.Module, data: Any) -> dict[str, Tensor]:
    x, y = data_for(MODELS["groups, circular, transposed"][1], loss, batch=6)
    corrected = curvature.ekfac(net, loss, data, kfac(net, loss, (x, y)))
    return {name: values for name, (_, _, values) in corrected.parts.items()}


SUMMED: dict[str, Callable[..., Mapping[str, Tensor]]] = {
    "ggn_diagonal": curvature.ggn_diagonal,
    "ggn_mini_blocks": curvature.ggn_mini_blocks,
    "hessian_diagonal": curvature.hessian_diagonal,
    "ekfac": _ekfac,
}


@pytest.mark.parametrize("quantity", SUMMED)
def test_a_batch_of_which_no_target_counts_adds_nothing(quantity: str) -> None:
    net, shape = MODELS["groups, circular, transposed"]
    loss = nn.CrossEntropyLoss(ignore_index=1)
    x, y = data_for(shape, loss, batch=6)
    parts = [(x[:1], y[:1]), (x[1:2], y[1:2]), (x[2:], y[2:])]
    whole, found = (SUMMED[quantity](net, loss, data) for data in ((x, y), parts))
    for name, value in whole.items():
        close(found[name], value)
    with pytest.raises(ValueError, match="the data has no target that counts"):
        SUMMED[quantity](net, loss, parts[1])


def test_batchmean_divides_by_examples() -> None:
    net, loss = nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(1)).double(), nn.KLDivLoss(reduction="batchmean")
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    y = torch.cat([x, x[:, :1]], 1).softmax(1)
    parts = [(x[:2], y[:2]), (x[2:], y[2:])]
    whole, found = (curvature.hessian_diagonal(net, loss, data) for data in ((x, y), parts))
    for name, value in whole.items():
        close(found[name], value)


@pytest.mark.parametrize("loss", ["squared error", "squared error, sum", "cross entropy", "cross entropy, sum"])
@pytest.mark.parametrize("bias", ["separate", "joint"])
def test_linear_networks_with_squared_error_are_exact(loss: str, bias: str) -> None:
    """The Hessian by the outputs is the same for every example, so the expectation of the product is the product."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, CLASSES)).double()
    batch = N if loss.startswith("squared") else 1  # with one example the product is exact for any loss
    data = data_for((4,), LOSSES[loss], batch=batch)
    for approx in ("expand", "reduce"):
        found = kfac(net, LOSSES[loss], data, approx=approx, bias=bias)
        for at in (0, 1):
            exact = ggn(net, LOSSES[loss], data, f"{at}.weight")
            dense = found[f"{at}.weight"].dense()[0]
            if bias == "joint":
                inputs = net[at].in_features
                keep = [row * (inputs + 1) + column for row in range(3) for column in range(inputs)]
                dense = dense[keep][:, keep]
            else:
                close(found[f"{at}.bias"].dense()[0], ggn(net, LOSSES[loss], data, f"{at}.bias"))
            close(dense, exact)


def test_expand_is_exact_where_positions_are_examples() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, CLASSES)).double()
    loss = nn.MSELoss()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    data = (x, torch.randn(2, 6, CLASSES, generator=generator, dtype=torch.float64))
    found = kfac(net, loss, data, approx="expand")
    for name in found:
        close(found[name].dense()[0], ggn(net, loss, data, name))


def test_reduce_is_exact_where_positions_are_averaged() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).double()
    loss = nn.MSELoss()
    data = data_for((4, 5, 6), loss)
    found = kfac(net, loss, data, approx="reduce")
    exact = ggn(net, loss, data, "0.weight").reshape(2, 54, 2, 54)
    for g in range(2):
        close(found["0.weight"].dense()[g], exact[g, :, g])
    exact = ggn(net, loss, data, "0.bias").reshape(2, 3, 2, 3)
    for g in range(2):
        close(found["0.bias"].dense()[g], exact[g, :, g])


def test_one_position_of_a_convolution_is_a_linear_layer() -> None:
    torch.manual_seed(4)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, CLASSES)).double()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(27, 4), nn.Linear(4, CLASSES)).double()
    with torch.no_grad():
        linear[1].weight.copy_(conv[0].weight.flatten(1))
        linear[1].bias.copy_(conv[0].bias)
        linear[2].load_state_dict(conv[2].state_dict())
    data = data_for((3, 3, 3), nn.CrossEntropyLoss())
    a, b = (kfac(net, nn.CrossEntropyLoss(), data) for net in (conv, linear))
    close(a["0.weight"].A, b["1.weight"].A)
    close(a["0.weight"].B, b["1.weight"].B)


def test_sampled_fisher_is_unbiased() -> None:
    net, shape = MODELS["depthwise, reflect"]
    for name in ("cross entropy, weights, smoothing", "squared error", "binary, weights"):
        loss = LOSSES[name]
        data = data_for(shape, loss)
        exact = kfac(net, loss, data)
        generator = torch.Generator().manual_seed(0)
        often = [torch.cat([part] * 40) for part in data]  # each copy of an example is sampled for itself
        sampled = kfac(net, loss, often, fisher="mc", mc_samples=100, generator=generator)
        for key, block in exact.items():
            scale = float(block.B.abs().max())
            close(sampled[key].A, block.A)
            assert float((sampled[key].B - block.B).abs().max()) < 0.08 * scale, (name, key)
        few = [
            kfac(net, loss, data, fisher="mc", mc_samples=9, generator=torch.Generator().manual_seed(0)) for _ in "ab"
        ]
        close(few[0]["0.weight"].B, few[1]["0.weight"].B)


def test_empirical_fisher_is_made_of_the_examples_own_gradients() -> None:
    net = nn.Sequential(nn.Linear(4, CLASSES)).double()
    for name, scale in (("cross entropy", N), ("cross entropy, sum", 1), ("squared error", N * CLASSES)):
        loss = LOSSES[name]
        data = data_for((4,), loss)
        found = kfac(net, loss, data, fisher="empirical", bias="separate")
        rows = curvature.per_example_gradients(net, loss, data)["0.bias"]
        close(found["0.bias"].dense()[0], rows.T @ rows * scale)


def test_forward_only_needs_no_gradient_and_has_the_identity() -> None:
    net, shape = MODELS["groups, circular, transposed"]
    data = data_for(shape, nn.CrossEntropyLoss())
    found = kfac(net, nn.CrossEntropyLoss(), data, fisher="forward-only", approx="reduce")
    assert torch.equal(found["0.weight"].B, torch.eye(3).double().expand(2, 3, 3))
    assert found["0.weight"].root is not None
    close(found["0.weight"].A, kfac(net, nn.CrossEntropyLoss(), data, approx="reduce")["0.weight"].A)


def test_dense_outputs_have_a_target_at_every_position() -> None:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(2, CLASSES, 1)).double()
    loss = nn.CrossEntropyLoss(ignore_index=0)
    data = torch.randn(2, 2, 2, 3).double(), torch.randint(CLASSES, (2, 2, 3))
    exact = ggn(net, loss, data, "0.weight").diagonal().reshape(CLASSES, 2, 1, 1)
    close(curvature.ggn_diagonal(net, loss, data)["0.weight"], exact)


# ------------------------------------------------------------------------------------------------ the model as it was
def test_model_is_left_as_found() -> None:
    torch.manual_seed(6)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3))
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = copy.deepcopy(net.state_dict())
    data = torch.randn(4, 3, 5, 5), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"mixed by the statistics of 1: call model.eval\(\) first"):
        kfac(net, nn.CrossEntropyLoss(), data)
    kfac(net, nn.CrossEntropyLoss(), data, others="skip")
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert net[4].weight.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    with pytest.raises((RuntimeError, ValueError)):
        kfac(net, nn.CrossEntropyLoss(), (torch.randn(4, 2, 5, 5), data[1]), layers=["0", "4"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


QUANTITIES: dict[str, Callable[..., Any]] = {
    "kfac": kfac,
    "ggn_diagonal": curvature.ggn_diagonal,
    "ggn_mini_blocks": curvature.ggn_mini_blocks,
    "per_example_gradients": curvature.per_example_gradients,
    "per_example_gradient_norms": curvature.per_example_gradient_norms,
    "hessian_diagonal": curvature.hessian_diagonal,
}


def values_of(found: Any) -> dict[str, Tensor]:
    return {name: one.A if isinstance(one, curvature.Block) else one for name, one in found.items()}


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_normalisation_may_be_frozen_in_a_model_that_trains(quantity: str) -> None:
    torch.manual_seed(6)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).double()
    data = torch.randn(4, 3, 5, 5).double(), torch.tensor([0, 1, 2, 0])
    expected = values_of(QUANTITIES[quantity](net.eval(), nn.CrossEntropyLoss(), data, layers=["0", "4"]))
    net.train()[1].eval()
    for name, value in values_of(QUANTITIES[quantity](net, nn.CrossEntropyLoss(), data, layers=["0", "4"])).items():
        close(value, expected[name])


def test_statistics_are_kept_where_a_part_of_the_model_trains() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3)).eval()
    net[1].train()
    before = copy.deepcopy(net.state_dict())
    data = torch.randn(4, 3, 5, 5), torch.tensor([0, 1, 2, 0])
    kfac(net, nn.CrossEntropyLoss(), data, layers=["0", "3"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_gradients_need_not_be_enabled(quantity: str) -> None:
    net, shape = MODELS["depthwise, reflect"]
    data = data_for(shape, nn.CrossEntropyLoss())
    expected = values_of(QUANTITIES[quantity](net, nn.CrossEntropyLoss(), data))
    with torch.no_grad():
        found = values_of(QUANTITIES[quantity](net, nn.CrossEntropyLoss(), data))
    for name, value in found.items():
        close(value, expected[name])


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_one_example_and_inputs_that_are_not_contiguous(quantity: str) -> None:
    net, shape = MODELS["groups, circular, transposed"]
    x, y = data_for(shape, nn.CrossEntropyLoss())
    for inputs, targets in ((x[:1], y[:1]), (x, y)):
        plain = values_of(QUANTITIES[quantity](net, nn.CrossEntropyLoss(), (inputs, targets)))
        strided = inputs.to(memory_format=torch.channels_last)
        for name, value in values_of(QUANTITIES[quantity](net, nn.CrossEntropyLoss(), (strided, targets))).items():
            close(value, plain[name])


def test_half_precision_models_have_factors_in_single_precision() -> None:
    net, shape = MODELS["groups, circular, transposed"]
    x, y = data_for(shape, nn.CrossEntropyLoss())
    half, x = copy.deepcopy(net).bfloat16(), x.bfloat16().double()
    same = copy.deepcopy(half).double()
    for approx in ("expand", "reduce"):
        exact = kfac(same, nn.CrossEntropyLoss(), (x, y), approx=approx)
        for name, block in kfac(half, nn.CrossEntropyLoss(), (x.bfloat16(), y), approx=approx).items():
            assert block.A.dtype == block.B.dtype == torch.float32
            for value, expected in ((block.A, exact[name].A), (block.B, exact[name].B)):
                assert float((value - expected).abs().max()) < 0.03 * float(expected.abs().max()), name


def test_inputs_may_be_written_to_after_a_layer() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = x * 1.0
            first = self.a(hidden.detach())
            return first + self.b(hidden.mul_(3.0))

    x, y = torch.randn(3, 6).double(), torch.tensor([0, 1, 2])
    for approx in ("expand", "reduce"):
        found = kfac(Reused().double(), nn.CrossEntropyLoss(), (x, y), approx=approx, fisher="forward-only")
        close(found["a.weight"].A[0], x.T @ x / 3)
        close(found["b.weight"].A[0], 9 * x.T @ x / 3)


def test_frozen_parameters_have_factors_too() -> None:
    net, shape = MODELS["groups, circular, transposed"]
    frozen = copy.deepcopy(net)
    for parameter in frozen[:3].parameters():
        parameter.requires_grad_(False)
    data = data_for(shape, nn.CrossEntropyLoss())
    a, b = (kfac(one, nn.CrossEntropyLoss(), data) for one in (net, frozen))
    for name in a:
        close(a[name].B, b[name].B)
    with torch.no_grad():
        c = kfac(net, nn.CrossEntropyLoss(), data)
    close(c["0.weight"].B, a["0.weight"].B)


# -------------------------------------------------------------------------------------------------------- other answers
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_quantities_are_their_definitions(model: str, loss: str) -> None:
    net, shape = MODELS[model]
    criterion = LOSSES[loss]
    data = data_for(shape, criterion)
    diagonal = curvature.ggn_diagonal(net, criterion, data)
    gradients = curvature.per_example_gradients(net, criterion, data)
    norms = curvature.per_example_gradient_norms(net, criterion, data)
    blocks = curvature.ggn_mini_blocks(net, criterion, data)
    whole = torch.autograd.grad(criterion(net(data[0]), data[1]), list(net.parameters()))
    for (name, parameter), gradient in zip(net.named_parameters(), whole, strict=True):
        exact = ggn(net, criterion, data, name)
        close(diagonal[name], exact.diagonal().reshape(parameter.shape))
        close(gradients[name].sum(0), gradient)
        parts = own_gradients(net, criterion, data, name)
        close(gradients[name], parts)
        close(norms[name], parts.flatten(1).norm(dim=1))
        layer: Any = net.get_submodule(name.rpartition(".")[0])
        if name.endswith("weight") and not getattr(layer, "transposed", False):
            c = parameter.shape[0]
            filters = torch.stack([exact.reshape(c, -1, c, parameter[0].numel())[i, :, i] for i in range(c)])
            close(blocks[name], filters)


def test_per_example_gradients_are_those_of_single_examples() -> None:
    net, shape = MODELS["groups, circular, transposed"]
    x, y = data_for(shape, nn.CrossEntropyLoss())
    found = curvature.per_example_gradients(net, nn.CrossEntropyLoss(reduction="sum"), (x, y))
    for n in range(N):
        value = nn.CrossEntropyLoss(reduction="sum")(net(x[n : n + 1]), y[n : n + 1])
        for (name, _), one in zip(
            net.named_parameters(), torch.autograd.grad(value, list(net.parameters())), strict=True
        ):
            close(found[name][n], one)


@pytest.mark.parametrize("model", MODELS)
def test_hessian_diagonal(model: str) -> None:
    net, shape = MODELS[model]
    loss = LOSSES["cross entropy, weights, smoothing"]
    x, y = data_for(shape, loss)
    found = curvature.hessian_diagonal(net, loss, [(x[:2], y[:2]), (x[2:], y[2:])])
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(loss(net(x), y), parameters, create_graph=True)
    for (name, parameter), gradient in zip(net.named_parameters(), gradients, strict=True):
        for place in range(0, parameter.numel(), max(parameter.numel() // 7, 1)):
            (row,) = torch.autograd.grad(gradient.reshape(-1)[place], parameter, retain_graph=True)
            close(found[name].reshape(-1)[place], row.reshape(-1)[place])


@pytest.mark.slow
def test_hessian_diagonal_by_draws_is_unbiased() -> None:
    net, shape = MODELS["depthwise, reflect"]
    data = data_for(shape, nn.CrossEntropyLoss())
    exact = curvature.hessian_diagonal(net, nn.CrossEntropyLoss(), data)
    drawn = curvature.hessian_diagonal(
        net, nn.CrossEntropyLoss(), data, samples=3000, generator=torch.Generator().manual_seed(0)
    )
    for name, value in exact.items():
        assert float((drawn[name] - value).abs().max()) < 0.15 * float(value.abs().max()), name


@pytest.mark.parametrize("model", MODELS)
def test_empirical_ntk(model: str) -> None:
    net, shape = MODELS[model]
    x, _ = data_for(shape, nn.MSELoss())
    parameters = {name: value.detach() for name, value in net.named_parameters()}
    jacobians = jacrev(lambda p: functional_call(net, p, (x,)))(parameters)
    flat = torch.cat([j.reshape(N * CLASSES, -1) for j in jacobians.values()], 1)
    expected = (flat @ flat.T).reshape(N, CLASSES, N, CLASSES).permute(0, 2, 1, 3)
    close(curvature.empirical_ntk(net, x), expected)


# ------------------------------------------------------------------------------------------------------ as an operator
def factors(approx: str = "expand", bias: str = "separate", **options: Any) -> KroneckerFactors:
    net, shape = MODELS["groups, circular, transposed"]
    data = data_for(shape, nn.CrossEntropyLoss())
    return kfac(net, nn.CrossEntropyLoss(), data, approx=approx, bias=bias, **options)


def dense(found: KroneckerFactors) -> Tensor:
    """The operator as a matrix on flat vectors of parameters in their own layouts, from its blocks."""
    matrix = torch.zeros(found.size, found.size).double()
    ends = list(itertools.accumulate([0, *(int(np.prod(shape)) for shape in found.shapes.values())]))
    starts = dict(zip(found.shapes, ends, strict=False))
    index = {
        name: torch.arange(int(np.prod(shape))).reshape(shape) + starts[name] for name, shape in found.shapes.items()
    }
    for block in found.values():
        places = block.to_rows({name: index[name] for name in block.names}).flatten(1)
        for g, kron in enumerate(block.dense()):
            matrix[places[g][:, None], places[g][None]] = kron
    return matrix


@pytest.mark.parametrize(("approx", "bias"), list(itertools.product(["expand", "reduce"], ["separate", "joint"])))
def test_operator_is_its_matrix(approx: str, bias: str) -> None:
    found = factors(approx, bias)
    matrix = dense(found)
    vectors = torch.randn(2, 3, found.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(found @ vectors, vectors @ matrix)
    damped = matrix + 0.1 * torch.eye(len(matrix)).double()
    close(found.inverse(0.1) @ vectors, torch.linalg.solve(damped, vectors, left=False))
    close(found.logdet(0.1), torch.linalg.slogdet(damped)[1], atol=1e-7)
    close(found.trace(), matrix.trace())
    close(found.flatten(found.diagonal()), matrix.diagonal())
    eigen = found.eigh()
    close(eigen @ vectors, vectors @ matrix)
    close(eigen.inverse(0.1) @ vectors, torch.linalg.solve(damped, vectors, left=False))
    close(eigen.logdet(0.1), torch.linalg.slogdet(damped)[1], atol=1e-7)
    close(eigen.trace(), matrix.trace())
    linear = found.inverse(0.1).linear_operator()
    columns = vectors[0].T.numpy()
    np.testing.assert_allclose(linear @ columns, np.linalg.solve(damped.numpy(), columns), atol=1e-9)
    np.testing.assert_allclose(linear @ columns[:, 0], np.linalg.solve(damped.numpy(), columns[:, 0]), atol=1e-9)


def test_texts_of_factors_are_short() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 2, 3, groups=2, bias=False), torch.nn.Flatten(), torch.nn.Linear(8, 3)
    )
    data = torch.randn(5, 4, 4, 4), torch.randn(5, 3)
    factors = kfac(model, torch.nn.MSELoss(), data, approx="expand", bias="joint")
    assert repr(factors["0.weight"]) == "Block('0.weight', 2 × kron(B 1², A 18²))"
    assert repr(factors["2.weight"]) == "Block('2.weight', '2.bias', 1 × kron(B 3², A 9²))"
    rooted = kfac(model, torch.nn.MSELoss(), data, approx="reduce")
    assert repr(rooted["0.weight"]) == "Block('0.weight', 2 × kron(B 1², A 18²), A's root of 5 rows)"
    assert repr(rooted).splitlines()[1] == "  0.weight: 2 × kron(B 1², A 18²), A's root of 5 rows"
    assert repr(factors.inverse(0.1, "cholesky")) == "Inverse(damping=0.1, method='cholesky', 2 blocks)"
    assert repr(factors.eigh()) == "EigenFactors(2 blocks)"
    one = kfac(torch.nn.Linear(3, 2, bias=False), torch.nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 2)))
    assert repr(one.inverse(0.5)) == "Inverse(damping=0.5, method='eigen', 1 block)"


def test_a_block_is_in_the_order_of_the_weight() -> None:
    """kron(B, A) on the weight's own view, as documented: [g, c_out, (c_in k)]."""
    found = factors()
    block = found["0.weight"]
    w = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zeros = {name: torch.zeros(shape).double() for name, shape in found.shapes.items()}
    product = (found @ (zeros | {"0.weight": w}))["0.weight"]
    view = w.reshape(2, 3, 18)
    expected = torch.stack([torch.kron(block.B[g], block.A[g]) @ view[g].reshape(-1) for g in range(2)])
    close(product.reshape(2, -1), expected)


@pytest.mark.parametrize("bias", ["separate", "joint"])
def test_factored_damping(bias: str) -> None:
    found = factors("reduce", bias)
    inverse = found.inverse(0.01, "cholesky")
    v = {name: torch.randn(shape).double() for name, shape in found.shapes.items()}
    solved = inverse @ v
    block = found["2.weight"]
    rows = block.to_rows(solved)
    for g in range(2):
        a, b = block.A[g], block.B[g]
        pi = ((a.trace() / len(a)) / (b.trace() / len(b))) ** 0.5
        on_b, on_a = (torch.eye(len(matrix)).double() for matrix in (b, a))
        back = (b + 0.1 / pi * on_b) @ rows[g] @ (a + 0.1 * pi * on_a)
        close(back, block.to_rows(v)[g], atol=1e-8)
    if bias == "joint":
        by_root = found.inverse(0.01, "woodbury") @ v
        for name, value in solved.items():
            close(by_root[name], value, atol=1e-8)


def test_woodbury_is_exact_for_a_multiple_of_the_identity() -> None:
    found = factors("reduce", "joint", fisher="forward-only")
    v = torch.randn(found.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(found.inverse(0.05, "woodbury") @ v, found.inverse(0.05, "eigen") @ v, atol=1e-8)
    close(
        found.inverse(cast(Any, torch.tensor(0.05, dtype=torch.float64)), "woodbury") @ v,
        found.inverse(0.05, "woodbury") @ v,
    )


@pytest.mark.parametrize("write", [lambda one: one.mul_(2), lambda one: one[0, :2].add_(1)])
def test_a_multiple_of_the_identity_is_known_until_something_writes_into_it(write: Callable[[Tensor], Any]) -> None:
    found = multiple_of_identity(2, 3, 0.5, torch.zeros((), dtype=torch.float64))
    assert torch.equal(found, 0.5 * torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    assert factor_of_identity(found) == 0.5
    assert factor_of_identity(found.clone()) is None
    number = id(found)
    write(found)
    assert factor_of_identity(found) is None
    assert number in _multiples
    del found
    assert number not in _multiples


def test_roots_are_kept_while_they_are_smaller() -> None:
    net, shape = MODELS["groups, circular, transposed"]
    for batch, kept in ((5, True), (17, True), (18, False), (40, False)):
        found = kfac(net, nn.CrossEntropyLoss(), data_for(shape, nn.CrossEntropyLoss(), batch=batch), approx="reduce")
        assert (found["0.weight"].root is not None) == kept
        if kept:
            assert found["0.weight"].root.shape == (2, batch, 18)


@pytest.mark.parametrize("loss", ["cross entropy", "squared error, sum"])
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_corrected_eigenvalues_are_the_diagonal_of_the_ggn_in_the_eigenbasis(bias: str, loss: str) -> None:
    net, shape = MODELS["groups, circular, transposed"]
    criterion = LOSSES[loss]
    x, y = data_for(shape, criterion)
    found = kfac(net, criterion, (x, y), bias=bias)
    corrected = curvature.ekfac(net, criterion, [(x[:2], y[:2]), (x[2:], y[2:])], found)
    parameters = {name: value.detach() for name, value in net.named_parameters()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return functional_call(net, values, (x,))

    jacobians = {name: j.flatten(0, 1) for name, j in jacrev(outputs)(parameters).items()}
    f = outputs(parameters)
    curved = hessian(lambda out: criterion(out, y))(f).reshape(f.numel(), f.numel())
    for name, block in found.items():
        q_a, q_b, values = corrected.parts[name]
        rows = q_b.mT @ block.to_rows(jacobians) @ q_a
        close(values, torch.einsum("iabc,ij,jabc->abc", rows, curved, rows))
    v = torch.randn(found.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solved = corrected.inverse(0.2) @ v
    close(corrected @ solved + 0.2 * solved, v)


def test_averages() -> None:
    for approx in ("expand", "reduce"):
        old, new = factors(approx), factors(approx, fisher="empirical")
        expected = {
            name: (0.9 * block.A + 0.1 * new[name].A, 0.9 * block.B + 0.1 * new[name].B) for name, block in old.items()
        }
        assert old.ema_(new, 0.9) is old
        for name, (a, b) in expected.items():
            close(old[name].A, a)
            close(old[name].B, b)
    with pytest.raises(ValueError, match="other has different parameters"):
        factors("expand").ema_(factors("reduce"), 0.9)


def test_state_goes_through_a_file(tmp_path: Any) -> None:
    for approx, bias in itertools.product(["expand", "reduce"], ["separate", "joint"]):
        found = factors(approx, bias)
        torch.save(found.state_dict(), tmp_path / "factors.pt")
        again = KroneckerFactors.from_state_dict(torch.load(tmp_path / "factors.pt", weights_only=True))
        v = torch.randn(found.size).double()
        assert torch.equal(again @ v, found @ v)
        assert repr(again) == repr(found)
    with pytest.raises(ValueError, match="cannot read state"):
        KroneckerFactors.from_state_dict({"version": 2, "blocks": {}})


def test_conventions_leave_the_product_alone() -> None:
    paper, other = factors(), factors(convention="curvlinops")
    assert other.convention == "curvlinops"
    close(dense(paper), dense(other))
    positions = paper["0.weight"].positions
    assert positions == 9
    close(other["0.weight"].A * positions, paper["0.weight"].A)
    close(other.in_convention("paper")["0.weight"].B, paper["0.weight"].B)
    jax = other.in_convention("kfac-jax")
    close(jax["0.weight"].dense() * positions, paper["0.weight"].dense())
    with pytest.raises(ValueError, match="convention is 'k-fac', expected one of 'paper', 'curvlinops', 'singd'"):
        paper.in_convention("k-fac")
    with pytest.raises(ValueError, match="takes A from approx='expand' and B from approx='reduce'"):
        paper.in_convention("backpack")
    with pytest.raises(ValueError, match="expected one that defines factors for approx='reduce'"):
        factors("reduce").in_convention("kfac-jax")


# (A, B) from P = Σ p pᵀ, G = Σ g gᵀ of the summed loss, M = Σ g gᵀ of the mean one, N examples, O positions, C outputs.
LIBRARIES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "curvlinops": lambda p, g, m, n, o, c, mean: (p / (n * o), g / n if mean else g),
    "singd": lambda p, g, m, n, o, c, mean: (p / (n * o), m * n if mean else g),
    "asdl": lambda p, g, m, n, o, c, mean: (p / o / n, g / n),
    "nngeometry": lambda p, g, m, n, o, c, mean: (c**0.5 * p / n, g / (o * n * c**0.5)),
    "kfac-jax": lambda p, g, m, n, o, c, mean: (p / (n * o), g / (n * o) if mean else g / o),
    "kfac-pytorch": lambda p, g, m, n, o, c, mean: (p / (n * o**3), (m if mean else g) / (n * o**3)),
    "laplace": lambda p, g, m, n, o, c, mean: (p / n, g / o),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("convention", list(LIBRARIES))
def test_conventions_by_their_definitions(convention: str, reduction: str) -> None:
    torch.manual_seed(0)
    n, o, c = 6, 12, 5
    conv, linear = nn.Conv2d(2, 3, (2, 3), bias=False).double(), nn.Linear(36, c).double()
    x, y = torch.randn(n, 2, 4, 6, dtype=torch.float64), torch.arange(n) % c
    patches = nn.functional.unfold(x, (2, 3)).movedim(1, 2).flatten(0, 1)
    middle = conv(x)
    value = nn.functional.cross_entropy(linear(middle.flatten(1)), y, reduction="sum")
    (g,) = torch.autograd.grad(value, middle)
    g = g.flatten(2).movedim(1, 2).flatten(0, 1)
    sums = patches.mT @ patches, g.mT @ g, g.mT @ g / n**2
    a, b = LIBRARIES[convention](*sums, n, o, c, reduction == "mean")
    model, loss = nn.Sequential(conv, nn.Flatten(), linear), nn.CrossEntropyLoss(reduction=reduction)
    found = kfac(model, loss, (x, y), fisher="empirical", convention=convention)
    close(found["0.weight"].A[0], a)
    close(found["0.weight"].B[0], b)
    again = KroneckerFactors.from_state_dict(found.state_dict()).in_convention("paper")
    paper = kfac(model, loss, (x, y), fisher="empirical")
    for name, block in again.items():
        close(block.A, paper[name].A)
        close(block.B, paper[name].B)


def test_other_devices_and_dtypes() -> None:
    single = factors().to(torch.float32)
    assert single["0.weight"].A.dtype == torch.float32
    assert single.to("meta")["0.weight"].B.device.type == "meta"


# ------------------------------------------------------------------------------------------------------------ bad input
def _tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class _Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class _Standardised(nn.Conv1d):
    """A layer that computes with another weight than its own."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean()
        return nn.functional.conv1d(input, weight, self.bias)


class _Scaled(nn.Linear):
    """A layer with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.scale = nn.Parameter(torch.ones(()))


class _Without(nn.Module):
    """A first layer at whose output no gradient is recorded."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                x = self.first(x)
        else:
            x = checkpoint(self.first, x.requires_grad_(), use_reentrant=True)
        return self.last(x)


class _Summed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(0)


def test_other_functions_of_a_weight_are_no_layers() -> None:
    """Subclasses with a forward pass of their own and parametrisations: never taken for the plain layer."""
    parametrized, old = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    nn.utils.parametrizations.weight_norm(parametrized[0])
    nn.utils.spectral_norm(old[0])
    nets = [
        nn.Sequential(_Standardised(4, 3, 1), nn.Flatten(), nn.Linear(9, 3)),
        nn.Sequential(_Scaled(), nn.Linear(3, 3)),
        parametrized,
        old,
    ]
    for net in nets:
        x = torch.randn(4, 4, 3) if net is nets[0] else torch.randn(4, 3)
        found = kfac(net, nn.CrossEntropyLoss(), (x, Y))
        assert set(found) == set(dict(net.named_parameters()))
        assert all(block.factored != name.startswith("0.") for name, block in found.items())
        net.eval()
        wanted = torch.autograd.grad(nn.CrossEntropyLoss()(net(x), Y), list(net.parameters()), materialize_grads=True)
        gradients = curvature.per_example_gradients(net, nn.CrossEntropyLoss(), (x, Y))
        for key, want in zip(dict(net.named_parameters()), wanted, strict=True):
            torch.testing.assert_close(gradients[key].sum(0), want)
        first = next(name for name in found if name.startswith("0."))
        with pytest.raises(ValueError, match=f"the parameters '{first}'.* have no Kronecker factors"):
            kfac(net, nn.CrossEntropyLoss(), (x, Y), strict=True)
    own = nn.Sequential(lensor.nn.Conv1d(4, 3, 1), nn.Flatten(), lensor.sampling.Linear(9, 3, keep={"n": 0.5}))
    assert set(kfac(own.eval(), nn.CrossEntropyLoss(), (torch.randn(4, 4, 3), Y), strict=True)) >= {
        "0.weight",
        "2.weight",
    }


def test_batches_may_differ_in_their_positions() -> None:
    """A linear layer that is the model: expand is exact, whatever the order of batches with 3 and 5 positions."""
    net, loss = nn.Linear(3, 2).double(), nn.MSELoss(reduction="sum")
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(2, o, 3, generator=generator).double(), torch.zeros(2, o, 2).double()) for o in (3, 5)]
    expected = {name: sum(ggn(net, loss, one, name) for one in data) for name in ("weight", "bias")}
    for pairs in (data, data[::-1]):
        found = kfac(net, loss, pairs, convention="paper")
        for name, block in found.items():
            close(block.dense()[0], expected[name])
        with pytest.raises(ValueError, match="the number of positions of weight varies"):
            found.in_convention("curvlinops")
        assert found.in_convention("paper")["weight"].positions == 0


def test_outputs_may_have_rows_for_each_example() -> None:
    """[batch · positions, classes], the examples outermost, as [batch, classes, positions]."""

    class Folded(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(1, 2).reshape(-1, CLASSES)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, CLASSES, 1)).double()
    x, y = torch.randn(N, 2, 5).double(), torch.randint(CLASSES, (N, 4))
    other = Folded(*net)
    for loss in (nn.CrossEntropyLoss(), nn.MSELoss()):
        targets = y if isinstance(loss, nn.CrossEntropyLoss) else nn.functional.one_hot(y).movedim(-1, 1).double()
        rows = targets.flatten() if targets.ndim == 2 else targets.transpose(1, 2).reshape(-1, CLASSES)
        for approx in ("expand", "reduce"):
            a, b = kfac(net, loss, (x, targets), approx=approx), kfac(other, loss, (x, rows), approx=approx)
            for name in a:
                close(a[name].A, b[name].A)
                close(a[name].B, b[name].B)
        a, b = curvature.ggn_diagonal(net, loss, (x, targets)), curvature.ggn_diagonal(other, loss, (x, rows))
        for name in a:
            close(a[name], b[name])
            close(b[name].flatten(), ggn(other, loss, (x, rows), name).diagonal())


def test_an_inverse_of_eigenfactors_has_a_trace_a_determinant_and_an_inverse() -> None:
    found = factors().eigh()
    inverse = found.inverse(0.1)
    matrix = torch.linalg.inv(dense(factors()) + 0.1 * torch.eye(found.size).double())
    close(inverse.trace(), matrix.trace())
    close(inverse.logdet(0.2), torch.linalg.slogdet(matrix + 0.2 * torch.eye(len(matrix)).double())[1])
    vector = torch.randn(found.size, generator=torch.Generator().manual_seed(0)).double()
    close(inverse.inverse(0.5) @ vector, torch.linalg.solve(matrix + 0.5 * torch.eye(len(matrix)).double(), vector))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_s_divisor_is_not_rounded(dtype: torch.dtype) -> None:
    net = nn.Conv2d(1, 2, 1).to(dtype)
    x, y = torch.randn(1, 1, 300, 300).to(dtype), torch.randint(2, (1, 300, 300))
    half = kfac(net, nn.CrossEntropyLoss(), (x, y), fisher="empirical")["weight"].B
    whole = kfac(copy.deepcopy(net).double(), nn.CrossEntropyLoss(), (x.double(), y), fisher="empirical")["weight"].B
    assert LossRoot(nn.CrossEntropyLoss(), net(x), y, 1).normaliser == 90_000
    torch.testing.assert_close(half.double(), whole, rtol=3e-2, atol=1e-3 * float(whole.max()))


def test_inputs_may_be_several_or_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a + b)

    net = Two()
    expected = kfac(net.layer, nn.CrossEntropyLoss(), (2 * X, Y))["weight"].A
    for inputs in ((X, X), [X, X], {"a": X, "b": X}):
        torch.testing.assert_close(kfac(net, nn.CrossEntropyLoss(), (inputs, Y))["layer.weight"].A, expected)
        torch.testing.assert_close(kfac(net, nn.CrossEntropyLoss(), [(inputs, Y)])["layer.weight"].A, expected)


X, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (lambda: kfac(3, nn.MSELoss(), (X, X)), TypeError, "model has type int, expected torch.nn.Module"),
    "no parameter": (lambda: kfac(nn.ReLU(), nn.MSELoss(), (X, X)), ValueError, "no layer and no parameter"),
    "no layer": (lambda: kfac(nn.LayerNorm(3), nn.MSELoss(), (X, X), others="skip"), ValueError, "no convolution"),
    "others": (lambda: kfac(nn.Linear(3, 3), nn.MSELoss(), (X, X), others="all"), ValueError, "'diagonal', 'full'"),
    "others without gradients": (
        lambda: kfac(nn.Linear(3, 3), nn.MSELoss(), (X, X), others="full", fisher="forward-only"),
        ValueError,
        "others is 'full', expected 'skip' for fisher='forward-only'",
    ),
    "loss": (lambda: kfac(nn.Linear(3, 3), nn.L1Loss(), (X, X)), TypeError, "L1Loss, expected torch.nn.CrossEntropy"),
    "reduction": (
        lambda: kfac(nn.Linear(3, 3), nn.MSELoss(reduction="none"), (X, X)),
        ValueError,
        "reduction='none', expected 'mean' or 'sum'",
    ),
    "approx": (lambda: kfac(nn.Linear(3, 3), nn.MSELoss(), (X, X), approx="kfc"), ValueError, "'expand', 'reduce'"),
    "fisher": (lambda: kfac(nn.Linear(3, 3), nn.MSELoss(), (X, X), fisher="ef"), ValueError, "'type-2', 'mc'"),
    "tied": (
        lambda: kfac(_tied(), nn.MSELoss(), (X, X), bias="joint"),
        ValueError,
        "the weight '0.weight' is not always used together with the bias '0.bias'",
    ),
    "twice": (lambda: curvature.ggn_mini_blocks(_Twice(), nn.MSELoss(), (X, X)), ValueError, "twice"),
    "idle": (lambda: kfac(_Idle(), nn.MSELoss(), (X, X)), ValueError, "did not run on the data.*idle"),
    "layer": (
        lambda: kfac(_Idle(), nn.MSELoss(), (X, X), layers=["nope"]),
        ValueError,
        "layers has 'nope', expected names from 'used', 'idle'",
    ),
    "data": (lambda: kfac(nn.Linear(3, 3), nn.MSELoss(), X), TypeError, "data is a tensor, expected a pair"),
    "empty": (lambda: kfac(nn.Linear(3, 3), nn.MSELoss(), []), ValueError, "data is empty"),
    "targets": (
        lambda: kfac(nn.Linear(3, 3), nn.CrossEntropyLoss(), (X, Y[:3])),
        ValueError,
        r"targets have shape \(3,\), expected \(4,\)",
    ),
    "unbatched": (
        lambda: kfac(nn.Conv1d(1, 1, 1), nn.MSELoss(), (torch.ones(1, 5), torch.ones(1, 5))),
        ValueError,
        r"shape \(1, 5\), expected a batch of 1 examples first",
    ),
    "nan": (
        lambda: kfac(nn.Linear(3, 3), nn.MSELoss(), (X * torch.nan, X)),
        FloatingPointError,
        "factor A of weight is not finite",
    ),
    "nan, drawn": (
        lambda: kfac(nn.Linear(3, 3), nn.CrossEntropyLoss(), (X * torch.nan, Y), fisher="mc"),
        FloatingPointError,
        "factor A of weight is not finite",
    ),
    "nan, drawn, binary": (
        lambda: kfac(nn.Linear(3, 3), nn.BCEWithLogitsLoss(), (X * torch.nan, X), fisher="mc"),
        FloatingPointError,
        "factor A of weight is not finite",
    ),
    "no gradient": (
        lambda: kfac(_Without("no_grad"), nn.CrossEntropyLoss(), (X, Y)),
        ValueError,
        "gradients are not recorded .*: first.*; leave them out with layers=",
    ),
    "reentrant checkpoint": (
        lambda: curvature.ggn_diagonal(_Without("checkpoint"), nn.CrossEntropyLoss(), (X, Y)),
        ValueError,
        "gradients are not recorded .*: first.*; leave them out with layers=",
    ),
    "no vector": (
        lambda: kfac(nn.Linear(3, 3), nn.MSELoss(), (X, X)) @ 3,
        TypeError,
        "the vector is of type int, expected a tensor or a mapping from parameters to tensors",
    ),
    "a vector of another dtype": (
        lambda: (
            kfac(nn.Linear(3, 3), nn.MSELoss(), (X, X), bias="joint")
            @ {
                "weight": torch.ones(3, 3).double(),
                "bias": torch.ones(3),
            }
        ),
        TypeError,
        "weight is torch.float64, expected a tensor of the factors' torch.float32",
    ),
    "rows": (
        lambda: kfac(_Summed(nn.Linear(3, 3)), nn.MSELoss(), (X, torch.ones(3))),
        ValueError,
        r"the model's outputs have shape \(3,\) for 4 examples, expected the examples",
    ),
    "no example": (
        lambda: curvature.ggn_diagonal(nn.Linear(3, 3), nn.MSELoss(), (X[:0], X[:0])),
        ValueError,
        "the batch is empty",
    ),
    "no layers": (lambda: kfac(nn.Linear(3, 3), nn.MSELoss(), (X, X), layers=[]), ValueError, "layers is empty"),
    "batches without reduction": (
        lambda: curvature.hessian_diagonal(nn.Linear(3, 3), lambda f, t: (f - t).square().sum(), [(X, X), (X, X)]),
        ValueError,
        "data has several batches, expected one for this loss",
    ),
    "ntk of rows": (
        lambda: curvature.empirical_ntk(
            nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 1)), nn.Flatten(0, 1), nn.Linear(1, 1)), X
        ),
        ValueError,
        r"outputs have shape \(12, 1\), expected \[batch, c\]",
    ),
    "lazy": (lambda: kfac(nn.LazyLinear(3), nn.MSELoss(), (X, X)), ValueError, "lazy"),
    "strict": (
        lambda: kfac(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), nn.MSELoss(), (X, X), strict=True),
        ValueError,
        "the parameters '1.weight', '1.bias' have no Kronecker factors",
    ),
    "mixing": (
        lambda: curvature.per_example_gradients(
            nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)), nn.MSELoss(), (X, X)
        ),
        ValueError,
        r"mixed by the statistics of 1: call model.eval\(\) first",
    ),
    "damping": (lambda: factors().inverse(0.0), ValueError, "damping is 0.0, expected a positive number"),
    "damping by name": (
        lambda: factors().inverse(damping={"a": 1}),  # type: ignore[arg-type]
        TypeError,
        r"damping is {'a': 1} of type dict, expected a number",
    ),
    "damping of a determinant": (
        lambda: factors().logdet(damping="a"),  # type: ignore[arg-type]
        TypeError,
        "damping is 'a' of type str, expected a number",
    ),
    "average with a number": (
        lambda: factors().ema_(3, decay=0.5),  # type: ignore[arg-type]
        TypeError,
        "other is 3 of type int, expected a KroneckerFactors",
    ),
    "ekfac without factors": (
        lambda: curvature.ekfac(nn.Linear(3, 3), nn.MSELoss(), (X, X), 3),  # type: ignore[arg-type]
        TypeError,
        "factors is 3 of type int, expected a KroneckerFactors",
    ),
    "ekfac with the factors of another model": (
        lambda: curvature.ekfac(nn.Linear(3, 3), nn.MSELoss(), (X, X), factors()),
        ValueError,
        "factors has '0.weight', expected the factors of this model",
    ),
    "ekfac with the factors of another shape": (
        lambda: curvature.ekfac(
            nn.Linear(3, 2), nn.MSELoss(), (X, X[:, :2]), kfac(nn.Linear(3, 3), nn.MSELoss(), (X, X))
        ),
        ValueError,
        r"the factors of 'weight' have shape \(3, 3\), expected that of the model: \(2, 3\)",
    ),
    "class weights": (
        lambda: kfac(nn.Linear(3, 3), nn.CrossEntropyLoss(weight=torch.ones(2)), (X, Y)),
        ValueError,
        r"the weight of the loss has shape \(2,\), expected \(3,\)",
    ),
    "classes as floats": (
        lambda: kfac(nn.Linear(3, 3), nn.CrossEntropyLoss(), (X, Y.float())),
        TypeError,
        r"targets have dtype torch.float32 and shape \(4,\), expected integer class indices",
    ),
    "batch axis of no layer": (
        lambda: kfac(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.MSELoss(), (X, X), batch_axis={"zz": 0, "1": 0}),
        ValueError,
        "batch_axis has 'zz', '1', expected names from '0'",
    ),
    "group": (
        lambda: kfac(nn.Linear(3, 3), nn.MSELoss(), (X, X), group="x"),  # type: ignore[arg-type]
        TypeError,
        "group is 'x' of type str, expected a ProcessGroup",
    ),
    "ntk with targets": (
        lambda: curvature.empirical_ntk(nn.Linear(3, 3), (X, Y)),
        TypeError,
        "inputs is a tuple of 2 entries, expected the arguments of the model's forward pass, without targets: .*takes",
    ),
    "method": (
        lambda: factors().inverse(1.0, "lu"),
        ValueError,
        "method is 'lu', expected one of 'cholesky', 'eigen', 'woodbury'",
    ),
    "no root": (lambda: factors().inverse(1.0, "woodbury"), ValueError, "0.weight has no root"),
    "missing": (lambda: factors() @ {}, KeyError, "missing parameters"),
    "size": (lambda: factors() @ torch.ones(3), ValueError, "in its last axis"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore")
def test_bad_input(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
