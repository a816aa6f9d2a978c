"""The steps of plans in torch, written with torch operators that are differentiable to any order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch._C._functorch import is_functorch_wrapped_tensor

from lensor.kernels.selection import in_mode, read_at
from lensor.kernels.torch.capture import Constant
from lensor.kernels.torch.memory import shape_only
from lensor.kernels.torch.patterns import pattern_product
from lensor.kernels.torch.tensors import may_write
from lensor.pattern import IndexPattern
from lensor.plan import steps as s


def _constant(step: s.Constant) -> Callable[[torch.Tensor], torch.Tensor]:
    def make() -> torch.Tensor:
        return torch.from_numpy(step.pattern.summed(step.summed, np.float64))

    return Constant((step.pattern, step.summed), make)


def _pad(step: s.Pad) -> Callable[[torch.Tensor], torch.Tensor]:
    def pad(x: torch.Tensor) -> torch.Tensor:
        widths = [0, 0] * (x.ndim - 1 - step.axis) + [step.left, step.right]
        return torch.nn.functional.pad(x, widths)

    return pad


def _stuff(step: s.Stuff) -> Callable[[torch.Tensor], torch.Tensor]:
    def stuff(x: torch.Tensor) -> torch.Tensor:
        if may_write(x):
            out = x.new_zeros(step.shape([tuple(x.shape)]))
            out[(*[slice(None)] * step.axis, slice(None, None, step.step))] = x
            return out
        x = x.unsqueeze(step.axis + 1)
        x = torch.nn.functional.pad(x, [0, 0] * (x.ndim - 2 - step.axis) + [0, step.step - 1])
        x = x.flatten(step.axis, step.axis + 1)
        return x.narrow(step.axis, 0, x.shape[step.axis] - (step.step - 1))

    return stuff


def _slice(step: s.Slice) -> Callable[[torch.Tensor], torch.Tensor]:
    stop = step.start + (step.count - 1) * step.step + 1
    where = (*[slice(None)] * step.axis, slice(step.start, stop, step.step))
    return lambda x: x[where]


def _window(step: s.Window) -> Callable[[torch.Tensor], torch.Tensor]:
    span = step.dilation * (step.kernel - 1) + 1

    def window(x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(x):
            # The derivative of a strided view has no batching rule in torch.
            first = torch.arange(step.positions, device=x.device) * step.stride
            reads = (first[:, None] + torch.arange(step.kernel, device=x.device) * step.dilation).flatten()
            x = x.index_select(step.axis, reads).unflatten(step.axis, (step.positions, step.kernel))
            return x.movedim(step.axis + 1, -1)
        x = x.unfold(step.axis, span, step.stride)
        if step.dilation > 1:
            x = x[..., :: step.dilation]
        return x.narrow(step.axis, 0, step.positions)

    return window


def _overlap_add(step: s.OverlapAdd) -> Callable[[torch.Tensor], torch.Tensor]:
    def overlap_add(x: torch.Tensor) -> torch.Tensor:
        stuff = _stuff(s.Stuff((0,), step.axis, step.stride)) if step.stride > 1 else None
        out = None
        for k in range(x.shape[-1]):
            part = x[..., k] if stuff is None else stuff(x[..., k])
            left = k * step.dilation
            right = step.length - left - part.shape[step.axis]
            part = _pad(s.Pad((0,), step.axis, left, right))(part)
            out = part if out is None else out + part
        assert out is not None
        return out

    return overlap_add


_MOST_RUNS = 8
"""Up to this many runs of positions are read as slices and concatenated, which is faster than indexing."""


def _gather(step: s.Gather) -> Callable[[torch.Tensor], torch.Tensor]:
    axis, runs = step.axis, step.runs()
    if 0 < len(runs) <= _MOST_RUNS:
        return lambda x: torch.cat([_run(x, axis, *one) for one in runs], axis)
    return lambda x: x.index_select(step.axis, _reads(step.pattern, x))


def _flip(step: s.Flip) -> Callable[[torch.Tensor], torch.Tensor]:
    def flip(x: torch.Tensor) -> torch.Tensor:
        if not may_write(x) or not step.pieces(x.shape):
            return x.flip(step.axes)
        sizes = [x.shape[axis] for axis in step.axes]
        out = x.new_empty(x.shape)
        where: list[Any] = [slice(None)] * x.ndim
        for places in itertools.product(*map(range, sizes)):
            for axis, place in zip(step.axes, places, strict=True):
                where[axis] = place
            target = out[tuple(where)]
            for axis, place, size in zip(step.axes, places, sizes, strict=True):
                where[axis] = size - 1 - place
            target.copy_(x[tuple(where)])
        return out

    return flip


def _reads(crop: IndexPattern, like: torch.Tensor) -> torch.Tensor:
    """The input position that each output position of a crop reads, in any padding mode except zeros."""
    places = torch.arange(crop.output_size, device=like.device) * crop.stride - crop.padding[0]
    return in_mode(places, crop.input_size, crop.padding_mode, torch.where)


def _scatter_add(step: s.ScatterAdd) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.new_zeros(step.shape([x.shape])).index_add_(step.axis, _reads(step.pattern, x), x)


def _put(step: s.Put) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda x, positions: x.new_zeros(step.shape([x.shape])).index_add_(step.axis, positions, x)


def _read(step: s.Read) -> Callable[..., torch.Tensor]:
    def read(x: torch.Tensor, *positions: torch.Tensor) -> torch.Tensor:
        ordered = [positions[axis.positions - 1] for axis in step.axes]
        places = read_at(
            step,
            ordered,
            lambda size: torch.arange(size, device=x.device),
            torch.where,
        )
        last = step.axis + len(step.axes) - 1
        flat = torch.nn.functional.pad(x.flatten(step.axis, last), (*(0, 0) * (x.ndim - 1 - last), 0, 1))
        return flat.index_select(step.axis, places).reshape(step.shape([x.shape, *(each.shape for each in positions)]))

    return read


def _run(x: torch.Tensor, axis: int, start: int, step: int, length: int) -> torch.Tensor:
    low = min(start, start + step * (length - 1))
    x = x.narrow(axis, low, abs(step) * (length - 1) + 1)
    if step == 0:
        return x.expand(*x.shape[:axis], length, *x.shape[axis + 1 :])
    if abs(step) > 1:
        x = x[(slice(None),) * axis + (slice(None, None, abs(step)),)]
    return x if step > 0 else x.flip(axis)


def _number(factor: Any) -> Any:
    """A factor as a number, which is symbolic if it contains a symbolic size."""
    return float(factor) if isinstance(factor, Fraction) else factor


def _multiple(step: s.Multiple) -> Callable[[torch.Tensor], torch.Tensor]:
    factor = _number(step.factor)
    if step.owned:
        return lambda x: x.mul_(factor) if may_write(x) else x * factor
    return lambda x: x * factor


def _add(step: s.Add) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    if step.owned:
        return lambda a, b: a.add_(b) if may_write(a) and may_write(b) else a + b
    return torch.add


def _add_at(step: s.AddAt) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def add_at(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if not (may_write(a) and may_write(b)):
            ends = zip(step.starts, a.shape, b.shape, strict=True)
            widths = [width for start, size, part in ends for width in (size - part - start, start)]
            return a + torch.nn.functional.pad(b, widths[::-1])
        a = a if step.owned else a.clone()
        a[step.part(b.shape)].add_(b)
        return a

    return add_at


def _sum_squares(step: s.SumSquares) -> Callable[[torch.Tensor], torch.Tensor]:
    """Add squares term by term without storing them, or all at once for many terms or if writing is not allowed."""
    axes = step.axes

    def sum_squares(x: torch.Tensor) -> torch.Tensor:
        sizes = [x.shape[axis] for axis in axes]
        if not may_write(x) or not 0 < math.prod(sizes) <= step.most_terms:
            return (x * x).sum(axes)
        kept = [axis for axis in range(x.ndim) if axis not in axes]
        terms = x.permute(*axes, *kept)
        first, *others = itertools.product(*map(range, sizes))
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype  # sums in half are inaccurate
        result = torch.mul(*[terms[first].to(wide)] * 2, out=x.new_empty([x.shape[axis] for axis in kept], dtype=wide))
        for place in others:
            result.addcmul_(*[terms[place].to(wide)] * 2)
        return result.to(x.dtype)

    return sum_squares


def _multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply into row-major order, since the next step is often a view; torch would use the order of the factors."""
    if not (may_write(a) and may_write(b)) or (a.is_contiguous() and b.is_contiguous()):
        return a * b
    shape = [q if p == 1 else p for p, q in zip(a.shape, b.shape, strict=True)]
    return torch.mul(a, b, out=a.new_empty(shape, dtype=torch.result_type(a, b)))


def _matmul(step: s.MatMul | s.Gram) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    if isinstance(step.factor, Fraction) and step.factor == 1:
        return torch.matmul
    factor = _number(step.factor)

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if may_write(a) and a.ndim in (2, 3) and a.shape[:-2] == b.shape[:-2]:
            multiply = torch.addmm if a.ndim == 2 else torch.baddbmm
            return multiply(a.new_empty((1,) * a.ndim), a, b, beta=0, alpha=factor)
        return torch.matmul(a, b) * factor

    return matmul


def _gram(step: s.Gram) -> Callable[[torch.Tensor], torch.Tensor]:
    """Multiply halves of the rows recursively, or all rows at once if this saves nothing or writing is not allowed."""
    multiply = _matmul(step)
    factor = _number(step.factor)

    def fill(out: torch.Tensor, x: torch.Tensor, depth: int) -> None:
        if not depth:
            _product_into(out, x, x, factor)
            return
        size = x.shape[-2]
        low, high = slice(0, size // 2), slice(size // 2, size)
        fill(out[..., low, low], x[..., low, :], depth - 1)
        fill(out[..., high, high], x[..., high, :], depth - 1)
        _product_into(out[..., high, low], x[..., high, :], x[..., low, :], factor)
        out[..., low, high] = out[..., high, low].mT

    def gram(x: torch.Tensor) -> torch.Tensor:
        depth = step.depth(*x.shape[-2:]) if may_write(x) and not x.is_cuda else 0
        if not depth:
            return multiply(x, x.mT)
        out = x.new_empty((*x.shape[:-1], x.shape[-2]))
        fill(out, x, depth)
        return out

    return gram


def _product_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: float) -> None:
    """Write factor · a bᵀ to `out`, one batch element at a time, since a batched product needs contiguous memory."""
    for place in itertools.product(*map(range, out.shape[:-2])):
        torch.addmm(out[place], a[place], b[place].mT, beta=0, alpha=factor, out=out[place])


_CONVOLUTIONS = (None, torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)


def _convolution(step: s.Convolution) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
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
            within = all(more < apart for more, apart in zip(extra, stride, strict=True))
            if any(extra) and within and v.device.type == "cpu":  # a transposed convolution copies such a result again
                like = shape_only((v.shape[0], *step.size[1:]), v)
                return torch.ops.aten.convolution_backward(
                    v, like, w, None, stride, padding, dilation, False, [0] * dims, groups, [True, False, False]
                )[0]
            return torch.convolution(v, w, None, stride, padding, dilation, True, extra, groups)

        return input_grad

    def weight_grad(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        like = shape_only(step.size, x)
        return torch.ops.aten.convolution_backward(
            v, x, like, None, stride, padding, dilation, False, [0] * dims, groups, [False, True, False]
        )[1]

    return weight_grad


STEPS: dict[type[s.Step], Callable[[Any], Callable[..., Any]]] = {
    s.Constant: _constant,
    s.Fill: lambda step: lambda like: torch.full(step.size, _number(step.value), dtype=like.dtype, device=like.device),
    s.Identity: lambda step: lambda like: torch.eye(step.size, dtype=like.dtype, device=like.device),
    s.Reshape: lambda step: lambda x: x.reshape(step.size),
    s.Transpose: lambda step: lambda x: x.permute(step.order),
    s.Slice: _slice,
    s.Pad: _pad,
    s.Stuff: _stuff,
    s.Gather: _gather,
    s.Pick: lambda step: lambda x, positions: x.index_select(step.axis, positions),
    s.ScatterAdd: _scatter_add,
    s.Put: _put,
    s.Read: _read,
    s.Window: _window,
    s.OverlapAdd: _overlap_add,
    s.Diagonal: lambda step: lambda x: x.diagonal(dim1=step.first, dim2=step.second),
    s.SumAxes: lambda step: lambda x: x.sum(dim=step.axes),
    s.Expand: lambda step: lambda x: x.expand(step.size),
    s.Multiply: lambda step: _multiply,
    s.MatMul: _matmul,
    s.Gram: _gram,
    s.PatternProduct: pattern_product,
    s.Flip: _flip,
    s.Concat: lambda step: lambda *parts: torch.cat(parts, step.axis),
    s.Convolution: _convolution,
    s.SumSquares: _sum_squares,
    s.Add: _add,
    s.AddAt: _add_at,
    s.Multiple: _multiple,
}
