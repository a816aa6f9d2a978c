"""Hypothesis draws the same examples in every run; HYPOTHESIS_PROFILE=search draws many new ones.

Tests that run side by side have one thread each: those of several would wait for each other.
"""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and torch are loaded

from hypothesis import HealthCheck, settings

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "default", derandomize=True, deadline=None, max_examples=150, database=None, suppress_health_check=QUIET
)
settings.register_profile("search", deadline=None, max_examples=5000, suppress_health_check=QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
