"""A copy of a user's model that can be taken apart: not compiled, its lazy layers initialised, weights untied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from cutlayer.copies import deep_copy
from cutlayer.errors import CutError
from cutlayer.models.parts import Arguments, one_line

_WRAPPED = "_orig_mod"  # torch.compile's name for the wrapped model


def prepared(model: nn.Module, names: Sequence[str], x: Arguments) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy without gradients and without torch.compile's wrapper, and `names` as they are in it.

    Lazy layers are initialised with the batch. Raises CutError for a scripted model, or one that cannot be copied.
    """
    original = model
    while _is_compiled(model):
        model = getattr(model, _WRAPPED)
    if model is not original:
        names = [name.removeprefix(f"{_WRAPPED}.") for name in names]
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CutError(
                f"{f'the layer {name!r}' if name else 'the model'} is scripted by torch.jit, and runs outside Python: "
                "give the module that it was scripted from"
            )
    model = _copied(model)
    model.zero_grad(set_to_none=True)
    for module in model.modules():
        if _is_compiled(module):
            vars(module).pop("forward", None)
            module.__class__ = _Uncompiled
    if has_lazy_layers(model):
        _initialise(model, x)
    return model, tuple(names)


def untied(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy in which each of the `names` of one parameter is a separate parameter in a separate layer."""
    model = deep_copy(model)
    seen: set[int] = set()
    for name in names:
        prefix, _, key = name.rpartition(".")
        module = model.get_submodule(prefix)
        if id(module) in seen:  # one layer under several names
            above, _, leaf = prefix.rpartition(".")
            module = deep_copy(module)
            model.get_submodule(above)._modules[leaf] = module
        seen.add(id(module))
        shared = module._parameters[key]
        assert shared is not None
        module._parameters[key] = nn.Parameter(shared.detach().clone(), shared.requires_grad)
    return model


class _Uncompiled(nn.Module):
    """Takes the place of a compiled layer: runs the original, which has the same names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, _WRAPPED)(*args, **kwargs)


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" and _WRAPPED in module._modules


def has_lazy_layers(model: nn.Module) -> bool:
    """Whether layers of the model get their shapes in the first forward pass."""
    tensors = (t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()))
    return any(isinstance(t, (UninitializedParameter, UninitializedBuffer)) for t in tensors)


def _copied(model: nn.Module) -> nn.Module:
    """A copy, also of a model that keeps results (a weight made of others) in plain attributes. Raises CutError."""
    results = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in results}
    buffers = [b for m in model.modules() for b in m._buffers.values() if isinstance(b, UninitializedBuffer)]
    empty: Any = UninitializedBuffer
    memo.update((id(b), empty(device=b.device, dtype=b.dtype)) for b in buffers)
    try:
        return deep_copy(model, memo)
    except Exception as error:  # the user's classes: any error is possible
        raise CutError(
            f"cannot cut {type(model).__name__}: the model cannot be copied ({one_line(error)}); give it as it is when "
            "new, without results of a forward pass in it"
        ) from error


def _initialise(model: nn.Module, x: Arguments) -> None:
    """Give lazy layers their shapes, and draw their weights. Raises CutError."""
    try:
        with torch.no_grad():
            x.run(model)
    except Exception as error:  # the user's code: any error is possible
        raise CutError(
            f"cannot cut {type(model).__name__}: its lazy layers cannot be initialised with the example "
            f"({one_line(error)}); give samples that the model takes"
        ) from error
