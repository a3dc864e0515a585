"""`serve` and `join`: training with clients on other machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter
from pydantic import BaseModel

from cutlayer.cli.application import ConfigFile, Out
from cutlayer.cli.flags import command
from cutlayer.cli.merging import budget_config, fault_config, run_config
from cutlayer.cli.printing import say
from cutlayer.cli.progress import Monitor, resumable
from cutlayer.cli.results import print_clients, print_metrics, print_result, tell, tell_of_data, write_report
from cutlayer.errors import ConfigError
from cutlayer.options import BudgetConfig, FaultConfig, RunConfig
from cutlayer.plugins import label

if TYPE_CHECKING:
    from cutlayer.wire.limits import Limits

NETWORK = Group("Network", sort_key=12)
FLAG = Parameter(group=NETWORK)
File = Annotated[Path | None, FLAG]
LogForm = Annotated[Literal["text", "json"], FLAG]


@command(sort_key=9, options=RunConfig, faults=FaultConfig)
def serve(
    *,
    options: BaseModel | None = None,
    config: ConfigFile = None,
    out: Out = None,
    listen: Annotated[str, FLAG] = "127.0.0.1:4747",
    certificate: File = None,
    key: File = None,
    ca: File = None,
    tokens: File = None,
    deny: File = None,
    insecure: Annotated[bool, FLAG] = False,
    faults: BaseModel | None = None,
    keepalive: Annotated[float, FLAG] = 10.0,
    message_limit: Annotated[float | None, FLAG] = None,
    prometheus: Annotated[str | None, FLAG] = None,
    log: LogForm = "text",
) -> None:
    """Train with clients on other machines, as the server: wait for all clients, train, and resume after a restart.

    To resume, run the same command with the same folder; it continues from the last checkpoint, and clients reconnect
    by themselves. Clients are called client-0, client-1 and so on. Their certificates, or the file of tokens, must use
    these names.

    Parameters
    ----------
    config
        A TOML file with any of the options above. Those about faults go into a table [faults]. Clients use the same
        file.
    out
        The run folder. Default: runs/serve-ALGORITHM-DATA.
    listen
        Address and port to listen on.
    certificate
        The server's certificate (`cutlayer certs` creates one for trying things out).
    key
        The server's private key.
    ca
        The certificate of the authority that signed the clients' certificates. Clients must present theirs.
    tokens
        A TOML file with a line NAME = "TOKEN" for each client, instead of client certificates.
    deny
        A file of clients and certificates to refuse, one per line: a client's name, or serial:HEX or sha256:HEX of a
        certificate. It is read again when it changes, like certificate, key, ca and tokens.
    insecure
        No encryption and no authentication: for localhost only.
    keepalive
        Seconds between pings. A client that vanishes is noticed after 1.5 times as long. Use a minute if hundreds of
        clients share few cores.
    message_limit
        Largest size of a message, such as an averaged model, in MB. Use the same value for clients. Default: 268.
    prometheus
        Port (or address:port) at which metrics for Prometheus are served.
    log
        Format of the log of connections on stderr: text, or JSON with one object per line.
    """
    from cutlayer.remote.logs import show_log
    from cutlayer.remote.security import ServerSecurity
    from cutlayer.remote.serve import Service, Serving

    merged = run_config(options, config)
    _check_network(insecure, certificate=certificate, key=key, ca=ca, tokens=tokens)
    _check_keepalive(keepalive)
    show_log(log)
    security = ServerSecurity(certificate, key, ca, tokens, deny)
    security.open(listen)  # reports errors before a folder is made
    limits = _limits(message_limit)
    serving = Serving(listen, security, fault_config(faults, config), prometheus, keepalive, limits)
    where = out or Path("runs") / f"serve-{label(merged.algorithm)}-{Path(merged.data).stem}"
    service = Service(merged, serving, where)
    name = label(merged.algorithm)
    with resumable(f"the same command with --out {where}"), service.open() as run, Monitor({name: 1.0}) as monitor:
        tell(run.standing.remarks)
        for standing in run.standings():
            monitor.show(name, standing)
        monitor.ended(name)
    assert service.run.result is not None
    print_result(service.run.result)
    print_metrics(service.run)
    print_clients(service.run)
    write_report(where)


@command(sort_key=10, options=RunConfig, budget=BudgetConfig)
def join(
    address: Annotated[str, FLAG],
    *,
    client: Annotated[tuple[str, ...], Parameter(group=NETWORK, negative=(), consume_multiple=True)],
    options: BaseModel | None = None,
    config: ConfigFile = None,
    folder: File = None,
    certificate: File = None,
    key: File = None,
    ca: File = None,
    token_file: File = None,
    insecure: Annotated[bool, FLAG] = False,
    own_data: Annotated[str | None, FLAG] = None,
    give_up_after: Annotated[float | None, FLAG] = None,
    keepalive: Annotated[float, FLAG] = 10.0,
    message_limit: Annotated[float | None, FLAG] = None,
    watch: Annotated[Literal["off", "warn", "leave"], FLAG] = "off",
    budget: BaseModel | None = None,
    audit: File = None,
    show: Annotated[bool, Parameter(group=NETWORK, negative=())] = False,
    approve: Annotated[str | None, FLAG] = None,
    prometheus: Annotated[str | None, FLAG] = None,
    log: LogForm = "text",
) -> None:
    """Take part as a client in a `serve` on another machine: dial out, keep data and model here, and reconnect alone.

    Parameters
    ----------
    address
        The server's host:port.
    client
        This client's name: client-0, client-1, ... With several names, several clients run in this process (only
        with --insecure).
    config
        The server's configuration.
    folder
        The folder for this client's state, so that it can continue after a restart. Default: keep no state.
    certificate
        This client's certificate.
    key
        This client's private key.
    ca
        The certificate of the authority that signed the server's certificate.
    token_file
        A file with this client's token, instead of a certificate.
    insecure
        No encryption: for localhost only.
    own_data
        The path of this client's own data. It trains on all rows except its own test rows (evaluate_on).
        Default: its share of the configuration's data.
    give_up_after
        Give up after this many seconds without a connection. Default: never.
    keepalive
        Seconds between pings. A server that vanishes is noticed after 1.5 times as long.
    message_limit
        Largest size of a message in MB; use the server's value. Default: 268.
    watch
        Check whether received gradients look like gradients of the task (a hostile server may send others to read the
        inputs); if not, warn or leave. Received models are also checked if the algorithm averages models or hands
        them over. Gradients that clients share (SplitAvg) are not checked.
    audit
        The file in which this client records what it was asked and what it answered. Default: audit.jsonl in its
        folder.
    show
        Do not connect. Instead, show what the study will ask of this client and what will leave it, with a
        fingerprint.
    approve
        Join only if this client's configuration has this fingerprint (see --show).
    prometheus
        Port of this machine, or host:port, at which this process serves metrics for Prometheus: requests by name and
        outcome, rows and bytes sent, and how much of each client's budget is spent.
    log
        Format of the log of the connection on stderr: text, or JSON with one object per line.
    """
    from cutlayer.build import own_source
    from cutlayer.remote.approval import check_approved, shown
    from cutlayer.remote.join import Joining
    from cutlayer.remote.join import join as work
    from cutlayer.remote.logs import show_log
    from cutlayer.remote.security import ClientSecurity, read_token

    merged = run_config(options, config)
    _check_network(insecure, certificate=certificate, key=key, ca=ca, token_file=token_file)
    _check_keepalive(keepalive)
    if len(client) > 1:
        _check_shared(len(client), own_data, certificate or token_file)
    show_log(log)
    own = None if own_data is None else own_source(merged, own_data)
    if own is not None:
        tell_of_data(own)
    token = None if token_file is None else read_token(token_file)
    security = ClientSecurity(ca, certificate, key, token)
    folders = {name: None if folder is None else folder / name for name in client}
    limits = _limits(message_limit)
    most = budget_config(budget, config)
    joining = [
        Joining(address, name, security, folders[name], own, give_up_after, keepalive, watch, limits, most, audit)
        for name in client
    ]
    if show:
        for line in shown(merged, joining):
            say(line)
        return
    if approve is not None:
        check_approved(merged, joining, approve)
    for reason in dict.fromkeys(work(merged, joining, prometheus)):
        say(reason)


def _check_network(insecure: bool, **files: Path | None) -> None:
    """TLS is the default: raises ConfigError if there are neither files nor `insecure`, or both."""
    given = [name for name, path in files.items() if path is not None]
    if insecure and given:
        raise ConfigError(f"insecure and {given[0]} exclude each other: leave one out")
    if not insecure and not given:
        raise ConfigError(
            "TLS is required: pass --certificate, --key and --ca (`cutlayer certs` creates a test set), or --insecure "
            "for localhost only"
        )


def _check_shared(clients: int, own_data: str | None, identity: Path | None) -> None:
    """Raises ConfigError for options that several clients in one process cannot share."""
    if identity is not None:
        raise ConfigError(f"{clients} clients cannot share one certificate or token: start one process for each")
    if own_data is not None:
        raise ConfigError(f"own_data = {own_data!r} would be {clients} clients' own: start one process for each")


def _limits(megabytes: float | None) -> Limits:
    """The limits of a message. Raises ConfigError if gRPC cannot carry it."""
    from cutlayer.wire.limits import Limits

    if megabytes is None:
        return Limits()
    if not 1 <= megabytes <= 2000:
        raise ConfigError(f"message_limit = {megabytes} MB is not possible: give 1 to 2000, which is gRPC's limit")
    return Limits(message_bytes=int(megabytes * 1e6))


def _check_keepalive(seconds: float) -> None:
    """Raises ConfigError if the ping interval is shorter than the peer allows or longer than an hour."""
    from cutlayer.remote.network import LEAST

    if not LEAST <= seconds <= 3600:
        raise ConfigError(f"keepalive = {seconds} is not possible: give {LEAST:g} to 3600 seconds")
