"""The peer that connects to a server: its name, its address, and its certificate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import unquote

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from cutlayer.text import plain, shortened

_SHOWN = 100  # characters of a stranger's text


@dataclass(frozen=True)
class Caller:
    """The peer. `name` is the name that it claims, which is proven only if the server has admitted it. `serial` and
    `sha256` are those of its certificate, in hexadecimal digits; they are empty if it has shown none.
    """

    name: str
    address: str
    subject: str = ""
    serial: str = ""
    sha256: str = ""
    expires: datetime | None = None

    @classmethod
    def of(cls, name: str, peer: str, context: Mapping[str, Iterable[bytes]]) -> Caller:
        """The peer at gRPC's address `peer`, whose certificate is in gRPC's "auth context"."""
        address = unquote(peer)
        with suppress(ValueError):
            for pem in context.get("x509_pem_cert", ()):
                return cls(name, address, **described(x509.load_pem_x509_certificate(pem)))
        return cls(name, address)

    @property
    def host(self) -> str:
        """The address without its port."""
        return self.address.rpartition(":")[0]

    @property
    def facts(self) -> dict[str, str]:
        """The facts for a record, without empty ones."""
        name, subject = (plain(shortened(text, _SHOWN)) for text in (self.name, self.subject))
        shown = {"name": name, "address": self.address, "subject": subject}
        return {n: v for n, v in {**shown, "serial": self.serial, "sha256": self.sha256}.items() if v}


def described(certificate: x509.Certificate) -> dict[str, Any]:
    """The facts that identify a certificate, and the end of its validity."""
    return {
        "subject": certificate.subject.rfc4514_string(),
        "serial": f"{certificate.serial_number:x}",
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
        "expires": certificate.not_valid_after_utc,
    }
