"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: the adapted model is frozen, and only adapters are trained.

    W x  becomes  W x + (alpha / rank) B A x,   B = 0 at the start

so that the model begins as the adapted one. All clients share the frozen model (see `frozen`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from cutlayer.adapters import pairs
from cutlayer.errors import ConfigError
from cutlayer.models.blocks import named_block

ADAPTER = "default"
"""peft's name for the one adapter."""
_WRAPPED = "base_model.model."  # peft's prefix of the names of the base
_ALL = "all-linear"
_HEADS = ("score", "classifier", "lm_head", "cls")  # the last layers of a transformer
_NEW_HEADS = ("score", "classifier")  # new layers, which are trained completely


@dataclass(frozen=True)
class Lora:
    """The options of adapters in `--model hf:PATH`; a `rank` of 0 means no adapters."""

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    sides: Literal["both", "client", "server"] = "both"
    ranks: tuple[int, ...] = ()

    @property
    def largest(self) -> int:
        """The rank of the factors: the largest, if clients have their own `ranks`."""
        return max(self.ranks, default=self.rank)

    def check(self) -> None:
        """Raises ConfigError for options without effect, and for invalid ranks."""
        if self.ranks and self.rank:
            raise ConfigError(
                f"lora_rank = {self.rank} has no effect beside lora_ranks, which has that of each client: leave one out"
            )
        if self.ranks and min(self.ranks) < 1:
            raise ConfigError(f"lora_ranks = {list(self.ranks)}: give ranks of 1 or more")
        idle: dict[str, object] = {
            "lora_alpha": self.alpha,
            "lora_targets": self.targets,
            "lora_dropout": self.dropout,
            "lora_sides": None if self.sides == "both" else self.sides,
        }
        given = [name for name, value in idle.items() if value]
        if given and not self.largest:
            raise ConfigError(
                f"{given[0]} = {idle[given[0]]!r} has no effect without lora_rank: give a rank, such as 8, or leave it "
                "out"
            )


def adapted(model: nn.Module, lora: Lora, cuts: Sequence[str]) -> nn.Module:
    """`model` with adapters, and everything else frozen except a classifier's new head. The adapters' first factor is
    drawn from torch's global generator. `cuts` determine the sides. Raises ConfigError.
    """
    peft = _peft()
    names = _on_side(model, _targets(peft, model, lora), lora, cuts)
    heads = [name for name, _ in model.named_children() if name in _NEW_HEADS]
    config = peft.LoraConfig(
        r=lora.largest,
        lora_alpha=2 * lora.largest if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        modules_to_save=heads or None,
        fan_in_fan_out=any(_transposed(model.get_submodule(name)) for name in names),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which it sets itself layer by layer
        made: nn.Module = peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    made.client_ranks = lora.ranks  # type: ignore[assignment]
    return made


def adapter_files(model: nn.Module, base: str) -> dict[str, bytes]:
    """The files of a folder that peft loads onto the whole base model, by name: the adapters of `model`, and a
    classifier's head. `base` is the path of the base. Raises ConfigError for a model without adapters.
    """
    configs = getattr(model, "peft_config", None) or {}
    if len(configs) != 1:
        raise ConfigError(
            f"the model has {len(configs)} adapters by peft, but a folder holds one: "
            + ("export it with --format safetensors" if not configs else "merge them first")
        )
    peft, (name, config) = _peft(), next(iter(configs.items()))
    from safetensors.torch import save

    injected = not isinstance(model, peft.PeftModel)  # which names its weights as in the folder
    state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    state, ranks = _without_zeros(state) if getattr(model, "client_ranks", ()) else (state, {})
    named = {f"{_WRAPPED if injected else ''}{key}": tensor.contiguous().clone() for key, tensor in state.items()}
    about = config.to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    about |= {"task_type": config.task_type or _task_type(model)} | _patterns(config, ranks)
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in about.items()}
    return {
        "adapter_config.json": (json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n").encode(),
        "adapter_model.safetensors": save(named, metadata={"format": "pt"}),
    }


def _without_zeros(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Adapters without their last zero rows of A and columns of B (which a client with a smaller rank has in a
    simulation), and the rank of each layer.
    """
    found, ranks = dict(state), {}
    for first, second in pairs(list(state)):
        used = (state[first].ne(0).any(1) | state[second].ne(0).any(0)).nonzero()
        rank = int(used.max()) + 1 if len(used) else 1
        found[first], found[second] = state[first][:rank], state[second][:, :rank]
        ranks[first.partition(".lora_A")[0]] = rank
    return found, ranks


def _patterns(config: Any, ranks: Mapping[str, int]) -> dict[str, Mapping[str, float]]:
    """peft's settings for layers whose adapters have another rank: the rank, and the alpha that keeps their scale."""
    own = {layer.removeprefix(_WRAPPED): rank for layer, rank in ranks.items() if rank != config.r}
    if not own:
        return {}
    scale = config.lora_alpha / config.r
    return {"rank_pattern": own, "alpha_pattern": {layer: scale * rank for layer, rank in own.items()}}


def _task_type(model: nn.Module) -> str:
    """peft's word for this kind of model."""
    return "SEQ_CLS" if any(name in _NEW_HEADS for name, _ in model.named_children()) else "CAUSAL_LM"


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "lora_rank needs the package peft, which is not installed: pip install 'cutlayer[lm]'"
        ) from None
    return peft


def _targets(peft: Any, model: nn.Module, lora: Lora) -> list[str]:
    """The full names of the layers to adapt. Raises ConfigError."""
    linear = {name for name, module in model.named_modules() if _adaptable(module)}
    inner = [name for name in linear if name.partition(".")[0] not in _HEADS]
    kind = getattr(getattr(model, "config", None), "model_type", "")
    usual = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, (_ALL,))
    wanted = lora.targets or tuple(usual)
    found = set(inner) if _ALL in wanted else {n for n in linear if any(f".{n}".endswith(f".{w}") for w in wanted)}
    if not found:
        short = sorted({name.rpartition(".")[2] for name in inner})
        raise ConfigError(
            f"lora_targets = {list(wanted)} match no layer of the model: choose among {', '.join(short)}, or all-linear"
        )
    return sorted(found)


def _on_side(model: nn.Module, names: list[str], lora: Lora, cuts: Sequence[str]) -> list[str]:
    """The layers on the side that gets adapters. Raises ConfigError."""
    if lora.sides == "both":
        return names
    inner = [named_block(model, cut) for cut in cuts]
    if not inner:
        raise ConfigError(
            f"lora_sides = {lora.sides!r} has no effect on a model that is not cut, or not for all clients at one "
            "place: leave it out"
        )
    client = set(_up_to(model, inner[0]))
    if len(inner) > 1:  # U-shaped: the client also has the end
        client |= {name for name, _ in model.named_modules()} - set(_up_to(model, inner[1]))
    chosen = [name for name in names if (name in client) == (lora.sides == "client")]
    if not chosen:
        raise ConfigError(
            f"lora_sides = {lora.sides!r} leaves no layer to adapt: none of {', '.join(names[:3])}... lies on that "
            f"side of the cut {', '.join(cuts)}; cut elsewhere"
        )
    return chosen


def _up_to(model: nn.Module, cut: str) -> list[str]:
    """The names of the modules that come before the cut: registered before, or within."""
    names = [name for name, _ in model.named_modules()]
    if cut == "input":
        return []
    if cut not in names:  # the cut itself reports the error
        return names
    last = max(i for i, name in enumerate(names) if name == cut or name.startswith(f"{cut}."))
    return names[: last + 1]


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _transposed(module)


def _transposed(module: nn.Module) -> bool:
    """Whether it is a linear layer with a transposed weight, as in GPT-2."""
    return type(module).__name__ == "Conv1D"
