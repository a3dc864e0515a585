"""Authentication: mutual TLS, TLS with a token per client, or nothing on the same machine.

Files are read and checked before anything starts, so that errors in them lead to a clear message and not to a failed
handshake. TLS is 1.2 or newer (gRPC's own floor).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import ssl
import stat
import time
import tomllib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cutlayer.errors import ConfigError, CutlayerWarning
from cutlayer.remote.caller import Caller, described
from cutlayer.remote.denied import DenyList
from cutlayer.remote.reread import News, Reread
from cutlayer.remote.transports import host_and_port

TOKEN_LENGTH = 20
"""The minimum length of a token. Tokens come from `make_token` and are not invented by people, so a fast hash is
enough.
"""

T = TypeVar("T")

_HASHED = "sha256"
_CLOSED = "it hung up after the handshake"


@dataclass(frozen=True)
class ServerSecurity:
    """The server's credentials, and those that it requires from clients: a certificate by the authority in the file
    `ca` (mutual TLS), or the token that the file `tokens` (TOML: name = token, or its hash) has for them, or, without
    files, nothing. `deny` is a file with clients and certificates that are always refused (`denied.DenyList`).
    """

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    tokens: Path | None = None
    deny: Path | None = None

    @property
    def insecure(self) -> bool:
        """Nothing is asked, nothing is encrypted."""
        return not any((self.certificate, self.key, self.ca, self.tokens))

    def open(self, address: str) -> Gate:
        """Read and check everything. Raises ConfigError, naming the file and the remedy."""
        _check_exposure(self.insecure, address, "clients' data")
        denied = None if self.deny is None else _reread("deny list", DenyList.read, self.deny, _denied)
        if self.insecure:
            return Gate(None, None, denied)
        if not self.certificate or not self.key:
            raise ConfigError("a server with TLS needs both its certificate and its key: give the missing one")
        if bool(self.ca) == bool(self.tokens):
            raise ConfigError("clients show either certificates or tokens: give exactly one of ca and tokens")
        files = [path for path in (self.certificate, self.key, self.ca) if path]
        identity = Reread("certificate", files, self._identity, lambda found: found.facts)
        tokens = None if self.tokens is None else _reread("tokens", Tokens.read, self.tokens, lambda found: {})
        return Gate(identity, tokens, denied)

    def _identity(self) -> Identity:
        """The server's present credentials, and the authority that it requires of clients. Raises ConfigError."""
        assert self.certificate, "only a server with TLS has an identity"
        assert self.key
        chain, key = _read_pair(self.certificate, self.key, ExtendedKeyUsageOID.SERVER_AUTH, "server")
        authority = _read_authority(self.ca) if self.ca else None
        own = described(x509.load_pem_x509_certificate(chain))
        expiries = {"server": own["expires"]}
        if authority:
            expiries["authority"] = described(x509.load_pem_x509_certificate(authority))["expires"]
        configuration = grpc.ssl_server_certificate_configuration([(key, chain)], authority)
        return Identity(configuration, {"serial": own["serial"], "sha256": own["sha256"]}, expiries)


@dataclass(frozen=True)
class Identity:
    """A server's credentials in a handshake: gRPC's `configuration`, with the `facts` that identify its certificate.
    `expiries`: the ends of validity of its certificate and of the clients' authority.
    """

    configuration: Any
    facts: Mapping[str, str]
    expiries: Mapping[str, datetime]


@dataclass(frozen=True)
class ClientSecurity:
    """The credentials that a client trusts and shows: the authority `ca` of the server's certificate, and a certificate
    with its key, or a token. Without any of them: nothing, only on the same machine.

    `server_name`: the name in the server's certificate, if it differs from the address (a tunnel).
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: str | None = field(default=None, repr=False)
    server_name: str | None = None

    @property
    def insecure(self) -> bool:
        """Nothing is asked, nothing is encrypted."""
        return not any((self.ca, self.certificate, self.key, self.token))

    def credentials(self, address: str) -> Any:
        """gRPC's credentials for a channel to `address`, None for none. Raises ConfigError, naming the file and the
        remedy.
        """
        _check_exposure(self.insecure, address, "this client's data")
        if self.insecure:
            return None
        if not self.ca:
            raise ConfigError("a client with TLS needs the authority that made the server's certificate: give ca")
        authority = _read_authority(self.ca)
        if not self.certificate and not self.key:
            return grpc.ssl_channel_credentials(authority)
        if not self.certificate or not self.key:
            raise ConfigError("a client's certificate needs its key, and the key its certificate: give the missing one")
        chain, key = _read_pair(self.certificate, self.key, ExtendedKeyUsageOID.CLIENT_AUTH, "client")
        return grpc.ssl_channel_credentials(authority, key, chain)

    def diagnose(self, address: str) -> str | None:
        """Why TLS fails, as a sentence, if it is the reason for a failed connection. gRPC's own messages come from its
        library or are missing, but Python's errors can be distinguished.

        Two handshakes must give the same result, since one can be damaged on its way, or meet a server that is just
        stopping.
        """
        found = self._diagnosis(address)
        if found is not None:
            time.sleep(0.2)
        return found if found is None or self._diagnosis(address) == found else None

    def _diagnosis(self, address: str) -> str | None:
        """The result of one handshake."""
        try:
            said = self._shake_hands(address)
        except ssl.SSLCertVerificationError as error:
            return (
                f"the certificate of the server at {address} is not accepted ({error.verify_message}): give ca, the "
                "authority that made it, or the address that it was made for"
            )
        except ssl.SSLError as error:
            reason = error.reason or ""
            if reason == "WRONG_VERSION_NUMBER":
                return None if self.insecure else f"the server at {address} speaks no TLS: start it with a certificate"
            if "ALERT" not in reason:
                return None
            said = reason.partition("ALERT_")[2].lower().replace("_", " ")
        except OSError:
            return None
        if self.insecure:
            return f"the server at {address} speaks TLS: give ca, and this client's certificate or token"
        if not said:
            return None
        return (
            f"the server at {address} does not accept this client's certificate ({said}): give certificate and key, "
            "made by the authority that the server knows, and not expired"
        )

    def _shake_hands(self, address: str) -> str:
        """Open a TLS connection. Returns the server's objection to our certificate, "" if it accepted it. Raises
        OSError.
        """
        host, port = split_address(address)
        context = ssl.create_default_context(cafile=None if self.insecure else self.ca)
        if self.insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if self.certificate:
            context.load_cert_chain(self.certificate, self.key)
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, port), timeout=5) as raw,
            context.wrap_socket(raw, server_hostname=self.server_name or host) as tls,
        ):
            # The server checks our certificate after the handshake. If it refuses, gRPC just closes; otherwise it sends
            # first.
            try:
                return "" if tls.recv(1) else _CLOSED
            except (ConnectionError, ssl.SSLEOFError):
                return _CLOSED


class Tokens:
    """The clients' tokens, stored as salted hashes."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        self._entries = {name: _entry(name, text) for name, text in entries.items()}
        self._nobody = _entry("", hash_token(make_token()))

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """From a TOML file, name = "token" or name = "its hash". Raises ConfigError."""
        _warn_if_open(path)
        try:
            found = tomllib.loads(_read(path).decode())
        except ValueError as error:
            raise ConfigError(
                f'{str(path)!r} is not valid TOML ({error}): write a line NAME = "TOKEN" for each client'
            ) from None
        if not found or not all(isinstance(text, str) for text in found.values()):
            raise ConfigError(f'{str(path)!r} must have a line NAME = "TOKEN" for each client, one at least')
        return cls(found)

    def __contains__(self, shown: tuple[str, str]) -> bool:
        """Whether (name, token) is one of them. Takes the same time if it is not."""
        name, token = shown
        salt, digest = self._entries.get(name, self._nobody)
        return hmac.compare_digest(_digest(salt, token), digest) and name in self._entries


class Gate:
    """An open server's checks of connecting clients. All files are read again when they change: at each new handshake,
    and at each `look`. `credentials` are gRPC's, None for none; `certified`: clients show certificates.
    """

    def __init__(
        self, identity: Reread[Identity] | None, tokens: Reread[Tokens] | None, denied: Reread[DenyList] | None
    ) -> None:
        self._identity, self._tokens, self._denied = identity, tokens, denied
        self.certified = identity is not None and tokens is None
        self.credentials: Any = None
        if identity is not None:
            self._shown = identity.value
            first = self._shown.configuration
            self.credentials = grpc.dynamic_ssl_server_credentials(first, self._renewed, self.certified)

    def _renewed(self) -> Any:
        """Called by gRPC at each handshake, on its own threads, one at a time. None if nothing is new."""
        assert self._identity is not None
        found = self._identity.look()
        if found is self._shown:
            return None
        self._shown = found
        return found.configuration

    @property
    def denied(self) -> DenyList:
        """The deny list, as it was read last."""
        return DenyList() if self._denied is None else self._denied.value

    @property
    def expiries(self) -> Mapping[str, datetime]:
        """The ends of validity of the server's certificate and of the clients' authority."""
        return {} if self._identity is None else self._identity.value.expiries

    def look(self) -> list[News]:
        """Read changed files again. Returns the news about them, and about what handshakes have found."""
        news: list[News] = []
        for watched in (self._identity, self._tokens, self._denied):
            if watched is not None:
                watched.look()
                while watched.news:
                    news.append(watched.news.popleft())
        return news

    def identity(self, name: str, token: str, certificate: Mapping[str, Iterable[bytes]]) -> str | None:
        """The identity of the peer that claims the name `name`; None if it cannot be known.

        `certificate` is gRPC's description of the peer's certificate (the "auth context"). Raises StrangerError.
        """
        if self._tokens is not None:
            if (name, token) not in self._tokens.look():
                raise StrangerError(
                    "token", f"there is no client {name!r} with this token: give the name and its own token"
                )
            return name
        if not self.certified:
            return None
        names = [
            text.decode(errors="replace")
            for key in ("x509_common_name", "x509_subject_alternative_name")
            for text in certificate.get(key, ())
        ]
        if name not in names:
            whose = repr(names[0]) if names else "nobody"
            raise StrangerError(
                "client", f"this certificate is made for {whose}, not for {name!r}: give the certificate of that client"
            )
        return name

    def check(self, caller: Caller) -> None:
        """Raises StrangerError for a peer that is denied."""
        if self._denied is not None and (why := self._denied.look().why(caller)):
            raise StrangerError("excluded", why)


class StrangerError(Exception):
    """Somebody came who is not who they say, or is not let in. `reason` is one of a Refused's."""

    def __init__(self, reason: Literal["token", "client", "excluded", "taken", "full"], sentence: str) -> None:
        super().__init__(sentence)
        self.reason: Literal["token", "client", "excluded", "taken", "full"] = reason
        self.sentence = sentence


def make_token() -> str:
    """A new token, of 256 random bits."""
    return secrets.token_urlsafe(32)


def read_token(path: Path) -> str:
    """The token in a client's file. Raises ConfigError if the file cannot be read, or has no token."""
    _warn_if_open(path)
    token = _read(path).decode(errors="replace").strip()
    if len(token) < TOKEN_LENGTH:
        raise ConfigError(
            f"{str(path)!r} holds no token of {TOKEN_LENGTH} characters or more: write the client's token into it"
        )
    return token


def hash_token(token: str) -> str:
    """The text that a server's file can have instead of the token. Raises ConfigError if the token is too short."""
    if len(token) < TOKEN_LENGTH:
        raise ConfigError(f"a token of {len(token)} characters can be guessed: use {TOKEN_LENGTH} random ones or more")
    salt = secrets.token_bytes(16)
    return f"{_HASHED}${salt.hex()}${_digest(salt, token).hex()}"


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[ipv6]:port". Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in bare and bare == host) or not port.isascii() or not port.isdigit():
        raise ConfigError(f"{address!r} is not an address: give host:port, e.g. localhost:4747 or [::1]:4747")
    if int(port) > 65535:
        raise ConfigError(f"{address!r}: a port is at most 65535")
    return bare, int(port)


def is_loopback(host: str) -> bool:
    """Whether `host` means this machine, independent of any name server."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reread(what: str, read: Callable[[Path], T], path: Path, facts: Callable[[T], Mapping[str, Any]]) -> Reread[T]:
    """The content of one file. Raises ConfigError."""
    return Reread(what, [path], lambda: read(path), facts)


def _denied(found: DenyList) -> dict[str, Any]:
    """The facts about a list for a record."""
    return {"entries": len(found), "names": sorted(found.names)[:100]}


def _check_exposure(insecure: bool, address: str, what: str) -> None:
    host, _ = split_address(host_and_port(address, encrypted=not insecure))
    if insecure and not is_loopback(host):
        raise ConfigError(
            f"without TLS, anyone between here and {host} can read {what}: give certificates, or use localhost"
        )


def _entry(name: str, text: str) -> tuple[bytes, bytes]:
    """(salt, hash) of a token, or of the result of `hash_token`."""
    kind, *rest = text.split("$")
    if kind != _HASHED or not rest:
        try:
            return _entry(name, hash_token(text))
        except ConfigError as error:
            raise ConfigError(f"client {name!r}: {error}") from None
    try:
        salt, digest = map(bytes.fromhex, rest)
        if len(digest) != hashlib.sha256().digest_size:
            raise ValueError
    except ValueError:
        raise ConfigError(f"the hash of client {name!r}'s token is damaged: make it anew") from None
    return salt, digest


def _digest(salt: bytes, token: str) -> bytes:
    return hashlib.sha256(salt + token.encode()).digest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}; name a file that you may read") from None


def _warn_if_open(path: Path) -> None:
    if (loaded := os.environ.get("CREDENTIALS_DIRECTORY")) and path.parent == Path(loaded):
        return  # systemd's: the group bits are those of an access list
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # reading it reports the error
    if stat.S_IMODE(mode) & 0o077:
        warnings.warn(f"others on this machine may read {str(path)!r}: chmod 600 it", CutlayerWarning, stacklevel=5)


def _read_certificates(path: Path) -> tuple[list[x509.Certificate], bytes]:
    """The certificates in a file and its content. The first certificate must be valid now."""
    content = _read(path)
    try:
        found = x509.load_pem_x509_certificates(content)
    except ValueError:
        raise ConfigError(f"{str(path)!r} holds no certificate in PEM: name a .crt of `cutlayer certs`") from None
    now = datetime.now(UTC)
    if found[0].not_valid_after_utc < now:
        raise ConfigError(f"{str(path)!r} expired on {found[0].not_valid_after_utc:%Y-%m-%d %H:%M} UTC: make a new one")
    if found[0].not_valid_before_utc > now:
        since = f"{found[0].not_valid_before_utc:%Y-%m-%d %H:%M}"
        raise ConfigError(f"{str(path)!r} is valid from {since} UTC on: set this machine's clock, or make a new one")
    return found, content


def _read_authority(path: Path) -> bytes:
    found, content = _read_certificates(path)
    try:
        is_authority = found[0].extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_authority = False
    if not is_authority:
        raise ConfigError(
            f"{str(path)!r} is a certificate, but not that of an authority: pass the authority's own as ca, ca.crt"
        )
    return content


def _read_pair(certificate: Path, key: Path, purpose: x509.ObjectIdentifier, kind: str) -> tuple[bytes, bytes]:
    """(certificate chain, private key), after checking that they belong together and suit this purpose."""
    found, chain = _read_certificates(certificate)
    _warn_if_open(key)
    secret = _read(key)
    try:
        private = serialization.load_pem_private_key(secret, password=None)
    except TypeError:
        raise ConfigError(
            f"{str(key)!r} is locked by a password, and there is no prompt for it: remove the password"
        ) from None
    except ValueError:
        raise ConfigError(f"{str(key)!r} holds no private key in PEM: name a .key of `cutlayer certs`") from None
    if private.public_key() != found[0].public_key():
        raise ConfigError(f"{str(key)!r} is not the key of {str(certificate)!r}: give the two that were made together")
    try:
        purposes = list(found[0].extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        purposes = [purpose]
    if purpose not in purposes:
        name = next((str(a.value) for a in found[0].subject.get_attributes_for_oid(NameOID.COMMON_NAME)), "it")
        raise ConfigError(f"{str(certificate)!r} ({name}) is not made for a {kind}: make one of kind {kind}")
    return chain, secret
