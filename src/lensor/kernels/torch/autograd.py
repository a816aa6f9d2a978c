"""Planned derivatives for torch's autograd, function transforms and forward mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from lensor.kernels.torch.tensors import casts_of


class Derivatives:
    """A function and its planned derivatives, as used by `_Planned`."""

    def __init__(self, run: Callable[..., Any], derivative: Callable[..., Any], needs: Sequence[Sequence[int]]) -> None:
        self.run, self.derivative, self.needs = run, derivative, needs
        self.unneeded: dict[tuple[bool, ...], tuple[int, ...]] = {}

    def kept(self, arrays: tuple[torch.Tensor, ...], asked: tuple[bool, ...]) -> Sequence[torch.Tensor | None]:
        """The operands needed for the requested derivatives, None for the others; `asked[0]` refers to `self`."""
        unneeded = self.unneeded.get(asked)
        if unneeded is None:
            needed = {at for place, wanted in enumerate(asked[1:]) if wanted for at in self.needs[place]}
            unneeded = self.unneeded[asked] = tuple(at for at in range(len(arrays)) if at not in needed)
        if not unneeded:
            return arrays
        return [None if at in unneeded else array for at, array in enumerate(arrays)]


class _Planned(torch.autograd.Function):
    """A function with planned derivatives, which saves only the operands that the derivatives need."""

    @staticmethod
    def forward(ctx: Any, own: Derivatives, *arrays: torch.Tensor) -> torch.Tensor:
        ctx.own, ctx.casts = own, casts_of(next(array for array in arrays if not is_positions(array)))
        ctx.save_for_backward(*own.kept(arrays, ctx.needs_input_grad))
        return own.run(*arrays)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        arrays, cotangent, casts = ctx.saved_tensors, cotangents[0], ctx.casts
        if casts is not None:
            cotangent = cotangent.to(casts.dtype)
        with casts.again() if casts is not None else nullcontext():
            found = [
                ctx.own.derivative("vjp", place, arrays, cotangent) if needed else None
                for place, needed in enumerate(ctx.needs_input_grad[1:])
            ]
        return None, *found


record = super(torch.autograd.Function, _Planned).apply  # pyright: ignore[reportAttributeAccessIssue]
"""`_Planned.apply` without its setup for function transforms, which takes most of its time."""


class Transformed(_Planned):
    """The same function in the form that torch.func transforms require, with support for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(own: Derivatives, *arrays: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return own.run(*arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.own, *arrays = inputs
        ctx.casts = casts_of(next(array for array in arrays if not is_positions(array)))
        ctx.save_for_backward(*arrays)  # save all arrays, since torch requires the same arrays for both modes
        ctx.save_for_forward(*arrays)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        arrays, found = ctx.saved_tensors, None
        with ctx.casts.again() if ctx.casts is not None else nullcontext():
            for place, tangent in enumerate(tangents[1:]):
                if tangent is not None:
                    part = ctx.own.derivative("jvp", place, arrays, tangent)
                    found = part if found is None else found + part
        return found


def is_positions(x: torch.Tensor) -> bool:
    """Whether a tensor contains positions, which are not differentiated."""
    return not (x.is_floating_point() or x.is_complex())
