"""Bounded, thread-safe caches that can be cleared and survive a fork."""

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
"""Default limit for the total weight of a cache's entries."""

_SHARED = (type, types.ModuleType, types.CodeType, types.BuiltinFunctionType, threading.Thread)
"""Kinds of objects that exist independently of the cache."""


def weigh(value: Any) -> int:
    """The bytes that a value keeps alive: everything it refers to, including arrays.

    Modules, classes, code and their parts do not count, since they exist anyway.

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
    """A least-recently-used cache of at most `maxsize` entries with a total weight of at most `max_bytes`.

    A value is computed outside the lock, so two threads that miss at the same time both compute it and one value is
    kept: values must not depend on the thread. A value that weighs more than the limit is not kept.

    Args:
        maxsize: largest number of entries.
        max_bytes: largest total weight of keys and values in bytes.
        weigh: computes the weight of a key and value, by default the bytes that they keep alive.

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
        """Like `get`, but faster, since it does not mark the entry as used."""
        _caches.add(self)

    @property
    def nbytes(self) -> int:
        """The total weight of all entries in bytes, each as of when it was put."""
        return self._total

    def get(self, key: Hashable) -> Any:
        """The value of `key`, or None."""
        with self._lock:
            value = self._entries.get(key)
            if value is not None:
                self._entries.move_to_end(key)
            return value

    def put(self, key: Hashable, value: Any) -> None:
        """Keep `value` (not None) for `key`; drop the least recently used entries beyond the limits."""
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
        """The value of `key`; make and keep it if it is missing."""
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
    """Drop everything that Lensor caches: simplified networks, plans, calls, and arrays made from patterns.

    Call it to time a first call, or to free memory. You need not call it to bound memory: each cache drops its least
    recently used entries once they take more than 64 MB (`lensor.cache.MAX_BYTES`), and no cached array is larger than
    the operands it was made for.

    It keeps the calls in graphs of `torch.compile` and `torch.export`, which may run again, measured times (see
    `lensor.wisdom.forget`), plans that you hold, and the layout of a model that `lensor.optim.KFAC` has found, which is
    freed with the model.

    Example:
        >>> import lensor
        >>> lensor.clear_caches()
    """
    for cache in list(_caches):
        cache.clear()


def _after_fork_in_child() -> None:
    # Another thread of the parent may have held a lock during the fork.
    for cache in list(_caches):
        cache._renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
