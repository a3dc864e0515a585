"""Samples with several input tensors: read, dealt, cut, trained with every engine, and sent."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT, difference
from torch import Tensor, nn

from cutlayer import ConfigError, DataError, Run, from_arrays, from_dataset
from cutlayer.testing import train_in_memory

N, T = 40, 6


class Tagger(nn.Module):
    """Scores for each token from two named inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """[R, T], [R, T] -> logits [R, T, 5]."""
        h = self.body(self.embed(input_ids) * attention_mask.unsqueeze(-1)).tanh()
        pooled = (h * attention_mask.unsqueeze(-1)).sum(1, keepdim=True)
        return {"logits": self.head(h + pooled)}


def drawn() -> tuple[dict[str, Tensor], Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (N, T), generator=g)
    mask = (torch.arange(T) < torch.randint(1, T + 1, (N, 1), generator=g)).long()
    return {"input_ids": ids, "attention_mask": mask}, torch.where(mask > 0, ids % 5, -100)


def trained(engine: str = "local", **options: Any) -> Run:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "algorithm": "psl", "task": "tokens", "cut": "body", "clients": 3, "batch": 4, "rounds": 2,
        "precision": "float64", "client_optimizer": "sgd", "client_lr": 0.1, "engine": engine,
    } | options  # fmt: skip
    run = Run(model=Tagger(), data=drawn(), **settings)
    run.run()
    return run


@pytest.mark.parametrize("algorithm", ["psl", "sglr", "fl", "sflv1"])
def test_every_engine_takes_them(algorithm: str) -> None:
    local = trained(algorithm=algorithm)
    torch.manual_seed(1)
    far = train_in_memory(local.config, model=Tagger(), data=drawn())
    stacked = trained("auto", algorithm=algorithm)
    for other in (far, stacked):
        for a, b in zip(other.evaluations, local.evaluations, strict=True):
            assert a.test_loss == pytest.approx(b.test_loss, rel=1e-9)
    there, here = (dict(run.training.server.model.state_dict()) for run in (far, local))
    assert difference(there, here) < 1e-11
    assert far.training.ledger.table() == local.training.ledger.table()


def test_readers_keep_their_names_and_rows() -> None:
    x, y = drawn()
    source = from_arrays(x, y, targets="classes", test=0.25, validation=0.2)
    for part in (source.train, source.validation, source.test):
        assert isinstance(part.inputs, dict)
        assert list(part.inputs) == ["input_ids", "attention_mask"]
        # A row's tensors stay together and with their target.
        assert torch.equal(torch.where(part.inputs["attention_mask"] > 0, part.inputs["input_ids"] % 5, -100), part.y)
    assert sum(map(len, (source.train, source.validation, source.test))) == N
    pair = from_arrays((np.zeros((8, 3)), np.arange(8)), np.arange(8) % 2)
    assert [x.dtype for x in pair.train.rows] == [torch.float32, torch.int64]


class Items(torch.utils.data.Dataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        return self.items[row]


def test_items_may_be_dictionaries() -> None:
    x, y = drawn()
    items = [
        {"input_ids": x["input_ids"][i], "attention_mask": x["attention_mask"][i], "labels": y[i]} for i in range(N)
    ]
    source = from_dataset(Items(items), targets="classes")
    assert list(source.train.inputs) == ["input_ids", "attention_mask"]
    pairs = from_dataset(
        Items([((x["input_ids"][i], x["attention_mask"][i]), y[i]) for i in range(N)]), targets="classes"
    )
    assert torch.equal(pairs.train.rows[0], source.train.rows[0])


def test_bad_input() -> None:
    x, y = drawn()
    with pytest.raises(DataError, match=r"x have rows .*'attention_mask': 39"):
        from_arrays({**x, "attention_mask": x["attention_mask"][1:]}, y, targets="classes")
    with pytest.raises(DataError, match="x 'input_ids' are of type <U"):
        from_arrays({**x, "input_ids": np.array(["a"] * N)}, y, targets="classes")
    with pytest.raises(DataError, match="x 'attention_mask' hold NaN"):
        from_arrays({**x, "attention_mask": torch.full((N, T), torch.nan)}, y, targets="classes")
    ragged = [({"a": torch.zeros(1 + i)}, 0) for i in range(3)]
    with pytest.raises(DataError, match=r"do not have 'a' in one shape.*pad sequences"):
        from_dataset(Items(ragged))
    with pytest.raises(ConfigError, match="does not take these inputs"):
        Run(model=Tagger(), data=({"tokens": x["input_ids"]}, y), task="tokens", cut="body", clients=2)


def test_the_page_on_tasks() -> None:
    for program in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text("utf-8"), re.DOTALL):
        exec(compile(program, "docs/tasks.md", "exec", dont_inherit=True), {"__name__": "__main__"})
