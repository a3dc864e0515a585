"""Coverage-guided fuzzing for a short time; `tests/wire/fuzz_wire.py` says how to do it by hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_guided_fuzzing(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="needs atheris: pip install cutlayer[fuzz]")
    bounds = ["-max_total_time=90", "-rss_limit_mb=2048", "-timeout=10", "-max_len=4096"]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "fuzz_wire.py"), str(tmp_path / "corpus"), *bounds],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    coverage = re.findall(r"cov: (\d+)", done.stderr)
    assert runs is not None
    assert int(runs[1]) > 1000
    assert int(coverage[-1]) > 200  # edges in cutlayer.wire; the initial inputs reach as many
