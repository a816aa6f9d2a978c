"""Kronecker blocks read from the state of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lensor.curvature.block import Block
from lensor.curvature.layers import Layer


def as_parameters(blocks: Mapping[str, Block], names: Mapping[str, Tensor]) -> dict[str, Block]:
    """Blocks on the devices of their parameters, in their precision, which is at least single.

    Args:
        blocks: the blocks.
        names: the parameters by name.
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
    """Raise unless blocks are those of an optimizer's own parameters.

    Args:
        blocks: the blocks.
        layers: the layers that have factors.
        names: the parameters that are trained, by name.
        joint: whether weight and bias share a block.

    Raises:
        ValueError: for other parameters, other shapes, or blocks of another form.
    """
    own = {layer.weight: layer for layer in layers}
    for name, block in blocks.items():
        for parameter, shape in block.shapes.items():
            known = names.get(parameter)
            if known is None or tuple(known.shape) != shape:
                found = "no such parameter" if known is None else f"shape {tuple(known.shape)}"
                raise ValueError(
                    f"the state has a factor for {parameter!r} of shape {shape}, this optimizer trains {found}: it is"
                    " the state for another model"
                )
        layer = own.get(name)
        if layer is not None and layer.bias is not None and (len(block.names) == 2) != joint:
            expected = "joint" if joint else "separate"
            raise ValueError(f"the state has another form of the block of {name!r}, expected bias={expected!r}")
