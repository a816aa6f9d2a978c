"""The documentation site: it builds without warnings, its links lead somewhere, and no public name is missing."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

pytest.importorskip("sphinx", reason="Sphinx is not installed")

ROOT = Path(__file__).parents[1]
MODULES = (
    *("lensor", "lensor.ops", "lensor.functional", "lensor.nn", "lensor.curvature", "lensor.optim", "lensor.sampling"),
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "-q",
        str(ROOT / "docs"),
        str(folder),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-4000:]
    return folder


def test_every_link_leads_somewhere(site: Path) -> None:
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    names = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    count = 0
    for page, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            target, part = urldefrag(unescape(link))
            if re.match(r"[a-z]+:|//", target) or target == "#":
                continue
            file = (page.parent / unquote(target.split("?")[0])).resolve() if target else page
            assert file.exists(), f"{page.name} links to {link}"
            if part and file in names:
                assert unquote(part) in names[file], f"{page.name} links to {link}"
            count += 1
    assert count > 500


def test_no_public_name_is_missing(site: Path) -> None:
    text = (site / "reference.html").read_text(encoding="utf-8")
    shown = set(re.findall(r'\bid="(lensor[\w.]*)"', text))
    for module in MODULES:
        package = importlib.import_module(module)
        functions = (
            [name for name in vars(package) if not name.startswith("_")] if module.endswith("functional") else []
        )
        for name in getattr(package, "__all__", functions):
            value = getattr(package, name)
            if type(value).__name__ == "module" or not getattr(value, "__doc__", None) or isinstance(value, tuple):
                continue
            home = getattr(value, "__module__", "")
            if not home.startswith("lensor"):
                continue
            assert {f"{module}.{name}", f"{home}.{name}"} & shown, f"{module}.{name}"


def test_search_has_an_index(site: Path) -> None:
    assert "kfac" in (site / "searchindex.js").read_text(encoding="utf-8")
