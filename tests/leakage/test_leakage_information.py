"""Mutual and usable information compared with closed forms, in dimensions that the estimators can handle."""

import math

import pytest
import torch

from cutlayer.errors import ConfigError, DataError
from cutlayer.leakage import calibration, information, mutual
from cutlayer.leakage.fitting import Budget
from cutlayer.leakage.ranks import dependence

METHODS = ("ksg", "infonce", "smile", "mine")


def gaussians(n: int, d: int, rho: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Pairs whose dimensions are correlated one to one, and their mutual information."""
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=draw)
    b = rho * a + math.sqrt(1 - rho**2) * torch.randn(n, d, generator=draw)
    return a, b, -d / 2 * math.log(1 - rho**2)


@pytest.mark.parametrize("method", METHODS)
def test_a_bivariate_gaussian_is_read_right(method):
    a, b, truth = gaussians(2000, 1, 0.8)
    found = mutual.estimate(a, b, method=method, view="raw")
    assert found.nats == pytest.approx(truth, abs=0.12)
    assert abs(found.null) < 0.06
    assert found.warning is None


@pytest.mark.parametrize("method", METHODS)
def test_independent_data_read_nothing(method):
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(1000, 3, generator=draw), torch.randn(1000, 4, generator=draw)
    found = mutual.estimate(a, b, method=method, view="cca", k=2)
    assert abs(found.nats) < 0.1
    assert abs(found.null) < 0.1


def test_an_estimate_is_repeatable_and_leaves_global_randomness_alone():
    a, b, _ = gaussians(400, 2, 0.5)
    few = Budget(steps=50, batch=64, check_every=25)
    before = torch.get_rng_state()
    first, second, other = (mutual.estimate(a, b, method="smile", seed=s, budget=few) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert first == second != other


def test_infonce_cannot_read_more_than_its_cap():
    a, _, _ = gaussians(500, 2, 0.5)
    found = mutual.estimate(a, a, method="infonce", view="raw")
    assert found.cap == math.log(100)
    assert 2.5 < found.nats <= found.cap


def test_projections_read_no_more_than_the_whole():
    """The data processing inequality: random 1-dimensional slices < canonical pair < all five dimensions."""
    a, b, truth = gaussians(2000, 5, 0.8)
    slices = mutual.estimate(a, b, method="ksg", view="random", k=1, slices=10)
    pair = mutual.estimate(a, b, method="ksg", view="cca", k=1)
    assert slices.slices == 10
    assert slices.nats < pair.nats < truth
    assert pair.nats == pytest.approx(truth / 5, abs=0.1)


def test_more_noise_reads_less_in_expectation():
    """The data processing inequality for x - z - z + noise, in the mean over seeds."""
    readings = []
    for noise in (0.0, 0.7, 2.0):
        total = 0.0
        for seed in range(4):
            a, b, _ = gaussians(1000, 2, 0.9, seed)
            b = b + noise * torch.randn(b.shape, generator=torch.Generator().manual_seed(9 + seed))
            total += mutual.estimate(a, b, method="ksg", view="raw").nats / 4
        readings.append(total)
    assert readings[0] > readings[1] + 0.2 > readings[2] + 0.4


def test_many_raw_dimensions_carry_a_warning_and_calibration_shows_why():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(500, 40, generator=draw), torch.randn(500, 40, generator=draw)
    assert "calibration.calibrate" in mutual.estimate(a, b, method="ksg", view="raw").warning
    found = calibration.calibrate("ksg", mutual.reader("ksg", "raw"), a, b, levels=(6.0,))
    assert not found.reliable
    assert found.error > 3  # the estimate is almost 0 for 6 nats
    assert "where the truth is 6.00 nats" in str(found)


# --- upper bounds ------------------------------------------------------------------------------------------------


def test_the_gaussian_channel_is_exact_for_gaussians():
    draw = torch.Generator().manual_seed(0)
    f = torch.randn(20_000, 4, generator=draw) * torch.tensor([0.5, 1.0, 2.0, 4.0])
    truth = sum(0.5 * math.log(1 + s**2 / 0.25) for s in (0.5, 1, 2, 4))
    assert mutual.gaussian_channel(f, 0.5).nats == pytest.approx(truth, rel=0.01)
    four = mutual.gaussian_channel(f, 1.0, releases=4)  # four releases at deviation 1 equal one at 1/2
    assert four.nats == pytest.approx(mutual.gaussian_channel(f, 0.5).nats)


def test_few_samples_give_the_looser_bound_not_a_smaller_number():
    draw = torch.Generator().manual_seed(0)
    f = torch.randn(30, 50, generator=draw)
    found = mutual.gaussian_channel(f, 1.0)
    assert "too few for their covariance" in found.reason
    assert found.nats == pytest.approx(50 / 2 * math.log(2), rel=0.15)


@pytest.mark.parametrize("method", ["ksg", "infonce"])
def test_estimates_lie_below_the_channel_bound(method):
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(1500, 2, generator=draw)
    f = torch.stack([x[:, 0] * x[:, 1], x[:, 0].exp()], dim=1)
    z = f + 0.1 * torch.randn(f.shape, generator=draw)
    assert mutual.estimate(x, z, method=method, view="raw").nats < mutual.gaussian_channel(f, 0.1).nats


def test_a_deterministic_client_part_leaks_without_bound():
    found = mutual.gaussian_channel(torch.ones(10, 2), 0.0)
    assert math.isinf(found.nats)
    assert "only noise or quantisation makes it finite" in found.reason


def test_quantised_values_cost_their_entropy():
    codes = torch.arange(4).repeat(2500)[:, None].repeat(1, 3)
    assert mutual.quantised(codes, 4).nats == pytest.approx(3 * math.log(4), rel=1e-6)
    assert mutual.quantised(torch.zeros(50, 7, dtype=torch.long), 256).nats == pytest.approx(0)
    skewed = (torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0)) < 0.1).long()
    truth = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))
    assert mutual.quantised(skewed, 2).nats == pytest.approx(truth, rel=0.03)


# --- usable information ------------------------------------------------------------------------------------------


def test_usable_information_of_gaussians_is_their_mutual_information():
    a, b, truth = gaussians(2000, 5, 0.8)
    found = information.usable(a, b)
    assert found.nats == pytest.approx(truth, abs=0.2)
    assert found.low < truth < found.high
    assert found.bits_per_dimension == pytest.approx(found.nats / 5 / math.log(2))
    assert found.cost - found.cost_given_z == pytest.approx(found.nats)


def test_an_identity_map_is_worth_much_and_noise_nothing():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(600, 1, 6, 6, generator=draw).cumsum(2)
    whole = information.usable(x, x)
    assert whole.low > 36  # more than a nat per pixel
    nothing = information.usable(x, torch.randn(600, 4, 3, 3, generator=draw))
    assert nothing.low <= 0 <= nothing.high
    assert abs(nothing.nats) < 0.5


def test_usable_information_falls_with_noise():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(800, 12, generator=draw)
    readings = [information.usable(x, x + s * torch.randn(x.shape, generator=draw)).nats for s in (0.1, 0.5, 2.0)]
    assert readings[0] > readings[1] + 3 > readings[2] + 5


# --- known answers -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_known_answers_have_the_information_they_claim():
    """With many samples of few dimensions, canonical correlations of the samples give the known information."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 3, generator=draw) @ torch.randn(3, 3, generator=draw)
    for a, b, truth in (calibration.pairs(20_000, 3, 2, 1.5), calibration.channel(x, 4, 2.5)):
        joint = torch.cat([a, b], dim=1).double().T.cov()
        d = a.shape[1]
        log_det = torch.logdet(joint[:d, :d]) + torch.logdet(joint[d:, d:]) - torch.logdet(joint)
        assert 0.5 * float(log_det) == pytest.approx(truth, abs=0.05)


def test_the_channel_uses_the_client_parts_jacobian():
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    x = torch.randn(50, 5)
    assert torch.allclose(calibration.jacobian(layer, x[0]), layer.weight, atol=1e-6)


def test_two_runs_are_ranked_only_beyond_the_error():
    few = mutual.reader("ksg", "raw")
    strong, weak, close = (gaussians(1000, 1, rho)[:2] for rho in (0.95, 0.5, 0.52))
    reads = [calibration.calibrate("ksg", few, *run) for run in (strong, weak, close)]
    assert all(r.reliable for r in reads)
    assert calibration.rank(reads[0], reads[1]).order == 1
    assert calibration.rank(reads[1], reads[0]).order == -1
    same = calibration.rank(reads[1], reads[2])
    assert same.order == 0
    assert same.sentence.startswith("not ranked")
    other = calibration.calibrate("infonce", few, *weak)
    with pytest.raises(ConfigError, match="cannot be ranked"):
        calibration.rank(reads[0], other)


def test_dependence_of_independent_data():
    """For independent data of many dimensions, the biased distance correlation is large and the unbiased one is not."""
    draw = torch.Generator().manual_seed(0)
    x, z = torch.randn(300, 64, generator=draw), torch.randn(300, 64, generator=draw)
    nothing, all_of_it = dependence(x, z), dependence(x, 3 * x + 1)
    assert nothing.distance_correlation > 0.3
    assert abs(nothing.unbiased_squared) < 0.02
    assert nothing.linear_r2 < 0.05
    assert all_of_it.distance_correlation == pytest.approx(1)
    assert all_of_it.linear_r2 > 0.99
    assert all_of_it.cka == pytest.approx(1)


@pytest.mark.parametrize(
    ("ask", "error", "sentence"),
    [
        (lambda x: mutual.estimate(x[:50], x[:50], method="ksg"), DataError, "50 samples are too few .* at least 100"),
        (lambda x: mutual.estimate(x, x[:200], method="ksg"), DataError, "rows do not match"),
        (lambda x: mutual.estimate(x, x / 0, method="ksg"), DataError, "z holds NaN or infinite"),
        (lambda x: mutual.estimate(x.long(), x, method="ksg"), DataError, "takes real numbers"),
        (lambda x: mutual.estimate(x, x, method="mini"), ConfigError, "did you mean 'mine'"),
        (lambda x: mutual.estimate(x, x, method="ksg", k=0), ConfigError, "k=0"),
        (lambda x: mutual.gaussian_channel(x, -1), ConfigError, "sigma=-1"),
        (lambda x: mutual.quantised(x.long() + 9, 4), ConfigError, "levels=4"),
        (lambda x: information.usable(x[:100], x[:100]), DataError, "100 samples are too few to code"),
        (lambda x: information.usable(x, x, resolution=0), ConfigError, "resolution=0"),
        (lambda x: calibration.pairs(10, 2, 2, 0), ConfigError, "0 nats"),
        (lambda x: calibration.channel(torch.ones(30, 3), 2, 1), ConfigError, "passes nothing"),
    ],
)
def test_bad_input_gets_one_sentence(ask, error, sentence):
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(error, match=sentence):
        ask(x)
