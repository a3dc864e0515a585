"""The command line. Heavy imports happen inside the commands: `--help` and `list` answer at once."""

from __future__ import annotations

import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Self

from cyclopts import App, CycloptsError, Group, Parameter, UnusedCliTokensError
from cyclopts import ValidationError as FlagError
from pydantic import ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from cutlayer import __version__
from cutlayer.allocator import keep_memory
from cutlayer.catalog import ALGORITHMS, DATA_FORMATS, DATASETS, MODELS
from cutlayer.errors import ConfigError, CutlayerError
from cutlayer.files import replace_file
from cutlayer.options import (
    CompareConfig,
    FaultConfig,
    PlanConfig,
    RunConfig,
    applicable,
    explain,
    normalised,
    overlaid,
    read_toml,
)
from cutlayer.reproduce.cells import SizeName
from cutlayer.text import format_bytes

if TYPE_CHECKING:
    from cutlayer.compare import Comparison, Row
    from cutlayer.reproduce.reproduction import Reproduction
    from cutlayer.run import Record, Result, Run
    from cutlayer.wire.limits import Limits

FILES = Group("Files", sort_key=9)

app = App(
    name="cutlayer",
    version=__version__,
    help="""Scalable split learning: train and compare SGLR, PSL, SSL, SplitFed, FedAvg and centralised learning.

Start with `cutlayer compare`: six algorithms on handwritten digits, ten clients, three seeds. Every option of a command
can stand in a TOML file too (`--config`), under the same name with underscores; flags win over the file. The resolved
configuration is stored with the run, and running from it reproduces the run.

Exit codes: 0 done, 1 training failed, 2 wrong input (nothing was written), 130 interrupted (`cutlayer resume` goes on).
""",
    help_format="markdown",
)
out = Console()
err = Console(stderr=True)

_Star = Parameter(name="*")
_ConfigFile = Annotated[Path | None, Parameter(name="--config", group=FILES)]
_Out = Annotated[Path | None, Parameter(group=FILES)]
_Folder = Annotated[Path, Parameter(group=FILES)]


@app.command(sort_key=1)
def run(*, options: Annotated[RunConfig | None, _Star] = None, config: _ConfigFile = None, out: _Out = None) -> None:
    """Train one algorithm and write a run folder.

    Parameters
    ----------
    config
        A TOML file with any of the options above.
    out
        The run folder to make. Default: runs/ALGORITHM-DATA-TIME.
    """
    from cutlayer.run import Run

    merged = _run_config(options, config)
    where = out or _fresh(f"{merged.algorithm}-{Path(merged.data).stem}")
    _train(Run(merged, out=where))


@app.command(sort_key=2)
def compare(
    *, options: Annotated[CompareConfig | None, _Star] = None, config: _ConfigFile = None, out: _Out = None
) -> None:
    """Train several algorithms over several seeds on the same data and write a table, curves and a page.

    Parameters
    ----------
    config
        A TOML file with any of the options above; its tables [variant.NAME] add entries with options of their own.
    out
        The folder to make. Default: runs/compare-DATA-TIME.
    """
    from cutlayer.compare import Comparison

    values = _merged(CompareConfig, options, config)
    merged = CompareConfig.of(values)
    _compare(Comparison(merged, out=out or _fresh(f"compare-{Path(merged.data).stem}")))


@app.command(sort_key=3)
def resume(folder: _Folder, *, options: Annotated[RunConfig | None, _Star] = None) -> None:
    """Go on with an interrupted run or comparison from its last checkpoint.

    Options are not needed; those given must be the run's own.

    Parameters
    ----------
    folder
        The folder of the run or comparison.
    """
    from cutlayer.folder import stored_config

    given = {} if options is None else options.model_dump(include=options.model_fields_set)
    if "algorithms" in stored_config(folder):
        from cutlayer.compare import Comparison

        if given:
            name, value = next(iter(given.items()))
            raise ConfigError(f"{name} = {value!r}: a comparison is resumed as it was started; leave options out")
        _compare(Comparison.resume(folder))
    else:
        from cutlayer.run import Run

        _train(Run.resume(folder, **given))


@app.command(sort_key=4)
def report(folder: _Folder) -> None:
    """Draw the curves and write the page of a run or comparison, finished or not.

    Parameters
    ----------
    folder
        The folder of the run or comparison.
    """
    from cutlayer.report import write

    for path in write(folder):
        out.print(str(path), soft_wrap=True)


@app.command(sort_key=5)
def reproduce(
    *tables: str,
    size: SizeName = "smoke",
    out: _Out = None,
    data: str = "fashion-mnist",
    device: str = "cpu",
    jobs: int | None = None,
) -> None:
    """Train what the SGLR paper's tables are made of and write them beside the paper's, with a verdict on each claim.

    The same command in the same folder goes on where it was; other tables can be added there. What is trained already
    is never trained again.

    Parameters
    ----------
    tables
        Any of table1, table2, table3, table4, fig5 (learning curves of Table 4's methods) and skew (label skew, which
        is not in the paper), or all, which is the default; and by name alone, since they attack what they train,
        table5 and leakage (methods, depths of the cut, defences).
    size
        How much is trained: smoke (a minute, to see that it works), reduced (hours) or full (the paper's models and
        numbers of clients).
    out
        The folder. Default: runs/reproduce-SIZE.
    data
        A built-in data set, or the path of your own, such as a folder of idx files.
    device
        Where the tensors are, as for `cutlayer run`.
    jobs
        How many runs at once. Default: as many as there are cores on the CPU, else 1. 0 trains nothing and writes the
        report on what is there.
    """
    from cutlayer.reproduce.reproduction import Reproduction

    if jobs is not None and jobs < 0:
        raise ConfigError(f"jobs = {jobs} is not possible: give how many runs to train at once, or 0 for none")
    workers = jobs if jobs is not None else (os.cpu_count() or 1) if device == "cpu" else 1
    where = out or Path("runs") / f"reproduce-{size}"
    chosen = {"--size": size, "--out": where, "--data": data, "--device": device, "--jobs": jobs}
    flags = [word for name, value in chosen.items() if value is not None for word in (name, str(value))]
    work = Reproduction(tables, size, where, data, device)
    _reproduce(work, workers, shlex.join(["cutlayer", "reproduce", *tables, *flags]))


@app.command(sort_key=6)
def plan(
    *,
    options: Annotated[PlanConfig | None, _Star] = None,
    config: _ConfigFile = None,
    out: _Out = None,
    json: Annotated[bool, Parameter(group=FILES, negative=())] = False,
) -> None:
    """Say what split learning would cost, without training: bytes, FLOPs, memory, time, energy, and the best cut.

    The model is built without values, so that billions of parameters and a million clients take seconds. It may be your
    own: any function without arguments that returns an nn.Module.

    Parameters
    ----------
    config
        A TOML file with any of the options above.
    out
        A folder to make, for plan.json and plan.png. Default: nothing is written.
    json
        Print JSON instead of tables.
    """
    merged = PlanConfig.of(_merged(PlanConfig, options, config))
    merged.check(frozenset(merged.model_fields_set))
    _plan(merged, out, json)


@app.command(name="list", sort_key=7)
def list_(what: Literal["all", "algorithms", "data", "models", "profiles"] = "all", /) -> None:
    """Name the algorithms with their options, the data sets and formats, the models with their cut points, and the
    profiles of devices and links with their figures.

    Parameters
    ----------
    what
        Which of them.
    """
    if what in ("all", "algorithms"):
        rows = [(n, i.title, i.summary, ", ".join(sorted(i.options))) for n, i in ALGORITHMS.items()]
        _print_table("Algorithms", ("name", "title", "what it does", "options of its own"), rows)
        shared = sorted(applicable("psl") - ALGORITHMS["psl"].options)
        out.print(f"All that cut the model also have: {', '.join(shared)}; fl has participation and start.\n")
    if what in ("all", "data"):
        _print_table("Data sets", ("name", "what it is"), [(n, i.summary) for n, i in DATASETS.items()])
        _print_table("Formats of your own data", ("--data-format", "what it is"), DATA_FORMATS.items())
    if what in ("all", "models"):
        rows = [(n, i.summary, ", ".join(i.cuts), i.default_cut) for n, i in MODELS.items()]
        _print_table("Models", ("name", "what it is", "cut points, in order", "default"), rows)
    if what in ("all", "profiles"):
        _print_profiles()


@app.command(sort_key=8)
def calibrate(
    *,
    name: Annotated[str, Parameter(group=FILES)] = "this-machine",
    model: Annotated[str, Parameter(group=FILES)] = "cnn",
    batch: Annotated[int, Parameter(group=FILES)] = 8,
    device: Annotated[str, Parameter(group=FILES)] = "cpu",
    seconds: Annotated[float, Parameter(group=FILES)] = 10.0,
    watts: Annotated[float | None, Parameter(group=FILES)] = None,
    idle_watts: Annotated[float | None, Parameter(group=FILES)] = None,
    out: _Out = None,
) -> None:
    """Measure how fast this machine trains, and what it draws, and write a device profile for `--profiles`.

    Parameters
    ----------
    name
        What the profile is called.
    model
        The model of the zoo that is trained.
    batch
        Its batch size.
    device
        Where it is trained: cpu, cuda...
    seconds
        For how long.
    watts
        What a meter at the wall shows meanwhile, where this machine cannot measure its power.
    idle_watts
        What it shows while the machine does nothing.
    out
        The file to write. Default: print the profile.
    """
    from cutlayer.costs.calibrate import calibrate as measure

    _check_positive(batch=batch, seconds=seconds, watts=watts, idle_watts=idle_watts)
    if out is not None and out.exists():
        raise ConfigError(f"out = {str(out)!r} exists already: choose another file")
    found = measure(model, batch=batch, device=device, seconds=seconds, watts=watts, idle_watts=idle_watts)
    spread = f"{found.lowest / 1e9:.3g} to {found.highest / 1e9:.3g}"
    err.print(f"{found.flops_per_second / 1e9:.3g} GFLOP/s ({spread}) at {found.watts:.3g} W", highlight=False)
    if out is None:
        _out_text(found.toml(name))
    else:
        replace_file(out, found.toml(name).encode())
        err.print(f"use it with: --profiles {out} --client-device {name}", highlight=False, soft_wrap=True)


def _say(what: str) -> None:
    """Print a line."""
    out.print(what, highlight=False, soft_wrap=True)


def _out_text(text: str) -> None:
    """Print as it is, for a pipe."""
    out.print(text, end="", markup=False, highlight=False, soft_wrap=True)


@app.command(sort_key=12)
def leakage(
    *runs: Path,
    out: _Out = None,
    clients: int = 2,
    samples: int = 1000,
    auxiliary: int | None = None,
    knowledge: Annotated[tuple[str, ...], Parameter(negative=(), consume_multiple=True)] = ("model", "smashed"),
    estimators: Annotated[tuple[str, ...], Parameter(negative=(), consume_multiple=True)] = (
        "usable",
        "infonce",
        "ksg",
    ),
    view: Literal["cca", "pca", "random", "raw"] = "cca",
    snapshots: bool = False,
    hijack: bool = False,
    seed: int = 0,
) -> None:
    """Measure what the server can learn about private inputs from the smashed data of trained runs.

    Attacks are made with samples that no client has (those held out), on samples that clients trained on. Every
    estimate of information stands beside what it reads where the answer is known. Needs the extra `leakage`.

    Parameters
    ----------
    runs
        Run folders.
    out
        Where leakage.json and leakage.png go. Default: the first run's folder.
    clients
        So many clients of each run, drawn once.
    samples
        Private samples of each client, at most.
    auxiliary
        Samples that the attacker has. Default: all that were held out, up to 1000.
    knowledge
        What the attacker knows: model (the client part), smashed (only the smashed data, and the server's own part).
    estimators
        Any of usable, infonce, smile, mine and ksg.
    view
        What estimators of mutual information look at: two canonical or principal components, random lines (sliced), or
        the raw tensors, of which their readings are far from true.
    snapshots
        Also at the snapshots that the runs have kept (snapshot_every).
    hijack
        Also train each run's clients anew, under an honest and under a hijacking server: what an active server would
        have read, and whether clients notice.
    seed
        Names all draws of the attackers.
    """
    if not runs:
        raise ConfigError("no run is named: give run folders, e.g. cutlayer leakage runs/sglr-digits")
    _check_positive(clients=clients, samples=samples, auxiliary=1 if auxiliary is None else auxiliary)
    from cutlayer.leakage import check_installed

    check_installed()
    from cutlayer.leakage.active import check_hijackable
    from cutlayer.leakage.active import hijack as hijacking
    from cutlayer.leakage.assess import Asked, check, comparisons, examine
    from cutlayer.leakage.subject import moments, subjects
    from cutlayer.report import leakage as report

    asked = Asked(tuple(knowledge), tuple(estimators), seed, view)  # type: ignore[arg-type]  # checked there
    of_runs = [moments(run, snapshots) for run in runs]

    def tell(what: str) -> None:
        err.print(what, highlight=False, soft_wrap=True)

    if hijack:
        for found in of_runs:
            check_hijackable(found[-1])
    every = [s for found in of_runs for m in found for s in subjects(m, clients, samples, auxiliary, seed)]
    for subject in every:
        check(subject, asked)
    examined = []
    for subject in every:
        tell(f"{subject.moment.out}, round {subject.moment.rounds}: client {subject.name}")
        examined.append(examine(subject, asked))
    active = [one for found in of_runs if hijack for one in hijacking(found[-1], samples, auxiliary, seed, tell)]
    findings = [e.finding for e in examined]
    sentences = comparisons(findings)
    bent = [h for h, _ in active]
    for table in [*report.tables(findings), report.active(bent)]:
        if table.row_count:
            Console(width=None if sys.stdout.isatty() else 170).print(table)
    if len(runs) > 1 and not sentences:
        sentences = ["nothing is ranked: no estimate was read of both of two runs"]
    for sentence in [*report.notes(findings), *report.active_notes(bent), *sentences]:
        _say(sentence)
    where = out or runs[0]
    where.mkdir(parents=True, exist_ok=True)
    written = {
        report.JSON: report.as_json(findings, sentences, bent).encode(),
        report.PICTURES: report.pictures(examined, active),
    }
    for name, content in written.items():
        if content is not None:
            replace_file(where / name, content)
            _say(str(where / name))


_Network = Group("Network", sort_key=12)
_Flag = Parameter(group=_Network)
_File = Annotated[Path | None, _Flag]
_LogForm = Annotated[Literal["text", "json"], _Flag]


@app.command(sort_key=9)
def serve(
    *,
    options: Annotated[RunConfig | None, _Star] = None,
    config: _ConfigFile = None,
    out: _Out = None,
    listen: Annotated[str, _Flag] = "127.0.0.1:4747",
    certificate: _File = None,
    key: _File = None,
    ca: _File = None,
    tokens: _File = None,
    insecure: Annotated[bool, _Flag] = False,
    faults: Annotated[FaultConfig | None, _Star] = None,
    keepalive: Annotated[float, _Flag] = 10.0,
    message_limit: Annotated[float | None, _Flag] = None,
    metrics: Annotated[str | None, _Flag] = None,
    log: _LogForm = "text",
) -> None:
    """Train with clients on other machines: hold the server's part, wait for all clients, go on after a restart.

    The same command with the same folder goes on from the last checkpoint; clients reconnect by themselves. Clients
    are called client-0, client-1 and so on; so are the names in their certificates or in the file of tokens.

    Parameters
    ----------
    config
        A TOML file with any of the options above, those about faults in a table [faults]. Clients join with the same
        one.
    out
        The run folder. Default: runs/serve-ALGORITHM-DATA.
    listen
        Address and port.
    certificate
        The server's certificate (`cutlayer certs` makes one for a trial).
    key
        Its private key.
    ca
        The authority that has made the clients' certificates: they must show one.
    tokens
        Instead of ca: a TOML file with a line NAME = "TOKEN" for each client.
    insecure
        No encryption, nobody is asked who they are: on this machine only.
    keepalive
        Seconds between pings: a client that vanishes without a word is noticed after one and a half times that. Give a
        minute where hundreds of clients share few cores.
    message_limit
        MB that a message may have, such as a model that is averaged; the same for clients. Default: 268.
    metrics
        Port (or address:port) to serve figures for Prometheus at.
    log
        What happens to connections, on stderr: as text, or as JSON, one object per line.
    """
    from cutlayer.remote.logs import show_log
    from cutlayer.remote.security import ServerSecurity
    from cutlayer.remote.serve import Service, Serving

    merged = _run_config(options, config)
    _check_network(insecure, certificate=certificate, key=key, ca=ca, tokens=tokens)
    _check_keepalive(keepalive)
    show_log(log)
    security = ServerSecurity(certificate, key, ca, tokens)
    security.open(listen)  # says what is wrong before a folder is made
    limits = _limits(message_limit)
    serving = Serving(listen, security, _fault_config(faults, config), metrics, keepalive, limits)
    where = out or Path("runs") / f"serve-{merged.algorithm}-{Path(merged.data).stem}"
    service = Service(merged, serving, where)
    with _resumable(f"the same command with --out {where}"), service.open() as run, Monitor(1) as monitor:
        for record in run:
            monitor.show(merged.algorithm, run, record)
    assert service.run.result is not None
    _print_result(service.run.result)
    _write_report(where)


@app.command(sort_key=10)
def join(
    address: Annotated[str, _Flag],
    *,
    client: Annotated[tuple[str, ...], Parameter(group=_Network, negative=(), consume_multiple=True)],
    options: Annotated[RunConfig | None, _Star] = None,
    config: _ConfigFile = None,
    folder: _File = None,
    certificate: _File = None,
    key: _File = None,
    ca: _File = None,
    token_file: _File = None,
    insecure: Annotated[bool, _Flag] = False,
    own_data: Annotated[str | None, _Flag] = None,
    give_up_after: Annotated[float | None, _Flag] = None,
    keepalive: Annotated[float, _Flag] = 10.0,
    message_limit: Annotated[float | None, _Flag] = None,
    watch: Annotated[Literal["off", "warn", "leave"], _Flag] = "off",
    log: _LogForm = "text",
) -> None:
    """Work as a client of a `serve` on another machine: dials out, keeps its data and its model, reconnects by itself.

    Parameters
    ----------
    address
        The server's host:port.
    client
        Who this is: client-0, client-1... Several names: several clients in this process (with tokens or insecure).
    config
        The server's configuration.
    folder
        Keeps this client's state, so that it can go on after a restart. Default: nothing is kept.
    certificate
        This client's certificate.
    key
        Its private key.
    ca
        The authority that has made the server's certificate.
    token_file
        Instead of a certificate: a file that holds this client's token.
    insecure
        No encryption: on this machine only.
    own_data
        The path of this client's own data, all of which it trains on. Default: its share of the configuration's data.
    give_up_after
        Seconds without a connection after which to give up. Default: never.
    keepalive
        Seconds between pings: a server that vanishes without a word is noticed after one and a half times that.
    message_limit
        MB that a message may have, as at the server. Default: 268.
    watch
        Look whether the gradients that come are those of the task (a server may send others, to read the inputs), and
        where they do not look like it: warn, or leave. Gradients that clients share (SplitAvg) are not looked at.
    log
        What happens to the connection, on stderr: as text, or as JSON, one object per line.
    """
    from cutlayer.build import own_source
    from cutlayer.remote.join import Joining
    from cutlayer.remote.join import join as work
    from cutlayer.remote.logs import show_log
    from cutlayer.remote.security import ClientSecurity, read_token

    merged = _run_config(options, config)
    _check_network(insecure, certificate=certificate, key=key, ca=ca, token_file=token_file)
    _check_keepalive(keepalive)
    if len(client) > 1 and (certificate or token_file):
        raise ConfigError(f"{len(client)} clients cannot share one certificate or token: start one process for each")
    if len(client) > 1 and own_data is not None:
        raise ConfigError(f"own_data = {own_data!r} would be {len(client)} clients' own: start one process for each")
    show_log(log)
    own = None if own_data is None else own_source(merged, own_data)
    token = None if token_file is None else read_token(token_file)
    security = ClientSecurity(ca, certificate, key, token)
    folders = {name: None if folder is None else folder / name for name in client}
    limits = _limits(message_limit)
    joining = [
        Joining(address, name, security, folders[name], own, give_up_after, keepalive, watch, limits) for name in client
    ]
    for reason in dict.fromkeys(work(merged, joining)):
        out.print(reason, highlight=False, soft_wrap=True)


@app.command(sort_key=11)
def certs(
    folder: Annotated[Path, _Flag],
    *,
    clients: Annotated[int | None, _Flag] = None,
    tokens: Annotated[bool, Parameter(group=_Network, negative=())] = False,
    host: Annotated[tuple[str, ...], Parameter(group=_Network, negative=(), consume_multiple=True)] = (),
    days: Annotated[int, _Flag] = 365,
    request: Annotated[str | None, _Flag] = None,
    sign: _File = None,
) -> None:
    """Make an authority, a server's and clients' certificates; or a key with a request, and its certificate from that.

    Parameters
    ----------
    folder
        Where to: ca.crt, server.crt, client-0.crt..., each with its .key.
    clients
        Certificates with keys for so many clients; 0 where they make their own keys. Default: 3.
    tokens
        Instead of clients' certificates, tokens: client-0.token... for them, and tokens.toml for the server.
    host
        Names and addresses under which the server is reached. Default: this machine only.
    days
        How long they are good.
    request
        The name of a client, or server: makes NAME.key and NAME.csr in the folder, nothing else. The key stays there;
        the .csr goes to the authority.
    sign
        A NAME.csr that has come: makes NAME.crt, by the authority in the folder. Compare the fingerprints first.
    """
    from cutlayer.remote.certs import (
        SERVER,
        key_fingerprint,
        make_ca,
        make_certificate,
        make_request,
        make_tokens,
    )
    from cutlayer.remote.certs import sign_request as signed

    if request is not None and sign is not None:
        raise ConfigError(f"request = {request!r} and sign = {str(sign)!r} are two sides' work: give one")
    if clients is not None and (request is not None or sign is not None):
        raise ConfigError(f"clients = {clients} has no effect beside request or sign, which are of one: leave it out")
    if tokens and (request is not None or sign is not None):
        raise ConfigError("tokens has no effect beside request or sign, which are about certificates: leave it out")
    if request is not None and (host or days != 365):
        raise ConfigError("host and days have no effect on a request: whoever signs it decides, leave them out")
    count = 3 if clients is None else clients
    if count < 0 or days < 1:
        raise ConfigError(f"clients = {count} and days = {days}: clients must be 0 or greater, days 1 or greater")
    if request is not None:
        made = make_request(folder, request)
        lines = [f"{made.certificate} {made.key}", f"key {key_fingerprint(made.certificate)}"]
    elif sign is not None:
        lines = [str(signed(folder, sign, hosts=host, days=days)), f"key {key_fingerprint(sign)}"]
    else:
        pairs = [make_ca(folder), make_certificate(folder, SERVER, SERVER, hosts=host, days=days)]
        names = [f"client-{k}" for k in range(count)]
        pairs += [] if tokens else [make_certificate(folder, name, days=days) for name in names]
        lines = [f"{pair.certificate} {pair.key}" for pair in pairs]
        if tokens:
            hashes, own = make_tokens(folder, names)
            lines += [str(hashes), *map(str, own)]
    for line in lines:
        out.print(line, highlight=False, soft_wrap=True)


def _check_network(insecure: bool, **files: Path | None) -> None:
    """TLS is the default: without files one must say so."""
    given = [name for name, path in files.items() if path is not None]
    if insecure and given:
        raise ConfigError(f"insecure and {given[0]} exclude each other: leave one out")
    if not insecure and not given:
        raise ConfigError(
            "connections are encrypted: give certificate, key and ca (`cutlayer certs` makes them for a trial), or "
            "--insecure on this machine alone"
        )


def _limits(megabytes: float | None) -> Limits:
    """What a message may have. Raises ConfigError for more than gRPC carries."""
    from cutlayer.wire.limits import Limits

    if megabytes is None:
        return Limits()
    if not 1 <= megabytes <= 2000:
        raise ConfigError(f"message_limit = {megabytes} MB is not possible: gRPC carries up to 2000, give 1 at least")
    return Limits(message_bytes=int(megabytes * 1e6))


def _check_keepalive(seconds: float) -> None:
    """Raises ConfigError for pings that come too thick for the other side, or practically never."""
    from cutlayer.remote.network import LEAST

    if not LEAST <= seconds <= 3600:
        raise ConfigError(f"keepalive = {seconds} is not possible: it is {LEAST:g} to 3600 seconds")


def main() -> NoReturn:
    """Run the command line: one clear sentence on stderr and an exit code for everything that goes wrong."""
    keep_memory()
    warnings.showwarning = _show_warning
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        _fail(_flag_sentence(error), 2)
    except CutlayerError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    sys.exit(0)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    err.print(Text.assemble(("note: ", "bold yellow"), str(message)), soft_wrap=True, highlight=False)


def _fail(sentence: str, code: int) -> NoReturn:
    err.print(Text.assemble(("error:", "bold red"), " ", " ".join(sentence.splitlines())), soft_wrap=True)
    sys.exit(code)


def _flag_sentence(error: CycloptsError) -> str:
    """One sentence for a flag that cyclopts or a field's range refused."""
    cause = error.__cause__
    if isinstance(error, FlagError) and isinstance(cause, ValidationError):
        models = (CompareConfig, FaultConfig, PlanConfig)
        return str(explain(cause, next((m for m in models if m.__name__ in cause.title), RunConfig)))
    if isinstance(error, UnusedCliTokensError):
        return f"unexpected {' '.join(error.unused_tokens or [])!r}: values follow their option, see `cutlayer --help`"
    return str(error).strip()


def _run_config(options: RunConfig | None, config: Path | None) -> RunConfig:
    """A run's options, of the file with the flags over them, checked. Raises ConfigError."""
    values = _merged(RunConfig, options, config)
    merged = RunConfig.of(values)
    merged.check((merged.algorithm,), frozenset(values))
    return merged


def _fault_config(flags: FaultConfig | None, config: Path | None) -> FaultConfig:
    """What is done about faults: of the file's table [faults], with the flags over it. Raises ConfigError."""
    table = {} if config is None else read_toml(config).get("faults", {})
    if not isinstance(table, dict):
        raise ConfigError(f"faults = {table!r} is no table: write [faults] on a line, and below it e.g. deadline = 30")
    given = {} if flags is None else flags.model_dump(include=flags.model_fields_set)
    return FaultConfig.of({**normalised(table), **given})


def _check_positive(**values: float | None) -> None:
    """Raises ConfigError for what is given and not a finite number above 0."""
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} = {value} is not possible: it must be greater than 0")


def _merged(model: type[Any], options: Any, config: Path | None) -> dict[str, Any]:
    """The file's values with the flags over them."""
    flags = {} if options is None else options.model_dump(include=options.model_fields_set)
    values = read_toml(config) if config is not None else {}
    if model is RunConfig:
        values.pop("faults", None)  # the server's: of no effect where all clients are in this process
    return overlaid(values, flags)


def _fresh(name: str) -> Path:
    """A folder of this moment that does not exist yet."""
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    count, path = 1, stem
    while path.exists():
        count, path = count + 1, stem.with_name(f"{stem.name}-{count}")
    return path


def _train(run: Run) -> None:
    """Train with live progress; then the result, the pictures and the page."""
    assert run.out is not None
    with Monitor(1) as monitor, _resumable(f"cutlayer resume {run.out}"):
        for record in run:
            monitor.show(run.config.algorithm, run, record)
    assert run.result is not None
    _print_result(run.result)
    _write_report(run.out)


def _compare(comparison: Comparison) -> None:
    """Train all entries with live progress; then the table, the pictures and the page."""
    assert comparison.out is not None
    with Monitor(sum(map(len, comparison.plan.values()))) as monitor, _resumable(f"cutlayer resume {comparison.out}"):
        for entry, seed, run, record in comparison:
            monitor.show(f"{entry}, seed {seed}", run, record)
    _print_comparison(comparison.table())
    _write_report(comparison.out)


def _reproduce(work: Reproduction, workers: int, command: str) -> None:
    """Train what is missing with live progress; then tables, verdicts and the report on all that is there."""
    from cutlayer.reproduce.terminal import Meter, show

    if workers and (waiting := work.waiting()):
        with _resumable(command):
            work.check()
            with Meter(out, work.jobs, waiting) as meter:
                for job in work.train(workers):
                    meter.tell(job, work.outcome(job))
    findings = work.find()
    show(findings, work.size, out)
    for path in work.write(findings):
        out.print(str(path), soft_wrap=True, highlight=False)


def _plan(config: PlanConfig, folder: Path | None, as_json: bool) -> None:
    """Reckon, write, print."""
    import json

    from cutlayer.costs.plan import plan
    from cutlayer.folder import refuse_used

    if folder is not None:
        refuse_used(folder)
    found = plan(config)
    text = json.dumps(found.as_dict(), indent=1, allow_nan=False)
    if as_json:
        sys.stdout.write(f"{text}\n")
    else:
        from cutlayer.report.planned import show

        show(found, out if out.is_terminal else Console(width=140))
    if folder is not None:
        from cutlayer.report.planned import picture

        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out = {str(folder)!r} cannot be made: {error.strerror}; choose another --out") from None
        for name, content in (("plan.json", f"{text}\n".encode()), ("plan.png", picture(found))):
            replace_file(folder / name, content)
            (err if as_json else out).print(str(folder / name), soft_wrap=True, highlight=False)


@contextmanager
def _resumable(command: str) -> Iterator[None]:
    """Ctrl-C says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        _fail(f"interrupted; go on with: {command}", 130)


class Monitor:
    """Live progress: a bar for the run at work (and one for all runs); lines per evaluation where no terminal
    listens.
    """

    def __init__(self, runs: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=out,
            disable=not out.is_terminal,
        )
        self._all = self._progress.add_task("runs", total=runs, note="", visible=runs > 1)
        self._task: TaskID | None = None
        self._run: Run | None = None
        self._label = ""
        self._seen = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self._task is not None and self._run is not None:
            self._tell()
            self._progress.update(self._task, completed=self._run.rounds)
            self._progress.advance(self._all)
        self._progress.stop()

    def show(self, label: str, run: Run, record: Record) -> None:
        """Show one more record of `run`."""
        if run is not self._run:
            self._next(label, run)
        assert self._task is not None
        self._tell()
        test = f"  test accuracy {run.evaluations[-1].test_accuracy:.2%}" if run.evaluations else ""
        self._progress.update(self._task, completed=record.round, note=f"loss {record.loss:.3f}{test}")

    def _next(self, label: str, run: Run) -> None:
        """The run before is over."""
        self._tell()
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._progress.advance(self._all)
        self._run, self._label, self._seen = run, label, len(run.evaluations)
        self._task = self._progress.add_task(label, total=run.rounds, note="")

    def _tell(self) -> None:
        """Where no terminal listens: a line per evaluation."""
        if self._run is None or len(self._run.evaluations) == self._seen:
            return
        self._seen = len(self._run.evaluations)
        scores = self._run.evaluations[-1]
        if not out.is_terminal:
            text = f"{self._label}: round {scores.round}/{self._run.rounds}, test accuracy {scores.test_accuracy:.2%}"
            out.print(text, highlight=False, soft_wrap=True)


def _print_result(result: Result) -> None:
    out.print(
        f"\n[bold]{ALGORITHMS[result.algorithm].title}[/] ({result.engine} engine): test accuracy "
        f"[bold]{result.test_accuracy:.2%}[/] (at the best validation accuracy, round {result.best_round}: "
        f"{result.best_test_accuracy:.2%}); {result.steps} steps, {result.steps_per_second:.1f} steps/s, "
        f"{result.samples_per_second:.0f} samples/s; {format_bytes(result.bytes_up)} up, "
        f"{format_bytes(result.bytes_down)} down",
        highlight=False,
    )
    _print_run_costs(result)


def _print_run_costs(result: Result) -> None:
    from cutlayer.report import spending

    text = f"A client computed {spending.flops(result.client_flops)}, the server {spending.flops(result.server_flops)}"
    if result.virtual_seconds is not None:
        text += (
            f"; on these machines it takes {spending.duration(result.virtual_seconds)} (virtual time), the clients' "
            f"energy is {spending.joules(result.clients_marginal_joules)} marginal, "
            f"{spending.joules(result.clients_joules)} total, "
            f"the server's {spending.joules(result.server_joules)} (modelled)"
        )
    drawn = "" if result.measured_joules is None else f"{spending.joules(result.measured_joules)} "
    out.print(f"{text}. Energy of this machine: {drawn}{result.measured_by}.", highlight=False, soft_wrap=True)


def _print_comparison(rows: list[Row]) -> None:
    table = Table(title="Test accuracy: mean ± standard deviation over seeds")
    names = (
        "",
        "accuracy %",
        "at best validation %",
        "steps",
        "steps/s",
        "samples/s",
        "bytes up",
        "bytes down",
        "broadcast down",
    )
    for name in names:
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.title,
            _spread(row.accuracy_mean, row.accuracy_std),
            _spread(row.best_accuracy_mean, row.best_accuracy_std),
            f"{row.steps:.0f}",
            f"{row.steps_per_second:.1f}",
            f"{row.samples_per_second:.0f}",
            format_bytes(round(row.bytes_up)),
            format_bytes(round(row.bytes_down)),
            format_bytes(round(row.bytes_down_broadcast)),
        )
    # A table that is piped or logged keeps its width: cut-off numbers help nobody.
    Console(width=None if out.is_terminal else 140).print(table)
    _print_costs(rows)


def _print_costs(rows: list[Row]) -> None:
    """What was computed; time and energy where devices and links were named."""
    from cutlayer.report import spending

    clocked = any(row.virtual_seconds is not None for row in rows)
    table = Table(title="Costs of training" + (", time and energy modelled" if clocked else ""))
    table.add_column("", no_wrap=True)
    for name in ("a client computes", "the server computes"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("virtual time", "clients' energy: marginal", "total", "server's energy") if clocked else ():
        table.add_column(name, justify="right")
    table.add_column("this machine drew", justify="right")
    for row in rows:
        modelled = (
            spending.duration(row.virtual_seconds),
            spending.joules(row.clients_marginal_joules),
            spending.joules(row.clients_joules),
            spending.joules(row.server_joules),
        )
        table.add_row(
            row.title,
            spending.flops(row.client_flops),
            spending.flops(row.server_flops),
            *(modelled if clocked else ()),
            spending.joules(row.measured_joules, "not measured"),
        )
    Console(width=None if out.is_terminal else 140).print(table)


def _spread(mean: float, std: float | None) -> str:
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def _write_report(folder: Path) -> None:
    from cutlayer.report import write

    for path in write(folder):
        out.print(str(path), soft_wrap=True, highlight=False)


def _print_profiles() -> None:
    """Figures of devices and links with their sources; where there is no figure it is not known."""
    from cutlayer.costs.profiles import Profiles

    def figure(value: float | None, unit: str) -> str:
        return "not known" if value is None else f"{value:g} {unit}"

    found = Profiles.load()
    devices = [
        (d.name, d.title, figure(d.flops_per_second / 1e9, "GFLOP/s"), figure(d.watts, "W"), figure(d.idle_watts, "W"))
        for d in found.devices.values()
    ]
    _print_table("Devices", ("name", "what it is", "speed", "power", "idle"), devices)
    for d in found.devices.values():
        out.print(Text(f"{d.name}: {d.basis}; {d.source}"), soft_wrap=True)
    links = [
        (
            p.name,
            figure(p.up_mbps, "Mbit/s"),
            figure(p.down_mbps, "Mbit/s"),
            figure(p.latency_ms, "ms"),
            _power(p.up_watts, p.up_watts_per_mbps),
            _power(p.down_watts, p.down_watts_per_mbps),
        )
        for p in found.links.values()
    ]
    out.print()
    names = ("name", "up", "down", "latency", "W sending at R Mbit/s", "W receiving")
    _print_table("Links", names, links)
    for p in found.links.values():
        out.print(Text(f"{p.name}: {p.title}; {p.source}"), soft_wrap=True)
    out.print(Text("\nYour own: --profiles FILE, a TOML file with tables [device.NAME] and [link.NAME]."))


def _power(base: float | None, per_mbps: float | None) -> str:
    """Power of a radio at a rate of R Mbit/s."""
    return "not known" if base is None or per_mbps is None else f"{base:g} + {per_mbps:g} R"


def _print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(title=title, title_justify="left", show_lines=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)
