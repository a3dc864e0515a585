"""Folders of pictures, one per class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cutlayer.data.account import ignored_files
from cutlayer.data.formats._pictures import stack_pictures
from cutlayer.data.formats.reader import Sized, data_format
from cutlayer.data.unsplit import Raw, Section, part_called
from cutlayer.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_PICTURES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff",
    ".pgm", ".ppm", ".pbm", ".pnm", ".tga",
)  # fmt: skip
_LITTER = (
    ".txt", ".md", ".json", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".html", ".log", ".ini", ".db", ".url",
    ".md5", ".sha256", ".license",
)  # fmt: skip
"""Suffixes of other files beside pictures: texts about them, and files of the system."""


@data_format(
    "images",
    title="Images",
    summary="a folder with one subfolder of pictures per class (or train/ and test/ with such subfolders)",
)
class Images(Sized):
    """A folder of pictures, sorted by class or by part and class."""

    @classmethod
    def fits(cls, path: Path) -> bool:
        """A folder of folders of pictures, or of a train folder with folders in it."""
        if not path.is_dir():
            return False
        return any(file.suffix.lower() in _PICTURES for file in path.glob("*/**/*")) or _has_train(path)

    def read(self, path: Path) -> Raw:
        """A folder of class sub-folders of pictures, or of train/ and test/ (and validation/) of such folders.

        All pictures are grey (x [n, 1, h, w]), or in colour (x [n, 3, h, w]) if one of them is. Folders within a class
        belong to that class. Files that are not pictures are named; many of them in a class are an error.
        """
        folders = _split_folders(path) or {"train": path}
        order = ("train", "validation", "test")
        parts: dict[str, _Part] = {part: _part(folders[part]) for part in order if part in folders}
        names = sorted({name for part in parts.values() for name in part.labels})
        _refuse_other_classes(path, parts)
        pictures = stack_pictures({part: opened(found.files) for part, found in parts.items()}, self.resize)
        sections = {
            part: Section(pictures.x[part], np.array([names.index(label) for label in found.labels], np.int64))
            for part, found in parts.items()
        }
        ignored = ignored_files(file for found in parts.values() for file in found.ignored)
        return Raw(
            path.name,
            sections["train"],
            sections.get("validation"),
            sections.get("test"),
            class_names=tuple(names),
            rows="pictures",
            left_out=(ignored,) if ignored else (),
            remarks=pictures.remarks,
            recipe=pictures.recipe,
        )


@dataclass(frozen=True)
class _Part:
    """The pictures of a part, the class of each, and the files that are not read."""

    files: list[Path]
    labels: list[str]
    ignored: list[Path]


def _part(folder: Path) -> _Part:
    found = _Part([], [], [file for file in sorted(folder.iterdir()) if not file.is_dir() and _counts(file, folder)])
    for sub in _subfolders(folder):
        files = [file for file in sorted(sub.rglob("*")) if not file.is_dir() and _counts(file, sub)]
        pictures = [file for file in files if _is_picture(file)]
        ignored = [file for file in files if not _is_picture(file)]
        if not pictures:
            raise DataError(f"the class folder {sub} holds no pictures (such as .png or .jpg): fill or remove it")
        _refuse_loss(sub, len(pictures), ignored)
        found.files.extend(pictures)
        found.labels.extend([sub.name] * len(pictures))
        found.ignored.extend(ignored)
    if not found.files:
        raise DataError(f"{folder} has no class sub-folders with pictures: arrange them as <class>/<picture>")
    _refuse_loss(folder, len(found.files), found.ignored)
    return found


def _counts(file: Path, folder: Path) -> bool:
    """Whether a file is worth a word: hidden ones are not."""
    return not any(word.startswith(".") for word in file.relative_to(folder).parts)


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in _PICTURES and file.is_file()


def _refuse_loss(folder: Path, pictures: int, ignored: Iterable[Path]) -> None:
    """Raises DataError if more than a quarter of the files that may be data would be left out."""
    lost = [file for file in ignored if file.suffix.lower() not in _LITTER]
    if 3 * len(lost) > pictures:
        raise DataError(
            f"{folder} holds {pictures} pictures, and {ignored_files(lost)}, which are not read: convert them to .png "
            "or .jpg in a folder of their class, or remove them"
        )


def _refuse_other_classes(folder: Path, parts: dict[str, _Part]) -> None:
    """Raises DataError for a part without any class of the training part, and for classes that only differ in case."""
    names = {name for part in parts.values() for name in part.labels}
    for part, found in parts.items():
        if not set(found.labels) & set(parts["train"].labels):
            raise DataError(
                f"the {part} part of {folder} has the class {found.labels[0]!r} and none of the training part's, such "
                f"as {parts['train'].labels[0]!r}: arrange it as <class>/<picture> too"
            )
    if len({name.casefold() for name in names}) < len(names):
        twice = next(a for a in sorted(names) for b in names if a != b and a.casefold() == b.casefold())
        raise DataError(f"{folder} has several spellings of the class {twice!r}: rename its folders alike")


def picture_files(path: Path) -> list[Path]:
    """The picture, or all pictures in a folder, in order. Raises DataError if there are none."""
    if not path.exists():
        raise DataError(f"{str(path)!r} does not exist: name a picture or a folder of them")
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if _counts(file, path)]
    return [file for file in files if file == path or _is_picture(file)]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith("."))


def _has_train(folder: Path) -> bool:
    return any(part_called(sub.name) == "train" and _subfolders(sub) for sub in _subfolders(folder))


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the parts, if `folder` is divided into parts and not into classes."""
    subs = _subfolders(folder)
    if not _has_train(folder):
        if subs and all(part_called(sub.name) and _subfolders(sub) for sub in subs):
            found = ", ".join(sub.name for sub in subs)
            raise DataError(f"{folder} has {found} but no train folder: add train/<class>/<picture>")
        return {}
    splits: dict[str, Path] = {}
    for sub in subs:
        part = part_called(sub.name)
        if part is None:
            raise DataError(f"{folder} has {sub.name!r} beside train/: keep only train/, validation/, test/")
        if part in splits:
            raise DataError(
                f"{folder} has {splits[part].name!r} and {sub.name!r}, both of which are the {part} part: keep one, or "
                "put their pictures together"
            )
        splits[part] = sub
    return splits


def opened(files: Iterable[Path]) -> Iterator[tuple[str, Image]]:
    """Each picture, while its file is open."""
    from PIL import Image

    for file in files:
        try:
            with Image.open(file) as picture:
                picture.load()
                yield str(file), picture
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"the picture {file} cannot be read ({error}): fix or remove it") from None
