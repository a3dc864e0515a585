"""`run`, `compare`, `resume` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from cutlayer.cli.application import ConfigFile, Folder, Out
from cutlayer.cli.flags import command
from cutlayer.cli.merging import fresh_folder, merged_values, run_config
from cutlayer.cli.progress import Monitor, resumable
from cutlayer.cli.results import print_clients, print_comparison, print_result, tell_of_run, write_report
from cutlayer.errors import ConfigError
from cutlayer.options import CompareConfig, RunConfig
from cutlayer.plugins import label

if TYPE_CHECKING:
    from cutlayer.compare import Comparison
    from cutlayer.run import Run


@command(sort_key=1, options=RunConfig)
def run(*, options: BaseModel | None = None, config: ConfigFile = None, out: Out = None) -> None:
    """Train one algorithm and write a run folder.

    Parameters
    ----------
    config
        A TOML file with any of the options above.
    out
        The run folder to make. Default: runs/ALGORITHM-DATA-TIME.
    """
    from cutlayer.run import Run

    merged = run_config(options, config)
    where = out or fresh_folder(f"{label(merged.algorithm)}-{Path(merged.data).stem}")
    _train(Run(merged, out=where))


@command(sort_key=2, options=CompareConfig)
def compare(*, options: BaseModel | None = None, config: ConfigFile = None, out: Out = None) -> None:
    """Train several algorithms over several seeds on the same data and write a table, curves and a page.

    Parameters
    ----------
    config
        A TOML file with any of the options above; its tables [variant.NAME] add entries with options of their own.
    out
        The folder to make. Default: runs/compare-DATA-TIME.
    """
    from cutlayer.compare import Comparison

    values = merged_values(CompareConfig, options, config)
    merged = CompareConfig.of(values)
    _compare(Comparison(merged, out=out or fresh_folder(f"compare-{Path(merged.data).stem}")))


@command(sort_key=3, options=RunConfig)
def resume(folder: Folder, *, options: BaseModel | None = None) -> None:
    """Continue an interrupted run or comparison from its last checkpoint.

    Options are not needed; those given must be the run's own.

    Parameters
    ----------
    folder
        The folder of the run or comparison.
    """
    from cutlayer.folder import stored_config

    given = {} if options is None else options.model_dump(include=options.model_fields_set)
    if "algorithms" in stored_config(folder):
        from cutlayer.compare import Comparison

        if given:
            name, value = next(iter(given.items()))
            raise ConfigError(f"{name} = {value!r}: a comparison is resumed as it was started; leave options out")
        _compare(Comparison.resume(folder))
    else:
        from cutlayer.run import Run

        _train(Run.resume(folder, **given))


@command(sort_key=4)
def report(folder: Folder) -> None:
    """Draw the curves and write the page of a run or comparison, finished or not.

    Parameters
    ----------
    folder
        The folder of the run or comparison.
    """
    write_report(folder)


def _train(run: Run) -> None:
    """Train with live progress, then print the result and write the pictures and the page."""
    assert run.out is not None
    with Monitor(1) as monitor, resumable(f"cutlayer resume {run.out}"):
        for number, record in enumerate(run):
            if number == 0:
                tell_of_run(run)
            monitor.show(label(run.config.algorithm), run, record)
    assert run.result is not None
    print_result(run.result)
    print_clients(run)
    write_report(run.out)


def _compare(comparison: Comparison) -> None:
    """Train all entries with live progress, then print the table and write the pictures and the page."""
    assert comparison.out is not None
    with Monitor(sum(map(len, comparison.plan.values()))) as monitor, resumable(f"cutlayer resume {comparison.out}"):
        told = set[str]()
        for entry, seed, run, record in comparison:
            if run.training.source.account not in told:
                tell_of_run(run)
            told.add(run.training.source.account)
            monitor.show(f"{entry}, seed {seed}", run, record)
    print_comparison(comparison.table())
    write_report(comparison.out)
