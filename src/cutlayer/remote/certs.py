"""Certificates for your own federation: an authority, and its certificates for the server and the clients.

ECDSA on P-256. The authority's key (`ca.key`) stays on the machine that makes the certificates. A client needs `ca.crt`
and its own `NAME.crt` and `NAME.key`. A client's certificate contains its name, which is its identity for the server.

Keys need not be sent: each party makes its own key with a request (PKCS #10), and the authority signs the request.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes as PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cutlayer.errors import ConfigError
from cutlayer.remote.caller import described
from cutlayer.remote.security import hash_token, make_token

CA: Final = "ca"
SERVER: Final = "server"
TOKENS: Final = "tokens.toml"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
Kind = Literal["server", "client"]
_EARLIER = timedelta(minutes=10)  # clocks of other machines may be slow
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # a common name has 64 characters at most; it names files too
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_PURPOSE = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}


class Pair(NamedTuple):
    """The paths of a certificate and its private key."""

    certificate: Path
    key: Path


def make_ca(folder: Path, *, days: int = 3650) -> Pair:
    """A new authority in `folder`: ca.crt and ca.key.

    It certifies servers and clients, but no further authorities. Raises ConfigError if there is one already, or if the
    files cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Cutlayer authority {secrets.token_hex(4)}")])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    builder = _builder(name, name, key.public_key(), *_validity(days)).add_extension(
        x509.BasicConstraints(True, 0), critical=True
    )
    return _write(folder, CA, builder.add_extension(usage, critical=True).sign(key, hashes.SHA256()), key)


def make_certificate(
    folder: Path, name: str, kind: Kind = "client", *, hosts: Sequence[str] = (), days: int = 365
) -> Pair:
    """A certificate by the authority in `folder` for the server, which is reached under `hosts` (names and addresses;
    by default only those of this machine), or for the client called `name`.

    Raises ConfigError if the authority is missing, if the name is taken or is not a valid file name, or if the files
    cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    return _write(folder, name, _certified(folder, name, kind, key.public_key(), hosts, days), key)


def make_tokens(folder: Path, names: Sequence[str]) -> tuple[Path, list[Path]]:
    """A token for each of `names` in `folder`: NAME.token for the client, and tokens.toml with the hashes for the
    server.

    Raises ConfigError if a name is taken or is not a valid file name, or if the files cannot be written.
    """
    for name in names:
        _check_name(name)
    tokens = {name: make_token() for name in names}
    server, files = folder / TOKENS, {name: folder / f"{name}.token" for name in names}
    lines = "".join(f'"{name}" = "{hash_token(token)}"\n' for name, token in tokens.items())
    own = {files[name]: (f"{token}\n".encode(), 0o600) for name, token in tokens.items()}
    _write_files(folder, {server: (lines.encode(), 0o600), **own})
    return server, list(files.values())


def make_request(folder: Path, name: str) -> Pair:
    """A new key NAME.key in `folder` for the party called `name`, with a request for its certificate, NAME.csr.

    The key stays there; the request has no secrets. Raises ConfigError if the name is taken or is not a valid file
    name, or if the files cannot be written.
    """
    _check_name(name)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    pair = Pair(folder / f"{name}.csr", folder / f"{name}.key")
    _write_files(folder, {pair.key: (_secret(key), 0o600), pair.certificate: (_pem(request), 0o644)})
    return pair


def sign_request(folder: Path, path: Path, *, hosts: Sequence[str] = (), days: int = 365) -> Path:
    """NAME.crt by the authority in `folder` for the request NAME.csr at `path`. If the name is `server`, it is the
    certificate of the server, which is reached under `hosts`; otherwise it is a client's. Only the name and the key are
    taken from the request.

    Raises ConfigError if the request cannot be read, is damaged, is for another name than its file's or has a weak key,
    and as `make_certificate` does.
    """
    request = _read_request(path)
    name = next((str(a.value) for a in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)), "")
    if name != path.stem:
        raise ConfigError(
            f"{str(path)!r} asks for a certificate for {name!r}: rename it to {name + '.csr'!r} if that is who sent it"
        )
    key = request.public_key()
    strong = isinstance(key, ec.EllipticCurvePublicKey) or (isinstance(key, rsa.RSAPublicKey) and key.key_size >= 2048)
    if not strong:
        raise ConfigError(f"the key of {str(path)!r} is weak or of an unknown kind: make one on the curve P-256")
    kind: Kind = "server" if name == SERVER else "client"
    certificate = _certified(folder, name, kind, key, hosts, days)
    made = _paths(folder, name).certificate
    _write_files(folder, {made: (_pem(certificate), 0o644)})
    return made


def key_fingerprint(path: Path) -> str:
    """SHA-256 of the public key in a request, which both sides compare. Raises ConfigError."""
    key = _read_request(path).public_key()
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def read_certificate(path: Path) -> dict[str, Any]:
    """The owner of a certificate (`subject`), its identity (`serial`, `sha256`), and the end of its validity
    (`expires`). Raises ConfigError.
    """
    try:
        return described(x509.load_pem_x509_certificate(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}; name a .crt of `cutlayer certs`") from None
    except ValueError:
        raise ConfigError(f"{str(path)!r} holds no certificate in PEM: name a .crt of `cutlayer certs`") from None


def _read_request(path: Path) -> x509.CertificateSigningRequest:
    """A request with a valid signature, which only the owner of the key can make. Raises ConfigError."""
    try:
        request = x509.load_pem_x509_csr(path.read_bytes())
        sound = request.is_signature_valid
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}; name a .csr of `cutlayer certs`") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{str(path)!r} holds no request in PEM: name a .csr of `cutlayer certs`") from None
    if not sound:
        raise ConfigError(f"{str(path)!r} is damaged (its signature is wrong): have it sent again")
    return request


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name == CA:
        raise ConfigError(
            f"{name!r} cannot name a certificate: give up to 64 letters, digits, points, hyphens and underscores, "
            f"beginning with a letter or digit, other than {CA!r}"
        )


def _certified(
    folder: Path, name: str, kind: Kind, key: PublicKey, hosts: Sequence[str], days: int
) -> x509.Certificate:
    """The certificate by the authority in `folder` for the party called `name`, which holds `key`. Raises
    ConfigError.
    """
    _check_name(name)
    if hosts and kind == "client":
        raise ConfigError(
            f"hosts have no effect on {name!r}, which is a client, and no one connects to a client: leave them out"
        )
    issuer, issuer_key = _authority(folder)
    begin, end = _validity(days)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    reached = [_host(host) for host in hosts or LOOPBACK] if kind == "server" else [x509.DNSName(name)]
    own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _builder(subject, issuer.subject, key, begin, min(end, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_PURPOSE[kind]]), critical=False)
        .add_extension(x509.SubjectAlternativeName(reached), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
    )
    return builder.sign(issuer_key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PublicKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(begin, end - _EARLIER))
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _validity(days: int) -> tuple[datetime, datetime]:
    """Valid from shortly before now, for `days` days. A certificate with negative days has expired already."""
    now = datetime.now(UTC)
    return now - _EARLIER, now + timedelta(days=days)


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        if not _HOST.fullmatch(host):
            raise ConfigError(
                f"{host!r} is not a host: give names and addresses without ports, e.g. split.example.org"
            ) from None
        return x509.DNSName(host)


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate, key = _paths(folder, CA)
    try:
        issuer = x509.load_pem_x509_certificate(certificate.read_bytes())
        issuer_key = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(
            f"cannot read {str(error.filename)!r}: {error.strerror}; make an authority in this folder first"
        ) from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the authority in {str(folder)!r} cannot be used ({error}): make a new one") from None
    if not isinstance(issuer_key, ec.EllipticCurvePrivateKey) or issuer_key.public_key() != issuer.public_key():
        raise ConfigError(f"{str(key)!r} is not the key of {str(certificate)!r}: restore it, or make a new authority")
    return issuer, issuer_key


def _paths(folder: Path, name: str) -> Pair:
    return Pair(folder / f"{name}.crt", folder / f"{name}.key")


def _write(folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    pair = _paths(folder, name)
    _write_files(folder, {pair.key: (_secret(key), 0o600), pair.certificate: (_pem(certificate), 0o644)})
    return pair


def _secret(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _pem(made: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    return made.public_bytes(serialization.Encoding.PEM)


def _write_files(folder: Path, files: Mapping[Path, tuple[bytes, int]]) -> None:
    """Write contents with their modes, if no file has this name. Raises ConfigError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = next((path for path in files if path.exists()), None)
        if taken is not None:
            raise FileExistsError(0, "", str(taken))
        for path, (content, mode) in files.items():
            _write_new(path, content, mode)
    except FileExistsError as error:
        raise ConfigError(
            f"{str(error.filename2 or error.filename)!r} exists: keep it, or remove it first if nothing needs it"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot write to {str(folder)!r}: {error.strerror}; choose another folder") from None


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write atomically, and only if the file does not exist. At no time can others read it."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        try:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            os.link(fresh, path)  # unlike a rename, this fails if the file exists
        finally:
            fresh.unlink()
