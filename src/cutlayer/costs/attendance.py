"""The reachable clients at the start of a round, and the time that messages wait for a link: the effect of a trace on a
clock.

Shape legend: C clients.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cutlayer.costs.traces import Trace
from cutlayer.errors import CutlayerWarning
from cutlayer.stored import Amount, Count, Stored, checked, sized
from cutlayer.text import format_duration

Array = npt.NDArray[np.float64]
_ROUNDING = 1e-9


class Attendance:
    """Follows a trace, and counts: how often each client took part, how long its messages waited for a link [C]; how
    many rounds began late because no client could be reached, and the total delay.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        count = len(trace.clients)
        self.rounds, self.waited = np.zeros(count, np.int64), np.zeros(count)
        self.late_rounds, self.late_seconds = 0, 0.0

    def present(self, time: float) -> tuple[tuple[int, ...], float]:
        """The clients that can be reached at `time`, or at the first later time when any can; and that time."""
        waits = self.trace.waits(time)
        late = float(waits.min())
        here = tuple(int(k) for k in np.flatnonzero(waits <= late + _ROUNDING * late))
        if late:
            self._say(time, time + late)
            self.late_rounds, self.late_seconds = self.late_rounds + 1, self.late_seconds + late
        return here, time + late

    def _say(self, time: float, then: float) -> None:
        """Warn, the first time in a run: the result counts them all."""
        if not self.late_rounds:
            warnings.warn(
                CutlayerWarning(
                    f"no client can be reached after {format_duration(time)} of the virtual clock, when a round should "
                    f"begin: the clock moves on to {format_duration(then)}, and does so whenever that happens"
                ),
                stacklevel=2,
            )

    def took_part(self, clients: Sequence[int]) -> None:
        """Count a round with these clients."""
        self.rounds[list(clients)] += 1

    def passing(
        self, direction: Literal["up", "down"], times: Array, bits: Array, shared: float, *, notes: bool = True
    ) -> tuple[Array, Array]:
        """Seconds [C] on air and seconds [C] without a link of `bits` [C] that are sent together at `times` [C], and
        take at least `shared` seconds at the server. `notes`: the waiting is counted.
        """
        on_air, waited = np.zeros_like(bits), np.zeros_like(bits)
        for k in np.flatnonzero(bits > 0).tolist():
            most = bits[k] / shared if shared else np.inf
            found = self.trace.passing(direction, k, float(times[k]), float(bits[k]), float(most))
            on_air[k], waited[k] = found
        self.waited += waited if notes else 0.0
        return on_air, waited

    def summary(self, seconds: float, idle: Sequence[float]) -> dict[str, Any]:
        """The counts after `seconds`, as plain values: lists have a value for each client."""
        return {
            "reachable": self.trace.share(seconds).tolist(),
            "idle_seconds": list(idle),
            "link_seconds": self.waited.tolist(),
            "rounds": self.rounds.tolist(),
            "late_rounds": self.late_rounds,
            "late_seconds": self.late_seconds,
        }

    def state(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rounds": self.rounds.tolist(),
            "waited": self.waited.tolist(),
            "late_rounds": self.late_rounds,
            "late_seconds": self.late_seconds,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state that `state()` returned. Raises MalformedError."""
        found = checked(state, _AttendanceState, "the attendance")
        for name in ("rounds", "waited"):
            sized(getattr(found, name), len(self.rounds), f"the attendance's {name!r}")
        self.rounds, self.waited = np.array(found.rounds, np.int64), np.array(found.waited, np.float64)
        self.late_rounds, self.late_seconds = found.late_rounds, float(found.late_seconds)


class _AttendanceState(Stored):
    rounds: list[Count]
    waited: list[Amount]
    late_rounds: Count
    late_seconds: Amount
