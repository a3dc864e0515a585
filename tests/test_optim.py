"""Optimisers: clipping, accumulation, groups of parameters, and the user's own optimisers, in every engine."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT, call
from torch import Tensor, nn
from torch.nn import functional

from cutlayer import ConfigError, Run
from cutlayer.data.batches import Batches
from cutlayer.errors import CutlayerWarning, RefusedError
from cutlayer.options import RunConfig
from cutlayer.seeds import torch_seeded
from cutlayer.testing.algorithm_checks import check_algorithm
from cutlayer.testing.deployed import in_memory, train_in_memory
from cutlayer.testing.material import demand_equal, random_source, smooth

ALGORITHMS = ["cl", "fl", "psl", "ssl", "ussl", "sfl", "sflv1", "sflv2", "sflv3", "sglr"]
WHOLE = ("cl", "fl")
KINDS = ["fl", "psl", "ssl", "sflv1"]  # whole models; a common server; clients in turn; a server copy per client
SGD: dict[str, Any] = {"client_optimizer": "sgd", "client_lr": 0.1, "lr_schedule": "constant"}


def run_of(sizes: tuple[int, ...] = (10, 7), model: Callable[[], nn.Module] = smooth, **options: Any) -> Run:
    common: dict[str, Any] = {"clients": len(sizes), "partition": "column", "batch": 4, "precision": "float64"}
    if options.get("algorithm") not in WHOLE:
        common["cut"] = "1"
    return Run(model=model, data=random_source(sizes), **{**common, "rounds": 2, **options})


def trained(**options: Any) -> dict[str, Any]:
    run = run_of(**options)
    losses = [record.loss for record in run]
    t = run.training
    models = {str(k): dict(t.clients.model_state(k)) for k in range(len(t.clients.samples))}
    return {"engine": t.engine, "losses": losses, "models": models, "server": t.server.state()["model"]}


def alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    for what in ("losses", "models", "server"):
        demand_equal("engines", f"{one['engine']} and {other['engine']} differ", one[what], other[what])


def by_hand(
    size: int, step: Callable[[nn.Module, int, bool], None], rounds: int = 2, batch: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """Plain training of the whole model on client 0's batches.

    Calls `step(model, number, last of the round)` after each backward pass.
    """
    source = random_source((size,))
    with torch_seeded(seed, "model"):
        model = smooth().double()
    batches = Batches([np.arange(size)], batch, seed)
    per_round = -(-size // batch)
    for number in range(rounds * per_round):
        part = source.train[batches.draw([0])[0]]
        functional.cross_entropy(model(part.x), part.y).backward()
        step(model, number % per_round, number % per_round == per_round - 1)
    return dict(model.state_dict())


GROUPS = ({"match": "bias", "weight_decay": 0.0}, {"match": r"^4\.", "lr": 10.0})


# ---- Clipping and accumulation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "optimizer"), [*((a, "adamw") for a in ALGORITHMS), *((a, "sgd") for a in KINDS)]
)
def test_every_engine_clips_accumulates_and_groups_alike(algorithm: str, optimizer: str) -> None:
    """Local, stacked and remote clients agree, and a resumed run equals an uninterrupted one.

    Each of the three options is compared with torch below.
    """
    its = {"weight_decay": 0.1} if optimizer == "sgd" else {"weight_decay": 0.1, "eps": 1e-4}  # limits rounding errors
    options: dict[str, Any] = {"client_clip_grad_norm": 0.05, "accumulate": 2, "param_groups": GROUPS}
    if algorithm not in WHOLE:
        options |= {"server_clip_grad_norm": 0.05, "server_accumulate": 3}
    options |= {"client_lr": 0.1 if optimizer == "sgd" else 0.01}
    check_algorithm(
        algorithm, one_client_is_sgd=False, client_optimizer=optimizer, client_optimizer_options=its, **options
    )


@pytest.mark.parametrize("engine", ["local", "stacked"])
@pytest.mark.parametrize("algorithm", ["fl", "sflv1"])
def test_clipping_is_torchs(algorithm: str, engine: str) -> None:
    """With one client, torch's clip_grad_norm_ is applied to the parameters of each part."""
    limit, rate = 0.1, 0.5

    def step(model: nn.Module, number: int, last: bool) -> None:
        weights = list(model.parameters())
        parts = [weights] if algorithm == "fl" else [weights[:2], weights[2:]]
        for part in parts:
            assert torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) > limit
            torch.nn.utils.clip_grad_norm_(part, limit)
        with torch.no_grad():
            for p in weights:
                assert p.grad is not None
                p -= rate * p.grad
                p.grad = None

    expected = by_hand(8, step)
    server = {} if algorithm == "fl" else {"server_clip_grad_norm": limit}
    found = trained(
        sizes=(8,), algorithm=algorithm, engine=engine, **{**SGD, "client_lr": rate}, client_clip_grad_norm=limit,
        **server,
    )  # fmt: skip
    assert found["engine"] == engine
    model = found["models"]["0"] if algorithm == "fl" else {**found["models"]["0"], **found["server"]}
    demand_equal(algorithm, "not what torch clips to", model, expected)


def test_each_client_and_each_copy_is_clipped_by_itself() -> None:
    """Each of two clients moves by the limit times the rate."""
    both = trained(algorithm="sflv3", sizes=(8, 8), rounds=1, local_steps=1, engine="stacked", **SGD,
                   client_clip_grad_norm=0.03)  # fmt: skip
    free = trained(algorithm="sflv3", sizes=(8, 8), rounds=1, local_steps=1, engine="stacked", **SGD)
    with torch_seeded(0, "model"):
        start = smooth().double().state_dict()

    def moved(found: dict[str, Any], client: str) -> float:
        model = found["models"][client]
        return float(sum(((model[n] - start[n]) ** 2).sum() for n in model)) ** 0.5

    for client in ("0", "1"):
        assert moved(free, client) > 0.1 * 0.03
        assert moved(both, client) == pytest.approx(0.1 * 0.03, rel=1e-4)


@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_the_last_incomplete_group_of_a_round_steps_too(engine: str) -> None:
    """There are three batches per round and two per step, so the last step uses one batch."""

    def step(model: nn.Module, number: int, last: bool) -> None:
        if number % 2 == 0 and not last:
            return
        batches = number % 2 + 1
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p -= 0.1 * p.grad / batches
                p.grad = None

    expected = by_hand(10, step)
    found = trained(sizes=(10,), algorithm="fl", engine=engine, accumulate=2, **SGD)
    demand_equal("fl", "not by hand", found["models"]["0"], expected)
    split = trained(sizes=(10,), algorithm="psl", engine=engine, accumulate=2, **SGD)
    demand_equal("psl", "not by hand", {**split["models"]["0"], **split["server"]}, expected)


def test_two_batches_of_four_are_one_of_eight() -> None:
    """Centralised learning with 16 rows and a model without batch statistics."""
    one = trained(algorithm="cl", sizes=(16,), batch=8, **SGD)
    two = trained(algorithm="cl", sizes=(16,), batch=4, accumulate=2, **SGD)
    demand_equal("cl", "accumulation is not a larger batch", two["models"], one["models"])


def test_each_side_accumulates_its_own_number() -> None:
    run = run_of(
        algorithm="psl", sizes=(16, 16), rounds=1, engine="local", accumulate=4, server_accumulate=2,
        client_optimizer="adam",
    )  # fmt: skip
    run.run()
    assert run.training.server.state()["optimizer"]["state"][0]["step"] == 2
    clients = run.training.clients.state()
    while "inner" in clients:
        clients = clients["inner"]
    assert [c["optimizer"]["state"][0]["step"] for c in clients["clients"]] == [1, 1]


def test_averaging_after_every_step_leaves_nothing_waiting() -> None:
    """The union engine gives the same result as the local one: no gradients wait after an averaging."""
    options: dict[str, Any] = {"algorithm": "sfl", "average_every": "step", "accumulate": 3, **SGD}
    union, local = trained(**options), trained(**options, engine="local")
    assert union["engine"] == "union"
    alike(union, local)
    v1: dict[str, Any] = {"algorithm": "sflv1", "local_steps": 1, "accumulate": 3, "rounds": 4, **SGD}
    union, local = trained(**v1), trained(**v1, engine="local")
    assert union["engine"] == "union"
    alike(union, local)


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_clipped_step_of_the_union_is_not_that_of_the_models(side: str) -> None:
    """Each model's own gradient is clipped, so the union step would be wrong and is not used."""
    options: dict[str, Any] = {"algorithm": "sflv1", "local_steps": 1, f"{side}_clip_grad_norm": 0.05, **SGD}
    auto, local = trained(**options), trained(**options, engine="local")
    assert auto["engine"] == "stacked"
    alike(auto, local)


def test_gradients_without_a_step_do_not_disturb_what_waits() -> None:
    """The server may compute gradients between two batches of one step."""
    looked = run_of(algorithm="psl", sizes=(8, 8), server_accumulate=2, **SGD)
    plain = run_of(algorithm="psl", sizes=(8, 8), server_accumulate=2, **SGD)
    server, step = looked.training.server, looked.training.server.step

    def looking(smashed: Any, *rest: Any, **options: Any) -> Any:
        taken = step(smashed, *rest, **options)
        server.gradients(smashed)
        return taken

    server.step = looking  # type: ignore[method-assign]
    assert [r.loss for r in looked] == [r.loss for r in plain]


# ---- Groups of parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["local", "stacked"])
def test_groups_are_torchs(engine: str) -> None:
    """Biases have no decay, the last layer has ten times the rate, and the first matching group counts."""
    groups = ({"match": "bias", "weight_decay": 0.0}, {"match": r"^4\.", "lr": 10.0, "weight_decay": 0.5})

    def step(model: nn.Module, number: int, last: bool) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                assert p.grad is not None
                head = name == "4.weight"
                decay = 0.0 if "bias" in name else 0.5 if head else 0.1
                p -= (0.1 if head else 0.01) * (p.grad + decay * p)
                p.grad = None

    expected = by_hand(8, step)
    found = trained(
        sizes=(8,), algorithm="psl", engine=engine, **{**SGD, "client_lr": 0.01},
        client_optimizer_options={"weight_decay": 0.1}, param_groups=groups,
    )  # fmt: skip
    demand_equal("psl", "not by hand", {**found["models"]["0"], **found["server"]}, expected)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([{"match": "head"}], "match = 'head' matches none of the trained parameters: they are 0.weight, 0.bias, 2."),
        ([{"match": "bias"}, {"match": r"2\.bias"}], "that an earlier group has not taken"),
        ([{"match": "("}], "'(' is not a regular expression"),
        ([{"lr": 2}], "names no parameters: give match"),
        ([{"match": "bias", "rate": 2}], "unknown key 'rate'"),
        ([{"match": "bias", "lr": 0}], "lr = 0 is not possible: it must be a number, greater than 0"),
        ([{"match": "bias", "weight_decay": -1.0}], "weight_decay = -1.0 is not possible"),
    ],
)  # fmt: skip
def test_groups_are_checked_first(groups: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        run_of(algorithm="psl", param_groups=tuple(groups))


def test_a_weight_decay_needs_an_optimizer_that_has_one() -> None:
    with pytest.raises(ConfigError, match="rprop has no weight_decay"):
        run_of(algorithm="psl", client_optimizer="rprop", param_groups=({"match": "bias", "weight_decay": 0.1},))


# ---- Optimisers by name and of one's own ---------------------------------------------------------------------------

OWN = '''
import torch


def adam(params, lr, *, second=0.999):
    """A function that returns one of torch's."""
    return torch.optim.Adam(params, lr=lr, betas=(0.9, second))


class Fading(torch.optim.Optimizer):
    """A momentum that fades: elementwise, with state of its own."""

    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["momentum"] = 0, torch.zeros_like(p)
                state["step"] += 1
                state["momentum"].lerp_(p.grad, 1 - group["beta"])
                p.sub_(state["momentum"] * group["lr"] / state["step"] ** 0.5)


class Normed(Fading):
    """The whole tensor's norm: not elementwise."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad / (p.grad.norm() + 1e-3))


class Counting(Fading):
    """A count that is not in its state."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad / self.count)


def head_first(params, lr):
    """Groups of its own."""
    params = list(params)
    return torch.optim.SGD([{"params": params[:1], "lr": 3 * lr}, {"params": params[1:]}], lr=lr)


def nothing(params, lr):
    return None


def broken(params, lr):
    raise KeyError("momentum")
'''


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return str(path)


@pytest.mark.parametrize("spelling", ["Adam", "adam", "torch.optim.Adam", "torch.optim:Adam", torch.optim.Adam])
def test_torchs_optimizers_by_any_spelling(spelling: Any) -> None:
    """The configuration has one name, which both sides of a deployment compare."""
    found = run_of(algorithm="psl", client_optimizer=spelling)
    assert found.config.client_optimizer == "adam"
    assert found.training.engine == "stacked"


@pytest.mark.filterwarnings("ignore:.*runs on the local engine")
@pytest.mark.parametrize(
    ("algorithm", "name", "engine"),
    [
        *((algorithm, "Fading", "stacked") for algorithm in KINDS),
        *((algorithm, "Normed", "local") for algorithm in ("psl", "sflv1")),
        ("psl", "adam", "stacked"),
    ],
)
def test_an_optimizer_of_ones_own_in_every_engine(own: str, algorithm: str, name: str, engine: str) -> None:
    """Given by its file. It is stacked only if the proof shows that each client steps as it would alone."""
    check_algorithm(algorithm, one_client_is_sgd=False, client_optimizer=f"{own}:{name}", client_lr=0.01)
    if algorithm == "psl":
        assert run_of(algorithm=algorithm, client_optimizer=f"{own}:{name}").training.engine == engine


@pytest.mark.parametrize("name", ["Normed", "Counting"])
def test_why_an_optimizer_is_not_stacked(own: str, name: str) -> None:
    said = (
        f"psl runs on the local engine: the rule of {own}:{name} is not elementwise: it does not step stacked tensors"
    )
    with pytest.warns(CutlayerWarning, match=re.escape(said)):
        assert run_of(algorithm="psl", client_optimizer=f"{own}:{name}").training.engine == "local"


def test_its_options_and_its_own_groups(own: str) -> None:
    """Options are those of each side's table. A group's own rate remains a multiple of the scheduled rate."""
    run = run_of(
        algorithm="psl", client_optimizer=f"{own}:Fading", client_optimizer_options={"beta": 0.5},
        server_optimizer=f"{own}:head_first", server_lr=0.1, lr_schedule="step", lr_decay_at=(0.5,),
    )  # fmt: skip
    run.run()
    groups = run.training.server.state()["optimizer"]["param_groups"]
    assert [g["lr"] for g in groups] == pytest.approx([0.03, 0.01])
    with pytest.raises(ConfigError, match=r"unknown option of .*Fading"):
        run_of(algorithm="psl", client_optimizer=f"{own}:Fading", client_optimizer_options={"gamma": 1})


def test_one_from_python() -> None:
    """A function and a class."""

    def slow(params: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr)

    alike(
        trained(algorithm="psl", **{**SGD, "client_optimizer": slow}),
        trained(algorithm="psl", **SGD),
    )
    found = run_of(algorithm="psl", client_optimizer=torch.optim.RMSprop, client_optimizer_options={"alpha": 0.5})
    assert found.config.client_optimizer == "rmsprop"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "gives NoneType: return a torch.optim.Optimizer"),
        ("broken", "refuses: KeyError: 'momentum'; correct it or its options"),
        ("torch", "is not registered"),
        ("missing", "unknown optimizer"),
    ],
)
def test_what_is_not_an_optimizer_is_found_first(own: str, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        run_of(algorithm="psl", client_optimizer=f"{own}:{name}")


def test_in_a_deployment_each_side_reads_its_own_file(own: str, tmp_path: Path) -> None:
    """Files with the same text at two places agree; files with different texts do not."""
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "copy.py").write_text(OWN)

    def config(path: Path | str) -> RunConfig:
        return RunConfig.of(
            {"algorithm": "psl", "cut": "1", "clients": 2, "partition": "column", "batch": 4, "rounds": 1,
             "precision": "float64", "client_optimizer": f"{path}:Fading"}
        )  # fmt: skip

    data = random_source((8, 8))
    here = train_in_memory(config(own), model=smooth, data=data)

    def workers() -> Any:
        return in_memory(config(other / "copy.py"), model=smooth, data=data).workers

    there = in_memory(config(own), model=smooth, data=data, workers=workers()).run
    there.run()
    assert there.evaluations[-1].test_loss == here.evaluations[-1].test_loss
    (other / "changed.py").write_text(OWN + "\n# another text\n")
    changed = in_memory(config(other / "changed.py"), model=smooth, data=data).workers
    with pytest.raises(RefusedError, match="code of the optimizer"):
        in_memory(config(own), model=smooth, data=data, workers=changed).run.run()


def test_state_of_ones_own_is_resumed(own: str, tmp_path: Path) -> None:
    """Bit for bit, also if the optimiser travels with the model."""
    for algorithm, extra in (("psl", {}), ("ssl", {"hand_over_optimizer": True})):
        check_algorithm(algorithm, one_client_is_sgd=False, client_optimizer=f"{own}:Fading", client_lr=0.01, **extra)


def test_the_page_on_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's file is written, its commands run, and its TOML is read."""
    page = (ROOT / "docs/training.md").read_text()
    (program,) = re.findall(r"```python\n# fading\.py\n(.*?)```", page, re.DOTALL)
    commands = [c for c in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if "--jobs" not in c]  # in test_crew
    (tmp_path / "fading.py").write_text(program)
    assert len(commands) == 3
    for command in commands:
        call(*shlex.split(command.replace("\\\n", ""))[1:], cwd=tmp_path)
    (groups,) = re.findall(r"```toml\n(param_groups.*?)```", page, re.DOTALL)
    (tmp_path / "groups.toml").write_text(groups)
    call("run", "--config", "groups.toml", "--model", "mlp", "--rounds", "1", "--clients", "2", cwd=tmp_path)


def test_groups_as_flags(tmp_path: Path) -> None:
    """One or more tables in JSON. The run's folder stores them as tables of TOML."""
    groups = ('{"match": "bias", "weight_decay": 0}', '{"match": "weight", "lr": 0.5}')
    line = ("--model", "mlp", "--rounds", "1", "--clients", "2", "--samples-per-client", "16")
    call("run", *line, "--client-optimizer", "adamw", "--param-groups", *groups, "--out", "run", cwd=tmp_path)
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert stored["param_groups"] == [{"match": "bias", "weight_decay": 0}, {"match": "weight", "lr": 0.5}]
