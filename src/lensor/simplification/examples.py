"""Worked examples of the simplification rules, as data; `lensor rules` generates docs/simplification.md from them.

An example is either an operation (a name in `lensor.ops`) with a convolution and optional transforms, or a network in
text form. `lensor.inspect.rules` evaluates the examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """One network to simplify.

    Args:
        operation: a name in `lensor.ops`, or the text form of a network with its sizes and patterns.
        spec: (in_channels, out_channels, input_size, kernel_size); empty for a text form.
        hyper: the other parameters of the spec.
        then: transforms, each given by its name and arguments.
        arguments: the other arguments of the operation.
    """

    operation: str
    spec: tuple[int, ...] = ()
    hyper: Mapping[str, Any] = field(default_factory=dict)
    then: tuple[tuple[Any, ...], ...] = ()
    arguments: tuple[Any, ...] = ()

    @property
    def code(self) -> str:
        """The example as Python code."""
        if not self.spec:
            return f"parse({self.operation!r})"
        spec = ", ".join([*map(str, self.spec), *(f"{name}={value!r}" for name, value in self.hyper.items())])
        more = "".join(f", {value!r}" for value in self.arguments)
        calls = "".join(f".{name}({', '.join(map(repr, values))})" for name, *values in self.then)
        return f"ops.{self.operation}(ConvSpec({spec}){more}){calls}"


RULE_EXAMPLES: Mapping[str, Example] = {
    "index of size 1 squeezed": Example("conv", (4, 8, 9, 1), {"groups": 2}),
    "delta contracted": Example("X[n a] δ[a b] -> n b where n=8, a=3, b=3"),
    "ones dropped": Example("X[n i] 1[i] 1[j] -> n where n=8, i=3, j=5"),
    "parallel indices merged": Example("X[n (g c) i] W[(g c)] -> n i (g c) where n=8, g=2, c=3, i=5"),
    "irrelevant parameters normalised": Example("unfold", (2, 3, 8, 1), {"dilation": 2, "padding": 1}),
    "one output position: kernel and output swapped": Example("conv", (4, 8, 8, 8), {"padding": 1, "stride": 3}),
    "one input position: read the other way round": Example("conv", (4, 8, 1, 3), {"padding": 1}),
    "one position of a group: one position of each of its indices": Example(
        "fold", (2, 3, 8, 4), {"stride": 2}, then=(("select", "i1", 6),)
    ),
    "pattern at one position of a leg": Example("unfold", (2, 3, 8, 3), then=(("select", "o1", 2),)),
    "one position of a shared index: one of each holder's own": Example(
        "X[n i] V[n o] Π1[n () ()] -> i o where Π1=IndexPattern(8, 1, padding=(-2, -5)), i=3, o=5"
    ),
    "pattern that reads nothing: the network is zero": Example(
        "fold", (2, 3, 8, 1), {"stride": 2}, then=(("select", "i1", 7),)
    ),
    "identity pattern contracted": Example("conv", (4, 8, 8, 1)),
    "crop composed with a pattern": Example("unfold", (2, 3, 8, 3), {"padding": 1}, then=(("slice", "o1", 0, 8, 2),)),
    "padding or cropping composed with a pattern": Example(
        "unfold", (2, 3, 9, 3), {"stride": 3, "padding": 1, "padding_mode": "circular"}
    ),
    "crop of the input taken into the pattern": Example(
        "fold", (2, 3, 8, 3), {"padding": 1}, then=(("narrow", "i1", 2, 4),)
    ),
    "two patterns that share two legs": Example("hessian_diagonal_input", (2, 3, 8, 3)),
    "pattern and one position of itself": Example("hessian_diagonal_input", (2, 3, 8, 2), then=(("select", "k1", 0),)),
    "leg sum that is constant": Example("Π1[i o k] W[c k] -> c o where Π1=IndexPattern(8, 3), c=4"),
    "crop summed over its input: a mask": Example(
        "Π1[i o ()] V[n o] -> n where Π1=IndexPattern(8, 1, stride=2, padding=1), n=8"
    ),
    "padding mode split from its pattern": Example("conv", (4, 8, 8, 3), {"padding": 1, "padding_mode": "reflect"}),
    "common divisor of stride and dilation taken out": Example("conv", (4, 8, 9, 3), {"stride": 2, "dilation": 2}),
    "dense or block pattern into regrouping": Example("conv", (4, 8, 9, 3), {"stride": 3}),
    "dense or block pattern after the swap into regrouping": Example("conv", (4, 8, 9, 3), {"dilation": 3}),
}
"""Maps each rule's name to a network to which the rule applies."""

CASES: Mapping[str, Example] = {
    "K=1, S=2, odd I": Example("conv", (4, 8, 9, 1), {"stride": 2}),
    "K=1, S=2, P=1": Example("conv", (4, 8, 8, 1), {"stride": 2, "padding": 1}),
    "K=1, D=2": Example("conv", (4, 8, 8, 1), {"dilation": 2}),
    "K=I, S=1": Example("conv", (4, 8, 8, 8)),
    "K=2, S=2, I=9": Example("conv", (4, 8, 9, 2), {"stride": 2}),
    "K=2, S=3, I=8": Example("conv", (4, 8, 8, 2), {"stride": 3}),
    "K=4, S=2": Example("conv", (4, 8, 8, 4), {"stride": 2}),
    "K=1, S=2, input VJP": Example("conv_input_vjp", (4, 8, 9, 1), {"stride": 2}),
    "KFAC-reduce, Π summed over o": Example("kfac_input_factor", (4, 8, 8, 3), {"padding": 1}, arguments=("reduce",)),
}
"""Cases beyond dense and down-sampling patterns with divisible sizes."""
