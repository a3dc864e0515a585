"""Deployments of any task: what both sides compare, what they cannot derive, and targets that stay with clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cutlayer import ConfigError, Run
from cutlayer.build import own_source
from cutlayer.data.samples import Samples, Source
from cutlayer.errors import RefusedError
from cutlayer.options import RunConfig
from cutlayer.remote.sides import worker_of
from cutlayer.remote.transports.memory import MemoryCarrier
from cutlayer.testing.deployed import in_memory
from cutlayer.wire import messages as m
from cutlayer.wire.codecs.raw import RAW
from cutlayer.wire.tensors import encode

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
TASK = """
from cutlayer.plugins import option
from cutlayer.tasks import Task, task

@task("scaled", title="Scaled", targets="numbers")
class Scaled(Task):
    power: float = option(2.0)
    def losses(self, outputs, targets):
        return POWER(outputs.view(-1) - targets)
    def width(self, targets, classes):
        return 1
"""


def table(path: Path, targets: Tensor) -> str:
    """A CSV file of `X` and the given targets."""
    rows = [",".join(f"{v:.4f}" for v in x) + f",{y.item():g}" for x, y in zip(X, targets, strict=True)]
    path.write_text("\n".join(["a,b,c,d,e,label", *rows]) + "\n", encoding="utf-8")
    return str(path)


def config(data: str, **options: Any) -> RunConfig:
    given = {"algorithm": "psl", "model": "mlp", "data": data, "clients": 2, "rounds": 1, "batch": 8}
    return RunConfig.of({**given, **options})


def refused(ours: RunConfig, theirs: RunConfig) -> str:
    """The server's answer to a client that joins with another configuration."""
    workers = {0: worker_of(theirs, 0, name="client-0"), 1: worker_of(ours, 1, name="client-1")}
    with pytest.raises(RefusedError) as caught:
        next(iter(in_memory(ours, workers=workers).run))
    return str(caught.value)


def test_a_client_with_another_task_is_refused(tmp_path: Path) -> None:
    """The sentence names the task and the task options of both sides."""
    data = table(tmp_path / "two.csv", (X[:, 0] > 0).long())
    ours = config(data)
    assert refused(ours, config(data, task="binary")).startswith(
        "task is binary for the client and classification for the server"
    )
    assert refused(ours, config(data, label_smoothing=0.1)).startswith(
        "label_smoothing is 0.1 for the client and 0.0 for the server"
    )
    quantity = config(data, task="regression", loss="huber", huber_delta=2.0)
    assert refused(quantity, config(data, task="regression")).startswith("huber_delta is 1.0 for the client and 2.0")


def test_a_task_file_is_compared_by_its_code(tmp_path: Path) -> None:
    """Each side names its own copy, in any place. Different code under the same name is refused."""
    paths = {}
    for name, power in (("server", "torch.square"), ("client", "torch.square"), ("other", "torch.abs")):
        (tmp_path / name).mkdir()
        paths[name] = tmp_path / name / "task.py"
        paths[name].write_text("import torch\n" + TASK.replace("POWER", power))
    data = table(tmp_path / "data.csv", X[:, 0] + X[:, 1])
    ours, same, other = (config(data, task=f"{p}:Scaled") for p in paths.values())
    workers = {k: worker_of(same, k, name=f"client-{k}") for k in range(2)}
    there = in_memory(ours, workers=workers).run
    there.run()
    assert there.result is not None
    assert there.result.metric == "loss"
    sentence = refused(ours, other)
    assert sentence.startswith("code of the task is ")
    assert " for the client and " in sentence
    powered = config(data, task=f"{paths['client']}:Scaled", power=3.0)
    assert refused(ours, powered).startswith("power is 3.0 for the client and 2.0 for the server")


def test_nobody_can_balance_classes_that_clients_keep_to_themselves(tmp_path: Path) -> None:
    """With its own data, a client refuses and names the remedy. With shares of common data, all count alike."""
    data = table(tmp_path / "two.csv", (X[:, 0] > 0).long())
    own = table(tmp_path / "own.csv", (X[:, 0] > 0.9).long())
    ours = config(data, balanced_classes=True, class_names=("0", "1"))
    with pytest.raises(ConfigError, match=r"balanced_classes = True is derived .* give class_weights to server and"):
        worker_of(ours, 0, name="client-0", own=own_source(ours, own))
    weighted = config(data, class_weights=(0.5, 2.0), class_names=("0", "1"))
    assert worker_of(weighted, 0, name="client-0", own=own_source(weighted, own)).duty.samples
    next(iter(in_memory(ours).run))
    theirs = config(own, balanced_classes=True, class_names=("0", "1"))  # another file with the same options
    assert refused(ours, theirs).startswith("class_weights is (")


def test_a_watch_needs_classes(tmp_path: Path) -> None:
    data = table(tmp_path / "data.csv", X[:, 0] + X[:, 1])
    ours = config(data, task="regression")
    assert worker_of(ours, 0, name="client-0").duty.watch == "off"
    with pytest.raises(ConfigError, match=r"watch = 'warn' .* the task 'regression' are not one class per sample"):
        worker_of(ours, 0, name="client-0", watch="warn")
    averaged = config(data, task="regression", algorithm="fl")  # it receives models, which it checks for every task
    assert worker_of(averaged, 0, name="client-0", watch="warn").duty.watch == "warn"


class Listening(MemoryCarrier):
    """Records all messages of clients."""

    said: list[tuple[m.Message, bytes]]

    def answer(self, client: int, frame: Any) -> Any:
        answer = super().answer(client, frame)
        if answer is not None:
            message, body = answer
            self.__dict__.setdefault("said", []).append((message, b"".join(bytes(part) for part in body)))
        return answer


def written(rows: int, width: int) -> int:
    """Number of bytes of one tensor in a message."""
    return sum(len(bytes(part)) for part in encode([torch.zeros(rows, width)], [RAW]))


def test_quantities_stay_with_the_clients() -> None:
    """U-shape: of the targets, only the loss, the mass and what the features' gradients reveal goes up."""

    def heard(shift: float) -> tuple[Listening, Run, Any]:
        y = X[:, 0] + shift
        held = Samples(X[40:50], y[40:50])
        source = Source("drawn", Samples(X[:40], y[:40]), held, Samples(X[50:], y[50:]), ())
        net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 1))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for p in net.parameters():
                nn.init.normal_(p, std=0.3)
        given = {"algorithm": "ussl", "task": "regression", "cut": "1", "tail_cut": "3", "clients": 2, "batch": 8}
        options = RunConfig.of({**given, "rounds": 1, "client_lr": 0.01})
        there = in_memory(options, model=net, data=source, carrier=Listening)
        hellos = [worker.hello() for worker in there.workers.values()]
        there.run.run()
        return there.carrier, there.run, hellos

    (one, run, hellos), (other, _, others) = heard(0.0), heard(100.0)
    kinds = {type(message) for message, _ in one.said}
    training = {m.SmashedUp, m.TailUp}
    assert training <= kinds
    for message, body in one.said:
        if isinstance(message, m.SmashedUp):
            assert len(body) == written(message.rows, 7)  # the smashed data, and no targets after them
        if isinstance(message, m.TailUp):
            assert len(body) == written(message.rows, 6)
            assert set(message.__struct_fields__) == {"step", "rows", "loss", "mass"}
            assert message.mass == message.rows
    first, same = (next(body for message, body in c.said if isinstance(message, m.SmashedUp)) for c in (one, other))
    assert first == same  # before the first update, nothing that goes up depends on targets
    assert hellos == others
    assert run.result is not None
    assert run.result.metric == "rmse"
