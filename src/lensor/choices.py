"""The allowed values of arguments, as `Literal` types; `words(Approx)` returns the values themselves."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

Approx: TypeAlias = Literal["expand", "reduce"]
"""Whether a Kronecker factor treats positions as separate examples, or sums over them first."""

Bias: TypeAlias = Literal["joint", "separate"]
"""Whether weight and bias share a block or have separate blocks."""

Effort: TypeAlias = Literal["estimate", "measure", "remember"]
"""How a plan is chosen: by estimates, by measurements, or by previous measurements."""

Fisher: TypeAlias = Literal["type-2", "mc", "empirical"]
"""The exact Hessian of the loss, samples from the model's distribution, or gradients of the loss itself."""

FactorFisher: TypeAlias = Literal["type-2", "mc", "empirical", "forward-only"]
"""The choices of `Fisher`, or "forward-only": no backward pass; B is the identity."""

FactorNormalisation: TypeAlias = Literal["paper", "curvlinops", "singd", "backpack", "asdl", "kfac-jax", "kfac-pytorch"]
"""The library or paper whose normalisation is used for the factors of one layer."""

ModelNormalisation: TypeAlias = Literal[
    "paper", "curvlinops", "singd", "asdl", "nngeometry", "kfac-jax", "kfac-pytorch", "laplace"
]
"""The library or paper whose normalisation is used for the factors of a model."""

Form: TypeAlias = Literal["factor", "root"]
"""A Kronecker factor itself, or a root, whose Gram matrix is the factor."""

Others: TypeAlias = Literal["diagonal", "full", "skip"]
"""The blocks of parameters that have no Kronecker factors."""

Compiler: TypeAlias = Literal["inductor", "eager"]
"""How a traced graph runs: compiled by torch, or as torch's operators, one after the other."""

Method: TypeAlias = Literal["cholesky", "eigen", "woodbury", "low-rank"]
"""How damped factors are inverted."""

Nonfinite: TypeAlias = Literal["raise", "skip"]
"""How an optimizer handles a gradient that is not finite."""

PaddingMode: TypeAlias = Literal["zeros", "circular", "reflect", "replicate"]
"""How values outside the input are defined."""

Scheme: TypeAlias = Literal["bernoulli", "fixed", "blocks", "importance"]
"""How positions are sampled."""

StepMethod: TypeAlias = Literal["cholesky", "eigen", "woodbury", "low-rank", "inverse-free"]
"""The choices of `Method`, or "inverse-free": an optimizer updates roots of the inverse by products only."""

Structure: TypeAlias = Literal["dense", "block", "diagonal"]
"""The entries of Kronecker factors that are computed: all, those of diagonal blocks, or those of the diagonal."""


def words(choice: Any) -> tuple[str, ...]:
    """Return the choices of a `Literal` type.

    Example:
        >>> from lensor.choices import Approx, words
        >>> words(Approx)
        ('expand', 'reduce')
    """
    return get_args(choice)
