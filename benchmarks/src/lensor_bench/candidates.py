"""Times of all candidate plans of an operation, to judge the choice by estimates."""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from lensor.evaluate import bind_shapes
from lensor.inspect.errors import CommandError
from lensor.kernels import load
from lensor.lowering import candidates
from lensor.plan import Plan
from lensor.planner import Machine, estimate, profile_of
from lensor.planner.cost import step_times
from lensor.runtime import Runnable
from lensor_bench.implementations import IMPLEMENTATIONS, STANDARD
from lensor_bench.measure import interleaved, neighbours, threads
from lensor_bench.run import Bench, Case

_HOPELESS = 30
"""Plans whose estimate exceeds the lowest by more than this factor are not run."""


@dataclass(frozen=True)
class Candidate:
    """One candidate plan of an operation of a convolution.

    Args:
        operation: name of the operation.
        convolution: label of the convolution, with the net.
        plan: name of the plan.
        estimate: estimated seconds.
        seconds: shortest measured seconds.
        standard: shortest seconds of the standard implementation in the same rounds.
        calls: number of framework calls that are not views.
        flops: additions and multiplications.
        nbytes: bytes read and written.
        largest: name of the step with the longest estimate, with the number of such steps.
    """

    operation: str
    convolution: str
    plan: str
    calls: int
    flops: int
    nbytes: int
    largest: str
    estimate: float
    seconds: float
    standard: float


@dataclass(frozen=True)
class Choice:
    """The plan with the lowest estimate, and the fastest plan of the same operation and convolution."""

    chosen: Candidate
    fastest: Candidate

    @property
    def regret(self) -> float:
        """The time of the chosen plan divided by that of the fastest plan."""
        return self.chosen.seconds / self.fastest.seconds

    @property
    def ratio(self) -> float:
        """The time of the chosen plan divided by that of the standard implementation."""
        return self.chosen.seconds / self.chosen.standard


@dataclass(frozen=True)
class Summary:
    """The choices of one operation: their number, the median and 95th percentile of the regret, and the worst one."""

    operation: str
    count: int
    median: float
    high: float
    worst: Choice


def measured(bench: Bench) -> Iterator[tuple[Case, list[Candidate]]]:
    """Time the candidates of each case, interleaved with the standard implementation."""
    with threads(bench.settings.threads), torch.no_grad(), neighbours(bench.settings.neighbours):
        for case in bench.cases:
            yield case, _measured(bench, case)


def _measured(bench: Bench, case: Case) -> list[Candidate]:
    operands = bench.operands(case)
    backend = load("torch")
    kind = backend.kind(next(iter(operands.values())))
    net = bind_shapes(
        case.operation.network(case.layer.spec), {name: tuple(array.shape) for name, array in operands.items()}
    )
    plans = [plan for plan in candidates(net) if backend.can_run(plan.steps, kind)]
    device, dtype = profile_of(backend, kind), backend.dtype(kind)
    estimates = [estimate(plan, device, backend.itemsize(kind), dtype) for plan in plans]
    kept = [at for at in range(len(plans)) if estimates[at] <= _HOPELESS * min(estimates)]
    runs = [Runnable(plans[at], backend) for at in kept]
    standard = IMPLEMENTATIONS[STANDARD].ways[case.operation.name](operands, case.layer.spec)
    calls = [standard, *(lambda run=run: run(operands) for run in runs)]
    for call in calls:
        call()
    settings = bench.settings
    times = interleaved(calls, settings.seconds, min(3, settings.repeats), settings.repeats, bench.device)
    return [
        Candidate(
            case.operation.name,
            case.layer.label,
            plans[at].name,
            *_work(plans[at], device, backend.itemsize(kind), dtype),
            estimates[at],
            taken.minimum,
            times[0].minimum,
        )
        for at, taken in zip(kept, times[1:], strict=True)
    ]


def _work(plan: Plan, device: Machine, itemsize: int, dtype: str) -> tuple[int, int, int, str]:
    """The calls, flops and bytes of a plan, and the kind of step that takes the most time."""
    taken: dict[str, float] = {}
    calls = 0.0
    for place, seconds in enumerate(step_times(plan, device, itemsize, dtype)):
        step = plan.steps[place]
        taken[step.name] = taken.get(step.name, 0.0) + seconds
        calls += 0 if step.is_view else step.calls([plan.shapes[at] for at in step.takes], plan.shapes[place])
    name = max(taken, key=taken.__getitem__)
    return (
        round(calls),
        plan.flops,
        plan.bytes // plan.itemsize * itemsize,
        f"{sum(step.name == name for step in plan.steps)} {name}",
    )


def choices(rows: Sequence[Candidate]) -> list[Choice]:
    """The choice by estimate of each operation and convolution."""

    def key(row: Candidate) -> tuple[str, str]:
        return row.operation, row.convolution

    groups = (list(group) for _, group in itertools.groupby(sorted(rows, key=key), key))
    return [
        Choice(min(group, key=lambda row: row.estimate), min(group, key=lambda row: row.seconds)) for group in groups
    ]


def summaries(found: Sequence[Choice]) -> list[Summary]:
    """A summary of each operation, in order."""
    result = []
    for operation in dict.fromkeys(choice.chosen.operation for choice in found):
        mine = [choice for choice in found if choice.chosen.operation == operation]
        regrets = sorted(choice.regret for choice in mine)
        high = regrets[min(int(0.95 * len(regrets)), len(regrets) - 1)]
        worst = max(mine, key=lambda choice: choice.regret)
        result.append(Summary(operation, len(mine), statistics.median(regrets), high, worst))
    return result


def write(path: Path, rows: Sequence[Candidate]) -> None:
    """Write the times of candidates to a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Candidate)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(path: Path) -> list[Candidate]:
    """Read a file written by `write`.

    Raises:
        CommandError: if the file has other columns.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = [field.name for field in fields(Candidate)]
        if reader.fieldnames != names:
            raise CommandError(f"{path} has the columns {reader.fieldnames}, expected {names}")
        convert = {"str": str, "int": int, "float": float}
        return [
            Candidate(**{field.name: convert[str(field.type)](row[field.name]) for field in fields(Candidate)})
            for row in reader
        ]
