"""The time that a cached call of each function adds to its torch calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lensor import functional as F
from lensor import ops
from lensor.evaluate import compile
from lensor.kernels import load
from lensor.network import AnyNetwork
from lensor.runtime import runnable
from lensor.spec import ConvSpec
from lensor_bench.measure import interleaved

_ROUNDS, _CALLS = 200, 20
_SECONDS = 1.0
_SPEC = ConvSpec(4, 4, (6, 6), 3)
_TRANSPOSED = ConvSpec(4, 4, (6, 6), 3, transposed=True)


@dataclass(frozen=True)
class Overhead:
    """Times of one function after a warm-up, in microseconds.

    Args:
        name: the function.
        gradient: whether the function's first array requires a gradient.
        raw: time of the plan's torch calls alone.
        call: time of the function.
    """

    name: str
    gradient: bool
    raw: float
    call: float

    @property
    def added(self) -> float:
        """The time that the function adds."""
        return self.call - self.raw


@dataclass(frozen=True)
class _Case:
    """A function, its arrays by name in the order of its arguments, and the network that it evaluates."""

    network: AnyNetwork
    function: Callable[..., Any]
    shapes: Mapping[str, tuple[int, ...]]


_X, _W, _V, _S = (2, 4, 6, 6), (4, 4, 3, 3), (2, 4, 4, 4), (2, 2, 4, 4, 4)

CASES = {
    "conv": _Case(ops.conv(_SPEC), F.conv, {"X": _X, "W": _W}),
    "conv_transpose": _Case(ops.conv(_TRANSPOSED), F.conv_transpose, {"X": _X, "W": _W}),
    "unfold": _Case(ops.unfold(_SPEC), partial(F.unfold, kernel_size=3), {"X": _X}),
    "unfold_transpose": _Case(ops.unfold_transpose(_TRANSPOSED), partial(F.unfold_transpose, kernel_size=3), {"X": _X}),
    "conv_input_vjp": _Case(ops.conv_input_vjp(_SPEC), partial(F.conv_input_vjp, _X), {"W": _W, "V": _V}),
    "conv_weight_vjp": _Case(ops.conv_weight_vjp(_SPEC), lambda x, v: F.conv_weight_vjp(x, _W, v), {"X": _X, "V": _V}),
    "conv_weight_vjp_per_example": _Case(
        ops.conv_weight_vjp_per_example(_SPEC), lambda x, v: F.conv_weight_vjp_per_example(x, _W, v), {"X": _X, "V": _V}
    ),
    "kfac_input_factor, expand": _Case(
        ops.kfac_input_factor(_SPEC), partial(F.kfac_input_factor, kernel_size=3), {"X": _X}
    ),
    "kfac_input_factor, reduce": _Case(
        ops.kfac_input_factor(_SPEC, "reduce"), partial(F.kfac_input_factor, kernel_size=3, approx="reduce"), {"X": _X}
    ),
    "kfac_output_factor": _Case(ops.kfac_output_factor(_SPEC), F.kfac_output_factor, {"V": _S}),
    "ggn_diagonal": _Case(ops.ggn_diagonal(_SPEC), lambda x, s: F.ggn_diagonal(x, _W, s), {"X": _X, "S": _S}),
    "ggn_gram": _Case(ops.ggn_gram(_SPEC), lambda x, s: F.ggn_gram(x, _W, s), {"X": _X, "S": _S}),
}
"""The calls to measure, which are small, so that the added time is visible."""


def measure(seconds: float = _SECONDS) -> Iterable[Overhead]:
    """The overhead of every function, with and without a gradient: the shortest of many interleaved rounds."""
    for gradient in (False, True):
        for name, case in CASES.items():
            made = torch.Generator().manual_seed(0)
            arrays = {name: torch.randn(shape, generator=made) for name, shape in case.shapes.items()}
            next(iter(arrays.values())).requires_grad_(gradient)
            ready = runnable(compile(case.network, case.shapes, like=next(iter(arrays.values()))), load("torch"))
            raw = partial(ready.unrecorded, *(arrays[name] for name in ready.names))
            call = partial(case.function, *arrays.values())
            pair = interleaved([_repeated(raw), _repeated(call)], seconds / 2, most=_ROUNDS)
            yield Overhead(name, gradient, *(1e6 * times.minimum / _CALLS for times in pair))


def _repeated(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def repeated() -> torch.Tensor:
        for _ in range(_CALLS - 1):
            call()
        return call()

    return repeated
