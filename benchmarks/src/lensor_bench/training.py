"""Training on real data: KFAC and its forward-only variant, compared with tuned gradient descent and AdamW.

The data of both tasks are included in packages: the digits of scikit-learn, and 32×32 crops of scikit-image's
photographs, where the label is the photograph. Validation crops come from a part of each photograph that training does
not use. Every optimizer is tuned on the first seed over a grid of the same size, then run with all seeds. Seconds are
the number of steps times the time of one step, which is measured after all runs, interleaved for all optimizers of a
task.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lensor.curvature import LinAlgError
from lensor.inspect.errors import choose, require
from lensor.inspect.text import write_rows
from lensor.optim import KFAC
from lensor_bench.measure import interleaved
from lensor_bench.measure import threads as using

PICTURES = (
    *("astronaut", "brick", "camera", "chelsea", "clock", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
    *("immunohistochemistry", "moon", "page", "retina", "rocket", "text", "stereo_motorcycle", "cell"),
)
"""Photographs from the scikit-image package."""

_SIDE, _CROPS, _HELD_OUT = 32, 200, 50
_EVERY = 10
"""Number of steps between validations."""
_BLOCK, _ROUNDS = 10, 7
"""Number of steps in a timed block (a multiple of all update intervals), and number of blocks."""


@dataclass(frozen=True)
class Task:
    """Images [n, channels, height, width] with labels, and a model.

    Args:
        train: inputs and labels for training.
        validate: inputs and labels for validation.
        model: function that creates the model.
    """

    train: tuple[Tensor, Tensor]
    validate: tuple[Tensor, Tensor]
    model: Callable[[], nn.Module]


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


def _digits() -> Task:
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]

    def model() -> nn.Module:
        convolutions = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 10))

    return Task((x[:1400], y[:1400]), (x[1400:], y[1400:]), model)


def _crops() -> Task:
    from skimage import data

    draw = np.random.default_rng(0)
    parts: dict[bool, list[np.ndarray]] = {True: [], False: []}
    labels: dict[bool, list[int]] = {True: [], False: []}
    for label, name in enumerate(PICTURES):
        loaded = getattr(data, name)()
        picture = np.asarray(loaded[0] if isinstance(loaded, tuple) else loaded, np.float32)
        picture = np.repeat(picture[..., None], 3, 2) if picture.ndim == 2 else picture[..., :3]
        picture /= max(float(picture.max()), 1.0)
        cut = int(0.7 * picture.shape[1])
        for training, count, low, high in (
            (True, _CROPS, 0, cut - _SIDE),
            (False, _HELD_OUT, cut, picture.shape[1] - _SIDE),
        ):
            for _ in range(count):
                top, left = draw.integers(picture.shape[0] - _SIDE), draw.integers(low, high)
                parts[training].append(picture[top : top + _SIDE, left : left + _SIDE])
                labels[training].append(label)
    arrays = {key: torch.tensor(np.stack(crops)).movedim(-1, 1).contiguous() for key, crops in parts.items()}
    mean, deviation = arrays[True].mean((0, 2, 3), keepdim=True), arrays[True].std((0, 2, 3), keepdim=True)
    sets = [((arrays[key] - mean) / deviation, torch.tensor(labels[key])) for key in (True, False)]

    def model() -> nn.Module:
        layers: list[nn.Module] = []
        for c_in, c_out, stride in ((3, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, len(PICTURES)))

    return Task(sets[0], sets[1], model)


TASKS: Mapping[str, Callable[[], Task]] = {"digits": _digits, "crops": _crops}

Make = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]


def _optimizers() -> dict[str, dict[str, Make]]:
    """The grid of each optimizer: six settings, by name."""
    rates = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5)
    sgd: dict[str, Make] = {
        f"lr={lr}": lambda m, _, lr=lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9) for lr in rates
    }
    adamw: dict[str, Make] = {
        f"lr={lr}": lambda m, _, lr=lr: torch.optim.AdamW(m.parameters(), lr=lr)
        for lr in (3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2)
    }
    grid = [(damping, clip) for damping in (0.01, 0.03, 0.1) for clip in (3e-4, 1e-3)]
    own: dict[str, dict[str, Any]] = {
        "KFAC": {"fisher": "mc", "inverse_interval": 5},
        "KFAC, reduce": {"fisher": "mc", "approx": "reduce", "inverse_interval": 5},
        "KFAC, forward-only": {"fisher": "forward-only", "approx": "reduce", "method": "woodbury", "ema": 0.0},
    }
    found = {"SGD": sgd, "AdamW": adamw}
    for name, options in own.items():
        found[name] = {
            f"damping={damping}, kl_clip={clip}": lambda m, loss, d=damping, c=clip, o=options: KFAC(
                m, loss, lr=0.1, damping=d, kl_clip=c, **o
            )
            for damping, clip in grid
        }
    return found


def run(names: Sequence[str], steps: int, seeds: int, batch: int, threads: int) -> Iterator[Point]:
    """Tune and train; yields each validation of the final runs.

    Raises:
        CommandError: for an unknown task or a missing package.
    """
    require("torch", "sklearn", "skimage")
    with using(threads):
        for name in choose("task", names, TASKS):
            task = TASKS[name]()
            found, best = [], {}
            for optimizer, grid in _optimizers().items():
                tuned = {
                    settings: [point.loss for point in _train(name, task, optimizer, settings, make, 0, steps, batch)]
                    for settings, make in grid.items()
                }
                chosen = min(tuned, key=lambda settings: statistics.mean(tuned[settings][len(tuned[settings]) // 2 :]))
                best[optimizer] = grid[chosen]
                for seed in range(seeds):
                    found += _train(name, task, optimizer, chosen, grid[chosen], seed, steps, batch)
            models = {optimizer: task.model() for optimizer in best}
            loss = nn.CrossEntropyLoss()
            each = step_seconds(task, {one: (models[one], best[one](models[one], loss)) for one in best}, batch)
            yield from (replace(point, seconds=point.step * each[point.optimizer]) for point in found)


def step_seconds(
    task: Task, runs: Mapping[str, tuple[nn.Module, torch.optim.Optimizer]], batch: int
) -> dict[str, float]:
    """Seconds per training step of each model with its optimizer, from the shortest block; blocks are interleaved."""
    x, y = task.train[0][:batch], task.train[1][:batch]

    def block(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        return torch.stack([training_step(model, optimizer, x, y) for _ in range(_BLOCK)])

    calls = [partial(block, *one) for one in runs.values()]
    for call in calls:
        call()  # create the plans
    times = interleaved(calls, 0.0, _ROUNDS)
    return {name: found.minimum / _BLOCK for name, found in zip(runs, times, strict=True)}


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """Take one step on the cross-entropy of a batch, and return the cross-entropy."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _train(
    name: str, task: Task, optimizer: str, settings: str, make: Make, seed: int, steps: int, batch: int
) -> list[Point]:
    """Train once, without timing; a run that diverges continues with an infinite loss."""
    torch.manual_seed(seed)
    model = task.model()
    chosen = make(model, nn.CrossEntropyLoss())
    x, y = task.train
    draw = torch.Generator().manual_seed(seed)
    found = []
    failed = False
    for step in range(steps + 1):
        if step % _EVERY == 0:
            value, accuracy = validated(model, task.validate) if not failed else (float("inf"), 0.0)
            found.append(Point(name, optimizer, settings, seed, step, 0.0, value, accuracy))
        if failed or step == steps:
            continue
        index = torch.randint(len(x), (batch,), generator=draw)
        try:
            training_step(model, chosen, x[index], y[index])
        except (FloatingPointError, LinAlgError):  # diverged
            failed = True
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


def reached(points: Sequence[Point], task: str) -> list[tuple[str, ...]]:
    """A table of the steps and seconds that each optimizer needs to reach the best loss of tuned SGD or AdamW.

    The target is the lower of the two optimizers' mean best losses. A run reaches the target at its first validation at
    or below it; entries are medians over seeds.
    """
    own = [point for point in points if point.task == task]
    optimizers = list(dict.fromkeys(point.optimizer for point in own))
    best = {
        name: statistics.mean(
            min(point.loss for point in own if point.optimizer == name and point.seed == seed)
            for seed in {point.seed for point in own}
        )
        for name in optimizers
    }
    target = min(best[name] for name in optimizers if name in ("SGD", "AdamW"))
    table = []
    for name in optimizers:
        runs: dict[int, list[Point]] = {}
        for point in own:
            if point.optimizer == name:
                runs.setdefault(point.seed, []).append(point)
        hits = [next((p for p in points if p.loss <= target), None) for points in runs.values()]
        there = [hit for hit in hits if hit is not None]
        steps = f"{statistics.median(hit.step for hit in there):.0f}" if there else "–"
        seconds = f"{statistics.median(hit.seconds for hit in there):.2f}" if there else "–"
        last = [points[-1] for points in runs.values()]
        each = statistics.median(1e3 * point.seconds / max(point.step, 1) for point in last)
        accuracy = statistics.mean(max(point.accuracy for point in points) for points in runs.values())
        settings = last[0].settings
        table.append(
            (
                name,
                settings,
                f"{best[name]:.4f}",
                f"{accuracy:.3f}",
                f"{len(there)}/{len(runs)}",
                steps,
                seconds,
                f"{each:.1f}",
            )
        )
    return table


HEADINGS = ("optimizer", "tuned to", "best loss", "accuracy", "runs there", "steps", "seconds", "ms a step")
"""The columns of `reached`; "there" means at the best loss of SGD and AdamW."""


def write(points: Sequence[Point], folder: Path) -> list[Path]:
    """Write training.csv and a plot of validation loss against steps and seconds."""
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
            color = None
            for seed in sorted({point.seed for point in own}):
                line = [point for point in own if point.optimizer == name and point.seed == seed]
                losses = [point.loss for point in line]
                (drawn,) = row[0].plot(
                    [p.step for p in line], losses, color=color, label=None if color else name, lw=1.2
                )
                color = drawn.get_color()
                row[1].plot([p.seconds for p in line], losses, color=color, lw=1.2)
        row[0].set_ylabel(f"{task}: validation loss")
        for axis, what in zip(row, ("steps", "seconds of training"), strict=True):
            axis.set_yscale("log")
            axis.set_xlabel(what)
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    picture = folder / "training.png"
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return [table, picture]
