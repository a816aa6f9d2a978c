"""Random pattern products, run by the Triton kernel and compared with the oracles of whole operations.

On a machine with a GPU the compiled kernel runs; elsewhere Triton's interpreter does, on tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from lensor import ConvSpec, ops
from lensor.curvature.batch import squared_norms
from lensor.evaluate import bind_shapes
from lensor.kernels.torch import patterns
from lensor.kernels.torch.triton import Launcher
from lensor.lowering import BY_NAME, FUSED, lower
from lensor.plan import Plan
from lensor.plan.steps import PatternProduct
from lensor.runtime import run
from tests.support.oracles import OPERATIONS, Case, make_case
from tests.support.strategies import random_call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""The largest error, as a share of the largest entry of the result."""

CHOSEN = (
    *("conv", "conv_transpose", "conv_weight_vjp", "conv_weight_vjp_per_example", "conv_weight_jvp"),
    *("kfac_input_factor", "kfac_output_factor", "ggn_diagonal", "ggn_gram", "ggn_mini_blocks"),
    "norms",
)
"""The operations; `norms` are the squared norms of per-example gradients."""


@contextmanager
def kernel_everywhere(splits: int | None = None) -> Iterator[list[Launcher]]:
    """Inside the `with` block, pattern products run by the kernel on all devices; the launchers are listed."""
    made: list[Launcher] = []

    def launcher(step: PatternProduct) -> Launcher:
        made.append(Launcher(step, splits=splits))
        return made[-1]

    before = patterns._launcher
    patterns._launcher = launcher
    try:
        with nullcontext() if DEVICE == "cuda" else patterns.interpreting():
            yield made
    finally:
        patterns._launcher = before


@dataclass
class Product:
    """A plan with pattern products, operands in a random layout, and the expected result in double precision."""

    case: Case
    plan: Plan
    operands: dict[str, torch.Tensor]
    expected: np.ndarray
    splits: int | None

    def run(self) -> torch.Tensor:
        with kernel_everywhere(self.splits) as made:
            found = run(self.plan, self.operands)
        assert made, "no kernel ran"
        return found

    def error(self) -> float:
        """The largest error, as a share of the largest entry of the result (or of 1, if that is smaller)."""
        found = self.run()
        assert found.shape == self.expected.shape, (found.shape, self.expected.shape)
        assert found.dtype == next(iter(self.operands.values())).dtype
        difference = np.abs(found.double().cpu().numpy() - self.expected)
        assert np.isfinite(difference).all()
        return float(difference.max(initial=0.0)) / max(1.0, float(np.abs(self.expected).max(initial=0.0)))

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.operands.values())).dtype

    def __str__(self) -> str:
        layouts = {name: (tuple(x.shape), x.stride()) for name, x in self.operands.items()}
        return f"{self.case.call}, {self.plan.strategy}, {self.dtype}, splits {self.splits}, {layouts}"


def product_of(seed: int, k: int) -> Product:
    """Case k of a seed."""
    rng = np.random.default_rng([seed, k])
    op = CHOSEN[k % len(CHOSEN)]
    dtype = [*TOLERANCE][int(rng.integers(len(TOLERANCE)))]
    while True:
        found = _drawn(rng, op, dtype)
        if found is not None:
            return found


def _drawn(rng: np.random.Generator, op: str, dtype: torch.dtype) -> Product | None:
    """A random case; None if its plan has no pattern product."""
    known = "conv_weight_vjp_per_example" if op == "norms" else op
    case = make_case(known, **random_call(rng, known), dtype=str(dtype).removeprefix("torch."))
    spec = ConvSpec(**case.spec)
    net = getattr(ops, known)(spec, **case.options)
    expected = case.expected
    shapes = {name: array.shape for name, array in case.operands.items()}
    net = bind_shapes(net.bind(case.sizes) if case.sizes else net, shapes)
    if op == "norms":
        net = bind_shapes(squared_norms(spec), shapes)
        expected = (expected**2).sum(tuple(range(1, expected.ndim)))
    strategy = FUSED[int(rng.integers(len(FUSED)))].name
    plan = lower(net.simplify(), BY_NAME[strategy])
    if not any(isinstance(step, PatternProduct) for step in plan.steps):
        return None
    operands = {name: _laid(rng, torch.from_numpy(array).to(DEVICE, dtype)) for name, array in case.operands.items()}
    operands = {name: operands[name] for name in plan.operands}
    splits = [None, 1, 2, 3][int(rng.integers(4))]
    return Product(case, plan, operands, expected, splits)


def _laid(rng: np.random.Generator, x: torch.Tensor) -> torch.Tensor:
    """The same tensor in one of several layouts."""
    match int(rng.integers(4)):
        case 0:  # another order of axes in memory, such as channels_last
            order = rng.permutation(x.ndim).tolist()
            return x.permute(order).contiguous().permute(np.argsort(order).tolist())
        case 1:  # every second entry of a larger tensor, poisoned between them
            whole = x.new_full([2 * size for size in x.shape], torch.nan)
            whole[tuple(slice(1, None, 2) for _ in x.shape)] = x
            return whole[tuple(slice(1, None, 2) for _ in x.shape)]
        case 2:  # not aligned
            flat = x.new_full((x.numel() + 1,), torch.nan)
            flat[1:] = x.reshape(-1)
            return flat[1:].view(x.shape)
    return x


__all__ = ["CHOSEN", "DEVICE", "OPERATIONS", "TOLERANCE", "Product", "kernel_everywhere", "product_of"]
