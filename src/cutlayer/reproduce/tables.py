"""The tables: ours beside the paper's. A table is one function of the outcomes, entered in `SECTIONS`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from operator import attrgetter
from typing import Any

from cutlayer.errors import ConfigError, unknown
from cutlayer.report.looks import title_of_algorithm
from cutlayer.reproduce.cells import (
    ALPHAS,
    ALPHAS_WITH_PHI,
    LEAKING_DEFENCES,
    LEAKING_METHODS,
    LEAKING_PHIS,
    PHASES,
    PHIS,
    SKEW,
    TABLE4_METHODS,
    Cell,
    Study,
)
from cutlayer.reproduce.contest import contest
from cutlayer.reproduce.outcomes import Outcomes, Score
from cutlayer.summary import spread
from cutlayer.text import format_bytes, listed

DASH = "\N{EN DASH}"
Rows = dict[str, tuple[float, float, str | None]]  # label -> alpha, phi, phase


@dataclass(frozen=True)
class Table:
    """A table as every page shows it: rows of scores or ready texts, below a title; `text` says how to read it."""

    name: str
    title: str
    head: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Score | str, ...]], ...]
    text: str


@dataclass(frozen=True)
class Chapter:
    """The meaning of one name on the command line: the cells to train, and the tables made from them."""

    cells: Callable[[Study], Iterator[Cell]]
    tables: Callable[[Outcomes], list[Table]]


def table1(outcomes: Outcomes) -> list[Table]:
    """SplitLr: alpha by number of clients (paper, Table 1)."""
    rows: Rows = {f"alpha {alpha:g}": (alpha, 0.0, None) for alpha in ALPHAS}
    text = (
        "The server's learning rate is the clients' rate times C^alpha; alpha 0 means no SplitLr. SplitAvg is not used."
    )
    return [_by_clients(outcomes, "table1", "Table 1: SplitLr", "", rows, text)]


def table2(outcomes: Outcomes) -> list[Table]:
    """SplitLr and SplitAvg: alpha and phi by number of clients (paper, Table 2)."""
    rows: Rows = {f"alpha {alpha:g}, phi {phi:g}": (alpha, phi, None) for alpha in ALPHAS_WITH_PHI for phi in PHIS}
    text = (
        "In each step, a random fraction phi of the clients back-propagates one common gradient; phi 0 means no "
        "SplitAvg."
    )
    return [_by_clients(outcomes, "table2", "Table 2: SplitLr and SplitAvg", "", rows, text)]


def table3(outcomes: Outcomes) -> list[Table]:
    """Phased SplitAvg (paper, Table 3)."""
    rows: Rows = {"none": (1.0, 0.0, None)}
    rows |= {phase: (1.0, 1.0, phase) for phase in PHASES}
    text = (
        "Alpha is 1. All clients back-propagate the common gradient (phi 1) during the first or last part of the "
        "training, all the time (full) or never (none)."
    )
    return [_by_clients(outcomes, "table3", "Table 3: SplitAvg in phases", "when", rows, text)]


def table4(outcomes: Outcomes) -> list[Table]:
    """The methods at their chosen rates (paper, Table 4), and all tried rates."""
    size, theirs = outcomes.study.size, paper()["table4"]
    best, tried = [], []
    for method in TABLE4_METHODS:
        title, rate, chosen = title_of_algorithm(method), outcomes.chosen_rate(method), outcomes.chosen(method)
        none = Score(None, None, 0, len(size.seeds), 0, theirs[method])
        score = none if chosen is None else outcomes.score(chosen, theirs[method])
        best.append((title, (score, DASH if rate is None else f"{rate:g}")))
        cells = [outcomes.study.method(method, r) for r in size.rates]
        each = [(outcomes.score(cell, by=attrgetter("validation")), outcomes.score(cell)) for cell in cells]
        tried.append((title, tuple(score for pair in each for score in pair)))
    own = outcomes.study.method("sglr", size.rates[0]).config.specific
    text = (
        f"{size.methods_clients} clients, {outcomes.study.model_names[1]} (paper: AlexNet). Each method uses the "
        f"learning rate with the highest best validation accuracy (mean over seeds) among the same {len(size.rates)} "
        f"rates, so all had equal tuning effort; SGLR's alpha {own['alpha']:g} and phi {own['phi']:g} were not tuned "
        "further."
    )
    columns = tuple(c for rate in size.rates for c in (f"validation, {rate:g}", f"test, {rate:g}"))
    rates = (
        "For each learning rate: the best validation accuracy, by which the rate is chosen, and the test accuracy at "
        "that evaluation."
    )
    return [
        Table("table4", "Table 4: the methods", "method", ("accuracy", "rate"), tuple(best), text),
        Table("table4-rates", "Table 4: all rates that were tried", "method", columns, tuple(tried), rates),
        _computation(outcomes.study),
    ]


def _computation(study: Study) -> Table:
    """Table 4's last column: what a client computes."""
    from cutlayer.reproduce import table6  # here, not above: it needs torch

    theirs = paper()["table4-compute"]
    columns, computed = table6.computation(study)
    rows = tuple(
        (title, (*values, f"{theirs[method]:g} PFLOP"))
        for method, (title, values) in zip(TABLE4_METHODS, computed, strict=True)
    )
    columns = (*columns, "of FL", "paper, whole training")
    text = (
        f"Per client and epoch of {study.size.samples_per_client} samples (for CL, of the one machine that has all "
        "clients' data). FLOPs are counted on the real modules. The paper counts three forward passes, which "
        "overstates the first layers, since their inputs need no gradient. "
    )
    text += (
        "The paper gives no widths for its AlexNet; ours are chosen to match its share."
        if "AlexNet" in columns
        else "The paper's numbers are those of its AlexNet on Fashion-MNIST."
    )
    return Table("table4-compute", "Table 4: computation of a client", "method", columns, rows, text)


def table6(outcomes: Outcomes) -> list[Table]:
    """Communication per epoch (paper, Table 6 and section 4.4)."""
    from cutlayer.reproduce import table6

    study = outcomes.study
    size = study.size
    columns = ("worked example, by formula", "counted as the paper", "wire-unicast", "wire-broadcast")
    text = (
        "Bytes of all clients together, per epoch. The worked example is that of section 4.4: 100 clients, phi 0.5, "
        "50 000 samples with 0.024 MB of smashed data each, models of 200 and 67 MB. The paper's numbers for it are "
        f"the same. The other columns: {size.methods_clients} clients with {size.samples_per_client} samples each, "
        f"{study.model_names[1]}, as a run's ledger counts. The paper leaves out labels and counts SplitAvg's common "
        "gradient once per epoch. On a wire, it is sent in every step: once if the network can broadcast, otherwise "
        "once to every active client. In the latter case, SGLR sends as much as PSL."
    )
    return [Table("table6", "Table 6: communication", "method", columns, tuple(table6.communication(study)), text)]


def skew(outcomes: Outcomes) -> list[Table]:
    """The contest under label skew (beyond the paper): accuracies, traffic, and how the rates were chosen."""
    study, extent = outcomes.study, outcomes.study.extent
    settings = study.contest()
    methods = list(dict.fromkeys(m for names in settings.values() for m in names))

    def score(setting: str, method: str) -> Score | str:
        there = method in settings[setting]
        return outcomes.score(study.contestant(setting, method)) if there else ""

    rows = tuple((m, tuple(score(s, m) for s in settings)) for m in methods)
    text = (
        f"{study.size.skewed_clients} clients. “+ client” and “+ both”: the logits are adjusted for the gradients "
        "that clients receive, or also for the server's step. “global”: each step's rows are drawn from all data. "
        "SLR and SGLR use alpha 1, and SGLR uses phi 0.5; neither is tuned. Dirichlet: each class is divided in "
        "proportions drawn from a Dirichlet distribution. The smaller its parameter, the stronger the skew; clients "
        "also differ in size. 2 shards: each client holds about two classes. Half take part: five of ten clients, "
        "drawn in each round. CL has all data in one place, so its result is the same in all settings."
    )
    sent = tuple((m, _sent(outcomes, next(s for s in settings if m in settings[s]), m)) for m in methods)
    tuned = tuple(dict.fromkeys(extent.tuning(s) for s in settings))
    tried = tuple((m, tuple(_tried(outcomes, s, m) for s in tuned)) for m in methods)
    rates = listed([f"{rate:g}" for rate in extent.rates])
    others = [f"{s} uses the rates that were chosen for {extent.tuning(s)}" for s in settings if extent.tuning(s) != s]
    return [
        Table("skew", "Label skew: accuracy", "method", tuple(settings), rows, text),
        Table(
            "skew-traffic",
            "Label skew: traffic of a whole training",
            "method",
            ("up", "down", "up + down", f"beyond {contest(SKEW).baseline}", "up + down, broadcast"),
            sent,
            "Bytes of all clients together in the method's first setting, mean over seeds. Broadcast: a message that "
            "is the same for several clients is counted once.",
        ),
        Table(
            "skew-rates",
            "Label skew: how rates were chosen",
            "method",
            tuned,
            tried,
            f"Validation accuracy at the rates {rates}, and the chosen rate, on seed {extent.tuning_seed}, "
            f"which is not reported. {'; '.join(others)}{'.' * bool(others)}".strip(),
        ),
    ]


def _sent(outcomes: Outcomes, setting: str, method: str) -> tuple[str, ...]:
    """Up, down, both, both beyond the baseline's, both with broadcast."""
    own, base = (
        [o.evaluations[-1] for o in outcomes.of(outcomes.study.contestant(setting, m)).values() if not o.diverged]
        for m in (method, contest(SKEW).baseline)
    )
    if not own:
        return (DASH,) * 5
    up, down, broadcast = (mean_of(own, f"bytes_{way}") for way in ("up", "down", "down_broadcast"))
    more = up + down - mean_of(base, "bytes_up") - mean_of(base, "bytes_down") if base else None
    beyond = DASH if more is None else "less" if more < 0 else format_bytes(round(more))
    return (*(format_bytes(round(n)) for n in (up, down, up + down)), beyond, format_bytes(round(up + broadcast)))


def mean_of(evaluations: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean of a number over evaluations."""
    return statistics.fmean(e[name] for e in evaluations)


def _tried(outcomes: Outcomes, tuned: str, method: str) -> str:
    """Validation accuracies of the trials in that setting, and the rate that was chosen."""
    study = outcomes.study
    of = [s for s, methods in study.contest().items() if study.extent.tuning(s) == tuned and method in methods]
    if not of:
        return ""
    cell = study.contestant(of[0], method)
    if outcomes.cells[cell.name].trials:
        return DASH
    done = [o for trial in cell.trials for o in outcomes.of(trial).values()]
    found = ["diverged" if o.diverged else f"{o.validation:.1f}" for o in done]
    return f"{', '.join(found)}: {outcomes.cells[cell.name].config.client_lr:g}"


def table5(outcomes: Outcomes) -> list[Table]:
    """Reconstruction by phi (paper, Table 5)."""
    study, theirs = outcomes.study, paper()["table5"]
    rows = tuple(
        (f"phi {phi:g}", (*_leaks(outcomes, study.by_phi(phi)), f"{theirs[f'{phi:g}']:.4f}")) for phi in LEAKING_PHIS
    )
    text = (
        f"SGLR (SLR at phi 0), {study.size.methods_clients} clients, {study.size.leakage_epochs} epochs; accuracy is "
        "that at the end. If phi x clients, rounded, is one, nothing is averaged. MSE: the mean squared error of a "
        "decoder, trained on samples that no client has by an attacker that knows the client part, with pixels scaled "
        "to [-1, 1]. The paper does not say what its decoder was trained on, nor how its pixels are scaled. Compare "
        "the trend of the numbers, not their values."
    )
    return [Table("table5", "Table 5: reconstruction", "", (*_LEAKS, "paper"), rows, text)]


def leakage(outcomes: Outcomes) -> list[Table]:
    """The effect of methods, depths of the cut and defences (beyond the paper)."""
    study = outcomes.study
    cuts = study.cuts
    methods = tuple((title_of_algorithm(m), _leaks(outcomes, study.attacked(m))) for m in LEAKING_METHODS)
    depths = tuple((f"after {cut}", _leaks(outcomes, study.at_depth(cut))) for cut in cuts)
    defences = tuple(
        (f"{kind}, {strength}", _leaks(outcomes, study.defended(kind, strength)))
        for kind, own in LEAKING_DEFENCES.items()
        for strength in own
    )
    none = (("none", _leaks(outcomes, study.attacked("psl"))),)
    text = (
        "An attacker that knows the client part trains a decoder on samples that no client has. Explained: 1 - MSE / "
        "(MSE of the mean input); 0 means that the attack has learned nothing. The attacker sees each sample sent "
        "once. Distance correlation: the unbiased squared estimate. At most, once: the smallest upper bound on the "
        "information about an input in one transmission, in nats; infinite for a client part without noise or coarse "
        "codes. Epsilon: differential privacy of all transmissions of a sample together, at delta 1e-5 (Laplace "
        "noise: 0); the documentation of leakage states its limits. None: nothing is guaranteed. These runs have "
        "{study.size.leakage_epochs} epochs; accuracy is that at the end."
    )
    skipped = (
        " CL and FL send no smashed data. FL sends models, which are open to gradient inversion. That is another "
        "channel and is not measured here."
    )
    return [
        Table("leakage-methods", "Leakage: methods", "method", _LEAKS, methods, text + skipped),
        Table("leakage-depth", "Leakage: depth of the cut", "PSL cut", _LEAKS, depths, text),
        Table("leakage-defences", "Leakage: defences", "PSL with", _LEAKS, none + defences, text),
    ]


_LEAKS = ("accuracy", "MSE", "explained", "SSIM", "classified", "distance correlation", "at most, once", "epsilon")


def _leaks(outcomes: Outcomes, cell: Cell) -> tuple[Score | str, ...]:
    """The results of a cell, over its seeds."""
    found = [o.leakage[-1] for o in outcomes.of(cell).values() if o.leakage]
    attacks = [f["attacks"]["model"] for f in found]

    def text(values: Sequence[float | None], form: str) -> str:
        known = [v for v in values if v is not None]
        mean, std = spread(known)
        if mean is None or len(known) < len(values):
            return DASH
        return format(mean, form) + (f" ± {format(std, form)}" if std else "")

    bounds = [[b["nats"] for b in f["upper"] if b["nats"] is not None] for f in found]
    most = text([min(b) for b in bounds], ".0f") if bounds and all(bounds) else "infinite" if bounds else DASH
    return (
        outcomes.score(cell, by=attrgetter("last")),  # of the models that were attacked
        text([a["attack"]["mse"] for a in attacks], ".4f"),
        text([a["explained"] for a in attacks], ".3f"),
        text([a["attack"]["ssim"] for a in attacks], ".3f"),
        text([a["attack"]["accuracy"] for a in attacks], ".3f"),
        text([f["dependence"]["unbiased_squared"] for f in found], ".3f"),
        most,
        text([f["privacy"]["epsilon"] for f in found], ".3g") if found and all(f["privacy"] for f in found) else "none",
    )


SECTIONS: dict[str, Chapter] = {
    "table1": Chapter(Study.table1, table1),
    "table2": Chapter(Study.table2, table2),
    "table3": Chapter(Study.table3, table3),
    "table4": Chapter(Study.table4, table4),
    "table6": Chapter(lambda _: iter(()), table6),
    "fig5": Chapter(Study.table4, lambda _: []),  # curves of Table 4's runs
    "skew": Chapter(Study.skew, skew),
    "table5": Chapter(Study.table5, table5),
    "leakage": Chapter(Study.leakage, leakage),
}
BY_NAME = frozenset({SKEW, "table5", "leakage"})
"""Parts that `all` does not mean: `skew` is not the paper's, the others need the extra `leakage`."""
BEYOND = frozenset({SKEW})
"""Parts that make their own page if no part of the paper is requested."""


def named(names: Iterable[str]) -> tuple[str, ...]:
    """The requested parts, in the order of the paper; no parts, or `all`, mean all. Raises ConfigError for unknown
    ones.
    """
    asked = set(names) or {"all"}
    for name in asked:
        if name not in {*SECTIONS, "all"}:
            raise ConfigError(unknown("table", name, [*SECTIONS, "all"]))
    return tuple(name for name in SECTIONS if name in asked or ("all" in asked and name not in BY_NAME))


def cells_of(study: Study, names: Sequence[str]) -> dict[str, Cell]:
    """The cells of these parts by name, each once."""
    return {cell.name: cell for name in names for cell in SECTIONS[name].cells(study)}


def shown(score: Score | str) -> str:
    """Our side of a cell: 84.12 ± 0.31; a dash if nothing is known; peculiarities in brackets."""
    if isinstance(score, str):
        return score
    if score.mean is None:
        return DASH
    if score.diverged == score.seeds > 0:
        number = "diverged"
    else:
        number = f"{score.mean:.2f}" + ("" if score.std is None else f" ± {score.std:.2f}")
    notes = [f"{score.diverged} diverged"] if 0 < score.diverged < score.seeds else []
    if score.seeds < score.planned:
        notes.append(f"{score.seeds} seed{'s' * (score.seeds > 1)}")
    return number + (f" [{listed(notes)}]" if notes else "")


def paper_of(score: Score | str) -> str:
    """The paper's side of a cell; empty if it has no number."""
    return "" if isinstance(score, str) or score.paper is None else f"{score.paper:.2f}"


def _by_clients(outcomes: Outcomes, name: str, title: str, head: str, rows: Rows, text: str) -> Table:
    """A table of (alpha, phi, phase) by number of clients, beside the paper's table of that name."""
    study, theirs = outcomes.study, paper()[name]

    def score(label: str, clients: int) -> Score:
        there = clients in theirs["clients"]
        paper = theirs["rows"][label][theirs["clients"].index(clients)] if there else None
        return outcomes.score(study.grid(clients, *rows[label]), paper)

    lines = tuple((label, tuple(score(label, c) for c in study.size.clients)) for label in rows)
    return Table(name, title, head, tuple(f"C = {c}" for c in study.size.clients), lines, text)


@cache
def paper() -> Any:
    """The numbers of the paper's tables, by the names of ours and their rows."""
    return json.loads(resources.files("cutlayer.reproduce").joinpath("paper.json").read_text("utf-8"))
