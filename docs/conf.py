"""How the documentation is built: `make docs`. The pages are Markdown; the reference of the API is written here."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import api_pages

import cutlayer

project = "Cutlayer"
author = copyright = "The Cutlayer authors"
version = release = cutlayer.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
highlight_language = "none"  # a block without a language is plain text
nb_execution_mode = "force"  # the tutorials are notebooks: each is run anew, in a folder that is then gone
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for `cutlayer` in cells
os.environ |= {"COLUMNS": "130", "TERM": "dumb"}  # what it prints there: wide, and without bold letters
exclude_patterns: list[str] = []
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["notebooks.css", "figures.css"]
html_title = f"Cutlayer {version}"
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True

nitpicky = True
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 100


PAGES = {
    "../CHANGELOG.md": "changes.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../SECURITY.md": "security-policy.md",
    "../CODE_OF_CONDUCT.md": "conduct.md",
    "../examples/own_algorithm/README.md": "own-algorithm.md",
    "../examples/own_algorithm": "own-algorithm.md",
}
"""Files outside this folder that are pages of the site."""


def read(app: Any, docname: str, source: list[str]) -> None:
    """A page is about to be parsed: put the text that it includes in its place, and let links lead to pages."""
    page = Path(app.srcdir, f"{docname}.md")
    if included := re.match(r"```\{include\} (\S+)\n```\n$", source[0]):
        page = (page.parent / included[1]).resolve()
        app.env.note_dependency(str(page))
        source[0] = page.read_text(encoding="utf-8")

    def link(found: re.Match[str]) -> str:
        name, mark, anchor = found[1].partition("#")
        if not name or "://" in name:
            return found[0]
        place = os.path.relpath(page.parent / name, app.srcdir)
        return f"]({os.path.relpath(PAGES.get(place, place), Path(docname).parent)}{mark}{anchor})"

    if page.suffix == ".md":
        source[0] = re.sub(r"\]\(([^)\s]+)\)", link, source[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    api_pages.setup(app)
    app.connect("source-read", read)
