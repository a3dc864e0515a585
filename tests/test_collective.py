"""Ranks as described by launchers, and the operations of a process without others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cutlayer.collective import Place, World, first_host, is_known, known, place
from cutlayer.errors import ConfigError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpu7",
    "MASTER_PORT": "12345",
}
SRUN = {
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "77",
}


def test_what_launchers_say() -> None:
    assert place(TORCHRUN) == Place(3, 4, 1, 2, "tcp://gpu7:12345")
    assert place(SRUN) == Place(1, 2, 0, 1, "tcp://gpu03:20077")


@pytest.mark.parametrize(
    "environ",
    [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "1"}],
)
def test_a_process_alone(environ: dict[str, str]) -> None:
    assert place(environ) is None


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"RANK": "4"}, "RANK = 4 is not one of WORLD_SIZE = 4 ranks: start them with torchrun"),
        ({"RANK": "-1"}, "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE = -1, 4, 1, 2 are not whole numbers"),
        ({"WORLD_SIZE": "four"}, "are not whole numbers: start them with torchrun"),
    ],
)
def test_what_no_launcher_says(changed: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        place({**TORCHRUN, **changed})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu[03-05,09],login1", "gpu03"), ("login1", "login1"), ("a1,a2", "a1"), ("n[7]-ib", "n7-ib")],
)
def test_the_first_host(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_alone_nothing_is_sent() -> None:
    alone, numbers = World(), torch.arange(3.0)
    alone.total([numbers])
    alone.largest(numbers)
    assert numbers.tolist() == [0, 1, 2]
    assert alone.joined(np.ones((2, 1)), [2]).tolist() == [[1], [1]]
    assert alone.rows(numbers, [3]) is numbers
    assert alone.gathered("a") == alone.collected("a") == ["a"]
    assert alone.from_rank(0, "a") == alone.first(lambda: "a") == alone.agreed(lambda: "a") == "a"
    assert alone.sent == 0


def test_an_error_that_all_ranks_have_is_known() -> None:
    error = ConfigError("a sentence")
    assert not is_known(error)
    assert is_known(known(error))
