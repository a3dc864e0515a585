"""Early stopping: training ends when the validation score no longer improves, also in a resumed run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import same
from test_resume import assert_same_runs

from cutlayer import Comparison, ConfigError, Run, RunConfig, checkpoint
from cutlayer.build import assemble
from cutlayer.cli import results
from cutlayer.cli.application import out as console
from cutlayer.files import read_records
from cutlayer.folder import CHECKPOINT, EVALUATIONS, RESULT, STEPS
from cutlayer.report import write
from cutlayer.report.collect import read
from cutlayer.testing.deployed import in_memory

# At this rate the model hardly changes: all evaluations are equal, and none is better than the first.
STUCK: dict[str, Any] = {
    "data": "digits", "model": "mlp", "algorithm": "psl", "clients": 3, "samples_per_client": 20, "rounds": 9,
    "client_lr": 1e-12, "client_optimizer": "sgd", "eval_every": 1, "checkpoint_every": 1,
}  # fmt: skip
LEARNING = {**STUCK, "clients": 2, "client_lr": 0.1, "client_optimizer": "adam", "rounds": 30}


def waited(scores: list[float]) -> list[int]:
    """For each evaluation, the number of evaluations since the first best one."""
    return [k - scores.index(max(scores[: k + 1])) for k in range(len(scores))]


@pytest.mark.parametrize("patience", [1, 3])
def test_it_stops_after_so_many_evaluations_without_a_better_one(patience: int) -> None:
    result = Run(**STUCK, stop_after=patience).run()
    assert result.rounds == 1 + patience
    assert result.stopped == (
        f"stopped early, after round {1 + patience} of 9: the accuracy on the validation rows has not become better "
        f"since round 1 (stop_after = {patience})"
    )


def test_it_trains_to_the_end_while_it_gets_better() -> None:
    """Training also continues if early stopping was not requested."""
    assert Run(**STUCK).run().stopped == ""
    result = Run(**{**LEARNING, "rounds": 3}, stop_after=3).run()
    assert (result.rounds, result.stopped) == (3, "")


def test_up_to_there_it_is_the_run_without_it(tmp_path: Path) -> None:
    """Up to its end, the run has the steps, scores and models of the whole run: schedules use the planned rounds."""
    stopped = Run(**LEARNING, stop_after=2, out=tmp_path / "stopped")
    result = stopped.run()
    scores = [s.validation_score or 0.0 for s in stopped.evaluations]
    assert 2 < result.rounds < 30, "otherwise this shows nothing"
    assert [waiting >= 2 for waiting in waited(scores)] == [False] * (result.rounds - 1) + [True]
    whole = Run(**LEARNING, out=tmp_path / "whole")
    for record in whole:
        if record.round == result.rounds:
            break
    assert [s.validation_score for s in whole.evaluations] == scores
    kept, other = (checkpoint.read(tmp_path / name / CHECKPOINT) for name in ("stopped", "whole"))
    assert kept["rounds"] == other["rounds"] == result.rounds
    assert all(same(kept[part], other[part]) for part in ("server", "clients"))


def test_resumed_it_stops_at_the_same_place(tmp_path: Path) -> None:
    options = {**LEARNING, "stop_after": 2}
    Run(**options, out=tmp_path / "quiet").run()
    total = len(list(read_records(tmp_path / "quiet" / STEPS)))
    for stop in (total // 2, total - 1):
        broken = tmp_path / f"broken-{stop}"
        for count, _ in enumerate(Run(**options, out=broken), 1):
            if count == stop:
                break
        Run.resume(broken).run()
        assert_same_runs(tmp_path / "quiet", broken)
        assert json.loads((broken / RESULT).read_text())["stopped"]


def test_resumed_after_the_end_it_trains_no_further(tmp_path: Path) -> None:
    """The process may end between the last checkpoint and the result."""
    first = Run(**STUCK, stop_after=2, out=tmp_path / "run").run()
    (tmp_path / "run" / RESULT).unlink()
    again = Run.resume(tmp_path / "run").run()
    assert (again.rounds, again.steps, again.stopped) == (first.rounds, first.steps, first.stopped)


def test_at_the_end_all_are_judged_as_in_a_whole_run(tmp_path: Path) -> None:
    """If only some clients are evaluated during training, all of them are evaluated after the last round."""
    config = RunConfig.of({**STUCK, "stop_after": 1, "eval_clients": 1})
    run = Run(config, training=replace(assemble(config), eval_last=None), out=tmp_path / "run")
    run.run()
    assert [s.round for s in run.evaluations] == [1, 2, 2]
    judged = [len(line["clients"]) for line in read_records(tmp_path / "run" / "clients.jsonl")]
    assert judged == [1, 1, 3]
    assert len(list(read_records(tmp_path / "run" / EVALUATIONS))) == 3


def test_test_rows_do_not_decide() -> None:
    with pytest.raises(ConfigError, match=r"stop_after = 2 needs validation rows"):
        Run(**STUCK, validation=0, stop_after=2)


def test_the_page_and_the_log_say_it(tmp_path: Path) -> None:
    result = Run(**STUCK, stop_after=2, out=tmp_path / "run").run()
    write(tmp_path / "run")
    assert result.stopped in (tmp_path / "run" / "report.html").read_text()
    with console.capture() as shown:
        results.print_result(result)
    assert result.stopped in " ".join(shown.get().split())


def test_the_page_of_a_comparison_says_it(tmp_path: Path) -> None:
    """Each run stops by itself, and its progress line gives the reason."""
    options = {k: v for k, v in STUCK.items() if k != "algorithm"}
    comparison = Comparison(**options, algorithms=("psl", "fl"), seeds=(0, 1), stop_after=2, out=tmp_path / "all")
    ends = [progress.standing for progress in comparison.progress() if progress.ended]
    assert [(standing.done, standing.rounds, bool(standing.stopped)) for standing in ends] == [(3, 9, True)] * 4
    assert {entry.note for entry in read(tmp_path / "all").entries} == {"2 of 2 runs stopped early (stop_after)"}


def test_with_remote_clients_the_server_stops() -> None:
    deployed = in_memory(RunConfig.of({**STUCK, "stop_after": 2}))
    result = deployed.run.run()
    assert (result.engine, result.rounds) == ("remote", 3)
    assert result.stopped
