"""A hostile client among honest ones, each a process of its own: it is told what is wrong, and nobody else notices."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile import ATTACKS  # type: ignore[import-not-found]
from test_remote import remote  # type: ignore[import-not-found]
from trial import CONFIG, PATIENCE, Trial  # type: ignore[import-not-found]

from cutlayer.options import RunConfig, read_toml

SAID = {
    "truncated": "cut off or run on",
    "only a beginning": "20 bytes are not a message",
    "nothing": "0 bytes are not a message",
    "run on": "came in answer to",  # what is whole is read first
    "bit-flipped": "",  # any of them
    "foreign": "is not Cutlayer's",
    "noise": "",
    "overtaken": "repeated, lost or overtaken",
    "replayed": "repeated, lost or overtaken",
    "of an earlier conversation": "belongs to another conversation",
    "not asked for": "came in answer to",
    "of another step": "came in answer to",
    "a wrong body": "tensors came where|came in answer to",
    "no rows": "Smashed of 0 rows|came in answer to",
    "too many rows": "Smashed of 4294967295 rows|came in answer to",
    "a header of gigabytes": "a header of 2147483648 bytes",
    "a body of gigabytes": "cut off or run on",
    "a server's message": "cannot be understood",
    "oversized": "larger than max",
    "many at once": "came in answer to",
    "failed": "",
}
CODES = {"oversized": "RESOURCE_EXHAUSTED", "failed": "OK"}  # it has said itself that it cannot go on
GROWTH = 100 << 20  # bytes that the server may need for all of it
pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc"),
]


def resident(pid: int) -> int:
    """Bytes of a process that are in memory; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


@pytest.mark.timeout(300)
def test_a_hostile_client(tmp_path: Path) -> None:
    t = Trial(tmp_path, "sglr", rounds=300, config=CONFIG + "eval_every = 50\ncheckpoint_every = 50\n")
    try:
        server = t.serve("--quorum", "0.6", "--deadline", "20", "--faulty", "readmit")
        honest = [t.join(0), t.join(1)]
        words = [sys.executable, str(Path(__file__).parent / "hostile.py"), t.address, "c.toml", "ca"]
        with (tmp_path / "hostile.log").open("wb") as log, (tmp_path / "attacks").open("wb") as out:
            paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
            hostile = subprocess.Popen(words, cwd=tmp_path, stdout=out, stderr=log, env=environment)
        t.processes.append(hostile)
        end, sizes = time.monotonic() + 2 * PATIENCE, []
        while server.poll() is None:
            assert time.monotonic() < end, t.log("server")[-3000:]
            if len(t.steps()) > 10:
                sizes.append(resident(server.pid))
            time.sleep(0.2)
        assert [p.wait(PATIENCE) for p in (server, *honest)] == [0, 0, 0], t.log("server")[-3000:]
        assert hostile.wait(PATIENCE) == 0, t.log("hostile")[-3000:]
    finally:
        t.stop()
    *attacks, (_, code, _) = [json.loads(line) for line in (tmp_path / "attacks").read_text().splitlines()]
    assert code in ("BYE", "UNAVAILABLE")  # the run is over
    tried = {name for name, *_ in attacks}
    assert tried == set(ATTACKS) == set(SAID)
    for name, code, said in attacks:
        assert code == CODES.get(name, "INVALID_ARGUMENT"), (name, code, said)
        assert any(one in said for one in SAID[name].split("|")), (name, code, said)
    assert max(sizes) - sizes[0] < GROWTH
    assert "Traceback" not in t.log("server")

    alone, hub = remote(RunConfig.of({**read_toml(tmp_path / "c.toml"), "engine": "local"}))
    hub.gone.add(2)
    records = list(alone)
    assert [(r["loss"], tuple(r["clients"]), r["bytes_up"]) for r in t.steps()] == [
        (r.loss, r.clients, r.bytes_up) for r in records
    ]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert alone.result is not None
    assert result["test_score"] == alone.result.test_score
