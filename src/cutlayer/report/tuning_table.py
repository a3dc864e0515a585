"""The tuning of a comparison: its table, and one row per trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cutlayer.sweep import shown_value
from cutlayer.text import format_figure, spoken
from cutlayer.tuned import Trial, Tuned

HEADS = ("method", "trials", "epochs trained", "rows trained", "chosen values", "validation score")


def lines(tuned: Tuned, titles: Mapping[str, str]) -> list[tuple[str, ...]]:
    """A line for each entry, with its title: the cost of its tuning, and the chosen values."""
    found: list[tuple[str, ...]] = [
        (
            titles.get(entry, entry),
            str(len(each.trials)),
            f"{each.epochs:,.4g}",
            f"{each.samples:,}",
            values_of_trial(each.values) + ("; at the edge: " + ", ".join(each.edges) if each.edges else ""),
            _score(tuned, next(trial for trial in each.trials if trial.number == each.chosen)),
        )
        for entry, each in tuned.entries.items()
    ]
    return found + [(titles.get(entry, entry), "0", "0", "0", "not tuned", "") for entry in tuned.untuned]


def sentence(tuned: Tuned) -> str:
    """The description of the table, in one or two sentences."""
    when = "after the last round" if tuned.by == "last" else "at the best evaluation"
    shared = (
        f" The data bring no test rows: those that seed {tuned.test_seed} draws are the test of all seeds (test_seed)."
        if tuned.test_seed is not None
        else ""
    )
    apart = f"{tuned.overlap}." if tuned.overlap else "No trial was trained or judged on test rows."
    return (
        f"{tuned.trials} trial{'s' * (tuned.trials > 1)} of each method ({tuned.how}), on seed {tuned.seed}, which is "
        f"not reported, by the {spoken(tuned.metric)} on the validation rows {when}. {apart}{shared}"
    )


def rows(tuned: Tuned) -> Iterator[dict[str, Any]]:
    """One row for each trial, for a CSV file."""
    for entry, each in tuned.entries.items():
        for trial in each.trials:
            yield {
                "entry": entry,
                "trial": trial.number + 1,
                "chosen": trial.number == each.chosen,
                "validation_score": trial.score,
                "metric": tuned.metric,
                "diverged": trial.diverged,
                "rounds": trial.rounds,
                "epochs": trial.epochs,
                "samples": trial.samples,
                **trial.values,
            }


def values_of_trial(values: dict[str, Any]) -> str:
    """The values of a trial as text."""
    return ", ".join(f"{name} {shown_value(value)}" for name, value in values.items())


def _score(tuned: Tuned, trial: Trial) -> str:
    return format_figure(trial.score, share=tuned.share) + " %" * (tuned.share and trial.score is not None)
