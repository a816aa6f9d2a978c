"""How libraries normalise Kronecker factors, as powers of the numbers of examples and positions times the paper's.

The paper's factors: A = 1/N Σ p pᵀ (expand), 1/(N·O²) Σ (Σ p)(Σ p)ᵀ (reduce); B = 1/O Σ s sᵀ (expand), Σ (Σ s)(Σ s)ᵀ
(reduce), s carrying the loss's own reduction, here the mean over the N examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Convention(NamedTuple):
    """Powers of (batch size, number of positions) for the input factor and the output factor, by `approx`.

    What a library does not define is left out. `grouped` tells whether its factors are one for each group.
    """

    input: Mapping[str, tuple[int, int]]
    output: Mapping[str, tuple[int, int]]
    grouped: bool = False


CONVENTIONS: Mapping[str, Convention] = {
    "paper": Convention({"expand": (0, 0), "reduce": (0, 0)}, {"expand": (0, 0), "reduce": (0, 0)}, grouped=True),
    # A = Σ p pᵀ/(N·O), B = Σ g gᵀ.
    "curvlinops": Convention({"expand": (0, -1), "reduce": (0, 0)}, {"expand": (0, 1), "reduce": (0, 0)}),
    # A from x/√(N·O) and from the averaged patches/√N; B depends on how the loss was averaged.
    "singd": Convention({"expand": (0, -1), "reduce": (0, 0)}, {}),
    # A = Σ p pᵀ/N, B sums over positions first.
    "backpack": Convention({"expand": (0, 0)}, {"reduce": (0, 0)}),
    # A = Σ p pᵀ/(N·O), B = Σ g gᵀ/N with gradients of the summed loss.
    "asdl": Convention({"expand": (0, -1)}, {"expand": (0, 1)}),
    # A = Σ p pᵀ/(N·O), B = Σ g gᵀ/(N·O) with gradients of the summed loss; the block is O times their product.
    "kfac-jax": Convention({"expand": (0, -1)}, {"expand": (0, 0)}),
    # A = Σ p pᵀ/(N·O³), B = Σ g gᵀ/(N·O³).
    "kfac-pytorch": Convention({"expand": (0, -3)}, {"expand": (-1, -2)}),
}
"""The conventions by the library's name."""
