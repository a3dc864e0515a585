"""If requested, freed memory stays in the process while it trains and is returned afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

RUN = """
import json, os, torch
from cutlayer import Run, allocator

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

def used():
    torch.ones(25_000_000)  # 100 MB

x, y = torch.randn(60, 5), torch.arange(60) % 3
options = dict(data=(x, y), model="mlp", clients=2, batch=8, rounds=2)
runs = [Run(**options), Run(**options)]
before = resident()
used()
kept = resident() - before
for run in runs:
    run.run()
print(json.dumps({"kept": kept, "left": resident() - before, "calls": allocator._set_up.cache_info().misses}))
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is set up")


def trained(switch: str) -> dict[str, Any]:
    """MB that are kept after 100 MB were freed, MB after two runs, and the number of times the allocator was set up."""
    environment = {**os.environ, "CUTLAYER_KEEP_MEMORY": switch}
    done = subprocess.run(
        [sys.executable, "-c", RUN], env=environment, check=True, capture_output=True, text=True, timeout=120
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_run_from_python_keeps_freed_memory_once_and_hands_it_back() -> None:
    found = trained("1")
    assert found["kept"] > 90
    assert found["left"] < 60
    assert found["calls"] == 1


@pytest.mark.network  # like the test above, in another process
def test_the_switch_leaves_the_allocator_alone() -> None:
    found = trained("0")
    assert found["kept"] < 10
    assert found["calls"] == 0
