"""Tasks: losses equal torch's, engines agree, and the exact identities hold if rows have different weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support import difference
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import ConfigError, DataError, Run, RunConfig, Samples, Source, plugins
from cutlayer.algorithms import Algorithm, algorithm
from cutlayer.algorithms.common import report
from cutlayer.cohort import Cohort
from cutlayer.gradients import means, own
from cutlayer.server import Server
from cutlayer.tasks import Task
from cutlayer.testing import train_in_memory
from cutlayer.types import Round, Smashed, Step
from cutlayer.verbs import BACKWARD, FORWARD, TAIL

SIZES = (10, 6, 7)
OWNERS = torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))
ROWS = len(OWNERS)


class Case(NamedTuple):
    """A task with its options, data, a model and torch's loss for a batch."""

    task: str
    options: dict[str, Any]
    shape: tuple[int, ...]
    targets: Callable[[torch.Generator], Tensor]
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    names: int = 0


class Scores(nn.Module):
    """[R, 6] -> [R, T, K]: scores for each of T tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """[R, T * K] -> [R, T, K]."""
        return x.view(len(x), 4, 3)


def dense(width: int, *more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, width), *more)


def pixels() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1)
    )


def classes(count: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    """Random labels. The first rows contain every class."""

    def draw(g: torch.Generator) -> Tensor:
        y = torch.randint(0, count, (ROWS, *shape), generator=g)
        y.view(-1)[:count] = torch.arange(count)
        return y

    return draw


def ignoring(count: int, ignored: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    def draw(g: torch.Generator) -> Tensor:
        y = classes(count, *shape)(g)
        y[torch.rand(y.shape, generator=g) < 0.3] = ignored
        return y

    return draw


def numbers(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(ROWS, *shape, generator=g, dtype=torch.float64)


WEIGHTS = (0.5, 1.0, 2.5)
CASES = {
    "classification": Case("classification", {}, (6,), classes(3), lambda: dense(3), functional.cross_entropy, 3),
    "class weights": Case(
        "classification",
        {"class_weights": WEIGHTS},
        (6,),
        classes(3),
        lambda: dense(3),
        lambda o, y: functional.cross_entropy(o, y, weight=o.new_tensor(WEIGHTS)),
        3,
    ),
    "smoothing": Case(
        "classification",
        {"label_smoothing": 0.1, "class_weights": WEIGHTS},
        (6,),
        classes(3),
        lambda: dense(3),
        lambda o, y: functional.cross_entropy(o, y, weight=o.new_tensor(WEIGHTS), label_smoothing=0.1),
        3,
    ),
    "binary": Case(
        "binary",
        {"positive_weight": 3.0},
        (6,),
        classes(2),
        lambda: dense(1),
        lambda o, y: functional.binary_cross_entropy_with_logits(o[:, 0], y.to(o), pos_weight=o.new_tensor(3.0)),
        2,
    ),
    "multilabel": Case(
        "multilabel",
        {"positive_weights": (2.0, 1.0, 0.5)},
        (6,),
        lambda g: classes(2, 3)(g).double(),
        lambda: dense(3),
        lambda o, y: functional.binary_cross_entropy_with_logits(o, y, pos_weight=o.new_tensor([2.0, 1.0, 0.5])),
    ),
    "regression": Case(
        "regression", {}, (6,), numbers(), lambda: dense(1), lambda o, y: functional.mse_loss(o[:, 0], y)
    ),
    "huber": Case(
        "regression",
        {"loss": "huber", "huber_delta": 0.5},
        (6,),
        numbers(2),
        lambda: dense(2),
        functools.partial(functional.huber_loss, delta=0.5),
    ),
    "l1": Case("regression", {"loss": "l1"}, (6,), numbers(2), lambda: dense(2), functional.l1_loss),
    "poisson": Case(
        "regression",
        {"loss": "poisson"},
        (6,),
        lambda g: classes(5)(g).double(),
        lambda: dense(1),
        lambda o, y: functional.poisson_nll_loss(o[:, 0], y),
    ),
    "segmentation": Case("segmentation", {}, (1, 4, 4), classes(3, 4, 4), pixels, functional.cross_entropy),
    "ignored pixels": Case(
        "segmentation",
        {"ignore_index": 255, "class_weights": WEIGHTS},
        (1, 4, 4),
        ignoring(3, 255, 4, 4),
        pixels,
        lambda o, y: functional.cross_entropy(o, y, ignore_index=255, weight=o.new_tensor(WEIGHTS)),
    ),
    "tokens": Case(
        "tokens",
        {},
        (6,),
        ignoring(3, -100, 4),
        lambda: dense(12, Scores()),
        lambda o, y: functional.cross_entropy(o.flatten(0, 1), y.flatten()),
    ),
    "next token": Case(
        "tokens",
        {"next_token": True},
        (6,),
        ignoring(3, -100, 4),
        lambda: dense(12, Scores()),
        lambda o, y: functional.cross_entropy(o[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    ),
}
UNEQUAL = "ignored pixels"  # rows have different weights


def source_of(case: Case, owner: Tensor = OWNERS, held: int = 8) -> Source:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, *case.shape, generator=g, dtype=torch.float64)
    y = case.targets(g)
    train, test = Samples(x, y), Samples(x[:held], y[:held])
    return Source("made", train, test[:0], test, tuple(map(str, range(case.names))), owner)


def model_of(case: Case) -> nn.Module:
    torch.manual_seed(5)
    return case.model().double()


def trained(case: Case, algorithm: Any, engine: str = "local", **options: Any) -> Run:
    settings = dict(
        algorithm=algorithm,
        engine=engine,
        task=case.task,
        partition="column",
        clients=len(SIZES),
        batch=4,
        rounds=2,
        precision="float64",
        client_optimizer="sgd",
        client_lr=0.1,
        cut="1",
        **case.options,
    )
    settings |= options
    if algorithm in ("ussl", SeveralTails):
        settings["tail_cut"] = "3"
    run = Run(model=model_of(case), data=source_of(case), **settings)
    run.losses = [record.loss for record in run]  # type: ignore[attr-defined]
    return run


@algorithm("several-tails", title="Several tails", needs={FORWARD, TAIL, BACKWARD})
class SeveralTails(Algorithm):
    """In each step of the server, the tails of all U-shaped clients finish the forward pass."""

    def round(self, server: Server, clients: Cohort, this: Round) -> Iterator[Step]:
        """One local epoch."""
        while smashed := clients.forward(labels=False):
            features = replace(smashed, rows=server.forward(smashed))
            step = server.backward(smashed, clients.tail(features))
            clients.backward(own(step.gradient, smashed))
            yield report(step, smashed)


def state_of(run: Run, client: int = 0) -> dict[str, Tensor]:
    """The whole model of a client, with the server's part."""
    clients = run.training.clients
    client = client if clients.holder is None else clients.holder
    return {**run.training.server.model.state_dict(), **clients.model_state(client)}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_torchs_own(name: str) -> None:
    """The weighted mean of the row losses is torch's loss of the batch."""
    case = CASES[name]
    task: Task = plugins.load("task", case.task).of(case.options)
    data, net = source_of(case).train, model_of(case)
    outputs = net(data.x)
    weights = task.weights(data.y)
    losses = task.row_losses((outputs,), data.y)
    mean = losses.mean() if weights is None else (losses * weights).sum() / weights.sum()
    assert losses.shape == (ROWS,)
    torch.testing.assert_close(mean, case.loss(outputs, data.y), rtol=1e-12, atol=1e-13)
    task.check_outputs(outputs, data.y, tuple("012"[: case.names]))


@pytest.mark.parametrize("name", CASES)
def test_one_client_is_plain_training(name: str) -> None:
    """With one client, every algorithm is SGD with torch's loss."""
    case = CASES[name]
    net, data = model_of(case), source_of(case).train
    run = trained(case, "cl", clients=3, rounds=1, batch=ROWS)
    case.loss(net(data.x), data.y).backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.1 * p.grad
    assert difference(run.training.clients.model_state(0), dict(net.state_dict())) < 1e-13
    test = source_of(case).test
    assert run.evaluations[-1].test_loss == pytest.approx(case.loss(net(test.x), test.y).item(), rel=1e-11)
    alone = torch.zeros(ROWS, dtype=torch.long)
    for other in ("psl", "ssl", "sglr", "sflv1", "sflv2", "fl", "ussl"):
        same = {"clients": 1, "rounds": 1, "batch": ROWS, "partition": "iid"}
        settings = {**same, **({"tail_cut": "3"} if other == "ussl" else {})}
        one = Run(
            RunConfig.of({
                **settings, "algorithm": other, "task": case.task, "cut": "1", "precision": "float64",
                "client_optimizer": "sgd", "client_lr": 0.1, **case.options,
            }),
            model=model_of(case),
            data=source_of(case, alone),
        )  # fmt: skip
        one.run()
        assert difference(state_of(one), dict(net.state_dict())) < 1e-13, other


WEIGHTED = ("class weights", "ignored pixels", "tokens", "next token")  # rows have weights, for all algorithms
STACKED = [(name, a) for name in CASES for a in ("psl", "sflv1", "fl", *(("sglr", "sfl") if name in WEIGHTED else ()))]


@pytest.mark.parametrize(("name", "algorithm"), STACKED)
def test_stacked_is_local(name: str, algorithm: str) -> None:
    """Losses, models and metrics of the stacked engine equal those of the local engine."""
    case = CASES[name]
    slow, fast = trained(case, algorithm), trained(case, algorithm, "stacked")
    assert fast.training.engine == "stacked"
    np.testing.assert_allclose(fast.losses, slow.losses, rtol=1e-11)  # type: ignore[attr-defined]
    for k in range(len(SIZES)):
        assert difference(state_of(fast, k), state_of(slow, k)) < 1e-11
    for a, b in zip(fast.evaluations, slow.evaluations, strict=True):
        assert a.test_loss == pytest.approx(b.test_loss, rel=1e-11)
        assert numbers(a.test) == pytest.approx(numbers(b.test), rel=1e-9, nan_ok=True)


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics, with lists split into single numbers."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, tuple | list):
            found |= numbers({f"{name} {i}": one for i, one in enumerate(value)})
        else:
            found[name] = value
    return found


FAR: list[Any] = ["psl", "sglr", "ussl", SeveralTails, "sflv1", "fl"]


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        *((name, algorithm) for name in ("ignored pixels", "next token") for algorithm in FAR),
        *((name, algorithm) for name in ("class weights", "multilabel") for algorithm in FAR[::2]),
        *((name, algorithm) for name in ("binary", "huber") for algorithm in FAR[1::2]),
    ],
)
def test_remote_is_local(name: str, algorithm: Any) -> None:
    case = CASES[name]
    near = trained(case, algorithm)
    config = near.config
    far = train_in_memory(config, model=model_of(case), data=source_of(case))
    for a, b in zip(far.evaluations, near.evaluations, strict=True):
        assert a.test_loss == pytest.approx(b.test_loss, rel=1e-12)
    assert (
        difference(dict(far.training.server.model.state_dict()), dict(near.training.server.model.state_dict())) < 1e-12
    )
    assert far.training.ledger.table() == near.training.ledger.table()


@pytest.mark.parametrize("algorithm", ["fl", "sflv1", "sfl"])
def test_one_union_step_is_the_average(algorithm: str) -> None:
    """With weights, the union step equals the local engine's, and FedSGD is a step on the union batch."""
    case = CASES[UNEQUAL]
    options: dict[str, Any] = {"batch": 10, "rounds": 1}
    options |= {"average_every": "step"} if algorithm == "sfl" else {"local_steps": 1}
    slow, fast = trained(case, algorithm, "local", **options), trained(case, algorithm, "auto", **options)
    assert fast.training.engine == "union"
    assert difference(state_of(fast), state_of(slow)) < 1e-13
    if algorithm == "sfl":
        return
    net, data = model_of(case), source_of(case).train
    case.loss(net(data.x), data.y).backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.1 * p.grad
    whole = {**slow.training.server.model.state_dict(), **slow.training.clients.model_state(0)}
    assert difference(whole, dict(net.state_dict())) < 1e-13


def test_federated_is_splitfed_with_weights() -> None:
    """SplitFed V1 equals FedAvg for any number of local steps."""
    case = CASES[UNEQUAL]
    fl, v1 = trained(case, "fl"), trained(case, "sflv1")
    assert difference(fl.training.clients.model_state(0), state_of(v1)) < 1e-13


def test_sglr_without_its_halves_is_psl_with_weights() -> None:
    case = CASES[UNEQUAL]
    assert difference(state_of(trained(case, "sglr", phi=0.0, alpha=0.0), 1), state_of(trained(case, "psl"), 1)) == 0


def test_u_shaped_is_vanilla_with_weights() -> None:
    case = CASES[UNEQUAL]
    assert difference(state_of(trained(case, "ussl")), state_of(trained(case, "ssl"))) < 1e-13


def test_own_gradients_are_of_own_weighted_means() -> None:
    """Rows of client k are scaled by W / W_k, which gives the gradient of the client's own mean loss."""
    case = CASES[UNEQUAL]
    run = trained(case, "psl", rounds=1, batch=10)
    t = Run(run.config, model=model_of(case), data=source_of(case)).training
    t.clients.begin_round(0, 1, 1.0)
    smashed = t.clients.forward()
    assert smashed.weights is not None
    assert len(set(smashed.masses)) == 3
    gradients = own(t.server.gradients(smashed).gradient, smashed)
    for k in smashed.clients:
        mine = smashed.only(k)
        alone = t.server.gradients(mine).gradient
        torch.testing.assert_close(gradients.for_client(k, len(mine))[0], alone[0], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_a_step_reports_weighted_means(engine: str) -> None:
    """The weighted mean over all rows, and over each client's rows."""
    case, data = CASES[UNEQUAL], source_of(CASES[UNEQUAL]).train
    outputs = model_of(case)(data.x)
    wanted = [case.loss(outputs, data.y)]
    wanted += [case.loss(o, y) for o, y in zip(outputs.split(SIZES), data.y.split(SIZES), strict=True)]
    for name in ("psl", "sflv1", "fl"):
        run = trained(case, name, engine, rounds=1, batch=10)
        t = Run(run.config, model=model_of(case), data=source_of(case)).training
        step = next(t.algorithm.round(t.server, t.clients, t.clients.begin_round(0, 1, 1.0)))
        assert [step.loss, *step.losses] == pytest.approx([loss.item() for loss in wanted], rel=1e-11), name


def test_made_up_rows_count_as_those_of_clients() -> None:
    case = CASES["class weights"]
    run = trained(case, "psl", rounds=1, batch=10)
    one, other = (Run(run.config, model=model_of(case), data=source_of(case)).training for _ in range(2))
    one.clients.begin_round(0, 1, 1.0)
    smashed = one.clients.forward()
    step = one.server.step(smashed)
    assert other.server.step_on(smashed.rows, smashed.labels).item() == step.means[0].item()
    assert difference(one.server.model.state_dict(), other.server.model.state_dict()) == 0


def test_a_row_that_counts_nothing_changes_nothing() -> None:
    """A client without rows that count has a zero gradient, without a division by zero."""
    case = CASES["tokens"]
    data = source_of(case)
    data.train.y[OWNERS == 1] = -100
    run = Run(trained(case, "psl").config, model=model_of(case), data=data)
    before = {k: v.clone() for k, v in run.training.clients.model_state(1).items()}
    assert all(math.isfinite(record.loss) for record in run)
    assert difference(run.training.clients.model_state(1), before) == 0


def test_losses_of_rows_that_count_nothing_are_none() -> None:
    nothing = torch.zeros(3, dtype=torch.float64)
    assert means(torch.ones(3, dtype=torch.float64), (1, 2), nothing).tolist() == [0, 0, 0]


def test_balanced_classes_count_by_their_frequency() -> None:
    case = CASES["classification"]
    data = source_of(case)
    run = Run(
        model=model_of(case), data=data, balanced_classes=True, clients=3, partition="column", cut="1", rounds=1,
        precision="float64",
    )  # fmt: skip
    counts = data.train.y.bincount().double()
    assert run.training.task.class_weights == pytest.approx((ROWS / (3 * counts)).tolist())


class TwoHeads(nn.Module):
    """A model with a main and an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.main, self.extra = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[R, 6] -> two scores [R, 3]."""
        h = self.body(x).tanh()
        return self.main(h), self.extra(h)


def test_auxiliary_heads_have_weights() -> None:
    task: Task = plugins.load("task", "classification").of({"auxiliary_weights": (0.4,)})
    torch.manual_seed(0)
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    main, extra = TwoHeads()(x)
    wanted = functional.cross_entropy(main, y) + 0.4 * functional.cross_entropy(extra, y)
    torch.testing.assert_close(task.row_losses((main, extra), y).mean(), wanted)
    with pytest.raises(ConfigError, match="auxiliary_weights has 1 numbers, but the model gives 0 outputs beside"):
        task.row_losses((main,), y)


def test_a_count_is_predicted_not_its_logarithm() -> None:
    task: Task = plugins.load("task", "regression").of({"loss": "poisson"})
    counts = torch.tensor([1.0, 4.0, 2.5])
    torch.testing.assert_close(task.predictions(counts.log()), counts)


def test_which_score_is_best() -> None:
    """The largest accuracy or the smallest error. Undefined scores are never the best."""
    scores = [0.5, None, math.nan, 0.8, 0.1]
    accuracy, error = (plugins.load("task", name)() for name in ("classification", "regression"))
    assert max(scores, key=accuracy.rank) == 0.8
    assert max(scores, key=error.rank) == 0.1
    assert [max([None, bad, 0.0], key=error.rank) for bad in (math.nan, math.inf)] == [0.0] * 2


# Bad input


def refused(words: str, **options: Any) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        Run(clients=2, rounds=1, cut="1", **options)


X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def test_quantities_are_not_classes() -> None:
    y = np.random.default_rng(0).integers(25, 346, 400)
    refused("take .* different values in 400 rows.*--task regression", data=(np.zeros((400, 6)) + y[:, None], y))
    refused("hold 0.5, which is not a class.*--task regression", data=(X, np.linspace(0, 1, 40) + 0.5))


def test_classes_are_not_quantities() -> None:
    refused(
        "type <U3: this task needs numbers.*--task classification", data=(X, ["dog", "cat"] * 20), task="regression"
    )
    data = source_of(CASES["classification"])
    refused("are classes \\(0, 1, 2\\), but this task needs numbers", data=data, task="regression", model=dense(1))


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("needs two classes but the data have 3", {"y": torch.arange(40) % 3, "task": "binary", "model": 1}),
        (r"\(3, 3\), not into \[3, 1\]", {"task": "binary", "model": 3}),
        (r"gives \(3,\) per sample but there are \(\) quantities", {"y": X[:, 0], "task": "regression", "model": 3}),
        ("class_weights has 2 numbers but the model scores 3", {"class_weights": (1.0, 2.0), "model": 3}),
        ("exclude each other", {"class_weights": (1.0, 2.0), "balanced_classes": True, "model": 2}),
        ("huber_delta = 2 has no effect", {"y": X[:, 0], "task": "regression", "huber_delta": 2.0, "model": 1}),
        ("the targets hold 0.3.*a label is 0 or 1", {"y": torch.full((40, 3), 0.3), "task": "multilabel", "model": 3}),
        ("belongs to .*regression", {"loss": "huber", "model": 2}),
        (
            "'dirichlet' divides samples by class",
            {"y": X[:, 0], "task": "regression", "partition": "dirichlet", "model": 1},
        ),
        ("NaN or infinite", {"y": X[:, 0] / 0, "task": "regression", "model": 1}),
        ("this task needs integers", {"y": X, "task": "segmentation", "model": 1}),
        (r"its target is \(40,\)", {"y": torch.zeros(40, 40).long(), "task": "segmentation", "model": 1}),
        ("the targets hold -7", {"y": torch.full((40, 4), -7), "task": "tokens", "model": Scores()}),
    ],
)
def test_a_model_must_fit_the_task(words: str, options: dict[str, Any]) -> None:
    made = options["model"]
    net = dense(made) if isinstance(made, int) else dense(12, made)
    y = options.get("y", torch.arange(40) % 2)
    rest = {k: v for k, v in options.items() if k not in ("y", "model")}
    refused(words, data=(X, y), model=net, **rest)


def test_a_softmax_at_the_end_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="probabilities that add up to 1"):
        Run(data=(X, torch.arange(40) % 3), model=dense(3, nn.Softmax(1)), cut="1", clients=2, rounds=1)


def test_smashed_data_know_what_rows_count() -> None:
    rows = Smashed((torch.zeros(3, 2),), torch.zeros(3), (4, 7), (1, 2), weights=torch.tensor([1.0, 0.5, 2.0]))
    assert rows.masses == (1.0, 2.5)
    assert rows.masses_of({7}) == (2.5,)
    assert rows.only(7).masses == (2.5,)


# The meaning of labels


def labelled(labels: list[int], model: nn.Module, **options: Any) -> Run:
    y = torch.tensor(labels * 20)
    return Run(data=(torch.randn(len(y), 6), y), model=model, cut="1", clients=2, rounds=1, **options)


def test_labels_that_a_model_scores_are_its_classes() -> None:
    run = labelled([1, 3, 7], dense(10))
    assert sorted(run.training.source.train.y.unique().tolist()) == [1, 3, 7]
    assert run.training.source.class_names == tuple(map(str, range(10)))
    assert run.training.counts.shape == (2, 10)
    assert run.training.source.account.endswith("the labels 1, 3, 7 are taken as classes of the model's 10")


@pytest.mark.parametrize(("labels", "width"), [([1, 3, 7], 3), ([-1, 1], 2), ([1, 3, 70], 10)])
def test_other_integers_are_names(labels: list[int], width: int) -> None:
    run = labelled(labels, dense(width))
    assert sorted(run.training.source.train.y.unique().tolist()) == list(range(len(labels)))
    assert run.training.source.class_names == tuple(map(str, labels))
    assert f"become the classes 0 to {len(labels) - 1}" in run.training.source.account


def test_rows_without_a_class_are_left_out() -> None:
    run = labelled([0, 1, -100], dense(2), ignore_index=-100)
    assert sum(len(part) for part in (run.training.source.train, run.training.source.test)) <= 40
    assert run.training.source.class_names == ("0", "1")
    assert "left out 20 rows with the label -100" in run.training.source.account
    run.run()
    with pytest.raises(DataError, match=r"20 rows of arrays have the label -100.*ignore_index = -100"):
        labelled([0, 1, -100], dense(2))
    with pytest.raises(ConfigError, match="ignore_index = 1 is the number of a class"):
        labelled([0, 1], dense(2), ignore_index=1)
