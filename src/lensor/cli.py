"""The `lensor` command line and its commands."""

import io
import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from typing import Annotated, Any

from lensor import __version__

_MISSING = 'lensor: {name} is not installed: install the extra "cli", in a checkout with pip install ".[cli]"'

_OF_BENCH = ("bench", "reproduce", "conformance")
"""The commands that the lensor-bench package provides."""

_EXAMPLES = ("demo", "gallery")
"""The former commands that are examples now."""

_INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells: 128 plus the signal's number."""


def main() -> None:
    """Run the command line: the entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app = make_app()
        except ModuleNotFoundError as error:
            sys.exit(_MISSING.format(name=error.name))
        try:
            app(prog_name="lensor")
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where the error can still be reported
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:  # the reader stopped reading
        _drop_output()
        sys.exit(1)
    except OSError as error:
        _drop_output()
        sys.exit(f"lensor: cannot write {error.filename or 'the output'}: {error.strerror or error}")


def _drop_output() -> None:
    """Discard unwritten output, so that flushing it does not fail again when Python exits."""
    if sys.stdout is not None:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_app() -> Any:
    """Create the application with its commands.

    Raises:
        ModuleNotFoundError: if typer or rich is not installed.
    """
    import typer

    from lensor.inspect import commands
    from lensor.inspect.terminal import stop

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    def print_version(asked: bool) -> None:
        if asked:
            typer.echo(f"lensor {__version__}")
            raise typer.Exit()

    @app.callback(help="Convolutions, their derivatives and their curvature as tensor networks.")
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
        ] = False,
    ) -> None:
        pass

    for command in (commands.convs, commands.explain, commands.rules):
        app.command()(command)
    hints = {name: f"{name} is not a command, but an example: python -m examples.{name}" for name in _EXAMPLES}
    if find_spec("lensor_bench") is not None:
        from lensor_bench.commands import add_commands

        add_commands(app)
    else:
        hints |= {name: f"{name} is a command of lensor-bench: pip install ./benchmarks" for name in _OF_BENCH}
    for name in hints:

        @app.command(name, hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
        def missing(context: typer.Context) -> None:
            raise stop(hints[str(context.info_name)])

    return app


if __name__ == "__main__":
    main()
