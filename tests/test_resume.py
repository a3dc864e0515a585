"""A resumed run ends bit for bit like an uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ALGORITHMS, same, source, u_shaped
from torch import nn

from cutlayer import Comparison, Run, RunFolderError, checkpoint, plugins
from cutlayer.files import read_records
from cutlayer.folder import BEST, CHECKPOINT, EVALUATIONS, LAST, RESULT, STEPS
from cutlayer.options import traits

SIZES = [10, 5, 7]


def net() -> nn.Module:
    """A model with many kinds of state: batch normalisation, dropout, several layers."""
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(8, 8),
        nn.Dropout(0.3),
        nn.Linear(8, 4),
    )


def options(algorithm: str) -> dict[str, Any]:
    """Adam with state on both sides, sampling of clients, schedules, and an odd number of rounds."""
    common = {"algorithm": algorithm, "clients": 3, "partition": "column", "batch": 5, "rounds": 5, "client_lr": 0.01}
    if algorithm == "ussl":
        return {**common, "cut": "2", "tail_cut": "4", "hand_over_optimizer": True}
    own: dict[str, Any] = {} if algorithm == "cl" else {"participation": 0.7}
    if u_shaped(algorithm):
        own["tail_cut"] = "4"
    cut = {} if traits(algorithm).whole else {"cut": "3", "start": "independent"}
    if traits(algorithm).gradients_cross:
        cut["start"] = "equal"
    if plugins.index("algorithm")[algorithm].facts["presets"].get("sampling") == "global":
        cut["sampling"] = "proportional"  # the model cannot train on the single rows of global sampling
    if algorithm in ("fl", "sfl", "sflv1"):
        own["local_epochs"] = 2  # so rounds are not epochs
    return {**common, **own, **cut}


def new(algorithm: str, out: Path | None) -> Run:
    return Run(model=net, data=source(SIZES, (6,)), out=out, **options(algorithm))


def without_times(path: Path) -> list[dict[str, Any]]:
    """Records without the time, which is the only field that differs."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_records(path)]


def assert_same_runs(a: Path, b: Path) -> None:
    """Equal records, and equal final states of models, optimisers, clocks and ledger."""
    assert without_times(a / STEPS) == without_times(b / STEPS)
    assert without_times(a / EVALUATIONS) == without_times(b / EVALUATIONS)
    x, y = checkpoint.read(a / CHECKPOINT), checkpoint.read(b / CHECKPOINT)
    for part in ("config", "rounds", "steps", "samples", "server", "clients"):
        assert same(x[part], y[part]), part


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_interrupted_anywhere(algorithm: str, tmp_path: Path) -> None:
    """Stopped after the first step, in the middle, and before the last step, and resumed each time."""
    quiet = tmp_path / "quiet"
    new(algorithm, quiet).run()
    total = len(without_times(quiet / STEPS))
    for stop in {1, total // 2, total - 1}:
        broken = tmp_path / f"broken-{stop}"
        for count, _ in enumerate(new(algorithm, broken), 1):
            if count == stop:
                break  # closes the generator, as Ctrl-C does
        resumed = Run.resume(broken, model=net, data=source(SIZES, (6,)))
        resumed.run()
        assert_same_runs(quiet, broken)


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("fl", {"local_steps": 1}),
        ("sflv1", {"local_steps": 1, "cut": "2"}),
        ("sfl", {"average_every": "step", "cut": "2"}),
    ],
)
def test_interrupted_union_steps(algorithm: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Averaged after one local step: one model for all clients, without optimiser state."""
    every: dict[str, Any] = {
        "algorithm": algorithm, "clients": 3, "partition": "column", "batch": 5, "rounds": 6, "participation": 0.7,
        "client_optimizer": "sgd", "checkpoint_every": 2, **more,
    }  # fmt: skip
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    quiet, broken = tmp_path / "quiet", tmp_path / "broken"
    run = Run(model=plain, data=source(SIZES, (6,)), out=quiet, **every)
    assert run.training.engine == "union"
    run.run()
    for count, _ in enumerate(Run(model=plain, data=source(SIZES, (6,)), out=broken, **every), 1):
        if count == 4:
            break
    Run.resume(broken, model=plain, data=source(SIZES, (6,))).run()
    assert_same_runs(quiet, broken)


@pytest.mark.parametrize(("algorithm", "optimizer"), [("sglr", "adam"), ("sflv1", "sgd"), ("ssl", "adam")])
def test_interrupted_with_kernels_whose_channels_lie_last(algorithm: str, optimizer: str, tmp_path: Path) -> None:
    """Moments have the memory layout of their weights, also after they are read from a checkpoint."""
    momentum = {"client_optimizer_options": {"momentum": 0.9}} if optimizer == "sgd" else {}
    every: dict[str, Any] = {
        "algorithm": algorithm, "data": "digits", "model": "cnn", "clients": 3, "samples_per_client": 8, "batch": 8,
        "rounds": 4, "test": 20, "validation": 20, "client_optimizer": optimizer, **momentum,
    }  # fmt: skip
    quiet, broken = tmp_path / "quiet", tmp_path / "broken"
    run = Run(out=quiet, **every)
    assert run.training.ways.server_layout == "last"
    run.run()
    steps = iter(Run(out=broken, **every))
    for _ in range(4):
        next(steps)
    steps.close()
    Run.resume(broken).run()
    assert_same_runs(quiet, broken)


def test_interrupted_twice_and_between_checkpoints(tmp_path: Path) -> None:
    """With checkpoints every two rounds, records after the last checkpoint are discarded and written again."""
    data = source(SIZES, (6,))
    more = {**options("sglr"), "rounds": 7, "checkpoint_every": 2}
    quiet, broken = tmp_path / "quiet", tmp_path / "broken"
    Run(model=net, data=data, out=quiet, **more).run()
    run = Run(model=net, data=data, out=broken, **more)
    for stop in (7, 2):
        for count, _ in enumerate(run, 1):
            if count == stop:
                break
        run = Run.resume(broken, model=net, data=data)
    run.run()
    assert_same_runs(quiet, broken)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    new("psl", tmp_path / "run").run()
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    result = Run.resume(tmp_path / "run", model=net, data=source(SIZES, (6,))).run()
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before
    assert json.loads((tmp_path / "run" / RESULT).read_text())["test_score"] == result.test_score


def test_same_seed_same_run_other_seed_other_run(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        Run(model=net, data=source(SIZES, (6,)), out=tmp_path / name, **options("sglr"), seed=seed).run()
    assert_same_runs(tmp_path / "a", tmp_path / "b")
    assert without_times(tmp_path / "a" / STEPS) != without_times(tmp_path / "c" / STEPS)


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    new("sglr", None).run()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_an_optimizer_with_state_in_another_type(precision: str, tmp_path: Path) -> None:
    """NAdam keeps a float32 product in addition to float64 parameters."""
    more = {**options("sflv1"), "client_optimizer": "nadam", "precision": precision, "engine": "local"}
    data = source(SIZES, (6,))
    Run(model=net, data=data, out=tmp_path / "quiet", **more).run()
    for count, _ in enumerate(Run(model=net, data=data, out=tmp_path / "broken", **more), 1):
        if count == 9:
            break
    Run.resume(tmp_path / "broken", model=net, data=data).run()
    assert_same_runs(tmp_path / "quiet", tmp_path / "broken")


@pytest.mark.parametrize("what", ["data set", "model"])
def test_other_data_or_another_model_are_refused(what: str, tmp_path: Path) -> None:
    new("psl", tmp_path / "run").run()
    model = (
        net if what == "data set" else lambda: nn.Sequential(*net()[:4], nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 4))
    )
    data = source(SIZES, (6,), seed=5 if what == "data set" else 0)
    with pytest.raises(RunFolderError, match=f"made with another {what} than now"):
        Run.resume(tmp_path / "run", model=model, data=data).run()


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    run = new("sglr", tmp_path / "run")
    next(iter(run))
    with pytest.raises(RunFolderError, match=r"made with alpha = 1\.0, not 2\.0"):
        Run.resume(tmp_path / "run", model=net, data=source(SIZES, (6,)), alpha=2.0)
    with pytest.raises(RunFolderError, match="a model of your own"):
        Run.resume(tmp_path / "run")


def test_an_edited_configuration_is_refused(tmp_path: Path) -> None:
    new("sglr", tmp_path / "run").run()
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace("phi = 0.5", "phi = 0.25"))
    with pytest.raises(RunFolderError, match=r"phi = 0\.5, not 0\.25"):
        Run.resume(tmp_path / "run", model=net, data=source(SIZES, (6,))).run()


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_broken_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    new("psl", tmp_path / "run").run()
    path = tmp_path / "run" / CHECKPOINT
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"\x80\x04K\x01." * 99, "empty": b""}[damage])
    with pytest.raises(RunFolderError, match="not a whole checkpoint"):
        Run.resume(tmp_path / "run", model=net, data=source(SIZES, (6,))).run()


def test_no_pickle_in_a_run_folder(tmp_path: Path) -> None:
    """The checkpoint and the models are plain safetensors files. All other files are text."""
    from safetensors import safe_open

    new("sflv1", tmp_path / "run").run()
    for name, least in ((CHECKPOINT, 10), (LAST, 2), (BEST, 2)):
        with safe_open(tmp_path / "run" / name, framework="pt") as file:
            assert len(list(file.keys())) > least
    for path in (tmp_path / "run").iterdir():
        if path.name not in (CHECKPOINT, LAST, BEST):
            path.read_text()


def test_comparison_resumes(tmp_path: Path) -> None:
    """Interrupted in the third of four runs. Finished runs are kept, and the table is that without interruption."""
    data = source(SIZES, (6,))
    more: dict[str, Any] = {"algorithms": ("psl", "sglr"), "seeds": (0, 1), "clients": 3, "partition": "column"}
    more |= {"cut": "3", "rounds": 3, "batch": 5, "variant": {"half": {"algorithm": "sglr", "alpha": 0.5}}}
    quiet = Comparison(model=net, data=data, out=tmp_path / "quiet", **more).run()
    for entry, seed, _, record in Comparison(model=net, data=data, out=tmp_path / "broken", **more):
        if (entry, seed, record.step) == ("sglr", 1, 2):
            break
    kept = (tmp_path / "broken" / "psl" / "seed-0" / RESULT).read_bytes()
    again = Comparison.resume(tmp_path / "broken", model=net, data=data).run()
    assert (tmp_path / "broken" / "psl" / "seed-0" / RESULT).read_bytes() == kept
    timeless = {"seconds", "evaluation_seconds", "steps_per_second", "samples_per_second"}
    for a, b in zip(quiet, again, strict=True):
        assert {k: v for k, v in vars(a).items() if k not in timeless} == {
            k: v for k, v in vars(b).items() if k not in timeless
        }


def test_a_model_and_data_by_name(tmp_path: Path) -> None:
    """Names are options like any others: equal values are accepted, different ones refused."""
    options: dict[str, Any] = {"algorithm": "psl", "model": "mlp", "data": "digits", "clients": 2, "epochs": 2}
    for record in Run(**options, out=tmp_path / "run"):
        if record.round == 1:
            break
    with pytest.raises(RunFolderError, match="with model = 'mlp', not 'cnn'"):
        Run.resume(tmp_path / "run", **{**options, "model": "cnn"})
    assert Run.resume(tmp_path / "run", **options).run().rounds == 2
