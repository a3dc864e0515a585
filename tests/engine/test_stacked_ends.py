"""Tails and auxiliary heads train on the stacked engine as on the local engine, where both parts of a client share one
optimiser, one clipped norm and one step clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support import client_state, difference, make, mlp, server_state, source
from torch import Tensor, nn

from cutlayer import Run
from cutlayer.algorithms import Algorithm, algorithm
from cutlayer.algorithms.common import report, sample_weights
from cutlayer.cohort import Cohort
from cutlayer.engine.choice import Choice
from cutlayer.engine.ways import Stacking, Way
from cutlayer.errors import CutlayerWarning, NonFiniteError
from cutlayer.gradients import own
from cutlayer.server import Server
from cutlayer.types import Round, Rows, Step
from cutlayer.verbs import AVERAGE, BACKWARD, FORWARD, LEARN

EQUAL, UNEQUAL = [8, 8, 8], [10, 6, 7, 2]


class DrawingHead(nn.Module):
    """Batch normalisation and dropout before a linear layer."""

    def __init__(self, smashed: Rows, classes: int) -> None:
        super().__init__()
        width = smashed[0].shape[1]
        self.layers = nn.Sequential(nn.BatchNorm1d(width, eps=0.1), nn.Dropout(0.3), nn.Linear(width, classes))

    def forward(self, smashed: Tensor) -> Tensor:
        scores: Tensor = self.layers(smashed)
        return scores


@algorithm("drawing-heads", title="Drawing heads", needs={FORWARD, LEARN, AVERAGE})
class DrawingHeads(Algorithm):
    """Uploads every third batch of the round. Some clients draw their batches later than others."""

    def head(self, smashed: Rows, classes: int) -> nn.Module:
        return DrawingHead(smashed, classes)

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        trained: set[int] = set()
        while smashed := clients.forward(this.clients[1:] if len(trained) < 2 else None):
            trained |= set(smashed.clients)
            step = server.step(smashed)
            for one in clients.learn(3):
                trained |= set(one.clients)
            yield report(step, smashed)
        clients.average(sample_weights(clients, trained))


def norm() -> nn.Module:
    """Batch normalisation and dropout in each of three parts, with cuts 3 and 7."""

    def block(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, 5, bias=False), nn.BatchNorm1d(5, eps=0.1), nn.Tanh(), nn.Dropout(0.4)]

    return nn.Sequential(*block(6), *block(5), nn.Dropout(0.2), nn.Linear(5, 4))


CASES: list[tuple[Any, dict[str, Any]]] = [
    ("upsl", {"tail_cut": "7"}),
    ("usfl", {"tail_cut": "7", "average_every": "step"}),
    ("usglr", {"tail_cut": "7", "phi": 0.7}),
    (DrawingHeads, {}),
]
HOW: dict[str, dict[str, Any]] = {
    "plain descent": {"client_optimizer": "sgd"},
    "momentum, decay": {
        "client_optimizer": "sgd", "client_optimizer_options": {"momentum": 0.9, "weight_decay": 0.01}
    },
    "adam, sampled": {"participation": 0.7},
    "clipped": {"client_clip_grad_norm": 0.05, "client_optimizer": "sgd"},
    "clipped, waiting": {"client_clip_grad_norm": 0.1, "accumulate": 2},
    "groups": {"param_groups": [{"match": "bias", "lr": 3.0}, {"match": "^8|^9|auxiliary", "lr": 0.3}]},
    "independent": {"start": "independent"},
    "adjusted": {"logit_adjust": "client"},
    "codecs": {"up_codec": "int8", "down_codec": "float16"},
}  # fmt: skip


def same(case: Any, sizes: list[int], **options: Any) -> None:
    """Both engines give the same records, scores, client models and server model."""
    found = []
    for engine in ("local", "stacked"):
        run = Run(
            algorithm=case, data=source(sizes, (6,)), clients=len(sizes), partition="column", precision="float64",
            client_lr=0.02, lr_schedule="constant", rounds=4, batch=4, eval_every=3,
            **{"model": make(norm), "cut": "3", "engine": engine, **options},
        )  # fmt: skip
        assert run.training.engine == engine
        records = [(r.clients, r.samples, r.bytes_up, r.bytes_down, r.loss) for r in run]
        scores = [(e.test_loss, e.test_score) for e in run.evaluations]
        found.append((run, [r[:4] for r in records], [r[4] for r in records] + [x for s in scores for x in s]))
    (a, facts, numbers), (b, same_facts, same_numbers) = found
    assert facts == same_facts
    assert numbers == pytest.approx(same_numbers, rel=1e-9)
    for k in range(len(sizes)):
        assert difference(client_state(a, k), client_state(b, k)) < 1e-10
    assert difference(server_state(a), server_state(b)) < 1e-10
    assert a.training.ledger.state() == b.training.ledger.state()


@pytest.fixture(autouse=True)
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are computed together wherever possible."""
    monkeypatch.setattr(Choice, "_usual", lambda self, side, layout: self._ways_of(side, layout)[0])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("case", "options"), CASES)
def test_both_parts_train_as_on_the_local_engine(case: Any, options: dict[str, Any], how: str) -> None:
    model = {"model": lambda: norm().double()} if how == "independent" else {}
    same(case, UNEQUAL, **options, **HOW[how], **model)


@pytest.mark.parametrize("way", ["lowered", "mapped", "each"])
@pytest.mark.parametrize(("case", "options"), [CASES[0], CASES[3]])
def test_every_way_in_small_groups_with_passes_that_run_twice(
    case: Any, options: dict[str, Any], way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Choice, "_stacking", lambda *_: Stacking(way, 2, False))
    same(case, UNEQUAL, **options)


@pytest.mark.parametrize(("case", "options"), [("upsl", {"tail_cut": "3", "cut": "1"}), (DrawingHeads, {"cut": "1"})])
def test_dense_layers_as_one_node(case: Any, options: dict[str, Any]) -> None:
    for sizes in (EQUAL, UNEQUAL):
        same(case, sizes, model=make(mlp), client_optimizer="sgd", **options)


@algorithm("tied-heads", title="Tied heads", needs={FORWARD, LEARN, AVERAGE})
class TiedHeads(DrawingHeads):
    """Two layers of the head share their weights."""

    def head(self, smashed: Rows, classes: int) -> nn.Module:
        head = DrawingHead(smashed, classes)
        again = nn.Linear(classes, classes)
        head.layers.append(again).append(nn.Tanh()).append(nn.Linear(classes, classes))
        head.layers[-1].weight = again.weight
        return head


@algorithm("both-gradients", title="Both gradients", needs={FORWARD, LEARN, BACKWARD})
class BothGradients(Algorithm):
    """Steps alternate between the server's gradient and the head's."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        while smashed := clients.forward():
            step = server.step(smashed)
            clients.backward(own(step.gradient, smashed))
            clients.learn(1)
            yield report(step, smashed)


def tied() -> nn.Module:
    """The first and the last layer share their weights."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[4].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("case", "options", "why"),
    [
        (TiedHeads, {}, "the auxiliary head cannot be stacked: it has tied weights"),
        (BothGradients, {"client_optimizer": "adam"}, "its clients' heads may step less often than their models"),
        ("upsl", {"cut": "1", "tail_cut": "3", "model": tied, "shape": (4,)}, "the clients' two parts share weights"),
    ],
)
def test_what_cannot_be_stacked_runs_on_the_local_engine(case: Any, options: dict[str, Any], why: str) -> None:
    options = {"cut": "3", "model": norm, "shape": (6,), **options}
    data, model = source(EQUAL, options.pop("shape")), make(options.pop("model"))
    with pytest.warns(CutlayerWarning, match=f"runs on the local engine: {why}"):
        run = Run(algorithm=case, data=data, model=model, clients=3, partition="column", batch=4, **options)
    assert run.training.engine == "local"


def test_plain_descent_on_both_gradients_can_be_stacked() -> None:
    same(BothGradients, UNEQUAL, client_optimizer="sgd")


def deep() -> nn.Module:
    """Ten linear layers; cuts 0..9."""
    return nn.Sequential(*[nn.Linear(6, 6) for _ in range(9)], nn.Linear(6, 4))


@pytest.mark.parametrize(("case", "options"), [CASES[0], CASES[3]])
def test_not_a_number_names_the_client(case: Any, options: dict[str, Any]) -> None:
    data = source(EQUAL, (6,))
    data.train.x[8:16] *= 1e300
    run = Run(
        algorithm=case, data=data, model=make(deep), clients=3,
        partition="column", precision="float64", batch=4, cut="3", client_optimizer="sgd", client_lr=1e10,
        engine="stacked", **options,
    )  # fmt: skip
    with pytest.raises(NonFiniteError) as caught:
        run.run()
    assert caught.value.clients == (1,)


def test_an_upload_waits_for_the_last_forward_pass_only() -> None:
    """A batch that was sent before another forward pass has lost its gradient, so nothing is learned from it later."""

    @algorithm("twice-forward", title="Twice forward", needs={FORWARD, LEARN, AVERAGE})
    class TwiceForward(DrawingHeads):
        def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
            clients.forward(this.clients[:1])
            smashed = clients.forward(this.clients[1:])
            yield report(server.step(smashed), smashed)
            taken = clients.learn(5)
            # Of the two batches of client 0, the one that was sent is lost.
            assert [one.clients for one in taken] == [(0, 1, 2), (1, 2), (1, 2), (1, 2)]
            clients.average(sample_weights(clients, this.clients))

    same(TwiceForward, [8, 16, 16])


@pytest.mark.parametrize("keep", [True, False])
def test_passes_that_nothing_comes_of_leave_their_statistics(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batches have 3, 4 and 3 rows: clients 0 and 2 are one copy when client 1 sends its second batch."""
    monkeypatch.setattr(Choice, "_stacking", lambda *_: Stacking("lowered", None, keep))
    same("ampere", [3, 8, 3])
