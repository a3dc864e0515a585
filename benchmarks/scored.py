"""Common parts of benchmarks of accuracy: the data, and the score of a run."""

from __future__ import annotations

from dataclasses import replace

from cutlayer import NonFiniteError, Run, Source, load


def data(path: str, tested: int) -> Source:
    """Fashion-MNIST with its first `tested` test rows."""
    found = load(path)
    return replace(found, test=found.test[:tested], validation=found.validation[:0])


def accuracy(run: Run) -> float:
    """Train, to the test accuracy at the end, in percent; nan if it ended with numbers that are not finite."""
    try:
        score = run.run().test_score
    except NonFiniteError:
        return float("nan")
    assert score is not None, "an accuracy is always defined"
    return 100 * score
