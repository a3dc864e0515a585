"""A run in trackio: a database on this machine, which `trackio show` opens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cutlayer.loggers.listening import Logger, RunStart, logger, need, of_evaluation, of_step
from cutlayer.plugins import option

if TYPE_CHECKING:
    from cutlayer.run import Record, Result, Scores


@logger("trackio")
class Trackio(Logger):
    """Logs each run as one run of Trackio, grouped by comparison; a resumed run continues the same one."""

    trackio_project: str = option("cutlayer", shared=False)
    """The project that runs go to."""

    _run: Any = None

    def check(self, given: frozenset[str]) -> None:
        """Raises ConfigError where the package is missing."""
        need("trackio", "trackio")

    def on_begin(self, run: RunStart) -> None:
        """Begin a run, or go on with the one of that name."""
        import trackio

        name = run.kept("trackio-name", lambda: run.name)
        self._run = trackio.init(
            self.trackio_project,
            name=name,
            group=run.group or None,
            config=dict(run.config),
            resume="allow" if run.steps else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def on_step(self, record: Record) -> None:
        """The figures of the step, at the number of steps that are done."""
        self._run.log(of_step(record), step=record.step + 1)

    def on_evaluate(self, scores: Scores) -> None:
        """The figures of the evaluation."""
        self._run.log(of_evaluation(scores), step=scores.step)

    def on_end(self, result: Result | None) -> None:
        """Write all that waits."""
        self._run.finish()
