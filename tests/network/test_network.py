"""Server and clients as separate processes, over TLS on this machine: the simulation's numbers, even after faults."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import call
from trial import CONFIG, PATIENCE, Trial, finished, same_as_local, until

from cutlayer.remote.certs import make_ca, make_certificate, read_certificate


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Callable[..., Trial]]:
    made: list[Trial] = []

    def make(algorithm: str, rounds: int = 3) -> Trial:
        made.append(Trial(tmp_path, algorithm, rounds))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.mark.parametrize(
    ("algorithm", "forked"), [("sglr", True), pytest.param("fl", False, marks=pytest.mark.network)]
)
def test_processes_over_tls_give_the_simulations_numbers(
    algorithm: str, forked: bool, trial: Callable[..., Trial]
) -> None:
    t = trial(algorithm)
    t.forked = forked
    finished(t, t.serve(), *(t.join(k) for k in range(3)))
    same_as_local(t)


@pytest.mark.network
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_ends_and_comes_back(how: signal.Signals, trial: Callable[..., Trial]) -> None:
    """Killed or stopped: clients return to the round of its checkpoint, and the run ends like one without faults."""
    t = trial("sglr", rounds=60)
    server = t.serve()
    clients = [t.join(k) for k in range(3)]
    until(lambda: len(t.steps()) > 40, "forty steps", t)
    server.send_signal(how)
    server.wait(PATIENCE)
    assert all(client.poll() is None for client in clients)
    finished(t, t.serve(), *clients)
    same_as_local(t)


@pytest.mark.network
def test_a_client_is_denied_and_let_in_again(trial: Callable[..., Trial]) -> None:
    """The server denies its certificate during the run: it ends, and the others continue. It may return later."""
    t = trial("sglr", rounds=200)
    deny, client = t.folder / "deny.txt", t.folder / "ca" / "client-1.crt"
    deny.write_text("# nobody\n")
    server = t.serve("--deny", "deny.txt", "--quorum", "0.6")
    clients = [t.join(k) for k in range(3)]
    until(lambda: len(t.steps()) > 10, "ten steps", t)
    deny.write_text(f"sha256:{read_certificate(client)['sha256']}\n")
    assert clients[1].wait(PATIENCE) == 2
    assert "on this server's list of denied ones: ask who runs" in " ".join(t.log("client-1").split())
    seen = len(t.steps())
    until(lambda: len(t.steps()) > seen + 20, "twenty steps of the others", t)
    deny.write_text("")
    until(lambda: '"deny list", "entries": 0' in (t.folder / "run" / "events.jsonl").read_text(), "the new list", t)
    finished(t, t.join(1), server, clients[0], clients[2])
    assert "denied" in (t.folder / "run" / "events.jsonl").read_text()


@pytest.mark.network
def test_a_client_is_killed_and_comes_back(trial: Callable[..., Trial]) -> None:
    """The others continue without it. It takes part again as a new process with its saved state."""
    t = trial("sglr", rounds=150)
    server = t.serve("--deadline", "20", "--quorum", "0.6")
    clients = [t.join(k) for k in range(3)]
    until(lambda: len(t.steps()) > 20, "twenty steps", t)
    clients[1].kill()
    clients[1].wait()
    until(lambda: any(r["clients"] == [0, 2] for r in t.steps()), "a step without the client that is gone", t)
    clients[1] = t.join(1)
    lonely = max(r["step"] for r in t.steps() if r["clients"] == [0, 2])
    until(lambda: any(r["clients"] == [0, 1, 2] and r["step"] > lonely for r in t.steps()), "a step with all again", t)
    finished(t, server, *clients)
    assert [r["step"] for r in t.steps()] == list(range(900))


@pytest.mark.network
def test_wrong_hands(trial: Callable[..., Trial]) -> None:
    """Another client's certificate, another authority, no encryption, other options: each is refused with a reason."""
    t = trial("sglr")
    server = t.serve()
    until(lambda: "listening" in t.log("server"), "listening", t)
    make_ca(t.folder / "rogue")
    make_certificate(t.folder / "rogue", "client-0")
    tls = ["--ca", "ca/ca.crt"]
    (t.folder / "other.toml").write_text(CONFIG.format(algorithm="psl", rounds=3).replace("batch = 10", "batch = 5"))
    attempts = {
        "another": (["--certificate", "ca/client-1.crt", "--key", "ca/client-1.key", *tls], "made for 'client-1'"),
        "rogue": (["--certificate", "rogue/client-0.crt", "--key", "rogue/client-0.key", *tls], "certificate"),
        "plain": (["--insecure"], "TLS"),
    }
    for name, (words, said) in attempts.items():
        process = t.start(name, "join", t.address, "--client", "client-0", *words, "--give-up-after", "5")
        assert process.wait(PATIENCE) != 0
        assert said in t.log(name), t.log(name)
        assert "Traceback" not in t.log(name)
    own = ["--certificate", "ca/client-0.crt", "--key", "ca/client-0.key", *tls]
    words = ["join", t.address, "--client", "client-0", *own, "--config", "other.toml"]
    assert "psl" in call(*words, cwd=t.folder, code=2).stderr
    assert server.poll() is None
    server.send_signal(signal.SIGTERM)
    assert server.wait(PATIENCE) == 130


@pytest.mark.network
def test_a_clients_folder_is_held_while_it_works(trial: Callable[..., Trial]) -> None:
    t = trial("sglr")
    first = t.join(0)  # there is no server, so it keeps dialling
    until(lambda: "dialling again" in t.log("client-0"), "dialling", t)
    second = t.join(0)
    assert second.wait(PATIENCE) == 75
    assert first.poll() is None
    assert "in use by process" in t.log("client-0").replace("\n", " "), t.log("client-0")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("serve", "TLS is required"),
        ("serve --insecure --listen 0.0.0.0:0", "without TLS"),
        ("serve --insecure --quorum 2", "quorum = 2 is not possible"),
        ("serve --insecure --algorithm cl", "cl trains one model on the pooled data"),
        ("serve --ca ca.crt", "certificate"),
        ("serve --insecure --keepalive 0.5", "keepalive = 0.5"),
        ("join localhost:1 --client hospital --insecure", "client-0, client-1"),
        ("join localhost --client client-0 --insecure", "host:port"),
        ("join localhost:1 --client client-99 --insecure", "not one of the"),
        ("join localhost:1 --client client-0 --insecure --keepalive nan", "keepalive = nan"),
        ("certs there --clients -1", "0 or greater"),
    ],
)
def test_wrong_words(words: str, said: str, tmp_path: Path) -> None:
    done = call(*words.split(), cwd=tmp_path, code=2)
    assert said in done.stderr.replace("\n", " ")


@pytest.mark.network
def test_tokens_that_were_made_let_clients_in(trial: Callable[..., Trial]) -> None:
    """`cutlayer certs --tokens`: the server has hashes, and each client has its token. A client with another client's
    token is refused.
    """
    t = trial("psl", 2)
    made = call("certs", "tk", "--clients", "3", "--tokens", cwd=t.folder)
    assert (t.folder / "tk" / "client-2.token").stat().st_mode & 0o077 == 0
    token = (t.folder / "tk" / "client-0.token").read_text().strip()
    assert token not in (t.folder / "tk" / "tokens.toml").read_text()
    assert "tk/tokens.toml" in made.stdout
    tls = ["--certificate", "tk/server.crt", "--key", "tk/server.key", "--tokens", "tk/tokens.toml"]
    server = t.start("server", "serve", "--listen", t.address, *tls, "--out", "run", "--message-limit", "10")

    def join(k: int, whose: int) -> Any:
        shows = ["--ca", "tk/ca.crt", "--token-file", f"tk/client-{whose}.token", "--message-limit", "10"]
        return t.start(f"client-{k}", "join", t.reached, "--client", f"client-{k}", *shows)

    wrong = join(0, 1)
    assert wrong.wait(PATIENCE) == 2
    assert "there is no client 'client-0' with this token" in t.log("client-0")
    finished(t, *[join(k, k) for k in range(3)], server)
    assert token not in t.log("server") + t.log("client-0")


@pytest.mark.network
def test_a_dead_client_does_not_hold_up_a_server_that_restarts(trial: Callable[..., Trial]) -> None:
    """The first server continued without the client. The restarted server waits for all clients, but not for ever."""
    t = trial("sglr", rounds=40)
    server = t.serve()
    clients = [t.join(k) for k in range(3)]
    until(lambda: len(t.steps()) > 20, "twenty steps", t)
    clients[2].kill()
    until(lambda: bool(t.steps()) and t.steps()[-1]["clients"] == [0, 1], "steps without it", t)
    server.kill()
    server.wait(PATIENCE)
    finished(t, t.serve("--patience", "20"), *clients[:2])
    assert t.steps()[-1]["clients"] == [0, 1]
