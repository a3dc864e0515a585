"""The clients' machines and links, and the server's: what a virtual clock and a plan are based on.

Shape legend: C clients.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cutlayer import seeds
from cutlayer.costs.profiles import Device, Link, Precision, Profiles
from cutlayer.costs.traces import Trace
from cutlayer.errors import ConfigError, CutlayerWarning
from cutlayer.options import PlanConfig, RunConfig
from cutlayer.text import format_quantity

Array = npt.NDArray[np.float64]
MBPS = 1e6  # bit/s


FleetOptions = RunConfig | PlanConfig
"""The options that define the machines and links, and the seed of the clients' differences."""


@dataclass(frozen=True)
class Fleet:
    """C clients and a server. `server_speed` is infinite if the server has no profile: it then takes no time.

    `server_rate` is the rate at which all clients together can send to (or receive from) the server; with `multicast`,
    a message that is the same for several clients counts there once. `notes` say which devices have no rate for the
    precision. With a `trace`, the links follow it, and `up` and `down` are not known (NaN).
    """

    client: Device
    link: Link
    server: Device | None
    speeds: Array  # [C] FLOP/s, as reached
    up: Array  # [C] bit/s
    down: Array  # [C] bit/s
    latency: float  # s
    server_speed: float = math.inf  # FLOP/s, as reached
    server_rate: float = math.inf  # bit/s
    multicast: bool = False
    notes: tuple[str, ...] = ()
    trace: Trace | None = None

    @property
    def clients(self) -> int:
        """C."""
        return len(self.speeds)


def fleet(options: FleetOptions, clients: int) -> Fleet | None:
    """The fleet that the options describe, with the devices' rates in the options' precision; None without a client
    device. The caller reads a trace, when the clients' names are known.

    Raises ConfigError: an unknown profile, or a link without rates.
    """
    if options.client_device is None:
        return None
    profiles = Profiles.load(None if options.profiles is None else Path(options.profiles))
    client = profiles.device(options.client_device)
    server = None if options.server_device is None else profiles.device(options.server_device)
    link = (
        Link.of("own", {"source": "the user"}, "the options") if options.link is None else profiles.link(options.link)
    )
    for profile in (client, server, link):
        if profile is not None and profile.warning:
            warnings.warn(CutlayerWarning(profile.warning), stacklevel=2)
    traced = isinstance(options, RunConfig) and options.trace is not None
    up = math.nan if traced else options.up_mbps or link.up_mbps
    down = math.nan if traced else options.down_mbps or link.down_mbps
    if up is None or down is None:
        missing = [name for name, value in (("up_mbps", up), ("down_mbps", down)) if value is None]
        what = "there is no link" if options.link is None else f"link {options.link!r} has no rates of its own"
        raise ConfigError(f"{what}: give {' and '.join(missing)} in Mbit/s, e.g. --up-mbps 10 --down-mbps 50")
    slow = _slowness(options, clients)
    latency = link.latency_ms if options.latency_ms is None else options.latency_ms
    return Fleet(
        client=client,
        link=link,
        server=server,
        speeds=_rate(client, options.precision) * options.utilisation * slow[0],
        up=up * MBPS * slow[1],
        down=down * MBPS * slow[1],
        latency=latency / 1e3,
        server_speed=math.inf if server is None else _rate(server, options.precision) * options.utilisation,
        server_rate=math.inf if options.server_mbps is None else options.server_mbps * MBPS,
        multicast=options.multicast,
        notes=_notes(client, server, options.precision),
    )


def _rate(device: Device, precision: Precision) -> float:
    """FLOP/s in that precision; the float32 rate if the profile does not state one."""
    return device.rate(precision) or device.flops_per_second


def _notes(client: Device, server: Device | None, precision: Precision) -> tuple[str, ...]:
    """A sentence for each device whose float32 rate is used for `precision`."""
    devices = {device.name: device for device in (client, server) if device is not None}
    return tuple(
        f"{name} has no known rate in {precision}: its float32 rate, {format_quantity(d.flops_per_second, 'FLOP/s')}, "
        "is used. A profile of your own can state one."
        for name, d in devices.items()
        if d.rate(precision) is None
    )


def _slowness(options: FleetOptions, clients: int) -> tuple[Array, Array]:
    """Factors on each client's speed and rate: [C] each. The median is 1, that of stragglers 1 / straggler_slowdown."""
    draw = seeds.generator(options.seed, "fleet")
    speed = np.exp(options.speed_spread * draw.standard_normal(clients))
    rate = np.exp(options.rate_spread * draw.standard_normal(clients))
    slow = np.ones(clients)
    count = math.floor(options.stragglers * clients + 0.5)
    slow[draw.permutation(clients)[:count]] = 1 / options.straggler_slowdown
    return speed * slow, rate * slow
