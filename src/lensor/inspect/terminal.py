"""Terminal output of the commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from lensor.inspect.errors import CommandError
from lensor.inspect.text import printable

WIDE = 150
"""Width of tables if the output is not a terminal."""


class _Plain(Console):
    """A console that prints text verbatim: no markup, no emoji codes, no control characters except line ends."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, keep="\n"), **options)


def console(**options: Any) -> Console:
    """A console that prints untrusted text safely; it is wide if the output is not a terminal.

    Example:
        >>> from lensor.inspect.terminal import console
        >>> console().print("conv[red] :smile:")
        conv[red] :smile:
    """
    found = _Plain(markup=False, emoji=False, **options)
    return found if found.is_terminal else _Plain(markup=False, emoji=False, width=WIDE, **options)


def names_of(given: list[str] | None) -> tuple[str, ...]:
    """The names that options such as `--ops a,b --ops c` contain."""
    return tuple(name.strip() for one in given or () for name in one.split(",") if name.strip())


def stop(message: str) -> typer.Exit:
    """Print an error in one line and return the exit exception to raise."""
    console(stderr=True).print(f"lensor: {printable(message)}", style="red", highlight=False, soft_wrap=True)
    return typer.Exit(1)


@contextmanager
def reported(debug: bool, interrupted: str | None = None) -> Iterator[None]:
    """Report an error that stops a command in one line, without a traceback.

    Args:
        debug: whether to raise the error instead.
        interrupted: message after Ctrl-C; by default Ctrl-C ends the program as usual.
    """
    try:
        yield
    except CommandError as error:
        if debug:
            raise
        raise stop(str(error)) from None
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        raise stop(interrupted) from None
