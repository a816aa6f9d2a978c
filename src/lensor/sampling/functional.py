"""Convolutions, transposed convolutions and linear maps whose weight gradient is computed from a sampled input."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lensor import functional as exact
from lensor import ops
from lensor.cache import Cache, frozen
from lensor.choices import PaddingMode
from lensor.errors import require_choice
from lensor.evaluate import compile, evaluate
from lensor.kernels import backend_of, override_of
from lensor.kernels.torch.memory import in_channels_last, suggests_channels_last
from lensor.kernels.torch.tensors import unviewed
from lensor.network import Group, Network, contraction
from lensor.nn.layers import Padding, Size, as_autocast
from lensor.planner import preferring, profile_of
from lensor.sampling.bands import Axis, Band, axes_of, cropped, joined
from lensor.sampling.schemes import SCHEMES, draw, draw_start, kept_count, require_keep
from lensor.spec import ConvSpec, known_spec

Keep: TypeAlias = Mapping[str, float | Fraction]
"""Keep rates by index name of an input: n, g, c_in, i1, i2, ..."""

Scheme: TypeAlias = str | Mapping[str, str]
"""One scheme for all indices, or one per index."""

_SMALL = 1 << 22
"""Memory in bytes that a weight gradient may always use, however small its operands are."""

COUNTED = ("fixed", "blocks")
"""Schemes whose number of positions is not random."""

Forward: TypeAlias = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]

_Chosen: TypeAlias = tuple[tuple[str, Fraction, int], ...]
"""For each sampled index: its name in the network, the keep rate, and the step to which the number of positions is
rounded up."""

_Bands: TypeAlias = tuple[tuple[int, Band], ...]
"""Bands of the input, with the axis of the array."""

_sampled_networks, _maps, _faster = Cache(1024), Cache(1024), Cache(1024)


@dataclass(frozen=True, eq=False)
class BilinearMap:
    """A map that is linear in an input X and in a weight W.

    Args:
        network: the network of the map.
        names: the users' names for X's indices, in order.
        conv_input_vjp: a function (shape of x, weight, grad_output) -> gradient of x.
        channels: the channel axis of the output.
        spec: the specification of a convolution with zero padding; None for other maps.
    """

    network: Network
    names: tuple[str, ...]
    conv_input_vjp: Callable[[Sequence[int], Tensor, Tensor], Tensor]
    channels: int
    spec: ConvSpec | None = None

    @functools.cached_property
    def axes(self) -> dict[str, Axis]:
        """The axes whose bands can be used, by the user's name of their index."""
        axes = () if self.spec is None else axes_of(self.spec)
        return dict(zip(self.names[len(self.names) - len(axes) :], axes, strict=True))

    @functools.cached_property
    def gradient(self) -> Network:
        """The network of the weight gradient."""
        return self.network.vjp("W")

    @functools.cached_property
    def legs(self) -> tuple[Group, ...]:
        """The legs of X."""
        return self.gradient.operand_legs["X"]

    @functools.cached_property
    def indices(self) -> dict[str, str]:
        """A mapping from users' names to indices of the network."""
        return dict(zip(self.names, (index for leg in self.legs for index in leg), strict=True))

    def sizes(self, x: Sequence[int]) -> dict[str, int]:
        """The size of every index, for an input of a given shape."""
        found = {name: size for name, size in self.gradient.sizes.items() if size is not None}
        for leg, size in zip(self.legs, x, strict=True):
            if len(leg) == 1:
                found[leg[0]] = size
        return found


def _at(
    array: Tensor, legs: Sequence[Group], sizes: Mapping[str, int], change: Callable[[Tensor, int], Tensor], index: str
) -> Tensor:
    """Apply a function to one index of an array's legs."""
    flat = [name for leg in legs for name in leg]
    array = change(array.reshape([sizes[name] for name in flat]), flat.index(index))
    counts = dict(zip(flat, array.shape, strict=True))
    return array.reshape([math.prod(counts[name] for name in leg) for leg in legs])


def take_part(array: Tensor, legs: Sequence[Group], sizes: dict[str, int], index: str, positions: Tensor) -> Tensor:
    """Select some positions of an index from an array, and update the index's size in `sizes`."""
    found = _at(array, legs, sizes, lambda flat, axis: flat.index_select(axis, positions), index)
    sizes[index] = len(positions)
    return found


def put_part(
    array: Tensor, legs: Sequence[Group], sizes: dict[str, int], index: str, positions: Tensor, size: int
) -> Tensor:
    """The adjoint of `take_part`: write an array to some positions of a larger index, with zeros elsewhere."""

    def put(flat: Tensor, axis: int) -> Tensor:
        whole = flat.new_zeros((*flat.shape[:axis], size, *flat.shape[axis + 1 :]))
        return whole.index_copy(axis, positions, flat)

    found = _at(array, legs, sizes, put, index)
    sizes[index] = size
    return found


def _sampled(gradient: Network, chosen: Sequence[tuple[str, Fraction]], sizes: Mapping[str, int]) -> Network:
    """The network of the weight gradient whose input operand is already sampled."""

    def make() -> Network:
        net = gradient
        for index, keep in chosen:
            net = net.sample(index, keep, stored=["X"]).bind({f"{index}_full": sizes[index]})
        return net

    return _sampled_networks.get_or_make((gradient, *chosen, *sorted(sizes.items())), make)


class _Sampled(torch.autograd.Function):
    """Exact output and input gradient; the weight gradient uses, and the graph stores, only a part of the input.

    The part is a separate operand that is a function of the input, so the weight gradient can be differentiated.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        bilinear: BilinearMap,
        forward: Forward,
        chosen: _Chosen,
        bands: _Bands,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        part: Tensor,
        *drawn: Tensor,
    ) -> Tensor:
        return unviewed(forward(x, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.channels_last = output.ndim in (4, 5) and suggests_channels_last(output)
        ctx.bilinear, _, ctx.chosen, ctx.bands, x, weight, bias, part, *drawn = inputs
        ctx.shapes, ctx.has_bias, ctx.count = (x.shape, weight.shape), bias is not None, len(inputs)
        _, _, _, _, needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(weight if needs_x else None, *([part, *drawn] if needs_weight else []))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight, *kept), bilinear, grad = ctx.saved_tensors, ctx.bilinear, grads[0]
        _, _, _, _, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        others = [axis for axis in range(grad.ndim) if axis != bilinear.channels % grad.ndim]
        with torch.autocast(grad.device.type, enabled=False):
            # Compute the weight gradient first, so that its temporaries are freed before the large input gradient is
            # allocated.
            weight_grad = None
            if needs_weight and ctx.bands:
                weight_grad = _band_gradient(bilinear, ctx.chosen, ctx.bands, ctx.shapes, grad, *kept)
            elif needs_weight:
                weight_grad = _weight_gradient(bilinear, ctx.chosen, ctx.shapes, grad, *kept)
            if weight_grad is not None and ctx.channels_last:
                weight_grad = in_channels_last(weight_grad)
            x_grad = bilinear.conv_input_vjp(ctx.shapes[0], weight, grad) if needs_x else None
            bias_grad = grad.sum(others) if ctx.has_bias and needs_bias else None
        return None, None, None, None, x_grad, weight_grad, bias_grad, *[None] * (ctx.count - 7)


def _weight_gradient(
    bilinear: BilinearMap,
    chosen: _Chosen,
    shapes: tuple[Sequence[int], Sequence[int]],
    grad: Tensor,
    part: Tensor,
    *drawn: Tensor,
) -> Tensor:
    """The sampled weight gradient: evaluate the network on the part, and insert zeros for sampled weight indices.

    Because sampling is meant to save memory, this prefers plans that need at most twice the memory of the whole input
    and the output gradient, plus that of the weight.
    """
    if not part.numel():
        return grad.new_zeros(tuple(shapes[1]))
    full = bilinear.sizes(shapes[0])
    net = _sampled(bilinear.gradient, [(index, keep) for index, keep, _ in chosen], full)
    sizes = {**full, **{index: len(positions) for (index, _, _), positions in zip(chosen, drawn, strict=True)}}
    operands = {"V": grad}
    for (index, _, step), positions in zip(chosen, drawn, strict=True):
        more = -len(positions) % step
        part = _at(part, bilinear.legs, sizes, lambda flat, axis, more=more: _with_zeros(flat, axis, more), index)
        sizes[index] += more
        operands[f"{index}_positions"] = _with_zeros(positions, 0, more)
    operands["X"] = part
    with preferring(_memory(shapes, grad)):
        found = evaluate(net, operands)
    for (index, _, _), positions in zip(chosen, drawn, strict=True):
        if index in net.output_indices:
            kept = len(positions)
            found = _at(found, net.output, sizes, lambda flat, axis, kept=kept: flat.narrow(axis, 0, kept), index)
            sizes[index] = kept
            found = put_part(found, net.output, sizes, index, positions, full[index])
    return found


def _memory(shapes: tuple[Sequence[int], Sequence[int]], grad: Tensor) -> int:
    entries = 2 * (math.prod(shapes[0]) + grad.numel()) + math.prod(shapes[1])
    return max(entries * grad.element_size(), _SMALL)


def _band_gradient(
    bilinear: BilinearMap,
    chosen: _Chosen,
    bands: _Bands,
    shapes: tuple[Sequence[int], Sequence[int]],
    grad: Tensor,
    part: Tensor,
    *drawn: Tensor,
) -> Tensor:
    """The sampled weight gradient from bands: that of a small convolution, or the sampled network if it is faster."""
    net = bilinear.gradient
    placed = _fastest(bilinear, chosen, bands, shapes, grad, part, drawn)
    if placed is None:
        more = [(bilinear.indices[bilinear.names[at + 1]], band.share, 1) for at, band in bands]
        positions = [band.positions(part.device) for _, band in bands]
        return _weight_gradient(bilinear, (*chosen, *more), shapes, grad, part, *drawn, *positions)
    full = bilinear.sizes(shapes[0])
    sizes, legs, scale = dict(full), net.operand_legs["V"], Fraction(1)
    for (index, keep, _), positions in zip(chosen, drawn, strict=True):
        scale /= keep
        if any(index in leg for leg in legs):
            grad = take_part(grad, legs, sizes, index, positions)
        sizes[index] = len(positions)
    for _, band in bands:
        scale /= band.share
    found = _small(bilinear, bands, placed, sizes[bilinear.indices["g"]], part, grad)
    if found is None:
        return grad.new_zeros(tuple(shapes[1]))
    small, operands = found
    with preferring(_memory(shapes, grad)):
        found = evaluate(small, operands) * float(scale)
    for (index, _, _), positions in zip(chosen, drawn, strict=True):
        if index in net.output_indices:
            found = put_part(found, net.output, sizes, index, positions, full[index])
    return found


def _small(
    bilinear: BilinearMap, bands: _Bands, placed: Sequence[bool], groups: int, part: Tensor, grad: Tensor
) -> tuple[Network, dict[str, Tensor]] | None:
    """The weight gradient of a small convolution and its operands; None if it is zero.

    Args:
        bilinear: the whole convolution.
        bands: the bands that the part contains.
        placed: for each band, whether it is placed in zeros instead of taking a window of the output gradient.
        groups: number of groups in the part.
        part: the part of the input.
        grad: the output gradient.
    """
    spec = bilinear.spec
    assert spec is not None
    padding = [axis.sides for axis in bilinear.axes.values()]
    taken, window = {}, {}
    for (at, band), whole in zip(bands, placed, strict=True):
        met = band.meet()
        if met is None:
            return None
        if whole:
            taken[at] = band.placed
        else:
            taken[at], window[at], padding[at - 2] = met
    part, grad = joined(part, taken), joined(grad, window)
    one, other = (grad, part) if spec.transposed else (part, grad)
    for axis, sides in enumerate(padding):
        one, padding[axis] = cropped(one, axis + 2, sides)
    channels, size = (one.shape[1], other.shape[1]), tuple(one.shape[2:])
    hyper = (spec.kernel_size, spec.stride, padding, spec.dilation, groups)
    return _gradient_of(spec_of(*channels, size, *hyper, "zeros", None)), {"X": one, "V": other}


def _fastest(
    bilinear: BilinearMap,
    chosen: _Chosen,
    bands: _Bands,
    shapes: tuple[Sequence[int], Sequence[int]],
    grad: Tensor,
    part: Tensor,
    drawn: Sequence[Tensor],
) -> tuple[bool, ...] | None:
    """Which bands to place in zeros, for the least estimated time; None if the sampled network is faster."""
    counts = tuple(len(positions) for positions in drawn)
    given = (tuple(shapes[0]), tuple(part.shape), tuple(grad.shape), grad.dtype, grad.device)
    key = (bilinear, chosen, counts, tuple(at for at, _ in bands), given)

    def make() -> tuple[bool, ...] | None:
        full = bilinear.sizes(shapes[0])
        sizes = {**full, **{index: count for (index, _, _), count in zip(chosen, counts, strict=True)}}
        legs = [math.prod(sizes[index] for index in leg) for leg in bilinear.gradient.operand_legs["V"]]
        window = torch.empty((*legs[:2], *grad.shape[2:]), device="meta")
        small = torch.empty(part.shape, device="meta")
        likely = tuple((at, Band(band.axis, 0, band.count)) for at, band in bands)
        bytes_per_second = profile_of(backend_of(grad), backend_of(grad).kind(grad)).memory
        times: dict[tuple[bool, ...] | None, float] = {}

        def estimated(net: Network, operands: Mapping[str, Sequence[int]]) -> float:
            return compile(net, operands, like=grad).candidates[0].estimated

        with preferring(_memory(shapes, grad)):
            for placed in itertools.product((False, True), repeat=len(bands)):
                found = _small(bilinear, likely, placed, sizes[bilinear.indices["g"]], small, window)
                if found is None:
                    continue
                net, operands = found
                moved = sum(array.numel() for array in operands.values()) * 2 * grad.element_size()
                operand_shapes = {name: array.shape for name, array in operands.items()}
                times[placed] = estimated(net, operand_shapes) + moved / bytes_per_second
            every = [*((index, keep) for index, keep, _ in chosen)]
            every += [(bilinear.indices[bilinear.names[at + 1]], band.share) for at, band in bands]
            counted = [*counts, *(band.count for _, band in bands)]
            positions = {f"{index}_positions": (count,) for (index, _), count in zip(every, counted, strict=True)}
            net = _sampled(bilinear.gradient, every, full)
            times[None] = estimated(net, {"X": part.shape, "V": grad.shape, **positions})
        return min(times, key=times.__getitem__)

    return _faster.get_or_make(key, make)


def _gradient_of(spec: ConvSpec) -> Network:
    """The network of the weight gradient of a convolution."""
    return _sampled_networks.get_or_make(spec, lambda: ops.conv_weight_vjp(spec))


def _with_zeros(array: Tensor, axis: int, count: int) -> Tensor:
    """Append `count` zeros to an axis of an array."""
    return torch.nn.functional.pad(array, (*[0, 0] * (array.ndim - 1 - axis), 0, count)) if count else array


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
    """Compute the map with `forward` and a sampled weight gradient, or with `forward` alone if nothing is sampled.

    Raises:
        TypeError: for complex arrays.
        ValueError: for an unknown index or scheme, or a keep rate outside (0, 1].
    """
    rates, schemes = rates_of(keep, bilinear.names), schemes_of(scheme, bilinear.names)
    if x.is_complex():
        raise TypeError(f"input has complex dtype {x.dtype}, expected a real dtype")
    x, weight, bias = as_autocast(x, weight, bias)
    if not rates or not (torch.is_grad_enabled() and weight.requires_grad):
        return forward(x, weight, bias)
    full = bilinear.sizes(x.shape)
    sizes, part, chosen, drawn = dict(full), x, [], []
    banded, bands = _banded(bilinear, rates, schemes), []
    for name, rate in rates.items():
        index, way = bilinear.indices[name], schemes[name]
        size, fixed = full[index], way in COUNTED
        if fixed and kept_count(size, rate) == size:
            continue
        if name in banded:
            at = x.ndim - len(bilinear.axes) + [*bilinear.axes].index(name)
            bands.append((at, Band(bilinear.axes[name], draw_start(size, generator), kept_count(size, rate))))
            continue
        norms = _norms(x, bilinear.legs, full, index) if way == "importance" else None
        found = draw(size, rate, way, norms=norms, generator=generator, device=x.device)
        part = take_part(part, bilinear.legs, sizes, index, found.positions)
        if found.weights is not None:
            part = _weighted(part, bilinear.legs, sizes, index, found.weights)
        chosen.append((index, found.keep or Fraction(1), 1 if fixed else _step(size, rate)))
        drawn.append(found.positions)
    if not chosen and not bands:
        return forward(x, weight, bias)
    part = joined(part, {at: band.taken for at, band in bands})
    if part._is_view():
        part = part.clone()  # keep only the part
    arrays = (x, weight, bias, part, *drawn)
    return _Sampled.apply(bilinear, forward, tuple(chosen), tuple(bands), *arrays)  # type: ignore[return-value]


def _banded(bilinear: BilinearMap, rates: Mapping[str, Fraction], schemes: Mapping[str, str]) -> Collection[str]:
    """The names of the indices of which bands are used: all spatial indices, or none.

    Bands need counts that are not random, since each count is a different convolution.
    """
    found = [name for name in rates if name in bilinear.axes]
    fits = all(schemes[name] == "blocks" for name in found) and all(schemes[name] in COUNTED for name in rates)
    return found if fits and not torch.compiler.is_compiling() else ()


def _step(size: int, keep: Fraction) -> int:
    """The step to which drawn counts are rounded up: their standard deviation.

    Without rounding, every count would need a separate plan: hundreds per layer with two sampled indices. Rounding
    leaves about six counts per index, at the cost of padding with half a standard deviation of zeros on average.
    """
    return max(1, math.ceil(math.sqrt(size * keep * (1 - keep))))


def is_exporting() -> bool:
    """Whether `torch.export` is tracing: an exported program has no backward pass, and its outputs are exact."""
    exporting = getattr(torch.compiler, "is_exporting", None)  # torch 2.7
    return torch.compiler.is_compiling() and exporting is not None and exporting()


def batched(call: Callable[[Tensor], Tensor], x: Tensor, dims: int) -> Tensor:
    """Call with an input that has a batch axis; one is added for the call if the input has fewer than `dims` axes."""
    return call(x) if x.ndim >= dims else call(x[None])[0]


def _norms(x: Tensor, legs: Sequence[Group], sizes: Mapping[str, int], index: str) -> Tensor:
    """The norm of the entries at each position of an index, up to a common factor; always finite.

    A position with non-finite values gets a norm larger than the sum of all finite norms, so that it is kept.
    """
    flat = [name for leg in legs for name in leg]
    x = x.detach().reshape([sizes[name] for name in flat]).double()
    others = [axis for axis, name in enumerate(flat) if name != index]
    largest = (x.abs().amax(others) if x.numel() else x.sum(others)) if others else x.abs()
    finite = largest.isfinite()
    scale = torch.where(finite, largest, 0.0).amax() if largest.numel() else largest.sum()
    norms = (x / torch.where(scale > 0, scale, 1.0)).square().sum(others).sqrt() if others else largest
    norms = torch.where(finite, norms, 0.0)
    return torch.where(finite, norms, 1.0 + norms.sum())


def _weighted(part: Tensor, legs: Sequence[Group], sizes: dict[str, int], index: str, weights: Tensor) -> Tensor:
    """The part times one factor per position of an index, in at least single precision because factors may overflow."""

    def times(flat: Tensor, axis: int) -> Tensor:
        return (flat * weights.reshape(-1, *[1] * (flat.ndim - 1 - axis))).to(flat.dtype)

    return _at(part, legs, sizes, times, index)


def rates_of(keep: Keep, names: Sequence[str]) -> dict[str, Fraction]:
    """The keep rates below 1; ValueError for an unknown index or a rate outside (0, 1]."""
    if not isinstance(keep, Mapping):
        raise TypeError(f"keep is {keep!r}, expected a mapping of indices to rates, e.g. {{'i1': 0.5}}")
    for name in keep:
        if name not in names:
            raise ValueError(f"keep has index {name!r}, expected indices of the input: {', '.join(names)}")
    rates = {name: require_keep(rate, name) for name, rate in keep.items()}
    return {name: rate for name, rate in rates.items() if rate < 1}


def require_scheme(scheme: Any) -> None:
    """Raise TypeError unless the scheme is a string or a mapping."""
    if not isinstance(scheme, (str, Mapping)):
        raise TypeError(f"scheme is {scheme!r}, expected one of {', '.join(SCHEMES)}, or a mapping of indices to them")


def schemes_of(scheme: Scheme, names: Sequence[str]) -> dict[str, Any]:
    """The scheme of every index, "bernoulli" by default; ValueError for an unknown index or scheme."""
    require_scheme(scheme)
    given = dict.fromkeys(names, scheme) if isinstance(scheme, str) else {**dict.fromkeys(names, SCHEMES[0]), **scheme}
    for name, value in given.items():
        if name not in names:
            raise ValueError(f"scheme has index {name!r}, expected indices of the input: {', '.join(names)}")
        require_choice("scheme", value, SCHEMES)
    return given


def names_of(dims: int) -> tuple[str, ...]:
    """The users' names for the indices of a convolution's input."""
    return ("n", "g", "c_in", *(f"i{axis}" for axis in range(1, dims + 1)))


def convolution(spec: ConvSpec, padding: Any) -> BilinearMap:
    """A convolution or transposed convolution as a bilinear map of input and weight."""
    return _maps.get_or_make((spec, padding), lambda: _convolution(spec, padding))


def _convolution(spec: ConvSpec, padding: Any) -> BilinearMap:
    options = (spec.stride, padding, spec.dilation, spec.groups)

    def vjp(shape: Sequence[int], weight: Tensor, grad: Tensor) -> Tensor:
        if spec.transposed:
            # The transposed convolution is an input VJP. Its own input VJP is the convolution, which has more
            # positions if output_padding is at least the stride.
            found = exact.conv(grad, weight, None, *options)
            for axis, size in enumerate(shape[2:], start=2):
                found = found.narrow(axis, 0, size)
            return found
        return exact.conv_input_vjp(tuple(shape), weight, grad, *options, padding_mode=spec.padding_mode)

    dims = len(spec.kernel_size)
    net = ops.conv_transpose(spec) if spec.transposed else ops.conv(spec)
    assert isinstance(net, Network)  # without bias
    return BilinearMap(net, names_of(dims), vjp, channels=1, spec=spec if spec.padding_mode == "zeros" else None)


def linear_map(in_features: int, out_features: int, axes: int) -> BilinearMap:
    """A linear map along the last of `axes` axes."""
    key = (in_features, out_features, axes)
    return _maps.get_or_make(key, lambda: _linear_map(*key))


def _linear_map(in_features: int, out_features: int, axes: int) -> BilinearMap:
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
    padding_mode: PaddingMode = "zeros",
    keep: Keep,
    scheme: Scheme = "bernoulli",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A convolution with exact output and input gradient, and an unbiased weight gradient from a part of the input.

    Only the sampled part of the input is kept for the backward pass. This reduces a model's memory only if nothing else
    keeps the input: see `convert`.

    Args:
        input: [batch, c_in, *input_size] or [c_in, *input_size].
        weight: [c_out, c_in/groups, *kernel_size].
        bias: [c_out] or None; its gradient is exact.
        stride: one int, or one per dimension.
        padding: an int, "same", "valid", one int or one (left, right) pair per dimension.
        dilation: one int, or one per dimension.
        groups: number of channel groups.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        keep: fraction of positions to keep, by index of the input: n (examples), g (groups), c_in (channels of a group,
            the same in every group), i1, i2, ... (positions); the other indices are kept whole.
        scheme: sampling scheme, one of `SCHEMES`, or one per index.
        generator: a CPU generator; torch's by default.

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
        TypeError: for complex arrays, arrays of two dtypes, or arrays that are not torch tensors.
        ValueError: for an unknown index or scheme, a keep rate outside (0, 1], or arguments that
            `lensor.functional.conv` rejects.

    Equation:
        Equation 9 of the paper (§5.2) for `n (g c_in) i, i o k, n (g c_out) o -> (g c_out) c_in k`.
    """
    if (override := override_of(input, weight)) is not None:
        options = (stride, padding, dilation, groups)
        return override(
            conv, (input, weight, bias, *options), padding_mode=padding_mode, **_in_graph(keep, scheme, generator)
        )

    _require_tensors(input, weight, bias)

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return exact.conv(x, weight, bias, stride, padding, dilation, groups, padding_mode=padding_mode)

    dims = weight.ndim - 2
    fits = dims > 0 and input.ndim in (dims + 1, dims + 2) and input.shape[-dims - 1] == groups * weight.shape[1]
    if not fits or is_exporting():
        return forward(input, weight, bias)  # raises the error for invalid arguments
    spec = spec_of(
        input.shape[-dims - 1],
        weight.shape[0],
        tuple(input.shape[-dims:]),
        tuple(weight.shape[2:]),
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        None,
    )
    found = convolution(spec, frozen(padding))
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
    """A transposed convolution with an unbiased weight gradient from a sampled part of the input; otherwise exact.

    Args:
        input: [batch, c_in, *input_size] or [c_in, *input_size].
        weight: [c_in, c_out/groups, *kernel_size].
        bias: [c_out] or None; its gradient is exact.
        stride: one int, or one per dimension.
        padding: one int, or one per dimension.
        output_padding: one int, or one per dimension.
        groups: number of channel groups.
        dilation: one int, or one per dimension.
        keep: fraction of positions to keep, by index of the input, as in `conv`.
        scheme: sampling scheme, one of `SCHEMES`, or one per index.
        generator: a CPU generator; torch's by default.

    Returns:
        The transposed convolution, [batch, c_out, *output_size].

    Example:
        >>> import torch, lensor.sampling
        >>> x, w = torch.ones(2, 3, 8), torch.ones(3, 4, 2, requires_grad=True)
        >>> lensor.sampling.conv_transpose(x, w, stride=2, keep={"c_in": 0.5}).shape
        torch.Size([2, 4, 16])

    Raises:
        TypeError: for complex arrays, arrays of two dtypes, or arrays that are not torch tensors.
        ValueError: for an unknown index or scheme, a keep rate outside (0, 1], or arguments that
            `lensor.functional.conv_transpose` rejects.

    Equation:
        Equation 9 of the paper (§5.2) for the weight VJP of the transposed convolution.
    """
    if (override := override_of(input, weight)) is not None:
        options = (stride, padding, output_padding, groups, dilation)
        return override(conv_transpose, (input, weight, bias, *options), **_in_graph(keep, scheme, generator))

    _require_tensors(input, weight, bias)

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return exact.conv_transpose(x, weight, bias, stride, padding, output_padding, groups, dilation)

    dims = weight.ndim - 2
    fits = dims > 0 and input.ndim in (dims + 1, dims + 2) and input.shape[-dims - 1] == weight.shape[0]
    if not fits or is_exporting():
        return forward(input, weight, bias)  # raises the error for invalid arguments
    spec = spec_of(
        weight.shape[0],
        groups * weight.shape[1],
        tuple(input.shape[-dims:]),
        tuple(weight.shape[2:]),
        stride,
        padding,
        dilation,
        groups,
        "zeros",
        output_padding,
    )
    found = convolution(spec, frozen(padding))
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
    """A linear map with an unbiased weight gradient from a sampled part of the input; otherwise exact.

    Args:
        input: [batch, ..., c_in] or [c_in].
        weight: [c_out, c_in].
        bias: [c_out] or None; its gradient is exact.
        keep: fraction of positions to keep, by index of the input: n (the first axis), i1, i2, ... (axes between the
            first and the last), c_in (the last axis).
        scheme: sampling scheme, one of `SCHEMES`, or one per index.
        generator: a CPU generator; torch's by default.

    Returns:
        The output of the map, [batch, ..., c_out].

    Example:
        >>> import torch, lensor.sampling
        >>> w = torch.ones(3, 5, requires_grad=True)
        >>> lensor.sampling.linear(torch.ones(4, 5), w, keep={"n": 0.5}, scheme="fixed").sum().backward()
        >>> w.grad[0]
        tensor([4., 4., 4., 4., 4.])

    Raises:
        TypeError: for complex arrays, or arrays that are not torch tensors.
        ValueError: for an unknown index or scheme, a keep rate outside (0, 1], or shapes that do not fit.

    Equation:
        §5.2 of the paper, applied to the matrix product `n c_out, n c_in -> c_out c_in`.
    """
    if (override := override_of(input, weight)) is not None:
        return override(linear, (input, weight, bias), **_in_graph(keep, scheme, generator))
    _require_tensors(input, weight, bias)
    forward = torch.nn.functional.linear
    if is_exporting():
        return forward(input, weight, bias)
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [c_out, c_in]")
    if input.ndim < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input has shape {tuple(input.shape)}, expected {weight.shape[1]} entries along the last axis for weight"
            f" of shape {tuple(weight.shape)}"
        )
    bilinear = linear_map(weight.shape[1], weight.shape[0], max(input.ndim, 2))
    return batched(lambda x: apply(bilinear, forward, x, weight, bias, keep, scheme, generator), input, 2)


def _require_tensors(input: Any, weight: Any, bias: Any) -> None:
    """Raise TypeError unless all arrays are torch tensors."""
    for name, array in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(array, Tensor) and not (name == "bias" and array is None):
            raise TypeError(f"{name} has type {type(array).__name__}, expected torch.Tensor")


def _in_graph(keep: Keep, scheme: Scheme, generator: torch.Generator | None) -> dict[str, Any]:
    """The sampling options as arguments that a torch.fx graph can contain."""
    if generator is not None:
        raise TypeError(
            "generator is a torch.Generator, expected None in a torch.fx graph: trace a model that contains the layer"
            " as a submodule, or omit generator to use torch's default one"
        )
    scheme = scheme if isinstance(scheme, str) else dict(scheme)
    return {"keep": {name: float(rate) for name, rate in keep.items()}, "scheme": scheme}


def spec_of(
    in_channels: int,
    out_channels: int,
    input_size: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: PaddingMode,
    output_padding: Any,
) -> ConvSpec:
    """The specification of a layer; `output_padding` is None for a convolution."""
    sizes = in_channels, out_channels, input_size, kernel_size, stride, padding, dilation, groups, padding_mode
    transposed = {} if output_padding is None else {"transposed": True, "output_padding": output_padding}
    return known_spec(*sizes, **transposed)
