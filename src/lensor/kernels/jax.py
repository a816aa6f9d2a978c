"""The JAX backend: the steps in `jax.numpy` and `jax.lax`, and plans as a primitive with the network's own derivatives.

A plan of a network is one primitive. Its JVP is the plan of the network's JVP, a network that is linear in the tangent;
transposing this one gives the plan of its VJP. Mapping it (`vmap`) gives the plan of a network with one more index.
These plans are primitives, too, so both modes work to any order. (If the positions of a selection are mapped, the steps
are mapped one by one instead, since a network has one vector of positions.)

`jax.custom_jvp` would have let JAX transpose single steps, and `jax.custom_vjp` excludes forward mode.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from lensor.kernels.common import common_steps, reads_of, require_inside, widened
from lensor.kernels.constants import folded, materialize_summed
from lensor.plan import steps as s
from lensor.spec import ConvSpec

_MOST_RUNS = 8
"""Up to this many runs of positions are read as slices, which is faster than indexing."""

_MOST_SLICES = 64
"""Windows with up to this many kernel positions are read as slices."""

_LEAST_ROWS = 512
"""Gram matrices of at least this many rows are computed in blocks, on and below the diagonal only."""


# --------------------------------------------------------------------------------------------------------------- steps
def _constant(step: s.Constant) -> Callable[[Any], Any]:
    return lambda like: jnp.asarray(materialize_summed(step.pattern, step.summed, np.dtype(np.float64)), like.dtype)


def _padded(x: Any, axis: int, left: int, right: int, between: int = 0) -> Any:
    """The array with zeros before, after and between the positions of an axis; negative widths cut positions off."""
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (left, right, between)
    return lax.pad(x, np.zeros((), x.dtype), widths)


def _sliced(x: Any, axis: int, start: int, step: int, count: int) -> Any:
    stop = start + (count - 1) * step + 1 if count else start
    return lax.slice_in_dim(x, start, stop, step, axis)


def _run(x: Any, axis: int, start: int, step: int, length: int) -> Any:
    if step == 0:
        one = lax.slice_in_dim(x, start, start + 1, 1, axis)
        return jnp.broadcast_to(one, (*x.shape[:axis], length, *x.shape[axis + 1 :]))
    low = min(start, start + step * (length - 1))
    x = _sliced(x, axis, low, abs(step), length)
    return x if step > 0 else jnp.flip(x, axis)


def _gather(step: s.Gather) -> Callable[[Any], Any]:
    axis, runs = step.axis, step.runs()
    if 0 < len(runs) <= _MOST_RUNS:
        return lambda x: jnp.concatenate([_run(x, axis, *one) for one in runs], axis)
    return lambda x: jnp.take(x, reads_of(step.pattern), axis, mode="clip")


def _scatter_add(step: s.ScatterAdd) -> Callable[[Any], Any]:
    def scatter_add(x: Any) -> Any:
        return _added_at(x, step.axis, reads_of(step.pattern), step.shape([x.shape]))

    return scatter_add


def _added_at(x: Any, axis: int, positions: Any, shape: Sequence[int]) -> Any:
    """The sums of the entries with the same position along an axis."""
    wide = jnp.float32 if x.dtype.itemsize == 2 else x.dtype  # long sums in half precision stop growing
    found = jnp.zeros(shape, wide).at[(*[slice(None)] * axis, positions)].add(x.astype(wide))
    return found.astype(x.dtype)


def _put(step: s.Put) -> Callable[[Any, Any], Any]:
    def put(x: Any, positions: Any) -> Any:
        found = _added_at(x, step.axis, positions, step.shape([x.shape]))
        return _only_if_inside(found, [(positions, step.size)])

    return put


def _pick(step: s.Pick) -> Callable[[Any, Any], Any]:
    def pick(x: Any, positions: Any) -> Any:
        return _only_if_inside(jnp.take(x, positions, step.axis), [(positions, x.shape[step.axis])])

    return pick


def _read(step: s.Read) -> Callable[..., Any]:
    read = _COMMON[s.Read](step)

    def checked(x: Any, *positions: Any) -> Any:
        limits = [(positions[axis.positions - 1], axis.sizes[axis.second]) for axis in step.axes]
        return _only_if_inside(read(x, *positions), limits)

    return checked


def _only_if_inside(found: Any, limits: Sequence[tuple[Any, int]]) -> Any:
    """The result, or NaN if a position is negative or not below its limit: traced ones cannot be checked before."""
    inside = [((positions >= 0) & (positions <= _last(positions.dtype, below))).all() for positions, below in limits]
    return jnp.where(jnp.stack(inside).all(), found, np.asarray(np.nan, found.dtype))


def _last(dtype: Any, below: int) -> Any:
    """The largest position below a limit that the dtype has."""
    return np.asarray(min(below - 1, int(jnp.iinfo(dtype).max)), dtype)


def _window(step: s.Window) -> Callable[[Any], Any]:
    def window(x: Any) -> Any:
        starts = range(0, step.kernel * step.dilation, step.dilation)
        if step.kernel <= _MOST_SLICES:
            return jnp.stack([_sliced(x, step.axis, start, step.stride, step.positions) for start in starts], -1)
        reads = np.arange(step.positions)[:, None] * step.stride + np.array(starts)
        return jnp.moveaxis(jnp.take(x, reads, step.axis, mode="clip"), step.axis + 1, -1)

    return window


def _overlap_add(step: s.OverlapAdd) -> Callable[[Any], Any]:
    def overlap_add(x: Any) -> Any:
        span = (x.shape[step.axis] - 1) * step.stride + 1
        dtype, out = x.dtype, None
        x = x.astype(jnp.float32) if dtype.itemsize == 2 else x  # long sums in half precision stop growing
        for k in range(x.shape[-1]):
            left = k * step.dilation
            part = _padded(x[..., k], step.axis, left, step.length - left - span, step.stride - 1)
            out = part if out is None else out + part
        assert out is not None
        return out.astype(dtype)

    return overlap_add


def _diagonal(step: s.Diagonal) -> Callable[[Any], Any]:
    def diagonal(x: Any) -> Any:
        size = x.shape[step.first]
        x = jnp.moveaxis(x, (step.first, step.second), (-2, -1))
        return _sliced(x.reshape(*x.shape[:-2], -1), x.ndim - 2, 0, size + 1, size)

    return diagonal


def _transpose(step: s.Transpose) -> Callable[[Any], Any]:
    """Axes of size 1 are left out, since XLA would copy the array if they stood between a transpose and a product."""

    def transpose(x: Any) -> Any:
        kept = [axis for axis in step.order if x.shape[axis] != 1]
        small = x.reshape([size for size in x.shape if size != 1])
        order = [sorted(kept).index(axis) for axis in kept]
        return small.transpose(order).reshape([x.shape[axis] for axis in step.order])

    return transpose


def _matmul(a: Any, b: Any) -> Any:
    """The product of matrices; XLA computes a batch of one pair of matrices more slowly than a product of two."""
    shape = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    if not shape or math.prod(shape) != 1:
        return jnp.matmul(a, b)
    found = jnp.matmul(a.reshape(a.shape[-2:]), b.reshape(b.shape[-2:]))
    return found.reshape(*shape, *found.shape)


def _gram(x: Any) -> Any:
    """The products of all pairs of rows; the blocks above the diagonal are transposes of those below it."""
    rows = x.shape[-2]
    if rows < _LEAST_ROWS:
        return _matmul(x, x.swapaxes(-1, -2))
    first, second = x[..., : rows // 2, :], x[..., rows // 2 :, :]
    below = _matmul(second, first.swapaxes(-1, -2))
    upper = jnp.concatenate([_gram(first), below.swapaxes(-1, -2)], -1)
    return jnp.concatenate([upper, jnp.concatenate([below, _gram(second)], -1)], -2)


def _scaled(x: Any, factor: Fraction) -> Any:
    return x if factor == 1 else x * np.asarray(float(factor), x.dtype)


def _add_at(step: s.AddAt) -> Callable[[Any, Any], Any]:
    return lambda a, b: a.at[step.part(b.shape)].add(b)


def _convolution(step: s.Convolution) -> Callable[[Any, Any], Any]:
    dims, groups, padding = len(step.stride), step.groups, [(width, width) for width in step.padding]
    if step.kind == "forward":

        def forward(x: Any, w: Any) -> Any:
            return lax.conv_general_dilated(
                x, w, step.stride, padding, rhs_dilation=step.dilation, feature_group_count=groups
            )

        return forward
    if step.kind == "weight_grad":
        swapped = lax.ConvDimensionNumbers(*[(1, 0, *range(2, 2 + dims))] * 3)

        def weight_grad(x: Any, v: Any) -> Any:
            widths = [
                (q, (k - 1) * d + (o - 1) * t + 1 - i - q)
                for i, o, k, t, d, q in zip(
                    x.shape[2:], v.shape[2:], step.size[2:], step.stride, step.dilation, step.padding, strict=True
                )
            ]
            return lax.conv_general_dilated(
                x,
                v,
                step.dilation,
                widths,
                rhs_dilation=step.stride,
                dimension_numbers=swapped,
                batch_group_count=groups,
            )

        return weight_grad

    def input_grad(v: Any, w: Any) -> Any:
        spatial = tuple(range(2, 2 + dims))
        w = jnp.flip(w, spatial).reshape(groups, -1, *w.shape[1:]).swapaxes(1, 2)
        w = w.reshape(-1, *w.shape[2:])
        widths = [
            (d * (k - 1) - q, i + q - (o - 1) * t - 1)
            for i, o, k, t, d, q in zip(
                step.size[2:], v.shape[2:], w.shape[2:], step.stride, step.dilation, step.padding, strict=True
            )
        ]
        between = step.stride
        if _stops_the_compiler(v.shape[2:], w.shape[2:], between):
            for axis, more in enumerate(between, start=2):
                v = _padded(v, axis, 0, 0, more - 1)
            v, between = lax.optimization_barrier(v), (1,) * dims
        return lax.conv_general_dilated(
            v, w, (1,) * dims, widths, lhs_dilation=between, rhs_dilation=step.dilation, feature_group_count=groups
        )

    return input_grad


def _stops_the_compiler(sizes: Sequence[int], kernel: Sequence[int], between: Sequence[int]) -> bool:
    """Whether XLA may end the process while it compiles such a convolution, as it does at least up to JAX 0.10.

    For kernels with more entries than the input, XLA exchanges the two. It fails if the input has zeros between its
    entries and the kernel is larger than the input along one axis, but smaller along another one.
    """
    larger = any(k > size for k, size in zip(kernel, sizes, strict=True))
    smaller = any(k < size for k, size in zip(kernel, sizes, strict=True))
    return larger and smaller and max(between, default=1) > 1


_COMMON = common_steps(jnp)
_STEPS: dict[type[s.Step], Callable[[Any], Callable[..., Any]]] = {
    **_COMMON,
    s.Constant: _constant,
    s.Transpose: _transpose,
    s.Slice: lambda step: lambda x: _sliced(x, step.axis, step.start, step.step, step.count),
    s.Pad: lambda step: lambda x: _padded(x, step.axis, step.left, step.right),
    s.Stuff: lambda step: lambda x: _padded(x, step.axis, 0, 0, step.step - 1),
    s.Gather: _gather,
    s.Window: _window,
    s.OverlapAdd: _overlap_add,
    s.Diagonal: _diagonal,
    s.ScatterAdd: _scatter_add,
    s.Put: _put,
    s.Pick: _pick,
    s.Read: _read,
    s.MatMul: lambda step: lambda a, b: _scaled(_matmul(a, b), step.factor),
    s.Gram: lambda step: lambda x: _scaled(_gram(x), step.factor),
    s.Convolution: _convolution,
    s.SumSquares: lambda step: lambda x: (x * x).sum(step.axes),
    s.Add: lambda step: jnp.add,
    s.AddAt: _add_at,
    s.Multiple: lambda step: lambda x: _scaled(x, step.factor),
}


# ----------------------------------------------------------------------------------------------------------- primitive
_compiled: WeakKeyDictionary[_Planned, Callable[..., Any]] = WeakKeyDictionary()
_results: WeakKeyDictionary[_Planned, dict[tuple, Any]] = WeakKeyDictionary()
"""The compiled function of each plan, and the types of its results for types of operands.

Plans do not refer to these, since Lensor's caches weigh everything to which a plan refers.
"""


class _Planned:
    """A plan as the parameter of the primitive."""

    def __init__(self, ready: Any) -> None:
        self.ready = ready
        _compiled[self] = jax.jit(ready.unrecorded)
        _results[self] = {}

    def __repr__(self) -> str:
        return self.ready.plan.name


_plan = Primitive("lensor_plan")


@_plan.def_impl
def _evaluated(*arrays: Any, planned: _Planned) -> Any:
    return _compiled[planned](*arrays)


@_plan.def_abstract_eval
def _abstract(*avals: Any, planned: _Planned) -> Any:
    found = _results[planned].get(avals)
    if found is None:
        found = _results[planned][avals] = jax.make_jaxpr(planned.ready.unrecorded)(*avals).out_avals[0]
    return found


def _lowered(*arrays: Any, planned: _Planned) -> Any:
    return planned.ready.unrecorded(*arrays)


mlir.register_lowering(_plan, mlir.lower_fun(_lowered, multiple_results=False))


def _differentiated(primals: Sequence[Any], tangents: Sequence[Any], *, planned: _Planned) -> tuple[Any, Any]:
    result, tangent = _plan.bind(*primals, planned=planned), None
    for place, direction in enumerate(tangents):
        if type(direction) is not ad.Zero and direction.dtype != jax.dtypes.float0:
            part = planned.ready.derivative("jvp", place, primals, direction)
            tangent = part if tangent is None else tangent + part
    return result, ad.Zero(jax.typeof(result).to_tangent_aval()) if tangent is None else tangent


ad.primitive_jvps[_plan] = _differentiated


def _transposed(cotangent: Any, *arrays: Any, planned: _Planned) -> list[Any]:
    linear = [place for place, array in enumerate(arrays) if ad.is_undefined_primal(array)]
    if any(other in linear for place in linear for other in planned.ready.needs[place]):
        raise NotImplementedError(f"{planned} is not linear in the operands {linear} together, so it has no transpose")
    if type(cotangent) is ad.Zero:
        return [ad.Zero(array.aval) if place in linear else None for place, array in enumerate(arrays)]
    # `derivative` conjugates the operands, but JAX's transposes are linear.
    known = [None if place in linear else jnp.conj(array) for place, array in enumerate(arrays)]
    derivative = planned.ready.derivative
    return [derivative("vjp", place, known, cotangent) if place in linear else None for place in range(len(arrays))]


ad.primitive_transposes[_plan] = _transposed


def _mapped(arrays: Sequence[Any], axes: Sequence[int | None], *, planned: _Planned) -> tuple[Any, int]:
    moved = [array if axis is None else jnp.moveaxis(array, axis, 0) for array, axis in zip(arrays, axes, strict=True)]
    places = tuple([place for place, axis in enumerate(axes) if axis is not None])
    if all(jnp.issubdtype(arrays[place].dtype, jnp.inexact) for place in places):
        return planned.ready.batched(places, moved), 0
    # All examples of a network share the positions that it reads, so the steps are mapped.
    return jax.vmap(planned.ready.unrecorded, [None if axis is None else 0 for axis in axes])(*moved), 0


batching.primitive_batchers[_plan] = _mapped


def _strong(array: Any) -> Any:
    """The array without a weak type, which some steps would keep and others not, so that results depend on the plan."""
    return lax.convert_element_type(array, array.dtype) if getattr(array, "weak_type", False) else array


def varying(arrays: Sequence[Any]) -> Sequence[Any]:
    """The arrays, marked as varying over the same axes of a mesh inside `shard_map`, as operands of a primitive are.

    The derivative of this mark is the sum over these axes.
    """
    every = [_axes_of(array) for array in arrays]
    union = frozenset().union(*every)
    if not union:
        return arrays
    missing = [tuple(union - one) for one in every]
    return [_marked(array, names) if names else array for array, names in zip(arrays, missing, strict=True)]


def _axes_of(array: Any) -> frozenset[str]:
    """The axes of a mesh over which an array varies; JAX 0.10 has a new name for them."""
    found = jax.typeof(array)
    return found.mat.varying if hasattr(found, "mat") else getattr(found, "vma", frozenset())


def _marked(array: Any, names: tuple[str, ...]) -> Any:
    mark: Any = getattr(lax, "pvary", None) or partial(lax.pcast, to="varying")  # JAX 0.10 has the second one only
    return mark(array, names)


# ------------------------------------------------------------------------------------------------------------- backend
class JaxBackend:
    """The backend for JAX arrays, concrete or traced."""

    name = "jax"
    steps = _STEPS

    def kind(self, array: Any) -> tuple:
        if self.is_traced(array) or not isinstance(array, jax.Array):
            return ("jax", np.dtype(array.dtype), jax.default_backend())
        return ("jax", np.dtype(array.dtype), min(array.devices(), key=lambda device: device.id).platform)

    def device(self, kind: Sequence[Any]) -> tuple[str, str, int]:
        if kind[2] == "cpu":
            return "cpu", "JAX", os.cpu_count() or 1
        return kind[2], jax.devices(kind[2])[0].device_kind, 1

    def dtype(self, kind: Sequence[Any]) -> str:
        return kind[1].name

    def example(self, shape: Sequence[int], dtype: str, device: str) -> Any:
        return jax.device_put(jnp.ones(tuple(shape), dtype), jax.devices(device)[0])

    def describe(self, kind: Sequence[Any]) -> str:
        return f"jax {jax.__version__}, {kind[1]}, {jax.devices(kind[2])[0].device_kind}"

    def check(self, arrays: Sequence[Any], names: Sequence[str]) -> None:
        for array, name in zip(arrays, names, strict=True):
            if not jnp.issubdtype(array.dtype, jnp.inexact) or array.dtype.itemsize < 2:
                raise TypeError(
                    f"{name} has dtype {array.dtype}, expected a floating or complex dtype of at least 16 bits"
                )
            if array.dtype != arrays[0].dtype:
                raise TypeError(f"{name} has dtype {array.dtype}, expected {arrays[0].dtype}, the dtype of {names[0]}")

    def check_positions(self, array: Any, name: str, below: int) -> None:
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} has dtype {array.dtype}, expected positions of an integer dtype")
        if not self.is_traced(array):
            require_inside(np.asarray(array), name, below)  # inside jax.jit, functions of JAX would trace it

    def constant(self, key: Any, make: Callable[[np.dtype], np.ndarray]) -> Callable[[Any], Any]:
        return lambda like: jnp.asarray(folded(key, make, np.dtype(np.float64)), like.dtype)

    def default_reference(self) -> Any:
        return jnp.zeros((), float)

    def is_complex(self, array: Any) -> bool:
        return jnp.iscomplexobj(array)

    def conj(self, array: Any) -> Any:
        return jnp.conj(array)

    def copy(self, array: Any, *, channels_last: bool = False) -> Any:
        return array  # JAX arrays are immutable

    def owned(self, array: Any, *others: Any, channels_last: bool = False) -> Any:
        return array

    def settled(self, array: Any, *, channels_last: bool = False) -> Any:
        return array

    def formatted(self, ready: Any, spec: ConvSpec) -> Callable[..., Any]:
        return ready.unchecked

    def widened(self, run: Callable[..., Any], one_sum: s.Step | None) -> Callable[..., Any]:
        return run if one_sum is not None else widened(run)

    def as_operator(self, ready: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        return run

    def differentiable(self, ready: Any) -> Callable[..., Any]:
        planned = _Planned(ready)
        return lambda *arrays: _plan.bind(*varying([_strong(array) for array in arrays]), planned=planned)

    def can_run(self, steps: Sequence[s.Step], kind: Sequence[Any]) -> bool:
        return True

    def fuses(self, kind: Sequence[Any]) -> bool:
        return False

    def convolves_as_it_multiplies(self, kind: Sequence[Any]) -> bool:
        return True  # both follow `jax_default_matmul_precision`

    def itemsize(self, kind: Sequence[Any]) -> int:
        return kind[1].itemsize

    def spread(self, count: int, below: int, kind: Sequence[Any]) -> Any:
        return jnp.asarray(np.linspace(0, max(below - 1, 0), count).astype(np.int32))

    def random(self, shape: Sequence[int], kind: Sequence[Any]) -> Any:
        values = np.random.default_rng(0).standard_normal(shape, np.float32)
        return jax.device_put(jnp.asarray(values, kind[1]), jax.devices(kind[2])[0])

    def placeholder(self, shape: Sequence[int], dtype: Any, device: Any) -> Any:
        return jax.ShapeDtypeStruct(tuple(shape), dtype)

    def timed(self, call: Callable[[], Any], kind: Sequence[Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    def tuning(self, kind: Sequence[Any]) -> AbstractContextManager[None]:
        return nullcontext()

    def is_traced(self, array: Any) -> bool:
        return isinstance(array, Tracer)


BACKEND = JaxBackend()
