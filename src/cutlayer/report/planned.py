"""A plan for people: tables for the terminal, and one picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cutlayer.costs.breakeven import Quantity, bytes_of, lines
from cutlayer.costs.expect import Mixture, Workload, expect
from cutlayer.costs.ledger import CONVENTIONS, Convention
from cutlayer.costs.measure import at_client
from cutlayer.costs.plan import Plan, flops_share
from cutlayer.options import PlanConfig
from cutlayer.report.curves import _plain, drawn, titled
from cutlayer.report.looks import BLUE, VERMILLION, look_of_algorithm, title_of_algorithm
from cutlayer.report.spending import duration, flops, joules
from cutlayer.text import format_bytes, format_quantity, listed, shortened

_COUNTED = (
    "wire-unicast: each message once per receiver; wire-broadcast: what is the same for several clients once; paper: "
    "as the SGLR paper counts. All else is as planned."
)
_GATHERED = (
    "Rows of a step: what all clients of a rank save for the backward pass. Rows are "
    "gathered where the server's part has batch normalisation or draws: each rank then computes all of it."
)
_NAMED = 14  # cuts whose names fit below the axis


def show(plan: Plan, console: Console) -> None:
    """Print the description of the plan, and the tables."""
    for line in heading(plan):
        console.print(line, highlight=False, soft_wrap=True)
    if len(plan.cuts) > 1:
        console.print(_cuts(plan))
        for name, reason in list(plan.refused.items())[:3]:
            console.print(f"No cut at {name!r}: {reason}.", highlight=False, soft_wrap=True)
        if len(plan.refused) > 3:
            rest = list(plan.refused)[3:]
            more = f" and {len(rest) - 5} more" if len(rest) > 5 else ""
            console.print(f"Nor at {', '.join(rest[:5])}{more}.", highlight=False, soft_wrap=True)
    if plan.kinds:
        console.print(_kinds(plan))
    if plan.verdict:
        console.print(Text(plan.verdict, style="bold"), soft_wrap=True)
    console.print(_communication(plan))
    if plan.coded:
        console.print(_by_codec(plan))
    console.print(_computation(plan))
    if plan.memory:
        console.print(_memory(plan))
    if plan.ranks:
        console.print(_of_ranks(plan))
        console.print(_GATHERED, highlight=False, soft_wrap=True)
    for line in notes(plan):
        console.print(line, highlight=False, soft_wrap=True)
    if plan.break_evens:
        console.print(_break_evens(plan))
        console.print(_COUNTED, highlight=False, soft_wrap=True)
    if plan.data_break_evens:
        console.print(_against_data(plan))


def heading(plan: Plan) -> list[str]:
    """The description of the plan, in sentences."""
    m, c = plan.chosen.measured, plan.config
    tensors = listed([f"{_times(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in m.crossing])
    down = "" if m.gradient == m.smashed else f", {format_bytes(m.gradient)} come down"
    share = m.client_parameters / m.parameters if m.parameters else 0.0
    at = (
        f"cut after {m.name!r}: the client has {m.client_parameters:,} parameters ({share:.2%}) and "
        f"{flops_share(m):.2%} of the FLOPs; {format_bytes(m.smashed)} of smashed data go up per sample "
        f"({tensors}){down}"
    )
    return [
        f"{plan.title}: {m.parameters:,} parameters ({format_bytes(m.whole.state)}), "
        f"{flops(m.flops.whole.training)} to train on one sample of {_times(c.input)}",
        *([plan.remark] if plan.remark else []),
        *([] if plan.kinds and not ranked(plan) else [at]),
        *_tails(plan),
        f"{c.clients:,} {'client' if c.clients == 1 else 'clients'} with {c.samples_per_client:,} samples each, "
        f"batches of {c.batch}{_options(c)}; all figures are one epoch's",
    ]


def _tails(plan: Plan) -> list[str]:
    """The second cut, for the algorithms that have one."""
    bent = [cost.algorithm for cost in plan.costs if plan.config.algorithm(cost.algorithm).traits.u_shaped]
    if not bent:
        return []
    titles, work = listed([_title(plan, name) for name in bent]), plan.works[bent[0]]
    assert isinstance(work, Workload), "with a second cut, the first is the same for all"
    features = format_bytes(work.features)
    return [f"{titles}: cut again after {plan.config.tail_cut!r}; {features} of features come down per sample"]


def notes(plan: Plan) -> list[str]:
    """Explanations for reading the tables."""
    c, m = plan.config, plan.chosen.measured
    optimizer = "Adam's two moments" if c.client_optimizer == "adam" else "no state of plain SGD"
    lines = [
        f"Memory of a client: weights, gradients, {optimizer}, and what the forward pass of one batch saves for the "
        f"backward pass{', of which blocks keep only their inputs' if at_client(c.gradient_checkpointing) else ''}."
    ]
    if c.gradient_checkpointing != "none":
        whose = {"client": "Blocks of the client", "server": "Blocks of the server", "both": "All blocks"}
        lines.append(
            f"{whose[c.gradient_checkpointing]} are computed again in the backward pass, which is in the computation "
            "and the time (gradient_checkpointing)."
        )
    if not m.flops.whole.forward and m.parameters:
        lines.append("FLOPs: none of the model's operations is known to torch's counter, so that 0 means not known.")
    if once := [_title(plan, cost.algorithm) for cost in plan.costs if cost.expected.once_up]:
        lines.append(f"{listed(once)}: the raw data and labels go up once, whatever the number of epochs.")
    if plan.not_planned:
        lines.append(f"Not planned, since they do not say what they move: {', '.join(plan.not_planned)}.")
    for name, reason in plan.one_cut.items():
        differ = "ranks of adapters" if ranked(plan) else "cuts"
        lines.append(f"Not planned with different {differ}: {_title(plan, name)}, since {reason}.")
    if plan.kinds:
        lines.append("What a client computes is the mean of all clients; its memory is that of the one with the most.")
    if c.client_device is not None:
        clients = f"{c.client_device} over {c.link or 'a link of your own'}"
        server = f"{c.servers} x {c.server_device}" if c.server_device else "a server that takes no time"
        lines.append(
            f"Time and energy are modelled, in {c.precision}, for clients on {clients} and {server}"
            + ("" if c.utilisation == 1 else f", at {c.utilisation:.0%} of their FLOP/s")
            + ". Energy is a client's mean: marginal is what training adds, total also what the device draws anyway "
            "while it sends, receives and waits. Server: its share of the time."
        )
    return [*lines, *plan.notes]


def picture(plan: Plan) -> bytes:
    """Bytes over samples per client with the break-evens; with several cuts also the costs of each. One PNG."""
    return drawn(lambda: _figure(plan))


# Tables


def _table(title: str, columns: Iterable[str], rows: Iterable[Sequence[str]], bold: str = "") -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if row[0] == bold else None)
    return table


def _communication(plan: Plan) -> Table:
    columns = ("", "up", "down", "broadcast down", "wire-unicast", "wire-broadcast", "paper's convention")
    rows = []
    for cost in plan.costs:
        e = cost.expected
        counts = (e.up + e.once_up, e.down, e.down_broadcast, *(bytes_of(e, c) for c in CONVENTIONS))
        rows.append((_title(plan, cost.algorithm), *map(format_bytes, counts)))
    return _table("Communication of all clients, per epoch", columns, rows)


def _by_codec(plan: Plan) -> Table:
    """The bytes of the judged algorithm with each codec: per token, if samples are tokens."""
    timed, batch = plan.config.client_device is not None, plan.config.batch
    unit, units = ("token", batch * plan.tokens) if plan.tokens else ("sample", batch)
    columns = ["codec", f"up per {unit}", f"down per {unit}", "up per step", "down per step", "all, per epoch"]
    columns += ["time of a step"] if timed else []
    rows = []
    for one in plan.coded:
        each = [format_bytes(round(size / units)) for size in (one.up, one.down)]
        row = [", ".join(one.codecs), *each, *map(format_bytes, (one.up, one.down, one.unicast))]
        rows.append([*row, *([duration(one.seconds)] if timed else [])])
    title = f"Rows of a client by codec, with {_title(plan, plan.judged)}; labels and models go as they are"
    return _table(title, columns, rows)


def _memory(plan: Plan) -> Table:
    """The memory of each side during a batch."""
    columns = ["", "frozen weights", "trained weights", "gradients", "optimiser", "activations", "together"]
    again = any(one.checkpointed != one.activations for one in plan.memory)
    columns += ["checkpointed activations", "together"] if again else []
    rows = []
    for one in plan.memory:
        kept = (one.frozen, one.trained, one.gradients, one.moments, one.activations, one.total)
        row = [one.side[0].upper() + one.side[1:], *map(format_bytes, kept)]
        more = (one.checkpointed, one.total_checkpointed)
        rows.append([*row, *(map(format_bytes, more) if again else ())])
    return _table(f"Memory with {_title(plan, plan.judged)}", columns, rows)


def _of_ranks(plan: Plan) -> Table:
    columns = (
        "",
        "clients",
        "states",
        "rows of a step",
        "sent per step",
        "if rows are gathered",
        "per averaging",
        "per epoch",
    )
    rows = []
    for one in plan.ranks:
        amounts = (one.states, one.rows, *map(round, (one.step, one.gathering, one.averaging, one.epoch)))
        cells = ("not shared",) * 7 if one.refused else (f"{one.clients:,}", *map(format_bytes, amounts))
        rows.append((_title(plan, one.algorithm), *cells))
    return _table(f"One of {plan.config.ranks} ranks", columns, rows)


def _computation(plan: Plan) -> Table:
    timed = plan.config.client_device is not None
    columns = ["", "a client computes", "the server", "a client's memory"]
    columns += ["time", "of it server", "marginal energy", "total energy", "server's energy"] if timed else []
    rows = []
    for cost in plan.costs:
        e = cost.expected
        row = [
            _title(plan, cost.algorithm),
            flops(e.client_flops),
            flops(e.server_flops),
            format_bytes(cost.memory),
        ]
        if timed:
            share = "not known" if cost.server_share is None else f"{cost.server_share:.2%}"
            row += [duration(e.seconds), share, joules(cost.marginal), joules(cost.total), joules(e.server_joules)]
        rows.append(row)
    return _table("Computation of a client and of the server, per epoch", columns, rows)


def _cuts(plan: Plan) -> Table:
    timed, budget = plan.config.client_device is not None, _has_budget(plan.config)
    columns = ["cut after", "client's parameters", "of FLOPs", "smashed/sample", "client's memory"]
    columns += ["marginal energy", "time"] if timed else []
    columns += ["unicast", "broadcast", *(["fits"] if budget else [])]
    rows = []
    for cut in plan.cuts:
        m = cut.measured
        row = [m.name, f"{m.client_parameters:,}", f"{flops_share(m):.2%}", format_bytes(m.smashed)]
        row += [format_bytes(cut.cost.memory)]
        row += [joules(cut.cost.marginal), duration(cut.costs.seconds)] if timed else []
        row += [format_bytes(cut.costs.unicast), format_bytes(cut.costs.broadcast)]
        rows.append([*row, *([] if not budget else ["yes" if cut.strain <= 1 else "no"])])
    title = f"Cuts in the order data flows, with {_title(plan, plan.judged)}, per epoch"
    return _table(title, columns, rows, plan.chosen.measured.name)


def _kinds(plan: Plan) -> Table:
    """The clients of each cut, with algorithms that cut the model; or of each rank, with the judged algorithm."""
    by_rank = ranked(plan)
    columns = (
        "rank" if by_rank else "cut after",
        "clients",
        "their parameters",
        "of FLOPs",
        "up/sample",
        "down/sample",
        "computes",
        "memory",
    )
    rows = [
        (
            kind.measured.name if kind.rank is None else str(kind.rank),
            f"{kind.clients:,}",
            f"{kind.measured.client_parameters:,}",
            f"{flops_share(kind.measured):.2%}",
            format_bytes(kind.measured.smashed),
            format_bytes(kind.measured.gradient),
            flops(kind.flops),
            format_bytes(kind.memory),
        )
        for kind in plan.kinds
    ]
    return _table(f"Clients of each {'rank' if by_rank else 'cut'}, per epoch", columns, rows)


def ranked(plan: Plan) -> bool:
    """Whether the adapters of clients have different ranks."""
    return any(kind.rank is not None for kind in plan.kinds)


def _break_evens(plan: Plan) -> Table:
    """The numbers at which each algorithm that cuts the model costs at most as much as the one that does not."""
    first = plan.break_evens[0]
    table = Table(title=f"Where they cost no more than {first.against}", title_justify="left")
    total = next((b.total for b in plan.break_evens if b.total), None)
    frozen = plan.chosen.measured.whole.frozen
    heads: dict[Quantity, str] = {
        "samples per client": "samples per client",
        "clients": f"clients that share {total:,} samples" if total else "clients",
        "model bytes": f"size of {'all that is trained' if frozen else 'the whole model'}",
    }
    heads = {what: title for what, title in heads.items() if any(b.quantity == what for b in plan.break_evens)}
    for name in ("counted as", "method", *heads.values()):
        table.add_column(name, justify="right" if name in heads.values() else "left")
    for convention, titles, cells in lines(plan.break_evens):
        counted = "time on these machines" if convention is None else convention
        own: dict[Quantity, str] = {"samples per client": cells["time"]} if convention is None else cells
        table.add_row(counted, listed(titles), *(own.get(quantity, "") for quantity in heads))
    return table


def _against_data(plan: Plan) -> Table:
    """The number of epochs up to which algorithms send at most the bytes of sending the data."""
    table = Table(title=f"Where they cost no more than {plan.data_break_evens[0].against}", title_justify="left")
    for name in ("counted as", "method", "epochs"):
        table.add_column(name, justify="right" if name == "epochs" else "left")
    for convention, titles, cells in lines(plan.data_break_evens):
        table.add_row(convention or "", listed(titles), cells["epochs"])
    return table


def _has_budget(config: PlanConfig) -> bool:
    return config.memory_budget is not None or config.energy_budget is not None


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"


# Picture


def _figure(plan: Plan) -> Figure:
    draws: list[Callable[[Axes, Plan], None]] = [_bytes_over_samples]
    if len(plan.cuts) > 1:
        draws += [_smashed_over_cuts, _flops_over_cuts]
    figure = Figure(figsize=(7.2 if len(draws) == 1 else 6.2 * len(draws), 5.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    for ax, draw in zip(figure.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
        draw(ax, plan)
    return figure


def _bytes_over_samples(ax: Axes, plan: Plan) -> None:
    convention: Convention = "wire-broadcast" if plan.config.multicast else "wire-unicast"
    marks = [
        b for b in plan.break_evens if b.convention == convention and b.quantity == "samples per client" and b.last
    ]
    n = plan.config.samples_per_client
    points = [n, *(b.exact for b in marks if b.exact)]
    grid = np.unique(np.geomspace(max(1, min(points) / 30), max(points) * 30, 120).round().astype(int))
    once = {cost.algorithm for cost in plan.costs if cost.expected.once_up}
    lines: dict[tuple[int, ...], list[str]] = {}
    for cost in plan.costs:
        work = plan.works[cost.algorithm]
        counts = [_bytes(plan.config, cost.algorithm, work, int(k), convention) for k in grid]
        lines.setdefault(tuple(counts), []).append(cost.algorithm)
    for values, names in lines.items():
        if max(values) > 0:
            colour, style = look_of_algorithm(plan.config.reference(names[-1]))
            label = listed([_title(plan, a) for a in names]) + (", once" if set(names) <= once else "")
            ax.plot(grid, values, color=colour, linestyle=style, label=label)
    for i, at in enumerate(sorted({b.last for b in marks if b.last is not None})):
        same = [b for b in marks if b.last == at]
        against = plan.config.reference(same[0].against_name)
        height = _bytes(plan.config, against, plan.works[against], at, convention)
        colour, _ = look_of_algorithm(plan.config.reference(same[-1].algorithm))
        ax.plot([at], [height], "o", color=colour, markeredgecolor="white", markersize=9, zorder=4)
        ax.annotate(f"{at:,}", (at, height), xytext=(9, -15 - 13 * (i % 2)), textcoords="offset points", fontsize=10)
    ax.axvline(n, color="#777777", linestyle=":", linewidth=1.4)
    ax.annotate(
        " planned", (n, 0.02), xycoords=("data", "axes fraction"), color="#555555", fontsize=10, ha="left", va="bottom"
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("samples per client (log)")
    ax.set_ylabel(f"bytes of all clients per epoch, {convention} (log)")
    _log_ticks(ax, lambda v: _short(v, "B"))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v < 1e6 else f"{v:.0e}"))
    ax.legend(loc="best", fontsize=10)
    where = "different cuts" if plan.kinds and not ranked(plan) else f"cut after {plan.chosen.measured.name}"
    titled(ax, _plain(shortened(f"Bytes over samples, {where}", 48)))


def _bytes(config: PlanConfig, algorithm: str, work: Workload | Mixture, samples: int, convention: Convention) -> int:
    return bytes_of(expect(config.algorithm(algorithm), work.varied(samples_per_client=samples)), convention)


def _options(config: PlanConfig) -> str:
    """The options of the planned algorithms and of the model that have a value."""
    given = {name: value for name, value in config.specific.items() if value not in (None, ())}
    shown = (f"{value:g}" if isinstance(value, float) else str(value) for value in given.values())
    return "".join(f", {name} {value}" for name, value in zip(given, shown, strict=True))


def _smashed_over_cuts(ax: Axes, plan: Plan) -> None:
    _over_cuts(ax, plan, [c.measured.smashed for c in plan.cuts], VERMILLION)
    ax.set_ylabel("smashed data per sample (log)")
    _log_ticks(ax, lambda v: _short(v, "B"))
    titled(ax, "What crosses at each cut")


def _flops_over_cuts(ax: Axes, plan: Plan) -> None:
    _over_cuts(ax, plan, [c.costs.client_flops for c in plan.cuts], BLUE)
    ax.set_ylabel("FLOPs of a client per epoch (log)")
    _log_ticks(ax, lambda v: _short(v, ""))
    titled(ax, "What a client computes")


def _over_cuts(ax: Axes, plan: Plan, values: Sequence[float], colour: str) -> None:
    x = range(len(values))
    shown = [v if v > 0 else math.nan for v in values]
    ax.plot(x, shown, color=colour, alpha=0.5)
    for fits, face in ((True, colour), (False, "white")):
        own = [i for i in x if (plan.cuts[i].strain <= 1) == fits]
        label = "within the budgets" if fits else "beyond the budgets"
        ax.plot(own, [shown[i] for i in own], "o", color=colour, markerfacecolor=face, label=label, markersize=6)
    at = plan.cuts.index(plan.chosen)
    ax.plot([at], [shown[at]], "o", color="#000000", markerfacecolor="none", markersize=13, label="chosen")
    ax.set_yscale("log")
    every = math.ceil(len(values) / _NAMED)
    ticks = list(range(0, len(values), every))
    ax.set_xticks(ticks)
    ax.set_xticklabels(
        [_plain(shortened(plan.cuts[i].measured.name, 16)) for i in ticks], rotation=40, ha="right", fontsize=10
    )
    ax.set_xlabel("cut after, in the order data flows")
    handles, labels = ax.get_legend_handles_labels()
    if not _has_budget(plan.config):
        handles, labels = handles[-1:], labels[-1:]
    ax.legend(handles, labels, loc="best", fontsize=10)


def _log_ticks(ax: Axes, text: Callable[[float], str]) -> None:
    """Numbers at powers of ten; if fewer than two of them are visible, also at 1, 2 and 5."""
    low, high = ax.get_ylim()
    decades = math.log10(high / low)
    if decades < 2:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if decades < 0.35:
        values = sorted({float(f"{v:.2g}") for v in np.geomspace(low, high, 6)[1:-1]})
        ax.yaxis.set_major_locator(FixedLocator(values))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: text(v)))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _short(value: float, unit: str) -> str:
    number, _, rest = format_quantity(value, unit).partition(" ")
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return f"{number} {rest}".strip()


def _title(plan: Plan, name: str) -> str:
    """The title of an algorithm of the plan."""
    return title_of_algorithm(plan.config.reference(name))
