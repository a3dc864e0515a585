"""After an interruption, a resumed run of any task ends bit for bit like an uninterrupted one, with every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import Tagger, same
from torch import nn

from cutlayer import Run, checkpoint
from cutlayer.data.samples import Samples, Source
from cutlayer.files import read_records
from cutlayer.folder import CHECKPOINT, EVALUATIONS, STEPS

OWNERS = torch.arange(3).repeat_interleave(16)
ENGINES: dict[str, dict[str, Any]] = {
    "local": {"algorithm": "sglr", "engine": "local"},
    "stacked": {"algorithm": "sglr", "engine": "stacked"},
    "union": {"algorithm": "sfl", "average_every": "step", "client_optimizer": "sgd", "engine": "auto"},
}


def case(task: str) -> tuple[Any, dict[str, Any], Source]:
    """A model, options and data: regression with Huber's loss, or tags with padding that does not count."""
    draw = torch.Generator().manual_seed(0)
    if task == "regression":
        x = torch.randn(72, 6, generator=draw)
        every = Samples(x, x[:, :2] * 3)

        def model() -> nn.Module:
            return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

        return model, {"task": "regression", "loss": "huber", "cut": "1"}, source(every)
    words = torch.randint(0, 9, (72, 5), generator=draw)
    mask = (torch.arange(5) < torch.randint(1, 6, (72, 1), generator=draw)).float()
    tags = torch.where(mask > 0, words % 4, -100)
    options = {"task": "tokens", "balanced_classes": True, "cut": "body"}
    return Tagger, options, source(Samples({"words": words, "mask": mask}, tags))


def source(every: Samples) -> Source:
    return Source("drawn", every[:48], every[48:60], every[60:], (), client_column=OWNERS)


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_records(folder / name)]


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("task", ["regression", "tokens"])
def test_interrupted_on_every_engine(task: str, engine: str, tmp_path: Path) -> None:
    """Stopped in the second of three rounds: records, evaluations and models are those of an uninterrupted run."""
    model, own, data = case(task)
    options = {**own, **ENGINES[engine], "clients": 3, "partition": "column", "batch": 4, "rounds": 3}
    quiet, broken = tmp_path / "quiet", tmp_path / "broken"
    run = Run(model=model, data=data, out=quiet, **options)
    assert run.training.engine == engine
    run.run()
    for count, _ in enumerate(Run(model=model, data=data, out=broken, **options), 1):
        if count == 6:
            break
    resumed = Run.resume(broken, model=model, data=data)
    assert resumed.training.engine == engine
    resumed.run()
    for name in (STEPS, EVALUATIONS):
        assert records(quiet, name) == records(broken, name)
    assert len(records(quiet, STEPS)) == 12
    ends = [checkpoint.read(folder / CHECKPOINT) for folder in (quiet, broken)]
    for part in ("config", "rounds", "steps", "samples", "server", "clients"):
        assert same(ends[0][part], ends[1][part]), part
