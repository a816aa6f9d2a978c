"""Bounded caches that can be cleared, are safe between threads and survive a fork."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

_caches: weakref.WeakSet[Cache] = weakref.WeakSet()


class Cache:
    """A least-recently-used cache of at most `maxsize` entries.

    A value is computed outside the lock, so two threads that miss at once compute it twice and keep one: values
    must not depend on who computed them.

    Example:
        >>> cache = Cache(maxsize=2)
        >>> cache.get_or_make("a", lambda: 1)
        1
        >>> cache.get("a"), cache.get("b")
        (1, None)
    """

    def __init__(self, maxsize: int) -> None:
        self.maxsize = maxsize
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()
        self.peek = self._entries.get
        """As `get`, but for speed it leaves out that the entry was used."""
        _caches.add(self)

    def get(self, key: Hashable) -> Any:
        """The value kept under `key`, or None."""
        with self._lock:
            value = self._entries.get(key)
            if value is not None:
                self._entries.move_to_end(key)
            return value

    def put(self, key: Hashable, value: Any) -> None:
        """Keep `value` (not None) under `key`, dropping the entry used longest ago if there are too many."""
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            while len(self._entries) > self.maxsize:
                self._entries.popitem(last=False)

    def get_or_make(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value kept under `key`, made and kept first if it is not there."""
        value = self.get(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value

    def clear(self) -> None:
        """Drop every entry."""
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()


def clear_caches() -> None:
    """Drop everything Lensor remembers to be fast: simplified networks, plans, materialized patterns.

    What graphs of `torch.compile` and `torch.export` were made of stays: they may run again. So do measured times,
    which `lensor.wisdom.forget` drops.

    Example:
        >>> import lensor
        >>> lensor.clear_caches()
    """
    for cache in list(_caches):
        cache.clear()


def _after_fork_in_child() -> None:
    # Another thread of the parent may have held a lock at the moment of the fork.
    for cache in list(_caches):
        cache._renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
