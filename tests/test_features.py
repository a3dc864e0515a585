"""Smashed data that the server keeps: the same training, with each row computed and sent once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from cutlayer import ConfigError, Run
from cutlayer.features import KeptFeatures
from cutlayer.testing.deployed import in_memory, train_in_memory
from cutlayer.testing.material import demand_equal, random_source, smooth, stateful

SIZES = (10, 7, 5)
FIRST = r"^0\."


def run_of(*, model: Any = smooth, sizes: tuple[int, ...] = SIZES, **options: Any) -> Run:
    common: dict[str, Any] = {"clients": len(sizes), "partition": "column", "batch": 4, "precision": "float64"}
    common |= {"cut": "1", "freeze": FIRST, "rounds": 4, "algorithm": "psl", "cache_features": True}
    return Run(model=model, data=random_source(sizes), **{**common, **options})


def trained(run: Run) -> dict[str, Any]:
    losses = [record.loss for record in run]
    return {
        "losses": losses,
        "evaluations": [e.test_loss for e in run.evaluations],
        "server": run.training.server.state()["model"],
    }


def sent(run: Run) -> dict[str, int]:
    ledger = run.training.ledger
    return {kind: ledger.total("up", kind=kind) for kind in ("smashed data", "labels")} | {"down": ledger.total("down")}


ROW, LABEL = 8 * 8, 8


@pytest.mark.parametrize("engine", ["local", "stacked", "remote"])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [("psl", {}), ("psl", {"participation": 0.7, "rounds": 6}), ("slr", {}), ("sflv3", {"local_steps": 2, "rounds": 7}),
     ("ssl", {"hand_over": "batch"})],
)  # fmt: skip
def test_the_training_is_the_same_and_rows_go_up_once(algorithm: str, options: dict[str, Any], engine: str) -> None:
    """Equal to the run without this option in every engine. The bytes are those of the rows that were used."""
    asked = "auto" if algorithm == "ssl" and engine == "stacked" else "local" if engine == "remote" else engine
    run = run_of(algorithm=algorithm, engine=asked, **options)
    if engine == "remote":
        run = in_memory(run.config, model=smooth, data=random_source(SIZES)).run
    plain = run_of(algorithm=algorithm, engine="local", cache_features=False, **options)
    demand_equal(engine, "the features that are kept give another training", trained(run), trained(plain))
    counts = run.training.ledger.of_clients("up", "smashed data") // ROW
    assert all(0 < count <= n for count, n in zip(counts, SIZES, strict=True))
    if not options.get("participation") and not options.get("local_steps"):
        assert counts.tolist() == list(SIZES)
    assert sent(run) == {"smashed data": counts.sum() * ROW, "labels": counts.sum() * LABEL, "down": 0}
    assert sent(plain)["smashed data"] > sent(run)["smashed data"]
    if engine != "remote":
        assert run.result is not None
        assert plain.result is not None
        assert run.result.client_flops == counts.sum() / 3 * run.training.flops.client.forward
        assert run.result.server_flops == plain.result.server_flops


@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_it_is_resumed_exactly(engine: str, tmp_path: Path) -> None:
    """The bytes are equal, too: kept rows need not be sent again."""
    quiet, broken = run_of(engine=engine, rounds=5), run_of(engine=engine, rounds=5, out=tmp_path / "r")
    whole = trained(quiet)
    for count, _ in enumerate(broken, 1):
        if count == 8:
            break
    resumed = Run.resume(tmp_path / "r", model=smooth, data=random_source(SIZES))
    resumed.run()
    demand_equal(engine, "not resumed", resumed.training.server.state()["model"], whole["server"], exact=True)
    assert sent(resumed) == sent(quiet)


def test_a_remote_run_is_resumed_with_what_was_kept(tmp_path: Path) -> None:
    config = run_of(rounds=5).config
    quiet = train_in_memory(config, model=smooth, data=random_source(SIZES))
    there = in_memory(config, model=smooth, data=random_source(SIZES), folder=tmp_path)
    for count, _ in enumerate(there.run, 1):
        if count == 8:
            break
    resumed = in_memory(config, model=smooth, data=random_source(SIZES), folder=tmp_path, resume=True).run
    resumed.run()
    one, other = (r.training.server.state()["model"] for r in (resumed, quiet))
    demand_equal("remote", "not resumed", one, other, exact=True)
    assert sent(resumed) == sent(quiet)


def test_a_remote_client_is_told_which_batch_is_missing() -> None:
    """The last batch of the client's first epoch is lost. Later, it computes only batches with rows of that batch.

    The server names these batches, since the client has not drawn the others.
    """

    def losses(run: Run) -> tuple[list[float], list[int]]:
        kept = run.training.clients
        assert isinstance(kept, KeptFeatures)
        forward, seek, sought = kept.inner.forward, kept.inner.seek, list[int]()

        def told(client: int, batch: int) -> None:
            if client == 0:
                sought.append(batch)
            seek(client, batch)

        def forgetful(clients: Any = None, *, labels: bool = True) -> Any:
            if 0 in clients and sought[-1] == 2:
                forward([0])  # the client has computed, but its answer is lost
                clients = [k for k in clients if k != 0]
            return forward(clients, labels=labels)

        kept.inner.forward, kept.inner.seek = forgetful, told  # type: ignore[method-assign]
        return [record.loss for record in run], sought

    sizes = (10, 9, 10)
    run = run_of(engine="local", sizes=sizes, seed=1)
    here, sought = losses(run)
    assert sought[:3] == [0, 1, 2]
    assert sought[3] > 3  # there was a batch of known rows in between
    there, _ = losses(in_memory(run.config, model=smooth, data=random_source(sizes)).run)
    assert there == pytest.approx(here, rel=1e-9)


def test_a_lost_batch_is_asked_for_again() -> None:
    """After a lost answer, the rows are not known, and are sent when they are needed."""
    run = run_of(algorithm="psl", engine="local", rounds=4)
    kept = run.training.clients
    assert isinstance(kept, KeptFeatures)
    forward, lost = kept.inner.forward, [True]

    def forgetful(clients: Any = None, *, labels: bool = True) -> Any:
        if lost and 1 in clients:
            lost.clear()
            forward([1])  # the client has computed, but its answer is lost
            return forward([k for k in clients if k != 1], labels=labels)
        return forward(clients, labels=labels)

    kept.inner.forward = forgetful  # type: ignore[method-assign]
    run.run()
    assert all(one.seen.all() for one in kept._kept.values())
    counts = run.training.ledger.of_clients("up", "smashed data") // ROW
    assert counts[0] == SIZES[0]
    assert counts[2] == SIZES[2]
    assert counts[1] > SIZES[1]


def mixing() -> nn.Module:
    class Centred(nn.Module):
        def forward(self, x: Any) -> Any:
            return x - x.mean(0)

    return nn.Sequential(nn.Linear(6, 8), Centred(), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"freeze": None}, "the clients' part is trained; freeze it"),
        (
            {"model": stateful, "cut": "1", "freeze": "^[01]", "sizes": (8, 6)},
            "keeps running statistics",
        ),
        ({"model": stateful, "cut": "3", "freeze": "^[01]", "sizes": (8, 6)}, "draws random numbers (dropout)"),
        ({"model": mixing, "cut": "1"}, "rows influence each other"),
        ({"gaussian_noise": 0.1, "clip": 1.0}, "defences change smashed data anew"),
        ({"client_device": "raspberry-pi-4", "up_mbps": 10.0, "down_mbps": 10.0}, "the virtual clock assumes"),
        ({"algorithm": "ussl", "tail_cut": "3"}, "the clients of ussl train on the batch themselves"),
        ({"algorithm": "fl", "cut": None}, "cache_features = True has no effect on fl"),
    ],
)
def test_what_cannot_be_kept(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        run_of(**options)
