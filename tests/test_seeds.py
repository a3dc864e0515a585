"""Each use of randomness has its own named stream and does not change the caller's."""

import torch
from torch import nn

from cutlayer.seeds import seeded_for, streams, torch_seeded

CPU = torch.device("cpu")


def test_what_does_not_say_that_it_draws_nothing_is_seeded() -> None:
    silent, drawing = nn.Identity(), nn.Identity()
    silent.draws, drawing.draws = False, True
    with torch_seeded(3, "forward", 1):
        named = torch.rand(4)
    for module, seeded in ((nn.Identity(), True), (drawing, True), (silent, False)):
        before = torch.get_rng_state()
        with seeded_for(module, 3, "forward", 1):
            assert torch.equal(torch.rand(4), named) == seeded
        assert torch.equal(torch.get_rng_state(), before) == seeded


def test_streams_give_what_their_generators_would_and_leave_the_callers() -> None:
    before = torch.get_rng_state()
    with streams(CPU) as draw_from:
        for seed in (1, 2, 1):
            draw_from(torch.Generator().manual_seed(seed))
            assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(torch.get_rng_state(), before)
