r"""For a paper: the result table in LaTeX (booktabs), and each panel as a figure of a column's width, whose lines
differ in colour, dashes and markers, so that they can be read in black and white.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from cutlayer.report import tuning_table
from cutlayer.report.collect import Report
from cutlayer.report.curves import panel_draws
from cutlayer.report.differences import Differences
from cutlayer.report.looks import DARK
from cutlayer.text import format_bytes
from cutlayer.tuned import Tuned

Format = Literal["pdf", "svg"]
WIDTH = 3.35
"""Inches: a column of a page with two of them."""
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.4,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "pdf.fonttype": 42,  # letters as text, as publishers require
    "svg.fonttype": "none",
    "svg.hashsalt": "cutlayer",  # equal files for equal folders
}
_DASHES = ((), (4, 1.5), (1, 1.2), (5, 1.2, 1, 1.2), (7, 2), (3, 1, 1, 1, 1, 1), (2, 2))


def figures(report: Report, kind: Format) -> dict[str, bytes]:
    """File name -> content: a figure for each panel of the page."""
    return {f"{name}.{kind}": _drawn(report, draw, kind) for name, draw in panel_draws(report).items()}


def _drawn(report: Report, draw: Callable[[Axes, Report], None], kind: Format) -> bytes:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        ax = figure.subplots()
        draw(ax, report)
        ax.set_title("", loc="left")  # a paper's figures have captions
        lines = ax.get_lines()
        for number, line in enumerate(lines):
            line.set(linestyle=(0, _DASHES[number % len(_DASHES)]) if number % len(_DASHES) else "-", linewidth=1.2)
            line.set(markersize=0.6 * line.get_markersize(), markeredgewidth=0.4)
        longest = max((len(str(line.get_label())) for line in lines), default=0)
        columns = max(1, min(len(lines), 52 // (longest + 7)))
        figure.set_figheight(2.1 + 0.145 * -(-len(lines) // columns))
        figure.legend(handles=lines, loc="outside upper center", ncols=columns, handlelength=2.6, columnspacing=1.2)
        {"pdf": FigureCanvasPdf, "svg": FigureCanvasSVG}[kind](figure)
        file = io.BytesIO()
        unsaid: dict[str, Any] = {"Date": None} if kind == "svg" else {"CreationDate": None}
        figure.savefig(file, format=kind, metadata={"Creator": "Cutlayer", **unsaid})
    return file.getvalue() if kind == "pdf" else _darkening(file.getvalue())


def _darkening(svg: bytes) -> bytes:
    """The picture with a dark variant for readers who prefer dark pages, and with an opaque background."""
    rule = f"@media screen and (prefers-color-scheme: dark) {{ .cutlayer {{ filter: {DARK} }} }}"
    head, tag, rest = svg.partition(b"<svg ")
    return head + tag + b'class="cutlayer" ' + rest.replace(b">", f">\n <style>{rule}</style>".encode(), 1)


def latex(report: Report, gaps: Differences | None) -> str:
    """The result table; `\\usepackage{booktabs}` is all that it needs. With differences to a baseline, if there are."""
    measure = report.measure
    found = {} if gaps is None else {gap.entry: gap for gap in gaps.gaps}
    lines = [
        f"% {report.folder.resolve().name}; needs \\usepackage{{booktabs}}",
        r"\begin{tabular}{l" + "r" * (3 + (gaps is not None)) + "}",
        r"\toprule",
        " & ".join(
            ["Method", f"Test {escaped(measure.label)}"]
            + ([rf"$\Delta$ to {escaped(gaps.title)}"] if gaps else [])
            + ["Up", "Down"]
        )
        + r" \\",
        r"\midrule",
    ]
    for entry in report.entries:
        row = entry.row
        cells = [escaped(row.title), _math(entry.measure.figure(*row.score))]
        if gaps is not None:
            cells.append(_gap(found[entry.name].found) if entry.name in found else "--")
        cells += [escaped(format_bytes(round(b))).replace(" ", "~") for b in (row.bytes_up, row.bytes_down)]
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if report.tuned is not None:
        lines += _tuning(report.tuned, {entry.name: entry.title for entry in report.entries})
    if gaps is not None:
        lines.append(f"% Differences in {gaps.unit}, paired by seed, with 95 % intervals of Student's t.")
    return "\n".join(lines) + "\n"


def _tuning(tuned: Tuned, titles: Mapping[str, str]) -> list[str]:
    """A second table: the chosen values, and the cost of choosing them."""
    heads = ("Method", "Trials", "Epochs", "Rows", "Chosen values", "Validation")
    lines = [
        "",
        f"% {tuning_table.sentence(tuned)}",
        r"\begin{tabular}{lrrrlr}",
        r"\toprule",
        " & ".join(heads) + r" \\",
        r"\midrule",
    ]
    lines += [" & ".join(map(escaped, line)) + r" \\" for line in tuning_table.lines(tuned, titles)]
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _gap(found: Any) -> str:
    if found.mean is None or found.low is None:
        return "--"
    return f"${found.mean:+.2f}$ $[{found.low:+.2f}, {found.high:+.2f}]$"


def _math(figure: str) -> str:
    """87.31 ± 0.42 as mathematics; words stay as they are."""
    number = figure.replace("±", r"\pm").replace("\N{MINUS SIGN}", "-")
    return f"${number}$" if number[:1].isdigit() or number[:1] == "-" else escaped(figure)


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: f"\\{c}" for c in "&%$#_{}"}
    return "".join(special.get(c, c) for c in text)
