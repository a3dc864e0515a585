"""The output of `run`, `compare` and `serve` at their end."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from cutlayer import plugins
from cutlayer.cli.application import out
from cutlayer.cli.printing import say, wide
from cutlayer.text import attacked, format_bytes, format_figure, spoken, with_unit

_ROWS = {"global": "all test rows", "own": "its own test rows"}
_FEW, _ENDS = 12, 5  # up to this number, all clients are shown; otherwise this many at either end

if TYPE_CHECKING:
    from cutlayer.compare import Row
    from cutlayer.data import Source
    from cutlayer.report import Wanted
    from cutlayer.report.collect import Report
    from cutlayer.run import Result, Run
    from cutlayer.tuned import Tuned
    from cutlayer.types import Evaluation


def tell_of_data(source: Source) -> None:
    """Print the line about the data that were read, used and left out."""
    if source.account:
        say(f"Data: {source.account}")


def tell(remarks: Iterable[str]) -> None:
    """Print the line about the data, and the choices for evaluation, a line each."""
    for remark in remarks:
        say(remark)


def print_clients(run: Run) -> None:
    """Print the final scores of the clients' models: all if they are few, otherwise the best and the worst."""
    from cutlayer.scoring import fairness

    task, called = run.training.task, run.client_names
    found = {where: _defined(evaluation, task.leading) for where, evaluation in run.by_client.items()}
    own = len(found.get("own", {})) > 1  # requested figures, even if they are equal
    found = {where: scores for where, scores in found.items() if own or len(set(scores.values())) > 1}
    if not found:  # one model, or models that are known to be equal
        return
    first = next(iter(found.values()))
    table = Table(title=f"Test {with_unit(task.leading, share=task.share)} of each client's model")
    table.add_column("client", no_wrap=True)
    for where in found:
        table.add_column(_ROWS[where], justify="right", no_wrap=True)
    best_first = sorted(first, key=lambda k: task.rank(first[k]), reverse=True)
    few = len(best_first) <= _FEW
    for k in sorted(first) if few else [*best_first[:_ENDS], -1, *best_first[-_ENDS:]]:
        if k < 0:
            table.add_row(f"... {len(first) - 2 * _ENDS} more", *("" for _ in found))
        else:
            table.add_row(
                called[k] if called else str(k), *(format_figure(s.get(k), share=task.share) for s in found.values())
            )
    wide(140).print(table)
    figure = partial(format_figure, share=task.share)
    for where, scores in found.items():
        fair = fairness(scores.values(), maximise=task.maximise)
        say(
            f"On {_ROWS[where]}: worst {figure(fair.worst)}, mean of the worst 10 % {figure(fair.worst_tenth)}, "
            f"standard deviation {figure(fair.std)}"
        )
        classes = run.result.fairness.get(where, {}) if run.result else {}
        if classes.get("performance_gap") is not None:
            forgotten = classes["backward_transfer"]
            say(
                f"Over the classes: performance gap {format_figure(classes['performance_gap'], share=True)}"
                + ("" if forgotten is None else f", backward transfer {format_figure(forgotten, share=True)}")
            )


def print_metrics(run: Run) -> None:
    """Print the other final measurements that are single numbers, for comparison with the score."""
    assert run.result is not None
    task, scores = run.training.task, run.result.test
    known = [name for name, metric in task.all_metrics.items() if name in scores and not metric.several]
    figures = []
    for name in known:
        if name != task.leading and not isinstance(scores[name], list | tuple):
            share = task.all_metrics[name].share
            unit = "%" * (share and scores[name] is not None)
            figures.append(f"{spoken(name)} {format_figure(scores[name], share=share)}{unit}")
    if figures:
        say(f"Besides: {', '.join(figures)}")


def _defined(evaluation: Evaluation | None, metric: str) -> dict[int, float]:
    """Each client's score, if it is defined."""
    return {} if evaluation is None else {k: s for k, s in evaluation.each(metric).items() if s is not None}


def print_result(result: Result) -> None:
    """Print the result of a run and its costs."""
    title = attacked(plugins.find("algorithm", result.algorithm).title, result.attack)
    line = Text.assemble(
        "\n",
        (title, "bold"),
        f" ({result.engine} engine): test {spoken(result.metric)} ",
        (_score(result.test_score, result), "bold"),
        f" (at the best validation {spoken(result.metric)}, round "
        f"{result.best_round}: {_score(result.best_test_score, result)}); {result.steps} steps, "
        f"{result.steps_per_second:.1f} steps/s, "
        f"{result.samples_per_second:.0f} samples/s; {format_bytes(result.bytes_up)} up, "
        f"{format_bytes(result.bytes_down)} down",
    )
    out.print(line, highlight=False)
    if result.stopped:
        say(f"{title} {result.stopped}")
    _print_run_costs(result)


def _score(score: float | None, result: Result) -> str:
    """A score with its unit."""
    return format_figure(score, share=result.share) + "%" * (result.share and score is not None)


def _print_run_costs(result: Result) -> None:
    """Print what was computed, and time and energy if devices and links are named."""
    from cutlayer.report import availability, spending, staleness

    text = f"A client computed {spending.flops(result.client_flops)}, the server {spending.flops(result.server_flops)}"
    if result.virtual_seconds is not None:
        text += (
            f"; on these machines it takes {spending.duration(result.virtual_seconds)} (virtual time), the clients' "
            f"energy is {spending.joules(result.clients_marginal_joules)} marginal, "
            f"{spending.joules(result.clients_joules)} total, "
            f"the server's {spending.joules(result.server_joules)} (modelled)"
        )
    drawn = "" if result.measured_joules is None else f"{spending.joules(result.measured_joules)} "
    out.print(f"{text}. Energy of this machine: {drawn}{result.measured_by}.", highlight=False, soft_wrap=True)
    if result.staleness is not None:
        out.print(staleness.line(result.staleness), highlight=False, soft_wrap=True)
    if result.availability is not None:
        out.print(availability.line(result.availability), highlight=False, soft_wrap=True)


def print_comparison(rows: list[Row]) -> None:
    """Print the scores, the traffic and the costs of all entries."""
    metrics = list(dict.fromkeys((row.metric, row.share) for row in rows))
    metric, share = metrics[0] if len(metrics) == 1 else ("score", False)
    table = Table(title=f"Test {spoken(metric)}: mean ± standard deviation over seeds")
    names = (
        "",
        spoken(metric) + " %" * share,
        "at best validation" + " %" * share,
        "steps",
        "steps/s",
        "samples/s",
        "bytes up",
        "bytes down",
        "broadcast down",
    )
    for name in names:  # an entry's name may be long; it is wrapped rather than cut off
        table.add_column(name, justify="left" if not name else "right", no_wrap=bool(name))
    for row in rows:
        table.add_row(
            row.title,
            _figure(row.score_mean, row.score_std, row, len(metrics) > 1),
            _figure(row.best_score_mean, row.best_score_std, row, len(metrics) > 1),
            f"{row.steps:.0f}",
            f"{row.steps_per_second:.1f}",
            f"{row.samples_per_second:.0f}",
            format_bytes(round(row.bytes_up)),
            format_bytes(round(row.bytes_down)),
            format_bytes(round(row.bytes_down_broadcast)),
        )
    wide(140).print(table)
    _print_costs(rows)


def _print_costs(rows: list[Row]) -> None:
    """Print what was computed, and time and energy if devices and links are named."""
    from cutlayer.report import availability, spending, staleness

    stale = any(row.batch_age is not None for row in rows)
    traced = any(row.reachable is not None for row in rows)
    clocked = any(row.virtual_seconds is not None for row in rows)
    table = Table(title="Costs of training" + (", time and energy modelled" if clocked else ""))
    table.add_column("", no_wrap=True)
    for name in ("a client computes", "the server computes"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("virtual time", "clients' energy: marginal", "total", "server's energy") if clocked else ():
        table.add_column(name, justify="right")
    for name in availability.HEADS if traced else ():
        table.add_column(name, justify="right")
    for name in staleness.HEADS if stale else ():
        table.add_column(name, justify="right")
    waits = stale and clocked and not traced
    if waits:
        table.add_column("a client waits", justify="right")
    table.add_column("this machine drew", justify="right")
    for row in rows:
        modelled = (
            spending.duration(row.virtual_seconds),
            spending.joules(row.clients_marginal_joules),
            spending.joules(row.clients_joules),
            spending.joules(row.server_joules),
        )
        table.add_row(
            row.title,
            spending.flops(row.client_flops),
            spending.flops(row.server_flops),
            *(modelled if clocked else ()),
            *(availability.means(row.reachable, row.idle_seconds, row.link_seconds) if traced else ()),
            *(staleness.means(row.batch_age, row.model_age) if stale else ()),
            *((staleness.waits(row.idle_seconds),) if waits else ()),
            spending.joules(row.measured_joules, "not measured"),
        )
    wide(140).print(table)


def print_tuning(tuned: Tuned | None, rows: Iterable[Row]) -> None:
    """Print how each entry was tuned, if the comparison was."""
    from cutlayer.report import tuning_table

    if tuned is None:
        return
    table = Table(title="Tuning, before the seeds were trained")
    for number, name in enumerate(tuning_table.HEADS):
        table.add_column(name, justify="right" if number else "left")
    for line in tuning_table.lines(tuned, {row.entry: row.title for row in rows}):
        table.add_row(*line)
    wide(140).print(table)
    say(tuning_table.sentence(tuned))


def _figure(mean: float | None, std: float | None, row: Row, named: bool) -> str:
    """A score, with its metric if rows differ in it."""
    return f"{with_unit(row.metric, share=row.share)} " * named + format_figure(mean, std, share=row.share)


def _print_differences(report: Report, wanted: Wanted) -> None:
    """Print the differences between the entries of a comparison and the baseline, if there are at least two seeds."""
    from cutlayer.report.differences import as_text, differences

    found = differences(report, wanted.baseline, correction=wanted.correction, wanted=wanted.difference)
    if found is None:
        return
    table = Table(title=f"Differences to {found.title} in {found.unit}, paired by seed")
    heads = ["mean", "95 % interval", "p (Holm)" if found.correction == "holm" else "p", "seeds"]
    heads += [] if found.wanted is None else [f"seeds to find {found.wanted:g}"]
    table.add_column("")
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    for row in as_text(found):
        table.add_row(*row[: 1 + len(heads)])
    wide(140).print(table)


def write_report(folder: Path, wanted: Wanted | None = None) -> None:
    """Draw the curves, write the page and what else is `wanted`; print the differences between the entries of a
    comparison, and the paths of all these files.
    """
    from cutlayer.report import Wanted, collect, write

    report, wanted = collect.read(folder), wanted or Wanted()
    _print_differences(report, wanted)
    for path in write(report, wanted):
        say(str(path))
