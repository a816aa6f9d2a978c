"""Results files: one CSV row for each operation, convolution and implementation, written as soon as it is measured.

A row contains the measurement, the machine and the versions, so it can be interpreted without other rows. Rows are
appended in a single write and flushed to disk, so finished rows survive even if the run is killed. A last line without
a line end is an unfinished row from a killed run and is ignored. Any other invalid line counts as damage: the file is
rejected and left unchanged.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lensor.inspect.errors import CommandError
from lensor.inspect.files import read_bytes, require_regular, writing
from lensor.inspect.layers import SPEC_COLUMNS, Layer, integer, label, spec_of, spec_record
from lensor.inspect.operations import DTYPES, OPERATIONS
from lensor.inspect.text import from_cell, write_rows

OK = "ok"
"""The status of a row with a correct result."""

STATUSES = (OK, "wrong", "refused", "failed")
"""All statuses."""


@dataclass(frozen=True)
class Machine:
    """The machine and the versions that produced a row."""

    machine: str
    cores: int
    python: str
    torch: str
    lensor: str

    @property
    def label(self) -> str:
        """The machine and the versions in one line."""
        return f"{self.machine}, {self.cores} CPUs; Python {self.python}, torch {self.torch}, lensor {self.lensor}"


@dataclass(frozen=True)
class Setting:
    """The settings of a measured row.

    Args:
        batch: batch size.
        columns: number of columns of the square root of the GGN.
        dtype: dtype of the operands.
        device: "cpu" or "cuda".
        threads: number of torch threads.
    """

    batch: int
    columns: int
    dtype: str
    device: str
    threads: int


@dataclass(frozen=True)
class Found:
    """The result of a measurement: times in seconds, with the standard's from the same rounds, and memory in bytes.

    Args:
        status: "ok", "wrong" (the result differs from the standard's), "refused" or "failed".
        message: the reason why the status is not "ok".
        error: the largest difference from the standard's result, divided by the largest entry.
        repeats: number of timed rounds.
        minimum: the shortest time.
        median: the median time.
        standard_minimum: the standard's shortest time.
        standard_median: the standard's median time.
        extra_bytes: peak memory in bytes besides the operands, minus the size of the result.
        standard_extra_bytes: the same for the standard.
        result_bytes: size of the result in bytes.
    """

    status: str
    message: str = ""
    error: float | None = None
    repeats: int = 0
    minimum: float | None = None
    median: float | None = None
    standard_minimum: float | None = None
    standard_median: float | None = None
    extra_bytes: int | None = None
    standard_extra_bytes: int | None = None
    result_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status is {self.status!r}, expected one of {', '.join(STATUSES)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and value < 0:
                raise ValueError(f"{field.name} is {value}, expected at least 0")
            if field.name != "error" and isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name} is {value}, expected a finite number")


@dataclass(frozen=True)
class Row:
    """One operation on one convolution by one implementation."""

    operation: str
    implementation: str
    version: str
    layer: Layer
    setting: Setting
    found: Found
    machine: Machine

    @property
    def key(self) -> tuple[object, ...]:
        """The fields that identify a row within a file."""
        return (self.operation, self.implementation, self.layer.spec, self.setting)


_PARTS: tuple[type[Any], ...] = (Setting, Found, Machine)
_FIRST = ("operation", "implementation", "version", "nets", "module", "count", "convolution")
HEADER = (*_FIRST, *SPEC_COLUMNS, *(field.name for part in _PARTS for field in fields(part)))
"""Columns of a results file."""


def _record(row: Row) -> dict[str, object]:
    layer = row.layer
    shown: dict[str, object] = {"operation": row.operation, "implementation": row.implementation}
    shown |= {"version": row.version, "nets": layer.model, "module": layer.name, "count": layer.count}
    shown |= {"convolution": label(layer.spec), **spec_record(layer.spec)}
    for part in (row.setting, row.found, row.machine):
        for field in fields(part):
            value = getattr(part, field.name)
            shown[field.name] = "" if value is None else f"{value:.7g}" if isinstance(value, float) else value
    return shown


def _row(cells: Sequence[str]) -> Row:
    """Parse the row in the cells of a line.

    Raises:
        CommandError, ValueError: for an invalid row.
    """
    if len(cells) != len(HEADER):
        raise ValueError(f"the line has {len(cells)} cells, expected {len(HEADER)}")
    record = dict(zip(HEADER, map(from_cell, cells), strict=True))
    for name, known in (("operation", tuple(OPERATIONS)), ("dtype", DTYPES)):
        if record[name] not in known:
            raise ValueError(f"{name} is {record[name]!r}, expected one of {', '.join(known)}")
    layer = Layer(record["nets"], record["module"], spec_of(record), integer(record, "count"))
    setting, found, machine = (_part(part, record) for part in _PARTS)
    return Row(record["operation"], record["implementation"], record["version"], layer, setting, found, machine)


def _part(part: type[Any], record: dict[str, str]) -> Any:
    hints = get_type_hints(part)
    return part(**{field.name: _value(hints[field.name], record, field.name) for field in fields(part)})


def _value(hint: Any, record: dict[str, str], name: str) -> Any:
    if get_args(hint):  # int | None, float | None
        if record[name] == "":
            return None
        (hint, _) = get_args(hint)
    if hint is int:
        return integer(record, name)
    try:
        return hint(record[name])
    except ValueError:
        raise ValueError(f"{name} is {record[name]!r}, expected a number") from None


# --------------------------------------------------------------------------------------------------------------- files
def read(path: Path) -> list[Row]:
    """Read the rows of a results file.

    Raises:
        CommandError: if the file cannot be read, is not a results file, or is damaged.
    """
    return _scan(path)[0]


def _scan(path: Path) -> tuple[list[Row], int]:
    """The rows of a file, and their total length in bytes."""
    data = read_bytes(path)
    whole = finished(data)
    try:
        text = whole.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if text.partition("\n")[0].rstrip("\r") != ",".join(HEADER):
        raise CommandError(f"{path} is not a results file of this version of lensor bench; it was left unchanged")
    rows: list[Row] = []
    seen = set()
    reader = csv.reader(io.StringIO(text.partition("\n")[2], newline=""))
    try:
        for cells in reader:
            row = _row(cells)
            if row.key in seen:
                raise ValueError("the measurement occurs in an earlier line, expected once")
            seen.add(row.key)
            rows.append(row)
    except (CommandError, csv.Error, TypeError, ValueError) as error:
        raise CommandError(
            f"{path} is corrupt at line {reader.line_num + 1} ({error}); it was left unchanged"
        ) from None
    return rows, len(whole)


def finished(data: bytes) -> bytes:
    """The contents of a file without an unfinished last line."""
    return data[: data.rfind(b"\n") + 1]


class ResultsFile:
    """A results file opened for writing.

    Args:
        path: the file; it is created with a header if it does not exist.
        resume: whether to continue an existing file.

    A file that another process has changed in the meantime is not written to, so no row is lost or repeated.

    Raises:
        CommandError: if the file cannot be written, exists while `resume` is not set, is damaged or not a results file,
            or comes from a different machine or different versions.
    """

    def __init__(self, path: Path, machine: Machine, resume: bool) -> None:
        self.path = path
        self.rows: list[Row] = []
        header = (",".join(HEADER) + "\n").encode()
        require_regular(path)
        with writing(path):
            held = path.read_bytes() if path.exists() else b""
            if held == header or not header.startswith(held):
                self._length = self._go_on(machine, resume)
            else:  # the file is new, or a run was killed while writing the header
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"")
                self._length = 0
                self._append(header)

    def _go_on(self, machine: Machine, resume: bool) -> int:
        if not resume:
            raise CommandError(f"{self.path} exists: continue it with --resume, or specify a different --out")
        before = self.path.stat().st_size
        self.rows, length = _scan(self.path)
        for row in self.rows:
            if row.machine != machine:
                raise CommandError(
                    f"{self.path} was measured on another machine or with other versions"
                    f" ({difference(row.machine, machine)}): specify a different --out"
                )
        if length < before and self.path.stat().st_size == before:
            os.truncate(self.path, length)
        return length

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows to disk in a single write."""
        text = io.StringIO()
        new = list(rows)
        write_rows(text, (_record(row).values() for row in new))
        with writing(self.path):
            self._append(text.getvalue().encode())
        self.rows += new

    def _append(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            if file.tell() != self._length:
                raise CommandError(f"{self.path} was changed by another process; it was left unchanged")
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._length += len(data)


def difference(there: Machine, here: Machine) -> str:
    """The differences between two machines, for a message."""
    pairs = ((field.name, getattr(there, field.name), getattr(here, field.name)) for field in fields(here))
    return ", ".join(f"{name} {one}, here {other}" for name, one, other in pairs if one != other)
