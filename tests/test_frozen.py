"""Frozen parameters: one copy for all clients, never sent, averaged, counted, or stored for every client."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cutlayer import ConfigError, CutError, Run, checkpoint
from cutlayer.algorithms import traffic_of
from cutlayer.build import prepare
from cutlayer.costs.expect import Workload, expect
from cutlayer.engine.stack import Stack
from cutlayer.errors import RefusedError
from cutlayer.folder import CHECKPOINT
from cutlayer.optim import make_optimizer
from cutlayer.options import RunConfig
from cutlayer.testing.algorithm_checks import check_algorithm
from cutlayer.testing.deployed import in_memory, train_in_memory
from cutlayer.testing.material import demand_equal, random_source, smooth
from cutlayer.wire.coded import CodedCohort

ALGORITHMS = ["cl", "fl", "psl", "ssl", "ussl", "sfl", "sflv1", "sflv2", "sflv3", "sglr"]
LONG = [a if a in ("cl", "fl", "psl", "ssl", "ussl") else pytest.param(a, marks=pytest.mark.long) for a in ALGORITHMS]
WHOLE = ("cl", "fl")
BENT = ("ussl", "upsl", "usfl")
FIRST = r"^0\."  # the client's first layer in `smooth` and `stateful`


def run_of(sizes: tuple[int, ...] = (10, 7), model: Any = smooth, **options: Any) -> Run:
    common: dict[str, Any] = {"clients": len(sizes), "partition": "column", "batch": 4, "precision": "float64"}
    if options.get("algorithm") not in WHOLE:
        common["cut"] = "1"
    if options.get("algorithm") in BENT:
        common["tail_cut"] = "3"
    return Run(model=model, data=random_source(sizes), **{**common, "rounds": 2, **options})


def innermost(run: Run) -> Any:
    cohort: Any = run.training.clients
    while hasattr(cohort, "inner"):
        cohort = cohort.inner
    return cohort


# ---- The same in every engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", LONG)
def test_every_engine_with_a_part_of_each_model_frozen(algorithm: str) -> None:
    """Frozen are a weight of the client, whose bias is trained, and a weight of the server.

    The check covers records, models, bytes compared with tensors, resuming, and `plan`.
    """
    check_algorithm(algorithm, one_client_is_sgd=False, freeze=r"^(0|4)\.weight")


@pytest.mark.parametrize("algorithm", ["psl", "ssl", "sflv3"])
@pytest.mark.parametrize("pattern", [r"^[01]\.", pytest.param(r"^0\.|^1\.", marks=pytest.mark.long)])
def test_every_engine_with_clients_that_train_nothing(algorithm: str, pattern: str) -> None:
    """Frozen are the first layer and batch normalisation. Buffers still change, so models differ."""
    check_algorithm(algorithm, one_client_is_sgd=False, freeze=pattern)


@pytest.mark.parametrize("engine", ["local", "stacked"])
@pytest.mark.parametrize("algorithm", ["fl", "psl", "sfl", "sflv1"])
def test_what_is_frozen_keeps_every_bit(algorithm: str, engine: str) -> None:
    """In float32, an average would round frozen weights. All others change."""
    run = run_of(algorithm=algorithm, engine=engine, freeze=r"^(0|2)\.weight", precision="float32", sizes=(10, 7, 5))
    before = {k: t.clone() for part in run.training.parts.all for k, t in part.state_dict().items()}
    run.run()
    assert run.training.engine == engine
    after = [{**run.training.clients.model_state(k)} for k in range(3)]
    for model in after:
        assert torch.equal(model["0.weight"], before["0.weight"])
        assert not torch.equal(model["0.bias"], before["0.bias"])
    server = run.training.server.state()["model"]
    if algorithm != "fl":
        assert torch.equal(server["2.weight"], before["2.weight"])
        assert not torch.equal(server["2.bias"], before["2.bias"])


def test_the_union_engine_has_one_anyway() -> None:
    options: dict[str, Any] = {
        "algorithm": "sfl",
        "average_every": "step",
        "client_optimizer": "sgd",
        "freeze": "0.weight",
    }
    union, local = run_of(**options), run_of(**options, engine="local")
    assert union.training.engine == "union"
    one, other = [r.loss for r in union], [r.loss for r in local]
    demand_equal("union", "other losses", one, other)
    demand_equal("union", "other models", *(dict(r.training.clients.model_state(1)) for r in (union, local)))
    assert union.training.ledger.table() == local.training.ledger.table()


def test_a_frozen_layer_is_applied_once_for_all() -> None:
    """A convolution, a linear layer, normalisation and a single parameter, stacked, with frozen weights."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1)
            self.more = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.shift = nn.Parameter(torch.randn(4, 1, 1))
            self.last = nn.Linear(4 * 16, 5)
            self.head = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Any:
            x = torch.relu(self.norm(self.more(torch.relu(self.conv(x)))) + self.shift)
            return self.head(torch.tanh(self.last(x.flatten(1))))

    data = random_source((8, 8), (1, 6, 6))
    for frozen in ("conv|shift", "more", "norm", "weight", "bias", "conv|more|norm|shift"):
        found = []
        for engine in ("stacked", "local"):
            run = Run(
                model=Mixed, data=data, algorithm="psl", cut="last", clients=2, partition="column", batch=4, rounds=2,
                precision="float64", engine=engine, freeze=frozen, client_optimizer="sgd", client_lr=0.1,
            )  # fmt: skip
            found.append(([r.loss for r in run], {**run.training.clients.model_state(1)}))
            assert run.training.engine == engine
        demand_equal(frozen, "stacked and local differ", found[0], found[1])


# ---- One copy ------------------------------------------------------------------------------------------------------


def test_all_clients_of_the_local_engine_hold_the_same_tensor() -> None:
    cohort = innermost(run_of(algorithm="sflv3", engine="local", freeze=FIRST + "|^4", sizes=(4, 4, 4)))
    first, *others = [dict(c.module.named_parameters()) for c in cohort._clients]
    for other in others:
        assert other["lower.0.weight"] is first["lower.0.weight"]
    run = run_of(algorithm="sflv1", engine="local", freeze="^4", sizes=(4, 4, 4))
    run.run()
    copies = run.training.server._copies
    assert len({id(c.model.get_parameter("4.weight")) for c in copies.values()}) == 1
    assert len({id(c.model.get_parameter("2.weight")) for c in copies.values()}) == 3


def test_the_stacked_engine_does_not_stack_it() -> None:
    module = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 3))
    module[0].requires_grad_(False)
    stack = Stack(module, 50, make_optimizer("adam", 0.1, {}))
    assert sum(t.nbytes for t in stack.state()["parameters"].values()) == 50 * (303 * 4)
    assert stack.module[0].weight is module[0].weight


@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_independent_starts_share_it(engine: str) -> None:
    """Trained weights start from each client's own initialisation, frozen ones from the common model."""
    run = run_of(algorithm="psl", start="independent", engine=engine, freeze="0.weight", rounds=1)
    one, other = (run.training.clients.model_state(k) for k in (0, 1))
    assert torch.equal(one["0.weight"], other["0.weight"])
    assert not torch.equal(one["0.bias"], other["0.bias"])


@pytest.mark.parametrize("engine", ["local", "stacked"])
@pytest.mark.parametrize("algorithm", ["fl", "sflv1"])
def test_a_checkpoint_holds_it_once_for_each_side(algorithm: str, engine: str, tmp_path: Path) -> None:
    def wide() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 501), nn.Linear(501, 8), nn.Linear(8, 502), nn.Linear(502, 4))

    run_of(
        algorithm=algorithm,
        engine=engine,
        model=wide,
        freeze=r"^(0|3)\.",
        sizes=(4, 4, 4),
        rounds=1,
        out=tmp_path / "r",
    ).run()
    state = checkpoint.read(tmp_path / "r" / CHECKPOINT)
    shapes: list[tuple[int, ...]] = []

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            shapes.append(tuple(value.shape))
        for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            look(one)

    look(state)
    assert shapes.count((501, 6)) == 1
    assert shapes.count((4, 502)) == 1
    assert not any(len(s) == 3 and s[1:] in ((501, 6), (4, 502)) for s in shapes)


def test_a_resumed_run_takes_the_frozen_weights_of_its_checkpoint(tmp_path: Path) -> None:
    """Even if the model given to `resume` has other initial weights."""

    def other() -> nn.Module:
        model = smooth()
        with torch.no_grad():
            model[0].weight.add_(1.0)
        return model

    for engine in ("local", "stacked"):
        options: dict[str, Any] = {"algorithm": "psl", "freeze": r"^(0|4)\.weight", "engine": engine, "rounds": 4}
        quiet = run_of(**options)
        quiet.run()
        broken = run_of(**options, out=tmp_path / engine)
        for count, _ in enumerate(broken, 1):
            if count == 8:
                break
        resumed = Run.resume(tmp_path / engine, model=other, data=random_source((10, 7)))
        resumed.run()
        for k in (0, 1):
            demand_equal(
                engine, "not resumed", dict(resumed.training.clients.model_state(k)),
                dict(quiet.training.clients.model_state(k)), exact=True,
            )  # fmt: skip


# ---- Bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["local", "stacked", "remote"])
def test_no_frozen_byte_crosses(engine: str) -> None:
    """Only biases are averaged. Simulation and deployment count the same bytes."""
    options: dict[str, Any] = {"algorithm": "sfl", "freeze": "weight", "rounds": 1, "sizes": (8, 8)}
    run = run_of(**options, engine="local" if engine == "remote" else engine)
    if engine == "remote":
        run = train_in_memory(run.config, model=smooth, data=random_source((8, 8)))
    else:
        run.run()
    models = run.training.ledger.total("up", kind="models")
    assert models == run.training.ledger.total("down", kind="models") == 2 * 8 * 8  # the first layer's bias as doubles
    assert run.training.clients.footprint(0).model == 64


@pytest.mark.parametrize("engine", ["local", "stacked", "remote"])
@pytest.mark.parametrize("algorithm", ["psl", "ssl", "sflv3"])
def test_clients_that_train_nothing_receive_nothing(algorithm: str, engine: str) -> None:
    """No gradients, no models and no backward pass. The bytes down are zero, also in the plan."""
    options: dict[str, Any] = {"algorithm": algorithm, "freeze": FIRST, "rounds": 1, "sizes": (8, 8)}
    asked = "local" if engine == "remote" or algorithm == "ssl" else engine
    run = run_of(**options, engine=asked)
    if engine == "remote":
        there = in_memory(run.config, model=smooth, data=random_source((8, 8)))
        run = there.run
        for worker in there.workers.values():
            worker.client.backward = refused  # type: ignore[method-assign]
    else:
        innermost(run).backward = refused
    run.run()
    t = run.training
    assert t.ledger.total("down") == 0
    assert t.ledger.total("up") > 0
    stated = expect(t.algorithm, Workload(**vars(t.epoch), flops=t.flops, epochs=1))
    assert traffic_of(t.algorithm, t.epoch) is not None
    assert (stated.up, stated.down) == (t.ledger.total("up"), 0)
    assert t.flops.client.backward == 0
    losses = [e.test_loss for e in run.evaluations]
    demand_equal(engine, "not what the local engine trains", losses, [e.test_loss for e in trained_locally(options)])


@pytest.mark.parametrize("algorithm", BENT)
def test_every_engine_with_frozen_lower_parts_below_tails_that_train(algorithm: str) -> None:
    check_algorithm(algorithm, one_client_is_sgd=False, freeze=FIRST)


@pytest.mark.parametrize("engine", ["local", "stacked", "remote"])
@pytest.mark.parametrize("algorithm", BENT)
def test_frozen_lower_parts_get_no_gradients_and_their_tails_train(algorithm: str, engine: str) -> None:
    """Only features are sent down. All results are equal to those with useless gradients."""
    options: dict[str, Any] = {
        "algorithm": algorithm,
        "freeze": FIRST,
        "sizes": (8, 6),
        "clip": 1.0,
        "gaussian_noise": 0.1,
    }
    asked = "local" if engine == "remote" or algorithm == "ussl" else engine
    run = run_of(**options, engine=asked)
    assert coded(run).trains
    if engine == "remote":
        run = train_in_memory(run.config, model=smooth, data=random_source((8, 6)))
    else:
        run.run()
    ledger, t = run.training.ledger, run.training
    assert ledger.total("down", kind="cut gradients") == 0
    assert ledger.total("down", kind="features") == ledger.total("up", kind="cut gradients") > 0
    stated = expect(t.algorithm, Workload(**vars(t.epoch), flops=t.flops, epochs=2))
    if algorithm != "ussl":  # in ussl, the first client already has the model
        assert (stated.up, stated.down) == (ledger.total("up"), ledger.total("down"))
    wasteful = run_of(**options, engine="local")
    coded(wasteful).lower_trains = True
    wasteful.run()
    assert wasteful.training.ledger.total("down", kind="cut gradients") > 0
    losses = [e.test_loss for e in run.evaluations]
    demand_equal(engine, "not what gradients for nothing give", losses, [e.test_loss for e in wasteful.evaluations])
    assert losses[0] != losses[1]


def coded(run: Run) -> Any:
    cohort: Any = run.training.clients
    while not isinstance(cohort, CodedCohort):
        cohort = cohort.inner
    return cohort


def trained_locally(options: dict[str, Any]) -> Any:
    run = run_of(**options, engine="local")
    run.run()
    return run.evaluations


def refused(*args: Any, **options: Any) -> None:
    raise AssertionError("a backward pass was asked for")


def test_plan_counts_what_a_run_does() -> None:
    from cutlayer.costs.plan import plan
    from cutlayer.options import PlanConfig

    for algorithm, pattern in (("psl", "^0"), ("sfl", "weight"), ("fl", "weight"), ("upsl", "^0")):
        run = run_of(algorithm=algorithm, freeze=pattern, sizes=(8, 8), rounds=1, precision="float32")
        run.run()
        config = PlanConfig.of(
            {"algorithms": [algorithm], "cut": "1", "input": [6], "clients": 2, "samples_per_client": 8, "batch": 4,
             "freeze": pattern, **({"tail_cut": "3"} if algorithm in BENT else {})}
        )  # fmt: skip
        (cost,) = (
            plan(config, smooth).costs if hasattr(plan(config, smooth), "costs") else plan(config, smooth).algorithms
        )
        ledger = run.training.ledger
        assert (cost.expected.up, cost.expected.down) == (ledger.total("up"), ledger.total("down"))


# ---- Deployments ---------------------------------------------------------------------------------------------------


def test_both_sides_must_have_the_same_frozen_weights() -> None:
    """They are not sent, so a difference would never be noticed."""

    def other() -> nn.Module:
        model = smooth()
        with torch.no_grad():
            model[0].weight.mul_(1.001)
        return model

    data = random_source((8, 8))
    options = {"algorithm": "psl", "cut": "1", "clients": 2, "partition": "column", "batch": 4, "rounds": 1}
    config = RunConfig.of({**options, "freeze": "0.weight", "precision": "float64"})
    workers = in_memory(config, model=other, data=data).workers
    with pytest.raises(RefusedError, match="frozen parameters"):
        in_memory(config, model=smooth, data=data, workers=workers).run.run()
    trained = RunConfig.of({**options, "precision": "float64"})
    workers = in_memory(trained, model=other, data=data).workers
    in_memory(trained, model=smooth, data=data, workers=workers).run.run()


# ---- Warnings and errors before training -----------------------------------------------------------------------------


def test_a_models_own_frozen_parameters_count_alike() -> None:
    def own() -> nn.Module:
        model = smooth()
        model[0].requires_grad_(False)
        return model

    one, other = run_of(algorithm="psl", model=own), run_of(algorithm="psl", freeze=FIRST)
    assert [r.loss for r in one] == [r.loss for r in other]
    assert one.training.ledger.table() == other.training.ledger.table()


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"freeze": "head"}, ConfigError, "freeze = 'head' matches none of the parameters: they are 0.weight, 0.bias"),
        ({"freeze": "("}, ConfigError, "freeze = '(' is not a regular expression"),
        ({"freeze": FIRST, "nopeek": 0.5}, ConfigError, "but nothing of that part is trained"),
        ({"freeze": "."}, ConfigError, "freeze = '.' leaves nothing to train"),
        ({"freeze": FIRST, "algorithm": "sglr"}, CutError, "cannot work with a frozen client part"),
        ({"freeze": r"^[24]\.", "algorithm": "slr"}, CutError, "cannot work with a frozen server part"),
        (
            {"freeze": "bias", "param_groups": ({"match": "bias", "lr": 2.0},)},
            ConfigError,
            "matches none of the trained parameters: they are 0.weight, 2.weight, 4.weight",
        ),
    ],
)
def test_what_cannot_be_frozen(options: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=re.escape(said)):
        run_of(**{"algorithm": "psl", **options})


def test_preparing_leaves_the_users_model_as_it_is() -> None:
    model = smooth()
    config = RunConfig.of({"algorithm": "psl", "cut": "1", "clients": 2, "partition": "column", "freeze": FIRST})
    prepare(config, model, random_source((4, 4)))
    assert all(p.requires_grad for p in model.parameters())
