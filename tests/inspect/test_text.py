"""Text of any origin in terminals, tables, pages and files; odd files in the place of results."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lensor_bench import crs
from lensor_bench.report import Options, markdown
from lensor_bench.results import HEADER, OK, Found, Machine, ResultsFile, Row, Setting, read
from torch import nn

import lensor
from lensor.inspect import CommandError, Layer
from lensor.inspect.text import cell, from_cell, printable, write_rows
from tests.support.command import invoke

HOSTILE = (
    *("[red]x[/red]", "[/]", "\x1b[31mesc\x1b]0;title\x07", "=HYPERLINK(1)", "@sum", "-1", "+a", "a\rb\nc"),
    *("<script>alert(1)</script>", "\u202ertl", "\x9b31m", "\ud800", "a|b", "'=x", ":smile:", "\u2028"),
)
HERE = Machine("machine", 2, "3.11", "2.13", "0.1.0")


class Named(nn.Module):
    """Convolutions with names of all sorts."""

    def __init__(self) -> None:
        super().__init__()
        for at, name in enumerate(HOSTILE):
            self._modules[name] = nn.Conv2d(3, 3, 1, padding=at)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self._modules.values():
            x = module(x)  # pyright: ignore[reportOptionalCall]
        return x


def steers(text: str) -> list[str]:
    return [one for one in text if unicodedata.category(one) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and one != "\n"]


# ------------------------------------------------------------------------------------------------------------- cells
@given(st.text())
def test_printable_text_steers_nothing_and_stays(text: str) -> None:
    shown = printable(text)
    assert not steers(shown)
    assert "\n" not in shown
    assert printable(shown) == shown
    if not steers(text) and "\n" not in text:
        assert shown == text


@given(st.one_of(st.text(), st.builds("{}{}".format, st.sampled_from("=+-@'＝＠\t\r\n"), st.text())))
def test_cells_are_no_formulas_and_are_read_back(text: str) -> None:
    file = io.StringIO()
    write_rows(file, [[text]])
    file.seek(0)
    (row,) = csv.reader(file)
    assert from_cell(row[0]) == printable(text)
    if row[0][:1] in tuple("=+-@＝＋－＠"):
        float(row[0])


@given(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers()))
def test_numbers_stay_numbers(number: float) -> None:
    assert cell(number) is number
    for text in (str(number), f"{number:.3g}", f"{number:+.3e}"):
        assert cell(text) == text


# ---------------------------------------------------------------------------------------------------------- commands
def test_names_of_modules_are_only_shown(tmp_path: Path) -> None:
    table, page = tmp_path / "named.csv", tmp_path / "named.html"
    given = ("tests.inspect.test_text:Named", "--input-shape", "3x5x5")
    found = invoke("convs", *given, "--csv", str(table))
    assert found.exit_code == 0, found.output
    assert not steers(found.stdout)
    assert [line.split("│")[1].strip() for line in found.stdout.splitlines()[3:-2]] == list(map(printable, HOSTILE))
    with table.open(encoding="utf-8", newline="") as file:
        names = [row["name"] for row in csv.DictReader(file)]
    assert list(map(from_cell, names)) == list(map(printable, HOSTILE))
    assert [name for name in names if name[0] in "=+-@"] == ["-1"]
    found = invoke("explain", *given, "--no-times", "--ops", "forward", "--html", str(page))
    assert found.exit_code == 0, found.output
    assert not steers(found.stdout)
    text = page.read_text(encoding="utf-8")
    assert not steers(text)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def raising() -> nn.Module:
    raise ValueError("\x1b[2J[bold]gone[/bold] \u202e")


def test_messages_and_paths_are_only_shown(tmp_path: Path) -> None:
    found = invoke("convs", "tests.inspect.test_text:raising", "--input-shape", "3x5x5")
    assert found.exit_code == 1
    assert r"ValueError: \x1b[2J[bold]gone[/bold] \u202e" in found.stderr
    assert not steers(found.stderr)
    found = invoke("convs", "2c2d", "--csv", str(tmp_path / "no\x1b[31m[red]" / "x.csv"))
    assert found.exit_code == 1
    assert r"no\x1b[31m[red]" in found.stderr
    assert not steers(found.stderr)


# --------------------------------------------------------------------------------------------------------- results
def row(**changes: Any) -> Row:
    layer = Layer("net", "conv", lensor.ConvSpec(3, 8, (12, 12), 3, padding=((0, 1), (1, 0))), 2)
    found = Found(OK, minimum=0.5, median=0.5, standard_minimum=2.0, standard_median=2.0)
    made = Row("forward", "lensor", "0.1.0", layer, Setting(2, 4, "float32", "cpu", 1), found, HERE)
    return replace(made, **changes)


@pytest.mark.parametrize("text", HOSTILE)
def test_results_with_any_text_are_read_back(text: str, tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "r.csv", HERE, resume=False)
    layer = Layer(text, text, row().layer.spec, 1)
    file.append([row(layer=layer, implementation="other", found=Found("failed", text)), row(layer=layer)])
    first, second = read(tmp_path / "r.csv")
    assert (first.found.message, first.layer, second.layer) == (printable(text), layer, layer)
    report = markdown([first, second], Options(against="lensor"))
    assert not steers(report)
    assert "<script" not in report
    assert len({line.count("|") for line in report.splitlines() if line.startswith("| forward")}) <= 3


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("batch", "", "batch is '', expected an integer"),
        ("count", "2.5", "count is '2.5', expected an integer"),
        ("in_channels", "x", "in_channels is 'x', expected an integer"),
        ("minimum", "fast", "minimum is 'fast', expected a number"),
        ("minimum", "nan", "minimum is nan, expected a finite number"),
        ("padding", "0+", r"padding is '0\+', expected numbers such as 1x0\+2"),
        ("operation", "inverse", "operation is 'inverse', expected one of forward,"),
        ("dtype", "float8", "dtype is 'float8', expected one of float64,"),
        ("stride", "", "'' is not a shape, expected sizes such as"),
    ],
)
def test_a_damaged_cell_is_named(column: str, value: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    ResultsFile(path, HERE, resume=False).append([row()])
    header, cells = csv.reader(path.read_text(encoding="utf-8").splitlines())
    cells[header.index(column)] = value
    path.write_text(f"{','.join(header)}\n{','.join(cells)}\n", encoding="utf-8")
    with pytest.raises(CommandError, match=rf"r\.csv is corrupt at line 2 \({message}.*\); it was left unchanged"):
        read(path)


def test_a_truncated_row_is_told(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    ResultsFile(path, HERE, resume=False).append([row()])
    header, line = path.read_text(encoding="utf-8").splitlines()
    for count in (1, 5, len(HEADER) - 1, len(HEADER) + 1):
        cells = [*line.split(","), "more"][:count]
        path.write_text(f"{header}\n{','.join(cells)}\n", encoding="utf-8")
        with pytest.raises(CommandError, match=rf"line 2 \(the line has {count} cells, expected {len(HEADER)}\)"):
            read(path)


def test_devices_pipes_and_folders_are_not_results_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    made = crs.Made("machine", 2, "3.11", "2.13", "0.1.0", threads=1)
    for path in (Path("/dev/full"), Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        for use in (lambda path=path: ResultsFile(path, HERE, resume=True), lambda path=path: crs.read(path, made)):
            with pytest.raises(CommandError, match=f"cannot write {path}: it is a .*, expected a file"):
                use()
    for path in (Path("/dev/zero"), tmp_path):
        with pytest.raises(CommandError, match=f"cannot read {path}: "):
            read(path)


# ---------------------------------------------------------------------------------------------------------- the shell
@pytest.mark.parametrize(
    ("shell", "status", "message"),
    [
        ("{} convs 2c2d > /dev/full", 1, "lensor: cannot write the output: No space left on device\n"),
        ("{} rules > /dev/full", 1, "lensor: cannot write the output: No space left on device\n"),
        ("{} --version > /dev/full", 1, "lensor: cannot write the output: No space left on device\n"),
        ("{} convs 2c2d --csv /dev/full > /dev/null", 1, "lensor: cannot write /dev/full: No space left on device\n"),
        ("{} convs resnet18 | head -1 > /dev/null", 0, ""),
        ("{} rules | head -1 > /dev/null", 0, ""),
        ("{} convs 2c2d >&-", 0, ""),
        ("{} bench --out /dev/full --nets 2c2d", 1, "lensor: cannot write /dev/full: it is a device or pipe"),
        ("{} bench report /dev/zero", 1, "lensor: cannot read /dev/zero: it is a device, expected a file\n"),
        ("PYTHONIOENCODING=ascii {} convs 2c2d > /dev/null", 0, ""),
    ],
)
def test_outputs_that_are_full_closed_or_narrow(shell: str, status: int, message: str) -> None:
    program = f"{sys.executable} -c 'from lensor.cli import main; main()'"
    done = subprocess.run(shell.format(program), shell=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == (1 if message else 0)
