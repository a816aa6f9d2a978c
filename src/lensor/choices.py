"""The words that arguments are chosen from, as types. `words(Approx)` are the choices themselves."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

Approx: TypeAlias = Literal["expand", "reduce"]
"""How a Kronecker factor treats positions: as examples, or summed over first."""

Bias: TypeAlias = Literal["joint", "separate"]
"""Whether weight and bias share a block."""

Effort: TypeAlias = Literal["estimate", "measure", "remember"]
"""How a plan is chosen: by estimates, by measuring, or by what was measured earlier."""

Fisher: TypeAlias = Literal["type-2", "mc", "empirical"]
"""The exact Hessian of the loss, samples from the model's distribution, or gradients of the loss itself."""

FactorFisher: TypeAlias = Literal["type-2", "mc", "empirical", "forward-only"]
"""`Fisher`, or no backward pass at all: B is the identity."""

FactorNormalisation: TypeAlias = Literal["paper", "curvlinops", "singd", "backpack", "asdl", "kfac-jax", "kfac-pytorch"]
"""Whose normalisation the factor of one layer has."""

ModelNormalisation: TypeAlias = Literal[
    "paper", "curvlinops", "singd", "asdl", "nngeometry", "kfac-jax", "kfac-pytorch", "laplace"
]
"""Whose normalisation the factors of a model have."""

Form: TypeAlias = Literal["factor", "root"]
"""A Kronecker factor itself, or a matrix whose Gram matrix it is."""

Method: TypeAlias = Literal["cholesky", "eigen", "woodbury"]
"""How damped factors are inverted."""

Nonfinite: TypeAlias = Literal["raise", "skip"]
"""What an optimizer does with a gradient that is not finite."""

PaddingMode: TypeAlias = Literal["zeros", "circular", "reflect", "replicate"]
"""What is read outside of the input."""

Scheme: TypeAlias = Literal["bernoulli", "fixed", "blocks", "importance"]
"""How positions are drawn."""


def words(choice: Any) -> tuple[str, ...]:
    """The choices of a type.

    Example:
        >>> from lensor.choices import Approx, words
        >>> words(Approx)
        ('expand', 'reduce')
    """
    return get_args(choice)
