"""Initial weights from a file, checks that weights fit a model, and new weights for an existing module."""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from cutlayer.copies import deep_copy
from cutlayer.errors import ConfigError, CutlayerWarning
from cutlayer.models.prepared import untied

_WRAPPED = ("state_dict", "model_state_dict", "model")  # keys under which training scripts store a state dict
_PREFIX = "module."  # DataParallel's prefix of every name


def read_weights(path: str) -> dict[str, Tensor]:
    """The named tensors in a .safetensors file, or in a state dict that `torch.save` wrote. No code in the file is run.

    Raises ConfigError if it is missing, damaged or something else.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise ConfigError(f"weights = {path!r}: there is no such file (from {Path.cwd()}); check the path")
    found = _safetensors(place) if place.suffix == ".safetensors" else _state_dict(place)
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(found):
        odd = next((name for name, value in found.items() if not isinstance(value, Tensor)), "nothing")
        raise ConfigError(
            f"weights = {path!r} holds {odd!r}, which is not a tensor: save the model's state_dict() alone"
        )
    if all(name.startswith(_PREFIX) for name in tensors):
        return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    return tensors


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Any] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"weights = {str(path)!r} is not a safetensors file ({error}): copy it again") from None
    return found


def _state_dict(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, KeyError):
        raise ConfigError(
            f"weights = {str(path)!r} cannot be read as a state dict: it is damaged, or holds Python objects other "
            "than tensors, which are not opened since they can run code; save the model's state_dict() alone, with "
            "torch.save or as .safetensors"
        ) from None
    while isinstance(found, Mapping) and (key := next((k for k in _WRAPPED if isinstance(found.get(k), Mapping)), "")):
        found = found[key]
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"weights = {str(path)!r} holds a {type(found).__name__}, not a state dict: save the model's state_dict()"
        )
    return dict(found)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str, *, strict: bool) -> None:
    """Load the weights of the file `path` into `model`: all, or (not `strict`) those that fit by name and shape, with a
    warning. Raises ConfigError with the weights that do not fit.
    """
    model = uncompiled(model)
    wanted, what = model.state_dict(), f"the weights in {path!r}"
    fitting = {n: t for n, t in weights.items() if n in wanted and _fits(wanted[n], t)}
    if strict:
        check_fit(wanted, weights, what, "give the weights of this model, or weights_strict = false to take what fits")
    elif not fitting:
        raise ConfigError(
            f"{what} have no tensor that fits the model by name and shape: give those of a model with the same layers "
            f"(theirs begin with {next(iter(weights))!r}, the model's with {next(iter(wanted))!r})"
        )
    elif fresh := [n for n in wanted if n not in fitting]:
        warnings.warn(
            f"{len(fitting)} of {len(wanted)} tensors start from {what}; {_listed(fresh)} with random weights, drawn "
            "from the seed",
            CutlayerWarning,
            stacklevel=2,
        )
    model.load_state_dict(fitting, strict=strict)


def check_fit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Check that the weights `given` fit a model with the weights `wanted`, by name and shape. Raises ConfigError with
    the first that does not.
    """
    if shapes := [n for n in wanted if n in given and not _fits(wanted[n], given[n])]:
        name = shapes[0]
        raise ConfigError(
            f"{what} have the shape {tuple(given[name].shape)} for {name!r}{_others(shapes)}, the model has "
            f"{tuple(wanted[name].shape)}: {remedy}"
        )
    if missing := [n for n in wanted if n not in given]:
        raise ConfigError(f"{what} lack {missing[0]!r}{_others(missing)}, which the model has: {remedy}")
    if odd := [n for n in given if n not in wanted]:
        raise ConfigError(f"{what} have {odd[0]!r}{_others(odd)}, which the model lacks: {remedy}")


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper, if there is one, so that weights have the model's own names."""
    while (inner := model._modules.get("_orig_mod")) is not None:
        model = inner
    return model


def fitted(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The same; or, where `weights` have different numbers for the names of one parameter, as they do after a cut that
    unties it, a copy in which each name has its own parameter.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        given = [weights[name] for name in shared if name in weights]
        if any(t.shape != given[0].shape or not torch.equal(t, given[0]) for t in given[1:]):
            model = untied(model, shared)
    return model


def _fits(wanted: Tensor, given: Tensor) -> bool:
    """Whether the shapes agree. A lazy layer takes any."""
    return isinstance(wanted, (UninitializedBuffer, UninitializedParameter)) or wanted.shape == given.shape


def digest_of(weights: Mapping[str, Tensor], names: Collection[str]) -> str:
    """SHA-256, in hexadecimal, of those of the weights that have these names: names, types, shapes and numbers."""
    found = hashlib.sha256()
    for name in sorted(set(names) & weights.keys()):
        tensor = weights[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def renewed(module: nn.Module) -> Callable[[], nn.Module] | None:
    """A function that makes a copy with newly drawn weights; None if a layer cannot draw its own (it has weights, but
    no `reset_parameters`).
    """
    if any(_holds(layer) and _reset_of(layer) is None for layer in module.modules()):
        return None

    def make() -> nn.Module:
        made = deep_copy(module)
        for layer in reversed(list(made.modules())):  # the inner ones first: the outer ones may change them
            if (reset := _reset_of(layer)) is not None:
                reset()
        return made

    return make


def _holds(layer: nn.Module) -> bool:
    """Whether a layer has its own weights or state, not counting those of layers inside it."""
    return any(t is not None for t in (*layer._parameters.values(), *layer._buffers.values()))


def _reset_of(layer: nn.Module) -> Callable[[], None] | None:
    found: Callable[[], None] | None = getattr(layer, "reset_parameters", getattr(layer, "_reset_parameters", None))
    return found


def _others(names: Collection[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _listed(names: Collection[str]) -> str:
    first = ", ".join(repr(n) for n in list(names)[:3])
    return f"{first} and {len(names) - 3} more start" if len(names) > 3 else f"{first} start"
