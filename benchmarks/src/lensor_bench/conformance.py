"""The conformance matrix: whether a library's result is right or wrong, or the library raises an error, for each case.

A cell covers several convolutions and is right only if every result equals the one from `definitions`, in float64. The
libraries are called as their users would call them (`libraries`).
"""

from __future__ import annotations

import io
import itertools
import math
import platform
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from lensor.inspect.errors import CommandError, choose, in_one_line, require
from lensor.inspect.text import write_rows
from lensor_bench.definitions import WITHOUT_BATCH, Case, Convolution, expected
from lensor_bench.libraries import LIBRARIES, Library
from lensor_bench.measure import relative_error

TOLERANCE = 1e-6
"""Maximum relative error that counts as rounding; it allows for scales in single precision."""

RIGHT, WRONG, REFUSES, NONE = "right", "wrong", "refuses", "n/a"
SYMBOLS = {RIGHT: "✓", WRONG: "✗", REFUSES: "!", NONE: "–"}
LEGEND = {
    RIGHT: "every case agrees with the definition",
    WRONG: "a result differs without a warning or error",
    REFUSES: "an exception, and no wrong result",
    NONE: "the library has no function for it, or the convolution does not exist",
}

QUANTITIES = {
    "forward": "forward",
    "transposed_forward": "transposed forward",
    "input_vjp": "input VJP",
    "weight_vjp": "weight VJP",
    "per_example_weight_vjp": "weight VJP per example",
    "kfac_expand": "KFAC input factor, expand",
    "kfac_reduce": "KFAC input factor, reduce",
    "kfac_output_expand": "KFAC output factor, expand",
    "kfac_output_reduce": "KFAC output factor, reduce",
    "ggn_diagonal": "GGN diagonal",
    "unfold": "unfold",
    "fold": "fold",
}
"""The quantities, which are the rows, and their names in tables."""


# -------------------------------------------------------------------------------------------------------------- columns
def _conv(in_channels: int, out_channels: int, input_size: Any, kernel_size: Any, **hyper: Any) -> Convolution:
    return Convolution(
        in_channels=in_channels, out_channels=out_channels, input_size=input_size, kernel_size=kernel_size, **hyper
    )


def _mode(padding_mode: str) -> tuple[Convolution, ...]:
    return (
        _conv(2, 3, (6, 5), (3, 3), padding=1, padding_mode=padding_mode),
        _conv(2, 3, (7, 6), (3, 2), stride=(2, 1), padding=(2, 1), padding_mode=padding_mode),
        _conv(2, 3, (7, 6), (3, 2), padding=(3, 1), dilation=(2, 1), padding_mode=padding_mode),
        _conv(2, 2, (7,), (4,), stride=2, padding=3, padding_mode=padding_mode),
        _conv(1, 2, (4, 3, 4), (2, 3, 2), padding=(1, 1, 2), padding_mode=padding_mode),
    )


COLUMNS: Mapping[str, tuple[Convolution, ...]] = {
    "plain": (
        _conv(3, 4, (7, 6), (3, 2)),
        _conv(2, 3, (5, 5), (1, 1)),
        _conv(3, 2, (4, 5), (4, 5)),
    ),
    "stride": (
        _conv(2, 3, (7, 7), (3, 3), stride=2),
        _conv(2, 3, (9, 6), (3, 2), stride=(3, 2)),
        _conv(3, 2, (7, 6), (3, 2), stride=(2, 1)),
    ),
    "unread inputs": (
        _conv(2, 3, (8, 8), (3, 3), stride=2),
        _conv(2, 3, (9, 8), (2, 1), stride=(3, 2)),
        _conv(2, 3, (9, 8), (3, 2), stride=(4, 3), padding=(1, 0)),
    ),
    "padding": (
        _conv(3, 2, (6, 5), (3, 3), padding=1),
        _conv(2, 3, (5, 6), (3, 2), padding=(2, 1)),
        _conv(2, 3, (7, 6), (3, 4), stride=2, padding=(1, 2)),
        _conv(2, 3, (6, 5), (2, 1), padding=(2, 1)),
    ),
    "same": (
        _conv(2, 3, (6, 5), (3, 3), padding="same"),
        _conv(2, 3, (6, 5), (2, 4), padding="same"),
        _conv(3, 2, (7, 6), (4, 2), padding="same", dilation=(1, 3)),
        _conv(2, 3, (7,), (2,), padding="same"),
    ),
    "uneven": (
        _conv(2, 3, (6, 5), (3, 3), padding=((2, 0), (0, 1))),
        _conv(2, 3, (7, 6), (3, 2), stride=2, padding=((0, 3), (1, 0))),
        _conv(3, 2, (6, 6), (2, 3), padding=((2, 1), (1, 3)), dilation=(3, 2)),
    ),
    "dilation": (
        _conv(2, 3, (7, 6), (3, 2), dilation=2),
        _conv(2, 3, (8, 7), (3, 2), dilation=(2, 3), stride=(1, 2), padding=(1, 2)),
        _conv(3, 2, (7, 8), (2, 3), dilation=(4, 2), padding=(2, 1)),
    ),
    "groups": (
        _conv(4, 6, (6, 5), (3, 2), groups=2),
        _conv(6, 3, (7, 6), (3, 3), groups=3, stride=2, padding=1),
        _conv(4, 4, (5, 5), (1, 1), groups=2, stride=2),
        _conv(4, 2, (8, 7), (2, 3), groups=2, dilation=(3, 2), padding=(1, 0)),
    ),
    "depthwise": (
        _conv(4, 4, (6, 5), (3, 3), groups=4, padding=1),
        _conv(3, 6, (7, 6), (3, 2), groups=3, stride=(2, 1)),
    ),
    "circular": _mode("circular"),
    "reflect": _mode("reflect"),
    "replicate": _mode("replicate"),
    "large kernel": (
        _conv(2, 3, (3, 2), (5, 4), padding=2),
        _conv(2, 3, (3, 4), (2, 3), padding=(2, 1), dilation=(4, 2)),
        _conv(2, 3, (2, 3), (4, 5), padding=(2, 3), stride=2),
    ),
    "1-d": (
        _conv(2, 3, (9,), (3,)),
        _conv(2, 3, (8,), (3,), stride=2, padding=1, dilation=2),
    ),
    "3-d": (
        _conv(2, 2, (4, 3, 5), (2, 2, 3)),
        _conv(2, 3, (5, 4, 3), (3, 2, 1), stride=(2, 1, 2), padding=(1, 0, 1)),
        _conv(3, 2, (4, 5, 4), (2, 3, 2), dilation=(2, 1, 1), padding=(1, 1, 0)),
    ),
    "combined": (
        _conv(2, 4, (5, 6), (2, 4), groups=2, padding="same", padding_mode="circular"),
        _conv(4, 2, (7, 6), (3, 2), groups=2, padding=(3, 1), dilation=(2, 1), padding_mode="reflect"),
        _conv(2, 2, (6, 7), (2, 3), groups=2, stride=2, padding=(2, 1), padding_mode="replicate"),
        _conv(4, 2, (7,), (4,), groups=2, padding="same", dilation=3),
        _conv(4, 2, (4, 5, 4), (2, 3, 2), groups=2, dilation=(2, 1, 1), padding=(1, 1, 0)),
        _conv(4, 2, (3, 4), (3, 2), groups=2, stride=(3, 1), dilation=(1, 2), output_padding=(2, 1), transposed=True),
    ),
    "transposed": (
        _conv(3, 2, (4, 3), (3, 2), transposed=True),
        _conv(2, 3, (4, 3), (3, 3), stride=2, padding=1, transposed=True),
        _conv(2, 3, (3, 4), (2, 3), stride=(3, 1), padding=(0, 1), dilation=(1, 2), transposed=True),
        _conv(2, 3, (5,), (4,), stride=3, padding=1, transposed=True),
        _conv(2, 2, (3, 2, 3), (2, 3, 2), stride=(2, 1, 1), transposed=True),
    ),
    "output padding": (
        _conv(2, 3, (4, 3), (3, 3), stride=2, padding=1, output_padding=1, transposed=True),
        _conv(2, 3, (3, 4), (3, 2), stride=(3, 1), output_padding=(2, 1), dilation=(1, 2), transposed=True),
        _conv(2, 3, (5,), (4,), stride=3, padding=1, output_padding=2, transposed=True),
        _conv(2, 2, (3, 2, 3), (2, 3, 2), stride=(2, 1, 1), output_padding=(1, 0, 0), transposed=True),
    ),
    "transposed groups": (
        _conv(4, 2, (3, 4), (3, 2), groups=2, transposed=True),
        _conv(3, 3, (3, 4), (3, 2), stride=(2, 3), padding=(1, 0), groups=3, transposed=True),
        _conv(4, 2, (3, 4), (3, 2), stride=(3, 1), padding=(0, 1), dilation=(1, 2), groups=2, transposed=True),
    ),
    "unbatched": (
        _conv(2, 3, (6, 5), (3, 2), unbatched=True),
        _conv(4, 2, (7, 6), (3, 3), stride=2, padding=1, groups=2, unbatched=True),
        _conv(2, 3, (8,), (3,), padding=1, unbatched=True),
    ),
    "bias": (
        _conv(2, 3, (6, 5), (3, 2), bias=True),
        _conv(4, 6, (7, 6), (3, 3), stride=2, padding=1, groups=2, bias=True),
        _conv(2, 3, (4, 3, 4), (2, 2, 2), padding=1, bias=True),
    ),
}
"""The hyper-parameters, which are the columns, with their convolutions."""

MEANINGS = {
    "unread inputs": "strides that leave positions of the input unread",
    "same": '`padding="same"`, also with even kernels, where the padding is uneven',
    "uneven": "padding as (left, right) pairs; torch's modules cannot express these",
    "large kernel": "kernels larger than the input, with padding",
    "combined": 'groups together with a padding mode, `padding="same"`, three dimensions or output padding',
    "unbatched": "inputs without a batch axis",
    "bias": "a bias; in input factors it is the last row and column",
}
"""Explanations of some column names."""

WITH_BIAS = ("forward", "transposed_forward", "kfac_expand", "kfac_reduce")
"""Quantities that depend on whether there is a bias; in an input factor, the bias is the last row and column."""


def cases(quantity: str, column: str) -> tuple[Convolution, ...]:
    """The convolutions of a cell; empty if none exists."""
    if column == "unbatched" and quantity not in WITHOUT_BATCH:
        return ()
    if column == "bias" and quantity not in WITH_BIAS:
        return ()
    held = COLUMNS[column]
    if quantity in ("unfold", "fold"):
        return tuple(conv for conv in held if conv.groups == 1)
    if quantity == "forward":
        return tuple(conv for conv in held if not conv.transposed)
    if quantity == "transposed_forward":
        plain = (conv for conv in held if conv.padding_mode == "zeros" and conv.padding != "same")
        return tuple(replace(conv, transposed=True) for conv in plain)
    return held


# --------------------------------------------------------------------------------------------------------------- cells
@dataclass(frozen=True)
class Answer:
    """A library's answer to one case.

    Args:
        conv: the convolution.
        status: "right", "wrong" or "refuses".
        error: the largest difference divided by the largest entry; infinite for a wrong shape or NaN.
        message: the error that the library raised, or the difference in shape.
    """

    conv: Convolution
    status: str
    error: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class Cell:
    """A library's answers to all cases of a quantity and a hyper-parameter."""

    quantity: str
    column: str
    answers: tuple[Answer, ...]

    @property
    def status(self) -> str:
        """`wrong` if any case is wrong, else `refuses` if any is refused, else `right`; `n/a` without cases."""
        found = {answer.status for answer in self.answers}
        return next((status for status in (WRONG, REFUSES, RIGHT) if status in found), NONE)

    @property
    def error(self) -> float:
        """The largest error among the cases."""
        return max((answer.error for answer in self.answers), default=0.0)

    def having(self, status: str) -> list[Answer]:
        """The answers with a status."""
        return [answer for answer in self.answers if answer.status == status]


@dataclass(frozen=True)
class Matrix:
    """All cells for one library."""

    library: Library
    cells: tuple[Cell, ...]

    @cached_property
    def counts(self) -> Counter[str]:
        """Number of cells with each status."""
        return Counter(cell.status for cell in self.cells)

    def rows(self) -> Iterator[tuple[str, list[Cell]]]:
        """The cells of each quantity that the library supports."""
        for quantity, cells in itertools.groupby(self.cells, lambda cell: cell.quantity):
            if quantity in self.library.ways:
                yield quantity, list(cells)

    @property
    def absent(self) -> str:
        """The quantities that the library does not support, in one line."""
        asked = dict.fromkeys(cell.quantity for cell in self.cells)
        return ", ".join(QUANTITIES[quantity] for quantity in asked if quantity not in self.library.ways)

    @property
    def summary(self) -> str:
        """The counts in one line."""
        return ", ".join(f"{self.counts[status]} {status}" for status in SYMBOLS)

    def wrong(self) -> list[tuple[str, ...]]:
        """Wrong cells: quantity, hyper-parameter, error, cases, and the first wrong case."""
        found = []
        for cell in self.cells:
            answers = cell.having(WRONG)
            if answers:
                cases = f"{len(answers)} of {len(cell.answers)}"
                first = f"{answers[0].conv}" + (f": {answers[0].message}" if answers[0].message else "")
                found.append((QUANTITIES[cell.quantity], cell.column, f"{cell.error:.2g}", cases, first))
        return found

    def refusals(self) -> list[tuple[str, ...]]:
        """Errors, where they occur, and in how many cases; messages that differ only in numbers are merged."""
        places: dict[str, tuple[str, dict[str, list[str]]]] = {}
        for cell in self.cells:
            alike: dict[str, list[str]] = {}
            for answer in cell.having(REFUSES):
                alike.setdefault(re.sub(r"\d+", "0", answer.message), []).append(answer.message)
            for kind, messages in alike.items():
                some = f" ({len(messages)} of {len(cell.answers)})" if len(messages) < len(cell.answers) else ""
                _, where = places.setdefault(kind, (messages[0], {}))
                where.setdefault(QUANTITIES[cell.quantity], []).append(cell.column + some)
        return [
            (message, "; ".join(f"{quantity}: {', '.join(columns)}" for quantity, columns in where.items()))
            for message, where in places.values()
        ]


def ask(library: Library, quantity: str, conv: Convolution) -> Answer:
    """Compute a library's answer to one case.

    Raises:
        ImportError: if the library does not have the functions that this command calls.
    """
    case = Case.draw(conv)
    right = expected(quantity, case)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = library.ways[quantity](case).detach()
    except ImportError as error:  # this is not the library's answer
        known = f"{library.name} {library.version} is not supported, expected another version"
        raise CommandError(f"{known}: {in_one_line(error)}") from error
    except Exception as error:  # any other error counts as the library's result
        return Answer(conv, REFUSES, message=in_one_line(error, None))
    if found.shape != right.shape:
        return Answer(conv, WRONG, math.inf, f"shape {tuple(found.shape)}, expected {tuple(right.shape)}")
    difference = relative_error(found, right)
    if difference <= TOLERANCE:
        return Answer(conv, RIGHT, difference)
    return Answer(conv, WRONG, math.inf if math.isnan(difference) else difference)


def examine(
    library: Library, quantities: Iterable[str] = QUANTITIES, advance: Callable[[], None] = lambda: None
) -> Matrix:
    """Compute a library's matrix; `advance` is called after each cell."""
    cells = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads would slow down arrays of this size
    try:
        for quantity, column in itertools.product(quantities, COLUMNS):
            held = cases(quantity, column) if quantity in library.ways else ()
            answers = tuple(ask(library, quantity, conv) for conv in held if not library.lacks(quantity, conv))
            cells.append(Cell(quantity, column, answers))
            advance()
    finally:
        torch.set_num_threads(threads)
    return Matrix(library, tuple(cells))


# -------------------------------------------------------------------------------------------------------------- writing
def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], centred: bool = False) -> list[str]:
    rule = ["---"] + [":-:" if centred else "---"] * (len(headings) - 1)
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return [f"| {' | '.join(row)} |" for row in (headings, rule, *escaped)] + [""]


def section(matrix: Matrix) -> str:
    """A library's section of the page."""
    library = matrix.library
    lines = [f"## {library.name}", "", f"Called by {library.called}", ""]
    rows = ([QUANTITIES[quantity], *(SYMBOLS[cell.status] for cell in cells)] for quantity, cells in matrix.rows())
    lines += _table(("", *COLUMNS), rows, centred=True)
    lines += [f"Cells: {matrix.summary}." + (f" No function for: {matrix.absent}." if matrix.absent else ""), ""]
    wrong, refusals = matrix.wrong(), matrix.refusals()
    if wrong:
        lines += _table(("wrong", "hyper-parameter", "largest relative error", "cases", "first of them"), wrong)
    if refusals:
        lines += _table(
            ("raised", "where"), [(f"`{message.replace('`', chr(39))}`", where) for message, where in refusals]
        )
    return "\n".join(lines)


def command(matrices: Sequence[Matrix], file: str) -> str:
    """The command that writes a page with these matrices."""
    asked = dict.fromkeys(cell.quantity for matrix in matrices for cell in matrix.cells)
    some = "" if set(asked) == set(QUANTITIES) else f" --quantity {','.join(asked)}"
    return f"lensor conformance --peer {','.join(matrix.library.name for matrix in matrices)}{some} --markdown {file}"


def markdown(matrices: Sequence[Matrix], file: str) -> str:
    """The page as Markdown, for a file with this name."""
    counts = ([str(matrix.counts[status]) for status in SYMBOLS] for matrix in matrices)
    names = ((matrix.library.name, matrix.library.version) for matrix in matrices)
    count = len({conv for column in COLUMNS.values() for conv in column})
    lines = [
        "# Conformance",
        "",
        "Correct quantities of a convolution, by hyper-parameter. Written by",
        "",
        f"    {command(matrices, file)}",
        "",
        f"with torch {torch.__version__} and Python {platform.python_version()}. Number of cells by result:",
        "",
        *_table(("library", "version", *SYMBOLS), [(*name, *count) for name, count in zip(names, counts, strict=True)]),
        f"A cell contains up to {max(map(len, COLUMNS.values()))} of {count} small convolutions, including combinations"
        f" with other hyper-parameters. It is right only if all are: relative error at most {TOLERANCE:g} in float64."
        " Results are compared with explicit definitions: torch's own convolution on padded input, its automatic"
        " derivatives, Jacobians as full arrays, and, for Kronecker factors, patches gathered entry by entry."
        " Libraries are called as their users would call them, one layer at a time; factors are compared at the paper's"
        " scale. Messages that differ only in numbers are listed once.",
        "",
        *_table(("", "", "meaning"), [(SYMBOLS[status], status, LEGEND[status]) for status in SYMBOLS]),
        *_table(("hyper-parameter", "meaning"), list(MEANINGS.items())),
    ]
    return "\n".join([*lines, *map(section, matrices)]).rstrip() + "\n"


HEADER = ("library", "version", "quantity", "hyper_parameter", "convolution", "status", "error", "message")


def csv_rows(matrices: Iterable[Matrix]) -> Iterator[tuple[Any, ...]]:
    """One CSV row per case, and one per cell without cases."""
    for matrix in matrices:
        library = matrix.library
        for cell in matrix.cells:
            head = (library.name, library.version, cell.quantity, cell.column)
            if not cell.answers:
                yield (*head, "", NONE, "", "")
            for answer in cell.answers:
                error = "" if answer.status == REFUSES else f"{answer.error:.3g}"
                yield (*head, str(answer.conv), answer.status, error, answer.message)


def csv_text(matrices: Sequence[Matrix]) -> str:
    """All cases as CSV."""
    file = io.StringIO()
    write_rows(file, [HEADER, *csv_rows(matrices)])
    return file.getvalue()


def libraries_of(names: Sequence[str]) -> list[Library]:
    """Look up libraries by name; Lensor by default.

    Raises:
        CommandError: for a library that is unknown or not installed.
    """
    found = [LIBRARIES[name] for name in choose("peer", names or ["lensor"], LIBRARIES)]
    for library in found:
        require(library.module)
    return found
