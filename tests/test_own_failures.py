"""Failures of the user's own code: one sentence names the thing, the exception and the line. `--debug` shows more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import call

from cutlayer import Run

OWN = """
from cutlayer.algorithms import Algorithm, algorithm
from cutlayer.algorithms.common import report
from cutlayer.defences.protection import Defence, defence
from cutlayer.gradients import own
from cutlayer.plugins import option
from cutlayer.schedules import Schedule
from cutlayer.plugins import register
from cutlayer.traffic import Traffic
from cutlayer.verbs import BACKWARD, FORWARD


@algorithm("plain", title="Plain", needs={FORWARD, BACKWARD})
class Plain(Algorithm):
    def round(self, server, clients, this):
        while smashed := clients.forward():
            step = server.step(smashed)
            clients.backward(own(step.gradient, smashed))
            yield report(step, smashed)


@algorithm("broken", title="Broken", needs={FORWARD, BACKWARD})
class Broken(Plain):
    def round(self, server, clients, this):
        smashed = clients.forward()
        1 / 0  # BROKEN
        yield report(server.step(smashed), smashed)


@algorithm("wrong-shape", title="Wrong shape", needs={FORWARD, BACKWARD})
class WrongShape(Plain):
    def round(self, server, clients, this):
        smashed = clients.forward()
        step = server.step(smashed)
        clients.backward(own(tuple(g[:, :1] for g in step.gradient), smashed))  # WRONG
        yield report(step, smashed)


@algorithm("silent", title="Silent", needs={FORWARD, BACKWARD})
class Silent(Plain):
    def round(self, server, clients, this):
        while smashed := clients.forward():
            server.step(smashed)
        yield from ()


@algorithm("function", title="Function", needs={FORWARD, BACKWARD})
class Function(Plain):
    def round(self, server, clients, this):
        return None


@algorithm("numbers", title="Numbers", needs={FORWARD, BACKWARD})
class Numbers(Plain):
    def round(self, server, clients, this):
        yield 0.5


@algorithm("untold", title="Untold", needs={FORWARD, BACKWARD})
class Untold(Plain):
    def traffic(self, epoch):
        return Traffic("steps", averaged=epoch.nothing)  # UNTOLD


@algorithm("worded", title="Worded", needs={FORWARD, BACKWARD})
class Worded(Plain):
    def traffic(self, epoch):
        return Traffic("stepps")


@algorithm("unchecked", title="Unchecked", needs={FORWARD, BACKWARD})
class Unchecked(Plain):
    def check(self, given):
        raise KeyError("CHECK")


@register("schedule", "rising")
class Rising(Schedule):
    limit: float = option(1.0, help="Where it ends.")

    def factor(self, progress):
        return {1.0: float("nan"), 2.0: float("inf"), 3.0: -0.5}[self.limit]  # RISING


@defence("leaky")
class Leaky(Defence):
    def protect(self, rows, sizes, draws):
        raise ValueError("no rows")  # LEAKY


@defence("cropping")
class Cropping(Defence):
    def protect(self, rows, sizes, draws):
        return tuple(r[:1] for r in rows)


@defence("dear")
class Dear(Defence):
    def penalty(self, x, z):
        return x @ z  # DEAR
"""
LINES = {found[1]: n for n, line in enumerate(OWN.splitlines(), 1) if (found := re.search(r"# ([A-Z]+)$", line))}
SMALL = ["--model", "mlp", "--rounds", "1", "--clients", "2", "--samples-per-client", "40"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def sentence(*words: str) -> str:
    said = call(*words, code=2).stderr
    (line,) = [line for line in said.splitlines() if not line.startswith("note: ")]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--algorithm", "own.py:Broken"],
            f"the round of the algorithm 'broken' failed at own.py:{LINES['BROKEN']} (ZeroDivisionError: division by "
            "zero): correct its code; --debug shows the traceback",
        ),
        (
            ["--algorithm", "own.py:WrongShape"],
            f"the round of the algorithm 'wrong-shape' failed at own.py:{LINES['WRONG']} (RuntimeError: ",
        ),
        (["--algorithm", "own.py:Silent"], "'own.py:Silent' has yielded no step in 1 rounds"),
        (["--algorithm", "own.py:Function"], "'function' returns None: make it a generator that yields a Step"),
        (["--algorithm", "own.py:Numbers"], "'numbers' yields 0.5: yield a cutlayer.types.Step"),
        (["--algorithm", "own.py:Unchecked"], "`check` of Unchecked failed at own.py:"),
        (
            ["--lr-schedule", "own.py:Rising", "--limit", "5"],
            f"the schedule 'rising' failed at own.py:{LINES['RISING']} (KeyError: 5.0)",
        ),
        (
            ["--defences", "own.py:Leaky"],
            f"`protect` of the defence 'leaky' failed at own.py:{LINES['LEAKY']} (ValueError: no rows): correct",
        ),
        (["--defences", "own.py:Cropping"], "`protect` of the defence 'cropping' makes tensors of the shapes [(1, "),
        (
            ["--defences", "own.py:Dear"],
            f"`penalty` of the defence 'dear' failed at own.py:{LINES['DEAR']} (RuntimeError: mat1 and mat2",
        ),
    ],
)
def test_a_run_says_what_failed_and_where(place: Path, flags: list[str], said: str) -> None:
    assert said in sentence("run", *SMALL, *flags, "--out", "run")


@pytest.mark.parametrize(("limit", "factor"), [("1", "nan"), ("2", "inf"), ("3", "-0.5")])
@pytest.mark.parametrize("flags", [("--lr-schedule",), ("--lr-schedule", "constant", "--server-lr-schedule")])
def test_a_schedule_is_blamed_for_its_factor(place: Path, limit: str, factor: str, flags: tuple[str, ...]) -> None:
    said = f"the schedule 'rising' gives the factor {factor} after 0 of the rounds: return a finite number"
    assert said in sentence("run", *SMALL, *flags, "own.py:Rising", "--limit", limit, "--out", "run")


def test_a_schedule_is_blamed_through_its_warm_up(place: Path) -> None:
    words = ["run", *SMALL, "--lr-warmup", "0.5", "--lr-schedule", "own.py:Rising", "--limit"]
    assert "the schedule 'rising' gives the factor nan" in sentence(*words, "1", "--out", "run")
    assert f"the schedule 'rising' failed at own.py:{LINES['RISING']}" in sentence(*words, "5", "--out", "again")


def test_a_plan_says_what_failed_and_where(place: Path) -> None:
    said = f"`traffic` of the algorithm 'untold' failed at own.py:{LINES['UNTOLD']} (AttributeError: "
    assert said in sentence("plan", "--algorithms", "own.py:Untold")
    wrong = "`traffic` of the algorithm 'worded': unknown pattern 'stepps': did you mean 'steps'?"
    assert wrong in sentence("plan", "--algorithms", "own.py:Worded")


def test_debug_shows_the_traceback(place: Path) -> None:
    done = call("run", *SMALL, "--debug", "--algorithm", "own.py:Broken", code=2)
    assert "Traceback" in done.stderr
    assert "1 / 0  # BROKEN" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the round of the algorithm 'broken' failed at own.py:")
    assert "--debug" not in done.stderr.splitlines()[-1]


def test_built_in_code_is_not_the_users_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("cutlayer.algorithms.parallel.Psl.round", failing)
    with pytest.raises(ZeroDivisionError, match="ours"):
        Run(algorithm="psl", model="mlp", rounds=1, clients=2, samples_per_client=40).run()
