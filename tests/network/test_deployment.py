"""The deployment guide works as written, with a folder for each machine. The files of deploy/ name what exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from cutlayer.cli import application
from cutlayer.errors import ConfigError, ExitCode
from cutlayer.remote.certs import key_fingerprint, make_ca, make_request, sign_request
from cutlayer.remote.serve import GRACE

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "deployment.md").read_text()
BLOCKS = re.findall(r"```(\w+) ([^\n]+)\n(.*?)```", GUIDE, re.DOTALL)
"""(language, purpose, content) of the blocks for this test. Other blocks have only a language."""

MACHINES = ("coordinator", "hospital-a", "hospital-b")
PATIENCE = 120.0  # seconds that any one thing may take; it usually takes a tenth of that


class Machines:
    """A folder for each machine, and the processes started in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "bin").mkdir()
        for name, words in {"cutlayer": "-m cutlayer ", "python": ""}.items():
            (root / "bin" / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words}"$@"\n')
            (root / "bin" / name).chmod(0o755)
        self.ports = {"4747": free_port(), "9464": free_port()}
        self.environment = {**os.environ, "PATH": f"{root / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self.environment["PYTHONPATH"] = str(ROOT / "src")
        self.background: dict[str, subprocess.Popen[bytes]] = {}
        self.trials: list[subprocess.Popen[bytes]] = []
        self.said: dict[str, str] = {}

    def here(self, text: str) -> str:
        """The text with ports that are free on this machine."""
        return re.sub("4747|9464", lambda found: self.ports[found[0]], text)

    def run(self, machine: str, commands: str) -> None:
        done = subprocess.run(
            ["bash", "-e", "-c", self.here(commands)],
            cwd=self.root / ("." if machine == "carry" else machine),
            env=self.environment, capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        self.said[machine] = self.said.get(machine, "") + done.stdout
        assert done.returncode == 0, f"{machine}: {commands}\n{done.stdout}{done.stderr}"

    def start(self, machine: str, commands: str) -> None:
        self.background[machine] = self._popen(machine, f"exec {self.here(commands)}", "log")

    def start_trial(self, machine: str, commands: str) -> None:
        """Start commands that no later block needs; they run in parallel."""
        self.trials.append(self._popen(machine, commands, "trial.log"))

    def _popen(self, machine: str, commands: str, log: str) -> subprocess.Popen[bytes]:
        with (self.root / machine / log).open("ab") as file:
            return subprocess.Popen(
                ["bash", "-e", "-c", commands],
                cwd=self.root / machine, env=self.environment, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

    def log(self) -> str:
        return "\n".join((self.root / machine / "log").read_text()[-2000:] for machine in self.background)

    def records(self, name: str) -> list[dict[str, Any]]:
        path = self.root / "coordinator" / "run" / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def stop(self) -> None:
        for process in (*self.background.values(), *self.trials):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    made = Machines(tmp_path)
    yield made
    made.stop()


@pytest.mark.network
def test_the_guide(machines: Machines) -> None:
    """All blocks in order. The server is stopped during training, gets its new certificate, and continues."""
    serve = ""
    for language, purpose, content in BLOCKS:
        names = purpose.split()
        if language == "python":
            (machines.root / purpose).write_text(content)
            subprocess.run([sys.executable, purpose], cwd=machines.root, timeout=PATIENCE, check=True)
        elif language == "toml":
            for machine in MACHINES:
                (machines.root / machine / purpose).write_text(content)
        elif names[-1] == "background":
            serve = serve or content
            machines.start(names[0], content)
        elif names[-1] == "trial":
            machines.start_trial(names[0], content)
        elif names[-1] == "running":
            wait_for_steps(machines, 60)
            machines.run(names[0], content)
            stop_the_server(machines)
        else:
            machines.run(purpose, content)
    machines.start("coordinator", serve)
    for machine, process in machines.background.items():
        assert process.wait(PATIENCE) == 0, f"{machine}\n{machines.log()}"
    assert [trial.wait(PATIENCE) for trial in machines.trials] == [0, 0]
    what_came_of_it(machines)


def wait_for_steps(machines: Machines, steps: int) -> None:
    end = time.monotonic() + PATIENCE
    while len(machines.records("steps.jsonl")) < steps:
        assert time.monotonic() < end, machines.log()
        assert all(process.poll() is None for process in machines.background.values()), machines.log()
        time.sleep(0.05)


def stop_the_server(machines: Machines) -> None:
    """The clients stay and dial again."""
    server, *clients = (machines.background[machine] for machine in MACHINES)
    server.send_signal(signal.SIGTERM)
    assert server.wait(PATIENCE) == 130, machines.log()
    assert all(client.poll() is None for client in clients), machines.log()


def what_came_of_it(machines: Machines) -> None:
    """Both hospitals took part in every step, and the result is the one that the guide shows."""
    steps = machines.records("steps.jsonl")
    assert [step["step"] for step in steps] == list(range(len(steps)))
    assert all(step["clients"] == [0, 1] for step in steps)
    events = [event["event"] for event in machines.records("events.jsonl")]
    assert events.count("listening") == 2
    assert events.count("came") == 4
    assert "stopped" in events
    assert events[-1] == "done"
    result = json.loads((machines.root / "coordinator" / "run" / "result.json").read_text())
    shown = re.findall(r"SGLR \(remote engine\): test accuracy ([\d.]+)%", GUIDE)
    assert [100 * result["test_score"]] == pytest.approx([float(text) for text in shown], abs=2)
    assert 'cutlayer_bytes_total{client="1",direction="up"}' in machines.said["coordinator"]
    assert {path.name for path in (machines.root / "hospital-a" / "own").iterdir()} == {
        "ca.crt", "client-0.crt", "client-0.csr", "client-0.key",
    }  # fmt: skip


def test_the_guide_names_files_that_exist() -> None:
    for name in re.findall(r"`((?:deploy|tests|docs)/[\w@./-]+)`", GUIDE):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([\w./-]+\.md)", GUIDE):
        assert (ROOT / "docs" / name).exists(), name


# --- the files of deploy/ ----------------------------------------------------------------------------------------


def service_of(name: str) -> RawConfigParser:
    parser = RawConfigParser(strict=False, delimiters="=", comment_prefixes="#", inline_comment_prefixes=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((ROOT / "deploy" / "systemd" / name).read_text().replace("\\\n", ""))
    return parser


UNITS = ("cutlayer-server.service", "cutlayer-client@.service")


def test_the_units_name_what_there_is() -> None:
    """Their commands are valid command lines. Systemd leaves the server enough time to stop."""
    for name in UNITS:
        service = service_of(name)["Service"]
        program, *words = shlex.split(re.sub(r"\$\{SERVER\}", "host:4747", service["ExecStart"]))
        assert program.endswith("/bin/cutlayer")
        command, _, _ = application().parse_args(words, exit_on_error=False, print_error=False)[:3]
        assert command.__name__ == ("serve" if "server" in name else "join")
        assert float(service["TimeoutStopSec"]) > 2 * GRACE
        key = service["LoadCredential"].partition(":")[0]
        assert f"${{CREDENTIALS_DIRECTORY}}/{key}" in words
    assert service_of("cutlayer-server.service")["Service"]["SuccessExitStatus"] == str(int(ExitCode.INTERRUPTED))


@pytest.mark.parametrize("name", UNITS)
def test_the_units_start_again_what_may_succeed_then(name: str) -> None:
    unit = service_of(name)
    service = unit["Service"]
    assert service["Restart"] == "on-failure"
    assert [int(code) for code in service["RestartForceExitStatus"].split()] == [ExitCode.TRY_AGAIN]
    assert [int(code) for code in service["RestartPreventExitStatus"].split()] == [ExitCode.WRONG]
    assert unit["Unit"]["StartLimitIntervalSec"] == "1h"
    # All attempts fit into the interval; otherwise there would be no end of them.
    assert int(unit["Unit"]["StartLimitBurst"]) * (int(service["RestartSec"]) + 60) <= 3600


HARDENED = {
    "CapabilityBoundingSet": "",
    "LimitCORE": "0",
    "NoNewPrivileges": "yes",
    "PrivateDevices": "yes",
    "PrivateTmp": "yes",
    "ProtectHome": "yes",
    "ProtectKernelModules": "yes",
    "ProtectProc": "invisible",
    "ProtectSystem": "strict",
    "StateDirectoryMode": "0700",
    "SystemCallArchitectures": "native",
    "UMask": "0077",
    "User": "cutlayer",
}


@pytest.mark.parametrize("name", UNITS)
def test_the_units_bound_what_a_process_may(name: str) -> None:
    service = service_of(name)["Service"]
    assert {option: service[option] for option in HARDENED} == HARDENED
    assert 0 < int(service["MemoryMax"].removesuffix("%")) < 100
    assert int(service["LimitNOFILE"]) >= 1024
    assert int(service["TasksMax"]) >= 256


def test_a_gpu_is_a_drop_in() -> None:
    """The drop-in allows the GPU's files, and nothing else."""
    text = (ROOT / "deploy" / "systemd" / "gpu.conf").read_text()
    options = [line.partition("=")[::2] for line in text.splitlines() if "=" in line and not line.startswith("#")]
    allowed = [value for option, value in options if option == "DeviceAllow"]
    assert allowed
    assert all(re.fullmatch(r"/dev/nvidia[\w-]* rw", value) for value in allowed)
    assert ("DevicePolicy", "closed") in options
    assert {option for option, _ in options} == {"Wants", "After", "PrivateDevices", "DevicePolicy", "DeviceAllow"}


@pytest.mark.network
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("gpu", [False, True])
def test_systemd_accepts_the_units(gpu: bool, tmp_path: Path) -> None:
    for name in UNITS:
        text = (ROOT / "deploy" / "systemd" / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/cutlayer/.venv/bin/cutlayer", shutil.which("true") or ""))
        if gpu:
            (tmp_path / f"{name}.d").mkdir()
            shutil.copy(ROOT / "deploy" / "systemd" / "gpu.conf", tmp_path / f"{name}.d")
        path = tmp_path / name
        for words in (["verify"], ["security", "--offline=yes", "--threshold=20"]):  # 2.0: few exposures
            done = subprocess.run(
                ["systemd-analyze", *words, str(path)], capture_output=True, text=True, timeout=PATIENCE, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert not done.stderr.strip()


def test_the_containers_name_what_there_is() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        words = shlex.split(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", service["command"]))
        command = application().parse_args(words, exit_on_error=False, print_error=False)[0]
        assert command.__name__ == {"server": "serve", "client": "join"}[name]
        written = words[words.index({"server": "--out", "client": "--folder"}[name]) + 1]
        assert written.startswith("/srv/cutlayer/")  # the rest is read-only
        assert any(volume.endswith(":/srv/cutlayer") for volume in service["volumes"])
        assert float(service["stop_grace_period"].removesuffix("s")) > 2 * GRACE
        assert service["restart"].startswith("on-failure:")  # a successful end is final
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["mem_limit"] == "${MEMORY:-8g}"
        assert service["ulimits"] == {"nofile": 8192, "core": 0}
    client = compose["services"]["client"]["command"]
    assert "localhost" not in client  # in a container, localhost is the container itself
    assert "${SERVER:-server:4747}" in client
    container = (ROOT / "deploy" / "Containerfile").read_text()
    (torch,) = re.findall(r"torch==\S+", container)
    assert torch in (ROOT / "constraints.txt").read_text().splitlines()
    for source in re.findall(r"^COPY (.*) \S+$", container, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())


# --- certificates from requests ----------------------------------------------------------------------------------


def test_a_request_is_signed(tmp_path: Path) -> None:
    """The certificate is for the client's key, which stays in its own folder, away from the authority's."""
    from cryptography import x509

    make_ca(tmp_path / "ca")
    request = make_request(tmp_path / "own", "client-0")
    assert request.key.stat().st_mode & 0o777 == 0o600
    made = sign_request(tmp_path / "ca", request.certificate, days=30)
    certificate = x509.load_pem_x509_certificate(made.read_bytes())
    asked = x509.load_pem_x509_csr(request.certificate.read_bytes())
    assert certificate.public_key() == asked.public_key()
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((tmp_path / "ca" / "ca.crt").read_bytes()))
    assert not (tmp_path / "ca" / "client-0.key").exists()
    assert len(key_fingerprint(request.certificate)) == 64


def test_what_is_not_signed(tmp_path: Path) -> None:
    make_ca(tmp_path / "ca")
    request = make_request(tmp_path / "own", "client-0").certificate
    sign_request(tmp_path / "ca", request)
    renamed = tmp_path / "client-1.csr"
    renamed.write_bytes(request.read_bytes())
    before = sorted(path.name for path in (tmp_path / "ca").iterdir())
    with pytest.raises(ConfigError, match="exists"):
        sign_request(tmp_path / "ca", request)
    with pytest.raises(ConfigError, match="asks for a certificate for 'client-0'"):
        sign_request(tmp_path / "ca", renamed)
    with pytest.raises(ConfigError, match="no request in PEM"):
        sign_request(tmp_path / "ca", tmp_path / "ca" / "ca.crt")
    with pytest.raises(ConfigError, match="no one connects to a client"):
        sign_request(tmp_path / "ca", make_request(tmp_path / "own", "client-2").certificate, hosts=["h"])
    with pytest.raises(ConfigError, match="exists"):
        make_request(tmp_path / "own", "client-0")
    with pytest.raises(ConfigError, match="cannot name a certificate"):
        make_request(tmp_path / "own", "../client-0")
    assert sorted(path.name for path in (tmp_path / "ca").iterdir()) == before


def test_damaged_and_weak_requests(tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    make_ca(tmp_path / "ca")
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "client-0")])
    weak = x509.CertificateSigningRequestBuilder().subject_name(name)
    signed = weak.sign(rsa.generate_private_key(65537, 1024), hashes.SHA256())
    path = tmp_path / "client-0.csr"
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    with pytest.raises(ConfigError, match="weak"):
        sign_request(tmp_path / "ca", path)
    der = bytearray(signed.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    damaged = x509.load_der_x509_csr(bytes(der))
    path.write_bytes(damaged.public_bytes(serialization.Encoding.PEM))
    with pytest.raises(ConfigError, match="damaged"):
        sign_request(tmp_path / "ca", path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--request a --sign a.csr", "two different sides"),
        ("--request a --clients 2", "clients = 2 has no effect"),
        ("--request a --days 3", "the authority that signs it decides"),
    ],
)
def test_words_that_exclude_each_other(words: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        application()(["certs", str(tmp_path / "x"), *words.split()], exit_on_error=False, print_error=False)
    assert not (tmp_path / "x").exists()


def test_keys_that_systemd_hands_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such keys have group bits because of an access list. There is no warning, which would fail this test."""
    from cutlayer.remote.security import ServerSecurity

    ca = make_ca(tmp_path)
    server = sign_request(tmp_path, make_request(tmp_path, "server").certificate)
    key = tmp_path / "server.key"
    key.chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert ServerSecurity(server, key, ca.certificate).open("127.0.0.1:0").certified
