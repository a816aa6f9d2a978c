"""Values, times and memory of one factor of one convolution, computed in two ways.

Lensor's caches are cleared before memory is traced, so that cached constants count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lensor_bench import standard
from lensor_bench.measure import Times, interleaved, peak_bytes, relative_error

import lensor
from lensor.choices import Approx
from lensor.inspect.layers import Layer


@dataclass(frozen=True)
class Comparison:
    """Lensor compared with the standard implementation for one factor of one convolution."""

    layer: Layer
    approx: Approx
    error: float
    lensor: Times
    standard: Times
    lensor_peak: int
    standard_peak: int

    @property
    def median_ratio(self) -> float:
        """Lensor's median time divided by the standard implementation's; below 1, Lensor is faster."""
        return self.lensor.median / self.standard.median

    @property
    def minimum_ratio(self) -> float:
        """The same ratio for the shortest times."""
        return self.lensor.minimum / self.standard.minimum

    @property
    def memory_ratio(self) -> float:
        """Lensor's peak memory divided by the standard implementation's."""
        return self.lensor_peak / self.standard_peak


def lensor_factor(x: torch.Tensor, spec: lensor.ConvSpec, approx: Approx) -> torch.Tensor:
    """The factor, computed by Lensor."""
    return lensor.functional.kfac_input_factor(
        x,
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.dilation,
        spec.groups,
        approx=approx,
        padding_mode=spec.padding_mode,
    )


def standard_factor(x: torch.Tensor, spec: lensor.ConvSpec, approx: Approx) -> torch.Tensor:
    """The factor, computed by torch: pad, unfold, one matrix product per group."""
    return standard.WAYS[f"kfac_{approx}"]({"X": x}, spec)


def compare(layer: Layer, x: torch.Tensor, approx: Approx, seconds: float, least: int) -> Comparison:
    """Compute and compare one factor of one convolution in both ways."""

    def mine() -> torch.Tensor:
        return lensor_factor(x, layer.spec, approx)

    def theirs() -> torch.Tensor:
        return standard_factor(x, layer.spec, approx)

    with torch.no_grad():
        lensor.clear_caches()
        (lensor_peak, found), (standard_peak, expected) = peak_bytes(mine), peak_bytes(theirs)  # this also warms up
        error = relative_error(found, expected)
        del found, expected
        one, two = interleaved((mine, theirs), seconds / 2, least)
    return Comparison(layer, approx, error, one, two, lensor_peak, standard_peak)
