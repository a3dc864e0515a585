"""Gradient checkpointing: equal results with less saved memory, for all engines and both ways to run parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cutlayer import ConfigError, Run, cut
from cutlayer.costs.measure import Measured, example, measure, placed
from cutlayer.models.depths import one_depth
from cutlayer.models.parts import Parts, storage_of
from cutlayer.models.recomputed import Recomputed, Staged, recompute
from cutlayer.models.trace import TracedPart
from cutlayer.options import RunConfig
from cutlayer.testing.deployed import in_memory

FEATURES, BLOCKS = 6, 4


class Block(nn.Module):
    """A block that saves more than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(FEATURES, 24), nn.Linear(24, FEATURES), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.drop(self.down(torch.relu(self.up(x))))
        return found


class Traced(nn.Module):
    """A model with blocks that torch.fx can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x)
        return found


class Replayed(Traced):
    """A model with blocks that torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError("NaN")
        return super().forward(x)


KINDS = {"fx": Traced, "hooks": Replayed}


def data() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, FEATURES, generator=generator), torch.randint(0, 3, (16,), generator=generator)
    return {"x": x, "y": y, "x_test": x[:4], "y_test": y[:4]}


def options(algorithm: str, engine: str = "local", **more: Any) -> dict[str, Any]:
    cuts = {} if algorithm == "fl" else {"cut": "2"}
    cuts |= {"tail_cut": "3"} if algorithm == "upsl" else {}
    common = {"algorithm": algorithm, "clients": 2, "rounds": 2, "batch": 3, "validation": 0, "client_lr": 0.05}
    return {**common, "client_optimizer": "sgd", "engine": engine, **cuts, **more}


def trained(kind: str, algorithm: str, engine: str, **more: Any) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    run = Run(model=KINDS[kind](), data=data(), **options(algorithm, engine, **more))
    losses = [step.loss for step in run]
    state = {f"{k}.{name}": t for k in range(2) for name, t in run.training.clients.model_state(k).items()}
    return losses, {**state, **run.training.server.state()["model"]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("algorithm", "engine", "sides"),
    [
        ("psl", "local", "both"),
        ("sfl", "local", "client"),
        ("upsl", "local", "both"),
        ("fl", "local", "client"),
        ("sfl", "stacked", "both"),
        ("fl", "stacked", "client"),
        pytest.param("sglr", "local", "server", marks=pytest.mark.long),
        pytest.param("ssl", "local", "both", marks=pytest.mark.long),
        pytest.param("sflv1", "stacked", "both", marks=pytest.mark.long),
    ],
)
@pytest.mark.filterwarnings("ignore:.*runs on the local engine")
def test_results_are_the_same(kind: str, algorithm: str, engine: str, sides: str) -> None:
    """Dropout draws the same masks again. Results are equal bit for bit if the same operations run."""
    plain = trained(kind, algorithm, engine)
    again = trained(kind, algorithm, engine, gradient_checkpointing=sides)
    if engine == "local":
        assert plain[0] == again[0]
    assert again[0] == pytest.approx(plain[0], abs=1e-5)
    assert plain[1].keys() == again[1].keys()
    for name, tensor in plain[1].items():
        assert torch.allclose(tensor, again[1][name], rtol=0, atol=0 if engine == "local" else 1e-5), name


@pytest.mark.parametrize("sides", ["server", "both"])
def test_sides_of_a_deployment(sides: str) -> None:
    """Each side of a deployment has its own file. In this test, both have the same options."""
    torch.manual_seed(0)
    model = Traced()
    local = Run(model=model, data=data(), **options("sfl"))
    losses = [step.loss for step in local]
    remote = in_memory(RunConfig.of(options("sfl", gradient_checkpointing=sides)), model=model, data=data())
    assert [step.loss for step in remote.run] == losses
    for k in range(2):
        state = local.training.clients.model_state(k)
        assert all(torch.equal(tensor, state[name]) for name, tensor in remote.model(k).items())


def saved(part: nn.Module, x: Tensor) -> tuple[int, int]:
    """The bytes that a forward pass of the part saves, without its parameters, and the number of saved tensors."""
    seen, alive, sizes = {storage_of(p) for p in part.parameters()}, [], []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        if storage_of(tensor) not in seen:
            seen.add(storage_of(tensor))
            sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        part.train()((x,))
    return sum(sizes), len(alive)


@pytest.mark.parametrize("kind", KINDS)
def test_less_is_saved_as_planned(kind: str) -> None:
    """A block keeps only its input, and a forward pass saves as much as the plan says."""
    torch.manual_seed(0)
    model, x = KINDS[kind](), torch.randn(5, FEATURES)
    parts = cut(model, "2", x)
    assert parts.method == kind
    before = saved(parts.client, x)
    again = recompute(one_depth("2", replace(parts, likeness="known"), 1), model, "client")
    assert again.deepest.parts.likeness is None  # the new part computes more than its likes
    after = saved(parts.client, x)
    found = planned()
    assert before[0] == found.client.saved(5)
    assert after[0] == found.client.held + 5 * found.client.held_per_row
    # The block in progress adds its own saved tensors: relu's output in the wide layer, and a mask.
    assert found.client.saved(5, checkpointed=True) - after[0] == (before[0] - after[0]) // 2
    assert after[0] < before[0] / 2
    assert after[1] < before[1]
    assert found.server.saved(5, checkpointed=True) < found.server.saved(5)


def planned() -> Measured:
    return measure(placed(Traced(), torch.float32), "blocks.1", example((FEATURES,), torch.float32))


def wrapped(parts: Parts) -> list[int]:
    """How many blocks of each part are computed again."""

    def count(part: nn.Module) -> int:
        if isinstance(part, TracedPart):
            code = part.training_code
            return sum(stage.again for stage in code.stages) if isinstance(code, Staged) else 0
        return sum(isinstance(module, Recomputed) for module in part.modules())

    return [count(part) for part in parts.all]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("at", "sides", "counts"),
    [
        ("2", "both", [2, 2]),
        ("2", "client", [2, 0]),
        ("1", "server", [0, 3]),
        (("1", "3"), "client", [1, 0, 1]),
    ],
)
def test_whole_blocks_of_a_side_are_computed_again(kind: str, at: Any, sides: Any, counts: list[int]) -> None:
    model, x = KINDS[kind](), torch.randn(5, FEATURES)
    parts = cut(model, at, x)
    recompute(one_depth("", parts, 1), model, sides)
    assert wrapped(parts) == counts
    assert_the_model(parts, model, x)


def assert_the_model(parts: Parts, model: nn.Module, x: Tensor) -> None:
    for part in parts.all:
        part.eval()
    rows: Any = x
    for part in parts.all:
        rows = part(rows)
    assert torch.equal(rows, model.eval()(x))


class Straight(Replayed):
    """Blocks without skip connections, so a block can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh()) for _ in range(BLOCKS))


@pytest.mark.parametrize(("at", "counts"), [("blocks.1.0", [1, 2]), ("blocks.1.1", [1, 2])])
def test_a_block_with_a_cut_in_it_is_computed_once(at: str, counts: list[int]) -> None:
    model, x = Straight(), torch.randn(5, FEATURES)
    parts = cut(model, at, x)
    assert parts.method == "hooks"
    recompute(one_depth("", parts, 1), model, "both")
    assert wrapped(parts) == counts
    for part in parts.all:
        part.train()
    parts.server(parts.client((x,))).sum().backward()
    assert_the_model(parts, model, x)


def test_a_copy_of_a_part_computes_again_with_its_own_weights() -> None:
    """The weights are replaced between the passes, as stacked copies do."""
    import copy

    torch.manual_seed(0)
    model, x = Replayed(), torch.randn(5, FEATURES)
    parts = cut(model, "2", x)
    plain = copy.deepcopy(parts.client).train()
    recompute(one_depth("2", parts, 1), model, "client")
    again = copy.deepcopy(parts.client).train()
    gradients = []
    for part in (plain, again):
        torch.manual_seed(1)
        (given,) = part((x,))
        owner = dict(part.named_modules())["blocks.0.up"]
        own = owner._parameters["weight"]
        owner._parameters["weight"] = nn.Parameter(torch.zeros_like(own))
        given.sum().backward()
        assert not owner.weight.any()
        owner._parameters["weight"] = own
        gradients.append(own.grad)
    assert torch.equal(*gradients)


class Normed(Traced):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES)) for _ in "ab"
        )


@pytest.mark.parametrize(
    ("model", "algorithm", "sides", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(FEATURES, 4), nn.Linear(4, 3)), "fl", "client", "which has no blocks"),
        (Normed, "fl", "client", "'blocks.0.1' keeps running statistics"),
        (Traced, "fl", "server", "no whole block lies on the server's side"),
    ],
)
def test_bad_input(model: Any, algorithm: str, sides: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Run(model=model(), data=data(), **options(algorithm, gradient_checkpointing=sides))


def test_what_is_computed_again_is_counted() -> None:
    """Checkpointing adds the FLOPs of one more forward pass of the blocks."""
    machines = {"client_device": "raspberry-pi-4", "link": "lte"}
    plain, again = (
        Run(model=Traced(), data=data(), **options("fl", rounds=1, gradient_checkpointing=sides), **machines).run()
        for sides in ("none", "client")
    )
    rows = 8 * 2 * BLOCKS * 2 * FEATURES * 24
    assert again.client_flops - plain.client_flops == rows
