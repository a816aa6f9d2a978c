"""The page of `lensor explain`: a self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lensor.draw import draw
from lensor.inspect.explain import Explanation, totals
from lensor.inspect.layers import label
from lensor.inspect.text import digits
from lensor.network import AnyNetwork

HEADINGS = (
    *(("module", False), ("convolution", False), ("kind", False), ("count", True), ("operation", False)),
    *(("plan", False), ("Mflop", True), ("peak MB", True), ("standard, ms", True), ("Lensor, ms", True)),
    ("ratio", True),
)
"""The columns of the table, and whether they contain numbers."""

EVEN = 1.05
"""Ratios above this are marked as slower, ratios below its inverse as faster."""


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, its sort key ("" comes last), and its style."""

    text: str
    value: str | float
    style: str = ""


def cells(one: Explanation) -> list[Cell]:
    """The cells of an explanation, one per heading."""
    spec = one.layer.spec
    texts = (one.layer.name or "(the model)", label(spec) + (" transposed" if spec.transposed else ""), one.layer.kind)
    times = [Cell("–", "")] * 3
    if one.seconds is not None and one.ratio is not None:
        times = [Cell(milliseconds(seconds), seconds) for seconds in one.seconds]
        times.append(Cell(digits(one.ratio), one.ratio, pace(one.ratio)))
    return [
        *(Cell(text, text) for text in texts),
        Cell(str(one.layer.count), one.layer.count),
        *(Cell(text, text) for text in (one.operation, one.plan.name)),
        Cell(millions(one.plan.flops), one.plan.flops),
        Cell(millions(one.peak_bytes), one.peak_bytes),
        *times,
    ]


def page(explanations: Sequence[Explanation], model: str, lead: str, settings: Sequence[str]) -> str:
    """The page as HTML.

    Args:
        explanations: the explanations to show.
        model: name of the model.
        lead: a line about the model's input.
        settings: lines about the measurement.
    """
    environment = Environment(
        loader=PackageLoader("lensor.inspect"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "digits": digits,
        "milliseconds": milliseconds,
        "millions": millions,
        "pace": pace,
        "share": lambda seconds, every: f"{100 * seconds / max(every):.1f}",
    }
    drawn: dict[str, Markup] = {}
    rows = [
        {
            "operation": one.operation,
            "cells": cells(one),
            "trouble": one.trouble,
            "written": one.written,
            "simplified": one.simplified,
            "diagrams": [_diagram(one.network, one.written, drawn), _diagram(one.rest, one.simplified, drawn)],
            "plan": str(one.plan),
        }
        for one in explanations
    ]
    return environment.get_template("explain.html.j2").render(
        model=model,
        lead=lead,
        settings=settings,
        headings=HEADINGS,
        rows=rows,
        totals=totals(explanations),
        timed=any(one.seconds is not None for one in explanations),
    )


def _diagram(net: AnyNetwork, text: str, drawn: dict[str, Markup]) -> Markup:
    """The diagram of a network; networks with the same text are drawn once."""
    if text not in drawn:
        # Inside a page, an SVG element needs no namespace, which would look like an external address.
        drawn[text] = Markup(draw(net).svg.replace(' xmlns="http://www.w3.org/2000/svg"', ""))
    return drawn[text]


def milliseconds(seconds: float) -> str:
    """Format a time in milliseconds with three digits.

    Example:
        >>> from lensor.inspect.page import milliseconds
        >>> milliseconds(0.001234), milliseconds(0.25)
        ('1.23', '250')
    """
    return _three(seconds * 1e3)


def millions(count: float) -> str:
    """Format a count in millions with three digits.

    Example:
        >>> from lensor.inspect.page import millions
        >>> millions(6_099_456), millions(123)
        ('6.10', '0.000123')
    """
    return _three(count / 1e6)


def pace(ratio: float) -> str:
    """The style of a ratio: "slow", "fast" or empty."""
    return "slow" if ratio > EVEN else "fast" if ratio < 1 / EVEN else ""


def _three(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 10 else f"{value:#.3g}"
