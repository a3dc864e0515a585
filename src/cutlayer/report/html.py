"""The page: everything a reader needs in one HTML file that loads nothing."""

from __future__ import annotations

import base64
import json
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from cutlayer import plugins
from cutlayer.options import CompareConfig, RunConfig
from cutlayer.report import spending
from cutlayer.report.collect import Measure, Report, ReportEntry
from cutlayer.report.curves import has_classes, loss_window, shown_partition
from cutlayer.text import format_bytes, format_rate, listed

_OWN = ("model", "data", "loss", "metrics")
_CONVENTIONS = ("wire-unicast", "wire-broadcast", "paper")


def render(report: Report, panels: list[bytes], classes: bytes) -> str:
    """The page with the three panels of curves and the picture of the classes in it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("cutlayer.report").joinpath("report.html.j2").read_text("utf-8"))
    partition = shown_partition(report)
    return template.render(
        title=_title(report),
        sentence=sentence(report),
        unfinished=report.unfinished,
        comparison=report.comparison,
        rows=[_row(entry, report.measure) for entry in report.entries],
        one_seed=all(len(entry.row.seeds) == 1 for entry in report.entries),
        costs=[spending.line(entry) for entry in report.entries if entry.facts],
        clocked=spending.clocked(report),
        reached=spending.reached(report),
        kinds=[(entry.row.title, rows) for entry in report.entries if (rows := _kinds(entry))],
        pictures=list(zip(map(_embedded, panels), _descriptions(report), strict=False)),
        classes=_embedded(classes),
        classes_text=f"{len(partition.counts)} clients, "
        + (f"{len(partition.class_names)} classes, " if has_classes(partition) else "")
        + f"{sum(map(sum, partition.counts)):,} training samples",
        classed=has_classes(partition),
        measure=report.measure,
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
    """What was trained on what and how, in one sentence, from the configuration."""
    c = report.config
    runs = [run.config for entry in report.entries for run in entry.runs]

    def value(name: str, default: str = "?") -> str:
        """The option's value; where variants differ in it, all of its values."""
        values = dict.fromkeys(_shown(run[name]) for run in [c, *runs] if run.get(name) is not None)
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
        f"{what} on {data}, dealt to {whose} ({how}), with {model}"
        + (f", cut after {' or '.join(cut)}" if cut else "")
        + f": {length}, batch {value('batch')}, {value('client_optimizer')} at rate {value('client_lr')}, "
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
        "note": row.note,
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


def _or_dash(value: float | None, form: Any) -> str:
    return "\N{EN DASH}" if value is None else str(form(value))


def _kinds(entry: ReportEntry) -> list[dict[str, str]]:
    """Bytes by direction and kind, mean over the runs that are done; what was not sent in a run counts as zero. What a
    run of an older version did not count is not known.
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
    for name, value in report.config.items():
        if name == "variant" and isinstance(value, dict):
            for variant, options in value.items():
                rows.extend((f"variant.{variant}.{key}", _shown(item), meaning(key)) for key, item in options.items())
        else:
            rows.append((name, _shown(value), meaning(name)))
    return rows


def _shown(value: Any) -> str:
    """A value of the configuration as text."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value)


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
