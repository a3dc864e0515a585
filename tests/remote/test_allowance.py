"""How much a client answers according to its own file, counted across restarts; its own record; file permissions."""

from __future__ import annotations

import json
import logging
import os
import stat
import urllib.request
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.build import load_source
from cutlayer.cli.merging import budget_config
from cutlayer.defences import dp, of
from cutlayer.errors import (
    BudgetError,
    ConfigError,
    CutlayerError,
    DiskFullError,
    PortInUseError,
    RunFolderError,
    WireError,
)
from cutlayer.files import private, replace_file
from cutlayer.options import BudgetConfig, RunConfig
from cutlayer.remote.allowance import SPENT, Allowance, Extent, most_releases
from cutlayer.remote.approval import UNCOVERED, fingerprint_of, shown
from cutlayer.remote.approval import check_approved as approve
from cutlayer.remote.audit import Audit
from cutlayer.remote.join import Joining
from cutlayer.remote.metrics import ClientFigures, Exporter
from cutlayer.remote.security import ClientSecurity
from cutlayer.remote.sides import worker_of
from cutlayer.remote.worker import Worker
from cutlayer.wire import encode, pack, unpack
from cutlayer.wire import messages as m

SMALL: dict[str, Any] = {
    "data": "digits",
    "model": "mlp",
    "clients": 2,
    "samples_per_client": 12,
    "batch": 4,
    "test": 10,
    "rounds": 3,
    "algorithm": "psl",
}
NOISY = {"clip": 1.0, "gaussian_noise": 8.0}
ROUND = m.BeginRound(0, 3, 1.0, 3)


@cache
def source() -> Any:
    return load_source(RunConfig.of(SMALL), None)


def client(folder: Path | None = None, audit: Audit | None = None, budget: Any = None, **options: Any) -> Worker:
    config = RunConfig.of({**SMALL, **options})
    most = BudgetConfig.of(budget or {})
    secret = 5 if "clip" in options else None
    return worker_of(
        config, 0, name="client-0", data=source(), folder=folder, budget=most, audit=audit, noise_seed=secret
    )


def ask(worker: Worker, message: m.Message, body: bytes = b"") -> Any:
    return worker.handle(unpack(pack(message, [body], 0, 1), "to client"))


def rounds(worker: Worker, count: int, passes: int = 3) -> None:
    """Plays a server that runs rounds without sending gradients."""
    for _ in range(count):
        ask(worker, ROUND)
        for step in range(passes):
            ask(worker, m.Forward(step))


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_without_a_table_a_client_answers_what_the_study_needs_and_some_restarts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = client()
    rounds(worker, 11)  # 2 x 3 + 5
    with pytest.raises(BudgetError, match=r"of 11 rounds begun, 11 are spent, and 1 more .* raise max_rounds in"):
        ask(worker, ROUND)
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    assert "client-0 leaves: the server asks for more than the budget of client-0" in caplog.text


@pytest.mark.parametrize(
    ("budget", "asked", "said"),
    [
        ({"max_passes": 2}, m.Forward(1), "of 2 forward passes on its own rows, 2 are spent"),
        ({"max_batches": 2}, m.Forward(1), "of 2 batches trained on, 2 are spent"),
        ({"max_evaluations": 0}, m.Evaluate(1, "lower", 1), "of 0 requests to evaluate, 0 are spent"),
        ({"max_seconds": 1e-9}, m.Settle(1), "has worked for .* and its budget is"),
    ],
)
def test_what_is_over_a_budget_is_refused_and_nothing_is_sent(budget: Any, asked: m.Message, said: str) -> None:
    worker = client(budget=budget)
    if "max_seconds" not in budget:
        ask(worker, ROUND)
        for _ in range(2 if isinstance(asked, m.Forward) else 0):
            ask(worker, m.Forward(1))
    else:
        ask(worker, m.Settle(0))
    drawn = worker._batches.drawn.tolist()
    with pytest.raises(BudgetError, match=said):
        ask(worker, asked)
    assert "max_batches" in budget or worker._batches.drawn.tolist()[0] - drawn[0] <= 1


def test_what_prometheus_hears_of_a_client(tmp_path: Path) -> None:
    """Requests, rows and bytes are those of this process. The budget spans all processes, and includes epsilon."""
    first = client(tmp_path, budget={"max_passes": 4, "max_epsilon": 50.0}, **NOISY)
    rounds(first, 1, passes=2)
    first.close()
    worker = client(tmp_path, budget={"max_passes": 4, "max_epsilon": 50.0}, **NOISY)
    rounds(worker, 1, passes=2)
    with pytest.raises(BudgetError, match="of 4 forward passes"):
        ask(worker, m.Forward(2))
    with closing(Exporter(ClientFigures([worker]), 0)) as exporter:
        with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=10) as page:
            text = page.read().decode()
        with pytest.raises(PortInUseError, match="cannot serve metrics at"):
            Exporter(ClientFigures([worker]), exporter.port)
    of, sent = 'client="client-0"', worker.answers.bytes
    epsilon = worker.budget()["epsilon"][0]
    assert epsilon == pytest.approx(dp.gaussian(worker.duty.noise.scale, 1.0, 2, 1e-5).epsilon)  # 12 rows, 4 batches
    for line in (
        f'cutlayer_client_requests_total{{{of},outcome="answered",request="Forward"}} 2.0',
        f'cutlayer_client_requests_total{{{of},outcome="refused",request="Forward"}} 1.0',
        f"cutlayer_client_rows_sent_total{{{of}}} 8.0",
        f"cutlayer_client_bytes_sent_total{{{of}}} {float(sent)}",
        f'cutlayer_client_budget_spent{{{of},item="passes"}} 4.0',
        f'cutlayer_client_budget_allowed{{{of},item="passes"}} 4.0',
        f'cutlayer_client_budget_spent{{{of},item="epsilon"}} {epsilon}',
    ):
        assert line in text, text
    assert 'item="seconds"' in text
    assert f'budget_allowed{{{of},item="seconds"}}' not in text  # it has no limit
    assert sent > 8 * 64 * 4


def test_models_and_local_batches_are_counted_too() -> None:
    worker = client(algorithm="fl", budget={"max_models": 1, "max_batches": 3})
    ask(worker, ROUND)
    ask(worker, m.Fit(1))
    ask(worker, m.GiveModel(1))
    with pytest.raises(BudgetError, match="of 1 models given, 1 are spent"):
        ask(worker, m.GiveModel(1))
    ask(worker, ROUND)
    with pytest.raises(BudgetError, match="of 3 batches trained on, 3 are spent"):
        ask(worker, m.Fit(2))


def test_a_server_that_speaks_of_more_rounds_than_the_study_is_refused_at_once() -> None:
    with pytest.raises(BudgetError, match="says that the run has 4 rounds, but in this client's own file it has 3"):
        ask(client(), m.BeginRound(0, 4, 1.0, 3))
    ask(client(budget={"max_rounds": 4}), m.BeginRound(0, 4, 1.0, 3))


def test_what_is_spent_survives_a_restart(tmp_path: Path) -> None:
    first = client(tmp_path)
    rounds(first, 6)
    again = client(tmp_path)  # as if the first process was killed
    rounds(again, 5)
    with pytest.raises(BudgetError, match="of 11 rounds begun, 11 are spent"):
        ask(again, ROUND)
    again.close()
    kept = json.loads((tmp_path / SPENT).read_text())
    assert (kept["rounds"], kept["passes"], kept["batches"], kept["releases"]) == (11, 33, 33, 11)
    assert 0 < kept["seconds"] < 100


@pytest.mark.parametrize("damage", ["{", "[]", '{"rounds": "x"}', '{"rounds": -1}', '{"seconds": NaN}', "\xff"])
def test_a_damaged_account_is_said_to_be(tmp_path: Path, damage: str) -> None:
    (tmp_path / SPENT).write_bytes(damage.encode("latin-1"))
    with pytest.raises(RunFolderError, match=r"spent.json', which says what this client has answered, is damaged"):
        client(tmp_path)


def test_the_study_of_each_kind() -> None:
    """The number of rounds is unknown if it depends on other clients' data."""
    study = client(evaluate_on="both").duty.study
    assert study == Extent(rounds=3, quota=3, evaluations=4, models=0, sends=True)
    assert client(algorithm="sfl").duty.study == Extent(3, 3, 2, 6, sends=True)
    assert client(algorithm="fl", local_steps=2).duty.study == Extent(3, 2, 2, 5, sends=False)
    assert client(algorithm="ussl", cut="hidden1", tail_cut="hidden2").duty.study == Extent(3, 3, 4, 6, sends=True)
    unknown = Allowance.of(Extent(None, 2, 1, 3, sends=False), BudgetConfig())
    assert unknown.total is None
    assert unknown.rounds > 1 << 20
    known = Allowance.of(Extent(None, 2, 1, 3, sends=True), BudgetConfig(max_rounds=7))
    assert known == Allowance(7, 14, 14, 8, 24, None, None, 7)


def test_budgets_are_read_from_their_table_and_flags_win(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[budget]\nmax-rounds = 4\nmax_epsilon = 2.5\n")
    flags = BudgetConfig(max_rounds=9)
    assert budget_config(flags, tmp_path / "c.toml") == BudgetConfig(max_rounds=9, max_epsilon=2.5)
    (tmp_path / "c.toml").write_text("budget = 3\n")
    with pytest.raises(ConfigError, match=r"budget = 3 is not a table: write \[budget\]"):
        budget_config(None, tmp_path / "c.toml")


# ---- privacy ---------------------------------------------------------------------------------------------------------


def test_the_epsilon_that_is_spent_is_in_the_log_of_each_round(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cutlayer.remote.worker")
    worker = client(**NOISY)
    rounds(worker, 2)
    worker.close()
    expected = [str(dp.gaussian(8.0, 1.0, epochs)) for epochs in (1, 2)]
    assert [r.message.partition("so far: ")[2] for r in caplog.records] == expected


@pytest.mark.parametrize("kind", ["gaussian_noise", "laplace_noise"])
def test_a_client_stops_before_its_epsilon_is_above_the_budget(kind: str) -> None:
    noise = {"clip": 1.0, kind: 8.0}
    twice = (dp.gaussian(8.0, 1.0, 2) if kind == "gaussian_noise" else dp.laplace(8.0, 1.0, 2)).epsilon
    worker = client(budget={"max_epsilon": twice * 1.01}, **noise)
    rounds(worker, 2)
    ask(worker, ROUND)
    with pytest.raises(BudgetError, match="were sent 2 times: once more would cost more than max_epsilon"):
        ask(worker, m.Forward(9))


def test_the_most_releases_are_found_for_any_budget() -> None:
    noise = of(RunConfig.of({**SMALL, **NOISY})).in_order[0]
    for wanted in (1, 2, 3, 50):
        epsilon = dp.gaussian(8.0, 1.0, wanted).epsilon
        assert most_releases(noise, BudgetConfig(max_epsilon=epsilon)) == wanted  # type: ignore[arg-type]
        assert most_releases(noise, BudgetConfig(max_epsilon=epsilon * 0.999)) == wanted - 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "budget", "said"),
    [
        ({}, {"max_epsilon": 1.0}, "max_epsilon = 1.0 cannot be kept without noise"),
        (NOISY, {"max_epsilon": 0.01}, "max_epsilon = 0.01 is less than sending each sample once costs"),
        (
            {**NOISY, "algorithm": "sfl"},
            {},
            "sfl has each client give its .*, or set give_model_despite_noise = true",
        ),
        ({**NOISY, "algorithm": "ssl"}, {}, "ssl has each client give its model"),
    ],
)
def test_a_promise_that_cannot_be_kept_is_refused_before_anything_is_sent(options: Any, budget: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        client(budget=budget, **options)


def test_a_model_is_given_despite_noise_if_that_is_meant() -> None:
    worker = client(budget={"give_model_despite_noise": True}, algorithm="sfl", **NOISY)
    assert ask(worker, m.GiveModel(1)) is not None
    client(algorithm="sfl", clip=1.0)  # clipping alone promises nothing


def test_a_batch_that_is_sent_by_other_weights_gets_other_noise() -> None:
    """Otherwise a server could request the batch twice, subtract the two answers and remove the noise."""

    def sent(worker: Worker) -> torch.Tensor:
        ask(worker, ROUND)
        worker._batches.drawn[0] = 0
        (message, body) = ask(worker, m.Forward(1))
        assert message.rows == 4
        return torch.frombuffer(bytearray(b"".join(map(bytes, body))[-4 * 4 - 4 * 128 * 4 :]), dtype=torch.float32)

    worker = client(**NOISY)
    first, again = sent(worker), sent(worker)
    assert torch.equal(first, again)  # a repetition reveals nothing new
    with torch.no_grad():
        for p in worker.client.weights:
            p.mul_(1.001)
    assert (sent(worker) - first).std() > 4.0  # about twice the noise's variance, so the noise is a new one


# ---- the client's own record -----------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_all_that_is_asked_and_answered_is_recorded_as_it_happens(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"earlier": 1}\n')
    worker = client(audit=Audit(path, "client-0", "split.example.org:4747"))
    ask(worker, ROUND)
    ask(worker, m.Forward(7))
    ask(worker, m.Backward(7, "own", 4), b"".join(map(bytes, encode([torch.zeros(4, 128)]))))
    with pytest.raises(WireError):
        ask(worker, m.GiveModel(7))
    earlier, begun, sent, stepped, refused = lines(path)  # everything is there before anything is closed
    assert earlier == {"earlier": 1}
    assert (begun["asked"], begun["answered"], begun["of_batches"]) == ("BeginRound", "done", 3)
    assert (sent["asked"], sent["answered"], sent["of_step"], sent["rows"]) == ("Forward", "Smashed", 7, 4)
    assert sent["bytes_up"] > 4 * 128 * 4
    assert (stepped["asked"], stepped["answered"]) == ("Backward", "done")
    assert stepped["bytes_down"] > 4 * 128 * 4
    assert (refused["asked"], refused["refused"]) == ("GiveModel", "ForbiddenError")
    assert "which psl does not need" in refused["why"]
    assert all(e["server"] == "split.example.org:4747" and e["client"] == "client-0" for e in lines(path)[1:])
    worker.close()
    ended = lines(path)[-1]
    assert (ended["event"], ended["spent"]["passes"]) == ("ended", 1)


def test_what_cannot_be_recorded_is_not_answered() -> None:
    worker = client(audit=Audit(Path("/dev/full"), "client-0", "x"))
    with pytest.raises(DiskFullError, match="cannot write '/dev/full'"):
        ask(worker, ROUND)


# ---- who can read it -------------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_made_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "file").write_text("x")
        (tmp_path / "old" / "run.sh").touch(0o755)
        (tmp_path / "old" / "link").symlink_to("file")
        assert mode(tmp_path / "old" / "file") == 0o666
        with private(tmp_path / "old", tmp_path / "a" / "new"):
            replace_file(tmp_path / "a" / "new" / "file", b"x")
            (tmp_path / "a" / "new" / "more").mkdir()
        assert [mode(tmp_path / p) for p in ("old", "a", "a/new", "a/new/more")] == [0o700] * 4
        assert [mode(tmp_path / p) for p in ("old/file", "a/new/file")] == [0o600] * 2
        assert mode(tmp_path / "old" / "run.sh") == 0o700
        Audit(tmp_path / "audit.jsonl", "client-0", "x").close()
        assert mode(tmp_path / "audit.jsonl") == 0o600
        (tmp_path / "after").touch()
        assert mode(tmp_path / "after") == 0o666
    finally:
        os.umask(before)


# ---- approval --------------------------------------------------------------------------------------------------------


def joining(**changes: Any) -> Joining:
    return replace(Joining("localhost:4747", "client-0", ClientSecurity()), **changes)


def test_a_study_is_shown_in_words_before_anybody_is_contacted(tmp_path: Path) -> None:
    text = "\n".join(shown(RunConfig.of({**SMALL, **NOISY}), [joining(folder=tmp_path / "f")]))
    for said in (
        "client-0 for the server at localhost:4747: psl",
        "nothing is encrypted (insecure)",
        "asked: backward, forward; evaluate",
        "3 rounds, each of 3 batches of 4 of its 12 rows",
        "at most: 11 rounds, 33 batches trained on, 33 of them sent, 24 requests to evaluate, 0 times its model",
        "leaves: smashed data (every row, in each epoch): a row is float32 [128], 512 B, 18.4 kB in all",
        "leaves: labels (every row)",
        "stays: inputs, its part of the model",
        f"in the study: {dp.gaussian(8.0, 1.0, 3)}",
        f"At most, by its budget: {dp.gaussian(8.0, 1.0, 11)}",
        f"recorded: {tmp_path / 'f' / 'audit.jsonl'}",
    ):
        assert said in text
    assert not (tmp_path / "f").exists()


def test_what_was_approved_is_joined_and_nothing_else() -> None:
    config = RunConfig.of(SMALL)
    fingerprint = next(line for line in shown(config, [joining()]) if "fingerprint: " in line).split()[-1]
    approve(config, [joining()], fingerprint)
    approve(config, [joining()], fingerprint.replace("-", "").upper())
    for other, how in (
        (RunConfig.of({**SMALL, "seed": 1}), joining()),
        (config, joining(budget=BudgetConfig(max_rounds=50))),
    ):
        with pytest.raises(ConfigError, match=f"but '{fingerprint}' was approved"):
            approve(other, [how], fingerprint)
    with pytest.raises(ConfigError, match="2 clients have 2 fingerprints"):
        approve(config, [joining(), joining(name="client-1")], fingerprint)


CHANGES: dict[str, Any] = {
    "algorithm": "sflv3",
    "seed": 1,
    "rounds": 4,
    "batch": 5,
    "clients": 3,
    "client_lr": 0.5,
    "client_optimizer": "sgd",
    "cut": "hidden1",
    "up_codec": "int8",
    "down_codec": "float16",
    "evaluate_on": "both",
    "clip": 2.0,
    "gaussian_noise": 1.0,
    "task": "binary",
    "share_server_model": True,
    "samples_per_client": 13,
    "participation": 0.5,
    "freeze": "hidden1",
    "metrics": ("f1_macro",),
    "defences": ("noise",),
    "gradient_scale": "union",
}


def test_any_option_that_decides_what_leaves_changes_the_fingerprint(tmp_path: Path) -> None:
    config, how, terms = RunConfig.of({**SMALL, "clip": 1.0}), joining(), {"part": "p", "crossing": []}
    base = fingerprint_of(config, how, terms)
    assert base == fingerprint_of(config, how, dict(terms))
    found = {base}
    for name, value in CHANGES.items():
        given = {**SMALL, "clip": 1.0, name: value}
        if name == "algorithm":
            given |= {"local_epochs": 2}
        found.add(fingerprint_of(RunConfig.of(given), how, terms))
    for name in BudgetConfig.model_fields:
        value = True if name == "give_model_despite_noise" else 0.25 if name == "delta" else 77
        found.add(fingerprint_of(config, joining(budget=BudgetConfig(**{name: value})), terms))
    (tmp_path / "ca.crt").write_text("one")
    one = ClientSecurity(tmp_path / "ca.crt", token="t")
    ways: list[dict[str, Any]] = [
        {"name": "client-1"},
        {"watch": "leave"},
        {"address": "localhost:4748"},
        {"data": source()},
        {"security": one},
        {"security": replace(one, server_name="other")},
        {"security": replace(one, token=None, certificate=tmp_path / "ca.crt")},
    ]
    found |= {fingerprint_of(config, joining(**way), terms) for way in ways}
    (tmp_path / "ca.crt").write_text("two")
    found.add(fingerprint_of(config, joining(security=one), terms))
    found |= {fingerprint_of(config, how, other) for other in ({**terms, "part": "q"}, {**terms, "crossing": [1]})}
    assert len(found) == 1 + len(CHANGES) + len(BudgetConfig.model_fields) + len(ways) + 3
    same = {"data": "x.csv", "device": "cuda", "engine": "local", "data_workers": 2}
    assert same.keys() < UNCOVERED
    assert fingerprint_of(RunConfig.of({**SMALL, "clip": 1.0, **same}), how, terms) == base


def test_errors_of_a_budget_are_those_of_what_is_forbidden() -> None:
    assert issubclass(BudgetError, CutlayerError)
    assert BudgetError("x").exit_code == 2
