"""Errors that Lensor raises in addition to the built-in TypeError and ValueError."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from numbers import Real
from typing import Any


class LensorError(Exception):
    """Base class of Lensor's errors, each of which also subclasses a built-in error.

    Example:
        >>> import lensor
        >>> try:
        ...     lensor.contraction("n i -> j", "X")
        ... except lensor.LensorError as error:
        ...     print(type(error).__name__, isinstance(error, ValueError))
        SubscriptsError True
    """


class SubscriptsError(LensorError, ValueError):
    """Subscripts or the text of a network do not parse; a caret in the message marks the place.

    Args:
        reason: description of the problem.
        text: the text that does not parse.
        position: offset of the error in `text`.

    Example:
        >>> import lensor
        >>> try:
        ...     lensor.contraction("n i -> n j", "X")
        ... except lensor.SubscriptsError as error:
        ...     print(error)
        output index 'j' is not in the operands, expected one of ['i', 'n']
          n i -> n j
                   ^
    """

    def __init__(self, reason: str, text: str, position: int) -> None:
        self.reason, self.text, self.position = reason, text, position
        # Put the caret below the line that contains the error, indented with the same tabs as that line.
        end = text.find("\n", position)
        shown = (text if end < 0 else text[:end]).split("\n")
        before = text[:position].rpartition("\n")[2]
        shown.append("".join("\t" if mark == "\t" else " " for mark in before) + "^")
        super().__init__("\n".join([reason, *(f"  {line}" for line in shown)]))

    def __reduce__(self) -> tuple:
        return SubscriptsError, (self.reason, self.text, self.position)


class NetworkError(LensorError, ValueError):
    """A network violates the grammar of `Network.check`, or would do so after a transform with these arguments.

    Example:
        >>> import lensor
        >>> try:
        ...     lensor.contraction("n i -> i", "X").vjp("W")
        ... except lensor.NetworkError as error:
        ...     print(error)
        operand 'W' is unknown, expected one of ['X']
    """


def require_type(value: Any, name: str, *kinds: type) -> None:
    """Raise a TypeError that names the argument unless `value` is an instance of one of `kinds`."""
    if not isinstance(value, kinds):
        names = [kind.__name__ for kind in kinds]
        expected = " or ".join(f"{'an' if name[0] in 'AEIOU' else 'a'} {name}" for name in names)
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}, expected {expected}")


def require_choice(name: str, found: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless an argument is one of `choices`.

    Example:
        >>> from lensor.errors import require_choice
        >>> require_choice("approx", "kfc", ("expand", "reduce"))
        Traceback (most recent call last):
        ValueError: approx is 'kfc', expected one of 'expand', 'reduce'

    Raises:
        ValueError: if the argument is not one of `choices`; the message lists them.
    """
    if found not in choices:
        raise ValueError(f"{name} is {found!r}, expected one of {', '.join(map(repr, choices))}")


def require_share(found: Any, what: str, error: type[ValueError] = ValueError) -> Fraction:
    """Convert a number to a fraction, after checking that 0 < found <= 1.

    Example:
        >>> from lensor.errors import require_share
        >>> require_share(0.25, "keep")
        Fraction(1, 4)
        >>> require_share(1.5, "keep")
        Traceback (most recent call last):
        ValueError: keep is 1.5, expected a number with 0 < keep <= 1

    Raises:
        ValueError: if `found` is anything else; pass `error` to raise a different class.
    """
    number = float(found) if isinstance(found, Real) and not isinstance(found, bool) else 0.0
    if not 0 < number <= 1:
        raise error(f"{what} is {found!r}, expected a number with 0 < keep <= 1")
    return found if isinstance(found, Fraction) else Fraction(number)
