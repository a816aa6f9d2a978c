"""The documentation site: Sphinx over the Markdown pages of this folder and the docstrings of the package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for notebooks.py

project = "Lensor"
copyright = "the Lensor authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "notebooks"]
html_theme = "furo"
html_title = "Lensor"
html_favicon = "favicon.svg"
html_static_path: list[str] = []
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Equation", "notes_style")]


def setup(app):  # noqa: D103, Sphinx calls it
    app.connect("autodoc-process-docstring", _as_restructured_text)


def _as_restructured_text(app, what, name, obj, options, lines) -> None:
    """Docstrings mark code with single backticks and have shapes like [n, *output_size]: spell both for Sphinx."""
    import re

    example = False
    for at, line in enumerate(lines):
        example = line.lstrip().startswith((">>>", "...")) or (example and bool(line.strip()))
        if not example:
            parts = re.split(r"(`[^`]+`)", line)
            lines[at] = "".join(
                f"`{part}`" if part[:1] == "`" else part.replace("*", r"\*").replace("|", r"\|") for part in parts
            )
