"""New rows for a trained model: files and folders in the form of the run's data, without labels; or objects from
Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cutlayer.data.formats import detect, find_format
from cutlayer.data.formats._tables import columns_called
from cutlayer.data.formats.csv import read_columns
from cutlayer.data.formats.huggingface import table_columns
from cutlayer.data.formats.images import picture_files
from cutlayer.data.formats.npz import npz_arrays
from cutlayer.data.own import own_code
from cutlayer.data.preprocessed import preprocessed
from cutlayer.data.samples import Inputs, Samples
from cutlayer.data.unsplit import Raw
from cutlayer.errors import DataError


@dataclass(frozen=True)
class New:
    """New rows in the form that a model takes; the name of each (or its number), and remarks on how they were read."""

    inputs: Inputs
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read(path: Path, about: Mapping[str, Any]) -> New:
    """The rows in a file or folder, read in the format of the data that a model was trained on, and converted as these
    were. Labels are ignored. `about` is the description of the model (see `trained.describe`).

    Raises DataError: missing, damaged, or not such rows.
    """
    preprocessing, data_format = about["preprocessing"], about["data_format"]
    if not path.exists():
        raise DataError(f"there is no file or folder {str(path)!r}: check the path")
    if not preprocessing:
        raise DataError(
            "how the inputs were preprocessed in training is not known, since they came as a Source: predict from "
            "Python"
        )
    if about["inputs"]["form"] != "one":
        return New(_several(path, about["inputs"]))
    kind = preprocessing.get("kind")
    if kind == "table":
        return _table(path, preprocessing)
    if kind == "pictures" and (path.is_file() or data_format in ("auto", "images")):
        files = picture_files(path)
        names = tuple(file.name if file == path else str(file.relative_to(path)) for file in files)
        return New(preprocessed(preprocessing, path), names)
    if path.suffix.lower() == ".npz":
        return New(preprocessed(preprocessing, path))
    return New(preprocessed(preprocessing, _inputs(path, data_format, about["reading"])))


def _several(path: Path, inputs: Mapping[str, Any]) -> Inputs:
    """Several tensors per row: the arrays of an .npz file that have the names of the model's arguments."""
    names = inputs["names"]
    if path.suffix.lower() != ".npz" or not names:
        raise DataError(
            f"the model takes {len(inputs['tensors'])} tensors per row, which {str(path)!r} cannot hold: "
            + (f"give an .npz file with the arrays {', '.join(names)}" if names else "predict from Python")
        )
    arrays = npz_arrays(path)
    if lacking := [name for name in names if name not in arrays]:
        raise DataError(f"{path} lacks the array {lacking[0]!r} (it has {', '.join(arrays)}): add it")
    typed = {n: getattr(torch, t["dtype"]) for n, t in zip(names, inputs["tensors"], strict=True)}
    return {name: torch.from_numpy(arrays[name]).to(typed[name]) for name in names}


def _table(path: Path, preprocessing: Mapping[str, Any]) -> New:
    """Columns, found by their names; columns that the model does not use are named."""
    columns = _columns(path)
    used = {column["name"] for column in preprocessing["columns"]}
    others = [name for name in columns if name and name not in used and name != preprocessing.get("label_column")]
    notes = (f"ignored {columns_called(others)}, which the model does not use",) if others else ()
    return New(preprocessed(preprocessing, path if _is_text(path) else columns), notes=notes)


def _columns(path: Path) -> dict[str, Any]:
    return dict(read_columns(path)[0]) if _is_text(path) else table_columns(path)


def _is_text(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() != ".parquet"


def _inputs(path: Path, data_format: str, options: Mapping[str, Any]) -> Any:
    """The inputs of data in a format, which then need labels, too."""
    name = detect(path) if data_format == "auto" else data_format
    having = {k: v for k, v in options.items() if k in find_format(name, {}).entry.option_names}
    reader = find_format(name, having)
    with own_code(reader, f"reading data of the format {name!r}"):
        found = reader.read(path)
    if isinstance(found, Raw):
        return (found.test or found.train).x
    x = found["x"] if isinstance(found, Mapping) else found[0] if isinstance(found, tuple) else None
    if x is None:
        raise DataError(f"{str(path)!r} has no inputs that can be distinguished from labels: give them as an .npz file")
    return x


def converted(x: Any, preprocessing: Mapping[str, Any]) -> Inputs:
    """New rows from Python as a model takes them: an array or tensor [n, ...] as those of training were given; of a
    table its columns by name (a mapping or a data frame); pictures. `Samples`, several tensors, and rows without known
    preprocessing are used unchanged. Raises DataError.
    """
    if isinstance(x, Samples):
        return x[:].inputs
    if preprocessing.get("kind") == "table" and not isinstance(x, Mapping) and hasattr(x, "columns"):
        x = {str(name): x[name].to_list() for name in x.columns}
    elif isinstance(x, Mapping) and preprocessing.get("kind") != "table":
        return {str(name): torch.as_tensor(value) for name, value in x.items()}
    elif isinstance(x, tuple):
        return tuple(torch.as_tensor(value) for value in x)
    return preprocessed(preprocessing, x) if preprocessing else torch.as_tensor(x)
