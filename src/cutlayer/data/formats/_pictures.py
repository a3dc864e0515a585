"""Pictures to arrays."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cutlayer.data.unsplit import Array
from cutlayer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_GREY, _DEEP, _COLOUR = "L", "I;16", "RGB"
_ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Pictures:
    """Pictures `x` [n, c, h, w] of each part, as bytes or in 16 bits, with the changes to them, and remarks on
    these.
    """

    x: dict[str, Array]
    recipe: dict[str, Any]
    remarks: tuple[str, ...]


def stack_pictures(parts: Mapping[str, Iterable[tuple[str, Image]]], resize: str | None = None) -> Pictures:
    """Named pictures of each part as arrays: all grey, or all in colour if one of them is; 16 bits if one has them.

    They are turned as their EXIF orientation says, and given the height and width of `resize`. Raises DataError naming
    a picture of another size than the first.
    """
    wanted = None if resize is None else parse_size(resize)
    notes: Counter[str] = Counter()
    arrays: dict[str, list[Array]] = {}
    first = ""
    size = wanted
    for part, pictures in parts.items():
        arrays[part] = []
        for name, picture in pictures:
            array = _array(name, picture, wanted, notes)
            if size is None:
                first, size = name, array.shape[-2:]
            if array.shape[-2:] != size:
                raise DataError(
                    f"the picture {name} has {_size(array.shape[-2:])} pixels (height x width), but {first} has "
                    f"{_size(size)}: pass resize, such as resize = '{_size(size)}', or resize them all to one size"
                )
            arrays[part].append(array)
    mode = _common_mode([array for those in arrays.values() for array in those])
    assert size is not None, "a part has a picture"
    recipe = {"kind": "pictures", "mode": mode, "size": list(size)}
    x = {part: np.stack([_in_mode(array, mode) for array in those]) for part, those in arrays.items()}
    return Pictures(x, recipe, tuple(f"{what} {count}" for what, count in notes.items()))


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of a text such as 224x224. Raises ConfigError."""
    found = re.fullmatch(r"([1-9]\d{0,4})\s*[xX]\s*([1-9]\d{0,4})", text.strip())
    if found is None:
        raise ConfigError(f"resize = {text!r} is not a size: give HEIGHTxWIDTH, such as 224x224")
    return int(found[1]), int(found[2])


def one_picture(name: str, picture: Image, recipe: Mapping[str, Any], *, resized: bool = True) -> Array:
    """A picture [c, h, w] in the form of those of `recipe`. Raises DataError for another size if it is not to be
    `resized`.
    """
    size = (recipe["size"][0], recipe["size"][1])
    array = _array(name, picture, size if resized else None, Counter())
    if array.shape[-2:] != size:
        raise DataError(
            f"the picture {name} has {_size(array.shape[-2:])} pixels (height x width), but the first has "
            f"{_size(size)}: resize them all to one size"
        )
    mode = _common_mode([array])
    if recipe["mode"] != mode and mode != _GREY:
        raise DataError(f"the picture {name} has the mode {mode}, those of the training data {recipe['mode']}")
    return _in_mode(array, recipe["mode"])


def _array(name: str, picture: Image, size: tuple[int, int] | None, notes: Counter[str]) -> Array:
    """[h, w] if grey, in 8 or 16 bits, or [3, h, w]."""
    from PIL import ImageOps

    notes.update(_notes(picture))
    picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] == "F":
        raise DataError(f"the picture {name} has real numbers for pixels ({picture.mode}): convert it to 8 or 16 bits")
    if picture.mode[0] == "I":
        return _deep(name, np.asarray(picture), size)
    mode = _GREY if picture.mode in ("1", "L", "LA", "La") else _COLOUR
    picture = picture if picture.mode == mode else picture.convert(mode)
    if size is not None and picture.size != size[::-1]:
        from PIL import Image

        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, np.uint8)
    return pixels if mode == _GREY else np.moveaxis(pixels, 2, 0)


def _deep(name: str, pixels: Array, size: tuple[int, int] | None) -> Array:
    """The pixels [h, w] of a picture of more than 8 bits, as 16 bits."""
    if pixels.min() < 0 or pixels.max() > 65535:
        raise DataError(f"the picture {name} has more than 16 bits per pixel: convert it to 8 or 16 bits")
    if size is not None and pixels.shape != size:
        from PIL import Image

        scaled = Image.fromarray(pixels.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
        pixels = np.asarray(scaled).round().clip(0, 65535)
    return pixels.astype(np.uint16)


def _notes(picture: Image) -> list[str]:
    """Remarks on the pictures."""
    found = []
    if picture.getexif().get(_ORIENTATION, 1) != 1:
        found.append("pictures turned upright by their EXIF orientation:")
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        found.append("pictures whose transparency is left out:")
    if getattr(picture, "is_animated", False):
        found.append("pictures with several frames, of which the first is used:")
    return found


def _common_mode(arrays: list[Array]) -> str:
    kinds = {_COLOUR if array.ndim == 3 else _DEEP if array.dtype == np.uint16 else _GREY for array in arrays}
    if {_COLOUR, _DEEP} <= kinds:
        raise DataError("some pictures have colour and others 16 bits per pixel: convert them to one kind")
    return next((mode for mode in (_COLOUR, _DEEP) if mode in kinds), _GREY)


def _in_mode(array: Array, mode: str) -> Array:
    """[c, h, w] in the common mode: 8 bits are the upper ones of 16."""
    if mode == _DEEP and array.dtype == np.uint8:
        array = array.astype(np.uint16) * 257
    if array.ndim == 3:
        return array
    return np.repeat(array[None], 3, axis=0) if mode == _COLOUR else array[None]


def _size(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
