"""A cache of materialized patterns, and of arrays that are computed from them."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np

from lensor.cache import Cache
from lensor.pattern import IndexPattern

_kept = Cache(maxsize=256)


def materialize_summed(pattern: IndexPattern, summed: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Materialize a pattern, summed over some legs (0: i, 1: o, 2: k), as a read-only array."""

    def make() -> np.ndarray:
        array = pattern.summed(summed, dtype)
        array.flags.writeable = False
        return array

    return _kept.get_or_make((pattern, summed, dtype), make)


def folded(key: Hashable, make: Callable[[np.dtype], np.ndarray], dtype: np.dtype) -> np.ndarray:
    """An array that a plan computes from patterns only, as a read-only array."""

    def made() -> np.ndarray:
        array = np.array(make(dtype))
        array.flags.writeable = False
        return array

    return _kept.get_or_make((key, dtype), made)
