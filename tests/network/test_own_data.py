"""A deployment whose clients have their own files, and are tested on rows held out of them."""

from pathlib import Path

import numpy as np
import pytest
from trial import Trial, finished

from cutlayer import Run
from cutlayer.files import read_records
from cutlayer.options import RunConfig

CONFIG = """algorithm = "{algorithm}"
model = "mlp"
clients = 3
rounds = {rounds}
batch = 10
class_names = ["a", "b"]
evaluate_on = "both"
"""


@pytest.mark.network
def test_own_scores_over_tls_are_those_of_a_simulation(tmp_path: Path) -> None:
    """The server tests with its own rows too. A client with a single row is refused before it dials."""
    rng = np.random.default_rng(0)
    sizes, labels = (40, 33, 21), np.array(["a", "b"])

    def rows(count: int, part: str = "") -> dict[str, np.ndarray]:
        x = rng.normal(size=(count, 5)).astype(np.float32)
        return {f"x{part}": x, f"y{part}": labels[(x[:, 0] > 0).astype(int)]}

    held = {**rows(20, "_test"), **rows(10, "_validation")}
    each = [rows(n) for n in sizes]
    trial = Trial(tmp_path, "psl", 3, config=CONFIG)
    np.savez(tmp_path / "server.npz", **rows(30), **held)
    np.savez(tmp_path / "few.npz", **{name: array[:1] for name, array in each[0].items()})
    for k, mine in enumerate(each):
        np.savez(tmp_path / f"own-{k}.npz", **mine)
    whole = {name: np.concatenate([mine[name] for mine in each]) for name in ("x", "y")}
    np.savez(tmp_path / "all.npz", **whole, **held, client=np.repeat(np.arange(3), sizes))
    try:
        few = trial.join(0, "--data", "server.npz", "--own-data", "few.npz")
        assert few.wait(60) == 2
        assert "client 0 has 1 rows, too few to hold out 0.2 of them" in trial.log("client-0")
        server = trial.serve("--data", "server.npz")
        clients = [trial.join(k, "--data", "server.npz", "--own-data", f"own-{k}.npz") for k in range(3)]
        finished(trial, server, *clients)
    finally:
        trial.stop()
    options = {"algorithm": "psl", "model": "mlp", "clients": 3, "rounds": 3, "batch": 10, "class_names": ["a", "b"]}
    options |= {"evaluate_on": "both", "data": str(tmp_path / "all.npz"), "partition": "column", "engine": "local"}
    here = Run(RunConfig.of(options), out=tmp_path / "here")
    here.run()
    own = [[x for x in read_records(tmp_path / name / "clients.jsonl") if x["on"] == "own"] for name in ("here", "run")]
    assert own[0][-1]["clients"] == own[1][-1]["clients"]
    assert list(own[1][-1]["clients"]) == ["0", "1", "2"]
