"""Clients with states on disk train exactly as clients in memory, and either resumes from the other's checkpoint."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cutlayer import Run, RunConfig, RunFolderError, checkpoint
from cutlayer.build import Training
from cutlayer.collective import World
from cutlayer.engine import shelf as shelves
from cutlayer.engine import stacked, states
from cutlayer.engine.shelf import Shelf, StatesFolder
from cutlayer.errors import ConfigError, DiskFullError
from cutlayer.footprint import footprint
from cutlayer.scoring import judged
from cutlayer.stored import MalformedError
from cutlayer.trained import find_trained

CLIENTS = 8


def model() -> nn.Module:
    """A model with running statistics, dropout, and images whose channels may come last."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(48, 6), nn.ReLU(),
        nn.Linear(6, 3),
    )  # fmt: skip


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """96 images of three classes."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(96, 1, 6, 6, generator=draw), torch.randint(0, 3, (96,), generator=draw)


def options(algorithm: str, **more: Any) -> dict[str, Any]:
    """A short run in which only some clients take part in a round."""
    cut = {} if algorithm == "fl" else {"cut": "2"}
    few: dict[str, Any] = {"clients": CLIENTS, "participation": 0.4, "batch": 5, "rounds": 4, "tune": "off"}
    return {"algorithm": algorithm, "client_optimizer": "adam", **few, "test": 0.1, "validation": 0.0, **cut, **more}


def made(where: str, algorithm: str, **more: Any) -> Run:
    """A run with the clients' states in `where`: memory, disk or auto."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Run(model=model, data=data(), client_states=where, **options(algorithm, **more))


def scores(run: Run) -> list[dict[str, Any]]:
    """All evaluations, without their times."""
    return [{k: v for k, v in asdict(one).items() if "seconds" not in k} for one in run.evaluations]


def assert_equal(a: Run, b: Run) -> None:
    """Models, sizes of optimisers and scores are equal bit for bit."""
    for k in range(CLIENTS):
        mine, theirs = a.training.clients.model_state(k), b.training.clients.model_state(k)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), k
        assert a.training.clients.footprint(k) == b.training.clients.footprint(k)
    mine, theirs = (run.training.server.model.state_dict() for run in (a, b))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert scores(a) == scores(b)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("psl", {}),
    ("psl", {"judge": "average", "start": "independent"}),
    ("psl", {"accumulate": 2, "client_clip_grad_norm": 0.5}),
    ("sglr", {"phi": 0.7, "client_optimizer": "sgd"}),
    ("sfl", {"averaging": "median"}),
    ("fl", {"local_steps": 2}),
    ("sflv1", {}),
    ("smofi", {"client_optimizer": "sgd", "client_optimizer_options": {"momentum": 0.9}}),
    ("cse-fsl", {}),
    ("gas", {"client_optimizer": "sgd"}),
]
cases = pytest.mark.parametrize(("algorithm", "more"), CASES, ids=[f"{a} {o}" for a, o in CASES])
engines = pytest.mark.parametrize("engine", ["stacked"])


@engines
@cases
def test_equals_memory(algorithm: str, more: dict[str, Any], engine: str) -> None:
    """Disk and memory give the same numbers, bit for bit."""
    runs = [made(where, algorithm, engine=engine, **more) for where in ("memory", "disk")]
    assert [run.training.place is None for run in runs] == [True, False]
    assert [run.training.engine for run in runs] == [engine] * 2
    for run in runs:
        run.run()
    assert_equal(*runs)


def interrupted(out: Path, where: str, algorithm: str, **more: Any) -> None:
    """A run that stops in the middle of its third round, after two checkpoints."""
    run = made(where, algorithm, out=out, checkpoint_every=1, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for record in run:
            if record.round == 2:
                break


@engines
@pytest.mark.parametrize(("first", "then"), [("disk", "disk"), ("disk", "memory"), ("memory", "disk")])
@pytest.mark.parametrize("algorithm", ["psl", "sflv1"])
def test_goes_on_from_either(algorithm: str, first: str, then: str, engine: str, tmp_path: Path) -> None:
    """A resumed run ends like the uninterrupted one, whether its states are on disk or in memory, before and after."""
    whole = made("memory", algorithm, engine=engine)
    whole.run()
    interrupted(tmp_path / "run", first, algorithm, engine=engine)
    again = Run.resume(tmp_path / "run", model=model, data=data(), client_states=then)
    assert (again.training.place is None) == (then == "memory")
    again.run()
    assert_equal(whole, again)


def test_no_moment_leaves_a_torn_state(tmp_path: Path) -> None:
    """A process can be killed at any step, also before the checkpoint of a round is in place: the run's folder, copied
    after every step, can always be resumed without loss.
    """
    run = made("disk", "psl", out=tmp_path / "run", engine="stacked", checkpoint_every=1, rounds=2)
    kept: list[Path] = []

    def keep() -> None:
        kept.append(tmp_path / f"kept-{len(kept)}")
        shutil.copytree(tmp_path / "run", kept[-1])

    for _ in run:
        keep()
    assert len(kept) >= 4
    for path in kept:
        again = Run.resume(path, model=model, data=data())
        again.run()
        assert_equal(run, again)


def test_a_checkpoint_that_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The previous checkpoint stays valid: its rows remain, though the files were prepared for the next one."""
    whole = made("memory", "sflv1", engine="stacked")
    whole.run()
    run = made("disk", "sflv1", out=tmp_path / "run", engine="stacked", checkpoint_every=1)
    write, rounds = checkpoint.write, []

    def failing(path: Path, state: Mapping[str, Any]) -> None:
        rounds.append(state.get("rounds"))
        if state.get("rounds") == 3:
            raise DiskFullError("it is full")
        write(path, state)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write", failing)
        with pytest.raises(DiskFullError):
            run.run()
    assert 3 in rounds
    again = Run.resume(tmp_path / "run", model=model, data=data())
    again.run()
    assert_equal(whole, again)


def test_models_that_differ_from_the_start(tmp_path: Path) -> None:
    """They are on disk before the run has a folder, and move into it. What a killed attempt left there does no harm."""
    whole = made("memory", "psl", engine="stacked", start="independent")
    whole.run()
    interrupted(tmp_path / "run", "disk", "psl", engine="stacked", start="independent")
    again = Run.resume(tmp_path / "run", model=model, data=data())
    place = again.training.place
    assert place is not None
    scratch = place.folder
    assert scratch.parent != tmp_path / "run"
    again.run()
    assert place.folder.parent == tmp_path / "run"
    assert not scratch.exists()
    assert_equal(whole, again)
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    anew = Run.resume(tmp_path / "run", model=model, data=data())
    anew.run()
    assert_equal(whole, anew)


def test_some_of_many_models_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If all models would be too many, a trained model has those of some clients, and the average of all."""
    whole = made("memory", "psl", engine="stacked", eval_clients=3)
    whole.run()
    monkeypatch.setattr(stacked, "_HELD", 600)
    run = made("disk", "psl", out=tmp_path / "run", engine="stacked", eval_clients=3)
    run.run()
    everyone, some = whole.trained(), find_trained(tmp_path / "run")
    assert everyone.names == [*range(CLIENTS), "average"]
    assert some.names == [*judged(CLIENTS, 3, 0), "average"]
    for whose in some.names:
        mine, theirs = some.state(whose), everyone.state(whose)
        assert mine.keys() == theirs.keys()
        close = 1e-6 if whose == "average" else 0.0
        assert all(torch.allclose(mine[n], theirs[n], rtol=close, atol=close) for n in mine), whose
    (missing, *_) = sorted(set(range(CLIENTS)) - set(judged(CLIENTS, 3, 0)))
    with pytest.raises(ConfigError, match=f"no model of client-{missing} here: there are those of client-"):
        some.state(missing)
    with pytest.raises(ConfigError, match=f"the models of the {CLIENTS} clients differ: say whose, client-"):
        some.state()


def test_files_of_a_run(tmp_path: Path) -> None:
    """The run's folder has safetensors files with the clients' models, and no files that are not needed."""
    run = made("disk", "psl", out=tmp_path / "run", engine="stacked")
    run.run()
    files = sorted(path.name for path in (tmp_path / "run" / "states").iterdir())
    assert "clients-models-0.weight.safetensors" in files
    assert "clients-moments-0.weight_exp_avg.safetensors" in files
    rows = load_file(tmp_path / "run" / "states" / "clients-models-0.weight.safetensors")["rows"]
    for k in range(CLIENTS):
        mine = run.training.clients.model_state(k)["0.weight"]
        assert bool((rows == mine).flatten(1).all(1).any()) or torch.equal(mine, model_of(run)["0.weight"])
    assert made("disk", "sfl", out=tmp_path / "other", engine="stacked").run().steps
    assert not list((tmp_path / "other").glob("*/copies-*"))


def model_of(run: Run) -> dict[str, torch.Tensor]:
    """The weights that all clients started from."""
    return made("memory", run.config.algorithm).training.parts.client.state_dict()


def test_scratch_files_go_with_the_run() -> None:
    """A run without a folder removes its files when it is deleted."""
    run = made("disk", "psl", engine="stacked")
    run.run()
    place = run.training.place
    assert place is not None
    folder = place.folder
    assert list(folder.iterdir())
    del run, place
    gc.collect()
    assert not folder.exists()


def test_auto_goes_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """States go to disk, with a remark, if they may not fit in memory; not if they fit."""
    assert made("auto", "psl").training.place is None
    monkeypatch.setattr(states, "room", lambda device: 1000)
    run = made("auto", "psl")
    assert run.training.place is not None
    assert any("lie on disk (client_states)" in line and "1.00 kB" in line for line in run.training.remarks)
    assert made("memory", "psl").training.place is None
    assert footprint(run.training, run.config) < footprint(made("memory", "psl").training, run.config)


def test_the_local_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses states on disk, however it was chosen. If memory may be short, it does not claim to use the disk."""
    for algorithm, engine in (("psl", "local"), ("ssl", "auto")):
        with pytest.raises(ConfigError, match=f"no effect on the local engine, which runs {algorithm} here"):
            made("disk", algorithm, engine=engine)
    monkeypatch.setattr(states, "room", lambda device: 1000)
    run = made("auto", "ssl")
    assert run.training.place is None
    assert any("keeps them there all the same" in line for line in run.training.remarks)
    assert not any("lie on disk" in line for line in run.training.remarks)


def test_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error is one sentence, and the run can be resumed once there is space."""
    run = made("disk", "psl", out=tmp_path / "run", engine="stacked", checkpoint_every=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskFullError, match=r"states/clients-m.*is full.*cutlayer resume"):
            run.run()
    again = Run.resume(tmp_path / "run", model=model, data=data())
    again.run()
    whole = made("memory", "psl", engine="stacked")
    whole.run()
    assert_equal(whole, again)


def shelf(place: StatesFolder, clients: int = 5) -> Shelf:
    """Two tensors for each client, one of them with its own memory layout."""
    found = Shelf(place, "some", clients)
    found.add("a", torch.zeros(3))
    found.add("b", torch.arange(6.0).view(2, 3).t())
    return found


def test_rows_of_a_checkpoint_stay(tmp_path: Path) -> None:
    """A state returns its rows whatever was written later. Rows of old states are reused."""
    place = StatesFolder()
    place.settle(tmp_path, begin=True)
    one, who = shelf(place), np.array([1, 3])
    one.put(who, {"a": torch.ones(2, 3)})
    assert torch.equal(one.take("b", who), torch.arange(6.0).view(2, 3).t().expand(2, 3, 2))
    assert one.take("b", who).stride() == one.take("b", np.array([0, 2])).stride()
    kept = one.state()
    one.put(who, {"a": torch.full((2, 3), 2.0)})
    one.put(np.array([0]), {"b": torch.full((1, 3, 2), 7.0)})
    fresh = shelf(place)
    fresh.load(kept, "it")
    assert fresh.own.tolist() == [1, 3]
    assert torch.equal(fresh.take("a", np.arange(5))[:, 0], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]))
    assert torch.equal(one.take("a", np.arange(5))[:, 0], torch.tensor([0.0, 2.0, 0.0, 2.0, 0.0]))
    one.state()
    one.put(who, {"a": torch.full((2, 3), 3.0)})
    before = shelf(place)
    before.load(kept, "it")  # from the checkpoint before the last, as the last may not be in place yet
    assert torch.equal(before.take("a", np.arange(5))[:, 0], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]))
    for value in range(30):  # a state each time, but the file holds at most three of them
        one.put(np.arange(5), {"a": torch.full((5, 3), float(value))})
        one.state()
    assert one._files["a"].capacity == 64
    spread = shelves.spread_out(one.state(), 5, "it")
    assert torch.equal(spread["a"], one.take("a", np.arange(5)))
    assert torch.equal(spread["b"], one.take("b", np.arange(5)))
    elsewhere = StatesFolder()
    copied = shelf(elsewhere)
    copied.load(one.state(), "it")
    assert torch.equal(copied.take("b", np.arange(5)), one.take("b", np.arange(5)))


def test_common_rows_need_no_room(tmp_path: Path) -> None:
    """Clients with a common row have no rows of their own, and dropped rows become free for others."""
    place = StatesFolder()
    place.settle(tmp_path, begin=True)
    one = shelf(place, 200)
    for value in range(5):
        one.put(np.arange(60), {"a": torch.rand(60, 3)})
        one.set_common({"a": torch.full((3,), float(value))})
        assert len(one.own) == 0
        assert torch.equal(one.take("a", np.array([7, 70])), torch.full((2, 3), float(value)))
    assert one._files["a"].capacity == 64
    whole = {"a": torch.zeros(200, 3), "b": torch.zeros(200, 3, 2)}
    whole["a"][3] = -0.0
    one.spread(whole)
    assert one.own.tolist() == [3]
    assert bool(one.take("a", np.array([3])).signbit().all())


def test_growing_that_was_interrupted(tmp_path: Path) -> None:
    """A file with more rows than its header says is used; a file of another tensor is refused."""
    place = StatesFolder()
    place.settle(tmp_path, begin=True)
    one = shelf(place)
    one.put(np.array([1]), {"a": torch.ones(1, 3)})
    kept = one.state()
    path = tmp_path / "states" / "some-a.safetensors"
    with path.open("ab") as file:
        file.write(bytes(12 * 10))
    again = shelf(place)
    again.load(kept, "it")
    assert torch.equal(again.take("a", np.array([1])), torch.ones(1, 3))
    assert load_file(path)["rows"].shape == (74, 3)
    other = Shelf(place, "some", 5)
    other.add("a", torch.zeros(3, dtype=torch.int32))
    with pytest.raises(MalformedError, match="does not hold"):
        other.put(np.array([1]), {"a": torch.ones(1, 3)})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.update(own=torch.tensor([3, 1])), "not in order"),
        (lambda s: s.update(own=torch.tensor([1, 5])), "not among the 5"),
        (lambda s: s.update(own=[1, 3]), "whose rows"),
        (lambda s: s["common"].pop("b"), "no row of 'b'|lacks 'b'"),
        (lambda s: s["common"].update(a=torch.zeros(4)), r"'a' is torch.float32 \(4,\)"),
        (lambda s: s["rows"].update(a=replace(s["rows"]["a"], slots=torch.tensor([0, 0]))), "one row of 'a' for two"),
        (lambda s: [s["rows"].update({n: replace(k, slots=torch.tensor([0, 999]))}) for n, k in s["rows"].items()],
         "lacks rows"),
    ],
)  # fmt: skip
def test_damaged_states(change: Callable[[dict[str, Any]], object], sentence: str, tmp_path: Path) -> None:
    """Each damaged state is refused with the reason."""
    place = StatesFolder()
    place.settle(tmp_path, begin=True)
    one = shelf(place)
    one.put(np.array([1, 3]), {"a": torch.ones(2, 3)})
    state = one.state()
    change(state)
    with pytest.raises(MalformedError, match=sentence):
        shelf(place).load(state, "it")


def test_files_are_named_within_the_folder(tmp_path: Path) -> None:
    """A checkpoint that names files outside the run's folder is refused."""
    place = StatesFolder()
    place.settle(tmp_path, begin=True)
    one = shelf(place)
    one.put(np.array([1]), {"a": torch.ones(1, 3)})
    checkpoint.write(tmp_path / "c.safetensors", {"shelf": one.state()})
    back = checkpoint.read(tmp_path / "c.safetensors")["shelf"]
    assert torch.equal(shelves.spread_out(back, 5, "it")["a"], one.take("a", np.arange(5)))
    raw = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "d.safetensors").write_bytes(raw.replace(b"states/some", b"../abc/some"))
    with pytest.raises(RunFolderError, match="not a file of its states"):
        checkpoint.read(tmp_path / "d.safetensors")


def test_ranks_share_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several processes, the disk is never chosen. If asked for, it is refused: see test_distributed."""
    parts = made("memory", "psl").training
    monkeypatch.setattr(states, "world", lambda: World(0, 2))
    monkeypatch.setattr(states, "room", lambda device: 1000)
    assert placed_with(parts, "auto") == (None, "")


def placed_with(training: Training, where: str) -> tuple[object, str]:
    """The place, and the remark about it, that are chosen for a training with these client_states."""
    config = RunConfig.of({"algorithm": "psl", "client_states": where, "clients": CLIENTS})
    return states.placed(config, training.parts, training.algorithm.traits, "stacked")
