"""Sums of clipped gradients of single examples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lensor.arguments import described
from lensor.curvature.batch import MEANS, Batch, is_torchs
from lensor.curvature.batch_axes import Given
from lensor.curvature.capture import computing
from lensor.curvature.compiled import Compile, on_batch
from lensor.curvature.described import SHARED
from lensor.curvature.registry import reduction_of, registered
from lensor.curvature.streaming import Streamed
from lensor.curvature.token_loss import TokenCrossEntropyLoss
from lensor.errors import require_choice


class ClippedGradients(NamedTuple):
    """The result of `clipped_gradients`.

    Args:
        gradients: a mapping from the name of each trainable parameter to a tensor of its shape.
        norms: [batch], the norms of the examples' gradients before clipping, over all these parameters.

    Example:
        >>> import torch
        >>> from lensor.curvature import clipped_gradients
        >>> data = torch.ones(2, 3), torch.zeros(2, 1)
        >>> found = clipped_gradients(torch.nn.Linear(3, 1), torch.nn.MSELoss(reduction="sum"), data, max_norm=1.0)
        >>> sorted(found.gradients), found.norms.shape
        (['bias', 'weight'], torch.Size([2]))
    """

    gradients: dict[str, Tensor]
    norms: Tensor


@described(SHARED)
def clipped_gradients(
    model: nn.Module,
    loss: Any,
    data: Any,
    max_norm: float,
    *,
    noise: float | None = None,
    generator: torch.Generator | None = None,
    reduction: str | None = None,
    layers: Iterable[str] | None = None,
    batch_axis: Given = None,
    compile: Compile = False,
) -> ClippedGradients:
    """The sum or mean of the examples' gradients, each clipped to a maximal norm: the gradient of private training.

    It takes one forward and one backward pass. For convolutions and linear layers, the gradients of single examples are
    formed only if they are smaller than the layer's input and output. Otherwise their norms come from networks, and the
    clipped sum from the gradients at the outputs, scaled for each example (Lee & Kifer, 2021; Bu et al., 2023). Use
    `per_example_gradient_norms` if you need only the norms.

    Args:
        loss: any callable of (outputs, targets) that is a sum or mean over examples. It receives everything that the
            model returns; torch's own losses receive one tensor, such as `outputs.logits`.
        data: a pair (inputs, targets).
        max_norm: the maximal norm C of an example's gradient over all parameters; longer gradients are scaled to it.
        noise: the noise multiplier σ: Gaussian noise with standard deviation σ C is added to each entry of the sum of
            the clipped gradients. No noise unless given. This function does no privacy accounting.
        generator: random generator for the noise.
        reduction: "sum" or "mean": whether the loss is a sum or a mean over examples. For a mean, the gradients of
            examples are those of their own losses, not divided by the number of examples N, and the result is divided
            by N. Unless given, it is that of one of torch's own losses.
        layers: names of modules whose own parameters are included; all trainable parameters unless given.

    Returns:
        The clipped gradients by parameter, and the norms before clipping.

    Example:
        >>> import torch
        >>> from lensor.curvature import clipped_gradients
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(28, 3))
        >>> data = torch.randn(8, 2, 9), torch.randint(3, (8,))
        >>> found = clipped_gradients(model, torch.nn.CrossEntropyLoss(), data, max_norm=1.0)
        >>> for name, parameter in model.named_parameters():
        ...     parameter.grad = found.gradients[name]
        >>> found.norms.shape
        torch.Size([8])

    Raises:
        TypeError: for a model or data of an unsupported type.
        ValueError: for an unknown layer, a layer that does not run, a model that mixes examples, a norm that is not
            positive, negative noise, an unknown reduction, or a mean in which the examples have different weights.

    Equation:
        Σ_n min(1, C / ‖g_n‖) g_n + σ C z, with standard normal z (Abadi et al., 2016).
    """
    max_norm = _number("max_norm", max_norm)
    if not (math.isfinite(max_norm) and max_norm > 0):
        raise ValueError(f"max_norm is {max_norm}, expected a positive finite number")
    noise = None if noise is None else _number("noise", noise)
    if noise is not None and not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise is {noise}, expected a finite number of at least 0")
    is_mean = _is_mean(loss, reduction)
    needs_equal = reduction is None and is_mean
    found, norms = on_batch(
        _clipped,
        model,
        loss,
        data,
        layers,
        batch_axis,
        frozen=False,
        compile=compile,
        options=(torch.tensor(max_norm, dtype=torch.float64), is_mean),
        check=partial(_require_equal_weights, loss) if needs_equal else None,
    )
    if noise:
        deviation = noise * max_norm / (max(len(norms), 1) if is_mean else 1)
        for name, gradient in found.items():
            draw = torch.randn(
                gradient.shape, generator=generator, dtype=gradient.dtype, device=_device(generator, gradient)
            )
            found[name] = gradient + deviation * draw.to(gradient.device)
    return ClippedGradients(found, norms)


def _clipped(batch: Batch, value: Tensor, given: tuple[Tensor, bool]) -> tuple[dict[str, Tensor], Tensor]:
    """The sum of the clipped gradients and the norms, for a maximal norm and whether the loss is a mean."""
    max_norm, is_mean = given
    streamed = Streamed(batch, value, is_weighted=True)
    squares = list(streamed.squares().values())
    norms = torch.stack([one.to(squares[0]) for one in squares]).sum(0).sqrt() * (batch.size if is_mean else 1)
    factors = (max_norm / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)
    with computing(value):
        return streamed.weighted_sums(factors), norms  # the parts of a mean are divided by N already


def _device(generator: torch.Generator | None, like: Tensor) -> torch.device:
    return like.device if generator is None else generator.device


def _number(name: str, value: Any) -> float:
    is_one = isinstance(value, Real) and not isinstance(value, bool)
    if not is_one and not (isinstance(value, Tensor) and value.numel() == 1 and value.dtype.is_floating_point):
        raise TypeError(f"{name} is {value!r}, expected a number")
    return float(value)


def _is_mean(loss: Any, reduction: str | None) -> bool:
    """Whether the loss is a mean over examples.

    Raises:
        ValueError: if this is unknown.
    """
    if reduction is None:
        known = registered(loss)
        is_known = is_torchs(loss) or type(loss) is TokenCrossEntropyLoss
        if known is not None and (reduction_of(loss) == "sum" or known.normaliser is None):
            is_known = True
        reduction = reduction_of(loss) if is_known else None
        if reduction is None:
            raise ValueError(
                "reduction is None, expected 'sum' or 'mean' for a function, for a loss that is not a module of torch,"
                " or for one that has its own normaliser"
            )
        return reduction in MEANS
    require_choice("reduction", reduction, ("sum", "mean"))
    return reduction == "mean"


def _require_equal_weights(loss: nn.Module, outputs: Tensor, targets: Any) -> None:
    """Raise unless a mean of torch's own gives each example the same weight, so that its own loss is known.

    Raises:
        ValueError: for different weights, which class weights and ignored targets cause.
    """
    if type(loss) is TokenCrossEntropyLoss:
        targets = loss.aligned(outputs, targets)
    if not isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)) or targets.is_floating_point() or not len(targets):
        return
    counted = targets != loss.ignore_index
    weights = counted.float()
    if loss.weight is not None:
        weights = loss.weight[targets.where(counted, torch.zeros_like(targets))] * counted
    weights = weights.reshape(len(targets), -1).sum(1)
    if not torch.allclose(weights, weights[:1].expand_as(weights)):
        raise ValueError(
            f"the examples have the weights {weights.tolist()} in the mean loss, expected equal ones: with class"
            " weights or ignored targets, an example's share of the mean depends on the other examples; use a sum"
        )
