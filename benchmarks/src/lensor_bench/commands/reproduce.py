"""The command `lensor reproduce`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lensor.inspect.errors import CommandError, require
from lensor.inspect.files import writing
from lensor.inspect.options import Batch, Debug, Device, Dtype, Repeats, Seconds, Threads
from lensor.inspect.terminal import console, reported
from lensor_bench.commands.shared import given_options, measure, shown_options
from lensor_bench.reproduce import FIGURES, OPTIONS, QUICK_RUNS, RUNS, figures, needed
from lensor_bench.reproduce import layers as reproduce_layers
from lensor_bench.reproduce import settings as reproduce_settings
from lensor_bench.reproduce import write as write_figures
from lensor_bench.results import ResultsFile, Row
from lensor_bench.settings import Settings

if TYPE_CHECKING:
    from lensor_bench.crs import Point as CrsPoint


def reproduce(
    context: typer.Context,
    figure: Annotated[list[str], typer.Argument(help=f"From {', '.join(FIGURES)}, all.")],
    out: Annotated[Path, typer.Option(help="Folder for CSV, PNG and Markdown.")] = Path("reproduced"),
    quick: Annotated[bool, typer.Option("--quick", help="A few convolutions of each kind, few repeats.")] = False,
    batch: Batch = 8,
    dtype: Dtype = "float32",
    threads: Threads = 2,
    device: Device = "cpu",
    repeats: Repeats = 20,
    seconds: Seconds = 0.2,
    cifar: Annotated[
        Path | None, typer.Option(help="Folder with CIFAR-100 (binary or Python version), for crs to measure as well.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Reproduce the paper's figures and tables beside its results: study, runtime, speedups, memory, crs, all."""
    settings = Settings(batch=batch, dtype=dtype, threads=threads, device=device, repeats=repeats, seconds=seconds)
    given = given_options(context)
    file = out / (QUICK_RUNS if quick else RUNS)
    with reported(debug, interrupted=f"interrupted: measurements are in {file}; the same command continues"):
        names = figures(figure)
        idle = [option for option, of in OPTIONS.items() if option in given and not {*of} & {*names}]
        if idle:
            raise CommandError(f"--{idle[0]} is given for {', '.join(names)}, expected {', '.join(OPTIONS[idle[0]])}")
        _reproduce(names, settings, out, quick, cifar, shown_options(given, ("figure", "out", "cifar")))


def _reproduce(names: Sequence[str], given: Settings, out: Path, quick: bool, cifar: Path | None, options: str) -> None:
    """Measure what the figures still need, and write the figures with the options of the command."""
    shown = console()
    rows: list[Row] = []
    operations = needed(names)
    if operations:
        require("torch", "matplotlib")
        from lensor_bench.run import Bench

        bench = Bench(reproduce_settings(operations, given, quick), reproduce_layers(quick))
        results = ResultsFile(out / (QUICK_RUNS if quick else RUNS), bench.machine, resume=True)
        measure([bench], results, shown)
        specs = {case.layer.spec for case in bench.cases}
        rows = [row for row in results.rows if row.setting == bench.setting and row.layer.spec in specs]
    points = _crs_points(given, out, quick, cifar, shown) if "crs" in names else []
    for found in write_figures(names, rows, points, out, options):
        headings, *cells = found.summary
        table = Table(*headings, title=found.title)
        for row in cells:
            table.add_row(*row)
        shown.print(table)
        shown.print(f"wrote {', '.join(map(str, found.paths))}", soft_wrap=True, highlight=False)


def _crs_points(given: Settings, out: Path, quick: bool, cifar: Path | None, shown: Console) -> Sequence[CrsPoint]:
    """Measure the missing errors of sampled gradients; return all points that the settings require."""
    require("torch", "matplotlib", "skimage")
    import torch

    from lensor_bench import crs
    from lensor_bench.run import here

    settings = crs.Settings.quick(cifar) if quick else crs.Settings(cifar=cifar)
    made = crs.Made(**asdict(here(torch.device("cpu"))), threads=given.threads)
    path = out / "crs.csv"
    known = crs.read(path, made)
    with writing(out), Progress(console=shown, transient=True, disable=not shown.is_terminal) as progress:
        out.mkdir(parents=True, exist_ok=True)
        wanted = crs.wanted_keys(settings)
        task = progress.add_task("sampled gradients", total=len(wanted))
        progress.advance(task, sum(point.key in wanted for point in known))
        for point in crs.run(settings, made, known):
            crs.append(path, point)
            progress.advance(task)
    return [point for point in crs.read(path, made) if point.key in wanted]
