"""The command `lensor bench` and its subcommands that measure single convolutions."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from lensor.inspect.catalogue import NETS
from lensor.inspect.errors import CommandError, choose, require
from lensor.inspect.files import refuse_folder_early, writing
from lensor.inspect.operations import OPERATIONS, STANDARD
from lensor.inspect.options import Batch, Columns, Debug, Device, Dtype, Kinds, Repeats, Resume, Seconds, Threads
from lensor.inspect.terminal import console, names_of, reported, stop
from lensor_bench.commands.shared import given_options, measure
from lensor_bench.report import HEADINGS, Options, parse_target, settings_of, summaries, write
from lensor_bench.results import ResultsFile, Row, read
from lensor_bench.settings import Settings

Neighbours = Annotated[
    int, typer.Option(min=0, help="Processes that keep each core busy during the measurement, as on a shared machine.")
]


def bench(
    context: typer.Context,
    ops: Annotated[list[str] | None, typer.Option(help=f"Operations, from {', '.join(OPERATIONS)}.")] = None,
    nets: Annotated[
        list[str] | None, typer.Option(help=f"Nets, from {', '.join(NETS)}; the paper's by default.")
    ] = None,
    impl: Annotated[
        list[str] | None,
        typer.Option(
            help="Implementations, besides standard: standard-again (the same calls timed again, to show the noise of"
            " measurements), lensor, lensor-measure (candidates timed), network and network-simplified (contracted"
            " with dense patterns), and, if installed, einconv, einconv-contract (without making the expression),"
            " backpack, opacus."
        ),
    ] = None,
    kinds: Kinds = None,
    batch: Batch = 8,
    columns: Columns = 4,
    dtype: Dtype = "float32",
    threads: Threads = 2,
    device: Device = "cpu",
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of convolutions.")] = None,
    repeats: Repeats = 20,
    seconds: Seconds = 0.3,
    neighbours: Neighbours = 0,
    framework: Annotated[
        str, typer.Option(help="torch, or jax: Lensor beside jax.lax, both compiled by jax.jit.")
    ] = "torch",
    out: Annotated[Path, typer.Option(help="Results file (CSV).")] = Path("bench.csv"),
    resume: Resume = False,
    debug: Debug = False,
) -> None:
    """Measure operations × convolutions × implementations. Write lists as a,b,c, or repeat the option."""
    if context.invoked_subcommand is not None:
        ignored = given_options(context)
        if ignored:
            name = f"--{next(iter(ignored))}"
            raise stop(f"{name} before {context.invoked_subcommand} is ignored: give options after the command")
        return
    names = (names_of(ops), names_of(nets), names_of(impl), names_of(kinds))
    with reported(debug, interrupted=f"interrupted: finished rows are in {out}; continue with --resume"):
        settings = Settings(*names, batch, columns, dtype, threads, device, limit, repeats, seconds, neighbours)
        _bench(settings, out, resume, *choose("framework", [framework], ("torch", "jax")))


def report(
    file: Annotated[Path, typer.Argument(help="Results file of lensor bench.")],
    out: Annotated[Path | None, typer.Option(help="Folder for report.md and plots; without it, print a table.")] = None,
    against: Annotated[
        str, typer.Option(help="Implementation whose time is 1; fastest: the fastest except Lensor.")
    ] = STANDARD,
    target: Annotated[
        list[str] | None, typer.Option(help="Desired median: OPERATION=RATIO or OPERATION:KIND=RATIO.")
    ] = None,
    slack: Annotated[float, typer.Option(min=0.0, help="Microseconds that do not count as slower.")] = 0.0,
    roof: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Maximum Gflop/s and GB/s of the machine: report.md shows the resulting bounds."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a Markdown report with plots from a results file."""
    with reported(debug):
        if roof is not None and min(roof) <= 0:
            raise CommandError(f"--roof is {roof[0]:g} {roof[1]:g}, expected two positive numbers")
        if roof is not None and out is None:
            raise CommandError("--roof requires --out FOLDER, the folder for report.md")
        rates = None if roof is None else (roof[0] * 1e9, roof[1] * 1e9)
        options = Options(against, tuple(map(parse_target, target or ())), slack * 1e-6, rates)
        rows = read(file)
        if not rows:
            raise CommandError(f"{file} has no rows, expected at least one")
        print_summaries(rows, options, console())
        if out is not None:
            for path in write(rows, out, options):
                console().print(f"wrote {path}", soft_wrap=True, highlight=False)


def growth(
    out: Annotated[Path, typer.Argument(help="Folder for growth.csv and growth.png.")],
    ops: Annotated[list[str] | None, typer.Option(help=f"Operations, from {', '.join(OPERATIONS)}.")] = None,
    impl: Annotated[list[str] | None, typer.Option(help="Implementations, besides standard.")] = None,
    dtype: Dtype = "float32",
    threads: Threads = 2,
    device: Device = "cpu",
    repeats: Repeats = 20,
    seconds: Seconds = 0.3,
    resume: Resume = False,
    debug: Debug = False,
) -> None:
    """Measure and plot how time and memory grow with batch, image, channels and kernel."""
    settings = Settings(
        operations=names_of(ops) or ("kfac_expand", "kfac_reduce", "per_example_weight_vjp", "weight_vjp"),
        implementations=names_of(impl) or ("lensor",),
        dtype=dtype,
        threads=threads,
        device=device,
        repeats=repeats,
        seconds=seconds,
    )
    with reported(debug, interrupted=f"interrupted: finished rows are in {out}; continue with --resume"):
        _growth(settings, out, resume)


def candidates(
    out: Annotated[Path, typer.Argument(help="Results file (CSV).")],
    ops: Annotated[list[str] | None, typer.Option(help=f"Operations, from {', '.join(OPERATIONS)}.")] = None,
    nets: Annotated[
        list[str] | None, typer.Option(help=f"Nets, from {', '.join(NETS)}; the paper's by default.")
    ] = None,
    kinds: Kinds = None,
    batch: Batch = 8,
    columns: Columns = 4,
    dtype: Dtype = "float32",
    threads: Threads = 2,
    device: Device = "cpu",
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of convolutions.")] = None,
    repeats: Repeats = 20,
    seconds: Seconds = 0.1,
    neighbours: Neighbours = 0,
    debug: Debug = False,
) -> None:
    """Measure all candidate plans, and how much time the choice by estimates loses."""
    names = (names_of(ops), names_of(nets), (), names_of(kinds))
    with reported(debug):
        _candidates(Settings(*names, batch, columns, dtype, threads, device, limit, repeats, seconds, neighbours), out)


def overhead(
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each function.")] = 1.0,
) -> None:
    """Measure the microseconds that a cached call of each function adds to its torch calls."""
    _overhead(threads, seconds)


def planning(
    ops: Annotated[list[str] | None, typer.Option(help=f"Operations, from {', '.join(OPERATIONS)}.")] = None,
    nets: Annotated[
        list[str] | None, typer.Option(help=f"Nets, from {', '.join(NETS)}; the paper's by default.")
    ] = None,
    kinds: Kinds = None,
    columns: Columns = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of convolutions.")] = None,
    shapes: Annotated[int, typer.Option(min=0, help="Number of shapes for the memory that is kept.")] = 10_000,
    debug: Debug = False,
) -> None:
    """Measure the time to plan, cold and for other batch sizes, and the memory kept after many shapes."""
    names = (names_of(ops), names_of(nets), (), names_of(kinds))
    with reported(debug):
        _planning(Settings(*names, columns=columns, threads=1, limit=limit), shapes)


def _bench(settings: Settings, out: Path, resume: bool, framework: str) -> None:
    """Measure the nets' convolutions, with a progress bar, and print the summary."""
    require("torch")
    if framework == "jax":
        require("jax")
        from lensor_bench.in_jax import JaxBench as Bench
    else:
        from lensor_bench.run import Bench

    bench = Bench(settings)
    if not bench.cases:
        raise CommandError("the nets have no convolution of these kinds, expected at least one")
    results = ResultsFile(out, bench.machine, resume)
    shown = console()
    measure([bench], results, shown)
    wanted = {(one.name, case.operation.name, case.layer.spec) for case in bench.cases for one in bench.implementations}
    rows = [
        row
        for row in results.rows
        if (row.implementation, row.operation, row.layer.spec) in wanted and row.setting == bench.setting
    ]
    print_summaries(rows, Options(), shown)
    shown.print(f"{len(results.rows)} rows in {out}", soft_wrap=True, highlight=False)


def _growth(settings: Settings, out: Path, resume: bool) -> None:
    """Measure the convolutions of `lensor bench growth`, with a progress bar, and plot them."""
    require("torch")
    require("matplotlib")
    from lensor_bench.growth import plot, sittings
    from lensor_bench.run import Bench

    benches = [Bench(one, layers) for one, layers in sittings(settings)]
    refuse_folder_early(out, ("growth.png",))
    results = ResultsFile(out / "growth.csv", benches[0].machine, resume)
    shown = console()
    measure(benches, results, shown)
    with writing(out / "growth.png"):
        plot(results.rows, {bench.setting for bench in benches}, out / "growth.png")
    for name in ("growth.csv", "growth.png"):
        shown.print(f"wrote {out / name}", soft_wrap=True, highlight=False)


def _candidates(settings: Settings, out: Path) -> None:
    """Measure candidates, write their times after each operation, and print how good the choices are."""
    require("torch")
    from lensor_bench.candidates import Candidate, choices, measured, summaries, write
    from lensor_bench.run import Bench

    bench = Bench(settings)
    shown = console()
    rows: list[Candidate] = []
    with writing(out), Progress(console=shown, speed_estimate_period=1800) as progress:
        task = progress.add_task("", total=len(bench.cases))
        for case, found in measured(bench):
            rows += found
            write(out, rows)
            progress.update(task, advance=1, description=f"{case.operation.name} {case.layer.label}"[:44].ljust(44))
    numbers = ("convolutions", "regret, median", "95 %", "largest")
    table = Table("operation", *(Column(name, justify="right") for name in numbers), "largest: convolution", "fastest")
    for one in summaries(choices(rows)):
        cells = (str(one.count), f"{one.median:.2f}", f"{one.high:.2f}", f"{one.worst.regret:.2f}")
        worst = f"{one.worst.chosen.convolution}: {one.worst.chosen.plan}"
        table.add_row(one.operation, *cells, worst, one.worst.fastest.plan)
    shown.print(table)
    shown.print("Regret: time of the plan with the lowest estimate, divided by that of the fastest plan.")


def _overhead(threads: int, seconds: float) -> None:
    from lensor_bench.measure import threads as using
    from lensor_bench.overhead import measure

    table = Table(
        "function", "gradient", *(Column(name, justify="right") for name in ("plan, µs", "call, µs", "added, µs"))
    )
    with using(threads):
        for found in measure(seconds):
            times = (f"{time:.1f}" for time in (found.raw, found.call, found.added))
            table.add_row(found.name, "yes" if found.gradient else "no", *times)
    console().print(table)


def _planning(settings: Settings, shapes: int) -> None:
    require("torch")
    from lensor_bench.measure import threads
    from lensor_bench.planning import kept, measure
    from lensor_bench.run import Bench

    names = ("cold, ms", "largest", "second size, ms", "largest", "third size, ms", "largest")
    table = Table("operation", *(Column(name, justify="right") for name in names))
    with threads(settings.threads):
        rows = sorted(measure(Bench(settings)), key=lambda one: one.operation)
        for operation, found in itertools.groupby(rows, lambda one: one.operation):
            times = zip(*((one.cold, one.second, one.third) for one in found), strict=True)
            table.add_row(operation, *(f"{of(column):.2f}" for column in times for of in (statistics.median, max)))
        console().print(table)
        table = Table(*(Column(name, justify="right") for name in ("shapes", "caches, MB", "process, MB")))
        for one in kept(shapes) if shapes else ():
            table.add_row(f"{one.shapes:,}", *(f"{size / 1e6:.1f}" for size in (one.nbytes, one.resident)))
        if shapes:
            console().print(table)


def print_summaries(rows: list[Row], options: Options, shown: Console) -> None:
    """Print the summary as a table, then the settings and the number of rows without a time."""
    table = Table(*HEADINGS[:3], *(Column(name, justify="right") for name in HEADINGS[3:]))
    last = None
    for summary in summaries(rows, options):
        if last not in (None, summary.operation):
            table.add_section()
        last = summary.operation
        table.add_row(*summary.cells)
    shown.print(table)
    shown.print(f"Shortest time divided by that of {options.against}, below 1: faster.", highlight=False)
    for line in settings_of(rows):
        shown.print(line, soft_wrap=True, highlight=False)
    for status in ("wrong", "failed", "refused"):
        count = sum(row.found.status == status for row in rows)
        if count:
            shown.print(f"{count} {status}: see the message column", style="red", highlight=False)
