"""Common parts of benchmarks of accuracy: the data, and the score of a run."""

from __future__ import annotations

from dataclasses import replace

from cutlayer import NonFiniteError, Run, Source, load


def data(path: str, tested: int) -> Source:
    """Fashion-MNIST with its first `tested` test rows."""
    found = load(path)
    return replace(found, test=found.test[:tested], validation=found.validation[:0])


def accuracy(run: Run) -> float:
    """The test accuracy at the end of training, in percent; nan if numbers became infinite or NaN."""
    try:
        score = run.run().test_score
    except NonFiniteError:
        return float("nan")
    assert score is not None, "an accuracy is always defined"
    return 100 * score
