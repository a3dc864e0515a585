"""No code outside `algorithms/` knows an algorithm by its name.

Everything about an algorithm follows from its registration. Comparisons with names, or lists of names, would have to be
found and edited for every new algorithm. Two places may name algorithms, but not compare names: the defaults of
options, and `reproduce/`, which trains the methods of one paper.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import cutlayer
from cutlayer import plugins

PACKAGE = Path(cutlayer.__file__).parent
NAMES = set(plugins.index("algorithm"))
STUDY = "reproduce"  # trains the methods of one paper
DEFAULTS = "options.py"  # the default algorithms of runs and comparisons


def constants(node: ast.AST) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value


def compared(tree: ast.Module) -> Iterator[str]:
    """Names of algorithms that are compared with something or used as a literal key."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from (name for side in (node.left, *node.comparators) for name in constants(side) if name in NAMES)
        if isinstance(node, ast.MatchValue):
            yield from (name for name in constants(node) if name in NAMES)


def listed(tree: ast.Module) -> Iterator[str]:
    """Names of algorithms in literal collections, as keys of dictionaries, and in literal types."""
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            yield from (e.value for e in node.elts if isinstance(e, ast.Constant) and e.value in NAMES)
        if isinstance(node, ast.Dict):
            yield from (k.value for k in node.keys if isinstance(k, ast.Constant) and k.value in NAMES)


def outside() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        if place.parts[0] != "algorithms":
            yield str(place), ast.parse(path.read_text())


def test_no_name_is_compared() -> None:
    assert {place: found for place, tree in outside() if (found := sorted(set(compared(tree))))} == {}


def test_no_names_are_listed() -> None:
    lists = {place: found for place, tree in outside() if (found := sorted(set(listed(tree))))}
    assert {p: found for p, found in lists.items() if not p.startswith(f"{STUDY}/") and p != DEFAULTS} == {}
    assert lists[DEFAULTS] == ["cl", "fl", "psl", "sfl", "sglr", "ssl"]  # the defaults of `compare` and `plan`


def test_no_name_is_anywhere_else() -> None:
    """Not in calls, subscripts or defaults either."""
    found = {(place, name) for place, tree in outside() for name in constants(tree) if name in NAMES}
    assert {(p, name) for p, name in found if not p.startswith(f"{STUDY}/") and p != DEFAULTS} == set()


def test_the_test_sees_names() -> None:
    tree = ast.parse("a == 'sglr'\nb in ('psl', x)\nc = {'fl': 1}\nd = ['ssl']")
    assert sorted(compared(tree)) == ["psl", "sglr"]
    assert sorted(listed(tree)) == ["fl", "psl", "ssl"]


def test_no_sentence_names_algorithms() -> None:
    """Neither in messages of the command line nor in reports, since they would stay after an algorithm is removed."""
    word = re.compile(rf"\b({'|'.join([*NAMES, *(e.title for e in plugins.index('algorithm').values())])})\b")
    said = {
        (place, found[0])
        for place, tree in outside()
        if place in ("checks.py", "costs/plan.py", "cli/application.py", "cli/leakage_command.py")
        for text in constants(tree)
        if (found := word.search(text))
    }
    pages = {
        (path.name, found[0])
        for path in (PACKAGE / "report").glob("*.j2")
        if (found := word.search(path.read_text("utf-8")))
    }
    assert said | pages == set()
