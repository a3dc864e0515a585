"""The page on evaluation works unchanged: its files are written, and its commands and programs run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from support import ROOT, call

from cutlayer import plugins

PAGE = (ROOT / "docs/evaluation.md").read_text()
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", PAGE, re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
FILES = {m[1]: text for text in PYTHON if (m := re.match(r"# (\w+\.py)\n", text))}
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]


def test_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for text in PYTHON:
        exec(compile(text, "docs/evaluation.md", "exec", dont_inherit=True), {"__name__": "__main__"})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    call(*shlex.split(command)[1:], cwd=tmp_path)
    assert list(tmp_path.glob("runs/*/report.html"))


def test_the_list_of_metrics() -> None:
    printed = call("list", "metrics").stdout
    assert all(name in printed for name in plugins.index("metric"))
