"""Networks, simplifications, plans and times of each convolution of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lensor.evaluate import bind_shapes
from lensor.inspect.layers import Layer
from lensor.inspect.operations import OPERATIONS, PAPER_OPERATIONS
from lensor.network import AnyNetwork, Pattern
from lensor.plan import Plan
from lensor.planner.settings import planning
from lensor.spec import ConvSpec


@dataclass(frozen=True)
class Timing:
    """The shortest times of one operation of one convolution, in seconds.

    Args:
        standard: time of the standard implementation, which uses torch alone; None if it failed.
        lensor: time of Lensor; None if it failed.
        trouble: the reason for a missing time; empty if no time is missing.
    """

    standard: float | None
    lensor: float | None
    trouble: str = ""


Timings = Mapping[tuple[str, ConvSpec], Timing]
"""Timings, by operation and convolution."""


@dataclass(frozen=True)
class Explanation:
    """One operation of one convolution.

    Args:
        layer: the convolution.
        operation: name of the operation.
        network: the network that defines the operation.
        rest: the simplified network.
        plan: the chosen plan.
        operands: arrays without data that have the operands' shapes and dtype.
        timing: the times, if they were measured.
    """

    layer: Layer
    operation: str
    network: AnyNetwork
    rest: AnyNetwork
    plan: Plan
    operands: Mapping[str, Any]
    timing: Timing | None = None

    @property
    def written(self) -> str:
        """The network as text."""
        return str(self.network)

    @property
    def simplified(self) -> str:
        """The simplified network as text."""
        return str(self.rest)

    @property
    def patterns(self) -> tuple[int, int]:
        """The numbers of index patterns in the network and in the simplified network."""
        return _patterns(self.network), _patterns(self.rest)

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the plan in bytes, including its result but not its operands."""
        return self.plan.peak_size * self.plan.itemsize

    def within(self, max_bytes: int) -> Plan | None:
        """The plan that Lensor chooses under a memory limit; None if no plan meets it."""
        try:
            with planning(max_bytes=max_bytes):
                return self.network.plan(**self.operands)
        except ValueError:
            return None

    @property
    def seconds(self) -> tuple[float, float] | None:
        """The shortest times of the standard implementation and Lensor; None unless both were measured."""
        if self.timing is None or self.timing.standard is None or self.timing.lensor is None:
            return None
        return self.timing.standard, self.timing.lensor

    @property
    def ratio(self) -> float | None:
        """Lensor's time divided by the standard implementation's."""
        return None if self.seconds is None else self.seconds[1] / self.seconds[0]

    @property
    def trouble(self) -> str:
        """The reason for a missing time; empty if both times exist or nothing was measured."""
        return "" if self.timing is None else self.timing.trouble


def _patterns(net: AnyNetwork) -> int:
    return sum(isinstance(node, Pattern) for term in net.terms for node in term.nodes)


@dataclass(frozen=True)
class Total:
    """Sums over explanations, each weighted by the count of its convolution.

    Args:
        name: name of the operation or of the layer.
        flops: total flops of all plans.
        peak_bytes: the largest peak memory of a plan.
        seconds: total times of the standard implementation and Lensor, if measured.
        missing: number of results without a time, which `seconds` excludes.
    """

    name: str
    flops: int
    peak_bytes: int
    seconds: tuple[float, float] | None
    missing: int

    @property
    def ratio(self) -> float | None:
        """Lensor's time divided by the standard implementation's."""
        return None if self.seconds is None else self.seconds[1] / self.seconds[0]


def explained(
    layers: Sequence[Layer],
    ops: Sequence[str] = PAPER_OPERATIONS,
    batch: int = 8,
    columns: int = 4,
    dtype: str = "float32",
    timings: Timings | None = None,
) -> Iterator[Explanation]:
    """Explain each operation of each convolution, in order.

    Args:
        layers: the convolutions, without biases.
        ops: names of operations.
        batch: batch size of the plans.
        columns: number of columns of the square root of the GGN.
        dtype: dtype of the plans' operands.
        timings: the times, if they were measured.

    Example:
        >>> import lensor
        >>> from lensor.inspect.explain import explained
        >>> from lensor.inspect.layers import Layer
        >>> layer = Layer("net", "conv1", lensor.ConvSpec(2, 4, (5, 5), 1), 1)
        >>> (found,) = explained([layer], ["forward"])
        >>> print(found.simplified)
        X[n c_in o1 o2] W[c_out c_in () ()] -> n c_out o1 o2
    """
    for layer in layers:
        for name in ops:
            net = OPERATIONS[name].network(layer.spec)
            shapes = OPERATIONS[name].shapes(layer.spec, batch, columns)
            like = {
                operand: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
                for operand, shape in shapes.items()
            }
            rest = bind_shapes(net, shapes).simplify()
            timing = None if timings is None else timings.get((name, layer.spec))
            yield Explanation(layer, name, net, rest, net.plan(**like), like, timing)


def total(name: str, explanations: Iterable[Explanation]) -> Total:
    """The total over explanations."""
    those = list(explanations)
    timed = [(one.layer.count, one.seconds) for one in those if one.seconds is not None]
    sums = tuple(sum(count * seconds[way] for count, seconds in timed) for way in (0, 1))
    flops = sum(one.layer.count * one.plan.flops for one in those)
    missing = sum(one.layer.count for one in those if one.seconds is None)
    return Total(name, flops, max(one.peak_bytes for one in those), (sums[0], sums[1]) if timed else None, missing)


def totals(explanations: Iterable[Explanation]) -> list[Total]:
    """The totals over a model, one for each operation."""
    found: dict[str, list[Explanation]] = {}
    for one in explanations:
        found.setdefault(one.operation, []).append(one)
    return [total(operation, those) for operation, those in found.items()]


def by_layer(explanations: Iterable[Explanation]) -> list[list[Explanation]]:
    """The explanations of each convolution, in the model's order."""
    found: dict[Layer, list[Explanation]] = {}
    for one in explanations:
        found.setdefault(one.layer, []).append(one)
    return list(found.values())
