"""Runs with codecs: which gradients come back."""

from __future__ import annotations

from typing import Any

import pytest

from cutlayer import Run
from cutlayer.options import RunConfig

TINY: dict[str, Any] = {
    "algorithm": "psl",
    "model": "mlp",
    "data": "digits",
    "clients": 2,
    "samples_per_client": 30,
    "batch": 10,
    "rounds": 3,
    "test": 30,
}


def losses(**options: Any) -> list[Any]:
    """The loss of each step."""
    return [r.loss for r in Run(RunConfig.of({**TINY, **options}))]


@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_a_gradient_on_the_support_fits_into_top_k(engine: str) -> None:
    """The gradient has no more numbers than were sent, so top-k of the same fraction loses none of them."""
    up = "rand-top-k:0.1:0.3"
    full, sparse = (losses(engine=engine, up_codec=f"{up}:support", down_codec=down) for down in ("raw", "top-k:0.1"))
    assert full == sparse
    assert full != losses(engine=engine, up_codec=up) != losses(engine=engine, up_codec=up, down_codec="top-k:0.1")


@pytest.mark.parametrize("support", ["", ":support"])
def test_a_run_without_a_chance_is_one_of_top_k(support: str) -> None:
    assert losses(up_codec=f"rand-top-k:0.1:0{support}") == losses(up_codec=f"top-k:0.1{support}")
