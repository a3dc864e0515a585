"""The pictures: learning curves, and the classes of each client. Drawn off screen, without pyplot's global figures."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cutlayer import plugins
from cutlayer.report.collect import Report, ReportEntry, StoredRun
from cutlayer.report.looks import BLACK, BLUE, COLOURS, PALETTE, VERMILLION, Look, look_of
from cutlayer.text import shortened

Array = npt.NDArray[np.float64]

DPI = 150
_STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 14,
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
}

MARKERS = "osD^vP*X<>ph"
_LARGER = {"*": 1.6, "P": 1.2, "X": 1.2}  # markers whose shape cannot be seen at the size of the others

_WINDOWS = 60  # the loss is averaged over windows of 1/60 of the training
_ANNOTATED = 16  # up to this number of clients and classes, the cells of the heat map show their numbers


@dataclass(frozen=True)
class _Curve:
    """One line: mean over seeds and, where there are several, the standard deviation (else NaN)."""

    label: str
    look: Look
    marker: str
    x: Array
    mean: Array
    std: Array


def panels(report: Report) -> list[bytes]:
    """Test score over epochs, training loss over epochs, test score over bytes, and where the runs have a clock
    over virtual time and over energy: a PNG each.
    """
    return [drawn(lambda draw=draw: figure_of(report, [draw])) for draw in panel_draws(report).values()]  # type: ignore[misc]


def overview(report: Report) -> bytes:
    """The panels in one PNG, three to a row."""
    return drawn(lambda: figure_of(report, list(panel_draws(report).values())))


def classes(report: Report) -> bytes:
    """Samples per class and client as a heat map, with the clients' sizes beside it, in one PNG."""
    return drawn(lambda: _classes_figure(shown_partition(report)))


def clients(report: Report) -> bytes | None:
    """Every client's score, the best first, as dots in one PNG; None if the clients' models do not differ."""
    entries = [(e, label, look) for e, label, look, _ in _looks(report) if differs(e.runs[0])]
    return drawn(lambda: _clients_figure(report, entries)) if entries else None


def differs(run: StoredRun) -> bool:
    """Whether the clients' models have separate scores."""
    return any(len(set(scores.values())) > 1 for scores in run.scores.values())


def _clients_figure(report: Report, entries: list[tuple[ReportEntry, str, Look]]) -> Figure:
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    ax = figure.subplots()
    measure = report.measure
    scale = 100 if measure.share else 1
    for entry, label, (colour, _) in entries:
        run = entry.runs[0]
        for where, scores in run.scores.items():
            values = sorted(scores.values(), key=run.measure.rank, reverse=True)
            rows = {"global": "all test rows", "own": "own test rows"}[where]
            several = len(run.scores) > 1
            ax.plot(
                np.arange(1, len(values) + 1),
                scale * np.array(values),
                marker="o" if where == "global" else "^",
                markersize=5 if len(values) <= 60 else 2.5,
                linestyle="-" if where == "global" else ":",
                linewidth=1.0,
                color=colour if report.comparison else (VERMILLION if where == "global" else BLUE),
                label=", ".join([label] * report.comparison + [rows] * (several or not report.comparison)),
            )
    titled(ax, f"Test {measure.title} of each client's model")
    ax.set_xlabel("clients, the best first")
    ax.set_ylabel(f"test {measure.label}")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    ax.legend()
    return figure


def shown_partition(report: Report) -> StoredRun:
    """The run whose partition is drawn: seeds have different partitions, entries of a comparison usually have
    the same.
    """
    return report.entries[0].runs[0]


def loss_window(report: Report) -> float:
    """Width in epochs of the windows over which the training loss is averaged."""
    return max(run.epochs[-1] if run.epochs else 0.0 for e in report.entries for run in e.runs) / _WINDOWS


def drawn(make: Callable[[], Figure]) -> bytes:
    """The figure as a PNG, in our style whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = make()
        FigureCanvasAgg(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def figure_of(report: Report, draws: Sequence[Callable[[Axes, Report], None]]) -> Figure:
    """Panels side by side, three to a row, with one legend."""
    across, rows = min(len(draws), 3), math.ceil(len(draws) / 3)
    figure = Figure(figsize=(5.9 * across, 5.0 * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(rows, across, squeeze=False).ravel()
    for ax, draw in zip(axes, draws, strict=False):
        draw(ax, report)
    for ax in axes[len(draws) :]:
        ax.set_axis_off()
    handles = {line.get_label(): line for ax in axes for line in ax.get_lines() if isinstance(line, Line2D)}
    # About 60 characters fit beside each other in a panel; a line's sample and the gap to the next take the room of 10.
    widths = [len(str(label)) + 10 for label in handles]
    columns = len(handles) if sum(widths) <= 60 * across else max(1, 60 * across // max(widths))
    lines = math.ceil(len(handles) / columns)
    figure.set_figheight(5.0 * rows + 0.26 * (lines - 1))  # space for further lines of the legend
    figure.legend(
        handles=list(handles.values()),
        labels=list(map(str, handles)),
        loc="outside upper center",
        ncols=columns,
        handlelength=2.6,
    )
    return figure


def score_over_epochs(ax: Axes, report: Report) -> None:
    """Test score over epochs."""
    for curve in _score_curves(report, lambda e: float(e["epochs"])):
        _plot(ax, curve)
    _named_scores(ax, report, "epochs")
    _epochs(ax)


def _loss_over_epochs(ax: Axes, report: Report) -> None:
    window = loss_window(report)
    curves = [_loss(entry, label, look, marker, window) for entry, label, look, marker in _looks(report)]
    if not report.comparison:  # one line, beside lines for test and validation
        curves = [replace(curves[0], label="training loss", look=(BLACK, "-"), marker="")]
    for curve in curves:
        _plot(ax, curve)
    values = np.concatenate([c.mean for c in curves])
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        ax.set_yscale("log")
        ax.set_ylim(values.min() / 1.8, values.max() * 1.8)  # the bands' tails would squeeze the lines
    titled(ax, "Training loss over epochs")
    ax.set_ylabel("training loss" + (" (log)" if ax.get_yscale() == "log" else ""))
    _epochs(ax)


def score_over_bytes(ax: Axes, report: Report) -> None:
    """Test score over the bytes of training, each message once per receiver."""
    score_over(ax, report, lambda e: (e["bytes_up"] + e["bytes_down"]) / 1e6, "traffic", "sent up and down (MB, log)")


def score_over_time(ax: Axes, report: Report) -> None:
    """Test score over virtual time."""
    score_over(ax, report, lambda e: e["virtual_seconds"], "virtual time", "virtual time (s, log)")


def score_over_energy(ax: Axes, report: Report) -> None:
    """Test score over the clients' modelled energy."""
    # Total energy if it is known for every run, otherwise marginal energy.
    known = all(run.evaluations[-1].get("clients_joules") is not None for e in report.entries for run in e.runs)
    name, kind = ("clients_joules", "total") if known else ("clients_marginal_joules", "marginal")
    score_over(ax, report, lambda e: e[name], "energy", f"all clients' energy, {kind} (J, log)")


def score_over(ax: Axes, report: Report, x: Callable[[dict[str, float]], float], over: str, label: str) -> None:
    """Test score over a quantity of an evaluation, on a logarithmic axis called `label`."""
    for curve in _score_curves(report, x):
        crossed = curve.x > 0  # nothing was spent yet, so it has no place on a log axis
        _plot(ax, replace(curve, x=curve.x[crossed], mean=curve.mean[crossed], std=curve.std[crossed]))
    _named_scores(ax, report, over)
    ax.set_xscale("log")
    ax.set_xlabel(label)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if 1e-3 <= x < 1e5 else f"{x:.0e}"))
    low, high = ax.get_xlim()
    if 6 < high / low <= 1000:
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    elif high / low <= 6:  # so little that even 1, 2, 5 would leave the axis without numbers
        ax.set_xticks(sorted({float(f"{x:.2g}") for x in np.geomspace(low, high, 6)[1:-1]}))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def panel_draws(report: Report) -> dict[str, Callable[[Axes, Report], None]]:
    """What draws each panel that the report has, by name."""
    found: dict[str, Callable[[Axes, Report], None]] = {
        "score-over-epochs": score_over_epochs,
        "loss-over-epochs": _loss_over_epochs,
        "score-over-bytes": score_over_bytes,
    }
    last = [run.evaluations[-1] for e in report.entries for run in e.runs]
    if all(e.get("virtual_seconds") is not None for e in last):
        found["score-over-time"] = score_over_time
    if all(e.get("clients_marginal_joules") is not None for e in last):
        found["score-over-energy"] = score_over_energy
    return found


def _score_curves(report: Report, x: Callable[[dict[str, float]], float]) -> list[_Curve]:
    """Test score per entry; for a single run also validation score and the worst client's."""
    if report.comparison:
        return [_scores(e.runs, label, look, marker, x, "test_score") for e, label, look, marker in _looks(report)]
    runs = report.entries[0].runs
    last = runs[0].evaluations[-1]
    kinds = [("test", (VERMILLION, "-"), "o", "test_score")]
    if last["validation_score"] is not None:
        kinds.append(("validation", (BLUE, "--"), "s", "validation_score"))
    if any(e["test_score_worst"] != e["test_score"] for e in runs[0].evaluations):
        kinds.append(("test, worst client", (PALETTE["grey"], ":"), "v", "test_score_worst"))
    return [_scores(runs, label, look, marker, x, name) for label, look, marker, name in kinds]


def _scores(
    runs: Iterable[StoredRun], label: str, look: Look, marker: str, x: Callable[[dict[str, float]], float], name: str
) -> _Curve:
    """Evaluations of the same round belong together, across seeds."""
    rounds: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        scale = 100 if run.measure.share else 1
        for e in run.evaluations:
            if e[name] is not None:
                rounds.setdefault(e["round"], []).append((x(e), scale * float(e[name])))
    groups = [rounds[r] for r in sorted(rounds)]
    return _curve(label, look, marker, groups)


def _loss(entry: ReportEntry, label: str, look: Look, marker: str, window: float) -> _Curve:
    """Per seed the mean loss of each window, samples weighted alike; then mean and spread over the seeds."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for run in entry.runs:
        epochs, losses, samples = np.array(run.epochs), np.array(run.losses), np.array(run.samples, float)
        finite = np.isfinite(losses)
        # The tiny shift to the left avoids another window because of rounding.
        windows = np.floor(np.maximum(epochs[finite] / window - 1e-9, 0)).astype(int) if window else np.zeros(0, int)
        for index in np.unique(windows):
            own = windows == index
            weights = samples[finite][own]
            if weights.sum():
                mean = float(np.average(losses[finite][own], weights=weights))
                groups.setdefault(int(index), []).append(((index + 0.5) * window, mean))
    return _curve(label, look, marker, [groups[i] for i in sorted(groups)])


def _curve(label: str, look: Look, marker: str, groups: list[list[tuple[float, float]]]) -> _Curve:
    """Mean and sample standard deviation of each group of (x, y)."""
    x = np.array([np.mean([p[0] for p in g]) for g in groups], float)
    mean = np.array([np.mean([p[1] for p in g]) for g in groups], float)
    std = np.array([np.std([p[1] for p in g], ddof=1) if len(g) > 1 else math.nan for g in groups], float)
    return _Curve(label, look, marker, x, mean, std)


def _plot(ax: Axes, curve: _Curve) -> None:
    colour, style = curve.look
    few, step = len(curve.x) <= 12, math.ceil(len(curve.x) / 10)
    first = MARKERS.find(curve.marker) * step // len(MARKERS) if curve.marker else 0  # not all at the same places
    ax.plot(
        curve.x,
        curve.mean,
        color=colour,
        linestyle=style,
        label=curve.label,
        marker=curve.marker or ("o" if len(curve.x) == 1 else None),
        markersize=5.5 * _LARGER.get(curve.marker, 1.0),
        markeredgecolor="white",
        markeredgewidth=0.8,
        markevery=1 if few else (first, step),
    )
    known = np.isfinite(curve.std)
    if known.any():
        low, high = curve.mean - curve.std, curve.mean + curve.std
        if (curve.mean > 0).all():  # a band below zero would break a logarithmic axis, and no such value is there
            low = np.maximum(low, 0.05 * curve.mean)
        if np.ptp(curve.x) > 1e-9 * abs(curve.x).max():
            ax.fill_between(curve.x[known], low[known], high[known], color=colour, alpha=0.15, linewidth=0)


def _looks(report: Report) -> list[tuple[ReportEntry, str, Look, str]]:
    """Per entry its label, look and marker. An algorithm has the same colour in every report; further entries of the
    same algorithm get the colours that are left.
    """
    owned = {e.name: look for e in report.entries if (look := look_of(e.about)) is not None}
    plain = {e.name: owned[e.name] for e in report.entries if e.name == plugins.label(e.algorithm) and e.name in owned}
    for e in report.entries:
        own = owned.get(e.name)
        if e.name not in plain and own is not None and own not in plain.values():
            plain[e.name] = own
    spare = [(c, s) for s in ("-", "--", "-.", ":") for c in COLOURS]
    for e in report.entries:
        if e.name not in plain:
            # A free colour first, then a free style of any colour; after 32 entries, from the start again.
            colours = {look[0] for look in plain.values()}
            free = [k for k in spare if k[0] not in colours] or [k for k in spare if k not in plain.values()] or spare
            plain[e.name] = free[0]
    labels: dict[str, str] = {}
    for e in report.entries:
        label = _plain(shortened(e.title, 32))
        labels[e.name] = label if label not in labels.values() else _plain(shortened(f"{e.title} ({e.name})", 60))
    return [(e, labels[e.name], plain[e.name], MARKERS[i % len(MARKERS)]) for i, e in enumerate(report.entries)]


def titled(ax: Axes, title: str) -> None:
    """The title of a panel."""
    ax.set_title(title, loc="left", fontweight="bold")


def _named_scores(ax: Axes, report: Report, over: str) -> None:
    """Title and axis of scores over something."""
    measure, test = report.measure, "test " if report.comparison else ""
    title = f"{test}{measure.title} over {over}"
    titled(ax, title[:1].upper() + title[1:])
    ax.set_ylabel(f"{test}{measure.label}")
    if measure.share:
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -1), min(high, 101))
        return
    found = [np.asarray(line.get_ydata(), float) for line in ax.get_lines()]
    values = np.concatenate(found) if found else np.zeros(0)
    if len(values) and not measure.maximise and values.min() > 0 and values.max() > 20 * values.min():
        ax.set_yscale("log")


def _epochs(ax: Axes) -> None:
    ax.set_xlabel("epochs")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    ax.set_xlim(left=0)


_NAMED = 30  # clients: beyond, not each has a label


def _classes_figure(run: StoredRun) -> Figure:
    if not has_classes(run):
        return _sizes_figure(run)
    names = list(map(_plain, run.class_names))
    counts = np.array(run.counts, int).reshape(len(run.counts), -1)
    clients, kinds = counts.shape
    annotated = clients <= 2 * _ANNOTATED and kinds <= _ANNOTATED
    height = min(max(2.6, 1.8 + (0.34 if annotated else 0.13) * clients), 11.0)
    figure = Figure(figsize=(9.6, height), layout="constrained")
    cells, sizes = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    top = max(int(counts.max(initial=0)), 1)
    image = cells.imshow(counts, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    _rows_and_columns(cells, names, clients)
    if run.client_names and clients <= _NAMED:
        cells.set_yticklabels([shortened(_plain(name), 14) for name in run.client_names])
    if annotated:
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if count > 0.55 * top else "#222222"
            cells.text(column, row, f"{count}", ha="center", va="center", fontsize=10, color=ink)
    else:
        figure.colorbar(image, ax=cells, location="left", label="samples", pad=0.02, shrink=min(1.0, 4 / height))
    totals = counts.sum(axis=1)
    sizes.barh(np.arange(clients), totals, height=0.8 if clients <= 100 else 1.0, color=PALETTE["sky"])
    sizes.set_title("All classes", loc="left", fontweight="bold")
    sizes.set_xlabel("samples")
    sizes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    sizes.tick_params(left=False, labelleft=False)
    sizes.grid(axis="y", visible=False)
    sizes.set_xlim(0, max(int(totals.max(initial=0)), 1) * 1.08)
    return figure


def has_classes(run: StoredRun) -> bool:
    """Whether samples have one class each, so that they are counted by class."""
    return bool(run.class_names) and len(run.class_names) == len(run.counts[0])


def _sizes_figure(run: StoredRun) -> Figure:
    """Only samples per client, if they have no classes."""
    totals = np.array(run.counts, int).reshape(len(run.counts), -1).sum(axis=1)
    clients = len(totals)
    figure = Figure(figsize=(9.6, min(max(2.2, 1.4 + 0.3 * clients), 7.0)), layout="constrained")
    ax = figure.subplots()
    ax.barh(np.arange(clients), totals, height=0.8 if clients <= 100 else 1.0, color=PALETTE["sky"])
    titled(ax, "Training samples per client")
    ax.set_xlabel("samples")
    ax.set_ylabel("client")
    ax.grid(axis="y", visible=False)
    ax.set_ylim(clients - 0.5, -0.5)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if clients <= 30:
        ax.set_yticks(range(clients))
    else:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    return figure


def _rows_and_columns(cells: Axes, names: list[str], clients: int) -> None:
    cells.grid(visible=False)
    cells.set_title("Training samples per class and client", loc="left", fontweight="bold")
    cells.set_xlabel("class")
    cells.set_ylabel("client")
    every = math.ceil(len(names) / 25)  # more labels would overlap
    shown = range(0, len(names), every)
    long = max((len(n) for n in names), default=0) * len(shown) > 70
    cells.set_xticks(list(shown))
    cells.set_xticklabels(
        [shortened(names[i], 14) for i in shown], rotation=40 if long else 0, ha="right" if long else "center"
    )
    if clients <= _NAMED:
        cells.set_yticks(range(clients))
    else:
        cells.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))


def _plain(text: str) -> str:
    """Text that matplotlib draws as it is: no mathematics between dollars, no characters that its font lacks."""
    known = "".join(c if ord(c) in _glyphs() else "?" for c in text) or "?"
    known = known.replace("\\", "/").replace("$", r"\$")
    # A leading underscore would hide the line from the legend.
    return f" {known}" if known.startswith("_") else known


@cache
def _glyphs() -> frozenset[int]:
    """The characters of the font that matplotlib brings along."""
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())
