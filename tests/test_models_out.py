"""The examples of docs/models-out.md work unchanged, in order, in one folder."""

import re
import shlex
from pathlib import Path

import pytest
from support import ROOT, call

PAGE = (ROOT / "docs/models-out.md").read_text(encoding="utf-8")


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|sh)\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 5
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, "models-out.md", "exec"), {"__name__": "__main__"})
        for line in text.splitlines() if kind == "sh" else ():
            call(*shlex.split(line)[1:])
    assert "torch.Size([359, 10])" in capsys.readouterr().out
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 5
    assert (tmp_path / "runs/kept/export/last-client-2.safetensors.json").exists()
