"""The terminal output of a reproduction: tables and verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from cutlayer.reproduce.cells import Study
from cutlayer.reproduce.claims import ClaimVerdict, points
from cutlayer.reproduce.findings import Findings
from cutlayer.reproduce.page import setting
from cutlayer.reproduce.table6 import Fact
from cutlayer.reproduce.tables import Table, paper_of, shown

_WIDTH = 160  # without a terminal, so that no numbers are cut off
_STYLES = {"holds": "green", "does not hold": "red", "within noise": "yellow", "not measured": "dim"}


def show(findings: Findings, size: str, console: Console) -> None:
    """Print the tables, the verdicts and the five lines."""
    wide = console if console.is_terminal else Console(width=_WIDTH)
    done, planned = findings.done
    wide.print(f"\n{setting(findings, size)}" + (f" {done} of {planned} runs are done." if done < planned else ""))
    for table in findings.tables:
        wide.print(_grid(table))
    wide.print(_claims(findings.verdicts, findings.outcomes.study))
    if findings.facts:
        wide.print(_facts(findings.facts, findings.outcomes.study))
    for line in findings.lines:
        wide.print(f"- {line}", highlight=False)


def _grid(table: Table) -> Grid:
    """Ours, and below it the paper's."""
    grid = Grid(title=table.title)
    grid.add_column(table.head)
    for column in table.columns:
        grid.add_column(column, justify="right")
    with_paper = any(paper_of(v) for _, values in table.rows for v in values)
    for label, values in table.rows:
        theirs = [f"paper {paper_of(v)}" if paper_of(v) else "" for v in values] if with_paper else [""] * len(values)
        cells = [
            Text(shown(v)) + Text(f"\n{p}" if with_paper else "", "dim") for v, p in zip(values, theirs, strict=True)
        ]
        grid.add_row(Text(label), *cells)
    return grid


def _word(word: str, study: Study) -> Text:
    """A verdict. One about another model has no colour: it is neither good nor bad for the paper."""
    return Text(study.verdict(word), "" if study.another_model else _STYLES.get(word, "dim"))


def _facts(facts: Sequence[Fact], study: Study) -> Grid:
    grid = Grid(title="Claims that are counted, not trained")
    for name in ("claim", "verdict", "counted"):
        grid.add_column(name, no_wrap=name == "verdict")
    for f in facts:
        grid.add_row(Text(f.title), _word(f.word, study), Text(f.evidence))
    return grid


def _claims(verdicts: Sequence[ClaimVerdict], study: Study) -> Grid:
    grid = Grid(title="The claims: differences in points with their 95 % intervals")
    for name in ("claim", "verdict", "difference", "seeds", "pairs"):
        grid.add_column(name, justify="left" if name in ("claim", "verdict") else "right", no_wrap=name == "verdict")
    for v in verdicts:
        d = v.overall
        grid.add_row(
            Text(v.claim.title),
            _word(d.verdict, study),
            "loss " * (v.claim.loss and d.mean is not None) + points(d),
            str(d.seeds),
            str(d.cells),
        )
    return grid
