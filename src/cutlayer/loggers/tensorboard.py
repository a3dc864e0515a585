"""A run for TensorBoard: an events file in the folder `logs/tensorboard` of the run's own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cutlayer.loggers.listening import Logger, RunStart, logger, need, of_evaluation, of_step

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from cutlayer.run import Record, Result, Scores


@logger("tensorboard")
class TensorBoard(Logger):
    """Logs scalars over steps, and the options as text. `tensorboard --logdir runs` shows all runs below a folder."""

    _writer: SummaryWriter | None = None

    def check(self, given: frozenset[str]) -> None:
        """Raises ConfigError where the package is missing."""
        need("tensorboard", "tensorboard")

    def on_begin(self, run: RunStart) -> None:
        """Open a file. Entries of earlier files about steps that are trained again are not shown."""
        from torch.utils.tensorboard.writer import SummaryWriter

        place = run.place("the logger 'tensorboard'") / "tensorboard"
        self._writer = SummaryWriter(str(place), purge_step=run.steps + 1 if run.steps else None)
        self._writer.add_text("options", f"```\n{json.dumps(dict(run.config), indent=1)}\n```", run.steps + 1)

    def on_step(self, record: Record) -> None:
        """The figures of the step, at the number of steps that are done."""
        for name, value in of_step(record).items():
            self._add(name, value, record.step + 1)

    def on_evaluate(self, scores: Scores) -> None:
        """The figures of the evaluation, flushed for readers."""
        for name, value in of_evaluation(scores).items():
            self._add(name, value, scores.step)
        assert self._writer is not None, "the run has begun"
        self._writer.flush()

    def on_end(self, result: Result | None) -> None:
        """Close the file."""
        assert self._writer is not None, "the run has begun"
        self._writer.close()

    def _add(self, name: str, value: float, step: int) -> None:
        assert self._writer is not None, "the run has begun"
        self._writer.add_scalar(name, value, step)
