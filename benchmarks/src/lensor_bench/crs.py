"""The paper's figure 8: the error of sampled gradients as a function of the fraction of the input that is kept.

The model is the untrained All-CNN-C without dropout. For the gradients of all kernels, flattened into one vector g, and
their sampled proxies ĝ, the figure shows the mean and standard deviation of ‖ĝ − g‖ / ‖g‖ over initialisations of the
model and the batch. In addition to the paper's two curves (Bernoulli sampling of channels, (p, 1, 1), and of positions,
(1, √p, √p)), the figure shows other indices and schemes, and plots the error against the time of the backward pass. The
time is measured for the first seed, alternately with the exact backward pass.

Times are warm: they exclude planning for the drawn counts. With Bernoulli or importance sampling, training draws new
counts at each step, and each new count needs a plan.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lensor import sampling
from lensor.inspect.errors import CommandError, require
from lensor.inspect.files import read_bytes, require_regular
from lensor.inspect.text import from_cell, write_rows
from lensor.sampling.layers import Sampled
from lensor_bench.cifar import cifar100
from lensor_bench.measure import interleaved
from lensor_bench.measure import threads as using
from lensor_bench.nets import all_cnn_c
from lensor_bench.results import Machine, difference, finished
from lensor_bench.training import TASKS

CHANNELS, POSITIONS, ROWS, EXAMPLES = ("c_in",), ("i1", "i2"), ("i1",), ("n",)
PAPER = ((CHANNELS, "bernoulli"), (POSITIONS, "bernoulli"))
OTHERS = (
    (CHANNELS, "fixed"),
    (CHANNELS, "importance"),
    (POSITIONS, "fixed"),
    (POSITIONS, "blocks"),
    (POSITIONS, "importance"),
    (ROWS, "blocks"),
    (EXAMPLES, "fixed"),
    (EXAMPLES, "importance"),
)
"""(indices, scheme): every index has the same keep rate; the product of the rates is the kept fraction of the input."""

_ROUNDS = 3
"""Number of rounds in which a sampled and the exact backward pass are timed."""

REAL, SYNTHETIC, CIFAR = "crops of pictures", "normal numbers", "CIFAR-100"


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    Args:
        batch: batch size.
        shares: kept fractions of the input, for the paper's two curves.
        few: kept fractions, for the other indices and schemes.
        seeds: number of initialisations of the model and the batch, for the paper's curves.
        others: number of initialisations, for the other indices and schemes.
        cifar: a folder with CIFAR-100, to measure on it as well; None to skip it.
    """

    batch: int = 128
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.75, 0.9)
    few: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)
    seeds: int = 10
    others: int = 3
    cifar: Path | None = None

    @classmethod
    def quick(cls, cifar: Path | None = None) -> Settings:
        """Settings with small batches and few fractions."""
        return cls(16, (0.1, 0.35, 0.75), (0.25, 0.75), seeds=3, others=1, cifar=cifar)

    @property
    def data(self) -> tuple[str, ...]:
        """The names of the data sets."""
        return (REAL, SYNTHETIC) if self.cifar is None else (REAL, SYNTHETIC, CIFAR)


@dataclass(frozen=True)
class Made(Machine):
    """The setting in which points are measured: the machine, the versions, and the number of torch threads."""

    threads: int

    @property
    def label(self) -> str:
        """The setting in one line."""
        return f"threads {self.threads}; {super().label}"


@dataclass(frozen=True)
class Point:
    """One sampled gradient.

    Args:
        data: name of the input data.
        batch: batch size.
        indices: sampled indices, joined by spaces.
        scheme: sampling scheme.
        share: kept fraction of the input.
        seed: seed of model and batch.
        error: ‖ĝ − g‖ / ‖g‖.
        seconds: time of the backward pass without planning; NaN if it was not timed.
        exact_seconds: time of the exact backward pass, measured alternately with the sampled one.
        made: the setting of the measurement.
    """

    data: str
    batch: int
    indices: str
    scheme: str
    share: float
    seed: int
    error: float
    seconds: float
    exact_seconds: float
    made: Made

    @property
    def key(self) -> tuple[object, ...]:
        """The fields that identify the point."""
        return (self.data, self.batch, self.indices, self.scheme, self.share, self.seed)


Batch = Callable[[int, int], tuple[Tensor, Tensor]]
"""(batch size, seed) -> inputs and labels."""


def _data(settings: Settings) -> dict[str, Batch]:
    def synthetic(count: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(count, 3, 32, 32, generator=generator)
        return inputs, torch.randint(100, (count,), generator=generator)

    found = {REAL: _drawn(*TASKS["crops"]().train), SYNTHETIC: synthetic}
    if settings.cifar is not None:
        pictures, labels = map(torch.from_numpy, cifar100(settings.cifar))
        some = pictures[:10_000].float()
        mean, deviation = some.mean((0, 2, 3), keepdim=True), some.std((0, 2, 3), keepdim=True)
        draw = _drawn(pictures, labels)

        def cifar(count: int, seed: int) -> tuple[Tensor, Tensor]:
            x, y = draw(count, seed)
            return (x.float() - mean) / deviation, y

        found[CIFAR] = cifar
    return found


def _drawn(x: Tensor, y: Tensor) -> Batch:
    def batch(count: int, seed: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
        return x[chosen], y[chosen]

    return batch


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradients of all kernels in one vector."""
    return _backward(*_forward(model, x, y))


def _forward(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    kernels: list[Tensor] = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    return nn.functional.cross_entropy(model(x), y), kernels


def _backward(loss: Tensor, kernels: list[Tensor]) -> Tensor:
    found = torch.autograd.grad(loss, kernels, retain_graph=True)
    return torch.cat([one.flatten() for one in found])


def _timed(sampled: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Seconds for the sampled and the exact backward pass, timed alternately; one draw, planned beforehand."""
    calls = [partial(_backward, *_forward(one, x, y)) for one in (sampled, model)]
    for call in calls:
        call()
    first, second = interleaved(calls, 0.0, _ROUNDS)
    return first.minimum, second.minimum


def _wanted(settings: Settings) -> Iterator[tuple[str, int, list[tuple[tuple[str, ...], str, float]]]]:
    """Yield each data set and seed with the (indices, scheme, share) of all its points."""
    for seed in range(settings.seeds):
        for data in settings.data:
            found = [(indices, scheme, share) for indices, scheme in PAPER for share in settings.shares]
            if data == REAL and seed < settings.others:
                found += [(indices, scheme, share) for indices, scheme in OTHERS for share in settings.few]
            yield data, seed, found


def wanted_keys(settings: Settings) -> set[tuple[object, ...]]:
    """The keys of all points."""
    return {
        (data, settings.batch, " ".join(indices), scheme, share, seed)
        for data, seed, found in _wanted(settings)
        for indices, scheme, share in found
    }


def run(settings: Settings, made: Made, known: Sequence[Point]) -> Iterator[Point]:
    """Measure the missing points with the number of threads in `made`, which the points record."""
    require("torch", "skimage")
    done = {point.key for point in known}
    batches = _data(settings)
    with using(made.threads):
        for data, seed, wanted in _wanted(settings):
            missing = [
                (indices, scheme, share)
                for indices, scheme, share in wanted
                if (data, settings.batch, " ".join(indices), scheme, share, seed) not in done
            ]
            if not missing:
                continue
            torch.manual_seed(seed)
            model = all_cnn_c()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            sampled = sampling.convert(model, {"i1": 1.0}, activations=False)
            layers = [module for module in sampled.modules() if isinstance(module, Sampled)]
            x, y = batches[data](settings.batch, seed)
            exact = _gradient(model, x, y)
            for indices, scheme, share in missing:
                for layer in layers:
                    layer.set_sampling({index: share ** (1 / len(indices)) for index in indices}, scheme)
                timed = seed == 0 and data == REAL
                seconds, exact_seconds = _timed(sampled, model, x, y) if timed else (math.nan, math.nan)
                found = _gradient(sampled, x, y)
                error = float((found - exact).norm() / exact.norm())
                times = (seconds, exact_seconds)
                yield Point(data, settings.batch, " ".join(indices), scheme, share, seed, error, *times, made)


# --------------------------------------------------------------------------------------------------------------- files
_OWN = tuple(field.name for field in fields(Point) if field.name != "made")
HEADER = (*_OWN, *(field.name for field in fields(Made)))
"""Columns of a file of points."""

_KINDS = {
    **dict.fromkeys(("batch", "seed", "cores", "threads"), int),
    **dict.fromkeys(("share", "error", "seconds", "exact_seconds"), float),
}
"""The types of columns that do not contain text."""


def read(path: Path, made: Made) -> list[Point]:
    """Read the points that a previous run wrote; none if there is no file.

    An unfinished last line is ignored and removed.

    Args:
        path: the file.
        made: the setting of new points.

    Raises:
        CommandError: if the file has a different format, is damaged, or contains points with a different setting; the
            file is left unchanged.
    """
    require_regular(path)
    if not path.exists():
        return []
    data = read_bytes(path)
    whole = finished(data)
    lines = csv.DictReader(io.StringIO(whole.decode("utf-8", "replace"), newline=""))
    if tuple(lines.fieldnames or ()) != HEADER:
        raise CommandError(
            f"{path} is not a file of this version of `lensor reproduce crs`: remove it, or specify a different --out"
        )
    try:
        points = [_point(line) for line in lines]
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error):
        raise CommandError(f"{path} is corrupt at line {lines.line_num}: repair or remove it") from None
    for point in points:
        if point.made != made:
            raise CommandError(
                f"{path} was measured with a different number of threads, on a different machine or with"
                f" different versions ({difference(point.made, made)}): specify a different --out"
            )
    if whole != data:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return points


def _point(line: dict[str, str]) -> Point:
    values: dict[str, Any] = {name: _KINDS.get(name, str)(from_cell(value)) for name, value in line.items()}
    made = Made(**{field.name: values.pop(field.name) for field in fields(Made)})
    return Point(**values, made=made)


def append(path: Path, point: Point) -> None:
    """Append a point to a file, which is created if it does not exist."""
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        record = asdict(point)
        record |= record.pop("made")
        write_rows(file, [*([HEADER] if new else []), [record[name] for name in HEADER]])


# ------------------------------------------------------------------------------------------------------------- summary
def errors(points: Sequence[Point], data: str, indices: Sequence[str], scheme: str) -> dict[float, list[float]]:
    """The errors, by share."""
    found: dict[float, list[float]] = {}
    for point in points:
        if (point.data, point.indices, point.scheme) == (data, " ".join(indices), scheme):
            found.setdefault(point.share, []).append(point.error)
    return dict(sorted(found.items()))


def equal_share(points: Sequence[Point], data: str, channels: float = 0.75) -> float | None:
    """The fraction of positions with the same mean error as a fraction of channels; None if it cannot be determined.

    Between measured fractions, log(error) is interpolated linearly.
    """
    reference = errors(points, data, *PAPER[0]).get(channels)
    curve = [(share, math.log(statistics.mean(values))) for share, values in errors(points, data, *PAPER[1]).items()]
    if reference is None:
        return None
    wanted = math.log(statistics.mean(reference))
    for (low, above), (high, below) in itertools.pairwise(curve):
        if above >= wanted >= below:
            return low + (high - low) * (above - wanted) / (above - below) if above > below else low
    return None


def table(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """Rows of text: data, indices, scheme, kept fraction, error with standard deviation, backward time / exact time."""
    groups: dict[tuple[str, str, str, float], list[Point]] = {}
    for point in points:
        groups.setdefault((point.data, point.indices, point.scheme, point.share), []).append(point)
    rows = []
    for (data, indices, scheme, share), own in sorted(groups.items()):
        values = [point.error for point in own]
        deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        time = _time(own)
        error = f"{statistics.mean(values):.3f}{deviation}"
        rows.append((data, indices, scheme, f"{share:g}", error, "" if math.isnan(time) else f"{time:.2f}"))
    return rows


def _time(points: Sequence[Point]) -> float:
    """The median ratio of sampled to exact backward time; NaN if no time was measured."""
    found = [point.seconds / point.exact_seconds for point in points if not math.isnan(point.seconds)]
    return statistics.median(found) if found else math.nan


HEADINGS = ("data", "indices", "scheme", "share kept", "error", "warm backward, × exact")


def plot(points: Sequence[Point], path: Path) -> None:
    """Plot the error against kept fraction and time, for each data set and all schemes, with the setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [data for data in (REAL, SYNTHETIC, CIFAR) if any(point.data == data for point in points)]
    columns = max(2, len(kinds))
    figure = Figure(figsize=(5.5 * columns, 8.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, columns)
    for unused in (*axes[0][len(kinds) :], *axes[1][2:]):
        unused.remove()
    names = {
        CHANNELS: "channels (p, 1, 1)",
        POSITIONS: "positions (1, √p, √p)",
        ROWS: "rows (1, p, 1)",
        EXAMPLES: "examples",
    }
    for axis, data in zip(axes[0], kinds, strict=False):
        for indices, scheme in PAPER:
            found = errors(points, data, indices, scheme)
            means = [statistics.mean(values) for values in found.values()]
            spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in found.values()]
            axis.errorbar([*found], means, yerr=spread, capsize=3, marker="o", markersize=3, label=names[indices])
        same = equal_share(points, data)
        if same is not None:
            axis.set_title(f"{data}: {same:.0%} of positions are as good as 75 % of channels", fontsize=10)
        axis.set_xlabel("share of the input that is kept, p")
    for indices, scheme in (*PAPER, *OTHERS):
        own = [point for point in points if point.data == REAL and point.indices == " ".join(indices)]
        own = [point for point in own if point.scheme == scheme]
        shares = sorted({point.share for point in own})
        means = [statistics.mean(point.error for point in own if point.share == share) for share in shares]
        times = [_time([point for point in own if point.share == share]) for share in shares]
        style = {CHANNELS: "--", POSITIONS: "-", ROWS: "-.", EXAMPLES: ":"}[indices]
        color = {"bernoulli": "C0", "fixed": "C1", "blocks": "C2", "importance": "C3"}[scheme]
        text = f"{names[indices].split(' ')[0]}, {scheme}"
        axes[1][0].plot(shares, means, style, color=color, marker="o", markersize=3, label=text)
        axes[1][1].plot(times, means, style, color=color, marker="o", markersize=3, label=text)
    axes[1][0].set_xlabel(f"share of the input that is kept ({REAL})")
    axes[1][1].set_xlabel(f"warm backward pass, × exact ({REAL})")
    figure.suptitle("\n".join(dict.fromkeys(point.made.label for point in points)), fontsize=8)
    for axis in figure.axes:
        axis.set_yscale("log")
        axis.set_ylabel("‖ĝ − g‖ / ‖g‖")
        axis.grid(alpha=0.3)
    for axis in axes[0][: len(kinds)]:
        axis.legend(fontsize=8)
    figure.legend(*axes[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)
