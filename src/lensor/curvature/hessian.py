"""The diagonal of the Hessian, exact or estimated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lensor.arguments import described
from lensor.curvature.batch import MEANS, Batch, add_parts, gradients_of, is_torchs, refuse_mixing, share_of
from lensor.curvature.batch_axes import Given
from lensor.curvature.capture import Use, computing, own, running, unwrapped
from lensor.curvature.data import batches, over_positions
from lensor.curvature.described import SHARED
from lensor.curvature.layers import layers_of
from lensor.curvature.losses import require_counted
from lensor.curvature.watching import Targets


@described(SHARED)
def hessian_diagonal(
    model: nn.Module,
    loss: nn.Module,
    data: Any,
    *,
    samples: int | None = None,
    layers: Iterable[str] | None = None,
    strict: bool = False,
    generator: torch.Generator | None = None,
    batch_axis: Given = None,
) -> dict[str, Tensor]:
    """The diagonal of the loss Hessian with respect to each layer's parameters, exact or estimated.

    A layer is linear in its parameters, so their Hessian is Jᵀ H J, where J is the Jacobian of the layer's output and H
    is the Hessian of the loss with respect to that output. The exact diagonal takes one product with H for each output
    entry of one example. With `samples`, Hutchinson's estimate at the layers' outputs takes one product with H per draw
    and layer; it is unbiased.

    Args:
        loss: any loss of (outputs, targets) that can be differentiated twice; for several batches, it must be one of
            torch's own losses with `reduction` "mean", "batchmean" or "sum".
        data: a pair (inputs, targets), or an iterable of pairs. With a mean reduction, the total loss is the mean over
            the examples of all batches.
        samples: number of random draws; without it, the diagonal is exact.
        generator: random generator for the signs.

    Returns:
        A mapping from the name of each weight and bias to a tensor of its shape.

    Example:
        >>> import torch
        >>> from lensor.curvature import hessian_diagonal
        >>> model, data = torch.nn.Linear(3, 2, bias=False), (torch.ones(4, 3), torch.zeros(4, 2))
        >>> hessian_diagonal(model, torch.nn.MSELoss(reduction="sum"), data)
        {'weight': tensor([[8., 8., 8.],
                [8., 8., 8.]])}

    Raises:
        TypeError: for a model or data of an unsupported type.
        ValueError: for an unknown or tied layer, a layer that does not run exactly once, a model that mixes examples,
            or several batches with a loss whose reduction is unknown.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples is {samples}, expected at least 1")
    model = unwrapped(model)
    watched = Targets(layers_of(model, layers, strict))
    refuse_mixing(model)
    found: dict[str, Tensor] = {}
    total, seen = 0.0, 0
    mean = getattr(loss, "reduction", "mean") in MEANS
    with running(model):
        for inputs, targets in batches(data):
            seen += 1
            if seen > 1 and not (is_torchs(loss) and getattr(loss, "reduction", None) in (*MEANS, "sum")):
                raise ValueError(
                    "data has several batches, expected one for this loss: only one of torch's own losses with"
                    " reduction 'mean', 'batchmean' or 'sum' determines how batches are averaged"
                )
            inputs, targets = own(inputs), own(targets)
            batch = Batch(model, watched, inputs, batch_axis)
            share = share_of(loss, batch, targets)
            if not share:  # all targets are ignored, so the batch's own loss is 0/0
                continue
            total += share
            value = batch.loss(loss, targets)
            gradients = batch.capture.gradients(value, torch.ones_like(value), keep=True, again=True)
            for use in batch.capture.uses:
                gradient, x = gradients[use], batch.capture.inputs[use]
                for z in _directions(gradient, samples, generator):
                    curved = torch.zeros_like(z)
                    if (
                        gradient.requires_grad
                    ):  # a loss that is linear in the outputs has a zero Hessian with respect to them
                        curved = batch.capture.gradients(gradient, z, keep=True, only=use)[use]
                    with computing(z):
                        add_parts(found, _quadratic(use, x, z, curved), share / (samples or 1))
    divisor = require_counted(total) if mean else 1.0
    return {name: value / divisor for name, value in found.items()}


def _quadratic(use: Use, x: Tensor, z: Tensor, curved: Tensor) -> dict[str, Tensor]:
    """Σ over examples of (Jᵀ z) ⊙ (Jᵀ H z), for each parameter."""
    found = {use.weight: (gradients_of(use, x, z) * gradients_of(use, x, curved)).sum(0)}
    if use.bias is not None:
        sides = [over_positions(v) for v in (z, curved)]
        found[use.bias] = (sides[0] * sides[1]).sum(0)
    return found


def _directions(like: Tensor, samples: int | None, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Yield the unit vectors of one example's output, repeated for all examples, or vectors of random signs."""
    if samples is not None:
        for _ in range(samples):
            signs = torch.randint(2, like.shape, generator=generator, device=like.device)
            yield (2 * signs - 1).to(like.dtype)
        return
    for place in range(like.shape[1:].numel()):
        unit = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        unit.view(len(unit), -1)[:, place] = 1
        yield unit
