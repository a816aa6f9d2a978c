"""Every step has a function in each backend."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lensor.kernels import load
from lensor.plan import Plan
from lensor.plan import steps as s
from lensor.planner import estimate
from lensor.planner.devices import H100


def kinds() -> set[type[s.Step]]:
    """The steps that plans are made of: those that the package of steps exports."""
    exported = {value for value in vars(s).values() if isinstance(value, type) and issubclass(value, s.Step)}
    return exported - {s.Step}


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_every_step_has_a_function(backend: str) -> None:
    table = load(backend).steps
    missing = {kind.__name__ for kind in kinds() if kind not in table and not issubclass(kind, s.Input)}
    assert not missing
    assert set(table) <= kinds()


@pytest.mark.parametrize("axes", [(0,), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("size", [3, 12])
def test_flip(axes: tuple[int, ...], size: int) -> None:
    """Both ways, position by position and at once, and where arrays may not be written to."""
    x = np.random.default_rng(0).standard_normal((size, 2, size, 3))
    expected = x[tuple(slice(None, None, -1) if axis in axes else slice(None) for axis in range(4))]
    step = s.Flip((0,), axes)
    assert np.array_equal(load("numpy").steps[s.Flip](step)(x), expected)
    run = load("torch").steps[s.Flip](step)
    found = run(torch.tensor(x))
    assert found.is_contiguous()
    assert np.array_equal(found, expected)
    per_example = load("torch").steps[s.Flip](s.Flip((0,), tuple(axis - 1 for axis in axes if axis)))
    mapped = torch.func.vmap(per_example)(torch.tensor(x))
    assert np.array_equal(mapped.flip(0) if 0 in axes else mapped, expected)


@pytest.mark.parametrize(("rows", "length", "depth"), [(191, 5000, 0), (193, 255, 0), (229, 3001, 1), (1025, 2500, 2)])
def test_gram_matrices_by_halves(rows: int, length: int, depth: int) -> None:
    """Each number of halvings, with odd numbers of rows, a factor, and several matrices at once."""
    step = s.Gram((0,), Fraction(1, 4))
    assert step.depth(rows, length) == depth
    shape = (rows, length) if depth > 1 else (2, rows, length)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = load("torch").steps[s.Gram](step)(x)
    torch.testing.assert_close(found, x @ x.mT / 4)
    expected = math.prod(shape[:-2]) * (3 * 2**depth - 2) if depth else 1
    assert (step.calls([shape], tuple(found.shape)), step.barriers([shape], tuple(found.shape))) == (1, expected)


def test_gram_matrices_are_no_slower_than_products_on_a_gpu() -> None:
    """GPUs multiply all rows at once."""
    x = s.Input((), "x", (64, 512, 1024))
    y = s.Input((), "y", (64, 1024, 512))
    gram = Plan("", (x, s.Gram((0,))), (x.size, (64, 512, 512)), 1, "one")
    product = Plan("", (x, y, s.MatMul((0, 1))), (x.size, y.size, (64, 512, 512)), 2, "one")
    assert estimate(gram, H100) <= estimate(product, H100)


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_add_at(backend: str, owned: bool) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((4, 5)), generator.standard_normal((2, 3))
    expected = a.copy()
    expected[1:3, 2:5] += b
    one, two = (a.copy(), b) if backend == "numpy" else (torch.tensor(a), torch.tensor(b))
    step = s.AddAt((0, 1), (1, 2), owned=owned)
    found = load(backend).steps[s.AddAt](step)(one, two)
    assert np.array_equal(found, expected)
    assert np.array_equal(one, expected if owned else a)


def test_add_at_is_differentiable() -> None:
    a, b = torch.randn(4, 5, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    run = load("torch").steps[s.AddAt](s.AddAt((0, 1), (1, 2), owned=True))
    assert torch.autograd.gradcheck(run, (a.requires_grad_(), b.requires_grad_()))
