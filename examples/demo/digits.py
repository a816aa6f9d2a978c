"""A CNN on handwritten digits: its training with KFAC, its uncertainty, and the training images behind its mistakes.

The Kronecker factors H of the training loss give a Laplace approximation: the weights are uncertain with covariance
(H + λI)⁻¹, where λ is the precision of the prior. The outputs at an image then have the covariance J (H + λI)⁻¹ Jᵀ with
the Jacobian J (Daxberger et al., 2021). The influence of a training image z on the loss at an image q is
g_qᵀ (H + λI)⁻¹ g_z, where the g are gradients of single images (Koh & Liang, 2017). It is divided by the square root of
the influence of z on itself, because otherwise a few unusual images have the largest influence on all others (Barshan
et al., 2020).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lensor.curvature import Inverse, KroneckerFactors, jacobians, kfac, per_example_gradients
from lensor.optim import KFAC

Data = tuple[Tensor, Tensor]
LOSS, SUMMED = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
PRECISIONS = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Candidates for the prior precision; the validation images decide."""


@dataclass(frozen=True)
class Study:
    """What the demo shows of the CNN.

    Args:
        train: the training images [n, 1, 8, 8] and their labels.
        test: the test images and their labels.
        seconds: the time to train.
        factors: the Kronecker factors of the training loss.
        precision: the prior precision.
        plain: the test probabilities [test, 10] from the outputs alone.
        careful: the test probabilities that take the uncertain weights into account.
        queries: the positions of the most certain mistakes among the test images.
        harm: how much each training image increases the loss at these images [queries, n], up to a scale.
    """

    train: Data
    test: Data
    seconds: float
    factors: KroneckerFactors
    precision: float
    plain: Tensor
    careful: Tensor
    queries: Tensor
    harm: Tensor

    @property
    def mistakes(self) -> Tensor:
        """Whether the prediction for each test image is wrong."""
        return self.careful.argmax(1) != self.test[1]


def digits(count: int = 1000) -> tuple[Data, Data, Data]:
    """The digits of scikit-learn: up to 1,000 for training, 200 for validation, 597 for the test."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images / 16.0, dtype=torch.float32)[order, None]
    sizes = (1000, 200, 597)
    train, valid, test = zip(images.split(sizes), torch.tensor(found.target)[order].split(sizes), strict=True)
    return (train[0][:count], train[1][:count]), valid, test


def trained(data: Data, epochs: int = 5) -> nn.Sequential:
    """A CNN with two convolutions, trained with KFAC."""
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU()]
    model = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(256, 10))
    optimizer = KFAC(model, LOSS, lr=0.1, damping=0.03)
    for _ in range(epochs):
        for part in torch.randperm(len(data[0])).split(100):
            optimizer.zero_grad()
            LOSS(model(data[0][part]), data[1][part]).backward()
            optimizer.step()
    return model.eval()


def careful(model: nn.Module, images: Tensor, covariance: Inverse) -> Tensor:
    """Probabilities [n, 10] with the outputs' variances, in MacKay's approximation of the mean over the weights."""
    variances = []
    for part in images.split(200):
        columns = jacobians(model, part)
        product = covariance.flatten(columns) * covariance.flatten(covariance @ columns)
        variances.append(product.sum(-1))
    with torch.no_grad():
        return (model(images) / (1 + math.pi / 8 * torch.cat(variances)).sqrt()).softmax(1)


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """The mean negative log-likelihood: small if certain predictions are right."""
    return float(nn.functional.nll_loss(probabilities.log(), labels))


def harmful(model: nn.Module, queries: Data, train: Data, covariance: Inverse) -> Tensor:
    """How much each training image increases the loss at each query [queries, n]: its relative influence, negated."""
    gradients, others = (per_example_gradients(model, SUMMED, one) for one in (queries, train))
    flat = covariance.flatten(others)
    own = (flat * covariance.flatten(covariance @ others)).sum(1)
    return -(covariance.flatten(covariance @ gradients) @ flat.mT) / own.sqrt()


def study(count: int = 1000, rows: int = 4) -> Study:
    """Train the CNN on `count` images, and compute uncertainties, and influences on the most certain mistakes."""
    train, valid, test = digits(count)
    start = time.perf_counter()
    model = trained(train)
    seconds = time.perf_counter() - start
    factors = kfac(model, SUMMED, train)
    found = {one: nll(careful(model, valid[0], factors.inverse(one)), valid[1]) for one in PRECISIONS}
    precision = min(found, key=lambda one: found[one])
    covariance = factors.inverse(precision)
    probabilities = careful(model, test[0], covariance)
    certainty, classes = probabilities.max(1)
    queries = certainty.where(classes != test[1], -1.0).topk(rows).indices
    harm = harmful(model, (test[0][queries], test[1][queries]), train, covariance)
    with torch.no_grad():
        plain = model(test[0]).softmax(1)
    return Study(train, test, seconds, factors, precision, plain, probabilities, queries, harm)
