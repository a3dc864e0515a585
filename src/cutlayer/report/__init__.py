"""The report of a run or a comparison: two pictures and one page. Reads the folder's files and never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cutlayer.files import replace_file
from cutlayer.folder import CLASS_COUNTS, CURVES, PAGE
from cutlayer.text import format_bytes

if TYPE_CHECKING:
    from cutlayer.summary import Correction

__all__ = ["Wanted", "format_bytes", "write"]


@dataclass(frozen=True)
class Wanted:
    """What is written besides the page, and how entries are compared: with a `baseline` (default: the first entry), a
    `correction` of the p values for their number, and the `difference` (in the units of the table) that a study of
    this kind should find, for which the seeds are counted.
    """

    csv: bool = False
    latex: bool = False
    pdf: bool = False
    svg: bool = False
    baseline: str | None = None
    correction: Correction = "none"
    difference: float | None = None


def write(folder: Path, wanted: Wanted = Wanted()) -> list[Path]:
    """Write curves.png, classes.png and report.html into the folder of a run or comparison, and what else is `wanted`;
    return their paths.

    Unfinished runs are shown as far as they got. Each file is replaced atomically, and none is touched unless all
    could be made. Raises RunFolderError where `folder` is no run, is damaged, or has no evaluation yet.
    """
    # Imported here: the command line reads format_bytes from this package, and `--help` should not load matplotlib.
    from cutlayer.report import collect, curves, html, paper, tidy
    from cutlayer.report.differences import differences

    report = collect.read(Path(folder))
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
