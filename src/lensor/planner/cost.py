"""The cost model, which estimates the time of a plan from flops, bytes moved and a few machine constants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lensor.plan import Plan
from lensor.plan import steps as s
from lensor.plan.memory import Value, put_in_order
from lensor.planner.profile import Machine, Speed

_FRESH = 1 << 25
"""Arrays with at least this many bytes use new memory from the system."""

_FIRST_CALLS = 10
"""Each part of a plan but one takes as long as this many calls in addition, since its data are not in the cache yet."""


def estimate(plan: Plan, device: Machine, itemsize: int = 4, dtype: str = "float32", parts: int = 1) -> float:
    """Estimate the time of a plan in seconds; with `parts`, the time of a plan of this many parts like `plan`."""
    seconds = parts * sum(step_times(plan, device, itemsize, dtype))
    within = 1 if plan.parts is None else plan.parts[1]
    return seconds + (parts * within - 1) * _FIRST_CALLS * device.call


def step_times(plan: Plan, device: Machine, itemsize: int = 4, dtype: str = "float32") -> Iterator[float]:
    """Estimate the time of each step in seconds, from flops at the step's rate, bytes moved, calls and barriers."""
    values, entries = plan.layouts, plan.moved
    speeds = device.speeds_of(dtype)
    kept, skipped = plan.constants
    for place, step in enumerate(plan.steps):
        if place in kept or place in skipped:  # computed once
            yield device.call / 4
            continue
        result, copied = plan.shapes[place], values[place].copied
        if step.is_view and not copied and place != plan.result:
            yield device.call / 4
            continue
        shapes = [plan.shapes[at] for at in step.takes]
        taken = [s.Laid(plan.shapes[at], values[at].strides) for at in step.takes]
        moved, size = float(entries[place]), math.prod(result)
        if step.is_view and copied and _run(plan, values, step.takes[0]) < s.SHORT_RUN:
            moved += s.SCATTERED * size
        if place == plan.result and _run(plan, values, place) < s.SHORT_RUN:
            moved += s.SCATTERED * put_in_order(plan.shapes, values, place)
        moved += step.traffic(taken, result)
        bandwidth = device.memory
        if copied and size * itemsize >= _FRESH:
            moved += (device.faults - 1) * size
        elif size * itemsize < device.cache_bytes:
            bandwidth = device.cache
        moved += 2 * step.rewrites(shapes, result) * size
        seconds = moved * itemsize / bandwidth
        work = step.flops(shapes, result)
        if work:
            rate = step.rate(shapes, result)
            speed: Speed = getattr(speeds, rate.of)
            seconds += speed.setup + work / max(speed.rate * rate.share, 1.0)
        seconds += step.calls(shapes, result) * device.call if copied else device.call / 4
        if copied and device.threads > 1:
            seconds += step.barriers(shapes, result) * device.barrier
        yield seconds


def _run(plan: Plan, values: Sequence[Value], place: int) -> int:
    """The length of the contiguous runs, in entries, when a value is read in the order of its axes."""
    run = 1
    for size, stride in zip(reversed(plan.shapes[place]), reversed(values[place].strides), strict=True):
        if size > 1:
            if stride != run:
                break
            run *= size
    return run
