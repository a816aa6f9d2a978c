"""One factor of one convolution in two ways: values, times and memory.

Times: both sides in one process, interleaved, in turns first and second, after a warm-up; minimum and median.

Memory: the most bytes that are alive at once in torch's allocator while one call runs, from the allocations and
releases that torch's profiler records, in the order of their times; the input is not counted, the result is. It is the
same in every run. Lensor's caches are emptied before, so that the constants it keeps are counted too. What a
matrix-product library takes behind torch's back is not seen, on either side.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own messages

import torch
from torch.profiler import ProfilerActivity, profile

import lensor
from lensor.bench.layers import Layer

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Times:
    """Seconds of repeated calls."""

    seconds: tuple[float, ...]

    @property
    def minimum(self) -> float:
        """The shortest."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """Lensor's way against the standard way for one factor of one convolution."""

    layer: Layer
    approx: str
    error: float
    lensor: Times
    standard: Times
    lensor_peak: int
    standard_peak: int

    @property
    def median_ratio(self) -> float:
        """Lensor's median time over the standard way's: below 1, Lensor is faster."""
        return self.lensor.median / self.standard.median

    @property
    def minimum_ratio(self) -> float:
        """The same for the shortest times."""
        return self.lensor.minimum / self.standard.minimum

    @property
    def memory_ratio(self) -> float:
        """Lensor's peak memory over the standard way's."""
        return self.lensor_peak / self.standard_peak


def lensor_factor(x: torch.Tensor, spec: lensor.ConvSpec, approx: str) -> torch.Tensor:
    """The factor by Lensor."""
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


def standard_factor(x: torch.Tensor, spec: lensor.ConvSpec, approx: str) -> torch.Tensor:
    """The factor by torch: pad, unfold, one matrix product for each group."""
    pads = spec.padding
    even = all(left == right >= 0 for left, right in pads) and spec.padding_mode == "zeros"
    if not even:
        mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
        x = torch.nn.functional.pad(x, [width for pair in reversed(pads) for width in pair], mode=mode)
    padding = tuple(left for left, _ in pads) if even else 0
    patches = torch.nn.functional.unfold(x, spec.kernel_size, spec.dilation, padding, spec.stride)
    batch, positions = patches.shape[0], patches.shape[2]
    patches = patches.reshape(batch, spec.groups, -1, positions)
    if approx == "reduce":
        patches = patches.mean(3).permute(1, 2, 0)
    else:
        patches = patches.permute(1, 2, 0, 3).reshape(spec.groups, -1, batch * positions)
    return (patches @ patches.mT).div_(batch)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, over the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))


def peak_bytes(call: Call) -> tuple[int, torch.Tensor]:
    """The most bytes alive at once in torch's allocator during a call, beyond those alive before it; its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    alive = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak, result


def times(one: Call, two: Call, seconds: float, least: int = 5, most: int = 40) -> tuple[Times, Times]:
    """Times of two warm calls, interleaved: at least `least` pairs, more while they take less than `seconds`."""
    found: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        end = perf_counter() + seconds
        while len(found[0]) < least or (len(found[0]) < most and perf_counter() < end):
            for side in (0, 1) if len(found[0]) % 2 == 0 else (1, 0):
                start = perf_counter()
                (one, two)[side]()
                found[side].append(perf_counter() - start)
    finally:
        gc.enable()
    return Times(tuple(found[0])), Times(tuple(found[1]))


def compare(layer: Layer, x: torch.Tensor, approx: str, seconds: float, least: int) -> Comparison:
    """One factor of one convolution in both ways."""

    def mine() -> torch.Tensor:
        return lensor_factor(x, layer.spec, approx)

    def theirs() -> torch.Tensor:
        return standard_factor(x, layer.spec, approx)

    with torch.no_grad():
        lensor.clear_caches()
        (lensor_peak, found), (standard_peak, expected) = peak_bytes(mine), peak_bytes(theirs)  # and the warm-up
        error = relative_error(found, expected)
        del found, expected
        one, two = times(mine, theirs, seconds, least)
    return Comparison(layer, approx, error, one, two, lensor_peak, standard_peak)
