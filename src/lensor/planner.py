"""The choice among candidate plans: by estimate, or by timing them once; within a memory limit; remembered."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from lensor import steps as s
from lensor import wisdom
from lensor.cost import estimate, machine
from lensor.kernels import Backend
from lensor.lower import STRATEGIES, candidates, compare_orders, lower_sliced, sliceable
from lensor.network import AnyNetwork
from lensor.pattern import as_integer
from lensor.plan import Candidate, Plan
from lensor.runtime import Runnable, bytes_needed, run

_HOPELESS = 5.0
"""A candidate whose estimate is this many times the best one is never run."""

_BUDGET = 50
"""Measuring takes about as long as this many calls of the fastest candidate."""

_SLOW_START, _SLOW = 4.0, 1.5
"""A candidate this many times slower than the fastest runs no more: after its first run, which warms up, or later."""

_SLICED = 3
"""A memory limit is met by slicing an index in one of this many strategies, those that need the least memory."""

_PARTS = 64
"""No index is worked through in more parts than this."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How plans are chosen.

    Args:
        effort: `"estimate"`: by the cost model; `"measure"`: by timing candidates once on the user's shapes;
            `"remember"`: by what `lensor.wisdom` knows, else by the cost model, never by timing.
        max_bytes: no plan may need more memory than this beside operands and patterns (the result counts).
        preferred_bytes: plans that need no more than this are chosen where there are any, else the smallest.
        known: which state of `lensor.wisdom` a choice by `"remember"` depends on.
    """

    effort: str = "estimate"
    max_bytes: int | None = None
    preferred_bytes: int | None = None
    known: int = 0

    def __post_init__(self) -> None:
        if self.effort not in ("estimate", "measure", "remember"):
            raise ValueError(f"effort must be 'estimate', 'measure' or 'remember', found {self.effort!r}")
        if self.max_bytes is not None and as_integer(self.max_bytes, "max_bytes") < 1:
            raise ValueError(f"max_bytes must be at least 1, found {self.max_bytes}")


_settings: ContextVar[Settings] = ContextVar("lensor.planning", default=Settings())  # noqa: B039  (frozen)


def current() -> Settings:
    """The settings that hold here."""
    settings = _settings.get()
    return settings if settings.effort != "remember" else replace(settings, known=wisdom.generation())


def untimed(settings: Settings) -> Settings:
    """The settings where nothing can be timed: what was timed before is used."""
    return settings if settings.effort != "measure" else replace(settings, effort="remember", known=wisdom.generation())


@contextmanager
def planning(*, effort: str | None = None, max_bytes: int | None = None) -> Iterator[Settings]:
    """Set how plans are chosen for the calls inside; what is not given stays as it is around.

    Example:
        >>> import lensor
        >>> with lensor.planning(effort="measure", max_bytes=2**30) as settings:
        ...     settings.effort
        'measure'

    Raises:
        ValueError: for an unknown effort or a limit below 1.
        TypeError: for a limit that is no integer.
    """
    before = _settings.get()
    settings = replace(
        before,
        effort=before.effort if effort is None else effort,
        max_bytes=before.max_bytes if max_bytes is None else max_bytes,
    )
    with _set(settings):
        yield settings


@contextmanager
def preferring(max_bytes: int) -> Iterator[None]:
    """Prefer plans that need no more memory than this; where there are none, the smallest is taken."""
    with _set(replace(_settings.get(), preferred_bytes=max_bytes)):
        yield


@contextmanager
def _set(settings: Settings) -> Iterator[None]:
    token = _settings.set(settings)
    try:
        yield
    finally:
        _settings.reset(token)


def choose(net: AnyNetwork, settings: Settings, backend: Backend | None = None, kind: Sequence[Any] = ()) -> Plan:
    """The best plan of a network whose sizes are known.

    Args:
        net: the network.
        settings: effort and memory limit.
        backend: where candidates are timed; None to estimate only.
        kind: what the backend says of the operands' dtype and device.

    Raises:
        ValueError: if no candidate fits the memory limit.
    """
    itemsize = backend.itemsize(kind) if backend is not None else 8
    plans = [
        plan for plan in candidates(net, in_parts=itemsize >= 4) if backend is None or backend.can_run(plan.steps, kind)
    ]
    found = [(plan, estimate(plan, machine(), itemsize)) for plan in plans]
    found.sort(key=lambda pair: pair[1])
    if settings.preferred_bytes is not None:
        fits, smallest = _within(net, found, settings.preferred_bytes, itemsize)
        found = fits or [smallest]
    if settings.max_bytes is not None:
        found, (smallest, _) = _within(net, found, settings.max_bytes, itemsize)
        if not found:
            least = bytes_needed(smallest, itemsize)
            raise ValueError(f"max_bytes is {settings.max_bytes}, but the smallest plan needs {least} bytes")
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
        comparer=compare_orders,
    )


def _reason(known: Sequence[Candidate], best: int, settings: Settings) -> str:
    """Why a candidate was chosen."""
    limit = "" if settings.max_bytes is None else f" within {settings.max_bytes:,} bytes"
    if len(known) == 1:
        return f"the only candidate{limit}"
    which = "estimated" if known[best].measured is None else "measured"
    return f"the least {which} time of {len(known)} candidates{limit}"


def _within(
    net: AnyNetwork, found: list[tuple[Plan, float]], limit: int, itemsize: int
) -> tuple[list[tuple[Plan, float]], tuple[Plan, float]]:
    """The plans that fit a memory limit, and the smallest there is.

    If none of those found does, plans that work through an index in as few parts as needed; if none of these does,
    there are no plans.
    """
    smallest = min(found, key=lambda pair: pair[0].peak_size)
    fits = [(plan, seconds) for plan, seconds in found if bytes_needed(plan, itemsize) <= limit]
    if fits:
        return fits, smallest
    result = math.prod(found[0][0].shape)
    frugal = sorted(found, key=lambda pair: pair[0].peak_size)
    strategies = [strategy for plan, _ in frugal for strategy in STRATEGIES if strategy.name == plan.name][:_SLICED]
    # The result itself counts: nothing helps where it is too large.
    for index in sliceable(net) if result * itemsize <= limit else ():
        size = min(net.sizes[index] or 0, _PARTS)
        for strategy in strategies:
            parts = 2
            while True:
                plan = lower_sliced(net, strategy, index, parts)
                one = (plan, estimate(plan, machine(), itemsize))
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
    """The time of each plan as far as it is worth knowing: what was measured before, or else measured now."""
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
    """The shortest time of each plan on random operands, interleaved; None for those that are not worth a run.

    All together take about `_BUDGET` runs of the fastest; each plan that is worth it runs at least twice.
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
