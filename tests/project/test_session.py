"""The settings of test runs."""

from __future__ import annotations

import os

import torch


def test_the_number_of_threads_is_the_one_that_is_set() -> None:
    """Workers set one thread each, which has an effect only if nothing imports torch before."""
    wanted = os.environ.get("OMP_NUM_THREADS")
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert wanted is not None
    assert wanted is None or torch.get_num_threads() == int(wanted)
