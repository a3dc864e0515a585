"""The output of runs, results and comparisons in a notebook."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from cutlayer import Comparison, Run
from cutlayer.markup import html_table
from cutlayer.text import format_bytes, format_figure

STUDY: dict[str, Any] = {
    "data": "digits", "model": "mlp", "clients": 2, "samples_per_client": 20, "rounds": 2, "eval_every": 1,
}  # fmt: skip


def cells(shown: str) -> dict[str, list[str]]:
    """The rows of a table, by their first cells."""
    body = ElementTree.fromstring(shown).find("tbody")
    assert body is not None
    return {str(row[0].text or ""): [str(cell.text) for cell in row[1:]] for row in body}


def test_foreign_text_is_text() -> None:
    shown = html_table("<b>", ("<i>", ""), [("a & b", "<script>")])
    assert "<script>" not in shown
    assert cells(shown) == {"a & b": ["<script>"]}


def test_a_run_shows_how_far_it_is_and_then_its_result() -> None:
    run = Run(**STUDY, algorithm="psl")
    assert cells(run._repr_html_())["rounds done"] == ["0 of 2"]
    steps = iter(run)
    for _ in range(4):
        next(steps)
    half = cells(run._repr_html_())
    assert half["rounds done"] == ["1 of 2"]
    assert half["test accuracy"] == [format_figure(run.evaluations[-1].test_score, share=True)]
    list(steps)
    assert run.result is not None
    shown = cells(run._repr_html_())
    assert run._repr_html_() == run.result._repr_html_()
    assert shown["test accuracy %"] == [format_figure(run.result.test_score, share=True)]
    assert shown["sent by clients"] == [format_bytes(run.result.bytes_up)]
    assert "ended early" not in shown


def test_an_early_end_is_shown() -> None:
    result = Run(**{**STUDY, "rounds": 5}, algorithm="psl", client_lr=1e-12, stop_after=1).run()
    assert cells(result._repr_html_())["ended early"] == [result.stopped]


def test_a_comparison_shows_its_table() -> None:
    comparison = Comparison(**STUDY, algorithms=("psl", "fl"), seeds=(0,))
    assert cells(comparison._repr_html_()) == {}
    rows = comparison.run()
    shown = cells(comparison._repr_html_())
    assert list(shown) == [row.title for row in rows]
    assert [line[0] for line in shown.values()] == [
        f"accuracy (%): {format_figure(row.score_mean, row.score_std, share=True)}" for row in rows
    ]
    assert {line[1] for line in shown.values()} == {"1 of 1"}
