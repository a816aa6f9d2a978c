"""Kinds of tensors (plain, wrapped by transforms, views), and the precision of their products (TF32, autocast)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch._C import _is_any_autocast_enabled
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, is_legacy_batchedtensor


def may_write(x: torch.Tensor) -> bool:
    """Whether steps may write into new arrays, because no gradient is recorded and nothing is traced or batched."""
    if x.requires_grad and torch.is_grad_enabled():
        return False
    return is_plain(x)


def is_plain(x: torch.Tensor) -> bool:
    """Whether a tensor is neither traced, compiled nor batched by a transform."""
    if torch.compiler.is_compiling():
        return False
    return not is_functorch_wrapped_tensor(x) and not is_legacy_batchedtensor(x)


def of_all_levels(x: torch.Tensor) -> torch.Tensor:
    """The tensor inside all wrappers added by transforms."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x


def unviewed(x: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that is not a view, since torch cannot write into a custom function's view."""
    if torch.compiler.is_compiling() or x.requires_grad or not of_all_levels(x)._is_view():
        return x
    return x.detach() if is_plain(x) else torch.ops.aten._unsafe_view(x, x.shape)


def allows_tf32() -> bool:
    """Whether torch may round the factors of float32 products to TF32, on GPUs that have such products."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # reading `allow_tf32` raises an error if the newer setting was used
        return matmul.fp32_precision == "tf32"
    return bool(matmul.allow_tf32)


def allows_tf32_convolutions() -> bool:
    """The same for convolutions, for which it is torch's default."""
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv.fp32_precision == "tf32" if hasattr(cudnn, "conv") else cudnn.allow_tf32


class Casts(NamedTuple):
    """The autocast state, to be restored later, and the dtype of the operands."""

    device: str
    to: torch.dtype
    dtype: torch.dtype

    def again(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, self.to)


def casts_of(x: torch.Tensor) -> Casts | None:
    """The autocast state for a tensor's device, or None if autocast is off."""
    if not _is_any_autocast_enabled():
        return None
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return Casts(device, torch.get_autocast_dtype(device), x.dtype)


def uncast(device: str) -> AbstractContextManager[Any]:
    """A context that disables autocast, which would otherwise compute products in half precision again."""
    if not _is_any_autocast_enabled() or device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
