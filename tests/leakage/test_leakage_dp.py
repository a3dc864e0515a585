"""Differential privacy: closed forms, published values, the library's accountants, and impossible requests."""

import math

import pytest

from cutlayer.defences import dp
from cutlayer.errors import ConfigError


def test_sampled_gaussian_gives_the_published_values():
    """sigma = 1.1, q = 0.01, 1000 steps, delta = 1e-5: 1.7118 by Renyi orders, 1.5154 by loss distributions."""
    found = dp.sampled_gaussian(1.1, 0.01, 1000, 1e-5)
    assert found.rdp == pytest.approx(1.7118, abs=1e-4)
    assert 1.5154 <= found.prv <= 1.5154 + 0.011  # an upper bound with an error of 0.01


@pytest.mark.parametrize(("multiplier", "epochs"), [(1.1, 1), (5.0, 10), (20.0, 50)])
def test_the_exact_epsilon_lies_just_below_the_accountants(multiplier, epochs):
    """Without sampling, the sampled Gaussian mechanism is the Gaussian mechanism."""
    exact = dp.gaussian(multiplier * 2 * 3.0, 3.0, epochs, 1e-5).epsilon
    bounds = dp.sampled_gaussian(multiplier, 1.0, epochs, 1e-5)
    assert exact < bounds.prv < exact + 0.011
    assert exact < bounds.rdp < exact * 1.1


def test_composition_of_gaussians_is_one_gaussian():
    assert dp.gaussian(4.0, 1.0, 16).epsilon == pytest.approx(dp.gaussian(1.0, 1.0, 1).epsilon, rel=1e-9)
    assert dp.gaussian(4.0, 1.0, 16).once < dp.gaussian(4.0, 1.0, 16).epsilon


def test_laplace_is_the_closed_form():
    statement = dp.laplace(scale=5.0, clip=1.5, epochs=4)
    assert statement.sensitivity == 3.0
    assert statement.epsilon == pytest.approx(4 * 3.0 / 5.0)
    assert statement.delta == 0


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0, 8.0, 300.0])
def test_noise_for_an_epsilon_gives_that_epsilon(epsilon):
    assert dp.gaussian_for(epsilon, 2.0, 30, 1e-6).epsilon == pytest.approx(epsilon, rel=1e-6)
    assert dp.laplace_for(epsilon, 2.0, 30).epsilon == pytest.approx(epsilon)


def test_no_noise_is_no_guarantee():
    for statement in (dp.gaussian(0, 1, 1), dp.laplace(0, 1, 1)):
        assert math.isinf(statement.epsilon)
        assert "nothing is guaranteed" in str(statement)


def test_a_statement_says_what_is_protected_and_what_not():
    statement = dp.gaussian(1.0, 1.0, 2)
    assert "replacing the sample" in statement.protects
    assert any("labels" in what for what in statement.not_covered)
    assert "no amplification by sampling" in str(statement)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda: dp.gaussian_for(0, 1, 1), "epsilon=0: no noise with a finite scale"),
        (lambda: dp.laplace_for(-1, 1, 1), "epsilon=-1: no noise"),
        (lambda: dp.gaussian_for(1, 1, 1, delta=0), "no Gaussian noise gives delta = 0: use Laplace"),
        (lambda: dp.gaussian(1, 1, 1, delta=1), "delta=1: give a number between 0 and 1"),
        (lambda: dp.gaussian(1, math.inf, 1), "clip=inf: without a finite bound"),
        (lambda: dp.laplace(1, 1, 0), "epochs=0"),
        (lambda: dp.laplace(-1, 1, 1), "scale=-1"),
        (lambda: dp.sampled_gaussian(1, 0, 1), "rate=0"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_sentence(ask, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ask()
