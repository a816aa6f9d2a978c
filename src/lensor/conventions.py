"""How libraries normalise Kronecker factors: the paper's factors times powers of the numbers of examples and positions.

The paper's factors are A = 1/N Σ p pᵀ (expand) or 1/(N·O²) Σ (Σ p)(Σ p)ᵀ (reduce), and B = 1/O Σ s sᵀ (expand) or
Σ (Σ s)(Σ s)ᵀ (reduce), where s includes the loss's reduction, here the mean over the N examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Convention(NamedTuple):
    """Powers of (batch size, number of positions) for the input and the output factor, keyed by `approx`.

    Factors that the library does not define have no entry. `grouped` is True if each group has a separate factor.
    """

    input: Mapping[str, tuple[int, int]]
    output: Mapping[str, tuple[int, int]]
    grouped: bool = False


class ModelConvention(NamedTuple):
    """Powers for the factors of a whole model, whose output factors include the loss reduction.

    Args:
        positions: powers of the number of positions for the input and the output factor, keyed by `approx`.
        examples: powers of the number of examples for the output factor, keyed by the loss reduction.
        outputs: power of the number of model outputs for the input factor; the output factor uses the inverse power.
    """

    positions: Mapping[str, tuple[int, int]]
    examples: Mapping[str, int] = {"mean": 0, "sum": 0}
    outputs: float = 0.0


CONVENTIONS: Mapping[str, Convention] = {
    "paper": Convention({"expand": (0, 0), "reduce": (0, 0)}, {"expand": (0, 0), "reduce": (0, 0)}, grouped=True),
    # A = Σ p pᵀ/(N·O), B = Σ g gᵀ.
    "curvlinops": Convention({"expand": (0, -1), "reduce": (0, 0)}, {"expand": (0, 1), "reduce": (0, 0)}),
    # A from x/√(N·O) and from the averaged patches/√N; B depends on how the loss was averaged.
    "singd": Convention({"expand": (0, -1), "reduce": (0, 0)}, {}),
    # A = Σ p pᵀ/N; B sums over positions first.
    "backpack": Convention({"expand": (0, 0)}, {"reduce": (0, 0)}),
    # A = Σ p pᵀ/(N·O), B = Σ g gᵀ/N with gradients of the summed loss.
    "asdl": Convention({"expand": (0, -1)}, {"expand": (0, 1)}),
    # A = Σ p pᵀ/(N·O), B = Σ g gᵀ/(N·O) with gradients of the summed loss; the block is O times their product.
    "kfac-jax": Convention({"expand": (0, -1)}, {"expand": (0, 0)}),
    # A = Σ p pᵀ/(N·O³), B = Σ g gᵀ/(N·O³).
    "kfac-pytorch": Convention({"expand": (0, -3)}, {"expand": (-1, -2)}),
}
"""The conventions, keyed by library name."""

MODEL_CONVENTIONS: Mapping[str, ModelConvention] = {
    "paper": ModelConvention({"expand": (0, 0), "reduce": (0, 0)}),
    # A = Σ p pᵀ/(N·O), B = Σ g gᵀ, corrected for the loss's reduction.
    "curvlinops": ModelConvention({"expand": (-1, 1), "reduce": (0, 0)}),
    # The same, except that gradients are multiplied by √N if the loss is a mean.
    "singd": ModelConvention({"expand": (-1, 1), "reduce": (0, 0)}),
    # A = Σ p pᵀ/(N·O), B = Σ g gᵀ/N with gradients of the summed loss.
    "asdl": ModelConvention({"expand": (-1, 1)}, {"mean": 0, "sum": -1}),
    # A = √C·Σ p pᵀ/N, B = Σ g gᵀ/(N·O·√C) with gradients of the summed loss and C outputs.
    "nngeometry": ModelConvention({"expand": (0, 0)}, {"mean": 0, "sum": -1}, outputs=0.5),
    # A = Σ p pᵀ/(N·O), B = Σ g gᵀ/(N·O).
    "kfac-jax": ModelConvention({"expand": (-1, 0)}),
    # A = Σ p pᵀ/(N·O³), B = Σ g gᵀ/(N·O³) with gradients of the loss as given.
    "kfac-pytorch": ModelConvention({"expand": (-3, -2)}, {"mean": -2, "sum": -1}),
    # A = Σ p pᵀ/N; B is computed from the summed loss.
    "laplace": ModelConvention({"expand": (0, 0), "reduce": (0, 0)}, {"mean": 1, "sum": 0}),
}
"""The conventions for factors of whole models, keyed by library name."""
