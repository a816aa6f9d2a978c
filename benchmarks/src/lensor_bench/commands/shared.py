"""Functions that the commands of lensor-bench share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lensor_bench.results import ResultsFile

if TYPE_CHECKING:
    from lensor_bench.run import Bench


def given_options(context: typer.Context) -> dict[str, object]:
    """The options that the user passed to a command, by name."""
    return {
        name: value
        for name, value in context.params.items()
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }


def shown_options(given: dict[str, object], without: Sequence[str]) -> str:
    """Options as the user passed them, each preceded by a space."""
    kept = {name: value for name, value in given.items() if name not in without}
    return "".join(f" --{name}" if value is True else f" --{name} {value}" for name, value in kept.items())


def measure(benches: Sequence[Bench], results: ResultsFile, shown: Console) -> None:
    """Run measurements with a progress bar."""
    columns = (
        *(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
        *(TextColumn("left"), TimeRemainingColumn()),
    )
    # The costs of convolutions vary widely, so estimate the remaining time from the last half hour, not from the last
    # seconds.
    with Progress(*columns, console=shown, speed_estimate_period=1800) as progress:
        total = sum(len(bench.pending(results)) for bench in benches)
        task = progress.add_task("", total=total)
        for at, case in enumerate(case for bench in benches for case in bench.run(results)):
            what = f"{case.operation.name} {case.layer.label}"
            progress.update(task, completed=at, description=what[:44].ljust(44))
        progress.update(task, completed=total, description="")
