"""torch kernels. Every step is made of differentiable torch operators, so results are differentiable to any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lensor import plan as p
from lensor.cache import Cache
from lensor.kernels.constants import materialize_summed

_constants = Cache(maxsize=256)


def _constant(step: p.Constant) -> Callable[[torch.Tensor], torch.Tensor]:
    def constant(like: torch.Tensor) -> torch.Tensor:
        key = (step.pattern, step.summed, like.dtype, like.device)

        def make() -> torch.Tensor:
            with torch.inference_mode(False):
                array = materialize_summed(step.pattern, step.summed, np.dtype(np.float64))
                return torch.tensor(array).to(device=like.device, dtype=like.dtype)

        return _constants.get_or_make(key, make)

    return constant


def _pad(step: p.Pad) -> Callable[[torch.Tensor], torch.Tensor]:
    def pad(x: torch.Tensor) -> torch.Tensor:
        widths = [0, 0] * (x.ndim - 1 - step.axis) + [step.left, step.right]
        return torch.nn.functional.pad(x, widths)

    return pad


def _stuff(step: p.Stuff) -> Callable[[torch.Tensor], torch.Tensor]:
    def stuff(x: torch.Tensor) -> torch.Tensor:
        x = x.unsqueeze(step.axis + 1)
        x = torch.nn.functional.pad(x, [0, 0] * (x.ndim - 2 - step.axis) + [0, step.step - 1])
        x = x.flatten(step.axis, step.axis + 1)
        return x.narrow(step.axis, 0, x.shape[step.axis] - (step.step - 1))

    return stuff


def _slice(step: p.Slice) -> Callable[[torch.Tensor], torch.Tensor]:
    stop = step.start + (step.count - 1) * step.step + 1
    where = (*[slice(None)] * step.axis, slice(step.start, stop, step.step))
    return lambda x: x[where]


def _window(step: p.Window) -> Callable[[torch.Tensor], torch.Tensor]:
    span = step.dilation * (step.kernel - 1) + 1

    def window(x: torch.Tensor) -> torch.Tensor:
        x = x.unfold(step.axis, span, step.stride)
        if step.dilation > 1:
            x = x[..., :: step.dilation]
        return x.narrow(step.axis, 0, step.positions)

    return window


def _overlap_add(step: p.OverlapAdd) -> Callable[[torch.Tensor], torch.Tensor]:
    def overlap_add(x: torch.Tensor) -> torch.Tensor:
        stuff = _stuff(p.Stuff((0,), step.axis, step.stride)) if step.stride > 1 else None
        out = None
        for k in range(x.shape[-1]):
            part = x[..., k] if stuff is None else stuff(x[..., k])
            left = k * step.dilation
            right = step.length - left - part.shape[step.axis]
            part = _pad(p.Pad((0,), step.axis, left, right))(part)
            out = part if out is None else out + part
        assert out is not None
        return out

    return overlap_add


def _gather(step: p.Gather) -> Callable[[torch.Tensor], torch.Tensor]:
    def gather(x: torch.Tensor) -> torch.Tensor:
        key = ("reads", step.pattern, x.device)
        reads = _constants.get_or_make(key, lambda: torch.tensor(step.pattern.reads()[:, 0], device=x.device))
        return x.index_select(step.axis, reads)

    return gather


def _matmul(step: p.MatMul) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return torch.matmul


_CONVOLUTIONS = (None, torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)


def _convolution(step: p.Convolution) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    stride, padding, dilation, groups = list(step.stride), list(step.padding), list(step.dilation), step.groups
    dims = len(stride)
    if step.kind == "forward":
        convolve = _CONVOLUTIONS[dims]
        assert convolve is not None
        return lambda x, w: convolve(x, w, None, stride, padding, dilation, groups)
    if step.kind == "input_grad":

        def input_grad(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            extra = [
                size - ((o - 1) * s - 2 * q + d * (k - 1) + 1)
                for size, o, s, q, d, k in zip(
                    step.size[2:], v.shape[2:], stride, padding, dilation, w.shape[2:], strict=True
                )
            ]
            return torch.convolution(v, w, None, stride, padding, dilation, True, extra, groups)

        return input_grad

    def weight_grad(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        like = x.new_empty(1).expand(step.size)
        return torch.ops.aten.convolution_backward(
            v, x, like, None, stride, padding, dilation, False, [0] * dims, groups, [False, True, False]
        )[1]

    return weight_grad


_STEPS: dict[type[p.Step], Callable[[Any], Callable[..., Any]]] = {
    p.Constant: _constant,
    p.Fill: lambda s: lambda like: torch.full(s.size, s.value, dtype=like.dtype, device=like.device),
    p.Identity: lambda s: lambda like: torch.eye(s.size, dtype=like.dtype, device=like.device),
    p.Reshape: lambda s: lambda x: x.reshape(s.size),
    p.Transpose: lambda s: lambda x: x.permute(s.order),
    p.Slice: _slice,
    p.Pad: _pad,
    p.Stuff: _stuff,
    p.Gather: _gather,
    p.Window: _window,
    p.OverlapAdd: _overlap_add,
    p.Diagonal: lambda s: lambda x: x.diagonal(dim1=s.first, dim2=s.second),
    p.SumAxes: lambda s: lambda x: x.sum(dim=s.axes),
    p.Expand: lambda s: lambda x: x.expand(s.size),
    p.Multiply: lambda s: torch.mul,
    p.MatMul: _matmul,
    p.Convolution: _convolution,
    p.Add: lambda s: torch.add,
    p.Multiple: lambda s: lambda x: x * float(s.factor),
}


class TorchBackend:
    """Tensors of torch."""

    name = "torch"
    steps = _STEPS

    def kind(self, array: Any) -> tuple:
        return ("torch", array.dtype, array.device)

    def reference(self, arrays: Sequence[Any], names: Sequence[str]) -> Any:
        for array, name in zip(arrays, names, strict=True):
            if not (array.is_floating_point() or array.is_complex()):
                raise TypeError(f"{name} has dtype {array.dtype}, expected a floating or complex dtype")
            if array.dtype != arrays[0].dtype:
                raise TypeError(
                    f"{name} has dtype {array.dtype}, expected {arrays[0].dtype} as {names[0]} has: one dtype for all"
                )
            if array.device != arrays[0].device:
                raise ValueError(f"{name} is on {array.device}, expected {arrays[0].device} as {names[0]} is")
        return arrays[0] if arrays else self.default_reference()

    def default_reference(self) -> Any:
        return torch.zeros((), dtype=torch.float64)

    def is_complex(self, array: Any) -> bool:
        return array.is_complex()

    def conj(self, array: Any) -> Any:
        return array.conj()

    def copy(self, array: Any) -> Any:
        return array.clone(memory_format=torch.contiguous_format)


BACKEND = TorchBackend()
