"""Weight gradients of convolutions from a band of the input: adjacent positions, which may wrap around at the end.

With zero padding, a convolution is also a convolution on a ring: enough zeros between the last and the first input
position separate them, and outputs that do not exist are zero. On the ring, every band of a given length looks the same
up to the remainder of its start modulo the stride. Its weight gradient is therefore that of a small ordinary
convolution of the band and a window of the output gradient, with few different shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import torch
from torch import Tensor

from lensor.spec import ConvSpec, Sides

Pieces: TypeAlias = tuple[tuple[int, int] | int, ...]
"""Parts of an axis, given by their first position and length, and zeros, given by their number."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A spatial axis of a convolution or transposed convolution with zero padding.

    Args:
        size: number of input positions.
        output: number of output positions.
        kernel: number of kernel positions.
        stride: step between output positions, or between input positions if transposed.
        dilation: step between kernel positions.
        left: padding on the left.
        transposed: whether the convolution is transposed.
    """

    size: int
    output: int
    kernel: int
    stride: int
    dilation: int
    left: int
    transposed: bool

    @property
    def reach(self) -> int:
        """Distance between the first and the last kernel position."""
        return self.dilation * (self.kernel - 1)

    @property
    def ring(self) -> int:
        """Number of input positions on the ring, including zeros; a multiple of the stride unless transposed.

        Input i and output o meet if i = s o + d k − l for a kernel position k. The last inputs must not meet the first
        outputs one round later, which the first inputs meet, and vice versa: r > I − 1 + l, and
        r + l − d(K−1) > s(O−1). For a transposed convolution, o = s i + d k − l.
        """
        if self.transposed:
            last = max(self.stride * (self.size - 1) + self.reach - self.left + 1, self.output + self.left)
            return max(self.size, -(-last // self.stride))
        last = max(self.size + self.left, self.stride * (self.output - 1) + self.reach + 1 - self.left)
        return -(-last // self.stride) * self.stride

    @property
    def gap(self) -> int:
        """Number of zeros between the last and the first input position."""
        return self.ring - self.size

    @property
    def sides(self) -> Sides:
        """The padding of the whole axis, so that every position meets only outputs that exist.

        It is negative on the right where a transposed convolution has more outputs than its input meets.
        """
        small, large = (self.size, self.output) if self.transposed else (self.output, self.size)
        right = self.stride * (small - 1) + self.reach + 1 - self.left - large
        return self.left, right if self.transposed else max(0, right)


@dataclass(frozen=True, slots=True)
class Band:
    """A band of an axis.

    Args:
        axis: the axis.
        start: the first position.
        count: number of positions.
    """

    axis: Axis
    start: int
    count: int

    @property
    def wraps(self) -> bool:
        """Whether the band continues at the first position."""
        return self._head > 0

    @property
    def _head(self) -> int:
        """Number of positions in the band after wrapping around."""
        return max(0, self.start + self.count - self.axis.size)

    @property
    def share(self) -> Fraction:
        """The fraction of the positions that the band contains."""
        return Fraction(self.count, self.axis.size)

    def positions(self, device: torch.device) -> Tensor:
        """The positions, in the order of the band."""
        return (self.start + torch.arange(self.count, device=device)) % self.axis.size

    @property
    def taken(self) -> Pieces:
        """The pieces of the input that the band consists of, from its start on."""
        return (self.start, self.count - self._head), (0, self._head)

    @property
    def placed(self) -> Pieces:
        """The pieces of the band of which the input consists, with zeros elsewhere."""
        tail, rest = self.count - self._head, self.axis.size - self.count
        return ((tail, self._head), rest, (0, tail)) if self.wraps else (self.start, (0, tail), rest - self.start)

    def meet(self) -> tuple[Pieces, Pieces, Sides] | None:
        """The pieces of the band and of the output gradient that meet, and the padding of their convolution.

        The result is None if the band meets no output. For a transposed convolution, the window is padded, not the
        band.
        """
        axis, tail = self.axis, self.count - self._head
        part: Pieces = ((0, tail), axis.gap, (tail, self._head)) if self.wraps else ((0, tail),)
        count = self.count + axis.gap * self.wraps
        if axis.transposed:
            first, period = axis.stride * self.start - axis.left, axis.stride * axis.ring
            return part, _window(axis.output, first, axis.stride * (count - 1) + axis.reach + 1, period), (0, 0)
        first = -((axis.reach - self.start - axis.left) // axis.stride)
        outputs = (self.start + count - 1 + axis.left) // axis.stride - first + 1
        if outputs <= 0:
            return None
        left = self.start + axis.left - axis.stride * first
        right = axis.stride * (outputs - 1) + axis.reach + 1 - left - count
        return part, _window(axis.output, first, outputs, axis.ring // axis.stride), (left, max(0, right))


def _window(size: int, first: int, count: int, period: int) -> Pieces:
    """The pieces at `count` positions from `first` on, of an axis that is followed by zeros and then repeats."""
    pieces: list[tuple[int, int] | int] = []
    while count:
        first %= period
        length = min(count, (size if first < size else period) - first)
        pieces.append((first, length) if first < size else length)
        first, count = first + length, count - length
    return tuple(pieces)


def joined(array: Tensor, pieces: Mapping[int, Pieces]) -> Tensor:
    """Join pieces along some axes of an array, in one pass over the result; a view if each axis has one piece."""
    shape, given = [*array.shape], []
    for axis, every in pieces.items():
        found = [piece for piece in every if _length(piece)]
        if len(found) == 1 and not isinstance(found[0], int):
            array = array.narrow(axis, *found[0])
            shape[axis] = found[0][1]
            continue
        shape[axis] = sum(map(_length, found))
        given.append((axis, found))
    if not given:
        return array
    order = sorted(range(array.ndim), key=lambda axis: array.stride(axis), reverse=True)
    result = array.new_empty([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(len(order))])
    for chosen in itertools.product(*(_placed(found) for _, found in given)):
        target, source = result, array
        for (axis, _), (start, piece) in zip(given, chosen, strict=True):
            target = target.narrow(axis, start, _length(piece))
            source = source if isinstance(piece, int) else source.narrow(axis, *piece)
        if any(isinstance(piece, int) for _, piece in chosen):
            target.zero_()
        else:
            target.copy_(source)
    return result


def _length(piece: tuple[int, int] | int) -> int:
    return piece if isinstance(piece, int) else piece[1]


def _placed(pieces: Sequence[tuple[int, int] | int]) -> list[tuple[int, tuple[int, int] | int]]:
    """The pieces with their first positions in the result."""
    starts = itertools.accumulate(map(_length, pieces), initial=0)
    return list(zip(starts, pieces, strict=False))


def axes_of(spec: ConvSpec) -> tuple[Axis, ...]:
    """The axes of a convolution; none if its padding mode is not "zeros"."""
    if spec.padding_mode != "zeros":
        return ()
    left = [sides[0] for sides in spec.padding]
    sizes = (spec.input_size, spec.output_size, spec.kernel_size, spec.stride, spec.dilation, left)
    found = zip(*sizes, strict=True)
    return tuple(Axis(i, o, k, stride, dilation, side, spec.transposed) for i, o, k, stride, dilation, side in found)


def cropped(array: Tensor, at: int, sides: Sides) -> tuple[Tensor, Sides]:
    """Remove the positions that negative padding removes, and return the padding that remains."""
    left, right = (max(0, -side) for side in sides)
    return array.narrow(at, left, array.shape[at] - left - right), (max(0, sides[0]), max(0, sides[1]))
