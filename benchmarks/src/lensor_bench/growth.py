"""Growth of time and memory with the batch, image, channels and kernel of one convolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from lensor.inspect.errors import CommandError, require
from lensor.inspect.files import writing
from lensor.inspect.layers import Layer, label
from lensor.spec import ConvSpec
from lensor_bench.results import Row, Setting
from lensor_bench.settings import Settings

MODEL = "growth"
"""Entry in the net column."""

_BATCH, _IMAGE, _CHANNELS, _KERNEL = 8, 28, 64, 3


@dataclass(frozen=True)
class Axis:
    """The varied size of one panel of the plot.

    Args:
        name: name of the size.
        values: the values of the size, including the base value.
        make: function that creates the convolution for a value.
        of: function that returns the value for a row.
    """

    name: str
    values: tuple[int, ...]
    make: Callable[[int], ConvSpec]
    of: Callable[[Row], int]


def _convolution(image: int = _IMAGE, channels: int = _CHANNELS, kernel: int = _KERNEL) -> ConvSpec:
    return ConvSpec(channels, channels, (image, image), kernel, padding=kernel // 2)


BASE = _convolution()
AXES = (
    Axis("batch", (1, 2, 4, 8, 16, 32), lambda _: BASE, lambda row: row.setting.batch),
    Axis(
        "image", (7, 14, 28, 56, 112), lambda size: _convolution(image=size), lambda row: row.layer.spec.input_size[0]
    ),
    Axis(
        "channels",
        (8, 16, 32, 64, 128, 256),
        lambda channels: _convolution(channels=channels),
        lambda row: row.layer.spec.in_channels,
    ),
    Axis("kernel", (1, 3, 5, 7), lambda kernel: _convolution(kernel=kernel), lambda row: row.layer.spec.kernel_size[0]),
)
"""The varied sizes; the base has 64→64 channels, a 3×3 kernel, 28² images and batch 8."""


def sittings(settings: Settings) -> Iterator[tuple[Settings, tuple[Layer, ...]]]:
    """The convolutions of each batch size, with their settings."""
    layers: dict[int, tuple[Layer, ...]] = {batch: (Layer(MODEL, "base", BASE, 1),) for batch in AXES[0].values}
    for axis in AXES[1:]:
        held = {layer.spec for layer in layers[_BATCH]}
        new = {value: axis.make(value) for value in axis.values}
        layers[_BATCH] += tuple(
            Layer(MODEL, f"{axis.name}={value}", spec, 1) for value, spec in new.items() if spec not in held
        )
    for batch, found in layers.items():
        yield replace(settings, batch=batch), found


def along(rows: Sequence[Row], axis: Axis) -> list[Row]:
    """The rows of one panel, sorted by the size that varies in it."""
    specs = {axis.make(value) for value in axis.values}
    found = [row for row in rows if row.layer.spec in specs and (axis.name == "batch" or row.setting.batch == _BATCH)]
    return sorted(found, key=axis.of)


_STYLES: tuple[Any, ...] = (
    "--",
    "-",
    ":",
    "-.",
    (0, (5, 1)),
    (0, (3, 1, 1, 1)),
    (0, (1, 4)),
    (0, (9, 3)),
    (0, (3, 1, 1, 1, 1, 1)),
)


def plot(rows: Sequence[Row], settings: Collection[Setting], path: Path) -> None:
    """Plot time (above) and extra memory (below), with one column per size and one line per implementation.

    Args:
        rows: the rows of a results file.
        settings: settings of the rows to show; a file may also contain rows with other dtypes or numbers of threads.
        path: the file.

    Raises:
        CommandError: if there is nothing to plot, matplotlib is missing, or the file cannot be written.
    """
    rows = [row for row in rows if row.layer.model == MODEL and row.setting in settings]
    rows = [row for row in rows if row.found.minimum is not None]
    if not rows:
        raise CommandError("the results file has no row with a time, expected rows of lensor bench growth")
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    operations = list(dict.fromkeys(row.operation for row in rows))
    names = list(dict.fromkeys(row.implementation for row in rows))
    styles = dict(zip(names, cycle(_STYLES), strict=False))
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(AXES), sharex="col", sharey="row")
    for column, axis in enumerate(AXES):
        held = along(rows, axis)
        for at, operation in enumerate(operations):
            for name in names:
                mine = [row for row in held if (row.operation, row.implementation) == (operation, name)]
                places = [axis.of(row) for row in mine]
                times = [1e3 * (row.found.minimum or math.nan) for row in mine]
                memory = [(row.found.extra_bytes or math.nan) / 2**20 for row in mine]
                for panel, values in zip(panels[:, column], (times, memory), strict=True):
                    panel.plot(places, values, linestyle=styles[name], color=f"C{at}", marker=".", linewidth=1.4)
        for panel in panels[:, column]:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.grid(alpha=0.3)
        panels[1, column].xaxis.set_major_locator(FixedLocator(axis.values))
        panels[1, column].xaxis.set_minor_locator(NullLocator())
        panels[1, column].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[1, column].set_xlabel(axis.name)
    panels[0, 0].set_ylabel("shortest time, ms")
    panels[1, 0].set_ylabel("memory besides operands and result, MiB")
    handles = [Line2D([], [], color=f"C{at}", label=operation) for at, operation in enumerate(operations)]
    handles += [Line2D([], [], color="black", linestyle=styles[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.suptitle(f"One convolution, {label(BASE)}, batch {_BATCH}: one of its sizes varied", fontsize=11)
    with writing(path):
        figure.savefig(path, dpi=120)
