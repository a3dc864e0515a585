"""`reproduce`: the paper's tables, and a verdict on each claim."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from cutlayer.cli.application import Out, out
from cutlayer.cli.flags import command
from cutlayer.cli.merging import merged_values
from cutlayer.cli.printing import say
from cutlayer.cli.progress import Monitor, resumable
from cutlayer.errors import ConfigError
from cutlayer.options import ReproduceConfig
from cutlayer.reproduce.cells import SizeName
from cutlayer.text import flag_words

if TYPE_CHECKING:
    from cutlayer.reproduce.outcomes import Outcome
    from cutlayer.reproduce.reproduction import Reproduction
    from cutlayer.reproduce.train import Job


@command(sort_key=5, options=ReproduceConfig)
def reproduce(
    *tables: str,
    options: BaseModel | None = None,
    size: SizeName = "smoke",
    out: Out = None,
    device: str = "cpu",
    jobs: int | None = None,
) -> None:
    """Reproduce the SGLR paper's tables: train, write them beside the paper's, and judge each claim.

    The same command with the same folder continues where it stopped, and can add other tables there. Finished runs are
    never trained again. With --model, a model of your choice replaces the paper's in every table.

    Parameters
    ----------
    tables
        Any of table1, table2, table3, table4, table6 and fig5 (learning curves of Table 4's methods), or all, which is
        the default. Three more must be named: skew (accuracy against bytes under label skew, which is not in the
        paper), and table5 and leakage, which attack the models that they train (methods, depths of the cut, defences).
    size
        How much to train: smoke (a minute, to see that it works), reduced (hours) or full (the paper's models and
        numbers of clients).
    out
        The folder. Default: runs/reproduce-SIZE.
    device
        The device that computes, as for `cutlayer run`.
    jobs
        Number of runs to train at the same time. Default: as many as cores and memory allow on the CPU, otherwise 1.
        With 0, nothing is trained, and the report is written from existing results.
    """
    from cutlayer.reproduce.reproduction import Reproduction

    if jobs is not None and jobs < 0:
        raise ConfigError(f"jobs = {jobs} is not possible: give how many runs to train at once, or 0 for none")
    where = out or Path("runs") / f"reproduce-{size}"
    chosen = ReproduceConfig.of(merged_values(ReproduceConfig, options, None))
    said = {"size": size, "out": where, "data": chosen.data, **chosen.things, **chosen.given}
    said |= {"device": device, "jobs": jobs}
    flags = [word for name, value in said.items() if value is not None for word in flag_words(name, value)]
    work = Reproduction(tables, size, where, chosen.data, device, chosen.given, **chosen.things)
    _reproduce(work, jobs, shlex.join(["cutlayer", "reproduce", *tables, *flags]))


def _reproduce(work: Reproduction, jobs: int | None, command: str) -> None:
    """Train what is missing with live progress, then print tables and verdicts and write the report."""
    from cutlayer.reproduce.terminal import show

    if jobs != 0 and (waiting := work.waiting()):
        with resumable(command):
            workers = work.check(jobs)
            weights = {_name(job): float(job[0].weight) for job in waiting}
            with Monitor(weights, done=len(work.jobs) - len(waiting), evaluations=False) as monitor:
                for job in work.train(workers, lambda job, standing: monitor.show(_name(job), standing)):
                    monitor.ended(_name(job), _came(work.outcome(job)))
    findings = work.find()
    show(findings, work.size, out)
    for path in work.write(findings):
        say(str(path))


def _name(job: Job) -> str:
    cell, seed = job
    return f"{cell.name} seed {seed}"


def _came(outcome: Outcome) -> str:
    return "diverged" if outcome.diverged else f"test accuracy {outcome.best:.1f} %"
