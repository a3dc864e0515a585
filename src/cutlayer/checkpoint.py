"""A training state in one safetensors file, written atomically; no pickle anywhere.

A state is a tree of dicts, lists, tuples, tensors and plain JSON values. Tensors become entries of the file, the rest
of the tree JSON in its header. Rows in other files beside it (`Kept`) are named there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cutlayer.engine.shelf import Kept
from cutlayer.errors import RunFolderError
from cutlayer.files import STATES, replace_file
from cutlayer.stored import Count, MalformedError, checked, parsed

_HEADER = "cutlayer"
_PLAIN = frozenset({int, float, str, bool, type(None)})


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path`: afterwards, either the new file is completely on disk, or the old one still is."""
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, tensors, path.parent)
    seen: set[int] = set()
    for name, tensor in tensors.items():  # and no two entries may share theirs
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    replace_file(path, save(tensors, metadata={_HEADER: json.dumps(tree)}))


def read(path: Path) -> dict[str, Any]:
    """The state in `path`. Raises RunFolderError if the file is not a complete checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {})[_HEADER]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        used = set[str]()
        state = _unpack(parsed(header), tensors, used, path.parent)
        if lost := sorted(tensors.keys() - used):
            raise MalformedError(f"it does not describe its tensor {lost[0]!r}")
        return checked(state, dict[str, Any])
    except RecursionError:
        reason = "it is nested too deeply"
    except (SafetensorError, MalformedError, OSError, KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    raise RunFolderError(f"{str(path)!r} is not a whole checkpoint ({reason}): start the run anew in another folder")


def _pack(value: Any, tensors: dict[str, Tensor], folder: Path) -> Any:
    """JSON for `value`; its tensors go into `tensors` under numbers. Files lie below `folder`."""
    if isinstance(value, Kept):
        return {"kept": [str(value.path.relative_to(folder)), _pack(value.slots, tensors, folder), list(value.order)]}
    if isinstance(value, Tensor):
        name = str(len(tensors))
        flat = value.detach().cpu().contiguous()
        # The file format needs tensors with their own memory; only views need a copy for this.
        tensors[name] = flat if flat.nbytes == flat.untyped_storage().nbytes() else flat.clone()
        return {"tensor": name}
    if isinstance(
        value, Mapping
    ):  # as pairs: optimiser states have integer keys, which JSON objects would turn to text
        return {"dict": [[key, _pack(item, tensors, folder)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, tensors, folder) for item in value]}
    if isinstance(value, list):
        if _PLAIN.issuperset(map(type, value)):  # numbers of very many clients: they are checked once
            return value
        return [_pack(item, tensors, folder) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values, not {type(value).__name__}")


def _unpack(value: Any, tensors: Mapping[str, Tensor], used: set[str], folder: Path) -> Any:
    """The inverse of `_pack`; the names of the tensors go into `used`. Raises MalformedError, KeyError, TypeError or
    ValueError for anything that `_pack` never produces.
    """
    if isinstance(value, list):
        if _PLAIN.issuperset(map(type, value)):
            return value
        return [_unpack(item, tensors, used, folder) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        used.add(content)
        return tensors[content]
    if kind == "kept":
        name, slots, order = checked(content, tuple[str, Any, list[Count]])
        where, found = Path(name), _unpack(slots, tensors, used, folder)
        if where.parts[:1] != (STATES,) or ".." in where.parts or not isinstance(found, Tensor):
            raise MalformedError(f"{name!r} is not a file of its states")
        return Kept(folder / where, found, tuple(order))
    if kind not in ("tuple", "dict") or not isinstance(content, list):
        raise MalformedError(f"{kind!r} is not a kind of value")
    if kind == "tuple":
        return tuple(_unpack(item, tensors, used, folder) for item in content)
    found = {key: _unpack(item, tensors, used, folder) for key, item in content}
    if len(found) != len(content):
        raise MalformedError("a key occurs twice")
    return found
