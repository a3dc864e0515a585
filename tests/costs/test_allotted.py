"""Cuts chosen for each client by memory, by time or by machine and link, and the errors if no cut fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cutlayer import ConfigError, Run
from cutlayer.costs.plan import plan
from cutlayer.options import CompareConfig, PlanConfig, RunConfig

SMALL: dict[str, Any] = {
    "data": "digits",
    "model": "mlp",
    "clients": 3,
    "samples_per_client": 20,
    "rounds": 1,
    "test": 30,
}
FLEET: dict[str, Any] = {"client_device": "raspberry-pi-zero-2w", "link": "lte", "server_device": "h100"}


def cuts(**options: Any) -> tuple[str, ...]:
    depths = Run(**{"algorithm": "psl", **SMALL, **options}).training.depths
    assert depths is not None
    return depths.names


def memory(cut: str) -> float:
    """Memory in GB that the plan states for a client."""
    planned = plan(PlanConfig(model="mlp", cut=cut, input=(1, 8, 8), algorithms=("psl",), batch=8))
    return planned.chosen.cost.memory / 1e9


def test_the_deepest_cut_within_a_memory_budget_is_the_plans() -> None:
    needs = {cut: memory(cut) for cut in ("hidden1", "hidden2", "hidden3")}
    assert needs["hidden1"] < needs["hidden2"] < needs["hidden3"]
    budgets = (needs["hidden2"] * 1.0001, needs["hidden3"] * 2, needs["hidden1"] * 1.0001)
    assert cuts(cut_by="memory", client_memory=budgets) == ("hidden2", "hidden3", "hidden1")
    with pytest.raises(ConfigError, match=r"no cut fits client 1: even 'hidden1' takes .* to train with batches of 8"):
        cuts(cut_by="memory", client_memory=(1.0, needs["hidden1"] * 0.99, 1.0))
    with pytest.raises(ConfigError, match=r"cut = 'hidden2' of client 2 takes .* more than its client_memory"):
        cuts(cut="hidden2", client_memory=budgets)


def test_cuts_within_a_time_budget_and_by_profile() -> None:
    slow = {"speed_spread": 2.0, **FLEET}
    chosen = cuts(cut_by="time", client_seconds=(1e9,), **slow)
    assert chosen == ("hidden3",) * 3  # all cuts fit, so the deepest is chosen
    with pytest.raises(ConfigError, match=r"no cut fits client 0: .* s for a step, more than its client_seconds"):
        cuts(cut_by="time", client_seconds=(1e-9,), **slow)
    assert cuts(cut_by="profile", **FLEET) == ("hidden1",) * 3  # least computation of the cuts that send equally much


def test_a_device_says_how_much_memory_it_has(tmp_path: Path) -> None:
    text = (
        f"[device.tiny]\nflops_per_second = 1e9\nwatts = 1.0\nsource = 'me'\nmemory_gb = {memory('hidden2') * 1.0001}\n"
    )
    (tmp_path / "tiny.toml").write_text(text + "[link.fast]\nup_mbps = 1e9\ndown_mbps = 1e9\nsource = 'me'\n")
    own: dict[str, Any] = {"profiles": str(tmp_path / "tiny.toml"), "client_device": "tiny", "link": "fast"}
    with pytest.raises(ConfigError, match="cut_by = 'time' needs client_seconds"):
        cuts(cut_by="time", **own)
    found = cuts(cut_by="profile", server_device="tiny", **own)
    assert found == ("hidden2",) * 3  # all cuts take equally long, so the deepest that fits
    with pytest.raises(ConfigError, match="more than its device's memory"):
        cuts(cut_by="profile", batch=4000, **own)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cut_by": "memory"}, "cut_by = 'memory' needs client_memory"),
        ({"cut_by": "profile"}, "cut_by = 'profile' needs client_device"),
        ({"client_seconds": (1.0,)}, "client_seconds = [1.0] needs client_device"),
        ({"client_memory": (1.0, 2.0)}, "client_memory has 2 entries for 3 clients"),
        ({"client_memory": (0.0,)}, "client_memory = 0 is not possible"),
        ({"cut": "hidden1", "cut_by": "memory", "client_memory": (1.0,)}, "exclude each other"),
        ({"algorithm": "ssl", "cut_by": "memory"}, "one client model travels from client to client"),
        ({"algorithm": "cse-fsl", "client_memory": (1.0,)}, "hold more than the part below one cut"),
        ({"algorithm": "upsl", "tail_cut": "hidden3", "client_memory": (1.0,)}, "hold more than the part below one"),
        ({"algorithm": "fl", "cut_by": "memory"}, "cut_by = 'memory' has no effect on fl"),
    ],
)
def test_bad_budgets(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig.of({"algorithm": "psl", "clients": 3, **options}).check(frozenset(options))
    assert words in str(error.value)


def test_a_comparison_gives_cuts_to_those_that_have_them() -> None:
    config = CompareConfig.of({"algorithms": ["fl", "psl"], "clients": 2, "cut": ["hidden1", "hidden2"]})
    runs = config.runs(frozenset({"algorithms", "clients", "cut"}))
    assert runs["psl"][0].cuts == ("hidden1", "hidden2")
    with pytest.raises(ConfigError, match="not possible with ssl: one client model travels"):
        CompareConfig.of({"algorithms": ["psl", "ssl"], "clients": 2, "cut": ["hidden1", "hidden2"]}).runs(
            frozenset({"cut", "algorithms", "clients"})
        )
