"""At the end, the server's part goes to the clients that want it, if the server shares it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import difference, mlp, source

from cutlayer import ConfigError, RunConfig, load_model
from cutlayer.engine.local import named_as_whole
from cutlayer.errors import WireError
from cutlayer.remote.sides import client_name, remote_training, share, worker_of
from cutlayer.remote.transports.memory import MemoryCarrier
from cutlayer.testing.deployed import InMemory, in_memory
from cutlayer.trained import find_trained
from cutlayer.wire import encode_named
from cutlayer.wire import messages as m
from cutlayer.wire.frames import Frame

SIZES, SHAPE = (9, 8, 7), (6,)


def config(**options: Any) -> RunConfig:
    given = {"algorithm": "psl", "cut": "1", "clients": 3, "partition": "column", "rounds": 2, "batch": 4}
    return RunConfig.of({**given, **options})


def finished(asked: RunConfig, folder: Path, **options: Any) -> InMemory[MemoryCarrier]:
    made = in_memory(asked, model=mlp, data=source(SIZES, SHAPE), folder=folder, **options)
    made.run.run()
    return made


def held(made: InMemory[MemoryCarrier], client: int) -> dict[str, torch.Tensor]:
    """A client's whole model, put together from both sides."""
    own = named_as_whole(made.workers[client].client.module.state_dict(), made.cohort.shape)
    return {**own, **made.run.training.server.model.state_dict()}


@pytest.mark.parametrize("algorithm", ["psl", "sfl", "ussl", "fl"])
def test_clients_keep_the_whole_model(algorithm: str, tmp_path: Path) -> None:
    """A client keeps its own part and the server's, and nothing of other clients. The bytes are counted separately."""
    cuts: dict[str, Any] = {"fl": {"cut": None}, "ussl": {"tail_cut": "3"}}.get(algorithm, {})
    made = finished(config(algorithm=algorithm, share_server_model=True, **cuts), tmp_path)
    before = made.run.result
    assert before is not None
    sent = share(made.run, made.cohort)
    size = sum(t.nbytes for t in made.run.training.server.model.state_dict().values())
    assert sent == dict.fromkeys(range(3), size)
    for k in range(3):
        kept = find_trained(tmp_path / client_name(k))
        assert difference(kept.state(), held(made, k)) == 0
        assert kept.names == [k, "average"]
        assert difference(kept.state(k), kept.state("average")) == 0
        with pytest.raises(ConfigError, match=f"there is no model of client-{(k + 1) % 3} here"):
            kept.state((k + 1) % 3)
        assert load_model(tmp_path / client_name(k), model=mlp)(torch.zeros(2, 6)).shape == (2, 4)
    after = made.run.result
    assert after is not None
    assert after.bytes_down == before.bytes_down  # the bytes of training
    rows = {row["kind"]: row["wire-unicast"] for row in after.bytes if row["direction"] == "down"}
    assert rows.get("server model", 0) == 3 * size
    assert '"server model"' in (tmp_path / "run/result.json").read_text() or not size


def test_only_clients_that_want_it_get_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = source(SIZES, SHAPE)
    folders = {k: tmp_path / client_name(k) for k in range(3)}
    for folder in folders.values():
        folder.mkdir()
    workers = {
        k: worker_of(config(share_server_model=k == 1), k, name=client_name(k), folder=folders[k], model=mlp, data=data)
        for k in folders
    }
    made = finished(config(share_server_model=True), tmp_path, workers=workers)
    assert sorted(share(made.run, made.cohort)) == [1]
    assert [k for k in folders if (folders[k] / "last.safetensors").exists()] == [1]

    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(folders[1])
    folders[1].mkdir()
    made = finished(config(), tmp_path, workers={
        k: worker_of(config(share_server_model=True), k, name=client_name(k), folder=None, model=mlp, data=data)
        if k != 1
        else worker_of(config(share_server_model=True), k, name=client_name(k), folder=folders[k], model=mlp, data=data)
        for k in folders
    })  # fmt: skip
    assert "client-1: the server keeps its part of the model" in caplog.text
    assert "client-0" not in caplog.text  # without a folder, it does not ask for the part
    assert share(made.run, made.cohort) == {}


def test_a_client_that_does_not_want_it_refuses_it(tmp_path: Path) -> None:
    worker = worker_of(config(), 0, name="client-0", folder=tmp_path, model=mlp, data=source(SIZES, SHAPE))
    body = memoryview(b"".join(encode_named({"2.weight": torch.zeros(8, 8)})))
    with pytest.raises(WireError, match="which this client's configuration does not want"):
        worker.handle(Frame(m.TakeServer(0, 1), body, 0, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "2.weight": torch.full((8, 8), torch.nan)}, "holds NaN or infinite numbers"),
        (lambda s: {k: v for k, v in s.items() if k != "2.bias"}, "tensors"),
        (lambda s: {**s, "2.weight": torch.zeros(9, 8)}, "float32 .9, 8. came"),
    ],
)
def test_a_server_part_of_another_form_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    asked = config(share_server_model=True)
    worker = worker_of(asked, 0, name="client-0", folder=tmp_path, model=mlp, data=source(SIZES, SHAPE))
    server = {k: v for k, v in mlp().state_dict().items() if k[0] in "24"}
    with pytest.raises(WireError, match=message):
        worker.handle(Frame(m.TakeServer(0, 1), memoryview(b"".join(encode_named(change(server)))), 0, 0))
    assert not (tmp_path / "last.safetensors").exists()


def test_the_server_alone_has_no_whole_model(tmp_path: Path) -> None:
    """The exception: the server averages the clients' parts itself."""
    finished(config(), tmp_path / "psl")
    with pytest.raises(ConfigError, match="the clients' parts of this model are with the clients"):
        load_model(tmp_path / "psl/run", model=mlp)
    made = finished(config(algorithm="sfl"), tmp_path / "sfl")
    assert difference(load_model(tmp_path / "sfl/run", model=mlp).state_dict(), held(made, 0)) == 0


def test_both_sides_start_from_the_same_weights(tmp_path: Path) -> None:
    """The client's starting weights are compared; those of the server's part are not."""
    torch.manual_seed(1)
    state = mlp().state_dict()
    files = {
        "a": state,
        "server": {**state, "4.bias": state["4.bias"] + 1},
        "client": {**state, "0.bias": -state["0.bias"]},
    }
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in files}
    for name, tensors in files.items():
        save_file(tensors, paths[name])
    made = finished(config(weights=paths["a"], rounds=1, client_lr=1e-30), tmp_path / "run")
    assert difference(held(made, 2), state) < 1e-6

    def joins(client: str | None, server: str) -> Any:
        options: dict[str, Any] = {"model": mlp, "data": source(SIZES, SHAPE)}
        worker = worker_of(config(weights=client and paths[client]), 0, name="client-0", **options)
        _, _, greet = remote_training(config(weights=paths[server]), MemoryCarrier({}), [0] * 3, **options)
        return greet(worker.hello(), 0)

    assert isinstance(joins("a", "server"), m.Welcome)
    for other in ("client", None):
        refused = joins(other, "a")
        assert isinstance(refused, m.Refused)
        assert refused.sentence.startswith("digest of the client's starting weights is ")
