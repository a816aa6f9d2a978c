"""The command `lensor conformance`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from rich.text import Text

from lensor.inspect.errors import CommandError, choose, require
from lensor.inspect.files import refuse_early, writing
from lensor.inspect.options import Debug
from lensor.inspect.terminal import console, names_of, reported, stop
from lensor.inspect.text import printable

if TYPE_CHECKING:
    from lensor_bench.conformance import Matrix


def conformance(
    peer: Annotated[
        list[str] | None,
        typer.Option(help="Libraries, from lensor (the default), einconv, backpack, opacus: a,b,c, or repeat."),
    ] = None,
    quantity: Annotated[
        list[str] | None, typer.Option(help="Quantities; all by default, an unknown one lists them.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write a page to this file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write every case to this CSV file.")] = None,
    debug: Debug = False,
) -> None:
    """Check whether Lensor, or another library, is right or wrong or refuses, for each quantity and hyper-parameter.

    The exit status is 1 if Lensor is wrong.
    """
    with reported(debug):
        wrong = _conformance(names_of(peer), names_of(quantity), markdown, csv)
    if wrong:
        raise stop(f"Lensor is wrong in {wrong} cells")


def _conformance(peers: tuple[str, ...], quantities: tuple[str, ...], markdown: Path | None, csv: Path | None) -> int:
    """Check libraries, with a progress bar; print and write the results; return the number of Lensor's wrong cells."""
    require("torch")
    from lensor_bench import conformance

    if markdown is not None and csv is not None and markdown.resolve() == csv.resolve():
        raise CommandError(f"--markdown and --csv are both {markdown}, expected different files")
    for path in (markdown, csv):
        if path is not None:
            refuse_early(path)
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
    """Print a library's table, split into parts if it is wider than the console, then wrong results and refusals."""
    from lensor_bench.conformance import COLUMNS, QUANTITIES, SYMBOLS

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
    """Split column headings into parts that fit a width; each column is as wide as its longest word plus a margin."""
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
