"""Plans as single operators, so that a graph of a whole pass contains plans instead of their steps.

While a graph is traced (`tracing`), each plan becomes the operator `lensor::plan`: compilers keep it in their graphs,
and it runs as it does in eager execution, with writes into its own arrays and kernels that are chosen when it runs.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor

from lensor.kernels.torch.memory import format_of

_numbers = itertools.count()
_plans: weakref.WeakValueDictionary[int, OnePlan] = weakref.WeakValueDictionary()
_lock = threading.RLock()
_traced: list[OnePlan] | None = None
"""The plans in the graph that is being traced. Its backward passes may run in other threads, with the same modes."""


class OnePlan:
    """The function of a plan, which is one operator while a graph is traced.

    Args:
        run: the function, which has no derivatives.
        shape: the result's shape.
        like: the position of an operand with the result's dtype and device.
        in_channels_last: whether the result is in the channels_last memory format.
    """

    def __init__(self, run: Callable[..., Any], shape: Sequence[int], like: int, in_channels_last: bool) -> None:
        self.run, self.shape, self.like, self.in_channels_last = run, tuple(shape), like, in_channels_last
        self.number: int | None = None

    def __call__(self, *arrays: torch.Tensor) -> torch.Tensor:
        """Run the plan, or add it to the graph."""
        if _traced is None or not _is_traced_here() or not _is_simple(arrays):
            return self.run(*arrays)
        if self.number is None:
            self.number = next(_numbers)
            _plans[self.number] = self
        _traced.append(self)
        return _operator()(self.number, list(arrays))

    def empty(self, arrays: Sequence[torch.Tensor]) -> torch.Tensor:
        """A tensor with the properties of the result."""
        out = arrays[self.like].new_empty(self.shape)
        return out.contiguous(memory_format=format_of(out, True)) if self.in_channels_last else out


@contextmanager
def tracing() -> Iterator[list[OnePlan]]:
    """Make plans single operators within the `with` block; yield the list of them, which a graph must keep.

    Only one thread traces at a time, because torch's tracing is not safe for several threads.
    """
    global _traced
    with _lock:
        outer, _traced = _traced, []
        try:
            yield _traced
        finally:
            _traced = outer


def _is_traced_here() -> bool:
    """Whether functions of this thread become part of the graph."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def _is_simple(arrays: Sequence[torch.Tensor]) -> bool:
    """Whether no transform of torch.func applies, and no gradient of the steps is recorded."""
    recorded = torch.is_grad_enabled()
    return not any(is_functorch_wrapped_tensor(array) or (recorded and array.requires_grad) for array in arrays)


@cache
def _operator() -> Callable[[int, list[torch.Tensor]], torch.Tensor]:
    """The operator, defined when it is first needed."""

    def plan(number: int, arrays: Sequence[torch.Tensor]) -> torch.Tensor:
        return _plans[number].run(*arrays)

    def fake(number: int, arrays: Sequence[torch.Tensor]) -> torch.Tensor:
        return _plans[number].empty(arrays)

    made: Any = torch.library.custom_op(
        "lensor::plan",
        plan,
        mutates_args=(),
        schema="(int number, Tensor[] arrays) -> Tensor",
        tags=(torch.Tag.flexible_layout,),
    )
    made.register_fake(fake)
    return made
