"""Safe output of text from users' models, files and errors in terminals and tables.

A module name, an error message or a path may contain anything: terminal escape sequences, marks that reverse the
writing direction, line ends, or text that a spreadsheet reads as a formula.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Iterable
from typing import IO, Any

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories to escape: control and format characters, lone surrogates, line and paragraph separators."""

_FORMULA = re.compile("'*[=+\\-@＝＋－＠]")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


EVEN = 1.1
"""Ratios above this are marked as slower, ratios below its inverse as faster: repeated times differ by as much."""


def printable(text: str, keep: str = "") -> str:
    r"""Escape, in Python's notation, the characters that would control a terminal.

    Args:
        text: any text.
        keep: characters that are not escaped.

    Example:
        >>> from lensor.inspect.text import printable
        >>> print(printable("conv\x1b[31m1"), printable("64→128\n", keep="\n"), end="")
        conv\x1b[31m1 64→128
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if one in keep or unicodedata.category(one) not in _HIDDEN else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def cell(value: object) -> object:
    """Convert a value to a CSV cell: text that a spreadsheet would read as a formula gets a leading apostrophe.

    Numbers, and text that represents a number, are left unchanged.

    Example:
        >>> from lensor.inspect.text import cell, from_cell
        >>> [cell(one) for one in ("conv1", "=1+1", "-1.5e-3", "-conv", -2)]
        ['conv1', "'=1+1", '-1.5e-3', "'-conv", -2]
        >>> from_cell("'=1+1")
        '=1+1'
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def from_cell(text: str) -> str:
    """Recover the text that `cell` converted."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def write_rows(file: IO[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write rows of CSV."""
    csv.writer(file, lineterminator="\n").writerows([cell(value) for value in row] for row in rows)


def digits(value: float) -> str:
    """Format a ratio with two or three digits.

    Example:
        >>> from lensor.inspect.text import digits
        >>> digits(0.0123), digits(0.5), digits(12.3)
        ('0.012', '0.50', '12.3')
    """
    return f"{value:.2g}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def milliseconds(seconds: float) -> str:
    """Format a time in milliseconds with three digits.

    Example:
        >>> from lensor.inspect.text import milliseconds
        >>> milliseconds(0.001234), milliseconds(0.25)
        ('1.23', '250')
    """
    return _three(seconds * 1e3)


def millions(count: float) -> str:
    """Format a count in millions with three digits.

    Example:
        >>> from lensor.inspect.text import millions
        >>> millions(6_099_456), millions(123)
        ('6.10', '0.000123')
    """
    return _three(count / 1e6)


def pace(ratio: float) -> str:
    """The style of a ratio: "slow", "fast" or empty."""
    return "slow" if ratio > EVEN else "fast" if ratio < 1 / EVEN else ""


def _three(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 10 else f"{value:#.3g}"
