"""Runs the examples in README.md, in docs/ and in the docstrings of the packages."""

from __future__ import annotations

from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from typing import Any

import pytest
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser
from sybil.sybil import SybilCollection

FLAGS = ELLIPSIS | NORMALIZE_WHITESPACE

TOGETHER = (
    "benchmarks/tests/test_conformance.py",
    "tests/examples/test_demo.py",
    "tests/project/test_packaging.py",
    "tests/project/test_site.py",
)
"""Files whose tests run in one worker, because they share a result that takes long to compute."""

pytest_plugins = ["tests.support.session", "tests.support.skips"]

# No SkipParser: an example that it skips counts as one that passed.
pages = Sybil(parsers=[PythonCodeBlockParser(doctest_optionflags=FLAGS)], patterns=["README.md", "docs/*.md"])
docstrings = (
    Sybil(
        parsers=[DocTestParser(FLAGS)],
        path=path,
        patterns=["*.py"],  # at any depth: patterns are matched from the right
        document_types={".py": PythonDocStringDocument},
    )
    for path in ("src", "benchmarks/src", "examples")
)
pytest_collect_file = SybilCollection([pages, *docstrings]).pytest()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests go to the workers one by one, the examples of a document together: they share a namespace.

    The tests of the files in `TOGETHER` stay together, too.

    A scheduler of one's own, because `--dist=loadgroup` of pytest-xdist 3.8 has no effect under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, rest = nodeid.partition("::")
            return path if rest.startswith("line:") or path in TOGETHER else nodeid

    return Scheduling(config, log)
