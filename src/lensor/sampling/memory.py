"""Memory that a model stores for its backward pass, and keep rates that fit a memory budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lensor.curvature.data import Inputs, call
from lensor.curvature.watching import undisturbed
from lensor.sampling.layers import Sampled, convert

_STEPS = 64
"""Keep rates are multiples of 1 / _STEPS."""


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
    model: torch.nn.Module, inputs: Inputs, max_bytes: int, *, indices: Sequence[str] = ("i1", "i2")
) -> dict[str, float]:
    """Keep rates at which a training step stores at most `max_bytes` for its backward pass.

    Every index gets the same rate. Memory is measured by `saved_bytes` for the converted model with the scheme "fixed",
    whose counts are not random; "bernoulli" keeps the same number of positions on average.

    Args:
        model: the unconverted model; it is not changed.
        inputs: a batch of the size that you train with.
        max_bytes: the memory budget in bytes.
        indices: the indices to sample.

    Returns:
        A mapping for `convert`; rates of 1 if nothing needs to be sampled.

    Example:
        >>> import torch, lensor.sampling
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
        >>> lensor.sampling.recommend(model, torch.zeros(4, 3, 16, 16), 30_000)
        {'i1': 0.78125, 'i2': 0.78125}

    Raises:
        TypeError: if indices is not a sequence of names, or max_bytes is not a positive int.
        ValueError: if the budget is too small even at the lowest keep rate, or if no layer's input has the indices.
    """
    if isinstance(indices, str) or not indices:
        raise TypeError(f"indices is {indices!r}, expected a sequence of index names, e.g. ('i1', 'i2')")
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
        raise TypeError(f"max_bytes is {max_bytes!r}, expected a positive number of bytes")
    sampled = convert(model, dict.fromkeys(indices, 0.5), scheme="fixed").train()
    every = [module for module in sampled.modules() if isinstance(module, Sampled)]

    def needed(rate: int) -> int:
        for module in every:
            module.set_sampling(dict.fromkeys(module.keep, rate / _STEPS), "fixed")
        return saved_bytes(sampled, inputs)

    low, high = 1, _STEPS
    least, most = needed(low), needed(high)
    if most <= max_bytes:
        return dict.fromkeys(indices, 1.0)
    if least > max_bytes:
        raise ValueError(
            f"max_bytes is {max_bytes}, expected at least {least}, the bytes stored at a keep rate of 1/{_STEPS} for"
            f" {', '.join(indices)}; without sampling, the model stores {most}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= max_bytes else (low, middle)
    return dict.fromkeys(indices, low / _STEPS)
