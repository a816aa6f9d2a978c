"""Costs and savings of sampled backpropagation: memory and time of a step, time of weight gradients, and training.

The model is All-CNN-C without dropout on a batch of 32×32 images. Weight gradients are measured for the 3×3
convolutions of ResNet-18. Training uses small CNNs on the digits of scikit-learn and on crops of photographs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.utils.checkpoint import checkpoint_sequential

from lensor import ops, sampling
from lensor.inspect.errors import choose, require
from lensor.inspect.text import write_rows
from lensor.sampling.schemes import draw
from lensor.spec import ConvSpec
from lensor_bench.measure import interleaved, peak_bytes
from lensor_bench.measure import threads as using
from lensor_bench.nets import all_cnn_c
from lensor_bench.training import TASKS, Task, step_seconds, training_step, validated

KEEPS = (0.75, 0.5, 0.25, 0.1)
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))
"""Number of channels and input size of the general 3×3 convolutions."""

TRAINED = (1.0, 0.5, 0.25)
"""Fractions of the positions to keep in training."""

STEPS, GRADIENTS, TRAINING, PLOT = "steps.csv", "gradients.csv", "training.csv", "training.png"
"""The files in the output folder."""

_DRAWS = 3
"""Number of draws before the measurement: blocks need several plans, which depend on their starts."""

_SEGMENTS = 3
"""Number of segments in a checkpointed model."""


@dataclass(frozen=True)
class StepRow:
    """One way to compute a training step.

    Args:
        way: name of the way.
        saved: number of bytes stored for the backward pass.
        peak: peak memory besides parameters and inputs, in bytes.
        ratio: the time of the step divided by the time of torch's.
    """

    way: str
    saved: int
    peak: int
    ratio: float


@dataclass(frozen=True)
class GradientRow:
    """One sampled weight gradient, with its time divided by that of the faster exact one, torch's or Lensor's."""

    layer: str
    indices: str
    keep: float
    milliseconds: float
    ratio: float


@dataclass(frozen=True)
class TrainingRow:
    """One validation during a run."""

    task: str
    keep: float
    seed: int
    step: int
    seconds: float
    loss: float
    accuracy: float
    peak: int


def _spatial(keep: float) -> dict[str, float]:
    return {"i1": keep**0.5, "i2": keep**0.5}


# ---------------------------------------------------------------------------------------------------------------- steps
def steps(batch: int, seconds: float, repeats: int, threads: int) -> list[StepRow]:
    """Measure memory and time of a training step of All-CNN-C: with torch, with checkpoints, and sampled."""
    require("torch")
    torch.manual_seed(0)
    model = all_cnn_c()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(100, (batch,))
    ways: dict[str, nn.Module] = {"torch": model, "checkpointing": _Checkpointed(model)}
    ways["rectifiers keep a byte"] = sampling.convert(model, {"i1": 1.0})
    for keep in KEEPS:
        for name, rates, scheme in (
            ("channels", {"c_in": keep}, "fixed"),
            ("positions", _spatial(keep), "fixed"),
            ("blocks", _spatial(keep), "blocks"),
            ("rows", {"i1": keep}, "blocks"),
            ("examples", {"n": keep}, "fixed"),
        ):
            ways[f"{name}, keep {keep:g}"] = sampling.convert(model, rates, scheme=scheme)

    def step(one: nn.Module) -> Tensor:
        one.zero_grad()
        loss = nn.functional.cross_entropy(one(x), y)
        loss.backward()
        return loss.detach()

    with using(threads):
        calls = {name: partial(step, one) for name, one in ways.items()}
        for call in calls.values():
            for _ in range(_DRAWS):
                call()  # create the plans
        times = interleaved(list(calls.values()), seconds, min(2, repeats), repeats)
        rows = []
        for (name, call), found in zip(calls.items(), times, strict=True):
            saved = sampling.saved_bytes(ways[name], x)
            rows.append(StepRow(name, saved, peak_bytes(call)[0], found.minimum / times[0].minimum))
    return rows


class _Checkpointed(nn.Module):
    """A sequential model whose segments are recomputed in the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(list(self.model.children()), _SEGMENTS, x, use_reentrant=False)


# ------------------------------------------------------------------------------------------------------------ gradients
def gradients(batch: int, seconds: float, repeats: int, threads: int) -> Iterator[GradientRow]:
    """Time sampled weight gradients of general convolutions, each interleaved with the exact gradient."""
    require("torch")
    with using(threads):
        for channels, size in LAYERS:
            spec = ConvSpec(channels, channels, (size, size), 3, padding=1)
            x, v = torch.randn(batch, channels, size, size), torch.randn(batch, channels, size, size)
            net = ops.conv_weight_vjp(spec)
            weight = (channels, channels, 3, 3)
            calls: list[Any] = [
                partial(conv2d_weight, x, weight, v, padding=1),
                partial(net, X=x, V=v),
            ]
            named = []
            for keep in KEEPS:
                for rates in (_spatial(keep), {"i1": keep}, {"c_in": keep}):
                    sampled, part, given = net.bind(n=batch), x, {}
                    for index, rate in rates.items():
                        axis = {"c_in": 1, "i1": 2, "i2": 3}[index]
                        found = draw(x.shape[axis], rate, "fixed", generator=torch.Generator().manual_seed(0))
                        sampled = sampled.sample(index, found.keep, stored=["X"])
                        if index == "c_in":
                            sampled = sampled.bind(c_in_full=channels)
                        part = part.index_select(axis, found.positions)
                        given[f"{index}_positions"] = found.positions
                    calls.append(partial(sampled, X=part, V=v, **given))
                    named.append((" ".join(rates), keep))
            times = interleaved(calls, seconds, min(5, repeats), repeats)
            exact = min(times[0].minimum, times[1].minimum)
            for (indices, keep), found in zip(named, times[2:], strict=True):
                layer = f"{channels}→{channels} 3×3 @{size}²"
                yield GradientRow(layer, indices, keep, 1e3 * found.minimum, found.minimum / exact)


# ------------------------------------------------------------------------------------------------------------- training
def train(tasks: Sequence[str], steps: int, seeds: int, batch: int, threads: int) -> Iterator[TrainingRow]:
    """Train on the tasks of `lensor bench training` with AdamW, keeping all, half or a quarter of the positions.

    Seconds are the number of steps times the time of one step, which is measured before the runs, interleaved for all
    rates.

    Raises:
        CommandError: for an unknown task or a missing package.
    """
    require("torch", "sklearn", "skimage")
    with using(threads):
        for name in choose("task", tasks, TASKS):
            task = TASKS[name]()
            models = {f"{keep:g}": _model(task, keep, 0) for keep in TRAINED}
            runs = {keep: (model, _optimizer(model)) for keep, model in models.items()}
            each = step_seconds(task, runs, batch)
            x, y = task.train[0][:batch], task.train[1][:batch]
            for keep in TRAINED:
                peak = peak_bytes(partial(training_step, *runs[f"{keep:g}"], x, y))[0]
                for seed in range(seeds):
                    model = _model(task, keep, seed)
                    for step, loss, accuracy in _run(task, model, seed, steps, batch):
                        yield TrainingRow(name, keep, seed, step, step * each[f"{keep:g}"], loss, accuracy, peak)


def _model(task: Task, keep: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = task.model()
    return sampling.convert(model, _spatial(keep), scheme="fixed") if keep < 1 else model


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3)


def _run(task: Task, model: nn.Module, seed: int, steps: int, batch: int) -> Iterator[tuple[int, float, float]]:
    """Yield step, validation loss and accuracy after every twentieth step."""
    generator, optimizer = torch.Generator().manual_seed(seed), _optimizer(model)
    x, y = task.train
    for at in range(steps + 1):
        if at % 20 == 0:
            yield (at, *validated(model, task.validate))
        if at < steps:
            chosen = torch.randint(len(x), (batch,), generator=generator)
            training_step(model, optimizer, x[chosen], y[chosen])


# ---------------------------------------------------------------------------------------------------------------- files
def write_csv(rows: Sequence[Any], path: Path) -> Path:
    """Write rows of one type to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        write_rows(file, [[field.name for field in fields(rows[0])], *(asdict(row).values() for row in rows)])
    return path


def summary(rows: Sequence[TrainingRow]) -> list[tuple[str, ...]]:
    """One row per task and keep rate: final accuracy, steps and seconds to about the exact accuracy, peak memory."""
    found = []
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        last = max(row.step for row in mine)
        target = statistics.mean(row.accuracy for row in mine if row.keep == 1.0 and row.step == last) - 0.01
        for keep in sorted({row.keep for row in mine}, reverse=True):
            own = [row for row in mine if row.keep == keep]
            ends = [row.accuracy for row in own if row.step == last]
            hits = [
                next((row for row in own if row.seed == seed and row.accuracy >= target), None)
                for seed in sorted({row.seed for row in own})
            ]
            there = [hit for hit in hits if hit is not None]
            spread = f" ± {statistics.stdev(ends):.3f}" if len(ends) > 1 else ""
            found.append(
                (
                    *(task, f"{keep:g}", f"{statistics.mean(ends):.3f}{spread}", f"{len(there)}/{len(hits)}"),
                    f"{statistics.median(hit.step for hit in there):.0f}" if there else "–",
                    f"{statistics.median(hit.seconds for hit in there):.1f}" if there else "–",
                    f"{max(row.peak for row in own) / 2**20:.1f}",
                )
            )
    return found


SUMMARY = ("task", "keep", "accuracy at the end", "runs there", "steps", "seconds", "peak of a step, MiB")
"""The columns of `summary`; "there" means one point below the final accuracy of the exact runs."""


def plot(rows: Sequence[TrainingRow], path: Path) -> Path:
    """Plot validation accuracy against steps and seconds, and peak memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(12.0, 3.6 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), 3, width_ratios=(3, 3, 1.4), squeeze=False)
    for (steps, seconds, memory), task in zip(axes, tasks, strict=True):
        mine = [row for row in rows if row.task == task]
        keeps = sorted({row.keep for row in mine}, reverse=True)
        for at, keep in enumerate(keeps):
            for seed in sorted({row.seed for row in mine}):
                own = [row for row in mine if (row.keep, row.seed) == (keep, seed)]
                label = f"keep {keep:g}" if seed == 0 else None
                steps.plot([row.step for row in own], [row.accuracy for row in own], color=f"C{at}", label=label)
                seconds.plot([row.seconds for row in own], [row.accuracy for row in own], color=f"C{at}")
        peaks = [max(row.peak for row in mine if row.keep == keep) / 2**20 for keep in keeps]
        memory.bar([f"{keep:g}" for keep in keeps], peaks, color=[f"C{at}" for at in range(len(keeps))])
        memory.set_xlabel("keep")
        memory.set_ylabel("peak of a training step, MiB")
        for axis, text in ((steps, "steps"), (seconds, "seconds of training")):
            axis.set_xlabel(text)
            axis.set_ylabel(f"{task}: validation accuracy")
            axis.grid(alpha=0.3)
        steps.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return path
