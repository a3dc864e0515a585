"""Several ranks train one run: the result equals that of one process, in double precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rank import DEFAULTS, SIZES, Case, Outcome, difference, together, trained
from support import ALGORITHMS, CLASSES, made, u_shaped

from cutlayer import RunConfig, build, plugins
from cutlayer.allocator import sharing
from cutlayer.collective import World
from cutlayer.costs.plan import plan
from cutlayer.engine.distributed import drawn_of, refuse
from cutlayer.engine.replicas import packed, unpacked
from cutlayer.engine.shares import spans
from cutlayer.errors import ConfigError
from cutlayer.options import PlanConfig
from cutlayer.stored import MalformedError

CLOSE = 1e-10
SPREAD = [name for name in ALGORITHMS if plugins.find("algorithm", name).facts["spreads"]]
MOMENTUM = {"server_lr": 0.01, "server_optimizer": "sgd", "server_optimizer_options": {"momentum": 0.5}}
OWN: dict[str, dict[str, Any]] = {
    "smofi": MOMENTUM,
    **{name: {"alpha": 0.5} for name in ("slr", "sglr", "usglr", "cyclesglr")},
}
UNLIKE = {"class_weights": [3.0, 1.0, 0.5, 2.0]}
LINK = {"client_device": "raspberry-pi-4", "up_mbps": 10.0, "down_mbps": 50.0}


def case(algorithm: str, **options: Any) -> Case:
    """The options of a run of this algorithm."""
    tail = {"cut": "0", "tail_cut": "2"} if u_shaped(algorithm) else {}
    return {"algorithm": algorithm, **OWN.get(algorithm, {}), **tail, **options}


# All kinds of data, models and options that may change a step that ranks share.
WIDE: dict[str, Case] = {
    **{f"{name}, {engine}": case(name, engine=engine) for name in SPREAD for engine in ("auto", "local")},
    "one takes part": case("sgl", participation=0.2, rounds=10),
    "two train copies": case("sflv1", participation=0.4, local_steps=2, rounds=10, client_optimizer="adam"),
    "two with tails": case("usglr", participation=0.4, rounds=12),
    "two sum gradients": case("gpsl", participation=0.4, rounds=12),
    "two whole models": case("fl", participation=0.4, local_steps=2, rounds=10),
    "averaged in each step": case("sfl", participation=0.6, average_every="step"),
    "one sum for all": case("sgl", average_reduce="sum"),
    "one mean for all": case("sglr", phi=0.4, average_over="clients-and-rows"),
    "dropout on both sides": case("psl", own="dropping"),
    "dropout in copies": case("sflv1", own="dropping"),
    "dropout in copies, local": case("sflv1", own="dropping", engine="local"),
    "batch norm on both sides": case("sglr", own="normed"),
    "batch norm in copies": case("sflv1", own="normed"),
    "batch norm in whole models": case("fl", own="normed"),
    "batch norm below": case("sgl", own="norm below"),
    "batch norm below, averaged": case("sfl", own="norm below", average_every="step"),
    "two tensors cross": case("sglr", own="residual cut inside"),
    "images": case("sgl", own="conv cut 2"),
    "codecs": case("sglr", up_codec="int8", down_codec="float16"),
    "codecs with tails": case("usglr", up_codec="float16", down_codec="int8"),
    "compressed": case("sglr", up_codec="int8+zstd", down_codec="float16+zstd"),
    "compressed with tails": case("usfl", up_codec="float16+zstd", down_codec="int8+zstd"),
    "weighted and compressed": case("usglr", up_codec="int8+zstd", down_codec="int8+zstd", **UNLIKE),
    "rows drawn, with tails": case("upsl", sampling="global"),
    "rows drawn for copies": case("sflv1", sampling="proportional"),
    "rows drawn for whole models": case("fl", sampling="global"),
    "several epochs, whole models": case("fl", local_epochs=2),
    "a sparse codec": case("psl", up_codec="top-k:0.3"),
    "noise": case("sgl", defences=["noise"], clip=5.0, gaussian_noise=0.1),
    "noise, local": case("sgl", defences=["noise"], clip=5.0, gaussian_noise=0.1, engine="local"),
    "features dropped": case("psl", defences=["feature-dropout"], feature_dropout=0.2),
    "a penalty": case("sfl", defences=["nopeek"], nopeek=0.1),
    **{f"weighted rows, {name}": case(name, **UNLIKE) for name in ("sglr", "sflv1", "usglr", "gpsl", "scala", "fl")},
    "medians": case("sfl", averaging="median"),
    "medians of copies": case("sflv1", averaging="median", participation=0.4, rounds=10),
    "medians of copies, local": case("sflv1", averaging="median", engine="local"),
    "bounded updates": case("sfl", averaging="norm_bound", norm_multiple=0.9, participation=0.6, rounds=10),
    "bounded updates, local": case("sflv3", averaging="norm_bound", norm_multiple=0.9, engine="local"),
    "bounded updates, whole models": case("fl", averaging="norm_bound", norm_multiple=0.9, own="normed"),
    "trimmed, with tails": case("usfl", averaging="trimmed_mean", trim=0.2),
    "adapters of different ranks": case("psl", own="ranked"),
    "adapters averaged": case("sfl", own="ranked", averaging="products", participation=0.6, rounds=10),
    "adapters averaged, local": case("sfl", own="ranked", averaging="products", engine="local"),
    "adapters of whole models": case("fl", own="ranked", averaging="products"),
    "screened": case("psl", screening="median_bound"),
    "Adam": case("sgl", client_optimizer="adam", server_optimizer="adamw", client_lr=0.01),
    "clipped": case("sglr", client_clip_grad_norm=0.1, server_clip_grad_norm=0.1),
    "accumulated": case("sgl", accumulate=2, server_accumulate=2),
    "accumulated in copies": case("sflv1", accumulate=2, server_accumulate=2),
    "rows drawn from all": case("psl", sampling="global"),
    "rows in proportion": case("sglr", sampling="proportional"),
    "a clock": case("sglr", **LINK),
    "a clock, with tails": case("usfl", **LINK),
    "adjusted on both sides": case("sglr", logit_adjust="both", participation=0.6),
    "adjusted by clients": case("upsl", logit_adjust="client"),
    "frozen": case("psl", freeze="^0"),
    "few are judged": case("sgl", eval_clients=2),
    "own test rows": case("psl", own_test=0.3, evaluate_on="both"),
    "in the order of ranks": case("sglr", deterministic=True),
}
FEW: dict[str, Case] = {
    name: {**WIDE[name], "rounds": 1}
    for name in (
        "cyclesfl, local",
        "sflv1, auto",
        "two with tails",
        "gpsl, auto",
        "noise",
        "weighted rows, sglr",
        "bounded updates",
        "medians of copies, local",
        "adapters averaged",
    )
}
# One case of each kind: rows that stay on a rank, an additional common gradient, copies on the server, gathered rows,
# tails.
PLANNED: dict[str, Case] = {
    f"planned {name}": {
        "algorithm": name,
        **({"cut": "hidden1", "tail_cut": "hidden3"} if u_shaped(name) else {"cut": "hidden2"}),
        "model": "mlp",
        "partition": "iid",
        "samples_per_client": 10,
        "precision": "float32",
        "rounds": 2,
        "eval_every": 2,
        "checkpoint_every": 2,
        **OWN.get(name, {}),
    }
    for name in ("psl", "sglr", "sflv1", "sflv2", "usfl")
}
SHORT = {**FEW, **PLANNED}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """A few short cases on two ranks."""
    return dict(zip(SHORT, together(2, list(SHORT.values()), tmp_path_factory.mktemp("two")), strict=True))


@pytest.mark.parametrize("name", FEW)
def test_two_ranks_give_what_one_process_gives(name: str, few: Mapping[str, Outcome]) -> None:
    assert difference(trained(FEW[name]), few[name]) <= CLOSE


def test_who_has_left_the_ranks_has_the_machine_alone_again(few: Mapping[str, Outcome]) -> None:
    """This process was one of two ranks; now all free memory belongs to it again."""
    assert few
    assert sharing() == 1


@pytest.mark.parametrize(
    ("name", "own"),
    [("noise", 4 * 8), ("sflv1, auto", None), ("gpsl, auto", 6 * 8 + 8 + 8 * 8 + 8)],
)
def test_what_a_rank_sends_in_a_step(name: str, own: int | None, few: Mapping[str, Outcome]) -> None:
    """Each of two ranks sends as much as it sums: the server's gradient, a loss for each client, and what is `own` to
    the algorithm (SplitAvg's common gradient, or the sum of the clients' gradients). SplitFed V1 sends only losses.
    """
    server = 8 * CLASSES + CLASSES + len(SIZES)
    most = 3  # clients of a rank
    sent = few[name].sent
    assert sent[1] - sent[0] == 8 * (most if own is None else server + own)  # 2 (R - 1) / R = 1


def sends_as_planned(case: Case, outcome: Outcome, ranks: int) -> None:
    """From the first step of one round to that of the next, a rank sends as much as `plan` says for an epoch."""
    assert not outcome.error
    names = ("cut", "tail_cut", "model", "samples_per_client")
    options = {name: case[name] for name in names if name in case}
    sizes = {"clients": DEFAULTS["clients"], "batch": DEFAULTS["batch"], "ranks": ranks}
    (planned,) = plan(PlanConfig.of({**options, **sizes, "input": (1, 8, 8), "algorithms": (case["algorithm"],)})).ranks
    steps = [after - before for before, after in pairwise(outcome.sent)]
    assert len(outcome.sent) == 2 * 3  # each round has steps of 4, 4 and 2 rows
    assert steps[0] == pytest.approx(planned.step, rel=1e-12)
    assert outcome.sent[3] - outcome.sent[0] == pytest.approx(planned.epoch, rel=1e-12)


@pytest.mark.parametrize("name", PLANNED)
def test_ranks_send_what_was_planned(name: str, few: Mapping[str, Outcome]) -> None:
    sends_as_planned(PLANNED[name], few[name], 2)


@pytest.mark.network
def test_three_ranks_send_what_was_planned(tmp_path: Path) -> None:
    for case, outcome in zip(PLANNED.values(), together(3, list(PLANNED.values()), tmp_path), strict=True):
        sends_as_planned(case, outcome, 3)


@pytest.mark.network
@pytest.mark.timeout(600)
@pytest.mark.parametrize("size", [2, 3])
def test_the_proof(size: int, tmp_path: Path) -> None:
    """All algorithms that ranks can share, and everything that changes a step, agree after twenty steps."""
    found = together(size, list(WIDE.values()), tmp_path)
    far = {}
    for (name, options), outcome in zip(WIDE.items(), found, strict=True):
        alone = trained(options)
        assert alone.error or len(alone.facts[0]) >= 14, name
        if (apart := difference(alone, outcome)) > CLOSE:
            far[name] = apart
    assert not far


@pytest.mark.network
@pytest.mark.timeout(600)
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """A run that 2 ranks began is continued by 1 or 3, and a run that 1 rank began by 2."""
    begun = {
        "sgl": case("sgl", own="norm below", client_optimizer_options={"momentum": 0.9}, client_lr=0.01),
        "local": case("sglr", engine="local", participation=0.4, client_optimizer="adam", client_lr=0.01),
        "v1": case("sflv1", client_optimizer="adam", server_optimizer="adam", client_lr=0.01, own="dropping"),
        "within epochs": case("sflv1", local_steps=2, client_optimizer="adam", client_lr=0.01),
        "tails": case("usfl", client_optimizer="adam", client_lr=0.01),
        "cycle": case("cyclesfl", server_optimizer="adam", client_lr=0.01),
        "whole": case("fl", client_optimizer="adam", client_lr=0.01, local_steps=2),
        "bounded": case("sfl", averaging="norm_bound", norm_multiple=0.9, participation=0.6, client_lr=0.05),
    }
    whole = {name: trained(options) for name, options in begun.items()}

    def part(where: str, **more: Any) -> list[Case]:
        return [{**options, "out": str(tmp_path / f"{where} {name}"), **more} for name, options in begun.items()]

    def on(size: int, cases: Sequence[Case]) -> list[Outcome]:
        (folder := tmp_path / f"{size} {len(list(tmp_path.iterdir()))}").mkdir()
        return [trained(one) for one in cases] if size == 1 else together(size, cases, folder)

    for first, then in ((2, 1), (2, 3), (1, 2)):
        where = f"{first} {then}"
        on(first, part(where, stop=3))
        for name, outcome in zip(begun, on(then, part(where, resume=True)), strict=True):
            assert not outcome.error, (where, name, outcome.error)
            close = {
                key: (whole[name].numbers[key] - t).abs().max() for key, t in outcome.numbers.items() if "." in key
            }
            assert max(close.values()) <= CLOSE, (where, name)
            assert outcome.facts[1:] == whole[name].facts[1:], (where, name)


@pytest.mark.network
def test_in_the_order_of_ranks_it_repeats_bit_for_bit(tmp_path: Path) -> None:
    cases = [case("sglr", deterministic=True), case("sflv1", deterministic=True)]
    one, other, again, other_again = together(3, [*cases, *cases], tmp_path)
    assert difference(one, again) == 0
    assert difference(other, other_again) == 0


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name not in SPREAD])
def test_an_algorithm_that_ranks_cannot_share_is_refused(algorithm: str) -> None:
    with pytest.raises(ConfigError, match="2 ranks cannot train this: "):
        refuse(RunConfig(algorithm=algorithm), made(algorithm), clients=5, ranks=2)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"attack": ["0=signs"]}, "attack is not there"),
        ({"judge": "average"}, "judge = 'average' needs the models of all clients"),
        ({"algorithm": "gpsl", "accumulate": 2}, "accumulate = 2 is not there for gpsl"),
        ({"cache_features": True}, "cache_features is not there"),
        ({"client_states": "disk"}, "client_states = 'disk' has no effect on 2 ranks, .*: leave it out, or run one"),
    ],
)
def test_what_ranks_cannot_share_is_refused(options: dict[str, Any], why: str) -> None:
    config = RunConfig(**{"algorithm": "psl", **options})
    with pytest.raises(ConfigError, match=why):
        refuse(config, made(config.algorithm), clients=5, ranks=2)


@pytest.mark.parametrize("options", [{"client_states": "disk"}, {"algorithm": "ssl"}])
def test_it_is_refused_before_anything_is_read(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "world", lambda: World(0, 2))
    config = RunConfig(**{"algorithm": "psl", "data": "there-is-none", **options})
    with pytest.raises(ConfigError, match="2 ranks"):
        build._assembled(config, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_go_along_with_gradients_exactly(dtype: torch.dtype) -> None:
    """Each rank has zeros in the places of the other ranks' losses, so the sum contains them all."""
    own = torch.tensor([1 / 3, 1e-20, -2.5, 1e30, float("inf")], dtype=torch.float64)
    here, there = packed(torch.cat([own, torch.zeros(2)]), dtype), packed(torch.cat([torch.zeros(5), own[:2]]), dtype)
    assert here.dtype == there.dtype == dtype
    assert torch.equal(unpacked(here + there), torch.cat([own, own[:2]]))
    assert unpacked(packed(torch.tensor([float("nan")], dtype=torch.float64), dtype)).isnan().all()


def test_clients_drawn_batches_are_checked_and_found() -> None:
    """The state is found under any number of cohorts around the one that drew the batches."""
    assert drawn_of({"inner": {"inner": {"drawn": [1, 2]}}}, 2) == [1, 2]
    with pytest.raises(MalformedError, match="drawn"):
        drawn_of({"drawn": [1, 2]}, 3)


def test_an_algorithm_that_does_not_say_how_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = made("psl")
    silent = replace(algorithm.entry, facts={**algorithm.entry.facts, "spreads": ""})
    monkeypatch.setattr(type(algorithm), "entry", silent)
    with pytest.raises(ConfigError, match="psl is not registered with `spreads`; start a single process"):
        refuse(RunConfig(algorithm="psl"), algorithm, clients=5, ranks=2)


def test_more_ranks_than_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match="more than the 3 clients; start 3 ranks at most"):
        refuse(RunConfig(algorithm="psl"), made("psl"), clients=3, ranks=4)


def test_clients_are_shared_by_their_samples() -> None:
    assert spans([10] * 6, 3) == [range(2), range(2, 4), range(4, 6)]
    assert spans([90, 1, 1, 1], 2) == [range(1), range(1, 4)]
    assert spans([1, 1, 90], 3) == [range(1), range(1, 2), range(2, 3)]
    assert spans(SIZES, 2) == [range(3), range(3, 5)]


def test_a_rank_without_rows_has_no_mean_to_give() -> None:
    """All ranks know how much a step counts, also the ranks without rows."""
    from cutlayer.gradients import spread

    assert spread([], []).shape == (0,)
    assert torch.equal(spread([0.5, 2.0], [2, 1]), torch.tensor([0.5, 0.5, 2.0], dtype=torch.float64))
