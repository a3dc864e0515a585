"""Handwritten digits from scikit-learn."""

from __future__ import annotations

import numpy as np

from cutlayer.data.built_in import data_set
from cutlayer.data.unsplit import Raw, Section


@data_set(
    "digits",
    title="Digits",
    summary="1797 handwritten digits, 8x8, 10 classes (bundled with scikit-learn)",
)
def digits() -> Raw:
    """Pictures [n, 1, 8, 8] in [0, 1]."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    bundled = load_digits()
    x = (bundled.images / 16).astype(np.float32)[:, None]  # [n, 1, 8, 8]
    return Raw("digits", Section(x, bundled.target))
