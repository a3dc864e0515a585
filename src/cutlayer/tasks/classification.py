"""Classification: one class per row, cross entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from cutlayer.errors import ConfigError
from cutlayer.plugins import option
from cutlayer.tasks import measures
from cutlayer.tasks.objective import Task, task


class OfClasses(Task):
    """Tasks whose loss is the cross entropy of scores with classes, for rows, pixels or tokens."""

    wants_scores: ClassVar = True
    loss_options: ClassVar = frozenset({"label_smoothing"})
    scores_axis: ClassVar[int] = 0
    """The position of the class dimension in the model's output for a row."""

    class_weights: tuple[float, ...] = option(())
    """Weight of a row of each class, one number per class. Default: 1 for all."""
    balanced_classes: bool = option(False)
    """Weight classes in inverse proportion to their frequency in the training data: n / (K n_k)."""
    label_smoothing: float = option(0.0, ge=0, lt=1)
    """Fraction of each target that is spread evenly over all classes."""
    ignore_index: int | None = option(None)
    """A class that is left out of the loss and the metrics, such as -100. Default: none."""

    def check(self, given: frozenset[str]) -> None:
        """Class weights come from one place, and are not negative. Raises ConfigError."""
        if self.class_weights and self.balanced_classes:
            raise ConfigError("class_weights and balanced_classes exclude each other: give one")
        if any(w < 0 for w in self.class_weights):
            raise ConfigError(f"class_weights = {self.class_weights} holds a negative number: weights are 0 or more")

    def fitted(self, targets: Tensor, classes: int) -> Self:
        """With the class weights of these targets, if classes are to be balanced."""
        if not self.balanced_classes:
            return self
        counted = targets[self._counting(targets)].flatten()
        scored = self.width(targets, classes)
        each = counted.bincount(minlength=scored).double()
        balanced = len(counted) / (scored * each.clamp(min=1))
        return self.model_copy(update={"class_weights": tuple(balanced.tolist()), "balanced_classes": False})

    @property
    def ignored(self) -> int | None:
        """As the option says."""
        return self.ignore_index

    def width(self, targets: Tensor, classes: int) -> int:
        """A score for each class: for those that have names, or for 0 to the largest target that counts."""
        return classes or int(targets[self._counting(targets)].max()) + 1

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        """The softmax of the scores, shaped as these."""
        return outputs.softmax(self._scored(outputs))

    def decided(self, outputs: Tensor) -> Tensor | None:
        """The class with the largest score: [n, t...]."""
        return outputs.argmax(self._scored(outputs))

    def _scored(self, outputs: Tensor) -> int:
        """The dimension of the scores in outputs [n, ...]."""
        return self.scores_axis + 1 if self.scores_axis >= 0 else outputs.dim() + self.scores_axis

    def entropies(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of each place, unweighted: scores [R, K, t...], targets [R, t...] -> [R, t...]."""
        ignored = -100 if self.ignore_index is None else self.ignore_index
        if not self.class_weights or not self.label_smoothing:
            return functional.cross_entropy(
                scores, targets, reduction="none", ignore_index=ignored, label_smoothing=self.label_smoothing
            )
        # torch weighs the smoothed part class by class; the weight of the place is divided out again.
        weighted = functional.cross_entropy(
            scores,
            targets,
            weight=scores.new_tensor(self.class_weights),
            reduction="none",
            ignore_index=ignored,
            label_smoothing=self.label_smoothing,
        )
        counts = self.counts(targets)
        assert counts is not None, "there are class weights"
        counts = counts.to(weighted.dtype)
        return weighted / torch.where(counts > 0, counts, torch.ones_like(counts))

    def counts(self, targets: Tensor) -> Tensor | None:
        """The weight of each place: [R, t...], in double precision; None if all are 1."""
        if not self.class_weights and self.ignore_index is None:
            return None
        counting = self._counting(targets)
        if not self.class_weights:
            return counting.double()
        each = torch.tensor(self.class_weights, dtype=torch.float64, device=targets.device)
        return torch.where(counting, each[torch.where(counting, targets, torch.zeros_like(targets))], 0.0)

    def counted(self, predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The places that count, one row for each."""
        counting = self._counting(targets)
        return predictions[counting], targets[counting]

    def told_apart(self, given: tuple[int, ...]) -> int:
        """The number of scores."""
        return given[self.scores_axis]

    def mixable(self, outputs: Tensor) -> Tensor:
        """The probabilities."""
        return outputs.softmax(1 + self.scores_axis if self.scores_axis >= 0 else self.scores_axis)

    def unmixed(self, mean: Tensor) -> Tensor:
        """Their logarithms, which are scores again."""
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()

    def foreign(self, targets: Tensor, given: tuple[int, ...]) -> str:
        """Targets that are classes without a score."""
        scored, counted = given[self.scores_axis], targets[self._counting(targets)]
        within = bool(((counted >= 0) & (counted < scored)).all())
        return "" if within else f"other classes than 0 to {scored - 1}"

    def _counting(self, targets: Tensor) -> Tensor:
        return torch.ones_like(targets, dtype=torch.bool) if self.ignore_index is None else targets != self.ignore_index

    def check_classes(self, scored: int, targets: Tensor, names: Sequence[str]) -> None:
        """The model scores all classes. Raises ConfigError."""
        if names and scored < len(names):
            raise ConfigError(
                f"the model scores {scored} classes but the data have {len(names)}: widen its last layer to "
                f"{len(names)}"
            )
        if self.class_weights and len(self.class_weights) != scored:
            raise ConfigError(
                f"class_weights has {len(self.class_weights)} numbers but the model scores {scored} classes: give one "
                "for each"
            )
        counted = targets[self._counting(targets)]
        if counted.numel() and (counted.min() < 0 or counted.max() >= scored):
            odd = counted.min().item() if counted.min() < 0 else counted.max().item()
            raise ConfigError(
                f"the targets hold {odd}, but the model scores classes 0 to {scored - 1}: widen its last layer, or "
                "name the class that does not count with ignore_index"
            )


@task("classification", title="Classification", targets="class")
class Classification(OfClasses):
    """One class per row: cross entropy of scores [R, K] with targets [R]."""

    primary: ClassVar = "accuracy"
    metrics: ClassVar = measures.OF_ROWS
    gives: ClassVar = frozenset({measures.CLASSES, measures.PROBABILITIES, measures.ENTROPY})

    def check(self, given: frozenset[str]) -> None:
        """Named classes are numbered from 0, so the ignored class must not be one of them. Raises ConfigError."""
        super().check(given)
        if self.ignore_index is not None and self.ignore_index >= 0:
            raise ConfigError(
                f"ignore_index = {self.ignore_index} is the number of a class: choose a negative one, such as -100"
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of each row: [R]."""
        return self.entropies(outputs, targets)

    def weights(self, targets: Tensor) -> Tensor | None:
        """The weight of each row's class: [R]."""
        return self.counts(targets)

    def occurrences(self, targets: Tensor, scored: int) -> Tensor:
        """Of each class: [K]."""
        return targets[self._counting(targets)].bincount(minlength=scored)

    def check_outputs(self, outputs: Tensor, targets: Tensor, names: Sequence[str]) -> None:
        """Scores [R, at least K]. Raises ConfigError."""
        if outputs.dim() != 2:
            raise ConfigError(
                f"the model turns {len(targets)} samples into {tuple(outputs.shape)}, not into [{len(targets)}, "
                "classes]: return one row of class scores per sample, or choose another task (see `cutlayer list "
                "tasks`)"
            )
        self.check_classes(outputs.shape[1], targets, names)
