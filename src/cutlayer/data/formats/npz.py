"""NumPy archives. Nothing is ever unpickled."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cutlayer.data.formats.reader import Format, data_format
from cutlayer.data.unsplit import Array, Raw, Section
from cutlayer.errors import DataError


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
        """Arrays x, y (and client), or x_train, y_train (and client_train); x_validation, x_test and their y if any.

        Inputs [n, h, w] that are not integer tokens get a channel axis: [n, 1, h, w]. Inputs [n, h, w, c] with c in
        (1, 3, 4) become [n, c, h, w], unless the second axis has such a size too: then they are taken as [n, c, h, w].
        """
        arrays = _npz_arrays(path)
        suffix = "_train" if "x_train" in arrays else ""
        train = _npz_part(path, arrays, suffix)
        if train is None:
            raise DataError(
                f"{path} has no array 'x' or 'x_train' but {sorted(arrays)}: save np.savez(path, x=..., y=...)"
            )
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
    if x.ndim == 3 and (x.dtype == np.uint8 or x.dtype.kind in "fb"):
        return x[:, None]  # [n, 1, h, w]
    if x.ndim == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        return np.moveaxis(x, 3, 1)  # [n, c, h, w]
    return x
