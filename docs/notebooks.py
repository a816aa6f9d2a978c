"""A Sphinx extension: each tutorial and how-to page can be downloaded as a notebook.

A notebook has the text of its page as Markdown cells, and the examples as code cells that end where the page shows a
result. Pictures are embedded, and links to other pages become text.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from doctest import DocTestParser
from pathlib import Path
from typing import Any

_PAGES = ("tutorial-", "howto-")
_LINK = """
<p><a class="reference external" href="notebooks/{}.ipynb" download>Download this page as a notebook</a></p>
"""
_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


def setup(app: Any) -> dict[str, bool]:  # noqa: D103, Sphinx calls it
    app.connect("source-read", _add_link)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True}


def _add_link(app: Any, name: str, source: list[str]) -> None:
    if name.startswith(_PAGES):
        source[0] += _LINK.format(name)


def _write(app: Any, problem: Exception | None) -> None:
    if problem is None and app.builder.format == "html":
        folder = Path(app.outdir, "notebooks")
        folder.mkdir(exist_ok=True)
        for name in sorted(app.env.found_docs):
            if name.startswith(_PAGES):
                text = json.dumps(_notebook(Path(app.srcdir, f"{name}.md")), indent=1, ensure_ascii=False)
                (folder / f"{name}.ipynb").write_text(text + "\n", encoding="utf-8")


def _notebook(page: Path) -> dict[str, Any]:
    """The notebook of a page, in version 4.5 of the format."""
    cells: list[dict[str, Any]] = []
    for part in re.split(r"^(```python\n.*?^```\n)", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL):
        if part.startswith("```python\n"):
            cells += _code(part)
        elif part.strip():
            cells.append(_text(part.strip(), page.parent))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _text(text: str, folder: Path) -> dict[str, Any]:
    """A Markdown cell."""
    attachments: dict[str, dict[str, str]] = {}

    def embed(found: re.Match[str]) -> str:
        path = folder / found[2]
        attachments[path.name] = {_TYPES[path.suffix]: b64encode(path.read_bytes()).decode()}
        return f"![{found[1]}](attachment:{path.name})"

    text = re.sub(r"!\[([^]]*)\]\(([^):]+)\)", embed, text)
    text = re.sub(r"(?<!!)\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    cell: dict[str, Any] = {"cell_type": "markdown", "metadata": {}, "source": text}
    return cell | {"attachments": attachments} if attachments else cell


def _code(block: str) -> list[dict[str, Any]]:
    """The code cells of a block of examples."""
    cells, source = [], ""
    examples = DocTestParser().get_examples(block.removeprefix("```python\n").removesuffix("```\n"))
    for example in examples:
        source += re.sub(r" *# doctest: .*", "", example.source)
        if example.want or example is examples[-1]:
            metadata = {"tags": ["raises-exception"]} if example.exc_msg is not None else {}
            cells.append({"cell_type": "code", "execution_count": None, "metadata": metadata, "outputs": []})
            cells[-1]["source"], source = source.rstrip("\n"), ""
    return cells
