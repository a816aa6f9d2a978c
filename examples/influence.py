"""Influence functions by EKFAC: which training images of a small CNN have wrong labels, and which explain a prediction.

    python -m examples.influence [--epochs 30] [--damping 0.001]

A part of the digits of scikit-learn gets wrong labels. The influence of a training image z on the loss at an image q is
the product g_qᵀ (H + λI)⁻¹ g_z, where the g are gradients of single examples and H is approximated by EKFAC (Koh &
Liang, 2017; Grosse et al., 2023). An image with a wrong label has a large influence on its own loss. The table compares
the ranking by this influence with rankings by the loss and by the norm of the gradient: the area under the curve is the
probability that an image with a wrong label has a larger score than one with its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lensor.curvature import ekfac, kfac, per_example_gradients

Data = tuple[Tensor, Tensor]
WRONG = 0.1
"""The share of wrong labels."""


def digits(count: int = 1000) -> tuple[Data, Tensor]:
    """Images [count, 1, 8, 8] with their labels, some of which are wrong, and whether they are wrong."""
    found: Any = load_digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(found.images), generator=generator)[:count]
    images = torch.tensor(found.images / 16.0, dtype=torch.float32)[order, None]
    labels = torch.tensor(found.target)[order]
    wrong = torch.rand(count, generator=generator) < WRONG
    shift = torch.randint(1, 10, (count,), generator=generator)
    return (images, torch.where(wrong, (labels + shift) % 10, labels)), wrong


def trained(data: Data, epochs: int) -> nn.Sequential:
    """A CNN, trained with weight decay so that it does not learn all wrong labels by heart."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    loss = nn.CrossEntropyLoss()
    for _ in range(epochs):
        for part in torch.randperm(len(data[0])).split(100):
            optimizer.zero_grad()
            loss(model(data[0][part]), data[1][part]).backward()
            optimizer.step()
    return model


def influences(model: nn.Module, data: Data, queries: Data, damping: float) -> tuple[Tensor, Tensor]:
    """The influence of each training example on itself [n], and on each query [queries, n].

    EKFAC needs two passes over the data. The inverse is applied to the gradients of the queries only, and the training
    examples are read in parts.
    """
    mean, total = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    parts = list(zip(data[0].split(200), data[1].split(200), strict=True))
    inverse = ekfac(model, mean, parts, kfac(model, mean, parts)).inverse(damping)
    solved = inverse.flatten(inverse @ per_example_gradients(model, total, queries))
    own, others = [], []
    for part in parts:
        gradients = per_example_gradients(model, total, part)
        flat = inverse.flatten(gradients)
        own.append((flat * inverse.flatten(inverse @ gradients)).sum(1))
        others.append(solved @ flat.mT)
    return torch.cat(own), torch.cat(others, 1)


def area(scores: Tensor, wrong: Tensor) -> float:
    """The area under the curve: the share of pairs in which the image with a wrong label has the larger score."""
    return float((scores[wrong][:, None] > scores[~wrong]).float().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--damping", type=float, default=1e-3)
    options = parser.parse_args(arguments)
    data, wrong = digits()
    model = trained(data, options.epochs)
    queries = data[0][wrong][:3], model(data[0][wrong][:3]).argmax(1)
    own, others = influences(model, data, queries, options.damping)
    total = nn.CrossEntropyLoss(reduction="none")
    gradients = per_example_gradients(model, nn.CrossEntropyLoss(reduction="sum"), data)
    norms = torch.cat([one.flatten(1) for one in gradients.values()], 1).norm(dim=1)
    scores = {
        "influence on itself": own,
        "norm of the gradient": norms,
        "loss": total(model(data[0]), data[1]).detach(),
    }
    print(f"{int(wrong.sum())} of {len(wrong)} labels are wrong\n")
    print(f"{'score':22}{'area':>8}{'wrong among the largest 100':>30}")
    for name, score in scores.items():
        largest = int(wrong[score.topk(100).indices].sum())
        print(f"{name:22}{area(score, wrong):>8.3f}{largest:>30}")
    print("\npredictions for images with wrong labels, and the labels of the five most helpful training images")
    for row, label in zip(others, queries[1].tolist(), strict=True):
        print(f"{label}: {' '.join(str(int(one)) for one in data[1][row.topk(5).indices])}")


if __name__ == "__main__":
    main()
