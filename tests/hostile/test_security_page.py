"""The page on security names only tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tests_that_the_page_names_exist() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page))
    assert len(named) > 30
    for path, name in sorted(named):
        tree = ast.parse((ROOT / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"


def test_every_row_of_the_attacks_names_a_test() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    (section,) = re.findall(r"\n## What an attacker can try\n(.*?)\n## ", page, re.DOTALL)
    rows = [
        line for line in section.splitlines() if line.startswith("|") and "---" not in line and "in 0.1.0" not in line
    ]
    without = [row for row in rows if "::" not in row]
    assert [row.split("|")[1].strip() for row in without] == ["secure aggregation"]
