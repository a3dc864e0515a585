"""Hostile and honest clients as separate processes, over gRPC with TLS: the culprits are named, and the run of the
others is the one without them.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hostile_clients import FRAMES, LIES, OVERSIZED, rows_of  # type: ignore[import-not-found]
from test_remote import remote  # type: ignore[import-not-found]
from trial import PATIENCE, Trial, finished, same_as_local, until  # type: ignore[import-not-found]

from cutlayer.options import RunConfig, read_toml
from cutlayer.wire import messages as m

CONFIG = """algorithm = "{algorithm}"
data = "digits"
model = "mlp"
clients = 3
samples_per_client = 20
test = 30
rounds = {rounds}
batch = 10
"""
pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc"),
]

# ---- lies in answers -------------------------------------------------------------------------------------------------

HUGE = "as large as 3e+38 came in the smashed data of client {}, with which no step is possible"
# Algorithm -> client -> (its lie, from which of its answers on, what the record says). Clients 0 and 1 are honest.
TRIED: dict[str, dict[int, tuple[str, int, str]]] = {
    "sfl": {
        2: ("smashed data of 3e38", 2, HUGE),
        3: ("smashed data of 1e30", 4, "as large as 1e+30 came in the smashed data of client {}"),
        4: ("a model times 1e37", 2, "came in the model of client {}, with which no step is possible"),
        5: ("1e12 samples", 1, "more than 10000 times the median of the others, 20:"),
        6: ("smashed data of NaN", 3, "smashed data of client {} hold NaN or infinite numbers"),
    },
    "fl": {
        2: ("a model times 1e37", 1, "came in the model of client {}, with which no step is possible"),
        3: ("infinite losses", 2, "losses of client {} hold NaN or infinite numbers"),
        4: ("1e12 samples", 1, "more than 10000 times the median of the others, 20:"),
        5: ("rows that count 1e300", 1, "10 rows of client {} count 1e+300 together"),
    },
    "upsl": {
        2: ("gradients of 3e38", 3, "came in the cut gradients of client {}, with which no step is possible"),
        3: ("smashed data of 3e38", 4, HUGE),
        4: ("rows of a tail that count 1e300", 2, "10 rows of client {} count 1e+300 together"),
        5: ("1e12 samples", 1, "more than 10000 times the median of the others, 20:"),
    },
}
OWN = {"upsl": 'cut = "hidden1"\ntail_cut = "hidden2"\n'}


def without(config: Mapping[str, Any], attacks: Mapping[int, tuple[str, int, str]]) -> tuple[Any, list[Any]]:
    """The same run in this process, in which each hostile client leaves at the point of its first lie."""
    run, hub = remote(RunConfig.of({**config, "engine": "local"}))
    left = {k: begin for k, (_, begin, _) in attacks.items()}

    def leave(client: int, message: Any, body: Any) -> tuple[Any, Any]:
        if client not in attacks or not isinstance(message, LIES[attacks[client][0]].kind):
            return message, body
        left[client] -= 1
        if left[client] > 0:
            return message, body
        hub.gone.add(client)
        if not isinstance(message, m.TailUp):
            hub.cut(client)
            return message, body
        return rows_of(float("nan"))(hub.workers[client], message, body)

    hub.tamper = leave
    hub.gone |= {k for k, (lie, _, _) in attacks.items() if LIES[lie].samples is not None}
    return run, list(run)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("algorithm", TRIED)
def test_lies_in_answers(algorithm: str, tmp_path: Path) -> None:
    attacks = TRIED[algorithm]
    clients = 2 + len(attacks)
    config = CONFIG.replace("clients = 3", f"clients = {clients}") + OWN.get(algorithm, "")
    t = Trial(tmp_path, algorithm, rounds=4, config=config, clients=clients)
    try:
        server = t.serve("--quorum", "0.2", "--deadline", "60")
        honest = [t.join(0), t.join(1)]
        t.attack("answers", json.dumps({k: (lie, begin) for k, (lie, begin, _) in attacks.items()}))
        finished(t, server, *honest)
    finally:
        t.stop()
    excluded = {event["client"]: event["why"] for event in t.events("excluded")}
    assert excluded.keys() == attacks.keys()
    for k, (lie, _, why) in attacks.items():
        assert why.format(k) in excluded[k], (lie, excluded[k])
    poisoned = {k for k, (lie, _, _) in attacks.items() if LIES[lie].kind is m.ModelUp}
    assert {event["client"] for event in t.events("deviates")} == poisoned
    assert [event["event"] for event in t.events()][-1] == "done"
    assert "Traceback" not in t.log("server")
    run, records = without(read_toml(tmp_path / "c.toml"), attacks)
    assert [(r["loss"], tuple(r["clients"]), r["bytes_up"], r["bytes_down"]) for r in t.steps()] == [
        (r.loss, r.clients, r.bytes_up, r.bytes_down) for r in records
    ]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_score"] == run.result.test_score


# ---- frames that are wrong -------------------------------------------------------------------------------------------

SAID = {
    "truncated": "cut off or run on",
    "only a beginning": "20 bytes are not a message",
    "nothing": "0 bytes are not a message",
    "run on": "came in answer to",  # the complete message is read first
    "bit-flipped": "",  # any error
    "foreign": "is not Cutlayer's",
    "noise": "",
    "overtaken": "repeated, lost or overtaken",
    "replayed": "repeated, lost or overtaken",
    "of an earlier conversation": "belongs to another conversation",
    "not asked for": "came in answer to",
    "of another step": "came in answer to",
    "a wrong body": "tensors came where|came in answer to",
    "no rows": "Smashed of 0 rows|came in answer to",
    "too many rows": "Smashed of 4294967295 rows|came in answer to",
    "a header of gigabytes": "a header of 2147483648 bytes",
    "a body of gigabytes": "cut off or run on",
    "a server's message": "cannot be understood",
    OVERSIZED: "larger than max",
    "many at once": "came in answer to",
    "failed": "",
}
CODES = {OVERSIZED: "RESOURCE_EXHAUSTED", "failed": "OK"}  # the client itself has said that it cannot continue
TIMES = 2  # how often each frame is sent, except the oversized one
GROWTH = 100 << 20  # bytes that the server may use for all attacks


def resident(pid: int) -> int:
    """Bytes of a process in memory, or 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


@pytest.mark.timeout(200)
def test_wrong_frames(tmp_path: Path) -> None:
    """A client that may come back, and sends another wrong frame in every round."""
    rounds = TIMES * len(FRAMES) - (TIMES - 1)
    t = Trial(tmp_path, "sglr", rounds=rounds, config=CONFIG + "eval_every = 50\ncheckpoint_every = 50\n")
    try:
        server = t.serve("--quorum", "1", "--deadline", "60", "--faulty", "readmit")
        honest = [t.join(0), t.join(1)]
        hostile = t.attack("frames", str(TIMES))
        end, sizes = time.monotonic() + PATIENCE, []
        while server.poll() is None:
            assert time.monotonic() < end, t.log("server")[-3000:]
            if len(t.steps()) > 10:
                sizes.append(resident(server.pid))
            time.sleep(0.1)
        finished(t, server, *honest, hostile)
    finally:
        t.stop()
    attacks = [json.loads(line) for line in (tmp_path / "hostile.out").read_text().splitlines()]
    assert len(attacks) == rounds
    assert {name for name, *_ in attacks} == set(FRAMES) == set(SAID)
    for name, code, said in attacks:
        assert code == CODES.get(name, "INVALID_ARGUMENT"), (name, code, said)
        assert any(one in said for one in SAID[name].split("|")), (name, code, said)
    found = [event["event"] for event in t.events("garbage", "gone", "failed") if event["client"] == 2]
    assert found.count("garbage") == rounds - 1 - TIMES
    assert found.count("failed") == TIMES
    assert max(sizes) - sizes[0] < GROWTH
    assert "Traceback" not in t.log("server")

    alone, hub = remote(RunConfig.of({**read_toml(tmp_path / "c.toml"), "engine": "local"}))
    hub.gone.add(2)
    records = list(alone)
    assert [(r["loss"], tuple(r["clients"]), r["bytes_up"]) for r in t.steps()] == [
        (r.loss, r.clients, r.bytes_up) for r in records
    ]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert alone.result is not None
    assert result["test_score"] == alone.result.test_score


# ---- a crowd of connections ------------------------------------------------------------------------------------------

STREAMS = 70


@pytest.mark.timeout(120)
def test_a_crowd_of_connections(tmp_path: Path) -> None:
    """One certificate opens many streams, under its own name and others. The server logs only a few lines, lets the
    others in, and completes the run of all three.
    """
    t = Trial(tmp_path, "psl", rounds=3, config=CONFIG)
    try:
        server = t.serve("--quorum", "1", "--deadline", "60")
        until(lambda: bool(t.events("listening")), "the server listens", t)
        hostile = t.attack("crowd", str(STREAMS))
        until(lambda: '"a stranger\'s name"' in (tmp_path / "hostile.out").read_text(), "a crowd", t)
        finished(t, t.join(0), t.join(1), server, hostile)
    finally:
        t.stop()
    said: dict[str, list[tuple[str, str]]] = {}
    for line in (tmp_path / "hostile.out").read_text().splitlines():
        name, code, sentence = json.loads(line)
        said.setdefault(name, []).append((code, sentence))
    assert said["other classes"][0][0] == "data"
    assert "the list of the classes is 'class 9', 'class 8'" in said["other classes"][0][1]
    assert "no training samples" in said["no samples"][0][1]
    assert said["another's name"][0][0] == "client"
    crowd = [code for code, _ in said["crowd"]]
    assert set(crowd) <= {"taken", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "Welcome"}
    assert crowd.count("Welcome") <= 1  # the stream that waits longest, after the end of the run
    assert len(said["crowd"]) == len(said["a stranger's name"]) == STREAMS
    assert {code for code, _ in said["a stranger's name"]} == {"client", "RESOURCE_EXHAUSTED"}
    assert said["client-2"][-1][0] == "BYE"
    assert len(t.events("refused")) <= 10
    (more,) = t.events("more")
    assert sum(more["counts"].values()) > 10
    assert t.log("server").count("is refused") <= 20
    same_as_local(t)
