"""The terminal as the commands use it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from lensor.bench.text import printable

WIDE = 150
"""The width of tables where there is no terminal."""


class _Plain(Console):
    """A console that shows text as it is: no markup, no emoji codes, no control characters but line ends."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, keep="\n"), **options)


def console(**options: Any) -> Console:
    """A console for text of any origin, wide where it is not a terminal; arguments as of `rich.console.Console`.

    Example:
        >>> from lensor.bench.terminal import console
        >>> console().print("conv[red] :smile:")
        conv[red] :smile:
    """
    found = _Plain(markup=False, emoji=False, **options)
    return found if found.is_terminal else _Plain(markup=False, emoji=False, width=WIDE, **options)
