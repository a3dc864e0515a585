"""The pages of the documentation: links and anchors lead somewhere, and the contents list every page.

`make docs` builds the site and is stricter. This file does not need Sphinx.
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
from support import ROOT

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("algorithms/*.md")), *sorted(DOCS.glob("tutorials/*.md"))]
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]


def origin(path: Path) -> Path:
    """The file with a page's text: the page itself, or the file that it includes."""
    included = re.match(r"```\{include\} (\S+)", path.read_text(encoding="utf-8"))
    return (path.parent / included[1]).resolve() if included else path


@cache
def read(path: Path) -> str:
    """A page's text without its code blocks."""
    text = origin(path).read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub and Sphinx make from a page's headings."""
    heads = re.findall(r"^#{1,4} (.+)$", read(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    place = origin(page)
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (place.parent / name).resolve() if name else place
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_in_the_contents() -> None:
    """Each page is listed once, in one of the four parts."""
    listed = re.findall(r"^[\w./-]+$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    own = [page for page in PAGES if page.parent.name != "algorithms"]
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in own} - {"index"}
    assert sorted(listed) == sorted(pages | {"api/index"})


def test_a_term_is_explained_once() -> None:
    terms = re.findall(r"^\| ([^|]+) \|", read(DOCS / "glossary.md"), re.MULTILINE)[1:]
    plain = [term.lower().replace("-", " ") for term in terms]
    assert plain == sorted(set(plain))
    assert len(terms) > 80


def test_every_extra_is_explained() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    table = (DOCS / "install.md").read_text(encoding="utf-8")
    assert [name for name in extras if f"`{name}`" not in table] == []


def test_modules_that_examples_import_are_in_the_reference() -> None:
    source = (DOCS / "api_pages.py").read_text(encoding="utf-8")
    texts = [path.read_text(encoding="utf-8") for path in [*PAGES, ROOT / "README.md"]]
    used = {name for text in texts for name in re.findall(r"^(?:from|import) (cutlayer[\w.]*)", text, re.MULTILINE)}
    assert {name for name in used if f'"{name}"' not in source} <= {
        name for name in used if name.startswith("cutlayer.algorithms.")
    }


def test_words_that_readers_stumble_over() -> None:
    """Pages and help use common words instead of these."""
    words = {
        r"mend(?:s|ed)?": "fix",
        r"such a one": "the noun",
        r"in earnest": "in a real study",
        r"whoever": "the party that",
        r"reckon\w*": "calculate, estimate, assume",
        r"nobody|somebody|everybody": "client, server, person",
        r"for ever": "without end",
    }
    found = re.compile(rf"(?<![\w:])(?:{'|'.join(words)})(?!\w)", re.IGNORECASE)
    texts = {page.name: read(page) for page in [*PAGES, *OUTSIDE]}
    assert {name: hits for name, text in texts.items() if (hits := found.findall(text))} == {}, words
