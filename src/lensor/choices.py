"""The choices of arguments, as types; `words(Approx)` returns the choices themselves."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

Approx: TypeAlias = Literal["expand", "reduce"]
"""How a Kronecker factor treats positions: as examples, or summed first."""

Bias: TypeAlias = Literal["joint", "separate"]
"""Whether weight and bias share a block."""

Effort: TypeAlias = Literal["estimate", "measure", "remember"]
"""How a plan is chosen: by estimates, by measurements, or by earlier measurements."""

Fisher: TypeAlias = Literal["type-2", "mc", "empirical"]
"""The exact Hessian of the loss, samples from the model's distribution, or gradients of the loss itself."""

FactorFisher: TypeAlias = Literal["type-2", "mc", "empirical", "forward-only"]
"""`Fisher`, or no backward pass: B is the identity."""

FactorNormalisation: TypeAlias = Literal["paper", "curvlinops", "singd", "backpack", "asdl", "kfac-jax", "kfac-pytorch"]
"""The library whose normalisation the factors of one layer have."""

ModelNormalisation: TypeAlias = Literal[
    "paper", "curvlinops", "singd", "asdl", "nngeometry", "kfac-jax", "kfac-pytorch", "laplace"
]
"""The library whose normalisation the factors of a model have."""

Form: TypeAlias = Literal["factor", "root"]
"""A Kronecker factor itself, or a matrix whose Gram matrix it is."""

Method: TypeAlias = Literal["cholesky", "eigen", "woodbury"]
"""How damped factors are inverted."""

Nonfinite: TypeAlias = Literal["raise", "skip"]
"""How an optimizer treats a gradient that is not finite."""

PaddingMode: TypeAlias = Literal["zeros", "circular", "reflect", "replicate"]
"""The values outside the input."""

Scheme: TypeAlias = Literal["bernoulli", "fixed", "blocks", "importance"]
"""How positions are drawn."""


def words(choice: Any) -> tuple[str, ...]:
    """The choices of a `Literal` type.

    Example:
        >>> from lensor.choices import Approx, words
        >>> words(Approx)
        ('expand', 'reduce')
    """
    return get_args(choice)
