"""Draws of positions: how often each is kept, sums over them, and weight gradients of whole layers over all draws.

Probabilities come from the definitions of the schemes, by counting their draws; nothing of the package is asked.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensor import sampling
from lensor.sampling import SCHEMES
from lensor.sampling.functional import names_of

DRAWS = 40_000
"""So many tell an error of 2 % in the mean of a sum over seven positions."""

CASES = ((5, 0.5), (7, 0.3))
"""(size, keep): their products are not whole."""

NORMS = (0.2, 6.0, 0.0, 1.0, 2.5, 0.7, 1.6)
"""Uneven: two of the first five are kept always, one never."""

UNEVEN = (1.0, 6.0, 3.0, 2.0, 4.0, 2.0, 5.0)
"""What is summed over positions."""

Outcome = tuple[int, ...]
"""Positions that are kept."""


# ------------------------------------------------------------------------------------------------- what schemes promise
def proportional(norms: tuple[float, ...], wanted: float) -> list[float]:
    """Probabilities in proportion to norms whose sum is what is wanted; those beyond 1 are 1, one after the other."""
    found, left = [0.0] * len(norms), [at for at, norm in enumerate(norms) if norm]
    while left:
        factor = (wanted - sum(found)) / sum(norms[at] for at in left)
        largest = max(left, key=lambda at: norms[at])
        if factor * norms[largest] < 1:
            for at in left:
                found[at] = factor * norms[at]
            break
        found[largest] = 1.0
        left.remove(largest)
    return found


def outcomes(scheme: str, size: int, keep: float, norms: tuple[float, ...]) -> dict[Outcome, float]:
    """The probability of every draw that a scheme can make."""
    count = max(1, round(size * keep))
    if scheme == "fixed":
        every = list(itertools.combinations(range(size), count))
    elif scheme == "blocks":
        every = [tuple(sorted((start + at) % size for at in range(count))) for start in range(size)]
    else:
        rates = [keep] * size if scheme == "bernoulli" else proportional(norms, keep * size)
        masks = itertools.product((0, 1), repeat=size)
        chances = {mask: math.prod(p if z else 1 - p for z, p in zip(mask, rates, strict=True)) for mask in masks}
        return {tuple(at for at, z in enumerate(mask) if z): chance for mask, chance in chances.items() if chance}
    return {one: every.count(one) / len(every) for one in every}


def probabilities(found: Mapping[Outcome, float], size: int) -> Tensor:
    """[size, size]: the probability that two positions are kept together; of each alone on the diagonal."""
    pairs = torch.zeros(size, size, dtype=torch.float64)
    for kept, chance in found.items():
        for one, other in itertools.product(kept, repeat=2):
            pairs[one, other] += chance
    return pairs


@functools.cache
def drawn(scheme: str, size: int, keep: float) -> tuple[Tensor, Tensor]:
    """[draws, size]: whether each position was kept; and its factor, which is zero where it was not."""
    generator, norms = torch.Generator().manual_seed(0), torch.tensor(NORMS[:size])
    kept, factors = (torch.zeros(DRAWS, size, dtype=torch.float64) for _ in range(2))
    for row in range(DRAWS):
        found = sampling.draw(size, keep, scheme, norms=norms, generator=generator)
        kept[row, found.positions] = 1.0
        factors[row, found.positions] = (
            torch.full((len(found.positions),), float(1 / found.keep), dtype=torch.float64)
            if found.keep is not None
            else found.weights.double()  # type: ignore[union-attr]
        )
    return kept, factors


every_case = pytest.mark.parametrize(
    ("scheme", "size", "keep"),
    [
        pytest.param(one, *case, marks=[pytest.mark.slow] * (one == "importance" and case[0] > 5))
        for one in SCHEMES
        for case in CASES
    ],
)


# ---------------------------------------------------------------------------------------------------------------- draws
@every_case
def test_positions_and_pairs_are_kept_as_often_as_the_scheme_says(scheme: str, size: int, keep: float) -> None:
    expected = probabilities(outcomes(scheme, size, keep, NORMS[:size]), size)
    kept, _ = drawn(scheme, size, keep)
    found = kept.T @ kept / DRAWS
    half = 4.5 * (expected * (1 - expected) / DRAWS).clamp(min=0).sqrt() + 1e-12
    assert ((found - expected).abs() <= half).all(), (found, expected)
    # All positions together: the interval is narrow enough for 2 %.
    chances = expected.diagonal()
    counts = kept.sum(1)
    half = 4.5 * math.sqrt(float((expected.sum() - chances.sum() ** 2).clamp(min=0)) / DRAWS) + 1e-9
    assert half < 0.02 * float(chances.sum())
    assert abs(float(counts.mean() - chances.sum())) <= half
    if scheme in ("fixed", "blocks"):
        assert counts.min() == counts.max() == chances.sum().round()


@every_case
def test_factors_are_one_over_the_probabilities(scheme: str, size: int, keep: float) -> None:
    chances = probabilities(outcomes(scheme, size, keep, NORMS[:size]), size).diagonal()
    kept, factors = drawn(scheme, size, keep)
    torch.testing.assert_close(factors, torch.where(kept > 0, 1 / chances, 0.0), rtol=1e-6, atol=0.0)


@every_case
def test_weighted_sums_are_unbiased(scheme: str, size: int, keep: float) -> None:
    values = torch.tensor(UNEVEN[:size], dtype=torch.float64)
    if scheme == "importance":
        values *= torch.tensor(NORMS[:size]) > 0  # what has norm zero is zero, and never kept
    _, factors = drawn(scheme, size, keep)
    sums = factors @ values / values.sum()
    mean, half = float(sums.mean()), 4 * float(sums.std()) / math.sqrt(DRAWS)
    assert abs(mean - 1) <= half
    assert min(abs(1.02 * mean - 1), abs(0.98 * mean - 1)) > half


# --------------------------------------------------------------------------------------------------------------- layers
SEEDS = 20_000
"""No more seeds than this are tried until every draw was made: no draw is rare."""


def uneven(*shape: int) -> Tensor:
    """Numbers of both signs that grow along every axis, by another factor each."""
    found = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1.0
    for axis, size in enumerate(shape):
        growth = torch.linspace(1.0, 2.0 + 0.2 * axis, size, dtype=torch.float64)
        found = found * growth.reshape([-1 if at == axis else 1 for at in range(len(shape))])
    return found


@dataclass(frozen=True)
class Case:
    """A layer, the shape of its input, and the sizes of the input's indices by name."""

    name: str
    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]
    sizes: Mapping[str, int]
    keep: Mapping[str, float]


def case(name: str, layer: Callable[[], nn.Module], shape: tuple[int, ...], groups: int = 1, **keep: float) -> Case:
    """A case; a linear layer has no groups, and its channels come last."""
    split = (shape[0], groups, shape[1] // groups, *shape[2:])
    sizes = dict(zip(names_of(len(shape) - 2), split, strict=True))
    if name.startswith("linear"):
        names = ("n", *(f"i{axis}" for axis in range(1, len(shape) - 1)), "c_in")
        sizes = dict(zip(names, shape, strict=True))
    return Case(f"{name}, {' '.join(keep)}", layer, shape, sizes, keep)


def conv2d() -> nn.Module:
    return nn.Conv2d(4, 2, (3, 2), stride=(1, 2), padding=1)


def grouped() -> nn.Module:
    return nn.ConvTranspose2d(8, 4, (2, 3), stride=2, padding=1, groups=2, output_padding=(1, 0))


LAYERS = (
    case("conv2d", conv2d, (5, 4, 3, 4), n=0.5),
    case("conv2d", conv2d, (2, 4, 4, 4), c_in=0.4),
    case("conv2d", conv2d, (2, 4, 5, 4), i1=0.5),
    case("conv2d", conv2d, (2, 4, 4, 5), i2=0.3),
    case("conv2d", conv2d, (2, 4, 4, 3), i1=0.6, i2=0.4),
    case("conv2d", conv2d, (3, 4, 4, 3), n=0.5, c_in=0.6),
    case("groups", lambda: nn.Conv1d(8, 4, 3, groups=4), (2, 8, 5), groups=4, g=0.4),
    case("conv3d", lambda: nn.Conv3d(3, 2, 2, dilation=2), (4, 3, 3, 4, 3), n=0.4),
    case("conv3d", lambda: nn.Conv3d(3, 2, 2), (2, 3, 5, 3, 2), i1=0.5),
    case("conv3d", lambda: nn.Conv3d(3, 2, 2), (2, 3, 2, 3, 3), i2=0.4, i3=0.6),
    case("transposed2d", lambda: nn.ConvTranspose2d(4, 2, 3, stride=2), (4, 4, 2, 3), n=0.4),
    case("transposed2d", lambda: nn.ConvTranspose2d(4, 2, 3, stride=2), (2, 4, 2, 3), c_in=0.4),
    case("transposed2d", lambda: nn.ConvTranspose2d(3, 2, 3, padding=1), (2, 3, 4, 3), i1=0.4, i2=0.4),
    case("transposed groups", grouped, (2, 8, 4, 3), groups=2, i1=0.4),
    case("transposed groups", grouped, (3, 8, 2, 3), groups=2, n=0.5, c_in=0.6),
    case("transposed groups", grouped, (2, 8, 3, 2), groups=2, g=0.6, i1=0.5),
    case("linear", lambda: nn.Linear(4, 3), (3, 5, 2, 4), i1=0.5),
    case("linear", lambda: nn.Linear(4, 3), (3, 4, 3, 4), i1=0.6, i2=0.4),
    case("linear", lambda: nn.Linear(3, 4), (3, 2, 3), n=0.5, c_in=0.4),
)


def norms_of(x: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """For each index the norms of what stands at its positions."""
    flat = x.reshape(tuple(sizes.values()))
    return {
        name: flat.square().sum([other for other in range(flat.ndim) if other != axis]).sqrt()
        for axis, name in enumerate(sizes)
    }


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("one", LAYERS, ids=[one.name for one in LAYERS])
def test_the_mean_of_a_layer_s_weight_gradient_over_all_its_draws_is_exact(one: Case, scheme: str) -> None:
    """Draws are told apart by the seeds that make them; each counts by its probability."""
    torch.manual_seed(0)
    exact, x = one.layer().double(), uneven(*one.shape)
    v = uneven(*exact(x).shape)
    (expected,) = torch.autograd.grad(exact(x), exact.weight, v)  # type: ignore[arg-type]
    generator = torch.Generator()
    layer: Any = sampling.convert(exact, {"": one.keep}, scheme=scheme, generator=generator)
    norms = norms_of(x, one.sizes)
    of_each = [outcomes(scheme, one.sizes[name], keep, tuple(norms[name].tolist())) for name, keep in one.keep.items()]
    left = {joint: math.prod(map(dict.__getitem__, of_each, joint)) for joint in itertools.product(*of_each)}
    assert sum(left.values()) == pytest.approx(1.0)
    mean = torch.zeros_like(expected)
    for seed in range(SEEDS):
        generator.manual_seed(seed)
        joint = tuple(
            tuple(
                sampling.draw(one.sizes[name], keep, scheme, norms=norms[name], generator=generator).positions.tolist()
            )
            for name, keep in one.keep.items()
        )
        if joint in left:
            generator.manual_seed(seed)
            (found,) = torch.autograd.grad(layer(x), layer.weight, v)
            mean += left.pop(joint) * found
        if not left:
            break
    assert not left
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
