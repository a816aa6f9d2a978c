"""Hypothesis draws the same examples in every run; HYPOTHESIS_PROFILE=search draws many new ones.

Every test finds the global generators of random numbers in the same state, whatever ran before it.
Tests that run side by side have one thread each: those of several would wait for each other. Nothing may import NumPy
or torch before this module.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Iterator
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and torch are loaded

os.environ.setdefault("JAX_ENABLE_X64", "1")  # arrays of JAX have the dtypes that tests give them

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # run Triton kernels by its interpreter; read when triton is imported

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    max_examples=150,
    database=None,
    print_blob=True,
    suppress_health_check=QUIET,
)
settings.register_profile("search", deadline=None, max_examples=5000, print_blob=True, suppress_health_check=QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function):  # an example of a document goes on from the one before it
        random.seed(0)
        for name in ("numpy", "torch"):
            if name in sys.modules:
                module = sys.modules[name]
                (module.manual_seed if name == "torch" else module.random.seed)(0)


@pytest.fixture
def browser() -> Iterator[Any]:
    """Headless Chromium with a log of what it fetches."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("Chromium and its driver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for name in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "disable-sync"):
        options.add_argument(f"--{name}")
    for name in ("background-networking", "component-update"):
        options.add_argument(f"--disable-{name}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    found.set_page_load_timeout(60)
    found.set_window_size(1300, 1100)
    try:
        yield found
    finally:
        found.quit()
