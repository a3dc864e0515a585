"""The records as tidy CSV files for other tools: one row per observation, one column per variable."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cutlayer.files import read_records
from cutlayer.folder import CLIENTS, EVALUATIONS, STEPS
from cutlayer.observations import Observations, flat
from cutlayer.report import tuning_table
from cutlayer.report.collect import Report, ReportEntry, StoredRun

Row = dict[str, Any]


def tables(report: Report) -> dict[str, bytes]:
    """File name -> content: the result table, and all steps, evaluations and scores of clients, of every entry and
    seed; of a comparison that was tuned, its trials. Lists (classes, confusion matrices) stay in the run's JSON lines.
    """
    return {f"{name}.csv": as_csv(rows) for name, rows in observed(report).items()}


def gathered(reports: Mapping[str, Report]) -> dict[str, Observations[Row]]:
    """The tables of several studies, by their names; the name of the study is the first column."""
    found = [(study, observed(report)) for study, report in reports.items()]
    names = dict.fromkeys(name for _, tables in found for name in tables)
    rows = {name: [{"study": s, **row} for s, tables in found for row in tables.get(name, ())] for name in names}
    return {name: Observations(those, dict) for name, those in rows.items()}


def observed(report: Report) -> dict[str, Observations[Row]]:
    """The tables by their names: table, steps, evaluations and clients; of a comparison that was tuned, also trials."""
    runs = [(entry, run, folder_of(report, entry, run)) for entry in report.entries for run in entry.runs]
    found = {
        "table": Observations(map(_result, report.entries), dict),
        "steps": Observations(_records(runs, STEPS), dict),
        "evaluations": Observations(_records(runs, EVALUATIONS), dict),
        "clients": Observations(_clients(runs), dict),
    }
    if report.tuned is not None:
        found["trials"] = Observations(tuning_table.rows(report.tuned), dict)
    return found


def folder_of(report: Report, entry: ReportEntry, run: StoredRun) -> Path:
    """Where a run is stored."""
    return report.folder / entry.name / f"seed-{run.seed}" if report.comparison else report.folder


def _result(entry: ReportEntry) -> Row:
    row = entry.row
    return {
        "entry": entry.name,
        "algorithm": entry.algorithm,
        "seeds": len(row.seeds),
        "metric": entry.measure.name,
        "score": row.score[0],
        "score_std": row.score[1],
        "best_score": row.best_score[0],
        "best_score_std": row.best_score[1],
        "steps": row.steps,
        "samples_per_second": row.samples_per_second,
        "bytes_up": row.bytes_up,
        "bytes_down": row.bytes_down,
        "bytes_down_broadcast": row.bytes_down_broadcast,
    }


def _records(runs: Iterable[tuple[ReportEntry, StoredRun, Path]], name: str) -> Iterator[Row]:
    for entry, run, folder in runs:
        for record in read_records(folder / name):
            yield {"entry": entry.name, "seed": run.seed, **flat(record)}


def _clients(runs: Iterable[tuple[ReportEntry, StoredRun, Path]]) -> Iterator[Row]:
    for entry, run, folder in runs:
        for record in read_records(folder / CLIENTS):
            when = {"round": record["round"], "step": record["step"], "rows": record["on"]}
            for client, scores in record["clients"].items():
                yield {
                    "entry": entry.name,
                    "seed": run.seed,
                    **when,
                    "client": run.called(int(client)),
                    **flat(scores),
                }


def as_csv(rows: Observations[Row]) -> bytes:
    """The rows as UTF-8, with every column that one of them has."""
    found = rows.rows
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(found[0]) if found else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return file.getvalue().encode()
