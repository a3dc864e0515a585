"""What `run`, `compare` and `serve` print and write at their end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from cutlayer import plugins
from cutlayer.cli.application import out
from cutlayer.cli.printing import say, wide
from cutlayer.text import format_bytes

if TYPE_CHECKING:
    from cutlayer.compare import Row
    from cutlayer.data import Source
    from cutlayer.run import Result


def tell_of_data(source: Source) -> None:
    """Print the line that says what was read, used and left out."""
    if source.account:
        say(f"Data: {source.account}")


def print_result(result: Result) -> None:
    """Print what a run has reached and what it cost."""
    title = plugins.find("algorithm", result.algorithm).title
    out.print(
        f"\n[bold]{title}[/] ({result.engine} engine): test accuracy "
        f"[bold]{result.test_score:.2%}[/] (at the best validation accuracy, round {result.best_round}: "
        f"{result.best_test_score:.2%}); {result.steps} steps, {result.steps_per_second:.1f} steps/s, "
        f"{result.samples_per_second:.0f} samples/s; {format_bytes(result.bytes_up)} up, "
        f"{format_bytes(result.bytes_down)} down",
        highlight=False,
    )
    _print_run_costs(result)


def _print_run_costs(result: Result) -> None:
    """Print what was computed, and time and energy if devices and links are named."""
    from cutlayer.report import spending

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


def print_comparison(rows: list[Row]) -> None:
    """Print the accuracies, the traffic and the costs of all entries."""
    table = Table(title="Test accuracy: mean ± standard deviation over seeds")
    names = (
        "",
        "accuracy %",
        "at best validation %",
        "steps",
        "steps/s",
        "samples/s",
        "bytes up",
        "bytes down",
        "broadcast down",
    )
    for name in names:
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.title,
            _spread(row.accuracy_mean, row.accuracy_std),
            _spread(row.best_accuracy_mean, row.best_accuracy_std),
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
    from cutlayer.report import spending

    clocked = any(row.virtual_seconds is not None for row in rows)
    table = Table(title="Costs of training" + (", time and energy modelled" if clocked else ""))
    table.add_column("", no_wrap=True)
    for name in ("a client computes", "the server computes"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("virtual time", "clients' energy: marginal", "total", "server's energy") if clocked else ():
        table.add_column(name, justify="right")
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
            spending.joules(row.measured_joules, "not measured"),
        )
    wide(140).print(table)


def _spread(mean: float, std: float | None) -> str:
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def write_report(folder: Path) -> None:
    """Draw the curves, write the page and print the paths of all these files."""
    from cutlayer.report import write

    for path in write(folder):
        say(str(path))
