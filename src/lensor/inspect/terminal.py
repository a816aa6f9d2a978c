"""The terminal as the commands use it."""

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
"""The width of tables where there is no terminal."""


class _Plain(Console):
    """A console that shows text as it is: no markup, no emoji codes, no control characters but line ends."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, keep="\n"), **options)


def console(**options: Any) -> Console:
    """A console for text of any origin, wide where it is not a terminal; arguments as of `rich.console.Console`.

    Example:
        >>> from lensor.inspect.terminal import console
        >>> console().print("conv[red] :smile:")
        conv[red] :smile:
    """
    found = _Plain(markup=False, emoji=False, **options)
    return found if found.is_terminal else _Plain(markup=False, emoji=False, width=WIDE, **options)


def names_of(given: list[str] | None) -> tuple[str, ...]:
    """The names in options such as `--ops a,b --ops c`."""
    return tuple(name.strip() for one in given or () for name in one.split(",") if name.strip())


def stop(message: str) -> typer.Exit:
    """Print an error in one line; the exit to raise."""
    console(stderr=True).print(f"lensor: {printable(message)}", style="red", highlight=False, soft_wrap=True)
    return typer.Exit(1)


@contextmanager
def reported(debug: bool, interrupted: str | None = None) -> Iterator[None]:
    """Report what stops a command in one line, without a traceback.

    Args:
        debug: whether to raise the error instead.
        interrupted: what to say after Ctrl-C; unless given, it ends the program as usual.
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
