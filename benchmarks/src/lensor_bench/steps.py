"""The cost of a training step with KFAC, compared with a step of plain gradient descent."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lensor.inspect.errors import choose, require
from lensor.optim import KFAC
from lensor_bench.measure import interleaved
from lensor_bench.measure import threads as using
from lensor_bench.models import CLASSES, MODELS
from lensor_bench.nets import all_cnn_c

INTERVAL = 10
"""Number of steps between inversions of dense factors, and number of steps in a timed call."""


@dataclass(frozen=True)
class Setup:
    """A model with its batch size and image size.

    Args:
        make: function that creates the model.
        batch: batch size.
        size: height and width of the images.
    """

    make: Callable[[], nn.Module]
    batch: int
    size: int


SETUPS: Mapping[str, Setup] = {
    "resnet18": Setup(MODELS["resnet18"], 8, 224),
    "all-cnn-c": Setup(all_cnn_c, 128, 32),
}
"""The measured models."""

OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "KFAC, forward-only": {"fisher": "forward-only", "approx": "reduce", "method": "woodbury", "ema": 0.0},
    "KFAC, reduce": {"approx": "reduce", "factor_interval": INTERVAL, "inverse_interval": INTERVAL},
    "KFAC, expand": {"factor_interval": INTERVAL, "inverse_interval": INTERVAL},
}
"""The optimizers; the last two update factors and inverses only at every tenth step."""


@dataclass(frozen=True)
class StepTime:
    """Seconds per training step, averaged over the steps from one inversion to the next."""

    model: str
    optimizer: str
    seconds: float
    ratio: float


def measure(names: Sequence[str], seconds: float, repeats: int, threads: int) -> Iterator[StepTime]:
    """Time the steps of each optimizer and of gradient descent, interleaved.

    Raises:
        CommandError: for an unknown model or a missing package.
    """
    require("torch", "transformers")
    with using(threads):
        for name in choose("model", names, SETUPS):
            setup = SETUPS[name]
            calls = {"SGD": _steps(setup, None)}
            calls |= {one: _steps(setup, options) for one, options in OPTIMIZERS.items()}
            times = interleaved(list(calls.values()), seconds, min(2, repeats), repeats)
            for optimizer, found in zip(calls, times, strict=True):
                yield StepTime(name, optimizer, found.minimum / INTERVAL, found.minimum / times[0].minimum)


def _steps(setup: Setup, options: Mapping[str, Any] | None) -> Callable[[], Tensor]:
    """A call that runs the steps from one inversion to the next, including one inversion."""
    torch.manual_seed(0)
    model, loss = setup.make().train(), nn.CrossEntropyLoss()
    x, y = torch.randn(setup.batch, 3, setup.size, setup.size), torch.randint(CLASSES, (setup.batch,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # normalisation layers have no factors
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
            if options is None
            else KFAC(model, loss, lr=1e-4, damping=0.1, **options)
        )

    def run() -> Tensor:
        value = x.new_zeros(())
        for _ in range(INTERVAL):
            optimizer.zero_grad()
            outputs = model(x)
            value = loss(outputs.flatten(2).mean(2) if outputs.ndim > 2 else outputs, y)
            value.backward()
            optimizer.step()
        return value.detach()

    run()
    return run
