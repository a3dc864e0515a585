"""The plots, in the look of a run's report. A plot is one function of the findings, entered in `PLOTS`; a panel of the
learning curves is one function of a report, entered in `PANELS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from safetensors.numpy import load_file

from cutlayer import plugins
from cutlayer.report.collect import Report, ReportEntry, ResultRow, StoredRun
from cutlayer.report.curves import (
    MARKERS,
    drawn,
    figure_of,
    score_over,
    score_over_bytes,
    score_over_energy,
    score_over_epochs,
    score_over_time,
    titled,
)
from cutlayer.report.looks import COLOURS, GREEN, PALETTE, VERMILLION, look_of_algorithm, title_of_algorithm
from cutlayer.reproduce.cells import (
    ALPHAS,
    ALPHAS_WITH_PHI,
    LEAKING_DEFENCES,
    LEAKING_METHODS,
    LEAKING_PHIS,
    PHASES,
    PHIS,
    SKEW,
    TABLE4_METHODS,
    Cell,
)
from cutlayer.reproduce.contest import contest
from cutlayer.reproduce.findings import Findings
from cutlayer.reproduce.outcomes import Outcomes, Score
from cutlayer.reproduce.table6 import FLEET_TEXT, spent
from cutlayer.reproduce.tables import SECTIONS, paper
from cutlayer.reproduce.train import PICTURES, SHOWN, folder_of
from cutlayer.summary import spread

_RANGE = 14.0  # points below the median accuracy that a plot shows; collapsed runs are below the bottom
_STRAIGHT = 2.0  # points up to which the axis of differences is linear

Line = tuple[str, Sequence[float], Sequence[Score]]  # label, x, scores


@dataclass(frozen=True)
class Plot:
    """A picture: the part of the command line that asks for it ("" for any), title, what to know about it, whether
    there is anything to draw yet, and the function that draws it.
    """

    part: str
    title: str
    text: str
    ready: Callable[[Findings], bool]
    figure: Callable[[Findings], Figure]


def draw(findings: Findings) -> dict[str, bytes]:
    """Name of a plot -> PNG, for requested plots with something to show."""
    asked = {name: plot for name, plot in PLOTS.items() if plot.part in ("", *findings.parts)}
    return {n: drawn(partial(plot.figure, findings)) for n, plot in asked.items() if plot.ready(findings)}


def _trained(part: str) -> Callable[[Findings], bool]:
    """Whether a cell of the part is done."""
    return lambda f: any(f.outcomes.of(cell) for cell in SECTIONS[part].cells(f.outcomes.study))


def _attacked(part: str) -> Callable[[Findings], bool]:
    """Whether a cell of the part is attacked."""
    return lambda f: any(
        o.leakage for cell in SECTIONS[part].cells(f.outcomes.study) for o in f.outcomes.of(cell).values()
    )


# ---- accuracy over the number of clients: Tables 1 to 3 -------------------------------------------------------------


def _clients(name: str, groups: Mapping[str, Mapping[str, str]], findings: Findings) -> Figure:
    """Ours beside the paper's. `groups`: title of a panel -> row of the table -> label."""
    table, theirs = findings.table(name), paper()[name]
    assert table is not None
    rows, clients = dict(table.rows), findings.outcomes.study.size.clients
    shape = (1, 2) if len(groups) == 1 else (2, len(groups))
    figure = Figure(figsize=(5.4 * shape[1], 0.6 + 4.2 * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False).reshape(2, len(groups))
    for column, (title, labels) in enumerate(groups.items()):
        for index, (row, label) in enumerate(labels.items()):
            beside = 1.012 ** (index - (len(labels) - 1) / 2)  # equal lines must not hide each other
            look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            scores = [s for s in rows[row] if isinstance(s, Score)]
            _line(axes[0, column], (label, [c * beside for c in clients], scores), **look)
            known = [None if v is None else Score(v, None, 1, 1) for v in theirs["rows"][row]]
            pairs = [(c, s) for c, s in zip(theirs["clients"], known, strict=True) if s is not None]
            _line(axes[1, column], (label, [c * beside for c, _ in pairs], [s for _, s in pairs]), **look)
        for ax, whose, there in zip(axes[:, column], ("ours", "the paper"), (clients, theirs["clients"]), strict=True):
            titled(ax, f"{title}, {whose}" if title else whose.capitalize())
            _log2(ax, there)
            ax.set_xlabel("clients")
    for own in axes:
        _accuracy_axis(own)
    _legend(figure, axes[0, 0])
    return figure


def _table1(findings: Findings) -> Figure:
    return _clients("table1", {"": {f"alpha {a:g}": f"alpha {a:g}" for a in ALPHAS}}, findings)


def _table2(findings: Findings) -> Figure:
    groups = {f"Alpha {a:g}": {f"alpha {a:g}, phi {p:g}": f"phi {p:g}" for p in PHIS} for a in ALPHAS_WITH_PHI}
    return _clients("table2", groups, findings)


def _table3(findings: Findings) -> Figure:
    return _clients("table3", {"": {phase: phase for phase in ("none", *PHASES)}}, findings)


# ---- the methods ----------------------------------------------------------------------------------------------------


def _table4(findings: Findings) -> Figure:
    outcomes, rates = findings.outcomes, findings.outcomes.study.size.rates
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    ax = figure.subplots()
    for index, method in enumerate(TABLE4_METHODS):
        scores = [outcomes.score(outcomes.study.method(method, rate)) for rate in rates]
        colour, style = look_of_algorithm(method)
        look = {"color": colour, "linestyle": style, "marker": MARKERS[index]}
        _line(ax, (title_of_algorithm(method), rates, scores), **look)
        chosen = outcomes.chosen_rate(method)
        if chosen is not None:
            mean = scores[rates.index(chosen)].mean or math.nan
            ax.plot([chosen], [mean], "o", ms=13, mfc="none", mec=colour, mew=1.5, linestyle="none")
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("learning rate (log); circled: chosen by validation accuracy")
    _accuracy_axis([ax])
    _legend(figure, ax)
    return figure


def _skew(findings: Findings) -> Figure:
    """The accuracy of each method, with a panel for each setting of the contest; its traffic is beside its name."""
    outcomes, traffic = findings.outcomes, findings.table("skew-traffic")
    assert traffic is not None
    study = outcomes.study
    sent = {method: values[-1] for method, values in traffic.rows}
    cells = {s: [study.contestant(s, m) for m in methods] for s, methods in study.contest().items()}
    # Centralised learning is the same everywhere: alone it does not begin a setting.
    begun = [s for s, own in cells.items() if any(outcomes.of(c) and not c.config.traits.central for c in own)]
    settings = {s: study.contest()[s] for s in begun or cells}
    columns = min(len(settings), 3)
    rows = math.ceil(len(settings) / columns)
    figure = Figure(figsize=(3.4 + 3.4 * columns, rows * (1.0 + 0.34 * len(sent))), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for ax, (setting, methods) in zip(axes.ravel(), settings.items(), strict=False):
        for y, method in enumerate(sent):
            score = outcomes.score(study.contestant(setting, method)) if method in methods else None
            if score is not None and score.mean is not None:
                colour, _ = look_of_algorithm(contest(SKEW).methods[method]["algorithm"])
                ax.errorbar([score.mean], [y], xerr=[score.std or 0], fmt="o", color=colour, capsize=3)
        titled(ax, setting)
        ax.set_xlabel("test accuracy (%)")
        ax.set_ylim(len(sent) - 0.5, -0.5)
    for ax in axes[:, 0]:
        ax.set_yticks(range(len(sent)), [f"{method}, {bytes_}" for method, bytes_ in sent.items()])
    for ax in axes.ravel()[len(settings) :]:
        ax.axis("off")
    return figure


# ---- leakage --------------------------------------------------------------------------------------------------------


def _phi(findings: Findings) -> Figure:
    """Table 5, ours beside the paper's, on different scales."""
    outcomes, theirs = findings.outcomes, paper()["table5"]
    figure = Figure(figsize=(10.8, 4.4), layout="constrained")
    ours, papers = figure.subplots(1, 2)
    errors = [[o.mse for o in outcomes.of(outcomes.study.by_phi(phi)).values() if o.leakage] for phi in LEAKING_PHIS]
    known = [(phi, *spread(values)) for phi, values in zip(LEAKING_PHIS, errors, strict=True) if values]
    ours.errorbar(
        [phi for phi, _, _ in known],
        [mean for _, mean, _ in known],
        [std or 0.0 for _, _, std in known],
        color=VERMILLION,
        marker="o",
        capsize=3,
    )
    papers.plot(LEAKING_PHIS, [theirs[f"{phi:g}"] for phi in LEAKING_PHIS], color=PALETTE["grey"], marker="s")
    for ax, whose in ((ours, "Ours"), (papers, "The paper")):
        titled(ax, whose)
        ax.set_xticks(LEAKING_PHIS)
        ax.set_xlabel("phi")
        ax.set_ylim(0, ax.get_ylim()[1] * 1.08)
    ours.set_ylabel("mean squared error of the reconstruction")
    return figure


def _defences(findings: Findings) -> Figure:
    """The effect and the cost of each defence: a line from no defence to the strongest."""
    outcomes = findings.outcomes
    study = outcomes.study
    lines: dict[str, list[Cell]] = {
        kind: [study.attacked("psl"), *(study.defended(kind, s) for s in strengths)]
        for kind, strengths in LEAKING_DEFENCES.items()
    }
    if "table5" in findings.parts:
        lines["SplitAvg (SGLR, by phi)"] = [study.by_phi(phi) for phi in LEAKING_PHIS]
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    ax = figure.subplots()
    for index, (label, cells) in enumerate(lines.items()):
        points = [[(o.last, o.explained) for o in outcomes.of(c).values() if o.explained is not None] for c in cells]
        at = [np.mean(np.asarray(p, float), axis=0) for p in points if p]
        wide = [np.std(np.asarray(p, float), axis=0, ddof=1) if len(p) > 1 else np.zeros(2) for p in points if p]
        if at:
            x, y = np.asarray(at).T
            dx, dy = np.asarray(wide).T
            look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            ax.errorbar(x, y, dy, dx, label=label, capsize=2, elinewidth=1.0, markeredgecolor="white", **look)
    ax.set_xlabel("test accuracy (%)")
    ax.set_ylabel("inputs' variance that the attacker explains (%)")
    _legend(figure, ax, 3)
    return figure


def _kept(findings: Findings) -> dict[str, Path]:
    """The pictures of the first seed, by cell: inputs and reconstructions [n, channels, h, w]."""
    outcomes = findings.outcomes
    study = outcomes.study
    cells = {title_of_algorithm(m): study.attacked(m) for m in LEAKING_METHODS}
    cells |= {f"PSL after {c}": study.at_depth(c) for c in study.cuts if c != study.cut}
    cells |= {
        f"PSL, {k} {s[-1]}": study.defended(k, s[-1]) for k, s in ((k, list(v)) for k, v in LEAKING_DEFENCES.items())
    }
    if "table5" in findings.parts:
        cells |= {f"SGLR, phi {phi:g}": study.by_phi(phi) for phi in LEAKING_PHIS[-1:]}
    files = {label: folder_of(outcomes.out, cell, study.size.seeds[0]) / PICTURES for label, cell in cells.items()}
    return {label: path for label, path in files.items() if path.exists()}


def _pictures(findings: Findings) -> Figure:
    """A row of inputs, and below it their reconstructions; inputs again if they differ."""
    rows: list[tuple[str, Any, Any]] = []
    last = None
    for label, path in _kept(findings).items():
        kept = load_file(path)
        inputs = kept["inputs"]
        if last is None or not np.array_equal(last, inputs):
            rows.append(("private inputs", inputs, inputs))
        rows.append((label, kept["reconstructions"], inputs))
        last = inputs
    figure = Figure(figsize=(0.75 * SHOWN + 3.2, 0.78 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), SHOWN + 1, squeeze=False, gridspec_kw={"width_ratios": [3.6, *[1] * SHOWN]})
    for line, (label, made, inputs) in zip(axes, rows, strict=True):
        for ax in line:
            ax.axis("off")
        line[0].text(0, 0.5, label, va="center", fontsize=11, weight="bold" if label == "private inputs" else "normal")
        for ax, picture in zip(line[1:], made, strict=False):
            shown = picture[0] if len(picture) == 1 else np.moveaxis(picture, 0, -1)
            ax.imshow(shown, cmap="gray", vmin=inputs.min(), vmax=inputs.max())
    return figure


# ---- learning curves ------------------------------------------------------------------------------------------------


def _over_broadcast_bytes(ax: Axes, report: Report) -> None:
    """As over bytes, with messages that are the same for several clients counted once."""
    total = "up + down, wire-broadcast (MB, log)"
    score_over(ax, report, lambda e: (e["bytes_up"] + e["bytes_down_broadcast"]) / 1e6, "traffic, broadcast", total)


PANELS: tuple[Callable[[Axes, Report], None], ...] = (
    score_over_epochs,
    score_over_bytes,
    _over_broadcast_bytes,
    score_over_time,
    score_over_energy,
)


def _curves(findings: Findings) -> Figure:
    return figure_of(curves_report(findings.outcomes), PANELS)


def curves_report(outcomes: Outcomes) -> Report:
    """Table 4's methods at their chosen rates, as a report of the same methods would have them."""
    chosen = {method: outcomes.chosen(method) for method in TABLE4_METHODS}
    entries = [_entry(outcomes, cell) for cell in chosen.values() if cell is not None]
    return Report(outcomes.out, {}, [entry for entry in entries if entry.runs], True, "")


def _entry(outcomes: Outcomes, cell: Cell) -> ReportEntry:
    name = cell.config.algorithm
    entry = plugins.find("algorithm", name)
    about = {"title": entry.title, **entry.facts}
    runs = [
        StoredRun(
            seed,
            {},
            [{**e, **spent(outcomes.study, name, e)} for e in o.evaluations],
            [],
            [],
            0.0,
            [],
            [],
            about,
            o.result,
        )
        for seed, o in outcomes.of(cell).items()
        if not o.diverged
    ]
    title = f"{title_of_algorithm(name)}, rate {cell.config.client_lr:g}"
    row = ResultRow(title, [r.seed for r in runs], (0.0, None), (0.0, None), 0.0, None, None, 0.0, 0.0, None)
    return ReportEntry(name, name, title, runs, row)


def _with_costs(outcomes: Outcomes, method: str, evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**e, **spent(outcomes.study, method, e)} for e in evaluations]


# ---- claims ---------------------------------------------------------------------------------------------------------


def _claims(findings: Findings) -> Figure:
    """Every claim's difference with its interval."""
    measured = [v for v in findings.verdicts if v.overall.low is not None]
    figure = Figure(figsize=(10.5, 1.5 + 0.42 * len(measured)), layout="constrained")
    ax = figure.subplots()
    colours = {"holds": GREEN, "does not hold": VERMILLION, "within noise": PALETTE["grey"]}
    ends = [0.0]
    for y, verdict in enumerate(measured):
        d = verdict.overall
        assert d.mean is not None
        assert d.low is not None
        assert d.high is not None
        colour = colours[d.verdict]
        ax.plot([d.low, d.high], [y, y], color=colour, linewidth=2.5, solid_capstyle="butt")
        ax.plot([d.mean], [y], "o", color=colour, markersize=8)
        ax.plot([verdict.claim.threshold] * 2, [y - 0.32, y + 0.32], color="#222222", linewidth=1.5)
        ends += [d.low, d.high, verdict.claim.threshold]
    for word, colour in colours.items():
        ax.plot([], [], "o-", color=colour, label=word)
    ax.plot(
        [], [], color="#222222", linestyle="none", marker="|", markersize=12, markeredgewidth=1.5, label="threshold"
    )
    ax.set_yticks(range(len(measured)), [v.claim.title for v in measured])
    ax.set_ylim(len(measured) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xscale("symlog", linthresh=_STRAIGHT, linscale=0.8)
    low, high = min(ends) * 1.15, max(ends) * 1.15
    ax.set_xlim(min(low, -_STRAIGHT), max(high, _STRAIGHT))
    ticks = [t for t in (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50) if low - 1 <= t <= high + 1]
    ax.set_xticks(ticks)
    ax.tick_params(axis="x", labelsize=10)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}".replace("-", "\N{MINUS SIGN}") if x else "0"))
    ax.set_xlabel(f"difference in points, mean and 95 % interval\n(logarithmic beyond ±{_STRAIGHT:g})")
    _legend(figure, ax)
    return figure


_BARS = "Bars show one standard deviation over seeds. Points far below the others are cut off at the bottom."
PLOTS: dict[str, Plot] = {
    "claims": Plot(
        "",
        "The claims",
        "The difference in points with its 95 % interval. The black tick is the claim's threshold.",
        lambda f: any(v.overall.low is not None for v in f.verdicts),
        _claims,
    ),
    "table1": Plot("table1", "SplitLr", _BARS, _trained("table1"), _table1),
    "table2": Plot("table2", "SplitLr and SplitAvg", _BARS, _trained("table2"), _table2),
    "table3": Plot("table3", "SplitAvg in phases", _BARS, _trained("table3"), _table3),
    "table4": Plot("table4", "The methods at every rate", _BARS, _trained("table4"), _table4),
    "fig5": Plot(
        "fig5",
        "Learning curves of the methods",
        "Table 4's methods at their chosen rates. Lines are means over seeds, bands one standard deviation on either "
        "side. Traffic is counted in two ways: once per receiver (wire-unicast), or once for a message that is the "
        "same for several clients (wire-broadcast). "
        + FLEET_TEXT
        + " These are our own curves; they are not compared with the paper's figure 5.",
        lambda f: bool(curves_report(f.outcomes).entries),
        _curves,
    ),
    SKEW: Plot(
        SKEW,
        "Label skew: accuracy and traffic",
        "The bytes next to each name go up and down in a whole training of all clients, in the method's first setting. "
        "A message that is the same for several clients is counted once. If it is sent once per receiver, SplitAvg "
        "(SGLR, SGL) moves as much as PSL. Bars show one standard deviation over seeds.",
        _trained(SKEW),
        _skew,
    ),
    "table5": Plot(
        "table5",
        "Reconstruction by phi",
        "Bars show one standard deviation over seeds. The claims at equal accuracy tell whether reconstruction got "
        "harder or the model got worse.",
        _attacked("table5"),
        _phi,
    ),
    "leakage-defences": Plot(
        "leakage",
        "Privacy and accuracy, by defence",
        "Each line goes from no defence to the strongest. Bars show one standard deviation over seeds in both "
        "directions. Lower is more private, and further right is more accurate. Below zero, a trained attacker does "
        "worse than one who always answers with the mean input.",
        _attacked("leakage"),
        _defences,
    ),
    "leakage-pictures": Plot(
        "leakage",
        "What the attacker sees",
        "One client's inputs, and their reconstructions by an attacker who knows the client part. Each defence is "
        "shown at its strongest, for the first seed.",
        lambda f: bool(_kept(f)),
        _pictures,
    ),
}


# ---- shared ---------------------------------------------------------------------------------------------------------


def _line(ax: Axes, line: Line, **look: Any) -> None:
    """Means with bars of one standard deviation, without unknown ones."""
    label, x, scores = line
    means = [math.nan if s.mean is None else s.mean for s in scores]
    stds = [s.std or 0.0 for s in scores]
    ax.errorbar(x, means, stds, label=label, capsize=2, elinewidth=1.2, markeredgecolor="white", markersize=7, **look)


def _log2(ax: Axes, clients: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(clients, [str(c) for c in clients])
    ax.xaxis.set_minor_locator(NullLocator())


def _accuracy_axis(axes: Iterable[Axes]) -> None:
    """Axes that share their range of accuracies, down to `_RANGE` points below the median."""
    own = list(axes)
    values = np.concatenate([np.asarray(line.get_ydata(), float) for ax in own for line in ax.get_lines()])
    values = values[np.isfinite(values)]
    own[0].set_ylabel("test accuracy (%)")
    for ax in own[1:]:
        ax.tick_params(labelleft=False)
    if len(values):
        top, bottom = values.max(), max(values.min(), np.median(values) - _RANGE)
        margin = 0.06 * max(top - bottom, 1.0)
        for ax in own:
            ax.set_ylim(bottom - margin, min(top + margin, 101))


def _legend(figure: Figure, ax: Axes, columns: int = 6) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), columns))
