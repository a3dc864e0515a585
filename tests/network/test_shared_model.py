"""A deployment whose clients keep the whole model and use it on their own machines."""

import json
from pathlib import Path

import numpy as np
import pytest
from support import call, difference
from trial import CONFIG, Trial, finished

from cutlayer import load_model

OWN = """
from torch import nn


def make(input_shape, classes):
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
    return nn.Sequential(body, nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, classes))
"""


@pytest.mark.network
def test_clients_export_and_predict_from_their_own_folders(tmp_path: Path) -> None:
    """Each side has its own file that makes the model. At the end, each client has the whole model."""
    trial = Trial(tmp_path, "psl", 2, config=CONFIG.replace('model = "mlp"', 'cut = "0"\nshare_server_model = true'))
    (tmp_path / "server.py").write_text(OWN)
    np.savez(tmp_path / "new.npz", x=np.random.default_rng(0).random((5, 1, 8, 8)).astype(np.float32))
    (tmp_path / "clients.py").write_text(f"# my own copy\n{OWN}")
    try:
        server = trial.serve("--model", "server.py:make")
        finished(trial, server, *(trial.join(k, "--model", "clients.py:make") for k in range(3)))
    finally:
        trial.stop()
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [e["clients"] for e in events if e["event"] == "shared"] == [[0, 1, 2]]
    states = [load_model(tmp_path / "c" / f"client-{k}").state_dict() for k in range(3)]
    server_parts = [{n: t for n, t in state.items() if not n.startswith("0.")} for state in states]
    assert difference(server_parts[0], server_parts[2]) == 0
    assert difference(states[0], states[2]) > 0
    done = call("export", "c/client-1", "--out", "m.safetensors", cwd=tmp_path)
    assert "Weights: the model of client-1, last evaluation, after round 2." in done.stdout
    assert json.loads((tmp_path / "m.safetensors.json").read_text())["model"].endswith("clients.py:make")
    with np.load(tmp_path / "new.npz") as new:
        rows = len(new["x"])
    lines = call("predict", "c/client-1", "new.npz", cwd=tmp_path).stdout.splitlines()
    assert len(lines) == rows + 1
    assert call("predict", "run", "new.npz", cwd=tmp_path, code=2).stderr.startswith(
        "error: the clients' parts of this"
    )
