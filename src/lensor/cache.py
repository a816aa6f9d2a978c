"""Bounded caches that can be cleared, are safe between threads and survive a fork."""

from __future__ import annotations

import gc
import os
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

_caches: weakref.WeakSet[Cache] = weakref.WeakSet()

MAX_BYTES = 1 << 26
"""What the entries of one cache weigh together at most, where the cache sets no limit of its own."""

_SHARED = (type, types.ModuleType, types.CodeType, types.BuiltinFunctionType, threading.Thread)
"""Kinds of objects that are there anyway, whatever is kept."""


def weigh(value: Any) -> int:
    """The bytes that keeping a value takes: those of everything it holds on to, arrays included.

    Modules, classes, code and what belongs to them are there anyway and count nothing.

    Example:
        >>> import numpy as np
        >>> weigh(np.zeros(1000)) >= 8000
        True
        >>> weigh((1, "a")) < 200
        True
    """
    total, seen, todo = 0, set(), [value]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, _SHARED):
            continue
        seen.add(id(one))
        if isinstance(one, dict) and ("__spec__" in one or one is sys.modules):
            continue  # the names of a module
        size = getattr(one, "nbytes", 0) if hasattr(one, "dtype") else 0
        total += max(sys.getsizeof(one, 0), size)
        todo += gc.get_referents(one)
    return total


class Cache:
    """A least-recently-used cache of at most `maxsize` entries that weigh at most `max_bytes` together.

    A value is computed outside the lock, so two threads that miss at once compute it twice and keep one: values
    must not depend on who computed them. A value that alone weighs more than the limit is not kept.

    Args:
        maxsize: the most entries.
        max_bytes: the most bytes that keys and values take together.
        weigh: the bytes of a key or value, by default of everything it holds on to.

    Example:
        >>> cache = Cache(maxsize=2)
        >>> cache.get_or_make("a", lambda: 1)
        1
        >>> cache.get("a"), cache.get("b")
        (1, None)
        >>> 0 < cache.nbytes < 1000
        True
    """

    def __init__(self, maxsize: int, max_bytes: int = MAX_BYTES, weigh: Callable[[Any], int] = weigh) -> None:
        self.maxsize, self.max_bytes, self.weigh = maxsize, max_bytes, weigh
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._weights: dict[Hashable, int] = {}
        self._total = 0
        self._lock = threading.Lock()
        self.peek = self._entries.get
        """As `get`, but for speed it leaves out that the entry was used."""
        _caches.add(self)

    @property
    def nbytes(self) -> int:
        """The bytes that all entries take together, as they weighed when they were put."""
        return self._total

    def get(self, key: Hashable) -> Any:
        """The value kept under `key`, or None."""
        with self._lock:
            value = self._entries.get(key)
            if value is not None:
                self._entries.move_to_end(key)
            return value

    def put(self, key: Hashable, value: Any) -> None:
        """Keep `value` (not None) under `key`, dropping the entries used longest ago if they are too many or heavy."""
        weight = self.weigh((key, value))
        with self._lock:
            self._drop(key)
            if weight > self.max_bytes:
                return
            self._entries[key] = value
            self._weights[key] = weight
            self._total += weight
            while len(self._entries) > self.maxsize or self._total > self.max_bytes:
                self._drop(next(iter(self._entries)))

    def _drop(self, key: Hashable) -> None:
        if key in self._entries:
            del self._entries[key]
            self._total -= self._weights.pop(key)

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
            self._weights.clear()
            self._total = 0

    def __len__(self) -> int:
        return len(self._entries)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()


def clear_caches() -> None:
    """Drop everything Lensor remembers to be fast: simplified networks, plans, calls, arrays made of patterns.

    There is no need to call this to keep memory bounded: each cache drops what was used longest ago once its entries
    take more than 64 MB (`lensor.cache.MAX_BYTES`), and nothing that is kept is larger than the operands it was made
    for. Call it to measure a first call, or to give the memory back.

    What graphs of `torch.compile` and `torch.export` were made of stays: they may run again. So do measured times,
    which `lensor.wisdom.forget` drops, plans that you hold, and what `lensor.optim.KFAC` has found of a model's layout,
    which goes with the model.

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
