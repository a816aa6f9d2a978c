"""The step for a framework's convolution and its gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lensor.plan.steps.base import SCATTERED, Laid, Rate, Shape, Step, contiguous

_LARGE_KERNEL = 196
"""Frameworks have no fast algorithm for more kernel positions than this."""

_WIDE_KERNEL = 8
"""Convolutions whose kernel has at least this many positions are slower if the kernel is larger than the output."""

_POSITIONS = 300
"""A weight gradient reaches its full rate with at least this many positions, over all examples."""


@dataclass(frozen=True, slots=True)
class Convolution(Step):
    """A framework's convolution or one of its gradients: contracts two of (input, kernel, output) to the third.

    forward: [N, G·Cin, *I], [G·Cout, Cin, *K] -> [N, G·Cout, *O];
    input_grad: [N, G·Cout, *O], [G·Cout, Cin, *K] -> [N, G·Cin, *I];
    weight_grad: [N, G·Cin, *I], [N, G·Cout, *O] -> [G·Cout, Cin, *K].
    """

    name: ClassVar[str] = "convolution"
    resized: ClassVar[tuple[str, ...]] = ("groups", "size")
    is_product: ClassVar[bool] = True
    kind: str
    stride: Shape
    padding: Shape
    dilation: Shape
    groups: int
    size: Shape

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.size

    def fixed(self, rank: int) -> Iterable[int]:
        return range(2, rank)

    def fits(self, shapes: Sequence[Shape], result: Shape) -> bool:
        a, b = shapes
        if self.kind == "forward":
            return result[:2] == (a[0], b[0]) and a[1] == self.groups * b[1]
        if self.kind == "input_grad":
            return result[:2] == (a[0], self.groups * b[1]) and a[1] == b[0]
        return (result[0], self.groups * result[1], a[0]) == (b[1], a[1], b[0])

    def flops(self, shapes: Sequence[Shape], result: Shape) -> int:
        a, b = shapes
        if self.kind == "forward":
            return 2 * math.prod(result) * math.prod(b[1:])
        if self.kind == "input_grad":
            return 2 * math.prod(a) * math.prod(b[1:])
        return 2 * math.prod(b) * math.prod(result[1:])

    def kernel(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of the kernel, [G·Cout, Cin, *K]; the kernel is an operand or the result."""
        return self.size if self.kind == "weight_grad" else shapes[1]

    def settings(self) -> str:
        return (
            f"{self.kind}, stride {self.stride}, padding {self.padding}, dilation {self.dilation}, groups {self.groups}"
        )

    def traffic(self, taken: Sequence[Laid], result: Shape) -> int:
        # Frameworks first copy operands into row-major order.
        shapes = [one.shape for one in taken]
        transposed = [one.shape for one in taken if one.strides != contiguous(one.shape)]
        moved = (1 + SCATTERED) * sum(map(math.prod, transposed))
        if self.groups == 1 and self.kind != "weight_grad" and set(self.kernel(shapes)[2:]) == {1}:
            # They also copy images to blocks of channels and back; for larger kernels, the rate includes this.
            moved += math.prod(shapes[0]) + math.prod(result)
        return moved

    def rate(self, shapes: Sequence[Shape], result: Shape) -> Rate:
        channels, inner, *kernel = self.kernel(shapes)
        if self.kind == "forward" and inner == 1 < channels // self.groups and self._is_swapped(kernel, result):
            return self._single(channels // self.groups, kernel, shapes)
        return Rate(self._speed(shapes), self._share(shapes, result))

    def _speed(self, shapes: Sequence[Shape]) -> str:
        if self.groups == 1:
            return self.kind
        channels, inner, *_ = self.kernel(shapes)
        return "depthwise" if min(channels // self.groups, inner) == 1 else "grouped"

    def _is_swapped(self, kernel: Sequence[int], result: Shape) -> bool:
        """Whether the kernel is larger than the output, as in gradients computed with kernel and output swapped."""
        return math.prod(result[2:]) < math.prod(kernel) >= _WIDE_KERNEL

    def _single(self, channels: int, kernel: Sequence[int], shapes: Sequence[Shape]) -> Rate:
        """The speed of a swapped convolution of one input channel: a product over the positions of the kernel."""
        positions = math.prod(kernel)
        if self.groups == 1:
            return Rate("forward", min(0.85, positions / 250) * (1.0 if shapes[0][0] >= 16 else 0.5))
        return Rate("grouped", 0.5 * min(1.0, positions / 150) * min(1.0, max(channels / 100, 0.12)))

    def _share(self, shapes: Sequence[Shape], result: Shape) -> float:
        """The rate as a multiple of the one in the profile: low for few channels per group or huge kernels."""
        channels, inner, *kernel = self.kernel(shapes)
        if self._speed(shapes) == "depthwise":
            return self._depthwise(kernel, shapes, result)
        share = 0.3 if math.prod(kernel) > _LARGE_KERNEL else 1.0
        if self._is_swapped(kernel, result):
            share *= 0.4
        if self.kind == "weight_grad":  # sums over few positions are slow
            share *= min(1.0, shapes[1][0] * math.prod(shapes[1][2:]) / _POSITIONS)
            share *= 0.1 * min(1.0, channels / 16) if self.groups == 1 == inner else 1.0
            share *= 0.6 if self.groups == 1 == shapes[1][0] else 1.0  # each thread processes one example or group
            share *= self._line(kernel)
        if self.groups == 1:
            if self.kind != "input_grad":
                return share
            if set(self.stride) != {1}:  # entries that no output reads are written, too
                share *= 0.35 if set(kernel) == {1} else 0.7
            return share * (0.4 if inner < 16 else 1.0)
        return share * min(1.0, 0.4 + min(channels // self.groups, inner) / 90)

    def _depthwise(self, kernel: Sequence[int], shapes: Sequence[Shape], result: Shape) -> float:
        """The same for groups of one channel: larger kernels are faster than the 3×3 kernels of the profile."""
        one_step = set(self.stride) == {1}
        if self.kind == "weight_grad":
            if max(kernel, default=1) > 3:
                return 0.13 * self._line(kernel)
            several = self.kernel(shapes)[0] > self.groups  # each input channel has several output channels
            return (0.25 if not one_step else 0.45 if several else 0.75) * self._line(kernel)
        if not one_step:
            return 0.25
        swapped = self._is_swapped(kernel, result)
        if self.kernel(shapes)[1] > 1:  # several channels contribute to one
            return 0.12 if swapped else 1.0
        if not swapped:
            return 2.5 if min(kernel, default=1) >= 5 else 1.0
        if set(self.dilation) != {1}:
            return 0.1
        return 2.0 if min(result[2:]) >= 5 else 0.7

    def _line(self, kernel: Sequence[int]) -> float:
        """With groups, gradients of kernels along one axis are slower."""
        line = sorted(kernel)[:-1] == [1] * (len(kernel) - 1)
        return 0.6 if self.groups > 1 and line and max(kernel) > 1 else 1.0
