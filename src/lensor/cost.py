"""What plans cost: an estimate of time from flops, bytes moved and a few machine constants."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from lensor import steps as s
from lensor.layout import Value, contiguous, layouts, put_in_order, step_copies
from lensor.layout import moved as moved_entries
from lensor.plan import Plan


@dataclass(frozen=True, slots=True)
class Machine:
    """A few constants of the machine, in units per second (seconds for `call`).

    Args:
        products: flops of a large matrix product.
        convolutions: flops of a framework's convolution with many channels.
        bytes: bytes copied (read and written).
        call: seconds of one small operation.

    Example:
        >>> import lensor
        >>> laptop = lensor.Machine(products=200e9, convolutions=150e9, bytes=20e9)
        >>> print(laptop)
        matrix products 200.0 Gflop/s, convolutions 150.0 Gflop/s, copies 20.0 GB/s, 4.0 µs a call
    """

    products: float
    convolutions: float
    bytes: float
    call: float = 4e-6

    def __str__(self) -> str:
        return (
            f"matrix products {self.products / 1e9:.1f} Gflop/s, convolutions {self.convolutions / 1e9:.1f} Gflop/s, "
            f"copies {self.bytes / 1e9:.1f} GB/s, {self.call * 1e6:.1f} µs a call"
        )


_TYPICAL = Machine(products=100e9, convolutions=95e9, bytes=8e9)
"""What two cores of a server reach in single precision: estimates are the same everywhere until `calibrate`."""

_LARGE_KERNEL = 196
"""Positions of a kernel from which on frameworks have no fast way."""

_CALLS_PER_CORRECTION = 12
"""Small operations for one excluded position of a patch Gram matrix."""

_SHORT_RUN, _SCATTERED = 16, 3
"""Copying in runs shorter than this moves so many entries more for each."""

_SINGLE = 4
"""Entries that are read one by one move so many entries more for each."""

_WIDE_KERNEL = 8
"""Kernels of this many positions that are larger than the output are slower than others."""

_NEAR = 1 << 23
"""Values of fewer bytes than this stay in a cache, which halves what moving them takes."""

_POSITIONS = 300
"""Positions of all examples together from which on a gradient by the weight reaches its rate."""

_FRESH, _FAULTS = 1 << 26, 3
"""Bytes from which on memory comes fresh from the system, and how many times as long it takes to write to then."""

_KEPT = 1 << 18
"""Entries of a matrix that stays in a cache while a batch is worked through."""

_machine = _TYPICAL


def machine() -> Machine:
    """The constants that estimates are made with: typical ones, or those `calibrate` measured.

    Example:
        >>> import lensor
        >>> print(lensor.machine())
        matrix products 100.0 Gflop/s, convolutions 95.0 Gflop/s, copies 8.0 GB/s, 4.0 µs a call
    """
    return _machine


def calibrate() -> Machine:
    """Measure the constants of this machine (about 30 ms, with NumPy) and use them in this process from now on.

    Plans that were chosen before stay as they are. Without a calibration estimates are deterministic.

    Example:
        >>> import lensor
        >>> lensor.calibrate().products > 0  # doctest: +SKIP
        True
    """
    global _machine
    a = np.ones((384, 384), np.float32)
    products = 2 * 384**3 / _shortest(lambda: a @ a)
    x = np.ones(1 << 21, np.float32)
    copies = 2 * x.nbytes / _shortest(lambda: x.copy())
    _machine = Machine(products, 0.95 * products, copies)
    return _machine


@cache
def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _shortest(function: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


# ------------------------------------------------------------------------------------------------------------ estimates
def estimate(plan: Plan, constants: Machine, itemsize: int = 4) -> float:
    """Estimated seconds: flops at the rate of the step, bytes that are moved, calls."""
    values, entries = layouts(plan.steps, plan.shapes), moved_entries(plan.steps, plan.shapes, plan.result)
    total = 0.0
    for place, step in enumerate(plan.steps):
        shapes, moved = [plan.shapes[at] for at in step.takes], float(entries[place])
        if isinstance(step, s.Reshape) and values[place].copied and _run(plan, values, step.takes[0]) < _SHORT_RUN:
            moved += _SCATTERED * math.prod(plan.shapes[place])
        if place == plan.result and _run(plan, values, place) < _SHORT_RUN:
            moved += _SCATTERED * put_in_order(plan.shapes, values, place)
        if isinstance(step, s.Read):
            row = math.prod(shapes[0][step.axis + len(step.axes) :])
            moved += math.prod(shapes[0]) + (_SINGLE * math.prod(plan.shapes[place]) if row == 1 else 0)
        if isinstance(step, s.OverlapAdd):
            moved += _SCATTERED * sum(math.prod(shape) for shape in shapes)
        if isinstance(step, s.MatMul):
            moved += _repeated(shapes)
        if isinstance(step, s.Convolution):  # frameworks bring operands into row-major order first
            transposed = [at for at in step.takes if values[at].strides != contiguous(plan.shapes[at])]
            moved += (1 + _SCATTERED) * sum(math.prod(plan.shapes[at]) for at in transposed)
        if isinstance(step, (s.MatMul, s.Gram)):
            moved += 2 * step_copies(step, [(plan.shapes[at], values[at].strides) for at in step.takes])[0]
        size = math.prod(plan.shapes[place])
        if values[place].copied and size * itemsize >= _FRESH:
            moved += (_FAULTS - 1) * size
        elif size * itemsize < _NEAR:
            moved /= 2
        work = step.flops(shapes, plan.shapes[place]) / max(_rate(step, shapes, plan.shapes[place], constants), 1.0)
        calls = 0.25 if not values[place].copied else 1
        if isinstance(step, s.PatchGram):
            # Every entry of the result is written for every border that concerns it, one pair of offsets a call.
            offsets, borders = math.prod(step.kernel), step.borders()
            passes = 1 + sum(len(border.offsets) for border in borders) / offsets
            moved += 2 * passes * math.prod(plan.shapes[place])
            calls = len(step.lags()) + passes * offsets**2 / 2 + _CALLS_PER_CORRECTION * len(borders)
        total += work + moved * itemsize / constants.bytes + calls * constants.call
    return total


def _run(plan: Plan, values: Sequence[Value], place: int) -> int:
    """Entries that lie side by side in memory when a value is read in the order of its axes."""
    run = 1
    for size, stride in zip(reversed(plan.shapes[place]), reversed(values[place].strides), strict=True):
        if size > 1:
            if stride != run:
                break
            run *= size
    return run


def _repeated(shapes: Sequence[s.Shape]) -> int:
    """Entries of a factor that are read again for every entry of the other's batch, if it is too large to be kept."""
    batches = [math.prod(shape[:-2]) for shape in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    most = max(batches)
    return sum((most - 1) * size for batch, size in zip(batches, sizes, strict=True) if batch == 1 and size > _KEPT)


def _rate(step: s.Step, shapes: list[s.Shape], result: s.Shape, constants: Machine) -> float:
    match step:
        case s.MatMul():
            (*_, m, k), (*_, n) = shapes[0], shapes[1]
            # Products with a short side do not reach the rate of large ones.
            return constants.products * min(1.0, m / 16, n / 16, max(k / 16, 0.1))
        case s.Gram():
            *_, m, k = shapes[0]
            return constants.products * min(1.0, m / 16, max(k / 16, 0.1))
        case s.PatchGram():
            return 0.7 * constants.products * (0.03 if shapes[0][2] == 1 else min(1.0, shapes[0][2] / 16))
        case s.Convolution(groups=groups):
            # Frameworks reach their rate with few channels, too, but not with few in a group, or with huge kernels.
            channels, inner, *kernel = step.kernel(shapes)
            rate = constants.convolutions * (0.3 if math.prod(kernel) > _LARGE_KERNEL else 1.0)
            if math.prod(result[2:]) < math.prod(kernel) >= _WIDE_KERNEL:  # a swapped convolution
                rate *= 0.4
            if step.kind == "weight_grad":  # few positions are little to sum over
                rate *= min(1.0, shapes[1][0] * math.prod(shapes[1][2:]) / _POSITIONS)
                rate *= 0.1 if groups == 1 == inner else 1.0
                rate *= 0.6 if groups == 1 == shapes[1][0] else 1.0  # threads work on an example or group each
                line = sorted(kernel)[:-1] == [1] * (len(kernel) - 1)
                rate *= 0.6 if groups > 1 and line and max(kernel) > 1 else 1.0
            if groups == 1:
                return rate if step.kind != "input_grad" else rate * (0.35 if inner < 16 else 0.85)
            few = min(channels // groups, inner)
            return rate * (min(0.9, 0.35 + few / 100) if few > 1 else 0.12 if set(step.stride) == {1} else 0.03)
    return constants.products / 16
