"""The output of `run` at its end: scores, and figures to compare them with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support import call


def test_scores_have_a_yardstick_and_owners_their_own_rows(tmp_path: Path) -> None:
    """Three of four rows belong to one class. The owners' scores are shown although they are equal."""
    y = np.tile([0, 0, 0, 1], 20)
    np.savez(tmp_path / "skewed.npz", x=np.stack([8.0 * y - 4, 4 - 8.0 * y], 1), y=y, client=np.repeat(["u", "v"], 40))
    words = "run --data skewed.npz --partition column --clients 2 --algorithm fl --rounds 6 --client-lr 0.5 --model mlp"
    done = call(*words.split(), "--test", "0.5", "--evaluate-on", "both", cwd=tmp_path)
    assert "Besides: majority 75.00%, balanced accuracy 100.00%, macro f1 100.00%" in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith(("│ u", "│ v"))]
    assert [line.count("100.00") for line in table] == [2, 2]
    assert "On its own test rows: worst 100.00" in done.stdout
