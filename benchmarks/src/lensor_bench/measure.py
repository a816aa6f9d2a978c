"""Times of several calls side by side, and the memory that a call takes.

Times: all calls in one process, interleaved, after a warm-up; minimum and median. What a call leaves in the caches is
the next one's start, so the order changes from round to round until each call has come right after each other one. On
a GPU by device events.

Memory on the CPU: the most bytes that are alive at once in torch's allocator while one call runs, from the allocations
and releases that torch's profiler records, in the order of their times. Operands are not counted, the result is. It is
the same in every run. What a matrix-product library takes behind torch's back is not seen, for no implementation. On a
GPU: torch's own statistics.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own messages

import torch
from torch.profiler import ProfilerActivity, profile

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


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, over the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))


def bytes_of(tensor: torch.Tensor) -> int:
    """The bytes of a tensor's entries."""
    return tensor.numel() * tensor.element_size()


# -------------------------------------------------------------------------------------------------------------- memory
def peak_bytes(call: Call) -> tuple[int, torch.Tensor]:
    """The most bytes alive at once in torch's allocator during a call, beyond those alive before it; its result."""
    peak, _, result = _traced(call)
    return peak, result


def extra_bytes(call: Call, device: torch.device) -> tuple[int, torch.Tensor]:
    """The most bytes alive at once beside the operands, less the result's, with what the first call leaves for later.

    The call is run twice: what the first leaves behind (constants that are kept) is counted as if it were made anew,
    what only the first needs (planning, and the runs of effort="measure") is not.
    """
    traced = _traced if device.type == "cpu" else _cuda_traced
    _, alive, result = traced(call)
    kept = max(alive - bytes_of(result), 0)
    del result
    peak, _, result = traced(call)
    return max(peak - bytes_of(result), 0) + kept, result


def _traced(call: Call) -> tuple[int, int, torch.Tensor]:
    """The most bytes alive at once during a call, those alive after it, and its result."""
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
    """So many threads for torch while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    calls: Sequence[Call], seconds: float, least: int = 5, most: int = 40, device: torch.device | None = None
) -> list[Times]:
    """Times of warm calls, interleaved.

    A call that has had its time leaves the rounds; the first, with which the others are compared, stays to the end, so
    that it has as many rounds as any.

    Args:
        calls: what is timed.
        seconds: how long each call is timed, all its rounds together.
        least: the least number of rounds, whatever they take.
        most: the most.
        device: where the calls run, the CPU unless given.
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
    """PathCosts of so many calls in which each comes right after each other one equally often.

    Example:
        >>> from lensor_bench.measure import balanced_orders
        >>> balanced_orders(4)
        ((0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1))

    Equation:
        Williams (1949): 0, 1, n−1, 2, n−2, … shifted by 0 to n−1; for odd n the same backwards, too.
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
