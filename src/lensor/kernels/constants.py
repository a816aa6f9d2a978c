"""A cache of materialized patterns."""

from __future__ import annotations

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
