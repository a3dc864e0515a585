"""GSCALA is SFL with global sampling and the logits adjusted on both sides."""

from __future__ import annotations

from typing import Any

import pytest
from support import difference, make, mlp, train, whole

from cutlayer import Run

SIZES = [9, 4, 17]


def trained(algorithm: str, **options: Any) -> Run:
    return train(algorithm, make(mlp), SIZES, (6,), **{"cut": "2", "rounds": 3, "participation": 0.7, **options})


@pytest.mark.parametrize("engine", ["local", "auto"])
def test_it_is_its_parts(engine: str) -> None:
    """Equal bit for bit to SFL with both options, and each option changes the result."""
    run = trained("gscala", engine=engine)
    both = trained("sfl", engine=engine, logit_adjust="both", sampling="global")
    assert difference(whole(run), whole(both)) == 0
    for one in ({"logit_adjust": "both"}, {"sampling": "global"}):
        assert difference(whole(run), whole(trained("sfl", engine=engine, **one))) > 1e-3


def test_a_step_has_as_many_rows_as_all_batches_together() -> None:
    """30 rows in steps of 3 x 4 take 3 steps. With each client's own batches, the largest client sets the number."""
    assert trained("gscala", rounds=1, participation=1.0).steps == 3
    assert trained("scala", rounds=1, participation=1.0).steps == 5
