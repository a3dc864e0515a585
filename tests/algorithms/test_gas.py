"""GAS: what it comes to when nobody is faster than another, and what it makes up."""

from __future__ import annotations

from typing import Any

import pytest
from support import client_state, difference, make, mlp, server_state, train

from cutlayer import Run
from cutlayer.testing import check_algorithm

PLAIN: dict[str, Any] = {"generate": "never", "working": 3, "rounds": 3}
FLEET = {"client_device": "raspberry-pi-4", "link": "lte", "speed_spread": 1.0, "rate_spread": 0.5}


def trained(algorithm: str = "gas", sizes: tuple[int, ...] = (8, 8, 8), **options: Any) -> Run:
    return train(algorithm, make(mlp), sizes, (6,), cut="2", **options)


@pytest.mark.parametrize("answer", ["arrival", "full"])
@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_equally_fast_clients_that_all_work_are_scala(answer: str, engine: str) -> None:
    """Buffers of one batch and one model of each client, nothing drawn: SFL with the same adjustment, in float64."""
    gas = trained(answer=answer, engine=engine, **PLAIN)
    for name in ("scala", "sfl"):
        sync = trained(name, logit_adjust="client", rounds=3)
        assert difference(server_state(sync), server_state(gas)) < 1e-10
        assert difference(client_state(sync), client_state(gas)) < 1e-10
