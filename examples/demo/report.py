"""The demo's reports: a table in the terminal, and a plot, a CSV file and a Markdown file in a folder."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.demo.layers import network, short_form
from examples.demo.measure import Comparison
from examples.demo.run import Settings
from lensor.inspect.layers import Layer
from lensor.inspect.text import write_rows

Pair = tuple[Comparison, Comparison]
"""The comparisons of one convolution, for expand and reduce."""


def pairs(comparisons: Sequence[Comparison]) -> list[Pair]:
    """The comparisons, grouped by convolution."""
    return list(zip(comparisons[::2], comparisons[1::2], strict=True))


def setting_line(settings: Settings) -> str:
    """A line with the settings and the machine."""
    return (
        f"batch {settings.batch}, photographs of {settings.size}×{settings.size} pixels, float32, "
        f"threads {settings.threads}, CPUs {os.cpu_count()}, torch {torch.__version__}, {platform.machine()}"
    )


def summaries(comparisons: Sequence[Comparison]) -> list[tuple[str, str, int, float, float]]:
    """(kind, approx, number, median time ratio, median memory ratio) for each kind and factor."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for found in comparisons:
        groups.setdefault((found.layer.kind, found.approx), []).append(found)
    return [
        (
            kind,
            approx,
            len(group),
            statistics.median(found.median_ratio for found in group),
            statistics.median(found.memory_ratio for found in group),
        )
        for (kind, approx), group in sorted(groups.items())
    ]


# --------------------------------------------------------------------------------------------------------- terminal
def _colour(ratio: float) -> str:
    return "green" if ratio < 0.95 else "red" if ratio > 1.05 else "default"


def _coloured(ratio: float) -> Text:
    return Text(_digits(ratio), style=_colour(ratio))


def _digits(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def show(comparisons: Sequence[Comparison], settings: Settings, console: Console) -> None:
    """Print the table."""
    table = Table(
        title="Input factors of KFAC: Lensor / (pad + unfold + matrix product), below 1: Lensor is better",
        caption=f"{setting_line(settings)}. X: one copy of the input in the simplified network; Π: an index pattern, "
        "S: a crop. Times: medians.",
    )
    table.add_column("convolution", no_wrap=True)
    wide = console.width >= 120
    if wide:
        table.add_column("kind")
        table.add_column("simplified, expand")
    for title in ("expand\ntime", "expand\nmemory", "reduce\ntime", "reduce\nmemory", "largest\nerror"):
        table.add_column(title, justify="right", no_wrap=True)
    model = None
    for expand, reduce in pairs(comparisons):
        if model not in (None, expand.layer.model):
            table.add_section()
        model = expand.layer.model
        net = network(expand.layer, "expand").simplify()
        described = [expand.layer.kind, short_form(net)] if wide else []
        ratios = [expand.median_ratio, expand.memory_ratio, reduce.median_ratio, reduce.memory_ratio]
        table.add_row(
            expand.layer.label,
            *described,
            *map(_coloured, ratios),
            f"{max(expand.error, reduce.error):.0e}",
        )
    console.print(table)
    for kind, approx, number, time, memory in summaries(comparisons):
        console.print(
            f"{kind}, {approx}: median time {_digits(time)}, memory {_digits(memory)} of {number} convolution"
            f"{'s' * (number > 1)}",
            highlight=False,
        )


# ------------------------------------------------------------------------------------------------------------ files
def write(comparisons: Sequence[Comparison], settings: Settings) -> list[Path]:
    """Write the reports and return their paths."""
    paths = [settings.out / name for name in ("report.md", "ratios.csv", "ratios.png")]
    paths[0].write_text("\n".join(_markdown(comparisons, settings)) + "\n", encoding="utf-8")
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        rows = [_record(found) for found in comparisons]
        write_rows(file, [list(rows[0]), *(row.values() for row in rows)])
    _plot(comparisons, settings, paths[2])
    return paths


def _record(found: Comparison) -> dict[str, object]:
    layer, spec = found.layer, found.layer.spec
    net = network(layer, found.approx)
    return {
        "model": layer.model,
        "module": layer.name,
        "modules": layer.count,
        "kind": layer.kind,
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "groups": spec.groups,
        "input_size": "×".join(map(str, spec.input_size)),
        "kernel_size": "×".join(map(str, spec.kernel_size)),
        "stride": "×".join(map(str, spec.stride)),
        "padding": spec.padding,
        "dilation": "×".join(map(str, spec.dilation)),
        "factor": found.approx,
        "network": str(net),
        "simplified": str(net.simplify()),
        "largest_relative_error": f"{found.error:.3e}",
        "repeats": len(found.lensor.seconds),
        "lensor_median_s": f"{found.lensor.median:.6f}",
        "lensor_minimum_s": f"{found.lensor.minimum:.6f}",
        "standard_median_s": f"{found.standard.median:.6f}",
        "standard_minimum_s": f"{found.standard.minimum:.6f}",
        "time_ratio_median": f"{found.median_ratio:.4f}",
        "time_ratio_minimum": f"{found.minimum_ratio:.4f}",
        "lensor_peak_bytes": found.lensor_peak,
        "standard_peak_bytes": found.standard_peak,
        "memory_ratio": f"{found.memory_ratio:.4f}",
    }


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _markdown(comparisons: Sequence[Comparison], settings: Settings) -> Iterable[str]:
    yield "# Input factors of KFAC: Lensor and unfold\n"
    yield (
        "The Kronecker factors of the input of each distinct convolution, for photographs from scikit-image and random"
        " weights. Standard: torch's pad and unfold, then one matrix product per group. All ratios are Lensor divided"
        " by standard: below 1, Lensor is faster or needs less memory.\n"
    )
    yield f"Setting: {setting_line(settings)}. Both ways ran alternately, after a warm-up.\n"
    yield (
        "Memory is the peak of torch's allocator, as its profiler records it, including the result and Lensor's"
        " constants but not the input. The error is the largest difference divided by the largest entry.\n"
    )
    yield "![Ratios](ratios.png)\n"
    yield "## By kind\n"
    yield _row(["kind", "factor", "convolutions", "median time ratio", "median memory ratio"])
    yield _row(["---", "---", "---:", "---:", "---:"])
    for kind, approx, number, time, memory in summaries(comparisons):
        yield _row([kind, approx, number, _digits(time), _digits(memory)])
    yield "\n## By convolution\n"
    yield _row(
        ["convolution", "modules", "kind", "factor", "time, median", "time, minimum", "memory", "repeats", "error"]
    )
    yield _row(["---", "---:", "---", "---", "---:", "---:", "---:", "---:", "---:"])
    for found in comparisons:
        ratios = (found.median_ratio, found.minimum_ratio, found.memory_ratio)
        yield _row(
            [
                found.layer.label,
                found.layer.count,
                found.layer.kind,
                found.approx,
                *map(_digits, ratios),
                len(found.lensor.seconds),
                f"{found.error:.0e}",
            ]
        )
    yield "\n## Networks\n"
    for expand, _ in pairs(comparisons):
        yield from _networks(expand.layer)


def _networks(layer: Layer) -> Iterable[str]:
    yield f"### {layer.label}\n"
    others = f" and {layer.count - 1} more" if layer.count > 1 else ""
    yield f"`{layer.name}`{others}: {layer.kind}.\n"
    yield "```text"
    for approx in ("expand", "reduce"):
        net = network(layer, approx)
        yield f"{approx}:     {net}"
        yield f"simplified: {net.simplify()}"
    yield "```\n"


def _plot(comparisons: Sequence[Comparison], settings: Settings, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    found = pairs(comparisons)
    figure = Figure(figsize=(12, 1.6 + 0.36 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    places = range(len(found))
    for axis, title, name in zip(axes, ("time (median)", "peak memory"), ("median_ratio", "memory_ratio"), strict=True):
        for side, (approx, colour) in enumerate((("expand", "#31688e"), ("reduce", "#e07b39"))):
            ratios = [getattr(pair[side], name) for pair in found]
            shifted = [place + (side - 0.5) * 0.38 for place in places]
            # Bars on a log scale need a left end, so each bar starts at 1 and shows how far the ratio is from 1.
            axis.barh(shifted, [ratio - 1 for ratio in ratios], 0.36, left=1, color=colour, label=f"KFAC-{approx}")
            for y, ratio in zip(shifted, ratios, strict=True):
                aside = {"ha": "right", "xytext": (-3, 0)} if ratio < 1 else {"ha": "left", "xytext": (3, 0)}
                axis.annotate(_digits(ratio), (ratio, y), textcoords="offset points", va="center", fontsize=7, **aside)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log")
        every = [getattr(one, name) for one in comparisons]
        axis.set_xlim(min(0.5, min(every) * 0.5), max(2.0, max(every) * 1.6))
        axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"{title}: Lensor / (pad + unfold + matrix product)")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(list(places), [f"{pair[0].layer.label}\n{pair[0].layer.kind}" for pair in found], fontsize=8)
    axes[0].set_ylim(len(found) - 0.4, -0.6)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle("Input factors of KFAC, below 1: Lensor is better\n" + setting_line(settings), fontsize=10)
    figure.savefig(path, dpi=130)
