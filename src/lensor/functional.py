"""Convolutions, their derivatives and their curvature as functions of arrays.

Argument names and their order follow `torch.nn.functional` and `torch.nn.grad`. All arrays passed to a function must
come from one framework, NumPy, torch or JAX; the result comes from the same framework. The number N of spatial
dimensions is taken from the weight's shape, else from the length of `kernel_size`, else from the input's shape, which
must then include a batch axis. `padding` is an int, "same", "valid", one int per dimension, or one (left, right) pair
per dimension.

Each function builds the network for its operation from shapes and hyper-parameters alone and evaluates it. The plan is
cached, so a later call with the same shapes and hyper-parameters reuses it.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

from lensor import ops
from lensor.arguments import described
from lensor.choices import Approx, FactorNormalisation, Form, PaddingMode
from lensor.conventions import CONVENTIONS
from lensor.dispatch import Array, Request, Shape, recipe
from lensor.errors import require_choice
from lensor.network import AnyNetwork
from lensor.pattern import as_positive
from lensor.spec import ConvSpec

__all__ = [
    "conv",
    "conv_input_vjp",
    "conv_transpose",
    "conv_weight_vjp",
    "conv_weight_vjp_per_example",
    "fold",
    "ggn_diagonal",
    "ggn_gram",
    "kfac_input_factor",
    "kfac_output_factor",
    "unfold",
    "unfold_transpose",
]

Size: TypeAlias = int | Sequence[int]

Padding: TypeAlias = int | str | Sequence[int | tuple[int, int]]


SHARED = {
    "stride": "one int, or one per dimension.",
    "dilation": "one int, or one per dimension.",
    "kernel_size": "one int, or one per dimension.",
    "padding": 'an int, "same", "valid", one int or one (left, right) pair per dimension.',
    "groups": "number of channel groups.",
    "padding_mode": '"zeros", "circular", "reflect" or "replicate".',
    "weight_size": "full shape of the weight, [c_out, c_in/groups, *kernel_size].",
}
"""Descriptions of arguments that appear in several functions."""


def _check_shape(name: str, found: Shape, expected: Shape, meaning: str) -> None:
    if found != expected:
        raise ValueError(f"{name} has shape {found}, expected {expected}: {meaning}")


def _found(name: str, shape: Shape) -> str:
    """The shape of an array, or the value of an argument `..._size` that is a shape itself, for an error message."""
    return f"{name} is {shape}" if name.endswith("_size") else f"{name} has shape {shape}"


def _axes(name: str) -> str:
    """The word for the entries of a shape in an error message."""
    return "entries" if name.endswith("_size") else "axes"


def _sizes(name: str, sizes: Any) -> Shape:
    """Convert a full shape that was passed as an argument to a tuple of ints."""
    try:
        return tuple(operator.index(size) for size in sizes)
    except TypeError:
        raise TypeError(f"{name} is {sizes!r}, expected a full shape (a sequence of ints)") from None


def _check_divides(groups: int, name: str, found: Shape, channels: int) -> None:
    if channels % groups:
        raise ValueError(f"{_found(name, found)} with {channels} channels, expected a multiple of groups={groups}")


def _is_unbatched(name: str, shape: Shape, dims: int, layout: str = "c_in, *input_size") -> bool:
    """Return whether a shape lacks the batch axis; raise ValueError unless it has N+1 or N+2 axes."""
    if len(shape) not in (dims + 1, dims + 2):
        raise ValueError(
            f"{_found(name, shape)} with {len(shape)} {_axes(name)}, expected {dims + 2} {_axes(name)}"
            f" [batch, {layout}] or {dims + 1} {_axes(name)} [{layout}] for {dims} spatial dimension{'s' * (dims > 1)}"
        )
    return len(shape) == dims + 1


def _check_batched(name: str, shape: Shape, dims: int) -> None:
    if dims < 1 or len(shape) != dims + 2:
        raise ValueError(
            f"{name} has shape {shape} with {len(shape)} axes, expected [batch, c_in, *input_size]"
            + (f" with {dims} spatial dimension{'s' * (dims > 1)}" if dims > 0 else "")
        )


def _spec(input_name: str, input_size: Shape, in_channels: int, out_channels: int, **hyper: Any) -> ConvSpec:
    """Create a spec; if a spatial size is 0, raise an error that names `input_name`."""
    if 0 in input_size:
        raise ValueError(f"{input_name} has spatial size {input_size}, expected at least 1 in every dimension")
    return ConvSpec(in_channels, out_channels, input_size, **hyper)


def _check_not_empty(input: Shape) -> None:
    if input[0] == 0:
        raise ValueError(f"input has shape {input} with an empty batch, expected at least one example")


class _Layer(NamedTuple):
    """A convolution, with the full shapes of its input and output, including the batch axis."""

    spec: ConvSpec
    input: Shape
    output: Shape
    unbatched: bool

    def check_cotangent(self, name: str, found: Shape) -> None:
        """Raise ValueError unless `found` is the output shape, without a batch axis if the input is unbatched."""
        layout = "[c_out, *output_size]" if self.unbatched else "[batch, c_out, *output_size]"
        _check_shape(name, found, self.output[self.unbatched :], layout)

    def check_stack(self, name: str, found: Shape) -> Shape:
        """Return `found`; raise ValueError unless it is the shape of a stack of cotangents."""
        if len(found) != len(self.output) + 1 or found[1:] != self.output:
            expected = f"(v, {', '.join(map(str, self.output))})"
            raise ValueError(f"{name} has shape {found}, expected {expected}: [v, batch, c_out, *output_size]")
        return found


def _layer(
    input: Shape,
    weight: Shape,
    stride: Size,
    padding: Padding,
    dilation: Size,
    groups: int,
    padding_mode: PaddingMode,
    *,
    names: tuple[str, str] = ("input", "weight"),
    batched: bool = False,
    bias: bool = False,
) -> _Layer:
    """The convolution of an input and a weight with these shapes; error messages refer to them as `names`."""
    input_name, weight_name = names
    if len(weight) < 3:
        raise ValueError(
            f"{_found(weight_name, weight)} with {len(weight)} {_axes(weight_name)}, expected at least 3"
            f" {_axes(weight_name)} [c_out, c_in/groups, *kernel_size]"
        )
    dims = len(weight) - 2
    if batched:
        _check_batched(input_name, input, dims)
    unbatched = _is_unbatched(input_name, input, dims)
    groups = as_positive(groups, "groups")
    in_channels, out_channels = input[-dims - 1], weight[0]
    if in_channels != weight[1] * groups:
        raise ValueError(
            f"{_found(input_name, input)} with {in_channels} channels, expected {weight[1] * groups} for"
            f" {weight_name} of shape {weight} and groups={groups}"
        )
    _check_divides(groups, weight_name, weight, out_channels)
    spec = _spec(
        input_name,
        input[-dims:],
        in_channels,
        out_channels,
        kernel_size=weight[2:],
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        bias=bias,
    )
    full = (1, *input) if unbatched else input
    return _Layer(spec, full, (full[0], out_channels, *spec.output_size), unbatched)


def _dims_of(kernel_size: Size, input: Shape) -> int:
    """Take N from the length of `kernel_size`, else from the input's shape, assumed to include a batch axis."""
    return len(kernel_size) if isinstance(kernel_size, Sequence) else len(input) - 2


def _patches(
    input: Shape, kernel_size: Size, groups: int = 1, *, batched: bool = False, **hyper: Any
) -> tuple[ConvSpec, Shape, bool]:
    """The spec for an operation without a weight, the batched input shape, and whether the input is unbatched."""
    dims = _dims_of(kernel_size, input)
    if batched or dims < 1:
        _check_batched("input", input, dims)
    unbatched = _is_unbatched("input", input, dims)
    groups = as_positive(groups, "groups")
    channels = input[-dims - 1]
    _check_divides(groups, "input", input, channels)
    # The number of output channels does not affect the result.
    spec = _spec("input", input[-dims:], channels, groups, kernel_size=kernel_size, groups=groups, **hyper)
    return spec, (1, *input) if unbatched else input, unbatched


def _join_positions(net: AnyNetwork) -> AnyNetwork:
    """Join the spatial output legs into one, as `torch.nn.functional.unfold` does."""
    first, second, *positions = net.output
    legs = (first, second, tuple(itertools.chain(*positions)))
    return net.regroup(" ".join(f"({' '.join(leg)})" if len(leg) != 1 else leg[0] for leg in legs))


@recipe("input", "weight", "bias")
def _conv(input: Shape, weight: Shape, bias: Shape | None, *options: Any) -> Request:
    layer = _layer(input, weight, *options, bias=bias is not None)
    shapes = {"X": layer.input, "W": weight}
    if bias is not None:
        _check_shape("bias", bias, weight[:1], "[c_out]")
        shapes["b"] = bias
    return Request(ops.conv(layer.spec), shapes, layer.unbatched, spec=layer.spec)


@described(SHARED)
def conv(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    padding_mode: PaddingMode = "zeros",
) -> Array:
    """Convolution in N dimensions.

    Example:
        >>> import numpy, lensor
        >>> x, w = numpy.ones((2, 4, 9)), numpy.ones((6, 2, 3))
        >>> lensor.functional.conv(x, w, stride=2, padding=1, groups=2).shape
        (2, 6, 5)

    Args:
        input: [batch, c_in, *input_size] or [c_in, *input_size].
        weight: [c_out, c_in/groups, *kernel_size].
        bias: [c_out].

    Returns:
        [batch, c_out, *output_size], without the batch axis if the input has none.

    Raises:
        TypeError: if the arrays differ in framework or dtype, or if the dtype is not floating-point.
        ValueError: if shapes or hyper-parameters are incompatible.

    Equation:
        `n (g c_in) i, i o k, (g c_out) c_in k -> n (g c_out) o`, plus the bias (Hayashi et al., 2019; table 1 of the
        paper).
    """
    arrays = (input, weight) if bias is None else (input, weight, bias)
    return _conv(arrays, stride, padding, dilation, groups, padding_mode)


@recipe("input", "weight", "bias")
def _conv_transpose(
    input: Shape,
    weight: Shape,
    bias: Shape | None,
    stride: Size,
    padding: Padding,
    output_padding: Size,
    groups: int,
    dilation: Size,
) -> Request:
    if len(weight) < 3:
        raise ValueError(
            f"weight has shape {weight} with {len(weight)} axes, expected at least 3 axes"
            " [c_in, c_out/groups, *kernel_size]"
        )
    dims = len(weight) - 2
    unbatched = _is_unbatched("input", input, dims)
    groups = as_positive(groups, "groups")
    in_channels = input[-dims - 1]
    if in_channels != weight[0]:
        raise ValueError(
            f"input has shape {input} with {in_channels} channels, expected {weight[0]} for weight of shape {weight}"
        )
    _check_divides(groups, "weight", weight, in_channels)
    spec = _spec(
        "input",
        input[-dims:],
        in_channels,
        weight[1] * groups,
        kernel_size=weight[2:],
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        transposed=True,
        output_padding=output_padding,
        bias=bias is not None,
    )
    shapes = {"X": (1, *input) if unbatched else input, "W": weight}
    if bias is not None:
        _check_shape("bias", bias, (weight[1] * groups,), "[c_out]")
        shapes["b"] = bias
    return Request(ops.conv_transpose(spec), shapes, unbatched, spec=spec)


@described(SHARED)
def conv_transpose(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Size = 1,
    padding: Padding = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Array:
    """Transposed convolution in N dimensions, with zero padding only.

    If you know the input size of the convolution that you want to transpose, use `conv_input_vjp` instead.

    Example:
        >>> import numpy, lensor
        >>> x, w = numpy.ones((2, 4, 5)), numpy.ones((4, 3, 3))
        >>> lensor.functional.conv_transpose(x, w, stride=2, padding=1, output_padding=1, groups=2).shape
        (2, 6, 10)

    Args:
        input: [batch, c_in, *input_size] or [c_in, *input_size].
        weight: [c_in, c_out/groups, *kernel_size].
        bias: [c_out].
        padding: an int, one int or one (left, right) pair per dimension.
        output_padding: one int, or one per dimension, less than the larger of stride and dilation.

    Returns:
        [batch, c_out, *output_size], without the batch axis if the input has none.

    Raises:
        TypeError: if the arrays differ in framework or dtype, or if the dtype is not floating-point.
        ValueError: if shapes or hyper-parameters are incompatible.

    Equation:
        `(g c_in) c_out k, i o k, n (g c_in) o -> n (g c_out) i`: the input VJP of a convolution (table 1 of the
        paper).
    """
    arrays = (input, weight) if bias is None else (input, weight, bias)
    return _conv_transpose(arrays, stride, padding, output_padding, groups, dilation)


@recipe("input")
def _unfold(
    input: Shape, kernel_size: Size, dilation: Size, padding: Padding, stride: Size, padding_mode: PaddingMode
) -> Request:
    spec, shape, unbatched = _patches(
        input, kernel_size, dilation=dilation, padding=padding, stride=stride, padding_mode=padding_mode
    )
    return Request(_join_positions(ops.unfold(spec)), {"X": shape}, unbatched)


@described(SHARED)
def unfold(
    input: Array,
    kernel_size: Size,
    dilation: Size = 1,
    padding: Padding = 0,
    stride: Size = 1,
    *,
    padding_mode: PaddingMode = "zeros",
) -> Array:
    """Extract the patches of an input (im2col).

    Example:
        >>> import numpy, lensor
        >>> lensor.functional.unfold(numpy.arange(5.0).reshape(1, 1, 5), kernel_size=2)
        array([[[0., 1., 2., 3.],
                [1., 2., 3., 4.]]])

    Args:
        input: [batch, c_in, *input_size], or [c_in, *input_size] if `kernel_size` is a sequence.

    Returns:
        [batch, c_in·ΠK, ΠO], without the batch axis if the input has none.

    Raises:
        TypeError: if the dtype is not floating-point.
        ValueError: if the shape and hyper-parameters are incompatible.

    Equation:
        `n c_in i, i o k -> n (c_in k) o` (table 1 of the paper).
    """
    return _unfold((input,), kernel_size, dilation, padding, stride, padding_mode)


def _fold_dims(output_size: Size, kernel_size: Size, count: Callable[[int], Sequence[int]], positions: int) -> int:
    """Take N from the length of a sequence, else find the N that gives this number of positions.

    If `output_size` or `kernel_size` is a sequence, N is its length. Otherwise, N is the first of 2 (as in torch), 1,
    3, 4, ... for which the number of patches equals `positions`, or 2 if there is none.
    """
    for size in (output_size, kernel_size):
        if isinstance(size, Sequence):
            return len(size)
    return next((dims for dims in (2, 1, *range(3, 13)) if math.prod(count(dims)) == positions), 2)


@recipe("input")
def _fold(
    input: Shape,
    output_size: Size,
    kernel_size: Size,
    dilation: Size,
    padding: Padding,
    stride: Size,
    padding_mode: PaddingMode,
) -> Request:
    if len(input) not in (2, 3):
        raise ValueError(
            f"input has shape {input} with {len(input)} axes, expected 3 axes [batch, c·ΠK, ΠO] or 2 axes [c·ΠK, ΠO]"
        )
    unbatched = len(input) == 2
    batch, rows, positions = (1, *input) if unbatched else input

    def spec_for(dims: int, channels: int) -> ConvSpec:
        size = output_size if isinstance(output_size, Sequence) else (output_size,) * dims
        return _spec(
            "output_size",
            _sizes("output_size", size),
            channels,
            1,
            kernel_size=kernel_size,
            dilation=dilation,
            padding=padding,
            stride=stride,
            padding_mode=padding_mode,
        )

    dims = _fold_dims(output_size, kernel_size, lambda dims: spec_for(dims, 1).output_size, positions)
    spec = spec_for(dims, 1)
    if positions != math.prod(spec.output_size):
        raise ValueError(
            f"input has shape {input} with {positions} positions, expected {math.prod(spec.output_size)}: the product"
            f" of the numbers of patches in each dimension, {tuple(spec.output_size)}"
        )
    patch = math.prod(spec.kernel_size)
    if rows == 0 or rows % patch:
        raise ValueError(
            f"input has shape {input} with {rows} rows, expected a multiple of {patch}: the product of"
            f" kernel_size={tuple(spec.kernel_size)}"
        )
    spec = spec_for(dims, rows // patch)
    return Request(ops.fold(spec), {"V": (batch, rows, *spec.output_size)}, unbatched)


@described(SHARED)
def fold(
    input: Array,
    output_size: Size,
    kernel_size: Size,
    dilation: Size = 1,
    padding: Padding = 0,
    stride: Size = 1,
    *,
    padding_mode: PaddingMode = "zeros",
) -> Array:
    """Sum overlapping patches (col2im): the adjoint of `unfold` in every padding mode.

    Example:
        >>> import numpy, lensor
        >>> lensor.functional.fold(numpy.ones((1, 2, 4)), output_size=(5,), kernel_size=2)
        array([[[1., 2., 2., 2., 1.]]])

    Args:
        input: [batch, c·ΠK, ΠO] or [c·ΠK, ΠO].
        output_size: spatial size of the result, one int or one per dimension.

    Returns:
        [batch, c, *output_size], without the batch axis if the input has none.

    Raises:
        TypeError: if the dtype is not floating-point.
        ValueError: if the shape and hyper-parameters are incompatible.

    Equation:
        `n (c k) o, i o k -> n c i`.
    """
    return _fold((input,), output_size, kernel_size, dilation, padding, stride, padding_mode)


@recipe("input")
def _unfold_transpose(
    input: Shape, kernel_size: Size, stride: Size, padding: Padding, output_padding: Size, dilation: Size
) -> Request:
    spec, shape, unbatched = _patches(
        input,
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        transposed=True,
        output_padding=output_padding,
    )
    return Request(_join_positions(ops.unfold_transpose(spec)), {"X": shape}, unbatched)


@described(SHARED)
def unfold_transpose(
    input: Array,
    kernel_size: Size,
    stride: Size = 1,
    padding: Padding = 0,
    output_padding: Size = 0,
    dilation: Size = 1,
) -> Array:
    """Extract the patches that a transposed convolution multiplies by its kernel, with zero padding only.

    Example:
        >>> import numpy, lensor
        >>> lensor.functional.unfold_transpose(numpy.array([[[1.0, 2.0]]]), kernel_size=2, stride=2)
        array([[[1., 0., 2., 0.],
                [0., 1., 0., 2.]]])

    Args:
        input: [batch, c_in, *input_size], or [c_in, *input_size] if `kernel_size` is a sequence.
        padding: an int, one int or one (left, right) pair per dimension.
        output_padding: one int, or one per dimension, less than the larger of stride and dilation.

    Returns:
        [batch, c_in·ΠK, ΠI], where I is the output size of the transposed convolution, without the batch axis if the
        input has none.

    Raises:
        TypeError: if the dtype is not floating-point.
        ValueError: if the shape and hyper-parameters are incompatible.

    Equation:
        `n c_in o, i o k -> n (c_in k) i`.
    """
    return _unfold_transpose((input,), kernel_size, stride, padding, output_padding, dilation)


@recipe("weight", "grad_output")
def _conv_input_vjp(weight: Shape, grad_output: Shape, input_size: Any, *options: Any) -> Request:
    layer = _layer(_sizes("input_size", input_size), weight, *options, names=("input_size", "weight"))
    layer.check_cotangent("grad_output", grad_output)
    return Request(
        ops.conv_input_vjp(layer.spec), {"W": weight, "V": layer.output}, layer.unbatched, ("W",), layer.spec
    )


@described(SHARED)
def conv_input_vjp(
    input_size: Sequence[int],
    weight: Array,
    grad_output: Array,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    padding_mode: PaddingMode = "zeros",
) -> Array:
    """Gradient of a convolution with respect to its input.

    If you know the input size, use this function instead of `conv_transpose`.

    Example:
        >>> import numpy, lensor
        >>> w, v = numpy.ones((1, 1, 2)), numpy.ones((1, 1, 4))
        >>> lensor.functional.conv_input_vjp((1, 1, 5), w, v)
        array([[[1., 2., 2., 2., 1.]]])

    Args:
        input_size: full shape of the input, [batch, c_in, *input_size] or [c_in, *input_size].
        weight: [c_out, c_in/groups, *kernel_size].
        grad_output: [batch, c_out, *output_size], without the batch axis if the input has none.

    Returns:
        An array of shape `input_size`; complex weights are conjugated, as in torch.

    Raises:
        TypeError: if the arrays differ in framework or dtype, or if the dtype is not floating-point.
        ValueError: if shapes or hyper-parameters are incompatible.

    Equation:
        `(g c_out) c_in k, i o k, n (g c_out) o -> n (g c_in) i` (table 1 of the paper).
    """
    return _conv_input_vjp((weight, grad_output), input_size, stride, padding, dilation, groups, padding_mode)


@recipe("input", "grad_output")
def _conv_weight_vjp(input: Shape, grad_output: Shape, weight_size: Any, *options: Any) -> Request:
    layer = _layer(input, _sizes("weight_size", weight_size), *options, names=("input", "weight_size"))
    layer.check_cotangent("grad_output", grad_output)
    shapes = {"X": layer.input, "V": layer.output}
    return Request(ops.conv_weight_vjp(layer.spec), shapes, conjugate=("X",), spec=layer.spec)


@described(SHARED)
def conv_weight_vjp(
    input: Array,
    weight_size: Sequence[int],
    grad_output: Array,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    padding_mode: PaddingMode = "zeros",
) -> Array:
    """Gradient of a convolution with respect to its weight, summed over the batch.

    Example:
        >>> import numpy, lensor
        >>> x, v = numpy.arange(5.0).reshape(1, 1, 5), numpy.ones((1, 1, 4))
        >>> lensor.functional.conv_weight_vjp(x, (1, 1, 2), v)
        array([[[ 6., 10.]]])

    Args:
        input: [batch, c_in, *input_size] or [c_in, *input_size].
        grad_output: [batch, c_out, *output_size], without the batch axis if the input has none.

    Returns:
        An array of shape `weight_size`; a complex input is conjugated, as in torch.

    Raises:
        TypeError: if the arrays differ in framework or dtype, or if the dtype is not floating-point.
        ValueError: if shapes or hyper-parameters are incompatible.

    Equation:
        `n (g c_in) i, i o k, n (g c_out) o -> (g c_out) c_in k` (table 1 of the paper).
    """
    return _conv_weight_vjp((input, grad_output), weight_size, stride, padding, dilation, groups, padding_mode)


@recipe("input", "grad_output")
def _conv_weight_vjp_per_example(input: Shape, grad_output: Shape, weight_size: Any, *options: Any) -> Request:
    layer = _layer(input, _sizes("weight_size", weight_size), *options, names=("input", "weight_size"), batched=True)
    layer.check_cotangent("grad_output", grad_output)
    return Request(ops.conv_weight_vjp_per_example(layer.spec), {"X": layer.input, "V": layer.output}, conjugate=("X",))


@described(SHARED)
def conv_weight_vjp_per_example(
    input: Array,
    weight_size: Sequence[int],
    grad_output: Array,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    padding_mode: PaddingMode = "zeros",
) -> Array:
    """Gradient of a convolution with respect to its weight, for each example of a batch.

    Example:
        >>> import numpy, lensor
        >>> x, v = numpy.arange(10.0).reshape(2, 1, 5), numpy.ones((2, 1, 4))
        >>> lensor.functional.conv_weight_vjp_per_example(x, (1, 1, 2), v)[:, 0, 0]
        array([[ 6., 10.],
               [26., 30.]])

    Args:
        input: [batch, c_in, *input_size].
        grad_output: [batch, c_out, *output_size].

    Returns:
        [batch, *weight_size]; a complex input is conjugated, as in torch.

    Raises:
        TypeError: if the arrays differ in framework or dtype, or if the dtype is not floating-point.
        ValueError: if shapes or hyper-parameters are incompatible.

    Equation:
        `n (g c_in) i, i o k, n (g c_out) o -> n (g c_out) c_in k`: the weight VJP without the sum over `n`.
    """
    options = (weight_size, stride, padding, dilation, groups, padding_mode)
    return _conv_weight_vjp_per_example((input, grad_output), *options)


def _convert(
    net: AnyNetwork, side: str, approx: Approx, convention: FactorNormalisation, groups: int, positions: int
) -> tuple[AnyNetwork, bool]:
    """Rescale the paper's factor to a different convention; also return whether the scale changed."""
    require_choice("convention", convention, tuple(CONVENTIONS))
    known = CONVENTIONS[convention]
    powers = getattr(known, side).get(approx)
    if powers is None:
        raise ValueError(f"convention={convention!r} has no {side} factor with approx={approx!r}, expected 'paper'")
    if groups > 1 and not known.grouped:
        raise ValueError(f"convention={convention!r} has no factors per group, expected 'paper' for groups={groups}")
    if not any(powers):
        return net, False
    batch_power, position_power = powers
    return net.scaled(Fraction(positions) ** position_power, {"n": batch_power} if batch_power else {}), True


@recipe("input", real=True)
def _kfac_input_factor(
    input: Shape,
    kernel_size: Size,
    stride: Size,
    padding: Padding,
    dilation: Size,
    groups: int,
    approx: Approx,
    transposed: bool,
    output_padding: Size,
    convention: FactorNormalisation,
    form: Form,
    padding_mode: PaddingMode,
) -> Request:
    require_choice("approx", approx, ("expand", "reduce"))
    require_choice("form", form, ("factor", "root"))
    if form == "root" and approx != "reduce":
        raise ValueError(
            f"form='root' with approx={approx!r}, expected approx='reduce': only this factor has such a root"
        )
    spec, shape, _ = _patches(
        input,
        kernel_size,
        groups,
        batched=True,
        stride=stride,
        padding=padding,
        dilation=dilation,
        transposed=transposed,
        output_padding=output_padding,
        padding_mode=padding_mode,
    )
    _check_not_empty(shape)
    net, scaled = _convert(
        ops.kfac_input_factor(spec, approx), "input", approx, convention, spec.groups, math.prod(spec.output_size)
    )
    if form == "root":
        if scaled:
            raise ValueError(f"form='root' with convention={convention!r}, expected convention='paper'")
        # A network's scale is rational, so use the double nearest to 1/√batch.
        net = ops.kfac_input_root(spec).scaled(Fraction(shape[0] ** -0.5))
    return Request(net, {"X": shape})


@described(SHARED)
def kfac_input_factor(
    input: Array,
    kernel_size: Size,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    approx: Approx = "expand",
    transposed: bool = False,
    output_padding: Size = 0,
    convention: FactorNormalisation = "paper",
    form: Form = "factor",
    padding_mode: PaddingMode = "zeros",
) -> Array:
    """Input-based KFAC factor of a convolution, one for each group.

    Example:
        >>> import numpy, lensor
        >>> x = numpy.ones((2, 4, 9, 9))
        >>> lensor.functional.kfac_input_factor(x, 3, stride=2, groups=2, approx="reduce").shape
        (2, 18, 18)
        >>> root = lensor.functional.kfac_input_factor(x, 3, stride=2, groups=2, approx="reduce", form="root")
        >>> root.shape
        (2, 2, 18)

    Args:
        input: [batch, c_in, *input_size].
        approx: "expand" (KFC) sums the outer products of all patches, "reduce" those of the examples' mean patches.
        transposed: whether the convolution is transposed (zero padding only).
        output_padding: output padding of a transposed convolution.
        convention: normalisation. "paper" divides by the batch size only; "curvlinops", "singd", "backpack", "asdl",
            "kfac-jax" and "kfac-pytorch" match these libraries, for one group and no bias, with this batch as the data
            set.
        form: "factor", or, with "reduce", "root": the mean patches divided by √batch; `root.mT @ root` is the factor.

    Returns:
        [groups, d, d] with d = c_in/groups·ΠK, or the root [groups, batch, d].

    Raises:
        TypeError: if the dtype is not real floating-point.
        ValueError: if shapes, hyper-parameters or choices are incompatible, or if the batch is empty.

    Equation:
        `n (g c) i, i o k, n (g c_) i_, i_ o k_ -> g (c k) (c_ k_)`/N. For "reduce" the second copy has `o_`, and the
        scale is 1/(N·O²) (table 1 of the paper; Grosse & Martens, 2016; Eschenhagen et al., 2023).
    """
    options = (kernel_size, stride, padding, dilation, groups, approx, transposed, output_padding)
    return _kfac_input_factor((input,), *options, convention, form, padding_mode)


@recipe("grad_output", real=True)
def _kfac_output_factor(
    grad_output: Shape, groups: int, approx: Approx, convention: FactorNormalisation, padding_mode: PaddingMode
) -> Request:
    require_choice("approx", approx, ("expand", "reduce"))
    if len(grad_output) < 4:
        raise ValueError(
            f"grad_output has shape {grad_output} with {len(grad_output)} axes, expected at least 4 axes"
            " [v, batch, c_out, *output_size]"
        )
    channels, positions = grad_output[2], grad_output[3:]
    groups = as_positive(groups, "groups")
    _check_divides(groups, "grad_output", grad_output, channels)
    # Only the output matters, so the spec may have kernel size 1.
    spec = _spec("grad_output", positions, groups, channels, kernel_size=1, groups=groups, padding_mode=padding_mode)
    net = ops.kfac_output_factor(spec, approx)
    net, _ = _convert(net, "output", approx, convention, groups, math.prod(positions))
    return Request(net, {"V": grad_output})


@described(SHARED)
def kfac_output_factor(
    grad_output: Array,
    groups: int = 1,
    *,
    approx: Approx = "expand",
    convention: FactorNormalisation = "paper",
    padding_mode: PaddingMode = "zeros",
) -> Array:
    """Gradient-based KFAC factor of a convolution, one for each group.

    Example:
        >>> import numpy, lensor
        >>> lensor.functional.kfac_output_factor(numpy.ones((10, 2, 6, 4, 4)), groups=2, approx="expand").shape
        (2, 3, 3)

    Args:
        grad_output: [v, batch, c_out, *output_size]: a square root of the loss Hessian, or gradients, backpropagated to
            the layer's output; must include the loss reduction.
        approx: "expand" averages the outer products of all vectors over the positions; "reduce" first sums each
            vector over the positions.
        convention: as in `kfac_input_factor`; "singd" does not define this factor.
        padding_mode: has no effect on this factor; accepted so that you can pass the same arguments to both functions.

    Returns:
        [groups, c_out/groups, c_out/groups].

    Raises:
        TypeError: if the dtype is not real floating-point.
        ValueError: if shapes or choices are incompatible.

    Equation:
        `v n (g c) o, v n (g c_) o -> g c c_`/O. For "reduce" the second copy has `o_`, and there is no factor 1/O
        (Eschenhagen et al., 2023).
    """
    return _kfac_output_factor((grad_output,), groups, approx, convention, padding_mode)


@recipe("input", "sqrt_ggn", real=True)
def _ggn_diagonal(input: Shape, sqrt_ggn: Shape, weight_size: Any, per_example: bool, *options: Any) -> Request:
    layer = _layer(input, _sizes("weight_size", weight_size), *options, names=("input", "weight_size"), batched=True)
    shapes = {"X": layer.input, "S": layer.check_stack("sqrt_ggn", sqrt_ggn)}
    return Request(ops.ggn_diagonal(layer.spec, per_example=per_example), shapes)


@described(SHARED)
def ggn_diagonal(
    input: Array,
    weight_size: Sequence[int],
    sqrt_ggn: Array,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    per_example: bool = False,
    padding_mode: PaddingMode = "zeros",
) -> Array:
    """Diagonal of the generalised Gauss-Newton matrix (GGN) of a convolution's weight.

    Example:
        >>> import numpy, lensor
        >>> x, s = numpy.ones((2, 4, 9)), numpy.ones((10, 2, 6, 7))
        >>> lensor.functional.ggn_diagonal(x, (6, 4, 3), s).shape
        (6, 4, 3)

    Args:
        input: [batch, c_in, *input_size].
        sqrt_ggn: [v, batch, c_out, *output_size]: a square root of the loss Hessian, backpropagated to the layer's
            output.
        per_example: whether to return one diagonal per example instead of their sum.

    Returns:
        An array of shape `weight_size`, or [batch, *weight_size].

    Raises:
        TypeError: if the arrays differ in framework or dtype, or if the dtype is not real floating-point.
        ValueError: if shapes or hyper-parameters are incompatible.

    Equation:
        `n (g c_in) i, i o k, v n (g c_out) o, n (g c_in) i_, i_ o_ k, v n (g c_out) o_ -> (g c_out) c_in k`: the sum
        over `v` and `n` of the squared per-example weight VJPs.
    """
    options = (bool(per_example), stride, padding, dilation, groups, padding_mode)
    return _ggn_diagonal((input, sqrt_ggn), weight_size, *options)


@recipe("input", "sqrt_ggn", real=True)
def _ggn_gram(input: Shape, sqrt_ggn: Shape, weight_size: Any, *options: Any) -> Request:
    layer = _layer(input, _sizes("weight_size", weight_size), *options, names=("input", "weight_size"), batched=True)
    return Request(ops.ggn_gram(layer.spec), {"X": layer.input, "S": layer.check_stack("sqrt_ggn", sqrt_ggn)})


@described(SHARED)
def ggn_gram(
    input: Array,
    weight_size: Sequence[int],
    sqrt_ggn: Array,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    padding_mode: PaddingMode = "zeros",
) -> Array:
    """Gram matrix of a convolution's weight GGN: the layer's empirical NTK.

    Its non-zero eigenvalues are those of the GGN. It is smaller than the GGN if v·batch < the number of weights.

    Example:
        >>> import numpy, lensor
        >>> x, s = numpy.ones((2, 4, 9)), numpy.ones((10, 2, 6, 7))
        >>> lensor.functional.ggn_gram(x, (6, 4, 3), s).shape
        (20, 20)

    Args:
        input: [batch, c_in, *input_size].
        sqrt_ggn: [v, batch, c_out, *output_size]: a square root of the loss Hessian, backpropagated to the layer's
            output.

    Returns:
        [v·batch, v·batch]: the inner products of the per-example weight VJPs of all vectors.

    Raises:
        TypeError: if the arrays differ in framework or dtype, or if the dtype is not real floating-point.
        ValueError: if shapes or hyper-parameters are incompatible.

    Equation:
        `n (g c_in) i, i o k, v n (g c_out) o, m (g c_in) i_, i_ o_ k, w m (g c_out) o_ -> (v n) (w m)`.
    """
    return _ggn_gram((input, sqrt_ggn), weight_size, stride, padding, dilation, groups, padding_mode)
