"""Measurements of this machine in the user's cache folder: one small file per model, shapes and machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from cutlayer.engine.ways import Ways
from cutlayer.errors import CutlayerError
from cutlayer.files import replace_file
from cutlayer.stored import MalformedError, parsed


def key(subject: Mapping[str, Any]) -> str:
    """The name of a measurement: `subject`, on this processor, with this version of torch and this number of
    threads.
    """
    machine = {"processor": _processor(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    return hashlib.sha256(json.dumps({**machine, **subject}, sort_keys=True).encode()).hexdigest()


def recalled(name: str) -> Ways | None:
    """The value stored under `name`; None if there is none, or if it cannot be read."""
    try:
        return Ways.of(parsed((_folder() / f"{name}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, MalformedError):
        return None


def remember(name: str, ways: Ways) -> None:
    """Store it for later runs; if the folder cannot be written, they measure again."""
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        replace_file(_folder() / f"{name}.json", json.dumps(ways.stored(), indent=1).encode())
    except (OSError, CutlayerError):
        return


def _folder() -> Path:
    return user_cache_path("cutlayer") / "tuning"


def _processor() -> str:
    """The processor's name, if the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.environ.get('ATEN_CPU_CAPABILITY', '')}"
    return platform.processor() or platform.machine()
