"""The reference of the API: a page for each public module, written into docs/api before Sphinx reads the pages.

Docstrings are plain text with code in backticks and in indented blocks. `as_rst` makes of them what Sphinx reads.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import pkgutil
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sphinx.util import logging
from sphinx.util.nodes import make_refnode

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "api"

PUBLIC = (
    *("cutlayer", "cutlayer.testing", "cutlayer.plugins", "cutlayer.options", "cutlayer.errors"),
    *("cutlayer.algorithms", "cutlayer.algorithms.common", "cutlayer.verbs", "cutlayer.cohort", "cutlayer.server"),
    *("cutlayer.types", "cutlayer.gradients", "cutlayer.traffic", "cutlayer.tasks", "cutlayer.data", "cutlayer.models"),
    *("cutlayer.schedules", "cutlayer.averagings", "cutlayer.screenings", "cutlayer.wire", "cutlayer.defences"),
    *("cutlayer.attacks", "cutlayer.loggers", "cutlayer.searches", "cutlayer.collective"),
)
"""What programs and own things import. The algorithms' modules, whose texts are their pseudocode, come after these."""

INTRODUCTION = """\
Reference of the API
====================

What programs and things of your own import. A name that several modules show is described where it comes first. The
modules of the algorithms come last; their texts are their pseudocode.
"""


def modules() -> list[str]:
    """All modules that have a page, in order."""
    package = importlib.import_module("cutlayer.algorithms")
    papers = [f"cutlayer.algorithms.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
    return [*PUBLIC, *(name for name in papers if name not in PUBLIC and not name.endswith((".contract", ".heads")))]


def names_of(module: Any) -> list[str]:
    """A module's public names: those of its `__all__`, or what is defined in it."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not name.startswith("_")]
    own = inspect.getmembers(module, lambda value: getattr(value, "__module__", None) == module.__name__)
    return [name for name, _ in own if not name.startswith("_")]


def undocumented(things: Mapping[str, Any]) -> Iterator[str]:
    """Public classes, functions and methods without a docstring, which Sphinx would leave out."""
    for name, thing in things.items():
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and not thing.__doc__:
            yield name
        if inspect.isclass(thing):
            own = (
                known for known, value in vars(thing).items() if inspect.isfunction(value) and known == value.__name__
            )
            yield from (
                f"{name}.{known}" for known in own if known[0] != "_" and not inspect.getdoc(getattr(thing, known))
            )


def write_pages(app: Any) -> None:
    """Write the pages. A class or function that several modules show is described where it comes first."""
    FOLDER.mkdir(exist_ok=True)
    seen: set[int] = set()
    pages = {}
    for name in modules():
        module = importlib.import_module(name)
        things = {known: getattr(module, known) for known in names_of(module)}
        for missing in undocumented(things):
            log.warning("%s.%s has no docstring", name, missing, type="api", subtype="undocumented")
        repeated = [known for known, thing in things.items() if id(thing) in seen or inspect.ismodule(thing)]
        seen |= {id(thing) for thing in things.values() if callable(thing)}
        hidden = f"   :exclude-members: {', '.join(repeated)}\n" if repeated else ""
        pages[f"{name}.rst"] = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n   :members:\n{hidden}"
    listed = "\n   ".join(page.removesuffix(".rst") for page in pages)
    pages["index.rst"] = f"{INTRODUCTION}\n.. toctree::\n   :maxdepth: 1\n\n   {listed}\n"
    for old in FOLDER.glob("*.rst"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # else Sphinx would read it again
            path.write_text(text, encoding="utf-8")


def as_rst(lines: Sequence[str]) -> Iterator[str]:
    """A docstring's lines as reStructuredText: indented blocks and tables are shown as they are."""
    shown = False  # whether the line before was one of such a block
    listed = False  # whether the line before was an item of a list, or its continuation
    for line in lines:
        line = re.sub(r"^(\w+) = (\S.*?): ", r"- `\1 = \2`: ", line)  # an option and its default
        item = re.match(r"(?:[-*]|\d+\.) ", line) is not None
        block = bool(line.strip()) and (line.startswith("|") or (line.startswith("  ") and not listed))
        if block and not shown:
            yield from ("", "::", "")
        if shown and line.strip() and not block:
            yield ""
        if item and not listed:
            yield ""
        if listed and line.strip() and not item and not line.startswith(" "):
            yield ""
        yield f"   {line}" if block else inline(line)
        if line.strip():
            shown, listed = block, item or (listed and line.startswith(" "))


def inline(line: str) -> str:
    """A line of prose: code in backticks stays code, and nothing else is markup."""
    parts = re.split(r"(`[^`]+`)", line)
    return "".join(
        f"`{part}`" if i % 2 else re.sub(r"([\\*|`]|_(?!\w))", r"\\\1", part) for i, part in enumerate(parts)
    )


def convert(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Sphinx hands over each docstring and wants its lines replaced."""
    lines[:] = [*as_rst(lines)]


def resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """A name in a signature: a link to its one description, or plain text if it exists and has none here."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    domain = env.get_domain("py")
    last = target.split(".")[-1]
    found = {
        name for name in domain.objects if name.split(".")[-1] == last and domain.objects[name].objtype != "module"
    }
    if len(found) == 1:
        place = domain.objects[found.pop()]
        return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, contnode, target)
    return contnode if exists(target) else None


def exists(target: str) -> bool:
    """Whether something of this dotted name can be imported, or is known in a module that has been read."""
    words = re.split(r"[\[(]", target)[0].split(".")
    read = [module for name, module in [*sys.modules.items()] if name.startswith("cutlayer.")]
    if any(reached(place, words) for place in (builtins, typing, *read)) or reached(typing, words[-1:]):
        return True
    for end in range(len(words) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(words[:end]))
        except ImportError:
            continue
        if reached(module, words[end:]):
            return True
    return False


def reached(place: Any, words: Sequence[str]) -> bool:
    """Whether these attributes, one of another, are there."""
    for word in words:
        if not hasattr(place, word):
            return False
        place = getattr(place, word)
    return True


def setup(app: Any) -> None:
    """Called by conf.py."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", convert)
    app.connect("missing-reference", resolve)
