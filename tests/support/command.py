"""The command line, run inside of the test."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from lensor import cli


def invoke(*arguments: str) -> Any:
    """The result of `lensor` with some arguments: exit code, output and errors."""
    return CliRunner().invoke(cli.make_app(), list(arguments))
