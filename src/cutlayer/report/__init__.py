"""The report of a run or a comparison: two pictures and one page. Reads the folder's files and never imports torch."""

from __future__ import annotations

from pathlib import Path

from cutlayer.files import replace_file
from cutlayer.folder import CLASS_COUNTS, CURVES, PAGE
from cutlayer.text import format_bytes

__all__ = ["format_bytes", "write"]


def write(folder: Path) -> list[Path]:
    """Write curves.png, classes.png and report.html into the folder of a run or comparison; return their paths.

    Unfinished runs are shown as far as they got. Each file is replaced atomically, and none is touched unless all
    three could be made. Raises RunFolderError where `folder` is no run, is damaged, or has no evaluation yet.
    """
    # Imported here: the command line reads format_bytes from this package, and `--help` should not load matplotlib.
    from cutlayer.report import collect, curves, html

    report = collect.read(Path(folder))
    panels = curves.panels(report)
    classes = curves.classes(report)
    by_client = curves.clients(report)
    contents = {
        CURVES: curves.overview(report),
        CLASS_COUNTS: classes,
        PAGE: html.render(report, panels, classes, by_client).encode(),
    }
    for name, content in contents.items():
        replace_file(report.folder / name, content)
    return [report.folder / name for name in contents]
