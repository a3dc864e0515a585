"""Comparisons for any task, with all entries judged by one metric."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cutlayer import Comparison, ConfigError
from cutlayer.data.samples import Samples, Source

X = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
COMMON: dict[str, Any] = {"clients": 2, "rounds": 1, "batch": 8, "cut": "1", "seeds": (0,)}


def source(y: torch.Tensor, *names: str) -> Source:
    every = Samples(X, y)
    return Source("drawn", every[:48], every[48:64], every[64:], names)


def model(width: int) -> Any:
    return lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, width))


def test_a_task_and_its_options_are_compared() -> None:
    """One task for all algorithms, and one algorithm with several losses."""
    rows = Comparison(
        data=source(X[:, 0]), model=model(1), task="regression", algorithms=("fl", "psl"), loss="l1",
        **{k: v for k, v in COMMON.items() if k != "cut"},
        variant={"squared": {"algorithm": "psl", "loss": "mse"}}, cut="1",
    ).run()  # fmt: skip
    assert [(row.entry, row.metric, row.share) for row in rows] == [
        ("fl", "rmse", False),
        ("psl", "rmse", False),
        ("squared", "rmse", False),
    ]
    squared, absolute = rows[2].score_mean, rows[1].score_mean
    assert squared is not None
    assert absolute is not None
    assert squared != absolute


def test_tasks_with_other_metrics_do_not_stand_in_one_table() -> None:
    """Different metrics are refused before training. Two tasks with the same metric are compared."""
    labels = source((X[:, 0] > 0).long(), "no", "yes")
    variants = {"ranked": {"algorithm": "psl", "primary_metric": "auroc"}}
    with pytest.raises(ConfigError, match=r"'psl' is scored by accuracy and 'ranked' by auroc, .* same primary_metric"):
        Comparison(data=labels, model=model(2), algorithms=("psl",), variant=variants, **COMMON).run()
    one = {"binary": {"algorithm": "psl", "task": "binary"}}
    with pytest.raises(
        ConfigError, match="one score per sample"
    ):  # the model has two scores, but the task needs one logit
        Comparison(data=labels, model=model(2), algorithms=("psl",), variant=one, **COMMON).run()
    zoo = {**COMMON, "cut": "hidden1"}
    rows = Comparison(data=labels, model="mlp", algorithms=("psl",), variant=one, **zoo).run()
    assert [(row.entry, row.metric) for row in rows] == [("psl", "accuracy"), ("binary", "accuracy")]
