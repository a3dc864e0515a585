"""A run at Weights & Biases, or in a folder that `wandb sync` sends there later."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Literal

from cutlayer.loggers.listening import Logger, RunStart, logger, need, of_evaluation, of_step
from cutlayer.plugins import option

if TYPE_CHECKING:
    from cutlayer.run import Record, Result, Scores


@logger("wandb", title="Weights & Biases")
class Wandb(Logger):
    """Logs each run as one run of W&B, grouped by comparison; a resumed run continues the same one."""

    wandb_project: str = option("cutlayer", shared=False)
    """The project that runs go to."""
    wandb_mode: Literal["online", "offline"] | None = option(None, shared=False)
    """Send runs at once (online), or keep them for `wandb sync` (offline). Default: the variable WANDB_MODE, or
    online."""

    _run: Any = None

    def check(self, given: frozenset[str]) -> None:
        """Raises ConfigError where the package is missing."""
        need("wandb", "wandb")

    def on_begin(self, run: RunStart) -> None:
        """Begin a run, or go on with the one that a resumed run has."""
        import wandb

        self._run = wandb.init(
            project=self.wandb_project,
            name=run.name,
            group=run.group or None,
            id=run.kept("wandb-id", lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            reinit="create_new",
            mode=self.wandb_mode,
            config=dict(run.config),
            dir=None if run.folder is None else str(run.place("wandb")),
            settings=wandb.Settings(console="off", quiet=True),  # only Cutlayer's progress is printed
        )
        self._run.define_metric("*", step_metric="step")  # steps that are trained again replace earlier ones

    def on_step(self, record: Record) -> None:
        """The figures of the step, at the number of steps that are done."""
        self._run.log({**of_step(record), "step": record.step + 1})

    def on_evaluate(self, scores: Scores) -> None:
        """The figures of the evaluation."""
        self._run.log({**of_evaluation(scores), "step": scores.step, "round": scores.round})

    def on_end(self, result: Result | None) -> None:
        """The result as the run's summary; a run without one has failed there."""
        if result is not None:
            self._run.summary.update({"test_score": result.test_score, "best_test_score": result.best_test_score})
        self._run.finish(exit_code=0 if result is not None else 1)
