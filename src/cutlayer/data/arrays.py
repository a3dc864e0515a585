"""Users' array-like values as NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cutlayer.data.unsplit import Array
from cutlayer.errors import DataError

ArrayOrTensor = npt.ArrayLike | Tensor

_FLOATS = (torch.float16, torch.float32, torch.float64)


def as_array(values: Any, name: str) -> Array:
    """`values`, called `name`, as an array; floats that NumPy lacks (bfloat16) as float32. Raises DataError for ragged
    rows.
    """
    try:
        if not isinstance(values, Tensor):
            return np.asarray(values)
        plain = values.detach().cpu()
        plain = plain.to_dense() if plain.layout is not torch.strided else plain.resolve_conj().resolve_neg()
        narrow = plain.is_floating_point() and plain.dtype not in _FLOATS
        return (plain.float() if narrow else plain).numpy()
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{name} cannot be read as an array ({reason}): give rows of one shape and type") from None
