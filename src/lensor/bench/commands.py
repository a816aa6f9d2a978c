"""The commands `lensor convs` and `lensor bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Column, Table

from lensor.bench.catalogue import NETS, layers_of
from lensor.bench.errors import BenchError
from lensor.bench.layers import COLUMNS, Layer, census, format_sizes, label, parse_sizes, write_layers

WIDE = 150
"""The width of tables where there is no terminal."""


def add_commands(app: typer.Typer, stop: Callable[[str], typer.Exit]) -> None:
    """Add the commands to an app; `stop` makes an exit of an error message."""

    def fail(error: BenchError, debug: bool) -> NoReturn:
        if debug:
            raise error
        raise stop(str(error)) from None

    @app.command(help="The convolutions of a CNN: of the catalogue, or any torch model that can be imported.")
    def convs(
        model: Annotated[str, typer.Argument(help="A net of the catalogue, or an import path pkg.mod:factory.")],
        input_shape: Annotated[
            str | None, typer.Option(help="Shape of one input, without batch axis: 3x224x224.")
        ] = None,
        csv: Annotated[Path | None, typer.Option(help="Write the convolutions to this CSV file too.")] = None,
        debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where there is an error.")] = False,
    ) -> None:
        try:
            shape = parse_sizes(input_shape) if input_shape else None
            layers, shape = _find(model, shape)
            if csv is not None:
                _write(csv, layers, shape)
        except BenchError as error:
            fail(error, debug)
        _show(layers, shape)


def console() -> Console:
    """A console that is wide where it is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDE)


def _find(model: str, shape: tuple[int, ...] | None) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """The unique convolutions of a model, and the shape of its input."""
    if ":" not in model:
        name = layers_of(model)[0].model
        held = dict.fromkeys((NETS[name].census, NETS[name].speed))
        if shape is not None and shape not in held:
            shapes = " and ".join(map(format_sizes, held))
            raise BenchError(f"{name} is held for {shapes}, for other inputs give {NETS[name].factory}")
        shape = shape or NETS[name].speed
        return layers_of(name, shape), shape
    if shape is None:
        raise BenchError(f"which input does {model} take? give --input-shape, such as 3x224x224")
    from lensor.bench.extract import convolutions, import_factory

    return tuple(convolutions(import_factory(model), model.rpartition(":")[2], shape)), shape


def _write(path: Path, layers: tuple[Layer, ...], shape: tuple[int, ...]) -> None:
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write(",".join(COLUMNS) + "\n")
            write_layers(file, layers, shape)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror or error}") from None


def _show(layers: tuple[Layer, ...], shape: tuple[int, ...]) -> None:
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
        f"{total} convolutions, {len(layers)} of them unique, for an input of {format_sizes(shape)}; of each kind, "
        f"total (unique): {kinds or 'none'}",
        soft_wrap=True,
        highlight=False,
    )
