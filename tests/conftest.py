"""Hypothesis draws the same examples in every run; HYPOTHESIS_PROFILE=search draws many new ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "default", derandomize=True, deadline=None, max_examples=150, database=None, suppress_health_check=QUIET
)
settings.register_profile("search", deadline=None, max_examples=5000, suppress_health_check=QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
