"""Data sets by name, from disk, from a function, or from memory; checked, split three ways, and converted to tensors.

What happens to the inputs, whatever their source:
- 8-bit inputs are scaled to [0, 1]; idx files (Fashion-MNIST too) to [-1, 1], as (x/255 - 0.5)/0.5;
- floating point inputs and booleans become float32 and are otherwise taken as they are;
- other integers stay integers (int64): a model that embeds them takes them as tokens, any other as numbers;
- 16-bit pictures are scaled to [0, 1] too;
- the numbers of a table (CSV, or a Hugging Face data set without pictures, arrays or lists) are standardised by the
  mean and the standard deviation of the training part; a column that is constant there becomes 0;
- the text of a table becomes one column of 0 and 1 for each category;
- missing values of a table are an error, unless `impute` says what to fill in.

What happens to the targets: where a row has one class, integers or words are mapped to their rank 0..K-1 among all
labels, and keep their names; other integers stay as they are (int64), and numbers become float32.

How it is split: a test set that the data bring is used as it is; the same for a validation set. Otherwise `test` is
taken from everything, then `validation` from what remains; each is a fraction below 1 or a whole number of samples.
Splits keep the shares of the classes, if every class is large enough for that.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from cutlayer import plugins
from cutlayer.data.arrays import ArrayOrTensor, as_array
from cutlayer.data.finish import finished, finished_whole, named
from cutlayer.data.formats import detect, find_format, no_effect
from cutlayer.data.formats.huggingface import Huggingface
from cutlayer.data.formats.reader import Format, Labelled
from cutlayer.data.lazy import InMemory, ItemReading
from cutlayer.data.own import own_code
from cutlayer.data.pairs import from_pairs
from cutlayer.data.samples import Source
from cutlayer.data.several import is_several, numbered
from cutlayer.data.targets import Targets, counting
from cutlayer.data.unsplit import Array, Raw, Section, part_called
from cutlayer.errors import ConfigError, DataError, unknown

R = TypeVar("R", bound=Raw | Source)

_ARRAYS = (
    "x", "y", "x_validation", "y_validation", "x_test", "y_test", "client", "client_validation", "client_test",
)  # fmt: skip


def load(
    data: str,
    *,
    data_format: str = "auto",
    class_names: Sequence[str] = (),
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    given: frozenset[str] = frozenset(),
    targets: Targets = "class",
    ignored: int | None = None,
    data_in_memory: InMemory = "always",
    data_workers: int = 0,
    model_folder: str = "",
    test_seed: int | None = None,
    **options: Any,
) -> Source:
    """Load a built-in data set, a file or folder, or the result of a function.

    `data` is a name (digits, fashion-mnist, or an entry point), a path, or a reference `path/to/file.py:name` or
    `package.module:name` to a function without arguments that returns data in any form that `from_memory` takes.
    `data_format` is the name of a format (npz, csv, idx, images, huggingface, or an entry point), a reference
    `file.py:name` to a `Format`, or auto. `options` are those of the format or of the function, such as `label_column`,
    `client_column`, `columns`, `ignore_columns` and `impute` for CSV and Hugging Face data. An .npz file names owners
    in an array `client` (or `client_train`). `class_names` are all labels in order, for data that may lack some of
    them. Inputs are returned as [n, ...]: pictures as [n, c, h, w], tables as [n, columns].

    `given` are the options that the user set; `validation` or `test` among them is an error if the data bring that
    part. `targets` says what the task needs as targets: one class per row ("class"), integers of any shape ("classes"),
    or numbers. Rows of the class `ignored` are left out. `model_folder` is the model's folder, if it has one; text
    takes its tokenizer from there. `seed` draws the held-out rows; if `test_seed` is given, it draws the test rows.

    Raises DataError if the data are missing, damaged, or not fit for the task, and ConfigError if an option is out of
    range or has no effect on these data.
    """
    reading = ItemReading(data_in_memory, data_workers, seed)
    found = _read(data, data_format, options, reading, _Setting(targets, model_folder))
    _refuse_given(found, given, {"validation": validation, "test": test})
    if isinstance(found, Source):
        return _of_classes(found, class_names)
    return finished(_named(found, class_names, targets, ignored), validation, test, seed, targets, ignored, test_seed)


def load_whole(
    data: str,
    *,
    data_format: str = "auto",
    class_names: Sequence[str] = (),
    targets: Targets = "class",
    ignored: int | None = None,
    data_in_memory: InMemory = "always",
    data_workers: int = 0,
    seed: int = 0,
    with_test: bool = False,
    model_folder: str = "",
    **options: Any,
) -> Source:
    """The same with nothing held out: what a client trains on, alone. What the data bring to test with is left out,
    unless it is wanted (`with_test`).

    Data of one class need `class_names`. Raises DataError and ConfigError as `load` does.
    """
    reading = ItemReading(data_in_memory, data_workers, seed)
    found = _read(data, data_format, options, reading, _Setting(targets, model_folder), alone=True)
    if isinstance(found, Source):
        whole = _of_classes(found, class_names)
        test = whole.test if with_test else whole.train[:0]
        return dataclasses.replace(
            whole, validation=whole.train[:0], test=test, client_column=None, validation_clients=None, test_clients=None
        )
    raw = _named(found, class_names, targets, ignored)
    raw = dataclasses.replace(raw, validation=None, validation_client=None, test_client=None)
    return finished_whole(raw if with_test else dataclasses.replace(raw, test=None), targets, ignored)


def _named(raw: Raw, class_names: Sequence[str], targets: Targets, ignored: int | None) -> Raw:
    """The same with these class names: labels are counted as they name them, other classes have them already."""
    if not class_names:
        return raw
    if targets == "class":
        return named(raw if ignored is None else counting(raw, ignored), class_names)
    return dataclasses.replace(raw, class_names=tuple(class_names))


def from_arrays(
    x: ArrayOrTensor,
    y: ArrayOrTensor,
    *,
    x_validation: ArrayOrTensor | None = None,
    y_validation: ArrayOrTensor | None = None,
    x_test: ArrayOrTensor | None = None,
    y_test: ArrayOrTensor | None = None,
    client: ArrayOrTensor | None = None,
    client_validation: ArrayOrTensor | None = None,
    client_test: ArrayOrTensor | None = None,
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    name: str = "arrays",
    targets: Targets = "class",
    ignored: int | None = None,
) -> Source:
    """Inputs `x` [n, ...] and labels `y` [n] from memory. The axes are not changed.

    `x_test` and `y_test` are the test set (`test` is then ignored), and `x_validation` and `y_validation` the
    validation set. `client` [n] says to which client each row of `x` belongs; `client_validation` and `client_test` do
    so for the other sets. Raises DataError and ConfigError as `load` does.
    """
    arrays = {
        "x": x,
        "y": y,
        "x_validation": x_validation,
        "y_validation": y_validation,
        "x_test": x_test,
        "y_test": y_test,
        "client": client,
        "client_validation": client_validation,
        "client_test": client_test,
    }
    raw = _raw_of_arrays(name, {k: v for k, v in arrays.items() if v is not None})
    return finished(raw, validation, test, seed, targets, ignored)


def from_dataset(
    dataset: Any,
    *,
    test_dataset: Any = None,
    label_column: str = "label",
    client_column: str | None = None,
    columns: Sequence[str] = (),
    ignore_columns: Sequence[str] = (),
    impute: str | None = None,
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    name: str = "dataset",
    given: frozenset[str] = frozenset(),
    targets: Targets = "class",
    ignored: int | None = None,
    data_in_memory: InMemory = "always",
    data_workers: int = 0,
) -> Source:
    """A map-style `torch.utils.data.Dataset` of pairs (x, label), or a local `datasets.Dataset` (or DatasetDict).

    x may be a tensor, an array, a number, or a picture (PIL). By default, all items are read once and kept in memory.
    With `data_in_memory` "never", the items of a `Dataset` are read when a batch needs them, by `data_workers`
    processes (0: by this one). With "auto", this happens if they would not all fit into memory. `seed` determines what
    random transforms draw. `test_dataset`, of the same kind, is the test set (`test` is then ignored). Options about
    columns apply only to `datasets.Dataset`. `given` is as for `load`. Raises DataError and ConfigError as `load` does.
    """
    values = {
        "label_column": label_column,
        "client_column": client_column,
        "columns": tuple(columns),
        "ignore_columns": tuple(ignore_columns),
        "impute": impute,
    }
    defaults = Huggingface.entry.defaults
    options = {option: value for option, value in values.items() if value != defaults[option]}
    parts = {"train": dataset} if test_dataset is None else {"train": dataset, "test": test_dataset}
    raw = _raw_of_parts(name, parts, options, ItemReading(data_in_memory, data_workers, seed))
    _refuse_given(raw, given, {"validation": validation, "test": test})
    return finished(raw, validation, test, seed, targets, ignored)


def from_memory(
    data: Any,
    *,
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    given: frozenset[str] = frozenset(),
    targets: Targets = "class",
    ignored: int | None = None,
    data_in_memory: InMemory = "always",
    data_workers: int = 0,
    data_format: str = "auto",
    model_folder: str = "",
    test_seed: int | None = None,
    **options: Any,
) -> Source:
    """Data in any of these forms:

    - a `Source`; arrays (x, y), (x, y, x_test, y_test), ((x, y), (x_test, y_test)), or a dictionary of the arrays that
      `from_arrays` takes, by their names;
    - a data set that `from_dataset` takes, (train, test) or (train, validation, test) of such, or a dictionary of them
      by part;
    - a list of data sets or of arrays (x, y), one for each client, or a dictionary of them by the clients' names.

    `data_format` says how Hugging Face data are read, with the `options` of that format: huggingface (auto), or text.
    Raises DataError and ConfigError as `load` does.
    """
    name = "arrays" if _arrays_of(data) is not None else "dataset"
    reading = ItemReading(data_in_memory, data_workers, seed)
    found: Raw | Source
    if data_format != "auto":
        found = _taken_as(data_format, data, name, options, _Setting(targets, model_folder))
    else:
        found = _taken(data, name, "data", options, reading)
    _refuse_given(found, given, {"validation": validation, "test": test})
    if isinstance(found, Source):
        return found
    return finished(found, validation, test, seed, targets, ignored, test_seed)


# From a name, a path or a function


class _Setting(NamedTuple):
    """The purpose of reading: the task's targets, and the folder of the model, if it has one."""

    targets: Targets
    folder: str = ""


def _read(
    data: str,
    data_format: str,
    options: Mapping[str, Any],
    reading: ItemReading,
    setting: _Setting,
    *,
    alone: bool = False,
) -> Raw | Source:
    """The result of a reader or a function; `alone`: for the data of one client. Raises DataError, ConfigError."""
    if data_format != "auto":
        plugins.find("format", data_format)  # an unknown name is an error now
    path = Path(data).expanduser()
    if plugins.known("data", data) or (plugins.is_reference(data) and not path.exists()):
        theirs = {name: value for name, value in options.items() if not (alone and name == "client_column")}
        return _from_function(data, data_format, theirs, reading)
    if not path.exists():
        raise DataError(
            f"{unknown('data set', data, plugins.names('data'))}; there is no file or folder of that name "
            "either; a function of your own is path/to/file.py:name"
        )
    return _from_path(path, detect(path) if data_format == "auto" else data_format, options, setting, alone=alone)


def _from_function(data: str, data_format: str, options: Mapping[str, Any], reading: ItemReading) -> Raw | Source:
    entry, function = plugins.find("data", data), plugins.load("data", data)
    what = f"the {'built-in ' if data in plugins.index('data') else ''}data set {data!r}"
    if data_format != "auto":
        raise ConfigError(no_effect("data_format", data_format, what))
    own = entry.checked({option: value for option, value in options.items() if option in entry.option_names})
    others = {option: value for option, value in options.items() if option not in entry.option_names}
    with own_code(function, what), _readable(data, what):
        return _taken(function(**own), data.rpartition(":")[2], what, others, reading)


def _from_path(
    path: Path, data_format: str, options: Mapping[str, Any], setting: _Setting, *, alone: bool
) -> Raw | Source:
    if alone and "client_column" not in plugins.find("format", data_format).option_names:
        options = {name: value for name, value in options.items() if name != "client_column"}
    reader = find_format(data_format, options).set_for(*setting)
    if alone and isinstance(reader, Labelled):
        reader = reader.alone()
    what = f"data of the format {data_format!r}"
    with own_code(reader, f"reading {what}"), _readable(str(path), what):
        return _taken(reader.read(path), path.stem, what, {})


@contextmanager
def _readable(data: str, what: str) -> Iterator[None]:
    """Turn an error of the file system into a DataError."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename})"
        raise DataError(f"{data!r} cannot be read as {what}: {reason}; name another data_format or path") from None


# From the result of a function or a format, or from memory


def _taken(
    found: Any, name: str, what: str, options: Mapping[str, Any], reading: ItemReading | None = None
) -> Raw | Source:
    """`found` in any of the forms that `load` describes. `options` are options that only some of these have; `reading`
    is for data sets of items.
    """
    if isinstance(found, (Raw, Source)):
        return _without(options, what, found)
    if (parts := _parts_of(found)) is not None:
        return _raw_of_parts(name, parts, options, reading)
    if (clients := _clients_of(found)) is not None:
        return _raw_of_clients(name, clients, options, reading)
    if (arrays := _arrays_of(found)) is not None:
        return _without(options, what, _raw_of_mapping(name, arrays, what))
    _refuse_other(found, what)
    return _raw_of_parts(name, {"train": found}, options, reading)


def _taken_as(data_format: str, found: Any, name: str, options: Mapping[str, Any], setting: _Setting) -> Raw:
    """Hugging Face data, by part or by client too, read as a format reads them. Raises ConfigError for other data."""
    reader: Format = find_format(data_format, options).set_for(*setting)
    parts, clients = _parts_of(found) or {"train": found}, _clients_of(found)
    if _parts_of(found) is None and clients is not None and all(map(_is_hugging, clients.values())):
        return reader.taken({"train": _joined(clients)}, name, _owning(clients))
    if not all(map(_is_hugging, parts.values())):
        raise ConfigError(
            f"data_format = {data_format!r} has no effect on a {type(found).__name__}: give data sets of Hugging Face, "
            "or leave it out"
        )
    return reader.taken(_splits(parts), name)


def _parts_of(found: Any) -> dict[str, Any] | None:
    """Data sets by part: (train, test), (train, validation, test), or by the names of parts; None for anything else."""
    if _is_hugging(found):
        return None
    if isinstance(found, tuple) and 2 <= len(found) <= 3 and all(map(_is_data_set, found)):
        return dict(zip(("train", "validation", "test") if len(found) == 3 else ("train", "test"), found, strict=True))
    if isinstance(found, Mapping) and found and all(map(_is_data_set, found.values())):
        parts = {part_called(str(key)): value for key, value in found.items()}
        if None not in parts and len(parts) == len(found) and "train" in parts:
            return {str(part): value for part, value in parts.items()}
    return None


def _clients_of(found: Any) -> dict[Any, Any] | None:
    """The data set of each client: a list of them, or a dictionary by the clients' names; None for anything else."""
    if isinstance(found, list) and found and all(map(_is_data_set, found)):
        return dict(enumerate(found))
    named = isinstance(found, Mapping) and not _is_hugging(found) and len(found) > 0
    if named and all(map(_is_data_set, found.values())):
        return {str(key): value for key, value in found.items()}
    return None


def _arrays_of(found: Any) -> Mapping[str, Any] | None:
    """Arrays by name, of a dictionary, (x, y), (x, y, x_test, y_test) or ((x, y), (x_test, y_test)); None for anything
    else.
    """
    if _is_hugging(found):
        return None
    if (pairs := _pairs_of(found)) is not None:
        return _by_client(pairs)
    if isinstance(found, Mapping):
        return found
    if isinstance(found, tuple) and len(found) == 2 and all(isinstance(f, tuple) and len(f) == 2 for f in found):
        found = (*found[0], *found[1])
    if isinstance(found, tuple | list) and len(found) == 2:
        return dict(zip("xy", found, strict=True))
    if isinstance(found, tuple) and len(found) == 4:
        return dict(zip(("x", "y", "x_test", "y_test"), found, strict=True))
    return None


def _pairs_of(found: Any) -> Mapping[Any, tuple[ArrayOrTensor, ArrayOrTensor]] | None:
    """The arrays (x, y) of each client: a list of them, or a dictionary by name; None for anything else."""
    named = dict(enumerate(found)) if isinstance(found, list) else found
    if not isinstance(named, Mapping) or not named or not named.keys().isdisjoint(_ARRAYS):
        return None
    pairs = [isinstance(f, tuple) and len(f) == 2 and all(hasattr(v, "shape") for v in f) for f in named.values()]
    return named if all(pairs) else None


def _by_client(pairs: Mapping[Any, tuple[ArrayOrTensor, ArrayOrTensor]]) -> dict[str, Any]:
    """The arrays of all clients, one client's rows after another's, and their owners. Raises DataError."""
    x, y = ([as_array(pair[i], "xy"[i]) for pair in pairs.values()] for i in (0, 1))
    for client, a, b in zip(pairs, x, y, strict=True):
        if a.shape[1:] != x[0].shape[1:] or b.shape[1:] != y[0].shape[1:] or a.shape[:1] != b.shape[:1]:
            raise DataError(
                f"client {client!r} has x {a.shape} and y {b.shape}, but the first x {x[0].shape} and y {y[0].shape}: "
                "give rows of one shape, and as many of x as of y"
            )
    owners = np.repeat(np.array(list(pairs)), [len(a) for a in x])
    return {"x": np.concatenate(x), "y": np.concatenate(y), "client": owners}


def _is_data_set(found: Any) -> bool:
    """Whether this is a map-style data set and not an array."""
    array = isinstance(found, (str, bytes, list, tuple, Mapping, np.ndarray, Tensor)) or hasattr(found, "__array__")
    return _is_hugging(found) or (hasattr(found, "__getitem__") and hasattr(found, "__len__") and not array)


def _refuse_other(found: Any, what: str) -> None:
    """Raises DataError for anything that is not a data set, with the remedy."""
    if isinstance(found, torch.utils.data.DataLoader):
        raise DataError(f"{what} gives a DataLoader, whose batches cannot be divided among clients: give its .dataset")
    if hasattr(found, "iloc"):
        raise DataError(
            f"{what} gives a {type(found).__name__}: give the arrays (frame[columns], frame[label]), or save it as "
            "CSV and name that file"
        )
    if isinstance(found, (str, np.ndarray, Tensor)) or not hasattr(found, "__getitem__"):
        raise DataError(
            f"{what} gives a {type(found).__name__}: return a Source, arrays (x, y), a dictionary of arrays "
            f"({', '.join(_ARRAYS)}), a map-style Dataset, or a list of one for each client"
        )


def _without(options: Mapping[str, Any], what: str, found: R) -> R:
    """`found`; raises ConfigError for options, which have no effect on it."""
    for option in sorted(options):
        raise ConfigError(no_effect(option, options[option], what))
    return found


def _raw_of_mapping(name: str, arrays: Mapping[str, Any], what: str) -> Raw:
    for key in arrays:
        if key not in _ARRAYS:
            raise DataError(f"{what}: {unknown('array', str(key), _ARRAYS)}")
    for key in ("x", "y"):
        if key not in arrays:
            raise DataError(f"{what} gives no array {key!r}: return x and y")
    return _raw_of_arrays(name, {key: values for key, values in arrays.items() if values is not None})


def _raw_of_arrays(name: str, arrays: Mapping[str, ArrayOrTensor]) -> Raw:
    """The arrays that `from_arrays` takes, by name."""
    several: dict[str, Any] = {}
    found: dict[str, Array] = {}
    for key, values in arrays.items():
        if key.partition("_")[0] == "x" and is_several(values):
            found[key], several[key.partition("_")[2] or "train"] = numbered(values, key)
        else:
            found[key] = as_array(values, key)
    parts = {part: _section(found, f"_{part}") for part in ("validation", "test")}
    for part in parts:
        if f"client_{part}" in found and ("client" not in found or parts[part] is None):
            lacks = "client" if "client" not in found else f"x_{part}"
            raise DataError(f"client_{part} is given without {lacks}: pass both or neither")
    return Raw(
        name,
        Section(found["x"], found["y"]),
        parts["validation"],
        parts["test"],
        client=found.get("client"),
        validation_client=found.get("client_validation"),
        test_client=found.get("client_test"),
        several=several,
    )


def _section(arrays: Mapping[str, Array], suffix: str) -> Section | None:
    x, y = f"x{suffix}", f"y{suffix}"
    if (x in arrays) != (y in arrays):
        given, absent = (x, y) if x in arrays else (y, x)
        raise DataError(f"{given} is given without {absent}: pass both or neither")
    return Section(arrays[x], arrays[y]) if x in arrays else None


def _raw_of_parts(
    name: str, parts: Mapping[str, Any], options: Mapping[str, Any], reading: ItemReading | None = None
) -> Raw:
    """Data sets by part. `options` are those of Hugging Face data. Raises ConfigError if they have no effect."""
    if not _is_hugging(parts["train"]):
        return _without(options, "a data set of pairs (x, label)", from_pairs(parts, name, reading))
    return Huggingface.of(options).taken(_splits(parts), name)


def _splits(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face data sets by part; the training part may have parts itself."""
    train = parts["train"]
    splits = {**(dict(train) if isinstance(train, dict) else {"train": train}), **parts}
    if isinstance(train, dict):
        splits["train"] = train.get("train", next(iter(train.values())))
    return splits


def _raw_of_clients(
    name: str, clients: Mapping[Any, Any], options: Mapping[str, Any], reading: ItemReading | None = None
) -> Raw:
    """One data set for each client: their rows, one client's after another's, and their owners."""
    raw = _raw_of_parts(name, {"train": _joined(clients)}, options, reading)
    return dataclasses.replace(raw, client=_owning(clients))


def _owning(clients: Mapping[Any, Any]) -> Array:
    """The owner of each row, one client's rows after another's."""
    return np.repeat(np.array(list(clients)), [len(those) for those in clients.values()])


def _joined(clients: Mapping[Any, Any]) -> Any:
    """One data set, one client's rows after another's."""
    if all(map(_is_hugging, clients.values())):
        return sys.modules["datasets"].concatenate_datasets(list(clients.values()))
    return torch.utils.data.ConcatDataset(list(clients.values()))


def _is_hugging(dataset: Any) -> bool:
    hugging = sys.modules.get("datasets")  # if there is such a data set, the package is imported
    return hugging is not None and isinstance(dataset, (hugging.Dataset, hugging.DatasetDict))


# Options without effect


def _refuse_given(found: Raw | Source, given: frozenset[str], sizes: Mapping[str, float]) -> None:
    """Check the options of a part that the data have themselves, so that it is not held out of the rest."""
    for part, size in sizes.items():
        if part in given and getattr(found, part) is not None:
            raise ConfigError(
                f"{part}={size} has no effect on {found.name}, which brings its own {part} set: leave it out"
            )


def _of_classes(source: Source, class_names: Sequence[str]) -> Source:
    """A complete source names its classes itself."""
    if class_names and tuple(class_names) != source.class_names:
        raise ConfigError(
            f"class_names = {list(class_names)} has no effect on {source.name}, whose classes are "
            f"{list(source.class_names)}: leave it out"
        )
    return source
