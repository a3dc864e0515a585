"""The layout of the package: names are unique, so files and classes can be found by name."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from support import ROOT

import cutlayer

PACKAGE = Path(cutlayer.__file__).parent


def twice(places: Iterable[tuple[str, Path]]) -> Mapping[str, list[str]]:
    found = defaultdict(list)
    for name, path in places:
        found[name].append(str(path.relative_to(ROOT)))
    return {name: sorted(paths) for name, paths in found.items() if len(paths) > 1}


def test_no_file_name_is_there_twice() -> None:
    own = (path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))
    assert not twice((path.name, path) for path in own)
    tests = (path for folder in ("tests", "examples") for path in (ROOT / folder).rglob("test_*.py"))
    assert not twice((path.name, path) for path in tests)  # pytest imports all of them as top-level modules


def test_no_public_class_name_is_there_twice() -> None:
    classes = (
        (node.name, path)
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not twice(classes)


def test_the_page_on_architecture_names_every_file() -> None:
    """Each file is named in the row of its room."""
    page = (ROOT / "docs/architecture.md").read_text()
    rooms = {
        room: row for row in page.splitlines() if row.startswith("| `") for room in re.findall(r"`([\w./]+)`", row)
    }
    missing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        room = place.stem if place.parent == Path() else f"{place.parent}/"
        if path.name != "__init__.py" and f"`{place.stem}`" not in rooms.get(room, ""):
            missing.append(str(place))
    assert not missing
