"""The gradients of single examples, for the uses of layers that a capture recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lensor import ops
from lensor.curvature.capture import KeptInputs, Use
from lensor.curvature.networks import network


def gradients_of(use: Use, x: Tensor, v: Tensor) -> Tensor:
    """The weight gradient of every example; linear maps are computed as convolutions."""
    return network(ops.conv_weight_vjp_per_example, use.spec(x))(X=x, V=v).reshape(len(x), *use.weight_shape)


def weight_gradients(capture: KeptInputs, uses: Sequence[Use], vectors: Mapping[Use, Tensor]) -> Tensor:
    """The weight gradient of every example, [batch, *weight_shape], summed over the weight's uses."""
    return sum_of(gradients_of(use, capture.inputs[use], vectors[use]) for use in uses)


def zeros_of(parameter: Tensor, batch: int) -> Tensor:
    """The gradients of every example for a parameter that is not used."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros((batch, *parameter.shape), dtype=dtype, device=parameter.device)


def rows_of(gradients: Tensor) -> Tensor:
    """Gradients [batch, *shape] as rows [batch, entries]."""
    return gradients.flatten(1) if gradients.ndim > 1 else gradients[:, None]


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """The sum of one or more tensors."""
    first, *others = parts
    for one in others:
        first = first + one
    return first
