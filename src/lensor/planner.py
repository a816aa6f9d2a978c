"""The choice among candidate plans: by estimate, or by timing them once; within a memory limit; remembered."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from lensor import steps as s
from lensor.cost import estimate, machine
from lensor.lower import STRATEGIES, candidates, compare_orders, lower_sliced, sliceable
from lensor.network import AnyNetwork
from lensor.plan import Candidate, Plan
from lensor.runtime import Runnable, run

_HOPELESS = 5.0
"""A candidate whose estimate is this many times the best one is never run."""

_REPEATS = 7

_SLICED = 3
"""A memory limit is met by slicing an index in one of this many strategies, those that need the least memory."""

_PARTS = 64
"""No index is worked through in more parts than this."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How plans are chosen.

    Args:
        effort: `"estimate"`: by the cost model; `"measure"`: by timing candidates once on the user's shapes.
        max_bytes: no plan may need more memory than this beside operands and patterns (the result counts).
    """

    effort: str = "estimate"
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.effort not in ("estimate", "measure"):
            raise ValueError(f"effort must be 'estimate' or 'measure', found {self.effort!r}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, found {self.max_bytes}")


_settings: ContextVar[Settings] = ContextVar("lensor.planning", default=Settings())  # noqa: B039  (frozen)


def current() -> Settings:
    """The settings that hold here."""
    return _settings.get()


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
    """
    before = _settings.get()
    settings = Settings(effort or before.effort, before.max_bytes if max_bytes is None else max_bytes)
    token = _settings.set(settings)
    try:
        yield settings
    finally:
        _settings.reset(token)


def choose(net: AnyNetwork, settings: Settings, backend: Any = None, kind: Sequence[Any] = ()) -> Plan:
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
    plans = [plan for plan in candidates(net) if backend is None or backend.can_run(plan.steps, kind)]
    found = [(plan, estimate(plan, machine(), itemsize)) for plan in plans]
    found.sort(key=lambda pair: pair[1])
    if settings.max_bytes is not None:
        found = _within(net, found, settings.max_bytes, itemsize)
    known = [Candidate(plan.name, plan.flops, plan.peak_size, seconds) for plan, seconds in found]
    best = 0
    if settings.effort == "measure" and backend is not None and len(found) > 1:
        measured = measure([plan for plan, _ in found], [seconds for _, seconds in found], backend, kind)
        known = [replace(one, measured=seconds) for one, seconds in zip(known, measured, strict=True)]
        best = min(range(len(found)), key=lambda at: math.inf if (seconds := measured[at]) is None else seconds)
    others = (*known[:best], *known[best + 1 :])
    return replace(found[best][0], candidates=(known[best], *others), network=net, runner=run, comparer=compare_orders)


def _within(net: AnyNetwork, found: list[tuple[Plan, float]], limit: int, itemsize: int) -> list[tuple[Plan, float]]:
    """The plans that fit a memory limit; if none does, plans that work through an index in as few parts as needed.

    Raises:
        ValueError: if even the smallest of these does not fit.
    """
    fits = [(plan, seconds) for plan, seconds in found if plan.peak_size * itemsize <= limit]
    if fits:
        return fits
    least = min(plan.peak_size for plan, _ in found)
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
                least = min(least, plan.peak_size)
                if plan.peak_size * itemsize <= limit:
                    fits.append((plan, estimate(plan, machine(), itemsize)))
                    break
                if parts == size:
                    break
                parts = min(2 * parts, size)
    if not fits:
        raise ValueError(f"max_bytes is {limit}, but the smallest plan needs {least * itemsize} bytes")
    return sorted(fits, key=lambda pair: pair[1])


def measure(plans: Sequence[Plan], estimates: Sequence[float], backend: Any, kind: Sequence[Any]) -> list[float | None]:
    """The shortest time of each plan on random operands, interleaved; None for those that are not worth a run."""
    shapes: Mapping[str, s.Shape] = {
        step.operand: step.size for plan in plans for step in plan.steps if isinstance(step, s.Input)
    }
    arrays = {name: backend.random(shape, kind) for name, shape in shapes.items()}
    shortest: list[float | None] = [None] * len(plans)
    hopeful = [at for at in range(len(plans)) if estimates[at] <= _HOPELESS * estimates[0]]
    runs = {at: Runnable(plans[at], backend) for at in hopeful}
    for repeat in range(_REPEATS):
        best = min((time for time in shortest if time is not None), default=math.inf)
        for at in hopeful:
            found = shortest[at]
            if repeat > 1 and found is not None and found > 1.5 * best:
                continue  # no chance any more
            start = time.perf_counter()
            runs[at](arrays)
            backend.synchronize()
            taken = time.perf_counter() - start
            if repeat:  # the first run warms up
                shortest[at] = taken if found is None else min(found, taken)
    return shortest
