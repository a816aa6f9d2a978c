"""Sampling schemes, which choose the positions of an index to keep; all are unbiased."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from lensor.choices import Scheme, words
from lensor.errors import require_choice, require_share

SCHEMES = words(Scheme)
"""bernoulli: each position independently, as in the paper; fixed: a fixed number of positions, without replacement;
blocks: a fixed number of neighbouring positions, cyclically; importance: each position independently, with probability
∝ its norm."""


@dataclass(frozen=True)
class Draw:
    """The kept positions, and the factors that make sums over them unbiased.

    Args:
        positions: the positions, ascending, int64.
        keep: the probability of keeping a position; None if probabilities differ.
        weights: the inverse probability of each position, if probabilities differ.

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
    """Convert a keep rate to a fraction; ValueError unless it is in (0, 1]."""
    return require_share(keep, f"keep of {name!r}")


def kept_count(size: int, keep: Fraction) -> int:
    """Number of positions that "fixed" and "blocks" keep: rounded to the nearest integer, at least one."""
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
    """Draw the positions of an index to keep.

    Args:
        size: number of positions.
        keep: the fraction to keep: the probability of each position ("bernoulli"), its mean over positions
            ("importance"), or the fraction of the size that is rounded to a count of at least one ("fixed", "blocks").
        scheme: one of `SCHEMES`.
        norms: for "importance", one norm per position; positions of norm zero are never kept.
        generator: a CPU generator; torch's by default.
        device: device of the result.

    Returns:
        The positions and their inverse probabilities; there may be no positions ("bernoulli", "importance").

    Example:
        >>> import torch, lensor.sampling
        >>> found = lensor.sampling.draw(8, 0.5, "fixed", generator=torch.Generator().manual_seed(0))
        >>> len(found.positions), found.keep
        (4, Fraction(1, 2))

    Raises:
        ValueError: for a keep rate outside (0, 1], an unknown scheme, or norms that are missing, have the wrong size,
            or are negative or not finite.

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
            start = _start(size, generator)
            positions = ((start + torch.arange(count)) % max(size, 1)).sort().values
    return Draw(positions.to(device), rate)


def _start(size: int, generator: torch.Generator | None) -> Tensor:
    return torch.randint(max(size, 1), (), generator=generator)


def draw_start(size: int, generator: torch.Generator | None = None) -> int:
    """Draw the first position of "blocks", as `draw` does."""
    return int(_start(size, generator))


def _uniform(size: int, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Random numbers in [0, 1); without a generator, compilers can trace the draw with symbolic sizes."""
    return torch.rand((size,), dtype=dtype) if generator is None else torch.rand(size, dtype=dtype, generator=generator)


def inclusion(norms: Tensor, keep: Fraction) -> Tensor:
    """Probabilities ∝ norms, clipped to 1, whose sum is `keep` times the number of norms, as far as the norms allow."""
    wanted = norms.numel() * float(keep)
    ordered = norms.double().sort(descending=True).values
    if wanted >= int((ordered > 0).sum()):
        return (norms > 0).double()
    rest = ordered.flip(0).cumsum(0).flip(0)  # the sum of each norm and all smaller ones
    certain = torch.arange(norms.numel(), dtype=torch.float64)
    factors = (wanted - certain) / rest
    fits = (factors * ordered <= 1) & (certain < wanted)
    return (norms.double() * factors[fits.nonzero()[0, 0]]).clamp(max=1.0)


def require_norms(norms: Tensor | None, size: int) -> Tensor:
    """The norms on the CPU; ValueError unless each position has a norm that is finite and at least 0."""
    if norms is None or tuple(getattr(norms, "shape", ())) != (size,):
        found = "missing" if norms is None else f"of shape {tuple(getattr(norms, 'shape', ()))}"
        raise ValueError(f"norms are {found}, expected one for each of the {size} positions for scheme 'importance'")
    norms = torch.as_tensor(norms).detach().cpu()
    if not bool((norms.isfinite() & (norms >= 0)).all()):
        raise ValueError("norms have entries that are negative or not finite, expected finite ones of at least 0")
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
