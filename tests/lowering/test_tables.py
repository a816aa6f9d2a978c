"""Ways without tables: no array has more entries than the operands."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lensor_bench.measure import peak_bytes
from torch.nn.functional import conv1d, pad

import lensor
from lensor import ConvSpec, IndexPattern, lowering, ops
from lensor import functional as F
from lensor.pattern import PADDING_MODES
from lensor.plan import steps as s
from lensor.runtime import run
from tests.support.cases import BUILDERS, SPECS, assert_close, bound, operands_of
from tests.support.dense import evaluate_dense

LONG = {  # input size, kernel size, stride, padding, dilation
    "same": (16_000, 3, 1, (1, 1), 1),
    "stride is the kernel, with a remainder": (16_001, 3, 3, (0, 0), 1),
    "kernel of 1 with stride": (16_000, 1, 2, (0, 0), 1),
    "stride is the dilation": (16_000, 3, 2, (2, 2), 2),
    "large kernel": (16_000, 251, 50, (125, 125), 1),
    "stride beyond the kernel": (16_000, 3, 5, (1, 4), 1),
    "causal": (16_000, 4, 1, (9, 0), 3),
}


def patches_of(x: torch.Tensor, case: tuple, mode: str) -> torch.Tensor:
    """[batch, c_in, output_size, kernel_size], by torch."""
    _, kernel, stride, padding, dilation = case
    x = pad(x, padding, mode="constant" if mode == "zeros" else mode)
    return x.unfold(2, dilation * (kernel - 1) + 1, stride)[..., ::dilation]


def functions(
    case: tuple, mode: str, x: torch.Tensor, w: torch.Tensor, v: torch.Tensor
) -> dict[str, tuple[Callable[..., Any], list[torch.Tensor], Callable[[], torch.Tensor]]]:
    """Every function with its arrays and what it should return."""
    size, kernel, stride, padding, dilation = case
    hyper = {"stride": stride, "padding": [padding], "dilation": dilation, "padding_mode": mode}
    n = len(x)

    def derivative(place: int) -> torch.Tensor:
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        padded = pad(leaves[0], padding, mode="constant" if mode == "zeros" else mode)
        return torch.autograd.grad(conv1d(padded, leaves[1], None, stride, 0, dilation), leaves[place], v)[0]

    def per_example() -> torch.Tensor:
        return torch.einsum("ncok,nvo->nvck", patches_of(x, case, mode), v)

    def unfolded() -> torch.Tensor:
        return patches_of(x, case, mode).movedim(3, 2).flatten(1, 2)

    def reduced() -> torch.Tensor:
        rows = patches_of(x, case, mode).mean(2).flatten(1)
        return (rows.mT @ rows / n)[None]

    def expanded() -> torch.Tensor:
        rows = unfolded().movedim(1, 2).flatten(0, 1)
        return (rows.mT @ rows / n)[None]

    def folded() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        columns = patches_of(leaf, case, mode).movedim(3, 2).flatten(1, 2)
        return torch.autograd.grad(columns, leaf, unfolded())[0]

    def of_columns(function: Callable[..., Any], columns: Any, **options: Any) -> Any:
        return function(columns, (size,), kernel, **options)

    return {
        "conv": (lambda x, w: F.conv(x, w, **hyper), [x, w], lambda: conv1d_of(x, w, case, mode)),
        "unfold": (lambda x: F.unfold(x, kernel, **hyper), [x], unfolded),
        "fold": (lambda columns: of_columns(F.fold, columns, **hyper), [unfolded()], folded),
        "input VJP": (lambda w, v: F.conv_input_vjp(tuple(x.shape), w, v, **hyper), [w, v], lambda: derivative(0)),
        "weight VJP": (lambda x, v: F.conv_weight_vjp(x, tuple(w.shape), v, **hyper), [x, v], lambda: derivative(1)),
        "per example": (
            lambda x, v: F.conv_weight_vjp_per_example(x, tuple(w.shape), v, **hyper),
            [x, v],
            per_example,
        ),
        "reduce": (lambda x: F.kfac_input_factor(x, kernel, approx="reduce", **hyper), [x], reduced),
        "expand": (lambda x: F.kfac_input_factor(x, kernel, **hyper), [x], expanded),
        "diagonal": (
            lambda x, v: F.ggn_diagonal(x, tuple(w.shape), v[None], **hyper),
            [x, v],
            lambda: per_example().square().sum(0),
        ),
    }


def conv1d_of(x: torch.Tensor, w: torch.Tensor, case: tuple, mode: str) -> torch.Tensor:
    _, _, stride, padding, dilation = case
    return conv1d(pad(x, padding, mode="constant" if mode == "zeros" else mode), w, None, stride, 0, dilation)


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize(
    ("case", "backend"), [*((case, "numpy") for case in LONG), ("same", "torch"), ("large kernel", "torch")]
)
def test_memory_of_long_inputs(case: str, mode: str, backend: str) -> None:
    """Planned and run, with cold caches: no more than operands, result and patches a few times."""
    torch.manual_seed(0)
    size, kernel, stride, padding, dilation = LONG[case]
    spec = ConvSpec(1, 2, (size,), kernel, stride, [padding], dilation, padding_mode=mode)
    x, w, v = torch.randn(2, 1, size).double(), torch.randn(2, 1, kernel).double(), torch.randn(2, *spec.output_shape)
    lensor.clear_caches()
    for name, (function, arrays, expected) in functions(LONG[case], mode, x, w, v.double()).items():
        if backend == "numpy":
            values = [array.numpy() for array in arrays]
            tracemalloc.start()
            found = function(*values)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            found = torch.from_numpy(found)
        else:
            lensor.clear_caches()
            tracemalloc.start()
            peak, found = peak_bytes(lambda function=function, arrays=arrays: function(*arrays))
            python = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert python < 64e6, name  # of which the profiler takes most
        patches = 2 * 8 * spec.output_size[0] * kernel
        allowed = sum(array.nbytes for array in arrays) + found.nbytes + patches
        assert peak <= 3 * allowed + 3e6, name
        assert_close(found, expected())


def test_the_reduce_factor_of_a_long_input_with_a_large_kernel() -> None:
    """160,000 samples and 1,024 kernel positions: a table of the pattern's sums would take 1.3 GB."""
    x = torch.randn(2, 1, 160_000).double()
    tracemalloc.start()
    peak, found = peak_bytes(lambda: F.kfac_input_factor(x, 1024, 512, approx="reduce"))
    assert tracemalloc.get_traced_memory()[1] < 64e6
    tracemalloc.stop()
    rows = x.unfold(2, 1024, 512).mean(2).flatten(1)
    assert_close(found, (rows.mT @ rows / 2)[None])
    assert peak <= found.nbytes + 4 * x.nbytes


def test_the_gradient_of_a_reduce_factor_has_no_table_either() -> None:
    x = torch.randn(2, 1, 6000, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(1, 101, 101).double()
    rows = x.unfold(2, 101, 1).mean(2).flatten(1)
    (expected,) = torch.autograd.grad(((rows.mT @ rows / 2)[None] * direction).sum(), x)
    factor = F.kfac_input_factor(x, 101, approx="reduce")
    peak, found = peak_bytes(lambda: torch.autograd.grad(factor, x, direction)[0])
    assert_close(found, expected)
    assert peak <= 12 * x.nbytes + 4 * direction.nbytes  # a table takes 50 times as much as x


# ------------------------------------------------------------------------------------------------ ways without tables
def no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every array made of a pattern were too large."""
    for name in ("state", "alternatives"):
        monkeypatch.setattr(f"lensor.lowering.{name}.largest_table", lambda sizes: 1)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", BUILDERS)
def test_every_operation_without_tables(op: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every pattern were too large an array: the values, and those of the derivatives, stay the same."""
    try:
        net = BUILDERS[op](SPECS[spec])
    except ValueError:
        pytest.skip("not defined for this convolution")
    no_tables(monkeypatch)
    derived = [net.vjp(name, "cotangent") for name in net.operand_names]
    for one in (net, *derived):
        one = bound(one)
        if math.prod(size or 1 for size in one.sizes.values()) > 3e8:
            continue
        simplified, operands = one.simplify(), operands_of(one)
        expected, seen = evaluate_dense(one, operands), set()
        for strategy in lowering.STRATEGIES:
            plan = lowering.lower(simplified, strategy)
            if plan.steps not in seen:
                seen.add(plan.steps)
                assert_close(run(plan, operands), expected)


CONTRACTIONS = {
    "i o, i o k -> k": True,
    "i k, i o k -> o": True,
    "o, i o k -> i": True,
    "k, i o k -> i": True,
    "i, i o k -> k": True,
    "i, i o k -> o": True,
    "k, i o k -> i o": True,
    "o, i o k -> i k": True,
    "b o, i o k -> b i": True,
    "b k c, i o k -> c i b o": True,
    "b i c o, i o k -> b k c": True,
    "i, i o k -> ": True,
    "i o k, i o k -> i": False,
    "i k, i o k -> i o": False,
}
"""Contractions with one pattern, and whether no plan needs a table for them."""


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("subscripts", CONTRACTIONS)
def test_contractions_without_tables(subscripts: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_tables(monkeypatch)
    rng = np.random.default_rng(0)
    for size, kernel, stride, padding, dilation in ((7, 3, 1, 1, 1), (9, 2, 3, (0, 2), 2), (6, 4, 1, (2, 0), 1)):
        pattern = IndexPattern(size, kernel, stride, padding, dilation, mode)
        dense = pattern.materialize().astype(float)
        sizes = dict(zip("iok", dense.shape, strict=True), b=2, c=3)
        first = subscripts.partition(",")[0].split()
        x = rng.standard_normal([sizes[index] for index in first])
        lensor.clear_caches()
        expected = np.einsum(subscripts.replace(" ", ""), x, dense)
        assert_close(lensor.einsum(subscripts, x, pattern), expected)
        net = lensor.contraction(subscripts, "X", pattern, **{index: sizes[index] for index in first})
        for strategy in lowering.STRATEGIES[:2]:
            plan = lowering.lower(net.simplify(), strategy)
            assert_close(run(plan, {"X": x}), expected)
            tables = [step for step in plan.steps if isinstance(step, s.Constant) and len(step.summed) < 2]
            assert not tables or not CONTRACTIONS[subscripts]


def test_dense_plans_are_left_out_where_a_table_would_be_larger_than_the_operands() -> None:
    small, large = (ops.conv(ConvSpec(4, 4, (size,), 3, padding=1)) for size in (100, 1000))
    names = [
        [candidate.name for candidate in net.plan(X=(8, 4, size), W=(4, 4, 3)).candidates]
        for net, size in ((small, 100), (large, 1000))
    ]
    assert "dense" in names[0]
    assert "dense" not in names[1]
