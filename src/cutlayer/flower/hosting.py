"""Flower's run configuration: options of a run, and how its streams are served.

Flower's configuration is flat, knows numbers, texts and truth values, and only allows overrides of names that the app
lists. So tables are given as dotted names, and an empty text means "not given".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from cutlayer.errors import ConfigError
from cutlayer.options import FaultConfig, RunConfig, normalised, overlaid, read_toml
from cutlayer.remote.security import split_address

SERVE, FILE = "serve", "config"
_EVERYWHERE = ("0.0.0.0", "::")


class Hosting(FaultConfig):
    """How the server hosts a run, and what it does about faults: the table `serve`."""

    listen: str = "127.0.0.1:0"
    """Address and port that the clients' streams come to; port 0: any that is free."""
    reach: str | None = None
    """The host under which clients reach it, or host:port behind a tunnel. Default: that of listen."""
    out: str | None = None
    """The run folder. Default: runs/flower-RUN."""
    patience: float = Field(120.0, ge=0)
    """Seconds to wait for SuperNodes, and then for clients that are missing: all at the start, a quorum later. 0: no
    limit."""
    hours: float = Field(168.0, gt=0)
    """So long Flower keeps the messages, and clients may connect."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values. Raises ConfigError."""
        hosting = super().of(values)
        split_address(hosting.listen)
        if hosting.host in _EVERYWHERE:
            raise ConfigError(
                f"{hosting.host} is not an address that clients can dial: give serve.reach, this machine's name or "
                "address"
            )
        return hosting

    @property
    def host(self) -> str:
        """The name or address of the server's certificate."""
        return split_address(self._reached(0))[0]

    def address(self, port: int) -> str:
        """The address to which clients connect, if the server listens at `port`."""
        return self._reached(port)

    def _reached(self, port: int) -> str:
        host = self.reach or split_address(self.listen)[0]
        bare = host.strip("[]")
        if ":" not in bare:
            return f"{host}:{port}"
        return f"[{bare}]:{port}" if bare.count(":") > 1 and "]:" not in host else host


def read(values: Mapping[str, Any]) -> tuple[RunConfig, Hosting]:
    """The run and its hosting from Flower's run configuration: options of `cutlayer run`, over those of the file in
    `config`, if any; and the table `serve`. Raises ConfigError.
    """
    tables: dict[str, Any] = {}
    for key, value in values.items():
        if value == "":
            continue
        table, dot, name = key.partition(".")
        if dot:
            tables.setdefault(table, {})[name] = value
        else:
            tables[key] = value
    serve, file = tables.pop(SERVE, {}), tables.pop(FILE, None)
    if not isinstance(serve, Mapping):
        raise ConfigError(f"serve = {serve!r} is not a table: write its names below [tool.flwr.app.config.serve]")
    below = read_toml(Path(str(file))) if file else {}
    below.pop("budget", None)  # a client's own
    hosting = Hosting.of({**normalised(below.pop("faults", {})), **normalised(serve)})
    merged = overlaid(below, normalised(tables))
    config = RunConfig.of(merged)
    config.check(frozenset(merged))
    return config, hosting
