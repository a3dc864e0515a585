"""The page: everything a reader needs in one HTML file that loads nothing."""

from __future__ import annotations

import base64
import json
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from cutlayer import plugins
from cutlayer.options import CompareConfig, RunConfig
from cutlayer.report import availability, spending, staleness, tuning_table
from cutlayer.report.collect import Measure, Report, ReportEntry
from cutlayer.report.curves import differs, has_classes, loss_window, shown_partition
from cutlayer.report.differences import Differences, as_text
from cutlayer.report.looks import DARK
from cutlayer.summary import mean_of_known, spread
from cutlayer.text import format_bytes, format_rate, listed, spoken

_OWN = ("model", "data", "loss", "metrics")
_CONVENTIONS = ("wire-unicast", "wire-broadcast", "paper")


def render(
    report: Report,
    panels: list[bytes],
    classes: bytes,
    by_client: bytes | None = None,
    gaps: Differences | None = None,
) -> str:
    """The page as HTML, with the panels of curves and the pictures of the classes and of the clients' scores."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("cutlayer.report").joinpath("report.html.j2").read_text("utf-8"))
    partition = shown_partition(report)
    return template.render(
        title=_title(report),
        sentence=sentence(report),
        unfinished=report.unfinished,
        comparison=report.comparison,
        rows=[_row(entry, report.measure) for entry in report.entries],
        gaps=gaps,
        tuned=None if report.tuned is None else tuning_table.sentence(report.tuned),
        tuned_lines=[]
        if report.tuned is None
        else tuning_table.lines(report.tuned, {e.name: e.title for e in report.entries}),
        tuned_warnings=[] if report.tuned is None else report.tuned.warnings,
        gap_rows=[] if gaps is None else as_text(gaps),
        one_seed=all(len(entry.row.seeds) == 1 for entry in report.entries),
        costs=[spending.line(entry) for entry in report.entries if entry.facts],
        clocked=spending.clocked(report),
        traced=availability.HEADS if spending.traced(report) else (),
        availability=availability.table(report),
        stale=staleness.HEADS if spending.stale(report) else (),
        staleness=staleness.table(report),
        reached=spending.reached(report),
        kinds=[(entry.row.title, rows) for entry in report.entries if (rows := _kinds(entry))],
        dark=DARK,
        pictures=list(zip(map(_embedded, panels), _descriptions(report), strict=False)),
        classes=_embedded(classes),
        by_client=None if by_client is None else _embedded(by_client),
        fairness=_fairness(report),
        clients=_clients(report),
        figures=_figures(report),
        per_class=_per_class(report),
        classes_text=f"{len(partition.counts)} clients, "
        + (f"{len(partition.class_names)} classes, " if has_classes(partition) else "")
        + f"{sum(map(sum, partition.counts)):,} training samples",
        classed=has_classes(partition),
        measure=report.measure,
        judged=_judged(report),
        client_names=", ".join(f"{k} is {name}" for k, name in enumerate(partition.client_names)),
        account=partition.account,
        partition_of=partition.seed if report.comparison else None,
        window=f"{loss_window(report):.2g}",
        config=_config(report),
        own=[f"{'a ' * (what in ('model', 'loss'))}{what}" for what in _OWN if report.config.get(f"own_{what}")],
        algorithms={e.algorithm: e.about for e in report.entries if e.about.get("summary")},
        central=list(dict.fromkeys(e.about["title"] for e in report.entries if e.about.get("central"))),
        folder=report.folder.resolve().name,
    )


def sentence(report: Report) -> str:
    """The training in one sentence, from the configuration."""
    c = report.config
    runs = [run.config for entry in report.entries for run in entry.runs]

    def value(name: str, default: str = "?") -> str:
        """The option's value; if variants differ in it, all of its values."""
        tuned = name in _tuned(report)
        values = dict.fromkeys(_shown(run[name]) for run in [c] * (not tuned) + runs if run.get(name) is not None)
        return " or ".join(values) or default

    titles = [entry.title for entry in report.entries]
    what = f"{listed(titles)} compared" if report.comparison and len(titles) > 1 else f"{titles[0]} trained"
    data = "data of your own" if c.get("own_data") else _known("data", value("data"))
    model = "a model of your own" if c.get("own_model") else _known("model", value("model"))
    clients = value("clients")
    partition = value("partition")
    entry = plugins.index("partition").get(partition)
    how = ", ".join([partition, *(f"{o.name} {value(o.name)}" for o in (entry.options if entry else ()))])
    length = f"{value('rounds')} rounds" if c.get("rounds") else f"{value('epochs')} epochs"
    seeds = list(dict.fromkeys(run.seed for entry in report.entries for run in entry.runs))
    cut = dict.fromkeys(str(run["cut"]) for run in runs if run.get("cut"))
    whose = f"{clients} client{'s' * (clients != '1')}"
    return (
        f"{what} on {data}, divided among {whose} ({how}), with {model}"
        + (f", cut after {' or '.join(cut)}" if cut else "")
        + f": {length}, batch size {value('batch')}, {value('client_optimizer')} with rate {value('client_lr')}, "
        + (f"{len(seeds)} seeds." if len(seeds) > 1 else f"seed {seeds[0]}.")
    )


def _title(report: Report) -> str:
    data = "data of your own" if report.config.get("own_data") else str(report.config.get("data", "data"))
    if report.comparison:
        titles = [entry.title for entry in report.entries]
        return f"{listed(titles) if len(titles) <= 6 else f'{len(titles)} algorithms and variants'} on {data}"
    return f"{report.entries[0].title} on {data}"


def _known(kind: str, name: str) -> str:
    return name if name in plugins.index(kind) else f"“{name}”"


def _row(entry: ReportEntry, measure: Measure) -> dict[str, Any]:
    """The result table's line, ready to print; `measure` is the table's."""
    row = entry.row
    named = "" if entry.measure == measure else f"{entry.measure.label} "
    down, broadcast = row.bytes_down, row.bytes_down_broadcast
    return {
        "title": row.title,
        "note": entry.note,
        "seeds": len(row.seeds),
        "score": named + entry.measure.figure(*row.score),
        "best": entry.measure.figure(*row.best_score),
        "steps": f"{row.steps:,.0f}",
        "steps_per_second": _or_dash(row.steps_per_second, format_rate),
        "samples_per_second": _or_dash(row.samples_per_second, format_rate),
        "up": format_bytes(round(row.bytes_up)),
        "down": format_bytes(round(down)),
        "broadcast": _or_dash(broadcast, lambda n: format_bytes(round(n))),
        "total": format_bytes(round(row.bytes_up + down)),
        "total_broadcast": _or_dash(broadcast, lambda n: format_bytes(round(row.bytes_up + n))),
    }


_ROWS = {"global": "all test rows", "own": "its own test rows"}
_SHOWN_CLIENTS = 40  # a longer table shows the best and the worst


def _judged(report: Report) -> str:
    """The models and rows of the scores."""
    score, config = report.measure.title, report.entries[0].runs[0].config
    rows = "its own test rows" if config.get("evaluate_on") == "own" else "the whole test set"
    whose = {
        "average": f"The {score} of the clients' averaged model with the server's model on {rows}.",
        "ensemble": f"The {score} of the mean of the predictions of all clients' models on {rows}.",
    }.get(config.get("judge", "mean"))
    whose = whose or f"The {score} of each client's model with the server's model on {rows}, averaged over the clients."
    return f"{whose}{' Models of hostile clients are left out.' if config.get('attack') else ''}"


def _fairness(report: Report) -> list[dict[str, str]]:
    """How the clients of each entry differ at the end, of its first run."""
    lines = []
    for entry in report.entries:
        run = entry.runs[0]
        for where, scores in run.scores.items() if differs(run) else ():
            worst_first = sorted(scores.values(), key=run.measure.rank)
            tenth = worst_first[: max(1, round(len(worst_first) / 10))]
            lines.append(
                {
                    "title": entry.row.title,
                    "rows": _ROWS[where],
                    "clients": f"{len(scores):,}",
                    "mean": run.measure.figure(sum(scores.values()) / len(scores)),
                    "std": run.measure.figure(spread(scores.values())[1]) if len(scores) > 1 else "\N{EN DASH}",
                    "best": run.measure.figure(worst_first[-1]),
                    "tenth": run.measure.figure(sum(tenth) / len(tenth)),
                    "worst": run.measure.figure(worst_first[0]),
                }
            )
    return lines


def _clients(report: Report) -> dict[str, Any] | None:
    """The scores of the clients of a single run: all if they are few, else the best and the worst."""
    run = report.entries[0].runs[0]
    if report.comparison or not differs(run):
        return None
    first = next(iter(run.scores.values()))
    best_first = sorted(first, key=lambda k: run.measure.rank(first[k]), reverse=True)
    half = _SHOWN_CLIENTS // 2
    shown = sorted(first) if len(first) <= _SHOWN_CLIENTS else best_first[:half] + best_first[-half:]

    def figure(scores: dict[int, float], client: int) -> str:
        return run.measure.figure(scores[client]) if client in scores else "\N{EN DASH}"

    return {
        "heads": [_ROWS[where] for where in run.scores],
        "lines": [(run.called(k), [figure(scores, k) for scores in run.scores.values()]) for k in shown],
        "left_out": len(first) - len(shown),
    }


def _figures(report: Report) -> list[tuple[str, list[str]]]:
    """Every metric that is one number: its name, and its final value for each entry, as the mean over seeds."""
    names = dict.fromkeys(m for e in report.entries for r in e.runs for m in r.evaluations[-1].get("test") or {})
    lines = []
    for name in names:
        each = [[(r.evaluations[-1].get("test") or {}).get(name) for r in e.runs] for e in report.entries]
        if not any(isinstance(value, list) for values in each for value in values):
            lines.append((spoken(name), [_mean_figure(values) for values in each]))
    return lines


def _mean_figure(values: list[float | None]) -> str:
    mean = mean_of_known(values)
    return "not defined" if mean is None else f"{mean:.4g}"


def _per_class(report: Report) -> dict[str, Any] | None:
    """The metrics of a single run that have a number for each class, and its confusion matrix."""
    run = report.entries[0].runs[0]
    test = run.evaluations[-1].get("test") or {}
    several = {m: v for m, v in test.items() if isinstance(v, list) and v}
    if report.comparison or not several:
        return None
    vectors = {m: v for m, v in several.items() if not isinstance(v[0], list)}
    kinds = max(map(len, several.values()))
    names = run.class_names if len(run.class_names) == kinds else list(map(str, range(kinds)))
    return {
        "names": names,
        "heads": [spoken(m) for m in vectors],
        "lines": [(names[i], [_mean_figure([v[i]]) for v in vectors.values()]) for i in range(kinds)],
        "confusion": [
            (names[i], [f"{count:.4g}" for count in row]) for i, row in enumerate(test.get("confusion") or [])
        ],
    }


def _or_dash(value: float | None, form: Any) -> str:
    return "\N{EN DASH}" if value is None else str(form(value))


def _kinds(entry: ReportEntry) -> list[dict[str, str]]:
    """Bytes by direction and kind, mean over the runs that are done; kinds that were not sent in a run count as zero.
    Kinds that a run of an older version did not count are not known.
    """
    results = [run.result for run in entry.runs if run.result is not None]
    uncounted = {c for result in results for row in result["bytes"] for c in _CONVENTIONS if c not in row}
    sums: dict[tuple[str, str], dict[str, int]] = {}
    for result in results:
        for row in result["bytes"]:
            total = sums.setdefault((row["direction"], row["kind"]), dict.fromkeys(_CONVENTIONS, 0))
            for convention in _CONVENTIONS:
                total[convention] += row.get(convention, 0)
    # Up before down, training before evaluation.
    order = sorted(sums, key=lambda key: (key[1] == "evaluation", key[0] == "down", key[1]))

    def shown(sent: dict[str, int], convention: str) -> str:
        return spending.NOT_KNOWN if convention in uncounted else format_bytes(round(sent[convention] / len(results)))

    return [{"direction": d, "kind": k, **{c: shown(sums[d, k], c) for c in _CONVENTIONS}} for d, k in order]


def _descriptions(report: Report) -> list[str]:
    """Alternative texts: what the picture shows and where its lines end."""
    ends = "; ".join(
        f"{e.row.title} {e.measure.figure(*e.row.score)}{' %' * e.measure.share}" for e in report.entries[:12]
    )
    score = report.measure.title
    losses = "; ".join(f"{e.row.title} {e.runs[0].losses[-1]:.3g}" for e in report.entries[:12] if e.runs[0].losses)
    return [
        f"Line chart of {score} over epochs. At the end: {ends}.",
        f"Line chart of the training loss over epochs. In the last step (first seed): {losses}.",
        f"Line chart of {score} over the bytes sent up and down, on a logarithmic axis. At the end: {ends}.",
        f"Line chart of {score} over virtual time, on a logarithmic axis: {ends}.",
        f"Line chart of {score} over the clients' modelled energy, on a logarithmic axis. At the end: {ends}.",
    ]


def _config(report: Report) -> list[tuple[str, str, str]]:
    """Name, value and meaning of every option; those of variants under their full name."""
    fields = {**CompareConfig.model_fields, **RunConfig.model_fields}
    things = {o.name: o.help for e in plugins.flat() for o in e.options}
    things |= {name: text for e in report.entries for run in e.runs for name, text in run.meanings.items()}

    def meaning(name: str) -> str:
        text = fields[name].description if name in fields else things.get(name)
        return " ".join((text or "").replace("`", "").split())

    rows: list[tuple[str, str, str]] = []
    tuned = _tuned(report)
    for name, value in report.config.items():
        if name == "variant" and isinstance(value, dict):
            for variant, options in value.items():
                rows.extend((f"variant.{variant}.{key}", _shown(item), meaning(key)) for key, item in options.items())
        else:
            rows.append((name, "chosen by tuning" if name in tuned else _shown(value), meaning(name)))
    return rows


def _tuned(report: Report) -> set[str]:
    """The options whose values were chosen for every entry."""
    entries = [] if report.tuned is None or report.tuned.untuned else report.tuned.entries.values()
    return set.intersection(*(set(each.values) for each in entries)) if entries else set()


def _shown(value: Any) -> str:
    """A value of the configuration as text."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value)


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
