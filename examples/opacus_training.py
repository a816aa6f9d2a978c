"""Private training of a small CNN on the digits of scikit-learn with Opacus, with per-example quantities by Lensor.

    python -m examples.opacus_training [--epochs 2] [--noise 1.0] [--batch 128]

`opacus.PrivacyEngine` trains the CNN in two modes: "hooks" forms the gradients of all examples, "ghost" needs only
their norms. Each mode runs with Opacus' own functions for convolutions and with those of Lensor. All runs draw the same
batches and the same noise. The peak is the largest memory that torch allocates during a step.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from lensor_bench.measure import peak_bytes
from opacus import PrivacyEngine  # type: ignore[import-not-found]
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lensor.integrations import opacus as lensor_opacus


class Run(NamedTuple):
    """One training run.

    Args:
        way: "Opacus" or "Lensor".
        mode: "hooks" or "ghost".
        accuracy: the fraction of test images that are classified correctly.
        epsilon: the privacy budget spent, for δ = 1e-4.
        seconds: the time of training.
        peak: the peak memory of a step, in bytes.
    """

    way: str
    mode: str
    accuracy: float
    epsilon: float
    seconds: float
    peak: int


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The images [1, 8, 8] and classes for training, and for the test."""
    found: Any = load_digits()
    images = torch.tensor(found.images / 16.0, dtype=torch.float32)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(found.target)[order]
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(images[1437:], labels[1437:])


def network() -> nn.Sequential:
    """The CNN; it has no layers that mix examples."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def train(way: str, mode: str, epochs: int, noise: float, batch: int) -> Run:
    """Train once with Opacus."""
    data, test = digits()
    model: Any = network()
    with lensor_opacus.register() if way == "Lensor" else nullcontext():
        engine = PrivacyEngine()
        model, optimizer, *others = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(data, batch_size=batch, shuffle=True),
            noise_multiplier=noise,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
            noise_generator=torch.Generator().manual_seed(0),
        )
        loader: Any = others[-1]
        criterion: Any = others[0] if mode == "ghost" else nn.CrossEntropyLoss()

        def step(images: Tensor, labels: Tensor) -> Tensor:
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()
            return torch.empty(0)

        torch.manual_seed(1)
        start, peak = 0.0, 0
        for _ in range(epochs):
            for images, labels in loader:
                if not peak:  # the first step also makes plans, and its time is not counted
                    peak = peak_bytes(lambda images=images, labels=labels: step(images, labels))[0]
                    start = time.perf_counter()
                else:
                    step(images, labels)
        seconds = time.perf_counter() - start
    images, labels = test.tensors
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == labels).float().mean())
    return Run(way, mode, accuracy, engine.get_epsilon(delta=1e-4), seconds, peak)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m examples.opacus_training", description=__doc__)
    parser.add_argument("--epochs", type=int, default=2, help="default: 2")
    parser.add_argument("--noise", type=float, default=1.0, help="the noise multiplier; default: 1.0")
    parser.add_argument("--batch", type=int, default=128, help="the mean size of a batch; default: 128")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning)  # of Opacus, on random generators and hooks
    print("convolutions  mode   accuracy  epsilon  seconds  peak, MB")
    for mode in ("hooks", "ghost"):
        for way in ("Opacus", "Lensor"):
            run = train(way, mode, options.epochs, options.noise, options.batch)
            print(
                f"{run.way:12}  {run.mode:5}  {run.accuracy:8.3f}  {run.epsilon:7.2f}  {run.seconds:7.2f}"
                f"  {run.peak / 1e6:8.1f}"
            )


if __name__ == "__main__":
    main()
