"""Pictures to arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from cutlayer.data.unsplit import Array
from cutlayer.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


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
