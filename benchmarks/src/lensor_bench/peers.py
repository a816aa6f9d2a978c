"""The same operations in other libraries, called as their users or their own code would call them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from lensor.spec import ConvSpec
from lensor_bench.standard import Operands

Tensor = torch.Tensor
Way = Callable[[Operands, ConvSpec], Callable[[], Tensor]]
"""Prepares a call from operands and a convolution; raises NotImplementedError for unsupported cases."""


# ------------------------------------------------------------------------------------------------------------ einconv
def _einconv_expression(operation: str, given: Operands, spec: ConvSpec) -> tuple[str, list[Tensor], tuple[int, ...]]:
    name = {"kfac_expand": "kfc"}.get(operation, operation)
    make = import_module(f"einconv.expressions.convNd_{name}").einsum_expression
    padding = _even(spec, "einconv")
    hyper = {"stride": spec.stride, "padding": padding, "dilation": spec.dilation, "groups": spec.groups}
    arguments: dict[str, tuple[Any, ...]] = {
        "forward": ("X", "W"),
        "input_vjp": ("W", "V", spec.input_size),
        "weight_vjp": ("X", "V", spec.kernel_size),
        "kfac_expand": ("X", spec.kernel_size),
        "kfac_reduce": ("X", spec.kernel_size),
    }
    return make(*(given[one] if isinstance(one, str) else one for one in arguments[operation]), **hyper)


def einconv(operation: str) -> Way:
    """Create, simplify and contract the expression at every call."""

    def way(given: Operands, spec: ConvSpec) -> Callable[[], Tensor]:
        def call() -> Tensor:
            equation, operands, shape = _einconv_expression(operation, given, spec)
            return torch.einsum(equation, *operands).reshape(shape)

        return call

    return way


def einconv_contract(operation: str) -> Way:
    """Contract an expression created and simplified beforehand: the remaining cost for a caller that reuses it."""

    def way(given: Operands, spec: ConvSpec) -> Callable[[], Tensor]:
        equation, operands, shape = _einconv_expression(operation, given, spec)
        return lambda: torch.einsum(equation, *operands).reshape(shape)

    return way


# ----------------------------------------------------------------------------------------------------------- BackPACK
def backpack_per_example_weight_vjp(given: Operands, spec: ConvSpec) -> Callable[[], Tensor]:
    """The function that BatchGrad calls for a convolution."""
    from backpack.core.derivatives.conv2d import Conv2DDerivatives  # type: ignore[import-not-found]

    module, derivatives, v = _module(spec, given, "BackPACK"), Conv2DDerivatives(), given["V"]
    return lambda: derivatives.param_mjp("weight", module, (), (v,), v, sum_batch=False)


def backpack_ggn_diagonal(given: Operands, spec: ConvSpec) -> Callable[[], Tensor]:
    """The function that DiagGGN calls for a convolution."""
    from backpack.extensions.secondorder.diag_ggn.conv2d import DiagGGNConv2d  # type: ignore[import-not-found]

    module, extension, s = _module(spec, given, "BackPACK"), DiagGGNConv2d(), given["S"]
    return lambda: extension.weight(None, module, (), (), s)


# ------------------------------------------------------------------------------------------------------------- Opacus
def opacus_per_example_weight_vjp(given: Operands, spec: ConvSpec) -> Callable[[], Tensor]:
    """The function that GradSampleModule calls for a convolution."""
    from opacus.grad_sample.conv import compute_conv_grad_sample  # type: ignore[import-not-found]

    module = _module(spec, given, "Opacus")
    return lambda: compute_conv_grad_sample(module, [given["X"]], given["V"])[module.weight]


def _even(spec: ConvSpec, name: str) -> tuple[int, ...]:
    if spec.padding_mode != "zeros" or any(left != right for left, right in spec.padding):
        found = f"{spec.padding_mode} {spec.padding}"
        raise NotImplementedError(f"padding is {found}, expected zeros of equal width on both sides for {name}")
    return tuple(left for left, _ in spec.padding)


def _module(spec: ConvSpec, given: Operands, name: str) -> Any:
    """A torch module with the input and output that a forward pass would have stored in it."""
    padding = _even(spec, name)
    if spec.ndim != 2:
        raise NotImplementedError(f"spec has {spec.ndim} spatial dimensions, expected two for {name}")
    x = given["X"]
    hyper: dict[str, Any] = {"kernel_size": spec.kernel_size, "stride": spec.stride, "padding": padding}
    hyper |= {"dilation": spec.dilation, "groups": spec.groups, "bias": False}
    module: Any = torch.nn.Conv2d(spec.in_channels, spec.out_channels, **hyper).to(x.device, x.dtype)
    module.input0 = x
    module.output = x.new_empty(1).expand(len(x), *spec.output_shape)  # only its shape is used
    return module
