"""Handwritten digits from scikit-learn."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from cutlayer.data.built_in import data_set
from cutlayer.data.unsplit import Raw, Section


@data_set(
    "digits",
    title="Digits",
    summary="1797 handwritten digits, 8x8, 10 classes (bundled with scikit-learn)",
    paper="doi 10.24432/C50P49",
    library="scikit-learn",
)
def digits() -> Raw:
    """Pictures [n, 1, 8, 8] in [0, 1]."""
    rows = np.loadtxt(_bundled(), delimiter=",", dtype=np.int64)  # [n, 65]: 64 shades from 0 to 16, and the digit
    x = (rows[:, :64] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return Raw("digits", Section(x, rows[:, 64]))


def _bundled() -> Path:
    """scikit-learn's file of the digits. It is read without importing scikit-learn, which would take a second."""
    found = importlib.util.find_spec("sklearn")
    assert found is not None, "it is among the requirements"
    assert found.origin is not None, "and a package of files"
    return Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
