"""U-shaped parallel algorithms equal those without the U if tails are equal, and ussl if there is one client."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import MODELS, client_state, difference, make, mlp, server_state, simulated, train, whole

from cutlayer.algorithms.ushaped import through_tails
from cutlayer.cohort import CohortAround
from cutlayer.types import Smashed, TailGradients

TIGHT = 1e-14
KIN: list[tuple[str, str, dict[str, Any]]] = [
    ("upsl", "psl", {}),
    ("upsl", "psl", {"gradient_scale": "union"}),
    ("usfl", "sfl", {}),
    ("usfl", "sfl", {"average_every": "step"}),
    ("usglr", "sglr", {"phi": 0.7, "alpha": 0.5}),
    ("usglr", "sglr", {"phi": 1.0, "average_over": "clients-and-rows", "alpha_clients": "enrolled"}),
]
kin = pytest.mark.parametrize(("u", "plain", "options"), KIN)


@kin
@pytest.mark.parametrize("sizes", [[4, 4, 4], [7, 3, 5]])
def test_a_step_from_equal_tails_is_that_of_its_kin(
    u: str, plain: str, options: dict[str, Any], sizes: list[int]
) -> None:
    common: dict[str, Any] = {"cut": "0", "rounds": 1, "batch": 8, **options}
    bent = train(u, make(mlp), sizes, (6,), tail_cut="2", **common)
    straight = train(plain, make(mlp), sizes, (6,), **common)
    for k in range(3):
        ours, theirs = client_state(bent, k), client_state(straight, k)
        assert difference({n: ours[n] for n in theirs}, theirs) < TIGHT
    middle = server_state(bent)
    assert difference(middle, {n: t for n, t in server_state(straight).items() if n in middle}) < TIGHT
    assert bent.training.ledger.total("up", kind="labels") == 0


def test_averaged_at_every_step_the_tails_are_the_servers() -> None:
    """With plain descent, the mean of the clients' steps of their tails is the server's step, also over many steps."""
    options: dict[str, Any] = {"cut": "0", "rounds": 3, "average_every": "step"}
    bent = train("usfl", make(mlp), [8, 8, 8], (6,), tail_cut="2", **options)
    straight = train("sfl", make(mlp), [8, 8, 8], (6,), **options)
    assert difference(whole(bent, 1), whole(straight, 1)) < TIGHT


@pytest.mark.parametrize(("u", "options"), [("upsl", {}), ("usfl", {}), ("usglr", {"alpha": 1.5, "phi": 1.0})])
@pytest.mark.parametrize(("model", "shape", "at", "tail"), [(mlp, (6,), "0", "2"), (MODELS[3][1], (1, 6, 6), "0", "3")])
def test_one_client_alone_is_sequential(
    u: str, options: dict[str, Any], model: Any, shape: tuple[int, ...], at: str, tail: str
) -> None:
    cuts: dict[str, Any] = {"cut": at, "tail_cut": tail}
    bent, sequential = (train(a, make(model), [10], shape, **cuts, **o) for a, o in ((u, options), ("ussl", {})))
    assert difference(whole(bent), whole(sequential)) == 0.0


def test_clients_weigh_as_much_as_their_rows_count() -> None:
    """With class weights, the result is the same as if the server had the labels."""
    options: dict[str, Any] = {"cut": "0", "rounds": 1, "batch": 8, "class_weights": [1.0, 2.0, 3.0, 0.5]}
    bent = train("upsl", make(mlp), [8, 8, 8], (6,), tail_cut="2", **options)
    straight = train("psl", make(mlp), [8, 8, 8], (6,), **options)
    assert len(set(straight.training.clients.masses)) > 1
    for k in range(3):
        theirs = client_state(straight, k)
        assert difference({n: client_state(bent, k)[n] for n in theirs}, theirs) < TIGHT
    middle = server_state(bent)
    assert difference(middle, {n: t for n, t in server_state(straight).items() if n in middle}) < TIGHT


class Leaving(CohortAround):
    """Client 1 leaves between its forward pass and the arrival of the server's features."""

    def tail(self, features: Smashed) -> TailGradients:
        stay = Smashed(
            features.take(features.rows, {0, 2}), features.labels, (0, 2), (features.sizes[0], features.sizes[2])
        )
        return self.inner.tail(stay)


def test_a_client_that_leaves_before_its_tail_has_answered_is_left_out() -> None:
    """The server's step uses only the rows of the other clients."""
    found = []
    for leaves in (True, False):
        run = train("upsl", make(mlp), [5, 4, 6], (6,), cut="0", tail_cut="2", rounds=1, batch=8)
        cohort, server = simulated(run), run.training.server
        cohort.begin_round(0, 1, 1.0)
        sent = cohort.forward(None if leaves else [0, 2], labels=False)
        smashed, step = through_tails(server, Leaving(cohort) if leaves else cohort, sent)
        assert (smashed.clients, smashed.sizes, len(step.means)) == ((0, 2), (5, 6), 3)
        found.append((step.gradient[0], server_state(run), smashed.rows[0]))
    (one, state, rows), (other, same, others) = found
    assert torch.equal(rows, others)
    assert difference({"gradient": one, **state}, {"gradient": other, **same}) < TIGHT
