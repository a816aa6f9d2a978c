"""Convolutions to test with: the whole matrix of hyper-parameters, at sizes whose dense Jacobians stay small.

One builder draws the arguments of a ConvSpec from any source of integers: hypothesis (`specs`, which shrinks towards
one channel, unit stride and no padding) or a seeded generator (`random_spec`). What does not fit, a kernel larger than
the padded input or padding beyond what a mode can do, is made smaller, so nothing has to be rejected as invalid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import HealthCheck
from hypothesis import strategies as st

from tests.support.oracles import OPERATIONS, TORCH_MODES, Geometry

Spec = dict[str, Any]
Integer = Callable[[int, int], int]
"""A source of integers from a first to a last one; small ones are simple."""

LARGEST_INPUT = (1, 9, 6, 4, 3, 2)
LARGEST_TRANSPOSED_INPUT = (1, 6, 4, 3, 2, 2)
LARGEST_KERNEL = (1, 5, 4, 3, 2, 2)
LARGEST_STRIDE = (1, 4, 3, 3, 2, 2)
LARGEST_DENSE = 120_000
"""Entries of the largest dense array that an answer may go through."""

QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
"""Health checks to leave out: answers that would go through large arrays are filtered."""

MODES = tuple(TORCH_MODES)
FORMS = ("valid", "int", "each", "pairs", "same")
"""How padding is written; `"each"` is one int for each dimension."""
STYLES = ("any", "point", "dense", "down-sampling", "whole", "gcd")
"""What a dimension is like: anything, K=1, K=S, K<S, K=I, or stride and dilation that share a factor."""


@dataclass
class Dimension:
    """One spatial dimension while it is being drawn."""

    size: int
    kernel: int
    stride: int
    dilation: int
    extra: int = 0
    left: int = 0
    right: int = 0
    plain: bool = False
    """Whether its style has no padding."""

    @property
    def reach(self) -> int:
        """From the first to the last input position that one output position reads, less one."""
        return self.dilation * (self.kernel - 1)

    def most_padding(self, mode: str) -> int:
        """How far the mode can pad."""
        return {"reflect": self.size - 1, "circular": self.size}.get(mode, 3)

    def shrink_kernel(self, reach: int) -> None:
        """Dilation, then the kernel, made smaller until they reach no further than this."""
        if self.reach > reach:
            self.dilation = max(1, min(self.dilation, reach // (self.kernel - 1)))
            self.kernel = min(self.kernel, reach // self.dilation + 1)


def build_spec(integer: Integer, ndim: int, transposed: bool = False) -> Spec:
    """The arguments of a valid ConvSpec, in one of the forms that it takes.

    Args:
        integer: a source of integers, called with the first and the last.
        ndim: the number of spatial dimensions.
        transposed: whether it is a transposed convolution.
    """

    def choose(options: Sequence[Any]) -> Any:
        return options[integer(0, len(options) - 1)]

    groups = integer(1, 3)
    widest = 3 if groups == 1 and ndim < 3 else 2
    inner, outer = integer(1, widest), integer(1, widest)
    mode = "zeros" if transposed else choose(MODES)
    form = choose([form for form in FORMS if not (transposed and form == "same")])
    dims = [_dimension(integer, choose(STYLES), ndim, transposed) for _ in range(ndim)]
    (_pad_transposed if transposed else _pad)(dims, form, mode, integer)

    def written(values: list[int]) -> int | tuple[int, ...]:
        same = len(set(values)) == 1
        return values[0] if same and integer(0, 1) else tuple(values)

    paddings: dict[str, Any] = {
        "valid": 0 if transposed else "valid",
        "same": "same",
        "int": dims[0].left if dims else 0,
        "each": tuple(dim.left for dim in dims),
        "pairs": tuple((dim.left, dim.right) for dim in dims),
    }
    return {
        "in_channels": groups * inner,
        "out_channels": groups * outer,
        "input_size": tuple(dim.size for dim in dims),
        "kernel_size": written([dim.kernel for dim in dims]),
        "stride": written([dim.stride for dim in dims]),
        "padding": paddings[form],
        "dilation": written([dim.dilation for dim in dims]),
        "groups": groups,
        "padding_mode": mode,
        "bias": bool(integer(0, 1)),
        "transposed": transposed,
        "output_padding": written([dim.extra for dim in dims]),
    }


def _dimension(integer: Integer, style: str, ndim: int, transposed: bool) -> Dimension:
    """Sizes, kernel, stride and dilation in a style; whether the kernel fits is settled with the padding."""
    size = integer(1, (LARGEST_TRANSPOSED_INPUT if transposed else LARGEST_INPUT)[ndim])
    kernel, stride = integer(1, LARGEST_KERNEL[ndim]), integer(1, LARGEST_STRIDE[ndim])
    dim = Dimension(size, kernel, stride, integer(1, 3), plain=style in ("dense", "down-sampling", "whole"))
    if dim.plain:
        dim.dilation = 1
    match style:
        case "point":
            dim.kernel = 1
        case "dense":
            dim.kernel = dim.stride = stride
        case "down-sampling":
            dim.stride = min(kernel, 2) + stride
            dim.kernel = min(kernel, 2)
        case "whole" if not transposed:
            dim.kernel = size
        case "gcd":
            dim.stride, dim.dilation = 2 * min(stride, 2), 2
    if transposed:
        dim.extra = integer(0, max(dim.stride, dim.dilation) - 1)
    return dim


def _pad(dims: list[Dimension], form: str, mode: str, integer: Integer) -> None:
    """Padding in its form, and kernels made to fit."""
    common = integer(0, min(3, *(dim.most_padding(mode) for dim in dims), 3)) if form == "int" else 0
    for dim in dims:
        most = min(3, dim.most_padding(mode))
        if form == "same":
            dim.stride = 1
            dim.shrink_kernel(2 * most)
            dim.left, dim.right = dim.reach // 2, dim.reach - dim.reach // 2
        elif form == "int":
            dim.left = dim.right = common
        elif form in ("each", "pairs") and not dim.plain:
            dim.left = dim.right = integer(0, most)
            if form == "pairs":
                dim.right = integer(0, most)
        dim.shrink_kernel(dim.size + dim.left + dim.right - 1)


def _pad_transposed(dims: list[Dimension], form: str, mode: str, integer: Integer) -> None:
    """Padding in its form that leaves some output."""
    most = [(dim.size - 1) * dim.stride + dim.reach + dim.extra for dim in dims]
    common = integer(0, min(3, *(m // 2 for m in most), 3)) if form == "int" else 0
    for dim, m in zip(dims, most, strict=True):
        if form == "int":
            dim.left = dim.right = common
        elif form == "each":
            dim.left = dim.right = integer(0, min(3, m // 2))
        elif form == "pairs":
            dim.left = integer(0, min(3, m))
            dim.right = integer(0, min(3, m - dim.left))


def fits(spec: Spec, op: str, batch: int) -> bool:
    """Whether the answer of an operation goes through small arrays only."""
    operation, g = OPERATIONS[op], Geometry.of(spec)
    return g.ndim <= operation.max_ndim and operation.largest(g, batch) <= LARGEST_DENSE


# ---------------------------------------------------------------------------------------------------------- hypothesis
@st.composite
def specs(draw: st.DrawFn, min_ndim: int = 0, max_ndim: int = 3, transposed: bool | None = None) -> Spec:
    """Arguments of a ConvSpec."""
    ndim = draw(st.integers(min_ndim, max_ndim))
    is_transposed = draw(st.booleans()) if transposed is None else transposed
    return build_spec(lambda first, last: draw(st.integers(first, last)), ndim, is_transposed)


@st.composite
def calls(draw: st.DrawFn, op: str) -> dict[str, Any]:
    """Arguments of `make_case` for an operation: spec, options, batch, v and a generator `rng`."""
    operation = OPERATIONS[op]
    batch = draw(st.integers(1, 3))
    spec = draw(specs(max_ndim=operation.max_ndim).filter(lambda spec: fits(spec, op, batch)))
    return {
        "spec": spec,
        "options": draw(st.sampled_from(operation.options)),
        "batch": batch,
        "v": draw(st.integers(1, 3)),
        "rng": np.random.default_rng(draw(st.integers(0, 2**16))),
    }


# -------------------------------------------------------------------------------------------------- a seeded generator
def random_spec(rng: np.random.Generator, max_ndim: int = 3) -> Spec:
    """Arguments of a ConvSpec; one and two dimensions are drawn most often."""
    weights = np.array([1, 6, 6, 3, 1, 1][: max_ndim + 1])
    ndim = int(rng.choice(max_ndim + 1, p=weights / weights.sum()))
    return build_spec(lambda first, last: int(rng.integers(first, last + 1)), ndim, bool(rng.random() < 0.3))


def random_call(rng: np.random.Generator, op: str) -> dict[str, Any]:
    """Arguments of `make_case` for an operation: spec, options, batch, v and rng itself."""
    operation = OPERATIONS[op]
    batch = int(rng.integers(1, 4))
    spec = random_spec(rng, operation.max_ndim)
    while not fits(spec, op, batch):
        spec = random_spec(rng, operation.max_ndim)
    options = operation.options[int(rng.integers(len(operation.options)))]
    return {"spec": spec, "options": options, "batch": batch, "v": int(rng.integers(1, 4)), "rng": rng}
