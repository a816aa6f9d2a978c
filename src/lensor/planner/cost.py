"""The cost model, which estimates the time of a plan from flops, bytes moved and a few machine constants."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lensor.plan import Plan
from lensor.plan import steps as s
from lensor.plan.memory import Value, layouts, put_in_order
from lensor.plan.memory import moved as moved_entries
from lensor.planner.profile import Machine

_SHORT_RUN = 16
"""Each entry copied in runs shorter than this costs as much as moving `SCATTERED` extra entries."""

_NEAR = 1 << 23
"""Values with fewer bytes than this stay in the cache, which halves the cost of moving them."""

_FRESH, _FAULTS = 1 << 26, 3
"""Arrays with at least `_FRESH` bytes use new memory from the system, which takes `_FAULTS` times as long to write."""


def estimate(plan: Plan, constants: Machine, itemsize: int = 4) -> float:
    """Estimate the time of a plan in seconds, from flops at each step's rate, bytes moved, and calls."""
    values, entries = layouts(plan.steps, plan.shapes), moved_entries(plan.steps, plan.shapes, plan.result)
    total = 0.0
    for place, step in enumerate(plan.steps):
        result, copied = plan.shapes[place], values[place].copied
        shapes = [plan.shapes[at] for at in step.takes]
        taken = [s.Laid(plan.shapes[at], values[at].strides) for at in step.takes]
        moved, size = float(entries[place]), math.prod(result)
        if step.is_view and copied and _run(plan, values, step.takes[0]) < _SHORT_RUN:
            moved += s.SCATTERED * size
        if place == plan.result and _run(plan, values, place) < _SHORT_RUN:
            moved += s.SCATTERED * put_in_order(plan.shapes, values, place)
        moved += step.traffic(taken, result)
        if copied and size * itemsize >= _FRESH:
            moved += (_FAULTS - 1) * size
        elif size * itemsize < _NEAR:
            moved /= 2
        moved += 2 * step.rewrites(shapes, result) * size
        rate = step.rate(shapes, result)
        work = step.flops(shapes, result) / max(getattr(constants, rate.of) * rate.share, 1.0)
        calls = step.calls(shapes, result) if copied else 0.25
        total += work + moved * itemsize / constants.bytes + calls * constants.call
    return total


def _run(plan: Plan, values: Sequence[Value], place: int) -> int:
    """The length of the contiguous runs, in entries, when a value is read in the order of its axes."""
    run = 1
    for size, stride in zip(reversed(plan.shapes[place]), reversed(values[place].strides), strict=True):
        if size > 1:
            if stride != run:
                break
            run *= size
    return run
