"""State files that are well-formed but wrong: an error names the file, or the state is used unchanged."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from support import ALGORITHMS, call, same, source
from torch import Tensor, nn

from cutlayer import Run, checkpoint
from cutlayer.data.batches import Batches, Clocks
from cutlayer.engine.remembered import recalled, remember
from cutlayer.engine.ways import Ways
from cutlayer.errors import RunFolderError
from cutlayer.folder import CHECKPOINT
from cutlayer.options import RunConfig, traits
from cutlayer.remote.join import _secret
from cutlayer.remote.sides import worker_of
from cutlayer.run import RunState
from cutlayer.stored import MalformedError, checked, fit, reading
from cutlayer.testing import in_memory
from cutlayer.wire import messages as m

SIZES = [6, 4]
TRIES = 10  # number of random mutations of each state
Place = tuple[Any, ...]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def options(algorithm: str) -> dict[str, Any]:
    common = {"algorithm": algorithm, "clients": 2, "partition": "column", "batch": 10, "rounds": 1, "client_lr": 0.01}
    if traits(algorithm).u_shaped:
        return {**common, "cut": "2", "tail_cut": "4"}
    if algorithm in ("gpsl", "gscala"):
        common["sampling"] = "fixed"  # batch normalisation needs two rows at least
    return common if traits(algorithm).whole else {**common, "cut": "3"}


def places(tree: Any, at: Place = ()) -> Iterator[Place]:
    """The places of all branches and leaves of a tree."""
    yield at
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in entries:
        yield from places(value, (*at, key))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"w": torch.tensor([1.0, float("nan")])}, "'w' holds NaN or infinite numbers"),
        ({"w": torch.zeros(2, 1)}, r"'w' is torch.float32 \(2, 1\), where torch.float32 \(2,\) belongs"),
        ({"w": torch.zeros(2, dtype=torch.float64)}, "'w' is torch.float64"),
        ({}, "lacks 'w'"),
        ({"w": torch.zeros(2), "v": torch.zeros(2)}, "has 'v'"),
    ],
)
def test_tensors_fit_those_that_they_replace(given: dict[str, Tensor], says: str) -> None:
    with pytest.raises(MalformedError, match=says):
        fit(given, {"w": torch.ones(2)}, "the model")
    masked = {"w": torch.tensor([0.0, float("-inf")])}  # like the mask of an attention
    fit(masked, masked, "the model")


@pytest.mark.parametrize("drawn", [[3], [3, 4, 5]])
def test_every_client_has_a_clock_of_its_own(drawn: list[int]) -> None:
    batches = Batches([np.arange(7), np.arange(7, 10)], 4, seed=0)
    with pytest.raises(MalformedError, match=rf"drawn has {len(drawn)} entries, not one for each of 2 clients"):
        batches.load(Clocks(drawn=drawn))
    batches.load(Clocks(drawn=[3, 4]))
    assert batches.drawn.tolist() == [3, 4]


def deep() -> list[Any]:
    """A list, nested 5000 times."""
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    return nested


def others(value: Any) -> list[Any]:
    """Values of another kind or out of range."""
    if isinstance(value, Tensor):
        nan = value.clone().float()
        nan.view(-1)[:1] = float("nan")
        wider = torch.zeros(*value.shape, 2, dtype=value.dtype)
        return [
            None,
            3,
            [1.0],
            nan.to(value.dtype if value.is_floating_point() else nan.dtype),
            wider,
            value.to(torch.int8),
        ]
    return [
        None,
        True,
        -5,
        1 << 70,
        0.5,
        float("nan"),
        float("inf"),
        "text",
        [],
        {},
        {"x": 1},
        [-5],
        deep(),
        torch.zeros(2),
    ]


def mutated(tree: Any, place: Place, how: int) -> Any:
    """The tree with one change: an entry is removed, added or replaced. Shares the rest with the tree."""
    if not place:
        return others(tree)[how % len(others(tree))]
    key, *rest = place
    branch = list(tree) if isinstance(tree, list | tuple) else dict(tree)
    choices = others(branch[key])
    if rest:
        branch[key] = mutated(branch[key], tuple(rest), how)
    elif (kind := how % (len(choices) + 2)) < len(choices):
        branch[key] = choices[kind]
    elif kind == len(choices):
        del branch[key]
    elif isinstance(branch, list):
        branch.append(branch[key])
    else:
        branch[f"{key} more"] = branch[key]
    return tuple(branch) if isinstance(tree, tuple) else branch


def draws(tree: Any, seed: str) -> Iterator[tuple[Place, Any]]:
    """Random mutations. Half of them are near the root, since most places are deep in models and metrics."""
    rng, found = random.Random(seed), [place for place in places(tree) if "confusion" not in place]
    near = [place for place in found if len(place) <= 4]
    for n in range(TRIES):
        place = rng.choice(near if n % 2 else found)
        yield place, mutated(tree, place, rng.randrange(1 << 20))


def folder_of(algorithm: str, engine: str, out: Path, **more: Any) -> tuple[Run, Path]:
    """A run after its checkpoint, ready to be continued, and the path of the checkpoint."""
    data, config = source(SIZES, (3,)), {**options(algorithm), **more}
    if engine == "remote":
        in_memory(RunConfig.of(config), model=net, data=data, folder=out).run.run()
        return in_memory(
            RunConfig.of(config), model=net, data=data, folder=out, resume=True
        ).run, out / "run" / CHECKPOINT
    Run(model=net, data=data, out=out / "run", engine=engine, **config).run()
    return Run.resume(out / "run", model=net, data=data), out / "run" / CHECKPOINT


LACKING = {"frozen", "plain clock", "batches", "code"}  # missing in states of earlier versions


CASES = [
    *((a, "local", {"rounds": 2} if a == "ampere" else {}) for a in ALGORITHMS),
    *((a, "remote", {}) for a in ("fl", "sglr", "ussl")),
    *((a, "stacked", {}) for a in ("fl", "psl", "sflv1", "sflv3")),
    ("sfl", "auto", {"average_every": "step", "client_optimizer": "sgd", "server_optimizer": "sgd"}),
    (
        "sglr",
        "local",
        {"client_device": "raspberry-pi-4", "up_mbps": 10.0, "down_mbps": 50.0, "client_optimizer": "nadam"},
    ),
    ("psl", "local", {"freeze": "^(0|1)[.]", "cache_features": True, "cut": "0"}),
]


@pytest.mark.parametrize(("algorithm", "engine", "more"), CASES)
def test_a_wrong_checkpoint_is_refused_or_taken_as_it_stands(
    algorithm: str, engine: str, more: dict[str, Any], tmp_path: Path
) -> None:
    run, path = folder_of(algorithm, engine, tmp_path, **more)
    tree = checkpoint.read(path)
    run._load(checked(tree, RunState))
    for place, wrong in draws(tree, f"{algorithm} {engine}"):
        try:
            with reading(path):
                run._load(checked(wrong, RunState))
        except RunFolderError:
            continue
        if engine != "remote" and not LACKING & {*place}:  # a remote cohort asks clients for their states
            assert same(run.training.server.state(), wrong["server"]), place
            assert same(run.training.clients.state(), wrong["clients"]), place


@pytest.mark.parametrize("algorithm", ["fl", "sglr", "ussl"])
def test_a_wrong_state_of_a_client_is_refused_or_taken_as_it_stands(algorithm: str, tmp_path: Path) -> None:
    """For a client on another machine. The error names the file before any of its values is used."""
    data, config = source(SIZES, (3,)), RunConfig.of(options(algorithm))
    in_memory(config, model=net, data=data, folder=tmp_path).run.run()
    path = tmp_path / "client-0" / "client.safetensors"
    tree = checkpoint.read(path)
    worker = worker_of(config, 0, name="client-0", folder=path.parent, model=net, data=data)
    for place, wrong in draws(tree, algorithm):
        try:
            checkpoint.write(path, wrong if isinstance(wrong, dict) and all(isinstance(k, str) for k in wrong) else {})
        except (TypeError, RecursionError):  # cannot be stored in a file
            continue
        try:
            worker._take(worker._states()["client.safetensors"])
        except RunFolderError:
            continue
        assert worker._batches.drawn.tolist() == wrong["drawn"], place
        assert same(dict(worker.client.module.state_dict()), wrong["model"]), place
        kept = worker.client.optimizer.state_dict() if worker.client.optimizer else {}
        assert same(kept, wrong["optimizer"]), place


def test_a_client_with_another_algorithms_state_leaves_with_a_sentence(tmp_path: Path) -> None:
    data = source(SIZES, (3,))
    for algorithm in ("fl", "sglr"):
        in_memory(RunConfig.of(options(algorithm)), model=net, data=data, folder=tmp_path / algorithm).run.run()
    shutil.copy(*(tmp_path / a / "client-0" / "client.safetensors" for a in ("fl", "sglr")))
    resumed = in_memory(RunConfig.of(options("sglr")), model=net, data=data, folder=tmp_path / "sglr", resume=True)
    shutil.copy(tmp_path / "fl" / "client-0" / "client.safetensors", tmp_path / "sglr" / "client-0")
    refused = resumed.workers[0].welcome(m.Welcome(0, 2, 9, resumed.workers[0].duty.terms))
    assert refused is not None
    assert refused.reason == "state"
    assert "client.safetensors' is damaged or of another kind" in refused.sentence


@pytest.mark.parametrize("text", ["", "-5", "1e3", "٣", str(1 << 63), "5\n6", "x" * 10000])
def test_a_wrong_seed_of_the_noise(text: str, tmp_path: Path) -> None:
    (tmp_path / "noise.seed").write_text(text, encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"noise\.seed' is damaged .*; remove it, and this client's defence"):
        _secret(tmp_path)


def test_a_checkpoint_that_says_more_than_it_packs(tmp_path: Path) -> None:
    """Well-formed safetensors files with headers that `checkpoint.write` never writes."""
    path, one = tmp_path / "x.safetensors", torch.zeros(2)
    headers = [
        "[" * 100_000 + "]" * 100_000,
        '{"dict": [["a"]]}',
        '{"dict": [["a", 1], ["a", 2]]}',
        '{"dict": [[["x"], 1]]}',
        '{"dict": [[1, 2]]}',
        '{"dict": {"a": 1}}',
        '{"list": []}',
        '{"dict": [["a", {"tensor": "7"}]]}',
        '{"dict": [["a", {"tensor": [0]}]]}',
        '{"dict": [], "tuple": []}',
        '{"dict": []}',  # does not mention the tensor
        "[1]",
        "{",
    ]
    for header in headers:
        path.write_bytes(save({"0": one}, metadata={"cutlayer": header}))
        with pytest.raises(RunFolderError, match="is not a whole checkpoint"):
            checkpoint.read(path)
    path.write_bytes(save({"0": one}))
    with pytest.raises(RunFolderError, match="it lacks 'cutlayer'"):
        checkpoint.read(path)


def test_a_wrong_tuning_cache_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cutlayer.engine.remembered._folder", lambda: tmp_path)
    remember("a", Ways())
    assert recalled("a") == Ways()
    right = json.loads((tmp_path / "a.json").read_text())
    for place, wrong in [(p, mutated(right, p, how)) for p in places(right) for how in range(16)]:
        try:
            (tmp_path / "a.json").write_text(json.dumps(wrong))
        except (TypeError, RecursionError):
            continue
        found = recalled("a")
        assert found is None or same(found.stored(), {**Ways().stored(), **wrong}), place


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run from the command line, with a table for `predict`."""
    folder = tmp_path_factory.mktemp("finished")
    rows = "".join(f"{x}.5,{x % 5},{'ab'[x % 2]}\n" for x in range(60))
    (folder / "rows.csv").write_text(f"u,v,label\n{rows}")
    words = ["--data", "rows.csv", "--algorithm", "psl", "--clients", "2", "--rounds", "2", "--model", "mlp"]
    call("run", *words, "--snapshot-every", "1", "--out", "run", cwd=folder)
    return folder


def rewritten(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes a file of a run and writes it back in its format."""
    if path.suffix == ".safetensors":
        checkpoint.write(path, change(checkpoint.read(path)))
    elif path.suffix == ".jsonl":
        path.write_text(
            "".join(json.dumps(change(json.loads(line))) + "\n" for line in path.read_text("utf-8").splitlines()),
            "utf-8",
        )
    else:
        path.write_text(json.dumps(change(json.loads(path.read_text("utf-8")))), "utf-8")


def without(name: str) -> Callable[[Any], Any]:
    return lambda tree: {key: value for key, value in tree.items() if key != name}


def having(*place: Any, value: Any) -> Callable[[Any], Any]:
    def change(tree: Any, at: Place = place) -> Any:
        key, *rest = at
        branch = list(tree) if isinstance(tree, list) else dict(tree)
        branch[key] = change(tree[key], tuple(rest)) if rest else value
        return branch

    return change


NAN = torch.full((64,), float("nan"))
RESUME, REPORT, LEAKAGE = ["resume", "run"], ["report", "run"], ["leakage", "run"]
EXPORT, PREDICT = ["export", "run"], ["predict", "run", "rows.csv"]
WRONG = [
    (RESUME, "checkpoint.safetensors", without("server")),
    (RESUME, "checkpoint.safetensors", having("rounds", value=-1)),
    (RESUME, "checkpoint.safetensors", having("rounds", value=99)),
    (RESUME, "checkpoint.safetensors", having("offsets", "steps.jsonl", value=1 << 20)),
    (RESUME, "checkpoint.safetensors", having("clients", value={"inner": {}, "ledger": {}, "stale": [9]})),
    (RESUME, "checkpoint.safetensors", having("config", "client_lr", value=-1)),
    (RESUME, "engine.json", having("clients", "chunk", value=-5)),
    (RESUME, "engine.json", having("engine", value="warp")),
    (RESUME, "engine.json", lambda tree: [tree]),
    (REPORT, "result.json", having("steps", value="many")),
    (REPORT, "result.json", lambda tree: [1]),
    (REPORT, "steps.jsonl", without("loss")),
    (REPORT, "steps.jsonl", lambda tree: 3),
    (REPORT, "evaluations.jsonl", having("test_score", value=[1])),
    (REPORT, "evaluations.jsonl", having("round", value=-4)),
    (REPORT, "classes.json", having("counts", value=5)),
    (REPORT, "metric.json", without("maximise")),
    (REPORT, "algorithm.json", lambda tree: 3),
    (LEAKAGE, "checkpoint.safetensors", without("rounds")),
    (LEAKAGE, "checkpoint.safetensors", having("server", "model", value={"x": NAN})),
    ([*LEAKAGE, "--snapshots"], "snapshots/round-000001.safetensors", having("models", value={"x": {}})),
    (EXPORT, "last.safetensors", without("about")),
    (EXPORT, "last.safetensors", having("about", "precision", value="float7")),
    (EXPORT, "last.safetensors", having("server", value={"fc1.weight": NAN})),
    (PREDICT, "last.safetensors", having("about", "preprocessing", "columns", value=[{"name": 3}])),
    (PREDICT, "last.safetensors", having("about", "preprocessing", "conversion", value={"mean": "x"})),
    (PREDICT, "last.safetensors", having("about", "preprocessing", "conversion", "std", value=[1.0])),
    (PREDICT, "last.safetensors", having("about", "task", value="no such task")),
    (PREDICT, "last.safetensors", having("about", "class_names", value=7)),
    (PREDICT, "last.safetensors", having("clients", value={"0": 5})),
]


@pytest.mark.parametrize(("words", "name", "change"), WRONG)
def test_commands_say_what_is_wrong_with_a_file(
    words: list[str], name: str, change: Callable[[Any], Any], finished: Path
) -> None:
    path = finished / "run" / name
    before = path.read_bytes()
    try:
        rewritten(path, change)
        said = call(*words, cwd=finished, code=2).stderr
    finally:
        path.write_bytes(before)
    assert said.startswith("error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("text", ["", "x = " + "[" * 5000 + "]" * 5000, "rounds = 'x'\n", "algorithm = 3\n", "\xff"])
@pytest.mark.parametrize("command", ["resume", "report"])
def test_commands_say_what_is_wrong_with_a_configuration(command: str, text: str, finished: Path) -> None:
    path = finished / "run" / "config.toml"
    before = path.read_bytes()
    try:
        path.write_text(text, encoding="latin-1")
        done = call(command, "run", cwd=finished, code=None)
    finally:
        path.write_bytes(before)
    assert done.returncode == 2 or command == "report"  # a report does not read these files


def test_serve_says_what_is_wrong_with_its_folder(tmp_path: Path) -> None:
    base = {"algorithm": "psl", "data": "digits", "clients": 2, "samples_per_client": 10, "test": 20, "rounds": 1}
    in_memory(RunConfig.of(base), folder=tmp_path).run.run()
    words = [word for name, value in base.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--insecure", "--listen", "127.0.0.1:0", "--out", "run"]
    for change in (without("clients"), having("clients", "inner", "samples", value=[-5, 5]), having("rounds", value=7)):
        path = tmp_path / "run" / "checkpoint.safetensors"
        before = path.read_bytes()
        rewritten(path, change)
        assert "checkpoint.safetensors' is damaged" in call("serve", *words, cwd=tmp_path, code=2).stderr
        path.write_bytes(before)
