"""The progress of several runs as lines of text, without bars in a terminal."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from cutlayer.cli import progress
from cutlayer.cli.progress import Monitor
from cutlayer.run import Scores, Standing


def scores(at: int) -> Scores:
    nothing: dict[str, Any] = {"validation_score": None, "validation_loss": None, "test_score_worst": None}
    counts = {"bytes_up": 0, "bytes_down": 0, "bytes_down_broadcast": 0}
    return Scores(
        round=at, step=9, epochs=1.0, test_score=0.5, test_loss=1.0, validation=None, test={}, seconds=1.0,
        **nothing, **counts,
    )  # fmt: skip


def timed(text: str) -> list[str]:
    """The lines without their times."""
    return [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.+)", line)[1] for line in text.splitlines()]  # type: ignore[index]


BEGUN = Standing(0, 4, 2.5, None, 0, 1.0, 0.5, "accuracy", True, ())


def test_lines_of_several_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each evaluation and each finished run gets a line. The time left counts runs by weight, including those in
    progress, but not the work of earlier processes.
    """
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Monitor({"a": 300.0, "b": 100.0, "c": 100.0}, done=1) as monitor:
        monitor.show("a", BEGUN)
        monitor.show("b", replace(BEGUN, done=3, evaluations=2, latest=scores(2)))  # resumed: not shown again
        now[0] += 600
        monitor.show("a", replace(BEGUN, done=2, evaluations=1, latest=scores(2)))
        monitor.ended("b")
        now[0] += 600
        monitor.ended("a", "diverged")
    assert timed(capsys.readouterr().out) == [
        "1/4 runs are done already",
        "a: round 2/4, test accuracy 50.00 % (1.50 s, evaluation 500 ms; 1.50 s left)",
        "2/4 runs, about 14 minutes left",  # 600 s for 150 + 25; 250 are left
        "3/4 runs, a: diverged, about 6 minutes left",  # 1200 s for 300 + 25; 100 are left
    ]


def test_lines_of_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    with Monitor({"a": 1.0}) as monitor:
        monitor.show("a", BEGUN)
        monitor.show("a", replace(BEGUN, done=4, evaluations=1, latest=scores(4)))
        monitor.ended("a")
    assert timed(capsys.readouterr().out) == ["a: round 4/4, test accuracy 50.00 % (1.50 s, evaluation 500 ms)"]
