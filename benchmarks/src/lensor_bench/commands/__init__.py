"""The commands that lensor-bench adds to `lensor`: `bench`, `reproduce` and `conformance`."""

import typer

from lensor_bench.commands import bench, conformance, gpu, models, reproduce


def add_commands(app: typer.Typer) -> None:
    """Add the commands to an application."""
    app.command()(reproduce.reproduce)
    app.command()(conformance.conformance)
    group = typer.Typer(invoke_without_command=True)
    group.callback()(bench.bench)
    for command in (
        *(bench.candidates, bench.overhead, bench.planning, bench.growth, bench.report),
        *(gpu.gpu, gpu.bounds, gpu.compiled),
        *(models.models, models.steps, models.private, models.headline, models.training, models.sampling),
    ):
        group.command()(command)
    app.add_typer(group, name="bench")
