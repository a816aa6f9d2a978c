"""The steps that NumPy and JAX run with the same functions, since their modules have the same names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lensor.kernels.reading import places
from lensor.kernels.selection import read_at
from lensor.pattern import IndexPattern
from lensor.plan import steps as s


def common_steps(xp: Any) -> dict[type[s.Step], Callable[[Any], Callable[..., Any]]]:
    """For each of these steps, a function that maps the step to the function that runs it.

    Args:
        xp: the module of a framework, `numpy` or `jax.numpy`.
    """
    return {
        s.Fill: lambda step: lambda like: xp.full(step.size, float(step.value), like.dtype),
        s.Identity: lambda step: lambda like: xp.eye(step.size, dtype=like.dtype),
        s.Reshape: lambda step: lambda x: x.reshape(step.size),
        s.Transpose: lambda step: lambda x: x.transpose(step.order),
        s.SumAxes: lambda step: lambda x: x.sum(axis=step.axes),
        s.Expand: lambda step: lambda x: xp.broadcast_to(x, step.size),
        s.Pick: lambda step: lambda x, positions: xp.take(x, positions, axis=step.axis),
        s.Read: lambda step: _read(step, xp),
        s.Multiply: lambda step: xp.multiply,
        s.PatternProduct: lambda step: _pattern_product(step, xp),
        s.Flip: lambda step: lambda x: xp.flip(x, step.axes),
        s.Concat: lambda step: lambda *parts: xp.concatenate(parts, axis=step.axis),
    }


def reads_of(crop: IndexPattern) -> np.ndarray:
    """The position that each output position of a crop reads, which is inside the axis."""
    return crop.reading().at(np.arange(crop.output_size), np.array(0))


def require_inside(positions: np.ndarray, name: str, below: int) -> None:
    """Raise ValueError if a position is negative or not below the limit."""
    if not positions.size:
        return
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= below:
        raise ValueError(f"{name} has positions {low} to {high}, expected 0 to {below - 1}")


def widened(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes in float32 for float16 operands and returns float16."""

    def call(*arrays: Any) -> Any:
        if all(array.dtype != np.float16 for array in arrays):
            return run(*arrays)
        wide = [array.astype(np.float32) if array.dtype == np.float16 else array for array in arrays]
        return run(*wide).astype(np.float16)

    return call


def _read(step: s.Read, xp: Any) -> Callable[..., Any]:
    def read(x: Any, *positions: Any) -> Any:
        wide = xp.arange(0).dtype  # positions in 8 bits would overflow
        ordered = [positions[axis.positions - 1].astype(wide) for axis in step.axes]
        flat_positions = read_at(step, ordered, xp.arange, xp.where)
        lead, tail = x.shape[: step.axis], x.shape[step.axis + len(step.axes) :]
        flat = xp.concatenate([x.reshape(*lead, -1, *tail), xp.zeros((*lead, 1, *tail), x.dtype)], axis=step.axis)
        return xp.take(flat, flat_positions, step.axis).reshape(
            step.shape([x.shape, *(each.shape for each in positions)])
        )

    return read


def _pattern_product(step: s.PatternProduct, xp: Any) -> Callable[[Any, Any], Any]:
    """Store everything that is read, and multiply with einsum: the definition of the step."""

    def read(x: Any, axes: Sequence[s.Axis]) -> tuple[Any, list[int]]:
        held = sorted({index for axis in axes for index, _ in axis.terms})
        found = [places(axis, step.sizes, {}) for axis in axes]
        entries = x[tuple([at for at, _ in found])]
        for _, inside in found:
            if inside is not None:
                entries = xp.where(inside, entries, xp.zeros((), x.dtype))
        entries = xp.broadcast_to(entries, [size if at in held else 1 for at, size in enumerate(step.sizes)])
        return entries.reshape([step.sizes[index] for index in held]), held

    def product(x: Any, y: Any) -> Any:
        (a, on_a), (b, on_b) = read(x, step.left), read(y, step.right)
        factor = np.asarray(float(step.factor), x.dtype)
        if not step.squared:
            return xp.einsum(a, on_a, b, on_b, step.order, optimize=True) * factor
        c = xp.einsum(a, on_a, b, on_b, step.free, optimize=True)
        return xp.einsum(c, step.free, c, step.free, step.order) * factor

    return product
