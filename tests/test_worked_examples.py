"""The worked examples run unchanged, in order, and print what their page shows."""

from __future__ import annotations

import runpy
import shlex
from pathlib import Path

import pytest
from support import ROOT, call
from transcripts import agree, blocks, plain

PAGE = (ROOT / "docs" / "worked-examples.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All except the deployment, whose processes are tested in tests/network."""
    monkeypatch.chdir(tmp_path)
    commands = 0
    for block in blocks(PAGE):
        if block.language != "console":
            Path(block.purpose).write_text(block.text, encoding="utf-8")
            continue
        for line, shown in block.commands if not block.purpose else ():
            program, *words = shlex.split(line)
            commands += 1
            if program == "python":
                runpy.run_path(words[0], run_name="__main__")
                continue
            done = call(*words, code=2 if "error: " in shown else 0)
            agree(shown, done.stderr + done.stdout)
    assert commands >= 10


def test_transcripts_that_differ_are_noticed() -> None:
    shown = "2026-11-29 11:39:50 sfl: round 5/10, test rmse 64.92 (440 ms, evaluation 15.1 ms)\nruns/a/curves.png\n"
    later = shown.replace("11:39:50", "12:00:01").replace("440 ms", "1.20 s").replace("64.92", "65.01")
    agree(shown, later)
    assert "curves" not in plain(shown)
    for before, after in (("rmse 64.92", "rmse 32.1"), ("rmse", "mae"), ("5/10", "5/100"), ("sfl", "sfl: error")):
        with pytest.raises(AssertionError):
            agree(shown, later.replace(before, after).replace("65.01", after.split()[-1]))
