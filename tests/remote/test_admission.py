"""Admission can change while a server runs: denied clients and new certificates, and what the server records of it."""

from __future__ import annotations

import os
import threading
import urllib.request
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st
from test_transport import (  # type: ignore[import-not-found]
    QUICK,
    SOON,
    Clients,
    Echo,
    Raw,
    bodies,
    client_tls,
    server_tls,
    serving,
    step,
    until,
)

from cutlayer.cli import certs_command
from cutlayer.errors import ConfigError, DiskFullError, RefusedError
from cutlayer.remote import hub as hubs
from cutlayer.remote.caller import Caller
from cutlayer.remote.certs import make_ca, make_certificate, read_certificate
from cutlayer.remote.denied import MOST, DenyList
from cutlayer.remote.dial import dial
from cutlayer.remote.reread import Reread
from cutlayer.remote.security import ClientSecurity, ServerSecurity, hash_token, make_token
from cutlayer.remote.visits import ALL, EACH, FIRST, LONGEST, Visits


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("admission")
    for place in (folder, folder / "new"):
        make_ca(place)
        make_certificate(place, "server", "server")
        for k in range(3):
            make_certificate(place, f"client-{k}")
    return folder


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs, "_LOOK", 0.02)


class Record:
    """Collects the events of a hub."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Mapping[str, Any]]] = []

    def __call__(self, happened: str, facts: Mapping[str, Any]) -> None:
        self.events.append((happened, facts))

    def all(self, happened: str) -> list[Mapping[str, Any]]:
        return [facts for what, facts in self.events if what == happened]


@pytest.fixture
def record() -> Record:
    return Record()


def replace(path: Path, content: str | bytes) -> None:
    """Replace the file at `path` by another one, as `mv` does."""
    fresh = path.with_name(f"{path.name}.fresh")
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    fresh.chmod(0o600)
    os.replace(fresh, path)


# --- the list of denied clients ----------------------------------------------------------------------------------


def denial(pki: Path, kind: str) -> str:
    """Returns the line that denies client 1."""
    if kind == "name":
        return "client-1"
    return f"{kind}:{read_certificate(pki / 'client-1.crt')[kind]}"


@pytest.mark.parametrize("kind", ["name", "serial", "sha256"])
def test_a_client_is_denied_and_let_in_again(kind: str, pki: Path, tmp_path: Path, record: Record) -> None:
    deny, told = tmp_path / "deny.txt", []
    deny.write_text("# nobody yet\n")
    security = ServerSecurity(pki / "server.crt", pki / "server.key", pki / "ca.crt", deny=deny)
    with (
        serving(security, tell=record, changed=told.append) as (hub, port),
        Clients(port, lambda k: client_tls(pki, f"client-{k}")).add(*map(Echo, range(3))) as group,
    ):
        hub.wait_for(3, SOON)
        hub.arrivals()
        replace(deny, f"\n{denial(pki, kind)}  # its contract has ended\n")
        error = group.end()
        assert isinstance(error, RefusedError)
        assert error.reason == "excluded"
        assert "on this server's list of denied ones: ask" in str(error)
        until(lambda: hub.present == {0, 2})
        assert bodies(hub.exchange({k: step(1) for k in (0, 2)})) == {0: b"x", 2: b"x"}
        replace(deny, "")
        until(lambda: len(told) == 3)
        group.security = client_tls(pki, "client-1")
        group.add(Echo(1))
        assert hub.wait_for(3, SOON) == {0, 1, 2}
    name = {"client-1"} if kind == "name" else set()
    assert told == [set(), name, set()]
    (cut,) = record.all("denied")
    assert (cut["client"], cut["name"], cut["subject"]) == (1, "client-1", "CN=client-1")
    assert cut["sha256"] == read_certificate(pki / "client-1.crt")["sha256"]
    assert [facts["reason"] for facts in record.all("refused")] == ["excluded"]
    assert [facts["entries"] for facts in record.all("deny list")] == [1, 0]
    assert [facts["client"] for facts in record.all("connected")][3:] == [1]


def test_who_is_denied_is_so_from_its_next_word_on(pki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs, "_LOOK", 3600.0)
    deny = tmp_path / "deny.txt"
    deny.write_text("")
    security = ServerSecurity(pki / "server.crt", pki / "server.key", pki / "ca.crt", deny=deny)
    with serving(security) as (_, port):
        replace(deny, "client-0")
        with pytest.raises(RefusedError, match="list of denied ones"):
            dial(f"localhost:{port}", client_tls(pki, "client-0"), Echo(0), backoff=QUICK)


@pytest.mark.parametrize("damage", ["missing", "line", "binary"])
def test_a_damaged_list_changes_nothing(
    damage: str, tmp_path: Path, record: Record, caplog: pytest.LogCaptureFixture
) -> None:
    deny = tmp_path / "deny.txt"
    deny.write_text("client-1")
    with serving(ServerSecurity(deny=deny), tell=record) as (hub, port):
        if damage == "missing":
            deny.unlink()
        else:
            replace(deny, "client-0\nserial:xyz" if damage == "line" else b"\xff\xfe")
        until(lambda: record.all("kept"))
        with Clients(port, ClientSecurity()).add(Echo(0), Echo(1)) as group:
            assert isinstance(group.end(), RefusedError)
            hub.wait_for(1, SOON)
            assert hub.present == {0}
        replace(deny, "")
        until(lambda: record.all("deny list"))
    (kept,) = record.all("kept")
    assert kept["what"] == "deny list"
    assert "deny.txt" in kept["why"]
    assert "what was read before stays in force" in kept["why"]
    assert sum("what was read before stays" in line for line in caplog.messages) == 1


def test_a_damaged_list_is_found_before_anybody_comes(tmp_path: Path) -> None:
    for content in (None, b"\xff", b"a name\n", b"serial:0\n", b"x" * (MOST + 1)):
        deny = tmp_path / "deny"
        if content is not None:
            deny.write_bytes(content)
        with pytest.raises(ConfigError, match="deny"):
            ServerSecurity(deny=deny).open("localhost:0")


SHA = "ab" * 32


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("client-0", DenyList(names=frozenset(["client-0"]))),
        ("  client-0\t# why", DenyList(names=frozenset(["client-0"]))),
        ("serial:0A:1b", DenyList(serials=frozenset(["a1b"]))),
        (f"sha256:{SHA.upper()}", DenyList(sha256=frozenset([SHA]))),
        ("# nobody", DenyList()),
        ("", DenyList()),
        (SHA, None),
        ("0a:1b:0a:1b:0a:1b:0a:1b:0a:1b", None),
        (f"sha256:{SHA[2:]}", None),
        ("serial:", None),
        ("serial:g", None),
        ("serial: 12", None),
        ("sha1:1234", None),
        ("client-0, client-1", None),
        ("client-\u202e0", None),
    ],
)
def test_lines_of_a_list(line: str, found: DenyList | None, tmp_path: Path) -> None:
    file = tmp_path / "deny"
    file.write_text(f"\n{line}\n", "utf-8")
    if found is not None:
        assert DenyList.read(file) == found
        return
    with pytest.raises(ConfigError, match=r"line 2: .* names no client"):
        DenyList.read(file)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_list_or_an_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any"
    file.write_bytes(content)
    try:
        found = DenyList.read(file)
    except ConfigError:
        return
    assert len(found) == len({line.partition("#")[0].strip() for line in content.decode().splitlines()} - {""})


def test_what_certificates_are_called(pki: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    certs_command.certs(pki, show=Path("client-1.crt"))
    shown = capsys.readouterr().out.splitlines()
    facts = read_certificate(pki / "client-1.crt")
    assert "CN=client-1, valid until" in shown[0]
    for line, kind in zip(shown[1:], ("serial", "sha256"), strict=True):
        assert line == f"{kind}:{facts[kind]}"
        (tmp_path / "deny").write_text(line)
        denied = DenyList.read(tmp_path / "deny")
        assert denied.why(Caller("x", "", **facts))
        assert not denied.why(Caller("client-1", "", **read_certificate(pki / "client-2.crt")))
    certs_command.certs(tmp_path / "made", clients=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(":")[2] for line in lines] == [
        read_certificate(Path(line.split()[0]))["serial"] for line in lines
    ]
    with pytest.raises(ConfigError, match="only prints a certificate"):
        certs_command.certs(pki, show=Path("client-1.crt"), days=3)
    for name in ("none.crt", "client-1.key"):
        with pytest.raises(ConfigError, match=name):
            certs_command.certs(pki, show=Path(name))


# --- new certificates without a restart --------------------------------------------------------------------------


def own(pki: Path, folder: Path) -> ServerSecurity:
    """A server's security with its files in a folder of its own."""
    for name in ("server.crt", "server.key", "ca.crt"):
        replace(folder / name, (pki / name).read_bytes())
    return server_tls(folder)


def test_new_certificates_without_a_restart(pki: Path, tmp_path: Path, record: Record) -> None:
    security = own(pki, tmp_path)
    with (
        serving(security, tell=record) as (hub, port),
        Clients(port, lambda k: client_tls(pki if k == 0 else pki / "new", f"client-{k}")).add(Echo(0)) as group,
    ):
        hub.wait_for(1, SOON)
        replace(tmp_path / "server.crt", (pki / "new" / "server.crt").read_bytes())
        until(lambda: record.all("kept"))
        assert client_tls(pki, "client-2").diagnose(f"localhost:{port}") is None  # the server still uses the old pair
        for name in ("server.key", "ca.crt"):
            replace(tmp_path / name, (pki / "new" / name).read_bytes())
        group.add(Echo(1))
        assert hub.wait_for(2, SOON) == {0, 1}
        hub.arrivals()
        assert bodies(hub.exchange({0: step(1), 1: step(1)})) == {0: b"x", 1: b"x"}  # the old connection still works
        with pytest.raises(RefusedError, match="is not accepted"):
            dial(f"localhost:{port}", client_tls(pki, "client-2"), Echo(2), backoff=QUICK)
        until(lambda: record.all("certificate"))
        shown = read_certificate(pki / "new" / "server.crt")
        until(lambda: hub.expiries["server"] == shown["expires"])
        assert hub.expiries.keys() == {"server", "authority", "client-0", "client-1"}
    assert all("server.key' is not the key of" in kept["why"] for kept in record.all("kept"))
    assert record.all("certificate")[-1] == {"serial": shown["serial"], "sha256": shown["sha256"]}


def test_a_new_authority_for_clients_alone(pki: Path, tmp_path: Path) -> None:
    security = own(pki, tmp_path)
    with serving(security) as (hub, port):
        both = (pki / "ca.crt").read_bytes() + (pki / "new" / "ca.crt").read_bytes()
        replace(tmp_path / "ca.crt", both)
        new = pki / "new"
        shown = [
            client_tls(pki, "client-0"),
            ClientSecurity(pki / "ca.crt", new / "client-1.crt", new / "client-1.key"),
        ]
        with Clients(port, lambda k: shown[k]).add(Echo(0), Echo(1)):
            assert hub.wait_for(2, SOON) == {0, 1}


def test_tokens_are_read_again(pki: Path, tmp_path: Path) -> None:
    old, new, file = make_token(), make_token(), tmp_path / "tokens.toml"
    replace(file, f'client-0 = "{hash_token(old)}"')
    with serving(ServerSecurity(pki / "server.crt", pki / "server.key", tokens=file)) as (hub, port):
        replace(file, f'client-0 = "{hash_token(new)}"')
        with pytest.raises(RefusedError, match="with this token"):
            dial(f"localhost:{port}", ClientSecurity(pki / "ca.crt", token=old), Echo(0))
        with Clients(port, ClientSecurity(pki / "ca.crt", token=new)).add(Echo(0)):
            assert hub.wait_for(1, SOON) == {0}


def test_files_are_read_when_they_change(tmp_path: Path) -> None:
    file, read = tmp_path / "n", []

    def number() -> int:
        read.append(1)
        try:
            return int(file.read_text())
        except ValueError:
            raise ConfigError("no number") from None

    file.write_text("1")
    watched = Reread("number", [file], number, lambda n: {"n": n})
    assert [watched.look() for _ in range(3)] == [1, 1, 1]
    assert len(read) == 1
    replace(file, "2")
    assert [watched.look() for _ in range(3)] == [2, 2, 2]
    file.write_text("x")  # in place: the same file with another length or time
    os.utime(file, ns=(1, 1))
    assert [watched.look() for _ in range(3)] == [2, 2, 2]
    assert len(read) == 3
    replace(file, "3")
    threads = [threading.Thread(target=watched.look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watched.value == 3
    assert [what for what, _ in watched.news] == ["number", "kept", "number"]
    assert watched.news[1][1] == {"what": "number", "why": "no number; what was read before stays in force"}


# --- an existing PKI ---------------------------------------------------------------------------------------------


class Authority:
    """Part of a hospital's own PKI, made without Cutlayer."""

    def __init__(self, name: str, above: Authority | None = None) -> None:
        self.key = ec.generate_private_key(ec.SECP384R1())
        self.above = above
        self.name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Hospital"), self._common(name)])
        issuer = above or self
        self.certificate = (
            self._builder(self.name, issuer, self.key.public_key())
            .add_extension(x509.BasicConstraints(True, None), critical=True)
            .sign(issuer.key, hashes.SHA384())
        )

    @staticmethod
    def _common(name: str) -> x509.NameAttribute[str]:
        return x509.NameAttribute(NameOID.COMMON_NAME, name)

    @staticmethod
    def _builder(subject: x509.Name, issuer: Authority, key: Any) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=5))
        )

    def issue(
        self, folder: Path, file: str, common: str, names: list[str], purposes: list[x509.ObjectIdentifier]
    ) -> None:
        """Writes a certificate with its chain, without the root, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Hospital"), self._common(common)])
        made = (
            self._builder(subject, self, key.public_key())
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL
        chain = [made] + ([self.certificate] if self.above else [])
        replace(folder / f"{file}.crt", b"".join(c.public_bytes(pem) for c in chain))
        replace(folder / f"{file}.key", key.private_bytes(pem, form, serialization.NoEncryption()))


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root -> issuing -> server and clients, which are identified by their common name or by a DNS name."""
    folder = tmp_path_factory.mktemp("hospital")
    root = Authority("Root")
    issuing = Authority("Issuing", root)
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    issuing.issue(folder, "server", "split", ["localhost"], both)
    issuing.issue(folder, "client-0", "client-0", ["ward.hospital.example"], both)
    issuing.issue(folder, "client-1", "gpu7.hospital.example", ["gpu7.hospital.example", "client-1"], both)
    for name, authority in (("root", root), ("issuing", issuing)):
        replace(folder / f"{name}.crt", authority.certificate.public_bytes(serialization.Encoding.PEM))
    replace(folder / "both.crt", (folder / "issuing.crt").read_bytes() + (folder / "root.crt").read_bytes())
    return folder


@pytest.mark.parametrize("trusted", ["root", "both"])
def test_chains_of_an_existing_pki(trusted: str, hospital: Path, record: Record) -> None:
    ca = hospital / f"{trusted}.crt"
    server = ServerSecurity(hospital / "server.crt", hospital / "server.key", ca)

    def client(k: int) -> ClientSecurity:
        return ClientSecurity(ca, hospital / f"client-{k}.crt", hospital / f"client-{k}.key")

    with serving(server, tell=record) as (hub, port):
        with Clients(port, client).add(Echo(0), Echo(1)):
            assert hub.wait_for(2, SOON) == {0, 1}
        with pytest.raises(RefusedError, match=r"is made for 'gpu7\.hospital\.example', not for"):
            dial(f"localhost:{port}", client(1), Echo(0), backoff=QUICK)
        assert client(0).diagnose(f"localhost:{port}") is None
    subjects = {facts["name"]: facts["subject"] for facts in record.all("connected")}
    assert subjects == {"client-0": "CN=client-0,O=Hospital", "client-1": "CN=gpu7.hospital.example,O=Hospital"}


# --- the record --------------------------------------------------------------------------------------------------


def test_what_is_on_record_of_strangers(pki: Path, record: Record) -> None:
    with serving(server_tls(pki), tell=record, metrics=0) as (hub, port):
        for client, reason in ((1, "client"), (0, "client")):
            shown = client_tls(pki, f"client-{1 - client}")
            with pytest.raises(RefusedError) as error:
                dial(f"localhost:{port}", shown, Echo(client), backoff=QUICK)
            assert error.value.reason == reason
        evil = "\x1b[31m\n\u202e" + "x" * 200
        with pytest.raises(RefusedError):
            dial(f"localhost:{port}", client_tls(pki, "client-0"), Echo(0, name=evil), backoff=QUICK)
        parts = [(pki / name).read_bytes() for name in ("ca.crt", "client-2.key", "client-2.crt")]
        with Raw(port, said=b"\0", credentials=grpc.ssl_channel_credentials(*parts), welcome=False) as raw:
            assert raw.refused().code() is grpc.StatusCode.INVALID_ARGUMENT
        with urllib.request.urlopen(f"http://127.0.0.1:{hub.metrics_port}/metrics", timeout=SOON) as page:
            text = page.read().decode()
        assert hub.refused == {"client": 3, "hello": 1}
    first, _, third, fourth = record.all("refused")
    assert first["name"] == "client-1"
    assert first["address"].startswith(("ipv6:[::1]:", "ipv4:127.0.0.1:"))
    assert first["subject"] == "CN=client-0"
    assert first["serial"] == read_certificate(pki / "client-0.crt")["serial"]
    assert first["why"].startswith("this certificate is made for 'client-0'")
    assert (third["name"].isprintable(), len(third["name"]) < 130) == (True, True)
    assert third["why"].isprintable()
    assert fourth["subject"] == "CN=client-2"
    assert "name" not in fourth
    for line in (
        'cutlayer_refused_total{reason="client"} 3.0',
        'cutlayer_refused_total{reason="hello"} 1.0',
        'cutlayer_certificate_days_left{certificate="server"} 36',
        'cutlayer_certificate_days_left{certificate="authority"} 36',
    ):
        assert line in text, text


def test_a_full_disk_refuses_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def full(happened: str, facts: Mapping[str, Any]) -> None:
        raise DiskFullError("no room")

    with serving(tell=full) as (hub, port), Clients(port, ClientSecurity()).add(Echo(0)):
        assert hub.wait_for(1, SOON) == {0}
    assert "connected is not on record: no room" in caplog.text


def test_a_flood_is_counted(record: Record) -> None:
    visits = Visits(record)
    hosts = [f"ipv4:192.0.2.{n}:{port}" for n in range(100) for port in range(10)]
    for n, address in enumerate(hosts * 3):
        visits.refuse(Caller("x", address), "token", "no such client", n / 1000)
    assert len(record.events) == ALL
    assert Counter(facts["address"].rpartition(":")[0] for facts in record.all("refused")).most_common(1)[0][1] == EACH
    for client in range(2 * ALL):  # connections of accepted clients are recorded all the same
        for _ in range(EACH + (client == 7)):
            visits.connect(Caller(f"client-{client}", "ipv4:198.51.100.1:1"), client, 5.0)
    assert len(record.all("connected")) == 2 * ALL * EACH
    visits.look(FIRST + 1)
    counts = {"connected": 1, "refused: token": 3000 - ALL}
    assert record.events[-1] == ("more", {"counts": counts, "seconds": FIRST})
    assert visits.refused == {"token": 3000}


@pytest.mark.parametrize("pause", [5, 29])
def test_days_of_refusals_leave_a_small_record(pause: int, record: Record) -> None:
    visits, days = Visits(record), 2
    for second in range(0, days * 86400, pause):
        visits.refuse(Caller("x", f"ipv4:192.0.2.1:{second}"), "token", "y" * 10_000, float(second))
    visits.close()
    assert len(record.events) <= (EACH + 1) * (days * 86400 / LONGEST + 7)
    counted = sum(sum(facts["counts"].values()) for facts in record.all("more"))
    assert len(record.all("refused")) + counted == visits.refused["token"]
    assert all(len(facts["why"]) <= 500 for facts in record.all("refused"))


def test_after_a_flood_all_is_told_again(record: Record) -> None:
    visits = Visits(record)
    for n in range(100):
        visits.refuse(Caller("x", "ipv4:192.0.2.1:1"), "token", "", n * 30.0)
    end = 100 * 30 + 2 * LONGEST
    for later in (end, end + 2 * LONGEST, end + 2 * LONGEST + FIRST):
        visits.look(later)
    begin = len(record.events)
    for n in range(EACH + 1):
        visits.refuse(Caller("x", "ipv4:192.0.2.1:1"), "token", "", end + 2 * LONGEST + FIRST + n)
    visits.look(end + 2 * LONGEST + 2 * FIRST)
    assert [what for what, _ in record.events[begin:]] == ["refused"] * EACH + ["more"]
    assert record.events[-1][1]["seconds"] == FIRST
