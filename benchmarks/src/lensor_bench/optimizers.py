"""The optimizers that are compared in training: their settings, and learning rate schedules."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lensor.optim import KFAC

LOSS = nn.CrossEntropyLoss()
"""The loss of all tasks."""

_WARM_UP = 0.05


class Optimizers:
    """Optimizers that step together.

    Args:
        parts: the optimizers.
        flat: pairs of a parameter and a matrix with the same memory, which an optimizer updates in its place.
    """

    def __init__(self, parts: Iterable[torch.optim.Optimizer], flat: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.parts, self.flat = list(parts), flat

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for part in self.parts:
            part.zero_grad()
        for parameter, _ in self.flat:
            parameter.grad = None

    def step(self) -> None:
        """Take a step with each optimizer."""
        for parameter, matrix in self.flat:
            matrix.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for part in self.parts:
            part.step()


@dataclass(frozen=True)
class Setting:
    """An optimizer with a schedule: the learning rate rises linearly, and falls to zero along a cosine.

    Args:
        make: function that creates the optimizer of a model.
        length: length of the schedule, as a fraction of the steps.
    """

    make: Callable[[nn.Module], Optimizers]
    length: float

    def started(self, model: nn.Module, steps: int) -> tuple[Optimizers, list[LambdaLR], int]:
        """The optimizer of a model, its schedules, and the number of steps until the learning rate is zero."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # layers without curvature
            optimizer = self.make(model)
        last = max(1, round(self.length * steps))
        return optimizer, [LambdaLR(part, partial(_rate, steps=last)) for part in optimizer.parts], last


def _rate(step: int, steps: int) -> float:
    """The fraction of the learning rate after some steps."""
    warm = max(1, round(_WARM_UP * steps))
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def _sgd(model: nn.Module, lr: float) -> Optimizers:
    return Optimizers([torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)])


def _adamw(model: nn.Module, lr: float) -> Optimizers:
    return Optimizers([torch.optim.AdamW(model.parameters(), lr=lr)])


def _muon(model: nn.Module, lr: float) -> Optimizers:
    """Muon for matrices and for kernels, as matrices with one row per output channel; AdamW for the others."""
    flat = [(p, nn.Parameter(p.detach().flatten(1))) for p in model.parameters() if p.ndim > 2]
    matrices = [matrix for _, matrix in flat] + [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return Optimizers([muon, torch.optim.AdamW(others, lr=3e-3)], flat)


def _singd(model: nn.Module, lr: float) -> Optimizers:
    from singd.optim.optimizer import SINGD  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {"damping": 1e-3, "T": 5, "kfac_approx": "reduce", "normalize_lr_cov": True}
    return Optimizers([SINGD(model, lr=lr, lr_cov=0.05, loss_average="batch", **options)])


def _kfac(model: nn.Module, kl_clip: float, options: Mapping[str, Any]) -> Optimizers:
    return Optimizers([KFAC(model, LOSS, **{**_DEFAULT, "kl_clip": kl_clip, **options})])


INTERVAL = 10
"""Number of steps between KFAC's updates, a multiple of SINGD's; timed calls have as many steps."""

_DEFAULT: Mapping[str, Any] = {
    "lr": 0.1,
    "damping": 0.03,
    "weight_decay": 0.2,
    "factor_interval": INTERVAL,
    "inverse_interval": INTERVAL,
    "batch_axis": 0,
}
"""One setting for all tasks. It was chosen on these tasks, with fewer seeds."""
_KL_CLIP = 0.01
_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "KFAC, reduce": {"approx": "reduce"},
    "KFAC, expand": {"approx": "expand"},
    "KFAC, forward-only": {"approx": "reduce", "fisher": "forward-only", "ema": 0.9},
}


def _grid(make: Callable[..., Optimizers], name: str, values: Sequence[float], **named: Any) -> dict[str, Setting]:
    """Settings for three values and two lengths of the schedule."""
    return {
        f"{name}={value}, {'all' if length == 1 else 'half'}": Setting(partial(make, **{name: value}, **named), length)
        for value in values
        for length in (0.5, 1.0)
    }


def settings() -> dict[str, dict[str, Setting]]:
    """The settings of each optimizer, by name: six for the tuned ones, and one for the others.

    SINGD is left out if it is not installed.
    """
    found = {
        "AdamW": _grid(_adamw, "lr", (1e-3, 3e-3, 1e-2)),
        "SGD": _grid(_sgd, "lr", (0.01, 0.03, 0.1)),
        "Muon": _grid(_muon, "lr", (5e-3, 0.02, 0.05)),
    }
    if importlib.util.find_spec("singd"):
        found["SINGD"] = _grid(_singd, "lr", (1e-3, 3e-3, 1e-2))
    for name, options in _VARIANTS.items():
        found[name] = {"default": Setting(partial(_kfac, kl_clip=_KL_CLIP, options=options), 0.5)}
    found["KFAC, reduce, tuned"] = _grid(_kfac, "kl_clip", (3e-3, 0.01, 0.03), options=_VARIANTS["KFAC, reduce"])
    return found
