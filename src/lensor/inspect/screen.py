"""The terminal output of `lensor explain`: one screen with totals, the layers that matter, and advice for each."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from rich.console import Console
from rich.text import Text

from lensor.inspect.explain import Explanation, Total, by_layer, total, totals
from lensor.inspect.layers import name_of
from lensor.inspect.table import STYLES, times
from lensor.inspect.text import digits, millions, pace, printable

WIDTHS = 80, 100
"""The minimum and maximum width of the screen, in columns; narrower terminals wrap it."""

SHOWN = 5
"""The number of layers on the screen."""


def print_screen(found: Sequence[Explanation], lines: Sequence[str], shown: Console) -> None:
    """Print the totals, and the layers that matter with one line of advice each: at most 24 lines of 80 columns.

    Args:
        found: the explanations of a model.
        lines: a line about the model, and lines about the measurement, the first of which is shown.
        shown: the console.
    """
    width = min(max(shown.width, WIDTHS[0]), WIDTHS[1])
    rows: list[Text] = [_clipped(lines[0], width)]
    most = 2 if len(totals(found)) <= SHOWN else 1
    rows += [Text(row) for row in wrap(printable(lines[1]), width, max_lines=most, placeholder=" …")]
    rows += _totals(found, width)
    layers = by_layer(found)
    rows += _layers(layers, width)
    for row in rows:
        shown.print(row, soft_wrap=True, highlight=False)


def _totals(found: Sequence[Explanation], width: int) -> list[Text]:
    """A row for each operation, and one for all of them."""
    every = totals(found)
    if len(every) > 1:
        every.append(total("all", found))
    timed = any(one.seconds is not None for one in every)
    titles = ["Mflop", "peak MB", *(["torch ms", "Lensor ms", "ratio"] if timed else [])]
    rows = [_row("operation", titles, width, style="bold")]
    for one in every:
        name = f"{one.name} ({one.missing} without a time)" if timed and one.missing else one.name
        numbers = [millions(one.flops), millions(one.peak_bytes)]
        ratio = one.ratio if timed else None
        numbers += [cell.text for cell in times(one.seconds)] if timed else []
        rows.append(_row(name, numbers, width, "" if ratio is None else pace(ratio)))
    return rows


def _layers(layers: Sequence[list[Explanation]], width: int) -> list[Text]:
    """Two rows for each layer that matters: its costs, and advice."""
    sums = [total("", those) for those in layers]
    timed = any(one.seconds is not None for one in sums)
    every = sum(_cost(one, timed) for one in sums)
    first = sorted(range(len(layers)), key=lambda at: _weight(layers[at], sums[at], timed), reverse=True)[:SHOWN]
    titles = ["share", *(["torch ms", "Lensor ms", "ratio"] if timed else ["Mflop", "peak MB"])]
    heading = f"most {'time' if timed else 'flops'} (Π: patterns before → after)"
    rows = [_row(heading, titles, width, style="bold")]
    for at in first:
        one = sums[at]
        share = f"{100 * _cost(one, timed) / every:.0f}%" if one.seconds is not None or not timed else "–"
        costs = [cell.text for cell in times(one.seconds)] if timed else [millions(one.flops), millions(one.peak_bytes)]
        rows.append(_row(_title(layers[at]), [share, *costs], width, "" if one.ratio is None else pace(one.ratio)))
        rows.append(_clipped("  " + advice(layers[at]), width))
    rest = len(layers) - len(first)
    more = f"{rest} more layer{'s' * (rest != 1)}" if rest else "every plan"
    return [*rows, _clipped(f"{more}: --all; diagrams: --html FILE; options: lensor.planning(…)", width)]


def _cost(one: Total, timed: bool) -> float:
    """Lensor's time, or the flops if nothing was measured."""
    return (one.seconds[1] if one.seconds is not None else 0.0) if timed else one.flops


def _weight(those: Sequence[Explanation], one: Total, timed: bool) -> tuple[bool, float]:
    """Sort key: failures first, then the longer of both times, so that large savings count, too."""
    seconds = max(one.seconds) if one.seconds is not None else 0.0
    return any(each.trouble for each in those), seconds if timed else one.flops


def _title(those: Sequence[Explanation]) -> str:
    layer = those[0].layer
    module, what = name_of(layer)
    return f"{module}{f' ×{layer.count}' if layer.count > 1 else ''}, {what}"


def _row(name: str, numbers: Sequence[str], width: int, pace: str = "", style: str = "") -> Text:
    """A row: a name, and right-aligned numbers, the last of which has the style of its pace."""
    end = "".join(f"{number:>10}" for number in numbers)
    row = Text(f"{_short(name, width - len(end)):<{width - len(end)}}", style=style)
    return row.append(end[:-10]).append(end[-10:], style=STYLES[pace] or style)


def _clipped(text: str, width: int) -> Text:
    return Text(_short(text, width))


def _short(text: str, width: int) -> str:
    text = printable(text)
    return text if len(text) <= width else text[: width - 1] + "…"


# --------------------------------------------------------------------------------------------------------------- advice
def advice(those: Sequence[Explanation]) -> str:
    """What to do about a layer, and what the rules made of the operation that the advice is about.

    The operation is one that failed, or the one whose time differs most from torch's; without times, it is the one with
    the largest peak memory.

    Args:
        those: the explanations of one layer.
    """
    failed = next((one for one in those if one.trouble), None)
    if failed is not None:
        return f"{failed.operation}: {failed.trouble}"
    timed = [one for one in those if one.seconds is not None]
    if not timed:
        one = max(those, key=lambda one: one.peak_bytes)
        return f"{one.operation}: {_memory(one)}; {_rules(one)}"
    one = max(timed, key=lambda one: abs(_loss(one)))
    return f"{one.operation} {digits(one.ratio or 1.0)}×: {_time(one)}; {_rules(one)}"


def _loss(one: Explanation) -> float:
    """Seconds by which Lensor is slower than torch."""
    return one.seconds[1] - one.seconds[0] if one.seconds is not None else 0.0


def _time(one: Explanation) -> str:
    match pace(one.ratio or 1.0):
        case "slow" if len(one.plan.candidates) > 1:
            return 'keep torch\'s or try effort="measure"'
        case "slow":
            return "keep torch's"
        case "fast":
            return "use Lensor's"
    return "as fast as torch's, either will do"


def _memory(one: Explanation) -> str:
    """A memory limit that halves the peak, with the costs of the plan that meets it."""
    half = one.peak_bytes // 2
    plan = one.within(half) if half else None
    if plan is None:
        return f"no plan needs less than half of {millions(one.peak_bytes)} MB"
    change = digits(plan.flops / one.plan.flops) if one.plan.flops else "1.00"
    return f"max_bytes={half} lowers the peak to {millions(plan.peak_size * plan.itemsize)} MB, {change}× the flops"


def _rules(one: Explanation) -> str:
    before, after = one.patterns
    return f"Π {before} → {after}, {one.plan.name}"
