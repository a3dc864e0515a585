"""The tutorials of docs/language-models.md work unchanged, in order, in one folder."""

import re
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
from support import ROOT, call

pytest.importorskip("transformers", reason="needs cutlayer[lm]")
pytest.importorskip("peft", reason="needs cutlayer[lm]")

PAGE = (ROOT / "docs/language-models.md").read_text(encoding="utf-8")
PATIENCE = 120.0


def blocks(title: str) -> list[tuple[str, str]]:
    """The code blocks of a section: the words after the opening backticks, and the text."""
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"```(\w[\w ]*)\n(.*?)```", section, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in text.splitlines()]


def executed(text: str) -> None:
    exec(compile(text, "language-models.md", "exec"), {"__name__": "__main__"})


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with the tutorial's data and base model."""
    folder = tmp_path_factory.mktemp("tutorial")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        kinds = blocks("Ten minutes")
        assert [kind for kind, _ in kinds] == ["python", "sh", "python"]
        executed(kinds[0][1])
        for words in commands(kinds[1][1])[:2]:
            call(*words)
        yield folder


@pytest.mark.long
@pytest.mark.filterwarnings("default")
def test_the_tutorial(tutorial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (_, shell), (_, use) = blocks("Ten minutes")
    for words in commands(shell)[2:]:
        call(*words)
    assert (tutorial / "adapters" / "adapter_model.safetensors").is_file()
    executed(use)
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("The")


@pytest.mark.network
@pytest.mark.filterwarnings("default")
def test_three_machines(tutorial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server and two clients in own processes. peft uses the clients' exports, which differ from the base."""
    (_, study), *sides, (_, use) = blocks("Three machines")
    (tutorial / "study.toml").write_text(study)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    assert [kind for kind, _ in sides] == ["sh server", "sh anna", "sh ben"]
    started, later = [], []
    try:
        for kind, text in sides:
            first, *rest = commands(text.replace("localhost:4747", address))
            later += rest
            with (tutorial / f"{kind}.log").open("wb") as log:
                started.append(processes.start(first, cwd=tutorial, stdout=log, stderr=log))
        codes = [process.wait(PATIENCE) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    assert codes == [0, 0, 0], "".join((tutorial / f"{kind}.log").read_text()[-1000:] for kind, _ in sides)
    for words in later:
        call(*words)
    executed(use)
    lines = capsys.readouterr().out.strip().splitlines()[-2:]
    assert [line.split()[0] for line in lines] == ["anna", "ben"]
    losses = [float(line.split()[-1]) for line in lines]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained("small")("The statement is", return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained("small")(input_ids=ids, labels=ids).loss.item()
    assert losses[0] == losses[1]  # sfl averages the adapters, and both clients receive the server's
    assert abs(losses[0] - plain) > 1e-3
