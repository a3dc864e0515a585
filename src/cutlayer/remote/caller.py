"""Who dials a server: its name, its address, and the certificate that it has shown."""

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

_SHOWN = 100  # characters of what a stranger says


@dataclass(frozen=True)
class Caller:
    """Who dials. `name` is what it calls itself, and has been proven only where the server has let it in; `serial` and
    `sha256` are those of its certificate, in hexadecimal digits; empty where it has shown none.
    """

    name: str
    address: str
    subject: str = ""
    serial: str = ""
    sha256: str = ""
    expires: datetime | None = None

    @classmethod
    def of(cls, name: str, peer: str, context: Mapping[str, Iterable[bytes]]) -> Caller:
        """Somebody at gRPC's `peer`, whose certificate is in gRPC's "auth context"."""
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
        """What a record says of it, without what there is not."""
        name, subject = (plain(shortened(text, _SHOWN)) for text in (self.name, self.subject))
        shown = {"name": name, "address": self.address, "subject": subject}
        return {n: v for n, v in {**shown, "serial": self.serial, "sha256": self.sha256}.items() if v}


def described(certificate: x509.Certificate) -> dict[str, Any]:
    """What tells a certificate from all others, and until when it is valid."""
    return {
        "subject": certificate.subject.rfc4514_string(),
        "serial": f"{certificate.serial_number:x}",
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
        "expires": certificate.not_valid_after_utc,
    }
