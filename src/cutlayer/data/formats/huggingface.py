"""Local Hugging Face data sets. Needs the extra `datasets`; nothing is ever downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cutlayer.data.formats._pictures import stack_pictures
from cutlayer.data.formats.reader import Columns, data_format
from cutlayer.data.unsplit import SPLITS, Array, Raw, Section, pick
from cutlayer.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


@data_format(
    "huggingface",
    title="Hugging Face",
    summary="a folder written by datasets.save_to_disk, or holding parquet files",
)
class Huggingface(Columns):
    """A folder written by `save_to_disk`, or a parquet file or a folder of them."""

    @classmethod
    def fits(cls, path: Path) -> bool:
        """A parquet file, or a folder with one or with what `save_to_disk` writes."""
        if path.is_file():
            return path.suffix.lower() == ".parquet"
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            return True
        return next(path.rglob("*.parquet"), None) is not None

    def read(self, path: Path) -> Raw:
        """A folder written by `save_to_disk`, or a parquet file or folder of them (train*, validation*, test*)."""
        datasets = import_datasets()
        try:
            if path.is_dir() and next(path.rglob("*.parquet"), None) is None:
                found = datasets.load_from_disk(str(path))
            else:
                found = _parquet(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read as a Hugging Face data set ({error}): write it with save_to_disk or as parquet"
            ) from None
        return from_huggingface(found, path.stem, self.label_column, self.client_column)


def import_datasets() -> Any:
    """The package `datasets`. Raises DataError with the remedy if it is not installed."""
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise DataError(
            "Hugging Face data sets need the package 'datasets', which is not installed: pip install "
            "'cutlayer[datasets]'"
        ) from None
    return datasets


def _parquet(path: Path) -> dict[str, Any]:
    """One data set per part. Parts are told by file or folder names that begin with train, validation or test."""
    # Read with pyarrow, not with datasets.load_dataset: that one copies everything to a cache first.
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    files: dict[str, list[Path]] = {}
    for file in [path] if path.is_file() else sorted(path.rglob("*.parquet")):
        words = [re.split(r"[^a-z0-9]", word.lower())[0] for word in reversed(file.relative_to(path.parent).parts)]
        part = next((SPLITS[word] for word in words[: max(1, len(words) - 1)] if word in SPLITS), "train")
        files.setdefault(part, []).append(file)
    read = pyarrow.parquet.read_table
    return {
        part: import_datasets().Dataset(pyarrow.concat_tables([read(file, partitioning=None) for file in those]))
        for part, those in files.items()
    }


def from_huggingface(found: Any, name: str, label_column: str, client_column: str | None) -> Raw:
    """A local `datasets.Dataset`, or a dictionary of them by part.

    The input is the only Image, Array or list column; without one, all numeric scalar columns together are a table.
    """
    splits = _hf_splits(found, name)
    features = splits["train"].features
    names = list(features)
    pick("label column", label_column, names, f"set label_column to a column of {name}")
    if client_column is not None:
        pick("client column", client_column, names, f"set client_column to a column of {name}")
    inputs, table = _hf_inputs(features, name, {label_column, client_column})
    label = features[label_column]
    mode = ""
    parts = {}
    for split, dataset in splits.items():
        if len(dataset) == 0:
            raise DataError(f"the part {split!r} of {name} has no rows: add samples or remove the part")
        pick("label column", label_column, list(dataset.features), f"the part {split!r} of {name} lacks it")
        for column in inputs:
            pick("input column", column, list(dataset.features), f"the part {split!r} of {name} lacks it")
        if _is_image(features[inputs[0]]):
            x, mode = stack_pictures(_hf_pictures(dataset, inputs[0], split), mode)
        else:
            columns = [_hf_numbers(dataset, column, name) for column in inputs]
            x = np.stack(columns, axis=1) if table else columns[0]
        parts[split] = Section(x, _hf_words(dataset, label_column, name))
    client = None if client_column is None else _hf_words(splits["train"], client_column, name)
    class_names = tuple(getattr(label, "names", None) or ()) or None
    if class_names and any(part.y.min() < 0 for part in parts.values()):
        raise DataError(f"column {label_column!r} of {name} has rows without a label (-1): remove them")
    return Raw(
        name,
        parts["train"],
        parts.get("validation"),
        parts.get("test"),
        client=client,
        class_names=class_names,
        columns=tuple(inputs) if table else (),
    )


def _hf_splits(found: Any, name: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        return {"train": found}
    if len(found) == 1:
        return {"train": next(iter(found.values()))}
    odd = [split for split in found if split not in SPLITS]
    splits = {SPLITS[split]: dataset for split, dataset in found.items() if split in SPLITS}
    if odd or "train" not in splits:
        raise DataError(f"{name} has the parts {', '.join(found)}: keep only train, validation and test")
    return splits


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image"


def _leaf(feature: Any) -> Any:
    """The value type inside lists of any depth; a list may also be written [type]."""
    while isinstance(feature, list) or hasattr(feature, "feature"):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return feature


def _is_numeric(feature: Any) -> bool:
    return re.match(r"u?int|float|bool", str(getattr(_leaf(feature), "dtype", ""))) is not None


def _hf_inputs(features: Mapping[str, Any], name: str, others: set[str | None]) -> tuple[list[str], bool]:
    """The input columns, and whether they are the columns of a table."""
    rest = {column: feature for column, feature in features.items() if column not in others}
    scalars = [c for c, f in rest.items() if _is_numeric(f) and type(f).__name__ in ("Value", "ClassLabel")]
    arrays = [c for c, f in rest.items() if _is_image(f) or (_is_numeric(f) and c not in scalars)]
    if len(arrays) > 1:
        raise DataError(f"{name} has several input columns, {', '.join(arrays)}: keep one (dataset.remove_columns)")
    if not arrays and not scalars:
        raise DataError(
            f"{name} has no input column among {', '.join(rest) or 'none'}: add an Image, array, list or numeric column"
        )
    return (arrays, False) if arrays else (scalars, True)


def _hf_pictures(dataset: Any, column: str, split: str) -> Iterator[tuple[str, Image]]:
    from PIL import UnidentifiedImageError

    only = dataset.select_columns(column)
    for row in range(len(only)):
        try:
            picture = only[row][column]
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"the picture in row {row} of {split!r} cannot be read ({error}): remove it") from None
        if picture is None:
            raise DataError(f"row {row} of {split!r} has no picture in column {column!r}: remove it")
        yield f"{split}[{row}]", picture


def _hf_numbers(dataset: Any, column: str, name: str) -> Array:
    only = dataset.select_columns(column)
    dtype = np.dtype(str(_leaf(dataset.features[column]).dtype))
    cells = only.with_format("arrow")[:].column(column)
    if cells.null_count:
        raise DataError(f"column {column!r} of {name} has missing values: fill them in or remove those rows")
    if type(dataset.features[column]).__name__ in ("Value", "ClassLabel"):
        return np.asarray(cells.to_numpy())  # the numpy format would make objects of floats if one of them is NaN
    try:  # without dtype, 8-bit pictures would come back as 64-bit integers
        values = np.asarray(only.with_format("numpy", dtype=dtype)[:][column])
    except (ValueError, TypeError) as error:
        raise DataError(f"column {column!r} of {name} cannot be stacked ({error}): make its rows equal") from None
    if values.dtype == object:
        raise DataError(f"the rows of column {column!r} of {name} differ in shape: make them all equally long")
    return values


def _hf_words(dataset: Any, column: str, name: str) -> Array:
    values = dataset.select_columns(column)[:][column]
    if any(value is None for value in values):
        raise DataError(f"column {column!r} of {name} is empty in row {list(values).index(None)}: fill it in")
    return np.asarray(values)
