"""Bounds on the rows that clients send: exact, equal in simulations and deployments, and warnings with names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support import client_state, difference, make, mlp, residual, server_state, source
from torch import Tensor

from cutlayer import ConfigError, Run, RunConfig
from cutlayer.cohort import Cohort, CohortAround
from cutlayer.errors import CutlayerWarning
from cutlayer.screened import ScreenedCohort
from cutlayer.screenings import Screening
from cutlayer.screenings.length_bound import LengthBound
from cutlayer.screenings.lengths import lengths_of, medians
from cutlayer.screenings.median_bound import MedianBound
from cutlayer.screenings.none import NoScreening
from cutlayer.testing.deployed import in_memory
from cutlayer.types import CutGradients, Rows, Smashed, TailGradients

SIZES = (10, 6, 7, 9)
MEDIAN: dict[str, Any] = {"screening": "median_bound"}
LENGTH: dict[str, Any] = {"screening": "length_bound"}


class Sends(CohortAround):
    """A cohort that sends the given rows and stores the received gradients."""

    def __init__(self, rows: Rows, clients: Sequence[int], sizes: Sequence[int], enrolled: int = 4) -> None:
        self.sent = Smashed(rows, torch.zeros(sum(sizes)), tuple(clients), tuple(sizes))
        self.got: CutGradients | None = None
        self.enrolled = enrolled

    @property
    def samples(self) -> Sequence[int]:
        """Ten per client."""
        return [10] * self.enrolled

    def forward(self, clients: Sequence[int] | None = None, *, labels: bool = True) -> Smashed:
        """The given rows."""
        return self.sent

    def tail(self, features: Smashed) -> TailGradients:
        """The same rows."""
        return TailGradients(self.sent.rows, torch.zeros(1), self.sent.clients, self.sent.sizes)

    def backward(self, gradients: CutGradients) -> None:
        """Stores the gradients."""
        self.got = gradients


class Told(list[tuple[str, Mapping[str, Any]]]):
    """The reported events."""

    def __call__(self, happened: str, facts: Mapping[str, Any]) -> None:
        """Adds an event."""
        self.append((happened, facts))


def rows_of(*lengths: float) -> Rows:
    """Two real tensors and one of integers. Each row has the given length over both real tensors."""
    along = torch.tensor([[0.6, 0.0], [0.0, 0.8]], dtype=torch.float64)
    scale = torch.tensor(lengths, dtype=torch.float64)
    return scale.view(-1, 1) * along[0], torch.arange(len(lengths)), scale.view(-1, 1, 1) * along[1].view(1, 1, 2)


def bounded(inner: Sends, rule: Screening | None = None, tell: Told | None = None) -> ScreenedCohort:
    cohort: Cohort = inner
    return ScreenedCohort(cohort, NoScreening() if rule is None else rule, Told() if tell is None else tell)


def times(multiple: float) -> MedianBound:
    return MedianBound(row_multiple=multiple)


def up_to(limit: float) -> LengthBound:
    return LengthBound(row_limit=limit)


def test_rows_are_scaled_down_to_a_multiple_of_the_median() -> None:
    """The clients' medians are 2, 3 and 9, so their median is 3. Integers do not change."""
    inner = Sends(rows_of(1, 2, 8, 3, 9), (0, 1, 2), (3, 1, 1))
    found = bounded(inner, times(2.0)).forward()
    assert lengths_of(found.rows).tolist() == pytest.approx([1, 2, 6, 3, 6])
    assert torch.equal(found.rows[1], torch.arange(5))
    for before, after in zip(inner.sent.rows, found.rows, strict=True):
        assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert lengths_of(inner.sent.rows).tolist() == pytest.approx([1, 2, 8, 3, 9])  # unchanged
    assert lengths_of(bounded(inner, up_to(2.5)).forward().rows).tolist() == pytest.approx([1, 2, 2.5, 2.5, 2.5])
    assert bounded(inner, times(100.0)).forward() is inner.sent


def test_a_client_does_not_gain_weight_by_many_rows() -> None:
    inner = Sends((torch.tensor([[1.0], [1], *[[50]] * 8]),), (0, 1, 2), (1, 1, 8))
    assert lengths_of(bounded(inner, times(1.0)).forward().rows).tolist() == [1] * 10


def test_rows_that_are_mostly_zeros_are_left() -> None:
    inner = Sends((torch.tensor([[0.0], [0], [5]]),), (0, 1, 2), (1, 1, 1))
    assert bounded(inner, times(1.0)).forward() is inner.sent


@pytest.mark.parametrize("numbers", [torch.float32, torch.bfloat16])
def test_finite_numbers_that_are_huge(numbers: torch.dtype) -> None:
    """Their squares overflow, but the row is still scaled down."""
    x = torch.ones(3, 8).to(numbers)
    x[2] = 1e38
    found = bounded(Sends((x,), (0, 1, 2), (1, 1, 1)), times(2.0)).forward()
    assert lengths_of(found.rows).tolist() == pytest.approx([8**0.5, 8**0.5, 2 * 8**0.5], rel=1e-2)


def test_numbers_that_are_not_finite_are_left_to_the_server() -> None:
    for bad in (math.nan, math.inf):
        x = torch.ones(4, 2)
        x[3, 0] = bad
        found = bounded(Sends((x,), (0, 1, 2, 3), (1, 1, 1, 1)), times(0.5)).forward()
        assert not bool(torch.isfinite(found.rows[0][3]).all())


def test_gradients_go_back_by_the_chain_rule() -> None:
    """Equal to autograd for a fixed bound, also for other orders, without a client, or with a common gradient."""
    generator = torch.Generator().manual_seed(0)
    sent = [torch.randn(6, 3, generator=generator).double(), torch.randn(6, 2, 2, generator=generator).double()]
    sent[0][4] *= 9
    sent[1][1] *= 9
    inner = Sends(tuple(sent), (0, 1, 2), (2, 3, 1))
    cohort = bounded(inner, up_to(4.0))
    rows = cohort.forward().rows
    gradient = tuple(torch.randn(r.shape, generator=generator).double() for r in rows)

    leaves = [r.clone().requires_grad_() for r in sent]
    length = torch.cat([leaf.flatten(1) for leaf in leaves], 1).norm(dim=1)
    factor = (4.0 / length).clamp(max=1)
    assert int((factor < 1).sum()) == 2
    used = [leaf * factor.view(-1, *[1] * (leaf.dim() - 1)) for leaf in leaves]
    for mine, expected in zip(rows, used, strict=True):
        torch.testing.assert_close(mine, expected.detach())
    expected = torch.autograd.grad(used, leaves, gradient)

    cohort.backward(CutGradients(gradient, (0, 1, 2), (2, 3, 1)))
    assert inner.got is not None
    for g, e in zip(inner.got.own, expected, strict=True):
        torch.testing.assert_close(g, e)
    order = [5, 2, 3, 4]  # client 2, then client 1; client 0 shares a common gradient
    common = tuple(g[:1] for g in gradient)
    cohort.backward(CutGradients(tuple(g[order] for g in gradient), (2, 1), (1, 3), common, (0,)))
    assert inner.got.common is common
    for g, e in zip(inner.got.own, expected, strict=True):
        torch.testing.assert_close(g, e[order])


def test_gradients_that_clients_send_are_bounded_by_the_multiple() -> None:
    inner = Sends((torch.tensor([[1.0], [2], [50]]),), (0, 1, 2), (1, 1, 1))
    smashed = inner.sent
    assert bounded(inner, times(3.0)).tail(smashed).rows[0].flatten().tolist() == [1, 2, 6]
    assert bounded(inner, up_to(3.0)).tail(smashed).rows[0].flatten().tolist() == [1, 2, 50]


def test_medians_of_clients() -> None:
    lengths = torch.tensor([3.0, 1, 2, 9, 8, 7])
    assert medians(lengths, (3, 3)).tolist() == [2, 8]
    assert medians(lengths, (1, 5)).tolist() == [3, 7]


# Clients that are named


def lone(length: float) -> Rows:
    return (torch.full((2, 1), length),)


def test_a_client_that_deviates_grossly_is_named_once() -> None:
    told = Told()
    inner = Sends((torch.tensor([[1.0], [1], [1e30], [2]]),), (0, 1, 2, 3), (1, 1, 1, 1))
    cohort = bounded(inner, tell=told)
    assert cohort.forward() is inner.sent
    cohort.forward()
    ((happened, facts),) = told
    assert (happened, facts["client"], facts["others"]) == ("deviates", 2, 1.0)
    assert facts["median"] == pytest.approx(1e30)
    assert "1e+30" in facts["why"]
    assert "screening = median_bound scales such rows down" in facts["why"]


@pytest.mark.parametrize(("lengths", "named"), [((1.0, 99, 1), []), ((1.0, 101, 1), [1]), ((0.0, 5, 0), [])])
def test_how_far_is_too_far(lengths: tuple[float, ...], named: list[int]) -> None:
    told = Told()
    bounded(Sends((torch.tensor(lengths).view(-1, 1),), (0, 1, 2), (1, 1, 1)), tell=told).forward()
    assert [facts["client"] for _, facts in told] == named


def test_clients_that_take_turns_are_compared_with_those_before() -> None:
    told, inner = Told(), Sends(lone(1.0), (0,), (2,))
    cohort = bounded(inner, tell=told)
    for client, length in ((0, 1.0), (1, 2.0), (2, 1e4), (3, 1.0)):
        inner.sent = Smashed(lone(length), torch.zeros(2), (client,), (2,))
        cohort.forward()
    assert [facts["client"] for _, facts in told] == [2]


# In runs


class Hostile(torch.nn.Module):
    """Makes smashed data huge for inputs of 1000 and more, which one client has."""

    def forward(self, x: Tensor) -> Tensor:
        """[...] -> [...]."""
        return torch.where(x.abs().amax(1, keepdim=True) >= 1000, x * 1e4, x)


def hostile_mlp() -> torch.nn.Module:
    net = make(mlp)
    assert isinstance(net, torch.nn.Sequential)
    return torch.nn.Sequential(Hostile(), *net)


def with_outlier() -> Any:
    data = source(SIZES, (6,))
    first = SIZES[0]
    data.train.rows[0][first : first + SIZES[1]] += 1000
    return data


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("psl", {**MEDIAN, "row_multiple": 1.1}),
        ("sglr", {**MEDIAN, "row_multiple": 0.8, "phi": 0.5, "average_over": "clients-and-rows"}),
        ("sfl", {**LENGTH, "row_limit": 0.5}),
        ("sflv1", {**MEDIAN, "row_multiple": 0.9}),
        ("ssl", {**LENGTH, "row_limit": 0.5}),
        ("ussl", {**LENGTH, "row_limit": 0.5, "tail_cut": "3"}),
    ],
)
def test_simulations_and_deployments_bound_alike(algorithm: str, options: dict[str, Any]) -> None:
    net, cut = (make(residual), "1.first") if algorithm in ("psl", "sglr") else (make(mlp), "2")
    run: dict[str, Any] = {"model": net, "data": source(SIZES, (6,))}
    values: dict[str, Any] = {
        "algorithm": algorithm, "clients": len(SIZES), "precision": "float64", "batch": 4, "client_lr": 0.05,
        "rounds": 2, "partition": "column", "cut": cut, "participation": 0.8, "engine": "local",
    }  # fmt: skip
    c = RunConfig(**values, **options)
    there = in_memory(c, **run)
    runs = [Run(c, **run), there.run]
    if algorithm not in ("ssl", "ussl"):
        runs.append(Run(c.model_copy(update={"engine": "stacked"}), **run))
    without = {name: value for name, value in options.items() if name not in ("screening", "row_multiple", "row_limit")}
    plain = Run(RunConfig(**values, **without), **run)
    for one in (*runs, plain):
        one.run()
    for other in runs[1:]:
        assert difference(server_state(runs[0]), server_state(other)) < 1e-12
        assert other.evaluations[-1].test_loss == pytest.approx(runs[0].evaluations[-1].test_loss, rel=1e-12)
        assert other.training.ledger.table() == runs[0].training.ledger.table() == plain.training.ledger.table()
    assert difference(client_state(runs[0]), there.model(0)) < 1e-12
    assert plain.evaluations[-1].test_loss != runs[0].evaluations[-1].test_loss


def test_a_deployment_names_who_deviates_and_a_simulation_does_with_a_bound() -> None:
    told = Told()
    options: dict[str, Any] = {"model": hostile_mlp(), "data": with_outlier()}
    c = RunConfig(
        algorithm="psl", clients=4, partition="column", cut="0", rounds=1, batch=4, engine="local", precision="float64"
    )
    in_memory(c, tell=told, **options).run.run()
    assert [facts["client"] for happened, facts in told if happened == "deviates"] == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", CutlayerWarning)
        Run(c, **options).run()
    with pytest.warns(CutlayerWarning, match=r"client 1 deviates: .* they are screened \(median_bound\)"):
        Run(c.model_copy(update={**MEDIAN, "row_multiple": 3.0}), **options).run()


@pytest.mark.parametrize(
    ("algorithm", "options", "words"),
    [
        ("fl", MEDIAN, "screening = 'median_bound' has no effect on fl: it belongs to "),
        ("ssl", MEDIAN, "screening = 'median_bound' has no effect on ssl: it belongs to "),
        ("fl", {**LENGTH, "row_limit": 2.0}, "screening = 'length_bound' has no effect on fl: it belongs to "),
        ("psl", {"row_limit": 2.0}, "row_limit = 2.0 has no effect on the screening none: it belongs to length_bound"),
        ("psl", {**MEDIAN, "row_limit": 2.0}, "row_limit = 2.0 has no effect on the screening median_bound: it "),
        ("psl", {**MEDIAN, "row_multiple": 0.0}, "row_multiple = 0.0 is not possible: it must be greater than 0"),
        (
            "psl",
            LENGTH,
            "the screening length_bound needs a length: give row_limit, such as 50, or choose median_bound",
        ),
        ("psl", {"screening": "median"}, "unknown screening 'median': did you mean 'median_bound'? known: "),
    ],
)
def test_errors(algorithm: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Run(algorithm=algorithm, model="mlp", **options)
    assert words in str(raised.value)


def test_nothing_is_looked_at_in_a_simulation_without_the_option() -> None:
    def wrapped(**options: Any) -> bool:
        cohort: Any = Run(algorithm="psl", model="mlp", clients=2, rounds=1, **options).training.clients
        while hasattr(cohort, "inner") and not isinstance(cohort, ScreenedCohort):
            cohort = cohort.inner
        return isinstance(cohort, ScreenedCohort)

    assert (wrapped(), wrapped(**MEDIAN)) == (False, True)
    assert np.isnan(bounded(Sends(lone(1.0), (0,), (2,)))._latest).all()
