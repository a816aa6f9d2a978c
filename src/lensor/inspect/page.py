"""The page of `lensor explain`: a self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lensor.draw import draw
from lensor.inspect.explain import Explanation, Total, by_layer, total, totals
from lensor.inspect.layers import name_of
from lensor.inspect.screen import advice
from lensor.inspect.table import HEADINGS, cells
from lensor.inspect.text import digits, millions, milliseconds, pace
from lensor.network import AnyNetwork

_SHARED = 4
"""The first columns of the table describe the convolution; the others differ between its operations."""


def page(explanations: Sequence[Explanation], model: str, lead: str, settings: Sequence[str]) -> str:
    """The page as HTML: totals, and a bar for each layer that opens its networks and plans.

    Args:
        explanations: the explanations to show.
        model: name of the model.
        lead: a line about the model's input.
        settings: lines about the measurement.
    """
    environment = Environment(
        loader=PackageLoader("lensor.inspect"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"digits": digits, "milliseconds": milliseconds, "millions": millions, "pace": pace}
    timed = any(one.seconds is not None for one in explanations)
    layers = by_layer(explanations)
    sums = [total(f"layer {place}", those) for place, those in enumerate(layers, start=1)]
    scales = max(max(_bars(one, timed).values(), default=0) for one in sums), max(one.peak_bytes for one in sums)
    drawn: dict[str, Markup] = {}
    return environment.get_template("explain.html.j2").render(
        model=model,
        lead=lead,
        settings=settings,
        timed=timed,
        missing=timed and any(one.missing for one in sums),
        totals=[*totals(explanations), total("all operations", explanations)],
        headings=HEADINGS[_SHARED:],
        layers=[_layer(those, one, timed, scales, drawn) for those, one in zip(layers, sums, strict=True)],
    )


def _layer(
    those: Sequence[Explanation], one: Total, timed: bool, scales: tuple[float, float], drawn: dict[str, Markup]
) -> dict[str, Any]:
    """What the page shows of a layer: names, widths of the bars in percent, and its operations."""
    layer = those[0].layer
    module, what = name_of(layer)
    return {
        "module": module,
        "what": f"{what}, {layer.kind}",
        "count": layer.count,
        "sum": one,
        "bars": {name: _percent(value, scales[0]) for name, value in _bars(one, timed).items()},
        "memory": _percent(one.peak_bytes, scales[1]),
        "advice": advice(those),
        "operations": [
            {
                "cells": cells(each)[_SHARED:],
                "name": each.operation,
                "trouble": each.trouble,
                "networks": [
                    ("before", each.written, _diagram(each.network, each.written, drawn)),
                    ("after simplification", each.simplified, _diagram(each.rest, each.simplified, drawn)),
                ],
                "plan": str(each.plan),
            }
            for each in those
        ],
    }


def _bars(one: Total, timed: bool) -> dict[str, float]:
    """The lengths of a layer's bars: torch's and Lensor's time, or the flops of Lensor's plans if nothing was timed."""
    if not timed:
        return {"lensor": one.flops}
    return {} if one.seconds is None else dict(zip(("torch", "lensor"), one.seconds, strict=True))


def _percent(value: float, scale: float) -> str:
    return f"{100 * value / scale:.2f}" if scale else "0.00"


def _diagram(net: AnyNetwork, text: str, drawn: dict[str, Markup]) -> Markup:
    """The diagram of a network; networks with the same text are drawn once."""
    if text not in drawn:
        # Inside a page, an SVG element needs no namespace, which would look like an external address.
        drawn[text] = Markup(draw(net).svg.replace(' xmlns="http://www.w3.org/2000/svg"', ""))
    return drawn[text]
