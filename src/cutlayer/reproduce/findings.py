"""All that a reproduction has to say, in the form that pages, plots and terminal show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cutlayer.reproduce.cells import SKEW
from cutlayer.reproduce.claims import ClaimVerdict, judge, summary
from cutlayer.reproduce.contest import contest
from cutlayer.reproduce.outcomes import Outcomes
from cutlayer.reproduce.table6 import Fact, facts
from cutlayer.reproduce.tables import BEYOND, SECTIONS, Table


@dataclass(frozen=True)
class Findings:
    """Tables, verdicts, what counting settles, and five lines about all of it, from the outcomes of the `parts` asked
    for (see `SECTIONS`).
    """

    outcomes: Outcomes
    parts: tuple[str, ...]
    tables: list[Table]
    verdicts: list[ClaimVerdict]
    facts: list[Fact]
    lines: list[str]

    @property
    def done(self) -> tuple[int, int]:
        """How many runs are done, of how many."""
        cells = self.outcomes.cells.values()
        return sum(len(self.outcomes.of(c)) for c in cells), sum(len(c.seeds) for c in cells)

    @property
    def alone(self) -> bool:
        """Nothing of the paper was asked for."""
        return set(self.parts) <= BEYOND

    @property
    def title(self) -> str:
        """What pages are called."""
        return contest(SKEW).about if self.alone else "Reproduction of SGLR's tables"

    def table(self, name: str) -> Table | None:
        """The table of that name, where it was asked for."""
        return next((t for t in self.tables if t.name == name), None)


def find(outcomes: Outcomes, parts: Sequence[str]) -> Findings:
    """Everything that follows from the outcomes."""
    verdicts = judge(outcomes)
    tables = [table for name in parts for table in SECTIONS[name].tables(outcomes)]
    counted = [] if set(parts) <= BEYOND else facts(outcomes.study)
    return Findings(
        outcomes,
        tuple(parts),
        tables,
        verdicts,
        counted,
        summary(verdicts, counted, another_model=outcomes.study.another_model),
    )
