"""Every entry against one of them, the baseline, seed by seed."""

from __future__ import annotations

from dataclasses import dataclass

from cutlayer.errors import RunFolderError, unknown
from cutlayer.paired import Paired, holm, paired, seeds_needed
from cutlayer.report.collect import Report, ReportEntry
from cutlayer.summary import Correction


@dataclass(frozen=True)
class Gap:
    """One entry minus the baseline, over the seeds that both have finished: final scores, in points if they are shares.
    `p` is corrected, if requested; `needed` is the number of seeds that would find the given difference.
    """

    entry: str
    title: str
    found: Paired
    p: float | None
    needed: int | None = None


@dataclass(frozen=True)
class Differences:
    """All gaps, with their `unit`."""

    baseline: str
    title: str
    unit: str
    correction: Correction
    gaps: list[Gap]
    wanted: float | None = None


def differences(
    report: Report, baseline: str | None = None, *, correction: Correction = "none", wanted: float | None = None
) -> Differences | None:
    """The comparison's entries against `baseline`, by default the first one; None if no two entries have two seeds in
    common. Raises RunFolderError for an unknown baseline.
    """
    names = [entry.name for entry in report.entries]
    if baseline is not None and baseline not in names:
        raise RunFolderError(unknown("baseline", baseline, names))
    first = next((e for e in report.entries if e.name == (baseline or names[0])), report.entries[0])
    others = [e for e in report.entries if e is not first and e.measure == first.measure]
    found = [(entry, paired(_pairs(entry, first))) for entry in others]
    if not any(each.pairs >= 2 for _, each in found):
        return None
    values = [each.p for _, each in found]
    corrected = holm(values) if correction == "holm" else values
    gaps = [
        Gap(entry.name, entry.row.title, each, p, _needed(each, wanted))
        for (entry, each), p in zip(found, corrected, strict=True)
    ]
    unit = "points" if first.measure.share else first.measure.title
    return Differences(first.name, first.row.title, unit, correction, gaps, wanted)


def _pairs(entry: ReportEntry, first: ReportEntry) -> list[float]:
    """Differences of the test scores at the end, of the seeds that both have."""
    scale = 100 if first.measure.share else 1
    ours, theirs = ({r.seed: r.result["test_score"] for r in e.runs if r.result} for e in (entry, first))
    common = [seed for seed in ours if theirs.get(seed) is not None and ours[seed] is not None]
    return [scale * (ours[seed] - theirs[seed]) for seed in common]


def _needed(found: Paired, wanted: float | None) -> int | None:
    return None if wanted is None or found.std is None else seeds_needed(found.std, wanted)


def as_text(found: Differences) -> list[tuple[str, str, str, str, str, str]]:
    """A row for each gap: title, mean, interval, p, pairs, seeds needed."""
    return [
        (
            gap.title,
            _signed(gap.found.mean),
            "" if gap.found.low is None else f"{_signed(gap.found.low)} to {_signed(gap.found.high)}",
            "" if gap.p is None else ("< 0.001" if gap.p < 0.001 else f"{gap.p:.3f}"),
            str(gap.found.pairs),
            "" if found.wanted is None or gap.found.std is None else str(gap.needed or "over 10000"),
        )
        for gap in found.gaps
    ]


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
