"""Energy that this machine used while training, measured by zeus if possible (RAPL, NVML), and never guessed.

The measurement covers the whole processor package and each GPU, including other work on them. It is the energy of the
*simulation*. The energy of clients and server is modelled (`energy.py`), and the two are never added.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cutlayer.allocator import sharing
from cutlayer.stored import Amount, Stored, checked

_RAPL = Path("/sys/class/powercap")
_NOTHING = "not measured: this machine offers neither RAPL nor NVML"


class _MeterState(Stored):
    joules: Amount | None


class Meter:
    """Measures between entering and leaving, any number of times. `joules` is None if nothing can be measured."""

    def __init__(self) -> None:
        self.joules: float | None = None
        self.method = _NOTHING
        self._monitor: Any = None
        self._tried = False

    def __enter__(self) -> Meter:
        if not self._tried:
            self._tried = True
            self._monitor, self.method = _monitor()
        if self._monitor is not None:
            self._monitor.begin_window("cutlayer", sync_execution=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._monitor is None:
            return
        window = self._monitor.end_window("cutlayer", sync_execution=False)
        parts = [*(window.gpu_energy or {}).values(), *(window.cpu_energy or {}).values()]
        parts += [*(window.dram_energy or {}).values()]
        self.joules = (self.joules or 0.0) + sum(map(float, parts))

    def state(self) -> dict[str, Any]:
        """Plain values."""
        return {"joules": self.joules}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from an earlier measurement."""
        self.joules = checked(state, _MeterState, "measured").joules


def _monitor() -> tuple[Any, str]:
    """zeus's monitor and what it reads, or None and the reason."""
    if sharing() > 1:
        return None, f"not measured: {sharing()} runs at once shared this machine"
    rapl = any(_RAPL.glob("intel-rapl:*/energy_uj"))
    if not rapl and not torch.cuda.is_available():
        return None, _NOTHING
    if rapl and not torch.cuda.is_available() and not _readable():
        return None, "not measured: RAPL's counters are readable by root only on this machine"
    try:
        from zeus.monitor import ZeusMonitor  # type: ignore[import-untyped]
    except ImportError:
        return None, "not measured: pip install 'cutlayer[energy]' to measure"
    logging.getLogger("zeus").setLevel(logging.ERROR)
    try:
        monitor = ZeusMonitor()
    except Exception as error:  # of a driver: any error is possible
        return None, f"not measured: {str(error).strip().splitlines()[0]}"
    found = [name for name, there in (("RAPL", monitor.cpu_indices), ("NVML", monitor.gpu_indices)) if there]
    return (monitor, f"measured by {' and '.join(found)} (zeus)") if found else (None, _NOTHING)


def _readable() -> bool:
    return all(os.access(path, os.R_OK) for path in _RAPL.glob("intel-rapl:*/energy_uj"))
