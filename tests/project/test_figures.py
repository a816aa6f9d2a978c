"""Measured figures in the documentation: each page names the command that measures them, and the commit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROW = re.compile(r"^\|.*\|\s*[−+]?\d+\.\d+(?: ×| s|, [^|]*)?\s*\|", re.MULTILINE)
COMMAND = re.compile(r"lensor(?:_bench|[ -]bench|[ -]reproduce)|python -m examples")
COMMIT = re.compile(r"commits? `?([0-9a-f]{7})\b")
NOT_MEASURED = ("conformance.md", "limits.md")
"""A table that a test compares with the code, and version numbers."""


def measured(page: Path) -> bool:
    if page.name in NOT_MEASURED or "decisions" in page.parts:
        return False
    text = page.read_text(encoding="utf-8")
    return bool(ROW.search(text)) or "headline.png" in text


def test_some_pages_have_figures() -> None:
    names = {page.name for page in PAGES if measured(page)}
    assert names >= {"README.md", "index.md", "performance.md", "curvature.md", "sampling.md", "jax.md", "crs.md"}


@pytest.mark.parametrize("page", [page for page in PAGES if measured(page)], ids=lambda page: page.name)
def test_figures_have_a_command_and_a_commit(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert COMMAND.search(text), f"{page.name} has measured figures, expected the command that measures them"
    assert COMMIT.search(text), f"{page.name} has measured figures, expected their commit"
