"""`certs`: an authority, certificates and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from cutlayer.cli.flags import command
from cutlayer.cli.network_commands import FLAG, NETWORK, File
from cutlayer.cli.printing import say
from cutlayer.errors import ConfigError


@command(sort_key=11)
def certs(
    folder: Annotated[Path, FLAG],
    *,
    clients: Annotated[int | None, FLAG] = None,
    tokens: Annotated[bool, Parameter(group=NETWORK, negative=())] = False,
    host: Annotated[tuple[str, ...], Parameter(group=NETWORK, negative=(), consume_multiple=True)] = (),
    days: Annotated[int, FLAG] = 365,
    request: Annotated[str | None, FLAG] = None,
    sign: File = None,
    show: File = None,
) -> None:
    """Create certificates for a server and its clients: all at once, or by requests that an authority signs.

    Parameters
    ----------
    folder
        The folder to write to: ca.crt, server.crt, client-0.crt, ..., each with its .key.
    clients
        Number of clients to create certificates and keys for; 0 if they create their own keys. Default: 3.
    tokens
        Create tokens instead of client certificates: client-0.token, ... for the clients, and tokens.toml for the
        server.
    host
        Names and addresses at which clients reach the server. Default: this machine only.
    days
        Number of days for which the certificates are valid.
    request
        The name of a client, or server. Only creates NAME.key and NAME.csr in the folder. The key stays there; send
        the .csr to the authority.
    sign
        A NAME.csr that you received. The authority in the folder signs it and writes NAME.crt. Compare the fingerprints
        first.
    show
        A certificate in the folder, such as client-0.crt. Prints its owner, until when it is valid, and its entry for
        a list of denied certificates (`serve --deny`). Creates nothing.
    """
    if show is not None:
        _check_alone(show, request, sign, clients, tokens, other_than_default=bool(host) or days != 365)
        for line in _shown(folder / show):
            say(line)
        return
    _check_roles(request, sign, clients, tokens, other_than_default=bool(host) or days != 365)
    count = 3 if clients is None else clients
    if count < 0 or days < 1:
        raise ConfigError(f"clients = {count} and days = {days}: clients must be 0 or greater, days 1 or greater")
    if request is not None:
        lines = _requested(folder, request)
    elif sign is not None:
        lines = _signed(folder, sign, host, days)
    else:
        lines = _trial(folder, count, tokens, host, days)
    for line in lines:
        say(line)


def _check_roles(
    request: str | None, sign: Path | None, clients: int | None, tokens: bool, other_than_default: bool
) -> None:
    """Raises ConfigError for options that have no effect together."""
    if request is not None and sign is not None:
        raise ConfigError(f"request = {request!r} and sign = {str(sign)!r} belong to two different sides: give one")
    if clients is not None and (request is not None or sign is not None):
        raise ConfigError(
            f"clients = {clients} has no effect beside request or sign, which concern one certificate: leave it out"
        )
    if tokens and (request is not None or sign is not None):
        raise ConfigError("tokens has no effect beside request or sign, which are about certificates: leave it out")
    if request is not None and other_than_default:
        raise ConfigError(
            "host and days have no effect on a request: the authority that signs it decides; leave them out"
        )


def _check_alone(show: Path, *others: object, other_than_default: bool) -> None:
    """Raises ConfigError for other options together with `show`, which creates nothing."""
    if other_than_default or any(other is not None and other is not False for other in others):
        raise ConfigError(f"show = {str(show)!r} only prints a certificate: leave out the options that create one")


def _shown(path: Path) -> list[str]:
    """A certificate for people; the lines to print."""
    from cutlayer.remote.certs import read_certificate

    facts = read_certificate(path)
    return [
        f"{path}: {facts['subject']}, valid until {facts['expires']:%Y-%m-%d %H:%M} UTC",
        f"serial:{facts['serial']}",
        f"sha256:{facts['sha256']}",
    ]


def _requested(folder: Path, name: str) -> list[str]:
    """Make a key and a request; the lines to print."""
    from cutlayer.remote.certs import key_fingerprint, make_request

    made = make_request(folder, name)
    return [f"{made.certificate} {made.key}", f"key {key_fingerprint(made.certificate)}"]


def _signed(folder: Path, request: Path, hosts: tuple[str, ...], days: int) -> list[str]:
    """Make the certificate of a request; the lines to print."""
    from cutlayer.remote.certs import key_fingerprint, read_certificate, sign_request

    made = sign_request(folder, request, hosts=hosts, days=days)
    return [str(made), f"key {key_fingerprint(request)}", f"serial:{read_certificate(made)['serial']}"]


def _trial(folder: Path, clients: int, tokens: bool, hosts: tuple[str, ...], days: int) -> list[str]:
    """Make an authority, the server's certificate, and certificates or tokens for the clients; the lines to print."""
    from cutlayer.remote.certs import SERVER, make_ca, make_certificate, make_tokens, read_certificate

    pairs = [make_ca(folder), make_certificate(folder, SERVER, SERVER, hosts=hosts, days=days)]
    names = [f"client-{k}" for k in range(clients)]
    pairs += [] if tokens else [make_certificate(folder, name, days=days) for name in names]
    lines = [f"{pair.certificate} {pair.key} serial:{read_certificate(pair.certificate)['serial']}" for pair in pairs]
    if tokens:
        hashes, own = make_tokens(folder, names)
        lines += [str(hashes), *map(str, own)]
    return lines
