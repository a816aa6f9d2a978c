"""The command line: `lensor` with its commands."""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from lensor import __version__

_MISSING = "lensor: the command line needs {name}: install lensor[cli], or lensor[demo] for the demo too"

_INTERRUPTED = 130
"""The exit status after Ctrl-C, as of shells: 128 and the signal's number."""


def main() -> None:
    """Run the command line; the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that a terminal's encoding does not have are escaped
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
                sys.stdout.flush()  # here, where an error can still be told
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:  # the reader has seen enough
        _drop_output()
        sys.exit(1)
    except OSError as error:
        _drop_output()
        sys.exit(f"lensor: cannot write {error.filename or 'the output'}: {error.strerror or error}")


def _drop_output() -> None:
    """Send what was not written yet to nowhere, instead of failing again when Python ends."""
    if sys.stdout is not None:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_app() -> Any:
    """The commands.

    Raises:
        ModuleNotFoundError: if typer or rich is not installed.
    """
    import typer

    from lensor.bench.commands import add_commands
    from lensor.bench.terminal import console
    from lensor.bench.text import printable

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    def stop(message: str) -> typer.Exit:
        console(stderr=True).print(f"lensor: {printable(message)}", style="red", highlight=False, soft_wrap=True)
        return typer.Exit(1)

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

    @app.command(help="Kronecker factors of the convolutions of real CNNs on photographs, by Lensor and by unfolding.")
    def demo(
        out: Annotated[Path, typer.Option(help="Folder for the reports.")] = Path("demo-output"),
        batch: Annotated[int, typer.Option(min=1, help="Number of photographs.")] = 8,
        size: Annotated[int, typer.Option(min=32, help="Their height and width in pixels.")] = 128,
        threads: Annotated[int, typer.Option(min=1, help="Threads for torch; 1 if the CPUs are shared.")] = 2,
        seconds: Annotated[float, typer.Option(min=0.0, help="Time for the repeats of one comparison.")] = 0.2,
        model: Annotated[
            list[str] | None,
            typer.Option(help="resnet18, convnext, inception, mobilenet or tiny; may be given more than once."),
        ] = None,
        quick: Annotated[bool, typer.Option("--quick", help="Small pictures, a small CNN, few repeats.")] = False,
    ) -> None:
        from lensor.demo import DemoError, Settings, run

        if quick:
            settings = Settings.quick(out, threads)
        else:
            settings = Settings(out, batch, size, threads, tuple(model or Settings.models), seconds)
        try:
            run(settings, console())
        except DemoError as error:
            raise stop(str(error)) from None

    add_commands(app, stop)

    @app.command(help="The paper's figures and every operation as diagrams, and a page that shows them.")
    def gallery(
        out: Annotated[Path, typer.Argument(help="Folder for the pictures; gallery.md is written beside it.")],
    ) -> None:
        from lensor.bench import gallery

        try:
            for path in gallery.write(out):
                typer.echo(f"wrote {printable(str(path))}")
        except OSError as error:
            raise stop(f"cannot write {error.filename or out}: {error.strerror or error}") from None
        except ImportError as error:
            raise stop(str(error)) from None

    @app.command(help="The rules of simplification, each with a worked example, as a Markdown table.")
    def rules(
        markdown: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")] = None,
    ) -> None:
        from lensor.rules import to_markdown

        text = to_markdown()
        if markdown is None:
            typer.echo(text, nl=False)
            return
        try:
            markdown.write_text(text, encoding="utf-8")
        except OSError as error:
            raise stop(f"cannot write {markdown}: {error.strerror or error}") from None

    return app
