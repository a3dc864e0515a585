"""An algorithm in a package of its own: installed, and by reference to its file; all commands treat it like any other."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
from support import ROOT

from cutlayer import RunConfig, plugins
from cutlayer.checkpoint import read as read_checkpoint
from cutlayer.cli.network_commands import serve  # noqa: F401  (what the forked processes import, here too)
from cutlayer.files import read_json, read_records
from cutlayer.report.collect import read
from cutlayer.report.curves import _looks
from cutlayer.testing import train_in_memory

PACKAGE = ROOT / "examples" / "own_algorithm"
FILE = f"{PACKAGE / 'cyclepsl.py'}:CyclePsl"
NAME, TITLE, COLOUR = "cyclepsl", "CyclePSL", "#8c564b"
SMALL = "--model mlp --clients 3 --samples-per-client 20 --batch 5 --test 40 --rounds 2 --server-batch 6".split()
PATIENCE = 100.0


@pytest.fixture(scope="module")
def installed() -> Iterator[Path]:
    """The folder that the package is installed in, from a copy: pip builds beside the sources."""
    import shutil

    with tempfile.TemporaryDirectory() as place:
        target = Path(place, "installed")
        shutil.copytree(PACKAGE, Path(place, "sources"))
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, str(Path(place, "sources"))], check=True)
        yield target
