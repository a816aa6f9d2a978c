"""The cost of a training step with KFAC, compared with a step of plain gradient descent."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lensor.curvature import KroneckerFactors
from lensor.inspect.errors import choose, require
from lensor.optim import KFAC
from lensor_bench.measure import interleaved
from lensor_bench.measure import threads as using
from lensor_bench.models import CLASSES, MODELS
from lensor_bench.nets import all_cnn_c
from lensor_bench.optimizers import INTERVAL


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

_RARELY: Mapping[str, Any] = {"factor_interval": INTERVAL, "inverse_interval": INTERVAL, "batch_axis": 0}
_SPREAD: Mapping[str, Any] = {**_RARELY, "method": "low-rank", "stagger": True}
_FREE: Mapping[str, Any] = {"method": "inverse-free", "factor_interval": INTERVAL, "batch_axis": 0}

OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "KFAC, forward-only": {
        "fisher": "forward-only",
        "approx": "reduce",
        "method": "woodbury",
        "ema": 0.0,
        "batch_axis": 0,
    },
    "KFAC, reduce": {"approx": "reduce", **_RARELY},
    "KFAC, reduce, bfloat16": {"approx": "reduce", **_RARELY, "stagger": True, "inverse_dtype": torch.bfloat16},
    "KFAC, reduce, low rank": {"approx": "reduce", **_SPREAD},
    "KFAC, expand": _RARELY,
    "KFAC, expand, low rank": _SPREAD,
    "KFAC, expand, low rank, bfloat16": {**_SPREAD, "inverse_dtype": torch.bfloat16},
    "KFAC, reduce, inverse-free, dense": {"approx": "reduce", **_FREE},
    "KFAC, reduce, inverse-free, block": {"approx": "reduce", **_FREE, "structure": "block"},
    "KFAC, reduce, inverse-free, diagonal": {"approx": "reduce", **_FREE, "structure": "diagonal"},
    "KFAC, expand, inverse-free, block": {**_FREE, "structure": "block"},
    "KFAC, expand, inverse-free, diagonal": {**_FREE, "structure": "diagonal"},
}
"""The optimizers; all but the first update factors and inverses of a layer at every tenth step only. With "low rank"
or "bfloat16", layers are updated at different steps. All are given the axis of the examples, which trial passes would
otherwise find in every pass."""


@dataclass(frozen=True)
class StepTime:
    """Seconds per training step.

    Args:
        model: the model.
        optimizer: the optimizer.
        seconds: the mean over the steps from one inversion to the next.
        ratio: these seconds, divided by those of gradient descent.
        longest: the longest of these steps, divided by their median.
    """

    model: str
    optimizer: str
    seconds: float
    ratio: float
    longest: float


def measure(
    names: Sequence[str], seconds: float, repeats: int, threads: int, optimizers: Sequence[str] = ()
) -> Iterator[StepTime]:
    """Time the steps of each optimizer and of gradient descent, interleaved.

    Raises:
        CommandError: for an unknown model or optimizer, or a missing package.
    """
    require("torch", "transformers")
    chosen = choose("optimizer", optimizers, OPTIMIZERS)
    with using(threads):
        for name in choose("model", names, SETUPS):
            setup = SETUPS[name]
            calls = {"SGD": _Steps(setup, None)}
            calls |= {one: _Steps(setup, OPTIMIZERS[one]) for one in chosen}
            interleaved(list(calls.values()), seconds, min(2, repeats), repeats)
            sgd = statistics.mean(calls["SGD"].each)
            for optimizer, steps in calls.items():
                mean = statistics.mean(steps.each)
                yield StepTime(name, optimizer, mean, mean / sgd, max(steps.each) / statistics.median(steps.each))


class _Steps:
    """A call that runs the steps from one inversion to the next, including one inversion of each layer.

    Averaged factors are those after many steps: roots have been multiplied out.
    """

    def __init__(self, setup: Setup, options: Mapping[str, Any] | None) -> None:
        torch.manual_seed(0)
        self.model, self.loss = setup.make().train(), nn.CrossEntropyLoss()
        size = (setup.batch, 3, setup.size, setup.size)
        self.x, self.y = torch.randn(size), torch.randint(CLASSES, (setup.batch,))
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        if options is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # normalisation layers have no factors
                self.optimizer = KFAC(self.model, self.loss, lr=1e-4, damping=0.1, **options)
        self._step()
        found = self.optimizer
        if isinstance(found, KFAC) and found.ema and found.factors is not None:
            formed = {name: replace(block, formed=block.A, root=None) for name, block in found.factors.items()}
            found.factors = KroneckerFactors(formed, **found.factors._settings())
        self.times: list[list[float]] = []
        self()
        self.times.clear()

    @property
    def each(self) -> list[float]:
        """The shortest time of each step."""
        return [min(one) for one in zip(*self.times, strict=True)]

    def __call__(self) -> Tensor:
        value, times = self.x.new_zeros(()), []
        for _ in range(INTERVAL):
            start = time.perf_counter()
            value = self._step()
            times.append(time.perf_counter() - start)
        self.times.append(times)
        return value

    def _step(self) -> Tensor:
        self.optimizer.zero_grad()
        outputs = self.model(self.x)
        value = self.loss(outputs.flatten(2).mean(2) if outputs.ndim > 2 else outputs, self.y)
        value.backward()
        self.optimizer.step()
        return value.detach()
