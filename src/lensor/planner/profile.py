"""Profiles of devices: the rates and durations on which estimates are based."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple


class Speed(NamedTuple):
    """The speed of one kind of calls: a call with f flops takes `setup` + f / `rate` seconds.

    Args:
        rate: flops per second of large calls.
        setup: seconds that a call takes in addition, which dominate small calls.
    """

    rate: float
    setup: float = 0.0


@dataclass(frozen=True, slots=True)
class Speeds:
    """The speeds of a device for one dtype.

    Args:
        products: products of two matrices.
        batched: products of two batches of matrices.
        forward: convolutions without groups.
        input_grad: gradients of convolutions with respect to the input, without groups.
        weight_grad: gradients of convolutions with respect to the weight, without groups.
        grouped: convolutions with groups of several channels, and their gradients.
        depthwise: convolutions with groups of one channel, and their gradients.
    """

    products: Speed
    batched: Speed
    forward: Speed
    input_grad: Speed
    weight_grad: Speed
    grouped: Speed
    depthwise: Speed


@dataclass(frozen=True, slots=True)
class Machine:
    """The profile of a device.

    Args:
        name: name of the device.
        threads: number of threads; 1 for a GPU, whose calls have no barriers that a plan could avoid.
        memory: bytes per second read or written in arrays that exceed `cache_bytes`.
        cache: the same for smaller arrays.
        cache_bytes: size of the largest cache.
        faults: how many times as long it takes to write to memory that is new to the process.
        call: seconds of a call of the framework, without its work.
        barrier: seconds of a call with several threads in addition, until all of them have finished.
        speeds: the speeds for each dtype, by name; float32 is required.

    Raises:
        ValueError: if a rate is not positive, a duration is negative, or the speeds for float32 are missing.

    Example:
        >>> import lensor
        >>> print(lensor.machine("cpu").name)
        two-core CPU
    """

    name: str
    threads: int
    memory: float
    cache: float
    cache_bytes: int
    faults: float
    call: float
    barrier: float
    speeds: Mapping[str, Speeds] = field(hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "speeds", MappingProxyType(dict(self.speeds)))
        if "float32" not in self.speeds:
            raise ValueError(f"speeds has the dtypes {sorted(self.speeds)}, expected at least float32")
        rates = {"memory": self.memory, "cache": self.cache, "threads": self.threads, "faults": self.faults}
        times = {"call": self.call, "barrier": self.barrier, "cache_bytes": self.cache_bytes}
        for dtype, speeds in self.speeds.items():
            for kind in Speeds.__dataclass_fields__:
                speed: Speed = getattr(speeds, kind)
                rates[f"the rate of {kind} in {dtype}"], times[f"the set-up time of {kind} in {dtype}"] = speed
        for name, value in (rates | times).items():
            if not math.isfinite(value) or value < 0 or (name in rates and value == 0):
                least = "a positive" if name in rates else "a non-negative"
                raise ValueError(f"{name} is {value}, expected {least} finite number")

    def __reduce__(self) -> tuple:
        parts = (self.name, self.threads, self.memory, self.cache, self.cache_bytes, self.faults, self.call)
        return Machine, (*parts, self.barrier, dict(self.speeds))

    def speeds_of(self, dtype: str) -> Speeds:
        """The speeds for a dtype; those of float32 for dtypes that were not measured.

        Example:
            >>> import lensor
            >>> cpu = lensor.machine("cpu")
            >>> cpu.speeds_of("complex64") == cpu.speeds_of("float32")
            True
        """
        return self.speeds.get(dtype) or self.speeds["float32"]

    def __str__(self) -> str:
        lines = [
            f"{self.name}, {self.threads} threads",
            f"memory {self.memory / 1e9:.1f} GB/s, {self.cache / 1e9:.1f} GB/s up to {self.cache_bytes / 2**20:.0f} MB",
            f"call {self.call * 1e6:.1f} µs, barrier {self.barrier * 1e6:.1f} µs",
        ]
        for dtype, speeds in self.speeds.items():
            every = ((name, getattr(speeds, name)) for name in Speeds.__dataclass_fields__)
            lines.append(f"{dtype}, Gflop/s: " + ", ".join(f"{name} {speed.rate / 1e9:.0f}" for name, speed in every))
        return "\n".join(lines)


@cache
def processor() -> str:
    """The name of the processor, or of its architecture if the system does not provide the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
