"""Loggers with their real libraries, offline: the libraries read back the numbers of the run.

Each run is interrupted after a step that is not in the checkpoint, and resumed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cutlayer import Run
from cutlayer.files import read_records
from cutlayer.folder import EVALUATIONS, LOGS, STEPS

STUDY: dict[str, Any] = {
    "data": "digits", "model": "mlp", "algorithm": "psl", "clients": 2, "samples_per_client": 20, "rounds": 3,
    "eval_every": 1, "checkpoint_every": 1,
}  # fmt: skip
# These libraries use deprecated functions of others.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
INTERRUPTED = 5  # the number of steps before the interruption; the checkpoint has three


def trained(name: str, out: Path, **options: Any) -> None:
    run = iter(Run(**STUDY, log_to=(name,), out=out, **options))
    for _ in range(INTERRUPTED):
        next(run)
    run.close()  # type: ignore[attr-defined]
    Run.resume(out).run()


def losses(out: Path) -> dict[int, float]:
    return {record["step"] + 1: pytest.approx(record["loss"], rel=1e-6) for record in read_records(out / STEPS)}


def scores(out: Path) -> dict[int, float]:
    return {s["step"]: pytest.approx(s["test"]["accuracy"], rel=1e-6) for s in read_records(out / EVALUATIONS)}


def logged(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, which is a LevelDB log with a header of 7 bytes.

    The log has blocks of 32 kB with pieces of records. Each piece has a checksum (4 bytes), a length (2 bytes) and a
    kind: a whole record, or the first, a middle or the last piece of one.
    """
    assert content.startswith(b":W&B")
    at, record = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no room for another piece: zeros
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'cutlayer[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    trained("tensorboard", out)
    found = EventAccumulator(str(out / LOGS / "tensorboard"))
    found.Reload()
    assert [e.step for e in found.Scalars("train/loss")] == list(range(1, 10))  # each step once
    assert {e.step: e.value for e in found.Scalars("train/loss")} == losses(out)
    assert {e.step: e.value for e in found.Scalars("test/accuracy")} == scores(out)
    assert "options/text_summary" in found.Tags()["tensors"]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="pip install 'cutlayer[wandb]'")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    trained("wandb", out, wandb_mode="offline", wandb_project="study")
    wandb.teardown()  # wandb's process writes the last lines when it ends
    folders = sorted((out / LOGS / "wandb").glob("offline-run-*"))
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1, "one run, gone on with"
    found: dict[str, dict[int, float]] = {"train/loss": {}, "test/accuracy": {}}
    for folder in folders:
        for data in logged(next(folder.glob("run-*.wandb")).read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                assert (record.run.project, record.run.display_name) == ("study", "run")
            items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            for name, values in found.items():
                if name in items:
                    values[items["step"]] = items[name]
    assert found == {"train/loss": losses(out), "test/accuracy": scores(out)}


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pip install 'cutlayer[mlflow]'")
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    out, uri = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    trained("mlflow", out, mlflow_uri=uri, mlflow_experiment="study")
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("study")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["clients"]) == ("run", "FINISHED", "2")
    for name, expected in (("train/loss", losses(out)), ("test/accuracy", scores(out))):
        history = client.get_metric_history(run.info.run_id, name)
        assert {m.step: m.value for m in history} == expected


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="pip install 'cutlayer[trackio]'")
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    for module in ("trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    assert tmp_path / "trackio" == utils.TRACKIO_DIR
    out = tmp_path / "run"
    trained("trackio", out, trackio_project="study")
    assert SQLiteStorage.get_runs("study") == ["run"]
    logs = SQLiteStorage.get_logs("study", "run")
    assert {line["step"]: line["train/loss"] for line in logs if "train/loss" in line} == losses(out)
    assert {line["step"]: line["test/accuracy"] for line in logs if "test/accuracy" in line} == scores(out)
