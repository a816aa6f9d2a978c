"""Memory that a model stores for its backward pass, and keep rates that fit a memory budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

from lensor.choices import Scheme
from lensor.curvature.data import Inputs, call
from lensor.curvature.watching import undisturbed
from lensor.errors import require_choice
from lensor.nn.conversion import copied
from lensor.sampling.functional import COUNTED
from lensor.sampling.layers import Sampled, convert

_STEPS = 64
"""Keep rates are multiples of 1 / _STEPS."""

_WARM, _ROUNDS = 3, 7
"""Numbers of rounds before and during the measurement of times; blocks may need new plans in the first rounds."""


def saved_bytes(model: torch.nn.Module, inputs: Inputs) -> int:
    """The bytes that a forward pass stores for the backward pass, without parameters and buffers.

    Memory shared between tensors counts once. Normalisation statistics and torch's random generator are restored.

    Args:
        model: the model, in its current mode.
        inputs: the model's inputs: a tensor, a tuple of arguments, or a mapping of named arguments.

    Example:
        >>> import torch, lensor.sampling
        >>> lensor.sampling.saved_bytes(torch.nn.Conv2d(1, 1, 3), torch.zeros(1, 1, 5, 5))
        100

    Raises:
        TypeError: if the model does not return a tensor.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # keep the tensors alive, so that no memory is reused

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own and memory.nbytes():
            found[memory.data_ptr()] = memory.nbytes()
            kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.random.fork_rng(), undisturbed(model), torch.enable_grad(), hooks:
        call(model, inputs)
    return sum(found.values())


def recommend(
    model: torch.nn.Module,
    inputs: Inputs,
    max_bytes: int | None = None,
    *,
    max_time: float | None = None,
    indices: Sequence[str] = ("i1", "i2"),
    scheme: Scheme = "fixed",
) -> dict[str, float]:
    """Keep rates at which a training step meets a memory budget, a time budget, or both.

    Every index gets the same rate, found by bisection: the largest within the memory budget, and for a time budget one
    at which the measured time is within it. Memory is measured by `saved_bytes` for the converted model, with a scheme
    whose counts are not random; "bernoulli" keeps the same number of positions as "fixed" on average. Time is measured
    on this machine, alternately with the exact step. It includes the forward and the backward pass of the sum of the
    outputs, and excludes the creation of plans.

    Args:
        model: the unconverted model; it is not changed.
        inputs: a batch of the size that you train with.
        max_bytes: the memory budget in bytes.
        max_time: the time budget as a fraction of the time of the exact step.
        indices: the indices to sample.
        scheme: "fixed" or "blocks"; with "blocks", positions save more time.

    Returns:
        A mapping for `convert`; rates of 1 if nothing needs to be sampled.

    Example:
        >>> import torch, lensor.sampling
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
        >>> lensor.sampling.recommend(model, torch.zeros(4, 3, 16, 16), 30_000)
        {'i1': 0.78125, 'i2': 0.78125}

    Raises:
        TypeError: if indices is not a sequence of names, max_bytes is not a positive int, max_time is not a positive
            number, or both are missing.
        ValueError: if a budget is too small even at the lowest keep rate, if no layer's input has the indices, or for a
            scheme other than "fixed" and "blocks".
    """
    if isinstance(indices, str) or not indices:
        raise TypeError(f"indices is {indices!r}, expected a sequence of index names, e.g. ('i1', 'i2')")
    if max_bytes is None and max_time is None:
        raise TypeError("max_bytes and max_time are None, expected at least one budget")
    if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1):
        raise TypeError(f"max_bytes is {max_bytes!r}, expected a positive int, the number of bytes")
    if max_time is not None and (
        isinstance(max_time, bool) or not isinstance(max_time, (int, float)) or not max_time > 0
    ):
        raise TypeError(f"max_time is {max_time!r}, expected a positive fraction of the time of the exact step")
    require_choice("scheme", scheme, COUNTED)
    sampled = convert(model, dict.fromkeys(indices, 0.5), scheme=scheme).train()
    exact = copied(model).train()
    every = [module for module in sampled.modules() if isinstance(module, Sampled)]

    def keep(rate: int) -> torch.nn.Module:
        for module in every:
            module.set_sampling(dict.fromkeys(module.keep, rate / _STEPS), scheme)
        return sampled

    high = _STEPS
    if max_bytes is not None:
        high = _largest(high, lambda rate: saved_bytes(keep(rate), inputs) <= max_bytes)
        if not high:
            least, most = (saved_bytes(keep(rate), inputs) for rate in (1, _STEPS))
            raise ValueError(
                f"max_bytes is {max_bytes}, expected at least {least}, the bytes stored at a keep rate of 1/{_STEPS}"
                f" for {', '.join(indices)}; without sampling, the model stores {most}"
            )
    if max_time is not None:
        high = _largest(high, lambda rate: _relative_time(keep(rate), exact, inputs) <= max_time)
        if not high:
            least = _relative_time(keep(1), exact, inputs)
            raise ValueError(
                f"max_time is {max_time}, expected at least {least:.2f}, the measured time at a keep rate of"
                f" 1/{_STEPS} for {', '.join(indices)}"
            )
    return dict.fromkeys(indices, high / _STEPS)


def _largest(high: int, fits: Callable[[int], bool]) -> int:
    """A number from 1 to `high` that fits, by bisection: the largest, if all smaller ones fit; 0 if none does."""
    if fits(high):
        return high
    if high == 1 or not fits(1):
        return 0
    low = 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _relative_time(sampled: torch.nn.Module, exact: torch.nn.Module, inputs: Inputs) -> float:
    """The time of a sampled training step divided by that of the exact step: of each, the shortest of some rounds."""
    shortest = {sampled: math.inf, exact: math.inf}
    with torch.random.fork_rng():
        for round in range(_WARM + _ROUNDS):
            for model in shortest:
                seconds = _seconds(model, inputs)
                if round >= _WARM:
                    shortest[model] = min(shortest[model], seconds)
    return shortest[sampled] / shortest[exact]


def _seconds(model: torch.nn.Module, inputs: Inputs) -> float:
    """The time of a forward and a backward pass."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wait = torch.cuda.synchronize if any(parameter.is_cuda for parameter in parameters) else lambda: None
    with undisturbed(model), torch.enable_grad():
        wait()
        start = time.perf_counter()
        torch.autograd.grad(call(model, inputs).sum(), parameters, allow_unused=True)
        wait()
        return time.perf_counter() - start
