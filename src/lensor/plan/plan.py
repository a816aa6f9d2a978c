"""Plans: a sequence of named steps, with what they cost.

A step is data: what to do with which earlier values. Kernels of a backend carry steps out; nothing here knows an
array framework.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lensor.network import AnyNetwork
from lensor.plan.memory import moved, peak_size
from lensor.plan.paths import PathCosts
from lensor.plan.steps import Input, Shape, Step


@dataclass(frozen=True, slots=True)
class Candidate:
    """What was known of a candidate when the choice was made; times in seconds."""

    name: str
    flops: int
    peak_size: int
    estimated: float
    measured: float | None = None

    def __str__(self) -> str:
        measured = "" if self.measured is None else f", measured {self.measured * 1e6:,.1f} µs"
        return (
            f"{self.name}: {self.flops:,} flops, peak size {self.peak_size:,}, "
            f"estimated {self.estimated * 1e6:,.1f} µs{measured}"
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """A network ready to run: named steps in order, with what they cost.

    Example:
        >>> import lensor
        >>> spec = lensor.ConvSpec(2, 4, (5,), kernel_size=1)
        >>> print(lensor.ops.conv(spec).plan(X=(3, 2, 5), W=(4, 2, 1)))  # doctest: +ELLIPSIS
        plan: 240 flops, ... bytes moved, peak size ..., by ...
        ...

    Args:
        subscripts: the simplified network as text.
        steps: the steps in order; each takes the values of earlier ones by their place.
        shapes: the shape of each step's value.
        result: the place of the result.
        strategy: the name of the strategy that made it.
        parts: the index that it works through part by part, and in how many parts; None if at once.
        candidates: every plan that was considered, with its estimated and measured time.
        reason: why it was chosen among them.
        itemsize: bytes of one entry.
        network: the network that was planned, before simplification.
        runner: runs the plan on operands by name.
        comparer: lists what the network costs in other orders.
        deriver: plans a derivative for a backend: `deriver(plan, backend, kind, operand, like)`, of the kind "vjp" or
            "jvp".
    """

    subscripts: str
    steps: tuple[Step, ...]
    shapes: tuple[Shape, ...]
    result: int
    strategy: str = ""
    parts: tuple[str, int] | None = None
    candidates: tuple[Candidate, ...] = ()
    reason: str = ""
    itemsize: int = 8
    network: AnyNetwork | None = field(default=None, repr=False)
    runner: Callable[[Plan, dict[str, Any]], Any] | None = field(default=None, repr=False)
    comparer: Callable[[Plan], PathCosts] | None = field(default=None, repr=False)
    deriver: Callable[..., Any] | None = field(default=None, repr=False)
    compiled: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What runners keep for each backend; not part of the plan's state."""

    @property
    def name(self) -> str:
        """The strategy, and the parts if there are several.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i, i o -> n o", "X", "W").plan(X=(4, 3), W=(3, 2)).name
            'windows'
        """
        return self.strategy if self.parts is None else "{}, {} in {} parts".format(self.strategy, *self.parts)

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the operands."""
        return tuple(step.operand for step in self.steps if isinstance(step, Input))

    @property
    def shape(self) -> Shape:
        """The shape of the result."""
        return self.shapes[self.result]

    def step_flops(self, place: int) -> int:
        """Additions and multiplications of one step.

        Example:
            >>> import lensor
            >>> plan = lensor.contraction("n i, i o -> n o", "X", "W").plan(X=(4, 3), W=(3, 2))
            >>> [(step.name, plan.step_flops(place)) for place, step in enumerate(plan.steps)]
            [('operand', 0), ('operand', 0), ('matmul', 48)]

        Raises:
            IndexError: for a place that the plan does not have.
        """
        step = self.steps[place]
        return step.flops([self.shapes[at] for at in step.takes], self.shapes[place])

    @property
    def flops(self) -> int:
        """Additions and multiplications of all steps (a multiply-add counts 2).

        Example:
            >>> import lensor
            >>> lensor.contraction("n i, i o -> n o", "X", "W").plan(X=(4, 3), W=(3, 2)).flops
            48
        """
        return sum(self.step_flops(place) for place in range(len(self.steps)))

    @cached_property
    def _moved(self) -> list[int]:
        return moved(self.steps, self.shapes, self.result)

    def step_bytes(self, place: int) -> int:
        """Bytes that one step reads and writes; 0 for a view.

        Example:
            >>> import lensor
            >>> plan = lensor.contraction("n i, i o -> n o", "X", "W").plan(X=(4, 3), W=(3, 2))
            >>> [plan.step_bytes(place) for place in range(len(plan.steps))]  # float32 unless arrays say otherwise
            [0, 0, 104]

        Raises:
            IndexError: for a place that the plan does not have.
        """
        return self._moved[place] * self.itemsize

    @property
    def bytes(self) -> int:
        """Bytes that all steps read and write; views count nothing.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i, i o -> n o", "X", "W").plan(X=(4, 3), W=(3, 2)).bytes
            104
        """
        return sum(self._moved) * self.itemsize

    @cached_property
    def peak_size(self) -> int:
        """The most entries alive at once beside operands and patterns; the result is counted.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i, i o -> n o", "X", "W").plan(X=(4, 3), W=(3, 2)).peak_size
            8
        """
        return peak_size(self.steps, self.shapes, self.result)

    def __call__(self, /, **operands: Any) -> Any:
        """Run the plan on arrays of one framework.

        Raises:
            TypeError, ValueError: if operands are missing, unknown, or not of the shapes the plan was made for.
        """
        return self._require(self.runner)(self, operands)

    def compare(self) -> PathCosts:
        """What the network costs in several orders of contraction, beside this plan.

        Listed are Feynman's (all sums as nested loops, nothing kept), left to right, greedy and optimal pairwise
        contraction of the simplified network with its patterns materialized, and this plan. Flops count a
        multiply-add as 2; sizes are entries alive at once beside operands and patterns, the result counted. The optimal
        order of many tensors that all share indices takes too long to find: it is left out then.

        Example:
            >>> import lensor
            >>> spec = lensor.ConvSpec(2, 4, (5,), kernel_size=3)
            >>> print(lensor.ops.conv(spec).plan(X=(3, 2, 5), W=(4, 2, 3)).compare())
            order                        flops        peak size
            Feynman                      3,240               36
            left to right                1,800              360
            greedy                         972              108
            optimal                        972              108
            planner                        432               36

        Source: Convolutions through the lens of tensor networks, section 4.2.
        """
        return self._require(self.comparer)(self)

    @staticmethod
    def _require(tool: Callable[..., Any] | None) -> Callable[..., Any]:
        if tool is None:
            raise TypeError("this plan is steps alone: a plan to run is made by network.plan(...)")
        return tool

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled": {}}

    def __repr__(self) -> str:
        return f"<Plan of {self.subscripts}: {len(self.steps)} steps, {self.flops:,} flops>"

    def __str__(self) -> str:
        rows = [
            f"plan: {self.flops:,} flops, {self.bytes:,} bytes moved, peak size {self.peak_size:,} "
            f"({self.peak_size * self.itemsize:,} bytes), by {self.name}",
            f"  network: {self.subscripts}",
        ]
        if self.reason:
            rows.append(f"  chosen: {self.reason}")
        rows += [f"  considered: {candidate}" for candidate in self.candidates]
        rows.append(f"  {'value':<6} {'step':<16} {'takes':<12} {'shape':<28} {'flops':>16} {'bytes':>14}  settings")
        for place, step in enumerate(self.steps):
            takes = " ".join(f"%{at}" for at in step.takes)
            shape = "×".join(str(size) for size in self.shapes[place]) or "scalar"
            rows.append(
                f"  %{place:<5} {step.name:<16} {takes:<12} {shape:<28} {self.step_flops(place):>16,} "
                f"{self.step_bytes(place):>14,}  "
                f"{step.settings()}".rstrip()
            )
        return "\n".join(rows)
