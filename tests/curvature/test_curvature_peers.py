"""Whole-model curvature compared with other libraries, on what they support, in their own conventions.

`make peers` installs them. Without them these tests are skipped, which fails in CI.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensor import curvature

N, CLASSES = 6, 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 4, 2, dilation=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    ).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, 8, 8, generator=generator).double(), torch.arange(N) % CLASSES


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_curvlinops(bias: str, fisher: str, approx: str, reduction: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    net, loss, data = network(), nn.CrossEntropyLoss(reduction=reduction), batch()
    theirs = curvlinops.KFACLinearOperator(
        net,
        loss,
        list(net.parameters()),
        [data],
        fisher_type=fisher,
        kfac_approx=approx,
        separate_weight_and_bias=bias == "separate",
        check_deterministic=False,
    )
    theirs.compute_kronecker_factors()
    own = curvature.kfac(net, loss, data, approx=approx, fisher=fisher, bias=bias, convention="curvlinops")
    for name in ("0", "2", "5"):
        block = own[f"{name}.weight"]
        close(block.A[0], theirs._input_covariances[name])
        if fisher != "forward-only":  # theirs keeps no identity
            close(block.B[0], theirs._gradient_covariances[name])


def backpacked(extension: Any, loss: nn.Module) -> nn.Module:
    backpack = importlib.import_module("backpack")
    net, criterion = backpack.extend(network()), backpack.extend(copy.deepcopy(loss))
    x, y = batch()
    with backpack.backpack(extension):
        criterion(net(x), y).backward()
    return net


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")], ids=["mean", "sum"])
def test_backpack(loss: nn.Module) -> None:
    pytest.importorskip("backpack")
    extensions = importlib.import_module("backpack.extensions")
    data = batch()
    for extension, attribute, own in (
        (extensions.DiagGGNExact(), "diag_ggn_exact", curvature.ggn_diagonal),
        (extensions.BatchGrad(), "grad_batch", curvature.per_example_gradients),
        (extensions.BatchL2Grad(), "batch_l2", curvature.per_example_gradient_norms),
    ):
        found = own(network(), loss, data)
        for name, parameter in backpacked(extension, loss).named_parameters():
            expected = getattr(parameter, attribute)
            close(found[name] ** 2 if attribute == "batch_l2" else found[name], expected)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")], ids=["mean", "sum"])
def test_backpack_kronecker_factors(loss: nn.Module) -> None:
    """Its input factor is KFC's, its output factor sums positions first."""
    pytest.importorskip("backpack")
    extensions = importlib.import_module("backpack.extensions")
    expand, reduce = (curvature.kfac(network(), loss, batch(), approx=approx) for approx in ("expand", "reduce"))
    for name, parameter in backpacked(extensions.KFLR(), loss).named_parameters():
        if name.endswith("weight"):
            b, a = getattr(parameter, "kflr")  # noqa: B009 - put there by BackPACK
            close(expand[name].A[0], a)
            close(reduce[name].B[0], b)


def test_opacus() -> None:
    pytest.importorskip("opacus")
    sampled = importlib.import_module("opacus").GradSampleModule(network(), loss_reduction="mean")
    x, y = batch()
    nn.CrossEntropyLoss()(sampled(x), y).backward()
    found = curvature.per_example_gradients(network(), nn.CrossEntropyLoss(), (x, y))
    for name, parameter in sampled.named_parameters():
        close(found[name.removeprefix("_module.")] * N, parameter.grad_sample)


def test_torch_func() -> None:
    net, (x, y) = network(), batch()
    parameters = {name: value.detach() for name, value in net.named_parameters()}

    def loss(values: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(net, values, (one[None],)), label[None])

    expected = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    for name, found in curvature.per_example_gradients(net, nn.CrossEntropyLoss(), (x, y)).items():
        close(found * N, expected[name])
