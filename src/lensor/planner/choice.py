"""The choice of a plan among candidates by estimates or measurements, within a memory limit."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lensor.kernels import Backend
from lensor.lowering import BY_NAME, candidates, compare_paths, lower_in_parts, sliceable
from lensor.network import AnyNetwork
from lensor.plan import Candidate, Plan
from lensor.plan import steps as s
from lensor.planner import wisdom
from lensor.planner.calibration import profile_of
from lensor.planner.cost import estimate
from lensor.planner.profile import Machine
from lensor.planner.settings import Settings
from lensor.runtime import Runnable, bytes_needed, run

_HOPELESS = 5.0
"""A candidate is never run if its estimate exceeds the best estimate by more than this factor."""

_BUDGET = 50
"""Measuring takes about as much time as this many runs of the fastest candidate."""

_SLOW_START, _SLOW = 4.0, 1.5
"""A candidate is dropped if it is this many times slower than the fastest: after the warm-up run, and later."""

_SLICED = 3
"""To meet a memory limit, indices are divided for this many strategies, namely those that need the least memory."""

_PARTS = 64
"""Maximum number of parts into which an index is divided."""


def choose(
    net: AnyNetwork,
    settings: Settings,
    backend: Backend | None = None,
    kind: Sequence[Any] = (),
    profile: Machine | None = None,
) -> Plan:
    """Choose the best plan for a network with known sizes.

    Args:
        net: the network.
        settings: effort and memory limit.
        backend: the backend for timing candidates; None to use estimates only.
        kind: the operands' dtype and device, as given by the backend.
        profile: the profile of the device for estimates; by default, that of `kind`.

    Raises:
        ValueError: if no candidate meets the memory limit.
    """
    itemsize = backend.itemsize(kind) if backend is not None else 8
    plans = [
        plan for plan in candidates(net, in_parts=itemsize >= 4) if backend is None or backend.can_run(plan.steps, kind)
    ]
    profile, dtype = profile or profile_of(backend, kind), "float32" if backend is None else backend.dtype(kind)
    found = [(plan, estimate(plan, profile, itemsize, dtype)) for plan in plans]
    found.sort(key=lambda pair: pair[1])
    if settings.preferred_bytes is not None:
        fits, smallest = _within(net, found, settings.preferred_bytes, itemsize, profile, dtype)
        found = fits or [smallest]
    if settings.max_bytes is not None:
        found, (smallest, _) = _within(net, found, settings.max_bytes, itemsize, profile, dtype)
        if not found:
            least = bytes_needed(smallest, itemsize)
            raise ValueError(f"max_bytes is {settings.max_bytes}, expected at least {least} for the smallest plan")
    known = [Candidate(plan.name, plan.flops, plan.peak_size, seconds) for plan, seconds in found]
    best = 0
    if settings.effort != "estimate" and backend is not None and len(found) > 1:
        measured = _times(net, found, backend, kind, settings.effort == "measure")
        known = [replace(one, measured=seconds) for one, seconds in zip(known, measured, strict=True)]
        best = min(range(len(found)), key=lambda at: math.inf if (seconds := measured[at]) is None else seconds)
    others = (*known[:best], *known[best + 1 :])
    return replace(
        found[best][0],
        candidates=(known[best], *others),
        reason=_reason(known, best, settings),
        itemsize=itemsize,
        network=net,
        runner=run,
        comparer=compare_paths,
    )


def _reason(known: Sequence[Candidate], best: int, settings: Settings) -> str:
    """Describe why a candidate was chosen."""
    limit = "" if settings.max_bytes is None else f" within {settings.max_bytes:,} bytes"
    if len(known) == 1:
        return f"the only candidate{limit}"
    which = "estimated" if known[best].measured is None else "measured"
    return f"the least {which} time of {len(known)} candidates{limit}"


def _within(
    net: AnyNetwork, found: list[tuple[Plan, float]], limit: int, itemsize: int, profile: Machine, dtype: str
) -> tuple[list[tuple[Plan, float]], tuple[Plan, float]]:
    """The plans that meet a memory limit, and the smallest plan.

    If no plan in `found` meets the limit, the returned plans divide an index into the smallest number of parts that
    meets the limit. If no such plan meets the limit either, the list is empty.
    """
    smallest = min(found, key=lambda pair: pair[0].peak_size)
    fits = [(plan, seconds) for plan, seconds in found if bytes_needed(plan, itemsize) <= limit]
    if fits:
        return fits, smallest
    result = math.prod(found[0][0].shape)
    frugal = sorted(found, key=lambda pair: pair[0].peak_size)
    strategies = [BY_NAME[name] for name in dict.fromkeys(plan.strategy for plan, _ in frugal)][:_SLICED]
    # The limit includes the result, so if the result is too large, no plan meets the limit.
    for index in sliceable(net) if result * itemsize <= limit else ():
        size = min(net.sizes[index] or 0, _PARTS)
        for strategy in strategies:
            parts = 2
            while True:
                plan = lower_in_parts(net, strategy, index, parts)
                one = (plan, estimate(plan, profile, itemsize, dtype))
                smallest = min(smallest, one, key=lambda pair: pair[0].peak_size)
                if bytes_needed(plan, itemsize) <= limit:
                    fits.append(one)
                    break
                if parts == size:
                    break
                parts = min(2 * parts, size)
    return sorted(fits, key=lambda pair: pair[1]), smallest


def _times(
    net: AnyNetwork, found: list[tuple[Plan, float]], backend: Backend, kind: Sequence[Any], may_measure: bool
) -> list[float | None]:
    """The measured time of each plan, from a previous or a new measurement; None for plans without a time."""
    key, where = wisdom.key_of(net, backend, kind)
    known = wisdom.recall(key)
    names = [plan.name for plan, _ in found]
    if may_measure and not any(name in known for name in names):
        times = measure([plan for plan, _ in found], [seconds for _, seconds in found], backend, kind)
        known = {name: time for name, time in zip(names, times, strict=True) if time is not None}
        wisdom.record(key, net, where, known)
    return [known.get(name) for name in names]


def measure(
    plans: Sequence[Plan], estimates: Sequence[float], backend: Backend, kind: Sequence[Any]
) -> list[float | None]:
    """Time plans in interleaved runs on random operands; return the shortest time of each, or None if it is too slow.

    The total time is about that of `_BUDGET` runs of the fastest plan. A plan with a time has run at least twice.
    """
    inputs = {step.operand: step for plan in plans for step in plan.steps if isinstance(step, s.Input)}
    arrays = {
        name: backend.spread(math.prod(step.size), step.below, kind)
        if isinstance(step, s.Positions)
        else backend.random(step.size, kind)
        for name, step in inputs.items()
    }
    shortest: list[float | None] = [None] * len(plans)
    hopeful = [at for at in range(len(plans)) if estimates[at] <= _HOPELESS * estimates[0]]
    runs = {at: Runnable(plans[at], backend) for at in hopeful}
    best, spent, first = math.inf, 0.0, True
    while hopeful:
        taken: dict[int, float] = {}
        for at in hopeful:
            start = time.perf_counter()
            runs[at](arrays)
            backend.synchronize()
            taken[at] = time.perf_counter() - start
            spent += taken[at]
            if not first:  # the first run warms up
                shortest[at] = min(taken[at], shortest[at] or math.inf)
        known = {at: shortest[at] or taken[at] for at in hopeful}
        best = min(known.values())
        hopeful = [at for at in hopeful if known[at] <= (_SLOW_START if first else _SLOW) * best]
        if spent > _BUDGET * best or (not first and len(hopeful) == 1):
            hopeful = hopeful if first else []
        first = False
    return shortest
