"""The choice of a plan among candidates by estimates or measurements, within a memory limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lensor.kernels import Backend
from lensor.lowering import BY_NAME, compare_paths, lower_in_parts, sliceable
from lensor.network import AnyNetwork
from lensor.plan import Candidate, Considered, Plan
from lensor.plan import steps as s
from lensor.plan.resizable import Resizable
from lensor.planner import wisdom
from lensor.planner.calibration import profile_of
from lensor.planner.families import Sizes, Target, family_of
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
    unbound: AnyNetwork | None = None,
) -> Plan:
    """Choose the best plan for a network with known sizes.

    Args:
        net: the network.
        settings: effort and memory limit.
        backend: the backend for timing candidates; None to use estimates only.
        kind: the operands' dtype and device, as given by the backend.
        profile: the profile of the device for estimates; by default, that of `kind`.
        unbound: the network before its open sizes were bound; its candidates are then resized, not lowered again.

    Raises:
        ValueError: if no candidate meets the memory limit.
    """
    target = Target(backend, tuple(kind), profile or profile_of(backend, kind))
    itemsize = target.itemsize
    unbound = net if unbound is None else unbound
    sizes = {index: net.sizes[index] or 0 for index, size in unbound.sizes.items() if size is None}
    family = family_of(unbound, sizes, target)
    if family is not None and settings == Settings():
        estimates = family.estimates(sizes, target)
        plan = family.members[estimates.index(min(estimates))].at(sizes)
        considered = Considered(partial(_described, unbound, sizes, target))
        return _finished(plan, net, considered, _least("estimated", len(estimates)), itemsize)
    if family is not None:
        estimates = family.estimates(sizes, target)
        found = [(member.at(sizes), seconds) for member, seconds in zip(family.members, estimates, strict=True)]
    else:
        found = [(plan, target.estimate(plan)) for plan in target.candidates(net)]
    found.sort(key=lambda pair: pair[1])
    if settings.preferred_bytes is not None:
        fits, smallest = _within(net, found, settings.preferred_bytes, target)
        found = fits or [smallest]
    if settings.max_bytes is not None:
        found, (smallest, _) = _within(net, found, settings.max_bytes, target)
        if not found:
            least = bytes_needed(smallest, itemsize)
            raise ValueError(f"max_bytes is {settings.max_bytes}, expected at least {least} for the smallest plan")
    known = _candidates(found)
    best = 0
    if settings.effort != "estimate" and backend is not None and len(found) > 1:
        measured = _times(net, found, backend, kind, settings.effort == "measure")
        known = [replace(one, measured=seconds) for one, seconds in zip(known, measured, strict=True)]
        best = min(range(len(found)), key=lambda at: math.inf if (seconds := measured[at]) is None else seconds)
    others = (*known[:best], *known[best + 1 :])
    return _finished(found[best][0], net, (known[best], *others), _reason(known, best, settings), itemsize)


def choose_resizable(net: AnyNetwork, sizes: Sizes, backend: Backend, kind: Sequence[Any]) -> Resizable | None:
    """Choose the best plan for a network whose open indices may have any sizes, by estimates for typical sizes.

    The result is None if no candidate allows all sizes. Candidates in parts of an index do not, and neither do pattern
    products, whose tables depend on the sizes.

    Args:
        net: the network.
        sizes: typical sizes of all open indices.
        backend: the backend.
        kind: the operands' dtype and device, as given by the backend.
    """
    target = Target(backend, tuple(kind), profile_of(backend, kind))
    family = family_of(net, sizes, target)
    if family is None:
        return None
    estimates = zip(family.estimates(sizes, target), family.members, strict=True)
    found = [(seconds, form) for seconds, member in estimates if (form := member.form) and not _has_tables(form.plan)]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _has_tables(plan: Plan) -> bool:
    return any(isinstance(step, s.PatternProduct) for step in plan.steps)


def _finished(plan: Plan, net: AnyNetwork, known: Sequence[Candidate], reason: str, itemsize: int) -> Plan:
    """The chosen plan, ready to run."""
    return replace(
        plan, candidates=known, reason=reason, itemsize=itemsize, network=net, runner=run, comparer=compare_paths
    )


def _described(unbound: AnyNetwork, sizes: Sizes, target: Target) -> list[Candidate]:
    """The candidates for these sizes, the best first."""
    family = family_of(unbound, sizes, target)
    assert family is not None
    estimates = family.estimates(sizes, target)
    order = sorted(range(len(estimates)), key=estimates.__getitem__)
    return _candidates([(family.members[at].at(sizes), estimates[at]) for at in order])


def _candidates(found: Sequence[tuple[Plan, float]]) -> list[Candidate]:
    return [Candidate(plan.name, plan.flops, plan.peak_size, seconds) for plan, seconds in found]


def _least(which: str, count: int, limit: str = "") -> str:
    return f"the only candidate{limit}" if count == 1 else f"the least {which} time of {count} candidates{limit}"


def _reason(known: Sequence[Candidate], best: int, settings: Settings) -> str:
    """Describe why a candidate was chosen."""
    limit = "" if settings.max_bytes is None else f" within {settings.max_bytes:,} bytes"
    return _least("estimated" if known[best].measured is None else "measured", len(known), limit)


def _within(
    net: AnyNetwork, found: list[tuple[Plan, float]], limit: int, target: Target
) -> tuple[list[tuple[Plan, float]], tuple[Plan, float]]:
    """The plans that meet a memory limit, and the smallest plan.

    If no plan in `found` meets the limit, the returned plans divide an index into the smallest number of parts that
    meets the limit. If no such plan meets the limit either, the list is empty.
    """
    itemsize = target.itemsize
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
                one = (plan, target.estimate(plan))
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
    if backend.fuses(kind):
        with backend.tuning(kind):  # not timed: it compiles kernels and tries their settings
            for at in hopeful:
                runs[at](arrays)
    best, spent, first = math.inf, 0.0, True
    while hopeful:
        taken: dict[int, float] = {}
        for at in hopeful:
            taken[at] = backend.timed(partial(runs[at], arrays), kind)
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
