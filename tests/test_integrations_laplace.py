"""The backends for laplace-torch, against its own backends and against loops over examples in double precision."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("laplace")

from laplace import Laplace, marglik_training
from laplace.curvature import (
    AsdlEF,
    AsdlGGN,
    BackPackEF,
    BackPackGGN,
    CurvlinopsEF,
    CurvlinopsGGN,
)

from examples.laplace_digits import fit, trained
from lensor.integrations.laplace import LensorEF, LensorGGN

N, C = 10, 3
X = torch.randn(N, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double()
TARGETS = {
    "classification": torch.arange(N) % C,
    "regression": torch.randn(N, C, generator=torch.Generator().manual_seed(1)).double(),
}
LIKELIHOODS = list(TARGETS)
STRUCTURES = ["diag", "kron", "full"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(27, C),
    ).double()
    net.output_size = C
    return net


def normalised() -> nn.Sequential:
    """A model with layers that have no Kronecker factors."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, groups=1),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, stride=2, groups=2),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(32, C),
    ).double()


def close(found: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(found, expected, **({"rtol": 1e-9, "atol": 1e-11} | tolerance))


def blocks(kron: Any) -> list[Tensor]:
    return [one[0] if len(one) == 1 else torch.kron(*one) for one in kron.kfacs]


def rows(model: nn.Module, x: Tensor) -> Tensor:
    """The Jacobians [batch, outputs, parameters], one row after the other."""
    parameters = [one for one in model.parameters() if one.requires_grad]
    found = []
    for one in x:
        outputs = model(one[None])[0]
        for place in range(len(outputs)):
            grads = torch.autograd.grad(outputs[place], parameters, retain_graph=True)
            found.append(torch.cat([one.flatten() for one in grads]))
    return torch.stack(found).reshape(len(x), -1, found[0].numel())


def hessians(outputs: Tensor, likelihood: str) -> Tensor:
    if likelihood == "regression":
        return torch.eye(C).double().expand(len(outputs), C, C)
    p = outputs.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


# ------------------------------------------------------------------------------------------------- backends one by one
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(
    ("theirs", "structure"),
    [
        (theirs, structure)
        for theirs in (CurvlinopsGGN, AsdlGGN, BackPackGGN, CurvlinopsEF, AsdlEF, BackPackEF)
        for structure in STRUCTURES
        # BackPACK's factors differ, and it has none for the empirical Fisher.
        if structure != "kron" or theirs not in (BackPackGGN, BackPackEF)
    ],
)
def test_own_backends_of_laplace(theirs: Any, structure: str, likelihood: str) -> None:
    own = (LensorEF if theirs.__name__.endswith("EF") else LensorGGN)(network(), likelihood)
    loss, found = getattr(own, structure)(X, TARGETS[likelihood], N=2 * N)
    expected_loss, expected = getattr(theirs(network(), likelihood), structure)(X, TARGETS[likelihood], N=2 * N)
    close(loss, expected_loss)
    if structure != "kron":
        close(found, expected, **({"rtol": 1e-4, "atol": 1e-5} if theirs in (CurvlinopsGGN, CurvlinopsEF) else {}))
        return
    for one, other in zip(blocks(found), blocks(expected), strict=True):
        close(one, other)
    if theirs not in (AsdlGGN, AsdlEF):  # Asdl distributes the scale of regression differently
        for one, other in zip(found.kfacs, expected.kfacs, strict=True):
            for factor, theirs_factor in zip(one, other, strict=True):
                close(factor, theirs_factor)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_weight_sharing(kfac_approx: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten(), nn.Linear(12, C)).double()
    y = TARGETS["classification"]
    _, found = LensorGGN(model, "classification").kron(X[:, 0], y, N, kfac_approx=kfac_approx)
    _, expected = CurvlinopsGGN(model, "classification").kron(X[:, 0], y, N, kfac_approx=kfac_approx)
    for one, other in zip(blocks(found), blocks(expected), strict=True):
        close(one, other)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("make", [network, normalised])
def test_against_autograd(make: Any, likelihood: str) -> None:
    model = make().eval()
    next(model.parameters()).requires_grad_(False)
    backend, y = LensorGGN(model, likelihood), TARGETS[likelihood]
    expected = rows(model, X)
    found, outputs = backend.jacobians(X)
    close(found, expected)
    close(outputs, model(X).detach())
    full = torch.einsum("ncp,nck,nkq->pq", expected, hessians(outputs, likelihood), expected)
    close(backend.full(X, y)[1], full)
    close(backend.diag(X, y)[1], full.diagonal())
    found, loss = backend.gradients(X, y)
    close(loss, backend.lossfunc(outputs, y))
    residual = outputs.softmax(1) - nn.functional.one_hot(y, C) if y.ndim == 1 else 2 * (outputs - y)
    gradients = torch.einsum("ncp,nc->np", expected, residual)
    close(found, gradients)
    close(LensorEF(model, likelihood).diag(X, y)[1], backend.factor * gradients.square().sum(0))
    close(LensorEF(model, likelihood).full(X, y)[1], backend.factor * gradients.T @ gradients)


def test_jacobians_can_be_differentiated() -> None:
    model = network()
    x = X.clone().requires_grad_(True)
    found, outputs = LensorGGN(model, "regression").jacobians(x, enable_backprop=True)
    close(found, rows(model, X))
    assert torch.autograd.grad(found.sum() + outputs.sum(), x)[0].any()


def test_subnetwork_of_parameters() -> None:
    indices = torch.tensor([2, 50, 7])
    backend, y = LensorGGN(network(), "classification"), TARGETS["classification"]
    diagonal, full = backend.diag(X, y)[1][indices], backend.full(X, y)[1][indices][:, indices]
    subset = LensorGGN(network(), "classification", subnetwork_indices=indices)  # pyright: ignore[reportArgumentType]
    close(subset.diag(X, y)[1], diagonal)
    close(subset.full(X, y)[1], full)
    assert subset.gradients(X, y)[0].shape == (N, 3)
    with pytest.raises(ValueError, match="Kronecker factors of a subnetwork"):
        subset.kron(X, y, N)


@pytest.mark.parametrize("structure", ["diag", "full", "kron"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_samples(likelihood: str, structure: str) -> None:
    torch.manual_seed(0)
    y = TARGETS[likelihood]
    exact = getattr(LensorGGN(network(), likelihood), structure)(X, y, N=N)[1]
    found = getattr(LensorGGN(network(), likelihood, stochastic=True, num_samples=2000), structure)(X, y, N=N)[1]
    for one, other in zip(*[blocks(part) if structure == "kron" else [part] for part in (found, exact)], strict=True):
        assert (one - other).norm() < 0.1 * other.norm()
        assert not torch.equal(one, other)


class Named(nn.Module):
    """A model that takes a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, given: Any) -> Tensor:
        return self.net(given["input_ids"])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_mappings(structure: str) -> None:
    y = TARGETS["classification"]
    expected = getattr(LensorGGN(network(), "classification"), structure)(X, y, N=N)[1]
    given = {"input_ids": X, "labels": y}
    found = getattr(LensorGGN(Named(), "classification"), structure)(given, y, N=N)[1]
    for one, other in zip(
        *[blocks(part) if structure == "kron" else [part] for part in (found, expected)], strict=True
    ):
        close(one, other)


# ------------------------------------------------------------------------------------------------------- whole Laplace
def fitted(subset: str, structure: str, likelihood: Any, backend: Any, **options: Any) -> Any:
    found = Laplace(
        network(), likelihood, subset_of_weights=subset, hessian_structure=structure, backend=backend, **options
    )
    found.fit(DataLoader(TensorDataset(X, TARGETS[likelihood]), batch_size=4))
    return found


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("own", [LensorGGN, LensorEF])
def test_laplace(own: Any, subset: str, structure: str, likelihood: str) -> None:
    # CurvlinopsGGN computes full matrices in single precision, and these backends of Laplace support these cases.
    theirs: Any = CurvlinopsGGN if structure == "kron" else AsdlGGN
    if own is LensorEF:
        theirs = AsdlEF if structure == "kron" else BackPackEF
    found, expected = (fitted(subset, structure, likelihood, one) for one in (own, theirs))
    close(found.log_marginal_likelihood(), expected.log_marginal_likelihood())
    if likelihood == "classification":
        close(found(X), expected(X))
    else:
        for one, other in zip(found(X), expected(X), strict=True):
            close(one, other)


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_laplace_of_subnetworks(structure: str) -> None:
    indices = torch.arange(0, 160, 7)
    found, expected = (
        fitted("subnetwork", structure, "classification", backend, subnetwork_indices=indices)
        for backend in (LensorGGN, AsdlGGN)
    )
    close(found.log_marginal_likelihood(), expected.log_marginal_likelihood())
    close(found(X), expected(X))


def test_arguments_and_prior() -> None:
    found = fitted("all", "kron", "classification", LensorGGN, asdl_fisher_kwargs={"kfac_approx": "reduce"})
    assert not torch.equal(
        found.H_facs.kfacs[0][0], fitted("all", "kron", "classification", LensorGGN).H_facs.kfacs[0][0]
    )
    found.optimize_prior_precision(method="marglik", pred_type="glm")
    assert bool(found.log_marginal_likelihood().isfinite())
    stochastic = fitted("all", "diag", "classification", LensorGGN, backend_kwargs={"stochastic": True})
    assert bool(stochastic.log_marginal_likelihood().isfinite())


def test_training_with_the_marginal_likelihood() -> None:
    data = DataLoader(TensorDataset(X, TARGETS["classification"]), batch_size=5)
    found, *_ = marglik_training(
        network(), data, "classification", "diag", backend=LensorGGN, n_epochs=3, n_epochs_burnin=1, marglik_frequency=1
    )
    assert bool(found.log_marginal_likelihood().isfinite())


# -------------------------------------------------------------------------------------------------------------- errors
def test_errors() -> None:
    y = TARGETS["classification"]
    model = normalised().eval()
    model[1].weight = nn.Parameter(model[1].weight.detach()[:, None])
    with pytest.raises(ValueError, match=r"parameters 1.weight have no Kronecker factors, expected .* one axis"):
        LensorGGN(model, "classification").kron(X, y, N)
    model = normalised().eval()
    with pytest.raises(
        ValueError,
        match=r"layer '3' with the parameter '3.weight' has 2 groups, expected .*use hessian_structure='diag' or",
    ):
        LensorGGN(model, "classification").kron(X, y, N)
    model[3].requires_grad_(False)
    with pytest.raises(ValueError, match=r"layer '5' with the parameter '5.weight' is a transposed convolution"):
        LensorGGN(model, "classification").kron(X, y, N)
    model[5].requires_grad_(False)
    backend = LensorGGN(model, "classification")
    (_, found), (_, full), at = backend.kron(X, y, N), backend.full(X, y), 0
    for parameter, block in zip(backend.params, found.kfacs, strict=True):
        if parameter.ndim == 1 and len(parameter) == 4 and at > 40:  # the normalisations
            torch.testing.assert_close(block[0], full[at : at + 4, at : at + 4])
        at += parameter.numel()
    with pytest.raises(ValueError, match=r"examples are mixed by the statistics of 4"):
        LensorGGN(normalised(), "classification").diag(X, y)
    with pytest.raises(ValueError, match=r"outputs have shape .*expected \[batch, c\]"):
        LensorGGN(nn.Conv1d(2, 3, 3), "regression").jacobians(torch.randn(4, 2, 5))
    with pytest.raises(TypeError, match="unexpected keyword argument 'samples'"):
        LensorGGN(network(), "classification").kron(X, y, N, samples=2)  # pyright: ignore[reportCallIssue]


def test_missing_laplace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "laplace.curvature", None)
    monkeypatch.delitem(sys.modules, "lensor.integrations.laplace")
    with pytest.raises(ImportError, match=r"lensor.integrations.laplace requires laplace-torch 0.3"):
        importlib.import_module("lensor.integrations.laplace")


# -------------------------------------------------------------------------------------------------------------- example
@pytest.mark.parametrize("subset", ["last_layer", "all"])
def test_the_example(subset: str) -> None:
    model = trained(3)
    theirs, own = (fit(model, subset, "kron", backend, 300.0) for backend in ("laplace-torch", "Lensor"))
    assert own.evidence == pytest.approx(theirs.evidence, rel=1e-4)
    assert own.nll == pytest.approx(theirs.nll, rel=1e-3)
