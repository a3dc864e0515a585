"""The reproduction of the paper's tables: training that can be interrupted, tables, verdicts and pages."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import processes
import pytest
import tomli_w
from matplotlib.image import imread
from processes import Process
from safetensors.numpy import save
from support import call, made

from cutlayer import Run
from cutlayer.costs.expect import expect
from cutlayer.errors import ConfigError, DataError, RunFolderError, TrainingError
from cutlayer.options import RunConfig
from cutlayer.reproduce import table6, tables
from cutlayer.reproduce.cells import SIZES, TABLE4_METHODS, Cell, Size, Study
from cutlayer.reproduce.claims import ClaimVerdict, interval, judge, summary
from cutlayer.reproduce.findings import find
from cutlayer.reproduce.outcomes import Outcomes, settled
from cutlayer.reproduce.reproduction import SETTINGS, Reproduction
from cutlayer.reproduce.train import DIVERGED, EXAMINED, PICTURES, folder_of, train
from cutlayer.reproduce.train import SHOWN as KEPT
from cutlayer.text import remaining

fashion_mnist = pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="Fashion-MNIST is not installed"
)
TIMEOUT = 120
SHOWN = [
    "table1",
    "table2",
    "table3",
    "table4",
    "table4-rates",
    "table4-compute",
    "table6",
    "skew",
    "skew-traffic",
    "skew-rates",
]
ATTACKED = ["table5", "leakage-methods", "leakage-depth", "leakage-defences"]
TINY = Size("mlp", (1, 2, 4), 1, (0, 1), 30, 100, 1, 1, 2, "mlp", 3, (1e-3, 1e-2), 3)
Accuracy = Callable[[Cell, int], float]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Size:
    """A size smoke that takes seconds."""
    monkeypatch.setitem(SIZES, "smoke", TINY)
    return TINY


def pretend(out: Path, cell: Cell, seed: int, test: float, validation: float | None = None) -> Path:
    """A run folder as after training, without steps.jsonl. Accuracies are in percent, and NaN means diverged."""
    folder = folder_of(out, cell, seed)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(tomli_w.dumps(cell.at(seed).resolved()))
    (folder / "classes.json").write_text(json.dumps({"class_names": list("abcdefghij"), "counts": [[1] * 10]}))
    if math.isnan(test):
        (folder / DIVERGED).write_text("the loss is NaN")
        return folder
    sent = {"bytes_up": 10**6, "bytes_down": 2 * 10**6, "bytes_down_broadcast": 10**6, "seconds": 1.0}
    better = {"validation_score": (test if validation is None else validation) / 100, "test_score": test / 100}
    worse = {"validation_score": 0.01, "test_score": 0.99}
    records = [{"round": n, "step": n, "epochs": n, **scores, **sent} for n, scores in ((1, better), (2, worse))]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    result = {"best_test_score": test / 100, "test_score": 0.99}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def pretended(out: Path, study: Study, accuracy: Accuracy) -> Outcomes:
    """Made-up accuracies for all cells of a study."""
    cells = tables.cells_of(study, list(tables.SECTIONS))
    for cell in sorted(cells.values(), key=attrgetter("turn")):
        chosen = settled(out, cell)
        assert chosen is not None
        for seed in cell.seeds:
            pretend(out, chosen, seed, accuracy(chosen, seed))
    return Outcomes(study, out, cells.values())


def by_name(verdicts: list[ClaimVerdict]) -> dict[str, ClaimVerdict]:
    return {v.claim.name: v for v in verdicts}


# ---- the test -------------------------------------------------------------------------------------------------------


def test_intervals_of_students_t() -> None:
    """Compared with tables of t: 4.3027 for two degrees of freedom, 12.706 for one."""
    three = interval([1.0, 2.0, 3.0], 0.0)
    assert three.mean == 2.0
    assert three.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    assert three.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert three.verdict == "within noise"
    two = interval([1.0, 1.1], 0.0)
    assert two.low == pytest.approx(1.05 - 12.7062 * 0.05, abs=1e-4)
    assert (two.verdict, two.seeds) == ("holds", 2)


@pytest.mark.parametrize(
    ("differences", "threshold", "verdict"),
    [
        ([2.0, 2.1, 1.9], 0.0, "holds"),
        ([2.0, 2.1, 1.9], 10.0, "does not hold"),
        ([-1.0, -1.1, -0.9], -1.5, "holds"),
        ([-3.0, -3.1, -2.9], -1.5, "does not hold"),
        ([0.0, 0.0, 0.0], 0.0, "within noise"),
        ([5.0], 0.0, "not measured"),
        ([], 0.0, "not measured"),
    ],
)
def test_verdicts(differences: list[float], threshold: float, verdict: str) -> None:
    assert interval(differences, threshold).verdict == verdict


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Seeds differ by 20 points, but the differences between runs with the same seed are all about equal."""
    study = Study(TINY, "digits")

    def accuracy(cell: Cell, seed: int) -> float:
        c = cell.config
        gain = {0.0: 0.0, 0.5: 1.0, 1.0: 2.0, 1.5: 3.0, 2.0: -30.0}[
            c.specific["alpha"] if c.algorithm in ("slr", "sglr") else 0.0
        ]
        return 50 + 20 * seed + (gain + 0.01 * seed if c.clients > 1 else 0)

    verdicts = by_name(judge(pretended(tmp_path, study, accuracy)))
    helps = verdicts["splitlr"]
    assert helps.overall.verdict == "holds"
    assert helps.overall.mean == pytest.approx(2.0)  # (1 + 2 + 3) / 3; the 0.01 of a seed cancels
    assert (helps.overall.seeds, helps.overall.cells) == (2, 6)
    assert helps.columns == ("C = 2", "C = 4", "all")
    rows = {label: [d and d.mean for d in cells] for label, cells in helps.rows}
    assert rows["alpha 1.5"] == pytest.approx([3.0, 3.0, 3.0])
    assert rows["all"] == pytest.approx([2.0, 2.0, 2.0])
    assert verdicts["collapse"].overall.verdict == "holds"
    assert verdicts["collapse"].overall.cells == 1  # only for the largest number of clients
    assert verdicts["both-sgl"].overall.verdict == "holds"
    assert verdicts["splitavg"].overall.verdict == "within noise"


def test_one_active_client_is_no_evidence_about_splitavg(tmp_path: Path) -> None:
    """If phi x C rounds to 1, SGLR is PSL: phi 0.25 and 0.5 for two clients, 0.25 for four. These are left out."""
    study = Study(TINY, "digits")
    verdict = by_name(judge(pretended(tmp_path, study, lambda cell, seed: 50.0)))["splitavg"]
    cells = {label: dict(zip(verdict.columns, cells, strict=True)) for label, cells in verdict.rows}
    assert verdict.overall.cells == 3 * 3  # alphas x (two clients at 0.75; four at 0.5 and 0.75)
    assert "phi 0.25" not in cells
    assert cells["phi 0.5"]["C = 2"] is None
    assert cells["phi 0.75"]["C = 2"] is not None


def test_rates_are_chosen_by_validation_alone(tmp_path: Path) -> None:
    """The rate with the better test accuracy has the worse validation accuracy. At the chosen rates, FL beats SGLR."""
    study = Study(TINY, "digits")
    for method in TABLE4_METHODS:
        for seed in TINY.seeds:
            pretend(tmp_path, study.method(method, 1e-3), seed, test=60 + (method == "fl"), validation=70)
            pretend(tmp_path, study.method(method, 1e-2), seed, test=90, validation=69)
    outcomes = Outcomes(study, tmp_path, study.table4())
    assert [outcomes.chosen_rate(method) for method in TABLE4_METHODS] == [1e-3] * 5
    best, tried, _ = tables.table4(outcomes)
    assert [label for label, _ in best.rows] == ["CL", "FL", "SGLR", "SFL", "PSL"]
    _, (score, rate) = best.rows[1]
    assert (tables.shown(score), tables.paper_of(score), rate) == ("61.00 ± 0.00", "89.70", "0.001")
    assert [tables.shown(v) for v in tried.rows[1][1]] == [
        "70.00 ± 0.00",
        "61.00 ± 0.00",
        "69.00 ± 0.00",
        "90.00 ± 0.00",
    ]
    verdicts = by_name(judge(outcomes))
    assert verdicts["sglr-fl"].overall.mean == pytest.approx(-1.0)
    assert verdicts["sglr-fl"].overall.verdict == "holds"  # within 1.5 points
    assert "splitlr" not in verdicts  # Table 1 was not requested


def test_a_rate_is_chosen_once_all_rates_have_a_seed(tmp_path: Path) -> None:
    study = Study(TINY, "digits")
    pretend(tmp_path, study.method("fl", 1e-3), 0, 60)
    assert Outcomes(study, tmp_path, study.table4()).chosen_rate("fl") is None
    pretend(tmp_path, study.method("fl", 1e-2), 0, 61)
    outcomes = Outcomes(study, tmp_path, study.table4())
    assert outcomes.chosen_rate("fl") == 1e-2
    ((_, (score, _)), *_) = tables.table4(outcomes)[0].rows[1:]
    assert tables.shown(score) == "61.00 [1 seed]"
    assert {v.overall.verdict for v in judge(outcomes)} == {"not measured"}


def test_diverged_runs_count_as_chance(tmp_path: Path) -> None:
    study = Study(TINY, "digits")

    def accuracy(cell: Cell, seed: int) -> float:
        lost = cell.config.algorithm == "slr" and (
            cell.config.specific.get("alpha", 1.0) == 2 or (cell.config.specific.get("alpha", 1.0) == 1.5 and seed == 1)
        )
        return math.nan if lost else 80.0

    outcomes = pretended(tmp_path, study, accuracy)
    (table,) = tables.table1(outcomes)
    rows = {label: [tables.shown(v) for v in values] for label, values in table.rows}
    assert rows["alpha 2"] == ["80.00 ± 0.00", "diverged", "diverged"]
    assert rows["alpha 1.5"][1] == "45.00 ± 49.50 [1 diverged]"
    assert by_name(judge(outcomes))["collapse"].overall.mean == pytest.approx(70.0)
    assert "counts as chance (10 %)" in files_of(outcomes, ["table1"])["reproduction.md"].decode()


def test_five_lines_say_what_came_out(tmp_path: Path) -> None:
    study = Study(TINY, "digits")
    verdicts = judge(
        pretended(tmp_path, study, lambda cell, seed: 80.0 - 40 * (cell.config.specific.get("alpha", 1.0) == 2))
    )
    lines = summary(verdicts)
    assert len(lines) == 5
    assert lines[0].startswith(f"Holds (7 of {len(verdicts)}): alpha 2 collapses at C = 4 (loss +40.00); ")
    assert lines[1].startswith("Does not hold (1 of")  # phi 1 loses nothing
    assert lines[4].startswith(
        "Largest differences beyond noise, in points: alpha 2 collapses at C = 4 (loss +40.00); "
    )
    assert sum(int(n) for n in re.findall(r"\((\d+) of", "".join(lines[:4]))) == len(verdicts)


# ---- tables and pages -----------------------------------------------------------------------------------------------


def files_of(outcomes: Outcomes, parts: list[str]) -> dict[str, bytes]:
    from cutlayer.reproduce.page import files

    return files(find(outcomes, parts), "smoke")


@fashion_mnist
def test_the_papers_numbers_stand_beside_ours(tmp_path: Path) -> None:
    """Rows have the names under which the paper's numbers are stored. Numbers that the paper lacks are left empty."""
    full = Study(SIZES["full"], "fashion-mnist")
    outcomes = Outcomes(full, tmp_path, [])
    paper = {
        t.name: {label: [tables.paper_of(v) for v in values] for label, values in t.rows}
        for name in ("table1", "table2", "table3", "table4")
        for t in tables.SECTIONS[name].tables(outcomes)
    }
    assert paper["table1"]["alpha 2"] == ["82.45", "82.11", "82.14", "83.56", "58.41", "34.37", "", ""]
    assert paper["table2"]["alpha 0.5, phi 0.75"][-1] == "87.47"
    assert paper["table3"]["full"] == ["82.45", "81.82", "82.07", "", "83.62", "81.61", "69.45", "60.67"]
    assert paper["table4"]["SGLR"] == ["89.30", ""]
    for name in ("table1", "table2", "table3"):
        assert set(paper[name]) == set(tables.paper()[name]["rows"])
    assert all(tables.shown(v) == tables.DASH for t in tables.table2(outcomes) for _, values in t.rows for v in values)


@pytest.mark.parametrize("method", TABLE4_METHODS)
def test_costs_are_those_of_the_runs(method: str) -> None:
    study = Study(TINY, "digits")
    run = Run(study.method(method, 1e-3).at(0))
    result = run.run()
    counted = table6.of_method(study, method)
    assert counted.unicast == result.bytes_up + result.bytes_down
    assert counted.broadcast == result.bytes_up + result.bytes_down_broadcast
    assert counted.client_flops == result.client_flops
    halfway = table6.spent(study, method, {"epochs": 1.0})
    assert halfway["virtual_seconds"] == counted.seconds
    if method != "cl":  # CL sends its data only once
        assert table6.spent(study, method, {"epochs": 2.0})["virtual_seconds"] > 1.5 * halfway["virtual_seconds"]


def test_table_6_and_what_counting_settles() -> None:
    study = Study(TINY, "digits")
    example = {title: values[0] for title, values in table6.communication(study)}
    assert example == {"FL": "40,000 MB", "PSL": "2,400 MB", "SFL": "15,800 MB", "SGLR": "1,800.024 MB"}
    counted = {fact.name: fact for fact in table6.facts(study)}
    assert counted["client-compute"].evidence.startswith("95.3 %")  # for 8x8 pictures; 94.7 % for 28x28 (test_costs.py)
    assert counted["traffic-sfl-wire-unicast"].holds
    # The sentence names the point at which both are equal.
    work = table6.trained_work(study)
    even = table6._break_even(study, work, "fl", "wire-unicast")
    below, above = (
        [expect(made(m), replace(work, samples_per_client=n)).unicast for m in ("sglr", "fl")]
        for n in (math.floor(even), math.ceil(even))
    )
    assert below[0] <= below[1]
    assert above[0] >= above[1]


def test_what_counting_settles_names_whole_samples_that_are_below() -> None:
    assert table6._until(33.7475) == "below it up to 33 samples per client and epoch"
    assert table6._until(34.0) == "below it up to 33 samples per client and epoch"
    assert table6._until(0.5) == "below it at no number of samples"
    assert table6._until(math.inf) == "below it at any number of samples"
    assert table6._against(1_000, 2_000) == "1.00 kB against 2.00 kB"
    assert table6._against(125_480_000, 125_486_400) == "125,480,000 B against 125,486,400 B"


def test_cells_are_shared_by_tables() -> None:
    study = Study(TINY, "digits")
    together = tables.cells_of(study, ["table1", "table2", "table3"])
    assert len(together) == 1 + 2 * (5 + 9 + 5)  # all cells of one client are the same
    assert tables.cells_of(study, ["fig5"]) == tables.cells_of(study, ["table4"])


def test_the_report_of_all_that_there_is(tmp_path: Path) -> None:
    study = Study(TINY, "digits")
    outcomes = pretended(tmp_path, study, lambda cell, seed: 80.0 + seed + cell.config.specific.get("alpha", 1.0))
    written = files_of(outcomes, list(tables.SECTIONS))
    plots = ["claims", "table1", "table2", "table3", "table4", "fig5", "skew"]
    assert list(written) == ["reproduction.json", "reproduction.md", "reproduction.html", *(f"{p}.png" for p in plots)]
    data = json.loads(written["reproduction.json"])
    assert data["cells"]["C2/alpha-1-phi-0"]["seeds"]["1"] == {
        "best_test_score": 82.0,
        "test_score": 99.0,
        "best_validation_score": 82.0,
        "diverged": False,
    }
    assert [t["name"] for t in data["tables"]] == SHOWN + ATTACKED
    assert data["settings"]["epochs"] == 1
    assert all(claim["overall"]["verdict"] for claim in data["claims"])
    text = written["reproduction.md"].decode()
    assert "| alpha 1 | 81.50 ± 0.71 (82.45) | 81.50 ± 0.71 (81.68) | 81.50 ± 0.71 (82.93) |" in text
    assert "Not finished" not in text
    assert all(line in text for line in data["lines"])
    for line in re.findall(r"^\|.*$", text, re.MULTILINE):
        assert line.endswith("|")
    page = written["reproduction.html"].decode()
    assert page.count("data:image/png;base64,") == len(plots)
    assert "81.50 ± 0.71" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_the_report_of_a_beginning(tmp_path: Path) -> None:
    """With one finished run, all others are dashes, and plots without points are left out."""
    study = Study(TINY, "digits")
    pretend(tmp_path, study.grid(1, 0, 0), 0, 80)
    outcomes = Outcomes(study, tmp_path, tables.cells_of(study, list(tables.SECTIONS)).values())
    written = files_of(outcomes, list(tables.SECTIONS))
    assert [name for name in written if name.endswith(".png")] == ["table1.png", "table2.png", "table3.png"]
    text = written["reproduction.md"].decode()
    assert "**Not finished: 1 of " in text
    dash = tables.DASH
    assert f"| alpha 2 | 80.00 [1 seed] (82.45) | {dash} (82.11) | {dash} (82.14) |" in text
    assert f"| CL | {dash} (90.50) | {dash} |" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (5, "less than a minute"),
        (61, "about 1 minute"),
        (41 * 60, "about 41 minutes"),
        (3 * 3600 + 100, "about 3 hours"),
        (86400 * 5, "about 5 days"),
    ],
)
def test_time_left(seconds: float, text: str) -> None:
    assert remaining(seconds) == text


# ---- a folder -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_tables_are_added_to_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trained in two processes. Cells that both tables use are trained once, and the report covers both tables."""
    monkeypatch.setitem(SIZES, "smoke", replace(TINY, clients=(1, 2)))
    out = tmp_path / "out"
    first = Reproduction(["table1"], "smoke", out, "digits")
    first.check()
    assert not out.exists()
    jobs = first.jobs
    assert [seed for _, seed in jobs] == [0] * 6 + [1] * 6  # seed by seed
    assert sorted(c.name for c, _ in first.train(2)) == sorted(cell.name for cell, _ in jobs)
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/**/result.json")}
    assert len(before) == 12
    second = Reproduction(["table3"], "smoke", out, "digits")
    assert len(second.jobs) - len(second.waiting()) == 2 * 2  # C1, and alpha 1 with phi 0 for two clients
    assert sum(1 for _ in second.train(1)) == len(second.jobs) - 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = Reproduction(["table3"], "smoke", out, "digits")
    assert again.waiting() == []
    assert again.parts == ("table1", "table3")
    for steps in out.glob("runs/**/steps.jsonl"):
        steps.unlink()
    findings = again.find()
    assert findings.done == (22, 22)
    names = {path.name for path in again.write(findings)}
    assert names == {f"reproduction.{kind}" for kind in ("json", "md", "html")} | {
        "claims.png",
        "table1.png",
        "table3.png",
    }
    assert imread(out / "table1.png").shape[1] > 1000


@pytest.mark.long
@fashion_mnist
def test_every_kind_of_cell_can_be_built(tmp_path: Path) -> None:
    Reproduction([], "smoke", tmp_path / "out").check()
    assert not (tmp_path / "out").exists()


def test_another_setting_is_refused(tiny: Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    work = Reproduction(["table1"], "smoke", out, "digits")
    with work._held():
        pass
    for size, data, device, word in (
        ("reduced", "digits", "cpu", "size = 'smoke', not 'reduced'"),
        ("smoke", "fashion-mnist", "cpu", "data = 'digits', not 'fashion-mnist'"),
        ("smoke", "digits", "cuda", "device = 'cpu', not 'cuda'"),
    ):
        with pytest.raises(RunFolderError, match=re.escape(word)):
            Reproduction([], size, out, data, device)  # type: ignore[arg-type]
    monkeypatch.setitem(SIZES, "smoke", Size(**{**TINY.__dict__, "epochs": 2, "seeds": (0, 1, 2)}))
    with pytest.raises(RunFolderError, match="epochs = 1, not 2"):
        Reproduction([], "smoke", out, "digits")


def test_one_at_a_time(tiny: Size, tmp_path: Path) -> None:
    work = Reproduction(["table1"], "smoke", tmp_path, "digits")
    with work._held(), pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}"):
        next(work.train(1))


def test_folders_of_other_things_are_left_alone(tiny: Size, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(RunFolderError, match="already holds files"):
        Reproduction([], "smoke", tmp_path, "digits")
    with pytest.raises(RunFolderError, match="is a file"):
        Reproduction([], "smoke", tmp_path / "thesis.txt", "digits")
    with pytest.raises(RunFolderError, match="no finished run"):
        Reproduction([], "smoke", tmp_path / "none", "digits").find()
    with pytest.raises(ConfigError, match="did you mean 'table1'"):
        Reproduction(["tabel1"], "smoke", tmp_path / "none", "digits")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_runs_of_other_settings_are_not_reported(tiny: Size, tmp_path: Path) -> None:
    """A run that was made with other settings and moved into the folder."""
    cell = Study(TINY, "digits").grid(1, 0, 0)
    pretend(tmp_path, Cell(cell.name, cell.config.model_copy(update={"epochs": 7})), 0, 80)
    with pytest.raises(RunFolderError, match=r"C1/psl/seed-0' was made with epochs = 7, not 1: remove it"):
        Reproduction(["table1"], "smoke", tmp_path, "digits").check()


def test_wrong_data_cost_nothing(tiny: Size, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for data in ("fashoin-mnist", str(tmp_path / "empty")):
        with pytest.raises(DataError):
            Reproduction(["table1"], "smoke", tmp_path / "out", data).check()
    assert not (tmp_path / "out").exists()


# ---- training -------------------------------------------------------------------------------------------------------


def wild(rate: float) -> Cell:
    """A cell that diverges at high rates."""
    values = {"algorithm": "psl", "model": "mlp", "clients": 2, "samples_per_client": 40, "epochs": 5}
    return Cell(f"rate-{rate:g}", RunConfig.of({**values, "client_optimizer": "sgd", "client_lr": rate}))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.network)])
def test_a_run_that_diverges_is_a_result(workers: int, tmp_path: Path) -> None:
    jobs = [(wild(1e9), 0), (wild(0.01), 0)]
    assert sorted(cell.name for cell, _ in train(tmp_path, jobs, workers)) == ["rate-0.01", "rate-1e+09"]
    assert "NaN or Inf" in (folder_of(tmp_path, *jobs[0]) / DIVERGED).read_text()
    assert list(train(tmp_path, jobs, workers)) == []  # both are done


@pytest.mark.network
def test_what_a_process_raises_arrives(tmp_path: Path) -> None:
    """The run folder contains other files, which is an error in the process that trains."""
    folder = folder_of(tmp_path, wild(0.01), 0)
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("all of it")
    with pytest.raises(RunFolderError, match="already holds files"):
        list(train(tmp_path, [(wild(0.01), 0)], 2))


@pytest.mark.network
def test_a_process_that_is_killed_does_not_keep_us_waiting(tmp_path: Path) -> None:
    slow = wild(0.001)
    jobs = [(Cell("long", slow.config.model_copy(update={"epochs": 100000})), seed) for seed in (0, 1)]
    trained = train(tmp_path, jobs, 2)

    def kill() -> None:
        eventually(lambda: len(trainers(os.getpid())) == 2 and (folder_of(tmp_path, *jobs[0]) / "steps.jsonl").exists())
        os.kill(trainers(os.getpid())[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(TrainingError, match=r"trained long with seed \d was ended by signal 9: call the same command"):
        next(trained)
    thread.join(TIMEOUT)
    assert trainers(os.getpid()) == []


# ---- the command ----------------------------------------------------------------------------------------------------


@contextmanager
def started(*argv: str, cwd: Path) -> Iterator[Process]:
    """A running command in a process group of its own, as in a shell. It ends with the test.

    Its stderr is in the file `said`.
    """
    with (cwd / "said").open("wb") as said:
        process = processes.start(argv, cwd=cwd, stderr=said, new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait(TIMEOUT)


def children(process: int) -> list[int]:
    """The running processes that `process` has started."""
    try:
        return [
            int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()
        ]
    except FileNotFoundError:
        return []


def trainers(process: int) -> list[int]:
    """The processes that train, without the one that cleans up after them."""
    return [pid for pid in children(process) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.network  # the test waits for processes
def test_interrupted_and_called_again(tmp_path: Path) -> None:
    """Ctrl-C reaches the command and all its processes, as in a terminal. The printed command finishes the work."""
    line = ["reproduce", "table1", "--size", "smoke", "--out", "my runs", "--data", "digits", "--jobs", "2"]
    out = tmp_path / "my runs"
    with started(*line, cwd=tmp_path) as process:
        eventually(lambda: len(list(out.glob("runs/**/result.json"))) >= 2 or process.poll() is not None)
        workers = trainers(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
    assert (tmp_path / "said").read_text() == (
        "error: interrupted; continue with: cutlayer reproduce table1 --size smoke --out 'my runs' --data digits "
        "--device cpu --jobs 2\n"
    )
    assert len(workers) == 2
    assert not any(map(alive, workers))
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/**/result.json")}
    assert 2 <= len(before) < 22

    report = call(*line[:-1], "0", cwd=tmp_path)
    assert f"{len(before)} of 22 runs are done" in report.stdout
    assert "Not finished" in (out / "reproduction.md").read_text()
    done = call(*line, cwd=tmp_path)
    assert done.stderr == ""
    assert f"{len(before)}/22 runs are done already" in done.stdout
    assert re.search(r" 21/22 runs, \S+ seed \d: test accuracy \d+\.\d %, .* left$", done.stdout, re.MULTILINE)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for words in ("Table 1: SplitLr", "paper 81.68", "SplitLr helps", "- Not measured (", "my runs/reproduction.html"):
        assert words in done.stdout
    assert "Not finished" not in (out / "reproduction.md").read_text()
    refused = call("reproduce", "--out", "my runs", cwd=tmp_path, code=2)
    assert refused.stderr == (
        "error: the reproduction in 'my runs' was made with data = 'digits', not 'fashion-mnist': ask for what it was "
        "made with, or choose another --out\n"
    )


@pytest.mark.network
def test_killed_without_leaving_anything_behind(tmp_path: Path) -> None:
    """If the command is killed by SIGKILL, its processes end, too."""
    with started("reproduce", "table1", "--data", "digits", "--out", "a", "--jobs", "2", cwd=tmp_path) as process:
        eventually(lambda: (tmp_path / "a" / SETTINGS).exists() and len(trainers(process.pid)) == 2)
        eventually(lambda: any(tmp_path.glob("a/runs/**/config.toml")))
        workers = trainers(process.pid)
        process.kill()
        process.wait(TIMEOUT)
        eventually(lambda: not any(map(alive, workers)))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["tabel1"], "unknown table 'tabel1': did you mean 'table1'? known: table1, table2"),
        (["--size", "smok"], 'Did you mean "smoke"?'),
        (["--jobs", "-1"], "jobs = -1 is not possible"),
        (["--data", "digits", "--jobs", "0"], "has no finished run to report on"),
        (["--data", "fashoin-mnist"], "did you mean 'fashion-mnist'"),
        (["--data", "digits", "--device", "abacus"], "device = 'abacus' cannot be used here"),
    ],
)
def test_wrong_input_is_one_sentence(argv: list[str], said: str, tmp_path: Path) -> None:
    done = call("reproduce", *argv, cwd=tmp_path, code=2)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_report_of_attacks(tmp_path: Path) -> None:
    """Made-up findings, at the end and at equal accuracy: effects of phi and noise in claims, tables and pictures."""
    study = Study(TINY, "digits")
    parts = ["table5", "leakage"]
    cells = tables.cells_of(study, parts)
    for cell in cells.values():
        for seed in study.size.seeds:
            folder = pretend(tmp_path, cell, seed, 80 + seed)
            found = [_found(0.6, 0.9), _found(0.8, 0.7)]  # the attacker explains less after longer training
            if cell.config.algorithm == "sglr":
                found[1] = _found(0.7, 0.8)  # as the others at that accuracy
            if cell.config.specific.get("gaussian_noise"):
                found[1] = _found(0.8, 0.4 + 0.001 * seed)
            (folder / EXAMINED).write_text(json.dumps(found if cell.config.snapshot_every else found[1:]))
            rows = np.full((KEPT, 1, 4, 4), seed, np.float32)
            (folder / PICTURES).write_bytes(save({"inputs": rows, "reconstructions": rows + 1}))
    outcomes = Outcomes(study, tmp_path, cells.values())
    verdicts = by_name(judge(outcomes))
    assert set(verdicts) == {
        *("phi", "phi-equal", "leaks-depth"),
        *(f"leaks-{m}{when}" for m in ("psl", "sfl", "ssl") for when in ("", "-equal")),
        *(f"leaks-{d}" for d in ("gaussian-noise", "laplace-noise", "feature-dropout", "nopeek", "codec")),
    }
    assert verdicts["phi"].overall.mean == pytest.approx(-10.0)
    assert verdicts["phi-equal"].overall.mean == pytest.approx(0.0)
    assert verdicts["leaks-gaussian-noise"].overall.mean == pytest.approx(30.0, abs=0.1)
    assert verdicts["leaks-gaussian-noise"].overall.verdict == "holds"
    written = files_of(outcomes, parts)
    plots = ["claims", "table5", "leakage-defences", "leakage-pictures"]
    assert [name for name in written if name.endswith(".png")] == [f"{p}.png" for p in plots]
    text = written["reproduction.md"].decode()
    assert "| phi 0.5 | 99.00 ± 0.00 | 0.0100 | 0.800 |" in text
    assert "“At equal accuracy” means that each of the two runs is attacked" in text


def _found(accuracy: float, explained: float) -> dict[str, object]:
    """The fields of a finding that reports read."""
    quality = {"mse": 0.01, "psnr": 20.0, "ssim": 0.9, "accuracy": 0.8}
    attack = {"attack": quality, "explained": explained}
    bounds = [{"nats": None}]
    return {
        "accuracy": accuracy,
        "attacks": {"model": attack},
        "dependence": {"unbiased_squared": 0.9},
        "upper": bounds,
        "privacy": None,
    }
