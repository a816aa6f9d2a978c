"""Curvature of whole models: Kronecker factors, diagonals, blocks, per-example gradients, and the empirical NTK.

Importing this package imports torch.
"""

from lensor.curvature.block import Block
from lensor.curvature.clipped import ClippedGradients, clipped_gradients
from lensor.curvature.ekfac import ekfac
from lensor.curvature.factors import KroneckerFactors
from lensor.curvature.function_module import FunctionModule
from lensor.curvature.ggn import ggn_diagonal, ggn_mini_blocks
from lensor.curvature.hessian import hessian_diagonal
from lensor.curvature.inverses import EigenFactors, Inverse, LinAlgError
from lensor.curvature.jacobian import jacobians
from lensor.curvature.kfac import kfac
from lensor.curvature.ntk import empirical_ntk
from lensor.curvature.per_example import per_example_gradient_norms, per_example_gradients
from lensor.curvature.registry import check_loss, register_loss
from lensor.curvature.token_loss import TokenCrossEntropyLoss

__all__ = [
    "Block",
    "ClippedGradients",
    "EigenFactors",
    "FunctionModule",
    "Inverse",
    "KroneckerFactors",
    "LinAlgError",
    "TokenCrossEntropyLoss",
    "check_loss",
    "clipped_gradients",
    "ekfac",
    "empirical_ntk",
    "ggn_diagonal",
    "ggn_mini_blocks",
    "hessian_diagonal",
    "jacobians",
    "kfac",
    "per_example_gradient_norms",
    "per_example_gradients",
    "register_loss",
]
