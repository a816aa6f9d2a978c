"""Explicit definitions of a convolution's quantities: slow, and without any of Lensor's code.

Hyper-parameters are resolved independently. Forward passes are torch's own convolutions on input padded by
`torch.nn.functional.pad`, derivatives come from torch's automatic differentiation, and Jacobians are full arrays.
Patches use none of these: each entry is gathered individually from the input position that a kernel position reads for
an output position.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch.nn import functional as F

Tensor = torch.Tensor
Sizes = tuple[int, ...]

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A convolution, with its hyper-parameters as a user would pass them.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        input_size: spatial size of the input.
        kernel_size: one int per dimension.
        stride: one int for all dimensions, or one per dimension.
        padding: an int, "same", or one int or (left, right) pair per dimension.
        dilation: as `stride`.
        groups: number of channel groups.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        bias: whether the convolution has a bias.
        transposed: whether it is a transposed convolution.
        output_padding: output padding of a transposed convolution, as `stride`.
        unbatched: whether its input has no batch axis.
    """

    in_channels: int
    out_channels: int
    input_size: Sizes
    kernel_size: Sizes
    stride: int | Sizes = 1
    padding: int | str | tuple[int | tuple[int, int], ...] = 0
    dilation: int | Sizes = 1
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = False
    transposed: bool = False
    output_padding: int | Sizes = 0
    unbatched: bool = False

    def each(self, sizes: int | Sizes) -> Sizes:
        """One size per dimension."""
        return (sizes,) * len(self.input_size) if isinstance(sizes, int) else sizes

    @cached_property
    def sides(self) -> tuple[tuple[int, int], ...]:
        """The left and right padding; for "same", an odd entry is added on the right."""
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.each(self.dilation), self.kernel_size, strict=True)]
            return tuple((total // 2, total - total // 2) for total in totals)
        given = (self.padding,) * len(self.input_size) if isinstance(self.padding, int) else self.padding
        return tuple((one, one) if isinstance(one, int) else (int(one[0]), int(one[1])) for one in given)

    @property
    def has_pairs(self) -> bool:
        """Whether the padding is given as (left, right) pairs, which torch's modules do not accept."""
        return isinstance(self.padding, tuple) and any(isinstance(one, tuple) for one in self.padding)

    @property
    def weight_size(self) -> Sizes:
        """[c_out, c_in/groups, *kernel_size]; transposed [c_in, c_out/groups, *kernel_size]."""
        first, second = self.out_channels, self.in_channels
        if self.transposed:
            first, second = second, first
        return (first, second // self.groups, *self.kernel_size)

    @cached_property
    def output_size(self) -> Sizes:
        """Spatial size of the output, according to torch."""
        shape = (1, self.in_channels, *self.input_size)
        return tuple(forward(self, torch.zeros(shape), torch.zeros(self.weight_size)).shape[2:])

    def __str__(self) -> str:
        kind = "transposed " if self.transposed else ""
        parts = [f"{kind}{self.in_channels}→{self.out_channels} on {_times(self.input_size)}"]
        parts.append(f"kernel {_times(self.kernel_size)}")
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0), ("groups", 1)):
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name.replace('_', ' ')} {_times(value)}")
        parts += [self.padding_mode] * (self.padding_mode != "zeros")
        parts += [name for name in ("bias", "unbatched") if getattr(self, name)]
        return ", ".join(parts)


def _times(sizes: object) -> str:
    """Format sizes in a few characters."""
    if not isinstance(sizes, tuple):
        return str(sizes)
    return "×".join(f"{one[0]}+{one[1]}" if isinstance(one, tuple) else str(one) for one in sizes)


# ---------------------------------------------------------------------------------------------- by torch's convolution
def forward(conv: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the layer: [n, c_in, *I] -> [n, c_out, *O]."""
    at = len(conv.input_size) - 1
    if conv.transposed:
        hyper = (0, conv.each(conv.output_padding), conv.groups, conv.each(conv.dilation))
        full = TRANSPOSED[at](x, weight, bias, conv.each(conv.stride), *hyper)
        crop = [slice(left, size - right) for size, (left, right) in zip(full.shape[2:], conv.sides, strict=True)]
        return full[(..., *crop)]
    widths = [width for pair in reversed(conv.sides) for width in pair]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    if any(widths):
        x = F.pad(x, widths, mode=mode)
    return CONVOLUTIONS[at](x, weight, bias, conv.each(conv.stride), 0, conv.each(conv.dilation), conv.groups)


def weight_jacobian(conv: Convolution, x: Tensor, weight: Tensor) -> Tensor:
    """The Jacobian of every example: [n, c_out, *O, *weight_size]."""

    def output(one: Tensor, at: Tensor) -> Tensor:
        return forward(conv, one[None], at)[0]

    return torch.func.vmap(torch.func.jacrev(output, argnums=1), (0, None))(x, weight)


# ------------------------------------------------------------------------------------------------- by explicit patches
def sources(conv: Convolution, d: int) -> Tensor:
    """The input position that each kernel position reads for each output position, or I if it reads none: [K, O]."""
    size, stride, dilation = conv.input_size[d], conv.each(conv.stride)[d], conv.each(conv.dilation)[d]
    left, _ = conv.sides[d]
    table = torch.empty(conv.kernel_size[d], conv.output_size[d], dtype=torch.long)
    for k, o in itertools.product(*map(range, table.shape)):
        if conv.transposed:  # position i contributes to i·S + k·D − left
            i, rest = divmod(o + left - k * dilation, stride)
            table[k, o] = i if rest == 0 and 0 <= i < size else size
            continue
        i = o * stride + k * dilation - left
        if conv.padding_mode == "circular":
            i %= size
        elif conv.padding_mode == "reflect":
            i = size - 1 - abs(size - 1 - abs(i))
        elif conv.padding_mode == "replicate":
            i = min(max(i, 0), size - 1)
        table[k, o] = i if 0 <= i < size else size
    return table


def patches(conv: Convolution, x: Tensor) -> Tensor:
    """[n, c_in, *K, *O]."""
    dims = len(conv.input_size)
    padded = F.pad(x, (0, 1) * dims)  # position I is zero
    index = []
    for d in range(dims):
        table, shape = sources(conv, d), [1] * (2 * dims)
        shape[d], shape[dims + d] = table.shape
        index.append(table.reshape(shape))
    return padded[(slice(None), slice(None), *index)]


def unfold(conv: Convolution, x: Tensor) -> Tensor:
    """[n, c_in·ΠK, ΠO]."""
    return patches(conv, x).reshape(len(x), conv.in_channels * math.prod(conv.kernel_size), -1)


def _grouped_patches(conv: Convolution, x: Tensor) -> Tensor:
    """[n, g, d, ΠO]; the last entry of a patch is 1 if there is a bias."""
    found = unfold(conv, x)
    found = found.reshape(len(x), conv.groups, -1, found.shape[2])
    return F.pad(found, (0, 0, 0, 1), value=1.0) if conv.bias else found


# ------------------------------------------------------------------------------------------------------------- operands
@dataclass(frozen=True, eq=False)
class Case:
    """A convolution with random operands in float64.

    The vectors at the convolution's output come from one small net (a sigmoid, a linear layer, and the sum of squared
    differences from a target), so that libraries that take a net and a loss get the same vectors. `V` is the loss
    gradient, `S` the square root of the loss Hessian.

    Args:
        conv: the convolution.
        X: [n, c_in, *I], the input; it always has a batch axis, even if `conv` is called without one.
        W: the weight.
        b: [c_out], the bias; None if there is none.
        head: [columns, c_out·ΠO], the weight of the linear layer.
        target: [n, columns].
        V: [n, c_out, *O], the loss gradient at the convolution's output.
        S: [columns, n, c_out, *O], the square root of the loss Hessian there.
        U: [n, c_in·ΠK, ΠO], a cotangent of the patches.
    """

    conv: Convolution
    X: Tensor
    W: Tensor
    b: Tensor | None
    head: Tensor
    target: Tensor
    V: Tensor
    S: Tensor
    U: Tensor

    @classmethod
    def draw(cls, conv: Convolution, batch: int = 3, columns: int = 2, seed: int = 0) -> Case:
        """Draw operands for a convolution; one example if it is unbatched."""
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        batch = 1 if conv.unbatched else batch
        x, weight = draw(batch, conv.in_channels, *conv.input_size), draw(conv.weight_size)
        bias = draw(conv.out_channels) if conv.bias else None
        features = conv.out_channels * math.prod(conv.output_size)
        head, residual = draw(columns, features), draw(batch, columns)
        hidden = forward(conv, x, weight, bias).sigmoid()
        slope, shape = (hidden * (1 - hidden)), (conv.out_channels, *conv.output_size)
        return cls(
            conv,
            x,
            weight,
            bias,
            head,
            hidden.flatten(1) @ head.T - residual / 2,
            slope * (residual @ head).reshape(batch, *shape),
            slope * math.sqrt(2) * head.reshape(columns, 1, *shape),
            draw(batch, conv.in_channels * math.prod(conv.kernel_size), math.prod(conv.output_size)),
        )


# ----------------------------------------------------------------------------------------------------------- quantities
def _forward(case: Case) -> Tensor:
    return forward(case.conv, case.X, case.W, case.b)


def _input_vjp(case: Case) -> Tensor:
    return torch.func.vjp(lambda x: forward(case.conv, x, case.W), case.X)[1](case.V)[0]


def _weight_vjp(case: Case) -> Tensor:
    return torch.func.vjp(lambda weight: forward(case.conv, case.X, weight), case.W)[1](case.V)[0]


def _per_example_weight_vjp(case: Case) -> Tensor:
    jacobian = weight_jacobian(case.conv, case.X, case.W).reshape(len(case.X), -1, case.W.numel())
    return torch.einsum("no,now->nw", case.V.flatten(1), jacobian).reshape(len(case.X), *case.W.shape)


def _kfac_expand(case: Case) -> Tensor:
    found = _grouped_patches(case.conv, case.X)
    return torch.einsum("ngdo,ngeo->gde", found, found) / len(found)


def _kfac_reduce(case: Case) -> Tensor:
    found = _grouped_patches(case.conv, case.X).mean(3)
    return torch.einsum("ngd,nge->gde", found, found) / len(found)


def _grouped_roots(case: Case) -> Tensor:
    """[columns, n, g, c_out/g, ΠO]."""
    return case.S.reshape(*case.S.shape[:2], case.conv.groups, case.conv.out_channels // case.conv.groups, -1)


def _kfac_output_expand(case: Case) -> Tensor:
    roots = _grouped_roots(case)
    return torch.einsum("vngco,vngdo->gcd", roots, roots) / roots.shape[4]


def _kfac_output_reduce(case: Case) -> Tensor:
    roots = _grouped_roots(case).sum(4)
    return torch.einsum("vngc,vngd->gcd", roots, roots)


def _ggn_diagonal(case: Case) -> Tensor:
    jacobian = weight_jacobian(case.conv, case.X, case.W).reshape(len(case.X), -1, case.W.numel())
    roots = torch.einsum("vno,now->vnw", case.S.flatten(2), jacobian)
    return roots.square().sum((0, 1)).reshape(case.W.shape)


def _fold(case: Case) -> Tensor:
    return torch.func.vjp(lambda x: unfold(case.conv, x), case.X)[1](case.U)[0]


DEFINITIONS: Mapping[str, Callable[[Case], Tensor]] = {
    "forward": _forward,
    "transposed_forward": _forward,
    "input_vjp": _input_vjp,
    "weight_vjp": _weight_vjp,
    "per_example_weight_vjp": _per_example_weight_vjp,
    "kfac_expand": _kfac_expand,
    "kfac_reduce": _kfac_reduce,
    "kfac_output_expand": _kfac_output_expand,
    "kfac_output_reduce": _kfac_output_reduce,
    "ggn_diagonal": _ggn_diagonal,
    "unfold": lambda case: unfold(case.conv, case.X),
    "fold": _fold,
}
"""The quantities, by name; Kronecker factors at the paper's scale, one per group."""

WITHOUT_BATCH = ("forward", "transposed_forward", "input_vjp", "weight_vjp", "unfold", "fold")
"""Quantities that are defined for an input without a batch axis."""


def expected(quantity: str, case: Case) -> Tensor:
    """Compute the quantity, without the batch axis for an unbatched case."""
    found = DEFINITIONS[quantity](case)
    return found[0] if case.conv.unbatched and quantity != "weight_vjp" else found
