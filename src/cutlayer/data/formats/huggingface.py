"""Local Hugging Face data sets. Needs the extra `datasets`; nothing is ever downloaded."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cutlayer.data.formats._pictures import stack_pictures
from cutlayer.data.formats._tables import Cells, Sheet, columns_called, features, raw_table, table
from cutlayer.data.formats.reader import Columns, Sized, data_format
from cutlayer.data.unsplit import SPLITS, Array, Raw, Section, part_called, pick
from cutlayer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_INDEX = re.compile(r"__index_level_\d+__")  # what pandas calls an index without a name


@data_format(
    "huggingface",
    title="Hugging Face",
    summary="a folder written by datasets.save_to_disk, or holding parquet files",
)
class Huggingface(Columns, Sized):
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
        found, indices = stored(path)
        return from_huggingface(found, path.stem, self, indices)

    def taken(self, found: Any, name: str, owners: Array | None = None) -> Raw:
        """A local `datasets.Dataset`, or a dictionary of them by part."""
        raw = from_huggingface(found, name, self)
        return raw if owners is None else dataclasses.replace(raw, client=owners)


def stored(path: Path) -> tuple[Any, set[str]]:
    """The content of a folder or parquet file, and the columns that are a saved index. Raises DataError."""
    datasets = import_datasets()
    try:
        if path.is_dir() and next(path.rglob("*.parquet"), None) is None:
            return datasets.load_from_disk(str(path)), set()
        return _parquet(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as a Hugging Face data set ({error}): write it with save_to_disk or as parquet"
        ) from None


def table_columns(path: Path) -> dict[str, Cells]:
    """The cells of all columns of numbers and texts, by name: of the test part, or the only one. Raises DataError."""
    splits = splits_of(stored(path)[0], path.stem)
    dataset = splits.get("test", splits["train"])
    scalars = {column: feature for column, feature in dataset.features.items() if _is_scalar(feature)}
    numbers = {c: _hf_numbers(dataset, c, path.stem, missing=True) for c, f in scalars.items() if _is_numeric(f)}
    return {c: numbers[c] if c in numbers else _hf_texts(dataset, c) for c in scalars}


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


def _parquet(path: Path) -> tuple[dict[str, Any], set[str]]:
    """One data set per part, and the columns that pandas saved as an index. Parts are recognised by file or folder
    names that begin with train, validation or test.
    """
    # Read with pyarrow, not with datasets.load_dataset: that one copies everything to a cache first.
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    files: dict[str, list[Path]] = {}
    for file in [path] if path.is_file() else sorted(path.rglob("*.parquet")):
        words = [re.split(r"[^a-z0-9]", word.lower())[0] for word in reversed(file.relative_to(path.parent).parts)]
        part = next((SPLITS[word] for word in words[: max(1, len(words) - 1)] if word in SPLITS), "train")
        files.setdefault(part, []).append(file)
    read = pyarrow.parquet.read_table
    tables = {part: [read(file, partitioning=None) for file in those] for part, those in files.items()}
    indices = {name for those in tables.values() for table in those for name in _index_columns(table.schema)}
    dataset = import_datasets().Dataset
    return {part: dataset(pyarrow.concat_tables(those)) for part, those in tables.items()}, indices


def _index_columns(schema: Any) -> list[str]:
    """The columns that pandas' own metadata call an index."""
    about = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
    return [name for name in about.get("index_columns", []) if isinstance(name, str)]


def from_huggingface(found: Any, name: str, options: Huggingface, indices: Collection[str] = ()) -> Raw:
    """A local `datasets.Dataset`, or a dictionary of them by part. `indices`: columns that are a saved index.

    The input is the only Image, Array or list column; without one, all columns of numbers and texts are a table.
    """
    splits = splits_of(found, name)
    return dataclasses.replace(_read(splits, name, options, indices), cited=cited(splits))


def cited(splits: Mapping[str, Any]) -> tuple[str, ...]:
    """The citations in the data, and the library that reads them."""
    citation = splits["train"].info.citation.strip()
    return ("datasets", citation) if citation else ("datasets",)


def _read(splits: Mapping[str, Any], name: str, options: Huggingface, indices: Collection[str]) -> Raw:
    """The data of each part."""
    about = splits["train"].features
    saved = {column: "a saved index" for column in about if column in indices or _INDEX.fullmatch(column)}
    columns, left_out = features(list(about), options, name, saved)
    inputs, is_table = _hf_inputs({column: about[column] for column in columns}, name)
    for split, dataset in splits.items():
        if len(dataset) == 0:
            raise DataError(f"the part {split!r} of {name} has no rows: add samples or remove the part")
        for kind, those in (("label column", [options.label_column]), ("input column", inputs)):
            for column in those:
                pick(kind, column, list(dataset.features), f"the part {split!r} of {name} lacks it")
    labels = {split: _hf_words(dataset, options.label_column, name) for split, dataset in splits.items()}
    class_names = tuple(getattr(about[options.label_column], "names", None) or ()) or None
    if class_names and any(y.min() < 0 for y in labels.values()):
        raise DataError(f"column {options.label_column!r} of {name} has rows without a label (-1): remove them")
    client = options.owner_among(list(about), name)
    owners = {
        split: _hf_words(dataset, client, name)
        for split, dataset in splits.items()
        if client is not None and client in dataset.features
    }
    if options.resize is not None and not _is_image(about[inputs[0]]):
        raise ConfigError(f"resize = {options.resize!r} has no effect on {name}, which has no pictures: leave it out")
    if is_table:
        made = table(_sheet(splits, name, options), inputs, options.impute, owners.get("train"))
        return raw_table(name, made, labels, dict(owners), options, left_out, class_names)
    if unused := [column for column in columns if column not in inputs]:
        left_out = (*left_out, columns_called(unused))
    if _is_image(about[inputs[0]]):
        raw = _of_pictures(splits, inputs[0], name, labels, options.resize)
    else:
        raw = _raw(name, {split: _hf_numbers(dataset, inputs[0], name) for split, dataset in splits.items()}, labels)
    return dataclasses.replace(
        raw,
        client=owners.get("train"),
        validation_client=owners.get("validation"),
        test_client=owners.get("test"),
        class_names=class_names,
        left_out=left_out,
    )


def _of_pictures(
    splits: Mapping[str, Any], column: str, name: str, labels: Mapping[str, Array], resize: str | None
) -> Raw:
    """The data whose input is one column of pictures."""
    found = stack_pictures({split: _hf_pictures(those, column, split) for split, those in splits.items()}, resize)
    raw = _raw(name, found.x, labels)
    return dataclasses.replace(raw, rows="pictures", remarks=found.remarks, recipe=found.recipe)


def _raw(name: str, xs: Mapping[str, Array], labels: Mapping[str, Array]) -> Raw:
    parts = {split: Section(x, labels[split]) for split, x in xs.items()}
    return Raw(name, parts["train"], parts.get("validation"), parts.get("test"))


def _sheet(splits: Mapping[str, Any], name: str, options: Columns) -> Sheet:
    def cells(column: str) -> dict[str, Cells]:
        text = not _is_numeric(splits["train"].features[column])
        read = _hf_texts if text else functools.partial(_hf_numbers, name=name, missing=options.impute is not None)
        return {split: read(dataset, column) for split, dataset in splits.items()}

    return Sheet(name, cells, lambda split, row: f"row {row} (from 0) of {split!r}")


def splits_of(found: Any, name: str) -> dict[str, Any]:
    """The data set of each part: train, and perhaps validation and test. Raises DataError for other parts."""
    if not isinstance(found, dict):
        return {"train": found}
    if len(found) == 1:
        return {"train": next(iter(found.values()))}
    odd = [split for split in found if part_called(split) is None]
    splits = {part: dataset for split, dataset in found.items() if (part := part_called(split))}
    if odd or "train" not in splits or len(splits) < len(found):
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


def _hf_inputs(columns: Mapping[str, Any], name: str) -> tuple[list[str], bool]:
    """The input columns, and whether they are the columns of a table."""
    cells = [c for c, f in columns.items() if _is_scalar(f) and (_is_numeric(f) or _is_text(f))]
    arrays = [c for c, f in columns.items() if _is_image(f) or (_is_numeric(f) and not _is_scalar(f))]
    if len(arrays) > 1:
        raise DataError(
            f"{name} has several input columns, {', '.join(arrays)}: name one with columns, or keep one "
            "(dataset.remove_columns)"
        )
    if arrays:
        return arrays, False
    if odd := [column for column in columns if column not in cells]:
        raise DataError(f"column {odd[0]!r} of {name} is neither a number nor a text: leave it out with ignore_columns")
    if not cells:
        raise DataError(f"{name} has no input column: add an Image, array, list, numeric or text column")
    return cells, True


def _is_scalar(feature: Any) -> bool:
    return type(feature).__name__ in ("Value", "ClassLabel")


def _is_text(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")) in ("string", "large_string", "string_view")


def _hf_texts(dataset: Any, column: str) -> list[str]:
    return ["" if text is None else text for text in dataset.select_columns(column)[:][column]]


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


def _hf_numbers(dataset: Any, column: str, name: str, *, missing: bool = False) -> Array:
    only = dataset.select_columns(column)
    dtype = np.dtype(str(_leaf(dataset.features[column]).dtype))
    cells = only.with_format("arrow")[:].column(column)
    scalar = _is_scalar(dataset.features[column])
    if cells.null_count and scalar and missing:
        return np.array([np.nan if value is None else float(value) for value in cells.to_pylist()])
    if cells.null_count:
        raise DataError(
            f"column {column!r} of {name} has missing values: fill them in, remove those rows, or (in a table) pass "
            "impute (mean, median or zero)"
        )
    if scalar:
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
