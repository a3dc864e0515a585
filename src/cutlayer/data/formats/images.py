"""Folders of pictures, one per class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cutlayer.data.formats._pictures import stack_pictures
from cutlayer.data.formats.reader import Format, data_format
from cutlayer.data.unsplit import SPLITS, Raw, Section
from cutlayer.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}


@data_format(
    "images",
    title="Images",
    summary="a folder with one sub-folder of pictures per class (or train/ and test/ of such folders)",
)
class Images(Format):
    """A folder of pictures, sorted by class or by part and class."""

    @classmethod
    def fits(cls, path: Path) -> bool:
        """A folder of folders of pictures, or of a train folder with folders in it."""
        if not path.is_dir():
            return False
        return any(file.suffix.lower() in _PICTURES for file in path.glob("*/*")) or _has_train(path)

    def read(self, path: Path) -> Raw:
        """A folder of class sub-folders of pictures, or of train/ and test/ (and validation/) of such folders.

        All pictures take the mode of the first: grey (x [n, 1, h, w]) or colour (x [n, 3, h, w]), 8 bits.
        """
        splits = _split_folders(path) or {"train": path}
        if "train" not in splits:
            raise DataError(f"{path} has {', '.join(sorted(splits))} but no train folder: add train/<class>/<picture>")
        names = sorted({sub.name for split in splits.values() for sub in _subfolders(split)})
        mode = ""
        parts = {}
        for split in ("train", "validation", "test"):
            if split in splits:
                files = _pictures(splits[split])
                pictures, mode = stack_pictures(((str(file), _open(file)) for file in files), mode)
                parts[split] = Section(pictures, np.array([names.index(file.parent.name) for file in files], np.int64))
        return Raw(path.name, parts["train"], parts.get("validation"), parts.get("test"), class_names=tuple(names))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith("."))


def _has_train(folder: Path) -> bool:
    return any(sub.name == "train" and _subfolders(sub) for sub in _subfolders(folder))


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the parts, if `folder` is divided into parts and not into classes."""
    if not _has_train(folder):
        return {}
    subs = _subfolders(folder)
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
        raise DataError(f"the picture {path} cannot be read ({error}): fix or remove it") from None
