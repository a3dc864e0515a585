"""Bytes, FLOPs, virtual time and energy: compared with hand counts, the paper's example and each other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import call, client_state, difference, make, mlp, train, u_shaped  # type: ignore[import-not-found]
from torch import nn

from cutlayer import ConfigError, Run, RunFolderError, checkpoint
from cutlayer.build import assemble
from cutlayer.cli import application
from cutlayer.costs.clock import Clock
from cutlayer.costs.energy import Use, clients_energy
from cutlayer.costs.expect import Workload, expect
from cutlayer.costs.fleet import Fleet, fleet
from cutlayer.costs.flops import Flops, count
from cutlayer.costs.measured import Meter
from cutlayer.costs.profiles import Device, Link, Profiles
from cutlayer.errors import CutlayerWarning
from cutlayer.models import cut
from cutlayer.models.zoo import build
from cutlayer.options import PlanConfig, RunConfig
from cutlayer.report import html
from cutlayer.report.collect import read
from cutlayer.reproduce.formulas import EXAMPLE, METHODS, Sizes, per_client, time, total

# All algorithms that state their traffic.
ALGORITHMS = (
    "cl", "fl", "ssl", "psl", "slr", "sfl", "sflv1", "sflv2", "sflv3", "sgl", "sglr", "ussl", "upsl", "usfl", "usglr",
    "cse-fsl", "fsl-sage",
)  # fmt: skip
NO_EXIT: dict[str, Any] = {"exit_on_error": False, "print_error": False, "result_action": "return_value"}
SMALL: dict[str, Any] = {"data": "digits", "model": "mlp", "clients": 4, "samples_per_client": 20, "test": 30}
FLEET: dict[str, Any] = {"client_device": "raspberry-pi-zero-2w", "link": "lte", "server_device": "h100"}
DESK = "[device.desk]\nflops_per_second = 1e9\nwatts = 30.0\nsource = 'me'\n"


def test_the_papers_example() -> None:
    found = {m: total(m, EXAMPLE) for m in METHODS}
    assert found == {"sglr": 1800.024, "psl": 2400, "sfl": 15800, "fl": 40000}
    assert round(100 * (1 - found["sglr"] / found["sfl"]), 1) == 88.6
    assert math.floor(100e3 * (1 - found["sglr"] / found["fl"])) / 1e3 == 95.499
    assert per_client("fl", EXAMPLE) == 400
    assert time("psl", EXAMPLE, rate=10, compute=1) == 1 + 2400 / 10  # as the paper states it
    assert time("sglr", EXAMPLE, rate=10, compute=1) == pytest.approx(1 + 18.00024 / 10)


@pytest.mark.parametrize("method", METHODS)
def test_the_ledgers_paper_convention_is_the_papers_formula(method: str) -> None:
    run = Run(algorithm=method, rounds=1, **SMALL)
    run.run()
    whole, client = 4 * sum(p.numel() for p in build("mlp", (1, 8, 8), 10).parameters()), 4 * (65 * 128 + 129 * 128)
    sizes = Sizes(clients=4, samples=80, smashed=4 * 128, model=whole, client_model=client, phi=0.5)
    ledger = run.training.ledger
    assert ledger.total("up", "paper") + ledger.total("down", "paper") == total(method, sizes)  # type: ignore[arg-type]


def test_flops_of_the_zoo_by_hand() -> None:
    """Forward: 2 x multiply-adds. Backward: as many for weights, and for the input except in the first layer."""
    picture = torch.rand(4, 1, 28, 28)
    mlp = count(cut(build("mlp", (1, 28, 28), 10), "hidden2", picture), picture)
    first, second = 2 * 784 * 128, 2 * 128 * 128
    assert mlp.client == Flops(first + second, first + 2 * second)
    rest = 2 * 128 * 128 + 2 * 128 * 10
    assert mlp.server == Flops(rest, 2 * rest)
    cnn = count(cut(build("cnn", (1, 28, 28), 10), "block1", picture), picture)
    first = 2 * 28 * 28 * 16 * 9
    assert cnn.client == Flops(first, first)
    rest = 2 * (14 * 14 * 32 * 16 * 9 + 32 * 7 * 7 * 64 + 64 * 10)
    assert cnn.server == Flops(rest, 2 * rest)
    resnet = count(cut(build("resnet16", (1, 28, 28), 10), "block4", picture), picture)
    stem, block16 = 2 * 32 * 32 * 16 * 27, 2 * (2 * 32 * 32 * 16 * 16 * 9)
    block32 = 2 * 16 * 16 * (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32) + 2 * (2 * 16 * 16 * 32 * 32 * 9)
    assert resnet.client.forward == stem + 2 * block16 + block32
    assert resnet.client.backward == 2 * resnet.client.forward - stem


def test_table_4_the_client_computes_94_7_percent_less() -> None:
    picture = torch.rand(4, 1, 28, 28)
    flops = count(cut(build("alexnet", (1, 28, 28), 10), "block1", picture), picture)
    assert round(100 * (1 - flops.client.three_forwards / flops.whole.three_forwards), 1) == 94.7
    # By an exact count, the client saves more: its first layer computes no gradient of its input.
    assert round(100 * (1 - flops.client.training / flops.whole.training), 1) == 96.4
    runs = {a: Run(algorithm=a, rounds=1, **{**SMALL, "clients": 5}).run() for a in ("cl", "fl", "sglr")}
    assert runs["fl"].client_flops
    assert runs["cl"].server_flops == 5 * runs["fl"].client_flops


def test_flops_need_no_values() -> None:
    """The count is the same on the meta device, where nothing is computed."""
    real, example = build("cnn", (1, 28, 28), 10), torch.rand(3, 1, 28, 28)
    parts = cut(real, "block1", example)
    expected = count(parts, example)
    for part in parts.all:
        part.to("meta")
    assert count(parts, example.to("meta")) == expected


def test_attention_counts() -> None:
    """The forward pass has four projections, scores and weighted values. Recomputed scores are not counted."""
    rows, tokens, width = 3, 5, 8

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.view(len(x), tokens, 2, width // 2).transpose(1, 2) for t in self.mixed(x).split(width, 2))
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).reshape(len(x), tokens, width))

    net = nn.Sequential(nn.Linear(width, width), Attention(), nn.Flatten(), nn.Linear(tokens * width, 2))
    example = torch.rand(rows, tokens, width)
    server = count(cut(net, "0", example), example).server
    projections, attention = 2 * tokens * width * 4 * width, 2 * 2 * tokens * tokens * width
    last = 2 * tokens * width * 2
    assert server.forward == projections + attention + last
    assert server.backward == 2 * (projections + attention + last)


def test_flops_change_nothing_and_say_what_they_do_not_know() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    example = torch.rand(4, 8)
    parts = cut(net, "1", example)
    before, random = [{k: v.clone() for k, v in p.state_dict().items()} for p in parts.all], torch.get_rng_state()
    count(parts, example)
    assert all(difference(b, p.state_dict()) == 0 for b, p in zip(before, parts.all, strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for part in parts.all for p in part.parameters())

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(8, 3, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = self.cell(x[:, None])[0]
            return outputs[:, -1]

    with pytest.warns(UserWarning, match="server part are not known"):
        count(cut(nn.Sequential(nn.Linear(8, 8), Recurrent()), "0", example), example)
    looked_up = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3))
    words = torch.randint(9, (4, 2))
    assert count(cut(looked_up, "0", words), words).client == Flops(0.0, 0.0)  # without a warning


def work_of(run: Run, **options: Any) -> Workload:
    training, config = run.training, run.config
    crossing, returning = (
        sum(math.prod(c.shape) * c.dtype.itemsize for c in crossings)
        for crossings in (training.parts.crossing, training.parts.returning)
    )
    parameters = [sum(p.nbytes for p in [*m.parameters(), *m.buffers()]) for m in training.parts.all]
    train = training.source.train
    return Workload(
        clients=config.clients,
        samples_per_client=config.samples_per_client or 0,
        batch=config.batch,
        smashed=crossing,
        gradient=crossing,
        label=train.y[:1].nbytes,
        raw=train.x[:1].nbytes,
        model=sum(parameters),
        client_model=parameters[0] + sum(parameters[2:]),
        features=returning,
        returned=returning,
        head=0 if training.head is None else sum(t.nbytes for t in training.head.state_dict().values()),
        flops=training.flops,
        **options,
    )


def tail_of(algorithm: str) -> dict[str, Any]:
    """The two cuts, if clients of the algorithm have tails."""
    return {"cut": "hidden1", "tail_cut": "hidden2"} if u_shaped(algorithm) else {}


CIRCUMSTANCES: dict[str, dict[str, Any]] = {
    "alike": {},
    "multicast": {"multicast": True},
    "narrow server": {"server_mbps": 3.0},
    "narrow server, multicast": {"server_mbps": 3.0, "multicast": True},
    "stragglers": {"speed_spread": 0.7, "rate_spread": 0.5, "stragglers": 0.25},
    "whole batches": {"batch": 10},
    "one batch": {"batch": 64, "speed_spread": 1.0},
    "slow server": {"server_device": "raspberry-pi-zero-2w", "batch": 3, "speed_spread": 0.7},
    "no server device, latency": {"server_device": None, "latency_ms": 50.0},
}


@pytest.mark.parametrize(
    ("circumstance", "epochs"), [*((name, 2) for name in CIRCUMSTANCES), ("alike", 1), ("one batch", 1)]
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_closed_forms_are_what_ledger_and_clock_count(algorithm: str, circumstance: str, epochs: int) -> None:
    options = {**SMALL, **FLEET, **CIRCUMSTANCES[circumstance], **tail_of(algorithm), "epochs": epochs}
    run = Run(algorithm=algorithm, **{k: v for k, v in options.items() if v is not None})
    result = run.run()
    machines = fleet(run.config, 4)
    assert machines is not None
    found = expect(run.training.algorithm, work_of(run, epochs=epochs), machines)
    ledger = run.training.ledger
    assert found.up + found.once_up == ledger.total("up")
    assert found.down == ledger.total("down")
    assert found.down_broadcast == ledger.total("down", "wire-broadcast")
    assert found.paper == ledger.total("up", "paper") + ledger.total("down", "paper")
    assert found.client_flops == result.client_flops
    assert found.server_flops == result.server_flops
    assert found.seconds == pytest.approx(result.virtual_seconds, rel=1e-9)
    assert found.clients is not None
    assert found.clients.total == pytest.approx(result.clients_joules, rel=1e-9)
    assert found.clients.marginal == pytest.approx(result.clients_marginal_joules, rel=1e-9)
    assert (found.server_joules is None) == (result.server_joules is None)
    if found.server_joules is not None:
        assert found.server_joules == pytest.approx(result.server_joules, rel=1e-9)
    assert run.training.clock is not None
    use = run.training.clock
    assert found.clients.radio_rate == pytest.approx(
        (0.0767 * use.up_bits.sum() + 0.0115 * use.down_bits.sum()) / 1e6, rel=1e-9
    )


@pytest.mark.parametrize(
    "algorithm", ["cl", "fl", "ssl", "psl", "sfl", "sflv1", "sflv2", "sflv3", "sglr", "ussl", "upsl"]
)
def test_the_clock_changes_no_number_of_the_training(algorithm: str) -> None:
    own = tail_of(algorithm)
    plain = Run(algorithm=algorithm, rounds=2, **SMALL, **own)
    timed = Run(algorithm=algorithm, rounds=2, **SMALL, **own, **FLEET, stragglers=0.5, rate_spread=1.0)
    losses = [[r.loss for r in run] for run in (plain, timed)]
    assert losses[0] == losses[1]
    assert plain.training.ledger.state() == timed.training.ledger.state()
    assert difference(client_state(plain), client_state(timed)) == 0
    assert timed.result is not None
    assert timed.result.virtual_seconds


def two(speeds: list[float], **options: Any) -> Clock:
    device = Device(name="d", source="test", flops_per_second=1.0, watts=2.0, idle_watts=0.5)
    link = Link(name="l", source="test", up_watts=1.0, up_watts_per_mbps=0.1, down_watts=0.5, down_watts_per_mbps=0.2)
    return Clock(
        Fleet(device, link, None, np.array(speeds), np.array([1e6, 2e6]), np.array([4e6, 4e6]), 0.25, **options)
    )


def test_the_clock_by_hand() -> None:
    clock = two([10.0, 20.0], server_speed=100.0)
    clock.begin([0, 1])
    clock.compute(np.array([10.0, 10.0]))  # 1 s, 0.5 s
    clock.upload(np.array([1e6, 1e6]))  # until 2 s, until 1 s
    assert clock.server == 2.25  # the later arrival
    clock.serve(50.0)
    clock.download(np.array([2e6, 0.0]), 2e6)  # leaves at 2.75 s, arrives at 3 s, takes 0.5 s
    clock.compute(np.array([5.0, 0.0]))
    assert clock.ready.tolist() == [4.0, 1.0]
    now = clock.read()
    assert now.seconds == 4.0
    # Client 0 computed 1.5 s, sent 1 s, received 0.5 s and waited 1 s; client 1: 0.5 s, 0.5 s, 0 s and 3 s.
    assert now.clients.computing == pytest.approx(2.0 * (1.5 + 0.5))
    assert now.clients.radio_rate == pytest.approx(0.1 * 2 + 0.2 * 2)
    assert now.clients.radio_base == pytest.approx(1.0 * 1.5 + 0.5 * 0.5)
    assert now.clients.waiting == pytest.approx(0.5 * (1.0 + 3.0))
    assert now.clients.marginal == pytest.approx(4.0 + 0.6)
    assert now.clients.total == pytest.approx(4.0 + 0.6 + 1.75 + 2.0)
    assert now.server_joules is None


def test_who_is_not_asked_sleeps() -> None:
    clock = two([10.0, 10.0])
    clock.begin([0])
    clock.compute(np.array([100.0, 0.0]))
    clock.upload(np.array([1e6, 0.0]))  # until 11 s
    assert clock.read().clients.waiting == pytest.approx(0.5 * 0.25)  # client 0 waits until its message has arrived
    clock.begin([1])  # wakes at 11.25, the server's time
    clock.compute(np.array([0.0, 10.0]))
    assert clock.now == 12.25
    assert clock.read().clients.waiting == 0.0  # client 0's 0.25 s now count as time between two rounds


def test_the_server_waits_for_those_that_send() -> None:
    """A client that computes for 10 s and sends nothing does not delay the others."""
    clock = two([10.0, 10.0])
    clock.begin([0, 1])
    clock.compute(np.array([100.0, 0.0]))
    clock.upload(np.array([0.0, 1e6]))
    assert clock.server == 0.75  # 0.5 s on air and 0.25 s of latency
    assert clock.ready.tolist() == [10.0, 0.5]


def test_what_comes_is_received_when_the_client_is_through() -> None:
    """A client that still computes receives the server's answer when it has finished. The other client waits for it."""
    clock = two([10.0, 10.0])
    clock.begin([0, 1])
    clock.compute(np.array([100.0, 0.0]))  # 10 s, 0 s
    clock.upload(np.array([0.0, 1e6]))  # sent at 0.5 s, arrives at 0.75 s
    clock.download(np.array([2e6, 2e6]), 0.0)  # arrives at 1 s and takes 0.5 s each
    assert clock.ready.tolist() == [10.5, 1.5]
    assert clock.now == 10.5


def test_the_u_shape_by_hand(tmp_path: Path) -> None:
    """Two clients of three and two rows take turns of one batch each. The model moves from one to the other."""
    mine = tmp_path / "mine.toml"
    mine.write_text(
        "[device.mote]\nflops_per_second = 1e3\nrates.float64 = 1e3\nwatts = 2.0\nidle_watts = 0.5\nsource = 'me'\n"
        "[device.desk]\nflops_per_second = 1e4\nrates.float64 = 1e4\nwatts = 30.0\nsource = 'me'\n"
        "[link.air]\nup_mbps = 0.01\ndown_mbps = 0.02\nlatency_ms = 100\nsource = 'me'\n"
        "up_watts = 3.0\nup_watts_per_mbps = 20.0\ndown_watts = 1.0\ndown_watts_per_mbps = 5.0\n"
    )
    run = train(
        "ussl", make(mlp), [3, 2], (6,), cut="0", tail_cut="2", rounds=1, profiles=str(mine), utilisation=1.0,
        client_device="mote", server_device="desk", link="air",
    )  # fmt: skip
    # FLOPs per row: 2 x 6 x 8 in the lower part, whose backward pass computes no gradient of its input, 2 x 8 x 8 in
    # the middle, and 2 x 8 x 4 in the tail. A row crosses as 8 numbers of 8 bytes, twice up and twice down.
    lower, middle, middle_back, tail = 96.0, 128.0, 256.0, 64.0 + 128.0
    crossing, model = 8 * 64.0, 8 * 8.0 * (6 * 8 + 8 + 8 * 4 + 4)  # bits
    up, down, latency = 1e4, 2e4, 0.1

    def turn(rows: int) -> float:
        """Seconds of a turn, from the first forward pass to the last backward pass."""
        computing = (2 * lower + tail) / 1e3 + (middle + middle_back) / 1e4
        return rows * (computing + 2 * crossing / up + 2 * crossing / down) + 4 * latency

    seconds = turn(3) + (model / up + model / down + 2 * latency) + turn(2)
    work, bits = 5 * (2 * lower + tail), 5 * 2 * crossing + model  # both clients; bits in each direction
    busy = work / 1e3 + bits / up + bits / down
    marginal = 2.0 * work / 1e3 + (20.0 + 5.0) * bits / 1e6
    waiting = 2 * seconds - busy  # each client waits for the other's turn and for the server
    result = run.result
    assert result is not None
    assert result.virtual_seconds == pytest.approx(seconds, rel=1e-12)
    assert result.clients_marginal_joules == pytest.approx(marginal, rel=1e-12)
    assert result.clients_joules == pytest.approx(
        marginal + 3.0 * bits / up + 1.0 * bits / down + 0.5 * waiting, rel=1e-12
    )
    assert result.server_joules == pytest.approx(30.0 * 5 * (middle + middle_back) / 1e4, rel=1e-12)


def test_a_clock_taken_up_again_reads_the_same() -> None:
    """Client 0 takes part, and its wait until its message has arrived is part of the state."""
    clock, again = two([10.0, 10.0]), two([10.0, 10.0])
    clock.begin([0])
    clock.compute(np.array([10.0, 0.0]))
    clock.upload(np.array([1e6, 0.0]))
    again.load(clock.state())
    assert clock.read().clients.waiting > 0
    assert again.read() == clock.read()


def test_a_narrow_server_and_multicast() -> None:
    clock = two([10.0, 10.0], server_rate=1e6)
    clock.begin([0, 1])
    clock.upload(np.array([1e6, 1e6]))  # together 2 Mbit at 1 Mbit/s
    assert clock.ready.tolist() == [2.0, 2.0]
    clock.download(np.array([1e6, 1e6]), 1e6)  # one copy for both
    assert clock.ready.tolist() == [3.5, 3.5]


def test_unknown_figures_stay_unknown() -> None:
    zeros, ones = np.zeros(1), np.ones(1)
    device = Device(name="d", source="test", flops_per_second=1.0, watts=2.0)
    machines = Fleet(device, Link(name="l", source="test", up_watts_per_mbps=1.0), None, ones, ones, ones, 0.0)
    nothing_known = clients_energy(machines, Use(ones, zeros, zeros, ones, ones, ones))
    assert (nothing_known.computing, nothing_known.marginal, nothing_known.total) == (2.0, None, None)
    idle = clients_energy(machines, Use(ones, zeros, zeros, zeros, zeros, ones))
    assert (idle.marginal, idle.waiting, idle.total) == (2.0, None, None)
    busy = clients_energy(machines, Use(ones, zeros, zeros, zeros, zeros, zeros))
    assert busy.total == 2.0


def test_what_cannot_be_measured_is_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cutlayer.costs.measured._RAPL", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with Meter() as meter:
        pass
    assert meter.joules is None
    assert meter.method.startswith("not measured")


def test_every_profile_has_a_source() -> None:
    profiles = Profiles.load()
    assert all(p.source and p.title for p in [*profiles.devices.values(), *profiles.links.values()])
    figures = {n: d.joules_per_flop for n, d in profiles.devices.items()}
    known = {"raspberry-pi-4": 6.1e-10, "raspberry-pi-5": 3.6e-10, "raspberry-pi-zero-2w": 5.7e-9}
    known |= {"desktop-i5-7400t": 5.7e-10, "desktop-ryzen-5600x": 8.6e-10, "mac-mini-m4": 1.3e-10}
    assert {n: float(f"{figures[n]:.1e}") for n in known} == known
    lora = profiles.link("lora")
    assert lora.up_watts is not None
    assert lora.up_mbps is not None
    assert lora.up_watts * 8e6 / (lora.up_mbps * 1e6) == pytest.approx(135, rel=0.01)  # J per MB


def test_profiles_of_ones_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[device.mote]\nflops_per_second = 1e6\nwatts = 0.1\nsource = "me"\n')
    options = {**SMALL, "rounds": 1, "algorithm": "psl", "profiles": str(mine)}
    run = Run(client_device="mote", up_mbps=1.0, down_mbps=1.0, **options)
    result = run.run()
    assert result.clients_joules is None  # the energy of the link is not known
    assert result.virtual_seconds is not None
    compute = 20 * run.training.flops.client.training / 1e6
    assert result.virtual_seconds > compute
    with pytest.raises(ConfigError, match="did you mean 'mote'"):
        Run(client_device="moat", up_mbps=1.0, down_mbps=1.0, **options)


def test_rates_of_other_precisions() -> None:
    """Rates are those of the data sheets, at most what such devices can reach, and None if the processor has none."""
    devices = Profiles.load().devices
    known = {n: [d.rate(p) for p in ("float32", "bfloat16", "float16", "tf32", "float64")] for n, d in devices.items()}
    assert known["a100"] == [19.5e12, 312e12, 312e12, 156e12, 19.5e12]
    assert known["h100"] == [67e12, 989.4e12, 989.4e12, 494.7e12, 66.9e12]
    assert known["jetson-orin-nano"][1:] == [None] * 4
    for name, device in devices.items():
        if device.basis.startswith("HPL, double precision"):
            assert known[name] == [device.flops_per_second, None, None, None, device.flops_per_second]
        elif device.rate("bfloat16") is not None:
            assert device.rates_source


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "tf32", "float64"])
def test_a_fleet_has_the_rates_of_its_precision(tmp_path: Path, precision: Any) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(f"{DESK}[device.desk.rates]\nbfloat16 = 4e9\nfloat16 = 3e9\ntf32 = 2e9\nfloat64 = 0.5e9\n")
    rate = {"bfloat16": 4e9, "float16": 3e9, "tf32": 2e9, "float64": 0.5e9}[precision]
    kind = PlanConfig if precision == "float16" else RunConfig
    options: dict[str, Any] = {"profiles": str(mine), "up_mbps": 1.0, "down_mbps": 1.0, "utilisation": 0.5}
    options |= {"client_device": "desk", "server_device": "h100", "precision": precision}
    found = fleet(kind(**options), 2)
    assert found is not None
    assert found.speeds.tolist() == [rate / 2] * 2
    assert found.server_speed == Profiles.load().device("h100").rate(precision) / 2  # type: ignore[operator]
    assert found.notes == ()
    mine.write_text(DESK)
    found = fleet(kind(**options), 2)
    assert found is not None
    assert found.speeds.tolist() == [0.5e9] * 2
    (note,) = found.notes
    assert note.startswith(f"desk has no known rate in {precision}: its float32 rate, 1.00 GFLOP/s, is used.")
    both = fleet(kind(**options | {"server_device": "desk"}), 2)
    assert both is not None
    assert both.notes == (note,)


def test_a_run_takes_the_rate_of_its_precision_and_says_what_is_not_known() -> None:
    """The server is faster at equal FLOPs. The clients' device has no rate in bfloat16, which is a warning."""
    options: dict[str, Any] = {**SMALL, **FLEET, "algorithm": "psl", "rounds": 1, "utilisation": 1e-6}
    with pytest.warns(CutlayerWarning, match="raspberry-pi-zero-2w has no known rate in bfloat16: its float32 rate"):
        narrow = Run(**options, precision="bfloat16")
    plain = Run(**options)
    slow, fast = plain.run(), narrow.run()
    assert slow.server_flops == fast.server_flops
    assert slow.server_joules == pytest.approx(fast.server_joules * 989.4 / 67)  # type: ignore[operator]
    seconds = [slow.virtual_seconds, fast.virtual_seconds]
    for i, (run, rate) in enumerate(((plain, 67e12), (narrow, 989.4e12))):
        clock = run.training.clock
        assert clock is not None
        assert clock.fleet.speeds.tolist() == [0.37e9 * 1e-6] * 4
        on_air = float(clock.up_seconds[0] + clock.down_seconds[0])  # half as many bytes cross in bfloat16
        seconds[i] -= on_air + slow.server_flops / rate / 1e-6  # type: ignore[operator]
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[device.x]\nflops_per_second = -1\nwatts = 1\nsource = 'me'", ["'x'", "flops_per_second = -1", "correct"]),
        ("[device.x]\nflops_per_second = 1\nwatts = 1", ["'x'", "source is missing"]),
        ("[device.x]\nwats = 1", ["'x'", "did you mean 'watts'"]),
        ("[device.x.rates]\nbfloat61 = 1", ["'x'", "unknown precision 'bfloat61'", "did you mean 'bfloat16'"]),
        ("[device.x.rates]\nfloat32 = 1", ["unknown precision 'float32'", "the float32 rate is flops_per_second"]),
        (f"{DESK}rates = {{ tf32 = 0 }}", ["rates.tf32 = 0 is not possible", "greater than 0"]),
        (f"{DESK}rates = 5", ["rates = 5 is not possible"]),
        ("[devices.x]\nwatts = 1", ["did you mean 'device'"]),
        ("[device]\nwatts = 1", ["watts = 1", "[device.NAME]"]),
        ("link = [1]", ["link = [1]", "[link.NAME]"]),
        ("[device.x]\nname = 'y'", ["'x'", "unknown figure 'name'"]),
        ("[link.x]\nup_mbps = 0\nsource = 'me'", ["up_mbps = 0"]),
        ("[link.x", ["not valid TOML"]),
    ],
)
def test_bad_profiles(tmp_path: Path, text: str, words: list[str]) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(text)
    with pytest.raises(ConfigError) as error:
        Profiles.load(mine)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"client_device": "raspberry-pi-3"}, ["'raspberry-pi-3'", "did you mean 'raspberry-pi-"]),
        ({"client_device": "raspberry-pi-4", "link": "lta"}, ["did you mean 'lte'"]),
        ({"client_device": "raspberry-pi-4"}, ["no link", "--up-mbps"]),
        ({"client_device": "raspberry-pi-4", "link": "5g-low-band"}, ["no rates", "down_mbps"]),
        ({"link": "lte"}, ["link = 'lte'", "without client_device"]),
        ({"multicast": True}, ["multicast = True", "without client_device"]),
        ({"client_device": "raspberry-pi-4", "link": "lte", "up_mbps": -1.0}, ["up_mbps = -1.0", "greater than 0"]),
        ({"client_device": "raspberry-pi-4", "link": "lte", "profiles": "nowhere.toml"}, ["nowhere.toml", "check"]),
    ],
)
def test_bad_fleets(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        Run(rounds=1, **SMALL, **options)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("fraction", "slow"), [(0.0, 0), (0.25, 1), (0.4, 2), (1.0, 4)])
def test_stragglers_by_hand(fraction: float, slow: int) -> None:
    """A fraction of the four clients, rounded, is five times as slow as the others in computing and on the link."""
    config = RunConfig(**SMALL, client_device="raspberry-pi-4", link="lte", straggler_slowdown=5.0, stragglers=fraction)
    usual, found = fleet(config.model_copy(update={"stragglers": 0.0}), 4), fleet(config, 4)
    assert usual is not None
    assert found is not None
    for values, normal in ((found.speeds, usual.speeds), (found.up, usual.up), (found.down, usual.down)):
        assert sorted(values / normal) == pytest.approx([0.2] * slow + [1.0] * (4 - slow))


def test_lora_warns() -> None:
    with pytest.warns(UserWarning, match="24 minutes"):
        assemble(RunConfig(rounds=1, client_device="raspberry-pi-4", link="lora", **SMALL))


def test_a_resumed_clock_reads_the_same(tmp_path: Path) -> None:
    options = {**SMALL, **FLEET, "algorithm": "sfl", "rounds": 3, "participation": 0.5}
    whole = Run(**options).run()
    broken = Run(**options, out=tmp_path / "run")
    for record in broken:
        if record.round == 2:
            break
    resumed = Run.resume(tmp_path / "run").run()
    assert resumed.virtual_seconds == whole.virtual_seconds
    assert resumed.clients_joules == whole.clients_joules
    assert resumed.bytes == whole.bytes


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_local_steps_go_on_where_the_last_round_stopped(participation: float) -> None:
    """20 samples give batches of 8, 8, 4, 8, ...: rounds of two steps have 16, 12, 12, 16, ... samples."""
    run = Run(algorithm="fl", local_steps=2, rounds=5, participation=participation, **SMALL, **FLEET)
    result, clock = run.run(), run.training.clock
    assert clock is not None
    assert clock.flops.mean() == result.client_flops


def test_a_resumed_clock_knows_how_many_local_steps_were_taken(tmp_path: Path) -> None:
    options = {**SMALL, **FLEET, "algorithm": "fl", "local_steps": 2, "rounds": 4, "checkpoint_every": 1}
    whole = Run(**options).run()
    broken = Run(**options, out=tmp_path / "run")
    for record in broken:
        if record.round == 1:
            break
    resumed = Run.resume(tmp_path / "run").run()
    assert resumed.virtual_seconds == whole.virtual_seconds
    assert resumed.clients_joules == whole.clients_joules


def test_a_checkpoint_of_another_version_is_refused_in_a_sentence(tmp_path: Path) -> None:
    broken = Run(**SMALL, algorithm="psl", rounds=3, checkpoint_every=1, out=tmp_path / "run")
    for record in broken:
        if record.round == 1:
            break
    path = tmp_path / "run" / "checkpoint.safetensors"
    state = checkpoint.read(path)
    del state["measured"]
    checkpoint.write(path, state)
    with pytest.raises(RunFolderError, match="another version of Cutlayer"):
        Run.resume(tmp_path / "run").run()


def test_what_an_older_run_did_not_count_is_not_known(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Run(**SMALL, algorithm="psl", rounds=1, out=folder).run()
    result = json.loads((folder / "result.json").read_text())
    for row in result["bytes"]:
        del row["paper"]
    for name in ("client_flops", "server_flops", "measured_joules", "measured_by"):
        del result[name]
    (folder / "result.json").write_text(json.dumps(result))
    (entry,) = read(folder).entries
    assert {kind["paper"] for kind in html._kinds(entry)} == {"not known"}
    assert all(kind["wire-unicast"][0].isdigit() for kind in html._kinds(entry))


def test_calibration_makes_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.toml"
    application()(["calibrate", "--seconds", "0.2", "--watts", "12.5", "--name", "desk", "--out", str(mine)], **NO_EXIT)
    device = Profiles.load(mine).device("desk")
    assert device.watts == 12.5
    assert device.idle_watts is None
    assert 1e6 < device.flops_per_second < 1e15
    assert [device.rate(p) for p in ("float32", "bfloat16", "float64")] == [device.flops_per_second, None, None]
    assert "float32" in device.basis
    assert "cnn, batch 8" in device.basis
    assert "as given" in device.source
    application()(["calibrate", "--seconds", "0.2", "--watts", "12.5", "--idle-watts", "3"], **NO_EXIT)
    assert "idle_watts = 3.0" in capsys.readouterr().out


def test_calibration_with_a_model_of_ones_own(tmp_path: Path) -> None:
    """The model takes word numbers and returns one number."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Embedding(2, 4), nn.Flatten(), nn.LazyLinear(3), nn.Linear(3, 1))\n"
    )
    words = "calibrate --model net.py:make --input 6 --input-type int64 --seconds 0.1 --watts 1 --out own.toml"
    call(*words.split(), cwd=tmp_path)
    assert "net.py:make, batch 8" in Profiles.load(tmp_path / "own.toml").device("this-machine").basis


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--seconds 0.2", ["not measured", "give watts"]),
        ("--watts -1", ["watts = -1.0", "greater than 0"]),
        ("--watts 1 --seconds 0", ["seconds = 0.0", "greater than 0"]),
        ("--watts 1 --batch 0", ["batch = 0", "greater than 0"]),
        ("--watts 1 --model cmn", ["did you mean 'cnn'"]),
        ("--watts 1 --device cuda:9", ["device = 'cuda:9'"]),
        ("--watts 1 --model cnn --input 8", ["takes pictures", "shape (8,)"]),
    ],
)
def test_bad_calibrations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, said: list[str]) -> None:
    monkeypatch.setattr("cutlayer.costs.measured._RAPL", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError) as error:
        application()(["calibrate", *words.split()], **NO_EXIT)
    assert all(part in str(error.value) for part in said)
