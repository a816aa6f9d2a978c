"""Operations: functions that map a ConvSpec to a network, each derived from `conv` or `unfold` by transforms."""

import warnings
from typing import TYPE_CHECKING, Any

from lensor.ops.convolution import conv, conv_transpose, fold, unfold, unfold_transpose, unfolded_kernel
from lensor.ops.curvature import (
    ggn_diagonal,
    ggn_gram,
    ggn_mini_blocks,
    hessian_backprop,
    hessian_diagonal_input,
    hessian_diagonal_weight,
    kfac_input_factor,
    kfac_input_root,
    kfac_output_factor,
)
from lensor.ops.derivatives import (
    conv_input_jacobian,
    conv_input_jvp,
    conv_input_vjp,
    conv_weight_jacobian,
    conv_weight_jvp,
    conv_weight_vjp,
    conv_weight_vjp_per_example,
    mixed_second_derivative,
)

__all__ = [
    "conv",
    "conv_input_jacobian",
    "conv_input_jvp",
    "conv_input_vjp",
    "conv_transpose",
    "conv_weight_jacobian",
    "conv_weight_jvp",
    "conv_weight_vjp",
    "conv_weight_vjp_per_example",
    "fold",
    "ggn_diagonal",
    "ggn_gram",
    "ggn_mini_blocks",
    "hessian_backprop",
    "hessian_diagonal_input",
    "hessian_diagonal_weight",
    "kfac_input_factor",
    "kfac_input_root",
    "kfac_output_factor",
    "mixed_second_derivative",
    "unfold",
    "unfold_transpose",
    "unfolded_kernel",
]

_RENAMED = {
    "input_vjp": "conv_input_vjp",
    "input_jvp": "conv_input_jvp",
    "input_jacobian": "conv_input_jacobian",
    "weight_vjp": "conv_weight_vjp",
    "weight_jvp": "conv_weight_jvp",
    "weight_jacobian": "conv_weight_jacobian",
    "per_example_weight_vjp": "conv_weight_vjp_per_example",
    "ggn_mini_block": "ggn_mini_blocks",
}
"""Deprecated names: each quantity now has the same name in `ops`, `functional` and `curvature`."""


if not TYPE_CHECKING:  # for type checkers, only the new names exist

    def __getattr__(name: str) -> Any:
        if name not in _RENAMED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        warnings.warn(f"ops.{name} is deprecated: use ops.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        return globals()[_RENAMED[name]]
