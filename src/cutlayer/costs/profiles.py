"""Device and link profiles: figures with their sources, the built-in ones and the user's own (TOML).

Units: FLOP/s, watts, bits per second, seconds. A figure that a profile lacks is None, and everything that depends on it
is not known either. The only exception is a device's rate in another precision than float32: the float32 rate is used
instead, and the output says so.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cutlayer.errors import ConfigError, unknown

Precision = Literal["float32", "bfloat16", "float16", "tf32", "float64"]
"""The precisions that a run or a plan can have."""


class _Profile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    name: str
    """What it is called by."""
    title: str = ""
    """Its full name."""
    source: str
    """Where the figures come from."""
    note: str = ""
    """What else is to be known."""
    warning: str = ""
    """What the user is told each time that it is used."""

    @classmethod
    def of(cls, name: str, values: Mapping[str, Any], where: str) -> Self:
        """From a TOML table. Raises ConfigError with the value, the reason and the place."""
        figures = [f for f in cls.model_fields if f != "name"]
        if "name" in values:
            raise ConfigError(f"profile {name!r} in {where}: {unknown('figure', 'name', figures)}; correct that table")
        try:
            return cls(name=name, **values)
        except ValidationError as error:
            first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a misspelt figure comes first
            path = [str(part) for part in first["loc"]]
            field = ".".join(path)
            if first["type"] == "extra_forbidden" and path[0] == "rates":
                precisions = list(Rates.model_fields)
                reason = f"{unknown('precision', path[-1], precisions)} (the float32 rate is flops_per_second)"
            elif first["type"] == "extra_forbidden":
                reason = unknown("figure", field, figures)
            elif first["type"] == "missing":
                reason = f"{field} is missing"
            else:
                reason = f"{field} = {first['input']!r} is not possible: {str(first['msg']).lower()}"
            raise ConfigError(f"profile {name!r} in {where}: {reason}; correct that table") from None


class Rates(BaseModel):
    """FLOP/s that a device reaches in other precisions than float32, where they are known."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    bfloat16: float | None = Field(default=None, gt=0)
    """With products in bfloat16."""
    float16: float | None = Field(default=None, gt=0)
    """With products in float16."""
    tf32: float | None = Field(default=None, gt=0)
    """With float32 numbers whose products are rounded to TF32."""
    float64: float | None = Field(default=None, gt=0)
    """In double precision."""


class Device(_Profile):
    """A machine that computes. `basis` says what kind of computation `flops_per_second` and `watts` are for."""

    flops_per_second: float = Field(gt=0)
    """FLOP/s that it reaches in float32."""
    rates: Rates = Rates()
    """FLOP/s that it reaches in other precisions."""
    rates_source: str = ""
    """Where `rates` come from. Default: `source`."""
    watts: float = Field(ge=0)
    """Power while it computes, of the whole device."""
    idle_watts: float | None = Field(None, ge=0)
    """Power while it waits."""
    memory_gb: float | None = Field(None, gt=0)
    """Gigabytes (1e9 bytes) that training may take; cut_by = profile keeps within it. None: not known."""
    basis: str = "as measured by its owner"
    """The computation that was measured."""

    def rate(self, precision: Precision) -> float | None:
        """FLOP/s in that precision, or None if the profile does not state it."""
        found: float | None = self.flops_per_second if precision == "float32" else getattr(self.rates, precision)
        return found

    @property
    def joules_per_flop(self) -> float:
        """Energy of one FLOP in float32."""
        return self.watts / self.flops_per_second


class Link(_Profile):
    """What carries data between a client and the server, seen from the client: up is sending."""

    up_mbps: float | None = Field(None, gt=0)
    """Rate of sending, in Mbit/s."""
    down_mbps: float | None = Field(None, gt=0)
    """Rate of receiving, in Mbit/s."""
    latency_ms: float = Field(0.0, ge=0)
    """One way."""
    up_watts: float | None = Field(None, ge=0)
    """Power while sending that does not depend on the rate."""
    up_watts_per_mbps: float | None = Field(None, ge=0)
    """Power that each Mbit/s of sending adds."""
    down_watts: float | None = Field(None, ge=0)
    """Power while receiving that does not depend on the rate."""
    down_watts_per_mbps: float | None = Field(None, ge=0)
    """Power that each Mbit/s of receiving adds."""


class Profiles(BaseModel):
    """Named devices and links."""

    model_config = ConfigDict(frozen=True)

    devices: dict[str, Device]
    links: dict[str, Link]

    @classmethod
    def load(cls, own: Path | None = None) -> Self:
        """The built-in profiles, with the user's over them.

        The user's file has tables [device.NAME], [device.NAME.rates] and [link.NAME] with the fields of `Device`,
        `Rates` and `Link`. Raises ConfigError for a file that cannot be read, is not TOML, or has an impossible figure.
        """
        built_in = resources.files("cutlayer.costs").joinpath("profiles.toml").read_text("utf-8")
        tables = [("the built-in profiles", tomllib.loads(built_in))]
        if own is not None:
            tables.append((repr(str(own)), _read(own)))
        devices: dict[str, Device] = {}
        links: dict[str, Link] = {}
        for where, table in tables:
            for kind in table:
                if kind not in ("device", "link"):
                    raise ConfigError(f"{where}: {unknown('table', kind, ('device', 'link'))}")
            devices |= {n: Device.of(n, v, where) for n, v in _named(table, "device", where)}
            links |= {n: Link.of(n, v, where) for n, v in _named(table, "link", where)}
        return cls(devices=devices, links=links)

    def device(self, name: str) -> Device:
        """The device called `name`. Raises ConfigError with the known names."""
        if name not in self.devices:
            raise ConfigError(unknown("device profile", name, self.devices))
        return self.devices[name]

    def link(self, name: str) -> Link:
        """The link called `name`. Raises ConfigError with the known names."""
        if name not in self.links:
            raise ConfigError(unknown("link profile", name, self.links))
        return self.links[name]


def _named(table: Mapping[str, Any], kind: str, where: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The tables [kind.NAME] by name. Raises ConfigError for figures outside of these tables."""
    named = table.get(kind, {})
    if not isinstance(named, Mapping):
        raise ConfigError(f"{where}: {kind} = {named!r} is not a table: give each {kind} one of its own, [{kind}.NAME]")
    for name, values in named.items():
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{where}: {name} = {values!r} stands in no profile: give each {kind} a table of its own, [{kind}.NAME]"
            )
    return list(named.items())


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the profiles {str(path)!r}: {error.strerror}; check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the profiles {str(path)!r} are not valid TOML: {error}; correct that line") from None
