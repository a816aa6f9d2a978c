"""Binding of functions from other modules as methods of networks, sums and plans.

A method is a function whose first argument is the network. To add a method, write the function in its module, list it
here, and add its signature to `lensor.network.verbs`; a test compares the two signatures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lensor.draw import draw, svg_or_none, to_tikz
from lensor.evaluate import call, plan
from lensor.network.sums import add
from lensor.network.text import patterns_of, subscripts_of, text_to_parse, to_text
from lensor.network.verbs import Verbs
from lensor.plan import Plan
from lensor.simplification import simplify
from lensor.transforms import access, composition, derivatives, names

OF_NETWORKS: dict[str, Callable[..., Any]] = {
    "jacobian": derivatives.jacobian,
    "vjp": derivatives.vjp,
    "jvp": derivatives.jvp,
    "diagonal": access.diagonal,
    "block_diagonal": access.block_diagonal,
    "narrow": access.narrow,
    "slice": access.slice,
    "select": access.select,
    "keep": access.keep,
    "sample": access.sample,
    "batch": composition.batch,
    "substitute": composition.substitute,
    "merge": composition.merge,
    "components": composition.components,
    "rename": names.rename,
    "rename_operands": names.rename_operands,
    "regroup": names.regroup,
    "group": names.group,
    "ungroup": names.ungroup,
    "split": names.split,
    "bind": names.bind,
    "scaled": names.scaled,
    "simplify": simplify,
    "plan": plan,
    "draw": draw,
    "to_tikz": to_tikz,
    "__call__": call,
    "__add__": add,
    "__radd__": add,
    "__str__": to_text,
    "__repr__": text_to_parse,
    "_repr_svg_": svg_or_none,
}
"""The methods of networks and of sums of networks."""

PROPERTIES: dict[str, Callable[..., Any]] = {"subscripts": subscripts_of, "patterns": patterns_of}
"""The properties of networks and of sums of networks."""

OF_PLANS: dict[str, Callable[..., Any]] = {"draw": draw, "to_tikz": to_tikz, "_repr_svg_": svg_or_none}
"""The methods of plans."""

for _name, _function in OF_NETWORKS.items():
    setattr(Verbs, _name, _function)
for _name, _function in PROPERTIES.items():
    setattr(Verbs, _name, property(_function))
for _name, _function in OF_PLANS.items():
    setattr(Plan, _name, _function)
