"""Callbacks and loggers: their calls, their failures, and their files after a resumed run."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, call

from cutlayer import Comparison, ConfigError, Run, RunConfig, TrainingError
from cutlayer.errors import CutlayerWarning
from cutlayer.files import read_records
from cutlayer.folder import LOGS, STEPS
from cutlayer.loggers import Callback, Logger, RunStart, logger
from cutlayer.loggers.listening import need, of_evaluation, of_step
from cutlayer.plugins import option
from cutlayer.testing.deployed import in_memory

STUDY: dict[str, Any] = {
    "data": "digits", "model": "mlp", "algorithm": "psl", "clients": 2, "samples_per_client": 20, "rounds": 3,
    "eval_every": 1, "checkpoint_every": 2,
}  # fmt: skip


FIND, BEFORE = importlib.util.find_spec, set(sys.modules)


class Hearing:
    """A callback that records its calls."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def on_begin(self, run: RunStart) -> None:
        self.heard.append(("begin", run))

    def on_step(self, record: Any) -> None:
        self.heard.append(("step", record))

    def on_evaluate(self, scores: Any) -> None:
        self.heard.append(("evaluate", scores))

    def on_end(self, result: Any) -> None:
        self.heard.append(("end", result))

    def of(self, what: str) -> list[Any]:
        return [said for kind, said in self.heard if kind == what]


def test_a_callback_hears_everything_in_order() -> None:
    hearing = Hearing()
    run = Run(**STUDY, callbacks=[hearing])
    records = list(run)
    assert [kind for kind, _ in hearing.heard] == ["begin", *[*["step"] * 3, "evaluate"] * 3, "end"]
    assert hearing.of("step") == records
    assert hearing.of("evaluate") == run.evaluations
    assert hearing.of("end") == [run.result]
    (start,) = hearing.of("begin")
    assert (start.name, start.group, start.metric, start.folder) == ("psl-seed-0", "", "accuracy", None)
    assert (start.steps, start.rounds, start.config["batch"]) == (0, 0, 8)


def test_it_hears_of_an_interruption_and_where_training_goes_on(tmp_path: Path) -> None:
    first, second = Hearing(), Hearing()
    run = iter(Run(**STUDY, callbacks=[first], out=tmp_path / "run"))
    for _ in range(8):  # stops in the third round; the checkpoint is that of the second
        next(run)
    run.close()  # type: ignore[attr-defined]
    assert first.of("end") == [None]
    Run.resume(tmp_path / "run", callbacks=[second]).run()
    (start,) = second.of("begin")
    assert (start.name, start.steps, start.rounds, start.folder) == ("run", 6, 2, tmp_path / "run" / LOGS)
    assert [record.step for record in second.of("step")] == [6, 7, 8]


def test_hooks_may_be_missing() -> None:
    class Counting:
        count = 0

        def on_step(self, record: Any) -> None:
            self.count += 1

    counting = Counting()
    Run(**STUDY, callbacks=[counting, Callback()]).run()
    assert counting.count == 9


@pytest.mark.parametrize("callbacks", ["csv", [object()], [Hearing]])
def test_what_cannot_be_told_is_refused(callbacks: Any) -> None:
    with pytest.raises(ConfigError, match=r"is not a list of objects|cannot be a callback"):
        Run(**STUDY, callbacks=callbacks)


@pytest.mark.parametrize("hook", ["on_step", "on_evaluate", "on_end"])
def test_one_that_fails_is_left_out_and_said(hook: str) -> None:
    class Failing(Callback):
        calls = 0

    def fail(self: Any, _: Any) -> None:
        self.calls += 1
        raise OSError("the service is away\nwith details")

    setattr(Failing, hook, fail)
    failing, hearing = Failing(), Hearing()
    with pytest.warns(CutlayerWarning) as warned:
        result = Run(**STUDY, callbacks=[failing, hearing]).run()
    (said,) = [str(w.message) for w in warned]
    place = r" at .*test_loggers\.py:\d+"
    assert re.fullmatch(
        rf"callback 1 \(Failing\) failed in {hook}{place} \(OSError: the service is away\): it is not called "
        "again in this run, which continues",
        said,
    )
    assert failing.calls == 1
    assert (result.steps, len(hearing.of("step")), len(hearing.of("end"))) == (9, 9, 1)


def test_one_that_cannot_begin_ends_the_run_before_training() -> None:
    class Failing(Hearing):
        def on_begin(self, run: RunStart) -> None:
            raise ValueError("no key")

    before, failing = Hearing(), Failing()
    with pytest.raises(ConfigError, match=r"callback 2 \(Failing\) failed at .*test_loggers.py:\d+ \(ValueError: no k"):
        Run(**STUDY, callbacks=[before, failing]).run()
    assert [kind for kind, _ in before.heard] == ["begin", "end"]
    assert failing.heard == []


def test_an_error_on_purpose_ends_the_run() -> None:
    class Strict(Callback):
        def on_evaluate(self, scores: Any) -> None:
            raise TrainingError("good enough")

    with pytest.raises(TrainingError, match="good enough"):
        Run(**STUDY, callbacks=[Strict()]).run()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(file)]


def untimed(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    return [line for line in lines if line["metric"] != "seconds"]


def test_csv_files_hold_the_records(tmp_path: Path) -> None:
    run = Run(**STUDY, log_to=("csv",), out=tmp_path / "run")
    run.run()
    logs = tmp_path / "run" / LOGS
    lines, records = read(logs / "steps.csv"), list(read_records(tmp_path / "run" / STEPS))
    assert [(int(a["step"]), float(a["loss"]), int(a["bytes_up"])) for a in lines] == [
        (b["step"], b["loss"], b["bytes_up"]) for b in records
    ]
    found = {(int(a["round"]), a["rows"], a["metric"]): float(a["value"]) for a in read(logs / "evaluations.csv")}
    for scores in run.evaluations:
        assert found[scores.round, "test", "accuracy"] == scores.test_score
        assert found[scores.round, "validation", "loss"] == scores.validation_loss
        assert found[scores.round, "run", "bytes_down"] == scores.bytes_down


def test_csv_files_of_a_resumed_run_are_those_of_the_uninterrupted_one(tmp_path: Path) -> None:
    """The run is interrupted after an evaluation that is not in the checkpoint, in the middle of a line."""
    options = {**STUDY, "rounds": 4, "log_to": ("csv",)}
    Run(**options, out=tmp_path / "quiet").run()
    broken = iter(Run(**options, out=tmp_path / "broken"))
    for _ in range(10):
        next(broken)
    broken.close()  # type: ignore[attr-defined]
    logs, quiet = tmp_path / "broken" / LOGS, tmp_path / "quiet" / LOGS
    assert [line["step"] for line in read(logs / "steps.csv")] == list(map(str, range(10)))
    with (logs / "steps.csv").open("a", encoding="utf-8") as file:
        file.write("10,3,0.")
    Run.resume(tmp_path / "broken").run()
    assert read(logs / "steps.csv") == read(quiet / "steps.csv")
    assert untimed(read(logs / "evaluations.csv")) == untimed(read(quiet / "evaluations.csv"))


def test_loggers_may_skip_steps_but_no_evaluations(tmp_path: Path) -> None:
    Run(**STUDY, log_to=("csv",), log_every=4, out=tmp_path / "run").run()
    logs = tmp_path / "run" / LOGS
    assert [line["step"] for line in read(logs / "steps.csv")] == ["0", "4", "8"]
    assert {line["round"] for line in read(logs / "evaluations.csv")} == {"1", "2", "3"}


def test_options_of_loggers_are_those_of_loggers_that_are_named() -> None:
    with pytest.raises(ConfigError, match=r"log_every = 4 has no effect on a run without this logger"):
        Run(**STUDY, log_every=4)
    with pytest.raises(ConfigError, match=r"wandb_project = 'x' has no effect on the logger csv"):
        Run(**STUDY, log_to=("csv",), wandb_project="x")


def test_a_logger_of_files_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"the logger 'csv' writes files, and this run has no folder"):
        Run(**STUDY, log_to=("csv",)).run()


def test_one_is_named_once() -> None:
    with pytest.raises(ConfigError, match=r"log_to names 'csv' twice"):
        Run(**STUDY, log_to=("csv", "csv"))
    with pytest.raises(ConfigError, match=r"unknown logger 'tensorbord'.*tensorboard"):
        Run(**STUDY, log_to=("tensorbord",))


def test_a_missing_package_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the name of the package does not count. wandb makes such a folder where it is called."""
    (tmp_path / "absent_logs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("absent_logs", "absent_altogether"):
        with pytest.raises(ConfigError) as raised:
            need(name, "mlflow", "mlflow-skinny")
        assert str(raised.value) == (
            "the logger 'mlflow' needs the package mlflow-skinny, which is not installed: pip install "
            "'cutlayer[mlflow]'"
        )
    need("json", "mlflow")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_it_is_said_before_anything_is_trained(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is raised before anything is written, in runs and in comparisons."""
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None if module == name else FIND(module))
    with pytest.raises(ConfigError, match=rf"pip install 'cutlayer\[{name}\]'"):
        Run(**STUDY, log_to=(name,), out=tmp_path / "run")
    options = {k: v for k, v in STUDY.items() if k != "algorithm"}
    comparison = Comparison(**options, algorithms=("psl",), seeds=(0,), log_to=(name,), out=tmp_path / "all")
    with pytest.raises(ConfigError, match=rf"pip install 'cutlayer\[{name}\]'"):
        comparison.run()
    assert list(tmp_path.iterdir()) == []


def test_what_is_used_is_imported_and_nothing_else() -> None:
    """Logged numbers are those of the records. Without loggers, no logger's library is imported."""
    run = Run(**STUDY)
    record = next(iter(run))
    assert of_step(record)["train/loss"] == record.loss
    assert not {"mlflow", "wandb", "trackio"} & (set(sys.modules) - BEFORE)


def test_figures_without_matrices_and_what_is_not_known() -> None:
    run = Run(**STUDY, metrics=("confusion",))
    run.run()
    figures = of_evaluation(run.evaluations[-1])
    assert figures["test/accuracy"] == run.evaluations[-1].test_score
    assert "test/confusion" not in figures
    assert "run/virtual_seconds" not in figures


@logger("own-lines")
class OwnLines(Logger):
    """Writes a line for each step."""

    own_word: str = option("step", shared=False)

    _lines: list[str] = []  # noqa: RUF012

    def on_step(self, record: Any) -> None:
        self._lines.append(f"{self.own_word} {record.step}")

    def on_end(self, result: Any) -> None:
        assert len(self._lines) == 9, "each run has a logger of its own"
        ENDS.append(self._lines)


ENDS: list[list[str]] = []


def test_objects_and_classes_are_loggers_too() -> None:
    """Each run has its own logger: a given object is copied for each run."""
    ENDS.clear()
    given = OwnLines(own_word="at")
    for _ in range(2):
        Run(**STUDY, log_to=(given,)).run()
    Run(**STUDY, log_to=(OwnLines,), own_word="by").run()
    assert [lines[-1] for lines in ENDS] == ["at 8", "at 8", "by 8"]


class Plain:
    """Not registered. Its keyword-only parameters are its options."""

    def __init__(self, *, plain_factor: int = 2) -> None:
        self.factor = plain_factor

    def on_end(self, result: Any) -> None:
        ENDS.append([f"{self.factor * result.steps}"])


def test_a_plain_class_is_a_logger() -> None:
    ENDS.clear()
    Run(**STUDY, log_to=(Plain,)).run()
    Run(**STUDY, log_to=(Plain,), plain_factor=3).run()
    assert ENDS == [["18"], ["27"]]


def test_a_comparison_tells_of_every_run(tmp_path: Path) -> None:
    hearing = Hearing()
    options = {k: v for k, v in STUDY.items() if k != "algorithm"}
    Comparison(
        **options, algorithms=("psl", "fl"), seeds=(0,), log_to=("csv",), callbacks=[hearing], out=tmp_path / "all"
    ).run()
    assert [(start.name, start.group) for start in hearing.of("begin")] == [("psl-seed-0", "all"), ("fl-seed-0", "all")]
    assert len(hearing.of("end")) == 2
    for entry in ("psl", "fl"):
        assert len(read(tmp_path / "all" / entry / "seed-0" / LOGS / "steps.csv")) == 9
    with pytest.raises(ConfigError, match=r"callbacks are called in this process, and jobs = 2 trains in others"):
        Comparison(callbacks=[hearing], jobs=2)


def test_a_server_logs_what_remote_clients_train(tmp_path: Path) -> None:
    deployed = in_memory(RunConfig.of({**STUDY, "log_to": ("csv",)}), folder=tmp_path)
    deployed.run.run()
    records = [str(record["step"]) for record in read_records(tmp_path / "run" / STEPS)]
    assert [line["step"] for line in read(tmp_path / "run" / LOGS / "steps.csv")] == records
    assert not list(tmp_path.glob(f"client-*/{LOGS}")), "the clients have the same configuration and log nothing"


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's logger is named by its file, as a flag and in TOML, with its option."""
    page = (ROOT / "docs/logging.md").read_text(encoding="utf-8")
    text = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "@logger" in block)
    (tmp_path / "lines.py").write_text(text, encoding="utf-8")
    (tmp_path / "study.toml").write_text('log_to = ["csv", "lines.py:Lines"]\nlines_word = "at"\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in STUDY.items()]
    for number, more in enumerate((["--config", "study.toml"], ["--log-to", "lines.py:Lines", "--lines-word", "at"])):
        call("run", *flags, *more, "--out", f"run-{number}", cwd=tmp_path)
        said = (tmp_path / f"run-{number}" / LOGS / "lines.txt").read_text(encoding="utf-8").splitlines()
        assert said[0].startswith("at 0: loss ")
        assert (len(said), said[-1]) == (10, "done: 9 steps")
    assert json.dumps("lines.py:Lines")[1:-1] in (tmp_path / "run-1" / "config.toml").read_text(encoding="utf-8")
