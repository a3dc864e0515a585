"""The report of a run or a comparison: two pictures and one page. Reads the folder's files and never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlayer.errors import RunFolderError
from cutlayer.files import replace_file
from cutlayer.folder import CLASS_COUNTS, CURVES, PAGE
from cutlayer.observations import Observations
from cutlayer.report.cited import cite
from cutlayer.text import format_bytes

if TYPE_CHECKING:
    from cutlayer.report.collect import Report
    from cutlayer.summary import Correction

__all__ = ["Wanted", "cite", "collect_studies", "format_bytes", "tables", "write"]


@dataclass(frozen=True)
class Wanted:
    """The files besides the page, and the comparison of entries: with a `baseline` (default: the first entry), a
    `correction` of the p values for their number, and the `difference` (in the units of the table) for which the needed
    seeds are calculated.
    """

    csv: bool = False
    latex: bool = False
    pdf: bool = False
    svg: bool = False
    baseline: str | None = None
    correction: Correction = "none"
    difference: float | None = None


def write(folder: Path | Report, wanted: Wanted = Wanted()) -> list[Path]:
    """Write curves.png, classes.png and report.html into the folder of a run or comparison (or the content read from
    it), and the other files `wanted`; return their paths.

    Unfinished runs are shown as far as they got. Each file is replaced atomically, and no file is changed unless all
    could be made. Raises RunFolderError if `folder` is not a run, is damaged, or has no evaluation yet.
    """
    # Imported here: the command line reads format_bytes from this package, and `--help` should not load matplotlib.
    from cutlayer.report import collect, curves, html, paper, tidy
    from cutlayer.report.differences import differences

    report = folder if isinstance(folder, collect.Report) else collect.read(Path(folder))
    gaps = differences(report, wanted.baseline, correction=wanted.correction, wanted=wanted.difference)
    panels = curves.panels(report)
    classes = curves.classes(report)
    by_client = curves.clients(report)
    contents = {
        CURVES: curves.overview(report),
        CLASS_COUNTS: classes,
        PAGE: html.render(report, panels, classes, by_client, gaps).encode(),
    }
    if wanted.csv:
        contents |= tidy.tables(report)
    if wanted.latex:
        contents["table.tex"] = paper.latex(report, gaps).encode()
    if wanted.pdf:
        contents |= paper.figures(report, "pdf")
    if wanted.svg:
        contents |= paper.figures(report, "svg")
    for name, content in contents.items():
        replace_file(report.folder / name, content)
    return [report.folder / name for name in contents]


def tables(first: Path | str, *more: Path | str) -> dict[str, Observations[dict[str, Any]]]:
    """The content of the CSV files of a run or a comparison, in Python: "table", "steps", "evaluations" and "clients".
    Each is a list of rows with a method `to_pandas`. Of several folders, together, the first column names the study.

    Raises RunFolderError for a folder that is not a run's or a comparison's, or has no evaluation yet.
    """
    from cutlayer.report import collect, tidy

    return tidy.observed(collect.read(Path(first))) if not more else _gathered([Path(f) for f in (first, *more)])


def _gathered(folders: Sequence[Path]) -> dict[str, Observations[dict[str, Any]]]:
    """The tables of several studies. Raises RunFolderError."""
    from cutlayer.report import collect, tidy

    reports = {path.resolve(): collect.read(path) for path in folders}
    names = [path.name for path in reports]
    called = {str(path) if names.count(path.name) > 1 else path.name: report for path, report in reports.items()}
    return tidy.gathered(called)


def collect_studies(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write table.csv, steps.csv, evaluations.csv and clients.csv of several runs and comparisons into `out`, each row
    with its study: the name of its folder, or its whole path if two have the same name. Returns the paths. Raises
    RunFolderError if a folder is not a run, or if `out` already has files of these names.
    """
    from cutlayer.report import tidy

    contents = {f"{name}.csv": tidy.as_csv(rows) for name, rows in _gathered(folders).items()}
    if there := [name for name in contents if (out / name).exists()]:
        raise RunFolderError(f"{str(out / there[0])!r} is there already: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        replace_file(out / name, content)
    return [out / name for name in contents]
