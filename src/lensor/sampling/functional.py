"""Convolutions, transposed convolutions and linear maps whose weight gradient is computed from a sampled input."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lensor import functional as exact
from lensor import ops
from lensor.errors import require_choice
from lensor.execute import evaluate
from lensor.network import Group, Network
from lensor.nn.layers import Padding, Size, as_autocast
from lensor.notation import contraction
from lensor.planner import current, planning
from lensor.sampling.schemes import SCHEMES, draw, require_keep
from lensor.spec import ConvSpec

Keep: TypeAlias = Mapping[str, float | Fraction]
"""Keep rates by the names of an input's indices: n, g, c_in, i1, i2, ..."""

Scheme: TypeAlias = str | Mapping[str, str]
"""One scheme for all indices, or one for each."""

_SMALL = 1 << 22
"""Bytes that a gradient may always take."""

Forward: TypeAlias = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]

_Chosen: TypeAlias = tuple[tuple[str, Fraction | None], ...]
"""Index of the network and keep rate; None where there are weights."""


@dataclass(frozen=True, eq=False)
class BilinearMap:
    """A map that is linear in an input X and in a weight W.

    Args:
        network: its network.
        names: what users call the indices of X, in order.
        input_vjp: (shape of x, weight, grad_output) -> gradient of x.
        channels: the output's axis of channels.
    """

    network: Network
    names: tuple[str, ...]
    input_vjp: Callable[[Sequence[int], Tensor, Tensor], Tensor]
    channels: int

    @functools.cached_property
    def gradient(self) -> Network:
        """The weight gradient's network."""
        return self.network.vjp("W")

    @functools.cached_property
    def legs(self) -> tuple[Group, ...]:
        """The legs of X."""
        return self.gradient.operand_legs["X"]

    @functools.cached_property
    def indices(self) -> dict[str, str]:
        """The network's index of each name."""
        return dict(zip(self.names, (index for leg in self.legs for index in leg), strict=True))

    def sizes(self, x: Sequence[int]) -> dict[str, int]:
        """The size of every index, for an input of some shape."""
        found = {name: size for name, size in self.gradient.sizes.items() if size is not None}
        for leg, size in zip(self.legs, x, strict=True):
            if len(leg) == 1:
                found[leg[0]] = size
        return found


def _at(
    array: Tensor, legs: Sequence[Group], sizes: Mapping[str, int], change: Callable[[Tensor, int], Tensor], index: str
) -> Tensor:
    """An array with one of the indices of its legs changed."""
    flat = [name for leg in legs for name in leg]
    array = change(array.reshape([sizes[name] for name in flat]), flat.index(index))
    counts = dict(zip(flat, array.shape, strict=True))
    return array.reshape([math.prod(counts[name] for name in leg) for leg in legs])


def take_part(array: Tensor, legs: Sequence[Group], sizes: dict[str, int], index: str, positions: Tensor) -> Tensor:
    """The array at some positions of an index, whose size in `sizes` is changed."""
    found = _at(array, legs, sizes, lambda flat, axis: flat.index_select(axis, positions), index)
    sizes[index] = len(positions)
    return found


def put_part(
    array: Tensor, legs: Sequence[Group], sizes: dict[str, int], index: str, positions: Tensor, size: int
) -> Tensor:
    """The array at some positions of an index of a larger size, zeros elsewhere."""

    def put(flat: Tensor, axis: int) -> Tensor:
        whole = flat.new_zeros((*flat.shape[:axis], size, *flat.shape[axis + 1 :]))
        return whole.index_copy(axis, positions, flat)

    found = _at(array, legs, sizes, put, index)
    sizes[index] = size
    return found


@functools.lru_cache(maxsize=1024)
def _sampled(gradient: Network, chosen: _Chosen, sizes: tuple[tuple[str, int], ...]) -> Network:
    """The weight gradient's network for an input that is sampled already; with weights where there is no keep rate."""
    for index, keep in chosen:
        weights = f"{index}_weights" if keep is None else None
        gradient = gradient.sample(index, keep, weights=weights, stored=["X"])
        gradient = gradient.bind({f"{index}_full": dict(sizes)[index]})
    return gradient


class _Sampled(torch.autograd.Function):
    """Exact output and input gradient; the weight gradient from a part of the input, all that is kept of it.

    The part is an operand of its own, a function of the input: derivatives of the weight gradient find their way.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        bilinear: BilinearMap,
        forward: Forward,
        chosen: _Chosen,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        part: Tensor,
        *drawn: Tensor,
    ) -> Tensor:
        return forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.bilinear, _, ctx.chosen, x, weight, bias, part, *drawn = inputs
        ctx.shapes, ctx.has_bias, ctx.count = (x.shape, weight.shape), bias is not None, len(inputs)
        _, _, _, needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(weight if needs_x else None, *([part, *drawn] if needs_weight else []))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight, *kept), bilinear, grad = ctx.saved_tensors, ctx.bilinear, grads[0]
        _, _, _, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        others = [axis for axis in range(grad.ndim) if axis != bilinear.channels % grad.ndim]
        with torch.autocast(grad.device.type, enabled=False):
            # The weight's first: what it needs beside is gone before the input's gradient, which is large, is made.
            weight_grad = _weight_gradient(bilinear, ctx.chosen, ctx.shapes, grad, *kept) if needs_weight else None
            x_grad = bilinear.input_vjp(ctx.shapes[0], weight, grad) if needs_x else None
            bias_grad = grad.sum(others) if ctx.has_bias and needs_bias else None
        return None, None, None, x_grad, weight_grad, bias_grad, *[None] * (ctx.count - 6)


def _weight_gradient(
    bilinear: BilinearMap,
    chosen: _Chosen,
    shapes: tuple[Sequence[int], Sequence[int]],
    grad: Tensor,
    part: Tensor,
    *drawn: Tensor,
) -> Tensor:
    """The sampled weight gradient: a network on the part, put into zeros where an index of the weight was sampled.

    Who samples wants memory first: reading may take no more than twice what the whole input and the gradient take.
    """
    if not part.numel():
        return grad.new_zeros(tuple(shapes[1]))
    operands, rest = {"X": part, "V": grad}, list(drawn)
    for index, keep in chosen:
        operands[f"{index}_positions"] = rest.pop(0)
        if keep is None:
            operands[f"{index}_weights"] = rest.pop(0).to(part.dtype)
    full = bilinear.sizes(shapes[0])
    net = _sampled(bilinear.gradient, chosen, tuple(sorted(full.items())))
    entries = 2 * (math.prod(shapes[0]) + grad.numel()) + math.prod(shapes[1])
    own, given = max(entries * grad.element_size(), _SMALL), current().max_bytes
    with planning(max_bytes=own if given is None else min(own, given)):
        found = evaluate(net, operands)
    sizes = {**full, **{index: len(operands[f"{index}_positions"]) for index, _ in chosen}}
    for index, _ in chosen:
        if index in net.output_indices:
            found = put_part(found, net.output, sizes, index, operands[f"{index}_positions"], full[index])
    return found


def apply(
    bilinear: BilinearMap,
    forward: Forward,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keep: Keep,
    scheme: Scheme,
    generator: torch.Generator | None,
) -> Tensor:
    """The map computed by `forward`, its weight gradient sampled; where nothing is sampled, `forward` alone.

    Raises:
        TypeError: for complex arrays.
        ValueError: for an unknown index or scheme, or a keep outside (0, 1].
    """
    rates, schemes = rates_of(keep, bilinear.names), schemes_of(scheme, bilinear.names)
    if x.is_complex():
        raise TypeError(f"input has complex dtype {x.dtype}, expected a real dtype")
    x, weight, bias = as_autocast(x, weight, bias)
    if not rates or not (torch.is_grad_enabled() and weight.requires_grad):
        return forward(x, weight, bias)
    full = bilinear.sizes(x.shape)
    sizes, part, chosen, drawn = dict(full), x, [], []
    for name, rate in rates.items():
        index = bilinear.indices[name]
        norms = _norms(x, bilinear.legs, full, index) if schemes[name] == "importance" else None
        found = draw(full[index], rate, schemes[name], norms=norms, generator=generator, device=x.device)
        part = take_part(part, bilinear.legs, sizes, index, found.positions)
        chosen.append((index, found.keep))
        drawn += [found.positions] if found.weights is None else [found.positions, found.weights]
    return _Sampled.apply(bilinear, forward, tuple(chosen), x, weight, bias, part, *drawn)  # type: ignore[return-value]


def batched(call: Callable[[Tensor], Tensor], x: Tensor, dims: int) -> Tensor:
    """The call for an input of at least so many axes, the first of which is the batch; one axis less is one example."""
    return call(x) if x.ndim >= dims else call(x[None])[0]


def _norms(x: Tensor, legs: Sequence[Group], sizes: Mapping[str, int], index: str) -> Tensor:
    """The norm of what stands at each position of an index."""
    flat = [name for leg in legs for name in leg]
    x = x.detach().reshape([sizes[name] for name in flat]).float()
    return x.square().sum([axis for axis, name in enumerate(flat) if name != index]).sqrt()


def rates_of(keep: Keep, names: Sequence[str]) -> dict[str, Fraction]:
    """The keep rates below 1; ValueError for unknown indices and rates outside (0, 1]."""
    if not isinstance(keep, Mapping):
        raise TypeError(f"keep is {keep!r}, expected a mapping of indices to rates, e.g. {{'i1': 0.5}}")
    for name in keep:
        if name not in names:
            raise ValueError(f"keep names index {name!r}, expected indices of the input: {', '.join(names)}")
    rates = {name: require_keep(rate, name) for name, rate in keep.items()}
    return {name: rate for name, rate in rates.items() if rate < 1}


def schemes_of(scheme: Scheme, names: Sequence[str]) -> dict[str, str]:
    """The scheme of every index, "bernoulli" where none is given; ValueError for unknown ones."""
    given = dict.fromkeys(names, scheme) if isinstance(scheme, str) else {**dict.fromkeys(names, SCHEMES[0]), **scheme}
    for name, value in given.items():
        if name not in names:
            raise ValueError(f"scheme names index {name!r}, expected indices of the input: {', '.join(names)}")
        require_choice("scheme", value, SCHEMES)
    return given


def names_of(dims: int) -> tuple[str, ...]:
    """What the indices of a convolution's input are called."""
    return ("n", "g", "c_in", *(f"i{axis}" for axis in range(1, dims + 1)))


@functools.lru_cache(maxsize=1024)
def convolution(spec: ConvSpec, padding: Any) -> BilinearMap:
    """A convolution, or a transposed one, as a map of its input and weight."""
    options = (spec.stride, padding, spec.dilation, spec.groups)

    def vjp(shape: Sequence[int], weight: Tensor, grad: Tensor) -> Tensor:
        if spec.transposed:
            # The transposed convolution is an input VJP, and its own is the convolution.
            return exact.conv(grad, weight, None, *options)
        return exact.conv_input_vjp(tuple(shape), weight, grad, *options, padding_mode=spec.padding_mode)

    dims = len(spec.kernel_size)
    net = ops.conv_transpose(spec) if spec.transposed else ops.conv(spec)
    assert isinstance(net, Network)  # without bias
    return BilinearMap(net, names_of(dims), vjp, channels=1)


@functools.lru_cache(maxsize=256)
def linear_map(in_features: int, out_features: int, axes: int) -> BilinearMap:
    """A linear map along the last of so many axes."""
    front = ("n", *(f"i{axis}" for axis in range(1, axes - 1)))
    net = contraction(
        f"{' '.join(front)} c_in, c_out c_in -> {' '.join(front)} c_out", "X", "W", c_in=in_features, c_out=out_features
    )
    return BilinearMap(net, (*front, "c_in"), lambda shape, weight, grad: grad @ weight, channels=-1)


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    keep: Keep,
    scheme: Scheme = "bernoulli",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A convolution with exact output and input gradient, and an unbiased weight gradient from a part of the input.

    Only the part of the input that is sampled is kept for the backward pass. Of a model's memory that falls only if
    nothing else keeps the input: see `convert`.

    Args:
        input: [batch, c_in, *input_size] or [c_in, *input_size].
        weight: [c_out, c_in/groups, *kernel_size].
        bias: [c_out] or None; its gradient is exact.
        stride: one int, or one per dimension.
        padding: an int, "same", "valid", one int or one (left, right) pair per dimension.
        dilation: one int, or one per dimension.
        groups: number of groups of channels.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        keep: the share of positions to keep of some indices of the input: n (examples), g (groups), c_in (channels of
            a group, the same in every group), i1, i2, ... (positions); those not named are kept whole.
        scheme: how they are drawn, of `SCHEMES`: one, or one for each index.
        generator: a generator on the CPU, by default torch's.

    Returns:
        The convolution, [batch, c_out, *output_size].

    Example:
        >>> import torch, lensor.sampling
        >>> x, w = torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3, requires_grad=True)
        >>> y = lensor.sampling.conv(x, w, padding=1, keep={"i1": 0.5, "i2": 0.5}, scheme="fixed")
        >>> y.sum().backward()
        >>> y.shape, w.grad.shape
        (torch.Size([2, 4, 8, 8]), torch.Size([4, 3, 3, 3]))

    Raises:
        TypeError: for complex arrays, or arrays of two dtypes.
        ValueError: for an unknown index or scheme, a keep outside (0, 1], or what `lensor.functional.conv` refuses.

    Equation:
        Equation 9 of the paper's §5.2 on `n (g c_in) i, i o k, n (g c_out) o -> (g c_out) c_in k`.
    """

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return exact.conv(x, weight, bias, stride, padding, dilation, groups, padding_mode=padding_mode)

    dims = weight.ndim - 2
    if dims < 1 or input.ndim not in (dims + 1, dims + 2) or input.shape[-dims - 1] != groups * weight.shape[1]:
        return forward(input, weight, bias)  # which says what is wrong
    spec = _spec(
        input.shape[-dims - 1],
        weight.shape[0],
        tuple(input.shape[-dims:]),
        tuple(weight.shape[2:]),
        _frozen(stride),
        _frozen(padding),
        _frozen(dilation),
        groups,
        padding_mode,
        None,
    )
    found = convolution(spec, _frozen(padding))
    return batched(lambda x: apply(found, forward, x, weight, bias, keep, scheme, generator), input, weight.ndim)


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    keep: Keep,
    scheme: Scheme = "bernoulli",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A transposed convolution with an unbiased weight gradient from a part of the input; else exact, as `conv`.

    Args:
        input: [batch, c_in, *input_size] or [c_in, *input_size].
        weight: [c_in, c_out/groups, *kernel_size].
        bias: [c_out] or None; its gradient is exact.
        stride: one int, or one per dimension.
        padding: one int, or one per dimension.
        output_padding: one int, or one per dimension.
        groups: number of groups of channels.
        dilation: one int, or one per dimension.
        keep: the share of positions to keep of some indices of the input, as in `conv`.
        scheme: how they are drawn, of `SCHEMES`: one, or one for each index.
        generator: a generator on the CPU, by default torch's.

    Returns:
        The transposed convolution, [batch, c_out, *output_size].

    Example:
        >>> import torch, lensor.sampling
        >>> x, w = torch.ones(2, 3, 8), torch.ones(3, 4, 2, requires_grad=True)
        >>> lensor.sampling.conv_transpose(x, w, stride=2, keep={"c_in": 0.5}).shape
        torch.Size([2, 4, 16])

    Raises:
        TypeError: for complex arrays, or arrays of two dtypes.
        ValueError: for an unknown index or scheme, a keep outside (0, 1], or what `lensor.functional.conv_transpose`
            refuses.

    Equation:
        Equation 9 of the paper's §5.2 on the transposed convolution's weight VJP.
    """

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return exact.conv_transpose(x, weight, bias, stride, padding, output_padding, groups, dilation)

    dims = weight.ndim - 2
    if dims < 1 or input.ndim not in (dims + 1, dims + 2) or input.shape[-dims - 1] != weight.shape[0]:
        return forward(input, weight, bias)  # which says what is wrong
    spec = _spec(
        weight.shape[0],
        groups * weight.shape[1],
        tuple(input.shape[-dims:]),
        tuple(weight.shape[2:]),
        _frozen(stride),
        _frozen(padding),
        _frozen(dilation),
        groups,
        "zeros",
        _frozen(output_padding),
    )
    found = convolution(spec, _frozen(padding))
    return batched(lambda x: apply(found, forward, x, weight, bias, keep, scheme, generator), input, weight.ndim)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    keep: Keep,
    scheme: Scheme = "bernoulli",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A linear map with an unbiased weight gradient from a part of the input; else exact.

    Args:
        input: [batch, ..., c_in] or [c_in].
        weight: [c_out, c_in].
        bias: [c_out] or None; its gradient is exact.
        keep: the share of positions to keep of some indices of the input: n (the first axis), i1, i2, ... (axes between
            the first and the last), c_in (the last).
        scheme: how they are drawn, of `SCHEMES`: one, or one for each index.
        generator: a generator on the CPU, by default torch's.

    Returns:
        The map's output, [batch, ..., c_out].

    Example:
        >>> import torch, lensor.sampling
        >>> w = torch.ones(3, 5, requires_grad=True)
        >>> lensor.sampling.linear(torch.ones(4, 5), w, keep={"n": 0.5}, scheme="fixed").sum().backward()
        >>> w.grad[0]
        tensor([4., 4., 4., 4., 4.])

    Raises:
        TypeError: for complex arrays.
        ValueError: for an unknown index or scheme, or a keep outside (0, 1].

    Equation:
        §5.2 of the paper on the matrix product `n c_out, n c_in -> c_out c_in`.
    """
    forward = torch.nn.functional.linear
    if weight.ndim != 2 or input.ndim < 1 or input.shape[-1] != weight.shape[1]:
        return forward(input, weight, bias)  # which says what is wrong
    bilinear = linear_map(weight.shape[1], weight.shape[0], max(input.ndim, 2))
    return batched(lambda x: apply(bilinear, forward, x, weight, bias, keep, scheme, generator), input, 2)


@functools.lru_cache(maxsize=1024)
def _spec(
    in_channels: int,
    out_channels: int,
    input_size: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
    output_padding: Any,
) -> ConvSpec:
    transposed = {} if output_padding is None else {"transposed": True, "output_padding": output_padding}
    return ConvSpec(
        in_channels,
        out_channels,
        input_size,
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        **transposed,
    )


def _frozen(option: Any) -> Any:
    """An option as something that can be hashed."""
    return (
        tuple(_frozen(entry) for entry in option)
        if isinstance(option, Sequence) and not isinstance(option, str)
        else option
    )
