"""The public operations for symbolic sizes, composed of torch operators.

Torch captures graphs for all sizes in `torch.export` with dynamic shapes, in `torch.compile` after a size has changed,
and in `torch.jit.trace`. If only the sizes of open indices are symbolic, such as the batch size, `lensor.dispatch` uses
a plan for all sizes if there is one. In all other cases, it uses the functions in this module. Each function has the
name, arguments and result of an operation in `lensor.functional`, and works for all sizes. Kernel sizes, strides,
paddings, dilations and groups are numbers. The numbers of examples, channels and positions may be symbolic, and the
functions impose no more constraints on them than torch's own layers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.fx.experimental.symbolic_shapes import has_static_value

from lensor.choices import Approx, FactorNormalisation, Form, PaddingMode
from lensor.conventions import CONVENTIONS
from lensor.errors import require_choice
from lensor.plan.steps import Convolution, Step
from lensor.spec import ConvSpec

Sizes: TypeAlias = Sequence[Any]
"""Integers, any of which may be symbolic."""

_CONVOLUTIONS = (None, torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)
_TRANSPOSED = (
    None,
    torch.nn.functional.conv_transpose1d,
    torch.nn.functional.conv_transpose2d,
    torch.nn.functional.conv_transpose3d,
)
_MODES = {"zeros": "constant"}
_MOST = 1 << 40
"""A spatial size larger than any hyper-parameter."""


def is_symbolic(arrays: Sequence[Any], options: Sequence[Any]) -> bool:
    """Whether a size of an array or a size in the options is symbolic."""
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]  # while tracing, every size is symbolic
        return True
    for array in arrays:
        for size in array.shape:
            if not has_static_value(size):
                return True
    for option in options:
        if isinstance(option, (tuple, list)):
            for entry in option:
                if not _is_known(entry):
                    return True
        elif not _is_known(option):
            return True
    return False


def _is_known(option: Any) -> bool:
    return not isinstance(option, (int, torch.SymInt)) or has_static_value(option)


def known_sizes(options: Any) -> Any:
    """Replace the symbolic sizes in nested options by None, and the others by ints."""
    if isinstance(options, (tuple, list)):
        return tuple([known_sizes(option) for option in options])
    if isinstance(options, bool) or not isinstance(options, (int, torch.SymInt)):
        return options
    return operator.index(options) if has_static_value(options) else None


def symbolic_sizes(options: Any) -> list[Any]:
    """The symbolic sizes in nested options."""
    if isinstance(options, (tuple, list)):
        return [size for option in options for size in symbolic_sizes(option)]
    return [] if _is_known(options) else [options]


def is_transformable(steps: Sequence[Step]) -> bool:
    """Whether sizes remain symbolic in derivatives and under `vmap`, where torch fixes those of gradients."""
    return not any(isinstance(step, Convolution) and step.kind != "forward" for step in steps)


def is_transformed(arrays: Sequence[Tensor]) -> bool:
    """Whether torch records the gradient of an operation on these tensors, or transforms it."""
    if _are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(array.requires_grad for array in arrays)


# ------------------------------------------------------------------------------------------------- hyper-parameters
class _Hyper(NamedTuple):
    """Hyper-parameters with one entry per dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    mode: str
    output_padding: tuple[int, ...]

    @property
    def span(self) -> tuple[int, ...]:
        """The distance between the first and the last position of a kernel."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def patch(self) -> int:
        """The number of kernel positions."""
        return math.prod(self.kernel)

    def padded(self, size: Sizes) -> Sizes:
        """A spatial size including the padding."""
        return [i + left + right for i, (left, right) in zip(size, self.padding, strict=True)]

    def positions(self, size: Sizes) -> Sizes:
        """The output size for a spatial size of the input."""
        sizes = zip(self.padded(size), self.span, self.stride, strict=True)
        return [(i - span - 1) // stride + 1 for i, span, stride in sizes]


@torch.compiler.assume_constant_result
def _checked(
    dims: int,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: PaddingMode,
    transposed: bool,
    output_padding: Any,
) -> tuple:
    """Normalise hyper-parameters, raising the same errors as for known sizes."""
    spec = ConvSpec(
        int(groups) if groups > 0 else 1,
        int(groups) if groups > 0 else 1,
        (_MOST,) * dims,
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
    )
    return (
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.dilation,
        spec.groups,
        spec.padding_mode,
        spec.output_padding,
    )


def _hyper(
    dims: int,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    *,
    transposed: bool = False,
    output_padding: Any = 0,
) -> _Hyper:
    found = _checked(
        dims,
        _numbers(kernel_size),
        _numbers(stride),
        _numbers(padding),
        _numbers(dilation),
        _numbers(groups),
        padding_mode,
        bool(transposed),
        _numbers(output_padding),
    )
    return _Hyper(*found)


def _numbers(option: Any) -> Any:
    """Replace symbolic values in an option by numbers, which specialises the graph to these numbers."""
    if isinstance(option, str):
        return option
    if isinstance(option, Sequence):
        return tuple([_numbers(entry) for entry in option])
    return operator.index(option)


# ------------------------------------------------------------------------------------------------------------ checks
def _require_shape(name: str, found: Sizes, expected: Sizes, meaning: str) -> None:
    if len(found) != len(expected) or any(a != b for a, b in zip(found, expected, strict=True)):
        raise ValueError(f"{name} has shape {tuple(found)}, expected {tuple(expected)}: {meaning}")


def _require_axes(name: str, count: int, dims: int, batched: bool = False) -> None:
    if dims < 1 or count not in ((dims + 2,) if batched else (dims + 1, dims + 2)):
        raise ValueError(
            f"{name} has {count} axes, expected {dims + 2} [batch, c_in, *input_size]"
            + ("" if batched else f" or {dims + 1} [c_in, *input_size]")
            + f" for {dims} spatial dimensions"
        )


def _dims_of_weight(name: str, weight: Sizes) -> int:
    if len(weight) < 3:
        raise ValueError(f"{name} has {len(weight)} axes, expected at least 3 [c_out, c_in/groups, *kernel_size]")
    return len(weight) - 2


# ----------------------------------------------------------------------------------------------------------- padding
def _padded(x: Tensor, h: _Hyper) -> Tensor:
    """Pad [batch, channels, *size]."""
    if not any(left or right for left, right in h.padding):
        return x
    if h.mode == "zeros" or len(h.padding) <= 3:
        widths = [width for sides in reversed(h.padding) for width in sides]
        return torch.nn.functional.pad(x, widths, _MODES.get(h.mode, h.mode))
    for axis, (left, right) in enumerate(h.padding, start=2):
        # torch pads at most three axes in these modes, so pad one axis at a time and flatten the other axes.
        rows = x.movedim(axis, -1)
        found = torch.nn.functional.pad(rows.reshape(1, -1, x.shape[axis]), (left, right), h.mode)
        x = found.reshape(*rows.shape[:-1], found.shape[-1]).movedim(-1, axis)
    return x


def _without_padding(x: Tensor, h: _Hyper) -> Tensor:
    """The adjoint of `_padded`, which sums all reads of each position."""
    for axis, (left, right) in enumerate(h.padding, start=2):
        if not left and not right:
            continue
        size = x.shape[axis] - left - right
        core = x.narrow(axis, left, size)
        before, after = x.narrow(axis, 0, left), x.narrow(axis, left + size, right)
        if h.mode == "circular":
            core = core + _between(before, axis, size - left, 0) + _between(after, axis, 0, size - right)
        elif h.mode == "reflect":
            core = core + _between(before.flip(axis), axis, 1, size - left - 1)
            core = core + _between(after.flip(axis), axis, size - right - 1, 1)
        elif h.mode == "replicate":
            core = core + _between(before.sum(axis, keepdim=True), axis, 0, size - 1)
            core = core + _between(after.sum(axis, keepdim=True), axis, size - 1, 0)
        x = core
    return x


def _between(x: Tensor, axis: int, before: Any, after: Any) -> Tensor:
    """Pad an axis with zeros at both ends."""
    return torch.nn.functional.pad(x, [*[0, 0] * (x.ndim - 1 - axis), before, after])


def _stuffed(x: Tensor, axis: int, step: int) -> Tensor:
    """Insert zeros between the positions of an axis, so that they are `step` apart."""
    if step == 1:
        return x
    x = _between(x.unsqueeze(axis + 1), axis + 1, 0, step - 1).flatten(axis, axis + 1)
    return x.narrow(axis, 0, x.shape[axis] - (step - 1))


# ------------------------------------------------------------------------------------------------ convolutions
def _every(x: Tensor, k: int, h: _Hyper, count: Any) -> Tensor:
    """Map a padded input [batch, channels, size, ...] to [batch·o, channels, ...] for position k of the first axis."""
    start = k * h.dilation[0]
    return x[:, :, start : start + (count - 1) * h.stride[0] + 1 : h.stride[0]].movedim(2, 1).flatten(0, 1)


def _inner(h: _Hyper) -> _Hyper:
    """The hyper-parameters without those of the first dimension."""
    return h._replace(kernel=h.kernel[1:], stride=h.stride[1:], padding=h.padding[1:], dilation=h.dilation[1:])


def _convolved(x: Tensor, w: Tensor, h: _Hyper) -> Tensor:
    """Convolve a padded input; beyond torch's three dimensions, sum over kernel positions of the first dimension."""
    convolve = _CONVOLUTIONS[w.ndim - 2] if w.ndim <= 5 else None
    if convolve is not None:
        return convolve(x, w, None, h.stride, 0, h.dilation, h.groups)
    count = (x.shape[2] - h.span[0] - 1) // h.stride[0] + 1
    found = sum([_convolved(_every(x, k, h, count), w[:, :, k], _inner(h)) for k in range(h.kernel[0])])
    return found.reshape(x.shape[0], count, *found.shape[1:]).movedim(1, 2)  # type: ignore[union-attr]


def _spread(v: Tensor, w: Tensor, h: _Hyper) -> Tensor:
    """The transposed convolution without padding, with (O−1)·S + D·(K−1) + 1 positions in each dimension."""
    convolve = _TRANSPOSED[w.ndim - 2] if w.ndim <= 5 else None
    if convolve is not None:
        return convolve(v, w, None, h.stride, 0, 0, h.groups, h.dilation)
    rows, span, found = v.movedim(2, 1), h.span[0], []
    for k in range(h.kernel[0]):
        part = _spread(rows.flatten(0, 1), w[:, :, k], _inner(h))
        part = part.reshape(v.shape[0], v.shape[2], *part.shape[1:]).movedim(1, 2)
        start = k * h.dilation[0]
        found.append(_between(_stuffed(part, 2, h.stride[0]), 2, start, span - start))
    return sum(found)  # type: ignore[return-value]


def _weight_gradient(x: Tensor, v: Tensor, size: Sizes, h: _Hyper, groups: Any) -> Tensor:
    """The weight gradient of a convolution with a padded input, for real numbers."""
    if len(size) <= 5:
        like, dims = x.new_empty(tuple(size)), len(size) - 2
        return torch.ops.aten.convolution_backward(
            v, x, like, None, h.stride, [0] * dims, h.dilation, False, [0] * dims, groups, [False, True, False]
        )[1]
    inner = [*size[:2], *size[3:]]
    rows, count = v.movedim(2, 1).flatten(0, 1), v.shape[2]
    found = [_weight_gradient(_every(x, k, h, count), rows, inner, _inner(h), groups) for k in range(h.kernel[0])]
    return torch.stack(found, 2)


def _bilinear(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Apply a bilinear function of real tensors to real or complex tensors."""
    if not a.is_complex():
        return function(a, b)
    real = function(a.real, b.real) - function(a.imag, b.imag)
    return torch.complex(real, function(a.real, b.imag) + function(a.imag, b.real))


# --------------------------------------------------------------------------------------------------------- operations
def conv(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: PaddingMode,
) -> Tensor:
    """`lensor.functional.conv`."""
    dims = _dims_of_weight("weight", w.shape)
    _require_axes("input", x.ndim, dims)
    h = _hyper(dims, w.shape[2:], stride, padding, dilation, groups, padding_mode)
    alike = h.mode == "zeros" and all(left == right for left, right in h.padding)
    if dims <= 3 and (alike or (h.mode == "zeros" and isinstance(padding, str))):
        sides = padding if isinstance(padding, str) else [left for left, _ in h.padding]
        return _CONVOLUTIONS[dims](x, w, bias, h.stride, sides, h.dilation, h.groups)  # type: ignore[misc]
    if dims <= 3 and x.ndim == dims + 2:
        return _CONVOLUTIONS[dims](_padded(x, h), w, bias, h.stride, 0, h.dilation, h.groups)  # type: ignore[misc]
    found = _convolved(_padded(x if x.ndim == dims + 2 else x[None], h), w, h)
    return _with_bias(found, bias, dims) if x.ndim == dims + 2 else _with_bias(found, bias, dims)[0]


def _with_bias(x: Tensor, bias: Tensor | None, dims: int) -> Tensor:
    if bias is None:
        return x
    _require_shape("bias", bias.shape, x.shape[1:2], "[c_out]")
    return x + bias.reshape(-1, *[1] * dims)


def conv_transpose(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Tensor:
    """`lensor.functional.conv_transpose`."""
    dims = _dims_of_weight("weight", w.shape)
    _require_axes("input", x.ndim, dims)
    extra = output_padding
    if is_symbolic((), (output_padding,)):  # from a module call with an output size
        output_padding = 0
    h = _hyper(dims, w.shape[2:], stride, padding, dilation, groups, transposed=True, output_padding=output_padding)
    if not isinstance(extra, Sequence):
        extra = (extra,) * dims
    if dims <= 3:
        sides = [min(left, right) for left, right in h.padding]
        function: Any = _TRANSPOSED[dims]
        found = function(x, w, bias, h.stride, sides, extra, h.groups, h.dilation)
        for axis, ((left, right), cut) in enumerate(zip(h.padding, sides, strict=True), start=found.ndim - dims):
            if left != right:
                found = found.narrow(axis, left - cut, found.shape[axis] - left - right + 2 * cut)
        return found
    found = _spread(x if x.ndim == dims + 2 else x[None], w, h)
    for axis, ((left, right), more) in enumerate(zip(h.padding, extra, strict=True), start=2):
        found = _between(found, axis, 0, more)
        found = found.narrow(axis, left, found.shape[axis] - left - right)
    return _with_bias(found, bias, dims) if x.ndim == dims + 2 else _with_bias(found, bias, dims)[0]


def _dims_of(kernel_size: Any, x: Tensor) -> int:
    return len(kernel_size) if isinstance(kernel_size, Sequence) else x.ndim - 2


def _windows(x: Tensor, h: _Hyper) -> Tensor:
    """The patches of a padded input, [batch, channels, *output_size, *kernel_size]."""
    for axis, (span, stride, dilation) in enumerate(zip(h.span, h.stride, h.dilation, strict=True), start=2):
        x = x.unfold(axis, span + 1, stride)[..., ::dilation]
    return x


def _windows_of_transposed(x: Tensor, h: _Hyper) -> Tensor:
    """The patches of a transposed convolution: reversed windows of its input with zeros inserted."""
    for axis, span in enumerate(h.span, start=2):
        at = axis - 2
        (left, right), more = h.padding[at], h.output_padding[at]
        x = _between(_stuffed(x, axis, h.stride[at]), axis, span, span + more)
        # Keep as many positions as there are outputs, plus the span.
        x = x.narrow(axis, left, x.shape[axis] - left - right)
        x = x.unfold(axis, span + 1, 1)[..., :: h.dilation[at]].flip(-1)
    return x


def _as_columns(windows: Tensor, dims: int) -> Tensor:
    """Convert [batch, channels, *positions, *kernel] to [batch, channels·ΠK, positions]."""
    kernel, positions = range(2 + dims, 2 + 2 * dims), range(2, 2 + dims)
    return windows.permute(0, 1, *kernel, *positions).flatten(2 + dims).flatten(1, 1 + dims)


def unfold(x: Tensor, kernel_size: Any, dilation: Any, padding: Any, stride: Any, padding_mode: PaddingMode) -> Tensor:
    """`lensor.functional.unfold`."""
    dims = _dims_of(kernel_size, x)
    _require_axes("input", x.ndim, dims)
    h = _hyper(dims, kernel_size, stride, padding, dilation, 1, padding_mode)
    if x.ndim == dims + 1:
        return _as_columns(_windows(_padded(x[None], h), h), dims)[0]
    return _as_columns(_windows(_padded(x, h), h), dims)


def unfold_transpose(
    x: Tensor, kernel_size: Any, stride: Any, padding: Any, output_padding: Any, dilation: Any
) -> Tensor:
    """`lensor.functional.unfold_transpose`."""
    dims = _dims_of(kernel_size, x)
    _require_axes("input", x.ndim, dims)
    h = _hyper(dims, kernel_size, stride, padding, dilation, transposed=True, output_padding=output_padding)
    if x.ndim == dims + 1:
        return _as_columns(_windows_of_transposed(x[None], h), dims)[0]
    return _as_columns(_windows_of_transposed(x, h), dims)


def fold(
    x: Tensor, output_size: Any, kernel_size: Any, dilation: Any, padding: Any, stride: Any, padding_mode: PaddingMode
) -> Tensor:
    """`lensor.functional.fold`."""
    if x.ndim not in (2, 3):
        raise ValueError(f"input has {x.ndim} axes, expected 3 [batch, c·ΠK, ΠO] or 2 [c·ΠK, ΠO]")
    if x.ndim == 2:
        return fold(x[None], output_size, kernel_size, dilation, padding, stride, padding_mode)[0]

    def hyper(dims: int) -> tuple[_Hyper, Sizes]:
        h = _hyper(dims, kernel_size, stride, padding, dilation, 1, padding_mode)
        return h, tuple(output_size) if isinstance(output_size, Sequence) else (output_size,) * dims

    dims = next((len(size) for size in (output_size, kernel_size) if isinstance(size, Sequence)), 0)
    for guess in (2, 1, *range(3, 13)) if dims == 0 else ():
        h, size = hyper(guess)
        if math.prod(h.positions(size)) == x.shape[2]:
            dims = guess
            break
    h, size = hyper(dims or 2)
    if len(size) != len(h.kernel):
        raise ValueError(f"output_size is {tuple(size)}, expected {len(h.kernel)} entries as in kernel_size")
    count = h.positions(size)
    if math.prod(count) != x.shape[2]:
        raise ValueError(
            f"input has {x.shape[2]} positions, expected {math.prod(count)}: the product of the numbers of patches in"
            f" each dimension, {tuple(count)}"
        )
    if x.shape[1] % h.patch != 0:
        raise ValueError(f"input has {x.shape[1]} rows, expected a multiple of {h.patch}: the product of {h.kernel}")
    return _without_padding(_overlapped(x, h.padded(size), count, h), h)


def _overlapped(x: Tensor, size: Sizes, count: Sizes, h: _Hyper) -> Tensor:
    """Sum overlapping patches [batch, channels·ΠK, ΠO] to [batch, channels, *size], one dimension at a time."""
    dims, (batch, rows, _) = len(h.kernel), x.shape
    if dims == 2:
        return torch.nn.functional.fold(x, tuple(size), h.kernel, h.dilation, 0, h.stride)
    x = x.reshape(batch, rows // h.patch, *h.kernel, *count)
    for at in range(dims):
        x = x.movedim((2, 2 + dims - at), (-2, -1))
        found = torch.nn.functional.fold(
            x.flatten(0, -3), (1, size[at]), (1, h.kernel[at]), (1, h.dilation[at]), 0, (1, h.stride[at])
        )
        x = found.reshape(*x.shape[:-2], size[at])
    return x


def conv_input_vjp(
    w: Tensor,
    v: Tensor,
    input_size: Sizes,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: PaddingMode,
) -> Tensor:
    """`lensor.functional.conv_input_vjp`."""
    dims = _dims_of_weight("weight", w.shape)
    _require_axes("input_size", len(input_size), dims)
    if len(input_size) == dims + 1:
        options = (stride, padding, dilation, groups, padding_mode)
        return conv_input_vjp(w, v[None], (1, *input_size), *options)[0]
    h = _hyper(dims, w.shape[2:], stride, padding, dilation, groups, padding_mode)
    size = input_size[2:]
    expected = (input_size[0], w.shape[0], *h.positions(size))
    _require_shape("grad_output", v.shape, expected, "[batch, c_out, *output_size]")
    if input_size[1] != w.shape[1] * h.groups:
        raise ValueError(f"input_size has {input_size[1]} channels, expected {w.shape[1] * h.groups} for the weight")
    found = _spread(v, w.conj(), h)
    for axis, whole in enumerate(h.padded(size), start=2):
        if h.stride[axis - 2] > 1:  # add the positions at the end that no kernel covers
            found = _between(found, axis, 0, whole - found.shape[axis])
    return _without_padding(found, h)


def _prepared(
    x: Tensor,
    v: Sizes,
    weight_size: Sizes,
    options: tuple[Any, Any, Any, int, PaddingMode],
    vectors: int = 0,
    batched: bool = True,
) -> tuple[Tensor, _Hyper]:
    """The padded input and the hyper-parameters for a weight gradient; check the cotangent's shape."""
    stride, padding, dilation, groups, padding_mode = options
    dims = _dims_of_weight("weight_size", weight_size)
    _require_axes("input", x.ndim, dims, batched)
    h = _hyper(dims, tuple(weight_size)[2:], stride, padding, dilation, groups, padding_mode)
    if x.shape[1] != weight_size[1] * h.groups or weight_size[0] % h.groups != 0:
        raise ValueError(
            f"input has {x.shape[1]} channels, expected {weight_size[1] * h.groups} for"
            f" weight_size={tuple(weight_size)} and groups={h.groups}, which must divide weight_size[0]"
        )
    name, layout = (
        ("sqrt_ggn", "[v, batch, c_out, *output_size]") if vectors else ("grad_output", "[batch, c_out, ...]")
    )
    expected = (*v[:vectors], x.shape[0], weight_size[0], *h.positions(x.shape[2:]))
    _require_shape(name, v, expected, layout)
    return _padded(x, h), h


def conv_weight_vjp(x: Tensor, v: Tensor, weight_size: Sizes, *options: Any) -> Tensor:
    """`lensor.functional.conv_weight_vjp`."""
    if x.ndim == len(weight_size) - 1:
        return conv_weight_vjp(x[None], v[None], weight_size, *options)
    x, h = _prepared(x, v.shape, weight_size, options)  # type: ignore[arg-type]
    return _bilinear(lambda x, v: _weight_gradient(x, v, weight_size, h, h.groups), x.conj(), v)


def conv_weight_vjp_per_example(x: Tensor, v: Tensor, weight_size: Sizes, *options: Any) -> Tensor:
    """`lensor.functional.conv_weight_vjp_per_example`, with each example treated as separate groups."""
    x, h = _prepared(x, v.shape, weight_size, options)  # type: ignore[arg-type]
    batch = x.shape[0]
    size = (batch * weight_size[0], *weight_size[1:])

    def gradient(x: Tensor, v: Tensor) -> Tensor:
        return _weight_gradient(x.flatten(0, 1)[None], v.flatten(0, 1)[None], size, h, batch * h.groups)

    return _bilinear(gradient, x.conj(), v).reshape(batch, *weight_size)


# ---------------------------------------------------------------------------------------------------------- curvature
def kfac_input_factor(
    x: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    approx: Approx,
    transposed: bool,
    output_padding: Any,
    convention: FactorNormalisation,
    form: Form,
    padding_mode: PaddingMode,
) -> Tensor:
    """`lensor.functional.kfac_input_factor`."""
    require_choice("approx", approx, ("expand", "reduce"))
    require_choice("form", form, ("factor", "root"))
    if form == "root" and (approx != "reduce" or convention != "paper"):
        raise ValueError(
            f"form='root' with approx={approx!r} and convention={convention!r}, expected approx='reduce' and"
            " convention='paper'"
        )
    dims = _dims_of(kernel_size, x)
    _require_axes("input", x.ndim, dims, batched=True)
    h = _hyper(
        dims,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        transposed=transposed,
        output_padding=output_padding,
    )
    if x.shape[1] % h.groups != 0:
        raise ValueError(f"input has {x.shape[1]} channels, expected a multiple of groups={h.groups}")
    if x.shape[0] == 0:
        raise ValueError("input has an empty batch, expected at least one example")
    windows = _windows_of_transposed(x, h) if transposed else _windows(_padded(x, h), h)
    batch, count = x.shape[0], math.prod(windows.shape[2 : 2 + dims])
    shape = (batch, h.groups, x.shape[1] // h.groups * h.patch)
    powers = _powers("input", approx, convention, h.groups)
    if approx == "expand":
        patches = _as_columns(windows, dims).reshape(*shape, count)
        return torch.einsum("ngdo,ngeo->gde", _scaled(patches / batch, powers, batch, count), patches)
    patches = windows.sum(tuple(range(2, 2 + dims))).reshape(shape) / count
    if form == "root":
        return patches.movedim(0, 1) / patches.new_full((), batch).sqrt()
    return torch.einsum("ngd,nge->gde", _scaled(patches / batch, powers, batch, count), patches)


def _powers(side: str, approx: Approx, convention: FactorNormalisation, groups: int) -> tuple[int, int]:
    """The powers of the numbers of examples and positions by which a convention multiplies the paper's factor."""
    require_choice("convention", convention, tuple(CONVENTIONS))
    known = CONVENTIONS[convention]
    powers = (known.input if side == "input" else known.output).get(approx)
    if powers is None:
        raise ValueError(f"convention={convention!r} has no {side} factor with approx={approx!r}, expected 'paper'")
    if groups > 1 and not known.grouped:
        raise ValueError(f"convention={convention!r} has no factors per group, expected 'paper' for groups={groups}")
    return powers


def _scaled(x: Tensor, powers: tuple[int, int], batch: Any, count: Any) -> Tensor:
    for power, size in zip(powers, (batch, count), strict=True):
        for _ in range(abs(power)):
            x = x / size if power < 0 else x * size
    return x


def kfac_output_factor(
    s: Tensor, groups: int, approx: Approx, convention: FactorNormalisation, padding_mode: PaddingMode
) -> Tensor:
    """`lensor.functional.kfac_output_factor`."""
    require_choice("approx", approx, ("expand", "reduce"))
    if s.ndim < 4:
        raise ValueError(f"grad_output has {s.ndim} axes, expected at least 4 [v, batch, c_out, *output_size]")
    groups = _hyper(s.ndim - 3, 1, 1, 0, 1, groups, padding_mode).groups
    powers = _powers("output", approx, convention, groups)
    if s.shape[2] % groups != 0:
        raise ValueError(f"grad_output has {s.shape[2]} channels, expected a multiple of groups={groups}")
    batch, count = s.shape[1], math.prod(s.shape[3:])
    s = s.flatten(3).reshape(*s.shape[:2], groups, s.shape[2] // groups, count)
    if approx == "expand":
        return torch.einsum("vngco,vngdo->gcd", _scaled(s / count, powers, batch, count), s)
    s = s.sum(-1)
    return torch.einsum("vngc,vngd->gcd", _scaled(s, powers, batch, count), s)


def _roots(x: Tensor, s: Tensor, weight_size: Sizes, options: tuple) -> Tensor:
    """The weight gradients for each example and vector, [v, batch, groups, c_out/groups, c_in/groups·ΠK]."""
    x, h = _prepared(x, s.shape, weight_size, options, vectors=1)
    dims = len(h.kernel)
    patches = _as_columns(_windows(x, h), dims).reshape(x.shape[0], h.groups, weight_size[1] * h.patch, -1)
    vectors = s.reshape(*s.shape[:2], h.groups, weight_size[0] // h.groups, -1)
    return torch.einsum("vngdo,ngco->vngdc", vectors, patches)


def ggn_diagonal(x: Tensor, s: Tensor, weight_size: Sizes, per_example: bool, *options: Any) -> Tensor:
    """`lensor.functional.ggn_diagonal`."""
    squares = _roots(x, s, weight_size, options).square()
    if per_example:
        return squares.sum(0).reshape(x.shape[0], *weight_size)
    return squares.sum((0, 1)).reshape(tuple(weight_size))


def ggn_gram(x: Tensor, s: Tensor, weight_size: Sizes, *options: Any) -> Tensor:
    """`lensor.functional.ggn_gram`."""
    roots = _roots(x, s, weight_size, options).flatten(2).flatten(0, 1)
    return roots @ roots.mT


LAYERS = ("_conv", "_conv_transpose")
"""Operations that never use plans for all sizes, so that exported programs contain torch's own layers."""

OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "_conv": conv,
    "_conv_transpose": conv_transpose,
    "_unfold": unfold,
    "_unfold_transpose": unfold_transpose,
    "_fold": fold,
    "_conv_input_vjp": conv_input_vjp,
    "_conv_weight_vjp": conv_weight_vjp,
    "_conv_weight_vjp_per_example": conv_weight_vjp_per_example,
    "_kfac_input_factor": kfac_input_factor,
    "_kfac_output_factor": kfac_output_factor,
    "_ggn_diagonal": ggn_diagonal,
    "_ggn_gram": ggn_gram,
}
"""The functions, keyed by the name of the operation's recipe in `lensor.functional`."""
