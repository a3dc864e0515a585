"""Unusual code and data of the user: they work, or one sentence gives the reason before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from support import call

from cutlayer import Comparison, Run, plugins
from cutlayer.errors import ConfigError, CutlayerWarning, RunFolderError
from cutlayer.options import CompareConfig
from cutlayer.reproduce.reproduction import Reproduction

OWN = """
from typing import Literal

from cutlayer.algorithms import Algorithm, algorithm
from cutlayer.algorithms.common import report
from cutlayer.gradients import own
from cutlayer.plugins import Thing, option, register
from cutlayer.verbs import BACKWARD, FORWARD


class Plain(Algorithm):
    def round(self, server, clients, this):
        while smashed := clients.forward():
            step = server.step(smashed)
            clients.backward(own(step.gradient, smashed))
            yield report(step, smashed)


@algorithm("idle", title="Idle", needs={FORWARD, BACKWARD})
class Idle(Algorithm):
    pass


@register("schedule", "odd")
class Odd(Thing):
    pass


@algorithm("words", title="Words", needs={FORWARD, BACKWARD})
class Words(Plain):
    order: Literal["fixed", "random"] = option("fixed", help="A word.")
    phi: float = option(0.25, help="Called like one of sglr.")


@algorithm("numbers", title="Numbers", needs={FORWARD, BACKWARD})
class Numbers(Plain):
    order: int = option(3, help="A number.")
"""
SMALL = ["--model", "mlp", "--rounds", "1", "--clients", "2", "--samples-per-client", "40"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file of the user's own things."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def test_a_comparison_of_algorithms_with_an_option_of_one_name_can_be_resumed(place: Path) -> None:
    config = CompareConfig(algorithms=("sglr", "own.py:Words", "own.py:Numbers"), seeds=(0,), rounds=1)
    stored = config.resolved()
    assert "order" not in stored
    assert "phi" not in stored  # the defaults are 0.5 in sglr and 0.25 in Words
    assert stored["alpha"] == 1.0
    again = CompareConfig.of(stored)
    runs = again.runs(frozenset(again.model_fields_set))
    assert [runs[name][0].specific.get("order") for name in runs] == [None, "fixed", 3]
    assert [runs[name][0].specific.get("phi") for name in runs] == [0.5, 0.25, None]
    given = CompareConfig(algorithms=("sglr", "own.py:Words"), seeds=(0,), rounds=1, phi=0.75).resolved()
    assert given["phi"] == 0.75


def test_a_file_that_cannot_be_found_is_what_is_wrong_not_its_options(place: Path) -> None:
    (place / "broken.py").write_text("def f(:\n")
    for reference, said in (("broken.py:X", "SyntaxError"), ("none.py:X", "no file"), ("own.py:Wods", "'Words'")):
        done = call("run", *SMALL, "--algorithm", reference, "--order", "random", "--out", "run", code=2)
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
    assert not (place / "run").exists()


def test_resume_knows_the_options_of_the_run(place: Path) -> None:
    call("run", *SMALL, "--algorithm", "own.py:Words", "--out", "run")
    call("resume", "run", "--order", "fixed")
    assert "made with order = 'fixed', not 'random'" in call("resume", "run", "--order", "random", code=2).stderr


def test_a_changed_file_is_said_when_a_run_is_resumed(place: Path) -> None:
    options: dict[str, Any] = {"model": "mlp", "clients": 2, "rounds": 2, "samples_per_client": 8}
    run = Run(algorithm="own.py:Words", out="run", **options)
    for record in run:
        if record.round == 1:  # the checkpoint of the first round exists
            break
    (place / "own.py").write_text(OWN + "# changed\n")
    with pytest.warns(CutlayerWarning, match="own.py:Words' has changed since the checkpoint"):
        Run.resume("run").run()


def test_no_option_has_the_name_of_one_of_all_runs(place: Path) -> None:
    with (place / "own.py").open("a") as file:
        file.write('\n@algorithm("taken", title="Taken", needs={FORWARD})\nclass Taken(Plain):\n')
        file.write('    batch: int = option(3, help="Of all runs.")\n')
    for flags in ((), ("--batch", "4")):
        done = call("run", *SMALL, "--algorithm", "own.py:Taken", *flags, "--out", "run", code=2)
        assert "the option 'batch' of the algorithm 'own.py:Taken' has the name of an option of all runs" in done.stderr
    assert not (place / "run").exists()


def test_what_is_not_a_thing_is_said(place: Path) -> None:
    (place / "leaves.py").write_text("raise SystemExit(3)\n")
    for reference, said in (
        ("leaves.py:X", "cannot be imported (SystemExit: 3)"),
        ("own.py:Wods", "did you mean 'Words'? known: Plain, Idle, Odd, Words, Numbers\n"),
        ("__main__:Lost", "is in a script that is not running: continue from that script"),
    ):
        assert said in call("run", *SMALL, "--algorithm", reference, "--out", "run", code=2).stderr
    done = call("run", *SMALL, "--partition", "own.py:Words", code=2)
    assert "'own.py:Words' is an algorithm, not a partition" in done.stderr
    with pytest.raises(ConfigError, match="5 is not an algorithm"):
        Run(algorithm=5)
    assert not (place / "run").exists()


def test_variants_take_objects_too(place: Path) -> None:
    words = plugins.load("algorithm", "own.py:Words")
    variant = {"one": {"algorithm": words(order="random")}, "two": {"algorithm": words, "phi": 0.5}}
    plan = Comparison(algorithms=(), seeds=(0,), variant=variant).plan
    assert [plan[v][0].specific["order"] for v in variant] == ["random", "fixed"]
    assert [plan[v][0].specific["phi"] for v in variant] == [0.25, 0.5]


def test_an_object_takes_only_options_of_its_own(place: Path) -> None:
    words = plugins.load("algorithm", "own.py:Words")
    with pytest.raises(ValidationError, match="phii"):
        words(phii=0.5)
    with pytest.raises(ConfigError, match="unknown option 'phii': did you mean 'phi'"):
        words.of({"phii": 0.5})


def test_what_is_not_complete_is_found_before_anything_is_written(place: Path) -> None:
    for option, reference, said in (
        ("--algorithm", "own.py:Idle", "has no round()"),
        ("--lr-schedule", "own.py:Odd", "is not derived from cutlayer.schedules.Schedule"),
        ("--server-lr-schedule", "own.py:Odd", "'own.py:Odd' is not derived"),
    ):
        assert said in call("run", *SMALL, option, reference, "--out", "run", code=2).stderr
    assert not (place / "run").exists()


MADE = '''
import json
from pathlib import Path

import torch
from torch import nn

from cutlayer.algorithms import Algorithm, algorithm
from cutlayer.plugins import option
from cutlayer.traffic import Traffic
from cutlayer.verbs import BACKWARD, FORWARD


def wide(input_shape, classes, *, width: int = 5):
    """A model that says how wide it is."""
    Path("width").write_text(str(width))
    inside = nn.Linear(784, width)
    return nn.Sequential(nn.Flatten(), inside, nn.ReLU(), nn.Linear(width, classes))


def striped(*, stripes: int = 2):
    """Data with as many classes as stripes."""
    return torch.rand(2000, 1, 28, 28), torch.arange(2000) % stripes


@algorithm("halved", title="Halved", needs={FORWARD, BACKWARD})
class Halved(Algorithm):
    share: float = option(0.5, help="What is averaged.", planned=True)

    def traffic(self, epoch):
        return Traffic("steps", averaged=round(self.share * epoch.client_model))
'''


@pytest.fixture
def made(place: Path) -> Path:
    (place / "made.py").write_text(MADE)
    return place


def test_a_plan_has_the_options_of_a_model_and_an_algorithm(made: Path) -> None:
    plan = ["plan", "--model", "made.py:wide", "--cut", "1", "--algorithms", "made.py:Halved", "--json"]
    up = [
        json.loads(call(*plan, "--width", "7", "--share", share).stdout)["algorithms"][0]["bytes_up"]
        for share in ("0", "1")
    ]
    assert (made / "width").read_text() == "7"
    assert up[1] - up[0] == 10 * 4 * (784 * 7 + 7)  # models of ten clients
    (made / "plan.toml").write_text('model = "made.py:wide"\ncut = "1"\nwidth = 9\nalgorithms = ["psl"]\n')
    call("plan", "--config", "plan.toml")
    assert (made / "width").read_text() == "9"
    assert "unknown option 'widht': did you mean 'width'?" in call("plan", "--config", toml(made), code=2).stderr


def toml(made: Path) -> str:
    (made / "wrong.toml").write_text('model = "made.py:wide"\nwidht = 9\n')
    return "wrong.toml"


def test_a_calibration_has_the_options_of_a_model(made: Path) -> None:
    words = ["--seconds", "0.1", "--watts", "5", "--name", "here"]
    assert "[device.here]" in call("calibrate", "--model", "made.py:wide", "--width", "11", *words).stdout
    assert (made / "width").read_text() == "11"
    assert "Did you mean" in call("calibrate", "--model", "made.py:wide", "--widht", "11", *words, code=2).stderr
    assert "width" in call("calibrate", "--width", "11", *words, code=2).stderr  # cnn has no such option


def test_a_reproduction_has_the_options_of_its_data(made: Path) -> None:
    words = ["reproduce", "table1", "--data", "made.py:striped", "--stripes", "3", "--jobs", "0", "--out", "out"]
    assert "'out' has no finished run" in call(*words, code=2).stderr
    work = Reproduction(["table1"], "smoke", made / "out", "made.py:striped", options={"stripes": 3})
    assert all(cell.config.specific["stripes"] == 3 for cell, _ in work.jobs)
    with work._held():
        pass
    with pytest.raises(RunFolderError, match="with stripes = 3, not 2"):
        Reproduction(["table1"], "smoke", made / "out", "made.py:striped", options={"stripes": 2})


def test_a_run_is_resumed_from_anywhere(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths in the run (things in files, data, profiles) are found from any folder."""
    np.savez("numbers.npz", x=np.random.default_rng(0).random((60, 6), np.float32), y=np.arange(60) % 2)
    (made / "thing.toml").write_text("[device.mine]\ntitle='t'\nflops_per_second=1e9\nwatts=1\nbasis='b'\nsource='s'\n")
    options: dict[str, Any] = {"model": "mlp", "clients": 2, "rounds": 2, "data": "numbers.npz", "checkpoint_every": 1}
    options |= {
        "lr_schedule": "own.py:Halving",
        "profiles": "thing.toml",
        "client_device": "mine",
        "up_mbps": 1.0,
        "down_mbps": 1.0,
    }
    with (made / "own.py").open("a") as file:
        file.write("\nfrom cutlayer.schedules import Schedule\n@register('schedule', 'halving')\n")
        file.write("class Halving(Schedule):\n    def factor(self, progress):\n        return 0.5**progress\n")
    whole = [record.loss for record in Run(algorithm="own.py:Words", **options)]
    run = Run(algorithm="own.py:Words", out="run", **options)
    for record in run:
        if record.round == 1:
            break
    comparison = Comparison(algorithms=("own.py:Words",), out="several", seeds=(0,), **options)
    for _, _, _, record in comparison:
        if record.round == 1:
            break
    (made / "elsewhere").mkdir()
    monkeypatch.chdir(made / "elsewhere")
    call("resume", "../run")
    losses = [json.loads(line)["loss"] for line in (made / "run" / "steps.jsonl").read_text().splitlines()]
    assert losses == whole
    (row,) = Comparison.resume("../several").run()
    assert row.entry == "Words"
    assert row.steps == len(whole)
    call("resume", "../several")
    call("resume", "../run", "--algorithm", "../own.py:Words")  # the same file by another path
    assert "made with algorithm = " in call("resume", "../run", "--algorithm", "../own.py:Numbers", code=2).stderr


def test_a_report_says_what_options_of_own_things_mean(place: Path) -> None:
    call("run", *SMALL, "--algorithm", "own.py:Words", "--order", "random", "--out", "run")
    (place / "own.py").unlink()  # reports need no code
    call("report", "run")
    page = (place / "run" / "report.html").read_text()
    assert '<code>order</code></th><td>random</td><td class="soft">A word.</td>' in page
    assert '<code>phi</code></th><td>0.25</td><td class="soft">Called like one of sglr.</td>' in page


def test_hints_at_what_was_meant(place: Path) -> None:
    for words, said in (
        (
            ("--algorithm", "own.py"),
            "'own.py' is a file, not a thing in it: it offers own.py:Idle, own.py:Words, own.py:N",
        ),
        (("--partition", "own.py"), "it registers no partition; give path/to/file.py:name"),
        (
            ("--algorithm", "psl,sglr"),
            "several names in one word: separate them by spaces if several can be named (cut",
        ),
        (("--algorithm", "psl,sglr"), "(cutlayer compare --algorithms psl sglr)"),
    ):
        assert said in call("run", *SMALL, *words, "--out", "run", code=2).stderr
    words = plugins.load("algorithm", "own.py:Words")
    with pytest.raises(ConfigError, match=r"twice: name it once, or make each a variant with options of its own"):
        Comparison(algorithms=(words(phi=0.5), words(phi=1.0)))
    with pytest.warns(CutlayerWarning, match="the variant 'mine' names no algorithm and trains sglr"):
        Comparison(algorithms=("psl",), seeds=(0,), variant={"mine": {"phi": 0.3}})
