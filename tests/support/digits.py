"""Training on scikit-learn's digits, for comparisons of optimizers."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

CE = nn.CrossEntropyLoss()


def digits_loss(make: Any, steps: int = 40) -> float:
    """The loss of a small CNN after some steps, always from the same start and with the same batches.

    Args:
        make: creates the optimizer of a model.
        steps: the number of steps.
    """
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(256, 10))
    optimizer = make(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(len(x), (128,), generator=generator)
        optimizer.zero_grad()
        CE(model(x[index]), y[index]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(CE(model(x), y))


def descent_loss() -> float:
    """The loss of the best of three learning rates of gradient descent with momentum."""
    rates = (0.03, 0.1, 0.3)
    return min(digits_loss(lambda m, lr=lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9)) for lr in rates)
