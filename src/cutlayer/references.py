"""The entries of `references.bib`, and BibTeX of what was used.

What a registration says of its `paper` ("arXiv 2112.05929", "doi 10.24432/C50P49", several of them with commas, or a
whole BibTeX entry) and `library` is all that is known. Nothing is invented: a thing without an entry is named in a
comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from cutlayer import __version__
from cutlayer.plugins import KINDS

_REFERENCES = Path(__file__).with_name("references.bib")
_ALWAYS = ("torch", "numpy")
_IDENTIFIER = re.compile(r"(arxiv|doi) \S+", re.I)
_BROUGHT = ("model", "data")  # libraries that most users have anyway

Used = dict[str, str]
"""What was used: its `kind`, `name`, `paper` and `library`; `own` is "yes" if it is not of this package."""


def bibtex(used: Iterable[Mapping[str, str]], libraries: Iterable[str] = ()) -> str:
    """The entries of all that was `used`, each once, and of `libraries` besides torch and numpy; comments name things
    that should be cited and have no entry here.
    """
    every = list(used)
    wanted = dict.fromkeys(named for thing in every for named in _papers(thing.get("paper", "")))
    known, own = [n for n in wanted if _key(n)], [n for n in wanted if not _key(n) and n.startswith("@")]
    tools = [*_ALWAYS, *(thing["library"] for thing in every if thing.get("library")), *libraries]
    keys = dict.fromkeys(["cutlayer", *(_key(name) for name in known), *tools])
    comments = dict.fromkeys(line for thing in every for line in _unsaid(thing))
    return "\n\n".join([*filter(None, ["\n".join(comments)]), *(references()[key] for key in keys if key), *own]) + "\n"


@cache
def references() -> dict[str, str]:
    """The known entries, by their keys."""
    text = _REFERENCES.read_text(encoding="utf-8").replace("VERSION", __version__)
    return {found[2]: found[1].strip() for found in re.finditer(r"^(@\w+\{([\w-]+),.*?^\})", text, re.M | re.S)}


def _papers(text: str) -> list[str]:
    """The papers of a registration: a BibTeX entry, or identifiers."""
    parts = [part.strip() for part in text.split(",")]
    return parts if all(_IDENTIFIER.fullmatch(part) for part in parts) else [text.strip()] if text.strip() else []


@cache
def _key(name: str) -> str:
    """The key of the entry that "arXiv ...", "doi ..." or a key names; empty if it is not known."""
    kind, _, number = name.partition(" ")
    field = {"arxiv": "eprint", "doi": "doi"}.get(kind.lower())
    if field is None:
        return name if name in references() else ""
    wanted = f"{field} = {{{number.strip()}}}"
    return next((key for key, entry in references().items() if wanted in entry), "")


def _unsaid(thing: Mapping[str, str]) -> Iterator[str]:
    """Comments about a thing with a citation that is not known here."""
    word = KINDS[thing["kind"]].word if thing["kind"] in KINDS else thing["kind"]
    what = " ".join(f"{word} {thing['name']!r}".split())
    papers = _papers(thing.get("paper", ""))
    for name in papers:
        if not _key(name) and not name.startswith("@"):
            yield f"% {what}: no entry is known here for {' '.join(name.split())}; add it yourself"
    if thing.get("own") and not papers:
        whose = "cite where it comes from" if thing["kind"] in _BROUGHT else "cite its source, if it has one"
        yield f"% {what} names no paper: {whose}"
