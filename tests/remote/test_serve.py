"""A restarted server uses the configuration of its folder, or does not start."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support import call  # type: ignore[import-not-found]

from cutlayer.errors import RunFolderError
from cutlayer.options import FaultConfig, RunConfig
from cutlayer.remote.security import ServerSecurity
from cutlayer.remote.serve import Service, Serving
from cutlayer.run import refuse_other
from cutlayer.testing import in_memory

BASE: dict[str, Any] = {
    "algorithm": "sglr",
    "data": "digits",
    "model": "mlp",
    "clients": 2,
    "samples_per_client": 10,
    "test": 20,
    "rounds": 1,
    "batch": 10,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with remote clients that has written a checkpoint."""
    folder = tmp_path_factory.mktemp("served")
    in_memory(RunConfig.of(BASE), folder=folder).run.run()
    return folder / "run"


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("rounds", 9, "rounds = 1, not 9"),
        ("client_lr", 0.5, r"client_lr = [0-9.]+, not 0\.5"),
        ("server_optimizer", "adam", "server_optimizer = not set, not 'adam'"),
        ("algorithm", "psl", "algorithm = 'sglr', not 'psl'"),
        ("phi", 0.25, r"phi = 0\.5, not 0\.25"),
        ("seed", 5, "seed = 0, not 5"),
        ("up_codec", "int8", "up_codec = 'raw', not 'int8'"),
        ("share_server_model", True, "share_server_model = False, not True"),
        ("data", "fashion-mnist", "data = 'digits', not 'fashion-mnist'"),
    ],
)
def test_another_configuration_is_refused_before_anybody_can_come(
    name: str, value: Any, sentence: str, served: Path
) -> None:
    other = RunConfig.of({**BASE, name: value})
    with pytest.raises(RunFolderError, match=f"was begun with {sentence}: go on with .*, or begin a new run"):
        Service(other, Serving("127.0.0.1:0", ServerSecurity()), served)


def test_how_it_is_served_may_change(served: Path) -> None:
    faults = FaultConfig.of({"deadline": 5.0, "quorum": 0.5, "faulty": "stop"})
    service = Service(RunConfig.of(BASE), Serving("localhost:0", ServerSecurity(), faults, keepalive=20.0), served)
    assert service.run.out == served


def test_the_command_says_it_and_ends_with_2(served: Path, tmp_path: Path) -> None:
    words = [word for name, value in BASE.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    other = [*words, "--client-lr", "0.7"]
    said = call("serve", *other, "--insecure", "--listen", "127.0.0.1:0", "--out", str(served), code=2, cwd=tmp_path)
    assert "client_lr = " in said.stderr
    assert "not 0.7" in said.stderr


def test_data_may_lie_elsewhere_once_a_checkpoint_knows_what_they_are(tmp_path: Path) -> None:
    """A checkpoint compares the content of the data. Before the first checkpoint, only the name identifies them."""
    rows = "".join(f"{x},{x % 3},{'ab'[x % 2]}\n" for x in range(40))
    (tmp_path / "here.csv").write_text(f"u,v,label\n{rows}")
    shutil.copy(tmp_path / "here.csv", tmp_path / "there.csv")
    config = {**BASE, "data": str(tmp_path / "here.csv"), "test": 10}
    in_memory(RunConfig.of(config), folder=tmp_path).run.run()
    moved = RunConfig.of({**config, "data": str(tmp_path / "there.csv")})
    refuse_other(tmp_path / "run", moved)
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    with pytest.raises(RunFolderError, match=r"here\.csv', not '.*there\.csv"):
        refuse_other(tmp_path / "run", moved)
