"""A run in MLflow's tracking store: a server, a database, or a folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cutlayer.loggers.listening import Logger, RunStart, logger, need, of_evaluation, of_step
from cutlayer.plugins import option

if TYPE_CHECKING:
    from cutlayer.run import Record, Result, Scores

_AT_ONCE = 900  # figures that are sent together: a request takes 1000
_LONGEST = 6000  # characters of a parameter's value


@logger("mlflow", title="MLflow")
class Mlflow(Logger):
    """Logs options as parameters and results as metrics; a resumed run continues the same MLflow run."""

    mlflow_uri: str | None = option(None, shared=False)
    """Address of the store: http://..., sqlite:///file.db, or a folder. Default: as MLflow decides, from the variable
    MLFLOW_TRACKING_URI."""
    mlflow_experiment: str = option("cutlayer", shared=False)
    """The experiment that runs belong to."""

    _client: Any = None
    _run: str = ""
    _waiting: list[Any] = []  # noqa: RUF012 (a private attribute of pydantic, a new list for each object)

    def check(self, given: frozenset[str]) -> None:
        """Raises ConfigError where the package is missing."""
        need("mlflow", "mlflow", "mlflow-skinny")

    def on_begin(self, run: RunStart) -> None:
        """Begin a run in the experiment, or continue the one of a resumed run."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=self.mlflow_uri)
        self._run = run.kept("mlflow-id", lambda: self._begun(run))
        self._client.update_run(self._run, status="RUNNING")
        values = {name: str(value)[:_LONGEST] for name, value in run.config.items()}
        if not self._client.get_run(self._run).data.params:
            self._client.log_batch(self._run, params=[Param(name, value) for name, value in values.items()])

    def _begun(self, run: RunStart) -> str:
        """The identifier of a new run."""
        experiment = self._client.get_experiment_by_name(self.mlflow_experiment)
        where = experiment.experiment_id if experiment else self._client.create_experiment(self.mlflow_experiment)
        made: str = self._client.create_run(where, run_name=run.name, tags={"group": run.group}).info.run_id
        return made

    def on_step(self, record: Record) -> None:
        """Keep the figures of the step, at the number of completed steps, until there are enough to send."""
        self._note(of_step(record), record.step + 1)
        if len(self._waiting) >= _AT_ONCE:
            self._send()

    def on_evaluate(self, scores: Scores) -> None:
        """Send the figures of the evaluation, and all figures that wait."""
        self._note(of_evaluation(scores), scores.step)
        self._send()

    def on_end(self, result: Result | None) -> None:
        """Send all figures that wait, and how the run ended."""
        self._send()
        self._client.set_terminated(self._run, "KILLED" if result is None else "FINISHED")

    def _note(self, figures: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        self._waiting += [Metric(name, value, now, step) for name, value in figures.items()]

    def _send(self) -> None:
        while self._waiting:
            self._client.log_batch(self._run, metrics=self._waiting[:_AT_ONCE])
            del self._waiting[:_AT_ONCE]
