"""Plans: a sequence of named steps from a small closed set, each with its shape, flops and bytes.

A step is data: what to do with which earlier values. Kernels of a backend carry steps out; nothing here knows an
array framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, TypeAlias

from lensor.pattern import IndexPattern

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One step: a name, the values it takes, and (in subclasses) its settings."""

    name: ClassVar[str] = "step"
    is_view: ClassVar[bool] = False
    takes: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of the result for operands of these shapes."""
        raise NotImplementedError

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        """Additions and multiplications (a multiply-add counts 2)."""
        return 0

    def settings(self) -> str:
        """The settings as text."""
        return ""


@dataclass(frozen=True, slots=True)
class Input(Step):
    """An operand of the network."""

    name: ClassVar[str] = "operand"
    is_view: ClassVar[bool] = True
    operand: str
    size: Shape

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.size

    def settings(self) -> str:
        return self.operand


@dataclass(frozen=True, slots=True)
class Constant(Step):
    """A materialized pattern, summed over some of its legs (0: i, 1: o, 2: k); made once and kept."""

    name: ClassVar[str] = "pattern"
    is_view: ClassVar[bool] = True
    pattern: IndexPattern
    summed: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        sizes = (self.pattern.input_size, self.pattern.output_size, self.pattern.kernel_size)
        return tuple(size for leg, size in enumerate(sizes) if leg not in self.summed)

    def settings(self) -> str:
        return str(self.pattern) + (f" summed over {''.join('iok'[leg] for leg in self.summed)}" if self.summed else "")


@dataclass(frozen=True, slots=True)
class Fill(Step):
    """An array of one number."""

    name: ClassVar[str] = "fill"
    size: Shape
    value: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.size


@dataclass(frozen=True, slots=True)
class Identity(Step):
    """The identity matrix of a delta between two output indices."""

    name: ClassVar[str] = "identity matrix"
    size: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return (self.size, self.size)


@dataclass(frozen=True, slots=True)
class Reshape(Step):
    """Another grouping of the same entries."""

    name: ClassVar[str] = "reshape"
    is_view: ClassVar[bool] = True
    size: Shape

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.size


@dataclass(frozen=True, slots=True)
class Transpose(Step):
    """The axes in another order."""

    name: ClassVar[str] = "transpose"
    is_view: ClassVar[bool] = True
    order: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return tuple(shapes[0][axis] for axis in self.order)

    def settings(self) -> str:
        return str(self.order)


@dataclass(frozen=True, slots=True)
class Slice(Step):
    """Every step-th position of an axis from start, `count` of them."""

    name: ClassVar[str] = "slice"
    is_view: ClassVar[bool] = True
    axis: int
    start: int
    step: int
    count: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0][: self.axis], self.count, *shapes[0][self.axis + 1 :])

    def settings(self) -> str:
        return f"axis {self.axis} from {self.start} step {self.step}"


@dataclass(frozen=True, slots=True)
class Pad(Step):
    """Zeros on both sides of an axis."""

    name: ClassVar[str] = "pad"
    axis: int
    left: int
    right: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        size = shapes[0][self.axis] + self.left + self.right
        return (*shapes[0][: self.axis], size, *shapes[0][self.axis + 1 :])

    def settings(self) -> str:
        return f"axis {self.axis} by {self.left}, {self.right}"


@dataclass(frozen=True, slots=True)
class Stuff(Step):
    """Zeros between the positions of an axis (embedding with a stride, the adjoint of a strided slice)."""

    name: ClassVar[str] = "embed"
    axis: int
    step: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        size = (shapes[0][self.axis] - 1) * self.step + 1
        return (*shapes[0][: self.axis], size, *shapes[0][self.axis + 1 :])

    def settings(self) -> str:
        return f"axis {self.axis} step {self.step}"


@dataclass(frozen=True, slots=True)
class Gather(Step):
    """The positions of an axis that a selection reads, in any padding mode (all of them inside)."""

    name: ClassVar[str] = "gather"
    axis: int
    pattern: IndexPattern

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0][: self.axis], self.pattern.output_size, *shapes[0][self.axis + 1 :])

    def settings(self) -> str:
        return f"axis {self.axis} by {self.pattern}"


@dataclass(frozen=True, slots=True)
class Window(Step):
    """The patches along an axis as a strided view: axis of length L becomes (positions), and a last axis (kernel)."""

    name: ClassVar[str] = "window"
    is_view: ClassVar[bool] = True
    axis: int
    positions: int
    kernel: int
    stride: int
    dilation: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0][: self.axis], self.positions, *shapes[0][self.axis + 1 :], self.kernel)

    def settings(self) -> str:
        return f"axis {self.axis}, kernel {self.kernel}, stride {self.stride}, dilation {self.dilation}"


@dataclass(frozen=True, slots=True)
class OverlapAdd(Step):
    """Add up the patches of an axis of positions and the last axis (kernel), the adjoint of `Window`."""

    name: ClassVar[str] = "overlap-add"
    axis: int
    length: int
    stride: int
    dilation: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0][: self.axis], self.length, *shapes[0][self.axis + 1 : -1])

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(shapes[0])

    def settings(self) -> str:
        return f"axis {self.axis}, stride {self.stride}, dilation {self.dilation}"


@dataclass(frozen=True, slots=True)
class Diagonal(Step):
    """The diagonal of two axes of one length, as the last axis."""

    name: ClassVar[str] = "diagonal"
    is_view: ClassVar[bool] = True
    first: int
    second: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        rest = [size for axis, size in enumerate(shapes[0]) if axis not in (self.first, self.second)]
        return (*rest, shapes[0][self.first])


@dataclass(frozen=True, slots=True)
class SumAxes(Step):
    """The sum over some axes."""

    name: ClassVar[str] = "sum"
    axes: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return tuple(size for axis, size in enumerate(shapes[0]) if axis not in self.axes)

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(shapes[0])

    def settings(self) -> str:
        return f"over {self.axes}"


@dataclass(frozen=True, slots=True)
class Expand(Step):
    """Axes of length 1 repeated to `size`."""

    name: ClassVar[str] = "expand"
    is_view: ClassVar[bool] = True
    size: Shape

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.size


@dataclass(frozen=True, slots=True)
class Multiply(Step):
    """The entry-wise product, axes of length 1 repeated."""

    name: ClassVar[str] = "multiply"

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return tuple(b if a == 1 else a for a, b in zip(*shapes, strict=True))

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(result)


@dataclass(frozen=True, slots=True)
class MatMul(Step):
    """Batched matrix products [b, m, k] · [b, k, n] -> [b, m, n]: the pairwise contraction."""

    name: ClassVar[str] = "matmul"

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0][:-1], shapes[1][-1])

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return 2 * math.prod(shapes[0]) * shapes[1][-1]


@dataclass(frozen=True, slots=True)
class Convolution(Step):
    """A framework's convolution, contracting two of the three tensors that hang off its patterns.

    forward: [N, G·Cin, *I], [G·Cout, Cin, *K] -> [N, G·Cout, *O];
    input_grad: [N, G·Cout, *O], [G·Cout, Cin, *K] -> [N, G·Cin, *I];
    weight_grad: [N, G·Cin, *I], [N, G·Cout, *O] -> [G·Cout, Cin, *K].
    """

    name: ClassVar[str] = "convolution"
    kind: str
    stride: Shape
    padding: Shape
    dilation: Shape
    groups: int
    size: Shape

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.size

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        a, b = shapes
        if self.kind == "forward":
            return 2 * math.prod(result) * math.prod(b[1:])
        if self.kind == "input_grad":
            return 2 * math.prod(a) * math.prod(b[1:])
        return 2 * math.prod(b) * math.prod(result[1:])

    def settings(self) -> str:
        return (
            f"{self.kind}, stride {self.stride}, padding {self.padding}, dilation {self.dilation}, groups {self.groups}"
        )


@dataclass(frozen=True, slots=True)
class Add(Step):
    """The sum of two arrays of one shape."""

    name: ClassVar[str] = "add"

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(result)


@dataclass(frozen=True, slots=True)
class Multiple(Step):
    """A number times an array."""

    name: ClassVar[str] = "scale"
    factor: Fraction

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(result)

    def settings(self) -> str:
        return f"by {self.factor}"


# ----------------------------------------------------------------------------------------------------------- programs
class Program:
    """Steps under construction: a step that is there already is not added again (hash-consing)."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.shapes: list[Shape] = []
        self._known: dict[Step, int] = {}

    def add(self, step: Step) -> int:
        """The place of the step's value, which is shared if an equal step was added before."""
        place = self._known.get(step)
        if place is None:
            place = len(self.steps)
            self.steps.append(step)
            self.shapes.append(step.shape([self.shapes[at] for at in step.takes]))
            self._known[step] = place
        return place

    def reshape(self, value: int, size: Shape) -> int:
        """The value with another grouping, itself if it has it already."""
        before = self.steps[value]
        if isinstance(before, Reshape):
            (value,) = before.takes
        return value if self.shapes[value] == size else self.add(Reshape((value,), size))

    def transpose(self, value: int, order: Sequence[int]) -> int:
        """The value with its axes in another order, itself if it is the same."""
        order, before = tuple(order), self.steps[value]
        if isinstance(before, Transpose):
            order, (value,) = tuple(before.order[axis] for axis in order), before.takes
        return value if order == tuple(range(len(order))) else self.add(Transpose((value,), order))


@dataclass(frozen=True, eq=False)
class Plan:
    """A network ready to run: named steps in order, with what they cost.

    Example:
        >>> import lensor
        >>> spec = lensor.ConvSpec(2, 4, (5,), kernel_size=1)
        >>> print(lensor.ops.conv(spec).plan(X=(3, 2, 5), W=(4, 2, 1)))  # doctest: +ELLIPSIS
        plan: 240 flops, ... candidate ...
        ...

    Args:
        subscripts: the simplified network as text.
        steps: the steps in order; each takes the values of earlier ones by their place.
        shapes: the shape of each step's value.
        result: the place of the result.
        candidates: (name, flops) of every candidate that was considered; the first is this one.
        runner: makes a function of the operands from the plan for the arrays' backend.
    """

    subscripts: str
    steps: tuple[Step, ...]
    shapes: tuple[Shape, ...]
    result: int
    candidates: tuple[tuple[str, int], ...] = ()
    runner: Callable[[Plan, dict[str, Any]], Any] | None = field(default=None, repr=False)
    compiled: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What runners keep for each backend; not part of the plan's state."""

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the operands."""
        return tuple(step.operand for step in self.steps if isinstance(step, Input))

    @property
    def shape(self) -> Shape:
        """The shape of the result."""
        return self.shapes[self.result]

    def step_flops(self, place: int) -> int:
        """Additions and multiplications of one step."""
        step = self.steps[place]
        return step.flops([self.shapes[at] for at in step.takes], self.shapes[place])

    @property
    def flops(self) -> int:
        """Additions and multiplications of all steps (a multiply-add counts 2)."""
        return sum(self.step_flops(place) for place in range(len(self.steps)))

    @property
    def written(self) -> int:
        """Entries written by all steps that are not views."""
        return sum(math.prod(shape) for step, shape in zip(self.steps, self.shapes, strict=True) if not step.is_view)

    def last_uses(self) -> list[int]:
        """For each value the place of the last step that takes it."""
        last = list(range(len(self.steps)))
        for place, step in enumerate(self.steps):
            for at in step.takes:
                last[at] = place
        last[self.result] = len(self.steps)
        return last

    @property
    def peak_size(self) -> int:
        """The most entries alive at once, operands and patterns not counted, views with what they view."""
        source = []
        for place, step in enumerate(self.steps):
            source.append(source[step.takes[0]] if step.is_view and step.takes else place)
        last = list(range(len(self.steps)))
        for place, until in enumerate(self.last_uses()):
            last[source[place]] = max(last[source[place]], until)
        alive = peak = 0
        ends: dict[int, int] = {}
        for place, step in enumerate(self.steps):
            if not step.is_view:
                size = math.prod(self.shapes[place])
                alive += size
                ends[last[place]] = ends.get(last[place], 0) + size
            peak = max(peak, alive)
            alive -= ends.get(place, 0)
        return peak

    def __call__(self, **operands: Any) -> Any:
        """Run the plan on arrays of one framework.

        Raises:
            TypeError, ValueError: if operands are missing, unknown, or not of the shapes the plan was made for.
        """
        assert self.runner is not None
        return self.runner(self, operands)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled": {}}

    def __str__(self) -> str:
        rows = [
            f"plan: {self.flops:,} flops, peak size {self.peak_size:,}, candidate {self.candidates[0][0]!r}"
            if self.candidates
            else f"plan: {self.flops:,} flops, peak size {self.peak_size:,}",
            f"  network: {self.subscripts}",
        ]
        others = ", ".join(f"{name} ({flops:,} flops)" for name, flops in self.candidates)
        rows.append(f"  considered: {others}")
        rows.append(f"  {'value':<6} {'step':<16} {'takes':<12} {'shape':<28} {'flops':>16}  settings")
        for place, step in enumerate(self.steps):
            takes = " ".join(f"%{at}" for at in step.takes)
            shape = "×".join(str(size) for size in self.shapes[place]) or "scalar"
            rows.append(
                f"  %{place:<5} {step.name:<16} {takes:<12} {shape:<28} {self.step_flops(place):>16,}  "
                f"{step.settings()}".rstrip()
            )
        return "\n".join(rows)
