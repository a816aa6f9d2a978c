"""Reports from a results file: a summary by operation and kind, the worst cases with physical limits, and plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lensor.inspect.errors import CommandError, choose, require
from lensor.inspect.files import writing
from lensor.inspect.layers import KINDS
from lensor.inspect.operations import OPERATIONS, STANDARD, Operation
from lensor.inspect.text import digits, printable
from lensor.spec import ConvSpec
from lensor_bench.results import OK, Row

FASTEST = "fastest"
ALL = "all"
_ITEMSIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_WORST = 10

_NARROW = 1.25
"""Panels whose values differ by less than this factor get limits of their own."""


@dataclass(frozen=True)
class Ratio:
    """The time of a row divided by that of the reference row."""

    row: Row
    value: float
    memory: float | None


@dataclass(frozen=True)
class Summary:
    """Ratios of one implementation for one operation and kind.

    Args:
        operation: the operation.
        kind: the kind of the convolutions, or "all".
        implementation: the implementation that was timed.
        ratios: one ratio per convolution.
        others: number of convolutions without a ratio, because the result was wrong or missing.
        target: the desired median.
    """

    operation: str
    kind: str
    implementation: str
    ratios: tuple[Ratio, ...]
    others: int
    target: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of the summary's table row."""
        values = [ratio.value for ratio in self.ratios]
        memory = [ratio.memory for ratio in self.ratios if ratio.memory is not None]
        counted = str(len(values)) + (f" (+{self.others} without)" if self.others else "")
        numbers = (min(values), statistics.median(values), max(values)) if values else ()
        times = [digits(value) for value in numbers] or ["–"] * 3
        target = ""
        if self.target is not None:
            target = f"{digits(self.target)} {'✓' if values and statistics.median(values) <= self.target else '✗'}"
        return (
            *(self.operation, self.kind, self.implementation, counted, *times, target),
            digits(statistics.median(memory)) if memory else "–",
        )


HEADINGS = ("operation", "kind", "implementation", "n", "min", "median", "max", "target", "memory, median")


@dataclass(frozen=True)
class Options:
    """Options of a summary.

    Args:
        against: the reference implementation, whose time is 1; "fastest" for the fastest except Lensor, per
            convolution.
        targets: desired medians by (operation, kind), with the kind "all" for all kinds.
        slack: number of seconds by which a time may be longer and still count as equal.
        roof: maximum flops and maximum bytes of operands and result per second, which bound times from below; None to
            omit the bounds.
    """

    against: str = STANDARD
    targets: tuple[tuple[tuple[str, str], float], ...] = ()
    slack: float = 0.0
    roof: tuple[float, float] | None = None


def parse_target(text: str) -> tuple[tuple[str, str], float]:
    """Parse a target `operation=ratio` or `operation:kind=ratio`.

    Example:
        >>> from lensor_bench.report import parse_target
        >>> parse_target("kfac_reduce:general=0.05"), parse_target("forward=1")
        ((('kfac_reduce', 'general'), 0.05), (('forward', 'all'), 1.0))

    Raises:
        CommandError: for anything else; for an unknown operation or kind the message lists the known ones.
    """
    what, _, number = text.partition("=")
    operation, _, kind = what.partition(":")
    try:
        ratio = float(number)
    except ValueError:
        raise CommandError(f"target is {text!r}, expected OPERATION=RATIO or OPERATION:KIND=RATIO") from None
    (operation,) = choose("operation", [operation], OPERATIONS)
    (kind,) = choose("kind", [kind or ALL], (*KINDS, ALL))
    return (operation, kind), ratio


def _case(row: Row) -> tuple[object, ...]:
    return (row.operation, row.layer.spec, row.setting)


def ratios(rows: Sequence[Row], options: Options) -> dict[Row, Ratio]:
    """The ratio of every row that has a time and a reference.

    Raises:
        CommandError: if the reference implementation has no rows.
    """
    known = {row.implementation for row in rows}
    if options.against not in (*known, FASTEST):
        names = ", ".join((*sorted(known), FASTEST))
        raise CommandError(f"implementation is {options.against!r}, expected one of {names}")
    bases: dict[tuple[object, ...], Row] = {}
    for row in rows:
        counts = (
            not row.implementation.startswith("lensor")
            if options.against == FASTEST
            else (row.implementation == options.against)
        )
        best = bases.get(_case(row))
        if counts and row.found.minimum and (best is None or row.found.minimum < (best.found.minimum or math.inf)):
            bases[_case(row)] = row
    found: dict[Row, Ratio] = {}
    for row in rows:
        base = bases.get(_case(row))
        if row.found.minimum is None or base is None or not base.found.minimum:
            continue
        # Compare rows of different sessions (for a peer added later) through the standard implementation's time in each
        # session.
        drift = 1.0
        if row.found.standard_minimum and base.found.standard_minimum:
            drift = base.found.standard_minimum / row.found.standard_minimum
        value = drift * row.found.minimum / base.found.minimum
        if value > 1 and drift * row.found.minimum - base.found.minimum <= options.slack:
            value = 1.0
        mine, theirs = row.found.extra_bytes, base.found.extra_bytes
        found[row] = Ratio(row, value, mine / theirs if mine is not None and theirs else None)
    return found


def summaries(rows: Sequence[Row], options: Options) -> list[Summary]:
    """One summary per operation, kind (and all kinds together) and implementation, in this order."""
    known = ratios(rows, options)
    compared = [row for row in rows if row.implementation != options.against]
    found = []
    for operation in OPERATIONS:
        kinds = {row.layer.spec.kind for row in compared if row.operation == operation}
        together = len(kinds) > 1 or (operation, ALL) in dict(options.targets)
        for kind in ((ALL,) if together else ()) + KINDS:
            held = [row for row in compared if row.operation == operation and kind in (ALL, row.layer.spec.kind)]
            for name in dict.fromkeys(row.implementation for row in compared):
                mine = [row for row in held if row.implementation == name]
                if mine:
                    with_ratio = tuple(known[row] for row in mine if row in known)
                    target = dict(options.targets).get((operation, kind)) if name.startswith("lensor") else None
                    summary = Summary(operation, kind, name, with_ratio, len(mine) - len(with_ratio), target)
                    found.append(summary)
    return found


# ---------------------------------------------------------------------------------------------------------- Markdown
def settings_of(rows: Iterable[Row]) -> list[str]:
    """The settings and machines of rows: one line per setting."""
    lines = []
    for row in rows:
        setting = row.setting
        lines.append(
            f"batch {setting.batch}, {setting.columns} columns of the GGN's root, {setting.dtype}, {setting.device}, "
            f"threads {setting.threads}; {row.machine.label}"
        )
    return list(dict.fromkeys(lines))


def _line(cells: Iterable[object]) -> str:
    shown = (printable(str(cell)).replace("|", "¦").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(shown)} |"


def table(headings: Sequence[str], rows: Iterable[Iterable[object]], text: int) -> Iterable[str]:
    """A Markdown table whose first `text` columns contain text and whose other columns contain numbers."""
    yield _line(headings)
    yield _line("---" if at < text else "---:" for at in range(len(headings)))
    yield from map(_line, rows)
    yield ""


def markdown(rows: Sequence[Row], options: Options, pictures: Sequence[str] = ()) -> str:
    """The report: summary, worst cases, and rows without a time."""
    lines = ["# Measurements", ""]
    lines += [f"- {line}" for line in settings_of(rows)]
    lines += [
        "",
        f"Ratios are shortest times divided by those of `{options.against}`, both from the same interleaved rounds:"
        " below 1 is faster. Every result was compared with the standard one before it was timed. Memory is the peak"
        " besides the operands, minus the size of the result: temporary memory that is released before the result is"
        " allocated does not count to the extent that it fits into the result's memory.",
        "",
    ]
    if options.slack:
        lines += [
            f"A time that is longer by at most {options.slack * 1e6:g} µs counts as equal: its ratio is 1.",
            "",
        ]
    lines += [f"![{name}]({name})\n" for name in pictures]
    lines += ["## By operation and kind", ""]
    lines += table(HEADINGS, (summary.cells for summary in summaries(rows, options)), 3)
    if options.roof is not None:
        lines += bounds(rows, options.roof)
    lines += [f"## The {_WORST} worst ratios of Lensor", ""]
    lines += [
        "The table lists the physical minimum for each time (the flops of the plan with the fewest, and the bytes of"
        " operands and result together) and the resulting rates.",
        "",
    ]
    headings = ("operation", "implementation", "nets", "convolution", "kind", "ratio", "ms", "Mflop", "MB", "Gflop/s")
    lines += table((*headings, "GB/s"), (_rates(ratio) for ratio in worst(rows, options)), 5)
    lines += without_time(rows)
    return "\n".join(lines).rstrip() + "\n"


def without_time(rows: Iterable[Row]) -> list[str]:
    """A section on rows without a time, with the reasons; empty if all rows have a time."""
    cells = [
        (row.operation, row.implementation, row.layer.label, row.found.status, row.found.message)
        for row in rows
        if row.found.status != OK
    ]
    if not cells:
        return []
    return ["## Without a time", "", *table(("operation", "implementation", "convolution", "status", "why"), cells, 5)]


def worst(rows: Sequence[Row], options: Options) -> list[Ratio]:
    """Lensor's largest ratios, in descending order."""
    mine = [ratio for row, ratio in ratios(rows, options).items() if row.implementation.startswith("lensor")]
    return sorted(mine, key=lambda ratio: -ratio.value)[:_WORST]


def bounds(rows: Sequence[Row], roof: tuple[float, float]) -> list[str]:
    """A section on the minimum time of the machine, compared with Lensor's: medians over convolutions.

    Args:
        rows: the rows of a results file.
        roof: maximum flops and maximum bytes per second.
    """
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        standard, mine = row.found.standard_minimum, row.found.minimum
        if row.implementation.startswith("lensor") and standard and mine:
            flops, moved = _limit(row)
            least = max(flops / roof[0], moved / roof[1])
            key = (row.operation, row.layer.spec.kind, row.implementation)
            found.setdefault(key, []).append((least / standard, mine / standard))
    cells = [
        (operation, kind, name, len(of), *(digits(statistics.median(one)) for one in zip(*of, strict=True)))
        for operation in OPERATIONS
        for kind in KINDS
        for (on, of_kind, name), of in found.items()
        if (on, of_kind) == (operation, kind)
    ]
    return [
        "## Bounds on the times",
        "",
        f"The minimum time is that of the plan with the fewest flops at {roof[0] / 1e9:g} Gflop/s, or of moving"
        f" operands and result once at {roof[1] / 1e9:g} GB/s, whichever is larger. Both columns are divided by the"
        " standard time.",
        "",
        *table(("operation", "kind", "implementation", "n", "minimum, median", "measured, median"), cells, 3),
    ]


def physical_limit(operation: Operation, spec: ConvSpec, batch: int, columns: int, itemsize: int) -> tuple[int, int]:
    """Quantities that bound the time from below: (flops of the cheapest plan, bytes of operands and result).

    Example:
        >>> import lensor
        >>> from lensor.inspect.operations import OPERATIONS
        >>> from lensor_bench.report import physical_limit
        >>> physical_limit(OPERATIONS["forward"], lensor.ConvSpec(4, 8, (9,), 1), batch=2, columns=1, itemsize=4)
        (1152, 992)
    """
    shapes = operation.shapes(spec, batch, columns)
    plan = operation.network(spec).plan(**shapes)
    sizes = sum(map(math.prod, shapes.values())) + math.prod(plan.shape)
    return min(candidate.flops for candidate in plan.candidates), itemsize * sizes


def _limit(row: Row) -> tuple[int, int]:
    """The `physical_limit` for a row."""
    setting = row.setting
    size = _ITEMSIZES[setting.dtype]
    return physical_limit(OPERATIONS[row.operation], row.layer.spec, setting.batch, setting.columns, size)


def _rates(ratio: Ratio) -> tuple[object, ...]:
    row = ratio.row
    seconds = row.found.minimum or math.inf
    flops, moved = _limit(row)
    layer = row.layer
    return (
        *(row.operation, row.implementation, layer.model, layer.label.partition(" ")[2], layer.kind),
        *(digits(ratio.value), f"{seconds * 1e3:.3g}", f"{flops / 1e6:.3g}", f"{moved / 1e6:.3g}"),
        *(f"{flops / seconds / 1e9:.3g}", f"{moved / seconds / 1e9:.3g}"),
    )


# -------------------------------------------------------------------------------------------------------------- plots
def plot(rows: Sequence[Row], options: Options, path: Path, memory: bool = False) -> None:
    """Box plots of ratios: one panel per operation, one box per kind and implementation.

    Boxes show quartiles, whiskers the whole range, dots single convolutions.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    found = [summary for summary in summaries(rows, options) if summary.kind != ALL]
    operations = list(dict.fromkeys(summary.operation for summary in found))
    names = list(dict.fromkeys(summary.implementation for summary in found))
    colours = {name: f"C{at}" for at, name in enumerate(names)}
    across = min(2, len(operations))
    down = math.ceil(len(operations) / across)
    figure = Figure(figsize=(6.5 * across, 1.4 + 2.7 * down), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(down, across, squeeze=False).ravel()
    for axis in every[len(operations) :]:
        axis.remove()
    for axis, operation in zip(every, operations, strict=False):
        boxes = [summary for summary in found if summary.operation == operation]
        kinds = [kind for kind in KINDS if any(box.kind == kind for box in boxes)]
        shown = list(dict.fromkeys(box.implementation for box in boxes))
        for box in boxes:
            values = [ratio.memory if memory else ratio.value for ratio in box.ratios]
            positive = [value for value in values if value]
            if not positive:
                continue
            width = 0.8 / len(shown)
            place = kinds.index(box.kind) + width * (shown.index(box.implementation) - (len(shown) - 1) / 2)
            colour = colours[box.implementation]
            axis.boxplot(
                [positive],
                positions=[place],
                widths=width * 0.8,
                whis=(0, 100),
                patch_artist=True,
                manage_ticks=False,
                boxprops={"facecolor": colour, "alpha": 0.35, "edgecolor": colour},
                medianprops={"color": colour, "linewidth": 2},
                whiskerprops={"color": colour},
                capprops={"color": colour},
            )
            axis.plot([place] * len(positive), positive, ".", color=colour, markersize=2, alpha=0.6)
        axis.axhline(1, color="black", linewidth=1)
        numbers = {kind: max(len(box.ratios) for box in boxes if box.kind == kind) for kind in kinds}
        axis.set_xticks(range(len(kinds)), [f"{kind}\nn={numbers[kind]}" for kind in kinds], fontsize=8)
        axis.set_yscale("log")
        low, high = _range(boxes, memory)
        if high < _NARROW * low:  # without limits, equal values would be spread over decades
            axis.set_ylim(low / _NARROW, high * _NARROW)
        axis.yaxis.set_major_locator(LogLocator(10, subs=_ticks(math.log10(high / low))))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="y", alpha=0.3)
        axis.set_title(operation, fontsize=10)
    what = "memory besides operands and result" if memory else "shortest time"
    figure.suptitle(f"{what} / that of {options.against}, below 1: better", fontsize=11)
    handles = [Patch(facecolor=colours[name], alpha=0.5, label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(len(handles), 1), fontsize=8)
    figure.savefig(path, dpi=130)


def _range(boxes: Iterable[Summary], memory: bool) -> tuple[float, float]:
    """The smallest and the largest positive value of a panel; 1 if there is none."""
    values = [ratio.memory if memory else ratio.value for box in boxes for ratio in box.ratios]
    positive = [value for value in values if value]
    return min(positive, default=1.0), max(positive, default=1.0)


def _ticks(decades: float) -> tuple[float, ...]:
    """Positions of labels within a decade of a logarithmic axis; the wider the range, the fewer labels."""
    return (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9) if decades < 0.7 else (1, 2, 5) if decades < 3 else (1,)


def write(rows: Sequence[Row], folder: Path, options: Options) -> list[Path]:
    """Write `report.md`, `times.png` and `memory.png` to a folder and return their paths.

    Raises:
        CommandError: if matplotlib is missing, or the folder cannot be written.
    """
    require("matplotlib")
    paths = [folder / name for name in ("report.md", "times.png", "memory.png")]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(markdown(rows, options, [path.name for path in paths[1:]]), encoding="utf-8")
        plot(rows, options, paths[1])
        plot(rows, options, paths[2], memory=True)
    return paths
