"""The NumPy kernels, which serve as the reference."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from lensor.kernels.common import common_steps, reads_of, require_inside, widened
from lensor.kernels.constants import folded, materialize_summed
from lensor.plan import steps as s
from lensor.spec import ConvSpec


def _constant(step: s.Constant) -> Callable[[np.ndarray], np.ndarray]:
    return lambda like: materialize_summed(step.pattern, step.summed, like.dtype)


def _pad(step: s.Pad) -> Callable[[np.ndarray], np.ndarray]:
    def pad(x: np.ndarray) -> np.ndarray:
        widths = [(0, 0)] * x.ndim
        widths[step.axis] = (step.left, step.right)
        return np.pad(x, widths)

    return pad


def _stuff(step: s.Stuff) -> Callable[[np.ndarray], np.ndarray]:
    def stuff(x: np.ndarray) -> np.ndarray:
        out = np.zeros(step.shape([x.shape]), x.dtype)
        out[(*[slice(None)] * step.axis, slice(None, None, step.step))] = x
        return out

    return stuff


def _multiple(step: s.Multiple) -> Callable[[np.ndarray], np.ndarray]:
    def multiple(x: np.ndarray) -> np.ndarray:
        factor = x.dtype.type(float(step.factor))
        return np.multiply(x, factor, out=x) if step.owned and x.flags.writeable else x * factor

    return multiple


def _add(step: s.Add) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda a, b: np.add(a, b, out=a) if step.owned and a.flags.writeable else a + b


def _add_at(step: s.AddAt) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def add_at(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a = a if step.owned and a.flags.writeable else a.copy()
        a[step.part(b.shape)] += b
        return a

    return add_at


def _sum_squares(step: s.SumSquares) -> Callable[[np.ndarray], np.ndarray]:
    def sum_squares(x: np.ndarray) -> np.ndarray:
        every, kept = list(range(x.ndim)), [axis for axis in range(x.ndim) if axis not in step.axes]
        return np.einsum(x, every, x, every, kept)

    return sum_squares


def _scatter_add(step: s.ScatterAdd) -> Callable[[np.ndarray], np.ndarray]:
    def scatter_add(x: np.ndarray) -> np.ndarray:
        whole, reads = np.zeros(step.shape([x.shape]), x.dtype), reads_of(step.pattern)
        np.add.at(np.moveaxis(whole, step.axis, 0), reads, np.moveaxis(x, step.axis, 0))
        return whole

    return scatter_add


def _put(step: s.Put) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def put(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        whole = np.zeros(step.shape([x.shape]), x.dtype)
        np.add.at(np.moveaxis(whole, step.axis, 0), positions, np.moveaxis(x, step.axis, 0))
        return whole

    return put


def _slice(step: s.Slice) -> Callable[[np.ndarray], np.ndarray]:
    stop = step.start + (step.count - 1) * step.step + 1
    where = (*[slice(None)] * step.axis, slice(step.start, stop, step.step))
    return lambda x: x[where]


def _window(step: s.Window) -> Callable[[np.ndarray], np.ndarray]:
    span = step.dilation * (step.kernel - 1) + 1
    where = (*[slice(None)] * step.axis, slice(0, (step.positions - 1) * step.stride + 1, step.stride))

    def window(x: np.ndarray) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(x, span, axis=step.axis)[where][..., :: step.dilation]

    return window


def _overlap_add(step: s.OverlapAdd) -> Callable[[np.ndarray], np.ndarray]:
    def overlap_add(x: np.ndarray) -> np.ndarray:
        out = np.zeros(step.shape([x.shape]), x.dtype)
        span = (x.shape[step.axis] - 1) * step.stride + 1
        for k in range(x.shape[-1]):
            start = k * step.dilation
            out[(*[slice(None)] * step.axis, slice(start, start + span, step.stride))] += x[..., k]
        return out

    return overlap_add


def _matmul(step: s.MatMul | s.Gram) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    if step.factor == 1:
        return np.matmul
    factor = float(step.factor)

    def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        product = np.matmul(a, b)
        product *= factor
        return product

    return matmul


def _gram(step: s.Gram) -> Callable[[np.ndarray], np.ndarray]:
    multiply = _matmul(step)
    return lambda x: multiply(x, x.swapaxes(-1, -2))


def _convolution(step: s.Convolution) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Use strided views of patches and one einsum per call; the input gradient adds shifted slices."""
    dims, groups = len(step.stride), step.groups
    spatial = list(range(4, 4 + dims))
    kernel = list(range(4 + dims, 4 + 2 * dims))

    def patches(x: np.ndarray, positions: tuple[int, ...], kernels: tuple[int, ...]) -> np.ndarray:
        x = np.pad(x, [(0, 0), (0, 0), *((q, q) for q in step.padding)])
        for axis in range(dims):
            window = s.Window((0,), 2 + axis, positions[axis], kernels[axis], step.stride[axis], step.dilation[axis])
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
                (out.shape[2 + axis] - 1) * step.stride[axis] + step.dilation[axis] * (out.shape[-1] - 1) + 1,
                left + size,
            )
            out = _overlap_add(s.OverlapAdd((0,), 2 + axis, length, step.stride[axis], step.dilation[axis]))(out)
            out = out[(*[slice(None)] * (2 + axis), slice(left, left + size))]
        return out

    return {"forward": forward, "weight_grad": weight_grad, "input_grad": input_grad}[step.kind]


_STEPS: dict[type[s.Step], Callable[[Any], Callable[..., Any]]] = {
    **common_steps(np),
    s.Constant: _constant,
    s.Slice: _slice,
    s.Pad: _pad,
    s.Stuff: _stuff,
    s.Gather: lambda step: lambda x: x.take(reads_of(step.pattern), axis=step.axis),
    s.Window: _window,
    s.OverlapAdd: _overlap_add,
    s.Diagonal: lambda step: lambda x: x.diagonal(axis1=step.first, axis2=step.second),
    s.ScatterAdd: _scatter_add,
    s.Put: _put,
    s.MatMul: _matmul,
    s.Gram: _gram,
    s.Convolution: _convolution,
    s.SumSquares: _sum_squares,
    s.Add: _add,
    s.AddAt: _add_at,
    s.Multiple: _multiple,
}


class NumpyBackend:
    """The backend for NumPy arrays."""

    name = "numpy"
    steps = _STEPS

    def kind(self, array: Any) -> tuple:
        return ("numpy", array.dtype)

    def device(self, kind: Sequence[Any]) -> tuple[str, str, int]:
        return "cpu", "NumPy", os.cpu_count() or 1

    def dtype(self, kind: Sequence[Any]) -> str:
        return kind[1].name

    def example(self, shape: Sequence[int], dtype: str, device: str) -> Any:
        if device != "cpu":
            raise ValueError(f"device is {device!r}, expected 'cpu', the only device of NumPy")
        return np.ones(tuple(shape), dtype)

    def describe(self, kind: Sequence[Any]) -> str:
        return f"numpy {np.__version__}, {kind[1]}"

    def check(self, arrays: Sequence[Any], names: Sequence[str]) -> None:
        for array, name in zip(arrays, names, strict=True):
            if not np.issubdtype(array.dtype, np.inexact):
                raise TypeError(f"{name} has dtype {array.dtype}, expected a floating or complex dtype")
            if array.dtype != arrays[0].dtype:
                raise TypeError(f"{name} has dtype {array.dtype}, expected {arrays[0].dtype}, the dtype of {names[0]}")

    def check_positions(self, array: Any, name: str, below: int) -> None:
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{name} has dtype {array.dtype}, expected positions of an integer dtype")
        require_inside(array, name, below)

    def constant(self, key: Any, make: Callable[[np.dtype], np.ndarray]) -> Callable[[Any], Any]:
        return lambda like: folded(key, make, like.dtype)

    def default_reference(self) -> Any:
        return np.zeros((), np.float64)

    def is_complex(self, array: Any) -> bool:
        return np.iscomplexobj(array)

    def conj(self, array: Any) -> Any:
        return array.conj()

    def copy(self, array: Any, *, channels_last: bool = False) -> Any:
        return np.array(array) if array.ndim else array.copy()

    def owned(self, array: Any, *others: Any, channels_last: bool = False) -> Any:
        if array.flags.c_contiguous and not any(np.may_share_memory(array, other) for other in others):
            return array
        return self.copy(array)

    def settled(self, array: Any, *, channels_last: bool = False) -> Any:
        return array  # NumPy functions preserve the memory order of their arguments, and reshape copies

    def formatted(self, ready: Any, spec: ConvSpec) -> Callable[..., Any]:
        return ready.unchecked

    def widened(self, run: Callable[..., Any], one_sum: s.Step | None) -> Callable[..., Any]:
        return widened(run)  # NumPy accumulates in half precision even inside one step

    def as_operator(self, ready: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        return run

    def differentiable(self, ready: Any) -> Callable[..., Any]:
        return ready.unrecorded

    def can_run(self, steps: Sequence[s.Step], kind: Sequence[Any]) -> bool:
        return True

    def fuses(self, kind: Sequence[Any]) -> bool:
        return False

    def convolves_as_it_multiplies(self, kind: Sequence[Any]) -> bool:
        return True

    def itemsize(self, kind: Sequence[Any]) -> int:
        return kind[1].itemsize

    def spread(self, count: int, below: int, kind: Sequence[Any]) -> Any:
        return np.linspace(0, max(below - 1, 0), count).astype(np.int64)

    def random(self, shape: Sequence[int], kind: Sequence[Any]) -> Any:
        values = np.random.default_rng(0).standard_normal(shape, np.float32)
        return values.astype(kind[1])

    def placeholder(self, shape: Sequence[int], dtype: Any, device: Any) -> Any:
        return np.broadcast_to(np.empty((), dtype), shape)

    def timed(self, call: Callable[[], Any], kind: Sequence[Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def tuning(self, kind: Sequence[Any]) -> AbstractContextManager[None]:
        return nullcontext()

    def is_traced(self, array: Any) -> bool:
        return False


BACKEND = NumpyBackend()
