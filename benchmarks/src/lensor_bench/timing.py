"""Timings for `lensor explain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from lensor.inspect.explain import Timing, Timings
from lensor.inspect.layers import Layer
from lensor.inspect.operations import STANDARD, Measuring
from lensor_bench.commands.shared import measure
from lensor_bench.report import settings_of
from lensor_bench.results import OK, ResultsFile
from lensor_bench.run import Bench
from lensor_bench.settings import Settings


def timings_of(
    layers: Sequence[Layer], ops: Sequence[str], options: Measuring, shown: Console
) -> tuple[Timings, list[str]]:
    """Measure operations on convolutions, with a progress bar.

    Args:
        layers: the convolutions, without biases.
        ops: names of operations.
        options: settings of the measurement.
        shown: console for the progress bar.

    Returns:
        The times, and lines that describe the measurement.
    """
    bench = Bench(Settings(tuple(ops), implementations=("lensor",), **asdict(options)), layers)
    with TemporaryDirectory() as folder:
        results = ResultsFile(Path(folder) / "rows.csv", bench.machine, resume=False)
        measure([bench], results, shown)
        rows = list(results.rows)
    found = {(row.operation, row.layer.spec, row.implementation): row for row in rows}
    timings = {}
    for layer in layers:
        for name in ops:
            both = [found[name, layer.spec, one] for one in (STANDARD, "lensor")]
            failed = (row for row in both if row.found.status != OK)
            trouble = next((f"{row.implementation} {row.found.status}: {row.found.message}" for row in failed), "")
            timings[name, layer.spec] = Timing(both[1].found.standard_minimum, both[1].found.minimum, trouble)
    return timings, settings_of(rows)
