"""Adapters averaged by their products: compared with the dense mean, and equal in every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Adapted
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import ConfigError, Run, RunConfig
from cutlayer.adapters import pairs
from cutlayer.averaging import average
from cutlayer.averagings.products import MeanOfProducts, factors
from cutlayer.testing.deployed import in_memory

INPUTS, OUTPUTS, CLIENTS = 7, 5, 3
SHARES = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
RULE: Any = MeanOfProducts.of({})


def drawn(rank: int, clients: int = CLIENTS, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(clients, rank, INPUTS, generator=generator, dtype=torch.float64)
    return a, torch.randn(clients, OUTPUTS, rank, generator=generator, dtype=torch.float64)


def mean_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("k,kor,kri->oi", SHARES[: len(a)] / SHARES[: len(a)].sum(), b, a)


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 6, 9])
def test_the_product_is_the_nearest_of_its_rank_to_the_mean(rank: int) -> None:
    """Compared with a dense decomposition. From full rank (5) on, the product is the mean itself."""
    a, b = drawn(rank)
    mean = mean_product(a, b)
    new_a, new_b = factors(a, b, SHARES)
    assert new_a.shape == a.shape[1:]
    assert new_b.shape == b.shape[1:]
    u, s, vh = torch.linalg.svd(mean, full_matrices=False)
    nearest = u[:, :rank] * s[:rank] @ vh[:rank]
    assert torch.allclose(new_b @ new_a, nearest, atol=1e-12)
    if rank >= OUTPUTS:
        assert torch.allclose(new_b @ new_a, mean, atol=1e-12)
    for fewer in range(1, rank):  # the first rows are the best of a lower rank
        best = u[:, :fewer] * s[:fewer] @ vh[:fewer]
        assert torch.allclose(new_b[:, :fewer] @ new_a[:fewer], best, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3])
def test_clients_that_agree_keep_their_product(rank: int) -> None:
    a, b = drawn(rank, 1)
    new_a, new_b = factors(a.expand(CLIENTS, -1, -1), b.expand(CLIENTS, -1, -1), SHARES)
    assert torch.allclose(new_b @ new_a, b[0] @ a[0], atol=1e-12)
    assert new_a.square().sum() == pytest.approx(a.square().sum())  # the length of A does not change
    again = factors(new_a[None], new_b[None], torch.ones(1))
    assert torch.allclose(again[0], new_a, atol=1e-12)
    assert torch.allclose(again[1], new_b, atol=1e-12)


@pytest.mark.parametrize("empty", [3, 1])
def test_directions_that_a_product_lacks_can_still_be_trained(empty: int) -> None:
    """B starts as 0 or has columns of 0. A then still has rows, in the span of the clients' rows."""
    a, b = drawn(3, 1)
    b[:, :, 3 - empty :] = 0
    new_a, new_b = factors(a.expand(2, -1, -1), b.expand(2, -1, -1), torch.ones(2) / 2)
    assert torch.allclose(new_b @ new_a, b[0] @ a[0], atol=1e-12)
    assert not new_b[:, 3 - empty :].any()
    norms = new_a.norm(dim=1)
    assert torch.allclose(norms, norms[:1].expand(3))
    assert torch.linalg.matrix_rank(new_a) == 3
    inside = new_a @ torch.linalg.pinv(a[0]) @ a[0]
    assert torch.allclose(inside, new_a, atol=1e-12)


def test_directions_that_nobody_has_do_not_depend_on_rounding() -> None:
    """Clients have ranks 1 and 2 and the result has rank 4. The two rows that are missing are drawn, orthogonal."""
    a, b = drawn(4, 2)
    for k, rank in enumerate((1, 2)):
        a[k, rank:], b[k, :, rank:] = 0, 0
    new_a, new_b = factors(a, b, torch.ones(2) / 2)
    assert torch.allclose(new_b @ new_a, (b @ a).mean(0), atol=1e-12)
    norms = new_a.norm(dim=1)
    assert torch.allclose(new_a @ new_a.T, torch.diag(norms.square()), atol=1e-12)
    assert torch.linalg.matrix_rank(new_a) == 4
    nudged = factors(a * (1 + 1e-13), b, torch.ones(2) / 2)
    assert torch.allclose(nudged[0], new_a, atol=1e-11)


def test_the_mean_of_factors_is_another_thing() -> None:
    a, b = drawn(2)
    assert not torch.allclose(torch.tensordot(SHARES, b, 1) @ torch.tensordot(SHARES, a, 1), mean_product(a, b))


def test_all_else_is_the_mean() -> None:
    a, b = drawn(2)
    states = [
        {"q.lora_A.default.weight": a[k], "q.lora_B.default.weight": b[k], "head": b[k, 0], "seen": torch.tensor(k)}
        for k in range(CLIENTS)
    ]
    found = average(states, SHARES.tolist(), RULE)
    assert list(found) == list(states[0])
    assert torch.allclose(found["head"], torch.tensordot(SHARES, b[:, 0], 1))
    assert found["seen"] == 1
    wanted = factors(a, b, SHARES)
    assert torch.equal(found["q.lora_A.default.weight"], wanted[0])
    assert torch.equal(found["q.lora_B.default.weight"], wanted[1])


def test_names() -> None:
    names = ["a.lora_A.x.weight", "a.lora_B.x.weight", "b.lora_A.x.weight", "lora_A", "lora_B", "lora_Aside"]
    assert pairs(names) == [("a.lora_A.x.weight", "a.lora_B.x.weight"), ("lora_A", "lora_B")]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Adapted(INPUTS, 8), nn.Tanh(), Adapted(8, OUTPUTS))


def data() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, INPUTS, generator=generator), torch.randint(0, OUTPUTS, (24,), generator=generator)
    return {"x": x, "y": y, "x_test": x[:4], "y_test": y[:4]}


def options(algorithm: str, **more: Any) -> dict[str, Any]:
    cut = {} if algorithm == "fl" else {"cut": "1"}
    common = {"clients": CLIENTS, "rounds": 3, "batch": 4, "validation": 0, "client_lr": 0.2, "precision": "float64"}
    return {"algorithm": algorithm, "averaging": "products", "client_optimizer": "sgd", **common, **cut, **more}


@pytest.mark.parametrize("algorithm", ["fl", "sfl"])
def test_all_engines_average_alike(algorithm: str) -> None:
    local, stacked = (Run(model=model(), data=data(), **options(algorithm, engine=e)) for e in ("local", "stacked"))
    losses = [step.loss for step in local]
    assert [step.loss for step in stacked] == pytest.approx(losses, rel=1e-9)
    remote = in_memory(RunConfig.of(options(algorithm)), model=model(), data=data())
    assert [step.loss for step in remote.run] == pytest.approx(losses, rel=1e-12)
    plain = Run(model=model(), data=data(), **options(algorithm, engine="local", averaging="mean"))
    assert [step.loss for step in plain] != pytest.approx(losses, rel=1e-9)
    held = [local.training.clients.model_state(k) for k in range(CLIENTS)]
    assert all(torch.equal(held[0][name], state[name]) for state in held for name in state)


def test_a_model_without_adapters() -> None:
    with pytest.raises(ConfigError, match="averaging = 'products' has no effect, since the model has no adapters"):
        Run(model=nn.Sequential(nn.Linear(INPUTS, 4), nn.Linear(4, OUTPUTS)), data=data(), **options("fl"))


def test_a_rule_of_ones_own_by_name() -> None:
    """The rule's result is checked."""

    class Odd(MeanOfProducts):
        def combine_named(self, models: Any, shares: Tensor) -> dict[str, Tensor]:
            return dict(models)

    with pytest.raises(ConfigError, match=r"gives a tensor of the shape \(2, 3\) for 'w': return one of each name"):
        average([{"w": torch.zeros(3)}] * 2, [1, 1], Odd.of({}))


class Ranked(nn.Sequential):
    """A model with adapters of the largest rank. Each client has adapters of its own rank."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        super().__init__(Adapted(INPUTS, 8, max(ranks)), nn.Tanh(), Adapted(8, OUTPUTS, max(ranks)))
        self.client_ranks = ranks


RANKS = (1, 4, 2)


def product(state: Any, name: str) -> Tensor:
    found: Tensor = state[f"{name}lora_B"] @ state[f"{name}lora_A"]
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("algorithm", ["fl", "sfl"])
def test_each_client_has_the_best_adapters_of_its_rank(algorithm: str, optimizer: str) -> None:
    """Ranks hold after training and after averaging, which gives the products nearest to the mean.

    The ledger counts only numbers of the client's rank.
    """
    kinds = {"client_optimizer": optimizer, "client_lr": 0.05}
    run = Run(model=Ranked(RANKS), data=data(), **options(algorithm, **kinds, rounds=1))
    assert run.training.engine == "stacked"
    clients = run.training.clients
    averaged: list[Any] = []
    trained: list[Any] = []
    real = type(clients).average

    def average(self: Any, weights: Any) -> Any:
        trained.extend({n: t.clone() for n, t in self.model_state(k).items()} for k in range(CLIENTS))
        found = real(self, weights)
        averaged.extend({n: t.clone() for n, t in self.model_state(k).items()} for k in range(CLIENTS))
        return found

    clients.__class__ = type("Watched", (type(clients),), {"average": average})
    run.run()
    names = ["0."] if algorithm == "sfl" else ["0.", "2."]
    for name in names:
        for k, rank in enumerate(RANKS):
            for state in (trained[k], averaged[k]):
                assert torch.linalg.matrix_rank(product(state, name)) == rank
                assert not state[f"{name}lora_A"][rank:].any()
                assert not state[f"{name}lora_B"][:, rank:].any()
        mean = sum(product(state, name) for state in trained) / CLIENTS
        u, s, vh = torch.linalg.svd(mean, full_matrices=False)
        for k, rank in enumerate(RANKS):
            assert torch.allclose(product(averaged[k], name), u[:, :rank] * s[:rank] @ vh[:rank], atol=1e-12)
    sizes = {"0.": INPUTS + 8, "2.": 8 + OUTPUTS}
    each = [8 * rank * sum(sizes[name] for name in names) for rank in RANKS]
    ledger = run.training.ledger
    assert ledger.of_clients("up", "models").tolist() == each
    assert ledger.of_clients("down", "models").tolist() == each
    assert ledger.total("down", "wire-broadcast", "models") == sum(each)  # no two clients receive the same


def test_every_client_is_evaluated() -> None:
    """Models of different ranks also differ after averaging."""
    run = Run(model=Ranked(RANKS), data=data(), **options("fl"))
    run.run()
    x, y = data()["x_test"].double(), data()["y_test"]
    losses = [functional.cross_entropy(run.model(k).eval()(x), y).item() for k in range(CLIENTS)]
    assert len({round(loss, 6) for loss in losses}) == CLIENTS
    assert run.evaluations[-1].test_loss == pytest.approx(sum(losses) / CLIENTS)


def test_equal_ranks_are_one_rank() -> None:
    """Equal ranks give the results of a single rank. Clients of the same rank share one message."""
    same = Run(model=Ranked((2, 2, 2)), data=data(), **options("sfl", engine="local"))
    plain = Run(model=model(), data=data(), **options("sfl", engine="local"))
    assert [step.loss for step in same] == [step.loss for step in plain]
    two = Run(model=Ranked((1, 4, 1)), data=data(), **options("sfl", rounds=1))
    two.run()
    each = 8 * (INPUTS + 8)
    assert two.training.ledger.total("down", "wire-broadcast", "models") == 5 * each
    assert two.training.ledger.total("down", kind="models") == 6 * each


def test_states_of_clients_with_ranks_come_back() -> None:
    """States are stored for each client, since models differ."""
    begun, other = (Run(model=Ranked(RANKS), data=data(), **options("sfl")) for _ in "ab")
    begun.run()
    other.training.clients.load(begun.training.clients.state())
    states = [[run.training.clients.model_state(k) for k in range(CLIENTS)] for run in (begun, other)]
    for mine, theirs in zip(*states, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not torch.equal(states[0][0]["0.lora_A"], states[0][1]["0.lora_A"])


@pytest.mark.parametrize(
    ("algorithm", "more", "words"),
    [
        ("sfl", {"averaging": "mean"}, "averages factors, and not their products; give one lora_rank, or averaging"),
        ("ssl", {"averaging": "mean"}, "its one model goes from client to client"),
        ("sfl", {"clients": 2}, "lora_ranks are 3 for 2 clients"),
    ],
)
def test_ranks_that_are_not_possible(algorithm: str, more: dict[str, Any], words: str) -> None:
    given = options(algorithm, **more)
    if algorithm == "ssl":
        del given["averaging"]
    with pytest.raises(ConfigError, match=words):
        Run(model=Ranked(RANKS), data=data(), **given)


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("sfl", {"client_optimizer": "adamw", "client_lr": 0.05, "client_clip_grad_norm": 0.1}),
        ("psl", {"client_optimizer": "sgd", "client_optimizer_options": {"momentum": 0.9, "weight_decay": 0.1}}),
        ("fl", {"accumulate": 2, "client_states": "disk"}),
    ],
)
def test_clients_of_every_rank_are_stacked(algorithm: str, more: dict[str, Any]) -> None:
    """Equal to the local engine: padding stays zero under momentum, decay and clipping, in memory and on disk."""
    given = options(algorithm, **more)
    if algorithm == "psl":
        del given["averaging"]
    stacked = Run(model=Ranked(RANKS), data=data(), **given, engine="stacked")
    given.pop("client_states", None)
    local = Run(model=Ranked(RANKS), data=data(), **given, engine="local")
    assert [step.loss for step in stacked] == pytest.approx([step.loss for step in local], rel=1e-10)
    assert (stacked.training.engine, local.training.engine) == ("stacked", "local")
    for k, rank in enumerate(RANKS):
        mine, theirs = (run.training.clients.model_state(k) for run in (stacked, local))
        for name in theirs:
            assert torch.allclose(mine[name], theirs[name], rtol=0, atol=1e-10)
        assert not mine["0.lora_A"][rank:].any()
        assert not mine["0.lora_B"][:, rank:].any()
        assert torch.linalg.matrix_rank(product(mine, "0.")) == rank
    assert stacked.evaluations[-1].test_loss == pytest.approx(local.evaluations[-1].test_loss, rel=1e-10)
    assert stacked.training.ledger.table() == local.training.ledger.table()
