"""The entries of references.bib are complete, and all registered things find their entries."""

from __future__ import annotations

import re

import pytest
import yaml
from support import ROOT

import cutlayer
from cutlayer import plugins
from cutlayer.references import bibtex, references

FILE = (ROOT / "src/cutlayer/references.bib").read_text(encoding="utf-8")
SOFTWARE = {"cutlayer", "peft"}  # have no paper


def parsed(text: str) -> dict[str, dict[str, str]]:
    """The entries as BibTeX reads them: key -> field -> value. Text between entries is a comment."""
    entries: dict[str, dict[str, str]] = {}
    at = 0
    while found := re.compile(r"^@(\w+)\{([^,\s]+),", re.M).search(text, at):
        depth, end = 1, found.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        body, fields, at = text[found.end() : end - 1], {}, end
        while field := re.match(r"\s*(\w+)\s*=\s*\{", body):
            depth, close = 1, field.end()
            while depth:
                depth += {"{": 1, "}": -1}.get(body[close], 0)
                close += 1
            fields[field[1]] = body[field.end() : close - 1]
            body = body[close:].removeprefix(",")
        assert not body.strip(), body
        assert found[2] not in entries, found[2]
        entries[found[2]] = fields
    return entries


def test_the_entries_are_whole_and_each_is_there_once() -> None:
    entries = parsed(FILE)
    assert list(entries) == list(references())
    assert len(entries) == FILE.count("\n@")
    for key, entry in entries.items():
        assert {"author", "title"} <= set(entry), key
        assert key in SOFTWARE or {"eprint", "doi"} & set(entry), key
        assert key == "cutlayer" or re.fullmatch(r"(19|20)\d\d", entry["year"]), key
        assert re.fullmatch(r"(\d{4}\.\d{4,5})?", entry.get("eprint", "")), key
        assert re.fullmatch(r"(10\.\d{4,}/\S+)?", entry.get("doi", "")), key
        assert all(", " in name or name.startswith("{") or name == "others" for name in entry["author"].split(" and "))
    for name in ("eprint", "doi", "title"):
        values = [entry[name] for entry in entries.values() if name in entry]
        assert len(values) == len(set(values)), name
    assert FILE.isascii()  # old programs need it


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_every_paper_and_library_of_a_registration_has_an_entry(kind: str) -> None:
    for entry in plugins.index(kind).values():
        facts = entry.facts
        thing = {"kind": kind, "name": entry.name, "paper": facts.get("paper", ""), "library": facts.get("library", "")}
        made = parsed(bibtex([thing]))
        assert "%" not in bibtex([thing])
        named = [*filter(None, thing["paper"].split(",")), *filter(None, [thing["library"]])]
        assert len(made) == 3 + len(named), entry.name
        numbers = {number for found in made.values() for number in (found.get("eprint"), found.get("doi"))}
        assert {name.split()[-1] for name in thing["paper"].split(",") if name} <= numbers


def test_every_algorithm_has_a_paper() -> None:
    assert [e.name for e in plugins.index("algorithm").values() if not e.facts["paper"]] == []


def test_cutlayer_itself_is_cited_as_its_citation_file_says() -> None:
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    entry = parsed(bibtex([]))["cutlayer"]
    assert entry["title"].replace("{", "").replace("}", "") == said["title"]
    assert [entry["author"]] == [f"{{{author['name']}}}" for author in said["authors"]]
    assert entry["note"] == f"Version {said['version']}" == f"Version {cutlayer.__version__}"
    paper, known = said["references"][0], parsed(FILE)["pal2021sglr"]
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert known["author"].split(" and ") == names
    assert (known["title"], known["year"]) == (paper["title"], str(paper["year"]))


def test_what_has_no_entry_is_named_and_never_made_up() -> None:
    own = {"kind": "algorithm", "name": "mine", "paper": "", "own": "yes"}
    other = {"kind": "data", "name": "scans", "paper": "arXiv 9999.99999", "own": "yes"}
    entry = {"kind": "codec", "name": "k", "paper": "@misc{k2026,\n  title = {K},\n}", "own": "yes"}
    found = bibtex([own, own, other, entry])
    assert found.splitlines()[:2] == [
        "% algorithm 'mine' names no paper: cite its source, if it has one",
        "% data set 'scans': no entry is known here for arXiv 9999.99999; add it yourself",
    ]
    assert list(parsed(found)) == ["cutlayer", "torch", "numpy", "k2026"]
    assert bibtex([{"kind": "data", "name": "p.csv", "own": "yes"}]).startswith(
        "% data set 'p.csv' names no paper: cite where"
    )
    assert "no entry is known here for A text, of lines;" in bibtex(
        [{"kind": "data", "name": "d", "paper": "A text, of\nlines"}]
    )
