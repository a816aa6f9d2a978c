"""The demo, from images to reports."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from examples.demo.measure import Comparison

DEFAULT_MODELS = ("resnet18", "convnext")


class DemoError(Exception):
    """An error that stops the demo, reported in one line."""


@dataclass(frozen=True)
class Settings:
    """Settings of the demo.

    Args:
        out: folder for the reports; it is created if it does not exist.
        batch: number of photographs.
        size: height and width in pixels.
        threads: number of torch threads.
        models: names of the CNNs.
        seconds: time budget for the repeats of one comparison.
        least: minimum number of repeats.
        digits: number of training images for the CNN on digits.
    """

    out: Path = Path("demo-output")
    batch: int = 8
    size: int = 128
    threads: int = 2
    models: tuple[str, ...] = DEFAULT_MODELS
    seconds: float = 0.1
    least: int = 5
    digits: int = 1000

    @classmethod
    def quick(cls, out: Path, threads: int = 2) -> Settings:
        """Settings for few digits, small photographs, a small CNN and few repeats."""
        return cls(out, batch=4, size=32, threads=threads, models=("tiny",), seconds=0.02, least=3, digits=200)


def run(settings: Settings, console: Console) -> list[Comparison]:
    """Run the demo, print its results and write its reports.

    Raises:
        DemoError: if a package is missing, the folder cannot be written, or a setting is invalid.
    """
    _check(settings)
    _require("torch", "rich", "matplotlib", "skimage", "sklearn")
    if set(settings.models) != {"tiny"}:
        _require("transformers")
    import torch
    from lensor_bench.measure import threads
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from examples.demo.digits import study
    from examples.demo.figure import draw, sentences
    from examples.demo.measure import compare
    from examples.demo.models import MODELS, build
    from examples.demo.pictures import photographs
    from examples.demo.report import show, write
    from lensor.inspect.extract import record

    for name in settings.models:
        if name not in MODELS:
            raise DemoError(f"model is {name!r}, expected one of {', '.join(MODELS)}")
    _make_folder(settings.out)
    console.rule("1. Handwritten digits: curvature, uncertainty, influence")
    with threads(1):  # more threads do not help with small images
        found = study(settings.digits)
    for line in sentences(found):
        console.print(line, highlight=False)
    figure = settings.out / "digits.png"
    draw(found, figure)
    _wrote(figure, console)
    console.rule("2. Photographs: Kronecker factors with Lensor and by unfolding")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with threads(settings.threads), Progress(*columns, console=console) as progress:
        task = progress.add_task("photographs through CNNs", total=None)
        batch = torch.from_numpy(photographs(settings.batch, settings.size))
        layers = [found for name in settings.models for found in record(build(name), name, batch)]
        progress.update(task, description="factors of convolutions", total=2 * len(layers))
        comparisons = []
        for layer, x in layers:
            for approx in ("expand", "reduce"):
                progress.update(task, description=f"{layer.label} {approx}"[:44].ljust(44))
                comparisons.append(compare(layer, x, approx, settings.seconds, settings.least))
                progress.advance(task)
    show(comparisons, settings, console)
    for path in write(comparisons, settings):
        _wrote(path, console)
    console.rule("Next")
    for command, purpose in _next():
        console.print(f"{command}\n    {purpose}", soft_wrap=True, highlight=False, markup=False)
    return comparisons


def _wrote(path: Path, console: Console) -> None:
    console.print(f"wrote {path}", soft_wrap=True, highlight=False, markup=False)


def _next() -> Iterable[tuple[str, str]]:
    """Commands to type next, with their purpose."""
    folder = Path(sys.executable).parent
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    yield f"{folder}/python -m examples.influence", "find training images with wrong labels"
    explain = f"{folder}/lensor explain examples.demo.models:tiny --input-shape 3x32x32"
    yield explain, "networks, plans and times of a model's convolutions; my.module:factory explains yours"
    yield "less docs/curvature.md", "compute curvature of your own model"


def _check(settings: Settings) -> None:
    for name in ("batch", "size", "threads", "least", "digits"):
        if getattr(settings, name) < 1:
            raise DemoError(f"{name} is {getattr(settings, name)}, expected at least 1")
    if settings.size < 32:
        raise DemoError(f"size is {settings.size}, expected at least 32 pixels")


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise DemoError(f"{', '.join(missing)} is not installed: pip install lensor[demo]")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".lensor"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DemoError(f"cannot write to {folder}: {error.strerror or error}") from None
