"""The full tables of `lensor explain --all`: every operation of every convolution, and the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from lensor.inspect.explain import Explanation, Total
from lensor.inspect.layers import name_of
from lensor.inspect.text import digits, millions, milliseconds, pace, printable

HEADINGS = (
    *(("module", False), ("convolution", False), ("kind", False), ("count", True), ("operation", False)),
    *(("plan", False), ("Mflop", True), ("peak MB", True), ("standard, ms", True), ("Lensor, ms", True)),
    ("ratio", True),
)
"""The columns of the table, and whether they contain numbers."""

STYLES = {"slow": "yellow", "fast": "green", "": ""}
"""The terminal's style for each pace."""


@dataclass(frozen=True)
class Cell:
    """A table cell: its text and its pace."""

    text: str
    pace: str = ""


def cells(one: Explanation) -> list[Cell]:
    """The cells of an explanation, one per heading."""
    texts = (*name_of(one.layer), one.layer.kind, str(one.layer.count), one.operation, one.plan.name)
    costs = millions(one.plan.flops), millions(one.peak_bytes)
    return [*map(Cell, (*texts, *costs)), *times(one.seconds)]


def times(seconds: tuple[float, float] | None) -> list[Cell]:
    """The cells for the standard time, Lensor's time and their ratio."""
    if seconds is None:
        return [Cell("–")] * 3
    ratio = seconds[1] / seconds[0]
    return [*(Cell(milliseconds(one)) for one in seconds), Cell(digits(ratio), pace(ratio))]


def print_tables(found: Sequence[Explanation], sums: Sequence[Total], shown: Console) -> None:
    """Print a table with one row per operation of each convolution, and one table for the whole model."""
    columns = (Column(name, justify="right" if number else "left", overflow="fold") for name, number in HEADINGS)
    table = Table(*columns)
    for one, following in zip(found, [*found[1:], None], strict=True):
        end = following is None or following.layer != one.layer
        table.add_row(*map(_styled, cells(one)), end_section=end)
    shown.print(table)
    headings = ("Mflop", "standard, ms", "Lensor, ms", "ratio", "without a time")
    table = Table("the whole model", *(Column(name, justify="right") for name in headings))
    for total in sums:
        missing = str(total.missing) if total.missing else ""
        table.add_row(total.name, millions(total.flops), *map(_styled, times(total.seconds)), missing)
    shown.print(table)
    for trouble in dict.fromkeys(one.trouble for one in found if one.trouble):
        shown.print(trouble, style="red", highlight=False, markup=False, soft_wrap=True)


def _styled(cell: Cell) -> Text:
    return Text(printable(cell.text), style=STYLES[cell.pace])
