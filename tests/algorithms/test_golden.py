"""Golden losses: twenty steps of every algorithm, stored as text in `golden`. `make golden` rewrites them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import ALGORITHMS

from cutlayer import Run

GOLDEN = Path(__file__).parent / "golden"
STEPS = 20

# 33 samples per client in batches of 5 (the last has 3), sampling of clients, and Adam: an error in any of these
# changes the losses.
COMMON: dict[str, Any] = {
    "data": "digits", "model": "mlp", "clients": 4, "samples_per_client": 33, "batch": 5, "rounds": 20, "seed": 1,
    "precision": "float64", "client_lr": 3e-3,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "cl": {},
    "fl": {"local_steps": 2, "participation": 0.75},
    "ssl": {"hand_over": "batch", "visit_order": "random"},
    "ussl": {"cut": "hidden1", "tail_cut": "hidden3", "hand_over_optimizer": True},
    "upsl": {"cut": "hidden1", "tail_cut": "hidden3"},
    "usfl": {"cut": "hidden1", "tail_cut": "hidden3", "average_every": "step"},
    "usglr": {"cut": "hidden1", "tail_cut": "hidden3", "phi": 0.5, "participation": 0.75},
    "fsl-sage": {"upload_every": 2, "align_every": 1},
    "ampere": {"client_share": 0.1},
    "sfl": {"average_every": "step"},
    "sflv1": {"local_steps": 2},
    "slr": {"alpha": 0.5},
    "sgl": {"phi": 0.75, "average_over": "clients-and-rows"},
    "sglr": {"phi": 0.5, "alpha": 1.0, "participation": 0.75},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_golden_losses(algorithm: str, request: pytest.FixtureRequest) -> None:
    """Losses agree to 1e-6.

    Initial weights are drawn in float32, and processors differ in its last digit: with the most basic instruction set,
    losses differed by 4e-8. A change of the algorithm changes losses by 1e-4 or more.
    """
    run = Run(algorithm=algorithm, eval_every=1000, **COMMON, **OWN.get(algorithm, {}))
    losses = [record.loss for record, _ in zip(run, range(STEPS), strict=False)]
    assert len(losses) == STEPS
    path = GOLDEN / f"{algorithm}.txt"
    if request.config.getoption("--rewrite-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{loss:.12f}\n" for loss in losses))
    assert losses == pytest.approx([float(line) for line in path.read_text().split()], rel=1e-6, abs=1e-6)
