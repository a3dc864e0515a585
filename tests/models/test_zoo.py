"""The zoo: shapes, names, the paper's figures, and what its models refuse."""

import pytest
import torch
from support import ZOO
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cutlayer.errors import ConfigError
from cutlayer.models import build, cut
from cutlayer.models.zoo.resnet16 import Prepare

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
    assert tuple(inner) == ZOO[name].facts["cuts"]
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
    # 16 layers as the paper counts them: the stem, two convolutions in each of seven blocks, and the last linear layer.
    spatial = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(spatial) + 1 == 16
    client = [m for m in parts.client.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert (len(client), 16 - len(client)) == (9, 7)


def test_resnet16_prepares_pictures_as_the_paper_does() -> None:
    prepared = Prepare()(x := torch.randn(2, 1, 32, 32))
    assert prepared.shape == (2, 3, 32, 32)
    for channel in range(3):
        assert torch.equal(prepared[:, channel], x[:, 0])  # resizing to the same size changes nothing
    colour = torch.randn(2, 3, 32, 32)
    assert torch.equal(Prepare()(colour), colour)


def test_alexnets_client_does_5_27_percent_of_the_work() -> None:
    """Table 4: the client's share; what is saved against training the whole model is 94.7 %."""
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
        ("mlp", (4,), 1, ["classes = 1", "two", "labels"]),
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
