"""The report's files: JSON with everything, Markdown with the tables, one self-contained page, the plots."""

from __future__ import annotations

import base64
import json
import shlex
from dataclasses import asdict
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from cutlayer import __version__
from cutlayer.reproduce.cells import SKEW, Study
from cutlayer.reproduce.claims import ClaimVerdict, Difference, points
from cutlayer.reproduce.findings import Findings
from cutlayer.reproduce.plots import PLOTS, draw
from cutlayer.reproduce.tables import Table, paper, paper_of, shown
from cutlayer.text import flag_words, listed

JSON, MARKDOWN, PAGE = "reproduction.json", "reproduction.md", "reproduction.html"
MARKS: dict[str, str] = {
    "holds": "✓",
    "does not hold": "✗",
    "within noise": "~",
    "not measured": "",
    "by construction": "",
    "counted": "",
}


def files(findings: Findings, size: str) -> dict[str, bytes]:
    """Name -> content of every file of the report."""
    pictures = draw(findings)
    content = _content(findings, size)
    return {
        JSON: (json.dumps(_data(findings, size), indent=1) + "\n").encode(),
        MARKDOWN: _rendered("page.md.j2", False, **content, pictures=_named(pictures), folder="").encode(),
        PAGE: _rendered("page.html.j2", True, **content, style=_style(), pictures=_embedded(pictures)).encode(),
        **{f"{name}.png": png for name, png in pictures.items()},
    }


def setting(findings: Findings, size: str) -> str:
    """The training, in a sentence."""
    study = findings.outcomes.study
    s = study.size
    first, fourth = study.model_names
    models = first if first == fourth or findings.alone else f"{first} ({fourth} in Table 4)"
    if study.another_model and not findings.alone:
        models = f"another model than the paper's ({first}, cut after {study.cut})"
    configs = [cell.config for cell in findings.outcomes.cells.values()]
    epochs = dict.fromkeys(c.epochs for c in configs) or [s.epochs]
    samples = dict.fromkeys(str(c.samples_per_client) for c in configs) or [str(s.samples_per_client)]
    seeds = study.extent.seeds if findings.alone else s.seeds
    many = "s" * (len(seeds) > 1)
    return (
        f"Size {size}: {models} on {study.data}, {listed(list(samples))} samples per client, {s.validation} held out "
        f"for validation, {listed([str(n) for n in epochs])} epochs, seed{many} {listed([str(n) for n in seeds])}."
    )


def reading(findings: Findings, size: str) -> list[str]:
    """The origin of the numbers: paragraphs for all tables."""
    s = findings.outcomes.study.size
    models = "all clients" if s.eval_clients is None else f"{s.eval_clients} clients"
    chance = sorted(
        {o.best for c in findings.outcomes.cells.values() for o in findings.outcomes.of(c).values() if o.diverged}
    )
    count = f" ({chance[0]:g} %)" if chance else ""
    of_contest = _CONTEST.format(seeds=len(findings.outcomes.study.extent.seeds), count=count)
    if findings.alone:
        return [of_contest]
    smoke = "The size smoke only shows that everything works; its numbers say nothing about the paper. "
    return [
        smoke
        * (size == "smoke")
        + "Accuracies are test accuracies in percent at the evaluation with the best validation accuracy, which is "
        f"what the paper reports. They are means over the models of {models}, shown as mean ± sample standard "
        f"deviation over {len(s.seeds)} seeds. If the paper has a number for the same setting, the table shows it, "
        "too. If fewer seeds are done, the table says so; a dash means that a run is not done. A run whose "
        f"numbers became NaN or infinite is called diverged and counts as chance{count} in means and differences.",
        "The paper trains its ResNet16 (an AlexNet in Table 4) on Fashion-MNIST with 10000 images held out for "
        "validation, does not say for how many epochs, and gives neither seeds nor spread. Compare the order of the "
        "numbers, not the numbers themselves.",
        *[f"Label skew: {of_contest}"] * (SKEW in findings.parts),
    ]


_CONTEST = (
    "Accuracies are test accuracies in percent at the end of the training, as means over the models of all clients on "
    "the global test set (if client models are averaged, they are all the same), shown as mean ± sample standard "
    "deviation over {seeds} seeds. Every method was tuned over the same rates on another seed, by validation "
    "accuracy; test accuracies play no part in the choice. If fewer seeds are done, the table says so; a dash means "
    "that a run is not done. A run whose numbers became NaN or infinite is called diverged and counts as "
    "chance{count}."
)

ANOTHER_MODEL = (
    "The model was chosen by the user. The paper's numbers beside ours are those of its ResNet16 and AlexNet, and the "
    "claims are the paper's. A verdict marked “another model” says whether a claim carries over to this model; it says "
    "nothing about the reproduction of the paper."
)

TEST = (
    "Each verdict comes from one test. Differences are taken between runs with the same seed (the same split of the "
    "data, partition and initial weights) and averaged over all cells that the claim covers. The spread over seeds "
    "gives a two-sided 95 % interval of Student's t, which is wide if there are few seeds. A claim holds if the "
    "interval lies above its threshold (0 points if it names none), does not hold if the interval lies below it, and "
    "is within noise if the interval contains it. With fewer than two seeds, it is not measured. Points are percentage "
    "points of test accuracy, or, in claims about reconstruction, of the inputs' variance that the attacker explains. "
    "“At equal accuracy” means that each of the two runs is attacked at the time when it first reached the highest "
    "test accuracy that both reach. There is no correction for the number of claims or of cells in a breakdown."
)


def _content(findings: Findings, size: str) -> dict[str, Any]:
    """The content of both pages."""
    done, planned = findings.done
    study = findings.outcomes.study
    return {
        "title": findings.title,
        "setting": setting(findings, size),
        "notice": ANOTHER_MODEL * (study.another_model and not findings.alone),
        "unfinished": "" if done == planned else f"{done} of {planned} runs are done",
        "lines": findings.lines,
        "reading": reading(findings, size),
        "test": TEST,
        "source": "" if findings.alone else paper()["source"],
        "tables": [_lines(table) for table in findings.tables],
        "verdicts": [_verdict(v, study) for v in findings.verdicts],
        "facts": [{**asdict(f), "word": study.verdict(f.word), "mark": MARKS[f.word]} for f in findings.facts],
        "command": _command(findings, size),
        "marks": MARKS,
    }


def _lines(table: Table) -> dict[str, Any]:
    """A table, ready to print: cells are (ours, the paper's)."""
    rows = [(label, [(shown(v), paper_of(v)) for v in values]) for label, values in table.rows]
    with_paper = any(theirs for _, cells in rows for _, theirs in cells)
    return {**asdict(table), "rows": rows, "with_paper": with_paper}


def _command(findings: Findings, size: str) -> str:
    """The command that made it; with a model of the user's choice, also the choices."""
    study = findings.outcomes.study
    words = ["cutlayer", "reproduce", *findings.parts, "--size", size]
    if study.another_model:
        chosen = {"data": study.data, "model": study.size.model, **dict(study.options)}
        words += [word for name, value in chosen.items() for word in flag_words(name, value)]
    return shlex.join(words)


def _verdict(verdict: ClaimVerdict, study: Study) -> dict[str, Any]:
    d = verdict.overall
    collapsed = f", {d.at_chance} with a cell at chance" if d.at_chance else ""
    return {
        "claim": verdict.claim,
        "word": study.verdict(d.verdict),
        "mark": MARKS[d.verdict],
        "points": "loss " * (verdict.claim.loss and d.mean is not None) + points(d),
        "evidence": f"{d.seeds} seed{'s' * (d.seeds != 1)}, {d.cells} pair{'s' * (d.cells != 1)}{collapsed}",
        "columns": verdict.columns,
        "rows": [(label, [_marked(cell) for cell in cells]) for label, cells in verdict.rows],
    }


def _marked(difference: Difference | None) -> str:
    mark = "" if difference is None else MARKS[difference.verdict]
    return f"{points(difference)} {mark}".strip()


def _data(findings: Findings, size: str) -> dict[str, Any]:
    """Everything, for programs: accuracies in percent, differences in points."""
    outcomes = findings.outcomes
    study = outcomes.study
    cells = {
        name: {
            "config": cell.config.model_dump(mode="json", include=cell.config.model_fields_set),
            "seeds": {
                str(seed): {
                    "best_test_score": o.best,
                    "test_score": o.last,
                    "best_validation_score": o.validation,
                    "diverged": o.diverged,
                }
                for seed, o in outcomes.of(cell).items()
            },
        }
        for name, cell in outcomes.cells.items()
    }
    return {
        "version": __version__,
        "settings": {
            "size": size,
            "data": study.data,
            "device": study.device,
            **asdict(study.size),
            **({SKEW: asdict(study.extent)} if SKEW in findings.parts else {}),
            **({"options": dict(study.options)} if study.options else {}),
        },
        "another_model": study.another_model,
        "tables": [asdict(table) for table in findings.tables],
        "claims": [
            {
                "name": v.claim.name,
                "title": v.claim.title,
                "sentence": v.claim.sentence,
                "threshold": v.claim.threshold,
                "verdict": study.verdict(v.overall.verdict),
                "overall": asdict(v.overall),
                "breakdown": [
                    {
                        "row": label,
                        "cells": {c: None if d is None else asdict(d) for c, d in zip(v.columns, cells, strict=True)},
                    }
                    for label, cells in v.rows
                ],
            }
            for v in findings.verdicts
        ],
        "counted": [{**asdict(fact), "verdict": study.verdict(fact.word)} for fact in findings.facts],
        "lines": findings.lines,
        "cells": cells,
    }


def _rendered(template: str, escape: bool, **content: Any) -> str:
    environment = Environment(autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(resources.files("cutlayer.reproduce").joinpath(template).read_text("utf-8")).render(
        content
    )


def _style() -> str:
    """The style sheet of a run's page: one look for all."""
    page = resources.files("cutlayer.report").joinpath("report.html.j2").read_text("utf-8")
    return page.partition("<style>")[2].partition("</style>")[0]


def _named(pictures: dict[str, bytes]) -> list[tuple[str, str, str]]:
    """(file name, title, text) of every plot."""
    return [(name, PLOTS[name].title, PLOTS[name].text) for name in pictures]


def _embedded(pictures: dict[str, bytes]) -> list[tuple[str, str, str]]:
    """(title, text, source) of every plot."""
    return [
        (PLOTS[n].title, PLOTS[n].text, f"data:image/png;base64,{base64.b64encode(png).decode()}")
        for n, png in pictures.items()
    ]
