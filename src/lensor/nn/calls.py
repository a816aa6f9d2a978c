"""Reads calls to layer functions: torch's, Lensor's, and others registered with `register_layer_function`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lensor.cache import Cache
from lensor.choices import PaddingMode
from lensor.nn.layers import convolve, convolve_transposed
from lensor.spec import ConvSpec, known_spec

_specs = Cache(4096)


@dataclass(frozen=True, eq=False)
class LayerCall:
    """The arguments of one call of a convolution, a transposed convolution or a linear map.

    Args:
        kind: "conv", "conv_transpose" or "linear".
        input: the input as it was passed.
        weight: the weight.
        bias: the bias, or None.
        stride: stride; this and the following hyper-parameters are as they were passed, and unused for a linear map.
        padding: "same", "valid", ints or pairs.
        dilation: spacing of the kernel entries.
        groups: number of channel groups.
        padding_mode: padding mode.
        output_padding: output padding of a transposed convolution.
        inputs_first: whether the weight of a linear map has the layout [inputs, outputs].
    """

    kind: Literal["linear", "conv", "conv_transpose"]
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    padding_mode: PaddingMode = "zeros"
    output_padding: Any = 0
    inputs_first: bool = False

    @property
    def is_transposed(self) -> bool:
        """Whether the weight has the input channels first."""
        return self.kind == "conv_transpose" or self.inputs_first

    @property
    def dims(self) -> int:
        """Number of spatial dimensions of the kernel."""
        return self.weight.ndim - 2

    def spec(self, input_size: Sequence[int]) -> ConvSpec:
        """The convolution for inputs [batch, c_in, *input_size].

        A linear map is a convolution with kernel size 1, or without spatial dimensions. Additional spatial dimensions
        before those of the kernel get kernel size 1.
        """
        settings = self.stride, self.padding, self.dilation, self.groups, self.padding_mode, self.output_padding
        key = self.kind, self.inputs_first, self.weight.shape, self.bias is None, tuple(input_size), settings
        try:
            return _specs.get_or_make(key, lambda: self._spec(input_size))
        except TypeError:  # a list has no hash; other errors occur again
            return self._spec(input_size)

    def _spec(self, input_size: Sequence[int]) -> ConvSpec:
        first, second = self.weight.shape[:2]
        bias = self.bias is not None
        if self.kind == "linear":
            channels = (first, second) if self.inputs_first else (second, first)
            kernel = 1 if input_size else ()
            return known_spec(*channels, tuple(input_size), kernel, bias=bias, transposed=self.inputs_first)
        more = len(input_size) - self.dims
        transposed = self.kind == "conv_transpose"
        channels = (first, second * self.groups) if transposed else (second * self.groups, first)
        padding = self.padding
        if not isinstance(padding, str):
            padding = (0,) * more + _each(padding, self.dims)
        return known_spec(
            *channels,
            tuple(input_size),
            (1,) * more + tuple(self.weight.shape[2:]),
            stride=(1,) * more + _each(self.stride, self.dims),
            padding=padding,
            dilation=(1,) * more + _each(self.dilation, self.dims),
            groups=self.groups,
            padding_mode=self.padding_mode,
            bias=bias,
            transposed=transposed,
            output_padding=(0,) * more + _each(self.output_padding, self.dims),
        )


def _each(value: Any, dims: int) -> tuple:
    """One entry per dimension; torch also accepts a single entry for all dimensions."""
    if not isinstance(value, (tuple, list)):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
) -> LayerCall:
    return LayerCall("conv", input, weight, bias, stride, padding, dilation, groups, padding_mode)


def _conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> LayerCall:
    kind, mode = "conv_transpose", "zeros"
    return LayerCall(kind, input, weight, bias, stride, padding, dilation, groups, mode, output_padding)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LayerCall:
    return LayerCall("linear", input, weight, bias)


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> LayerCall | None:
    """A linear map if the added tensor is a bias: its entries belong to the columns of the second matrix."""
    is_layer = beta == alpha == 1 and out is None and input.shape == mat2.shape[1:]
    return LayerCall("linear", mat1, mat2, input, inputs_first=True) if is_layer else None


_FUNCTIONS: dict[Callable[..., Any], Callable[..., LayerCall | None]] = {
    torch.conv1d: _conv,
    torch.conv2d: _conv,
    torch.conv3d: _conv,
    convolve: _conv,
    torch.conv_transpose1d: _conv_transpose,
    torch.conv_transpose2d: _conv_transpose,
    torch.conv_transpose3d: _conv_transpose,
    convolve_transposed: _conv_transpose,
    torch.nn.functional.linear: _linear,
    torch.addmm: _addmm,
}


def register_layer_function(function: Callable[..., Any], read: Callable[..., LayerCall]) -> None:
    """Let `layer_call` read the arguments of another overridable function.

    Args:
        function: a function that calls `torch.overrides.handle_torch_function`.
        read: a function that takes the same arguments and returns the equivalent call.
    """
    _FUNCTIONS[function] = read


def layer_call(function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> LayerCall | None:
    """The call of a layer's function, or None for any other function.

    Example:
        >>> import torch
        >>> from lensor.nn.calls import layer_call
        >>> call = layer_call(torch.conv2d, (torch.zeros(1, 2, 5, 5), torch.zeros(4, 2, 3, 3)), {"padding": 1})
        >>> call.spec((5, 5))
        ConvSpec(2, 4, (5, 5), 3, padding=1)
    """
    read = _FUNCTIONS.get(function)
    return None if read is None else read(*arguments, **named)
