"""The commands `lensor convs`, `explain` and `rules`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.table import Column, Table

from lensor.inspect.catalogue import NETS, layers_of, merged
from lensor.inspect.errors import CommandError, choose, require
from lensor.inspect.files import refuse_early, writing
from lensor.inspect.layers import COLUMNS, KINDS, Layer, census, format_sizes, label, parse_sizes, write_layers
from lensor.inspect.operations import DEVICES, DTYPES, OPERATIONS, PAPER_OPERATIONS, Measuring
from lensor.inspect.options import Batch, Columns, Debug, Device, Dtype, Kinds, Repeats, Seconds, Threads
from lensor.inspect.terminal import console, names_of, reported

MODEL = (
    "A net of the catalogue, an import path pkg.mod:factory (imported and called), or a file saved by torch.export"
    " (.pt2; its graph is read, not run)."
)
INPUT = "Shape of one example, without batch axis: 3x224x224; repeat for a model with several arguments."

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
"""The shapes of a model's arguments."""


def convs(
    model: Annotated[str, typer.Argument(help=MODEL)],
    input_shape: Annotated[list[str] | None, typer.Option(help=INPUT)] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the convolutions to this CSV file.")] = None,
    debug: Debug = False,
) -> None:
    """List the convolutions of a CNN from the catalogue, or of any torch model that can be imported."""
    with reported(debug):
        layers, shapes = _find(model, _shapes(input_shape))
        if csv is not None:
            _write(csv, layers, shapes)
    _show(layers, shapes)


def explain(
    model: Annotated[str, typer.Argument(help=MODEL)],
    input_shape: Annotated[list[str] | None, typer.Option(help=INPUT)] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page to this file.")] = None,
    ops: Annotated[
        list[str] | None,
        typer.Option(help=f"Operations, from {', '.join(OPERATIONS)}; by default {', '.join(PAPER_OPERATIONS)}."),
    ] = None,
    kinds: Kinds = None,
    batch: Batch = 8,
    columns: Columns = 4,
    dtype: Dtype = "float32",
    threads: Threads = 2,
    device: Device = "cpu",
    repeats: Repeats = 20,
    seconds: Seconds = 0.1,
    times: Annotated[
        bool | None,
        typer.Option("--times/--no-times", help="Whether to measure; by default if lensor-bench is installed."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Print every operation of every convolution.")] = False,
    debug: Debug = False,
) -> None:
    """Show what Lensor makes of the convolutions of a model, its costs beside torch's, and what to do about them."""
    options = Measuring(batch, columns, dtype, threads, device, repeats, seconds)
    with reported(debug, interrupted="interrupted: nothing was written"):
        names = names_of(ops) or PAPER_OPERATIONS
        _explain(model, _shapes(input_shape), names, names_of(kinds), options, html, times, every)


def rules(
    markdown: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")] = None,
) -> None:
    """Print the simplification rules, each with a worked example, as a Markdown table."""
    from lensor.inspect.rules import to_markdown

    text = to_markdown()
    if markdown is None:
        typer.echo(text, nl=False)
        return
    with reported(debug=False), writing(markdown):
        markdown.write_text(text, encoding="utf-8")


def _explain(
    model: str,
    shapes: Shapes,
    ops: Sequence[str],
    kinds: Sequence[str],
    options: Measuring,
    html: Path | None,
    times: bool | None,
    every: bool,
) -> None:
    """Measure the convolutions of a model unless `times` is False, print the results, and optionally write the page."""
    require("torch", *(["jinja2", "networkx"] if html is not None else []))
    from lensor.inspect.explain import explained, totals
    from lensor.inspect.screen import print_screen
    from lensor.inspect.table import print_tables

    ops, wanted = choose("operation", ops, OPERATIONS), choose("kind", kinds, KINDS)
    choose("dtype", [options.dtype], DTYPES)
    choose("device", [options.device], DEVICES)
    if times is None:
        times = find_spec("lensor_bench") is not None
    elif times:
        require("lensor_bench")
    layers, shapes = _find(model, shapes)
    layers = tuple(layer for layer in merged(layers) if layer.spec.kind in wanted)
    if not layers:
        raise CommandError(f"{model} has no convolution{' of these kinds' if kinds else ''}, expected at least one")
    if html is not None:
        refuse_early(html)
    shown = console()
    timings, lines = {}, [f"batch {options.batch}, {options.dtype}, nothing measured"]
    if times:
        from lensor_bench.timing import timings_of

        timings, lines = timings_of(layers, ops, options, shown)
    found = list(explained(layers, ops, options.batch, options.columns, options.dtype, timings))
    lead = f"input {_shown(shapes)}, {len(layers)} distinct convolutions, {sum(one.count for one in layers)} in all"
    if every:
        print_tables(found, totals(found), shown)
        for line in (lead, *lines):
            shown.print(line, soft_wrap=True, highlight=False)
    else:
        print_screen(found, (f"{layers[0].model}: {lead}", *lines), shown)
    if html is not None:
        from lensor.inspect.page import page

        with writing(html):
            html.write_text(page(found, layers[0].model, lead, lines), encoding="utf-8")
        shown.print(f"wrote {html}", soft_wrap=True, highlight=False)


def _shapes(given: list[str] | None) -> Shapes:
    """The shapes of a model's arguments, without batch axes."""
    return tuple(map(parse_sizes, given or ()))


def _shown(shapes: Shapes) -> str:
    return " and ".join(map(format_sizes, shapes))


def _find(model: str, shapes: Shapes) -> tuple[tuple[Layer, ...], Shapes]:
    """The distinct convolutions of a model, and the shapes of its inputs."""
    if model.endswith(".pt2"):
        if shapes:
            raise CommandError(f"--input-shape is {_shown(shapes)}, expected none: {model} has fixed sizes")
        require("torch")
        from lensor.inspect.exported import exported

        found, shape = exported(Path(model))
        return tuple(found), (shape,)
    if ":" not in model:
        name = layers_of(model)[0].model
        held = dict.fromkeys((NETS[name].census, NETS[name].speed))
        if len(shapes) > 1 or not set(shapes) <= set(held):
            known = " and ".join(map(format_sizes, held))
            other = f"for other inputs use {NETS[name].factory}"
            raise CommandError(f"--input-shape is {_shown(shapes)}, expected {known} for {name}: {other}")
        shape = shapes[0] if shapes else NETS[name].speed
        return layers_of(name, shape), (shape,)
    if not shapes:
        raise CommandError(f"--input-shape is missing, expected one for {model}, such as 3x224x224")
    require("torch")
    from lensor.inspect.extract import convolutions, import_factory

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
