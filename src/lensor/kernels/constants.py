"""Materialized patterns, kept: what every backend's constants are made from."""

from __future__ import annotations

import numpy as np

from lensor.cache import Cache
from lensor.pattern import IndexPattern

_kept = Cache(maxsize=256)


def materialize_summed(pattern: IndexPattern, summed: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The pattern summed over some legs (0: i, 1: o, 2: k) as a read-only array; sums form only [O, K]."""
    return _kept.get_or_make((pattern, summed, dtype), lambda: _make(pattern, summed, dtype))


def _make(pattern: IndexPattern, summed: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    reads = pattern.reads()
    valid = reads >= 0
    if 0 in summed:
        array = valid.sum(axis=tuple(leg - 1 for leg in summed if leg > 0)) if len(summed) > 1 else valid
    else:
        sizes = (pattern.input_size, pattern.output_size, pattern.kernel_size)
        kept = [leg for leg in (1, 2) if leg not in summed]
        o, k = np.nonzero(valid)
        places = {1: o, 2: k}
        array = np.zeros([sizes[0], *(sizes[leg] for leg in kept)], np.int64)
        np.add.at(array, (reads[o, k], *(places[leg] for leg in kept)), 1)
    array = np.asarray(array, dtype=dtype)
    array.flags.writeable = False
    return array
