"""Independent sources of the right answer for every operation, by torch's own operators, autograd and plain loops.

Nothing here knows Lensor. A convolution's hyper-parameters are resolved anew (`Geometry`), and there are two routes:

- torch: `F.pad` in the padding mode, then `F.conv{1,2,3}d` or `F.conv_transpose{1,2,3}d`; derivatives by torch's
  autograd. It serves up to three spatial dimensions.
- plain: `np.pad`, then one strided slice for each kernel offset. It serves any number of dimensions, makes the patches
  that curvature is defined by, and checks the torch route (`test_oracles.py`).

`make_case` draws operands and gives the expected result; `OPERATIONS` is the table of all operations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

Array = np.ndarray

NUMPY_MODES = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}
TORCH_MODES = {"zeros": "constant", "circular": "circular", "reflect": "reflect", "replicate": "replicate"}


# ----------------------------------------------------------------------------------------------------------- geometry
@dataclass(frozen=True)
class Geometry:
    """A convolution's hyper-parameters, one of each for every spatial dimension; padding as (left, right) pairs."""

    in_channels: int
    out_channels: int
    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    bias: bool
    transposed: bool
    output_padding: tuple[int, ...]

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Geometry:
        """From the arguments of a ConvSpec, in any of the forms it takes."""
        size = spec["input_size"]
        size = (size,) if isinstance(size, int) else tuple(size)

        def each(name: str, default: int) -> tuple[int, ...]:
            value = spec.get(name, default)
            return (value,) * len(size) if isinstance(value, int) else tuple(value)

        kernel, dilation, padding = each("kernel_size", 1), each("dilation", 1), spec.get("padding", 0)
        if padding == "valid":
            padding = 0
        if padding == "same":
            # torch puts the odd one to the right
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            padding = tuple((total // 2, total - total // 2) for total in totals)
        if isinstance(padding, int):
            padding = (padding,) * len(size)
        pairs = tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in padding)
        return cls(
            spec["in_channels"],
            spec["out_channels"],
            size,
            kernel,
            each("stride", 1),
            pairs,
            dilation,
            spec.get("groups", 1),
            spec.get("padding_mode", "zeros"),
            spec.get("bias", False),
            spec.get("transposed", False),
            each("output_padding", 0),
        )

    @property
    def ndim(self) -> int:
        """The number of spatial dimensions."""
        return len(self.input_size)

    @cached_property
    def full_size(self) -> tuple[int, ...]:
        """The padded input, or, transposed, the output before it is cropped by the padding."""
        if self.transposed:
            every = zip(self.input_size, self.kernel_size, self.stride, self.dilation, self.output_padding, strict=True)
            return tuple((i - 1) * s + d * (k - 1) + 1 + extra for i, k, s, d, extra in every)
        return tuple(i + left + right for i, (left, right) in zip(self.input_size, self.padding, strict=True))

    @cached_property
    def output_size(self) -> tuple[int, ...]:
        """The spatial size of the output, counted by trying positions."""
        if self.transposed:
            return tuple(i - left - right for i, (left, right) in zip(self.full_size, self.padding, strict=True))
        every = zip(self.full_size, self.kernel_size, self.stride, self.dilation, strict=True)
        return tuple(len(range(0, length - d * (k - 1), s)) for length, k, s, d in every)

    @property
    def weight_size(self) -> tuple[int, ...]:
        """The weight's shape in torch's layout."""
        first, second = (self.in_channels, self.out_channels)[:: 1 if self.transposed else -1]
        return (first, second // self.groups, *self.kernel_size)

    @property
    def is_valid(self) -> bool:
        """Whether torch takes these hyper-parameters: there is an output, and the mode can pad that far."""
        most = {"reflect": [i - 1 for i in self.input_size], "circular": list(self.input_size)}.get(self.padding_mode)
        far = most is not None and any(max(pair) > m for pair, m in zip(self.padding, most, strict=True))
        return all(size > 0 for size in self.output_size) and not far

    def offsets(self) -> Iterator[tuple[int, ...]]:
        """All kernel positions."""
        return itertools.product(*map(range, self.kernel_size))


# --------------------------------------------------------------------------------------------------- the torch route
def torch_conv(g: Geometry, x: Any, w: Any, b: Any = None) -> Any:
    """The layer by torch's pad and (transposed) convolution; tensors of up to three spatial dimensions."""
    if g.ndim == 0:
        layer = F.conv_transpose1d if g.transposed else F.conv1d
        return layer(x[..., None], w[..., None], b, groups=g.groups)[..., 0]
    if g.transposed:
        layer = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[g.ndim - 1]
        y = layer(x, w, None, g.stride, 0, g.output_padding, g.groups, g.dilation)
        crop = [slice(left, size - right) for size, (left, right) in zip(y.shape[2:], g.padding, strict=True)]
        y = y[(..., *crop)]
        return y if b is None else y + b.reshape(-1, *[1] * g.ndim)
    flat = [side for pair in reversed(g.padding) for side in pair]
    x = F.pad(x, flat, mode=TORCH_MODES[g.padding_mode]) if any(flat) else x
    layer = (F.conv1d, F.conv2d, F.conv3d)[g.ndim - 1]
    return layer(x, w, b, g.stride, 0, g.dilation, g.groups)


def torch_vjp(g: Geometry, at: str, x: Any, w: Any, v: Any) -> Any:
    """The gradient of ⟨layer(x, w), v⟩ with respect to `"x"` or `"w"` by autograd; differentiable again."""
    primal = {"x": x, "w": w}[at].detach().requires_grad_()
    y = torch_conv(g, primal, w) if at == "x" else torch_conv(g, x, primal)
    return torch.autograd.grad(y, primal, v, create_graph=True)[0]


def tensors(*arrays: Array | None) -> list[Any]:
    """Arrays as tensors; None stays None."""
    return [None if array is None else torch.from_numpy(array) for array in arrays]


# --------------------------------------------------------------------------------------------------- the plain route
def plain_read(g: Geometry, x: Array, offset: tuple[int, ...]) -> Array:
    """The value that kernel position `offset` reads for every output position: [n, c, *I] -> [n, c, *O]."""
    every = list(zip(offset, g.dilation, g.stride, strict=True))
    if g.transposed:
        full = np.zeros((*x.shape[:2], *g.full_size), x.dtype)
        at = [slice(k * d, k * d + (i - 1) * s + 1, s) for i, (k, d, s) in zip(g.input_size, every, strict=True)]
        full[(..., *at)] = x
        crop = [slice(left, left + size) for (left, _), size in zip(g.padding, g.output_size, strict=True)]
        return full[(..., *crop)]
    padded = plain_pad(g, x)
    at = [slice(k * d, k * d + (o - 1) * s + 1, s) for o, (k, d, s) in zip(g.output_size, every, strict=True)]
    return padded[(..., *at)]


def plain_pad(g: Geometry, x: Array) -> Array:
    """`np.pad` of the spatial axes in the padding mode."""
    widths = [(0, 0)] * (x.ndim - g.ndim) + list(g.padding)
    return np.pad(x, widths, mode=NUMPY_MODES[g.padding_mode])  # type: ignore[call-overload]


def plain_patches(g: Geometry, x: Array) -> Array:
    """Patches [n, c, *K, *O], one slice for each kernel position."""
    patches = np.empty((*x.shape[:2], *g.kernel_size, *g.output_size), x.dtype)
    for offset in g.offsets():
        patches[(slice(None), slice(None), *offset)] = plain_read(g, x, offset)
    return patches


def plain_conv(g: Geometry, x: Array, w: Array, b: Array | None = None) -> Array:
    """The layer, summed over kernel positions and groups."""
    y = np.zeros((len(x), g.out_channels, *g.output_size), np.result_type(x, w))
    inner, outer = g.in_channels // g.groups, g.out_channels // g.groups
    for offset in g.offsets():
        values, matrix = plain_read(g, x, offset), w[(slice(None), slice(None), *offset)]
        for group in range(g.groups):
            ins, outs = slice(group * inner, (group + 1) * inner), slice(group * outer, (group + 1) * outer)
            by_out = matrix[ins].T if g.transposed else matrix[outs]
            y[:, outs] += np.einsum("fc,nc...->nf...", by_out, values[:, ins])
    return y if b is None else y + b.reshape(-1, *[1] * g.ndim)


def plain_sources(g: Geometry) -> Array:
    """For every kernel and output position the flat input position it reads, -1 for none: int [*K, *O]."""
    # Positions count from 1, so that what zero padding puts in is told apart.
    numbers = 1 + np.arange(prod(g.input_size)).reshape(1, 1, *g.input_size)
    return plain_patches(g, numbers)[0, 0] - 1


def plain_fold(g: Geometry, patches: Array) -> Array:
    """The adjoint of `plain_patches`: [n, c, *K, *O] -> [n, c, *I], every value added where it was read."""
    sources = plain_sources(g).reshape(-1)
    read = np.flatnonzero(sources >= 0)
    flat = patches.reshape(*patches.shape[:2], -1)
    result = np.zeros((*patches.shape[:2], prod(g.input_size)), patches.dtype)
    for at in read:
        result[..., sources[at]] += flat[..., at]
    return result.reshape(*patches.shape[:2], *g.input_size)


def plain_input_vjp(g: Geometry, w: Array, v: Array) -> Array:
    """Cotangents of patches, folded."""
    matrix = w.reshape(g.groups, len(w) // g.groups, *w.shape[1:])
    by_group = v.reshape(len(v), g.groups, -1, prod(g.output_size))
    legs = "gcfk,ngfo->ngcko" if g.transposed else "gfck,ngfo->ngcko"
    patches = np.einsum(legs, matrix.reshape(*matrix.shape[:3], -1), by_group)
    return plain_fold(g, patches.reshape(len(v), g.in_channels, *g.kernel_size, *g.output_size))


def plain_per_example_weight_vjp(g: Geometry, x: Array, v: Array) -> Array:
    """Patches times cotangents, example by example: [n, *weight_size]."""
    patches = plain_patches(g, x).reshape(len(x), g.groups, -1, prod(g.kernel_size), prod(g.output_size))
    by_group = v.reshape(len(v), g.groups, -1, prod(g.output_size))
    legs = "ngcko,ngfo->ngcfk" if g.transposed else "ngcko,ngfo->ngfck"
    return np.einsum(legs, patches, by_group).reshape(len(x), *g.weight_size)


# ---------------------------------------------------------------------------- one function for each operation's result
def conv(g: Geometry, X: Array, W: Array, b: Array | None = None) -> Array:
    """torch's operators; above three dimensions the plain loops."""
    if g.ndim > 3:
        return plain_conv(g, X, W, b)
    return torch_conv(g, *tensors(X, W, b)).numpy()


def conv_input_vjp(g: Geometry, W: Array, V: Array) -> Array:
    """Autograd; above three dimensions the plain fold."""
    if g.ndim > 3:
        return plain_input_vjp(g, W, V)
    anywhere = torch.zeros(len(V), g.in_channels, *g.input_size, dtype=torch.from_numpy(V).dtype)
    return torch_vjp(g, "x", anywhere, *tensors(W, V)).detach().numpy()


def conv_transpose(g: Geometry, X: Array, W: Array, b: Array | None = None) -> Array:
    """A transposed layer's forward; of another layer the transpose, its input VJP."""
    return conv(g, X, W, b) if g.transposed else conv_input_vjp(g, W, X)


def unfold(g: Geometry, X: Array) -> Array:
    """Patches by slices, rows (c k1 k2 ..)."""
    return plain_patches(g, X).reshape(len(X), -1, *g.output_size)


def unfold_transpose(g: Geometry, X: Array) -> Array:
    """Patches of a transposed layer; of another layer those of its transpose, [n, f·ΠK, *I], by the adjoint of a copy.

    Column j of the transpose reads what kernel position k sends there: a convolution's input VJP with one-hot kernels.
    """
    if g.transposed:
        return unfold(g, X)
    result = np.zeros((*X.shape[:2], *g.kernel_size, *g.input_size), X.dtype)
    for offset in g.offsets():
        only = np.zeros((*X.shape[:2], *g.kernel_size, *g.output_size), X.dtype)
        at = (slice(None), slice(None), *offset)
        only[at] = X
        result[at] = plain_fold(g, only)
    return result.reshape(len(X), -1, *g.input_size)


def fold(g: Geometry, V: Array) -> Array:
    """Every value added where it was read."""
    return plain_fold(g, V.reshape(len(V), g.in_channels, *g.kernel_size, *g.output_size))


def unfolded_kernel(g: Geometry, W: Array) -> Array:
    """Column j is the layer at the j-th basis vector."""
    size = g.in_channels * prod(g.input_size)
    basis = np.eye(size, dtype=W.dtype).reshape(size, g.in_channels, *g.input_size)
    return np.ascontiguousarray(conv(g, basis, W).reshape(size, -1).T)


def conv_weight_vjp(g: Geometry, X: Array, V: Array) -> Array:
    """Autograd; above three dimensions patches times cotangents."""
    if g.ndim > 3:
        return plain_per_example_weight_vjp(g, X, V).sum(0)
    anywhere = torch.zeros(g.weight_size, dtype=torch.from_numpy(X).dtype)
    x, v = tensors(X, V)
    return torch_vjp(g, "w", x, anywhere, v).detach().numpy()


def conv_weight_vjp_per_example(g: Geometry, X: Array, V: Array) -> Array:
    """`conv_weight_vjp`, one example at a time."""
    return np.stack([conv_weight_vjp(g, X[n : n + 1], V[n : n + 1]) for n in range(len(X))])


def conv_weight_jvp(g: Geometry, X: Array, T: Array) -> Array:
    """torch's JVP, by differentiating its VJP."""
    if g.ndim > 3:
        return plain_conv(g, X, T)
    x, t = tensors(X, T)
    return torch.autograd.functional.jvp(lambda w: torch_conv(g, x, w), torch.ones_like(t), t)[1].numpy()


def conv_input_jvp(g: Geometry, T: Array, W: Array) -> Array:
    """torch's JVP, by differentiating its VJP."""
    if g.ndim > 3:
        return plain_conv(g, T, W)
    t, w = tensors(T, W)
    return torch.autograd.functional.jvp(lambda x: torch_conv(g, x, w), torch.ones_like(t), t)[1].numpy()


def conv_weight_jacobian(g: Geometry, X: Array) -> Array:
    """torch's Jacobian by reverse mode, row by row."""
    (x,) = tensors(X)
    anywhere = torch.zeros(g.weight_size, dtype=x.dtype)
    return torch.func.jacrev(lambda w: torch_conv(g, x, w))(anywhere).numpy()


def conv_input_jacobian(g: Geometry, W: Array, *, n: int) -> Array:
    """torch's Jacobian by reverse mode, row by row."""
    (w,) = tensors(W)
    anywhere = torch.zeros(n, g.in_channels, *g.input_size, dtype=w.dtype)
    return torch.func.jacrev(lambda x: torch_conv(g, x, w))(anywhere).numpy()


def mixed_second_derivative(g: Geometry, V: Array) -> Array:
    """The Jacobian of autograd's weight gradient with respect to the input, by differentiating twice."""
    (v,) = tensors(V)
    w = torch.zeros(g.weight_size, dtype=v.dtype, requires_grad=True)
    x = torch.zeros(len(V), g.in_channels, *g.input_size, dtype=v.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(torch_conv(g, x, w), w, v, create_graph=True)
    rows = torch.eye(gradient.numel(), dtype=v.dtype).reshape(-1, *gradient.shape)
    (jacobian,) = torch.autograd.grad(gradient, x, rows, is_grads_batched=True)
    return jacobian.reshape(*gradient.shape, *x.shape).numpy()


def kfac_input_factor(g: Geometry, X: Array, *, approx: str, bias: bool = False) -> Array:
    """The definition, from patches: expand (1/N) Σ_n [X][X]ᵀ, reduce (1/N) Σ_n of the mean patch's outer product."""
    patches = plain_patches(g, X).reshape(len(X), g.groups, -1, prod(g.output_size))
    if bias:
        patches = np.concatenate([patches, np.ones_like(patches[:, :, :1])], axis=2)
    if approx == "expand":
        return sum(patches[n] @ patches[n].swapaxes(1, 2) for n in range(len(X))) / len(X)  # type: ignore[return-value]
    mean = patches.mean(-1)
    return sum(mean[n][:, :, None] * mean[n][:, None, :] for n in range(len(X))) / len(X)  # type: ignore[return-value]


def kfac_input_root(g: Geometry, X: Array) -> Array:
    """The mean patch of every example."""
    mean = plain_patches(g, X).reshape(len(X), g.groups, -1, prod(g.output_size)).mean(-1)
    return mean.swapaxes(0, 1)


def kfac_output_factor(g: Geometry, V: Array, *, approx: str) -> Array:
    """The definition: expand (1/O) Σ of outer products at each position, reduce Σ of outer products of sums."""
    by_group = V.reshape(-1, g.groups, g.out_channels // g.groups, prod(g.output_size))
    if approx == "expand":
        return sum(vector @ vector.swapaxes(1, 2) for vector in by_group) / by_group.shape[-1]  # type: ignore[return-value]
    sums = by_group.sum(-1)
    return sum(vector[:, :, None] * vector[:, None, :] for vector in sums)  # type: ignore[return-value]


def ggn_roots(g: Geometry, X: Array, S: Array) -> Array:
    """Jᵀ S for every column and example, by `conv_weight_vjp_per_example`: [v, n, parameters]."""
    return np.stack([conv_weight_vjp_per_example(g, X, s).reshape(len(X), -1) for s in S])


def ggn(g: Geometry, X: Array, S: Array) -> Array:
    """The whole GGN of the weight, for every example: [n, parameters, parameters]."""
    roots = ggn_roots(g, X, S)
    return np.stack([roots[:, n].T @ roots[:, n] for n in range(len(X))])


def ggn_diagonal(g: Geometry, X: Array, S: Array, *, per_example: bool = False) -> Array:
    """The diagonal of the whole GGN."""
    each = np.diagonal(ggn(g, X, S), axis1=1, axis2=2).reshape(len(X), *g.weight_size)
    return each.copy() if per_example else each.sum(0)


def ggn_gram(g: Geometry, X: Array, S: Array) -> Array:
    """Inner products of all Jᵀ S: [(v n), (w m)]."""
    roots = ggn_roots(g, X, S).reshape(len(S) * len(X), -1)
    return roots @ roots.T


def ggn_mini_blocks(g: Geometry, X: Array, S: Array, *, block: str) -> Array:
    """Blocks taken out of the whole GGN one by one."""
    whole = ggn(g, X, S).sum(0)
    numbers = np.arange(len(whole)).reshape(g.weight_size)
    if block == "filter":
        return np.stack([whole[np.ix_(part.ravel(), part.ravel())] for part in numbers])
    if block == "kernel":
        parts = numbers.reshape(prod(g.weight_size[:2]), -1)
        blocks = np.stack([whole[np.ix_(part, part)] for part in parts])
        return blocks.reshape(*g.weight_size[:2], *g.kernel_size, *g.kernel_size)
    by_group = numbers.reshape(g.groups, prod(g.weight_size[:2]) // g.groups, -1)
    parts = [by_group[group, :, k] for group in range(g.groups) for k in range(by_group.shape[-1])]
    blocks = np.stack([whole[np.ix_(part, part)] for part in parts])
    return blocks.reshape(g.groups, *g.kernel_size, *blocks.shape[1:])


def hessian_backprop(g: Geometry, W: Array, H: Array) -> Array:
    """A(W)ᵀ H A(W), with the matrix made of basis vectors."""
    matrix = unfolded_kernel(g, W)
    size = (g.in_channels, *g.input_size)
    return (matrix.T @ H.reshape(len(matrix), len(matrix)) @ matrix).reshape(*size, *size)


def hessian_diagonal_input(g: Geometry, W: Array, V: Array) -> Array:
    """The matrix squared entry by entry, transposed, times V."""
    squared = unfolded_kernel(g, W) ** 2
    return (V.reshape(len(V), -1) @ squared).reshape(len(V), g.in_channels, *g.input_size)


def hessian_diagonal_weight(g: Geometry, X: Array, V: Array) -> Array:
    """autograd's weight Jacobian squared entry by entry, transposed, times V."""
    jacobian = conv_weight_jacobian(g, X).reshape(V.size, -1)
    return (V.ravel() @ jacobian**2).reshape(g.weight_size)


# ------------------------------------------------------------------------------------------------------------ the table
@dataclass(frozen=True)
class Operation:
    """How an operation of `lensor.ops` is called, and where its right answer comes from.

    `operands` names what each operand is (a key of `shapes`); `options` are all keywords it takes beside the spec.
    """

    oracle: Callable[..., Array]
    operands: Mapping[str, str]
    options: tuple[Mapping[str, Any], ...] = ({},)
    max_ndim: int = 3
    needs_n: bool = False
    largest: Callable[[Geometry, int], int] = field(default=lambda g, n: 0)
    """The number of entries of the largest dense thing the answer goes through."""


def _positions(g: Geometry) -> int:
    return g.out_channels * prod(g.output_size)


def _inputs(g: Geometry) -> int:
    return g.in_channels * prod(g.input_size)


def _weights(g: Geometry) -> int:
    return prod(g.weight_size)


_APPROX = ({"approx": "expand"}, {"approx": "reduce"})

OPERATIONS: dict[str, Operation] = {
    "conv": Operation(conv, {"X": "input", "W": "weight", "b": "bias"}, max_ndim=5),
    "conv_transpose": Operation(conv_transpose, {"X": "opposite", "W": "weight", "b": "bias"}, max_ndim=5),
    "unfold": Operation(unfold, {"X": "input"}, max_ndim=5),
    "unfold_transpose": Operation(unfold_transpose, {"X": "opposite"}, max_ndim=5),
    "fold": Operation(fold, {"V": "patches"}, max_ndim=5),
    "unfolded_kernel": Operation(unfolded_kernel, {"W": "weight"}, largest=lambda g, n: _positions(g) * _inputs(g)),
    "conv_weight_vjp": Operation(conv_weight_vjp, {"X": "input", "V": "output"}, max_ndim=5),
    "conv_weight_vjp_per_example": Operation(conv_weight_vjp_per_example, {"X": "input", "V": "output"}, max_ndim=5),
    "conv_input_vjp": Operation(conv_input_vjp, {"W": "weight", "V": "output"}, max_ndim=5),
    "conv_weight_jvp": Operation(conv_weight_jvp, {"X": "input", "T": "weight"}, max_ndim=5),
    "conv_input_jvp": Operation(conv_input_jvp, {"T": "input", "W": "weight"}, max_ndim=5),
    "conv_weight_jacobian": Operation(
        conv_weight_jacobian,
        {"X": "input"},
        largest=lambda g, n: n * _positions(g) * max(n * _positions(g), _weights(g)),
    ),
    "conv_input_jacobian": Operation(
        conv_input_jacobian,
        {"W": "weight"},
        needs_n=True,
        largest=lambda g, n: n**2 * _positions(g) * max(_positions(g), _inputs(g)),
    ),
    "mixed_second_derivative": Operation(
        mixed_second_derivative, {"V": "output"}, largest=lambda g, n: n * _weights(g) * _inputs(g)
    ),
    "kfac_input_factor": Operation(
        kfac_input_factor, {"X": "input"}, (*_APPROX, *({**approx, "bias": True} for approx in _APPROX)), max_ndim=5
    ),
    "kfac_input_root": Operation(kfac_input_root, {"X": "input"}, max_ndim=5),
    "kfac_output_factor": Operation(kfac_output_factor, {"V": "roots"}, _APPROX, max_ndim=5),
    "ggn_diagonal": Operation(
        ggn_diagonal,
        {"X": "input", "S": "roots"},
        ({}, {"per_example": True}),
        largest=lambda g, n: n * _weights(g) ** 2,
    ),
    "ggn_gram": Operation(ggn_gram, {"X": "input", "S": "roots"}),
    "ggn_mini_blocks": Operation(
        ggn_mini_blocks,
        {"X": "input", "S": "roots"},
        ({"block": "filter"}, {"block": "kernel"}, {"block": "position"}),
        largest=lambda g, n: n * _weights(g) ** 2,
    ),
    "hessian_backprop": Operation(
        hessian_backprop, {"W": "weight", "H": "hessian"}, largest=lambda g, n: max(_positions(g), _inputs(g)) ** 2
    ),
    "hessian_diagonal_input": Operation(
        hessian_diagonal_input, {"W": "weight", "V": "output"}, largest=lambda g, n: _positions(g) * _inputs(g)
    ),
    "hessian_diagonal_weight": Operation(
        hessian_diagonal_weight,
        {"X": "input", "V": "output"},
        largest=lambda g, n: n * _positions(g) * max(n * _positions(g), _weights(g)),
    ),
}


def shapes(g: Geometry, batch: int, v: int) -> dict[str, tuple[int, ...]]:
    """The shape of everything an operand can be."""
    input_size, output_size = (batch, g.in_channels, *g.input_size), (batch, g.out_channels, *g.output_size)
    return {
        "input": input_size,
        "output": output_size,
        "opposite": input_size if g.transposed else output_size,
        "weight": g.weight_size,
        "bias": (g.out_channels,),
        "patches": (batch, g.in_channels * prod(g.kernel_size), *g.output_size),
        "roots": (v, *output_size),
        "hessian": (*output_size[1:], *output_size[1:]),
    }


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float64") -> Array:
    """Normal numbers in double precision; for a shorter dtype small integers, which every dtype holds exactly."""
    if dtype == "complex128":
        return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    if dtype == "float64":
        return rng.standard_normal(shape)
    return rng.integers(-2, 3, shape).astype(np.float64)


@dataclass(frozen=True)
class Case:
    """An operation on a spec, operands in double precision, and what it should give."""

    op: str
    spec: Mapping[str, Any]
    options: Mapping[str, Any]
    operands: Mapping[str, Array]
    sizes: Mapping[str, int]
    expected: Array

    @property
    def call(self) -> str:
        """The call that this case makes, to be pasted."""
        spec = ", ".join(f"{name}={value!r}" for name, value in self.spec.items())
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        operands = [f"{name}={list(array.shape)}" for name, array in self.operands.items()]
        operands += [f"{name}={size}" for name, size in self.sizes.items()]
        return f"lensor.ops.{self.op}(lensor.ConvSpec({spec}){options})({', '.join(operands)})"


def make_case(
    op: str,
    spec: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    batch: int = 2,
    v: int = 2,
    dtype: str = "float64",
    options: Mapping[str, Any] | None = None,
) -> Case:
    """Random operands for an operation on a spec (the arguments of ConvSpec) and the expected result.

    Args:
        op: a name in `OPERATIONS`.
        spec: keyword arguments of ConvSpec.
        rng: where operands come from.
        batch: size of n.
        v: size of v, for operations that have it.
        dtype: the dtype that operands will be cast to; here they are double precision, but fit it exactly.
        options: keywords of the operation beside the spec; its first set if not given.
    """
    operation, g = OPERATIONS[op], Geometry.of(spec)
    options = operation.options[0] if options is None else options
    kinds = {name: kind for name, kind in operation.operands.items() if kind != "bias" or _takes_bias(op, g)}
    sizes = shapes(g, batch, v)
    operands = {name: draw(rng, sizes[kind], dtype) for name, kind in kinds.items()}
    known = {"n": batch} if operation.needs_n else {}
    expected = operation.oracle(g, **operands, **known, **options)
    return Case(op, spec, options, operands, known, expected)


def _takes_bias(op: str, g: Geometry) -> bool:
    # The transpose of a convolution that has a bias has none of its own.
    return g.bias and (op == "conv" or g.transposed)
