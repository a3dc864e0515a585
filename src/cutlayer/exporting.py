"""Trained models for other programs: named weights, or a program of PyTorch or ONNX, with a description."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cutlayer import plugins
from cutlayer.build import Model
from cutlayer.errors import ConfigError
from cutlayer.files import replace_file
from cutlayer.models.lora import adapter_files
from cutlayer.models.parts import one_line
from cutlayer.trained import TrainedModel, Whose

Form = Literal["safetensors", "onnx", "torch-export", "peft"]
SUFFIXES: dict[Form, str] = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2", "peft": ".peft"}
_ONNX = ("onnx", "onnxscript")


def export(trained: TrainedModel, client: Whose, form: Form, path: Path, *, model: Model | None = None) -> list[Path]:
    """Write the model of `client` to `path`, and its description to a JSON file beside it. Returns both paths. The form
    peft is a folder of the adapters alone, with that file in it. `model`: the module or function that the run was
    given, if it was given from Python.

    Raises ConfigError if there is no such client, or if the model is not possible in this form.
    """
    about = {"client": whose_name(client), **trained.about}
    if form == "peft":
        return _adapter_folder(trained, client, about, model, path)
    content = _WRITERS[form](trained, client, json.dumps(about), model)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.json")
    replace_file(path, content)
    replace_file(beside, (json.dumps(about, indent=1) + "\n").encode())
    return [path, beside]


def whose(text: str | None) -> Whose:
    """Whose model a text names: client-0, client-1..., or average. Raises ConfigError."""
    if text is None:
        return None
    if text == "average":
        return "average"
    number = text.removeprefix("client-")
    if not (number.isascii() and number.isdigit()):
        raise ConfigError(f"client = {text!r} is not a client name: use client-0, client-1, ... or average")
    return int(number)


def whose_name(client: Whose) -> str:
    """The name of a client, as `whose` reads it; "all" for the one model that all have."""
    return "all" if client is None else f"client-{client}" if isinstance(client, int) else client


def _adapter_folder(
    trained: TrainedModel, client: Whose, about: dict[str, Any], model: Model | None, path: Path
) -> list[Path]:
    """A folder that peft loads onto the base. Raises ConfigError."""
    name = trained.about["model"] or ""
    files = adapter_files(trained.model(client, model=model), plugins.argument_of("model", name) or name)
    files["cutlayer.json"] = (json.dumps(about, indent=1) + "\n").encode()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{str(path)!r} is a file, but adapters are a folder: name another place with --out")
    path.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        replace_file(path / file, content)
    return [path / file for file in files]


def _named_weights(trained: TrainedModel, client: Whose, about: str, model: Model | None) -> bytes:
    from safetensors.torch import save

    # The format wants tensors with memory of their own.
    state = {name: tensor.contiguous().clone() for name, tensor in trained.state(client).items()}
    return save(state, metadata={"cutlayer": about, "format": "pt"})


def _torch_program(trained: TrainedModel, client: Whose, about: str, model: Model | None) -> bytes:
    whole = trained.model(client, model=model)
    args, kwargs, shapes = _example(trained)
    with _exporting("torch.export"):
        program = torch.export.export(whole, args, kwargs, dynamic_shapes=_dynamic(args, kwargs, shapes))
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={"cutlayer.json": about})
    return buffer.getvalue()


def _onnx_program(trained: TrainedModel, client: Whose, about: str, model: Model | None) -> bytes:
    if lacking := [name for name in _ONNX if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"the format onnx needs the packages {' and '.join(_ONNX)} ({lacking[0]} is not installed): pip install "
            "'cutlayer[onnx]', or choose --format torch-export"
        )
    whole = trained.model(client, model=model)
    args, kwargs, shapes = _example(trained)
    with _exporting("torch.onnx"), contextlib.redirect_stdout(io.StringIO()):
        program: Any = torch.onnx.export(
            whole, args, kwargs=kwargs, dynamo=True, dynamic_shapes=_dynamic(args, kwargs, shapes)
        )
    program.model.metadata_props["cutlayer"] = about
    serialised: bytes = program.model_proto.SerializeToString()
    return serialised


_WRITERS: dict[Form, Callable[[TrainedModel, Whose, str, Model | None], bytes]] = {
    "safetensors": _named_weights,
    "torch-export": _torch_program,
    "onnx": _onnx_program,
}


def _example(trained: TrainedModel) -> tuple[tuple[Tensor, ...], dict[str, Tensor], list[dict[int, Any]]]:
    """Two rows of zeros as the model is called with them, and which dimension of each tensor is free."""
    inputs = trained.about["inputs"]
    rows = [torch.zeros(2, *t["shape"], dtype=getattr(torch, t["dtype"])) for t in inputs["tensors"]]
    free = torch.export.Dim("rows", min=1)
    shapes = [{0: free} for _ in rows]
    if inputs["form"] == "named":
        return (), dict(zip(inputs["names"], rows, strict=True)), shapes
    return tuple(rows), {}, shapes


def _dynamic(args: tuple[Tensor, ...], kwargs: dict[str, Tensor], shapes: list[dict[int, Any]]) -> Any:
    """The free dimensions in the form that torch wants them: by the names of the arguments, or in their order."""
    return dict(zip(kwargs, shapes, strict=True)) if kwargs else tuple(shapes)


@contextlib.contextmanager
def _exporting(what: str) -> Any:
    """Turn errors of an export into a sentence; its warnings are about torch's own code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # torch raises many kinds
        raise ConfigError(
            f"{what} cannot turn this model into a program ({one_line(error)}): export its weights, --format "
            "safetensors, and load them into the model's own class"
        ) from error
