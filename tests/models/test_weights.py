"""Initial weights from a file: read without running code, checked by name and shape, used in every seed and client."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import client_state, difference, mlp, server_state, source, whole
from torch import nn

from cutlayer import Comparison, ConfigError, Run
from cutlayer.errors import CutlayerWarning
from cutlayer.models.weights import digest_of, read_weights, renewed

SIZES, SHAPE = (7, 6), (6,)


def started(**options: Any) -> Run:
    """A run before its first step."""
    defaults: dict[str, Any] = {"algorithm": "psl", "model": mlp, "cut": "1", "clients": 2, "partition": "column"}
    return Run(data=source(SIZES, SHAPE), **{**defaults, **options})


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    """The weights of an mlp, written to files of each kind."""
    torch.manual_seed(3)
    state = mlp().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "script.pt")
    return state


@pytest.mark.parametrize("file", ["w.safetensors", "w.pt", "script.pt"])
@pytest.mark.parametrize("start", ["equal", "independent"])
def test_a_run_starts_from_them(weights: dict[str, torch.Tensor], file: str, start: str, tmp_path: Path) -> None:
    run = started(weights=str(tmp_path / file), start=start, seed=5)
    assert difference(whole(run, 0), weights) == 0
    assert difference(whole(run, 1), weights) == 0


def test_part_of_a_model(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """A backbone: weights that fit by name and shape are used, and the warning names the others."""
    backbone = {"0.weight": weights["0.weight"], "0.bias": weights["0.bias"], "4.weight": torch.zeros(9, 8)}
    save_file(backbone, tmp_path / "b.safetensors")
    path = str(tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match=r"have the shape \(9, 8\) for '4.weight', the model has \(4, 8\): give"):
        started(weights=path)
    with pytest.warns(
        CutlayerWarning, match=r"2 of 6 tensors start from the weights in '.*'; '2.weight', '2.bias', '4"
    ):
        run = started(weights=path, weights_strict=False)
    assert difference(client_state(run), {k: v for k, v in backbone.items() if k.startswith("0")}) == 0
    assert difference(server_state(run), server_state(started())) == 0  # other parts start as they do without weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {k: v for k, v in w.items() if k != "2.bias"},
            "lack '2.bias', which the model has: give the weights",
        ),
        (
            lambda w: {**w, "5.bias": torch.zeros(1), "6.bias": torch.zeros(1)},
            "have '5.bias' and 1 more, which the model",
        ),
    ],
)
def test_weights_of_another_model(weights: dict[str, torch.Tensor], change: Any, message: str, tmp_path: Path) -> None:
    save_file(change(weights), tmp_path / "o.safetensors")
    with pytest.raises(ConfigError, match=message):
        started(weights=str(tmp_path / "o.safetensors"))


class Evil:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit(9)",))


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"step": 3}, tmp_path / "number.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"strange": torch.zeros(2)}, tmp_path / "strange.safetensors")
    for file, message in (
        ("evil.pt", "cannot be read as a state dict: it is damaged, or holds Python objects"),
        ("list.pt", "holds a list, not a state dict"),
        ("number.pt", "holds 'step', which is not a tensor"),
        ("text.pt", "cannot be read as a state dict"),
        ("text.safetensors", "is not a safetensors file"),
        ("none.pt", "there is no such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_weights(str(tmp_path / file))
    with pytest.raises(ConfigError, match="no tensor that fits the model by name and shape"):
        started(weights=str(tmp_path / "strange.safetensors"), weights_strict=False)
    with pytest.raises(ConfigError, match="weights_strict = False has no effect without weights"):
        started(weights_strict=False)


def test_digests_tell_weights_apart(weights: dict[str, torch.Tensor]) -> None:
    names = ["0.weight", "0.bias"]
    other = {**weights, "2.bias": weights["2.bias"] + 1}
    assert digest_of(weights, names) == digest_of(other, names) != digest_of(other, ["2.bias", *names])
    assert digest_of(weights, names) != digest_of({**weights, "0.bias": weights["0.bias"] * -1}, names)


def starts(model: Any) -> dict[int, dict[str, torch.Tensor]]:
    """The server's weights at the first step of every seed."""
    options: dict[str, Any] = {"cut": "1", "clients": 2, "partition": "column", "rounds": 1, "client_lr": 1e-30}
    found = {}
    comparison = Comparison(algorithms=("psl",), seeds=(0, 1), model=model, data=source(SIZES, SHAPE), **options)
    for _, seed, run, _ in comparison:
        found.setdefault(seed, {k: v.clone() for k, v in server_state(run).items()})
    return found


def test_a_module_is_made_anew_for_every_seed() -> None:
    torch.manual_seed(0)
    module = mlp()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    found = starts(module)
    assert difference(found[0], found[1]) > 0.01
    assert difference(found[0], starts(module)[0]) == 0
    assert difference(module.state_dict(), before) == 0


class Scaled(nn.Module):
    """A layer that cannot initialise its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.net = nn.Parameter(torch.ones(6)), mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x * self.scale)


def test_a_module_that_cannot_be_made_anew() -> None:
    model = nn.Sequential(nn.Identity(), Scaled(), nn.Linear(4, 4))
    assert renewed(model) is None
    with pytest.warns(
        CutlayerWarning, match="all seeds start from the same weights, those of the model that was given"
    ):
        found = starts(model)
    assert difference(found[0], found[1]) == 0


def test_a_run_keeps_the_weights_of_its_module() -> None:
    torch.manual_seed(4)
    module = mlp()
    for seed in (0, 1):
        assert difference(whole(started(model=module, seed=seed)), module.state_dict()) == 0


def test_attention_draws_its_weights() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    with torch.random.fork_rng():
        make = renewed(layer)
        assert make is not None
        torch.manual_seed(1)
        made = make()
    assert not made.self_attn.out_proj.bias.any()  # as attention initialises them
    assert difference(made.state_dict(), layer.state_dict()) > 0.01
