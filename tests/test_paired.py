"""Paired differences over seeds, compared with scipy's tests and with numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from cutlayer.paired import holm, paired, seeds_needed

DIFFERENCES = [1.2, 0.4, 2.1, -0.3, 0.9]


def test_a_paired_t_test() -> None:
    found, theirs = paired(DIFFERENCES), stats.ttest_1samp(DIFFERENCES, 0)
    low, high = theirs.confidence_interval(0.95)
    assert (found.pairs, found.mean) == (5, pytest.approx(0.86))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.p == pytest.approx(theirs.pvalue)
    assert paired([-d for d in DIFFERENCES]).p == found.p


def test_few_and_equal_differences() -> None:
    assert paired([]) == paired([])
    assert paired([]).mean is None
    assert (paired([0.5]).mean, paired([0.5]).low, paired([0.5]).p) == (0.5, None, None)
    assert (paired([0.0, 0.0]).p, paired([0.0, 0.0]).low) == (1.0, 0.0)
    assert paired([0.5, 0.5]).p == 0.0


def test_holm_by_hand() -> None:
    """0.01 x 4, 0.02 x 3, 0.03 x 2. The last, 0.04 x 1, is raised to the 0.06 before it."""
    assert holm([0.03, None, 0.01, 0.04, 0.02]) == pytest.approx([0.06, None, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_the_fewest_seeds() -> None:
    """By the noncentral distribution, the power of the t test passes 0.8 at about this number of seeds."""
    for std, wanted in ((1.0, 1.0), (1.0, 0.5), (2.0, 0.5)):
        n = seeds_needed(std, wanted)
        assert n is not None
        power = [
            1 - stats.nct.cdf(stats.t.ppf(0.975, k - 1), k - 1, wanted * math.sqrt(k) / std) for k in (n - 1, n + 1)
        ]
        assert power[0] < 0.81
        assert power[1] > 0.79
    assert seeds_needed(0.0, 1.0) == 2
    assert seeds_needed(100.0, 0.1) is None
    with pytest.raises(ValueError, match="greater than 0, not 0"):
        seeds_needed(1.0, 0)
