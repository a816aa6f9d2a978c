"""A test that is skipped is a failure, unless it is listed here with the reason why that is right.

A pytest plugin, which conftest.py loads. Where the environment variable CI is set, as it is by `make test`, a skip that
is not listed fails, whatever it comes from: `pytest.skip`, `importorskip`, `skipif`, an empty parameter set, a module
that cannot be collected. An `xfail` fails if it has no reason, or if it does not run. The end of every run lists what
was skipped and why.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Listed:
    """Skips that are right.

    Args:
        where: how the ids of the tests begin.
        reason: how the reason that the tests give begins.
        why: why there is nothing to mend.
        allowed: whether that holds on this machine.
    """

    where: str
    reason: str
    why: str
    allowed: bool = True


LINUX = sys.platform == "linux"
INSTALLS = LINUX and os.geteuid() == 0 and shutil.which("apt-get") is not None
"""Whether `make browser` and `make tex` can install what they are for."""

ROOT = "only root may install Debian's packages, and this is not root, or not Debian"
SKIPS = [
    Listed("tests/draw/test_draw.py::test_tikz", "no TeX is installed", ROOT, not INSTALLS),
    Listed("tests/inspect/test_explain.py", "Chromium and its driver are not installed", ROOT, not INSTALLS),
    Listed("tests/project/test_site.py", "Chromium and its driver are not installed", ROOT, not INSTALLS),
    Listed("benchmarks/tests/test_bench.py", "there is no limit on this system", "Linux only", not LINUX),
    Listed("benchmarks/tests/test_bench.py", "there is no full disk on this system", "Linux only", not LINUX),
    Listed("tests/kernels/test_pattern_products.py", "no GPU", "CI has none", not torch.cuda.is_available()),
    Listed(
        "tests/kernels/test_pattern_products.py", "fewer than two GPUs", "CI has none", torch.cuda.device_count() < 2
    ),
    Listed("tests/test_evaluate.py", "no fork on this system", "Windows has none", not hasattr(os, "fork")),
]


def _reason(report: Any) -> str:
    """The reason that a test, or a module, gave for being skipped."""
    if hasattr(report, "wasxfail"):
        return report.wasxfail.removeprefix("reason: ").strip()
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return said.removeprefix("Skipped: ").strip()


def _why(report: Any) -> str | None:
    """Why a skip, or an expected failure, is right; None if nothing says so."""
    reason = _reason(report)
    if hasattr(report, "wasxfail") and not reason.startswith("[NOTRUN]"):
        return "an expected failure" if reason else None
    for one in SKIPS:
        if one.allowed and report.nodeid.startswith(one.where) and reason.startswith(one.reason):
            return one.why
    return None


def _judge(report: Any) -> Any:
    if report.skipped and os.environ.get("CI") and _why(report) is None:
        kind = "an expected failure" if hasattr(report, "wasxfail") else "skipped"
        report.outcome = "failed"
        report.longrepr = (
            f"{report.nodeid}: {kind}, and no reason is listed in tests/support/skips.py: {_reason(report)!r}"
        )
        vars(report).pop("wasxfail", None)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Iterator[None]:
    return _judge((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Iterator[None]:
    return _judge((yield))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Writes which tests were skipped, with their reasons."""
    stats = terminalreporter.stats
    reports = [one for kind in ("skipped", "xfailed") for one in stats.get(kind, ())]
    if not reports:
        return
    found = Counter((one.nodeid.partition("[")[0], _reason(one), _why(one)) for one in reports)
    terminalreporter.section("skips and their reasons")
    for (test, reason, why), count in found.items():
        terminalreporter.line(f"{count} × {test}: {reason or 'no reason given'} ({why or 'not listed: fails in CI'})")
