"""The commands `lensor convs`, `explain`, `bench`, `reproduce` and `conformance`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeAlias

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from lensor.bench.catalogue import NETS, layers_of, merged
from lensor.bench.errors import BenchError, choose, require, writing
from lensor.bench.layers import COLUMNS, KINDS, Layer, census, format_sizes, label, parse_sizes, write_layers
from lensor.bench.operations import OPERATIONS, PAPER_OPERATIONS, STANDARD
from lensor.bench.report import HEADINGS, Options, digits, parse_target, settings_of, summaries, write
from lensor.bench.reproduce import FIGURES, OPTIONS, QUICK_RUNS, RUNS, figures, needed
from lensor.bench.reproduce import layers as reproduce_layers
from lensor.bench.reproduce import settings as reproduce_settings
from lensor.bench.reproduce import write as write_figures
from lensor.bench.results import ResultsFile, Row, read
from lensor.bench.settings import Settings
from lensor.bench.terminal import console
from lensor.bench.text import printable, write_rows

if TYPE_CHECKING:
    from lensor.bench.conformance import Matrix
    from lensor.bench.crs import Point as CrsPoint
    from lensor.bench.explain import Explanation, Total
    from lensor.bench.run import Bench

MODEL = (
    "A net of the catalogue, an import path pkg.mod:factory (imported and called), or a file of torch.export (.pt2; its"
    " graph is read, nothing of it is run)."
)
INPUT = "Shape of one example, without batch axis: 3x224x224; repeated for models of several arguments."

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
"""The shapes of a model's arguments."""


def add_commands(app: typer.Typer, stop: Callable[[str], typer.Exit]) -> None:
    """Add the commands to an app; `stop` makes an exit of an error message."""

    def fail(error: BenchError, debug: bool) -> NoReturn:
        if debug:
            raise error
        raise stop(str(error)) from None

    @app.command(help="The convolutions of a CNN: of the catalogue, or any torch model that can be imported.")
    def convs(
        model: Annotated[str, typer.Argument(help=MODEL)],
        input_shape: Annotated[list[str] | None, typer.Option(help=INPUT)] = None,
        csv: Annotated[Path | None, typer.Option(help="Write the convolutions to this CSV file too.")] = None,
        debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where there is an error.")] = False,
    ) -> None:
        try:
            layers, shapes = _find(model, _shapes(input_shape))
            if csv is not None:
                _write(csv, layers, shapes)
        except BenchError as error:
            fail(error, debug)
        _show(layers, shapes)

    @app.command(
        help="What Lensor makes of each convolution of a model: network, what the rules leave of it, plan, time."
    )
    def explain(
        model: Annotated[str, typer.Argument(help=MODEL)],
        input_shape: Annotated[list[str] | None, typer.Option(help=INPUT)] = None,
        html: Annotated[Path | None, typer.Option(help="Write a page to this file: one file, no network.")] = None,
        ops: Annotated[
            list[str] | None,
            typer.Option(help=f"Operations, of {', '.join(OPERATIONS)}; unless given {', '.join(PAPER_OPERATIONS)}."),
        ] = None,
        kinds: Annotated[list[str] | None, typer.Option(help=f"Kinds of convolutions, of {', '.join(KINDS)}.")] = None,
        batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 8,
        columns: Annotated[int, typer.Option(min=1, help="Columns of the GGN's square root.")] = 4,
        dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
        threads: Annotated[int, typer.Option(min=1, help="Threads for torch; 1 if the CPUs are shared.")] = 2,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        repeats: Annotated[int, typer.Option(min=1, help="No more rounds than this.")] = 20,
        seconds: Annotated[
            float, typer.Option(min=0.0, help="Seconds for which each implementation is timed; at least three rounds.")
        ] = 0.1,
        times: Annotated[bool, typer.Option("--times/--no-times", help="Whether anything is measured.")] = True,
        debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where there is an error.")] = False,
    ) -> None:
        settings = Settings(
            operations=_names(ops) or PAPER_OPERATIONS,
            implementations=("lensor",),
            kinds=_names(kinds),
            batch=batch,
            columns=columns,
            dtype=dtype,
            threads=threads,
            device=device,
            repeats=repeats,
            seconds=seconds,
        )
        try:
            _explain(model, _shapes(input_shape), settings, html, times)
        except BenchError as error:
            fail(error, debug)
        except KeyboardInterrupt:
            raise stop("interrupted: nothing was written") from None

    @app.command(
        help="The paper's figures and tables, with what the paper says: study, runtime, speedups, memory, crs, all."
    )
    def reproduce(
        context: typer.Context,
        figure: Annotated[list[str], typer.Argument(help=f"Of {', '.join(FIGURES)}, all.")],
        out: Annotated[Path, typer.Option(help="Folder for CSV, PNG and Markdown.")] = Path("reproduced"),
        quick: Annotated[bool, typer.Option("--quick", help="A few convolutions of each kind, few repeats.")] = False,
        batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 8,
        dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
        threads: Annotated[int, typer.Option(min=1, help="Threads for torch; 1 if the CPUs are shared.")] = 2,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        repeats: Annotated[int, typer.Option(min=1, help="No more rounds than this.")] = 20,
        seconds: Annotated[
            float, typer.Option(min=0.0, help="Seconds for which each implementation is timed; at least three rounds.")
        ] = 0.2,
        cifar: Annotated[
            Path | None, typer.Option(help="Folder of CIFAR-100, binary or Python version, which crs measures too.")
        ] = None,
        debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where there is an error.")] = False,
    ) -> None:
        settings = Settings(batch=batch, dtype=dtype, threads=threads, device=device, repeats=repeats, seconds=seconds)
        given = _given(context)
        try:
            names = figures(figure)
            idle = [option for option, of in OPTIONS.items() if option in given and not {*of} & {*names}]
            if idle:
                raise BenchError(f"--{idle[0]} is of {', '.join(OPTIONS[idle[0]])}, found {', '.join(names)}")
            _reproduce(names, settings, out, quick, cifar, _shown_options(given, ("figure", "out", "cifar")))
        except BenchError as error:
            fail(error, debug)
        except KeyboardInterrupt:
            file = out / (QUICK_RUNS if quick else RUNS)
            raise stop(f"interrupted: what was measured is in {file}, the same command goes on with it") from None

    @app.command(
        help="For each quantity and hyper-parameter: is Lensor, or another library, right, wrong, or does it refuse?"
        " The exit status is 1 where Lensor is wrong."
    )
    def conformance(
        peer: Annotated[
            list[str] | None,
            typer.Option(help="Libraries, of lensor (the default), einconv, backpack, opacus: a,b,c, or repeated."),
        ] = None,
        quantity: Annotated[
            list[str] | None, typer.Option(help="Quantities; all unless given, an unknown one lists them.")
        ] = None,
        markdown: Annotated[Path | None, typer.Option(help="Write a page to this file too.")] = None,
        csv: Annotated[Path | None, typer.Option(help="Write every case to this CSV file too.")] = None,
        debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where there is an error.")] = False,
    ) -> None:
        try:
            wrong = _conformance(_names(peer), _names(quantity), markdown, csv)
        except BenchError as error:
            fail(error, debug)
        if wrong:
            raise stop(f"Lensor is wrong in {wrong} cells")

    bench = typer.Typer(invoke_without_command=True)
    app.add_typer(
        bench,
        name="bench",
        help="Measure operations × convolutions × implementations. Lists: a,b,c, or the option repeated.",
    )

    @bench.callback()
    def measure(
        context: typer.Context,
        ops: Annotated[list[str] | None, typer.Option(help=f"Operations, of {', '.join(OPERATIONS)}.")] = None,
        nets: Annotated[
            list[str] | None, typer.Option(help=f"Nets, of {', '.join(NETS)}; the paper's unless given.")
        ] = None,
        impl: Annotated[
            list[str] | None,
            typer.Option(
                help="Implementations, beside standard: lensor, lensor-measure (candidates timed), network and"
                " network-simplified (contracted with dense patterns), and where they are installed einconv,"
                " einconv-contract (no expression made), backpack, opacus."
            ),
        ] = None,
        kinds: Annotated[list[str] | None, typer.Option(help=f"Kinds of convolutions, of {', '.join(KINDS)}.")] = None,
        batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 8,
        columns: Annotated[int, typer.Option(min=1, help="Columns of the GGN's square root.")] = 4,
        dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
        threads: Annotated[int, typer.Option(min=1, help="Threads for torch; 1 if the CPUs are shared.")] = 2,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        limit: Annotated[int | None, typer.Option(min=1, help="No more convolutions than this.")] = None,
        repeats: Annotated[int, typer.Option(min=1, help="No more rounds than this.")] = 20,
        seconds: Annotated[
            float, typer.Option(min=0.0, help="Seconds for which each implementation is timed; at least three rounds.")
        ] = 0.3,
        out: Annotated[Path, typer.Option(help="Results file (CSV).")] = Path("bench.csv"),
        resume: Annotated[bool, typer.Option("--resume", help="Go on with a results file: skip what it has.")] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where there is an error.")] = False,
    ) -> None:
        if context.invoked_subcommand is not None:
            ignored = _given(context)
            if ignored:
                name = f"--{next(iter(ignored))}"
                raise stop(f"{name} before {context.invoked_subcommand} is ignored: give options behind the command")
            return
        names = (_names(ops), _names(nets), _names(impl), _names(kinds))
        try:
            _bench(Settings(*names, batch, columns, dtype, threads, device, limit, repeats, seconds), out, resume)
        except BenchError as error:
            fail(error, debug)
        except KeyboardInterrupt:
            message = f"interrupted: finished rows are in {out}, go on with --resume"
            raise stop(message) from None

    @bench.command(help="Microseconds that a cached call of each function adds to the torch calls that it makes.")
    def overhead(
        threads: Annotated[int, typer.Option(min=1, help="Threads for torch.")] = 2,
        seconds: Annotated[float, typer.Option(min=0.0, help="Time for each function.")] = 1.0,
    ) -> None:
        _overhead(threads, seconds)

    @bench.command(help="How time and memory grow with batch, image, channels and kernel: measured and plotted.")
    def growth(
        out: Annotated[Path, typer.Argument(help="Folder for growth.csv and growth.png.")],
        ops: Annotated[list[str] | None, typer.Option(help=f"Operations, of {', '.join(OPERATIONS)}.")] = None,
        impl: Annotated[list[str] | None, typer.Option(help="Implementations, beside standard.")] = None,
        dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
        threads: Annotated[int, typer.Option(min=1, help="Threads for torch; 1 if the CPUs are shared.")] = 2,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        repeats: Annotated[int, typer.Option(min=1, help="No more rounds than this.")] = 20,
        seconds: Annotated[
            float, typer.Option(min=0.0, help="Seconds for which each implementation is timed; at least three rounds.")
        ] = 0.3,
        resume: Annotated[bool, typer.Option("--resume", help="Go on with a results file: skip what it has.")] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where there is an error.")] = False,
    ) -> None:
        settings = Settings(
            operations=_names(ops) or ("kfac_expand", "kfac_reduce", "per_example_weight_vjp", "weight_vjp"),
            implementations=_names(impl) or ("lensor",),
            dtype=dtype,
            threads=threads,
            device=device,
            repeats=repeats,
            seconds=seconds,
        )
        try:
            _growth(settings, out, resume)
        except BenchError as error:
            fail(error, debug)
        except KeyboardInterrupt:
            raise stop(f"interrupted: finished rows are in {out}, go on with --resume") from None

    @bench.command(help="Kronecker factors of whole models, beside curvlinops and BackPACK where they are installed.")
    def models(
        names: Annotated[list[str] | None, typer.Argument(help="Models; an unknown one lists them.")] = None,
        batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 8,
        size: Annotated[int, typer.Option(min=32, help="Height and width of the pictures.")] = 224,
        threads: Annotated[int, typer.Option(min=1, help="Threads for torch; 1 if the CPUs are shared.")] = 2,
        repeats: Annotated[int, typer.Option(min=1, help="No more rounds than this.")] = 10,
        seconds: Annotated[float, typer.Option(min=0.0, help="Time for the rounds of one way.")] = 5.0,
        csv: Annotated[Path | None, typer.Option(help="Write the table to this CSV file too.")] = None,
        debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where there is an error.")] = False,
    ) -> None:
        try:
            _models(names or [], batch, size, seconds, repeats, threads, csv)
        except BenchError as error:
            fail(error, debug)

    @bench.command(help="What a training step with KFAC costs beside one of plain gradient descent.")
    def steps(
        names: Annotated[list[str] | None, typer.Argument(help="Of resnet18, all-cnn-c.")] = None,
        threads: Annotated[int, typer.Option(min=1, help="Threads for torch; 1 if the CPUs are shared.")] = 2,
        repeats: Annotated[int, typer.Option(min=1, help="No more rounds than this.")] = 3,
        seconds: Annotated[float, typer.Option(min=0.0, help="Time for the rounds of one optimizer.")] = 20.0,
        debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where there is an error.")] = False,
    ) -> None:
        try:
            _steps(names or [], seconds, repeats, threads)
        except BenchError as error:
            fail(error, debug)

    @bench.command(help="Training on real data: KFAC beside tuned SGD and AdamW, plotted.")
    def training(
        out: Annotated[Path, typer.Argument(help="Folder for training.csv and training.png.")],
        tasks: Annotated[list[str] | None, typer.Option(help="Tasks, of digits, crops.")] = None,
        steps: Annotated[int, typer.Option(min=10, help="Steps of a run.")] = 300,
        seeds: Annotated[int, typer.Option(min=1, help="Runs of each optimizer.")] = 3,
        batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 128,
        threads: Annotated[int, typer.Option(min=1, help="Threads for torch; 1 if the CPUs are shared.")] = 2,
        debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where there is an error.")] = False,
    ) -> None:
        try:
            _training(_names(tasks), steps, seeds, batch, threads, out)
        except BenchError as error:
            fail(error, debug)

    @bench.command(help="Sampled backpropagation: bytes and time of steps and gradients, and training, plotted.")
    def sampling(
        out: Annotated[Path, typer.Argument(help="Folder for CSV files and training.png.")],
        steps: Annotated[int, typer.Option(min=20, help="Steps of a training run.")] = 300,
        seeds: Annotated[int, typer.Option(min=1, help="Training runs for each keep rate.")] = 3,
        batch: Annotated[int, typer.Option(min=1, help="Batch size of steps and of training.")] = 128,
        threads: Annotated[int, typer.Option(min=1, help="Threads for torch; 1 if the CPUs are shared.")] = 2,
        repeats: Annotated[int, typer.Option(min=1, help="No more rounds than this.")] = 5,
        seconds: Annotated[float, typer.Option(min=0.0, help="Time for the rounds of one way.")] = 2.0,
        debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where there is an error.")] = False,
    ) -> None:
        try:
            _sampling(out, steps, seeds, batch, seconds, repeats, threads)
        except BenchError as error:
            fail(error, debug)

    @bench.command(help="A results file as a Markdown report with plots.")
    def report(
        file: Annotated[Path, typer.Argument(help="Results file of lensor bench.")],
        out: Annotated[
            Path | None, typer.Option(help="Folder for report.md and plots; the table only if none.")
        ] = None,
        against: Annotated[
            str, typer.Option(help="Implementation whose time is 1; fastest: the fastest that is not Lensor.")
        ] = STANDARD,
        target: Annotated[
            list[str] | None, typer.Option(help="Median that is wanted: OPERATION=RATIO or OPERATION:KIND=RATIO.")
        ] = None,
        slack: Annotated[float, typer.Option(min=0.0, help="Microseconds that do not count as slower.")] = 0.0,
        roof: Annotated[
            tuple[float, float] | None,
            typer.Option(help="Gflop/s and GB/s that the machine can reach: report.md says what they bound."),
        ] = None,
        debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where there is an error.")] = False,
    ) -> None:
        try:
            if roof is not None and min(roof) <= 0:
                raise BenchError(f"--roof is {roof[0]:g} {roof[1]:g}, expected two positive numbers")
            if roof is not None and out is None:
                raise BenchError("--roof is for report.md, which --out FOLDER writes")
            rates = None if roof is None else (roof[0] * 1e9, roof[1] * 1e9)
            options = Options(against, tuple(map(parse_target, target or ())), slack * 1e-6, rates)
            rows = read(file)
            if not rows:
                raise BenchError(f"{file} holds no rows yet")
            _print_summaries(rows, options, console())
            if out is not None:
                for path in write(rows, out, options):
                    console().print(f"wrote {path}", soft_wrap=True, highlight=False)
        except BenchError as error:
            fail(error, debug)


def _given(context: typer.Context) -> dict[str, object]:
    """The options of a command that were given, by name."""
    return {
        name: value
        for name, value in context.params.items()
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }


def _shown_options(given: dict[str, object], without: Sequence[str]) -> str:
    """Options as they were given, each behind a space."""
    kept = {name: value for name, value in given.items() if name not in without}
    return "".join(f" --{name}" if value is True else f" --{name} {value}" for name, value in kept.items())


def _names(given: list[str] | None) -> tuple[str, ...]:
    """The names in options such as `--ops a,b --ops c`."""
    return tuple(name.strip() for one in given or () for name in one.split(",") if name.strip())


def _bench(settings: Settings, out: Path, resume: bool) -> None:
    """Measure the nets' convolutions, with a progress bar, and print the summary."""
    require("torch")
    from lensor.bench.run import Bench

    bench = Bench(settings)
    if not bench.cases:
        raise BenchError("there is nothing to measure: no convolution is of these nets and kinds")
    results = ResultsFile(out, bench.machine, resume)
    shown = console()
    _measure([bench], results, shown)
    wanted = {(one.name, case.operation.name, case.layer.spec) for case in bench.cases for one in bench.implementations}
    rows = [
        row
        for row in results.rows
        if (row.implementation, row.operation, row.layer.spec) in wanted and row.setting == bench.setting
    ]
    _print_summaries(rows, Options(), shown)
    shown.print(f"{len(results.rows)} rows in {out}", soft_wrap=True, highlight=False)


def _explain(model: str, shapes: Shapes, settings: Settings, html: Path | None, timed: bool) -> None:
    """Measure the convolutions of a model unless told not to, print what was found, and write the page if asked."""
    require("torch", *(["jinja2"] if html is not None else []))
    from lensor.bench.explain import explained, totals
    from lensor.bench.run import Bench

    layers, shapes = _find(model, shapes)
    bench = Bench(settings, merged(layers))
    layers = tuple(dict.fromkeys(case.layer for case in bench.cases))
    if not layers:
        raise BenchError(f"{model} has no convolution{' of these kinds' if settings.kinds else ''}")
    if html is not None:
        _refuse_early(html)
    shown = console()
    rows: list[Row] = []
    if timed:
        with TemporaryDirectory() as folder:
            results = ResultsFile(Path(folder) / "rows.csv", bench.machine, resume=False)
            _measure([bench], results, shown)
            rows = list(results.rows)
    found = list(explained(layers, replace(settings, operations=bench.operations), rows))
    lead = f"input {_shown(shapes)}, {len(layers)} distinct convolutions, {sum(one.count for one in layers)} in all"
    lines = settings_of(rows) or [f"batch {settings.batch}, {settings.dtype}, nothing measured"]
    _print_explanations(found, totals(found), shown)
    for line in (lead, *lines):
        shown.print(line, soft_wrap=True, highlight=False)
    if html is not None:
        from lensor.bench.page import page

        with writing(html):
            html.write_text(page(found, layers[0].model, lead, lines), encoding="utf-8")
        shown.print(f"wrote {html}", soft_wrap=True, highlight=False)


def _refuse_early(path: Path) -> None:
    """Raise for a file that cannot be written, before anything is measured for it; devices and pipes may be."""
    with writing(path):
        if path.is_dir() or not path.parent.is_dir():
            why = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise BenchError(f"cannot write {path}: {why}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise BenchError(f"cannot write {path}: permission denied")


def _refuse_folder_early(out: Path, names: Sequence[str]) -> None:
    """Make a folder for files of some names, or raise, before anything is measured for them."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    for name in names:
        _refuse_early(out / name)


def _print_explanations(found: Sequence[Explanation], sums: Sequence[Total], shown: Console) -> None:
    """A table with a row for each operation of each convolution, and one of the whole model."""
    from lensor.bench.page import HEADINGS as COLUMNS_OF_PAGE
    from lensor.bench.page import cells, millions, milliseconds, pace

    styles = {"slow": "yellow", "fast": "green", "": ""}
    columns = (Column(name, justify="right" if number else "left", overflow="fold") for name, number in COLUMNS_OF_PAGE)
    table = Table(*columns)
    for one, following in zip(found, [*found[1:], None], strict=True):
        row = cells(one)
        end = following is None or following.layer != one.layer
        table.add_row(*(Text(printable(cell.text), style=styles[cell.style]) for cell in row), end_section=end)
    shown.print(table)
    headings = ("the whole model", "Mflop", "standard, ms", "Lensor, ms", "ratio", "without a time")
    table = Table(headings[0], *(Column(name, justify="right") for name in headings[1:]))
    for total in sums:
        times, style = ["–"] * 3, ""
        if total.seconds is not None and total.ratio is not None:
            times = [*map(milliseconds, total.seconds), digits(total.ratio)]
            style = styles[pace(total.ratio)]
        missing = str(total.missing) if total.missing else ""
        table.add_row(total.operation, millions(total.flops), *times[:2], Text(times[2], style=style), missing)
    shown.print(table)
    for trouble in dict.fromkeys(one.trouble for one in found if one.trouble):
        shown.print(trouble, style="red", highlight=False, markup=False, soft_wrap=True)


def _growth(settings: Settings, out: Path, resume: bool) -> None:
    """Measure the convolutions of `lensor bench growth`, with a progress bar, and plot them."""
    require("torch")
    require("matplotlib")
    from lensor.bench.growth import plot, sittings
    from lensor.bench.run import Bench

    benches = [Bench(one, layers) for one, layers in sittings(settings)]
    _refuse_folder_early(out, ("growth.png",))
    results = ResultsFile(out / "growth.csv", benches[0].machine, resume)
    shown = console()
    _measure(benches, results, shown)
    with writing(out / "growth.png"):
        plot(results.rows, {bench.setting for bench in benches}, out / "growth.png")
    for name in ("growth.csv", "growth.png"):
        shown.print(f"wrote {out / name}", soft_wrap=True, highlight=False)


def _measure(benches: Sequence[Bench], results: ResultsFile, shown: Console) -> None:
    """Measure with a progress bar."""
    columns = (
        *(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
        *(TextColumn("left"), TimeRemainingColumn()),
    )
    # Convolutions differ much in cost: the time left is estimated from half an hour, not from the last seconds.
    with Progress(*columns, console=shown, speed_estimate_period=1800) as progress:
        total = sum(len(bench.pending(results)) for bench in benches)
        task = progress.add_task("", total=total)
        for at, case in enumerate(case for bench in benches for case in bench.run(results)):
            what = f"{case.operation.name} {case.layer.label}"
            progress.update(task, completed=at, description=what[:44].ljust(44))
        progress.update(task, completed=total, description="")


def _reproduce(names: Sequence[str], given: Settings, out: Path, quick: bool, cifar: Path | None, options: str) -> None:
    """Measure what figures need and is not measured yet, and write them with the options of the command."""
    shown = console()
    rows: list[Row] = []
    operations = needed(names)
    if operations:
        require("torch", "matplotlib")
        from lensor.bench.run import Bench

        bench = Bench(reproduce_settings(operations, given, quick), reproduce_layers(quick))
        results = ResultsFile(out / (QUICK_RUNS if quick else RUNS), bench.machine, resume=True)
        _measure([bench], results, shown)
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
    """Measure the errors of sampled gradients that are not in the folder yet; all that the settings ask for."""
    require("torch", "matplotlib", "skimage")
    import torch

    from lensor.bench import crs
    from lensor.bench.run import here

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


def _sampling(out: Path, steps: int, seeds: int, batch: int, seconds: float, repeats: int, threads: int) -> None:
    """Measure sampled backpropagation, print tables and write them."""
    require("torch", "matplotlib", "skimage")
    from lensor.bench import sampling

    _refuse_folder_early(out, (sampling.STEPS, sampling.GRADIENTS, sampling.TRAINING, sampling.PLOT))
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
        trained = list(sampling.train((), steps, seeds, batch, threads))
        _print(shown, "Training", sampling.SUMMARY, sampling.summary(trained))
        paths += [sampling.write_csv(trained, out / sampling.TRAINING), sampling.plot(trained, out / sampling.PLOT)]
    shown.print(f"wrote {', '.join(map(str, paths))}", soft_wrap=True, highlight=False)


def _print(shown: Console, title: str, headings: Sequence[str], cells: Sequence[tuple[str, ...]]) -> None:
    table = Table(*headings, title=title)
    for row in cells:
        table.add_row(*row)
    shown.print(table)


def _conformance(peers: tuple[str, ...], quantities: tuple[str, ...], markdown: Path | None, csv: Path | None) -> int:
    """Ask libraries, with a progress bar, print and write what they answer; the number of Lensor's wrong cells."""
    require("torch")
    from lensor.bench import conformance

    if markdown is not None and csv is not None and markdown.resolve() == csv.resolve():
        raise BenchError(f"{markdown} cannot be both the page and the CSV file")
    for path in (markdown, csv):
        if path is not None:
            _refuse_early(path)
    libraries = conformance.libraries_of(peers)
    asked = choose("quantity", quantities, conformance.QUANTITIES)
    shown = console()
    matrices = []
    with Progress(console=shown, transient=True, disable=not shown.is_terminal) as progress:
        task = progress.add_task("", total=len(libraries) * len(asked) * len(conformance.COLUMNS))
        for library in libraries:
            progress.update(task, description=library.name)
            matrices.append(conformance.examine(library, asked, lambda: progress.advance(task)))
    for matrix in matrices:
        _print_matrix(matrix, shown)
    for name, what in conformance.LEGEND.items():
        shown.print(f"{conformance.SYMBOLS[name]} {name}: {what}", soft_wrap=True, highlight=False)
    texts = {markdown: conformance.markdown(matrices, str(markdown)), csv: conformance.csv_text(matrices)}
    for path, text in texts.items():
        if path is None:
            continue
        with writing(path):
            path.write_text(text, encoding="utf-8", newline="")
        shown.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return sum(matrix.counts[conformance.WRONG] for matrix in matrices if matrix.library.name == "lensor")


_COLOURS = {"right": "green", "wrong": "bold red", "refuses": "yellow", "n/a": "dim"}


def _print_matrix(matrix: Matrix, shown: Console) -> None:
    """A library's table, in parts where it is wider than the console, and below it what was wrong or refused."""
    from lensor.bench.conformance import COLUMNS, QUANTITIES, SYMBOLS

    library, rows = matrix.library, list(matrix.rows())
    head = Text.assemble((library.name, "bold"), printable(f" {library.version}: {matrix.summary}"))
    shown.print(head, highlight=False)
    for part in _parts(list(COLUMNS), shown.width - 6 - max(map(len, QUANTITIES.values()))) if rows else []:
        table = Table(Column(no_wrap=True), *(Column(name, justify="center") for name in part), box=SIMPLE)
        for quantity, cells in rows:
            of_part = (cell for cell in cells if cell.column in part)
            symbols = (Text(SYMBOLS[cell.status], style=_COLOURS[cell.status]) for cell in of_part)
            table.add_row(QUANTITIES[quantity], *symbols)
        shown.print(table)
    if matrix.absent:
        shown.print(f"no function for: {matrix.absent}", soft_wrap=True, highlight=False)
    for quantity, column, error, cases, first in matrix.wrong():
        text = f"wrong: {quantity}, {column}: relative error up to {error} in {cases} cases, first {first}"
        shown.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    for message, where in matrix.refusals():
        shown.print(f"refuses: {message} [{where}]", style="yellow", markup=False, highlight=False, soft_wrap=True)
    shown.print()


def _parts(names: list[str], width: int) -> list[list[str]]:
    """Column headings in parts that fit a width, as wide as their longest word and a margin."""
    parts: list[list[str]] = [[]]
    left = width
    for name in names:
        needed = max(map(len, name.split())) + 3
        if needed > left and parts[-1]:
            parts.append([])
            left = width
        parts[-1].append(name)
        left -= needed
    return parts


def _overhead(threads: int, seconds: float) -> None:
    from lensor.bench.measure import threads as using
    from lensor.bench.overhead import measure

    table = Table(
        "function", "gradient", *(Column(name, justify="right") for name in ("plan, µs", "call, µs", "added, µs"))
    )
    with using(threads):
        for found in measure(seconds):
            times = (f"{time:.1f}" for time in (found.raw, found.call, found.added))
            table.add_row(found.name, "yes" if found.gradient else "no", *times)
    console().print(table)


def _models(
    names: Sequence[str], batch: int, size: int, seconds: float, repeats: int, threads: int, csv: Path | None
) -> None:
    require("torch", "transformers")
    from lensor.bench.models import measure

    if csv is not None:
        _refuse_early(csv)
    headings = ("model", "way", "s", "beyond one pass, s", "peak, MB", "")
    table = Table(*headings[:2], *(Column(name, justify="right") for name in headings[2:5]), headings[5])
    lines: list[tuple[str, ...]] = [headings]
    shown = console()
    with shown.status("measuring"):
        for one in measure(names, batch, size, seconds, repeats, threads):
            numbers = [
                "–" if value is None else text.format(value)
                for text, value in (
                    ("{:.3f}", one.seconds),
                    ("{:.3f}", one.beyond),
                    ("{:,.0f}", one.peak and one.peak / 1e6),
                )
            ]
            lines.append((one.model, one.way, *numbers, one.message))
            table.add_row(*lines[-1])
    shown.print(table)
    if csv is not None:
        with writing(csv), csv.open("w", encoding="utf-8", newline="") as file:
            write_rows(file, lines)


def _steps(names: Sequence[str], seconds: float, repeats: int, threads: int) -> None:
    require("torch")
    from lensor.bench.steps import measure

    table = Table("model", "optimizer", *(Column(name, justify="right") for name in ("ms a step", "over SGD's")))
    shown = console()
    with shown.status("measuring"):
        for one in measure(names, seconds, repeats, threads):
            table.add_row(one.model, one.optimizer, f"{one.seconds * 1e3:.1f}", digits(one.ratio))
    shown.print(table)


def _training(tasks: Sequence[str], steps: int, seeds: int, batch: int, threads: int, out: Path) -> None:
    require("torch", "matplotlib")
    from lensor.bench.training import HEADINGS as OF_TRAINING
    from lensor.bench.training import TASKS, reached, run
    from lensor.bench.training import write as write_training

    choose("task", tasks, TASKS)
    _refuse_folder_early(out, ("training.csv", "training.png"))
    shown = console()
    with shown.status("training"):
        points = list(run(tasks, steps, seeds, batch, threads))
    for task in dict.fromkeys(point.task for point in points):
        table = Table(*OF_TRAINING, title=f"{task}: to the best loss of SGD and AdamW")
        for line in reached(points, task):
            table.add_row(*line)
        shown.print(table)
    with writing(out):
        paths = write_training(points, out)
    for path in paths:
        shown.print(f"wrote {path}", soft_wrap=True, highlight=False)


def _print_summaries(rows: list[Row], options: Options, shown: Console) -> None:
    """The summary as a table, what was measured below it, and how many rows have no time."""
    table = Table(*HEADINGS[:3], *(Column(name, justify="right") for name in HEADINGS[3:]))
    last = None
    for summary in summaries(rows, options):
        if last not in (None, summary.operation):
            table.add_section()
        last = summary.operation
        table.add_row(*summary.cells)
    shown.print(table)
    shown.print(f"Shortest time over that of {options.against}, below 1: faster.", highlight=False)
    for line in settings_of(rows):
        shown.print(line, soft_wrap=True, highlight=False)
    for status in ("wrong", "failed", "refused"):
        count = sum(row.found.status == status for row in rows)
        if count:
            shown.print(f"{count} {status}: see the message column", style="red", highlight=False)


def _shapes(given: list[str] | None) -> Shapes:
    """The shapes of a model's arguments, without batch axes."""
    return tuple(map(parse_sizes, given or ()))


def _shown(shapes: Shapes) -> str:
    return " and ".join(map(format_sizes, shapes))


def _find(model: str, shapes: Shapes) -> tuple[tuple[Layer, ...], Shapes]:
    """The unique convolutions of a model, and the shapes of its inputs."""
    if model.endswith(".pt2"):
        if shapes:
            raise BenchError(f"{model} holds the sizes that it was exported with: leave --input-shape out")
        require("torch")
        from lensor.bench.exported import exported

        found, shape = exported(Path(model))
        return tuple(found), (shape,)
    if ":" not in model:
        name = layers_of(model)[0].model
        held = dict.fromkeys((NETS[name].census, NETS[name].speed))
        if len(shapes) > 1 or not set(shapes) <= set(held):
            known = " and ".join(map(format_sizes, held))
            raise BenchError(f"{name} is held for {known}, for other inputs give {NETS[name].factory}")
        shape = shapes[0] if shapes else NETS[name].speed
        return layers_of(name, shape), (shape,)
    if not shapes:
        raise BenchError(f"which input does {model} take? give --input-shape, such as 3x224x224")
    require("torch")
    from lensor.bench.extract import convolutions, import_factory

    return tuple(convolutions(import_factory(model), model.rpartition(":")[2], *shapes)), shapes


def _write(path: Path, layers: tuple[Layer, ...], shapes: Shapes) -> None:
    with writing(path), path.open("w", encoding="utf-8", newline="") as file:
        file.write(",".join(COLUMNS) + "\n")
        write_layers(file, layers, _shown(shapes))


def _show(layers: tuple[Layer, ...], shapes: Shapes) -> None:
    headings = ("first module", "convolution", "kind", "stride", "padding", "dilation", "bias")
    table = Table(*headings, Column("count", justify="right"))
    for layer in layers:
        spec = layer.spec
        padding = format_sizes(spec.padding) + ("" if spec.padding_mode == "zeros" else f" {spec.padding_mode}")
        what = label(spec) + (" transposed" if spec.transposed else "")
        hyper = [format_sizes(spec.stride), padding, format_sizes(spec.dilation), "yes" if spec.bias else "no"]
        table.add_row(layer.name, what, layer.kind, *hyper, str(layer.count))
    out = console()
    out.print(table)
    total = sum(layer.count for layer in layers)
    kinds = ", ".join(f"{kind}: {total} ({unique})" for kind, (total, unique) in census(layers).items())
    out.print(
        f"{total} convolutions, {len(layers)} of them unique, for an input of {_shown(shapes)}; of each kind, "
        f"total (unique): {kinds or 'none'}",
        soft_wrap=True,
        highlight=False,
    )
