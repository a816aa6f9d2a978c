"""Gram matrices of patches, computed without forming the patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import ClassVar

from lensor.pattern import IndexPattern
from lensor.plan.steps.base import Laid, Rate, Shape, Step

_CALLS_PER_CORRECTION = 12
"""Number of small operations per correction of a patch Gram matrix."""

_LAG_BLOCK = 256
"""Channels per block: small blocks need less memory, large blocks have faster products."""


@dataclass(frozen=True, slots=True)
class Border:
    """Input positions excluded by some kernel offsets, which do not read these positions at any output.

    Args:
        fixed: an (axis, position) pair for each axis with a fixed position; all positions of the other axes are
            included.
        sign: sign with which the correction is added.
        offsets: the kernel offsets k that exclude the positions.
        low: the lowest lag l − k along each axis, for these k.
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

    The step requires stride 1 and does not form patches: Σ_o Π[i,o,k] Π[j,o,l] = [j − i = (l−k)·D]·m[i,k] (rule 20), so
    entry (k, l) is the autocorrelation at lag (l−k)·D without the positions that m excludes. The step computes one
    matrix product for each lag (up to sign) on rows separated by zeros, and thin products for the excluded rows.
    """

    name: ClassVar[str] = "patch gram"
    adds_in_several: ClassVar[bool] = True
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
        """The number of zeros appended to each axis, which is the largest lag."""
        return tuple(pattern.dilation * (pattern.kernel_size - 1) for pattern in self.patterns)

    def lags(self) -> list[Shape]:
        """All differences l − k of kernel positions."""
        return list(product(*(range(1 - k, k) for k in self.kernel)))

    def excluded(self) -> list[dict[int, list[int]]]:
        """For each axis, a map from excluded input positions i to the kernel positions k with m[i,k] = 0."""
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
        """The number of channel blocks; the products of two blocks for all lags are alive at once."""
        return -(-channels // _LAG_BLOCK)

    def borders(self) -> list[Border]:
        """The corrections to sums over all positions: products at excluded positions, by inclusion-exclusion."""
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

    def scratch(self, taken: Sequence[Laid], result: Shape) -> int:
        """Entries of the padded row, and of the products of two channel blocks for all lags or for a border."""
        n, g, c, *sizes = taken[0].shape
        row = n * g * c * math.prod(size + pad for size, pad in zip(sizes, self.pad, strict=True))
        if c == 1:
            return row + row
        blocks = self.blocks(c)
        block, lags = -(-c // blocks), len(self.lags())
        most = g * block**2 * (lags if blocks > 1 else (lags + 1) // 2)
        for border in self.borders():
            lines = padded = n * g * block
            for axis, (size, pad) in enumerate(zip(sizes, self.pad, strict=True)):
                if axis in dict(border.fixed):
                    padded *= border.count[axis]
                else:
                    lines, padded = lines * size, padded * (size + 2 * pad)
            count = math.prod(border.count)
            most = max(most, lines * count + padded, lines * (1 + count) + g * block**2 * count)
        return row + most

    def rate(self, shapes: Sequence[Shape], result: Shape) -> Rate:
        channels = shapes[0][2]
        return Rate("products", 0.7 * (0.03 if channels == 1 else min(1.0, channels / 16)))

    def rewrites(self, shapes: Sequence[Shape], result: Shape) -> float:
        # Each entry of the result is written once for each border that affects it, one pair of offsets per call.
        return 1 + sum(len(border.offsets) for border in self.borders()) / math.prod(self.kernel)

    def calls(self, shapes: Sequence[Shape], result: Shape) -> float:
        offsets = math.prod(self.kernel)
        corrections = _CALLS_PER_CORRECTION * len(self.borders())
        return len(self.lags()) + self.rewrites(shapes, result) * offsets**2 / 2 + corrections
