"""`leakage`: what the server can learn from the smashed data of trained runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from cutlayer.cli.application import Out, err
from cutlayer.cli.flags import command
from cutlayer.cli.merging import check_positive
from cutlayer.cli.printing import say, wide
from cutlayer.errors import ConfigError
from cutlayer.files import replace_file

if TYPE_CHECKING:
    from torch import Tensor

    from cutlayer.leakage.active import Hijacked
    from cutlayer.leakage.assess import Examined


@command(sort_key=12)
def leakage(
    *runs: Path,
    out: Out = None,
    clients: int = 2,
    samples: int = 1000,
    auxiliary: int | None = None,
    knowledge: Annotated[tuple[str, ...], Parameter(negative=(), consume_multiple=True)] = ("model", "smashed"),
    estimators: Annotated[tuple[str, ...], Parameter(negative=(), consume_multiple=True)] = (
        "usable",
        "infonce",
        "ksg",
    ),
    view: Literal["cca", "pca", "random", "raw"] = "cca",
    attacks: Annotated[tuple[str, ...], Parameter(negative=(), consume_multiple=True)] = ("nearest", "inversion"),
    snapshots: bool = False,
    hijack: bool = False,
    seed: int = 0,
) -> None:
    """Measure what the server can learn about private inputs from the smashed data of trained runs.

    Attackers learn from held-out samples, which no client has, and attack samples that clients trained on. Each
    estimate of information is shown together with what the estimator finds on data for which the answer is known. Needs
    the extra `leakage`.

    Parameters
    ----------
    runs
        Run folders.
    out
        The folder for leakage.json and leakage.png. Default: the first run's folder.
    clients
        Number of clients to attack in each run; they are drawn once.
    samples
        Largest number of private samples to attack per client.
    auxiliary
        Number of samples that the attacker has. Default: all held-out samples, up to 1000.
    knowledge
        What the attacker knows: model (the client part), smashed (only the smashed data, and the server's own part;
        for tokens also the client part that the run began with).
    estimators
        The estimators of information: any of usable, infonce, smile, mine and ksg.
    view
        The projection for estimators of mutual information: two canonical components (cca), two principal components
        (pca), random lines (random: sliced mutual information), or none (raw), whose estimates are far from the truth.
    attacks
        The attacks on tokens: nearest (the token whose smashed data are nearest), inversion (a trained model), search
        (tokens one after another, of a few rows; slow).
    snapshots
        Also examine the snapshots that the runs have kept (snapshot_every).
    hijack
        Also train the clients of each run again, under an honest and under a hijacking server. This shows what an
        active server would have read, and whether clients notice it.
    seed
        Seed of the attackers' randomness.
    """
    if not runs:
        raise ConfigError("no run is named: give run folders, e.g. cutlayer leakage runs/NAME")
    check_positive(clients=clients, samples=samples, auxiliary=1 if auxiliary is None else auxiliary)
    from cutlayer.leakage import check_installed

    check_installed()
    from cutlayer.leakage.active import check_hijackable
    from cutlayer.leakage.active import hijack as hijacking
    from cutlayer.leakage.assess import Asked, check, examine
    from cutlayer.leakage.subject import moments, subjects

    asked = Asked(tuple(knowledge), tuple(estimators), seed, view, tuple(attacks))  # type: ignore[arg-type]  # checked there
    of_runs = [moments(run, snapshots) for run in runs]
    if hijack:
        for found in of_runs:
            check_hijackable(found[-1])
    every = [s for found in of_runs for m in found for s in subjects(m, clients, samples, auxiliary, seed)]
    for subject in every:
        check(subject, asked)
    examined = []
    for subject in every:
        _tell(f"{subject.moment.out}, round {subject.moment.rounds}: client {subject.name}")
        examined.append(examine(subject, asked))
    active = [one for found in of_runs if hijack for one in hijacking(found[-1], samples, auxiliary, seed, _tell)]
    _show_and_write(examined, active, several=len(runs) > 1, folder=out or runs[0])


def _tell(what: str) -> None:
    """Print a line of progress on stderr."""
    err.print(what, highlight=False, soft_wrap=True)


def _show_and_write(
    examined: list[Examined], active: list[tuple[Hijacked, dict[str, Tensor]]], *, several: bool, folder: Path
) -> None:
    """Print tables and sentences, and write leakage.json and leakage.png."""
    from cutlayer.leakage.assess import comparisons
    from cutlayer.report import leakage as report

    findings = [e.finding for e in examined]
    sentences = comparisons(findings)
    hijacked = [h for h, _ in active]
    for table in [*report.tables(findings), report.active(hijacked)]:
        if table.row_count:
            wide(170).print(table)
    if several and not sentences:
        sentences = ["nothing is ranked: no estimate was read of both of two runs"]
    for sentence in [*report.notes(findings), *report.active_notes(hijacked), *sentences]:
        say(sentence)
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        report.LEAKAGE_JSON: report.as_json(findings, sentences, hijacked).encode(),
        report.LEAKAGE_PICTURES: report.pictures(examined, active),
    }
    for name, content in written.items():
        if content is not None:
            replace_file(folder / name, content)
            say(str(folder / name))
