"""Of all possible requests, a client answers those that its own configuration needs, and no others. It raises only
named errors, whatever it is asked and in whatever order.
"""

from __future__ import annotations

import logging
import math
import random
import threading
from functools import cache
from typing import Any

import pytest
import torch
from support import ALGORITHMS, difference  # type: ignore[import-not-found]

from cutlayer.build import load_source
from cutlayer.errors import CutlayerError, ForbiddenError, WireError
from cutlayer.options import BudgetConfig, RunConfig
from cutlayer.remote.carrier import Answer, StoppedError
from cutlayer.remote.sides import worker_of
from cutlayer.remote.worker import Worker
from cutlayer.verbs import ALIGN, AVERAGE, BACKWARD, BACKWARD_TOGETHER, FIT, FORWARD, HAND_OVER, LEARN, TAIL
from cutlayer.wire import Frame, encode, encode_named, pack, unpack
from cutlayer.wire import messages as m

REMOTE = [a for a in ALGORITHMS if a != "cl"]
SMALL: dict[str, Any] = {
    "data": "digits",
    "model": "mlp",
    "clients": 2,
    "samples_per_client": 12,
    "batch": 4,
    "test": 10,
    "rounds": 2,
}
OWN: dict[str, dict[str, Any]] = {
    "ussl": {"cut": "hidden1", "tail_cut": "hidden2"},
    **{a: {"sampling": "fixed"} for a in ("gpsl", "gscala")},
}

# Everything that a server could ask, with the fields that decide whether the client permits it.
REQUESTS: dict[str, m.Message] = {
    "round": m.BeginRound(0, 2, 1.0, 3),
    "a round that is too long": m.BeginRound(0, 2, 1.0, 4),
    "forward": m.Forward(1, True),
    "forward without labels": m.Forward(1, False),
    "a batch by its number": m.Forward(1, True, 0),
    "tail": m.Tail(1, 4),
    "own": m.Backward(1, "own", 4),
    "common": m.Backward(1, "common", 4),
    "held": m.Backward(1, "own", 4, hold=True),
    "give gradient": m.GiveGradient(1),
    "take gradient": m.TakeGradient(1, 1.0, False),
    "settle": m.Settle(1),
    "fit": m.Fit(1),
    "learn": m.Learn(1, 1),
    "take head": m.TakeHead(1),
    "give model": m.GiveModel(1),
    "take model": m.TakeModel(1),
    "take server": m.TakeServer(1, 1),
    "give optimizer": m.GiveOptimizer(1),
    "take optimizer": m.TakeOptimizer(1),
    "lower": m.Evaluate(1, "lower", 4),
    "whole": m.Evaluate(1, "whole", 4),
    "evaluate tail": m.Evaluate(1, "tail", 4),
    "own forward": m.OwnForward(1, 4, 0),
    "own finish": m.OwnFinish(1, 4, 0),
    "scores": m.GiveScores(1),
    "prepare": m.Save(1, "prepare"),
    "commit": m.Save(1, "commit"),
}
ALWAYS = {"round", "settle", "prepare", "commit"}
NEEDED: dict[str, set[str]] = {  # permitted requests for each verb of an algorithm
    FORWARD: {"forward", "forward without labels", "lower"},
    BACKWARD: {"own"},
    TAIL: {"tail", "evaluate tail"},
    FIT: {"fit", "whole"},
    LEARN: {"learn"},
    ALIGN: {"take head"},
    AVERAGE: {"give model", "take model"},
    HAND_OVER: {"give model", "take model"},
    BACKWARD_TOGETHER: {"held", "give gradient", "take gradient", "take model", "take optimizer"},
}


def permitted(worker: Worker) -> set[str]:
    """The requests that this client should answer, according to the needs of its algorithm."""
    needs = worker.duty.needs & NEEDED.keys()
    found = ALWAYS.union(*(NEEDED[verb] for verb in needs)) | ({"common"} if worker.duty.shares else set())
    return found - ({"forward"} if TAIL in needs else set())


SPLIT = {"forward", "forward without labels", "own", "lower"}
LITERALLY: dict[str, set[str]] = {  # one algorithm of each kind, written out
    "psl": SPLIT,
    "sglr": SPLIT | {"common"},
    "sfl": SPLIT | {"give model", "take model"},
    "ussl": (SPLIT | {"tail", "evaluate tail", "give model", "take model"}) - {"forward"},
    "fl": {"fit", "whole", "give model", "take model"},
    "gpsl": (SPLIT | {"held", "give gradient", "take gradient", "take model", "take optimizer"}) - {"own"},
}
OPTIONS: dict[str, tuple[dict[str, Any], list[str], set[str]]] = {  # requests that these options also permit
    "hand_over_optimizer": ({"hand_over_optimizer": True}, ["ssl", "ussl"], {"give optimizer", "take optimizer"}),
    "cache_features": ({"cache_features": True, "freeze": "hidden"}, ["psl"], {"a batch by its number"}),
}


@cache
def source() -> Any:
    return load_source(RunConfig.of(SMALL), None)


def client(algorithm: str, **options: Any) -> Worker:
    config = RunConfig.of({**SMALL, **OWN.get(algorithm, {}), "algorithm": algorithm, **options})
    return worker_of(config, 0, name="client-0", data=source(), budget=BudgetConfig(max_rounds=1000))


def ask(worker: Worker, message: m.Message, body: bytes = b"") -> Answer | None:
    """Send a request in the form that a network delivers."""
    return worker.handle(unpack(pack(message, [body], 0, 1), "to client"))


def refused(worker: Worker, name: str) -> bool:
    """Whether a client in a round refuses a request because it is not permitted. If so, nothing has changed. A
    permitted request may still fail because it lacks its body.
    """
    ask(worker, REQUESTS["round"])
    before = {n: t.clone() for n, t in worker.client.module.state_dict().items()}
    smashed = worker.client.smashed
    found = complaint(worker, REQUESTS[name])
    if not isinstance(found, ForbiddenError):
        return False
    assert difference(before, dict(worker.client.module.state_dict())) == 0
    assert worker.client.smashed is smashed
    return True


def complaint(worker: Worker, message: m.Message, body: bytes = b"") -> CutlayerError | None:
    """The error that a request causes, or None."""
    try:
        ask(worker, message, body)
    except CutlayerError as error:
        return error
    return None


@pytest.mark.parametrize("algorithm", REMOTE)
def test_a_client_answers_what_its_algorithm_needs_and_nothing_else(
    algorithm: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker = client(algorithm)
    found = {name for name in REQUESTS if not refused(worker, name)}
    assert found == permitted(worker)
    if algorithm in LITERALLY:
        assert found - ALWAYS == LITERALLY[algorithm]
    lines = [r for r in caplog.records if r.levelno == logging.ERROR and "client-0 leaves: " in r.message]
    assert len(lines) == len(REQUESTS) - len(found)


@pytest.mark.parametrize("option", OPTIONS)
def test_what_else_a_client_answers_if_its_own_configuration_says_so(option: str) -> None:
    options, algorithms, more = OPTIONS[option]
    for algorithm in algorithms:
        for name in more:
            assert refused(client(algorithm), name)
            assert not refused(client(algorithm, **options), name)


def test_every_message_of_a_server_is_in_the_table() -> None:
    asked = {type(message) for message in REQUESTS.values()}
    assert asked == set(m.FromServer.__args__) - {m.Welcome, m.Refused, m.Bye}
    for message in (m.Welcome(0, 1, 0, client("psl").duty.terms), m.Refused("run", "x"), m.Bye("x")):
        with pytest.raises(WireError, match="is not a request that a client answers"):
            ask(client("psl"), message)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([m.Forward(1)], "Forward without a round begun"),
        ([REQUESTS["round"], *[m.Forward(s) for s in range(1, 5)]], "Forward after all 3 batches of the round"),
        ([m.BeginRound(2, 2, 1.0, 1)], "begins round 2 of 2"),
        ([REQUESTS["round"], m.Backward(1, "own", 4)], "a gradient came where a forward pass is due"),
        ([REQUESTS["round"], m.Forward(1), m.Backward(1, "own", 3)], "a gradient of 3 rows came for a batch of 4"),
        ([REQUESTS["round"], m.Forward(1), m.Backward(1, "common", 1)], "a gradient came that clients share"),
        ([m.Evaluate(1, "lower", 0)], "asks to evaluate 0 rows at once"),
        ([m.Evaluate(1, "lower", 1025)], "asks to evaluate 1025 rows at once"),
    ],
)
def test_what_comes_at_a_wrong_moment_is_refused(asked: list[m.Message], said: str) -> None:
    worker = client("psl")
    *before, last = asked
    for message in before:
        ask(worker, message)
    with pytest.raises(WireError, match=said):
        ask(worker, last)


def test_local_training_is_done_once_in_a_round() -> None:
    worker = client("fl")
    ask(worker, REQUESTS["round"])
    first, again = ask(worker, m.Fit(1)), ask(worker, m.Fit(1))
    assert first == again  # the first answer was lost on its way
    with pytest.raises(ForbiddenError, match="Fit after all 3 batches of the round"):
        ask(worker, m.Fit(2))


def test_a_tail_comes_once_and_before_the_gradient() -> None:
    worker = client("ussl")
    ask(worker, REQUESTS["round"])
    ask(worker, m.Forward(1, False))
    with pytest.raises(WireError, match="a gradient came where the tail's turn is due"):
        ask(worker, m.Backward(1, "own", 4))
    features = b"".join(map(bytes, encode([torch.zeros(4, 128)])))
    ask(worker, m.Tail(1, 4), features)
    with pytest.raises(WireError, match="features of 4 rows came where a gradient is due"):
        ask(worker, m.Tail(1, 4), features)


@pytest.mark.parametrize("request_", ["take model", "take optimizer"])
def test_numbers_that_are_none_are_not_taken(request_: str) -> None:
    worker = client("ssl", hand_over_optimizer=True)
    ask(worker, REQUESTS["round"])
    ask(worker, m.Forward(1))
    ask(worker, m.Backward(1, "own", 4), b"".join(map(bytes, encode([torch.zeros(4, 128)]))))
    given = ask(worker, m.GiveModel(1) if request_ == "take model" else m.GiveOptimizer(1))
    assert given is not None
    body = b"".join(map(bytes, given[1]))
    ask(worker, REQUESTS[request_], body)
    state = dict(worker.client.module.state_dict()) if request_ == "take model" else None
    if state is not None:
        bad = {n: torch.full_like(t, math.nan) for n, t in state.items()}
        body = b"".join(map(bytes, encode_named(bad)))
    else:
        at = body.rindex(b"\x00\x00\x00\x00")
        body = body[:at] + b"\x00\x00\xc0\x7f" + body[at + 4 :]
    with pytest.raises(WireError, match="holds NaN or infinite numbers in"):
        ask(worker, REQUESTS[request_], body)


# ---- anything, in any order ------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 3, 4, 5, 8, 12, 1023, 1024, 1025, (1 << 32) - 1]
STEPS = [0, 1, 1, 2, 3, 1 << 53]


def anything(chance: random.Random, worker: Worker) -> tuple[m.Message, bytes]:
    """A readable request whose fields and body may be wrong."""

    def number() -> int:
        return chance.choice(NUMBERS)

    step, kind = chance.choice(STEPS), chance.choice(sorted(m.FromServer.__args__, key=lambda t: t.__name__))
    made: dict[type[m.Message], Any] = {
        m.Welcome: lambda: m.Welcome(number(), number(), step, worker.duty.terms),
        m.Refused: lambda: m.Refused("run", "x"),
        m.BeginRound: lambda: m.BeginRound(number(), number(), chance.choice([0.0, 1.0, 1e300]), number()),
        m.Forward: lambda: m.Forward(step, chance.random() < 0.5, chance.choice([None, None, number(), 1 << 53])),
        m.Tail: lambda: m.Tail(step, number()),
        m.Backward: lambda: m.Backward(step, chance.choice(["own", "common"]), number(), chance.random() < 0.3),
        m.TakeGradient: lambda: m.TakeGradient(step, chance.choice([0.0, 1.0, 1e300]), chance.random() < 0.5),
        m.Learn: lambda: m.Learn(step, number()),
        m.TakeServer: lambda: m.TakeServer(step, number()),
        m.Evaluate: lambda: m.Evaluate(step, chance.choice(["lower", "tail", "whole"]), number(), number()),
        m.OwnForward: lambda: m.OwnForward(step, number(), number()),
        m.OwnFinish: lambda: m.OwnFinish(step, number(), number()),
        m.Save: lambda: m.Save(step, chance.choice(["prepare", "commit"])),
        m.Bye: lambda: m.Bye("x"),
    }
    message = made[kind]() if kind in made else kind(step)
    return message, body(chance, worker, getattr(message, "rows", number()))


def body(chance: random.Random, worker: Worker, rows: int) -> bytes:
    """An empty body, random bytes, tensors of right or wrong shapes, or a model."""
    way, width = chance.randrange(6), chance.choice([10, 64, 128, 3])
    rows = rows if rows <= 1024 else 4
    values = torch.randn(rows, width) * chance.choice([1.0, 1e38, math.nan])
    if way == 0:
        return b""
    if way == 1:
        return chance.randbytes(chance.randrange(200))
    if way == 2:
        state = {n: t * chance.choice([1.0, 1e38, math.inf]) for n, t in worker.client.module.state_dict().items()}
        return b"".join(map(bytes, encode_named(state)))
    return b"".join(map(bytes, encode([values] if way < 5 else [values, values.long()])))


@pytest.mark.parametrize("algorithm", REMOTE)
def test_whatever_comes_a_client_raises_named_errors_alone(algorithm: str) -> None:
    """The client also continues after each error, which is harsher than a connection that ends at the first error."""
    chance = random.Random(algorithm)
    torch.manual_seed(0)
    answered = errors = 0
    for turn in range(6):
        with_options = turn % 2 and algorithm in ("ssl", "ussl")
        worker = client(algorithm, **({"hand_over_optimizer": True} if with_options else {}))
        for _ in range(60):
            if chance.random() < 0.3:  # so that not all requests fail early
                worker.handle(Frame(REQUESTS["round"], memoryview(b"")))
            message, data = anything(chance, worker)
            error = complaint(worker, message, data)
            assert error is None or str(error).isprintable()
            answered, errors = answered + (error is None), errors + (error is not None)
    assert answered > 20
    assert errors > 100


@pytest.mark.parametrize("after", [0, 2])
def test_local_training_stops_between_two_batches(after: int) -> None:
    worker = client("fl")
    worker.stop = threading.Event()
    taken = 0

    def learn(*inputs: Any, own: Any = worker.client.learn, **options: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == after:
            worker.stop.set()  # a signal arrives during the batch
        return own(*inputs, **options)

    worker.client.learn = learn  # type: ignore[method-assign]
    if not after:
        worker.stop.set()
    ask(worker, REQUESTS["round"])
    with pytest.raises(StoppedError):
        ask(worker, m.Fit(1))
    assert taken == after
