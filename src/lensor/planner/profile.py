"""The machine constants on which estimates are based."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class Machine:
    """The constants of a machine: rates per second, and the duration of a call.

    Args:
        products: flops per second of a large matrix product.
        convolutions: flops per second of a framework's convolution with many channels.
        bytes: bytes read or written per second in a copy.
        call: duration of a small operation in seconds.

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
"""Rates of two server cores in single precision; all machines use these constants unless you call `calibrate`."""

_machine = _TYPICAL


def machine() -> Machine:
    """Return the constants used for estimates: typical constants, or those measured by `calibrate`.

    Example:
        >>> import lensor
        >>> print(lensor.machine())
        matrix products 100.0 Gflop/s, convolutions 95.0 Gflop/s, copies 8.0 GB/s, 4.0 µs a call
    """
    return _machine


def calibrate() -> Machine:
    """Measure the constants of this machine with NumPy (about 30 ms) and use them for the rest of the process.

    Previously chosen plans do not change. Without calibration, estimates are deterministic.

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
    """The name of the processor, or of its architecture if the system does not provide the name."""
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
