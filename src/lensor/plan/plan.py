"""Plans: sequences of named steps with their costs.

A step is data: an operation and the previous values that it uses. The kernels of a backend run the steps; this module
does not depend on an array framework.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lensor.arguments import by_name
from lensor.network import AnyNetwork
from lensor.plan.constants import Constants, constants
from lensor.plan.memory import Value, layouts, moved, peak_size
from lensor.plan.paths import PathCosts
from lensor.plan.steps import Input, Shape, Step


@dataclass(frozen=True, slots=True)
class Candidate:
    """A candidate, as recorded when the plan was chosen; times are in seconds."""

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


class Considered(Sequence[Candidate]):
    """Candidates that are described only if somebody reads them."""

    def __init__(self, describe: Callable[[], Sequence[Candidate]]) -> None:
        self._describe = describe

    @cached_property
    def _all(self) -> tuple[Candidate, ...]:
        return tuple(self._describe())

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, at: Any) -> Any:
        return self._all[at]

    def __repr__(self) -> str:
        return repr(self._all)


@dataclass(frozen=True, eq=False)
class Plan:
    """A network that is ready to run: a sequence of named steps with their costs.

    Example:
        >>> import lensor
        >>> spec = lensor.ConvSpec(2, 4, (5,), kernel_size=1)
        >>> print(lensor.ops.conv(spec).plan(X=(3, 2, 5), W=(4, 2, 1)))  # doctest: +ELLIPSIS
        plan: 240 flops, ... bytes moved, peak size ..., by ...
        ...

    Args:
        subscripts: the text of the simplified network.
        steps: the steps in order; each step refers to the values of previous steps by their place.
        shapes: the shape of each step's value.
        result: the place of the result.
        strategy: the name of the strategy that created the plan.
        parts: the index that the plan processes in parts, and the number of parts; None if the plan does not divide an
            index.
        candidates: all plans that were considered, with their estimated and measured times.
        reason: why this plan was chosen.
        itemsize: bytes per entry.
        network: the network that was planned, before simplification.
        runner: runs the plan on operands by name.
        comparer: computes the costs of the network for other contraction paths.
        deriver: plans a derivative for a backend: `deriver(plan, backend, kind, operand, like)`, where `kind` is "vjp"
            or "jvp".
    """

    subscripts: str
    steps: tuple[Step, ...]
    shapes: tuple[Shape, ...]
    result: int
    strategy: str = ""
    parts: tuple[str, int] | None = None
    candidates: Sequence[Candidate] = ()
    reason: str = ""
    itemsize: int = 8
    network: AnyNetwork | None = field(default=None, repr=False)
    runner: Callable[[Plan, dict[str, Any]], Any] | None = field(default=None, repr=False)
    comparer: Callable[[Plan], PathCosts] | None = field(default=None, repr=False)
    deriver: Callable[..., Any] | None = field(default=None, repr=False)
    compiled: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """The compiled function for each backend; not saved with the plan."""

    @property
    def name(self) -> str:
        """The name of the strategy, including the parts if the plan divides an index.

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
        """Number of additions and multiplications in one step.

        Example:
            >>> import lensor
            >>> plan = lensor.contraction("n i, i o -> n o", "X", "W").plan(X=(4, 3), W=(3, 2))
            >>> [(step.name, plan.step_flops(place)) for place, step in enumerate(plan.steps)]
            [('operand', 0), ('operand', 0), ('matmul', 48)]

        Raises:
            IndexError: if the plan has no step at this place.
        """
        step = self.steps[place]
        return step.flops([self.shapes[at] for at in step.takes], self.shapes[place])

    @property
    def flops(self) -> int:
        """Number of additions and multiplications in all steps (a multiply-add counts as 2).

        Example:
            >>> import lensor
            >>> lensor.contraction("n i, i o -> n o", "X", "W").plan(X=(4, 3), W=(3, 2)).flops
            48
        """
        return sum(self.step_flops(place) for place in range(len(self.steps)))

    @cached_property
    def layouts(self) -> list[Value]:
        """The memory layout of each value, for operands in row-major order.

        Example:
            >>> import lensor
            >>> plan = lensor.contraction("n i, i o -> n o", "X", "W").plan(X=(4, 3), W=(3, 2))
            >>> [value.strides for value in plan.layouts]
            [(3, 1), (2, 1), (2, 1)]
        """
        return layouts(self.steps, self.shapes)

    @cached_property
    def moved(self) -> list[int]:
        """The number of entries that each step reads and writes; 0 for a view.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i, i o -> n o", "X", "W").plan(X=(4, 3), W=(3, 2)).moved
            [0, 0, 26]
        """
        return moved(self.steps, self.shapes, self.result, self.layouts)

    def step_bytes(self, place: int) -> int:
        """Number of bytes that one step reads and writes; 0 for a view.

        Example:
            >>> import lensor
            >>> plan = lensor.contraction("n i, i o -> n o", "X", "W").plan(X=(4, 3), W=(3, 2))
            >>> [plan.step_bytes(place) for place in range(len(plan.steps))]  # float32 unless arrays say otherwise
            [0, 0, 104]

        Raises:
            IndexError: if the plan has no step at this place.
        """
        return self.moved[place] * self.itemsize

    @property
    def bytes(self) -> int:
        """Number of bytes that all steps read and write; views count as 0.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i, i o -> n o", "X", "W").plan(X=(4, 3), W=(3, 2)).bytes
            104
        """
        return sum(self.moved) * self.itemsize

    @cached_property
    def constants(self) -> Constants:
        """The values that are computed from patterns only, once for all calls.

        Example:
            >>> import lensor
            >>> spec = lensor.ConvSpec(2, 3, (4, 4), 3)
            >>> plan = lensor.ops.kfac_input_root(spec).plan(X=(8, 2, 4, 4))
            >>> plan.name, len(plan.constants.kept)
            ('windows, tables first', 1)
        """
        return constants(self.steps, self.shapes, self.result)

    @cached_property
    def peak_size(self) -> int:
        """Maximum number of entries alive at once, including the result but not operands, patterns and `constants`.

        Example:
            >>> import lensor
            >>> lensor.contraction("n i, i o -> n o", "X", "W").plan(X=(4, 3), W=(3, 2)).peak_size
            8
        """
        once = {*self.constants.kept, *self.constants.skipped}
        return peak_size(self.steps, self.shapes, self.result, self.layouts, once)

    @by_name("operands")
    def __call__(self, /, **operands: Any) -> Any:
        """Run the plan on arrays from one framework.

        Raises:
            TypeError, ValueError: if operands are missing or unknown, or if their shapes differ from those of the plan.
        """
        return self._require(self.runner)(self, operands)

    def compare(self) -> PathCosts:
        """Compare the costs of the plan with those of other contraction paths.

        The table lists Feynman's path (all sums as nested loops, without intermediate results), the left-to-right,
        greedy and optimal pairwise paths for the simplified network with materialized patterns, and this plan. A
        multiply-add counts as 2 flops. The peak size is the maximum number of entries alive at once, including the
        result but not operands and patterns. If many tensors share indices, the optimal path is omitted, since finding
        it would take too long.

        Example:
            >>> import lensor
            >>> spec = lensor.ConvSpec(2, 4, (5,), kernel_size=3)
            >>> print(lensor.ops.conv(spec).plan(X=(3, 2, 5), W=(4, 2, 3)).compare())
            path                         flops        peak size
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
            raise TypeError("this plan contains only steps and cannot run, expected a plan from network.plan(...)")
        return tool

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "candidates": tuple(self.candidates), "compiled": {}}

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
