"""Times of several calls, measured together, and the memory of a call.

Times: all calls run in one process, interleaved, after a warm-up; the results are the minimum and the median. A call
starts with the caches that the previous call leaves, so the order changes between rounds until each call has followed
every other one. GPU times are from device events.

Memory on the CPU is the peak of torch's allocator while one call runs, from the allocations and releases that torch's
profiler records, ordered by time. It includes the result but not the operands, and is the same in every run. For all
implementations, it excludes memory that matrix-product libraries allocate outside torch. GPU memory is from torch's own
statistics.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TypeVar

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silence the profiler

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")
Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Times:
    """Times of repeated calls, in seconds."""

    seconds: tuple[float, ...]

    @property
    def minimum(self) -> float:
        """The shortest time."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The median time."""
        return statistics.median(self.seconds)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference divided by the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))


def bytes_of(tensor: torch.Tensor) -> int:
    """The size of a tensor's entries in bytes."""
    return tensor.numel() * tensor.element_size()


# -------------------------------------------------------------------------------------------------------------- memory
def peak_bytes(call: Callable[[], T]) -> tuple[int, T]:
    """The peak of torch's allocator during a call, beyond the memory before it, and the call's result."""
    peak, _, result = _traced(call)
    return peak, result


def extra_bytes(call: Call, device: torch.device) -> tuple[int, torch.Tensor]:
    """The peak memory besides operands and result, including memory that the first call retains, and the result.

    The call runs twice. Memory that the first call retains (cached constants) counts as if it were allocated again.
    Memory that only the first call needs (planning, and the runs of effort="measure") does not count.
    """
    traced = _traced if device.type == "cpu" else _cuda_traced
    _, alive, result = traced(call)
    kept = max(alive - bytes_of(result), 0)
    del result
    peak, _, result = traced(call)
    return max(peak - bytes_of(result), 0) + kept, result


def _traced(call: Callable[[], T]) -> tuple[int, int, T]:
    """The peak memory during a call, the memory after it, and its result."""
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
    return peak, alive, result


def _cuda_traced(call: Call) -> tuple[int, int, torch.Tensor]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before, result


# --------------------------------------------------------------------------------------------------------------- times
@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's number of threads within the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_BUSY = "import os, sys\nparent = int(sys.argv[1])\nwhile os.getppid() == parent:\n    sum(range(100_000))"


@contextmanager
def neighbours(per_core: int) -> Iterator[None]:
    """Keep each core busy with this many other processes within the `with` block; they end with this process, too."""
    command = [sys.executable, "-c", _BUSY, str(os.getpid())]
    running = [subprocess.Popen(command) for _ in range(per_core * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def interleaved(
    calls: Sequence[Call], seconds: float, least: int = 5, most: int = 40, device: torch.device | None = None
) -> list[Times]:
    """Time warm calls, interleaved.

    A call that has used up its time is left out of further rounds. The first call, with which the others are compared,
    runs in all rounds, so that it has at least as many as the others.

    Args:
        calls: the calls to time.
        seconds: time budget of each call over all rounds.
        least: minimum number of rounds, regardless of time.
        most: maximum number of rounds.
        device: device of the calls; the CPU by default.
    """
    once = _cuda_seconds if device is not None and device.type == "cuda" else _seconds
    found: list[list[float]] = [[] for _ in calls]
    orders = balanced_orders(len(calls))
    left = set(range(len(calls)))
    rounds = 0
    gc.collect()
    gc.disable()
    try:
        while left:
            for side in orders[rounds % len(orders)]:
                if side in left or side == 0:
                    found[side].append(once(calls[side]))
            rounds += 1
            if rounds >= least:
                left = {side for side in left if rounds < most and sum(found[side]) < seconds}
    finally:
        gc.enable()
    return [Times(tuple(one)) for one in found]


def balanced_orders(count: int) -> tuple[tuple[int, ...], ...]:
    """Orders of calls in which each call follows every other one equally often.

    Example:
        >>> from lensor_bench.measure import balanced_orders
        >>> balanced_orders(4)
        ((0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1))

    Equation:
        Williams (1949): 0, 1, n−1, 2, n−2, … shifted by 0 to n−1; for odd n also in reverse.
    """
    first = [at // 2 + 1 if at % 2 else (count - at // 2) % count for at in range(count)]
    orders = [tuple((at + shift) % count for at in first) for shift in range(count)]
    return (*orders, *(order[::-1] for order in orders if count % 2))


def _seconds(call: Call) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def _cuda_seconds(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
