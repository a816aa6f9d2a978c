"""Reads Kronecker blocks from an optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lensor.curvature.block import Block
from lensor.curvature.layers import Layer


def as_parameters(blocks: Mapping[str, Block], names: Mapping[str, Tensor]) -> dict[str, Block]:
    """Move blocks to the devices and dtypes of their parameters, in at least single precision.

    Args:
        blocks: the blocks.
        names: the parameters, by name.
    """
    found = {}
    for name, block in blocks.items():
        like = names[name]
        dtype = torch.promote_types(like.dtype, torch.float32)
        changed = {which: tensor.to(like.device, dtype) for which, tensor in block.tensors().items()}
        found[name] = replace(block, formed=changed.get("A"), root=changed.get("root"), B=changed["B"])
    return found


def require_same_form(
    blocks: Mapping[str, Block], layers: Iterable[Layer], names: Mapping[str, Tensor], joint: bool
) -> None:
    """Raise unless the blocks match an optimizer's parameters.

    Args:
        blocks: the blocks.
        layers: the layers with factors.
        names: the trained parameters, by name.
        joint: whether the optimizer uses one block for weight and bias.

    Raises:
        ValueError: if the blocks have different parameters, shapes or forms.
    """
    own = {layer.weight: layer for layer in layers}
    for name, block in blocks.items():
        for parameter, shape in block.shapes.items():
            known = names.get(parameter)
            if known is None or tuple(known.shape) != shape:
                found = "one of the trained parameters" if known is None else f"shape {tuple(known.shape)}"
                raise ValueError(
                    f"the state has a factor for {parameter!r} of shape {shape}, expected {found}: the state belongs to"
                    " another model"
                )
        layer = own.get(name)
        if layer is not None and layer.bias is not None and (len(block.names) == 2) != joint:
            expected = "joint" if joint else "separate"
            raise ValueError(f"the state has a block of {name!r} in another form, expected bias={expected!r}")
