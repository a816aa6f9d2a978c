"""The diagonal of the Hessian, exact or estimated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lensor.arguments import described
from lensor.curvature.batch import MEANS, Batch, add_parts, is_torchs, share_of
from lensor.curvature.batch_axes import Given
from lensor.curvature.capture import Capture, Use, computing, own, running, unwrapped
from lensor.curvature.complete import CompleteCapture
from lensor.curvature.data import batches, over_positions
from lensor.curvature.described import SHARED
from lensor.curvature.example_gradients import gradients_of
from lensor.curvature.graph import gradients_for_each
from lensor.curvature.layers import all_parameters, refuse_mixing
from lensor.curvature.losses import require_counted
from lensor.curvature.registry import reduction_of, registered
from lensor.curvature.watching import Targets

_AT_ONCE = 16
"""Number of entries of a parameter for which products with the Hessian are computed together."""


@described(SHARED)
def hessian_diagonal(
    model: nn.Module,
    loss: Any,
    data: Any,
    *,
    samples: int | None = None,
    layers: Iterable[str] | None = None,
    strict: bool = False,
    generator: torch.Generator | None = None,
    batch_axis: Given = None,
) -> dict[str, Tensor]:
    """The diagonal of the loss Hessian with respect to the parameters, exact or estimated.

    A layer is linear in its parameters, so their Hessian is Jᵀ H J, where J is the Jacobian of the layer's output and H
    is the Hessian of the loss with respect to that output. The exact diagonal takes one product with H for each output
    entry of one example. With `samples`, Hutchinson's estimate at the layers' outputs takes one product with H per draw
    and layer; it is unbiased.

    For other parameters (normalisation, embeddings, attention, weights with several uses), products with the Hessian of
    the loss itself are used: one for each entry of the parameter, or one per draw for all of them together.

    Args:
        loss: any loss of (outputs, targets) that can be differentiated twice; for several batches, it must be one of
            torch's own losses with `reduction` "mean", "batchmean" or "sum".
        data: a pair (inputs, targets), or an iterable of pairs. With a mean reduction, the total loss is the mean over
            the examples of all batches.
        samples: number of random draws; without it, the diagonal is exact.
        layers: names of modules whose own parameters are wanted; all trainable parameters, and the frozen ones of
            convolutions and linear layers, unless given.
        strict: has no effect, since all parameters are supported.
        generator: random generator for the signs.

    Returns:
        A mapping from the name of each parameter to a tensor of its shape.

    Example:
        >>> import torch
        >>> from lensor.curvature import hessian_diagonal
        >>> model, data = torch.nn.Linear(3, 2, bias=False), (torch.ones(4, 3), torch.zeros(4, 2))
        >>> hessian_diagonal(model, torch.nn.MSELoss(reduction="sum"), data)
        {'weight': tensor([[8., 8., 8.],
                [8., 8., 8.]])}

    Raises:
        TypeError: for a model or data of an unsupported type.
        ValueError: for an unknown layer, a layer that does not run, a model that mixes examples, or several batches
            with a loss whose reduction is unknown.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples is {samples}, expected at least 1")
    model = unwrapped(model)
    watched = Targets(*all_parameters(model, layers))
    refuse_mixing(model)
    found: dict[str, Tensor] = {}
    total, seen = 0.0, 0
    mean = (reduction_of(loss) or "mean") in MEANS
    with running(model), sdpa_kernel(SDPBackend.MATH):  # torch's other kernels cannot be differentiated twice
        for inputs, targets in batches(data):
            seen += 1
            is_known = is_torchs(loss) or registered(loss) is not None
            if seen > 1 and not (is_known and reduction_of(loss) in (*MEANS, "sum")):
                raise ValueError(
                    "data has several batches, expected one for this loss: only one of torch's own losses with"
                    " reduction 'mean', 'batchmean' or 'sum' determines how batches are averaged"
                )
            inputs, targets = own(inputs), own(targets)
            batch = Batch(model, watched, inputs, batch_axis, shared=True, whole=False)
            share = share_of(loss, batch, targets)
            if not share:  # all targets are ignored, so the batch's own loss is 0/0
                continue
            total += share
            value = batch.loss(loss, targets)
            gradients = batch.capture.gradients(value, torch.ones_like(value), keep=True, again=True)
            alone = _alone(batch.capture)
            for use in batch.capture.uses:
                if not alone.intersection((use.weight, use.bias)):
                    continue
                gradient, x = gradients[use], batch.capture.inputs[use]
                for z in _directions(gradient, samples, generator):
                    curved = torch.zeros_like(z)
                    if (
                        gradient.requires_grad
                    ):  # a loss that is linear in the outputs has a zero Hessian with respect to them
                        curved = batch.capture.gradients(gradient, z, keep=True, only=use)[use]
                    with computing(z):
                        parts = _quadratic(use, x, z, curved)
                        known = {name: part for name, part in parts.items() if name in alone}
                        add_parts(found, known, share / (samples or 1))
            others = {name: one for name, one in watched.parameters.items() if name not in alone}
            add_parts(found, _second_derivatives(value, others, samples, generator), share)
    divisor = require_counted(total) if mean else 1.0
    return {name: found[name] / divisor for name in watched.parameters if name in found}


def _alone(capture: Capture) -> set[str]:
    """The parameters with one use, a call of their layer's function."""
    assert isinstance(capture, CompleteCapture)
    counts = Counter(name for use in capture.uses for name in (use.weight, use.bias) if name is not None)
    return {name for name, count in counts.items() if count == 1} - capture.used


def _second_derivatives(
    value: Tensor, parameters: Mapping[str, Tensor], samples: int | None, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """The diagonal of the Hessian of a number for some parameters, by products with unit vectors or random signs."""
    for name, one in parameters.items():
        if not one.requires_grad:
            raise ValueError(
                f"the frozen parameter {name!r} has several uses, expected a trainable one, or one use: leave the layer"
                " out with layers="
            )
    if not parameters:
        return {}
    names, tensors = list(parameters), list(parameters.values())
    slopes = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
    found = {name: torch.zeros_like(one) for name, one in parameters.items()}
    curved = [at for at, slope in enumerate(slopes) if slope is not None and slope.requires_grad]
    if samples is not None:
        for _ in range(samples if curved else 0):
            signs = [_signs(one, generator) for one in tensors]
            products = torch.autograd.grad(
                [slopes[at] for at in curved],  # pyright: ignore[reportArgumentType]
                tensors,
                [signs[at] for at in curved],
                retain_graph=True,
                allow_unused=True,
            )
            for name, sign, product in zip(names, signs, products, strict=True):
                if product is not None:
                    found[name] += sign * product / samples
        return found
    for at in curved:
        flat, slope = found[names[at]].view(-1), slopes[at]
        assert slope is not None
        for start in range(0, len(flat), _AT_ONCE):
            places = range(start, min(start + _AT_ONCE, len(flat)))
            flat[start : places.stop] = _entries(slope, tensors[at], places)
    return found


def _entries(slope: Tensor, parameter: Tensor, places: range) -> Tensor:
    """The derivatives of some entries of a gradient with respect to the same entries of the parameter."""
    units = slope.new_zeros((len(places), slope.numel()))
    units[range(len(places)), places] = 1
    (found,) = gradients_for_each([slope], [parameter], [units.reshape((-1, *slope.shape))])
    if found is None:
        return slope.new_zeros(len(places))
    return found.reshape(len(places), -1)[range(len(places)), places]


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
            yield _signs(like, generator)
        return
    for place in range(like.shape[1:].numel()):
        unit = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        unit.view(len(unit), -1)[:, place] = 1
        yield unit


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """A tensor of random signs."""
    signs = torch.randint(2, like.shape, generator=generator, device=like.device)
    return (2 * signs - 1).to(like.dtype)
