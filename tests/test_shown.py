"""How far training is, in a log; a notebook's display is tried by the tutorials, which run when the site is built."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import pytest
from support import call, mlp, source

from cutlayer import Comparison, ConfigError, DataError, Run, UsageError
from cutlayer.observations import Observations
from cutlayer.shown import ShownLine

OPTIONS: dict[str, Any] = {
    "model": mlp,
    "cut": "2",
    "partition": "column",
    "clients": 2,
    "rounds": 3,
    "batch": 4,
    "engine": "local",
    "eval_every": 1,
    "precision": "float64",
}


def test_a_log_has_a_line_for_each_evaluation_and_each_run(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(algorithm="psl", data=source([8, 8], (6,)), **OPTIONS)
    assert run.run(progress=True) is run.result
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"psl: round {n} of 3" for n in (1, 2, 3)]
    assert "left" in lines[0]
    assert lines[-1].split(", ")[-1].startswith("test accuracy ")
    comparison = Comparison(algorithms=("psl", "ssl"), seeds=(0,), data=source([8, 8], (6,)), **OPTIONS)
    comparison.run(progress=True)
    starts = [line.partition(": round")[0] for line in capsys.readouterr().err.splitlines()]
    assert starts == ["1 of 2 runs done; psl, seed 0", "2 of 2 runs done; ssl, seed 0"]
    Run(algorithm="psl", data=source([8, 8], (6,)), **OPTIONS).run()
    assert capsys.readouterr().err == ""


def test_commands_draw_without_the_notebooks_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://of_another_environment")
    assert "iid" in call("list", "partitions").stdout
    assert "MPLBACKEND" not in os.environ


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_rewrites_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with ShownLine() as line:
        line.show("a long line")
        line.show("short")
    assert screen.getvalue() == "\ra long line\rshort      \n"


def test_a_notebook_shows_sentences_and_tables() -> None:
    error = ConfigError("phi = 2 is too large")
    assert error._render_traceback_() == ["ConfigError: phi = 2 is too large"]
    try:
        raise UsageError("your function failed") from ValueError("within")
    except UsageError as caused:
        shown = caused._render_traceback_()
    assert shown[0].startswith("ValueError: within")
    assert shown[-1] == "cutlayer.errors.UsageError: your function failed"
    assert isinstance(DataError("x"), UsageError)
    table = Observations([{"n": i, "half": i / 2, "name": "<b>"} for i in range(30)], dict)._repr_html_()
    assert table.count("<tr>") == 21
    assert "30 rows, of which 20 are shown" in table
    assert "&lt;b&gt;" in table
    assert Observations([], dict)._repr_html_().count("<td>") == 0
