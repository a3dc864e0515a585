"""Shows what a study will do with a client, before any server is contacted, with a fingerprint to approve it.

The fingerprint covers everything that decides what leaves the client and where it goes: all options that both sides
must agree on (the server's are compared with them word for word when the client joins), the defences, the budget, the
client's part of the model, and how the server proves its identity. It does not cover the data or the computing device.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cutlayer.build import load_source
from cutlayer.errors import ConfigError
from cutlayer.options import COSTS, RunConfig, about
from cutlayer.remote.allowance import ROOM, Allowance, statement
from cutlayer.remote.join import Joining, made
from cutlayer.remote.security import ClientSecurity
from cutlayer.remote.worker import OwnTest, Worker
from cutlayer.text import format_bytes, format_duration, plain
from cutlayer.verbs import CLIENT_VERBS

UNCOVERED = frozenset(
    {
        "client_states",
        "data",
        "data_format",
        "data_in_memory",
        "data_workers",
        "device",
        "engine",
        "memory_limit",
        "tune",
        *(name for name, field in RunConfig.model_fields.items() if about(field, "group") == COSTS),
    }
)
"""Options for the place of the data and for the computing device and its speed. They do not change what leaves the
client.
"""


def fingerprint_of(config: RunConfig, joining: Joining, terms: Mapping[str, Any]) -> str:
    """The fingerprint of a client's configuration; `terms` are those of the handshake, as plain values."""
    options = {name: value for name, value in config.resolved().items() if name not in UNCOVERED}
    covered = {
        "options": options,
        "terms": terms,
        "budget": joining.budget.model_dump(),
        "client": joining.name,
        "own data": joining.data is not None,
        "watch": joining.watch,
        "server": joining.address,
        "trust": _trust(joining.security),
    }
    text = json.dumps(covered, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return "-".join(digest[i : i + 4] for i in range(0, len(digest), 4))


def check_approved(config: RunConfig, joining: Sequence[Joining], approved: str) -> None:
    """Raises ConfigError if the client's configuration differs from the approved one, or for several clients, which
    have several fingerprints.
    """
    if len(joining) > 1:
        raise ConfigError(f"{len(joining)} clients have {len(joining)} fingerprints: approve and start each by itself")
    (one,) = joining
    found = _fingerprint(config, one, _alone(config, one))
    if found.replace("-", "") != approved.replace("-", "").strip().lower():
        raise ConfigError(
            f"the fingerprint of what {one.name} is configured to do is {found}, but {plain(approved)!r} was approved: "
            "check what `cutlayer join --show` prints, and approve that if it is what you want",
        )


def shown(config: RunConfig, joining: Sequence[Joining]) -> Iterator[str]:
    """The requests of the study to each client, and what leaves it, as lines. Raises UsageError as `join` does."""
    for one in joining:
        worker = _alone(config, one)
        yield f"{one.name} for the server at {one.address}: {worker.duty.terms.algorithm}"
        yield f"  the server is: {_who(one)}"
        yield from (f"  {line}" for line in _study(config, worker))
        yield f"  privacy: {_privacy(worker)}"
        yield f"  recorded: {one.record or 'nowhere; give --folder or --audit'}"
        yield f"  fingerprint: {_fingerprint(config, one, worker)}"


def _alone(config: RunConfig, joining: Joining) -> Worker:
    """The client, without storing anything or contacting a server."""
    shared = None if joining.data is not None else load_source(config, None)
    return made(config, joining, shared, noise_seed=0, alone=True)


def _fingerprint(config: RunConfig, joining: Joining, worker: Worker) -> str:
    return fingerprint_of(config, joining, msgspec.to_builtins(worker.duty.terms))


def _trust(security: ClientSecurity) -> dict[str, str]:
    """How the server proves its identity, and what this client shows."""
    shows = "a certificate" if security.certificate else "a token" if security.token else "nothing"
    return {
        "authority": _digest(security.ca) if security.ca else "none",
        "name": security.server_name or "",
        "shows": shows,
    }


def _digest(path: Path) -> str:
    """SHA-256 of a file. Raises ConfigError."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}; check the path") from None


def _who(joining: Joining) -> str:
    trust = _trust(joining.security)
    if joining.security.insecure:
        return "not asked who it is, and nothing is encrypted (insecure)"
    host = joining.security.server_name or joining.address.rpartition("/")[2].rpartition(":")[0]
    return (
        f"the holder of a certificate for {host} by the authority {joining.security.ca} (SHA-256 "
        f"{trust['authority'][:16]}...); this client shows {trust['shows']}"
    )


def _study(config: RunConfig, worker: Worker) -> Iterator[str]:
    d = worker.duty
    assert d.purse is not None
    assert d.study is not None
    needs, study, allowance = sorted(d.needs & CLIENT_VERBS), d.study, d.purse.allowance
    rounds = "the server's number of" if study.rounds is None else str(study.rounds)
    yield f"asked: {', '.join(needs)}; evaluate, save its state; nothing else is answered"
    yield f"how often: {rounds} rounds, each of {study.quota} batches of {d.batch} of its {len(d.samples)} rows"
    yield f"at most: {_most(allowance)}"
    for what, when in d.traits.leaving.items():
        yield f"leaves: {what} ({when}){_size(what, worker)}"
    counts = ", and of rows of each class" if d.class_counts else ""
    yield f"leaves: its name, its number of rows{counts}, names of classes and columns, the times of its answers"
    yield f"leaves: what its part of the model gives for the server's test rows{_tested(d.own_test)}"
    stays = {"inputs", *({"labels"} if d.traits.whole or d.traits.u_shaped else ())}
    stays |= set() if d.traits.models_cross else {"its part of the model"}
    yield f"stays: {', '.join(sorted(stays))}"
    yield f"arrives: {', '.join((*d.traits.arriving, *(['the server part, at the end'] if d.whole else [])))}"
    names = [part.entry.name for part in d.defences.in_order]
    yield f"defences: {', '.join(names) or 'none'}; watch: {d.watch}; codec upwards: {config.up_codec}"


def _most(a: Allowance) -> str:
    """The budget in words."""
    counted = f"{a.rounds} rounds, {a.batches} batches trained on, {a.passes} of them sent"
    rest = f"{a.evaluations} requests to evaluate, {a.models} times its model"
    time = "" if a.seconds is None else f", {format_duration(a.seconds)} of work"
    return f"{counted}, {rest}{time} ([budget]; without it {ROOM[0]} times the study and {ROOM[1]} rounds)"


def _size(what: str, worker: Worker) -> str:
    """The size of one row or model, and of everything that is sent, before codecs."""
    d = worker.duty
    assert d.study is not None
    if what == "smashed data":
        shapes = ", ".join(f"{t.dtype} {t.shape}" for t in d.terms.crossing)
        row = sum(math.prod(c.shape) * c.dtype.itemsize for c in d.crossing)
        total = "" if d.study.rounds is None else f", {format_bytes(row * len(d.samples) * _epochs(worker))} in all"
        return f": a row is {shapes}, {format_bytes(row)}{total}, before codecs"
    return f": {format_bytes(worker.client.footprint().model)} each" if what == "models" else ""


def _epochs(worker: Worker) -> int:
    """How often each row is sent in the study, rounded up."""
    d = worker.duty
    assert d.study is not None
    per_epoch = -(-len(d.samples) // d.batch)
    return -(-(d.study.rounds or 0) * d.study.passes // per_epoch)


def _tested(own: OwnTest | None) -> str:
    if own is None:
        return ""
    rows = len(own.samples)
    return f"; {rows} own test rows are held out, of which {'scores' if own.shape == 'whole' else 'smashed data'} go up"


def _privacy(worker: Worker) -> str:
    d = worker.duty
    if d.noise is None:
        return "no noise is added to what leaves: nothing is guaranteed"
    assert d.purse is not None
    planned = f"in the study: {statement(d.noise, max(1, _epochs(worker)), d.delta)}"
    most = d.purse.allowance.releases or -(-d.purse.allowance.passes // -(-len(d.samples) // d.batch))
    return f"{planned} At most, by its budget: {statement(d.noise, max(1, most), d.delta)}"
