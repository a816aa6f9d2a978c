"""A skip that is not listed fails where CI is set, in every form that a skip has; the same examples in every run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from tests.support import skips

pytest_plugins = ["pytester"]

LISTED = """
from tests.support import skips

skips.SKIPS = [
    skips.Listed("test_it.py::test_first", "no luck", "luck cannot be installed"),
    skips.Listed("test_another_reason.py::test_first", "no luck", "never happens"),
    skips.Listed("test_not_allowed_here.py::test_elsewhere", "no luck", "not on this machine", allowed=False),
]
"""

FORMS = {
    "skip": "def test_it():\n    pytest.skip('no luck')",
    "fixture": "@pytest.fixture\ndef it():\n    pytest.skip('no luck')\n\ndef test_it(it):\n    pass",
    "teardown": "@pytest.fixture\ndef it():\n    yield\n    pytest.skip('no luck')\n\ndef test_it(it):\n    pass",
    "mark": "@pytest.mark.skip\ndef test_it():\n    pass",
    "skipif": "@pytest.mark.skipif(True, reason='no luck')\ndef test_it():\n    pass",
    "class": "@pytest.mark.skip(reason='no luck')\nclass TestIt:\n    def test_it(self):\n        pass",
    "importorskip": "def test_it():\n    pytest.importorskip('no_such_module')",
    "unittest": "import unittest\n\nclass TestIt(unittest.TestCase):\n    @unittest.skip('no luck')\n"
    "    def test_it(self):\n        pass",
    "parameters": "@pytest.mark.parametrize('x', [])\ndef test_it(x):\n    pass",
    "another reason": "def test_first():\n    pytest.skip('no patience')",
    "not allowed here": "def test_elsewhere():\n    pytest.skip('no luck')",
    "xfail": "@pytest.mark.xfail\ndef test_it():\n    raise ValueError",
    "xfail in the test": "def test_it():\n    pytest.xfail()",
    "xfail that does not run": "@pytest.mark.xfail(reason='a bug', run=False)\ndef test_it():\n    pass",
    "module": "pytest.importorskip('no_such_module')\n\ndef test_it():\n    pass",
    "module that skips": "pytest.skip('no luck', allow_module_level=True)",
}
RIGHT = """
import pytest

def test_passes():
    pass

@pytest.mark.parametrize("x", range(3))
def test_first(x):
    pytest.skip("no luck today")

@pytest.mark.xfail(reason="a bug of another library")
def test_fails():
    raise ValueError
"""


def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, *options: str, **files: str) -> Any:
    for name in [name for name in os.environ if name.startswith(("PYTEST_XDIST", "PYTEST_ADDOPTS"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    pytester.makeconftest(LISTED)
    pytester.makepyfile(**files)
    return pytester.runpytest_subprocess("-p", "tests.support.skips", *options)


def outcomes(found: Any) -> dict[str, int]:
    return {name.removesuffix("s") if name == "errors" else name: n for name, n in found.parseoutcomes().items()}


WORKERS = ("-p", "xdist", "-n", "2")
FILES = {f"test_{form.replace(' ', '_')}": f"import pytest\n\n{code}\n" for form, code in FORMS.items()}


@pytest.mark.parametrize("options", [(), pytest.param(WORKERS, marks=pytest.mark.slow)], ids=["alone", "workers"])
def test_a_skip_that_is_not_listed_fails(
    options: tuple[str, ...], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(pytester, monkeypatch, "true", "--continue-on-collection-errors", *options, **FILES)
    counts = outcomes(found)
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    assert counts["failed"] + counts["error"] == len(FORMS)
    assert set(counts) <= {"failed", "error", "passed"}  # the test whose teardown skips has passed before
    for name in FILES:
        found.stdout.re_match_lines([f"{name}.py.*no reason is listed in tests/support/skips.py:.*"])


@pytest.mark.slow
def test_a_module_that_skips_ends_the_run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(pytester, monkeypatch, "true", *WORKERS, test_module=FILES["test_module"], test_it=RIGHT)
    assert found.ret
    found.stdout.re_match_lines(["test_module.py.*no reason is listed in tests/support/skips.py:.*"])


@pytest.mark.parametrize("options", [(), pytest.param(WORKERS, marks=pytest.mark.slow)], ids=["alone", "workers"])
def test_listed_skips_are_told_with_their_reasons(
    options: tuple[str, ...], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(pytester, monkeypatch, "true", *options, test_it=RIGHT)
    assert found.ret == 0
    found.assert_outcomes(passed=1, skipped=3, xfailed=1)
    found.stdout.fnmatch_lines(
        [
            "*skips and their reasons*",
            "3 × test_it.py::test_first: no luck today (luck cannot be installed)",
            "1 × test_it.py::test_fails: a bug of another library (an expected failure)",
        ]
    )


def test_outside_of_ci_a_skip_is_told(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(pytester, monkeypatch, "", **FILES)
    assert found.ret == 0
    assert sum(outcomes(found)[name] for name in ("skipped", "xfailed")) == len(FORMS)
    for name in FILES:
        found.stdout.fnmatch_lines([f"1 × {name}.py*(not listed: fails in CI)"])


def test_this_very_run_is_checked(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.pluginmanager.has_plugin("tests.support.skips")
    assert all(one.why for one in skips.SKIPS)
    for one in skips.SKIPS:
        assert (Path(__file__).parents[2] / one.where.partition("::")[0]).is_file(), one.where


def test_examples_are_the_same_in_every_run() -> None:
    default = hypothesis.settings.get_profile("default")
    assert default.derandomize
    assert default.database is None
    assert default.print_blob
    assert os.environ.get("HYPOTHESIS_PROFILE") or hypothesis.settings().derandomize


@pytest.mark.parametrize("again", range(2))
def test_generators_start_alike_in_every_test(again: int) -> None:
    import random

    assert torch.initial_seed() == 0
    found = (torch.rand(()).item(), float(np.random.rand()), random.random())
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    assert found == (torch.rand(()).item(), float(np.random.rand()), random.random())
