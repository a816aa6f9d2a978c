"""The subcommands of `lensor bench` that measure whole models and training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from lensor.inspect.errors import CommandError, require
from lensor.inspect.files import refuse_early, refuse_folder_early, writing
from lensor.inspect.options import Batch, Debug, Repeats, Threads
from lensor.inspect.terminal import console, names_of, reported
from lensor.inspect.text import digits, write_rows


def models(
    names: Annotated[list[str] | None, typer.Argument(help="Models; an unknown one lists them.")] = None,
    batch: Batch = 8,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images.")] = 224,
    threads: Threads = 2,
    repeats: Repeats = 10,
    seconds: Annotated[float, typer.Option(min=0.0, help="Seconds for the rounds of each way.")] = 5.0,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Include compiled passes; compiling takes minutes.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write the table to this CSV file.")] = None,
    debug: Debug = False,
) -> None:
    """Measure Kronecker factors of whole models, compared with curvlinops and BackPACK if they are installed."""
    with reported(debug):
        _models(names or [], batch, size, seconds, repeats, threads, compiled, csv)


def steps(
    names: Annotated[list[str] | None, typer.Argument(help="From resnet18, all-cnn-c.")] = None,
    optimizers: Annotated[list[str] | None, typer.Option(help="Optimizers; all unless given.")] = None,
    threads: Threads = 2,
    repeats: Repeats = 3,
    seconds: Annotated[float, typer.Option(min=0.0, help="Seconds for the rounds of each optimizer.")] = 20.0,
    debug: Debug = False,
) -> None:
    """Measure the cost of a training step with KFAC, compared with a step of plain gradient descent."""
    with reported(debug):
        _steps(names or [], seconds, repeats, threads, optimizers or [])


def private(
    names: Annotated[list[str] | None, typer.Argument(help="Models; an unknown one lists them.")] = None,
    batch: Batch = 32,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images.")] = 64,
    max_norm: Annotated[float, typer.Option(help="Maximal norm of an example's gradient.")] = 1.0,
    threads: Threads = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the shortest time counts.")] = 5,
    csv: Annotated[Path | None, typer.Option(help="Also write the table to this CSV file.")] = None,
    debug: Debug = False,
) -> None:
    """Measure sums of clipped gradients of whole models, compared with gradient descent and with Opacus."""
    with reported(debug):
        if not max_norm > 0:
            raise CommandError(f"--max-norm is {max_norm:g}, expected a positive number")
        _private(names or [], batch, size, max_norm, repeats, threads, csv)


def training(
    out: Annotated[Path, typer.Argument(help="Folder for training.csv and training.png.")],
    tasks: Annotated[list[str] | None, typer.Option(help="Tasks, from digits, crops, textures.")] = None,
    steps: Annotated[int, typer.Option(min=10, help="Steps of a run.")] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each optimizer.")] = 5,
    batch: Batch = 128,
    threads: Threads = 1,
    processes: Annotated[int, typer.Option(min=1, help="Runs at the same time, before steps are timed.")] = 1,
    cifar: Annotated[Path | None, typer.Option(help="Folder with CIFAR-10, for the task cifar10.")] = None,
    debug: Debug = False,
) -> None:
    """Train on real data, and plot KFAC compared with tuned SGD, AdamW, Muon and SINGD."""
    with reported(debug):
        _training(names_of(tasks), steps, seeds, batch, threads, processes, cifar, out)


def sampling(
    out: Annotated[Path, typer.Argument(help="Folder for CSV files and training.png.")],
    steps: Annotated[int, typer.Option(min=20, help="Steps of a training run.")] = 300,
    seeds: Annotated[int, typer.Option(min=0, help="Training runs for each keep rate; 0 for no training.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of steps and of training.")] = 128,
    threads: Threads = 2,
    repeats: Repeats = 5,
    seconds: Annotated[float, typer.Option(min=0.0, help="Seconds for the rounds of each way.")] = 2.0,
    debug: Debug = False,
) -> None:
    """Measure and plot sampled backpropagation: memory and time of steps and gradients, and training."""
    with reported(debug):
        _sampling(out, steps, seeds, batch, seconds, repeats, threads)


def headline(
    out: Annotated[Path, typer.Argument(help="Folder for headline.csv and headline.png.")],
    threads: Threads = 2,
    seconds: Annotated[float, typer.Option(min=0.0, help="Seconds for the rounds of each way.")] = 8.0,
    debug: Debug = False,
) -> None:
    """Measure and plot the figures of the README for ResNet-18: factors, clipped gradients, and steps of KFAC."""
    with reported(debug):
        _headline(out, threads, seconds)


def _models(
    names: Sequence[str],
    batch: int,
    size: int,
    seconds: float,
    repeats: int,
    threads: int,
    compiled: bool,
    csv: Path | None,
) -> None:
    require("torch", "transformers")
    from lensor_bench.models import measure

    columns = {
        "s": lambda one: _number("{:.3f}", one.seconds),
        "beyond one pass, s": lambda one: _number("{:.3f}", one.beyond),
        "peak, MB": lambda one: _megabytes(one.peak),
    }
    _tabulate(measure(names, batch, size, seconds, repeats, threads, compiled), columns, csv)


def _private(
    names: Sequence[str], batch: int, size: int, max_norm: float, repeats: int, threads: int, csv: Path | None
) -> None:
    require("torch", "transformers")
    from lensor_bench.private import measure

    columns = {
        "s": lambda one: _number("{:.3f}", one.seconds),
        "s over SGD's": lambda one: _number("{:.2f}", one.ratio),
        "peak, MB": lambda one: _megabytes(one.peak),
        "peak over SGD's": lambda one: _number("{:.2f}", one.peak_ratio),
        "difference": lambda one: _number("{:.0e}", one.difference),
    }
    _tabulate(measure(names, batch, size, max_norm, repeats, threads), columns, csv)


def _headline(out: Path, threads: int, seconds: float) -> None:
    require("torch", "transformers", "matplotlib")
    from lensor_bench import headline

    refuse_folder_early(out, (headline.TABLE, headline.PLOT))
    shown = console()
    with shown.status("measuring"):
        bars = list(headline.measure(seconds, threads))
    cells = [(bar.figure, bar.way, digits(bar.value)) for bar in bars]
    _print(shown, "ResNet-18", ("figure", "way", "value"), cells)
    with writing(out):
        paths = headline.write(bars, out)
    for path in paths:
        shown.print(f"wrote {path}", soft_wrap=True, highlight=False)


def _number(form: str, value: float | None) -> str:
    return "–" if value is None else form.format(value)


def _megabytes(value: int | None) -> str:
    return _number("{:,.0f}", value and value / 1e6)


def _tabulate(found: Iterable[Any], columns: Mapping[str, Callable[[Any], str]], csv: Path | None) -> None:
    """Show measurements of ways for models, with columns of numbers and a message; also write them to a CSV file."""
    if csv is not None:
        refuse_early(csv)
    table = Table("model", "way", *(Column(name, justify="right") for name in columns), "")
    lines: list[tuple[str, ...]] = [("model", "way", *columns, "")]
    shown = console()
    with shown.status("measuring"):
        for one in found:
            lines.append((one.model, one.way, *(text(one) for text in columns.values()), one.message))
            table.add_row(*lines[-1])
    shown.print(table)
    if csv is not None:
        with writing(csv), csv.open("w", encoding="utf-8", newline="") as file:
            write_rows(file, lines)


def _steps(names: Sequence[str], seconds: float, repeats: int, threads: int, optimizers: Sequence[str]) -> None:
    require("torch")
    from lensor_bench.steps import measure

    table = Table(
        "model", "optimizer", *(Column(name, justify="right") for name in ("ms a step", "over SGD's", "longest"))
    )
    shown = console()
    with shown.status("measuring"):
        for one in measure(names, seconds, repeats, threads, optimizers):
            table.add_row(one.model, one.optimizer, f"{one.seconds * 1e3:.1f}", digits(one.ratio), digits(one.longest))
    shown.print(table)


def _training(
    tasks: Sequence[str],
    steps: int,
    seeds: int,
    batch: int,
    threads: int,
    processes: int,
    cifar: Path | None,
    out: Path,
) -> None:
    require("torch", "matplotlib")
    from lensor_bench.training import HEADINGS as OF_TRAINING
    from lensor_bench.training import reached, run
    from lensor_bench.training import write as write_training

    refuse_folder_early(out, ("training.csv", "training.png"))
    shown = console()
    with shown.status("training"):
        points = list(run(tasks, steps, seeds, batch, threads, processes, cifar))
    for task in dict.fromkeys(point.task for point in points):
        table = Table(*OF_TRAINING, title=f"{task}: to the best accuracy of AdamW")
        for line in reached(points, task):
            table.add_row(*line)
        shown.print(table)
    with writing(out):
        paths = write_training(points, out)
    for path in paths:
        shown.print(f"wrote {path}", soft_wrap=True, highlight=False)


def _sampling(out: Path, steps: int, seeds: int, batch: int, seconds: float, repeats: int, threads: int) -> None:
    """Measure sampled backpropagation, then print and write tables."""
    require("torch", "matplotlib", "skimage")
    from lensor_bench import sampling

    refuse_folder_early(out, (sampling.STEPS, sampling.GRADIENTS, sampling.TRAINING, sampling.PLOT))
    shown = console()
    with writing(out):
        made = sampling.steps(batch, seconds, repeats, threads)
        cells = [(row.way, f"{row.saved / 2**20:.1f}", f"{row.peak / 2**20:.1f}", f"{row.ratio:.2f}") for row in made]
        _print(shown, "A training step of All-CNN-C", ("way", "saved, MiB", "peak, MiB", "time, × torch's"), cells)
        paths = [sampling.write_csv(made, out / sampling.STEPS)]
        found = list(sampling.gradients(8, seconds / 10, 4 * repeats, threads))
        cells = [(row.layer, row.indices, f"{row.keep:g}", digits(row.ratio)) for row in found]
        _print(shown, "Weight gradients, batch 8", ("layer", "indices", "keep", "time, × exact"), cells)
        paths.append(sampling.write_csv(found, out / sampling.GRADIENTS))
        if seeds:
            trained = list(sampling.train((), steps, seeds, batch, threads))
            _print(shown, "Training", sampling.SUMMARY, sampling.summary(trained))
            paths += [sampling.write_csv(trained, out / sampling.TRAINING), sampling.plot(trained, out / sampling.PLOT)]
    shown.print(f"wrote {', '.join(map(str, paths))}", soft_wrap=True, highlight=False)


def _print(shown: Console, title: str, headings: Sequence[str], cells: Sequence[tuple[str, ...]]) -> None:
    table = Table(*headings, title=title)
    for row in cells:
        table.add_row(*row)
    shown.print(table)
