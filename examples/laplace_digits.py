"""Laplace approximations of a small CNN on the digits of scikit-learn with laplace-torch, with curvature by Lensor.

    python -m examples.laplace_digits [--epochs 30] [--prior 300]

The CNN is trained on a part of the digits. Then laplace-torch fits Kronecker-factored and diagonal approximations of
the last layer and of all layers, with its own backend (CurvlinopsGGN) and with LensorGGN. The table shows the logarithm
of the marginal likelihood, the negative log-likelihood and the calibration error of the test images, and the seconds to
fit and to predict.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from laplace import Laplace  # type: ignore[import-not-found]
from laplace.curvature import CurvlinopsGGN  # type: ignore[import-not-found]
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lensor.integrations.laplace import LensorGGN

BACKENDS = {"laplace-torch": CurvlinopsGGN, "Lensor": LensorGGN}


class Fit(NamedTuple):
    """One approximation.

    Args:
        subset: "last_layer" or "all".
        structure: "kron" or "diag".
        backend: a key of `BACKENDS`.
        evidence: the log marginal likelihood.
        nll: the mean negative log-likelihood of the test images.
        error: the expected calibration error for the test images.
        fit_seconds: the time to fit.
        predict_seconds: the time to predict the test images.
    """

    subset: str
    structure: str
    backend: str
    evidence: float
    nll: float
    error: float
    fit_seconds: float
    predict_seconds: float


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The images [1, 8, 8] and classes for training, and for the test."""
    found: Any = load_digits()
    images = torch.tensor(found.images / 16.0, dtype=torch.float32)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(found.target)[order]
    return TensorDataset(images[:300], labels[:300]), TensorDataset(images[1697:], labels[1697:])


def trained(epochs: int) -> nn.Sequential:
    """The CNN after training."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for images, labels in DataLoader(digits()[0], batch_size=100, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def scores(probabilities: Tensor, labels: Tensor, bins: int = 10) -> tuple[float, float]:
    """The mean negative log-likelihood, and the expected calibration error (Guo et al., 2017)."""
    nll = nn.functional.nll_loss(probabilities.log(), labels)
    confidence, classes = probabilities.max(1)
    places = (confidence * bins).long().clamp_max(bins - 1)
    gaps = [
        (confidence[places == one] - (classes == labels)[places == one].float()).sum().abs()
        for one in range(bins)
        if (places == one).any()
    ]
    return float(nll), float(torch.stack(gaps).sum() / len(labels))


def fit(model: nn.Module, subset: str, structure: str, backend: str, prior: float) -> Fit:
    """Fit one approximation, after a first batch for which plans are made, and predict."""
    data, test = digits()
    found: Any = Laplace(model, "classification", subset, structure, prior_precision=prior, backend=BACKENDS[backend])
    found.fit(DataLoader(TensorDataset(*data[:50]), batch_size=50))
    start = time.perf_counter()
    found.fit(DataLoader(data, batch_size=50))
    seconds = time.perf_counter() - start
    images, labels = test.tensors
    start = time.perf_counter()
    probabilities = torch.cat([found(part).detach() for part in images.split(50)])
    later = time.perf_counter() - start
    evidence = float(found.log_marginal_likelihood())
    return Fit(subset, structure, backend, evidence, *scores(probabilities, labels), seconds, later)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m examples.laplace_digits", description=__doc__)
    parser.add_argument("--epochs", type=int, default=30, help="default: 30")
    parser.add_argument("--prior", type=float, default=300.0, help="the prior precision; default: 300")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module=r"torch|laplace")
    model = trained(options.epochs)
    images, labels = digits()[1].tensors
    with torch.no_grad():
        nll, error = scores(model(images).softmax(1), labels)
    print(f"without an approximation: NLL {nll:.4f}, calibration error {error:.4f}")
    print("weights     structure  backend        log marg. lik.     NLL  calibration  fit, s  predict, s")
    for subset in ("last_layer", "all"):
        for structure in ("kron", "diag"):
            for backend in BACKENDS:
                one = fit(model, subset, structure, backend, options.prior)
                print(
                    f"{one.subset:10}  {one.structure:9}  {one.backend:13}  {one.evidence:14.2f}  {one.nll:6.4f}"
                    f"  {one.error:11.4f}  {one.fit_seconds:6.2f}  {one.predict_seconds:10.2f}"
                )


if __name__ == "__main__":
    main()
