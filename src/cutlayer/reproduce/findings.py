"""All results of a reproduction, in the form that pages, plots and terminal show."""

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
    """Tables, verdicts, claims that counting settles, and a summary of five lines, from the outcomes of the requested
    `parts` (see `SECTIONS`).
    """

    outcomes: Outcomes
    parts: tuple[str, ...]
    tables: list[Table]
    verdicts: list[ClaimVerdict]
    facts: list[Fact]
    lines: list[str]

    @property
    def done(self) -> tuple[int, int]:
        """The numbers of finished runs and of all runs."""
        cells = self.outcomes.cells.values()
        return sum(len(self.outcomes.of(c)) for c in cells), sum(len(c.seeds) for c in cells)

    @property
    def alone(self) -> bool:
        """Whether no part of the paper was requested."""
        return set(self.parts) <= BEYOND

    @property
    def title(self) -> str:
        """The title of the pages."""
        return contest(SKEW).about if self.alone else "Reproduction of SGLR's tables"

    def table(self, name: str) -> Table | None:
        """The table of that name, if it was requested."""
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
