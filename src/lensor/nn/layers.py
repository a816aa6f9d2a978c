"""Convolutions, unfold and fold as torch modules, in any number of spatial dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.fx import Proxy, Tracer
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import handle_torch_function, has_torch_function_variadic

from lensor import functional
from lensor.choices import PaddingMode

Size: TypeAlias = int | Sequence[int]
Padding: TypeAlias = int | str | Sequence[int | tuple[int, int]]
Forward = TypeVar("Forward", bound=Callable[..., Tensor])


def _dimensions(dims: int | None, **sizes: Any) -> int:
    """The number of dimensions: the length of the first argument that is a sequence, or else `dims`."""
    for name, size in sizes.items():
        if isinstance(size, Sequence) and not isinstance(size, str):
            if dims is not None and dims != len(size):
                raise ValueError(f"{name} has {len(size)} entries, expected dims={dims}: {size}")
            dims = len(size)
    if dims is None:
        names = " or ".join(sizes)
        raise ValueError(f"dims is missing, expected the number of spatial dimensions, or a sequence as {names}")
    if dims < 1:
        raise ValueError(f"dims is {dims}, expected at least 1")
    return dims


def _each(name: str, value: Any, dims: int) -> tuple:
    """One entry per dimension."""
    if not isinstance(value, Sequence):
        return (value,) * dims
    if len(value) != dims:
        raise ValueError(f"{name} has {len(value)} entries, expected {dims}, one per dimension: {tuple(value)}")
    return tuple(tuple(entry) if isinstance(entry, Sequence) else entry for entry in value)


def _each_padding(padding: Padding, dims: int) -> str | tuple:
    return padding if isinstance(padding, str) else _each("padding", padding, dims)


def as_autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors (or None) in the dtype that an active `torch.autocast` uses for convolutions."""
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Any) -> Any:
        # As in torch, double precision and complex numbers are not cast.
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return tuple(map(cast, tensors))


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Padding,
    dilation: Size,
    groups: int,
    padding_mode: PaddingMode,
) -> Tensor:
    """The convolution of a layer. Torch function modes and tensor subclasses can override it."""
    if has_torch_function_variadic(input, weight):
        arguments = (input, weight, bias, stride, padding, dilation, groups, padding_mode)
        return handle_torch_function(convolve, (input, weight), *arguments)
    input, weight, bias = as_autocast(input, weight, bias)
    return functional.conv(input, weight, bias, stride, padding, dilation, groups, padding_mode=padding_mode)


def convolve_transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Padding,
    output_padding: Size,
    groups: int,
    dilation: Size,
) -> Tensor:
    """The transposed convolution of a layer; it can be overridden like `convolve`."""
    if has_torch_function_variadic(input, weight):
        arguments = (input, weight, bias, stride, padding, output_padding, groups, dilation)
        return handle_torch_function(convolve_transposed, (input, weight), *arguments)
    input, weight, bias = as_autocast(input, weight, bias)
    return functional.conv_transpose(input, weight, bias, stride, padding, output_padding, groups, dilation)


def typed(forward: Forward) -> Forward:
    """Annotate a method with torch's tensor type instead of the type's name, because torch.fx copies annotations."""
    names = forward.__annotations__
    names.update({name: Tensor for name, kind in names.items() if kind == "Tensor"})
    return forward


class Leaf:
    """Mixin that makes a module a leaf of torch.fx graphs, like torch's own layers; list it before the module's class.

    Tracers recognise torch's modules as leaves by their names, and trace through all other modules. Tracing through a
    layer would freeze its hooks, mode and parametrized values.
    """

    def _call_impl(self: Any, *args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Proxy) and isinstance(argument.tracer, Tracer):
                tracer = argument.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return super()._call_impl(*args, **kwargs)  # type: ignore[misc]


class Convolution(Leaf):
    """Mixin that makes Lensor compute a convolution; list it before torch's class."""

    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(input, weight, bias, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)

    @typed
    def forward(self: Any, input: Tensor) -> Tensor:
        """Convolve [batch, c_in, *input_size] or [c_in, *input_size]."""
        return self._conv_forward(input, self.weight, self.bias)


class TransposedConvolution(Leaf):
    """Mixin that makes Lensor compute a transposed convolution; list it before torch's class."""

    def forward(self: Any, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the layer; `output_size` is the desired spatial size, which determines `output_padding`."""
        output_padding = self.output_padding if output_size is None else output_padding_of(self, input, output_size)
        return convolve_transposed(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


def output_padding_of(module: Any, input: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
    """The output padding that results in a spatial size; ValueError if there is none."""
    dims = len(module.kernel_size)
    size = tuple(output_size)
    if len(size) == input.ndim:
        size = size[-dims:]
    paddings = [pad if isinstance(pad, Sequence) else (pad, pad) for pad in module.padding]
    least = tuple(
        (i - 1) * s - sum(p) + d * (k - 1) + 1
        for i, s, p, d, k in zip(
            input.shape[-dims:], module.stride, paddings, module.dilation, module.kernel_size, strict=True
        )
    )
    most = tuple(smallest + s - 1 for smallest, s in zip(least, module.stride, strict=True))
    if len(size) != dims or not all(a <= found <= b for a, found, b in zip(least, size, most, strict=True)):
        raise ValueError(
            f"output_size is {tuple(output_size)}, expected a spatial size from {least} to {most} for an input of"
            f" shape {tuple(input.shape)}"
        )
    return tuple(found - smallest for found, smallest in zip(size, least, strict=True))


class Conv1d(Convolution, torch.nn.Conv1d):
    """`torch.nn.Conv1d` computed by Lensor.

    Example:
        >>> import torch, lensor.nn
        >>> layer = lensor.nn.Conv1d(2, 4, kernel_size=3, stride=2)
        >>> layer(torch.zeros(1, 2, 9)).shape
        torch.Size([1, 4, 4])
    """


class Conv2d(Convolution, torch.nn.Conv2d):
    """`torch.nn.Conv2d` computed by Lensor.

    Example:
        >>> import torch, lensor.nn
        >>> layer = lensor.nn.Conv2d(2, 4, kernel_size=3, stride=2)
        >>> layer(torch.zeros(1, 2, 9, 9)).shape
        torch.Size([1, 4, 4, 4])
    """


class Conv3d(Convolution, torch.nn.Conv3d):
    """`torch.nn.Conv3d` computed by Lensor.

    Example:
        >>> import torch, lensor.nn
        >>> layer = lensor.nn.Conv3d(2, 4, kernel_size=3, stride=2)
        >>> layer(torch.zeros(1, 2, 9, 9, 9)).shape
        torch.Size([1, 4, 4, 4, 4])
    """


class ConvTranspose1d(TransposedConvolution, torch.nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` computed by Lensor.

    Example:
        >>> import torch, lensor.nn
        >>> layer = lensor.nn.ConvTranspose1d(2, 4, kernel_size=3, stride=2)
        >>> layer(torch.zeros(1, 2, 9)).shape
        torch.Size([1, 4, 19])
    """


class ConvTranspose2d(TransposedConvolution, torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` computed by Lensor.

    Example:
        >>> import torch, lensor.nn
        >>> layer = lensor.nn.ConvTranspose2d(2, 4, kernel_size=3, stride=2)
        >>> layer(torch.zeros(1, 2, 9, 9)).shape
        torch.Size([1, 4, 19, 19])
    """


class ConvTranspose3d(TransposedConvolution, torch.nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` computed by Lensor.

    Example:
        >>> import torch, lensor.nn
        >>> layer = lensor.nn.ConvTranspose3d(2, 4, kernel_size=3, stride=2)
        >>> layer(torch.zeros(1, 2, 9, 9, 9)).shape
        torch.Size([1, 4, 19, 19, 19])
    """


class ConvNd(Convolution, _ConvNd):
    """Convolution in any number of spatial dimensions; parameters, state_dict and initialisation as in torch.

    Use `Conv1d`, `Conv2d` or `Conv3d` for one to three dimensions.

    Example:
        >>> import torch, lensor.nn
        >>> layer = lensor.nn.ConvNd(2, 4, kernel_size=3, padding="same", dims=4)
        >>> layer(torch.zeros(1, 2, 5, 5, 5, 5)).shape
        torch.Size([1, 4, 5, 5, 5, 5])

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: one int, or one per dimension.
        stride: one int, or one per dimension.
        padding: an int, "same", "valid", one int or one (left, right) pair per dimension.
        dilation: one int, or one per dimension.
        groups: number of channel groups.
        bias: whether to learn a bias.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        device: device of the parameters.
        dtype: dtype of the parameters.
        dims: number of spatial dimensions, if `kernel_size` is an int.

    Raises:
        ValueError: for inconsistent hyper-parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        dims: int | None = None,
    ) -> None:
        dims = _dimensions(dims, kernel_size=kernel_size)
        super().__init__(
            in_channels,
            out_channels,
            _each("kernel_size", kernel_size, dims),
            _each("stride", stride, dims),
            _each_padding(padding, dims),
            _each("dilation", dilation, dims),
            False,
            (0,) * dims,
            groups,
            bias,
            padding_mode,  # pyright: ignore[reportArgumentType]
            device=device,
            dtype=dtype,
        )


class ConvTransposeNd(TransposedConvolution, _ConvTransposeNd):
    """Transposed convolution in any number of spatial dimensions; parameters and initialisation as in torch.

    Use `ConvTranspose1d`, `ConvTranspose2d` or `ConvTranspose3d` for one to three dimensions.

    Example:
        >>> import torch, lensor.nn
        >>> layer = lensor.nn.ConvTransposeNd(4, 2, kernel_size=2, stride=2, dims=4)
        >>> layer(torch.zeros(1, 4, 3, 3, 3, 3)).shape
        torch.Size([1, 2, 6, 6, 6, 6])

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: one int, or one per dimension.
        stride: one int, or one per dimension.
        padding: an int, one int or one (left, right) pair per dimension.
        output_padding: one int, or one per dimension, less than the larger of stride and dilation.
        groups: number of channel groups.
        bias: whether to learn a bias.
        dilation: one int, or one per dimension.
        padding_mode: "zeros", the only choice.
        device: device of the parameters.
        dtype: dtype of the parameters.
        dims: number of spatial dimensions, if `kernel_size` is an int.

    Raises:
        ValueError: for inconsistent hyper-parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        dims: int | None = None,
    ) -> None:
        dims = _dimensions(dims, kernel_size=kernel_size)
        if isinstance(padding, str):
            raise ValueError(f"padding is {padding!r}, expected ints for a transposed convolution")
        super().__init__(
            in_channels,
            out_channels,
            _each("kernel_size", kernel_size, dims),
            _each("stride", stride, dims),
            _each("padding", padding, dims),
            _each("dilation", dilation, dims),
            True,
            _each("output_padding", output_padding, dims),
            groups,
            bias,
            padding_mode,  # pyright: ignore[reportArgumentType]
            device=device,
            dtype=dtype,
        )


class _Patches(Leaf, torch.nn.Module):
    """Base class of unfold and fold."""

    def __init__(
        self, dims: int, kernel_size: Size, dilation: Size, padding: Padding, stride: Size, padding_mode: PaddingMode
    ) -> None:
        super().__init__()
        self.kernel_size = _each("kernel_size", kernel_size, dims)
        self.dilation = _each("dilation", dilation, dims)
        self.padding = _each_padding(padding, dims)
        self.stride = _each("stride", stride, dims)
        self.padding_mode: PaddingMode = padding_mode

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return (
            f"kernel_size={self.kernel_size}, dilation={self.dilation}, padding={self.padding!r}, stride={self.stride}"
            f", padding_mode={self.padding_mode!r}"
        )


class UnfoldNd(_Patches):
    """Unfold an input into patches (im2col), in any number of spatial dimensions.

    Example:
        >>> import torch, lensor.nn
        >>> lensor.nn.UnfoldNd(2, dims=3)(torch.zeros(1, 4, 5, 5, 5)).shape
        torch.Size([1, 32, 64])

    Args:
        kernel_size: one int, or one per dimension.
        dilation: one int, or one per dimension.
        padding: an int, "same", "valid", one int or one (left, right) pair per dimension.
        stride: one int, or one per dimension.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        dims: number of spatial dimensions, if `kernel_size` is an int.

    Raises:
        ValueError: for inconsistent hyper-parameters.
    """

    def __init__(
        self,
        kernel_size: Size,
        dilation: Size = 1,
        padding: Padding = 0,
        stride: Size = 1,
        *,
        padding_mode: PaddingMode = "zeros",
        dims: int | None = None,
    ) -> None:
        dims = _dimensions(dims, kernel_size=kernel_size)
        super().__init__(dims, kernel_size, dilation, padding, stride, padding_mode)

    @typed
    def forward(self, input: Tensor) -> Tensor:
        """Map [batch, c, *input_size] to [batch, c·ΠK, ΠO]; the batch axis is optional."""
        return functional.unfold(
            input, self.kernel_size, self.dilation, self.padding, self.stride, padding_mode=self.padding_mode
        )


class FoldNd(_Patches):
    """Fold patches into an image (col2im), summing them at their positions, in any number of spatial dimensions.

    Example:
        >>> import torch, lensor.nn
        >>> lensor.nn.FoldNd(5, 2, dims=3)(torch.zeros(1, 32, 64)).shape
        torch.Size([1, 4, 5, 5, 5])

    Args:
        output_size: the spatial size of the result, one int or one per dimension.
        kernel_size: one int, or one per dimension.
        dilation: one int, or one per dimension.
        padding: an int, "same", "valid", one int or one (left, right) pair per dimension.
        stride: one int, or one per dimension.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        dims: number of spatial dimensions, if `output_size` and `kernel_size` are ints.

    Raises:
        ValueError: for inconsistent hyper-parameters.
    """

    def __init__(
        self,
        output_size: Size,
        kernel_size: Size,
        dilation: Size = 1,
        padding: Padding = 0,
        stride: Size = 1,
        *,
        padding_mode: PaddingMode = "zeros",
        dims: int | None = None,
    ) -> None:
        dims = _dimensions(dims, output_size=output_size, kernel_size=kernel_size)
        super().__init__(dims, kernel_size, dilation, padding, stride, padding_mode)
        self.output_size = _each("output_size", output_size, dims)

    @typed
    def forward(self, input: Tensor) -> Tensor:
        """Map [batch, c·ΠK, ΠO] to [batch, c, *output_size]; the batch axis is optional."""
        return functional.fold(
            input,
            self.output_size,
            self.kernel_size,
            self.dilation,
            self.padding,
            self.stride,
            padding_mode=self.padding_mode,
        )

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"output_size={self.output_size}, {super().extra_repr()}"
