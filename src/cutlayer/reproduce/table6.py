"""The costs in Tables 4 and 6: counted and modelled, not trained. They do not depend on seeds.

The closed forms are those of `costs/expect.py`, which tests hold equal to the ledger and the clock of real runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from cutlayer.build import load_source
from cutlayer.costs.expect import Expected, Workload, expect
from cutlayer.costs.fleet import fleet
from cutlayer.costs.measure import example, load_model, measure, placed
from cutlayer.errors import ConfigError
from cutlayer.models import build
from cutlayer.models.blocks import places
from cutlayer.options import RunConfig, default_cut, traits
from cutlayer.plugins import find, is_reference
from cutlayer.report.looks import title_of_algorithm
from cutlayer.reproduce import formulas
from cutlayer.reproduce.cells import TABLE4_METHODS, Study
from cutlayer.text import format_bytes, format_quantity

FLEET = {"client_device": "raspberry-pi-4", "link": "lte", "server_device": "h100"}
FLEET_TEXT = (
    "Time and energy are modelled: the clients are Raspberry Pi 4 on LTE (5.64 Mbit/s up, 12.74 down), and the server "
    "is an H100 at its peak. Energy is the marginal energy of all clients together."
)
_COMMUNICATING: tuple[formulas.Method, ...] = ("fl", "psl", "sfl", "sglr")
_SAVED = 94.7  # percent, Table 4's client against federated learning


@dataclass(frozen=True)
class Fact:
    """A claim that counting settles, without a test."""

    name: str
    title: str
    sentence: str
    holds: bool
    evidence: str
    settled_by: Literal["", "by construction", "counted"] = ""

    @property
    def word(self) -> str:
        """The verdict. A result of our own choices is not a finding, and neither is a number of another model than the
        claim's.
        """
        if self.settled_by:
            return self.settled_by
        return "holds" if self.holds else "does not hold"


def of_method(study: Study, method: str, epochs: int = 1) -> Expected:
    """Costs of Table 4's setting with one method, for this number of epochs."""
    config = study.method(method, study.size.rates[0]).config
    machines = fleet(config.model_copy(update=FLEET), config.clients)
    algorithm = config.thing("algorithm", method)
    return expect(algorithm, replace(trained_work(study), epochs=epochs), machines)


@cache
def trained_work(study: Study) -> Workload:
    """An epoch of Table 4's setting with the trained model. Raises ConfigError if it cannot be measured."""
    config = study.method("sglr", study.size.rates[0]).config
    return _work(config, config.cut or default_cut(config.model), config.options_of(find("model", config.model)))


@cache
def _alexnet(study: Study) -> Workload | None:
    """The same with the paper's model; None with a model of the user's choice, or for data that it does not take."""
    if study.another_model:
        return None
    config = study.method("sglr", study.size.rates[0]).config.model_copy(update={"model": "alexnet"})
    try:
        return _work(config, default_cut("alexnet"), {})
    except ConfigError:
        return None


def _work(config: RunConfig, cut: str | None, options: dict[str, Any]) -> Workload:
    source = load_source(config, None)
    train = source.train.form
    if len(train.rows) > 1:
        raise ConfigError(
            f"an input of {source.name} is {len(train.rows)} tensors, but the tables count the bytes and FLOPs of one: "
            "give data with one tensor per input, or train them with `cutlayer compare`"
        )
    x = train.rows[0]
    shape = tuple(x.shape[1:])
    width = config.thing("task", config.task).width(source.train.y, source.classes)
    made = build if is_reference(config.model) else load_model  # a user's own model may read the values of its tensors
    net = placed(made(config.model, shape, width, **options), x.dtype)
    if cut is None:
        raise ConfigError(
            f"model {config.model!r} does not say where it is cut: name a module of it with --cut ({places(net)})"
        )
    return measure(net, cut, example(shape, x.dtype)).workload(
        clients=config.clients,
        samples_per_client=config.samples_per_client or 0,
        batch=config.batch,
        label=train.y[:1].nbytes,
        raw=x[:1].nbytes,
    )


def computation(study: Study) -> tuple[tuple[str, ...], list[tuple[str, tuple[str, ...]]]]:
    """Table 4's computation per client and epoch: the names of the columns, and each method's numbers. These are of the
    trained model, and of AlexNet if it is the paper's model that is meant; as truly counted, as the paper counts, and
    that as a share of FL's.
    """
    trained, alexnet = trained_work(study), _alexnet(study)
    name = study.model_names[1]
    columns = (name, "AlexNet", "AlexNet, 3 x forward") if alexnet else (name, f"{name}, 3 x forward")
    papers = alexnet or trained
    rows: list[tuple[str, tuple[str, ...]]] = []
    for method in TABLE4_METHODS:
        counted = [_per_client(method, w, counted=True) for w in (trained, alexnet) if w is not None]
        theirs = _per_client(method, papers, counted=False)
        share = theirs / _per_client("fl", papers, counted=False)
        numbers = (*(format_quantity(n, "FLOP") for n in (*counted, theirs)), f"{100 * share:.1f} %")
        rows.append((title_of_algorithm(method), numbers))
    return columns, rows


def _per_client(method: str, w: Workload, *, counted: bool) -> float:
    """FLOPs per epoch of a client, or in centralised learning of the one machine."""
    of_method = traits(method)
    part = w.flops.whole if of_method.whole else w.flops.at_client
    each = part.training if counted else part.three_forwards
    return each * w.samples_per_client * (w.clients if of_method.central else 1)


def communication(study: Study) -> list[tuple[str, tuple[str, ...]]]:
    """Table 6: (method, (worked example by its formula, then bytes per epoch of what is trained, per convention))."""
    rows: list[tuple[str, tuple[str, ...]]] = []
    for method in _COMMUNICATING:
        e = of_method(study, method)
        example = formulas.total(method, formulas.EXAMPLE)
        rows.append(
            (
                title_of_algorithm(method),
                (
                    f"{example:,.10g} MB",
                    format_bytes(e.paper),
                    format_bytes(e.unicast),
                    format_bytes(e.broadcast),
                ),
            )
        )
    return rows


def facts(study: Study) -> list[Fact]:
    """Claims 7 and 8: client computation, communication."""
    work = trained_work(study)
    found = [_saved_by_cutting(study, work)]
    sglr = of_method(study, "sglr")
    for other in ("sfl", "fl"):
        e = of_method(study, other)
        title = title_of_algorithm(other)
        for name, mine, theirs in (
            ("wire-unicast", sglr.unicast, e.unicast),
            ("wire-broadcast", sglr.broadcast, e.broadcast),
        ):
            found.append(
                Fact(
                    f"traffic-{other}-{name}",
                    f"SGLR sends less than {title} ({name})",
                    f"SGLR's communication per epoch is below {title}'s, counted as {name}.",
                    mine < theirs,
                    f"{_against(mine, theirs)} here; {_until(_break_even(study, work, other, name))}",
                )
            )
    return found


def _saved_by_cutting(study: Study, work: Workload) -> Fact:
    """Claim 7: the computation that a client saves, by the paper's count for AlexNet, and by the true count for the
    trained model.
    """
    alexnet = _alexnet(study)
    papers = alexnet or work
    saved = 100 * (1 - papers.flops.client.three_forwards / papers.flops.whole.three_forwards)
    truly = 100 * (1 - work.flops.client.training / work.flops.whole.training)
    trained = f"{truly:.1f} % for the {study.model_names[1]} trained here, counted exactly"
    if alexnet is None:
        return Fact(
            "client-compute",
            "how much less a client computes than in FL",
            "A client of split learning computes less than one of federated learning: 94.7 % less with the paper's "
            "AlexNet (Table 4).",
            round(saved, 1) >= _SAVED,
            f"{saved:.1f} % as the paper counts, {trained}",
            "counted",
        )
    return Fact(
        "client-compute",
        "a client computes 94.7 % less than in FL",
        "With AlexNet, a client of split learning computes 94.7 % less than one of federated learning (Table 4).",
        round(saved, 1) >= _SAVED,
        f"{saved:.1f} % as the paper counts (the paper gives no widths for its AlexNet; ours are chosen to give this "
        f"number); {trained}",
        "by construction",
    )


def _against(mine: int, theirs: int) -> str:
    """Two numbers of bytes, exact if three digits do not distinguish them."""
    texts = [format_bytes(n) for n in (mine, theirs)]
    if texts[0] == texts[1] and mine != theirs:
        texts = [f"{n:,} B" for n in (mine, theirs)]
    return " against ".join(texts)


def _until(even: float) -> str:
    """The number of samples up to which SGLR sends less, if both send the same at `even`."""
    if even == math.inf:
        return "below it at any number of samples"
    most = math.ceil(even) - 1
    return f"below it up to {most:,} samples per client and epoch" if most > 0 else "below it at no number of samples"


def _break_even(study: Study, w: Workload, other: str, convention: str) -> float:
    """Samples per client from which SGLR sends more than `other` in an epoch; infinite if it never does."""

    def gap(samples: int) -> int:
        methods = (study.method(m, study.size.rates[0]).config.thing("algorithm", m) for m in ("sglr", other))
        a, b = (expect(m, replace(w, samples_per_client=samples)) for m in methods)
        unicast = convention == "wire-unicast"
        return (a.unicast - b.unicast) if unicast else (a.broadcast - b.broadcast)

    # Both are linear in the number of samples: two points give the line.
    at, slope = gap(0), gap(1) - gap(0)
    return math.inf if slope <= 0 else max(0.0, -at / slope)


def spent(study: Study, method: str, evaluation: dict[str, Any]) -> dict[str, float]:
    """Virtual seconds and joules up to an evaluation of a run of Table 4."""
    e = of_method(study, method, round(evaluation["epochs"]))
    assert e.seconds is not None
    assert e.clients is not None
    return {"virtual_seconds": e.seconds, "clients_marginal_joules": e.clients.marginal or 0.0}
