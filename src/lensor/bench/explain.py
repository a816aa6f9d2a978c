"""What Lensor makes of each convolution of a model: the network, what is left of it, the plan, and what it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lensor.bench.layers import Layer
from lensor.bench.operations import OPERATIONS
from lensor.bench.results import OK, Row
from lensor.bench.settings import Settings
from lensor.evaluate import bind_shapes
from lensor.network import AnyNetwork
from lensor.plan import Plan


@dataclass(frozen=True)
class Explanation:
    """One operation of one convolution.

    Args:
        layer: the convolution.
        operation: the operation's name.
        network: its network, as the operation defines it.
        rest: what the rules leave of it.
        plan: the plan that was chosen.
        standard: the standard way's row, if times were asked for.
        lensor: Lensor's row, if times were asked for.
    """

    layer: Layer
    operation: str
    network: AnyNetwork
    rest: AnyNetwork
    plan: Plan
    standard: Row | None = None
    lensor: Row | None = None

    @property
    def written(self) -> str:
        """The network as text."""
        return str(self.network)

    @property
    def simplified(self) -> str:
        """What the rules leave of it as text."""
        return str(self.rest)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that the plan has alive at once, its result included and its operands not."""
        return self.plan.peak_size * self.plan.itemsize

    @property
    def seconds(self) -> tuple[float, float] | None:
        """The shortest times of the standard way and of Lensor; none if there are not both."""
        found = None if self.lensor is None else self.lensor.found
        if found is None or found.minimum is None or found.standard_minimum is None:
            return None
        return found.standard_minimum, found.minimum

    @property
    def ratio(self) -> float | None:
        """Lensor's time over the standard way's."""
        return None if self.seconds is None else self.seconds[1] / self.seconds[0]

    @property
    def trouble(self) -> str:
        """Why there is no time: what the standard way or Lensor said; empty if there is one, or none was asked for."""
        for row in (self.standard, self.lensor):
            if row is not None and row.found.status != OK:
                return f"{row.implementation} {row.found.status}: {row.found.message}"
        return ""


@dataclass(frozen=True)
class Total:
    """One operation of the whole model: each convolution as often as the model runs it.

    Args:
        operation: the operation's name.
        flops: of all plans.
        seconds: of the standard way and of Lensor, if there are times.
        missing: convolutions without a time, which are not in `seconds`.
    """

    operation: str
    flops: int
    seconds: tuple[float, float] | None
    missing: int

    @property
    def ratio(self) -> float | None:
        """Lensor's time over the standard way's."""
        return None if self.seconds is None else self.seconds[1] / self.seconds[0]


def explained(layers: Sequence[Layer], settings: Settings, rows: Iterable[Row] = ()) -> Iterator[Explanation]:
    """Each operation of each convolution, in order.

    Args:
        layers: convolutions, without biases.
        settings: the names of operations, batch size, columns and dtype.
        rows: what was measured, if anything was.

    Example:
        >>> import lensor
        >>> from lensor.bench.explain import explained
        >>> from lensor.bench.layers import Layer
        >>> from lensor.bench.settings import Settings
        >>> layer = Layer("net", "conv1", lensor.ConvSpec(2, 4, (5, 5), 1), 1)
        >>> (found,) = explained([layer], Settings(operations=("forward",)))
        >>> print(found.simplified)
        X[n c_in o1 o2] W[c_out c_in () ()] -> n c_out o1 o2
    """
    dtype = getattr(torch, settings.dtype)
    known = {(row.operation, row.implementation, row.layer.spec): row for row in rows}
    for layer in layers:
        for name in settings.operations:
            net = OPERATIONS[name].network(layer.spec)
            shapes = OPERATIONS[name].shapes(layer.spec, settings.batch, settings.columns)
            like = {operand: torch.empty(shape, dtype=dtype, device="meta") for operand, shape in shapes.items()}
            yield Explanation(
                layer,
                name,
                net,
                bind_shapes(net, shapes).simplify(),
                net.plan(**like),
                *(known.get((name, one, layer.spec)) for one in ("standard", "lensor")),
            )


def totals(explanations: Iterable[Explanation]) -> list[Total]:
    """The sums over a model for each operation."""
    found: dict[str, list[Explanation]] = {}
    for one in explanations:
        found.setdefault(one.operation, []).append(one)
    result = []
    for operation, those in found.items():
        timed = [(one.layer.count, one.seconds) for one in those if one.seconds is not None]
        sums = tuple(sum(count * seconds[way] for count, seconds in timed) for way in (0, 1))
        flops = sum(one.layer.count * one.plan.flops for one in those)
        missing = sum(one.layer.count for one in those if one.seconds is None)
        result.append(Total(operation, flops, (sums[0], sums[1]) if timed else None, missing))
    return result
