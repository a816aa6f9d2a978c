"""Adds Kronecker blocks to an optimizer's state, and reads them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lensor.curvature.block import Block
from lensor.curvature.layers import Layer

_KEY = "kfac"
"""The key of the blocks and settings in a state."""

WHOLE = "all ranks"
"""The name of the part of a state that is the same on all ranks."""


def mark(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer a state until parameters have one, so that `torch.distributed.checkpoint` takes no step."""
    states: Any = optimizer.state
    if any(isinstance(key, Tensor) for key in states):
        states.pop(_KEY, None)
    else:
        states[_KEY] = {}


def packed(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], own: dict[str, Any], part: str) -> Any:
    """Add factors and settings to a state.

    They become an entry of the first trained parameter's state, because `torch.distributed.checkpoint` saves nothing
    but the states of trained parameters, and they consist of bytes, because a new optimizer has no tensors to load
    factors into. Parameters without a state get an empty entry, because it requires that all or none have one.

    Args:
        optimizer: the optimizer.
        state: its state as torch defines it.
        own: the factors and settings.
        part: the name of the part of the whole state that they are.
    """
    buffer = io.BytesIO()
    torch.save(own, buffer)
    ids = [one for group in state["param_groups"] for one in group["params"]]
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    first = next((at for at, p in zip(ids, parameters, strict=True) if p.requires_grad), ids[0])
    found = {}
    for at in ids:
        found[at] = dict(state["state"].get(at, {}))
        if at == first or not found[at]:
            found[at][_KEY] = {part: buffer.getvalue() if at == first else b""}
    return {**state, "state": found}


def unpacked(state: Mapping[str, Any], part: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The reverse of `packed`: the state as torch defines it, and the factors and settings.

    Raises:
        KeyError: if the state has no factors.
        ValueError: if it has no such part.
    """
    if _KEY in state and part == WHOLE:  # a state of an earlier version
        return {key: value for key, value in state.items() if key != _KEY}, state[_KEY]
    parts: dict[str, bytes] = {}
    for some in state["state"].values():
        parts |= {name: value for name, value in some.get(_KEY, {}).items() if value or name not in parts}
    if not parts:
        raise KeyError("the state has no entry 'kfac', expected a state of lensor.optim.KFAC")
    if not parts.get(part):
        raise ValueError(
            f"the state has the parts {sorted(parts)}, expected {part!r}: a state of a sharded model can be loaded on"
            " the same number of ranks, by the rank that saved it"
        )
    own = torch.load(io.BytesIO(parts[part]), map_location="cpu", weights_only=True)
    rest = {key: {name: one for name, one in some.items() if name != _KEY} for key, some in state["state"].items()}
    return {**state, "state": {key: some for key, some in rest.items() if some}}, own


def as_parameters(
    blocks: Mapping[str, Block],
    names: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    least: torch.dtype = torch.float32,
) -> dict[str, Block]:
    """Move blocks to the devices of their parameters, and to a dtype.

    Args:
        blocks: the blocks.
        names: the parameters, by name.
        dtype: the dtype; that of the parameters unless given.
        least: the lowest precision, unless `dtype` is given.
    """
    found = {}
    for name, block in blocks.items():
        like = names[name]
        own = torch.promote_types(like.dtype, least) if dtype is None else dtype
        changed = {which: tensor.to(like.device, own) for which, tensor in block.tensors().items()}
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
