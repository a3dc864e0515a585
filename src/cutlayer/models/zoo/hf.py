"""A model of Hugging Face's transformers from a folder on this machine: `hf:path/to/folder`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from cutlayer.errors import ConfigError
from cutlayer.models.halved import halve
from cutlayer.models.lora import Lora, adapted
from cutlayer.models.making import model
from cutlayer.models.pretrained import read_folder
from cutlayer.plugins import option


@model(
    "hf",
    title="Hugging Face folder",
    summary="hf:PATH, a local folder with config.json and *.safetensors; cut at a module or after block 1, 2, ...",
    argument="a local folder with config.json and *.safetensors",
    library="transformers",
)
def hf(
    folder: str,
    classes: int,
    *,
    cuts: Sequence[str] = (),
    model_head: Literal["auto", "language", "classification"] = option(
        "auto", help="What the model predicts: tokens (language) or classes. auto: what its config.json says."
    ),
    lora_rank: int = option(
        0, ge=0, help="Rank of the LoRA adapters; then only the adapters are trained. 0: no adapters."
    ),
    lora_ranks: tuple[int, ...] = option(
        (),
        help="The rank of each client's adapters, instead of lora_rank. If models are averaged, use averaging = "
        "products.",
    ),
    lora_alpha: float | None = option(
        None, gt=0, help="Adapters are scaled by this number divided by their rank. Default: twice the rank."
    ),
    lora_targets: tuple[str, ...] = option(
        (),
        help="Names of the layers that get adapters, such as q_proj v_proj, or all-linear. Default: peft's choice for "
        "this kind of model.",
    ),
    lora_dropout: float = option(0.0, ge=0, lt=1, help="Dropout probability before the adapters."),
    lora_sides: Literal["both", "client", "server"] = option("both", help="Which side of the cut gets adapters."),
    base_precision: Literal["float32", "bfloat16"] = option(
        "float32", help="Type of the frozen base's weights. bfloat16: half the memory; adapters stay in float32."
    ),
) -> nn.Module:
    """The folder's causal language model, or its classifier of `classes` classes, with adapters if they are asked for.

    `cuts` are the modules after which it is cut: they tell the sides. Nothing is downloaded, no code in the folder is
    run, and pickled weights are not read. Raises ConfigError.
    """
    lora = Lora(lora_rank, lora_alpha, lora_targets, lora_dropout, lora_sides, lora_ranks)
    lora.check()
    if base_precision == "bfloat16" and not lora.largest:
        raise ConfigError(
            "base_precision = 'bfloat16' has no effect without lora_rank, since the base is then trained: give a rank, "
            "such as 8, or leave it out"
        )
    made = read_folder(folder, model_head, classes, half=base_precision == "bfloat16")
    if not lora.largest:
        return made
    made = adapted(made, lora, cuts)
    if base_precision == "bfloat16":
        halve(made)
    return made
