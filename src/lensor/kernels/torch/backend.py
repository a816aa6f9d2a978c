"""The torch backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from lensor.kernels.torch.autograd import Derivatives, Transformed, record
from lensor.kernels.torch.capture import Constant
from lensor.kernels.torch.memory import format_of, is_channels_last
from lensor.kernels.torch.operator import OnePlan
from lensor.kernels.torch.patterns import fuses
from lensor.kernels.torch.steps import STEPS
from lensor.kernels.torch.tensors import allows_tf32, allows_tf32_convolutions, is_plain, uncast, unviewed
from lensor.plan import steps as s
from lensor.spec import ConvSpec

_PRECISIONS: dict[tuple[bool, ...], str] = {
    (True, True): "tf32",
    (False, True): "float32 with tf32 convolutions",
    (True, False): "float32",
}
"""How GPUs multiply in float32, by whether products and convolutions may be rounded to TF32."""


class TorchBackend:
    """The backend for torch tensors."""

    name = "torch"
    steps = STEPS

    def kind(self, array: Any) -> tuple:
        if array.device.type == "cuda" and array.dtype is torch.float32:
            return ("torch", array.dtype, array.device, allows_tf32(), allows_tf32_convolutions())
        return ("torch", array.dtype, array.device)

    def device(self, kind: Sequence[Any]) -> tuple[str, str, int]:
        device = kind[2]
        if device.type == "cuda":
            return "cuda", torch.cuda.get_device_name(device), 1
        return "cpu", "", torch.get_num_threads()  # other devices, such as meta, are planned like CPUs

    def dtype(self, kind: Sequence[Any]) -> str:
        return _PRECISIONS.get(tuple(kind[3:])) or str(kind[1]).removeprefix("torch.")

    def example(self, shape: Sequence[int], dtype: str, device: str) -> Any:
        return torch.ones(tuple(shape), dtype=getattr(torch, dtype), device=device)

    def describe(self, kind: Sequence[Any]) -> str:
        dtype, device = _PRECISIONS.get(tuple(kind[3:])) or kind[1], kind[2]
        on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"torch {torch.__version__}, {dtype}, {on}, {torch.get_num_threads()} threads"

    def check(self, arrays: Sequence[Any], names: Sequence[str]) -> None:
        for array, name in zip(arrays, names, strict=True):
            if not (array.is_floating_point() or array.is_complex()):
                raise TypeError(f"{name} has dtype {array.dtype}, expected a floating or complex dtype")
            if array.dtype.itemsize < 2:
                raise TypeError(
                    f"{name} has dtype {array.dtype}, expected a dtype of at least 16 bits: torch supports this one for"
                    " storage only"
                )
            if array.dtype != arrays[0].dtype:
                raise TypeError(f"{name} has dtype {array.dtype}, expected {arrays[0].dtype}, the dtype of {names[0]}")
            if array.device != arrays[0].device:
                raise ValueError(f"{name} is on {array.device}, expected {arrays[0].device} as {names[0]} is")

    def check_positions(self, array: Any, name: str, below: int) -> None:
        if array.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {array.dtype}, expected positions of dtype torch.int64")
        if not array.numel() or self.is_traced(array):
            return
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= below:
            raise ValueError(f"{name} has positions {low} to {high}, expected 0 to {below - 1}")

    def constant(self, key: Any, make: Callable[[np.dtype], np.ndarray]) -> Callable[[Any], Any]:
        return Constant(key, lambda: torch.from_numpy(np.array(make(np.dtype(np.float64)))))

    def default_reference(self) -> Any:
        return torch.zeros((), dtype=torch.float64)

    def is_complex(self, array: Any) -> bool:
        return array.is_complex()

    def conj(self, array: Any) -> Any:
        return array.conj()

    def copy(self, array: Any, *, channels_last: bool = False) -> Any:
        return array.clone(memory_format=format_of(array, channels_last))

    def owned(self, array: Any, *others: Any, channels_last: bool = False) -> Any:
        if type(array) is not torch.Tensor or not is_plain(array) or array.is_meta:
            return self.copy(array, channels_last=channels_last)
        memory = array.untyped_storage().data_ptr()
        if any(other.untyped_storage().data_ptr() == memory for other in others):
            return self.copy(array, channels_last=channels_last)
        return self.settled(array, channels_last=channels_last)

    def settled(self, array: Any, *, channels_last: bool = False) -> Any:
        order = format_of(array, channels_last)
        if not (array.is_contiguous(memory_format=order) if channels_last else array.is_contiguous()):
            return array.contiguous(memory_format=order)
        return unviewed(array)

    def formatted(self, ready: Any, spec: ConvSpec) -> Callable[..., Any]:
        if not 2 <= len(spec.kernel_size) <= 3:
            return ready.unchecked
        deciding = [ready.names.index(name) for name in ("X", "W") if name in ready.names]

        def call(*arrays: torch.Tensor) -> torch.Tensor:
            for place in deciding:
                strides = arrays[place].stride()
                if strides[1] * arrays[place].shape[1] <= strides[-1]:
                    break
            else:
                return ready.unchecked(*arrays)
            if not is_channels_last([arrays[place] for place in deciding], spec):
                return ready.unchecked(*arrays)
            if torch.compiler.is_compiling():  # a compiler cannot create another Runnable
                return self.settled(ready.unchecked(*arrays), channels_last=True)
            return ready.channels_last.unchecked(*arrays)

        return call

    def widened(self, run: Callable[..., Any], one_sum: s.Step | None) -> Callable[..., Any]:
        # On CPUs, torch accumulates convolution gradients over examples in half precision.
        only_on_cpu = isinstance(one_sum, s.Convolution) and one_sum.kind != "forward"
        if one_sum is not None and not only_on_cpu:
            return run

        def call(*arrays: torch.Tensor) -> torch.Tensor:
            for array in arrays:
                if array.dtype is torch.float16:
                    break
            else:
                return run(*arrays)
            if only_on_cpu and array.device.type != "cpu":
                return run(*arrays)
            wide = [array.float() if array.dtype is torch.float16 else array for array in arrays]
            with uncast(array.device.type):
                return run(*wide).to(torch.float16)

        return call

    def as_operator(self, ready: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        like = next((at for at, step in enumerate(ready.inputs) if type(step) is s.Input), None)
        return run if like is None else OnePlan(run, ready.plan.shape, like, ready.in_channels_last)

    def differentiable(self, ready: Any) -> Callable[..., Any]:
        run, own = ready.unrecorded, Derivatives(ready.unrecorded, ready.derivative, ready.needs)

        def recorded(arrays: Sequence[torch.Tensor]) -> torch.Tensor:
            if forward_ad._current_level >= 0 or _are_functorch_transforms_active():
                return Transformed.apply(own, *arrays)
            return record(own, *arrays) if torch.is_grad_enabled() else run(*arrays)

        def call(*arrays: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_compiling():
                return run(*arrays)  # the compiler derives the steps itself and fuses them with the graph
            for array in arrays:
                if array.requires_grad or is_functorch_wrapped_tensor(array):
                    return recorded(arrays)
            if forward_ad._current_level >= 0:
                return recorded(arrays)
            return run(*arrays)

        return call

    def can_run(self, steps: Sequence[s.Step], kind: Sequence[Any]) -> bool:
        # Some devices do not support complex transposed convolutions in torch.
        return not (kind[1].is_complex and any(isinstance(step, s.Convolution) for step in steps))

    def fuses(self, kind: Sequence[Any]) -> bool:
        return fuses(kind[1], kind[2])

    def convolves_as_it_multiplies(self, kind: Sequence[Any]) -> bool:
        return tuple(kind[3:]) != (False, True)

    def itemsize(self, kind: Sequence[Any]) -> int:
        return kind[1].itemsize

    def spread(self, count: int, below: int, kind: Sequence[Any]) -> Any:
        return torch.linspace(0, max(below - 1, 0), count, device=kind[2]).long()

    def random(self, shape: Sequence[int], kind: Sequence[Any]) -> Any:
        generator = torch.Generator(device="cpu").manual_seed(0)
        return torch.randn(*shape, generator=generator).to(device=kind[2], dtype=kind[1])

    def placeholder(self, shape: Sequence[int], dtype: Any, device: Any) -> Any:
        """A tensor with this shape that does not allocate memory for its entries."""
        return torch.empty((), dtype=dtype, device=device).expand(tuple(shape))

    def timed(self, call: Callable[[], Any], kind: Sequence[Any]) -> float:
        if kind[2].type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        with torch.cuda.device(kind[2]):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3

    def tuning(self, kind: Sequence[Any]) -> AbstractContextManager[None]:
        if not self.fuses(kind):
            return nullcontext()
        from lensor.kernels.torch.triton import tuning

        return tuning()

    def is_traced(self, array: Any) -> bool:
        return not is_plain(array) or array.is_meta


BACKEND = TorchBackend()
