"""Energy: modelled from FLOPs, bytes and waiting, or measured if the machine can. The two are never added.

The model, per client: E = FLOPs x J/FLOP + idle power x waiting + sum over directions of (P0 + a R) x time on air, with
P0 the power of the whole device while its radio works and a R the addition of the rate R to it.

- `marginal`: the addition of the training itself: computing, and the rate's share of the radio;
- `total`: also P0 on air and waiting. If a profile lacks a figure, the energies that depend on it are not known (None).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cutlayer.costs.fleet import Array, Fleet


@dataclass(frozen=True)
class Use:
    """The work of each client so far: [C] each. FLOPs, bits, and seconds on air and waiting."""

    flops: Array
    up_bits: Array
    up_seconds: Array
    down_bits: Array
    down_seconds: Array
    waiting: Array


@dataclass(frozen=True)
class Energy:
    """Joules of all clients together, modelled. None: a profile lacks a figure."""

    computing: float
    radio_rate: float | None
    radio_base: float | None
    waiting: float | None

    @property
    def marginal(self) -> float | None:
        """The energy that the training itself adds."""
        return None if self.radio_rate is None else self.computing + self.radio_rate

    @property
    def total(self) -> float | None:
        """The energy that the devices use while they train."""
        parts = (self.computing, self.radio_rate, self.radio_base, self.waiting)
        return None if None in parts else math.fsum(p for p in parts if p is not None)


def clients_energy(fleet: Fleet, use: Use) -> Energy:
    """Joules of all clients for their work."""
    link, device = fleet.link, fleet.client
    # A device slowed down computes longer at the same power: FLOPs / speed x watts.
    computing = float((use.flops / fleet.speeds).sum() * device.watts)
    directions = (
        (link.up_watts, link.up_watts_per_mbps, use.up_bits, use.up_seconds),
        (link.down_watts, link.down_watts_per_mbps, use.down_bits, use.down_seconds),
    )
    rate: float | None = 0.0
    base: float | None = 0.0
    for watts, per_mbps, bits, seconds in directions:
        if not bits.any():
            continue
        rate = None if rate is None or per_mbps is None else rate + per_mbps * float(bits.sum()) / 1e6
        base = None if base is None or watts is None else base + watts * float(seconds.sum())
    waited = float(use.waiting.sum())
    idle = 0.0 if waited == 0 else None if device.idle_watts is None else device.idle_watts * waited
    return Energy(computing, rate, base, idle)


def server_energy(fleet: Fleet, flops: float) -> float | None:
    """Joules of the server's computing; None if its profile is not known. Its waiting is left out."""
    return None if fleet.server is None else flops / fleet.server_speed * fleet.server.watts
