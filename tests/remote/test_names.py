"""Names of classes and features are terms of the handshake, so no client trains on permuted labels or columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cutlayer.build import own_source
from cutlayer.data import from_memory
from cutlayer.options import RunConfig
from cutlayer.remote.sides import feature_names, remote_training, worker_of
from cutlayer.remote.transports.memory import MemoryCarrier
from cutlayer.wire import messages as m

BASE: dict[str, Any] = {"algorithm": "psl", "model": "mlp", "clients": 2, "rounds": 1, "test": 6, "validation": 6}


def table(path: Path, header: str, labels: list[str], words: str = "") -> Path:
    """A CSV file with two columns of numbers, a column of `words` if there are any, and labels."""
    lines = [header]
    for n in range(48):
        word = [words[n % len(words)]] if words else []
        lines.append(",".join([f"{n}.5", f"{n % 7}.25", *word, labels[n % len(labels)]]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def arrays(path: Path, labels: Any) -> Path:
    labels = np.asarray(labels)
    y = np.resize(labels, (48, *labels.shape[1:]))
    np.savez(path, x=np.random.default_rng(0).normal(size=(48, 3)).astype(np.float32), y=y)
    return path


def answer(server: Path, own: Path, ours: dict[str, Any] | None = None, theirs: dict[str, Any] | None = None) -> Any:
    """A server's answer to a client with another file. Both have their own options."""
    config = RunConfig.of({**BASE, "data": str(server), **(ours or {})})
    its = RunConfig.of({**BASE, "data": str(server), **((ours if theirs is None else theirs) or {})})
    worker = worker_of(its, 1, name="client-1", own=own_source(its, str(own)))
    _, _, greet = remote_training(config, MemoryCarrier({}), [0] * 2)
    return greet(worker.hello(), 1)


def refused(found: Any) -> str:
    assert isinstance(found, m.Refused)
    assert found.reason == "data"
    return str(found.sentence)


def test_reversed_class_names_are_refused(tmp_path: Path) -> None:
    here, there = (table(tmp_path / f"{n}.csv", "u,v,label", ["benign", "malignant"]) for n in "ab")
    ours = {"class_names": ["benign", "malignant"]}
    said = refused(answer(here, there, ours, {"class_names": ["malignant", "benign"]}))
    assert "classes is 'malignant', 'benign' for the client and 'benign', 'malignant' for the server" in said
    assert isinstance(answer(here, there, ours), m.Welcome)


@pytest.mark.parametrize("kind", ["csv", "npz"])
def test_a_file_that_lacks_a_numbered_class_is_refused(kind: str, tmp_path: Path) -> None:
    """Without names, classes 0 and 2 would be counted as 0 and 1. class_names in the study file adds class 1."""
    if kind == "csv":
        here = table(tmp_path / "a.csv", "u,v,label", ["0", "1", "2"])
        there = table(tmp_path / "b.csv", "u,v,label", ["0", "2"])
    else:
        here, there = arrays(tmp_path / "a.npz", [0, 1, 2]), arrays(tmp_path / "b.npz", [0, 2])
    assert "is '0', '2' for the client and '0', '1', '2' for the server" in refused(answer(here, there))
    assert isinstance(answer(here, there, {"class_names": ["0", "1", "2"]}), m.Welcome)


def test_names_with_commas_are_names(tmp_path: Path) -> None:
    here, there = arrays(tmp_path / "a.npz", ["k, l", "m"]), arrays(tmp_path / "b.npz", ["k", "l, m"])
    assert "is 'k', 'l, m' for the client and 'k, l', 'm' for the server" in refused(answer(here, there))
    assert isinstance(answer(here, here), m.Welcome)


def test_columns_of_categories_are_compared_with_their_categories(tmp_path: Path) -> None:
    header = "u,v,ward,label"
    here = table(tmp_path / "a.csv", header, ["x", "y"], words="kmn")
    assert isinstance(answer(here, table(tmp_path / "b.csv", header, ["x", "y"], words="nmk")), m.Welcome)
    said = refused(answer(here, table(tmp_path / "c.csv", header, ["x", "y"], words="km")))
    assert "is 'u', 'v', 'ward = k', 'ward = m' for the client and 'u', 'v', 'ward = k', 'ward = m', 'ward = n'" in said
    said = refused(answer(here, table(tmp_path / "d.csv", "v,u,ward,label", ["x", "y"], words="kmn")))
    assert "is 'v', 'u', " in said


def test_a_quantity_has_feature_names_alone(tmp_path: Path) -> None:
    numbers = [f"{n / 10}" for n in range(48)]
    here, there = (table(tmp_path / f"{n}.csv", h, numbers) for n, h in (("a", "u,v,label"), ("b", "v,u,label")))
    task = {"task": "regression"}
    assert "list of the features is 'v', 'u' for the client and 'u', 'v'" in refused(answer(here, there, task))
    assert isinstance(answer(here, here, task), m.Welcome)


def test_labels_in_several_columns_have_no_names(tmp_path: Path) -> None:
    """Arrays do not name their columns, so only shapes are compared, and the client is accepted."""
    here = arrays(tmp_path / "a.npz", np.random.default_rng(0).integers(0, 2, (48, 3)))
    found = answer(here, here, {"task": "multilabel"})
    assert isinstance(found, m.Welcome)
    assert found.terms.classes == found.terms.features == m.Names()


def test_tensors_by_name_are_features(tmp_path: Path) -> None:

    one = torch.arange(40.0).view(20, 2)
    source = from_memory(({"left": one, "right": one + 1}, torch.arange(20) % 2), test=4)
    assert feature_names(source) == ["left", "right"]
