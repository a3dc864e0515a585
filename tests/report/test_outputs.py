"""Other outputs of a report: differences to a baseline, tidy CSV, and a table and figures for a paper."""

from __future__ import annotations

import csv
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from scipy import stats
from test_report import NAMES, make_comparison, make_run

from cutlayer.errors import RunFolderError
from cutlayer.report import Wanted, collect_studies, write
from cutlayer.report.collect import read
from cutlayer.report.differences import differences
from cutlayer.report.paper import WIDTH, escaped, latex

ENTRIES = {"psl": "psl", "sglr, phi 0.5": "sglr", "50 % & more_of_$it": "sfl"}
FIGURES = ("score-over-epochs", "loss-over-epochs", "score-over-bytes")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_comparison(tmp_path / "c", ENTRIES, (0, 1, 2))
    return tmp_path / "c"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_differences_are_those_of_runs_with_the_same_seed(folder: Path) -> None:
    report = read(folder)
    for entry in report.entries:  # seeds differ by 10 points; SGLR is better by 1, 2 and 6
        for run, gain in zip(entry.runs, (1, 2, 6), strict=True):
            assert run.result is not None
            run.result["test_score"] = 0.1 * run.seed + (0.01 * gain if entry.name.startswith("sglr") else 0)
    found = differences(report, "psl", wanted=1.0)
    assert found is not None
    first, second = found.gaps
    assert (first.entry, first.found.mean, found.unit) == ("sglr, phi 0.5", pytest.approx(3.0), "points")
    assert first.p == pytest.approx(stats.ttest_1samp([1, 2, 6], 0).pvalue)
    assert (second.found.mean, second.p) == (pytest.approx(0, abs=1e-12), pytest.approx(1.0))
    assert first.needed is not None
    assert first.needed > 30
    corrected = differences(report, "psl", correction="holm")
    assert corrected is not None
    assert corrected.gaps[0].p == pytest.approx(2 * (first.p or 0))
    with pytest.raises(RunFolderError, match="unknown baseline 'pls': did you mean 'psl'"):
        differences(report, "pls")


def test_one_seed_or_one_entry_has_no_differences(tmp_path: Path) -> None:
    make_comparison(tmp_path / "one", {"psl": "psl", "sfl": "sfl"}, (0,))
    make_run(tmp_path / "run")
    for name in ("one", "run"):
        assert differences(read(tmp_path / name)) is None
        write(tmp_path / name)
        assert 'id="differences"' not in (tmp_path / name / "report.html").read_text(encoding="utf-8")


def test_nothing_is_written_unasked(folder: Path) -> None:
    assert [path.name for path in write(folder)] == NAMES
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Differences to" in page
    assert "not corrected for the number of comparisons" in page


def test_tidy_tables_have_every_observation(folder: Path) -> None:
    names = [path.name for path in write(folder, Wanted(csv=True))]
    assert names == [*NAMES, "table.csv", "steps.csv", "evaluations.csv", "clients.csv"]
    assert [(r["entry"], r["seeds"]) for r in table(folder / "table.csv")] == [(name, "3") for name in ENTRIES]
    steps = table(folder / "steps.csv")
    assert len(steps) == 3 * 3 * 8
    assert {(r["entry"], r["seed"]) for r in steps} == {(name, str(seed)) for name in ENTRIES for seed in range(3)}
    assert [float(r["loss"]) for r in steps[:3]] == [2.0, 1.0, 2 / 3]
    assert steps[0]["clients"] == "4"
    assert len(table(folder / "evaluations.csv")) == 3 * 3 * 4


def test_a_run_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "r", seed=3)
    write(tmp_path / "r", Wanted(csv=True, latex=True, svg=True))
    assert {r["seed"] for r in table(tmp_path / "r/steps.csv")} == {"3"}
    assert r"$\Delta$" not in (tmp_path / "r/table.tex").read_text()


def test_many_studies_are_gathered(folder: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "r", seed=3)
    make_run(tmp_path / "else" / "r", seed=4)
    out = tmp_path / "all"
    written = collect_studies([folder, tmp_path / "r", tmp_path / "else/r"], out)
    assert [path.name for path in written] == ["table.csv", "steps.csv", "evaluations.csv", "clients.csv"]
    studies = ["c"] * 3 + [str(tmp_path / "r"), str(tmp_path / "else/r")]  # two folders have the same name
    assert [row["study"] for row in table(out / "table.csv")] == studies
    steps = table(out / "steps.csv")
    assert len(steps) == 3 * 3 * 8 + 2 * 8
    assert [r["seed"] for r in steps if r["study"].endswith("else/r")] == ["4"] * 8
    with pytest.raises(RunFolderError, match="is there already: choose another --out"):
        collect_studies([folder], out)
    with pytest.raises(RunFolderError, match="not a run folder"):
        collect_studies([folder, tmp_path / "else"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_table_for_a_paper(folder: Path) -> None:
    write(folder, Wanted(latex=True, baseline="psl"))
    lines = (folder / "table.tex").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == 1 + len(ENTRIES)
    assert {line.count(" & ") for line in rows} == {4}
    assert rows[3].startswith(r"50 \% \& more\_of\_\$it & $")
    assert rows[0].startswith(r"Method & Test accuracy (\%) & $\Delta$ to PSL")
    assert escaped("a\\b~c^d{e}#") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\{e\}\#"
    report = read(folder)
    assert latex(report, None).count("&") == 3 * (1 + len(ENTRIES)) + 1  # one & is part of a name


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_takes_it(folder: Path, tmp_path: Path) -> None:
    write(folder, Wanted(latex=True, pdf=True))
    document = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{%s}\end{document}"
    (tmp_path / "d.tex").write_text(document % (folder / "table.tex"))
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "d.tex"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)


def test_figures_of_a_columns_width(folder: Path) -> None:
    """Text stays text. Each line has its own dashes, which distinguish it without colours."""
    first = write(folder, Wanted(pdf=True, svg=True))
    assert [path.name for path in first[3:]] == [f"{name}.{kind}" for kind in ("pdf", "svg") for name in FIGURES]
    assert (folder / f"{FIGURES[0]}.pdf").read_bytes().startswith(b"%PDF")
    content = (folder / f"{FIGURES[0]}.svg").read_bytes()
    picture = ET.fromstring(content)
    assert picture.get("width") == f"{72 * WIDTH:g}pt"
    assert picture.get("class") == "cutlayer"
    assert b"(prefers-color-scheme: dark) { .cutlayer { filter: invert" in content
    texts = {"".join(node.itertext()).strip() for node in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {"epochs", "PSL"} <= texts
    dashes = [line.get("style", "") for line in picture.iter("{http://www.w3.org/2000/svg}path")]
    assert (
        len({style.split("stroke-dasharray: ")[1].split(";")[0] for style in dashes if "stroke-dasharray" in style})
        == 2
    )
    write(folder, Wanted(svg=True))
    assert (folder / f"{FIGURES[0]}.svg").read_bytes() == content
