"""The documentation site: it builds without warnings, its links lead somewhere, and no public name is missing."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cached_property, partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

pytest.importorskip("sphinx", reason="Sphinx is not installed")

ROOT = Path(__file__).parents[2]
MODULES = (
    *("lensor", "lensor.ops", "lensor.functional", "lensor.nn", "lensor.curvature", "lensor.optim"),
    *("lensor.sampling", "lensor.wisdom"),
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


def test_the_first_page_links_to_all_pages(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    body = text[text.index("<article") : text.index("</article>")]
    generated = {"index.html", "genindex.html", "search.html", "py-modindex.html"}
    assert {page.name for page in site.glob("*.html")} - generated <= set(re.findall(r'href="([\w-]+\.html)"', body))


def test_tutorials_are_notebooks(site: Path) -> None:
    notebooks = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in site.glob("notebooks/*.ipynb")}
    assert set(notebooks) == {path.stem for kind in ("tutorial", "howto") for path in site.glob(f"{kind}-*.html")}
    for name, notebook in notebooks.items():
        assert f'href="notebooks/{name}.ipynb"' in (site / f"{name}.html").read_text(encoding="utf-8")
        text = "".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        assert text.startswith("# ")
        assert not re.search(r"\]\((?!https?:|attachment:)", text)  # no link to a file that was not downloaded
    space: dict[str, Any] = {}
    for cell in notebooks["tutorial-network"]["cells"]:
        if cell["cell_type"] == "code":
            exec(cell["source"], space)  # the examples of all pages are tested with the pages
    assert "lensor" in space


MODULE = ("forward", "extra_repr")
"""What all modules of torch have."""


def public_members(owner: type) -> Iterator[tuple[str, type]]:
    """The public methods and properties of a class that Lensor defines, each with the class that does."""
    for base in owner.__mro__:
        if base.__module__.startswith("lensor"):
            for name, value in vars(base).items():
                described = inspect.isroutine(value) or isinstance(value, (property, cached_property))
                if described and not name.startswith("_") and name not in MODULE:
                    yield name, base


def test_no_public_name_is_missing(site: Path) -> None:
    text = (site / "reference.html").read_text(encoding="utf-8")
    shown = set(re.findall(r'\bid="(lensor[\w.]*)"', text))
    classes = {}
    for module in MODULES:
        package = importlib.import_module(module)
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.ismodule(value):
                continue
            home = getattr(value, "__module__", "lensor.sampling.schemes")  # a tuple, SCHEMES, has none
            if home.startswith("lensor"):
                assert {f"{module}.{name}", f"{home}.{name}"} & shown, f"{module}.{name}"
                if inspect.isclass(value):
                    classes[f"{module}.{name}"] = value
    missing = [
        f"{full}.{member}"
        for full, owner in classes.items()
        for member, base in public_members(owner)
        if not {f"{one}.{member}" for one in (full, f"{full.rpartition('.')[0]}.{base.__name__}")} & shown
    ]
    assert not missing
    assert {"lensor.Network.vjp", "lensor.Network.draw", "lensor.Sum.plan", "lensor.Plan.draw"} <= shown


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site served on the loopback interface while the tests run."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(("width", "height"), [(1300, 1000), (420, 900)], ids=["desktop", "phone"])
def test_pages_in_a_browser(browser: Any, site: Path, address: str, width: int, height: int, tmp_path: Path) -> None:
    browser.set_window_size(width, height)
    pages = [*sorted(path.name for path in site.glob("*.html")), "evaluation/index.html", "evaluation/crs.html"]
    assert {"index.html", "gallery.html", "tutorial-kfac.html", "reference.html"} <= set(pages)
    for page in pages:
        browser.get(f"{address}/{page}")
        sizes = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert sizes[0] <= sizes[1], f"{page} is {sizes[0]} wide in a window of {sizes[1]}"
        broken = browser.execute_script(
            "return [...document.images].filter(i => i.loading != 'lazy' && !(i.complete && i.naturalWidth))"
            ".map(i => i.src)"
        )
        assert not broken, page
        assert not browser.get_log("browser"), page
    browser.get(f"{address}/index.html")
    assert browser.save_screenshot(str(tmp_path / "index.png"))
    assert (tmp_path / "index.png").stat().st_size > 20_000
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    fetched = [one["params"]["request"]["url"] for one in requests if one["method"] == "Network.requestWillBeSent"]
    assert not [url for url in fetched if not url.startswith((address, "data:"))]  # the site needs no other host


def test_search_finds_pages(browser: Any, address: str) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get(f"{address}/index.html")
    field = browser.find_element("css selector", "input[name=q]")
    field.send_keys("woodbury")
    field.submit()
    results = "#search-results ul.search a"
    WebDriverWait(browser, 20).until(lambda b: b.find_elements("css selector", results))
    names = [link.get_attribute("href") for link in browser.find_elements("css selector", results)]
    assert any("curvature.html" in name for name in names)
    browser.get(names[0])
    assert "woodbury" in browser.page_source.lower()
    assert not browser.get_log("browser")
