"""The operations: from a ConvSpec to its network, each derived from `conv` or `unfold` by transformation."""

from lensor.ops.convolution import conv, conv_transpose, fold, unfold, unfold_transpose, unfolded_kernel
from lensor.ops.curvature import (
    ggn_diagonal,
    ggn_gram,
    ggn_mini_block,
    hessian_backprop,
    hessian_diagonal_input,
    hessian_diagonal_weight,
    kfac_input_factor,
    kfac_input_root,
    kfac_output_factor,
)
from lensor.ops.derivatives import (
    input_jacobian,
    input_jvp,
    input_vjp,
    mixed_second_derivative,
    per_example_weight_vjp,
    weight_jacobian,
    weight_jvp,
    weight_vjp,
)

__all__ = [
    "conv",
    "conv_transpose",
    "fold",
    "ggn_diagonal",
    "ggn_gram",
    "ggn_mini_block",
    "hessian_backprop",
    "hessian_diagonal_input",
    "hessian_diagonal_weight",
    "input_jacobian",
    "input_jvp",
    "input_vjp",
    "kfac_input_factor",
    "kfac_input_root",
    "kfac_output_factor",
    "mixed_second_derivative",
    "per_example_weight_vjp",
    "unfold",
    "unfold_transpose",
    "unfolded_kernel",
    "weight_jacobian",
    "weight_jvp",
    "weight_vjp",
]
