"""Tokens: a class for each token of a sequence, or the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.plugins import option
from cutlayer.tasks import measures
from cutlayer.tasks.classification import OfClasses
from cutlayer.tasks.objective import mean_of_counting, task


@task("tokens", title="Tokens", targets="classes")
class TokenPrediction(OfClasses):
    """A class for each token: the mean cross entropy of scores [R, T, K] with targets [R, T] over the tokens that
    count. A row counts as many as its tokens that count, so that the loss is the mean over all tokens.
    """

    primary: ClassVar = "perplexity"
    scores_axis: ClassVar = -1
    metrics: ClassVar = measures.chosen(measures.perplexity, measures.accuracy, measures.majority)
    gives: ClassVar = frozenset({measures.CLASSES, measures.ENTROPY})

    ignore_index: int | None = option(-100)
    """Target value that does not count, used for tokens of the prompt and for padding."""
    next_token: bool = option(False)
    """The targets are the inputs themselves, and each position predicts the token after it: scores 0 to T - 2 are
    compared with targets 1 to T - 1."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over a row's tokens that count: [R]."""
        scores, wanted = self._aligned(outputs, targets)
        each, counts = self.entropies(scores.transpose(1, 2), wanted), self.counts(wanted)
        return each.mean(1) if counts is None else mean_of_counting(each, counts.to(each.dtype))

    def weights(self, targets: Tensor) -> Tensor | None:
        """The total weight of a row's tokens: [R]."""
        counts = self.counts(targets[:, 1:] if self.next_token else targets)
        return None if counts is None else counts.sum(1)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The token with the largest score: [n, T]."""
        return outputs.argmax(2)

    def counted(self, predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that count, each with its target."""
        return super().counted(*self._aligned(predictions, targets))

    def check_outputs(self, outputs: Tensor, targets: Tensor, names: Sequence[str]) -> None:
        """Scores [R, T, K] for targets [R, T]. Raises ConfigError."""
        if outputs.dim() != 3 or outputs.shape[:2] != targets.shape:
            raise ConfigError(
                f"the model gives {tuple(outputs.shape[1:])} per sample but its target is {tuple(targets.shape[1:])}: "
                "return scores [tokens, classes] for targets [tokens]"
            )
        scores, wanted = self._aligned(outputs, targets)
        self.check_classes(scores.shape[2], wanted, names)

    def _aligned(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return (outputs[:, :-1], targets[:, 1:]) if self.next_token else (outputs, targets)
