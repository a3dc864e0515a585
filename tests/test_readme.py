"""The examples of README, first steps and studies work unchanged: Python blocks and `cutlayer` commands."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from support import ROOT, call

from cutlayer import CompareConfig
from cutlayer.effort import Effort
from cutlayer.sweep import expanded

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + "".join(
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("first-steps.md", "studies.md")
)
PYTHON = re.findall(r"```python\n(.*?)```", PAGES, re.DOTALL)
# Without `make` targets, which run these tests, and without lines that state a long duration.
COMMANDS = [
    line.split("  #")[0].split(" > ")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", PAGES, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("cutlayer ") and "minute" not in line
]


def test_there_are_examples() -> None:
    assert len(PYTHON) >= 4
    assert len(COMMANDS) >= 16


def test_the_readme_is_for_strangers() -> None:
    """It is short, has five lines of Python, and links only to existing files."""
    assert len(README.splitlines()) <= 120
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert sum(1 for line in program.splitlines() if line) == 5
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_examples(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each block works alone in an empty folder and prints something."""
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON[number], "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


@pytest.mark.long
def test_commands(tmp_path: Path) -> None:
    """All commands run in one folder, in order: later ones use the runs of earlier ones.

    The first TOML example is written to a file unchanged. The others are sweeps and a tuning, which are only built.
    Results are not checked, since clients have few samples.
    """
    config, *sweeps = re.findall(r"```toml\n(.*?)```", PAGES, re.DOTALL)
    (tmp_path / "sweep.toml").write_text(config)
    for text in sweeps:
        config = CompareConfig.of(tomllib.loads(text))
        if config.tuning:
            assert Effort.of(config).trials == 9
        else:
            assert len(expanded(config).variant) > 5
    for command in COMMANDS:
        words = shlex.split(command.replace("--seconds 2", "--seconds 0.2"))[1:]
        few = ["--samples-per-client", "30"] if words[0] in ("run", "compare") else []
        call(*words, *few, cwd=tmp_path, plots=words[0] in ("report", "plan"))


def test_it_names_the_commands_that_exist() -> None:
    """The Makefile has every `make` target that README and CONTRIBUTING name."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets
