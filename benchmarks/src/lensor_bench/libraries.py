"""The quantities of one convolution, computed by Lensor and other libraries, each called as its users would call it.

Hyper-parameters are passed on unchanged, and a library for torch's modules gets a real module, even with
hyper-parameters that it does not support. Results are converted to a common shape and scale, but not changed otherwise.
Any error that a library raises is its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

import lensor
from lensor.choices import Approx
from lensor_bench.definitions import Case, Convolution

Tensor = torch.Tensor
Way = Callable[[Case], Tensor]


@dataclass(frozen=True, eq=False)
class Library:
    """A library and its functions.

    Args:
        name: name of the library.
        package: name of the package for pip.
        module: name of its Python module.
        ways: for each supported quantity, a function of a case.
        called: a description of the calls, and of the convention from which its Kronecker factors are converted.
        lacks: function that returns whether the library has no function for a quantity and a convolution.
    """

    name: str
    package: str
    module: str
    ways: Mapping[str, Way]
    called: str
    lacks: Callable[[str, Convolution], bool]

    @property
    def version(self) -> str:
        """The version of the package."""
        return lensor.__version__ if self.package == "lensor" else version(self.package)


# -------------------------------------------------------------------------------------------------------------- Lensor
def _input(case: Case) -> Tensor:
    """The case's input, with or without a batch axis."""
    return case.X[0] if case.conv.unbatched else case.X


def _cotangent(case: Case) -> Tensor:
    return case.V[0] if case.conv.unbatched else case.V


def _hyper(conv: Convolution) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names}


def _spec(conv: Convolution) -> lensor.ConvSpec:
    hyper = _hyper(conv) | {"transposed": conv.transposed, "output_padding": conv.output_padding, "bias": conv.bias}
    return lensor.ConvSpec(conv.in_channels, conv.out_channels, conv.input_size, conv.kernel_size, **hyper)


def _lensor_forward(case: Case) -> Tensor:
    return lensor.functional.conv(_input(case), case.W, case.b, **_hyper(case.conv))


def _lensor_transposed_forward(case: Case) -> Tensor:
    conv = case.conv
    return lensor.functional.conv_transpose(
        _input(case),
        case.W,
        case.b,
        stride=conv.stride,
        padding=conv.padding,
        output_padding=conv.output_padding,
        groups=conv.groups,
        dilation=conv.dilation,
    )


def _lensor_input_vjp(case: Case) -> Tensor:
    if case.conv.transposed:
        return lensor.ops.conv_input_vjp(_spec(case.conv))(W=case.W, V=case.V)
    return lensor.functional.conv_input_vjp(_input(case).shape, case.W, _cotangent(case), **_hyper(case.conv))


def _lensor_weight_vjp(case: Case) -> Tensor:
    if case.conv.transposed:
        return lensor.ops.conv_weight_vjp(_spec(case.conv))(X=case.X, V=case.V)
    return lensor.functional.conv_weight_vjp(_input(case), case.W.shape, _cotangent(case), **_hyper(case.conv))


def _lensor_per_example_weight_vjp(case: Case) -> Tensor:
    if case.conv.transposed:
        return lensor.ops.conv_weight_vjp_per_example(_spec(case.conv))(X=case.X, V=case.V)
    return lensor.functional.conv_weight_vjp_per_example(case.X, case.W.shape, case.V, **_hyper(case.conv))


def _lensor_kfac_input(approx: Approx) -> Way:
    def way(case: Case) -> Tensor:
        conv = case.conv
        if conv.bias:
            return lensor.ops.kfac_input_factor(_spec(conv), approx, bias=True)(X=case.X)
        hyper = _hyper(conv) | {"transposed": conv.transposed, "output_padding": conv.output_padding}
        return lensor.functional.kfac_input_factor(case.X, conv.kernel_size, approx=approx, **hyper)

    return way


def _lensor_kfac_output(approx: Approx) -> Way:
    return lambda case: lensor.functional.kfac_output_factor(case.S, case.conv.groups, approx=approx)


def _lensor_ggn_diagonal(case: Case) -> Tensor:
    if case.conv.transposed:
        return lensor.ops.ggn_diagonal(_spec(case.conv))(X=case.X, S=case.S)
    return lensor.functional.ggn_diagonal(case.X, case.W.shape, case.S, **_hyper(case.conv))


def _patch_hyper(conv: Convolution) -> dict[str, Any]:
    names = ("dilation", "padding", "stride", "padding_mode")
    return {name: getattr(conv, name) for name in names}


def _lensor_unfold(case: Case) -> Tensor:
    conv = case.conv
    if conv.transposed:
        hyper = {name: getattr(conv, name) for name in ("stride", "padding", "output_padding", "dilation")}
        return lensor.functional.unfold_transpose(case.X, conv.kernel_size, **hyper)
    return lensor.functional.unfold(_input(case), conv.kernel_size, **_patch_hyper(conv))


def _lensor_fold(case: Case) -> Tensor:
    conv = case.conv
    cotangent = case.U[0] if conv.unbatched else case.U
    return lensor.functional.fold(cotangent, conv.input_size, conv.kernel_size, **_patch_hyper(conv))


def _lensor_lacks(quantity: str, conv: Convolution) -> bool:
    return quantity == "fold" and conv.transposed


_LENSOR: dict[str, Way] = {
    "forward": _lensor_forward,
    "transposed_forward": _lensor_transposed_forward,
    "input_vjp": _lensor_input_vjp,
    "weight_vjp": _lensor_weight_vjp,
    "per_example_weight_vjp": _lensor_per_example_weight_vjp,
    "kfac_expand": _lensor_kfac_input("expand"),
    "kfac_reduce": _lensor_kfac_input("reduce"),
    "kfac_output_expand": _lensor_kfac_output("expand"),
    "kfac_output_reduce": _lensor_kfac_output("reduce"),
    "ggn_diagonal": _lensor_ggn_diagonal,
    "unfold": _lensor_unfold,
    "fold": _lensor_fold,
}


def _in_jax(way: Way) -> Way:
    """The same calls with arrays of JAX in double precision."""

    def called(case: Case) -> Tensor:
        import jax
        import jax.numpy as jnp

        before = jax.config.read("jax_enable_x64")
        jax.config.update("jax_enable_x64", True)
        try:
            operands = {name: getattr(case, name) for name in ("X", "W", "b", "V", "S", "U")}
            arrays = {name: None if x is None else jnp.asarray(x.numpy()) for name, x in operands.items()}
            return torch.from_numpy(np.array(way(replace(case, **arrays))))
        finally:
            jax.config.update("jax_enable_x64", before)

    return called


# ------------------------------------------------------------------------------------------------------------- einconv
def _einconv_hyper(conv: Convolution, *but: str) -> dict[str, Any]:
    """The hyper-parameters, with a padding mode only if it is not zeros, since einconv has no such argument."""
    hyper = _hyper(conv)
    if conv.padding_mode == "zeros":
        del hyper["padding_mode"]
    return {name: value for name, value in hyper.items() if name not in but}


def _einconv_forward(case: Case) -> Tensor:
    from einconv.functionals import convNd  # type: ignore[import-not-found]

    return convNd(_input(case), case.W, case.b, **_einconv_hyper(case.conv))


def _einconv_unfold(case: Case) -> Tensor:
    from einconv.functionals import unfoldNd  # type: ignore[import-not-found]

    return unfoldNd(_input(case), case.conv.kernel_size, **_einconv_hyper(case.conv, "groups"))


def _einconv(expression: str, arguments: Callable[[Case], tuple[Any, ...]]) -> Way:
    """Create an expression and contract it."""

    def way(case: Case) -> Tensor:
        make = import_module(f"einconv.expressions.convNd_{expression}").einsum_expression
        equation, operands, shape = make(*arguments(case), **_einconv_hyper(case.conv))
        return torch.einsum(equation, *operands).reshape(shape)

    return way


def _einconv_lacks(quantity: str, conv: Convolution) -> bool:
    return conv.transposed or (conv.bias and quantity.startswith("kfac"))


# ------------------------------------------------------------------------------------------ libraries of torch modules
def _module(case: Case) -> Any:
    """torch's module with the parameters of the case."""
    conv = case.conv
    kind = f"Conv{'Transpose' if conv.transposed else ''}{len(conv.input_size)}d"
    hyper = _hyper(conv)
    if conv.transposed:
        hyper["output_padding"] = conv.output_padding
    module = getattr(torch.nn, kind)(conv.in_channels, conv.out_channels, conv.kernel_size, bias=conv.bias, **hyper)
    parameters = {"weight": case.W} | ({} if case.b is None else {"bias": case.b})
    module.double().load_state_dict(parameters)
    return module


def _modules_lack(quantity: str, conv: Convolution) -> bool:
    return conv.has_pairs or conv.bias


def _backpack(extension: str, saved: str) -> Callable[[Case], Any]:
    """The result of a BackPACK extension for the weight in the backward pass of the case's net."""

    def way(case: Case) -> Any:
        from backpack import backpack, extend, extensions  # type: ignore[import-not-found]

        head = torch.nn.Linear(case.head.shape[1], case.head.shape[0], bias=False).double()
        head.load_state_dict({"weight": case.head})
        conv = _module(case)
        model = extend(torch.nn.Sequential(conv, torch.nn.Sigmoid(), torch.nn.Flatten(), head))
        loss = extend(torch.nn.MSELoss(reduction="sum"))
        with backpack(getattr(extensions, extension)()):
            loss(model(case.X), case.target).backward()
        return getattr(conv.weight, saved)

    return way


_kflr = _backpack("KFLR", "kflr")


def _backpack_kfac_expand(case: Case) -> Tensor:
    return _kflr(case)[1][None]  # no groups


def _backpack_kfac_output_reduce(case: Case) -> Tensor:
    return _kflr(case)[0][None]


def _opacus_per_example_weight_vjp(case: Case) -> Tensor:
    from opacus.grad_sample import GradSampleModule  # type: ignore[import-not-found]

    conv = _module(case)
    (GradSampleModule(conv, loss_reduction="sum")(case.X) * case.V).sum().backward()
    return conv.weight.grad_sample


# --------------------------------------------------------------------------------------------------------------- table
LIBRARIES = {
    found.name: found
    for found in (
        Library(
            "lensor",
            "lensor",
            "lensor",
            _LENSOR,
            "functions of `lensor.functional`; networks of `lensor.ops` for derivatives and GGN diagonal of transposed"
            " convolutions and for Kronecker factors with a bias. Factors are at the paper's scale.",
            _lensor_lacks,
        ),
        Library(
            "lensor-jax",
            "lensor",
            "jax",
            {name: _in_jax(way) for name, way in _LENSOR.items()},
            "the same functions and networks, with arrays of JAX.",
            _lensor_lacks,
        ),
        Library(
            "einconv",
            "einconv",
            "einconv",
            {
                "forward": _einconv_forward,
                "input_vjp": _einconv("input_vjp", lambda case: (case.W, _cotangent(case), case.conv.input_size)),
                "weight_vjp": _einconv(
                    "weight_vjp", lambda case: (_input(case), _cotangent(case), case.conv.kernel_size)
                ),
                "kfac_expand": _einconv("kfc", lambda case: (case.X, case.conv.kernel_size)),
                "kfac_reduce": _einconv("kfac_reduce", lambda case: (case.X, case.conv.kernel_size)),
                "unfold": _einconv_unfold,
            },
            "`einconv.functionals` for forward and unfold, `einconv.expressions` and `torch.einsum` for the others."
            " Factors are at the paper's scale and compared unchanged; the scale is a number in single precision.",
            _einconv_lacks,
        ),
        Library(
            "backpack",
            "backpack-for-pytorch",
            "backpack",
            {
                "per_example_weight_vjp": _backpack("BatchGrad", "grad_batch"),
                "kfac_expand": _backpack_kfac_expand,
                "kfac_output_reduce": _backpack_kfac_output_reduce,
                "ggn_diagonal": _backpack("DiagGGNExact", "diag_ggn_exact"),
            },
            "`extend` on a net that begins with torch's module and on its loss, then a backward pass with `BatchGrad`,"
            " `DiagGGNExact` or `KFLR`, whose factors are exact. The input factor is the paper's for expand. The output"
            " factor sums positions before the outer product, which is the paper's for reduce. Both are unchanged.",
            _modules_lack,
        ),
        Library(
            "opacus",
            "opacus",
            "opacus",
            {"per_example_weight_vjp": _opacus_per_example_weight_vjp},
            '`GradSampleModule` around torch\'s module, with `loss_reduction="sum"`.',
            _modules_lack,
        ),
    )
}
"""The libraries, by name."""
