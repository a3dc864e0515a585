"""The three hospitals of the worked examples: processes train, export and predict as their page shows."""

from __future__ import annotations

import runpy
import shlex
import shutil
import socket
from pathlib import Path

import processes
import pytest
from support import ROOT, call
from transcripts import agree, blocks

PAGE = (ROOT / "docs" / "worked-examples.md").read_text(encoding="utf-8")
HOSPITALS = ("north", "south", "west")
PATIENCE = 120.0


@pytest.mark.network
def test_three_hospitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks(PAGE)
    for block in found:
        if block.purpose in ("hospitals.py", "study.toml"):
            Path(block.purpose).write_text(block.text, encoding="utf-8")
    runpy.run_path("hospitals.py", run_name="__main__")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def start(folder: str, line: str) -> processes.Process:
        shutil.copy("study.toml", folder)
        words = shlex.split(line.replace("4747", port))[1:]
        with Path(folder, "log").open("wb") as log:
            return processes.start(words, cwd=Path(folder), stdout=log, stderr=log)

    consoles = [block for block in found if block.language == "console" and block.purpose]
    (serve,), (join,), after = ([*block.commands] for block in consoles)
    running = [start("coordinator", serve[0])]
    try:
        for k, name in enumerate(HOSPITALS):
            running.append(start(name, join[0].replace("client-2", f"client-{k}")))
        for process in running:
            assert process.wait(PATIENCE) == 0, Path("coordinator/log").read_text(encoding="utf-8")
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
    agree(serve[1], Path("coordinator/log").read_text(encoding="utf-8"))
    agree(join[1], Path("west/log").read_text(encoding="utf-8"))
    for line, shown in after:
        done = call(*shlex.split(line)[1:], cwd=Path("west"))
        agree(shown, done.stderr + done.stdout)
