"""Hostile clients in simulations: exact, equal in all engines, without more bytes, and named in the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import call, client_state, difference, make, mlp, server_state, source
from torch import Tensor

from cutlayer import Comparison, ConfigError, Run, RunConfig
from cutlayer.attacks import Attack, Attacks, attack, of
from cutlayer.attacks.hostile import HostileCohort, with_targets
from cutlayer.data.samples import Samples
from cutlayer.folder import RESULT
from cutlayer.gradients import own
from cutlayer.remote.sides import remote_training, worker_of
from cutlayer.remote.transports.memory import MemoryCarrier
from cutlayer.screened import ScreenedCohort

SIZES = (10, 6, 7, 9)
EACH = [
    ("psl", "scale:50@1"),
    ("psl", "features@1,3"),
    ("psl", "labels:0.5@0-2"),
    ("sglr", "sign:2@1"),
    ("sfl", "scale:50@1"),
    ("sfl", "poison:3@1"),
    ("sflv1", "poison:-3@1"),
    ("sflv2", "sign@3"),
    ("usfl", "poison:3@1"),
    ("upsl", "scale:3@1"),
    ("fl", "sign@1"),
    ("fl", "labels@2"),
]


def config(algorithm: str, *attacks: str, **options: Any) -> RunConfig:
    values: dict[str, Any] = {"batch": 4, "client_lr": 0.05, "rounds": 3, "participation": 0.8, "partition": "column"}
    cut = {} if algorithm == "fl" else {"cut": "2"}
    if algorithm in ("upsl", "usfl"):
        cut = {"cut": "0", "tail_cut": "3"}
    values |= {"precision": "float64", **cut, **options}
    return RunConfig(algorithm=algorithm, clients=len(SIZES), attack=attacks, **values)


def run(c: RunConfig, **more: Any) -> Run:
    made = Run(c, model=make(mlp), data=source(SIZES, (6,)), **more)
    made.run()
    return made


def trained(found: Run) -> list[dict[str, Any]]:
    """The bytes of training. Evaluation is left out, since it skips the models of hostile clients."""
    return [row for row in found.training.ledger.table() if row["kind"] != "evaluation"]


def hostile(found: Run) -> Any:
    """The cohort that makes clients hostile."""
    cohort: Any = found.training.clients
    while not isinstance(cohort, HostileCohort):
        cohort = cohort.inner
    return cohort


@pytest.mark.parametrize(("algorithm", "named"), EACH)
def test_engines_are_attacked_alike_and_no_byte_more_moves(algorithm: str, named: str) -> None:
    """The attack changes the result."""
    local, stacked = (run(config(algorithm, named, engine=engine)) for engine in ("local", "stacked"))
    honest = run(config(algorithm, engine="local"))
    assert [one.training.engine for one in (local, stacked)] == ["local", "stacked"]
    for k in range(len(SIZES)):
        assert difference(client_state(local, k), client_state(stacked, k)) < 1e-9
    assert difference(server_state(local), server_state(stacked)) < 1e-9
    assert local.evaluations[-1].test_loss == pytest.approx(stacked.evaluations[-1].test_loss, rel=1e-9)
    assert local.training.ledger.table() == stacked.training.ledger.table()
    assert trained(local) == trained(honest)
    changed = (
        difference(client_state(local), client_state(honest)),
        difference(server_state(local), server_state(honest)),
    )
    assert max(changed) > 1e-6


@pytest.mark.parametrize("algorithm", ["sfl", "ssl"])
def test_an_attacked_run_is_resumed_exactly(algorithm: str, tmp_path: Path) -> None:
    """Random draws depend on round and step, and the models that clients received are stored. SSL has one model."""
    c = config(algorithm, "poison:2@1", "labels@2", checkpoint_every=1)
    quiet = run(c)
    broken = Run(c, model=make(mlp), data=source(SIZES, (6,)), out=tmp_path / "run")
    for record in broken:
        if record.round == 2:
            break
    resumed = Run.resume(tmp_path / "run", model=make(mlp), data=source(SIZES, (6,)))
    resumed.run()
    assert difference(client_state(quiet), client_state(resumed)) == 0
    assert difference(server_state(quiet), server_state(resumed)) == 0


# The effect of each attack


def begun(algorithm: str, named: str, **options: Any) -> tuple[Any, Any]:
    """An attacked cohort and one without attack, at the beginning of a round."""
    options = {"participation": 1.0, "engine": "local", **options}
    found = []
    for attacks in ((named,), ()):
        made = Run(config(algorithm, *attacks, **options), model=make(mlp), data=source(SIZES, (6,)))
        cohort: Any = made.training.clients
        cohort.begin_round(0, 1, 1.0)
        found.append(cohort)
    return found[0], found[1]


def test_scaled_smashed_data() -> None:
    attacked, plain = begun("psl", "scale:50@1,3")
    mine, theirs = attacked.forward(), plain.forward()
    factors = torch.tensor([{1: 50.0, 3: 50.0}.get(k, 1.0) for k in mine.owner.tolist()]).view(-1, 1)
    torch.testing.assert_close(mine.rows[0], theirs.rows[0] * factors.double())
    assert torch.equal(mine.labels, theirs.labels)


@pytest.mark.filterwarnings("ignore:client 1 deviates")
def test_numbers_stay_finite() -> None:
    attacked, _ = begun("psl", "scale:1e308@1", precision="float32")
    rows = attacked.forward().only(1).rows[0]
    assert bool(torch.isfinite(rows).all())
    assert rows.abs().max().item() == torch.finfo(torch.float32).max


def test_random_features_look_like_real_ones() -> None:
    attacked, plain = begun("psl", "features:2@1", batch=6)
    mine, theirs = (cohort.forward().only(1).rows[0] for cohort in (attacked, plain))
    assert not torch.allclose(mine, theirs)
    assert mine.mean().item() == pytest.approx(theirs.mean().item(), abs=theirs.std().item())
    assert mine.std().item() == pytest.approx(2 * theirs.std().item(), rel=0.3)
    again, _ = begun("psl", "features:2@1", batch=6)
    assert torch.equal(again.forward().only(1).rows[0], mine)


def test_draws_are_named_by_round_and_step() -> None:
    """A resumed run draws like an uninterrupted one, and each step draws something else."""
    cohort = hostile(Run(config("psl", "features@1,2"), model=make(mlp), data=source(SIZES, (6,))))

    def drawn(index: int) -> list[int]:
        cohort.begin_round(index, 3, 1.0)
        return [
            cohort._draw(what, k).initial_seed() for what, k in (("rows", 1), ("rows", 1), ("rows", 2), ("update", 1))
        ]

    first, second = drawn(0), drawn(1)
    assert len({*first, *second}) == 8
    assert drawn(0) == first


def test_a_flipped_sign_climbs() -> None:
    """A step of plain descent goes equally far in the opposite direction. Steps of other clients do not change."""
    ends = []
    for named in ((), ("sign@1",), ("sign:3@1",)):
        c = config("psl", *named, client_optimizer="sgd", rounds=1, batch=10, participation=1.0, engine="local")
        ends.append(run(c))
    start = Run(config("psl"), model=make(mlp), data=source(SIZES, (6,)))
    plain, sign, steep = (
        [{n: t - client_state(start)[n] for n, t in client_state(one, k).items()} for k in (0, 1)] for one in ends
    )
    assert difference(plain[0], sign[0]) == 0
    for name, moved in plain[1].items():
        torch.testing.assert_close(sign[1][name], -moved)
        torch.testing.assert_close(steep[1][name], -3 * moved)


def by_hand(algorithm: str, named: str, update: Any, **options: Any) -> None:
    """Compares the average of an attacked round with that of an honest round with one changed model."""
    c = config(algorithm, rounds=1, participation=1.0, engine="local", **options)
    start = client_state(Run(c, model=make(mlp), data=source(SIZES, (6,))))
    plain = Run(c, model=make(mlp), data=source(SIZES, (6,)))
    cohort: Any = plain.training.clients
    cohort.begin_round(0, 1, 1.0)
    cohort.fit()
    models = [dict(cohort.model_state(k)) for k in range(len(SIZES))]
    models[1] = {name: start[name] + update(t - start[name]) for name, t in models[1].items()}
    expected = {n: sum(m[n] * size for m, size in zip(models, SIZES, strict=True)) / sum(SIZES) for n in start}
    attacked = run(config(algorithm, named, rounds=1, participation=1.0, engine="local", **options))
    assert difference(client_state(attacked), expected) < 1e-10


@pytest.mark.parametrize(("named", "factor"), [("scale:7@1", 7), ("poison:-3@1", -3), ("sign:2@1", -2)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_updates_are_multiplied(named: str, factor: float, accumulate: int) -> None:
    by_hand("fl", named, lambda update: factor * update, accumulate=accumulate)


def test_a_batch_that_waits_makes_its_step_before_the_model_leaves() -> None:
    """A model is averaged in the middle of a round, after the step of a batch that was accumulated."""
    ends = []
    for cohort in begun("sfl", "poison:-3@1", client_optimizer="sgd", accumulate=2):
        start = {name: t.clone() for name, t in cohort.model_state(1).items()}
        smashed = cohort.forward()
        cohort.backward(own(tuple(torch.ones_like(r) for r in smashed.rows), smashed))
        cohort.average({1: 1.0})
        ends.append({name: t - start[name] for name, t in cohort.model_state(1).items()})
    attacked, plain = ends
    assert max(t.abs().max().item() for t in plain.values()) > 1e-3
    assert difference(attacked, {name: -3 * t for name, t in plain.items()}) < 1e-12


def test_noise_is_as_long_as_it_says() -> None:
    found = {}
    for named in ((), ("poison:3@1",)):
        made = Run(config("fl", *named, rounds=1, participation=1.0), model=make(mlp), data=source(SIZES, (6,)))
        cohort: Any = made.training.clients
        start = {n: t.clone() for n, t in cohort.model_state(1).items()}
        cohort.begin_round(0, 1, 1.0)
        cohort.fit()
        if named:
            hostile(made)._leave(1)
        moved = [(cohort.model_state(1)[n] - start[n]).flatten() for n in start]
        found[named] = torch.linalg.vector_norm(torch.cat(moved)).item()
    assert found["poison:3@1",] == pytest.approx(3 * found[()])


def test_labels_are_flipped() -> None:
    samples = Samples(torch.zeros(10, 1), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, -100, 3]))
    owners = [torch.arange(4).numpy(), torch.arange(4, 10).numpy()]

    def flipped(named: str, classes: int = 4, y: Tensor = samples.y) -> list[float]:
        attacks = of(config("psl", named))
        found: list[float] = with_targets(Samples(samples.x, y), owners, attacks, classes).y.tolist()
        return found

    assert flipped("labels@1") == [0, 1, 2, 3, 3, 2, 1, 0, -100, 0]
    assert sum(a != b for a, b in zip(flipped("labels:0.5@0"), samples.y.tolist(), strict=True)) == 2
    quantities = torch.arange(10.0)
    shuffled = flipped("labels@1", 0, quantities)
    assert shuffled[:4] == [0, 1, 2, 3]
    assert sorted(shuffled) == list(range(10))
    assert shuffled != quantities.tolist()
    assert samples.y.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, -100, 3]  # unchanged


def test_scores_are_those_of_the_honest() -> None:
    """In means, in the scores of each client, and on the clients' own test rows."""
    found = run(config("psl", "scale:9@1", "sign@3", evaluate_on="both", own_test=0.5, participation=1.0))
    assert {k for e in found.by_client.values() if e is not None for k in e.scores} == {0, 2}
    assert found.training.remarks[0] == (
        "Attacked: scale:9@1, sign@3; clients 1, 3 are hostile, scores are those of the other 2"
    )
    everyone = run(config("psl", "labels@0-3", participation=1.0))
    assert set(everyone.by_client["global"].scores) == {0, 1, 2, 3}  # type: ignore[union-attr]
    assert everyone.training.remarks[0].endswith("no client is honest")


def test_rows_are_looked_at_where_somebody_attacks() -> None:
    with pytest.warns(UserWarning, match="client 1 deviates"):
        found = run(config("psl", "scale:1000@1", participation=1.0, rounds=1))
    cohort: Any = found.training.clients
    while not isinstance(cohort, ScreenedCohort):
        cohort = cohort.inner


# Statements in results, and refusals


def test_an_attacked_run_does_not_look_like_an_honest_one(tmp_path: Path) -> None:
    line = ["--model", "mlp", "--rounds", "1", "--clients", "3", "--samples-per-client", "20"]
    done = call("run", "--algorithm", "psl", "--attack", "labels@1", "sign@2", *line, "--out", "run", cwd=tmp_path)
    assert "Attacked: labels@1, sign@2; clients 1, 2 are hostile, scores are those of the other 1" in done.stdout
    assert "PSL (attacked: labels@1, sign@2) (stacked engine)" in " ".join(done.stdout.split())
    assert json.loads((tmp_path / "run" / RESULT).read_text())["attack"] == ["labels@1", "sign@2"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "PSL (attacked: labels@1, sign@2) trained" in page
    assert "Models of hostile clients are left out." in page
    assert "attack = [" in (tmp_path / "run" / "config.toml").read_text()


def test_a_comparison_names_what_is_attacked() -> None:
    variants: dict[str, dict[str, Any]] = {"hit": {"algorithm": "psl", "attack": ["sign@1"]}}
    options: dict[str, Any] = {"model": "mlp", "rounds": 1, "clients": 3, "samples_per_client": 20, "seeds": (0,)}
    rows = Comparison(algorithms=("psl",), variant=variants, **options).run()
    assert [row.title for row in rows] == ["PSL", "hit (attacked: sign@1)"]


def test_deployments_refuse() -> None:
    c = config("psl", "sign@1")
    for start in (lambda: worker_of(c, 0, name="client-0"), lambda: remote_training(c, MemoryCarrier({}), [0] * 4)):
        with pytest.raises(ConfigError, match="attack = sign@1 simulates hostile clients"):
            start()


@pytest.mark.parametrize(
    ("algorithm", "named", "words"),
    [
        ("psl", "scale:2", "'scale:2' does not name the clients that attack: write NAME:PARAMETER@CLIENTS"),
        ("psl", "scael:2@1", "unknown attack 'scael': did you mean 'scale'?"),
        ("psl", "scale:much@1", "the parameter 'much' is not a finite number"),
        ("psl", "scale:inf@1", "the parameter 'inf' is not a finite number"),
        ("psl", "scale@4", "there is no client 4 among 4, 0 to 3"),
        ("psl", "scale@2-1", "there is no client 2-1 among 4"),
        ("psl", "scale@one", "'one' does not name clients: write numbers or ranges, e.g. 0,4-6"),
        ("psl", "labels:2@1", "the parameter 2 is not a fraction of its rows"),
        ("fl", "poison:0@1", "the parameter 0 is not possible"),
        ("psl", "poison@1", "has no effect on psl: it changes models that leave a client"),
        ("fl", "features@1", "has no effect on fl: it changes smashed data"),
        ("cl", "labels@0", "has no effect on cl"),
    ],
)
def test_errors(algorithm: str, named: str, words: str) -> None:
    options = {} if algorithm == "cl" else {"participation": 1.0}
    with pytest.raises(ConfigError) as raised:
        Run(algorithm=algorithm, model="mlp", clients=4, rounds=1, attack=(named,), **options)
    assert words in str(raised.value)


def test_who_is_named() -> None:
    attacks = of(config("psl", "scale:2@0,2-3", "sign@2"))
    assert attacks.clients == ((0, 2, 3), (2,))
    assert attacks.hostile == (0, 2, 3)
    assert not Attacks()
    assert [one.parameter for one in attacks.made] == [2.0, 1.0]


@attack("crops")
class Crops(Attack):
    """Sends fewer rows."""

    def rows(self, rows: tuple[Tensor, ...], draw: torch.Generator) -> tuple[Tensor, ...]:
        """All rows except the first."""
        return tuple(r[1:] for r in rows)


def test_an_attack_of_ones_own_keeps_shapes() -> None:
    with pytest.raises(ConfigError, match=r"`rows` of the attack 'crops' makes tensors of the shapes .*: return those"):
        run(config("psl", f"{Path(__file__)}:Crops@1", participation=1.0))
