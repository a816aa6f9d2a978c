"""Which positions of an index are kept: schemes of sampling, all unbiased."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from lensor.choices import Scheme, words
from lensor.errors import require_choice, require_share

SCHEMES = words(Scheme)
"""bernoulli: each position by itself, as the paper; fixed: so many positions, without replacement; blocks: a run of so
many neighbours, around the end; importance: each by itself, with a probability in proportion to its norm."""


@dataclass(frozen=True)
class Draw:
    """Positions kept, and what makes sums over them unbiased.

    Args:
        positions: the positions, ascending, int64.
        keep: the probability with which each was kept; None if they differ.
        weights: one over the probability of each, if they differ.

    Example:
        >>> from lensor.sampling import draw
        >>> kept = draw(8, 0.25, "fixed")
        >>> kept.positions.shape, kept.keep, kept.weights
        (torch.Size([2]), Fraction(1, 4), None)
    """

    positions: Tensor
    keep: Fraction | None
    weights: Tensor | None = None


def require_keep(keep: float | Fraction, name: str) -> Fraction:
    """A keep rate as a fraction; ValueError unless it is in (0, 1]."""
    return require_share(keep, f"keep of {name!r}")


def kept_count(size: int, keep: Fraction) -> int:
    """How many positions the schemes of fixed counts keep: the nearest whole number, at least one."""
    return max(1, round(size * float(keep))) if size else 0


def draw(
    size: int,
    keep: float | Fraction,
    scheme: Scheme = "bernoulli",
    *,
    norms: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Draw:
    """Draw positions of an index.

    Args:
        size: the number of positions.
        keep: the share that is kept: the probability of each position ("bernoulli"), of each in the mean
            ("importance"), or what the count is rounded from ("fixed", "blocks"; at least one).
        scheme: one of `SCHEMES`.
        norms: for "importance", a norm for each position; those of norm zero are never kept.
        generator: a generator on the CPU, by default torch's.
        device: where the positions are wanted.

    Returns:
        The positions, and one over their probabilities; there may be none ("bernoulli", "importance").

    Example:
        >>> import torch, lensor.sampling
        >>> found = lensor.sampling.draw(8, 0.5, "fixed", generator=torch.Generator().manual_seed(0))
        >>> len(found.positions), found.keep
        (4, Fraction(1, 2))

    Raises:
        ValueError: for a keep outside (0, 1], an unknown scheme, or norms that are missing, of another size,
            negative or not finite.

    Equation:
        §5.2 of the paper: Σ_i a_i b_i ≈ Σ_i z_i/p a_i b_i with z_i ~ Bernoulli(p); in general z_i over its mean.
    """
    require_choice("scheme", scheme, SCHEMES)
    rate = require_keep(keep, "the draw")
    if scheme == "importance":
        return _by_importance(size, rate, norms, generator, device)
    if scheme == "bernoulli":
        positions = (_uniform(size, torch.float32, generator) < float(rate)).nonzero()[:, 0]
    else:
        count = kept_count(size, rate)
        rate = Fraction(count, size) if size else rate
        if scheme == "fixed":
            positions = torch.randperm(size, generator=generator)[:count].sort().values
        else:
            start = torch.randint(max(size, 1), (), generator=generator)
            positions = ((start + torch.arange(count)) % max(size, 1)).sort().values
    return Draw(positions.to(device), rate)


def _uniform(size: int, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Numbers in [0, 1); without a generator in the form that compilers trace for sizes that are symbols."""
    return torch.rand((size,), dtype=dtype) if generator is None else torch.rand(size, dtype=dtype, generator=generator)


def inclusion(norms: Tensor, keep: Fraction) -> Tensor:
    """Probabilities in proportion to norms, at most 1, whose sum is `keep` of the count (as far as norms allow)."""
    wanted = norms.numel() * float(keep)
    ordered = norms.double().sort(descending=True).values
    if wanted >= int((ordered > 0).sum()):
        return (norms > 0).double()
    rest = ordered.flip(0).cumsum(0).flip(0)  # the sum of a norm and all below it
    certain = torch.arange(norms.numel(), dtype=torch.float64)
    factors = (wanted - certain) / rest
    fits = (factors * ordered <= 1) & (certain < wanted)
    return (norms.double() * factors[fits.nonzero()[0, 0]]).clamp(max=1.0)


def require_norms(norms: Tensor | None, size: int) -> Tensor:
    """The norms on the CPU; ValueError unless there is one for each position, finite and at least 0."""
    if norms is None or tuple(getattr(norms, "shape", ())) != (size,):
        found = "none" if norms is None else f"shape {tuple(getattr(norms, 'shape', ()))}"
        raise ValueError(f"scheme 'importance' needs one norm for each of the {size} positions, found {found}")
    norms = torch.as_tensor(norms).detach().cpu()
    if not bool((norms.isfinite() & (norms >= 0)).all()):
        raise ValueError("norms must be finite and at least 0")
    return norms


def _by_importance(
    size: int,
    keep: Fraction,
    norms: Tensor | None,
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> Draw:
    rates = inclusion(require_norms(norms, size), keep)
    positions = (_uniform(size, torch.float64, generator) < rates).nonzero()[:, 0]
    return Draw(positions.to(device), None, (1 / rates[positions]).to(device))
