"""NumPy kernels: the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lensor import plan as p
from lensor.kernels.constants import materialize_summed


def _constant(step: p.Constant) -> Callable[[np.ndarray], np.ndarray]:
    return lambda like: materialize_summed(step.pattern, step.summed, like.dtype)


def _pad(step: p.Pad) -> Callable[[np.ndarray], np.ndarray]:
    def pad(x: np.ndarray) -> np.ndarray:
        widths = [(0, 0)] * x.ndim
        widths[step.axis] = (step.left, step.right)
        return np.pad(x, widths)

    return pad


def _stuff(step: p.Stuff) -> Callable[[np.ndarray], np.ndarray]:
    def stuff(x: np.ndarray) -> np.ndarray:
        out = np.zeros(step.shape([x.shape]), x.dtype)
        out[(*[slice(None)] * step.axis, slice(None, None, step.step))] = x
        return out

    return stuff


def _slice(step: p.Slice) -> Callable[[np.ndarray], np.ndarray]:
    stop = step.start + (step.count - 1) * step.step + 1
    where = (*[slice(None)] * step.axis, slice(step.start, stop, step.step))
    return lambda x: x[where]


def _window(step: p.Window) -> Callable[[np.ndarray], np.ndarray]:
    span = step.dilation * (step.kernel - 1) + 1
    where = (*[slice(None)] * step.axis, slice(0, (step.positions - 1) * step.stride + 1, step.stride))

    def window(x: np.ndarray) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(x, span, axis=step.axis)[where][..., :: step.dilation]

    return window


def _overlap_add(step: p.OverlapAdd) -> Callable[[np.ndarray], np.ndarray]:
    def overlap_add(x: np.ndarray) -> np.ndarray:
        out = np.zeros(step.shape([x.shape]), x.dtype)
        span = (x.shape[step.axis] - 1) * step.stride + 1
        for k in range(x.shape[-1]):
            start = k * step.dilation
            out[(*[slice(None)] * step.axis, slice(start, start + span, step.stride))] += x[..., k]
        return out

    return overlap_add


_STEPS: dict[type[p.Step], Callable[[Any], Callable[..., Any]]] = {
    p.Constant: _constant,
    p.Fill: lambda s: lambda like: np.full(s.size, s.value, like.dtype),
    p.Identity: lambda s: lambda like: np.eye(s.size, dtype=like.dtype),
    p.Reshape: lambda s: lambda x: x.reshape(s.size),
    p.Transpose: lambda s: lambda x: x.transpose(s.order),
    p.Slice: _slice,
    p.Pad: _pad,
    p.Stuff: _stuff,
    p.Gather: lambda s: lambda x: x.take(s.pattern.reads()[:, 0], axis=s.axis),
    p.Window: _window,
    p.OverlapAdd: _overlap_add,
    p.Diagonal: lambda s: lambda x: x.diagonal(axis1=s.first, axis2=s.second),
    p.SumAxes: lambda s: lambda x: x.sum(axis=s.axes),
    p.Expand: lambda s: lambda x: np.broadcast_to(x, s.size),
    p.Multiply: lambda s: np.multiply,
    p.MatMul: lambda s: np.matmul,
    p.Add: lambda s: np.add,
    p.Multiple: lambda s: lambda x: x * x.dtype.type(float(s.factor)),
}


class NumpyBackend:
    """Arrays of NumPy."""

    name = "numpy"
    steps = _STEPS

    def kind(self, array: Any) -> tuple:
        return ("numpy", array.dtype)

    def reference(self, arrays: Sequence[Any], names: Sequence[str]) -> Any:
        for array, name in zip(arrays, names, strict=True):
            if not np.issubdtype(array.dtype, np.inexact):
                raise TypeError(f"{name} has dtype {array.dtype}, expected a floating or complex dtype")
            if array.dtype != arrays[0].dtype:
                raise TypeError(
                    f"{name} has dtype {array.dtype}, expected {arrays[0].dtype} as {names[0]} has: one dtype for all"
                )
        return arrays[0] if arrays else self.default_reference()

    def default_reference(self) -> Any:
        return np.zeros((), np.float64)

    def is_complex(self, array: Any) -> bool:
        return np.iscomplexobj(array)

    def conj(self, array: Any) -> Any:
        return array.conj()

    def copy(self, array: Any) -> Any:
        return np.array(array)


BACKEND = NumpyBackend()
