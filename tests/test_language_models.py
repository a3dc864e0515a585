"""The tutorial of docs/language-models.md runs as it stands, in order, in one folder."""

import re
import shlex
from pathlib import Path

import pytest
from support import ROOT, call

pytest.importorskip("transformers", reason="needs cutlayer[lm]")
pytest.importorskip("peft", reason="needs cutlayer[lm]")

PAGE = (ROOT / "docs/language-models.md").read_text(encoding="utf-8").partition("## Ten minutes")[2]


@pytest.mark.long
@pytest.mark.filterwarnings("default")
def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(python|sh)\n(.*?)```", PAGE, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "sh", "python"]
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, "language-models.md", "exec"), {"__name__": "__main__"})
            continue
        for line in text.splitlines():
            call(*shlex.split(line)[1:])
    assert (tmp_path / "adapters" / "adapter_model.safetensors").is_file()
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("The")
