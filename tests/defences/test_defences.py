"""What clients do to their smashed data before sending them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import difference  # type: ignore[import-not-found]
from test_remote import OWN, SMALL, remote, same

from cutlayer import ConfigError, Run, defences
from cutlayer.build import assemble
from cutlayer.defences import Defences
from cutlayer.defences.defended import DefendedCohort
from cutlayer.defences.feature_dropout import FeatureDropout
from cutlayer.defences.noise import Noise
from cutlayer.defences.nopeek import NoPeek, distance_correlation
from cutlayer.defences.watch import Watch
from cutlayer.leakage.ranks import dcor_library
from cutlayer.options import RunConfig

STRONG = {"clip": 0.5, "gaussian_noise": 0.2, "feature_dropout": 0.3, "nopeek": 0.5}


def protection(
    seed: int = 0,
    clip: float | None = None,
    gaussian: float = 0.0,
    laplace: float = 0.0,
    dropout: float = 0.0,
    nopeek: float = 0.0,
) -> Defences:
    """The built-in defences, in another order than that in which they are applied."""
    noise = Noise(clip=clip, gaussian_noise=gaussian, laplace_noise=laplace)
    return Defences(seed, (NoPeek(nopeek=nopeek), noise, FeatureDropout(feature_dropout=dropout)))


def step(defence: Defences, *rows: torch.Tensor, sizes: tuple[int, ...] = (3, 2)) -> Any:
    clients = tuple(range(len(sizes)))
    x = [torch.arange(4.0 * n).view(n, 4) for n in sizes]
    return defence.step(rows, x, clients, sizes, [0] * len(sizes))


@settings(deadline=None, max_examples=60)
@given(
    clip=st.floats(1e-3, 1e3),
    laplace=st.booleans(),
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 2**31),
    dropout=st.sampled_from([0.0, 0.5]),
)
def test_nothing_sent_is_longer_than_the_clip(
    clip: float, laplace: bool, scale: float, seed: int, dropout: float
) -> None:
    """The length is that before noise, over all tensors that cross. Shorter samples and directions do not change."""
    g = torch.Generator().manual_seed(seed)
    one, two = (torch.randn(5, *shape, generator=g) * scale for shape in ((2, 3), (4,)))
    # Noise of this scale is lost in rounding: clipping uses Laplace's norm, and no noise is visible.
    defence = protection(seed=1, clip=clip, laplace=1e-30 if laplace else 0.0, dropout=dropout)
    bare = step(protection(seed=1, clip=1e30, dropout=dropout), one, two).rows
    sent = step(defence, one, two).rows
    flat, before = (torch.cat([r.flatten(1) for r in rows], 1) for rows in (sent, bare))
    order = 1 if laplace else 2
    lengths = torch.linalg.vector_norm(before, order, 1)
    assert (torch.linalg.vector_norm(flat, order, 1) <= clip * (1 + 1e-5)).all()
    short = lengths < clip * (1 - 1e-5)
    torch.testing.assert_close(flat[short], before[short])
    torch.testing.assert_close(flat, before * (clip / lengths.clamp(min=clip))[:, None], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_noise_has_the_deviation_asked_for(kind: str) -> None:
    defence = protection(seed=3, clip=2.0, **{kind: 0.25})
    sent = step(defence, torch.zeros(5, 20000)).rows[0]
    expected = 0.5 * (2**0.5 if kind == "laplace" else 1)
    assert float(sent.std()) == pytest.approx(expected, rel=0.02)
    assert float(sent.mean()) == pytest.approx(0, abs=0.01)
    # The share beyond three scales is that of the distribution.
    beyond = float((sent.abs() > 1.5).float().mean())
    assert beyond == pytest.approx(0.0498 if kind == "laplace" else 0.0027, rel=0.2)


@pytest.mark.parametrize(("noise", "order"), [("gaussian_noise", 2), ("laplace_noise", 1)])
def test_without_noise_the_norm_stays(noise: str, order: int) -> None:
    made = Noise(clip=1.0, **{noise: 0.5})
    rows = torch.randn(20, 30)
    (sent,) = made.silent.protect((rows,), [20], [torch.Generator()])
    lengths = torch.linalg.vector_norm(sent, order, 1)
    assert lengths.max() == pytest.approx(1.0, rel=1e-5)
    assert lengths.min() == pytest.approx(1.0, rel=1e-5)  # rows of 30 numbers are longer in both norms
    assert torch.equal(sent, made.clipped((rows,))[0])
    assert made.silent.exact
    assert not made.exact


def test_dropped_features_keep_their_mean() -> None:
    """Two fifths of the features become zero, and the others are scaled up."""
    sent = step(protection(seed=3, dropout=0.4), torch.full((5, 20000), 3.0)).rows[0]
    kept = sent != 0
    assert float(kept.float().mean()) == pytest.approx(0.6, rel=0.02)
    torch.testing.assert_close(sent[kept], torch.full_like(sent[kept], 5.0))
    assert float(sent.mean()) == pytest.approx(3, rel=0.02)


def test_noise_is_new_for_every_sample_client_and_batch() -> None:
    defence, rows = protection(seed=3, clip=1.0, gaussian=1.0), torch.zeros(6, 50)
    draws = [defence.step((rows,), [rows], [k], [6], [clock]).rows[0] for k in (0, 1) for clock in (0, 1)]
    draws.append(defence.evaluation((rows,), [0], 0)[0])
    draws.append(defence.evaluation((rows,), [0], 6)[0])
    every = torch.cat(draws)
    similar = torch.corrcoef(every) - torch.eye(len(every))
    assert float(similar.abs().max()) < 0.6
    again = defence.step((rows,), [rows], [0], [6], [0]).rows[0]
    assert torch.equal(again, draws[0])


def test_the_way_back_is_the_derivative() -> None:
    """Gradients through dropout and clipping are compared with finite differences."""
    defence = protection(seed=5, clip=1.0, dropout=0.4, gaussian=0.1)
    rows = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found,) = step(defence, rows).back((weights,))
    expected, h = torch.zeros_like(rows), 1e-6
    for i in range(5):
        for j in range(6):
            bent = [rows.clone(), rows.clone()]
            bent[0][i, j] += h
            bent[1][i, j] -= h
            up, down = (float((step(defence, b).rows[0] * weights).sum()) for b in bent)
            expected[i, j] = (up - down) / (2 * h)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_whole_numbers_are_not_touched() -> None:
    whole = torch.arange(10).view(5, 2)
    guarded = step(protection(seed=1, clip=0.1, gaussian=1.0, dropout=0.5), torch.ones(5, 3), whole)
    assert torch.equal(guarded.rows[1], whole)
    assert len(guarded.back((torch.ones(5, 3),))) == 1


def dependent() -> tuple[np.ndarray, np.ndarray]:
    """Two samples, one of which depends on the other: [40, 3] and [40, 5]."""
    g = np.random.default_rng(0)
    x, z = g.normal(size=(40, 3)), g.normal(size=(40, 5))
    z[:, :2] += x[:, :2] ** 2
    return x, z


def test_distance_correlation_is_as_defined() -> None:
    """Szekely, Rizzo & Bakirov 2007, definition 3: by products of doubly centred distances."""
    x, z = dependent()

    def centred(rows: np.ndarray) -> np.ndarray:
        d = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in rows] for a in rows])
        return d - d.mean(0) - d.mean(1)[:, None] + d.mean()

    a, b = centred(x), centred(z)
    expected = np.sqrt((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean()))
    assert float(distance_correlation(torch.from_numpy(x), torch.from_numpy(z))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.long
def test_distance_correlation_is_the_librarys() -> None:
    x, z = dependent()
    ours = float(distance_correlation(torch.from_numpy(x), torch.from_numpy(z)))
    assert ours == pytest.approx(dcor_library().distance_correlation(x, z), rel=1e-9)


def test_nopeek_adds_the_penaltys_slope() -> None:
    """Each client's slope does not depend on the other clients. Equal samples have a slope of 0 and cause no NaN."""
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(n, 4, generator=g) for n in (6, 5)]
    z = torch.randn(11, 3, generator=g)
    x[1][1], z[7] = x[1][0], z[6]
    gradient = torch.randn(11, 3, generator=g)
    (found,) = protection(nopeek=0.7).step((z,), x, [0, 1], [6, 5], [0, 0]).back((gradient,))
    parts = []
    for inputs, own in zip(x, z.split([6, 5]), strict=True):
        leaf = own.double().requires_grad_()
        distance_correlation(inputs, leaf).backward()
        parts.append(leaf.grad)
    torch.testing.assert_close(found, gradient + 0.7 * torch.cat(parts).float(), rtol=1e-4, atol=1e-6)
    assert torch.isfinite(found).all()


def test_nopeek_lowers_the_distance_correlation() -> None:
    def correlation(weight: float) -> float:
        options = {**SMALL, "algorithm": "sglr", "rounds": 20, "samples_per_client": 100, "nopeek": weight}
        run = Run(RunConfig.of(options))
        run.run()
        training = run.training
        lower = training.parts.client
        lower.load_state_dict({n: t for n, t in training.clients.model_state(0).items() if n in lower.state_dict()})
        x = training.source.test.x
        with torch.no_grad():
            z = lower.eval()(x)[0]
        return float(distance_correlation(x.flatten(1), z.flatten(1)))

    assert correlation(5.0) < correlation(0.0) - 0.1


@pytest.mark.parametrize("algorithm", ["sglr", "psl", "ssl", "sfl", "sflv1", "sflv2", "sflv3", "slr", "sgl", "ussl"])
def test_a_defence_of_strength_zero_changes_nothing(algorithm: str) -> None:
    none = {"gaussian_noise": 0.0, "laplace_noise": 0.0, "feature_dropout": 0.0, "nopeek": 0.0}
    bare, zero = (
        Run(RunConfig.of({**SMALL, **OWN.get(algorithm, {}), "algorithm": algorithm, **more})) for more in ({}, none)
    )
    assert [r.loss for r in bare] == [r.loss for r in zero]
    assert difference(bare.training.server.model.state_dict(), zero.training.server.model.state_dict()) == 0
    assert [e.test_loss for e in bare.evaluations] == [e.test_loss for e in zero.evaluations]


def test_a_defence_that_is_named_may_be_given_strength_zero() -> None:
    config = RunConfig(defences=("nopeek", "feature-dropout"), nopeek=0.0, feature_dropout=0.5)
    assert [part.entry.name for part in defences.of(config).in_order] == ["feature-dropout"]
    with pytest.raises(ConfigError, match="names 'feature-dropout', which does nothing with the defaults"):
        defences.of(RunConfig(defences=("nopeek", "feature-dropout"), nopeek=0.5))


def test_a_clip_that_nothing_reaches_changes_nothing() -> None:
    """The gradient through a clip without effect does not change either."""
    bare, wide = (
        Run(RunConfig.of({**SMALL, "algorithm": "sglr", "precision": "float64", **more}))
        for more in ({}, {"clip": 1e9})
    )
    assert [r.loss for r in bare] == [r.loss for r in wide]
    assert bare.training.ledger.state() == wide.training.ledger.state()


@pytest.mark.parametrize("algorithm", ["sglr", "ssl", "ussl", "sflv2"])
def test_defences_between_machines(algorithm: str) -> None:
    """Equal bit for bit to the simulation, with codecs on top."""
    same(RunConfig.of({**SMALL, **OWN.get(algorithm, {}), "algorithm": algorithm, "up_codec": "int8", **STRONG}))


OWN_DEFENCE = f"{Path(__file__).parents[1] / 'own.py'}:Shrink"


def own(config: RunConfig, shrink: float = 0.5) -> RunConfig:
    return config.model_copy(update={"defences": (OWN_DEFENCE,), "shrink": shrink})


def test_a_defence_of_ones_own_is_found_and_ordered() -> None:
    found = defences.of(own(RunConfig.of({**STRONG, "seed": 7})))
    assert [p.entry.name for p in found.in_order] == ["feature-dropout", "shrink", "noise", "nopeek"]
    assert found.seed == 7
    assert found.active
    noise = found.get(Noise)
    assert noise is not None
    assert noise.scale == pytest.approx(0.1)
    assert [p.entry.name for p in found.before(noise)] == ["feature-dropout", "shrink"]
    assert not defences.of(RunConfig()).active
    with pytest.raises(ConfigError, match=r"shrink = 2.* is not possible"):
        defences.of(own(RunConfig(), 2.0))


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("nopeak", "unknown defence 'nopeak': did you mean 'nopeek'"),
        (OWN_DEFENCE.replace("Shrink", "Grid"), "is a codec, not a defence"),
        ("no.py:Shrink", "there is no file"),
    ],
)
def test_wrong_defences(reference: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        defences.of(RunConfig().model_copy(update={"defences": (reference,)}))


def test_a_defence_of_ones_own_guards_rows_and_adds_its_penalty() -> None:
    z, x = torch.ones(5, 3), [torch.zeros(3, 4), torch.zeros(2, 4)]
    guarded = defences.of(own(RunConfig(), 0.25)).step((z,), x, [0, 1], [3, 2], [0, 0])
    (sent,) = guarded.rows
    assert 0.25 <= float(sent.min()) < 0.5 < float(sent.max()) < 1
    slope = torch.cat([torch.full((3, 3), 2 / 9), torch.full((2, 3), 2 / 6)])  # the slope of each client's mean square
    torch.testing.assert_close(guarded.back((torch.ones(5, 3),))[0], sent + slope)


def test_a_defence_of_ones_own_between_machines() -> None:
    config = own(RunConfig.of({**SMALL, "algorithm": "sglr", **STRONG}))
    here, (there, _) = Run(config, training=assemble(config)), remote(config)
    losses = [r.loss for r in here]
    assert losses == [r.loss for r in there]
    assert [e.test_loss for e in here.evaluations] == [e.test_loss for e in there.evaluations]
    assert losses[0] != next(iter(Run(RunConfig.of({**SMALL, "algorithm": "sglr", **STRONG})))).loss


def test_a_client_does_not_import_the_attacks() -> None:
    code = "import sys, cutlayer.remote.sides, cutlayer.defences.watch; print('cutlayer.leakage' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_a_watch_says_nothing_before_it_has_seen_enough() -> None:
    watch = Watch(after=3)
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    watch.observe(rows, rows, torch.zeros(6, dtype=torch.long))  # with only one label, there are no pairs to compare
    assert watch.observed == 0
    assert not watch.suspicious
    for _ in range(2):
        watch.observe(rows.flip(1), rows, torch.tensor([0, 1, 0, 1, 0, 1]))
    assert watch.observed == 2
    assert not watch.suspicious


def test_a_watch_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="window=5, after=9"):
        Watch(window=5, after=9)


@pytest.mark.parametrize("algorithm", ["sglr", "psl", "sflv1"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_defences_on_every_engine(algorithm: str, model: str) -> None:
    options = {**SMALL, "algorithm": algorithm, "model": model, "precision": "float64", **STRONG}
    local, stacked = (Run(RunConfig.of({**options, "engine": e})) for e in ("local", "stacked"))
    assert [r.loss for r in stacked] == pytest.approx([r.loss for r in local], rel=1e-9)
    assert [e.test_loss for e in stacked.evaluations] == pytest.approx(
        [e.test_loss for e in local.evaluations], rel=1e-9
    )


def test_defences_where_all_clients_are_one() -> None:
    options = {
        **SMALL,
        "algorithm": "sfl",
        "average_every": "step",
        "precision": "float64",
        "client_optimizer": "sgd",
        "client_lr": 0.1,
        "clip": 5.0,
        "gaussian_noise": 0.01,
    }
    union, local = (Run(RunConfig.of({**options, "engine": e})) for e in ("auto", "local"))
    assert union.training.engine == "union"
    assert [r.loss for r in union] == pytest.approx([r.loss for r in local], rel=1e-9)


def test_every_part_of_an_evaluation_draws_anew() -> None:
    """Two models and held-out samples in two chunks. The second chunk begins at sample 3."""
    rows, sent = (torch.zeros(6, 50),), []
    defence = protection(seed=3, clip=1.0, gaussian=1.0)

    class Inner:
        samples = (1, 1)

        def evaluate(self, samples: Any, predict: Any, clients: Any) -> None:
            predict((0, 1), rows)
            predict((0, 1), rows)

    inner: Any = Inner()
    DefendedCohort(inner, [], defence).evaluate(inner, lambda clients, seen: sent.append(seen) or seen)
    for start, found in zip((0, 3), sent, strict=True):
        assert torch.equal(found[0], defence.evaluation(rows, (0, 1), start)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gaussian_noise": 0.1}, "gaussian_noise = 0.1 needs clip"),
        ({"clip": 1.0, "gaussian_noise": 0.1, "laplace_noise": 0.1}, "exclude each other"),
        ({"clip": 0.0}, "clip = 0"),
        ({"feature_dropout": 1.0}, "feature_dropout = 1"),
        ({"algorithm": "fl", "nopeek": 1.0}, "nopeek = 1.0 has no effect on fl"),
    ],
)
def test_wrong_values(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Run(**{**SMALL, **options})
