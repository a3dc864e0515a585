"""NumPy archives. Nothing is ever unpickled."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cutlayer.data.formats.reader import Format, data_format
from cutlayer.data.unsplit import Array, Raw, Section
from cutlayer.errors import DataError, unknown


@data_format(
    "npz",
    title="NumPy",
    summary="a .npz file with arrays x, y (and client), or x_train, y_train, x_test, y_test (and client_train)",
)
class Npz(Format):
    """Arrays of an .npz file."""

    @classmethod
    def fits(cls, path: Path) -> bool:
        """A file named .npz."""
        return path.is_file() and path.suffix.lower() == ".npz"

    def read(self, path: Path) -> Raw:
        """Arrays x, y (and client), or x_train, y_train (and client_train); x_validation, x_test and so on if any. The
        names may be in any case, and those of MedMNIST (train_images, ...). Other arrays are left out.

        Inputs [n, h, w] that are not integer tokens get a channel axis: [n, 1, h, w]. Inputs [n, h, w, c] with c in
        (1, 3, 4) become [n, c, h, w], unless the second axis has such a size too: then they are taken as [n, c, h, w].
        """
        found = npz_arrays(path)
        arrays, left_out = _known(path, found)
        suffix = "_train" if "x_train" in arrays else ""
        train = _npz_part(path, arrays, suffix)
        if train is None:
            raise DataError(
                f"{path} has no array 'x' or 'x_train' but {sorted(found)}: save np.savez(path, x=..., y=...)"
            )
        owners = {part: arrays.pop(f"client_{part}", None) for part in ("validation", "test")}
        if "client" in arrays and suffix:
            raise DataError(f"{path} has 'client' beside 'x_train': call it client_train")
        return Raw(
            path.stem,
            train,
            _npz_part(path, arrays, "_validation"),
            _npz_part(path, arrays, "_test"),
            client=arrays.get(f"client{suffix}"),
            validation_client=owners["validation"],
            test_client=owners["test"],
            left_out=(f"the array{'s' if len(left_out) > 1 else ''} {', '.join(left_out)}",) if left_out else (),
        )

    def inputs(self, path: Path) -> Array:
        """The inputs alone: those of x, or of x_test."""
        arrays, _ = _known(path, npz_arrays(path))
        if not {"x", "x_test"} & set(arrays):
            raise DataError(f"{path} has no array 'x' or 'x_test': save np.savez(path, x=...)")
        return channels_first(arrays["x" if "x" in arrays else "x_test"])


_ROLES = {"x": "x", "y": "y", "client": "client", "images": "x", "labels": "y", "clients": "client"}
_PARTS = {"": "", "train": "_train", "val": "_validation", "validation": "_validation", "test": "_test"}


def _known(path: Path, found: Mapping[str, Array]) -> tuple[dict[str, Array], list[str]]:
    """The arrays by the names in `Npz.read`, and the names of those that are left out.

    Raises DataError for two arrays with the same role, and for a left-out array whose name resembles that of a role.
    """
    arrays: dict[str, Array] = {}
    called: dict[str, str] = {}
    left_out = []
    for name, array in found.items():
        words = name.lower().split("_")
        role = next((_ROLES[word] for word in words if word in _ROLES), None)
        part = next((_PARTS[word] for word in words if word in _PARTS), "")
        if role is None and not set(words) & set(_PARTS):
            left_out.append(repr(name))
            continue
        if role is None or len(words) > 2 or (len(words) == 2 and not part):
            raise DataError(f"{path} has an array {name!r}: {unknown('array', name, _NAMES)}; rename or remove it")
        if role + part in called:
            raise DataError(f"{path} has both {called[role + part]!r} and {name!r}: keep one")
        arrays[role + part], called[role + part] = array, name
    return arrays, left_out


_NAMES = [role + part for part in dict.fromkeys(_PARTS.values()) for role in ("x", "y", "client")]


def npz_arrays(path: Path) -> dict[str, Array]:
    """All arrays of an .npz file. Raises DataError."""
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


def _npz_part(path: Path, arrays: Mapping[str, Array], suffix: str) -> Section | None:
    x, y = arrays.get(f"x{suffix}"), arrays.get(f"y{suffix}")
    if x is None and y is None:
        return None
    if x is None or y is None:
        lone, absent = ("x", "y") if y is None else ("y", "x")
        raise DataError(f"{path} has '{lone}{suffix}' but no '{absent}{suffix}': save both in the same archive")
    return Section(channels_first(x), y)


def channels_first(x: Array) -> Array:
    """Pictures [n, h, w] or [n, h, w, c] as [n, c, h, w]; integer tokens and everything else as they are."""
    if x.ndim == 3 and (x.dtype in (np.uint8, np.uint16) or x.dtype.kind in "fb"):
        return x[:, None]  # [n, 1, h, w]
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        return np.moveaxis(x, 3, 1)  # [n, c, h, w]
    return x
