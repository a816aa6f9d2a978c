"""Constants of plans, cached for eager execution and stored in torch.compile graphs."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable

import torch

from lensor.cache import Cache
from lensor.kernels.marks import constant_in_graphs
from lensor.kernels.torch.tensors import is_plain

_constants = Cache(maxsize=256, weigh=lambda entry: entry[1].nbytes)


class Constant:
    """A tensor that does not depend on the operands, created once for each dtype and device.

    Under a mode that would wrap the tensor (fake tensors, function transforms), each call creates it again. While
    torch.compile traces, the tensor is a constant of the graph.
    """

    def __init__(self, key: Hashable, make: Callable[[], torch.Tensor]) -> None:
        self.key, self.make = key, make
        self.number = next(_numbers)
        _numbered[self.number] = self

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_dynamo_compiling():
            return getattr(_captured, _captured_constant(self.number, like.dtype, like.device))
        if type(like) not in (torch.Tensor, torch.nn.Parameter) or not is_plain(like):
            return self.made(like.dtype, like.device)
        return self.kept(like.dtype, like.device)

    def kept(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        def settled() -> torch.Tensor:
            # A compiler may trace a function transform, which would wrap the tensor.
            with torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad():
                return self.made(dtype, device)

        return _constants.get_or_make((self.key, dtype, device), settled)

    def made(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        found = self.make()
        return found.to(device=device, dtype=dtype if found.is_floating_point() else found.dtype)


_numbers = itertools.count()

_numbered: weakref.WeakValueDictionary[int, Constant] = weakref.WeakValueDictionary()


class _Captured:
    """The constants in graphs, stored as attributes so that torch.compile finds new constants while it traces."""


_captured = _Captured()


@constant_in_graphs
def _captured_constant(number: int, dtype: torch.dtype, device: torch.device) -> str:
    """Store a constant in `_captured` and return its name."""
    name = f"constant_{number}_{dtype}_{device}".replace(".", "_").replace(":", "_")
    setattr(_captured, name, _numbered[number].kept(dtype, device))
    return name
