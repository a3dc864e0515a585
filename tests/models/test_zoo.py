"""The zoo: shapes, names, the paper's figures, and inputs that its models refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ZOO
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cutlayer import Run, plugins
from cutlayer.costs.measure import load_model
from cutlayer.errors import ConfigError
from cutlayer.models import build, cut, make
from cutlayer.models.zoo.resnet16 import Prepare
from cutlayer.options import default_cut

SHAPES = {
    "mlp": [(64,), (1, 8, 8), (2, 5, 3)],
    "cnn": [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 9, 13)],
    "resnet16": [(1, 28, 28), (3, 16, 16), (1, 8, 8)],
    "alexnet": [(1, 28, 28), (1, 8, 8), (3, 32, 32)],
}


def test_every_model_of_the_catalogue_can_be_built() -> None:
    assert set(SHAPES) == set(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_cut_names_are_children_in_the_order_data_flows(name: str) -> None:
    children = [child for child, _ in build(name, SHAPES[name][-1], 10).named_children()]
    inner = [child for child in children if child not in ("prepare", "head")]
    assert tuple(inner) == tuple(ZOO[name].facts["cuts"])
    assert children[-1] == "head"
    assert ZOO[name].facts["default_cut"] in ZOO[name].facts["cuts"]


@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name, shapes in SHAPES.items() for shape in shapes])
def test_logits_have_one_row_for_every_sample(name: str, shape: tuple[int, ...]) -> None:
    model = build(name, shape, 7)
    for training in (True, False):
        logits = model.train(training)(torch.randn(3, *shape))
        assert logits.shape == (3, 7)
        assert logits.isfinite().all()


def test_resnet16_is_cut_where_the_paper_cuts_it() -> None:
    model = build("resnet16", (1, 28, 28), 10)
    parts = cut(model, ZOO["resnet16"].facts["default_cut"], torch.randn(2, 1, 28, 28))
    assert parts.crossing[0].shape == (32, 16, 16)
    # The paper counts 16 layers: the stem, two convolutions in each of seven blocks, and the last linear layer.
    spatial = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(spatial) + 1 == 16
    client = [m for m in parts.client.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert (len(client), 16 - len(client)) == (9, 7)


def test_resnet16_prepares_pictures_as_the_paper_does() -> None:
    prepared = Prepare()(x := torch.randn(2, 1, 32, 32))
    assert prepared.shape == (2, 3, 32, 32)
    for channel in range(3):
        assert torch.equal(prepared[:, channel], x[:, 0])  # resizing to the same size has no effect
    colour = torch.randn(2, 3, 32, 32)
    assert torch.equal(Prepare()(colour), colour)


def test_alexnets_client_does_5_27_percent_of_the_work() -> None:
    """Table 4: the client's share of the work. The saving compared with training the whole model is 94.7%."""
    client = 28 * 28 * 64 * (1 * 5 * 5)
    rest = (
        14 * 14 * 64 * (64 * 3 * 3)
        + 7 * 7 * 128 * (64 * 3 * 3)
        + 7 * 7 * 128 * (128 * 3 * 3)
        + 7 * 7 * 64 * (128 * 3 * 3)
        + (64 * 3 * 3) * 1024
        + 1024 * 256
        + 256 * 10
    )
    share = client / (client + rest)
    assert round(100 * share, 2) == 5.27
    assert round(100 * (1 - share), 1) == 94.7

    model = build("alexnet", (1, 28, 28), 10).eval()
    parts = cut(model, "block1", torch.randn(2, 1, 28, 28))
    assert _counted_macs(parts.client, torch.randn(1, 1, 28, 28)) == client
    assert _counted_macs(model, torch.randn(1, 1, 28, 28)) == client + rest


def _counted_macs(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "shape", "classes", "words"),
    [
        ("resnet", (1, 8, 8), 10, ["'resnet'", "did you mean 'resnet16'", "mlp"]),
        ("cnn", (64,), 10, ["'cnn'", "(64,)", "'mlp'"]),
        ("alexnet", (8, 8), 10, ["'alexnet'", "(8, 8)", "'mlp'"]),
        ("alexnet", (1, 7, 28), 10, ["8x8", "7x28", "enlarge"]),
        ("cnn", (1, 3, 3), 10, ["4x4", "3x3"]),
        ("resnet16", (2, 8, 8), 10, ["1 or 3", "2", "'cnn'"]),
        ("mlp", (4,), 0, ["classes = 0", "at least one number", "targets"]),
        ("mlp", (), 3, ["()", "at least 1"]),
        ("mlp", (0, 3), 3, ["(0, 3)", "at least 1"]),
    ],
)
def test_what_a_model_cannot_take_is_refused_with_the_remedy(
    name: str, shape: tuple[int, ...], classes: int, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        build(name, shape, classes)
    for word in words:
        assert word in str(error.value)


# --- models of the user's own --------------------------------------------------------------------------------

OWN = """
import math
import torch
from torch import nn
from beside import WIDTH
from cutlayer.models import model
from cutlayer.plugins import option


def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def fitted(classes, input_shape, depth=1, *, width: int = option(16, ge=1, help="Hidden features."), bias: bool = True):
    first = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), width, bias=bias), nn.ReLU())
    return nn.Sequential(first, nn.Linear(width, classes))


@model("ours", title="Ours", summary="two layers", cuts=("0",), default_cut="0")
def registered(*, input_shape, classes):
    return fitted(classes, input_shape, width=16)


class Net(nn.Module):
    def __init__(self, classes: int, *, width: int = 8) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.hidden(x))


made = plain()


def greedy(features):
    return plain()


def broken(input_shape):
    raise ValueError(f"no model for {input_shape}")


def valued():
    return nn.Linear(int(torch.ones(1).item()), 2)


def wordy(*, layers: dict = {}):
    return plain()


def number():
    return 3
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A file with the user's own models."""
    (tmp_path / "beside.py").write_text("WIDTH = 12\n")
    (tmp_path / "nets.py").write_text(OWN)
    return str(tmp_path / "nets.py")


@pytest.mark.parametrize(
    ("name", "options", "width"),
    [
        ("plain", {}, 12),
        ("fitted", {}, 16),
        ("fitted", {"width": 5, "bias": False}, 5),
        ("registered", {}, 16),
        ("Net", {}, 8),
        ("Net", {"width": 3}, 3),
    ],
)
def test_a_model_of_ones_own(own: str, name: str, options: dict[str, Any], width: int) -> None:
    net = build(f"{own}:{name}", (1, 8, 8), 10, **options)
    assert net(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    assert [m.out_features for m in net.modules() if isinstance(m, nn.Linear)] == [width, 10]
    planned = load_model(f"{own}:{name}", (1, 8, 8), 10, **options)
    assert {k: v.shape for k, v in planned.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert all(v.is_meta for v in planned.state_dict().values())


def test_a_model_says_where_it_is_cut(own: str) -> None:
    assert default_cut(f"{own}:registered") == "0"
    assert default_cut(f"{own}:plain") is None


def test_options_of_a_model_of_ones_own(own: str) -> None:
    entry = plugins.find("model", f"{own}:fitted")
    assert {o.name: (o.default, o.help) for o in entry.options} == {
        "width": (16, "Hidden features."),
        "bias": (True, ""),
    }
    assert plugins.find("model", f"{own}:registered").options == ()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fitted", {"width": 0}, ["width = 0", "greater than or equal to 1", "Hidden features"]),
        ("fitted", {"depth": 2}, ["depth = 2", "no effect", "leave it out"]),
        ("plain", {"width": 2}, ["width = 2", "no effect"]),
        ("greedy", {}, ["'features'", "input_shape and classes"]),
        ("broken", {}, ["ValueError: no model for (1, 8, 8)", "correct"]),
        ("number", {}, ["returns a int", "nn.Module"]),
        ("made", {}, ["is an existing module", "function or class"]),
        ("wordy", {}, ["'layers'", "dict", "bool, int, float, str"]),
        ("plian", {}, ["'plian'", "did you mean 'plain'"]),
    ],
)
def test_models_of_ones_own_that_cannot_be_used(own: str, name: str, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        build(f"{own}:{name}", (1, 8, 8), 10, **options)
    for word in words:
        assert word in str(error.value)


def test_a_model_that_needs_values_cannot_be_planned(own: str) -> None:
    assert isinstance(build(f"{own}:valued", (1,), 2), nn.Linear)
    with pytest.raises(ConfigError, match=r"meta device.*item\(\).*without reading values"):
        load_model(f"{own}:valued", (1,), 2)


def test_a_run_trains_a_model_of_ones_own(own: str) -> None:
    """A model by reference, with its own cut or a named one, and a function that takes the arguments that it needs."""
    options: dict[str, Any] = {"rounds": 1, "clients": 2, "samples_per_client": 16, "algorithm": "psl"}
    by_reference = Run(model=f"{own}:registered", **options).run()
    assert by_reference.test_score == Run(model=f"{own}:registered", cut="0", **options).run().test_score
    with pytest.raises(ConfigError, match="needs cut"):
        Run(model=f"{own}:plain", **options)

    def net(input_shape: tuple[int, ...], classes: int, *, width: int = plugins.option(4)) -> nn.Module:
        return nn.Sequential(nn.Linear(*input_shape, width), nn.Linear(width, classes))

    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    assert Run(model=net, data=(x, np.arange(60) % 3), cut="0", **options).run().rounds == 1
    assert isinstance(make(net, (5,), 3), nn.Module)
