"""The paper's claims, and some beyond it, each with a verdict from our own numbers.

A claim is that one set of cells is better than another by more than a threshold. Differences are taken between runs of
the same seed (same split, partition and initial weights), averaged over the pairs of cells that the claim covers; the
verdict is read off the two-sided 95 % interval of Student's t over the seeds. The compared quantity is accuracy, or the
share of the inputs that an attacker explains.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from cutlayer.paired import half_width
from cutlayer.report.looks import title_of_algorithm
from cutlayer.reproduce.cells import (
    ALPHAS_WITH_PHI,
    LEAKING_DEFENCES,
    LEAKING_OTHERS,
    LEAKING_PHIS,
    PHASES,
    PHIS,
    SKEW,
    Cell,
)
from cutlayer.reproduce.contest import contest
from cutlayer.reproduce.outcomes import Outcome, Outcomes
from cutlayer.reproduce.table6 import Fact
from cutlayer.text import listed

Gap = Callable[[Outcome, Outcome], float | None]
"""The difference between two runs of one seed (first minus second), in points; None if it was not measured."""

Word = Literal["holds", "does not hold", "within noise", "not measured"]
WORDS: tuple[Word, ...] = ("holds", "does not hold", "within noise", "not measured")

COLLAPSE = 10.0  # points that alpha 2 must lose to have collapsed
FAILURE = 5.0  # points that phi 1 must lose to have failed
CLOSE = 1.5  # points below FL or CL that count as close
MANY = 10  # clients from which phi 1 is said to fail


def accuracy(more: Outcome, less: Outcome) -> float:
    """Test accuracy at the best validation accuracy."""
    return more.best - less.best


def explained(more: Outcome, less: Outcome) -> float | None:
    """The share of the inputs' variance that the attacker explains, at the end of both runs."""
    a, b = more.explained, less.explained
    return None if a is None or b is None else a - b


def explained_at_equal_accuracy(more: Outcome, less: Outcome) -> float | None:
    """The same at the time when each of the two first reached the test accuracy that both reach."""
    if more.reached is None or less.reached is None:
        return None
    both = min(more.reached, less.reached)
    a, b = more.explained_at(both), less.explained_at(both)
    return None if a is None or b is None else a - b


@dataclass(frozen=True)
class CellPair:
    """Two cells that a claim compares: `more` is claimed to have more of the compared quantity.

    `row` and `column` are its labels in the breakdown. If there are several row labels, each also gets its own row.
    """

    more: Cell
    less: Cell
    row: tuple[str, ...] = ()
    column: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim: that `more` has more than `less` by more than `threshold` points, on average over the pairs in the
    `covered` columns (all if there are none); the other columns are only shown. `loss`: the difference is the loss of
    the claim's cells. `gap` is the compared quantity.
    """

    name: str
    title: str
    sentence: str
    pairs: tuple[CellPair, ...]
    threshold: float = 0.0
    covered: frozenset[str] = frozenset()
    loss: bool = False
    gap: Gap = accuracy


@dataclass(frozen=True)
class Difference:
    """A mean difference in points with its 95 % interval over `seeds`, averaged over `cells` pairs, and the verdict. In
    `at_chance` of the pairs a cell has collapsed to chance level for some seed: such pairs outweigh all others.
    """

    verdict: Word
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    cells: int = 0
    at_chance: int = 0


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim with its verdict, and the same for every row and column of its breakdown (None: no such pair)."""

    claim: Claim
    overall: Difference
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, tuple[Difference | None, ...]], ...] = field(default=())


def judge(outcomes: Outcomes) -> list[ClaimVerdict]:
    """Every claim with its verdict."""
    return [_judged(outcomes, claim) for claim in claims(outcomes)]


def interval(differences: Sequence[float], threshold: float) -> Difference:
    """Mean and 95 % t interval of one difference per seed, and the verdict against `threshold`."""
    n = len(differences)
    mean = statistics.fmean(differences) if differences else None
    if mean is None or n < 2:
        return Difference("not measured", mean, seeds=n)
    half = half_width(differences)
    low, high = mean - half, mean + half
    word: Word = "holds" if low > threshold else "does not hold" if high < threshold else "within noise"
    return Difference(word, mean, low, high, n)


def claims(outcomes: Outcomes) -> list[Claim]:
    """The claims about the cells of the parts in `outcomes`. Table 4's are those at the chosen
    rates.
    """
    makers: dict[str, Callable[[Outcomes], list[Claim]]] = {
        "table1": _split_lr,
        "table2": _split_avg,
        "table3": _phases,
        "table4": _methods,
        "skew": _skew,
        "table5": _phi,
        "leakage": _leaking,
    }
    asked = [p for p in makers if all(cell.name in outcomes.cells for cell in getattr(outcomes.study, p)())]
    return [claim for part in asked for claim in makers[part](outcomes)]


def summary(
    verdicts: Sequence[ClaimVerdict], counted: Sequence[Fact] = (), *, another_model: bool = False
) -> list[str]:
    """The results in five lines: the verdicts, and the claims that counting settles."""
    model = " with another model" * another_model
    meaning = {
        "holds": f"Holds{model}",
        "does not hold": f"Does not hold{model}",
        "within noise": f"Within noise{model}, so neither shown nor refuted",
        "not measured": "Not measured",
    }
    lines = []
    for word in WORDS:
        titles = [_counted(v) for v in verdicts if v.overall.verdict == word]
        titles += [f.title for f in counted if f.word == word]
        total = len(verdicts) + sum(f.word in WORDS for f in counted)
        lines.append(f"{meaning[word]} ({len(titles)} of {total}): {'; '.join(titles) or 'none'}.")
    sized = [v for v in verdicts if v.overall.verdict in ("holds", "does not hold") and v.overall.mean is not None]
    sized.sort(key=lambda v: -abs(v.overall.mean or 0.0))
    effects = "; ".join(_counted(v) for v in sized[:3])
    lines.append(f"Largest differences beyond noise, in points: {effects or 'none'}.")
    return lines


def points(difference: Difference | None) -> str:
    """A difference as text: +0.84 [+0.31, +1.37]."""
    if difference is None or difference.mean is None:
        return "\N{EN DASH}"
    text = f"{_signed(difference.mean)}"
    if difference.low is not None and difference.high is not None:
        text += f" [{_signed(difference.low)}, {_signed(difference.high)}]"
    return text


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _counted(verdict: ClaimVerdict) -> str:
    """A claim's title with its difference, if it is known."""
    mean = verdict.overall.mean if verdict.overall.verdict != "not measured" else None
    return verdict.claim.title + ("" if mean is None else f" ({'loss ' * verdict.claim.loss}{_signed(mean)})")


# ---- the test --------------------------------------------------------------------------------------------------------


def _judged(outcomes: Outcomes, claim: Claim) -> ClaimVerdict:
    def measured(pairs: Iterable[CellPair]) -> Difference | None:
        chosen = list(pairs)
        return _difference(outcomes, chosen, claim) if chosen else None

    order = {f"C = {c}": c for c in outcomes.study.size.clients}
    columns = sorted(dict.fromkeys(p.column for p in claim.pairs), key=lambda column: order.get(column, 0))
    covered = [p for p in claim.pairs if not claim.covered or p.column in claim.covered]
    overall = measured(covered) or Difference("not measured")
    if len(claim.pairs) < 2:
        return ClaimVerdict(claim, overall)
    # Rows of one label each (over all others), then every combination, then all together.
    places = range(max(len(p.row) for p in claim.pairs))
    groups: list[tuple[str, ...]] = list(dict.fromkeys((p.row[i],) for i in places for p in claim.pairs))
    groups += list(dict.fromkeys(p.row for p in claim.pairs if len(p.row) > 1))
    if len(groups) != 1:
        groups.append(())
    rows = []
    for labels in groups:
        own = [p for p in claim.pairs if set(labels) <= set(p.row)]
        cells = [measured(p for p in own if p.column == column) for column in columns]
        if len(columns) > 1:
            cells.append(measured(p for p in own if p in covered))
        rows.append((", ".join(labels) or ("all" if len(groups) > 1 else "difference"), tuple(cells)))
    last = (f"all {listed(sorted(claim.covered, key=columns.index))}" if claim.covered else "all",)
    return ClaimVerdict(claim, overall, (*columns, *(last if len(columns) > 1 else ())), tuple(rows))


def _difference(outcomes: Outcomes, pairs: list[CellPair], claim: Claim) -> Difference:
    """Over the seeds that all cells of all pairs have."""
    sides = [(outcomes.of(p.more), outcomes.of(p.less)) for p in pairs]
    seeds = frozenset.intersection(*(frozenset(more) & frozenset(less) for more, less in sides))
    per_seed = []
    for s in sorted(seeds):
        gaps = [claim.gap(more[s], less[s]) for more, less in sides]
        known = [gap for gap in gaps if gap is not None]
        if len(known) == len(gaps):
            per_seed.append(statistics.fmean(known))
    d = interval(per_seed, claim.threshold)
    collapsed = sum(any(o.best < o.chance + 1 for o in [*more.values(), *less.values()]) for more, less in sides)
    return Difference(d.verdict, d.mean, d.low, d.high, d.seeds, len(pairs), collapsed)


# ---- what is claimed -------------------------------------------------------------------------------------------------


def _several(outcomes: Outcomes) -> list[int]:
    return [c for c in outcomes.study.size.clients if c > 1]


def _shared(outcomes: Outcomes, phi: float) -> list[int]:
    """Numbers of clients of which at least two share the common gradient: phi x C, rounded half up. With one, SplitAvg
    gives that client its own gradient: nothing changes, so nothing can be measured.
    """
    return [c for c in _several(outcomes) if _is_shared(phi, c)]


def _is_shared(phi: float, clients: int) -> bool:
    return math.floor(phi * clients + 0.5) > 1


_WHERE_SHARED = "on average over all C with at least two active clients"


def _split_lr(outcomes: Outcomes) -> list[Claim]:
    """Paper, Table 1."""
    grid, several = outcomes.study.grid, _several(outcomes)
    helps = tuple(
        CellPair(grid(c, alpha, 0), grid(c, 0, 0), (f"alpha {alpha:g}",), f"C = {c}")
        for alpha in (0.5, 1.0, 1.5)
        for c in several
    )
    collapses = tuple(CellPair(grid(c, 0, 0), grid(c, 2, 0), ("loss of alpha 2",), f"C = {c}") for c in several)
    most = f"C = {max(several)}"
    return [
        Claim(
            "splitlr",
            "SplitLr helps",
            "SplitLr (alpha 0.5, 1 and 1.5) is better than no SplitLr, on average over C > 1.",
            helps,
        ),
        Claim(
            "collapse",
            f"alpha 2 collapses at {most}",
            f"With {max(several)} clients, alpha 2 loses more than {COLLAPSE:g} points compared with no SplitLr.",
            collapses,
            COLLAPSE,
            frozenset({most}),
            loss=True,
        ),
    ]


def _split_avg(outcomes: Outcomes) -> list[Claim]:
    """Paper, Table 2: against phi 0 at the same alpha."""
    grid = outcomes.study.grid
    pairs = tuple(
        CellPair(grid(c, alpha, phi), grid(c, alpha, 0), (f"phi {phi:g}", f"alpha {alpha:g}"), f"C = {c}")
        for phi in PHIS[1:]
        for alpha in ALPHAS_WITH_PHI
        for c in _shared(outcomes, phi)
    )
    sentence = f"SplitAvg (phi 0.25, 0.5 and 0.75) is better than no SplitAvg at the same alpha, {_WHERE_SHARED}."
    return [Claim("splitavg", "SplitAvg helps", sentence, pairs), *_both(outcomes)]


def _phases(outcomes: Outcomes) -> list[Claim]:
    """Paper, Table 3, at alpha 1."""
    grid, several = outcomes.study.grid, _several(outcomes)
    many = [c for c in several if c >= MANY] or [max(several)]
    covered = frozenset(f"C = {c}" for c in many)
    where = f"with {listed([str(c) for c in many])} clients"
    fails = tuple(CellPair(grid(c, 1, 0), grid(c, 1, 1, "full"), ("loss of full",), f"C = {c}") for c in several)
    phased = tuple(
        CellPair(grid(c, 1, 1, phase), grid(c, 1, 1, "full"), (phase,), f"C = {c}")
        for phase in PHASES
        if phase != "full"
        for c in several
    )
    return [
        Claim(
            "full",
            "phi 1 without phases fails",
            f"SplitAvg with all clients all the time (phi 1) loses more than {FAILURE:g} points compared with no "
            f"SplitAvg, {where}.",
            fails,
            FAILURE,
            covered,
            loss=True,
        ),
        Claim(
            "phases",
            "phases repair phi 1",
            f"SplitAvg with all clients in one phase only is better than all the time, {where}.",
            phased,
            0.0,
            covered,
        ),
    ]


def _both(outcomes: Outcomes) -> list[Claim]:
    """Paper, Table 2: SGLR against each of its halves."""
    grid = outcomes.study.grid
    settings = [(a, phi, c) for a in ALPHAS_WITH_PHI[1:] for phi in PHIS[1:] for c in _shared(outcomes, phi)]

    def against(alpha: bool) -> tuple[CellPair, ...]:
        return tuple(
            CellPair(
                grid(c, a, phi),
                grid(c, a, 0) if alpha else grid(c, 0, phi),
                (f"alpha {a:g}", f"phi {phi:g}"),
                f"C = {c}",
            )
            for a, phi, c in settings
        )

    mean = f"at alpha 0.5 and 1, phi 0.25, 0.5 and 0.75, {_WHERE_SHARED}"
    return [
        Claim("both-slr", "SGLR beats SplitLr alone", f"SGLR is better than SplitLr alone, {mean}.", against(True)),
        Claim("both-sgl", "SGLR beats SplitAvg alone", f"SGLR is better than SplitAvg alone, {mean}.", against(False)),
    ]


def _methods(outcomes: Outcomes) -> list[Claim]:
    """Paper, Table 4: each method at the rate chosen for it."""

    def pair(more: str, less: str) -> tuple[CellPair, ...]:
        a, b = outcomes.chosen(more), outcomes.chosen(less)
        return () if a is None or b is None else (CellPair(a, b),)

    c, tuned = outcomes.study.size.methods_clients, "each at its own best rate"
    return [
        Claim("sglr-sfl", "SGLR beats SFL", f"SGLR is better than SFL with {c} clients, {tuned}.", pair("sglr", "sfl")),
        Claim("sfl-psl", "SFL beats PSL", f"SFL is better than PSL with {c} clients, {tuned}.", pair("sfl", "psl")),
        *(
            Claim(
                f"sglr-{other}",
                f"SGLR comes within {CLOSE:g} points of {other.upper()}",
                f"SGLR is less than {CLOSE:g} points behind {other.upper()} with {c} clients, {tuned}.",
                pair("sglr", other),
                -CLOSE,
            )
            for other in ("fl", "cl")
        ),
    ]


def _skew(outcomes: Outcomes) -> list[Claim]:
    """Beyond the paper: the contest."""
    study = outcomes.study
    there = study.contest()
    return [
        Claim(
            f"{SKEW}-{c.name}",
            c.title,
            c.sentence,
            tuple(
                CellPair(study.contestant(s, c.more), study.contestant(s, c.less), (), s)
                for s in c.settings
                if {c.more, c.less} <= set(there.get(s, ()))
            ),
            c.threshold,
        )
        for c in contest(SKEW).claims
    ]


_TWICE: tuple[tuple[str, str, Gap], ...] = (
    ("", "", explained),
    ("-equal", ", at equal accuracy", explained_at_equal_accuracy),
)


def _phi(outcomes: Outcomes) -> list[Claim]:
    """Paper, Table 5, and the same at equal accuracy."""
    study = outcomes.study
    shared = [phi for phi in LEAKING_PHIS if _is_shared(phi, study.size.methods_clients)]
    pairs = tuple(CellPair(study.by_phi(0), study.by_phi(phi), (f"phi {phi:g}",)) for phi in shared)
    return [
        Claim(
            f"phi{name}",
            f"SplitAvg makes reconstruction harder{when}",
            f"An attacker explains less of the inputs of SGLR (phi {listed([f'{phi:g}' for phi in shared])}) than of "
            f"SLR (phi 0){when}, on average over phi.",
            pairs,
            gap=gap,
        )
        for name, when, gap in _TWICE
    ]


def _leaking(outcomes: Outcomes) -> list[Claim]:
    """Methods, depths of the cut and defences (beyond the paper)."""
    study = outcomes.study
    cuts = study.cuts
    methods = [
        Claim(
            f"leaks-{other}{name}",
            f"SGLR leaks less than {title_of_algorithm(other)}{when}",
            f"An attacker explains less of the inputs of SGLR than of those of {title_of_algorithm(other)}{when}.",
            (CellPair(study.attacked(other), study.attacked("sglr")),),
            gap=gap,
        )
        for other in LEAKING_OTHERS
        for name, when, gap in _TWICE
    ]
    steps = tuple(CellPair(study.at_depth(a), study.at_depth(b), (f"{a} to {b}",)) for a, b in pairwise(cuts))
    deeper = Claim(
        "leaks-depth",
        "a deeper cut leaks less",
        "An attacker explains less of the inputs the deeper the cut of PSL, on average over one step down.",
        steps,
        gap=explained,
    )
    defences = [
        Claim(
            f"leaks-{kind.lower().replace(' ', '-')}",
            f"{kind} makes reconstruction harder",
            f"An attacker explains less of the inputs of PSL with {kind} than without, on average over strengths.",
            tuple(CellPair(study.attacked("psl"), study.defended(kind, s), (s,)) for s in strengths),
            gap=explained,
        )
        for kind, strengths in LEAKING_DEFENCES.items()
    ]
    return [*methods, deeper, *defences]
