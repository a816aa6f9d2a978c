"""The demo's command line: `python -m examples.demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from examples.demo import DemoError, Settings, run
from lensor.inspect.terminal import console, stop


def main(
    out: Annotated[Path, typer.Option(help="Folder for the reports.")] = Path("demo-output"),
    batch: Annotated[int, typer.Option(min=1, help="Number of photographs.")] = 8,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the photographs in pixels.")] = 128,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch; use 1 if other programs use the CPUs.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for the repeats of one comparison.")] = 0.1,
    model: Annotated[
        list[str] | None,
        typer.Option(help="resnet18, convnext, inception, mobilenet or tiny; repeat for several."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few digits, small photographs and CNN, few repeats.")] = False,
) -> None:
    """Curvature of a CNN on handwritten digits, and Kronecker factors of real CNNs compared with unfolding."""
    if quick:
        settings = Settings.quick(out, threads)
    else:
        settings = Settings(out, batch, size, threads, tuple(model or Settings.models), seconds)
    try:
        run(settings, console())
    except DemoError as error:
        raise stop(str(error)) from None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app(prog_name="python -m examples.demo")
