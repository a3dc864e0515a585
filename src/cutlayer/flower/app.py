"""What Flower loads: the ServerApp `server` and the ClientApp `client`.

The ServerApp sends each chosen node one message and trains; the ClientApp answers it when its work is done. What is
exchanged in a step goes over the streams that the ClientApps open to the ServerApp (`remote`).
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import tomli_w
from flwr.app import Context, Error, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from cutlayer.build import own_source
from cutlayer.errors import ConfigError, CutlayerError, NetworkError, TrainingError
from cutlayer.files import replace_file
from cutlayer.flower.hosting import Hosting, read
from cutlayer.flower.invitation import Farewell, Invitation
from cutlayer.flower.replies import Replies
from cutlayer.folder import refuse_used
from cutlayer.options import RunConfig, normalised
from cutlayer.remote.certs import make_ca, make_certificate
from cutlayer.remote.dial import STOPPED, dial
from cutlayer.remote.security import ClientSecurity, ServerSecurity, hash_token, make_token
from cutlayer.remote.serve import GRACE, Service, Serving
from cutlayer.remote.sides import client_name, client_number, worker_of
from cutlayer.remote.worker import Worker
from cutlayer.report import write
from cutlayer.run import Run
from cutlayer.text import format_score

log = logging.getLogger(__name__)
CLIENTS = "clients.json"
"""In the run folder: the end of each client's work, and the bytes of its stream."""

_GIVE_UP_AFTER = 60.0  # seconds without the server after which a client ends
_FAREWELL = 30.0  # seconds for the replies after the end of the run

server = ServerApp()
client = ClientApp()


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Run one training: read and check, wait for nodes, invite them, train, collect their replies.

    Raises UsageError before any node is told of the run; TrainingError, NetworkError if it cannot be finished.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            "Flower's simulation has no nodes that could connect: start a SuperLink and SuperNodes, or simulate with "
            "`cutlayer run`"
        )
    _show_log()
    config, hosting = read(context.run_config)
    out = Path(hosting.out or f"runs/flower-{context.run_id}")
    refuse_used(out)
    try:
        with _hearing(signal.default_int_handler):
            _train(grid, config, hosting, out)
    except KeyboardInterrupt:
        raise TrainingError(f"the run was stopped before its end; {str(out)!r} contains the results so far") from None


@client.train()
def join(message: Message, context: Context) -> Message:
    """Work as the client that the message names, until the server says that the run is done."""
    _show_log()
    try:
        farewell = _work(Invitation.of(message.content), context)
    except CutlayerError as error:
        log.error("%s", error)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)
    log.info("%s", farewell.reason)
    return Message(farewell.content(), reply_to=message)


def _train(grid: Grid, config: RunConfig, hosting: Hosting, out: Path) -> None:
    """Everything is built, and so checked, before nodes are searched for. They are told when the server listens."""
    tokens = [make_token() for _ in range(config.clients)]
    with TemporaryDirectory(prefix="cutlayer-") as folder:  # of mode 0700
        ca, certificate, key, hashes = (
            Path(folder) / name for name in ("ca.crt", "server.crt", "server.key", "tokens")
        )
        security = ServerSecurity(certificate, key, tokens=hashes)
        serving = Serving(hosting.listen, security, hosting)

        def invite(port: int) -> None:
            authority = ca.read_text("utf-8")
            for secret in (ca, certificate, key, hashes):  # only the server reads them, and it has done so
                secret.unlink()
            options, address = json.dumps(config.resolved()), hosting.address(port)
            invitations = [
                Invitation(client_name(k), address, authority, options, _GIVE_UP_AFTER, token)
                for k, token in enumerate(tokens)
            ]
            replies.follow(_send(grid, nodes, invitations, hosting.hours))

        service = Service(config, serving, out, listening=invite)
        nodes = _nodes(grid, config.clients, hosting.patience)
        _make_secrets(Path(folder), hashes, hosting, tokens)
        with Replies(grid, lambda: service.all_came, lambda reason: service.hub.stop(reason, GRACE)) as replies:
            try:
                with service.open() as run:
                    _iterate(run)
            except (TrainingError, NetworkError) as error:
                raise (replies.trouble or error) from None
            replies.wait(_FAREWELL)
    _report(service, replies, nodes, out)


def _make_secrets(folder: Path, hashes: Path, hosting: Hosting, tokens: Sequence[str]) -> None:
    """A server's certificate by an authority for this certificate only, and the hashes of the clients' tokens."""
    days = math.ceil(hosting.hours / 24)
    authority = make_ca(folder, days=days)
    make_certificate(folder, "server", "server", hosts=[hosting.host], days=days)
    authority.key.unlink()
    hashes.touch(mode=0o600)
    hashes.write_text(
        tomli_w.dumps({client_name(k): hash_token(token) for k, token in enumerate(tokens)}), encoding="utf-8"
    )


def _nodes(grid: Grid, needed: int, patience: float) -> list[int]:
    """This number of available SuperNodes. Raises NetworkError if there are too few in time."""
    begun = time.monotonic()
    log.info("waiting for %d SuperNodes", needed)
    while len(found := sorted(grid.get_node_ids())) < needed:
        if patience and time.monotonic() - begun > patience:
            raise NetworkError(
                f"{len(found)} of {needed} SuperNodes are connected after {patience:g} seconds: start the others, run "
                "with fewer clients, or wait longer (serve.patience)"
            )
        time.sleep(0.5)
    return found[:needed]


def _send(grid: Grid, nodes: Sequence[int], invitations: Sequence[Invitation], hours: float) -> dict[str, int]:
    """Invite each node as one client; message id -> client. Raises NetworkError."""
    messages = [
        Message(invitation.content(), dst_node_id=node, message_type=MessageType.TRAIN, ttl=3600 * hours)
        for node, invitation in zip(nodes, invitations, strict=True)
    ]
    ids = list(grid.push_messages(messages))
    if len(ids) < len(nodes) or not all(ids):
        raise NetworkError("the SuperLink did not take all messages to the nodes: its log says why")
    log.info("invited %d nodes", len(nodes))
    return {message: k for k, message in enumerate(ids)}


def _iterate(run: Run) -> None:
    """Train to the end, with a line per evaluation."""
    told = 0
    for _ in run:
        told = _tell(run, told)
    _tell(run, told)


def _tell(run: Run, told: int) -> int:
    task = run.training.task
    for scores in run.evaluations[told:]:
        said = format_score(task.leading, scores.test_score, share=task.share)
        log.info("round %d of %d: test %s", scores.round, run.rounds, said)
    return len(run.evaluations)


def _report(service: Service, replies: Replies, nodes: Sequence[int], out: Path) -> None:
    """Pictures, page, and the end of each client's work."""
    traffic = service.hub.traffic()
    clients = [
        {
            "client": client_name(k),
            "node": str(node),
            "bytes_up": traffic[k].received,
            "bytes_down": traffic[k].sent,
            **(asdict(replies.farewells[k]) if k in replies.farewells else {"reason": replies.failures.get(k)}),
        }
        for k, node in enumerate(nodes)
    ]
    replace_file(out / CLIENTS, f"{json.dumps(clients, indent=1)}\n".encode())
    write(out)
    for k in range(len(nodes)):
        if k not in replies.farewells and k not in replies.failures:
            log.warning("%s has not replied within %g seconds of the end", client_name(k), _FAREWELL)
    result = service.run.result
    assert result is not None
    log.info("done: test %s, see %s", format_score(result.metric, result.test_score, share=result.share), out)


def _work(invitation: Invitation, context: Context) -> Farewell:
    """Dial, and answer until the server says Bye. Raises CutlayerError."""
    worker = _worker(invitation, context)
    stop = threading.Event()
    with TemporaryDirectory(prefix="cutlayer-") as folder, _hearing(lambda *_: stop.set()):
        authority = Path(folder) / "ca.crt"
        authority.write_text(invitation.authority, encoding="utf-8")
        security = ClientSecurity(authority, token=invitation.token)
        reason = dial(invitation.address, security, worker, stop=stop, give_up_after=invitation.give_up_after)
    if reason == STOPPED:
        raise NetworkError(f"{invitation.client} was stopped at its node")
    return Farewell(reason, len(worker.duty.samples))


def _worker(invitation: Invitation, context: Context) -> Worker:
    """This node's client, with the node's own data or its share of the configuration's."""
    config, number = invitation.config(context), client_number(invitation.client)
    path = normalised(context.node_config).get("own_data")
    own = None if path is None else own_source(config, str(path))
    secret = secrets.randbits(63)  # a node keeps nothing: what its defences draw, nobody else knows
    return worker_of(config, number, name=invitation.client, run=config.algorithm, own=own, noise_seed=secret)


@contextmanager
def _hearing(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Flower stops its apps by signals: inside, `handler` receives them."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _show_log() -> None:
    """Cutlayer's log goes to standard output, which Flower collects (`flwr run --stream`)."""
    logger = logging.getLogger("cutlayer")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)
