"""Sums of clipped gradients of whole models: Lensor and Opacus, compared with a pass of plain gradient descent."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lensor.curvature import clipped_gradients
from lensor.inspect.errors import choose, in_one_line, require
from lensor_bench.measure import interleaved, peak_bytes, relative_error
from lensor_bench.measure import threads as using
from lensor_bench.models import CLASSES, MODELS
from lensor_bench.nets import vgg11

Gradients: TypeAlias = dict[str, Tensor]
Data: TypeAlias = tuple[Tensor, Tensor]
Way: TypeAlias = tuple[Callable[[], Gradients], Callable[[], None]]
"""A call that computes sums of gradients, and a function that frees what the call leaves on the model."""

SGD = "SGD, not clipped"


def frozen_normalization(model: nn.Module) -> nn.Module:
    """The model, with the parameters of its batch normalisation frozen."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return model


PRIVATE_MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: MODELS["resnet18"](),
    "resnet18-frozen-norm": lambda: frozen_normalization(MODELS["resnet18"]()),
    "vgg11": vgg11,
}
"""The measured models. Opacus has no gradients of batch normalisation, so one variant freezes its parameters."""


@dataclass(frozen=True)
class Measured:
    """One way to compute the clipped sums of a model's gradients.

    Args:
        model: name of the model.
        way: the library and its mode.
        seconds: the shortest time, or None if the library does not support the model.
        ratio: this time divided by the time of a pass of gradient descent.
        peak: peak memory besides model and data, in bytes.
        peak_ratio: this memory divided by that of a pass of gradient descent.
        difference: the largest difference from Lensor's sums, for each parameter divided by its largest entry.
        message: how many gradients of how many parameters are clipped, or the reason why there is no time.
    """

    model: str
    way: str
    seconds: float | None
    ratio: float | None
    peak: int | None
    peak_ratio: float | None
    difference: float | None
    message: str = ""


def measure(
    names: Sequence[str], batch: int, size: int, max_norm: float, rounds: int, threads: int
) -> Iterator[Measured]:
    """Compare the sums of all ways for each model, then measure their memory and, interleaved, their time.

    Raises:
        CommandError: for an unknown model or a missing package.
    """
    require("torch", "transformers")
    with using(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus' hooks on layers whose inputs need no gradients
        for name in choose("model", names, PRIVATE_MODELS):
            yield from _model(name, batch, size, max_norm, rounds)


def _model(name: str, batch: int, size: int, max_norm: float, rounds: int) -> Iterator[Measured]:
    torch.manual_seed(0)
    model = PRIVATE_MODELS[name]().eval()
    data = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))
    loss = nn.CrossEntropyLoss(reduction="sum")
    expected, norms = clipped_gradients(model, loss, data, max_norm=max_norm)
    ways: dict[str, Way] = {}
    differences, peaks, failed = {}, {}, {}
    for way, make in _makers(data, max_norm).items():
        try:
            call, reset = make(copy.deepcopy(model))
            found = call()  # also warms up
            if way not in (SGD, "Lensor"):
                differences[way] = difference(found, expected)
            del found
            reset()
            peaks[way] = peak_bytes(call)[0]
            reset()
            ways[way] = call, reset
        except Exception as error:  # any error that a library raises for an unsupported model
            failed[way] = in_one_line(error, 120)
    del expected
    gc.collect()
    times = interleaved([_run(*one) for one in ways.values()], 0.0, rounds, rounds)
    shortest = {way: found.minimum for way, found in zip(ways, times, strict=True)}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    message = f"{int((norms > max_norm).sum())} of {batch} clipped, {trained:,} parameters"
    for way, time in shortest.items():
        ratios = time / shortest[SGD], peaks[way] / peaks[SGD]
        more = differences.get(way), "" if way == SGD else message
        yield Measured(name, way, time, ratios[0], peaks[way], ratios[1], *more)
    for way, message in failed.items():
        yield Measured(name, way, None, None, None, None, None, message)


def _run(call: Callable[[], Gradients], reset: Callable[[], None]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        call()
        reset()
        return torch.empty(0)

    return run


def difference(found: Gradients, expected: Gradients) -> float:
    """The largest relative error over the parameters.

    Raises:
        ValueError: if the parameters are not the expected ones.
    """
    if found.keys() != expected.keys():
        raise ValueError(f"{len(found)} parameters have gradients, expected {len(expected)}")
    return max(relative_error(found[name], one) for name, one in expected.items())


# ---------------------------------------------------------------------------------------------------------------- ways
def _makers(data: Data, max_norm: float) -> dict[str, Callable[[nn.Module], Way]]:
    """Functions by the name of a way; each takes its own copy of the model."""
    found: dict[str, Callable[[nn.Module], Way]] = {
        SGD: lambda model: _sgd(model, data),
        "Lensor": lambda model: _lensor(model, data, max_norm),
    }
    if find_spec("opacus") is not None:
        found |= {
            "Opacus, hooks": lambda model: _opacus_hooks(model, data, max_norm),
            "Opacus, ghost": lambda model: _opacus_ghost(model, data, max_norm, registered=False),
            "Opacus, ghost, Lensor": lambda model: _opacus_ghost(model, data, max_norm, registered=True),
        }
    return found


def _gradients_of(model: nn.Module) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _sgd(model: nn.Module, data: Data) -> Way:
    loss = nn.CrossEntropyLoss(reduction="sum")

    def call() -> Gradients:
        loss(model(data[0]), data[1]).backward()
        return _gradients_of(model)

    return call, model.zero_grad


def _lensor(model: nn.Module, data: Data, max_norm: float) -> Way:
    loss = nn.CrossEntropyLoss(reduction="sum")
    return lambda: clipped_gradients(model, loss, data, max_norm=max_norm).gradients, model.zero_grad


def _prepared(model: nn.Module) -> nn.Module:
    """The model for Opacus, which watches only modules in training mode: batch normalisation stays in eval mode."""
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    return model


def _opacus_hooks(model: nn.Module, data: Data, max_norm: float) -> Way:
    loss = nn.CrossEntropyLoss(reduction="sum")
    # strict=False accepts the buffers of batch normalisation
    watched = import_module("opacus").GradSampleModule(_prepared(model), loss_reduction="sum", strict=False)
    optimizer = import_module("opacus.optimizers").DPOptimizer(_plain(model), **_options(max_norm, len(data[0])))

    trained: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def call() -> Gradients:
        loss(watched(data[0]), data[1]).backward()
        optimizer.clip_and_accumulate()
        return {name: p.summed_grad for name, p in trained.items()}

    return call, lambda: optimizer.zero_grad(set_to_none=True)


def _opacus_ghost(model: nn.Module, data: Data, max_norm: float, registered: bool) -> Way:
    modules = import_module("opacus.grad_sample")
    utilities = import_module("opacus.utils.fast_gradient_clipping_utils")
    optimizers = import_module("opacus.optimizers")
    watched = modules.GradSampleModuleFastGradientClipping(
        _prepared(model), loss_reduction="sum", strict=False, max_grad_norm=max_norm
    )
    optimizer = optimizers.DPOptimizerFastGradientClipping(_plain(model), **_options(max_norm, len(data[0])))
    criterion = nn.CrossEntropyLoss(reduction="sum")
    loss = utilities.DPLossFastGradientClipping(watched, optimizer, criterion, loss_reduction="sum")
    register = import_module("lensor.integrations.opacus").register if registered else nullcontext

    def call() -> Gradients:
        with register():
            loss(watched(data[0]), data[1]).backward()
        return _gradients_of(model)

    return call, lambda: optimizer.zero_grad(set_to_none=True)


def _plain(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def _options(max_norm: float, batch: int) -> dict[str, Any]:
    return {
        "noise_multiplier": 0.0,
        "max_grad_norm": max_norm,
        "expected_batch_size": batch,
        "loss_reduction": "sum",
    }
