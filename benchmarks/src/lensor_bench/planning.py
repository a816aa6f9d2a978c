"""The time to plan a network: cold, for another batch size, and once the plans of two other sizes are known."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lensor.cache import cached_bytes, clear_caches
from lensor.inspect.operations import OPERATIONS
from lensor.spec import ConvSpec
from lensor_bench.run import Bench, Case

_BATCHES = (8, 12, 11)
"""The batch sizes of the cold plan, of the second and of the third."""

_ROUNDS = 3
"""The shortest of this many rounds counts."""


@dataclass(frozen=True)
class Planning:
    """The times to plan one operation of one convolution, in milliseconds of one core.

    Args:
        operation: name of the operation.
        layer: the convolution.
        cold: nothing is cached.
        second: another batch size, for which the estimates of the candidates are computed.
        third: a further batch size.
    """

    operation: str
    layer: str
    cold: float
    second: float
    third: float


def measure(bench: Bench) -> Iterator[Planning]:
    """Time the planning of each case."""
    for case in bench.cases:
        rounds = [_times(case, bench.settings.columns) for _ in range(_ROUNDS)]
        cold, second, third = (min(times) for times in zip(*rounds, strict=True))
        yield Planning(case.operation.name, case.layer.label, cold, second, third)


def _times(case: Case, columns: int) -> list[float]:
    clear_caches()
    net = case.operation.network(case.layer.spec)
    taken = []
    for batch in _BATCHES:
        shapes = case.operation.shapes(case.layer.spec, batch, columns)
        start = time.process_time()
        net.plan(**shapes)
        taken.append(1e3 * (time.process_time() - start))
    return taken


@dataclass(frozen=True)
class Kept:
    """What is kept after plans for many shapes have run.

    Args:
        shapes: number of different shapes.
        nbytes: the weight of all entries of Lensor's caches.
        resident: the memory of the process.
    """

    shapes: int
    nbytes: int
    resident: int


def kept(shapes: int) -> Iterator[Kept]:
    """Plan and run operations for many different shapes; yield what is kept at the start and ten times on the way."""
    clear_caches()
    yield Kept(0, cached_bytes(), _resident())
    operations = [OPERATIONS[name] for name in ("forward", "kfac_expand", "kfac_reduce", "weight_vjp")]
    for at in range(shapes):
        spec = ConvSpec(2, 2, (8 + at // 400, 8 + at // 20 % 20), 3, padding=1)
        operation = operations[at % len(operations)]
        arrays = {name: torch.zeros(shape) for name, shape in operation.shapes(spec, 4 + at % 20, 2).items()}
        operation.network(spec)(**arrays)
        if (at + 1) % max(shapes // 10, 1) == 0:
            yield Kept(at + 1, cached_bytes(), _resident())


def _resident() -> int:
    """The resident memory of this process in bytes; 0 where the system does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0
