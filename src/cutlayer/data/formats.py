"""Readers: from what lies on disk (or in a Hugging Face data set) to plain arrays.

A reader decides what is an input, a label and an owner, and nothing else; `sources` checks, splits and converts.
Every reader raises DataError, with the file's name, on anything it cannot read. Nothing is ever unpickled and nothing
is ever downloaded.
"""

from __future__ import annotations

import csv
import difflib
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from cutlayer.errors import DataError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image

Array = npt.NDArray[Any]

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""What folders and splits are called, and which part of the data each name means."""

_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
_IDX = re.compile(r"(?:.*-)?(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?")


@dataclass(frozen=True)
class Part:
    """Inputs `x` [n, ...] and labels `y` [n] as they were found: any numeric inputs; integer or string labels."""

    x: Array
    y: Array


@dataclass(frozen=True)
class Raw:
    """What a reader found: the training part, and a validation and a test part where the data bring their own.

    `client` [len(train.y)] says whose sample each training row is. `class_names` is set where labels are already
    0..K-1; otherwise labels are mapped to their rank among all labels. `columns` names the columns of a table
    (x [n, columns]), which `sources` standardises; it is empty for everything else. `symmetric` asks for 8-bit
    inputs in [-1, 1] instead of [0, 1].
    """

    name: str
    train: Part
    validation: Part | None = None
    test: Part | None = None
    client: Array | None = None
    class_names: tuple[str, ...] | None = None
    columns: tuple[str, ...] = ()
    symmetric: bool = False

    def parts(self) -> dict[str, Part]:
        """The parts that exist, by name."""
        every = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: part for name, part in every.items() if part is not None}


def detect(path: Path) -> str:
    """The format of `path`, one of `catalog.DATA_FORMATS`. Raises DataError if nothing fits."""
    if path.is_file() and path.suffix.lower() in (".npz", ".csv", ".parquet"):
        return "huggingface" if path.suffix.lower() == ".parquet" else path.suffix.lower()[1:]
    if path.is_dir():
        if any(_IDX.fullmatch(file.name) for file in path.iterdir()):
            return "idx"
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            return "huggingface"
        if next(path.rglob("*.parquet"), None) is not None:
            return "huggingface"
        if any(file.suffix.lower() in _PICTURES for file in path.glob("*/*")) or _split_folders(path):
            return "images"
    raise DataError(
        f"the format of {str(path)!r} is not recognised: name it with data_format (npz, csv, idx, images, "
        "huggingface); `cutlayer list data` describes each"
    )


def pick(kind: str, value: str, names: Sequence[str], hint: str) -> int:
    """The position of the column `value` in `names`. Raises DataError with the nearest names if it is not there."""
    if value in names:
        return names.index(value)
    few = list(names)
    if len(few) > 20:  # a table of pixels has hundreds of columns: show the near ones and the first
        few = [*difflib.get_close_matches(value, few, n=3), *few[:10], f"... ({len(names)} in all)"]
    raise DataError(f"{unknown(kind, value, dict.fromkeys(few))}; {hint}")


# --- npz ---------------------------------------------------------------------------------------------------------


def read_npz(path: Path) -> Raw:
    """Arrays x, y (and client), or x_train, y_train (and client_train); x_validation, x_test and theirs y if any.

    Inputs [n, h, w] that are not integer tokens get a channel axis: [n, 1, h, w]. Inputs [n, h, w, c] with c in
    (1, 3, 4) become [n, c, h, w], unless the second axis is of such a size too (then they are taken for [n, c, h, w]).
    """
    arrays = _npz_arrays(path)
    suffix = "_train" if "x_train" in arrays else ""
    train = _npz_part(path, arrays, suffix)
    if train is None:
        raise DataError(f"{path} has no array 'x' or 'x_train' but {sorted(arrays)}: save np.savez(path, x=..., y=...)")
    validation = _npz_part(path, arrays, "_validation") or _npz_part(path, arrays, "_val")
    test = _npz_part(path, arrays, "_test")
    return Raw(path.stem, train, validation, test, client=arrays.get(f"client{suffix}"))


def _npz_arrays(path: Path) -> dict[str, Array]:
    key = ""
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise DataError(f"{path} holds one array, not an .npz archive: save np.savez(path, x=..., y=...)")
            arrays: dict[str, Array] = {}
            for key in found.files:
                arrays[key] = found[key]
            return arrays
    except ValueError as error:
        if "Object arrays" in str(error):
            raise DataError(
                f"the array {key!r} of {path} holds Python objects, which Cutlayer never unpickles: save numbers, or "
                "strings as a string array (rows of equal length, no None)"
            ) from None
        raise DataError(f"{path} is not an .npz archive ({error}): write it with np.savez") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(f"{path} is damaged or truncated ({error}): write or copy it again") from None


def _npz_part(path: Path, arrays: Mapping[str, Array], suffix: str) -> Part | None:
    x, y = arrays.get(f"x{suffix}"), arrays.get(f"y{suffix}")
    if x is None and y is None:
        return None
    if x is None or y is None:
        lone, absent = ("x", "y") if y is None else ("y", "x")
        raise DataError(f"{path} has '{lone}{suffix}' but no '{absent}{suffix}': save both in the same archive")
    return Part(channels_first(x), y)


def channels_first(x: Array) -> Array:
    """Pictures [n, h, w] or [n, h, w, c] as [n, c, h, w]; integer tokens and everything else as they are."""
    if x.ndim == 3 and (x.dtype == np.uint8 or x.dtype.kind in "fb"):
        return x[:, None]  # [n, 1, h, w]
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        return np.moveaxis(x, 3, 1)  # [n, c, h, w]
    return x


# --- csv ---------------------------------------------------------------------------------------------------------


def read_csv(path: Path, label_column: str, client_column: str | None) -> Raw:
    """Numeric feature columns, a label column and, if named, a client column. The first line names the columns.

    The separator is whichever of comma, semicolon and tab the first line holds most of.
    """
    header, lines, rows = _csv_rows(path)
    label = pick("label column", label_column, header, f"set label_column (the first line of {path} names the columns)")
    client = None
    if client_column is not None:
        client = pick("client column", client_column, header, f"set client_column to a column of {path}")
    features = [at for at in range(len(header)) if at not in (label, client)]
    if not features:
        raise DataError(f"{path} has no feature column beside {label_column!r}: add numeric columns")
    y = _csv_words(path, header[label], lines, [row[label] for row in rows])
    owner = None if client is None else _csv_words(path, header[client], lines, [row[client] for row in rows])
    x = np.stack([_csv_floats(path, header[at], lines, [row[at] for row in rows]) for at in features], axis=1)
    return Raw(path.stem, Part(x, y), client=owner, columns=tuple(header[at] for at in features))


def _csv_rows(path: Path) -> tuple[list[str], list[int], list[list[str]]]:
    """The header, the line number (from 1) and the fields of every non-empty row."""
    lines, rows = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count))
            header = [field.strip() for field in next(reader, [])]
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"line {reader.line_num} of {path} has {len(row)} fields, the first line {len(header)}: mend "
                        "that line (quote fields that hold the separator)"
                    )
                lines.append(reader.line_num)
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV text in UTF-8 ({error}): convert it") from None
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path} names the column {twice[0]!r} twice: rename one of them")
    if not rows:
        raise DataError(f"{path} has no rows below the line of column names: add samples")
    return header, lines, rows


def _csv_floats(path: Path, column: str, lines: Sequence[int], values: list[str]) -> Array:
    try:
        return np.array(values, dtype=np.float64)
    except ValueError:
        for line, value in zip(lines, values, strict=True):
            if not _is_float(value):
                found = repr(value) if value.strip() else "empty"
                raise DataError(
                    f"column {column!r} of {path} is not numeric: line {line} is {found}; fill it in, encode the "
                    "column as numbers, or remove it"
                ) from None
        raise


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _csv_words(path: Path, column: str, lines: Sequence[int], values: list[str]) -> Array:
    """Labels or owners: integers where all are ("10" sorts after "9"), strings otherwise."""
    words = [value.strip() for value in values]
    if "" in words:
        raise DataError(f"column {column!r} of {path} is empty in line {lines[words.index('')]}: fill it in")
    if not all(_is_float(word) for word in words):
        return np.array(words, dtype=np.str_)
    numbers = np.array(words, dtype=np.float64)
    whole = (numbers == np.round(numbers)) & (np.abs(numbers) < 2**53)  # beyond, floats skip integers
    if not whole.all():
        raise DataError(
            f"column {column!r} of {path} holds {words[int(whole.argmin())]!r} in line {lines[int(whole.argmin())]}, "
            "which is no whole number: name a column of integers or words"
        )
    return numbers.astype(np.int64)


# --- idx ---------------------------------------------------------------------------------------------------------


def read_idx(folder: Path) -> Raw:
    """The four idx files of MNIST and its kin, gzipped or not; pictures x [n, 1, h, w] in 8 bits."""
    files: dict[tuple[str, str], Path] = {}
    for file in sorted(folder.iterdir(), key=lambda file: (file.suffix == ".gz", file.name)):
        match = _IDX.fullmatch(file.name)
        if match:
            role = ("train" if match[1] == "train" else "test", match[2])
            before = files.setdefault(role, file)
            if before.name not in (file.name, file.name.removesuffix(".gz")):
                raise DataError(f"{folder} holds both {before.name} and {file.name}: keep one data set per folder")
    train, test = (_idx_part(folder, files, name) for name in ("train", "test"))
    return Raw(folder.name, train, test=test, symmetric=True)


def _idx_part(folder: Path, files: Mapping[tuple[str, str], Path], part: str) -> Part:
    for what in ("images", "labels"):
        if (part, what) not in files:
            prefix = "train" if part == "train" else "t10k"
            dims = 3 if what == "images" else 1
            raise DataError(f"{folder} lacks the {part} {what}: add {prefix}-{what}-idx{dims}-ubyte (or .gz)")
    return Part(read_idx_file(files[part, "images"], 3)[:, None], read_idx_file(files[part, "labels"], 1))


def read_idx_file(path: Path, dims: int) -> Array:
    """The unsigned bytes of an idx file with `dims` dimensions (images: 3, labels: 1); a .gz file is unpacked.

    Raises DataError if the magic number is another one, or if the file is not as long as its dimensions say.
    """
    content = _gunzip(path) if path.suffix == ".gz" else path.read_bytes()
    magic = bytes((0, 0, 8, dims))  # two zeros, 8 = unsigned byte, number of dimensions
    head = 4 + 4 * dims
    if content[:4] != magic[: len(content)]:
        raise DataError(
            f"{path} is not an idx file of unsigned bytes in {dims} dimension{'s' if dims > 1 else ''}: it begins with "
            f"{content[:4].hex(' ')}, expected {magic.hex(' ')}"
        )
    if len(content) < head:
        raise DataError(f"{path} is truncated: its header has {len(content)} bytes, expected {head}; copy it again")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dims, offset=4))
    expected = head + math.prod(shape)
    if len(content) != expected:
        wrong = "truncated" if len(content) < expected else "too long"
        raise DataError(
            f"{path} is {wrong}: {len(content)} bytes found, {expected} expected for {shape}: copy it again"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _gunzip(path: Path) -> bytes:
    """What a gzip file holds; of a truncated one, what could be unpacked (its length is checked by the caller)."""
    try:
        return zlib.decompressobj(wbits=31).decompress(path.read_bytes())
    except zlib.error as error:
        raise DataError(f"{path} is not a sound gzip file ({error}): copy it again") from None


# --- pictures ----------------------------------------------------------------------------------------------------


def read_images(folder: Path) -> Raw:
    """A folder of class sub-folders of pictures, or of train/ and test/ (and validation/) of such folders.

    All pictures take the mode of the first: grey (x [n, 1, h, w]) or colour (x [n, 3, h, w]), 8 bits.
    """
    splits = _split_folders(folder) or {"train": folder}
    if "train" not in splits:
        raise DataError(f"{folder} has {', '.join(sorted(splits))} but no train folder: add train/<class>/<picture>")
    names = sorted({sub.name for split in splits.values() for sub in _subfolders(split)})
    mode = ""
    parts = {}
    for split in ("train", "validation", "test"):
        if split in splits:
            files = _pictures(splits[split])
            pictures, mode = stack_pictures(((str(file), _open(file)) for file in files), mode)
            parts[split] = Part(pictures, np.array([names.index(file.parent.name) for file in files], np.int64))
    return Raw(folder.name, parts["train"], parts.get("validation"), parts.get("test"), class_names=tuple(names))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith("."))


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the parts, if `folder` is divided into parts and not into classes."""
    subs = _subfolders(folder)
    if not any(sub.name == "train" and _subfolders(sub) for sub in subs):
        return {}
    odd = [sub.name for sub in subs if sub.name not in SPLITS]
    if odd:
        raise DataError(f"{folder} has {odd[0]!r} beside train/: keep only train/, validation/, test/")
    return {SPLITS[sub.name]: sub for sub in subs}


def _pictures(folder: Path) -> list[Path]:
    files = []
    for sub in _subfolders(folder):
        inside = sorted(file for file in sub.iterdir() if file.suffix.lower() in _PICTURES and file.is_file())
        if not inside:
            raise DataError(f"the class folder {sub} holds no pictures (such as .png or .jpg): fill or remove it")
        files += inside
    if not files:
        raise DataError(f"{folder} has no class sub-folders with pictures: arrange them as <class>/<picture>")
    return files


def _open(path: Path) -> Image:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the picture {path} cannot be read ({error}): mend or remove it") from None


def stack_pictures(pictures: Iterable[tuple[str, Image]], mode: str = "") -> tuple[Array, str]:
    """Named pictures as one array [n, c, h, w] of bytes, and their common mode, "L" or "RGB".

    The first picture decides the mode (unless given) and the size. Raises DataError naming a picture of another size.
    """
    arrays: list[Array] = []
    first, size = "", (0, 0)
    for name, picture in pictures:
        if picture.mode[0] in "IF":
            raise DataError(f"the picture {name} has more than 8 bits per pixel ({picture.mode}): convert it to 8 bits")
        mode = mode or ("L" if picture.mode in ("1", "L", "LA") else "RGB")
        if not arrays:
            first, size = name, picture.size
        if picture.size != size:
            raise DataError(
                f"the picture {name} has {_size(picture.size)} pixels, but {first} has {_size(size)}: resize "
                "them all to one size"
            )
        pixels = np.asarray(picture if picture.mode == mode else picture.convert(mode), np.uint8)  # [h, w] or [h, w, 3]
        arrays.append(pixels[None] if mode == "L" else np.moveaxis(pixels, 2, 0))
    return np.stack(arrays), mode


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


# --- Hugging Face ------------------------------------------------------------------------------------------------


def read_huggingface(path: Path, label_column: str, client_column: str | None) -> Raw:
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
    return from_huggingface(found, path.stem, label_column, client_column)


def import_datasets() -> Any:
    """The package `datasets`. Raises DataError with the remedy if it is not installed."""
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise DataError(
            "Hugging Face data sets need the package 'datasets', which is not installed: pip install datasets"
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
        parts[split] = Part(x, _hf_words(dataset, label_column, name))
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


# --- torch -------------------------------------------------------------------------------------------------------


def from_pairs(dataset: Any, what: str) -> Part:
    """All pairs (x, label) of a map-style Dataset. x: a tensor, an array, a number, or a picture (PIL)."""
    try:
        size = len(dataset)
    except TypeError:
        raise DataError(
            f"the {what} has no length: give a map-style Dataset (with __len__ and __getitem__), or use from_arrays"
        ) from None
    if size == 0:
        raise DataError(f"the {what} has no rows: add samples")
    xs, ys = [], []
    for row in range(size):
        item = dataset[row]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"item {row} of the {what} is no pair (x, label) but {type(item).__name__}: return pairs")
        xs.append(item[0])
        ys.append(item[1].item() if hasattr(item[1], "item") and np.ndim(item[1]) == 0 else item[1])
    if hasattr(xs[0], "getbands"):
        named = ((f"{what}[{row}]", picture) for row, picture in enumerate(cast("list[Image]", xs)))
        return Part(stack_pictures(named)[0], np.array(ys))
    arrays = [np.asarray(x) for x in xs]
    for row, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise DataError(
                f"x of item {row} of the {what} has shape {array.shape}, item 0 has {arrays[0].shape}: make them equal"
            )
    return Part(np.stack(arrays), np.array(ys))


READERS: dict[str, Callable[[Path, str, str | None], Raw]] = {
    "npz": lambda path, label, client: read_npz(path),
    "csv": read_csv,
    "idx": lambda path, label, client: read_idx(path),
    "images": lambda path, label, client: read_images(path),
    "huggingface": read_huggingface,
}
