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


def _convolution(step: p.Convolution) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Patches as strided views and one einsum a call, by group; the adjoint by adding shifted slices."""
    dims, groups = len(step.stride), step.groups
    spatial = list(range(4, 4 + dims))
    kernel = list(range(4 + dims, 4 + 2 * dims))

    def patches(x: np.ndarray, positions: tuple[int, ...], kernels: tuple[int, ...]) -> np.ndarray:
        x = np.pad(x, [(0, 0), (0, 0), *((q, q) for q in step.padding)])
        for axis in range(dims):
            window = p.Window((0,), 2 + axis, positions[axis], kernels[axis], step.stride[axis], step.dilation[axis])
            length = (positions[axis] - 1) * step.stride[axis] + step.dilation[axis] * (kernels[axis] - 1) + 1
            x = _window(window)(x[(*[slice(None)] * (2 + axis), slice(0, length))])
        return x.reshape(x.shape[0], groups, -1, *x.shape[2:])  # n g c o k

    def forward(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        found = patches(x, step.size[2:], w.shape[2:])
        w = w.reshape(groups, -1, *w.shape[1:])  # g co c k
        out = np.einsum(found, [0, 1, 2, *spatial, *kernel], w, [1, 3, 2, *kernel], [0, 1, 3, *spatial], optimize=True)
        return out.reshape(step.size)

    def weight_grad(x: np.ndarray, v: np.ndarray) -> np.ndarray:
        found = patches(x, v.shape[2:], step.size[2:])
        v = v.reshape(v.shape[0], groups, -1, *v.shape[2:])
        out = np.einsum(found, [0, 1, 2, *spatial, *kernel], v, [0, 1, 3, *spatial], [1, 3, 2, *kernel], optimize=True)
        return out.reshape(step.size)

    def input_grad(v: np.ndarray, w: np.ndarray) -> np.ndarray:
        v = v.reshape(v.shape[0], groups, -1, *v.shape[2:])
        w = w.reshape(groups, -1, *w.shape[1:])
        out = np.einsum(v, [0, 1, 3, *spatial], w, [1, 3, 2, *kernel], [0, 1, 2, *spatial, *kernel], optimize=True)
        out = out.reshape(out.shape[0], -1, *out.shape[3:])
        for axis in reversed(range(dims)):
            left, size = step.padding[axis], step.size[2 + axis]
            length = max(
                (out.shape[2 + axis] - 1) * step.stride[axis] + step.dilation[axis] * (out.shape[-1] - 1) + 1, left + size
            )
            out = _overlap_add(p.OverlapAdd((0,), 2 + axis, length, step.stride[axis], step.dilation[axis]))(out)
            out = out[(*[slice(None)] * (2 + axis), slice(left, left + size))]
        return out

    return {"forward": forward, "weight_grad": weight_grad, "input_grad": input_grad}[step.kind]


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
    p.Convolution: _convolution,
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
