"""The steps of plans: a small closed set, each with its shape and flops.

A step is data: what to do with which earlier values. Kernels of a backend carry steps out; nothing here knows an
array framework.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import ClassVar, TypeAlias

from lensor.pattern import IndexPattern
from lensor.reading import progressions

Shape: TypeAlias = tuple[int, ...]


def _with_axis(shape: Shape, axis: int, *sizes: int) -> Shape:
    """A shape with one axis of another size, or several for one."""
    return (*shape[:axis], *sizes, *shape[axis + 1 :])


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
class Positions(Input):
    """An operand that is a vector of positions below some size."""

    name: ClassVar[str] = "positions"
    below: int


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
    value: Fraction

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
        return _with_axis(shapes[0], self.axis, self.count)

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
        return _with_axis(shapes[0], self.axis, size)

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
        return _with_axis(shapes[0], self.axis, size)

    def settings(self) -> str:
        return f"axis {self.axis} step {self.step}"


@dataclass(frozen=True, slots=True)
class Gather(Step):
    """The positions of an axis that a selection reads, in any padding mode (all of them inside)."""

    name: ClassVar[str] = "gather"
    axis: int
    pattern: IndexPattern

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return _with_axis(shapes[0], self.axis, self.pattern.output_size)

    def runs(self) -> list[tuple[int, int, int]]:
        """The positions it reads as runs of equal steps, (start, step, length), one after another; steps may be 0."""
        return progressions(self.pattern.line())

    def settings(self) -> str:
        return f"axis {self.axis} by {self.pattern}"


@dataclass(frozen=True, slots=True)
class ScatterAdd(Step):
    """The adjoint of `Gather`: each position of an axis is added to the one that a selection reads there."""

    name: ClassVar[str] = "scatter-add"
    axis: int
    pattern: IndexPattern

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return _with_axis(shapes[0], self.axis, self.pattern.input_size)

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(shapes[0])

    def settings(self) -> str:
        return f"axis {self.axis} by {self.pattern}"


@dataclass(frozen=True, slots=True)
class Pick(Step):
    """The positions of an axis that a vector, the second operand, names."""

    name: ClassVar[str] = "pick"
    axis: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return _with_axis(shapes[0], self.axis, *shapes[1])

    def settings(self) -> str:
        return f"axis {self.axis}"


@dataclass(frozen=True, slots=True)
class Put(Step):
    """An axis put into the positions that a vector, the second operand, names, of one of `size`; zeros elsewhere."""

    name: ClassVar[str] = "put"
    axis: int
    size: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return _with_axis(shapes[0], self.axis, self.size)

    def settings(self) -> str:
        return f"axis {self.axis}"


@dataclass(frozen=True, slots=True)
class Through:
    """How one axis is read through a pattern: at which of its positions, for which of those of the other two legs.

    Args:
        pattern: the pattern.
        target: the leg (0: i, 1: o, 2: k) that is the axis.
        first: a leg of which all positions are meant.
        second: the leg whose positions are given.
        positions: the operand of the step that gives them.
    """

    pattern: IndexPattern
    target: int
    first: int
    second: int
    positions: int

    @property
    def sizes(self) -> Shape:
        """The sizes of the legs i, o, k."""
        return (self.pattern.input_size, self.pattern.output_size, self.pattern.kernel_size)


@dataclass(frozen=True, slots=True)
class Read(Step):
    """Neighbouring axes read through a pattern each, zero where nothing is.

    Args:
        takes: the array and the positions.
        axes: how each axis is read.
        axis: the first of the axes.
        chosen_first: whether the chosen legs' axes stand before the free ones' in the result, or behind them.
    """

    name: ClassVar[str] = "read"
    axes: tuple[Through, ...]
    axis: int
    chosen_first: bool

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        firsts = [axis.sizes[axis.first] for axis in self.axes]
        seconds = [math.prod(shapes[axis.positions]) for axis in self.axes]
        sizes = [*seconds, *firsts] if self.chosen_first else [*firsts, *seconds]
        return (*shapes[0][: self.axis], *sizes, *shapes[0][self.axis + len(self.axes) :])

    def settings(self) -> str:
        chosen = " ".join("iok"[axis.second] for axis in self.axes)
        return f"axis {self.axis} at chosen {chosen} of {' '.join(str(axis.pattern) for axis in self.axes)}"


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
class SumSquares(Step):
    """The sum over some axes of the squares of the entries, without conjugation."""

    name: ClassVar[str] = "sum of squares"
    axes: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return tuple(size for axis, size in enumerate(shapes[0]) if axis not in self.axes)

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return 2 * math.prod(shapes[0])

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
    """Batched matrix products [*b, m, k] · [*b, k, n] -> [*b, m, n], the pairwise contraction; b may be 1 in one."""

    name: ClassVar[str] = "matmul"
    factor: Fraction = Fraction(1)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        batch = (a if b == 1 else b for a, b in zip(shapes[0][:-2], shapes[1][:-2], strict=True))
        return (*batch, shapes[0][-2], shapes[1][-1])

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return 2 * math.prod(result) * shapes[0][-1]


@dataclass(frozen=True, slots=True)
class Gram(Step):
    """The products of all rows with all rows, [b, m, k] -> [b, m, m]: symmetric, so one triangle is enough."""

    name: ClassVar[str] = "gram"
    factor: Fraction = Fraction(1)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0][:-1], shapes[0][-2])

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(result[:-1]) * (result[-1] + 1) * shapes[0][-1]


_LAG_BLOCK = 256
"""Channels of a block: fewer take less memory, more are faster products."""


@dataclass(frozen=True, slots=True)
class Border:
    """Positions at which some kernel offsets read outside of a pattern's outputs.

    Args:
        fixed: (axis, position) for every axis of which one position is meant; all of the others.
        sign: of what is added for them.
        offsets: the kernel offsets k that exclude them.
        low: the lowest lag l − k along each axis for these k.
        count: the number of lags along each axis.
    """

    fixed: tuple[tuple[int, int], ...]
    sign: int
    offsets: tuple[Shape, ...]
    low: Shape
    count: Shape


@dataclass(frozen=True, slots=True)
class PatchGram(Step):
    """Products of all patch entries, summed over batch and positions: [n, g, c, *I] -> [g, c, *K, c, *K].

    For patterns of stride 1 without forming patches: Σ_o Π[i,o,k] Π[j,o,l] = [j − i = (l−k)·D]·m[i,k] (rule 20), so
    entry (k, l) is the autocorrelation at lag (l−k)·D less the positions that m excludes. One matrix product for each
    lag up to sign on rows that zeros keep apart, thin ones for the excluded rows.
    """

    name: ClassVar[str] = "patch gram"
    patterns: tuple[IndexPattern, ...]
    factor: Fraction = Fraction(1)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        _, g, c, *_ = shapes[0]
        kernel = tuple(pattern.kernel_size for pattern in self.patterns)
        return (g, c, *kernel, c, *kernel)

    @property
    def kernel(self) -> Shape:
        """The kernel size."""
        return tuple(pattern.kernel_size for pattern in self.patterns)

    @property
    def pad(self) -> Shape:
        """Zeros behind each axis: the largest lag."""
        return tuple(pattern.dilation * (pattern.kernel_size - 1) for pattern in self.patterns)

    def lags(self) -> list[Shape]:
        """All differences l − k of kernel positions."""
        return list(product(*(range(1 - k, k) for k in self.kernel)))

    def excluded(self) -> list[dict[int, list[int]]]:
        """For each axis: excluded input position -> the kernel positions k that exclude it (m[i,k] = 0)."""
        found: list[dict[int, list[int]]] = []
        for pattern in self.patterns:
            axis: dict[int, list[int]] = {}
            for k in range(pattern.kernel_size):
                low = k * pattern.dilation - pattern.padding[0]
                below, above = min(max(low, 0), pattern.input_size), max(low + pattern.output_size, 0)
                for i in (*range(below), *range(max(above, below), pattern.input_size)):
                    axis.setdefault(i, []).append(k)
            found.append(axis)
        return found

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        n, g, c, *spatial = shapes[0]
        lags = len(self.lags())
        rows = n * math.prod(size + pad for size, pad in zip(spatial, self.pad, strict=True))
        total = (lags + 1) // 2 * 2 * g * c * c * rows
        for border in self.borders():
            rest = n * math.prod(size for axis, size in enumerate(spatial) if axis not in dict(border.fixed))
            total += 2 * g * c * c * math.prod(border.count) * rest
        return total

    def blocks(self, channels: int) -> int:
        """Into how many blocks channels are divided, whose products with each other are alive for all lags at once."""
        return -(-channels // _LAG_BLOCK)

    def borders(self) -> list[Border]:
        """What to take away from sums over all positions: products at excluded positions, by inclusion-exclusion."""
        found = []
        excluded = self.excluded()
        for chosen in product((False, True), repeat=len(excluded)):
            axes = [axis for axis in range(len(excluded)) if chosen[axis]]
            for positions in product(*(excluded[axis] for axis in axes)) if axes else ():
                fixed = dict(zip(axes, positions, strict=True))
                own = [excluded[axis][fixed[axis]] if axis in fixed else range(k) for axis, k in enumerate(self.kernel)]
                low = tuple(-max(ks) for ks in own)
                count = tuple(k + max(ks) - min(ks) for k, ks in zip(self.kernel, own, strict=True))
                found.append(Border(tuple(fixed.items()), (-1) ** len(axes), tuple(product(*own)), low, count))
        return found

    def settings(self) -> str:
        return f"{len(self.lags())} lags, {' '.join(str(pattern) for pattern in self.patterns)}"


@dataclass(frozen=True, slots=True)
class Concat(Step):
    """Arrays side by side along an axis."""

    name: ClassVar[str] = "concat"
    axis: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        size = sum(shape[self.axis] for shape in shapes)
        return _with_axis(shapes[0], self.axis, size)

    def settings(self) -> str:
        return f"axis {self.axis}"


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

    def kernel(self, shapes: Sequence[Shape]) -> Shape:
        """The shape [G·Cout, Cin, *K] of the kernel, which is one of the factors or the result."""
        return self.size if self.kind == "weight_grad" else shapes[1]

    def settings(self) -> str:
        return (
            f"{self.kind}, stride {self.stride}, padding {self.padding}, dilation {self.dilation}, groups {self.groups}"
        )


@dataclass(frozen=True, slots=True)
class Add(Step):
    """The sum of two arrays of one shape."""

    name: ClassVar[str] = "add"
    owned: bool = False
    """Whether nothing else looks at the first array, so that the second may be added to it in place."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(result)


@dataclass(frozen=True, slots=True)
class Multiple(Step):
    """A number times an array."""

    name: ClassVar[str] = "scale"
    factor: Fraction
    owned: bool = False
    """Whether nothing else looks at the array, so that it may be scaled in place."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        return math.prod(result)

    def settings(self) -> str:
        return f"by {self.factor}"
