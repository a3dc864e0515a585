"""The list of clients and certificates that a server always refuses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cutlayer.errors import ConfigError
from cutlayer.remote.caller import Caller

MOST = 1 << 20
"""The largest size of the file in bytes."""

_CERTIFICATE = re.compile(r"(serial|sha256):([0-9A-Fa-f:]+)")
_HEX = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){7,}|[0-9A-Fa-f]{32,}")  # a number whose kind was forgotten
_NAME = re.compile(r"[^\s:]{1,256}")


@dataclass(frozen=True)
class DenyList:
    """Refused clients by their `names`, and certificates by their `serials` and fingerprints (`sha256`)."""

    names: frozenset[str] = frozenset()
    serials: frozenset[str] = frozenset()
    sha256: frozenset[str] = frozenset()

    @classmethod
    def read(cls, path: Path) -> DenyList:
        """From a file with a name, `serial:HEX` or `sha256:HEX` on each line; what follows a # is a remark. Raises
        ConfigError.
        """
        found: dict[str, set[str]] = {"name": set(), "serial": set(), "sha256": set()}
        for number, line in enumerate(_lines(path), 1):
            if entry := line.partition("#")[0].strip():
                kind, what = _entry(entry, f"{str(path)!r}, line {number}")
                found[kind].add(what)
        return cls(*map(frozenset, found.values()))

    def __len__(self) -> int:
        return len(self.names) + len(self.serials) + len(self.sha256)

    def why(self, caller: Caller) -> str | None:
        """Why a peer is refused; None if it is not denied."""
        if caller.name in self.names:
            return f"client {caller.facts['name']!r} is on this server's list of denied ones: ask who runs the server"
        if caller.sha256 in self.sha256 or caller.serial in self.serials:
            return (
                f"the certificate with the serial number {caller.serial} is on this server's list of denied ones: ask "
                "who runs the server for another"
            )
        return None


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}; name a file that you may read") from None
    try:
        if len(content) > MOST:
            raise ValueError(f"{len(content)} bytes")
        return content.decode().splitlines()
    except ValueError as error:
        raise ConfigError(
            f"{str(path)!r} is not a list ({error}): write a name, serial:HEX or sha256:HEX on each line, in UTF-8, "
            f"{MOST} bytes at most"
        ) from None


def _entry(text: str, where: str) -> tuple[str, str]:
    """(kind, value) of an entry. Raises ConfigError, because a line without a meaning would admit a client that should
    be refused.
    """
    if certificate := _CERTIFICATE.fullmatch(text):
        kind, digits = certificate[1], certificate[2].replace(":", "").lower()
        if kind == "sha256" and len(digits) == 64:
            return kind, digits
        if kind == "serial" and digits.strip("0"):
            return kind, digits.lstrip("0")
    elif _NAME.fullmatch(text) and not _HEX.fullmatch(text) and text.isprintable():
        return "name", text
    raise ConfigError(
        f"{where}: {text[:80]!r} names no client: write a client's name, serial:HEX or sha256:HEX (64 digits), which "
        "`cutlayer certs` prints"
    )
