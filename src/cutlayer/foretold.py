"""Predictions as a table of text, or as an archive of arrays."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.trained import Predictions


def as_csv(found: Predictions, names: Sequence[str] = ()) -> str:
    """A line per row: its number (from 1) or name; the label and the probability of each class, or the numbers.

    Raises ConfigError if a row has predictions for many places.
    """
    columns: dict[str, Sequence[Any]] = {"row": list(names) or list(range(1, len(found.outputs) + 1))}
    if (found.classes is not None and found.classes.dim() > 1) or found.values.dim() > 2:
        raise ConfigError("a row has predictions for several places, which a CSV file cannot hold: name an .npz file")
    if found.classes is not None:
        columns["label"] = found.labels
    if found.probabilities is not None:
        columns |= _numbers("probability", found.probabilities, found.class_names)
    elif found.classes is None:
        columns |= _numbers("prediction", found.values, found.class_names)
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(columns)
    table.writerows(zip(*columns.values(), strict=True))
    return written.getvalue()


def _numbers(what: str, values: Tensor, names: Sequence[str]) -> dict[str, list[str]]:
    """Columns of numbers [n] or [n, K]: one is called `what`, several have their number or name in it."""
    table = values.reshape(len(values), -1).T
    several = [f"{what}_{names[k] if len(names) == len(table) else k}" for k in range(len(table))]
    return {
        name: [f"{number:.6g}" for number in column.tolist()]
        for name, column in zip(several if len(table) > 1 else [what], table, strict=True)
    }


def as_archive(found: Predictions) -> bytes:
    """An .npz archive with the arrays values, probabilities, classes and class_names, as far as they exist."""
    arrays = {"values": found.values, "probabilities": found.probabilities, "classes": found.classes}
    plain: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items() if tensor is not None}
    written = io.BytesIO()
    np.savez(written, **plain, class_names=np.array(found.class_names, dtype=np.str_))
    return written.getvalue()
