"""The headline figures of the README: Kronecker factors, clipped gradients and KFAC's steps of ResNet-18."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from lensor.inspect.errors import require
from lensor.inspect.text import write_rows
from lensor_bench import models, private, steps

TABLE, PLOT = "headline.csv", "headline.png"
"""The files in the output folder."""

FACTORS = "Kronecker factors beyond one pass, seconds (batch 8, 224²)"
CLIPPED = "clipped gradients, seconds (batch 32, 64², normalisation frozen)"
STEPS = "a training step, divided by one of SGD (batch 8, 224²)"

_FACTORS = {"lensor, expand": "Lensor", "curvlinops, expand": "curvlinops"}
_CLIPPED = {
    private.SGD: "SGD, not clipped",
    "Lensor": "Lensor",
    "Opacus, ghost": "Opacus, ghost",
    "Opacus, ghost, Lensor": "Opacus, ghost, with Lensor",
}
_STEPS = {
    "SGD": "SGD",
    "KFAC, forward-only": "KFAC, forward-only",
    "KFAC, reduce, low rank": "KFAC, reduce",
    "KFAC, expand, low rank": "KFAC, expand",
}
"""What is shown, by the names of the measurements."""


@dataclass(frozen=True)
class Bar:
    """One bar of the plot.

    Args:
        figure: what is measured.
        way: how it is computed.
        value: seconds, or a ratio.
    """

    figure: str
    way: str
    value: float


def measure(seconds: float, threads: int) -> Iterator[Bar]:
    """Measure all bars; ways of libraries that are not installed are left out.

    Args:
        seconds: time for the rounds of each way of computing factors and steps.
        threads: number of threads.

    Raises:
        CommandError: for a missing package.
    """
    require("torch", "transformers", "matplotlib")
    for one in models.measure(["resnet18"], 8, 224, seconds, 10, threads):
        if one.way in _FACTORS and one.beyond is not None:
            yield Bar(FACTORS, _FACTORS[one.way], one.beyond)
    for two in private.measure(["resnet18-frozen-norm"], 32, 64, 1.0, 5, threads):
        if two.way in _CLIPPED and two.seconds is not None:
            yield Bar(CLIPPED, _CLIPPED[two.way], two.seconds)
    for three in steps.measure(["resnet18"], seconds, 5, threads, [name for name in _STEPS if name != "SGD"]):
        if three.optimizer in _STEPS:
            yield Bar(STEPS, _STEPS[three.optimizer], three.ratio)


def write(bars: Sequence[Bar], folder: Path) -> list[Path]:
    """Write headline.csv, and a plot with one panel for each figure."""
    require("matplotlib")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / TABLE, folder / PLOT
    with table.open("w", encoding="utf-8", newline="") as file:
        write_rows(file, [[field.name for field in fields(Bar)], *(astuple(bar) for bar in bars)])
    panels = {name: [bar for bar in bars if bar.figure == name] for name in dict.fromkeys(bar.figure for bar in bars)}
    heights = [len(own) + 1 for own in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(6.4, 0.34 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for (axis,), (name, own) in zip(axes, panels.items(), strict=True):
        colours = ["#c2410c" if bar.way.startswith(("Lensor", "KFAC")) else "#8a94a6" for bar in own]
        drawn = axis.barh([bar.way for bar in own], [bar.value for bar in own], color=colours, height=0.7)
        axis.bar_label(drawn, [f"{bar.value:.2f}" for bar in own], padding=3, fontsize=9)
        axis.set_title(name, loc="left", fontsize=9.5)
        axis.set_xlim(0, 1.12 * max(bar.value for bar in own))
        axis.invert_yaxis()
        axis.tick_params(labelsize=9, length=0)
        axis.set_xticks([])
        axis.spines[:].set_visible(False)
    figure.savefig(picture, dpi=150)
    plt.close(figure)
    return [table, picture]
