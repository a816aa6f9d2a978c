"""Bounded, thread-safe caches that can be cleared and that remain usable after a fork."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

_caches: weakref.WeakSet[Cache] = weakref.WeakSet()

MAX_BYTES = 1 << 26
"""Default limit for the total weight of a cache's entries."""

_SHARED = (type, types.ModuleType, types.CodeType, types.BuiltinFunctionType, threading.Thread)
"""Types of objects that exist independently of a cache."""


def weigh(value: Any) -> int:
    """Return the number of bytes that a value keeps alive, including everything to which it refers, such as arrays.

    Modules, classes, code and their parts are not counted, since they exist independently.

    Example:
        >>> import numpy as np
        >>> weigh(np.zeros(1000)) >= 8000
        True
        >>> weigh((1, "a")) < 200
        True
    """
    # Objects are handled in bulk, level by level, since calls for each of them would take a large part of planning.
    total, level = 0, [value]
    seen: set[int] = set()
    kinds: set[type] = set()
    apart: set[type] = set()
    arrays: set[type] = set()
    while level:
        found = dict(zip(map(id, level), level, strict=True))
        for at in seen.intersection(found):
            del found[at]
        seen.update(found)
        new = set(map(type, found.values())) - kinds
        kinds |= new
        apart.update(kind for kind in new if issubclass(kind, _SHARED))
        arrays.update(kind for kind in new if hasattr(kind, "nbytes") and hasattr(kind, "dtype"))
        kept: list[Any] = [one for one in found.values() if type(one) not in apart]
        if dict in kinds:
            kept = [one for one in kept if not (type(one) is dict and _is_namespace(one))]
        total += sum(map(sys.getsizeof, kept, itertools.repeat(0)))
        if arrays:
            total += sum(max(one.nbytes - sys.getsizeof(one, 0), 0) for one in kept if type(one) in arrays)
        level = gc.get_referents(*kept)
    return total


def _is_namespace(one: dict) -> bool:
    """Whether a dictionary is the namespace of a module, or the table of all modules."""
    return "__spec__" in one or one is sys.modules


class Cache:
    """A least-recently-used cache with at most `maxsize` entries and a total weight of at most `max_bytes`.

    Values are computed outside the lock. Two threads that miss the same key at the same time both compute the value,
    and one of the results is stored, so values must not depend on the thread. A value that weighs more than `max_bytes`
    is not stored.

    Args:
        maxsize: maximum number of entries.
        max_bytes: maximum total weight of keys and values in bytes.
        weigh: function that computes the weight of a key and value; by default, the number of bytes that they keep
            alive.

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
        """The total weight of all entries in bytes, as computed when each entry was stored."""
        return self._total

    def get(self, key: Hashable) -> Any:
        """Return the value for `key`, or None."""
        with self._lock:
            value = self._entries.get(key)
            if value is not None:
                self._entries.move_to_end(key)
            return value

    def put(self, key: Hashable, value: Any) -> None:
        """Store `value` (not None) for `key`, and drop the least recently used entries if a limit is exceeded."""
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

    def drop(self, key: Hashable) -> None:
        """Drop the value for `key`, if there is one."""
        with self._lock:
            self._drop(key)

    def count(self, is_counted: Callable[[Any], bool]) -> int:
        """The number of keys for which a function is true."""
        with self._lock:
            return sum(map(is_counted, self._entries))

    def _drop(self, key: Hashable) -> None:
        if key in self._entries:
            del self._entries[key]
            self._total -= self._weights.pop(key)

    def get_or_make(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the value for `key`; compute and store it if it is missing."""
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


_PLAIN = frozenset({int, float, bool, str, type(None)})
"""Types of options that are not sequences, or are used as they are; other types take longer to examine."""


def frozen(option: Any) -> Any:
    """An option as part of a key: lists become tuples."""
    if type(option) in _PLAIN:
        return option
    is_list = isinstance(option, Sequence) and not isinstance(option, str)
    return tuple(map(frozen, option)) if is_list else option


def clear_caches() -> None:
    """Drop everything that Lensor caches: networks, plans, calls, arrays made from patterns, and compiled passes.

    Use this function before you time a first call, or to free memory. You do not need it to bound memory: each cache
    drops its least recently used entries once it exceeds 64 MB (`lensor.cache.MAX_BYTES`), no cached array has more
    entries than the operands for which it was created (or 65,536, if these have fewer), and compiled passes are dropped
    with their models.

    The function does not drop calls in `torch.compile` and `torch.export` graphs (which may run again), measured times
    (see `lensor.wisdom.forget`), plans to which you hold references, or the batch axes that `lensor.optim.KFAC` found
    for a model (which are freed with the model).

    Example:
        >>> import lensor
        >>> lensor.clear_caches()
    """
    for cache in list(_caches):
        cache.clear()


def cached_bytes() -> int:
    """The total weight of the entries of all caches, in bytes.

    Example:
        >>> import lensor
        >>> lensor.clear_caches()
        >>> cached_bytes()
        0
    """
    return sum(cache.nbytes for cache in list(_caches))


def _after_fork_in_child() -> None:
    # A different thread of the parent may have held a lock during the fork.
    for cache in list(_caches):
        cache._renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
