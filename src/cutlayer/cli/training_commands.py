"""`run`, `compare`, `resume` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from cutlayer.cli.application import ConfigFile, Folder, Out, Overwrite
from cutlayer.cli.flags import command
from cutlayer.cli.launched import launched
from cutlayer.cli.merging import check_positive, fresh_folder, merged_values, run_config
from cutlayer.cli.printing import print_exactly, say
from cutlayer.cli.progress import Monitor, resumable
from cutlayer.cli.results import (
    print_clients,
    print_comparison,
    print_metrics,
    print_result,
    print_tuning,
    tell,
    write_report,
)
from cutlayer.collective import world
from cutlayer.errors import ConfigError
from cutlayer.options import CompareConfig, RunConfig
from cutlayer.plugins import label
from cutlayer.summary import Correction

if TYPE_CHECKING:
    from cutlayer.compare import Comparison
    from cutlayer.run import Run


@command(sort_key=1, options=RunConfig)
def run(
    *,
    options: BaseModel | None = None,
    config: ConfigFile = None,
    out: Out = None,
    overwrite: Overwrite = False,
    rank_timeout: float | None = None,
) -> None:
    """Train with one algorithm and write a run folder.

    Parameters
    ----------
    config
        A TOML file with any of the options above.
    out
        The run folder to create. Default: runs/ALGORITHM-DATA-TIME.
    overwrite
        Replace the run or comparison in the folder --out.
    rank_timeout
        With several ranks: seconds after which a rank that does not answer counts as lost. Default: 300.
    """
    with launched(rank_timeout) as ranks:
        _train(ranks.agreed(lambda: _run(options, config, out, overwrite)))


def _run(options: BaseModel | None, config: Path | None, out: Path | None, overwrite: bool) -> Run:
    from cutlayer.run import Run

    merged = run_config(options, config)
    _refuse_nameless(out, overwrite)
    where = out or world().first(lambda: fresh_folder(f"{label(merged.algorithm)}-{Path(merged.data).stem}"))
    return Run(merged, out=where, overwrite=overwrite)


@command(sort_key=2, options=CompareConfig)
def compare(
    *,
    options: BaseModel | None = None,
    config: ConfigFile = None,
    out: Out = None,
    overwrite: Overwrite = False,
    jobs: int = 1,
    rank_timeout: float | None = None,
) -> None:
    """Train several algorithms with several seeds on the same data, and write a table, curves and an HTML page.

    Parameters
    ----------
    config
        A TOML file with any of the options above; its tables [variant.NAME] add entries with options of their own.
    out
        The folder to create. Default: runs/compare-DATA-TIME.
    overwrite
        Replace the run or comparison in the folder --out.
    jobs
        Number of runs to train at the same time, each in its own process with its share of the cores.
    rank_timeout
        With several ranks: seconds after which a rank that does not answer counts as lost. Default: 300.
    """
    with launched(rank_timeout) as ranks:
        _compare(ranks.agreed(lambda: _comparison(options, config, out, overwrite, jobs)))


def _comparison(
    options: BaseModel | None, config: Path | None, out: Path | None, overwrite: bool, jobs: int
) -> Comparison:
    from cutlayer.compare import Comparison

    merged = CompareConfig.of(merged_values(CompareConfig, options, config))
    _refuse_nameless(out, overwrite)
    where = out or world().first(lambda: fresh_folder(f"compare-{Path(merged.data).stem}"))
    return Comparison(merged, out=where, overwrite=overwrite, jobs=jobs)


def _refuse_nameless(out: Path | None, overwrite: bool) -> None:
    if overwrite and out is None:
        raise ConfigError("--overwrite has no effect without --out: name the folder to replace, or leave it out")


@command(sort_key=3, options=RunConfig)
def resume(
    folder: Folder, *, options: BaseModel | None = None, jobs: int = 1, rank_timeout: float | None = None
) -> None:
    """Continue an interrupted run or comparison from its last checkpoint.

    No options are needed. Those that you give must be the same as the run's.

    Parameters
    ----------
    folder
        The folder of the run or comparison.
    jobs
        Number of a comparison's runs to train at the same time.
    rank_timeout
        With several ranks: seconds after which a rank that does not answer counts as lost. Default: 300.
    """
    from cutlayer.compare import Comparison

    with launched(rank_timeout) as ranks:
        resumed = ranks.agreed(lambda: _resumed(folder, options, jobs))
        if isinstance(resumed, Comparison):
            _compare(resumed)
        else:
            _train(resumed)


def _resumed(folder: Path, options: BaseModel | None, jobs: int) -> Run | Comparison:
    from cutlayer.folder import stored_config

    given = {} if options is None else options.model_dump(include=options.model_fields_set)
    if "algorithms" in world().first(lambda: stored_config(folder)):
        from cutlayer.compare import Comparison

        if given:
            name, value = next(iter(given.items()))
            raise ConfigError(f"{name} = {value!r}: a comparison is resumed as it was started; leave options out")
        return Comparison.resume(folder, jobs=jobs)
    if jobs != 1:
        raise ConfigError(f"jobs = {jobs} has no effect here: {str(folder)!r} is a single run; leave it out")
    from cutlayer.run import Run

    return Run.resume(folder, **given)


@command(sort_key=4)
def report(
    folder: Folder,
    *,
    csv: bool = False,
    latex: bool = False,
    pdf: bool = False,
    svg: bool = False,
    baseline: str | None = None,
    correction: Correction = "none",
    difference: float | None = None,
) -> None:
    """Draw the curves and write the HTML page of a run or comparison, which need not have finished.

    Parameters
    ----------
    folder
        The folder of the run or comparison.
    csv
        Also write table.csv, steps.csv, evaluations.csv and clients.csv, with one row per observation.
    latex
        Also write table.tex, the result table for a paper (booktabs).
    pdf
        Also write each panel as a PDF as wide as a column, readable in black and white.
    svg
        Also write each panel as an SVG of the same kind.
    baseline
        The entry that the others are compared with, seed by seed. Default: the first one.
    correction
        Correction of the p values for several comparisons: none or holm.
    difference
        Show how many seeds are needed to detect this difference, in the units of the table.
    """
    from cutlayer.report import Wanted

    check_positive(difference=difference)
    wanted = Wanted(csv, latex, pdf, svg, baseline, correction, difference)
    write_report(folder, wanted)


@command(sort_key=5)
def collect(first: Folder, *more: Folder, out: Path) -> None:
    """Collect the tables of several runs and comparisons in CSV files; each row names the study it comes from.

    Parameters
    ----------
    first
        The folder of a run or comparison.
    more
        Further folders.
    out
        The folder to write table.csv, steps.csv, evaluations.csv and clients.csv to.
    """
    from cutlayer.report import collect_studies

    for path in collect_studies([first, *more], out):
        say(str(path))


@command(sort_key=5)
def cite(first: Folder, *more: Folder) -> None:
    """Print BibTeX entries of what runs and comparisons used: methods, data, models, libraries and Cutlayer itself.

    Each entry is printed once. A comment names what is to be cited and has no entry, such as an algorithm of your own.

    Parameters
    ----------
    first
        The folder of a run or comparison, finished or not.
    more
        Further folders.
    """
    from cutlayer.report import cite as entries

    print_exactly(entries(first, *more))


def _train(run: Run) -> None:
    """Train with live progress, then print the result and write the pictures and the page."""
    assert run.out is not None
    name = label(run.config.algorithm)
    with Monitor({name: 1.0}) as monitor, resumable(f"cutlayer resume {run.out}"):
        for number, standing in enumerate(run.standings()):
            if number == 0:
                tell(standing.remarks)
            monitor.show(name, standing)
        monitor.ended(name)
    if not world().leads:
        return
    assert run.result is not None
    print_result(run.result)
    print_metrics(run)
    print_clients(run)
    write_report(run.out)


def _compare(comparison: Comparison) -> None:
    """Train all entries with live progress, then print the table and write the pictures and the page."""
    from cutlayer.compare import run_name
    from cutlayer.trials import trial_name

    assert comparison.out is not None
    trials = {trial_name(*which): 1.0 for which in comparison.waiting_trials}
    waiting = trials | {run_name(*which): 1.0 for which in comparison.waiting}
    done = sum(map(len, comparison.plan.values())) + len(trials) - len(waiting)
    if trials and comparison.effort is not None:
        tell(comparison.effort.remarks)
    jobs = f" --jobs {comparison.jobs}" if comparison.jobs > 1 else ""
    with Monitor(waiting, done=done) as monitor, resumable(f"cutlayer resume {comparison.out}{jobs}"):
        told = set[str]()
        for progress in comparison.progress():
            name, remarks = progress.name, progress.standing.remarks
            if not told.intersection(remarks[:1]):
                tell(remarks)
            told.update(remarks[:1])
            if progress.ended:
                monitor.ended(name, progress.standing.stopped)
            elif progress.came:
                monitor.note(name, progress.came)
            else:
                monitor.show(name, progress.standing)
    if not world().leads:
        return
    print_comparison(comparison.table())
    print_tuning(comparison.tuned, comparison.table())
    write_report(comparison.out)
