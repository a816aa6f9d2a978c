"""The paper's figures and tables: each is reproduced by one command and shown beside the published results.

`study` needs no measurement: it counts the convolutions of the nine nets by kind. `runtime`, `speedups` and `memory`
are three views of one results file, `runs.csv`. It contains the standard implementation, the contractions of the
unsimplified and the simplified network, and Lensor's plan, for every distinct convolution. `crs` has a separate file,
`crs.csv`. A command does not repeat measurements from previous commands.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensor.inspect.catalogue import NETS, PAPER, layers_of, merged
from lensor.inspect.errors import CommandError, choose, require
from lensor.inspect.files import writing
from lensor.inspect.layers import KINDS, Layer, census, format_sizes, label
from lensor.inspect.operations import PAPER_OPERATIONS, STANDARD
from lensor.inspect.text import digits, write_rows
from lensor_bench.report import HEADINGS, Options, plot, ratios, settings_of, summaries, table, without_time
from lensor_bench.results import OK, Row
from lensor_bench.settings import Settings

if TYPE_CHECKING:
    from lensor_bench.crs import Point

FIGURES = ("study", "runtime", "speedups", "memory", "crs")
"""The figures that can be reproduced; "all" selects all of them."""

_MEASURED = ("runtime", "speedups", "memory")
OPTIONS = {
    **dict.fromkeys(("batch", "dtype", "device", "repeats", "seconds"), _MEASURED),
    "threads": (*_MEASURED, "crs"),
    "quick": (*_MEASURED, "crs"),
    "cifar": ("crs",),
}
"""The figures that each option applies to."""

TN, SIMPLIFIED, PLANNED = "network", "network-simplified", "lensor"
IMPLEMENTATIONS = (TN, SIMPLIFIED, PLANNED)
RUNS, QUICK_RUNS = "runs.csv", "runs-quick.csv"

CENSUS = {
    "3c3d": {"general": (3, 3)},
    "2c2d": {"general": (2, 2)},
    "all-cnn-c": {"general": (7, 7), "dense": (2, 2)},
    "alexnet": {"general": (5, 5)},
    "resnet18": {"general": (17, 8), "down-sampling": (3, 3)},
    "resnext101-32x8d": {"general": (34, 8), "dense": (67, 8), "down-sampling": (3, 3)},
    "convnext-base": {"general": (36, 4), "dense": (4, 4)},
    "inceptionv3": {"general": (20, 12), "dense": (40, 19), "mixed-dense": (34, 12)},
    "mobilenetv2": {"general": (18, 11), "dense": (34, 19)},
}
"""The paper's hyper-parameter study: the numbers of (all, distinct) convolutions of each kind."""

CLAIMS = {
    "forward": "simplified, dense: median slightly above 1; general: simplification changes nothing",
    "input_vjp": "simplified, dense: median slightly above 1; general: simplification changes nothing",
    "weight_vjp": "simplified, dense and down-sampling: median below 1",
    "kfac_expand": "simplified, dense, mixed dense and down-sampling: median well below 1",
    "kfac_reduce": "simplified: median below 1 for every kind; best 0.22 (4.5 times faster)",
}
"""The paper's findings on an Nvidia T4, compared with PyTorch's way."""

_BEST = 10
_QUICK = 4
"""Number of convolutions per kind in a quick run."""


@dataclass(frozen=True)
class Written:
    """The result of writing a figure.

    Args:
        title: title of the figure.
        summary: rows of text for the terminal, with the headings first.
        paths: the files.
    """

    title: str
    summary: tuple[tuple[str, ...], ...]
    paths: tuple[Path, ...]


def figures(asked: Sequence[str]) -> tuple[str, ...]:
    """Look up figures by name; "all" selects every figure.

    Raises:
        CommandError: for an unknown name.
    """
    names = choose("figure", asked, (*FIGURES, "all"))
    return FIGURES if "all" in names else names


def needed(names: Iterable[str]) -> tuple[str, ...]:
    """The operations for which the figures need measurements."""
    if "runtime" in names:
        return PAPER_OPERATIONS
    return ("kfac_reduce",) if {"speedups", "memory"} & set(names) else ()


def settings(operations: Sequence[str], given: Settings, quick: bool) -> Settings:
    """The settings for figures; a quick run has fewer repeats."""
    found = replace(given, operations=tuple(operations), implementations=IMPLEMENTATIONS)
    return replace(found, seconds=min(given.seconds, 0.05), repeats=min(given.repeats, 5)) if quick else found


def layers(quick: bool) -> tuple[Layer, ...]:
    """The distinct convolutions of the nine nets, or, for a quick run, a few small ones of each kind."""
    every = merged(layer for net in PAPER for layer in layers_of(net))
    if not quick:
        return every
    found: list[Layer] = []
    for kind in KINDS:
        mine = sorted((layer for layer in every if layer.spec.kind == kind), key=_work)
        smaller = mine[: max(len(mine) // 2, 1)]
        step = max(len(smaller) // _QUICK, 1)
        found += smaller[::step][:_QUICK]
    return tuple(found)


def _work(layer: Layer) -> int:
    """Number of multiplications in the forward pass of one example."""
    spec, found = layer.spec, layer.spec.in_channels // layer.spec.groups
    for size in (*spec.output_shape, *spec.kernel_size):
        found *= size
    return found


# -------------------------------------------------------------------------------------------------------------- study
def study(out: Path) -> Written:
    """The hyper-parameter study: convolutions of each net by kind, with the paper's numbers."""
    headings = ("net", "input", *KINDS, "paper")
    rows: list[tuple[str, ...]] = []
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    for name in PAPER:
        shape = NETS[name].census
        counts[name] = census(layers_of(name, shape))
        rows.append((name, format_sizes(shape), *_cells(counts[name]), _agrees(counts[name], CENSUS[name])))
    sums, paper = (
        {
            kind: (sum(one.get(kind, (0, 0))[0] for one in of), sum(one.get(kind, (0, 0))[1] for one in of))
            for kind in KINDS
        }
        for of in (list(counts.values()), list(CENSUS.values()))
    )
    rows.append(("sum", "", *_cells(sums), _agrees(sums, paper)))
    total, unique = (sum(pair[at] for pair in sums.values()) for at in (0, 1))
    text = [
        *_opening("Hyper-parameter study", "study"),
        "Convolutions of each kind, total (unique), for one input of the given size. Convolutions of a net that agree"
        " in all hyper-parameters, input size and bias count as one. The last column compares with the paper:"
        ' "the same", or its numbers.',
        "",
        "![study](study.png)",
        "",
        *table(headings, rows, 2),
        f"{total} convolutions, {unique} of them unique in their net.",
    ]
    _plot_study(counts, out / "study.png")
    _write_csv(
        out / "study.csv",
        ("net", "input", "kind", "convolutions", "unique", "paper", "paper_unique"),
        (
            (
                name,
                format_sizes(NETS[name].census),
                kind,
                *counts[name].get(kind, (0, 0)),
                *CENSUS[name].get(kind, (0, 0)),
            )
            for name in PAPER
            for kind in KINDS
        ),
    )
    return _written("Hyper-parameter study", "study", out, text, (headings, *rows))


def _cells(counts: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    return tuple(f"{counts[kind][0]} ({counts[kind][1]})" if counts.get(kind, (0, 0))[0] else "" for kind in KINDS)


def _agrees(found: dict[str, tuple[int, int]], paper: dict[str, tuple[int, int]]) -> str:
    same = all(found.get(kind, (0, 0)) == paper.get(kind, (0, 0)) for kind in KINDS)
    return "the same" if same else ", ".join(f"{kind} {n} ({unique})" for kind, (n, unique) in paper.items())


def _plot_study(counts: dict[str, dict[str, tuple[int, int]]], path: Path) -> None:
    figure, axis = _figure()
    left = [0] * len(counts)
    for at, kind in enumerate(KINDS):
        values = [of.get(kind, (0, 0))[0] for of in counts.values()]
        axis.barh(list(counts), values, left=left, color=f"C{at}", label=kind)
        left = [before + value for before, value in zip(left, values, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("convolutions")
    axis.legend(fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=130)


# ------------------------------------------------------------------------------------------------------------ runtime
def runtime(rows: Sequence[Row], out: Path, options: str) -> Written:
    """Time ratios by operation and kind, as box plots and a table, with the paper's findings."""
    found = [one for one in summaries(rows, Options()) if one.operation in PAPER_OPERATIONS]
    cells = [one.cells[:7] for one in found]
    text = [
        *_opening("Run times", "runtime", options, rows),
        "Shortest times divided by those of the standard implementation, from the same interleaved rounds; below 1 is"
        " faster."
        f" `{TN}` contracts the network unsimplified, `{SIMPLIFIED}` after simplification, both with patterns as"
        f" dense tensors along opt_einsum's path; `{PLANNED}` is what `lensor` runs. Convolutions that occur in two"
        " nets are measured once, so there are fewer than the sum of the nets' unique ones.",
        "",
        "![time ratios](runtime.png)",
        "",
        "The paper's findings on an Nvidia T4:",
        "",
        *(f"- {operation}: {CLAIMS[operation]}" for operation in PAPER_OPERATIONS),
        "",
        *table(HEADINGS[:7], cells, 3),
        *without_time(rows),
    ]
    plot(rows, Options(), out / "runtime.png")
    _write_csv(out / "runtime.csv", HEADINGS[:7], cells)
    return _written("Run times", "runtime", out, text, (HEADINGS[:7], *cells))


# ----------------------------------------------------------------------------------------------------------- speedups
def speedups(rows: Sequence[Row], out: Path, options: str) -> Written:
    """The convolutions with the largest speed-ups of KFAC-reduce, for each implementation."""
    known = {
        (row.implementation, row.layer.spec): one.value
        for row, one in ratios(rows, Options()).items()
        if row.operation == "kfac_reduce"
    }
    every = {row.layer.spec: row for row in rows if row.operation == "kfac_reduce" and row.implementation == PLANNED}
    best = sorted((spec for spec in every if (PLANNED, spec) in known), key=lambda spec: known[PLANNED, spec])
    headings = ("nets", "convolution", "kind", "standard, ms", *(f"{name}, times faster" for name in IMPLEMENTATIONS))
    cells = []
    for spec in best:
        row = every[spec]
        times = (f"{1 / known[name, spec]:.1f}" if (name, spec) in known else "–" for name in IMPLEMENTATIONS)
        standard = 1e3 * (row.found.standard_minimum or 0.0)
        cells.append((row.layer.model, label(spec), row.layer.kind, f"{standard:.3g}", *times))
    lines = []
    for name in IMPLEMENTATIONS:
        mine = [value for (one, _), value in known.items() if one == name]
        if mine:
            lines.append(
                f"- `{name}`: best {digits(min(mine))} ({1 / min(mine):.1f} times faster), median"
                f" {digits(statistics.median(mine))}, worst {digits(max(mine))}"
            )
    text = [
        *_opening("Speed-ups of KFAC-reduce", "speedups", options, rows),
        f"The {_BEST} convolutions with the largest speed-up of `{PLANNED}` over unfolding, and the speed-ups of the"
        " other two ways on the same convolutions. All measured convolutions are in `speedups.csv`.",
        "",
        "The paper, on an Nvidia T4: ratios down to 0.22 (4.5 times faster). Here, over the measured convolutions:",
        "",
        *lines,
        "",
        "![speed-ups](speedups.png)",
        "",
        *table(headings, cells[:_BEST], 3),
    ]
    figure, axis = _figure()
    for at, name in enumerate(IMPLEMENTATIONS):
        mine = sorted(1 / value for (one, _), value in known.items() if one == name)
        axis.plot([place / max(len(mine) - 1, 1) for place in range(len(mine))], mine, color=f"C{at}", label=name)
    axis.axhline(1, color="black", linewidth=1)
    axis.axhline(4.5, color="grey", linewidth=1, linestyle="--", label="the paper's best")
    axis.set_yscale("log")
    axis.set_xlabel("share of the convolutions")
    axis.set_ylabel("times faster than unfolding")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(out / "speedups.png", dpi=130)
    _write_csv(out / "speedups.csv", headings, cells)
    return _written("Speed-ups of KFAC-reduce", "speedups", out, text, (headings, *cells[:_BEST]))


# ------------------------------------------------------------------------------------------------------------- memory
def memory(rows: Sequence[Row], out: Path, options: str) -> Written:
    """The memory of KFAC-reduce, excluding operand and result."""
    mine = [row for row in rows if row.operation == "kfac_reduce" and row.found.status == OK]
    if not any(row.implementation == STANDARD for row in mine):
        raise CommandError("the results contain no memory use of KFAC-reduce, expected some: measure it first")
    names = (STANDARD, *IMPLEMENTATIONS)
    bytes_of = {(row.implementation, row.layer.spec): row.found.extra_bytes or 0 for row in mine}
    every = {row.layer.spec: row for row in mine if row.implementation == STANDARD}
    specs = sorted(every, key=lambda spec: -bytes_of[STANDARD, spec])
    headings = ("nets", "convolution", "kind", *(f"{name}, MiB" for name in names))
    cells = [
        (
            *(every[spec].layer.model, label(spec), every[spec].layer.kind),
            *(f"{bytes_of[name, spec] / 2**20:.3g}" if (name, spec) in bytes_of else "–" for name in names),
        )
        for spec in specs
    ]
    saved = {
        name: max(0, *(bytes_of[STANDARD, spec] - bytes_of.get((name, spec), math.inf) for spec in specs))
        for name in IMPLEMENTATIONS
    }
    more = {
        name: sum(bytes_of[STANDARD, spec] < bytes_of.get((name, spec), 0) for spec in specs)
        for name in IMPLEMENTATIONS
    }
    batch = mine[0].setting.batch
    text = [
        *_opening("Memory of KFAC-reduce", "memory", options, rows),
        "Peak memory besides the operand, minus the size of the result: temporary memory that is released before the"
        " result is allocated does not count to the extent that it fits into the result's memory. The paper, on an"
        " Nvidia T4 with larger batches: up to 3 GiB less than the standard implementation. Here, with a batch of"
        f" {batch}, the largest saving on one convolution, and how many of {len(specs)} convolutions need more than the"
        " standard implementation:",
        "",
        *(f"- `{name}`: {saved[name] / 2**20:,.0f} MiB saved, {more[name]} need more" for name in IMPLEMENTATIONS),
        "",
        "![memory](memory.png)",
        "",
        f"The {_BEST} convolutions for which the standard implementation needs the most memory; all are in"
        " `memory.csv`.",
        "",
        *table(headings, cells[:_BEST], 3),
    ]
    figure, axis = _figure()
    for at, name in enumerate(names):
        values = [max(bytes_of.get((name, spec), math.nan) / 2**20, 2**-10) for spec in specs]
        axis.plot(range(len(specs)), values, ".", color="black" if name == STANDARD else f"C{at - 1}", label=name)
    axis.set_yscale("log")
    axis.set_xlabel("convolutions, by memory of the standard implementation")
    axis.set_ylabel("MiB besides operand, minus the result")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(out / "memory.png", dpi=130)
    _write_csv(out / "memory.csv", headings, cells)
    return _written("Memory of KFAC-reduce", "memory", out, text, (headings, *cells[:_BEST]))


# ---------------------------------------------------------------------------------------------------------------- crs
def crs_figure(points: Sequence[Point], out: Path, options: str) -> Written:
    """The error of sampled gradients, with the paper's findings."""
    from lensor_bench import crs

    rows = crs.table(points)
    lines = []
    for data in dict.fromkeys(point.data for point in points):
        same = crs.equal_share(points, data)
        found = "no measured share is" if same is None else f"{same:.0%} of positions are"
        lines.append(f"- {data}: {found} as good as 75 % of channels")
    batch, seeds = points[0].batch, 1 + max(point.seed for point in points)
    text = [
        *_opening("Sampled gradients", "crs", options)[:-1],
        *(f"- {one}" for one in dict.fromkeys(point.made.label for point in points)),
        "",
        "The untrained All-CNN-C without dropout, cross-entropy, 100 classes: the distance ‖ĝ − g‖ / ‖g‖ of the sampled"
        f" gradients of all kernels from the exact ones. Batches of {batch}, {seeds} initialisations of model and batch"
        " for channels and positions by Bernoulli sampling, fewer for the rest; mean and standard deviation. Crops of"
        " pictures are 32×32 pixels of scikit-image's photographs, with the photograph as label.",
        "",
        "The paper, on CIFAR-100: 35 % of positions are as good as 75 % of channels. Here:",
        "",
        *lines,
        "",
        "![errors](crs.png)",
        "",
        "The time is that of the whole backward pass, including the exact input gradients. It is measured once,"
        " alternately with the exact backward pass, and excludes planning for the drawn counts."
        " `--cifar FOLDER` measures CIFAR-100 too.",
        "",
        *table(crs.HEADINGS, rows, 3),
    ]
    crs.plot(points, out / "crs.png")
    return _written("Sampled gradients", "crs", out, text, (crs.HEADINGS, *rows))


VIEWS: dict[str, Callable[[Sequence[Row], Path, str], Written]] = {
    "runtime": runtime,
    "speedups": speedups,
    "memory": memory,
}
"""The figures that show measurements."""


def write(
    names: Sequence[str], rows: Sequence[Row], points: Sequence[Point], out: Path, options: str = ""
) -> Iterator[Written]:
    """Write figures to a folder, one after another.

    Args:
        names: names of the figures to write.
        rows: the measurements for all other figures.
        points: the measurements for `crs`.
        out: the folder.
        options: options of the command, which the pages show.

    Raises:
        CommandError: if the folder cannot be written, matplotlib is missing, or nothing was measured.
    """
    require("matplotlib")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for name in names:
            if name == "study":
                yield study(out)
            elif name == "crs":
                yield crs_figure(points, out, options)
            elif not any(row.found.minimum for row in rows if row.operation in needed([name])):
                raise CommandError(f"the results have no time for {name}, expected some: measure it first")
            else:
                yield VIEWS[name](rows, out, options)


# -------------------------------------------------------------------------------------------------------------- files
def _opening(title: str, name: str, options: str = "", rows: Sequence[Row] = ()) -> list[str]:
    lines = [f"# {title}", "", f"Made by `lensor reproduce {name}{options}`.", ""]
    rounds = [row.found.repeats for row in rows if row.found.repeats]
    lines += [f"- {one}" for one in settings_of(rows)]
    if rounds:
        specs = len({row.layer.spec for row in rows})
        lines += [f"- {specs} convolutions, {min(rounds)} to {max(rounds)} rounds for each"]
    return [*lines, ""]


def _written(title: str, name: str, out: Path, text: Iterable[str], summary: tuple[tuple[str, ...], ...]) -> Written:
    (out / f"{name}.md").write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    return Written(title, summary, tuple(out / f"{name}.{ending}" for ending in ("md", "png", "csv")))


def _write_csv(path: Path, headings: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        write_rows(file, [headings, *rows])


def _figure() -> tuple[Any, Any]:
    """A figure with one panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
