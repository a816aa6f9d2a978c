"""The standard implementation of each operation, as you would write it with torch alone.

- forward, input_vjp, weight_vjp: torch's convolution and its backward pass, for the one gradient that is needed. As
  after a forward pass, the input of input_vjp and the weight of weight_vjp already exist; they are created before
  timing.
- kfac_expand, kfac_reduce: pad, `torch.nn.functional.unfold`, the mean over positions (for reduce), and one matrix
  product per group. Where torch's unfold does not apply (one or three dimensions, transposed convolutions),
  `Tensor.unfold` along each axis replaces it; for transposed convolutions, zeros are first inserted between the input's
  positions.
- per_example_weight_vjp: `torch.func.vmap` over torch's weight gradient. This equals `vmap(grad(...))` without its
  forward pass.
- ggn_diagonal: unfold, an einsum for Jᵀ S of every example and column, squares, and a sum.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lensor.spec import ConvSpec

Tensor = torch.Tensor
Operands = Mapping[str, Tensor]


def _padded(x: Tensor, spec: ConvSpec) -> tuple[Tensor, tuple[int, ...]]:
    """The input, padded if torch's operators cannot pad it, and the padding that is left to these operators."""
    if spec.padding_mode == "zeros" and _is_even(spec):
        return x, tuple(left for left, _ in spec.padding)
    if spec.transposed:
        raise NotImplementedError(f"padding is {spec.padding}, expected equal sides for torch's transposed convolution")
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    widths = [width for pair in reversed(spec.padding) for width in pair]
    return torch.nn.functional.pad(x, widths, mode=mode), (0,) * spec.ndim


def _gradient(of: int, x: Tensor, weight: Tensor, v: Tensor, spec: ConvSpec, padding: tuple[int, ...]) -> Tensor:
    """torch's gradient of a convolution with respect to its input (0) or its weight (1)."""
    hyper = (spec.stride, padding, spec.dilation, spec.transposed, spec.output_padding, spec.groups)
    return torch.ops.aten.convolution_backward(v, x, weight, None, *hyper, [of == 0, of == 1, False])[of]


def forward(given: Operands, spec: ConvSpec) -> Tensor:
    """Compute the convolution."""
    x, padding = _padded(given["X"], spec)
    hyper = (spec.stride, padding, spec.dilation, spec.transposed, spec.output_padding, spec.groups)
    return torch.convolution(x, given["W"], None, *hyper)


def kept_input(v: Tensor, spec: ConvSpec) -> Tensor:
    """The input that a forward pass stores, padded if torch's operators cannot pad it; its entries are arbitrary.

    torch's backward pass uses only its shape, but copies an input that is not contiguous.
    """
    extra = [0 if _is_even(spec) else left + right for left, right in spec.padding]
    sizes = [size + more for size, more in zip(spec.input_size, extra, strict=True)]
    return v.new_zeros((len(v), spec.in_channels, *sizes))


def _is_even(spec: ConvSpec) -> bool:
    return all(left == right for left, right in spec.padding)


def input_vjp(given: Operands, spec: ConvSpec) -> Tensor:
    """The gradient with respect to the input, for zero padding only. X is the stored input."""
    if spec.padding_mode != "zeros":
        raise NotImplementedError(f"padding_mode is {spec.padding_mode!r}, expected 'zeros' for the input VJP")
    even = _is_even(spec)
    padding = tuple(left if even else 0 for left, _ in spec.padding)
    found = _gradient(0, given["X"], given["W"], given["V"], spec, padding)
    if not even:
        for axis, ((left, _), size) in enumerate(zip(spec.padding, spec.input_size, strict=True), start=2):
            found = found.narrow(axis, left, size)
    return found


def kept_weight(x: Tensor, spec: ConvSpec) -> Tensor:
    """The weight of the forward pass; torch's backward pass uses only its shape."""
    return x.new_zeros(spec.weight_shape)


def weight_vjp(given: Operands, spec: ConvSpec) -> Tensor:
    """The gradient with respect to the weight. W is the stored weight."""
    x, padding = _padded(given["X"], spec)
    return _gradient(1, x, given["W"], given["V"], spec, padding)


def per_example_weight_vjp(given: Operands, spec: ConvSpec) -> Tensor:
    """The gradient with respect to the weight for every example. W is the stored weight."""

    def one(x: Tensor, v: Tensor) -> Tensor:
        return weight_vjp({"X": x[None], "W": given["W"], "V": v[None]}, spec)

    return torch.func.vmap(one)(given["X"], given["V"])


def patches(x: Tensor, spec: ConvSpec) -> Tensor:
    """[batch, groups, channels/groups · ΠK, positions]; the positions are those of the output."""
    if spec.transposed or spec.ndim != 2:
        found = _windows(x, spec)
    else:
        x, padding = _padded(x, spec)
        found = torch.nn.functional.unfold(x, spec.kernel_size, spec.dilation, padding, spec.stride)
    return found.reshape(len(x), spec.groups, -1, found.shape[-1])


def _windows(x: Tensor, spec: ConvSpec) -> Tensor:
    """The patches in any number of dimensions: [batch, channels, ΠK, positions]."""
    sides = [side for pair in reversed(spec.padding) for side in pair]
    stride = spec.stride
    if spec.transposed:  # insert zeros between positions, then convolve with stride 1 and the flipped kernel
        sizes = [(size - 1) * step + 1 for size, step in zip(spec.input_size, stride, strict=True)]
        stuffed = x.new_zeros((*x.shape[:2], *sizes))
        stuffed[(..., *(slice(None, None, step) for step in stride))] = x
        x, stride, sides = stuffed, (1,) * spec.ndim, []
        every = zip(sizes, spec.output_size, spec.kernel_size, spec.dilation, spec.padding, strict=True)
        for size, positions, kernel, dilation, (left, _) in reversed(list(every)):
            span = dilation * (kernel - 1)
            sides += [span - left, positions + left - size]
    x = torch.nn.functional.pad(x, sides, mode="constant" if spec.padding_mode == "zeros" else spec.padding_mode)
    for axis, (kernel, step, dilation) in enumerate(zip(spec.kernel_size, stride, spec.dilation, strict=True), start=2):
        x = x.unfold(axis, dilation * (kernel - 1) + 1, step)[..., ::dilation]
    taps = range(2 + spec.ndim, 2 + 2 * spec.ndim)
    x = x.permute(0, 1, *taps, *range(2, 2 + spec.ndim))
    if spec.transposed:
        x = x.flip(tuple(range(2, 2 + spec.ndim)))
    return x.flatten(2, 1 + spec.ndim).flatten(3)


def kfac_expand(given: Operands, spec: ConvSpec) -> Tensor:
    """KFC's input factor."""
    found = patches(given["X"], spec)
    batch, groups, rows, positions = found.shape
    found = found.permute(1, 2, 0, 3).reshape(groups, rows, batch * positions)
    return (found @ found.mT).div_(batch)


def kfac_reduce(given: Operands, spec: ConvSpec) -> Tensor:
    """KFAC-reduce's input factor."""
    found = patches(given["X"], spec).mean(3).permute(1, 2, 0)
    return (found @ found.mT).div_(found.shape[2])


def ggn_diagonal(given: Operands, spec: ConvSpec) -> Tensor:
    """The diagonal of the weight's GGN."""
    s = given["S"]
    columns, batch = s.shape[:2]
    s = s.reshape(columns, batch, spec.groups, spec.out_channels // spec.groups, -1)
    roots = torch.einsum("vngol,ngkl->vngok", s, patches(given["X"], spec))  # one matrix product for each n and g
    found = roots.square_().sum((0, 1))
    if spec.transposed:  # the weight has the input channels first
        found = found.unflatten(2, (spec.in_channels // spec.groups, -1)).transpose(1, 2)
    return found.reshape(spec.weight_shape)


WAYS = {
    way.__name__: way
    for way in (forward, input_vjp, weight_vjp, kfac_expand, kfac_reduce, per_example_weight_vjp, ggn_diagonal)
}
"""The standard implementation of each operation."""
