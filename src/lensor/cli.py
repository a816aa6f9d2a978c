"""The command line: `lensor` with its commands."""

import sys
from pathlib import Path
from typing import Annotated, Any

from lensor import __version__

_MISSING = "lensor: the command line needs {name}: install lensor[cli], or lensor[demo] for the demo too"


def main() -> None:
    """Run the command line; the console script."""
    try:
        app = make_app()
    except ModuleNotFoundError as error:
        sys.exit(_MISSING.format(name=error.name))
    app(prog_name="lensor")


def make_app() -> Any:
    """The commands.

    Raises:
        ModuleNotFoundError: if typer or rich is not installed.
    """
    import typer
    from rich.console import Console

    from lensor.bench.commands import add_commands

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    def stop(message: str) -> typer.Exit:
        Console(stderr=True).print(f"lensor: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
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
        console = Console()
        try:
            run(settings, console if console.is_terminal else Console(width=150))
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
                typer.echo(f"wrote {path}")
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
