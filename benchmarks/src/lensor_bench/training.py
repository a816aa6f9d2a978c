"""Training on image tasks: KFAC, compared with tuned gradient descent, AdamW, Muon and SINGD.

The tasks are the digits of scikit-learn; 32×32 crops of scikit-image's photographs, where the label is the photograph
and validation crops come from a part that training does not use; and generated textures of 64×64. Every tuned optimizer
is tuned on the first seed over a grid of the same size, then run with all seeds. Seconds are the number of steps times
the time of one step, which is measured after all runs, interleaved for all optimizers of a task.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lensor.curvature import LinAlgError
from lensor.inspect.errors import choose, require
from lensor.inspect.text import write_rows
from lensor_bench.measure import interleaved
from lensor_bench.measure import threads as using
from lensor_bench.optimizers import INTERVAL, LOSS, settings
from lensor_bench.tasks import TASKS, Task, cifar_task

__all__ = ["TASKS", "Point", "Task", "reached", "run", "step_seconds", "training_step", "validated", "write"]

_EVERY = 10
"""Number of steps between validations."""
_ROUNDS = 7
"""Number of timed blocks of steps."""


@dataclass(frozen=True)
class Point:
    """One validation during a run.

    Args:
        task: name of the task.
        optimizer: name of the optimizer.
        settings: the tuned settings.
        seed: seed of the run.
        step: number of steps so far.
        seconds: time of these steps.
        loss: validation loss.
        accuracy: fraction of correctly classified validation examples.
    """

    task: str
    optimizer: str
    settings: str
    seed: int
    step: int
    seconds: float
    loss: float
    accuracy: float


class Stepper(Protocol):
    """An optimizer."""

    def zero_grad(self) -> None:
        """Clear the gradients."""
        ...

    def step(self) -> Any:
        """Take a step."""
        ...


@dataclass(frozen=True)
class _Job:
    """One run: the names of the task, the optimizer and its setting, and the seed, number and size of steps."""

    task: str
    optimizer: str
    setting: str
    seed: int
    steps: int
    batch: int
    cifar: Path | None


@cache
def _task(name: str, cifar: Path | None) -> Task:
    return cifar_task(cifar) if cifar is not None and name == CIFAR else TASKS[name]()


CIFAR = "cifar10"
"""The task of CIFAR-10, which needs a folder."""


def run(
    names: Sequence[str],
    steps: int,
    seeds: int,
    batch: int,
    threads: int,
    processes: int = 1,
    cifar: Path | None = None,
) -> Iterator[Point]:
    """Tune and train; yields each validation of the final runs.

    Args:
        names: the tasks; all unless given.
        steps: number of steps of a run.
        seeds: number of seeds.
        batch: batch size.
        threads: number of threads of a run.
        processes: number of runs at the same time; times of steps are measured afterwards.
        cifar: folder with CIFAR-10, for a task of this name.

    Raises:
        CommandError: for an unknown task or a missing package.
    """
    require("torch", "sklearn", "skimage")
    known = {**TASKS, **({} if cifar is None else {CIFAR: None})}
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (threads,)) if processes > 1 else nullcontext()
    with using(threads), pool as executor:
        for name in choose("task", names, known):
            chosen, found = _raced(name, steps, seeds, batch, cifar, executor)
            task, every = _task(name, cifar), settings()
            runs = {}
            for optimizer, setting in chosen.items():
                model = task.model()
                runs[optimizer] = model, every[optimizer][setting].started(model, 10**9)[0]
            each = step_seconds(task, runs, batch)
            yield from (replace(point, seconds=point.step * each[point.optimizer]) for point in found)


def _raced(
    name: str, steps: int, seeds: int, batch: int, cifar: Path | None, executor: Executor | None
) -> tuple[dict[str, str], list[Point]]:
    """The setting that is chosen for each optimizer, and the validations of its runs with all seeds.

    The setting of AdamW is the one with the highest accuracy with the first seed. This accuracy is the target of the
    other optimizers, for which the setting that reaches it first is chosen.
    """
    each = executor.map if executor is not None else map
    every = settings()
    chosen = {optimizer: next(iter(grid)) for optimizer, grid in every.items()}
    tuned = [
        _Job(name, optimizer, setting, 0, steps, batch, cifar)
        for optimizer, grid in every.items()
        for setting in grid
        if len(grid) > 1
    ]
    curves: dict[str, dict[str, list[Point]]] = {}
    for job, points in zip(tuned, each(_train, tuned), strict=True):
        curves.setdefault(job.optimizer, {})[job.setting] = points
    best = {setting: max(point.accuracy for point in points) for setting, points in curves["AdamW"].items()}
    for optimizer, grid in curves.items():
        target = max(best.values())
        chosen[optimizer] = min(grid, key=lambda setting: _rank(grid[setting], target))
    jobs = [
        _Job(name, optimizer, setting, seed, steps, batch, cifar)
        for optimizer, setting in chosen.items()
        for seed in range(seeds)
    ]
    return chosen, [point for points in each(_train, jobs) for point in points]


def _rank(points: Sequence[Point], target: float) -> tuple[float, float]:
    """The order of settings: by the steps to the target, then by the highest accuracy."""
    first = next((point.step for point in points if point.accuracy >= target), float("inf"))
    return first, -max(point.accuracy for point in points)


def step_seconds(task: Task, runs: Mapping[str, tuple[nn.Module, Stepper]], batch: int) -> dict[str, float]:
    """Seconds per training step of each model with its optimizer, from the shortest block; blocks are interleaved."""
    x, y = task.train[0][:batch], task.train[1][:batch]

    def block(model: nn.Module, optimizer: Stepper) -> Tensor:
        return torch.stack([training_step(model, optimizer, x, y) for _ in range(INTERVAL)])

    calls = [partial(block, *one) for one in runs.values()]
    for call in calls:
        call()  # create the plans
    times = interleaved(calls, 0.0, _ROUNDS)
    return {name: found.minimum / INTERVAL for name, found in zip(runs, times, strict=True)}


def training_step(model: nn.Module, optimizer: Stepper, x: Tensor, y: Tensor) -> Tensor:
    """Take one step on the cross-entropy of a batch, and return the cross-entropy."""
    optimizer.zero_grad()
    loss = LOSS(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _train(job: _Job) -> list[Point]:
    """Train once, without timing, until the learning rate is zero; a run that diverges has an infinite loss."""
    torch.manual_seed(job.seed)
    task = _task(job.task, job.cifar)
    model = task.model()
    optimizer, schedules, last = settings()[job.optimizer][job.setting].started(model, job.steps)
    x, y = task.train
    draw = torch.Generator().manual_seed(job.seed)
    found = []
    failed = False
    for step in range(job.steps + 1):
        if step % _EVERY == 0:
            value, accuracy = validated(model, task.validate) if not failed else (float("inf"), 0.0)
            found.append(Point(job.task, job.optimizer, job.setting, job.seed, step, 0.0, value, accuracy))
        if failed or step >= last:
            if step >= last and step % _EVERY == 0:
                break
            continue
        index = torch.randint(len(x), (job.batch,), generator=draw)
        try:
            training_step(model, optimizer, x[index], y[index])
        except (FloatingPointError, LinAlgError):  # diverged
            failed = True
        for schedule in schedules:
            schedule.step()
    return found


def validated(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The cross-entropy (infinity if it is not finite), and the fraction of correctly classified examples."""
    model.eval()
    with torch.no_grad():
        outputs = model(data[0])
        value = float(nn.functional.cross_entropy(outputs, data[1]))
        accuracy = float((outputs.argmax(1) == data[1]).float().mean())
    model.train()
    return (value if np.isfinite(value) else float("inf")), accuracy


def _mean_curve(points: Sequence[Point]) -> list[tuple[int, float, float]]:
    """The steps and seconds of the validations, with the mean accuracy over all seeds."""
    found: dict[int, list[Point]] = {}
    for point in points:
        found.setdefault(point.step, []).append(point)
    return [(step, own[0].seconds, statistics.mean(point.accuracy for point in own)) for step, own in found.items()]


def reached(points: Sequence[Point], task: str) -> list[tuple[str, ...]]:
    """A table of the steps and seconds that each optimizer needs to reach the best accuracy of AdamW.

    All accuracies are means over the seeds at one validation. The target is AdamW's best one, and an optimizer reaches
    it at its first validation at or above it.
    """
    own = [point for point in points if point.task == task]
    by_name: dict[str, list[Point]] = {}
    for point in own:
        by_name.setdefault(point.optimizer, []).append(point)
    curves = {name: _mean_curve(found) for name, found in by_name.items()}
    target = max(accuracy for _, _, accuracy in curves["AdamW"])
    hits = {name: next((p for p in curve if p[2] >= target), None) for name, curve in curves.items()}
    reference = hits["AdamW"]
    assert reference is not None
    table = []
    for name, curve in curves.items():
        hit, found = hits[name], by_name[name]
        each = max(1e3 * seconds / max(step, 1) for step, seconds, _ in curve)
        steps, seconds, ratio = ("–",) * 3
        if hit is not None:
            steps, seconds = str(hit[0]), f"{hit[1]:.2f}"
            ratio = f"{hit[1] / reference[1]:.2f}" if reference[1] else "–"
        seeds = {point.seed for point in found}
        there = {point.seed for point in found if point.accuracy >= target}
        best = f"{max(accuracy for _, _, accuracy in curve):.3f}"
        table.append(
            (name, found[0].settings, best, f"{len(there)}/{len(seeds)}", steps, seconds, ratio, f"{each:.1f}")
        )
    return table


HEADINGS = ("optimizer", "setting", "accuracy", "runs there", "steps", "seconds", "× AdamW's", "ms a step")
"""The columns of `reached`; the steps, the seconds and their ratio are those to the best accuracy of AdamW."""


def write(points: Sequence[Point], folder: Path) -> list[Path]:
    """Write training.csv and a plot of validation accuracy against steps and seconds, as means over the seeds."""
    require("matplotlib")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "training.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        write_rows(file, [[field.name for field in fields(Point)], *(asdict(point).values() for point in points)])
    tasks = list(dict.fromkeys(point.task for point in points))
    figure, axes = plt.subplots(len(tasks), 2, figsize=(10, 3.6 * len(tasks)), squeeze=False, layout="constrained")
    for row, task in zip(axes, tasks, strict=True):
        own = [point for point in points if point.task == task]
        for name in dict.fromkeys(point.optimizer for point in own):
            curve = _mean_curve([point for point in own if point.optimizer == name])
            accuracies = [accuracy for _, _, accuracy in curve]
            row[0].plot([step for step, _, _ in curve], accuracies, label=name, lw=1.2)
            row[1].plot([seconds for _, seconds, _ in curve], accuracies, lw=1.2)
        row[0].set_ylabel(f"{task}: validation accuracy")
        for axis, what in zip(row, ("steps", "seconds of training"), strict=True):
            axis.set_xlabel(what)
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    picture = folder / "training.png"
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return [table, picture]
