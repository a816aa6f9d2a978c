"""Constants of plans, as torch keeps them and as graphs of torch.compile hold them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable

import torch

from lensor.cache import Cache
from lensor.kernels.torch.tensors import is_plain

_constants = Cache(maxsize=256, weigh=lambda entry: entry[1].nbytes)


class Constant:
    """A tensor that is not an operand's: made once for a dtype and device.

    Made anew where a mode would get into it (fake tensors, transforms); while torch.compile traces, a constant of its
    graph.
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
            with torch.inference_mode(False), torch.no_grad():
                return self.made(dtype, device)

        return _constants.get_or_make((self.key, dtype, device), settled)

    def made(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        found = self.make()
        return found.to(device=device, dtype=dtype if found.is_floating_point() else found.dtype)


_numbers = itertools.count()

_numbered: weakref.WeakValueDictionary[int, Constant] = weakref.WeakValueDictionary()


class _Captured:
    """The constants that graphs use, as attributes: torch.compile finds new ones there while it traces."""


_captured = _Captured()


@torch.compiler.assume_constant_result
def _captured_constant(number: int, dtype: torch.dtype, device: torch.device) -> str:
    """The name in `_captured` of a constant."""
    name = f"constant_{number}_{dtype}_{device}".replace(".", "_").replace(":", "_")
    setattr(_captured, name, _numbered[number].kept(dtype, device))
    return name
