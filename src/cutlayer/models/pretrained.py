"""Reading a folder of Hugging Face's transformers: a configuration, and weights as safetensors.

Nothing is downloaded, no code in the folder is run, and pickled weights are not read.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cutlayer.errors import ConfigError, CutlayerWarning
from cutlayer.models.parts import one_line

Head = Literal["auto", "language", "classification"]
_CLASSES = {"language": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification"}
_ENDINGS = {"ForCausalLM": "language", "LMHeadModel": "language", "ForSequenceClassification": "classification"}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_folder(folder: str, head: Head, classes: int, *, half: bool = False) -> nn.Module:
    """The model in `folder` in float32 (or, `half`, in bfloat16) and training mode. A `folder` that is a .json file is
    a configuration alone. A classifier gives `classes` scores. On the meta device the model has no weights. Raises
    ConfigError.
    """
    transformers = _transformers()
    path = _checked(folder)
    with _sentence(folder):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    kind = _head_of(config, folder) if head == "auto" else head
    if hasattr(config, "use_cache"):
        config.use_cache = False  # the cache for generating text is not used in training
    if kind == "classification":
        config.num_labels = classes
        if config.pad_token_id is None:  # the end of a row
            config.pad_token_id = _first(config.eos_token_id)
    auto = getattr(transformers, _CLASSES[kind])
    fresh: list[str] = []
    dtype = torch.bfloat16 if half else torch.float32
    empty, meta = not any(path.glob("*.safetensors")), torch.empty(0).is_meta  # a file has no files in it
    with _sentence(folder), _quiet(transformers):
        if empty or meta:
            made: nn.Module = auto.from_config(config, trust_remote_code=False)
        else:
            made, fresh = _loaded(auto, path, config, dtype)
    if empty and not meta:
        _say(f"{folder!r} has no weights: the model starts with random weights, drawn from the seed")
    if fresh:
        named = ", ".join(map(repr, fresh[:3])) + (f" and {len(fresh) - 3} more" if len(fresh) > 3 else "")
        _say(f"{folder!r} has no fitting weights for {named}: these start with random weights, drawn from the seed")
    return made.to(dtype).train()


def _loaded(auto: Any, path: Path, config: Any, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """The model with the folder's weights, and the names of missing ones."""
    made, about = auto.from_pretrained(
        path,
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return made, [*about["missing_keys"], *(found[0] for found in about["mismatched_keys"])]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "a model hf:PATH needs the package transformers, which is not installed: pip install 'cutlayer[lm]'"
        ) from None
    return transformers


def _checked(folder: str) -> Path:
    """The folder or the configuration file, after checking that it can be read. Raises ConfigError."""
    path, where = Path(folder).expanduser(), f"model 'hf:{folder}'"
    alone = path.suffix == ".json" and path.is_file()
    if not (alone or path.is_dir()):
        raise ConfigError(
            f"{where}: there is no folder {folder!r} (from {Path.cwd()}); check the path (nothing is downloaded)"
        )
    said = path if alone else path / "config.json"
    if not said.is_file():
        raise ConfigError(f"{where} has no config.json: name a folder that save_pretrained wrote")
    try:
        stored = json.loads(said.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{where}: {said.name} is not JSON ({error}); save the model again") from None
    if not isinstance(stored, dict) or not isinstance(stored.get("model_type"), str):
        raise ConfigError(f"{where}: {said.name} names no model_type; save the model again with save_pretrained")
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled and not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"{where} has pickled weights only ({pickled[0]}), which can run code when they are read: if you trust "
            "them, convert them with AutoModel.from_pretrained(...).save_pretrained(...), which writes safetensors"
        )
    return path


def _head_of(config: Any, folder: str) -> str:
    """The head of the model by its configuration. Raises ConfigError."""
    named = str(_first(config.architectures) or "")
    for ending, head in _ENDINGS.items():
        if named.endswith(ending):
            return head
    raise ConfigError(
        f"model 'hf:{folder}' is of the architecture {named or 'unknown'!r}: choose what it predicts with model_head = "
        "language or classification"
    )


def _first(value: Any) -> Any:
    return (value[0] if value else None) if isinstance(value, list | tuple) else value


def _say(note: str) -> None:
    warnings.warn(CutlayerWarning(note), stacklevel=4)


@contextmanager
def _sentence(folder: str) -> Iterator[None]:
    """Turn what transformers raises into one sentence."""
    try:
        yield
    except Exception as error:  # damaged files, unknown architectures, code that would need to run
        raise ConfigError(
            f"model 'hf:{folder}' cannot be read ({one_line(error)}): name a folder of an architecture that the "
            "installed transformers has, with complete weights"
        ) from None


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's own messages and progress bars; important ones are reported here."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
