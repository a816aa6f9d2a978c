"""torch kernels. Every step is made of differentiable torch operators, so results are differentiable to any order."""

from __future__ import annotations

import itertools
import math
import mmap
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._C import (  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    _are_functorch_transforms_active,
    _is_any_autocast_enabled,
)
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch.autograd import forward_ad

from lensor import steps as s
from lensor.cache import Cache
from lensor.kernels.selection import in_mode, read_at
from lensor.pattern import IndexPattern
from lensor.spec import ConvSpec

_constants = Cache(maxsize=256, weigh=lambda entry: entry[1].nbytes)


class _Constant:
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
        if type(like) not in (torch.Tensor, torch.nn.Parameter) or not _plain(like):
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
_numbered: weakref.WeakValueDictionary[int, _Constant] = weakref.WeakValueDictionary()


class _Captured:
    """The constants that graphs use, as attributes: torch.compile finds new ones there while it traces."""


_captured = _Captured()


@torch.compiler.assume_constant_result
def _captured_constant(number: int, dtype: torch.dtype, device: torch.device) -> str:
    """The name in `_captured` of a constant."""
    name = f"constant_{number}_{dtype}_{device}".replace(".", "_").replace(":", "_")
    setattr(_captured, name, _numbered[number].kept(dtype, device))
    return name


def _constant(step: s.Constant) -> Callable[[torch.Tensor], torch.Tensor]:
    def make() -> torch.Tensor:
        return torch.from_numpy(step.pattern.summed(step.summed, np.float64))

    return _Constant((step.pattern, step.summed), make)


def _pad(step: s.Pad) -> Callable[[torch.Tensor], torch.Tensor]:
    def pad(x: torch.Tensor) -> torch.Tensor:
        widths = [0, 0] * (x.ndim - 1 - step.axis) + [step.left, step.right]
        return torch.nn.functional.pad(x, widths)

    return pad


def _stuff(step: s.Stuff) -> Callable[[torch.Tensor], torch.Tensor]:
    def stuff(x: torch.Tensor) -> torch.Tensor:
        if _may_write(x):
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
            # torch's derivative of a strided view has no batching rule.
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
"""Positions in at most this many runs are read as slices side by side, which is faster than one by one."""


def _gather(step: s.Gather) -> Callable[[torch.Tensor], torch.Tensor]:
    axis, runs = step.axis, step.runs()
    if 0 < len(runs) <= _MOST_RUNS:
        return lambda x: torch.cat([_run(x, axis, *one) for one in runs], axis)
    return lambda x: x.index_select(step.axis, _reads(step.pattern, x))


def _reads(selection: IndexPattern, like: torch.Tensor) -> torch.Tensor:
    """The input position that each output position of a selection reads, in any mode but zeros."""
    places = torch.arange(selection.output_size, device=like.device) * selection.stride - selection.padding[0]
    return in_mode(places, selection.input_size, selection.padding_mode, torch.where)


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


def _multiple(step: s.Multiple) -> Callable[[torch.Tensor], torch.Tensor]:
    factor = float(step.factor)
    if step.owned:
        return lambda x: x.mul_(factor) if _may_write(x) else x * factor
    return lambda x: x * factor


def _add(step: s.Add) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    if step.owned:
        return lambda a, b: a.add_(b) if _may_write(a) and _may_write(b) else a + b
    return torch.add


_MANY = 256
"""More terms than this are squared before they are summed, in memory of their own."""


def _sum_squares(step: s.SumSquares) -> Callable[[torch.Tensor], torch.Tensor]:
    """Term by term added up, so that no squares are kept; all at once where terms are many or nobody may write."""
    axes = step.axes

    def sum_squares(x: torch.Tensor) -> torch.Tensor:
        sizes = [x.shape[axis] for axis in axes]
        if not 0 < math.prod(sizes) <= _MANY or not _may_write(x):
            return (x * x).sum(axes)
        kept = [axis for axis in range(x.ndim) if axis not in axes]
        terms = x.permute(*axes, *kept)
        first, *others = itertools.product(*map(range, sizes))
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype  # half precision adds up badly
        result = torch.mul(*[terms[first].to(wide)] * 2, out=x.new_empty([x.shape[axis] for axis in kept], dtype=wide))
        for place in others:
            result.addcmul_(*[terms[place].to(wide)] * 2)
        return result.to(x.dtype)

    return sum_squares


def _multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """In row-major order, where torch alone would take over the order of what it multiplies: a view comes next."""
    if (a.is_contiguous() and b.is_contiguous()) or not (_may_write(a) and _may_write(b)):
        return a * b
    shape = [q if p == 1 else p for p, q in zip(a.shape, b.shape, strict=True)]
    return torch.mul(a, b, out=a.new_empty(shape, dtype=torch.result_type(a, b)))


def _matmul(step: s.MatMul | s.Gram) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    if step.factor == 1:
        return torch.matmul
    factor = float(step.factor)

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if _may_write(a) and a.ndim in (2, 3) and a.shape[:-2] == b.shape[:-2]:
            multiply = torch.addmm if a.ndim == 2 else torch.baddbmm
            return multiply(a.new_empty((1,) * a.ndim), a, b, beta=0, alpha=factor)
        return torch.matmul(a, b) * factor

    return matmul


_BLOCK = 192
"""Rows from which on a Gram matrix is halved; smaller blocks lose to the overhead of a call."""

_LONG = 512
"""Shorter rows make a Gram matrix a matter of writing the result, where one triangle saves nothing."""

_WIDE = 1024
"""Gram matrices of more rows are halved for shorter rows, too, but less often."""


def _gram(step: s.Gram) -> Callable[[torch.Tensor], torch.Tensor]:
    """Halves of the rows with themselves and with each other; whole where that is no gain or nobody may write."""
    multiply = _matmul(step)
    factor = float(step.factor)

    def fill(out: torch.Tensor, x: torch.Tensor, least: int) -> None:
        size = x.shape[-2]
        if size < least:
            _product_into(out, x, x, factor)
            return
        half = size // 2
        low, high = slice(0, half), slice(half, size)
        fill(out[..., low, low], x[..., low, :], least)
        fill(out[..., high, high], x[..., high, :], least)
        _product_into(out[..., high, low], x[..., high, :], x[..., low, :], factor)
        out[..., low, high] = out[..., high, low].mT

    def gram(x: torch.Tensor) -> torch.Tensor:
        size, length = x.shape[-2:]
        least = _BLOCK if length >= _LONG else _WIDE if length >= _LONG // 2 else size + 1
        if size < least or x.is_cuda or not _may_write(x):
            return multiply(x, x.mT)
        out = x.new_empty((*x.shape[:-1], size))
        fill(out, x, least)
        return out

    return gram


def _product_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: float) -> None:
    """factor · a bᵀ, written where `out` lies: batch by batch, for a batched product wants one piece of memory."""
    for place in itertools.product(*map(range, out.shape[:-2])):
        torch.addmm(out[place], a[place], b[place].mT, beta=0, alpha=factor, out=out[place])


def _may_write(x: torch.Tensor) -> bool:
    """Whether writing into new arrays is invisible: no gradient is recorded, nothing is traced or batched."""
    if x.requires_grad and torch.is_grad_enabled():
        return False
    return _plain(x)


def _plain(x: torch.Tensor) -> bool:
    """Whether the tensor is one of its own, not traced, compiled or batched by a transform."""
    if torch.compiler.is_compiling():
        return False
    return not is_functorch_wrapped_tensor(x) and not is_legacy_batchedtensor(x)


Lags = dict[s.Shape, torch.Tensor]
"""For each lag a matrix of products of channels, [g, block, block]."""


def _patch_gram(step: s.PatchGram) -> Callable[[torch.Tensor], torch.Tensor]:
    """Products by lags, one block of channels with another at a time; then the corrections, products of thin lines.

    Channels lie last and positions in one row with zeros behind each axis, so that a lag is an offset in the row. What
    is alive beside the result: the row, and products of two blocks for all lags.
    """
    dims, kernel, pad, factor = len(step.patterns), step.kernel, step.pad, float(step.factor)
    dilation = tuple(pattern.dilation for pattern in step.patterns)
    lags, borders = step.lags(), step.borders()
    whole = s.Border((), 1, tuple(itertools.product(*map(range, kernel))), lags[0], tuple(2 * k - 1 for k in kernel))
    places = {border: _places(border, whole.offsets) for border in (whole, *borders)}

    def of_rows(row: torch.Tensor, strides: Sequence[int], one: slice, two: slice) -> Lags:
        """Σ x[i] x[i + lag] of two blocks of channels for every lag: [g, block, block]."""
        length = row.shape[1]
        found: Lags = {}
        for lag in lags:
            offset = sum(d * every * s for d, every, s in zip(lag, dilation, strides, strict=True))
            back = tuple(-d for d in lag)
            if one == two and back in found:
                found[lag] = found[back].mT
                continue
            first = row[:, max(-offset, 0) : length - max(offset, 0), one]
            second = row[:, max(offset, 0) : length - max(-offset, 0), two]
            # One channel a group: a product of vectors is no matter for a matrix product.
            found[lag] = (first * second).sum(1, keepdim=True) if row.shape[2] == 1 else first.mT @ second
        return found

    def of_lines(body: torch.Tensor, sizes: Sequence[int], one: slice, two: slice, border: s.Border) -> Lags:
        """The same over the positions of a border, for the lags that it needs."""
        own, around = body[..., one], body[..., two]
        fixed = dict(border.fixed)
        free = [axis for axis in range(dims) if axis not in fixed]
        for axis, position in fixed.items():
            own = own.narrow(2 + axis, position, 1)
            start = position + border.low[axis] * dilation[axis]
            around = _spread(around, 2 + axis, sizes[axis], start, dilation[axis], border.count[axis])
        for axis in free:
            own = own.narrow(2 + axis, 0, sizes[axis])
            around = _padded(around, 2 + axis, pad[axis], 0).unfold(2 + axis, 2 * pad[axis] + 1, 1)
            around = around[..., :: dilation[axis]]
        along = [2 + axis if axis in fixed else 3 + dims + free.index(axis) for axis in range(dims)]
        around = around.permute(0, 1, *(2 + axis for axis in free), *along, 2 + dims)  # positions, lags, block
        around = around.reshape(own.shape[0], -1, math.prod(border.count) * around.shape[-1])
        products = own.reshape(own.shape[0], -1, own.shape[-1]).mT @ around
        every = itertools.product(*(range(low, low + n) for low, n in zip(border.low, border.count, strict=True)))
        return dict(zip(every, products.unflatten(2, (math.prod(border.count), -1)).unbind(2), strict=True))

    def collect(found: Lags, border: s.Border, views: Any, entries: dict[tuple[int, int], torch.Tensor]) -> None:
        """Put the products for every pair of offsets where they belong: into the result's views, if it has any."""
        for k, second, lag in places[border]:
            if views is None:
                known = entries.get((k, second))
                entries[k, second] = found[lag] if known is None else known.add(found[lag], alpha=border.sign)
            elif border.fixed:
                views[k][second].add_(found[lag], alpha=border.sign)
            else:
                views[k][second].copy_(found[lag])

    def patch_gram(x: torch.Tensor) -> torch.Tensor:
        n, g, c, *sizes = x.shape
        writes = _may_write(x)
        x = x.permute(1, 0, *range(3, 3 + dims), 2)  # [g, n, *positions, c]
        if writes:  # padding as torch does it need not be in row-major order
            body = x.new_zeros((g, n, *map(sum, zip(sizes, pad, strict=True)), c))
            body[(slice(None), slice(None), *map(slice, sizes))] = x
        else:
            behind = [0, 0, *(width for axis in reversed(range(dims)) for width in (0, pad[axis]))]
            body = torch.nn.functional.pad(x, behind)
        row = body.reshape(g, -1, c)
        strides = [math.prod(body.shape[3 + axis : 2 + dims]) for axis in range(dims)]
        blocks = step.blocks(c) if writes else 1
        bounds = [c * at // blocks for at in range(blocks + 1)]
        parts = [slice(low, high) for low, high in itertools.pairwise(bounds)]
        size = len(whole.offsets)
        result = x.new_empty((g, c, size, c, size) if writes else (0,) * 5)
        by_offsets = result.permute(2, 4, 0, 1, 3)
        entries: dict[tuple[int, int], torch.Tensor] = {}
        for at, one in enumerate(parts):
            for two in parts[at:]:
                views = [of_k.unbind() for of_k in by_offsets[:, :, :, one, two].unbind()] if writes else None
                collect(of_rows(row, strides, one, two), whole, views, entries)
                for border in borders:
                    collect(of_lines(body, sizes, one, two, border), border, views, entries)
                if one != two:
                    result[:, two, :, one].copy_(result[:, one, :, two].permute(0, 3, 4, 1, 2))
        if not writes:
            rows = [torch.stack([entries[k, second] for second in range(size)], -1) for k in range(size)]
            result = torch.stack(rows, 2)
        if factor != 1:
            result = result.mul_(factor) if writes else result * factor
        return result.reshape(g, c, *kernel, c, *kernel)

    return patch_gram


def _places(border: s.Border, offsets: Sequence[s.Shape]) -> list[tuple[int, int, s.Shape]]:
    """Every pair of offsets (k, l) that a border concerns, by their places, with their lag."""
    numbers = {k: at for at, k in enumerate(offsets)}
    return [
        (numbers[k], at, tuple(b - a for a, b in zip(k, second, strict=True)))
        for k in border.offsets
        for at, second in enumerate(offsets)
    ]


def _padded(x: torch.Tensor, axis: int, before: int, behind: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, [*[0, 0] * (x.ndim - 1 - axis), before, behind]) if before or behind else x


def _spread(x: torch.Tensor, axis: int, size: int, start: int, every: int, count: int) -> torch.Tensor:
    """`count` positions of an axis from `start` on in steps, zeros outside of 0 to size − 1."""
    low = min(max(-(start // every), 0), count)
    high = max(min((size - 1 - start) // every + 1, count), low)
    if high == low:
        shape = list(x.shape)
        shape[axis] = count
        return x.new_zeros(shape)
    x = x.narrow(axis, start + low * every, (high - low - 1) * every + 1)
    x = x[(slice(None),) * axis + (slice(None, None, every),)]
    return _padded(x, axis, low, count - high)


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
                like = _shape_only((len(v), *step.size[1:]), v)
                return torch.ops.aten.convolution_backward(
                    v, like, w, None, stride, padding, dilation, False, [0] * dims, groups, [True, False, False]
                )[0]
            return torch.convolution(v, w, None, stride, padding, dilation, True, extra, groups)

        return input_grad

    def weight_grad(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        like = _shape_only(step.size, x)
        return torch.ops.aten.convolution_backward(
            v, x, like, None, stride, padding, dilation, False, [0] * dims, groups, [False, True, False]
        )[1]

    return weight_grad


_nothing = mmap.mmap(-1, mmap.PAGESIZE, access=mmap.ACCESS_COPY)
"""Addresses that are never read nor written to, and therefore take no memory."""


def _shape_only(size: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """A tensor of which torch's convolutions read the shape only; an expanded one would be copied by them.

    One from the allocator would take the memory that is warm from the result, which is made next.
    """
    global _nothing
    if like.device.type != "cpu" or type(like) is not torch.Tensor or torch.compiler.is_compiling():
        return like.new_empty(size)
    count = math.prod(size)
    buffer = _nothing
    if len(buffer) < count * like.element_size():
        buffer = _nothing = mmap.mmap(-1, 2 * count * like.element_size(), access=mmap.ACCESS_COPY)
    return torch.frombuffer(buffer, dtype=like.dtype, count=count).reshape(size) if count else like.new_empty(size)


_STEPS: dict[type[s.Step], Callable[[Any], Callable[..., Any]]] = {
    s.Constant: _constant,
    s.Fill: lambda step: lambda like: torch.full(step.size, float(step.value), dtype=like.dtype, device=like.device),
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
    s.PatchGram: _patch_gram,
    s.Concat: lambda step: lambda *parts: torch.cat(parts, step.axis),
    s.Convolution: _convolution,
    s.SumSquares: _sum_squares,
    s.Add: _add,
    s.Multiple: _multiple,
}


def _of_all_levels(x: torch.Tensor) -> torch.Tensor:
    """The tensor that transforms have wrapped."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x


def unviewed(x: torch.Tensor) -> torch.Tensor:
    """The tensor as no view, in the same memory: torch refuses to write into a view that a custom function returned."""
    if torch.compiler.is_compiling() or x.requires_grad or not _of_all_levels(x)._is_view():
        return x
    return x.detach() if _plain(x) else torch.ops.aten._unsafe_view(x, x.shape)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _format_of(x: torch.Tensor, channels_last: bool) -> torch.memory_format:
    return _CHANNELS_LAST.get(x.ndim, torch.contiguous_format) if channels_last else torch.contiguous_format


def in_channels_last(x: torch.Tensor) -> torch.Tensor:
    """The tensor in that order of axes; as it is under a transform, where orders are not known."""
    return x.contiguous(memory_format=_format_of(x, True)) if _plain(x) else x


def _is_channels_last(arrays: Sequence[torch.Tensor], spec: ConvSpec) -> bool:
    """Whether torch's own convolution of an input and a weight, or of one of them, has a result in that order."""
    if torch.compiler.is_compiling() or len(arrays) == 1:
        return any(map(suggests_channels_last, arrays))
    if not all(map(_plain, arrays)):
        return False  # batches of a transform do not say
    x, weight = arrays
    padding = [max(sides) for sides in spec.padding]
    if spec.padding_mode == "circular":  # torch pads first, into row-major order
        x = x.new_empty(x.shape)
    if not suggests_channels_last(x) and not suggests_channels_last(weight):
        return False
    options = (list(spec.stride), padding, list(spec.dilation), spec.transposed, list(spec.output_padding), spec.groups)
    backend = torch._C._select_conv_backend(x, weight, None, *options, None)
    return torch._C._conv_determine_backend_memory_format(x, weight, backend) != torch.contiguous_format


def suggests_channels_last(x: torch.Tensor) -> bool:
    """Whether torch takes an array of 4 or 5 axes to be in that order, which strides do not always tell."""
    strides, sizes = x.stride(), x.shape
    least = 0
    if strides[1] == 0:
        return False
    for axis in (1, *range(x.ndim - 1, 1, -1), 0):
        if sizes[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * max(sizes[axis], 1)
    return True


class _Derivatives:
    """What `_Planned` knows of the function that it records."""

    def __init__(self, run: Callable[..., Any], derivative: Callable[..., Any], needs: Sequence[Sequence[int]]) -> None:
        self.run, self.derivative, self.needs = run, derivative, needs
        self.unneeded: dict[tuple[bool, ...], tuple[int, ...]] = {}

    def kept(self, arrays: tuple[torch.Tensor, ...], asked: tuple[bool, ...]) -> Sequence[torch.Tensor | None]:
        """The operands that the derivatives asked for need; None for the others. `asked` begins with that of `self`."""
        unneeded = self.unneeded.get(asked)
        if unneeded is None:
            needed = {at for place, wanted in enumerate(asked[1:]) if wanted for at in self.needs[place]}
            unneeded = self.unneeded[asked] = tuple(at for at in range(len(arrays)) if at not in needed)
        if not unneeded:
            return arrays
        return [None if at in unneeded else array for at, array in enumerate(arrays)]


class _Planned(torch.autograd.Function):
    """A function whose derivatives are planned: what is kept for them are operands, those that they need."""

    @staticmethod
    def forward(ctx: Any, own: _Derivatives, *arrays: torch.Tensor) -> torch.Tensor:
        ctx.own, ctx.casts = own, _casts(next(array for array in arrays if not _is_positions(array)))
        ctx.save_for_backward(*own.kept(arrays, ctx.needs_input_grad))
        return own.run(*arrays)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        arrays, cotangent, casts = ctx.saved_tensors, cotangents[0], ctx.casts
        if casts is not None:
            cotangent = cotangent.to(casts.dtype)
        with casts.again() if casts is not None else nullcontext():
            found = [
                ctx.own.derivative("vjp", place, arrays, cotangent) if needed else None
                for place, needed in enumerate(ctx.needs_input_grad[1:])
            ]
        return None, *found


_record = super(torch.autograd.Function, _Planned).apply  # pyright: ignore[reportAttributeAccessIssue]
"""`_Planned.apply` without its preparations for transforms, which take longer than the rest."""


class _Transformed(_Planned):
    """The same in the form that torch.func's transforms ask for, and forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(own: _Derivatives, *arrays: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return own.run(*arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.own, *arrays = inputs
        ctx.casts = _casts(next(array for array in arrays if not _is_positions(array)))
        ctx.save_for_backward(*arrays)  # all, because they want the same for both modes
        ctx.save_for_forward(*arrays)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        arrays, found = ctx.saved_tensors, None
        with ctx.casts.again() if ctx.casts is not None else nullcontext():
            for place, tangent in enumerate(tangents[1:]):
                if tangent is not None:
                    part = ctx.own.derivative("jvp", place, arrays, tangent)
                    found = part if found is None else found + part
        return found


class _Casts(NamedTuple):
    """Automatic casts, to be done again, and the dtype of the operands."""

    device: str
    to: torch.dtype
    dtype: torch.dtype

    def again(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, self.to)


def _is_positions(x: torch.Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex())


def _casts(x: torch.Tensor) -> _Casts | None:
    if not _is_any_autocast_enabled():
        return None
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return _Casts(device, torch.get_autocast_dtype(device), x.dtype)


def _uncast(device: str) -> AbstractContextManager[Any]:
    """Without automatic casts, which would put products into half precision again."""
    if not _is_any_autocast_enabled() or device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


class TorchBackend:
    """Tensors of torch."""

    name = "torch"
    steps = _STEPS

    def kind(self, array: Any) -> tuple:
        return ("torch", array.dtype, array.device)

    def describe(self, kind: Sequence[Any]) -> str:
        _, dtype, device = kind
        on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"torch {torch.__version__}, {dtype}, {on}, {torch.get_num_threads()} threads"

    def check(self, arrays: Sequence[Any], names: Sequence[str]) -> None:
        for array, name in zip(arrays, names, strict=True):
            if not (array.is_floating_point() or array.is_complex()):
                raise TypeError(f"{name} has dtype {array.dtype}, expected a floating or complex dtype")
            if array.dtype.itemsize < 2:
                raise TypeError(
                    f"{name} has dtype {array.dtype}, expected one of at least 16 bits: torch only stores it"
                )
            if array.dtype != arrays[0].dtype:
                raise TypeError(
                    f"{name} has dtype {array.dtype}, expected {arrays[0].dtype} as {names[0]} has: one dtype for all"
                )
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

    def default_reference(self) -> Any:
        return torch.zeros((), dtype=torch.float64)

    def is_complex(self, array: Any) -> bool:
        return array.is_complex()

    def conj(self, array: Any) -> Any:
        return array.conj()

    def copy(self, array: Any, *, channels_last: bool = False) -> Any:
        return array.clone(memory_format=_format_of(array, channels_last))

    def owned(self, array: Any, *others: Any, channels_last: bool = False) -> Any:
        if type(array) is not torch.Tensor or not _plain(array) or array.is_meta:
            return self.copy(array, channels_last=channels_last)
        memory = array.untyped_storage().data_ptr()
        if any(other.untyped_storage().data_ptr() == memory for other in others):
            return self.copy(array, channels_last=channels_last)
        return self.settled(array, channels_last=channels_last)

    def settled(self, array: Any, *, channels_last: bool = False) -> Any:
        order = _format_of(array, channels_last)
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
            if not _is_channels_last([arrays[place] for place in deciding], spec):
                return ready.unchecked(*arrays)
            if torch.compiler.is_compiling():  # what is compiled is made before
                return self.settled(ready.unchecked(*arrays), channels_last=True)
            return ready.channels_last.unchecked(*arrays)

        return call

    def widened(self, run: Callable[..., Any], one_sum: s.Step | None) -> Callable[..., Any]:
        # On CPUs, derivatives of torch's convolutions are added up in half precision, example by example.
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
            with _uncast(array.device.type):
                return run(*wide).to(torch.float16)

        return call

    def differentiable(
        self, run: Callable[..., Any], derivative: Callable[..., Any], needs: Sequence[Sequence[int]]
    ) -> Callable[..., Any]:
        own = _Derivatives(run, derivative, needs)

        def recorded(arrays: Sequence[torch.Tensor]) -> torch.Tensor:
            if forward_ad._current_level >= 0 or _are_functorch_transforms_active():
                return _Transformed.apply(own, *arrays)
            return _record(own, *arrays) if torch.is_grad_enabled() else run(*arrays)

        def call(*arrays: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_compiling():
                return run(*arrays)  # the compiler's own derivatives fuse with the rest of its graph
            for array in arrays:
                if array.requires_grad or is_functorch_wrapped_tensor(array):
                    return recorded(arrays)
            if forward_ad._current_level >= 0:
                return recorded(arrays)
            return run(*arrays)

        return call

    def can_run(self, steps: Sequence[s.Step], kind: Sequence[Any]) -> bool:
        # torch has no complex transposed convolution on every device.
        return not (kind[1].is_complex and any(isinstance(step, s.Convolution) for step in steps))

    def itemsize(self, kind: Sequence[Any]) -> int:
        return kind[1].itemsize

    def spread(self, count: int, below: int, kind: Sequence[Any]) -> Any:
        return torch.linspace(0, max(below - 1, 0), count, device=kind[2]).long()

    def random(self, shape: Sequence[int], kind: Sequence[Any]) -> Any:
        generator = torch.Generator(device="cpu").manual_seed(0)
        return torch.randn(*shape, generator=generator).to(device=kind[2], dtype=kind[1])

    def placeholder(self, shape: Sequence[int], dtype: Any, device: Any) -> Any:
        """A tensor of some shape that takes no memory."""
        return torch.empty((), dtype=dtype, device=device).expand(tuple(shape))

    def synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def is_traced(self, array: Any) -> bool:
        return not _plain(array) or array.is_meta


BACKEND = TorchBackend()
