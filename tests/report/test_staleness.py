"""Pages and tables for clients that work at their own pace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cutlayer import Comparison, Run
from cutlayer.cli.results import print_comparison
from cutlayer.report import collect, html, staleness

STUDY: dict[str, Any] = {
    "data": "digits", "model": "mlp", "clients": 3, "samples_per_client": 20, "test": 20, "rounds": 3, "batch": 5,
    "local_steps": 2, "client_device": "raspberry-pi-4", "up_mbps": 1.0, "down_mbps": 1.0, "stragglers": 0.34,
    "straggler_slowdown": 50.0,
}  # fmt: skip
HEAD = "age of a batch"


def page_of(folder: Path) -> str:
    """The HTML report without pictures."""
    return html.render(collect.read(folder), [], b"")


def test_a_comparison_shows_ages_beside_what_waits_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = Comparison(algorithms=("gas", "sfl"), seeds=(0,), out=tmp_path / "c", **STUDY)
    comparison.run()
    gas, sfl = comparison.table()
    assert gas.batch_age is not None
    assert gas.model_age is not None
    assert (sfl.batch_age, sfl.model_age) == (None, None)
    assert gas.idle_seconds is not None
    assert sfl.idle_seconds is not None
    page = page_of(tmp_path / "c")
    assert HEAD in page
    assert "a client waits" in page
    assert 'id="staleness"' not in page  # only in reports of single runs
    for text in (*staleness.means(gas.batch_age, gas.model_age), staleness.waits(sfl.idle_seconds)):
        assert f"<td>{text}</td>" in page
    print_comparison(comparison.table())
    printed = capsys.readouterr().out
    assert all(staleness.waits(row.idle_seconds) in printed for row in (gas, sfl))


def test_the_page_of_a_run_has_a_line_for_each_client(tmp_path: Path) -> None:
    run = Run(algorithm="gas", out=tmp_path / "r", **STUDY)
    run.run()
    assert run.result is not None
    found = run.result.staleness
    assert found is not None
    total = sum(n * (age or 0) for n, age in zip(found["batches"], found["batches_mean"], strict=True))
    assert run.result.batch_age == pytest.approx(total / sum(found["batches"]))
    page = page_of(tmp_path / "r")
    assert page.count('id="staleness"') == 1
    section = page[page.index('id="staleness"') :].split("</table>")[0]
    assert section.count('scope="row"') == 3
    assert [f"<td>{n}</td>" in section for n in found["batches"]] == [True] * 3


def test_synchronous_runs_say_nothing_of_it(tmp_path: Path) -> None:
    Run(algorithm="sfl", out=tmp_path / "r", **STUDY).run()
    page = page_of(tmp_path / "r")
    assert HEAD not in page
    assert 'id="staleness"' not in page
    assert json.loads((tmp_path / "r" / "result.json").read_text())["staleness"] is None


@pytest.mark.parametrize("clients", [3, 60])
def test_many_clients_are_shown_by_their_ends(clients: int, tmp_path: Path) -> None:
    Run(
        algorithm="gas", out=tmp_path / "r", **{**STUDY, "clients": clients, "samples_per_client": 5, "rounds": 1}
    ).run()
    page = page_of(tmp_path / "r")
    section = page[page.index('id="staleness"') :]
    assert section.split("</table>")[0].count('scope="row"') == min(clients, 40)
    assert ("The 20 clients in the middle" in section) == (clients == 60)
