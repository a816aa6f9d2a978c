"""Pattern products in torch: by a fused kernel on GPUs, and as a composition of operators everywhere else.

The fused kernel is the custom operator `lensor::pattern_product`, which compilers keep in their graphs. Its derivative
is a composition: entries of the cotangent are added where the operand was read.
"""

from __future__ import annotations

import itertools
import json
import math
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch._C import _are_functorch_transforms_active

from lensor.affine import Piece
from lensor.cache import Cache, clear_caches
from lensor.kernels.marks import constant_in_graphs
from lensor.kernels.reading import TooLarge, places
from lensor.kernels.torch.capture import Constant
from lensor.kernels.torch.tensors import casts_of, is_plain, uncast
from lensor.plan import steps as s

_PART = 1 << 24
"""A composition stores at most this many entries of patches and products at once, if it can be divided that far."""

_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@constant_in_graphs
def fuses(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether pattern products of tensors of this kind run as one kernel."""
    if dtype not in _FUSED_DTYPES:
        return False
    return _has_kernels(dtype, device) if device.type == "cuda" else _is_interpreting.get()


@lru_cache
def _has_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton 3.4 or later is installed, and multiplies about as fast as torch.

    It does not in half precision on older GPUs.
    """
    if torch.version.hip is not None or find_spec("triton") is None or find_spec("triton.knobs") is None:
        return False
    least = (7, 5) if dtype is torch.float32 else (8, 0)
    return torch.cuda.get_device_capability(device) >= least


_is_interpreting: ContextVar[bool] = ContextVar("lensor.interpreting", default=False)


@contextmanager
def interpreting() -> Iterator[None]:
    """Run pattern products on CPUs by Triton's interpreter, to test the kernel; plans are not kept.

    Raises:
        RuntimeError: if Triton compiles kernels, because TRITON_INTERPRET=1 was not set when it was imported.
    """
    from lensor.kernels.torch.triton.launch import IS_INTERPRETED

    if not IS_INTERPRETED:
        raise RuntimeError("Triton compiles kernels for GPUs, expected TRITON_INTERPRET=1 when it is imported")
    clear_caches()
    token = _is_interpreting.set(True)
    try:
        yield
    finally:
        _is_interpreting.reset(token)
        clear_caches()


def pattern_product(step: s.PatternProduct) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function that runs a pattern product."""
    compose, text, sizes = Composition(step), _text(step), list(step.sizes)
    kernel: Callable[..., Any] | None = None

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        nonlocal kernel
        casts = casts_of(left)
        if casts is not None and casts.dtype in _FUSED_DTYPES:  # autocast applies to it as to a matrix product
            left, right = left.to(casts.to), right.to(casts.to)
        if not fuses(left.dtype, left.device) or _is_transformed_in_graph():
            return compose(left, right)
        if not (_is_bare(left) and _is_bare(right)):
            return torch.ops.lensor.pattern_product(left, right, text, sizes)
        if kernel is None:
            kernel = _kernel(step)
        return kernel(left, right)

    return product


def _is_transformed_in_graph() -> bool:
    """Whether a compiler traces a function transform, for which it needs operators with all derivatives."""
    return torch.compiler.is_compiling() and _are_functorch_transforms_active()


def _kernel(step: s.PatternProduct) -> Callable[..., torch.Tensor]:
    """The kernel for a step, replaced by the composition for sizes that it cannot handle."""
    launcher = _launcher(step)

    def run(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        try:
            return launcher(left, right)
        except TooLarge:
            return Composition(step)(left, right)

    return run


def _is_bare(x: torch.Tensor) -> bool:
    """Whether a kernel may read a tensor directly, because nothing is traced, transformed or recorded."""
    return (
        is_plain(x)
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def _launcher(step: s.PatternProduct) -> Callable[..., Any]:
    from lensor.kernels.torch.triton import Launcher

    return Launcher(step)


# -------------------------------------------------------------------------------------------------------- composition
@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a product: the range of one index, and the positions that it reads of both operands."""

    index: int | None
    start: int
    step: s.PatternProduct
    reads: tuple[tuple[tuple[Constant, Constant | None], ...], ...]


class Composition:
    """A pattern product as torch operators: index, multiply with einsum, and add the parts."""

    def __init__(self, step: s.PatternProduct) -> None:
        self.step = step
        self._parts: list[_Part] | None = None

    @property
    def parts(self) -> list[_Part]:
        if self._parts is None:
            self._parts = list(_parts(self.step))
        return self._parts

    def __call__(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        dtype = left.dtype
        with uncast(left.device.type):
            return self._added(_wide(left), _wide(right)).to(dtype)

    def _added(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        step = self.step
        found: list[torch.Tensor] = []
        is_kept = self.parts[0].index in step.order
        for part in self.parts:
            value = self._value(part, left, right)
            found = [*found, value] if is_kept or not found else [found[0] + value]
        out = torch.cat(found, step.order.index(self.parts[0].index or 0)) if len(found) > 1 else found[0]
        return out if step.factor == 1 else out * float(step.factor)

    def _value(self, part: _Part, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        step = self.step
        a, b = _read(part, 0, left), _read(part, 1, right)
        if not step.squared:
            return _einsum(a, b, step.order)
        c = _einsum(a, b, step.free)
        found = (c * c).sum([step.free.index(index) for index in step.squared])
        kept = [index for index in step.free if index in step.order]
        return found.permute([kept.index(index) for index in step.order])

    def derivative(self, place: int, left: torch.Tensor, right: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        """The VJP with respect to an operand (0: the first, 1: the second)."""
        with uncast(left.device.type):
            return self._derivative(place, left, right, cotangent)

    def _derivative(self, place: int, left: torch.Tensor, right: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        step, dtype = self.step, left.dtype
        left, right, cotangent = _wide(left), _wide(right), _wide(cotangent) * float(step.factor)
        array = (left, right)[place]
        found = torch.zeros_like(array)
        for part in self.parts:
            given = cotangent
            if part.index in step.order:
                given = given.narrow(step.order.index(part.index), part.start, part.step.sizes[part.index])
            reads = [_read(part, 0, left), _read(part, 1, right)]
            held = step.order
            if step.squared:
                c = _einsum(reads[0], reads[1], step.free)
                kept = [part.step.sizes[index] if index in step.order else 1 for index in step.free]
                order = [step.order.index(index) for index in step.free if index in step.order]
                given, held = 2 * c * given.permute(order).reshape(kept), step.free
            own, other = reads[place], reads[1 - place]
            missing = [index for index in own[1] if index not in held and index not in other[1]]
            value = _einsum((given, list(held)), other, [index for index in own[1] if index not in missing])
            sizes = [part.step.sizes[index] for index in own[1]]
            shape = [1 if index in missing else size for index, size in zip(own[1], sizes, strict=True)]
            value = value.reshape(shape).expand(sizes)
            at, inside = _places(part, place, array)
            every = own[1]
            full = [part.step.sizes[index] if index in every else 1 for index in range(len(step.sizes))]
            value = value.reshape(full)
            if inside is not None:
                value = torch.where(inside, value, 0)
            found = found.index_put(tuple(at), value, accumulate=True) if at else found + value.sum()
        return found.to(dtype)


def _parts(step: s.PatternProduct) -> Iterator[_Part]:
    """Divide one index so that no array of a part is too large: a batch or a summed index, or one of the result.

    A summed index is not divided if sums are squared.
    """
    sizes = step.sizes
    held = [{index for axis in axes for index, _ in axis.terms} for axes in (step.left, step.right)]
    largest = max(math.prod(sizes[index] for index in group) for group in (*held, step.free))
    order = (*step.batch, *(() if step.squared else step.summed)) or step.free
    index = max(order, key=lambda index: sizes[index], default=None)
    count = 1 if index is None else max(min(sizes[index], -(-largest // _PART)), 1)
    bounds = [0 if index is None else sizes[index] * at // count for at in range(count + 1)]
    for low, high in itertools.pairwise(bounds):
        part, start = step, {}
        if count > 1 and index is not None:
            part = replace(step, sizes=tuple([high - low if at == index else n for at, n in enumerate(sizes)]))
            start = {index: low}
        reads = tuple(
            [tuple([_constants(axis, part.sizes, start) for axis in axes]) for axes in (step.left, step.right)]
        )
        yield _Part(index if count > 1 else None, low, part, reads)


def _constants(axis: s.Axis, sizes: s.Shape, start: dict[int, int]) -> tuple[Constant, Constant | None]:
    key = (axis, sizes, tuple(start.items()))
    inside = places(axis, sizes, start)[1]
    return (
        Constant((*key, "places"), lambda: torch.from_numpy(places(axis, sizes, start)[0])),
        None if inside is None else Constant((*key, "inside"), lambda: torch.from_numpy(inside)),
    )


def _places(part: _Part, side: int, like: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The positions that a part reads, for each axis, and where all of them exist."""
    at, inside = [], None
    for where, exists in part.reads[side]:
        at.append(where(like))
        if exists is not None:
            inside = exists(like) if inside is None else inside & exists(like)
    return at, inside


def _read(part: _Part, side: int, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The entries that a part reads, with an axis for each index that they depend on, and these indices."""
    axes = (part.step.left, part.step.right)[side]
    held = sorted({index for axis in axes for index, _ in axis.terms})
    at, inside = _places(part, side, x)
    found = x[tuple(at)] if at else x.reshape((1,) * len(part.step.sizes))
    if inside is not None:
        found = torch.where(inside, found, 0)
    return found.reshape([part.step.sizes[index] for index in held]), held


def _einsum(a: tuple[torch.Tensor, Sequence[int]], b: tuple[torch.Tensor, Sequence[int]], out: Sequence[int]) -> Any:
    letters = string.ascii_letters
    names = ["".join(letters[index] for index in group) for group in (a[1], b[1], out)]
    return torch.einsum(f"{names[0]},{names[1]}->{names[2]}", a[0], b[0])


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Half precision is too coarse for sums of parts."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ---------------------------------------------------------------------------------------------------- custom operator
def _text(step: s.PatternProduct) -> str:
    """Everything except the sizes, as text, which a graph can contain."""
    groups = [step.batch, step.rows, step.columns, step.order]
    axes = [[[axis.terms, axis.outer] for axis in side] for side in (step.left, step.right)]
    return json.dumps([step.takes[0] == step.takes[1], groups, axes, str(step.factor)])


def _step(text: str, sizes: tuple[int, ...]) -> s.PatternProduct:
    is_one, groups, sides, factor = json.loads(text)

    def line(pieces: Any) -> Any:
        return tuple([Piece(*piece) for piece in pieces])

    def axis(terms: Any, outer: Any) -> s.Axis:
        found = tuple([s.Term(index, line(pieces)) for index, pieces in terms])
        return s.Axis(found, None if outer is None else line(outer))

    batch, rows, columns, order = map(tuple, groups)
    left, right = (tuple([axis(*one) for one in side]) for side in sides)
    takes = (0, 0) if is_one else (0, 1)
    return s.PatternProduct(takes, sizes, batch, rows, columns, order, left, right, Fraction(factor))


_kernels, _compositions = Cache(maxsize=256), Cache(maxsize=256)


def _composition(text: str, sizes: tuple[int, ...]) -> Composition:
    return _compositions.get_or_make((text, sizes), lambda: Composition(_step(text, sizes)))


@torch.library.custom_op("lensor::pattern_product", mutates_args=())
def _operator(left: torch.Tensor, right: torch.Tensor, step: str, sizes: Sequence[int]) -> torch.Tensor:
    if fuses(left.dtype, left.device):
        known = _kernels.get_or_make((step, tuple(sizes)), lambda: _kernel(_step(step, tuple(sizes))))
        return known(left, right).contiguous()
    return _composition(step, tuple(sizes))(left, right).contiguous()


@_operator.register_fake
def _fake(left: torch.Tensor, right: torch.Tensor, step: str, sizes: Sequence[int]) -> torch.Tensor:
    order = json.loads(step)[1][3]
    return left.new_empty([sizes[index] for index in order])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    left, right, ctx.step, ctx.sizes = inputs
    ctx.save_for_backward(left, right)


def _backward(ctx: Any, cotangent: torch.Tensor) -> tuple[Any, ...]:
    left, right = ctx.saved_tensors
    compose = _composition(ctx.step, tuple(ctx.sizes))
    found = [
        compose.derivative(place, left, right, cotangent) if ctx.needs_input_grad[place] else None for place in (0, 1)
    ]
    return *found, None, None


_operator.register_autograd(_backward, setup_context=_save)


@_operator.register_vmap
def _vmap(
    info: Any, in_dims: Sequence[Any], left: torch.Tensor, right: torch.Tensor, step: str, sizes: Sequence[int]
) -> tuple[torch.Tensor, int]:
    """A mapped axis is one more index of the batch, which may be missing on one operand."""
    known = _step(step, tuple(sizes))
    index = len(sizes)
    arrays, sides = [], []
    for array, dim, axes in zip((left, right), in_dims, (known.left, known.right), strict=False):
        arrays.append(array if dim is None else array.movedim(dim, 0))
        sides.append(axes if dim is None else (s.Axis((s.Term(index, s.IDENTITY),)), *axes))
    mapped = replace(
        known,
        takes=(0, 1) if (in_dims[0] is None) != (in_dims[1] is None) else known.takes,
        sizes=(*sizes, info.batch_size),
        batch=(*known.batch, index),
        order=(index, *known.order),
        left=sides[0],
        right=sides[1],
    )
    return torch.ops.lensor.pattern_product(*arrays, _text(mapped), list(mapped.sizes)), 0
