"""The estimated memory of a run is an upper bound and not far too high. Runs that do not fit are refused."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from cutlayer import Run, allocator
from cutlayer.allocator import free_memory, give_back, share_with
from cutlayer.engine.choice import memory_limit
from cutlayer.errors import ConfigError
from cutlayer.footprint import _PROCESS, fitting, footprint, refuse_unless_fitting
from cutlayer.options import RunConfig
from cutlayer.testing import random_source

_KINDS: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "weights": (nn.Sequential(nn.Linear(100, 8000), nn.ReLU(), nn.Linear(8000, 4)), {"algorithm": "sfl", "clients": 8}),
    "rows": (nn.Sequential(nn.Linear(8, 3000), nn.ReLU(), nn.Tanh(), nn.Linear(3000, 4)), {"batch": 2000}),
}


def peak() -> int:
    """The largest number of bytes that this process has had in memory."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
@pytest.mark.parametrize("kind", list(_KINDS))
def test_the_estimate_and_a_real_run(kind: str) -> None:
    """Without Python and torch, measured memory is below the estimate, which is at most about six times as high."""
    model, options = _KINDS[kind]
    rows = (2000, 2000) if kind == "rows" else (20,) * 8
    width = next(model.children()).in_features
    values = {"algorithm": "psl", "clients": 2, "partition": "column", "cut": "1", "rounds": 2, **options}
    gc.collect()
    give_back()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = peak()
    run = Run(model=model, data=random_source(rows, (width,)), **values)
    expected = footprint(run.training, run.config) - _PROCESS["cpu"]
    run.run()
    taken = peak() - before
    assert 10_000_000 < taken <= expected + 20_000_000, (taken, expected)
    assert expected <= 6 * taken + 20_000_000, (taken, expected)


def test_how_many_fit() -> None:
    needs = {"small": 1_000, "large": 3_000, "middle": 2_000}
    assert [fitting(needs, 3, free) for free in (None, 6_000, 5_999, 5_000, 4_999, 10)] == [3, 3, 2, 2, 1, 1]
    refuse_unless_fitting(needs, 9, 6_000)
    refuse_unless_fitting(needs, 1, 10)  # a single run is always tried
    refuse_unless_fitting({}, 2, 10)
    with pytest.raises(ConfigError) as refused:
        refuse_unless_fitting(needs, 9, 5_000)
    assert str(refused.value) == (
        "jobs = 3 may need more memory than is free: 6.00 kB for 3 runs at once (at most 3.00 kB for large), where "
        "5.00 kB are free; use jobs = 2"
    )


def test_processes_share_the_memory_for_forward_passes() -> None:
    config = RunConfig.of({})
    try:
        alone = memory_limit(config, 1)
        share_with(4)
        assert memory_limit(config) == pytest.approx(alone / 4, rel=0.2)
        assert memory_limit(RunConfig.of({"memory_limit": 2.0})) == 2e9
    finally:
        share_with(1)


def test_what_control_groups_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert allocator._left(tmp_path) is None
    for name, text in (("max", "5000"), ("current", "3000"), ("stat", "anon 9\ninactive_file 700\n")):
        (tmp_path / f"memory.{name}").write_text(text, encoding="utf-8")
    assert allocator._left(tmp_path) == 2700
    free = free_memory()
    assert free is not None
    assert free > 10_000_000
    monkeypatch.setattr(allocator, "_left_by_groups", lambda: [2700])
    assert free_memory() == 2700
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert allocator._left(tmp_path) is None
