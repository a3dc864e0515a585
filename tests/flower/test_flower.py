"""Cutlayer as a Flower app with Flower's own processes: the example, and errors."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer import Run, checkpoint
from cutlayer.errors import ConfigError
from cutlayer.options import RunConfig

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower"
PATIENCE = 150.0  # seconds, for each wait
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One thread for Flower's processes, and a known place for their temporary folders."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))


def _alive(folder: Path) -> list[str]:
    """Commands of all processes that belong to the federation in `folder`."""
    mark = f"FLWR_HOME={folder.resolve() / 'flwr'}\0".encode()
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def _until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def _start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, EXAMPLE / "run.py", "--folder", folder, "--timeout", str(PATIENCE), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _config(cut: str = "") -> RunConfig:
    """The example's configuration for a local simulation, optionally with other cuts."""
    options = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return RunConfig.of(
        {k: v for k, v in options.items() if k != "serve" and v != ""} | {"engine": "local", "cut": cut or None}
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param("", marks=pytest.mark.network, id="one cut"),
        pytest.param("hidden1,hidden3,hidden2", marks=pytest.mark.slow, id="different cuts"),
    ],
)
def test_the_example_gives_the_simulations_numbers(cut: str, tmp_path: Path) -> None:
    process = _start(tmp_path / "f", *(["--run-config", f'cut="{cut}"'] if cut else []))
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "client-2" in said  # the table of clients

    local = Run(_config(cut), out=tmp_path / "local")
    records = list(local)
    assert local.result is not None
    out = tmp_path / "f" / "run"
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert [s["loss"] for s in steps] == [r.loss for r in records]
    assert [(s["bytes_up"], s["bytes_down"]) for s in steps] == [(r.bytes_up, r.bytes_down) for r in records]
    result = json.loads((out / "result.json").read_text())
    assert result["test_score"] == local.result.test_score
    ours, theirs = (
        _tensors(checkpoint.read(folder / "checkpoint.safetensors")["server"]) for folder in (tmp_path / "local", out)
    )
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    blocks = [
        checkpoint.read(folder / "checkpoint.safetensors")["clients"].get("inner", {}).get("blocks", {})
        for folder in (tmp_path / "local", out)
    ]
    assert [list(own) for own in blocks] == [["0", "2"] if cut else []] * 2
    assert all(torch.equal(a, b) for a, b in zip(*map(_tensors, blocks), strict=True))

    clients = json.loads((out / "clients.json").read_text())
    assert [c["client"] for c in clients] == ["client-0", "client-1", "client-2"]
    assert {(c["reason"], c["samples"]) for c in clients} == {("the run is done", 100)}
    _leaves_nothing(tmp_path)


def _leaves_nothing(tmp_path: Path) -> None:
    """Checks that no processes are left, and no keys or tokens in logs and files."""
    _until(lambda: not _alive(tmp_path / "f"), "processes are left", 30)
    _keeps_no_secret(tmp_path)


def _keeps_no_secret(tmp_path: Path) -> None:
    _until(lambda: not list((tmp_path / "tmp").glob("cutlayer-*")), "temporary folders are left", 30)
    for file in (tmp_path / "f").rglob("*"):
        if file.is_file():
            text = file.read_bytes()
            assert b"PRIVATE KEY" not in text, file
            if file.suffix in (".log", ".json", ".jsonl", ".toml"):
                assert not re.search(rb"(?<![\w-])[\w-]{43}(?![\w-])", text), file  # looks like a token


@pytest.mark.slow
def test_an_interrupted_example_leaves_nothing_behind(tmp_path: Path) -> None:
    process = _start(tmp_path / "f", "--run-config", "rounds=100000")
    try:
        _until(lambda: (tmp_path / "f" / "run" / "steps.jsonl").exists(), "no step was taken")
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "interrupted: everything was stopped" in said
    _leaves_nothing(tmp_path)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Any]:
    """The example's federation with a SuperLink and no nodes."""
    spec = importlib.util.spec_from_file_location("flower_example", EXAMPLE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with example.Federation(tmp_path / "f") as made:
        made.superlink(time.monotonic() + PATIENCE)
        yield made


def _ended(federation: Any, *config: str) -> str:
    """Runs the app until it ends and returns its status."""
    until = time.monotonic() + PATIENCE
    options = [word for given in config for word in ("--run-config", given)]
    federation.flwr("run", str(EXAMPLE), "local", "--stream", *options, until=until, quiet=True)
    runs = json.loads(federation.flwr("list", "local", "--format", "json", until=until, quiet=True))["runs"]
    newest = runs[0]
    assert newest["status"].startswith("finished"), newest
    return f"{newest['status']} {newest['status-details']}"


@pytest.mark.slow
def test_what_goes_wrong_has_a_sentence(federation: Any, tmp_path: Path) -> None:
    """Wrong options, too few nodes, a node without its data, and a node that does not answer."""
    said = _ended(federation, 'algorithm="sgrl"')
    assert "finished:failed" in said
    assert "unknown algorithm 'sgrl': did you mean 'sgl'?" in said
    said = _ended(federation, "serve.patience=1.5")
    assert "0 of 3 SuperNodes are connected after 1.5 seconds" in said

    federation.supernode(0, f'data="{tmp_path / "nowhere"}"')
    begin = time.monotonic()
    said = _ended(federation, "clients=1", "serve.patience=100.0")
    assert "client-0 (node" in said
    assert "has failed before training: " in said
    assert "nowhere" in said
    assert time.monotonic() - begin < 100  # ended before the patience was over

    node = federation.processes[-1]
    node.send_signal(signal.SIGSTOP)
    try:
        said = _ended(federation, "clients=1", "serve.patience=3.0")
    finally:
        node.send_signal(signal.SIGCONT)
    assert "0 of 1 clients are connected after 3 seconds" in said
    _keeps_no_secret(tmp_path)


@pytest.mark.slow
def test_a_run_that_is_stopped_ends_on_both_sides(federation: Any, tmp_path: Path) -> None:
    """After `flwr stop`, the ServerApp sends Bye, the ClientApp receives it, and neither waits for the other."""
    federation.supernode(0)
    out, until = tmp_path / "f" / "run", time.monotonic() + PATIENCE
    options = ("--run-config", f'clients=1 rounds=100000 serve.out="{out}"')
    started = federation.flwr("run", str(EXAMPLE), "local", "--format", "json", *options, until=until, quiet=True)
    _until((out / "steps.jsonl").exists, "no step was taken")
    apps = [command for command in _alive(tmp_path / "f") if "flwr-serverapp" in command or "flwr-clientapp" in command]
    assert len(apps) == 2
    federation.flwr("stop", json.loads(started)["run-id"], "local", until=until)
    _until(lambda: not set(apps) & set(_alive(tmp_path / "f")), "apps are left", 60)
    assert not (out / "result.json").exists()
    assert "the server stops" in (tmp_path / "f" / "supernode-0.log").read_text()
    _keeps_no_secret(tmp_path)


def _read(**values: Any) -> Any:
    from cutlayer.flower.hosting import read

    return read({name.replace("__", "."): value for name, value in values.items()})


def test_options_come_from_flower_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('algorithm = "psl"\nrounds = 7\nbatch = 4\nlr-decay-at = [0.5, 0.9]\n')
    config, hosting = _read(
        config=str(file), batch=5, cut="", client_optimizer_options__eps=1e-7, serve__reach="host", serve__out=""
    )
    assert (config.algorithm, config.rounds, config.batch, config.cut) == ("psl", 7, 5, None)
    assert config.lr_decay_at == (0.5, 0.9)
    assert _read(clients=3, model="mlp", cut="hidden1, hidden3*2")[0].cuts == ("hidden1", "hidden3", "hidden3")
    assert config.client_optimizer_options == {"eps": 1e-7}
    assert (hosting.host, hosting.address(5), hosting.out) == ("host", "host:5", None)


@pytest.mark.parametrize(
    ("listen", "reach", "host", "address"),
    [
        ("127.0.0.1:0", None, "127.0.0.1", "127.0.0.1:7"),
        ("[::1]:0", None, "::1", "[::1]:7"),
        ("0.0.0.0:0", "10.0.0.2", "10.0.0.2", "10.0.0.2:7"),
        ("[::]:0", "fd00::2", "fd00::2", "[fd00::2]:7"),
        ("127.0.0.1:0", "tunnel.example.org:99", "tunnel.example.org", "tunnel.example.org:99"),
        ("127.0.0.1:0", "[fd00::2]:99", "fd00::2", "[fd00::2]:99"),
    ],
)
def test_where_clients_dial(listen: str, reach: str | None, host: str, address: str) -> None:
    _, hosting = _read(serve__listen=listen, **({"serve__reach": reach} if reach else {}))
    assert (hosting.host, hosting.address(7)) == (host, address)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rouns": 3}, "unknown option 'rouns': did you mean 'rounds'?"),
        ({"serve__lisen": "x"}, "unknown option 'lisen': did you mean 'listen'?"),
        ({"serve": 3}, "serve = 3 is not a table"),
        ({"serve__quorum": 0.0}, "quorum = 0.0 is not possible"),
        ({"serve__listen": "0.0.0.0:0"}, "give serve.reach"),
        ({"serve__listen": "nohost"}, "is not an address"),
        ({"config": "/nowhere.toml"}, "cannot read the configuration '/nowhere.toml'"),
        ({"algorithm": "psl", "phi": 0.5}, "phi = 0.5 has no effect on psl"),
        ({"clients": 3, "cut": "hidden1,hidden3"}, "cut has 2 entries for 3 clients"),
        ({"clients": 2, "algorithm": "ssl", "cut": "hidden1,hidden3"}, "a list of cuts is not possible with ssl"),
    ],
)
def test_wrong_options_are_named(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        _read(**values)


def test_a_message_of_somebody_else_is_refused() -> None:
    from flwr.app import ConfigRecord, RecordDict

    from cutlayer.errors import WireError
    from cutlayer.flower.invitation import Farewell, Invitation

    invitation = Invitation("client-0", "host:1", "PEM", "{}", 60.0, "a secret")
    assert Invitation.of(invitation.content()) == invitation
    assert "a secret" not in repr(invitation)
    assert Farewell.of(Farewell("done", 3).content()) == Farewell("done", 3)
    for content in (RecordDict(), RecordDict({"cutlayer-invitation": ConfigRecord({"client": 3})})):
        with pytest.raises(WireError, match="use the same version"):
            Invitation.of(content)


def test_a_node_says_where_its_data_are() -> None:
    from flwr.app import Context, RecordDict

    from cutlayer.flower.invitation import Invitation

    invitation = Invitation("client-0", "host:1", "PEM", json.dumps(_config().resolved()), 60.0, "a secret")
    node = {"data": "mine.csv", "data-format": "csv", "clients": 9}
    config = invitation.config(Context(1, 2, node, RecordDict(), {}))
    assert (config.data, config.data_format, config.clients) == ("mine.csv", "csv", 3)
    assert invitation.config(Context(1, 2, {}, RecordDict(), {})).resolved() == _config().resolved()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("algorithm", "marked.py:Mine"),
        ("model", "marked:make"),
        ("data", "marked.py:load"),
        ("task", "marked.py:Counts"),
        ("metrics", ["accuracy", "marked.py:mine"]),
        ("lr_schedule", "marked:Falling"),
        ("up_codec", "marked.py:Grid:0.1+zstd"),
        ("defences", ["marked.py:Mine"]),
    ],
)
def test_a_node_imports_nothing_that_a_message_names(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.app import Context, RecordDict

    from cutlayer.flower.invitation import Invitation

    monkeypatch.chdir(tmp_path)
    Path("marked.py").write_text("open('imported', 'w').close()\n", encoding="utf-8")
    options = json.dumps({**_config().resolved(), name: value})
    invitation = Invitation("client-0", "host:1", "PEM", options, 60.0, "a secret")
    with pytest.raises(ConfigError, match=f"the server's {name} = .* which this node does not import"):
        invitation.config(Context(1, 2, {}, RecordDict(), {}))
    assert not Path("imported").exists()


def test_a_node_names_its_own_code() -> None:
    from flwr.app import Context, RecordDict

    from cutlayer.flower.invitation import Invitation

    options = {**_config().resolved(), "model": "theirs.py:make", "up_codec": "top-k:0.1"}
    invitation = Invitation("client-0", "host:1", "PEM", json.dumps(options), 60.0, "a secret")
    node = {"model": "cutlayer.models.zoo.mlp:mlp"}
    config = invitation.config(Context(1, 2, node, RecordDict(), {}))
    assert (config.model, config.up_codec) == ("cutlayer.models.zoo.mlp:mlp", "top-k:0.1")


def test_a_node_names_its_own_task(tmp_path: Path) -> None:
    """The file is the node's own. The handshake compares it with the server's when the client joins."""
    from flwr.app import Context, RecordDict

    from cutlayer.flower.invitation import Invitation

    (tmp_path / "task.py").write_text(
        "from cutlayer.tasks import Task, task\n\n\n"
        "@task('counts', targets='numbers')\nclass Counts(Task):\n    def losses(self, outputs, targets):\n"
        "        return (outputs.view(-1) - targets).abs()\n",
        encoding="utf-8",
    )
    own = f"{tmp_path / 'task.py'}:Counts"
    options = {**RunConfig.of({"task": own, "clients": 3}).resolved(), "task": "theirs.py:Counts"}
    invitation = Invitation("client-0", "host:1", "PEM", json.dumps(options), 60.0, "a secret")
    node = {"task": own, "metrics": "mae r2"}
    config = invitation.config(Context(1, 2, node, RecordDict(), {}))
    assert config.thing("task", config.task).targets == "numbers"
    assert config.metrics == ("mae", "r2")


def test_flowers_simulation_is_refused() -> None:
    """It runs the ServerApp in a thread, and ClientApps cannot connect to it."""
    from flwr.app import Context, RecordDict
    from flwr.superlink.grid import HttpGrid

    from cutlayer.flower.app import server

    grid = HttpGrid("127.0.0.1:1", insecure=True, token="nobody's")  # connects only when it is used
    with ThreadPoolExecutor(1) as pool, pytest.raises(ConfigError, match="cutlayer run"):
        pool.submit(server, grid, Context(1, 2, {}, RecordDict(), {})).result(60)


def test_without_flower_the_extra_is_named() -> None:
    code = "import sys; sys.modules['flwr'] = None\nimport cutlayer\nimport cutlayer.flower.app"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.rstrip().endswith(
        "Cutlayer as a Flower app needs Flower: install the extra, pip install 'cutlayer[flower]'"
    )
