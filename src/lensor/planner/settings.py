"""What the planner is asked for: effort and a memory limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from lensor.choices import Effort, words
from lensor.errors import require_choice
from lensor.pattern import as_integer
from lensor.planner import wisdom


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

    effort: Effort = "estimate"
    max_bytes: int | None = None
    preferred_bytes: int | None = None
    known: int = 0

    def __post_init__(self) -> None:
        require_choice("effort", self.effort, words(Effort))
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
def planning(*, effort: Effort | None = None, max_bytes: int | None = None) -> Iterator[Settings]:
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
