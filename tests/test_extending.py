"""The page on extending works unchanged: its files, commands and programs, and the errors that it shows."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from support import ROOT, call

from cutlayer import plugins

PAGE = (ROOT / "docs/extending.md").read_text()
BLOCKS = re.findall(r"```(python|sh|console)\n(.*?)```", PAGE, re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
FILES = {m[1]: text for text in PYTHON if (m := re.match(r"# (\w+\.py)\n", text))}
SCRIPTS = [text for text in PYTHON if text not in FILES.values()]
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
ERRORS = re.findall(r"\$ (cutlayer .*)\n(error: .*)\n", "\n".join(text for kind, text in BLOCKS if kind == "console"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's files, from which they can be imported."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in FILES:
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    return tmp_path


def test_there_is_an_example_of_each_kind() -> None:
    table = PAGE.partition("| kind |")[2].partition("\n\n")[0]
    assert re.findall(r"`(cutlayer\.\w+)` \|$", table, re.MULTILINE) == [k.group for k in plugins.KINDS.values()]
    for name in (
        "algorithm",
        "model",
        "task",
        "data_set",
        "data_format",
        "partition_scheme",
        "averaging",
        "screening",
        "codec",
        "defence",
        "attack",
        "search",
    ):
        assert any(f"@{name}(" in text for text in FILES.values()), name
    assert any('@register("schedule"' in text for text in FILES.values())


def test_programs_and_commands(place: Path) -> None:
    """In the page's order, since a program writes the file that a command reads."""
    assert len(COMMANDS) >= 12
    for script in SCRIPTS:
        exec(compile(script, "docs/extending.md", "exec", dont_inherit=True), {"__name__": "__main__"})
    for command in COMMANDS:
        call(*shlex.split(command)[1:], cwd=place)


@pytest.mark.parametrize(("command", "error"), ERRORS)
def test_errors(place: Path, command: str, error: str) -> None:
    assert call(*shlex.split(command)[1:], cwd=place, code=2).stderr.strip() == error


def test_declared_options(place: Path) -> None:
    assert set(importlib.import_module("declared").Example().model_dump()) == {"again", "limit", "order", "widths"}


@pytest.mark.filterwarnings("ignore::cutlayer.errors.CutlayerWarning")
def test_its_tests_pass(place: Path) -> None:
    pytest.importorskip("cutlayer.testing")
    tests = [f for name, f in vars(importlib.import_module("test_own")).items() if name.startswith("test_")]
    assert len(tests) == 3
    for proof in tests:
        proof()
