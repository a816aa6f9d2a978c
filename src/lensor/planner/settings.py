"""The settings of the planner: effort and memory limit."""

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
    """Settings for choosing plans.

    Args:
        effort: `"estimate"` uses the cost model, `"measure"` times the candidates once on your shapes, and `"remember"`
            uses the times in `lensor.wisdom` if there are any, else the cost model, without timing.
        max_bytes: the maximum memory that a plan may need, including the result but not operands and patterns.
        preferred_bytes: prefer plans that need at most this much memory; if there are none, use the smallest.
        known: the state of `lensor.wisdom`, on which the choice depends for `"remember"`.
    """

    effort: Effort = "estimate"
    max_bytes: int | None = None
    preferred_bytes: int | None = None
    known: int = 0

    def __post_init__(self) -> None:
        require_choice("effort", self.effort, words(Effort))
        if self.max_bytes is not None and as_integer(self.max_bytes, "max_bytes") < 1:
            raise ValueError(f"max_bytes is {self.max_bytes}, expected at least 1")


_settings: ContextVar[Settings] = ContextVar("lensor.planning", default=Settings())  # noqa: B039  (frozen)


def current() -> Settings:
    """The settings in the current context."""
    settings = _settings.get()
    return settings if settings.effort != "remember" else replace(settings, known=wisdom.generation())


def untimed(settings: Settings) -> Settings:
    """Replace `"measure"` by `"remember"`, so that no plans are timed."""
    return settings if settings.effort != "measure" else replace(settings, effort="remember", known=wisdom.generation())


@contextmanager
def planning(*, effort: Effort | None = None, max_bytes: int | None = None) -> Iterator[Settings]:
    """Set how plans are chosen inside the `with` block; omitted settings keep their outer values.

    Example:
        >>> import lensor
        >>> with lensor.planning(effort="measure", max_bytes=2**30) as settings:
        ...     settings.effort
        'measure'

    Raises:
        ValueError: if the effort is unknown or the limit is less than 1.
        TypeError: if the limit is not an integer.
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
    """Prefer plans that need at most this much memory; if there are none, use the smallest."""
    with _set(replace(_settings.get(), preferred_bytes=max_bytes)):
        yield


@contextmanager
def _set(settings: Settings) -> Iterator[None]:
    token = _settings.set(settings)
    try:
        yield
    finally:
        _settings.reset(token)
