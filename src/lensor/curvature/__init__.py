"""Curvature of whole models: Kronecker factors, diagonals, blocks, per-example gradients, the empirical NTK.

Importing this package imports torch.
"""

from lensor.curvature.factors import Block, EigenFactors, Inverse, KroneckerFactors, LinAlgError
from lensor.curvature.kfac import kfac
from lensor.curvature.quantities import (
    ekfac,
    empirical_ntk,
    ggn_diagonal,
    ggn_mini_blocks,
    hessian_diagonal,
    per_example_gradient_norms,
    per_example_gradients,
)

__all__ = [
    "Block",
    "EigenFactors",
    "Inverse",
    "KroneckerFactors",
    "LinAlgError",
    "ekfac",
    "empirical_ntk",
    "ggn_diagonal",
    "ggn_mini_blocks",
    "hessian_diagonal",
    "kfac",
    "per_example_gradient_norms",
    "per_example_gradients",
]
