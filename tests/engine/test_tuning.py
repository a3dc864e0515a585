"""What is measured, how long that may take, where the results are kept; results of training do not depend on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import client_state, difference, server_state
from torch import Tensor, nn

from cutlayer import Run
from cutlayer.engine import choice, remembered
from cutlayer.engine.convolutions import forms
from cutlayer.engine.remembered import key, recalled, remember
from cutlayer.engine.tuning import Tuner
from cutlayer.engine.ways import Stacking, Ways
from cutlayer.errors import RunFolderError
from cutlayer.testing.material import random_source

SMALL: dict[str, Any] = {
    "algorithm": "sglr", "data": "digits", "model": "cnn", "clients": 3, "samples_per_client": 24, "batch": 8,
    "rounds": 3, "test": 20, "validation": 20,
}  # fmt: skip

BUDGET = choice.Choice._budget


@pytest.fixture(autouse=True)
def measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Even the shortest run is measured, and the results are kept in the test's own folder."""
    monkeypatch.setenv("CUTLAYER_TUNE", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_FEWEST", 0)
    monkeypatch.setattr(choice, "_SHORTEST", 0.0)
    monkeypatch.setattr(choice.Choice, "_budget", lambda self: 60.0)


class Given:
    """A clock that reports given durations."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.asked = seconds, list[str]()

    def copies(self, tuner: Tuner, part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Seconds for a layout and a way."""
        how = args[4]
        name = f"{'last' if getattr(part, 'images_channels_last', False) else 'else'} {how.way}"
        self.asked.append(name)
        return choice.Timed(self.seconds.get(name.replace(" ", "_"), 1.0), how)

    def alone(self, tuner: Tuner, part: nn.Module, *args: Any, **kwargs: Any) -> float:
        """The server's seconds for a layout."""
        return self.seconds.get("server_last" if getattr(part, "images_channels_last", False) else "server", 1.0)


@pytest.mark.parametrize("quick", ["last_lowered", "last_each", "else_lowered", "else_each"])
@pytest.mark.parametrize("server", ["server", "server_last"])
def test_the_quickest_is_taken(quick: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Given(**{quick: 0.5, server: 0.5})
    monkeypatch.setattr(Tuner, "copies", lambda *a, **k: clock.copies(*a, **k))
    monkeypatch.setattr(Tuner, "alone", lambda *a, **k: clock.alone(*a, **k))
    ways = Run(**SMALL).training.ways
    assert (ways.client_layout == "last") == quick.startswith("last")
    assert ways.clients.way == quick.split("_")[1]
    assert (ways.server_layout == "last") == (server == "server_last")
    assert set(clock.asked) == {"last lowered", "last each", "else lowered", "else each"}


@pytest.mark.parametrize(
    "seconds",
    [{"last_each": 0.97}, {"last_lowered": 0.97}, {"else_lowered": 0.93, "else_each": 0.93}, {"server": 0.93}],
    ids=str,
)
def test_a_little_quicker_is_noise(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another way that is 3 % faster, or another layout of one side that saves 3.5 % of a step of both sides."""
    clock = Given(**seconds)
    monkeypatch.setattr(Tuner, "copies", lambda *a, **k: clock.copies(*a, **k))
    monkeypatch.setattr(Tuner, "alone", lambda *a, **k: clock.alone(*a, **k))
    assert Run(**SMALL).training.ways == Run(tune="off", **SMALL).training.ways


class Flattened(nn.Module):
    """Relies on the memory layout of the convolution's output: other layouts fail, or are read wrongly."""

    def __init__(self, blindly: bool) -> None:
        super().__init__()
        self.blindly = blindly
        self.conv, self.out = nn.Conv2d(1, 8, 3), nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 1, 8, 8] -> [n, 10]."""
        y, size = self.conv(x), 8 * 36
        return self.out(y.as_strided((len(x), size), (size, 1)) if self.blindly else y.view(len(x), size))


@pytest.mark.parametrize("blindly", [False, True])
def test_a_quick_layout_that_the_server_cannot_take_is_left(blindly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Given(last_lowered=0.1, last_each=0.1)
    monkeypatch.setattr(Tuner, "copies", lambda *a, **k: clock.copies(*a, **k))
    monkeypatch.setattr(Tuner, "alone", lambda *a, **k: clock.alone(*a, **k))
    run = Run(**{**SMALL, "model": Flattened(blindly), "cut": "conv", "rounds": 1})
    assert {"last lowered", "last each"} <= set(clock.asked)
    assert run.training.ways.client_layout != "last"
    run.run()


@pytest.mark.parametrize(("times", "taken"), [((1.0, 0.97), "dense"), ((1.0, 0.9), "grouped"), ((0.9, 1.0), "dense")])
def test_the_quickest_form_is_taken(times: tuple[float, float], taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a convolution of three clients; a small advantage is noise here too."""
    seconds = dict(zip(("dense", "grouped"), times, strict=True))
    x, weight = torch.randn(6, 2, 5, 5, requires_grad=True), torch.randn(3, 4, 2, 3, 3, requires_grad=True)
    possible = forms(x, weight, 1, 1, 1, 1)
    assert set(possible) == set(seconds)
    left = [seconds[name] for name in possible]

    def measured(tuner: Tuner, work: Callable[[], object], **how: int) -> float:
        work()
        return left.pop(0)

    monkeypatch.setattr(Tuner, "seconds", measured)
    assert Tuner(60.0, torch.device("cpu"))._form(possible, "dense", x, weight, None) == taken
    assert not left


@pytest.mark.parametrize("algorithm", ["sglr", "sflv1", "sflv2", "fl", "ssl"])
def test_whatever_is_measured_results_are_equal(algorithm: str) -> None:
    runs = [Run(**{**SMALL, "algorithm": algorithm}, tune=tune) for tune in ("on", "off")]
    for run in runs:
        run.run()
    assert any("Measured in" in remark for remark in runs[0].training.remarks)
    assert not runs[1].training.remarks
    for k in range(3):
        assert difference(*(client_state(run, k) for run in runs)) < 1e-4
    assert difference(*map(server_state, runs)) < 1e-4


def test_it_is_kept_for_the_next_run_and_said() -> None:
    first, second = Run(**SMALL), Run(**SMALL)
    assert second.training.ways == first.training.ways
    assert any(remark.startswith("Measured in ") for remark in first.training.remarks)
    assert any(remark.startswith("As measured here before: ") for remark in second.training.remarks)
    other = Run(**{**SMALL, "batch": 6})  # other shapes are measured again
    assert any(remark.startswith("Measured in ") for remark in other.training.remarks)


def test_images_of_another_size_are_measured_anew() -> None:
    """They are measured again although all layers and weights are the same."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    for size in (8, 6):
        data = random_source((24, 24, 24), (1, size, size), classes=3)
        options = {**SMALL, "model": net, "data": data, "partition": "column", "cut": "1", "samples_per_client": None}
        for remark in ("Measured in ", "As measured here before: "):
            assert any(said.startswith(remark) for said in Run(**options).training.remarks)


def test_what_was_measured_on_another_machine_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {key({"a": 1})}
    for owner, name, value in (
        (torch, "__version__", "0"),
        (torch, "get_num_threads", lambda: 99),
        (remembered, "_processor", lambda: "another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            names.add(key({"a": 1}))
    assert len(names) == 4


def test_what_is_cached_alone_is_not_measured() -> None:
    before = Run(tune="cached", **SMALL)
    assert not before.training.remarks
    Run(**SMALL)
    after = Run(tune="cached", **SMALL)
    assert any(remark.startswith("As measured here before: ") for remark in after.training.remarks)


def test_the_local_engine_asked_for_is_taken_as_it_is() -> None:
    run = Run(engine="local", **SMALL)
    assert run.training.ways == Ways("local")
    assert not run.training.remarks


def test_what_was_kept_is_used_only_where_it_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken file is measured again, and so is a file with a way in which this model cannot be computed."""
    kept = Run(**SMALL).training.ways
    (file,) = Path(choice.remember.__globals__["_folder"]()).glob("*.json")
    for text in ("{", "[]", '{"engine": "stacked"}', json.dumps({**kept.stored(), "engine": "union"})):
        file.write_text(text, encoding="utf-8")
        assert any(remark.startswith("Measured in ") for remark in Run(**SMALL).training.remarks)
    strange = {**kept.stored(), "clients": {**kept.stored()["clients"], "way": "mapped"}}
    file.write_text(json.dumps(strange), encoding="utf-8")
    assert Run(**SMALL).training.ways.clients.way != "mapped"


def test_ways_are_stored_whole() -> None:
    ways = Ways("stacked", "last", "pooled", Stacking("each", 3, False, {"a.weight": "dense"}), Stacking("mapped"))
    assert Ways.of(json.loads(json.dumps(ways.stored()))) == ways
    name = key({"a": 1})
    assert recalled(name) is None
    remember(name, ways)
    assert recalled(name) == ways
    assert key({"a": 2}) != name


def test_a_resumed_run_computes_as_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, although other ways would be chosen where it is resumed."""
    whole = Run(out=tmp_path / "whole", **SMALL)
    whole.run()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    ways = Ways("stacked", "plain", "plain", Stacking("each"))
    assert ways != whole.training.ways
    monkeypatch.setattr(choice.Choice, "_quickest", lambda *_: whole.training.ways)
    part = Run(out=tmp_path / "part", **SMALL)
    steps = iter(part)
    for _ in range(4):  # round 1 has ended, and its checkpoint is written
        next(steps)
    steps.close()
    monkeypatch.setattr(choice.Choice, "_quickest", lambda *_: ways)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    resumed = Run.resume(tmp_path / "part")
    assert resumed.training.ways == whole.training.ways
    resumed.run()
    for name in ("steps.jsonl", "evaluations.jsonl"):
        first, second = ((tmp_path / run / name).read_text() for run in ("whole", "part"))
        assert [strip(line) for line in first.splitlines()] == [strip(line) for line in second.splitlines()]
    assert all(torch.equal(v, client_state(resumed, 1)[n]) for n, v in client_state(whole, 1).items())


def strip(line: str) -> dict[str, Any]:
    """A record without its times."""
    return {k: v for k, v in json.loads(line).items() if "seconds" not in k}


def test_a_folder_whose_ways_are_broken_is_refused(tmp_path: Path) -> None:
    Run(out=tmp_path / "run", **SMALL).run()
    (tmp_path / "run" / "engine.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"engine\.json' is damaged"):
        Run.resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("run", "budget"),
    [(1.0, 0.05), (20.0, 0.5), (100.0, 1.0), (10_000.0, 5.0), (float("inf"), 5.0)],
)
def test_what_measuring_may_take(run: float, budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit for a run of this many seconds is 5 % up to half a second, then 1 %, and at most 5 s. Runs with few
    rows measure nothing.
    """
    clock, found = Given(server=run / (3 * 24 * 3) * 8 / 2, server_last=1.0), list[float]()

    def budgeted(made: choice.Choice) -> float:
        found.append(BUDGET(made))
        return found[-1]

    monkeypatch.setattr(choice.Choice, "_budget", budgeted)
    monkeypatch.setattr(Tuner, "copies", lambda *a, **k: clock.copies(*a, **k))
    monkeypatch.setattr(Tuner, "alone", lambda *a, **k: clock.alone(*a, **k))
    Run(**SMALL)
    assert found == pytest.approx([budget])
    monkeypatch.setattr(choice, "_FEWEST", 3 * 24 * 3 + 1)
    Run(**{**SMALL, "batch": 7})
    assert found[1] == 0.0


def test_its_time_is_bounded() -> None:
    tuner = Tuner(0.0, torch.device("cpu"))
    assert tuner.late
    assert tuner.seconds(lambda: pytest.fail("it is too late")) == float("inf")
    calls: list[int] = []
    assert Tuner(60.0, torch.device("cpu")).seconds(lambda: calls.append(1)) < 1.0
    assert len(calls) == 5  # one of them to warm up
