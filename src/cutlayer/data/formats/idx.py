"""The idx files of MNIST."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cutlayer.data.formats.reader import Format, data_format
from cutlayer.data.unsplit import Array, Raw, Section
from cutlayer.errors import DataError

_IDX = re.compile(r"(?:.*-)?(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?")


@data_format(
    "idx",
    title="idx",
    summary="a folder with four idx files as MNIST has them, gzipped or not",
    asked_first=True,
)
class Idx(Format):
    """A folder of idx files."""

    @classmethod
    def fits(cls, path: Path) -> bool:
        """A folder with a file that is named as MNIST's are."""
        return path.is_dir() and any(_IDX.fullmatch(file.name) for file in path.iterdir())

    def read(self, path: Path) -> Raw:
        """The four idx files of MNIST and its kin, gzipped or not; pictures x [n, 1, h, w] in 8 bits."""
        files: dict[tuple[str, str], Path] = {}
        for file in sorted(path.iterdir(), key=lambda file: (file.suffix == ".gz", file.name)):
            match = _IDX.fullmatch(file.name)
            if match:
                role = ("train" if match[1] == "train" else "test", match[2])
                before = files.setdefault(role, file)
                if before.name not in (file.name, file.name.removesuffix(".gz")):
                    raise DataError(f"{path} holds both {before.name} and {file.name}: keep one data set per folder")
        train, test = (_idx_part(path, files, name) for name in ("train", "test"))
        return Raw(path.name, train, test=test, symmetric=True)


def _idx_part(folder: Path, files: Mapping[tuple[str, str], Path], part: str) -> Section:
    for what in ("images", "labels"):
        if (part, what) not in files:
            prefix = "train" if part == "train" else "t10k"
            dims = 3 if what == "images" else 1
            raise DataError(f"{folder} lacks the {part} {what}: add {prefix}-{what}-idx{dims}-ubyte (or .gz)")
    return Section(read_idx_file(files[part, "images"], 3)[:, None], read_idx_file(files[part, "labels"], 1))


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
    """The content of a gzip file; for a truncated one, the part that could be unpacked (the caller checks its
    length).
    """
    try:
        return zlib.decompressobj(wbits=31).decompress(path.read_bytes())
    except zlib.error as error:
        raise DataError(f"{path} is not a valid gzip file ({error}): copy it again") from None
