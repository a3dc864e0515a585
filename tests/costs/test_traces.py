"""Traces of availability and links: by hand, against constant links, in interrupted runs, and with errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import call, client_state, difference, make, mlp, source, train  # type: ignore[import-not-found]

from cutlayer import Comparison, ConfigError, Run, RunConfig, RunFolderError
from cutlayer.cohort import draw_participants
from cutlayer.costs.clock import Clock
from cutlayer.costs.fleet import Fleet
from cutlayer.costs.profiles import Device, Link
from cutlayer.costs.traces import Reachable, Trace, read_trace
from cutlayer.errors import CutlayerWarning
from cutlayer.remote import sides
from cutlayer.report.collect import read
from cutlayer.report.spending import line

HEAD = "client,from,to,up,down\n"
SIZES = [9, 12, 7]
MACHINES: dict[str, Any] = {"client_device": "raspberry-pi-zero-2w", "link": "lte", "server_device": "h100"}


def written(folder: Path, rows: str) -> str:
    """The path of a trace file with these rows."""
    path = folder / "trace.csv"
    path.write_text(HEAD + rows)
    return str(path)


def always(clients: int, up: float = 5.64, down: float = 12.74) -> str:
    """Rows of clients that are always reachable, at the rates of the profile lte."""
    return "".join(f"{k},0,inf,{up},{down}\n" for k in range(clients))


def one(*rows: tuple[float, float, float, float], period: float = math.inf) -> Trace:
    """The trace of one client: (from, to, up, down), rates in bit/s."""
    begins, ends, up, down = zip(*rows, strict=True)
    return Trace((Reachable(begins, ends, up, down),), period)


def test_a_message_across_a_change_of_rate_by_hand() -> None:
    """30 bits from second 7 on: 3 s at 4 bit/s, then 18 bits at 9 bit/s. Down: 3 s at 1 bit/s, then 27 at 3 bit/s."""
    trace = one((0, 10, 4, 1), (10, math.inf, 9, 3))
    assert trace.passing("up", 0, 7.0, 30.0) == (5.0, 0.0)
    assert trace.passing("down", 0, 7.0, 30.0) == (12.0, 0.0)
    assert trace.passing("up", 0, 7.0, 12.0) == (3.0, 0.0)  # ends when the rate changes
    assert trace.passing("up", 0, 7.0, 30.0, most=3.0) == (10.0, 0.0)  # the server's rate is lower than both


def test_a_message_across_gaps_by_hand() -> None:
    trace = one((2, 4, 10, 10), (9, math.inf, 5, 5))
    assert trace.passing("up", 0, 0.0, 10.0) == (1.0, 2.0)  # waits for the first interval
    assert trace.passing("up", 0, 3.0, 30.0) == (5.0, 5.0)  # 10 bits, a gap of five seconds, 20 bits
    assert trace.passing("up", 0, 3.0, 10.0) == (1.0, 0.0)  # ends exactly with the interval
    assert trace.passing("up", 0, 4.0, 5.0) == (1.0, 5.0)  # the end of an interval does not belong to it
    assert trace.waits(1.0).tolist() == [1.0]
    assert trace.waits(2.0).tolist() == [0.0]
    assert trace.waits(4.0).tolist() == [5.0]
    assert trace.share(10.0).tolist() == [0.3]
    assert trace.share(0.0).tolist() == [0.0]


def test_a_trace_repeats() -> None:
    """The client is reachable for two of every ten seconds."""
    trace = one((3, 5, 10, 20), period=10.0)
    assert trace.waits(16.0).tolist() == [7.0]
    assert trace.waits(24.0).tolist() == [0.0]
    assert trace.passing("up", 0, 4.0, 25.0) == (2.5, 8.0)  # 10 bits, then 15 bits from second 13 on
    assert trace.passing("up", 0, 4.0, 10.0 + 7 * 20.0 + 5.0) == (15.5, 64.0)  # seven whole periods in between
    assert trace.passing("down", 0, 3.0, 40.0 * 1e9 + 20) == (2e9 + 1, 8e9)  # also with very many periods
    assert trace.share(20.0).tolist() == [0.2]
    assert trace.share(14.0).tolist() == [3 / 14]


@given(
    st.lists(st.tuples(st.floats(0.1, 50), st.floats(0.1, 50), st.floats(0.5, 9)), min_size=1, max_size=5),
    st.floats(0, 500),
    st.floats(0.01, 5000),
    st.floats(0.5, 20),
)
@settings(max_examples=60, deadline=None)
def test_what_passes_is_what_the_link_carries(
    parts: list[tuple[float, float, float]], begin: float, bits: float, most: float
) -> None:
    """The rates, summed over small pieces of time until the message's end, give the size of the message."""
    rows, now = [], 0.0
    for gap, length, rate in parts:
        rows.append((now + gap, now + gap + length, rate, rate))
        now += gap + length
    trace = one(*rows, period=now)
    on_air, waited = trace.passing("up", 0, begin, bits, most)
    edges = np.array(sorted({begin, begin + on_air + waited, *_edges(rows, now, begin, begin + on_air + waited)}))
    middles, lengths = (edges[1:] + edges[:-1]) / 2 % now, np.diff(edges)
    rates = np.array([next((min(r, most) for a, b, r, _ in rows if a <= at < b), 0.0) for at in middles])
    assert (rates * lengths).sum() == pytest.approx(bits, rel=1e-6)
    assert lengths[rates > 0].sum() == pytest.approx(on_air, rel=1e-6, abs=1e-6)


def _edges(rows: Sequence[tuple[float, ...]], period: float, begin: float, end: float) -> list[float]:
    cycles = range(int(begin // period), int(end // period) + 1)
    found = [cycle * period + edge for cycle in cycles for row in rows for edge in row[:2]]
    return [edge for edge in found if begin < edge < end]


def clock_of(trace: Trace, speeds: Sequence[float] = (10.0, 10.0), **options: Any) -> Clock:
    device = Device(name="d", source="test", flops_per_second=1.0, watts=2.0, idle_watts=0.5)
    unknown = np.full(len(speeds), math.nan)
    return Clock(
        Fleet(
            device,
            Link(name="l", source="test"),
            None,
            np.array(speeds),
            unknown,
            unknown,
            0.25,
            trace=trace,
            **options,
        )
    )


def two() -> Trace:
    """Client 0 is always reachable, client 1 for two of every ten seconds."""
    return Trace((Reachable((0.0,), (10.0,), (4.0,), (8.0,)), Reachable((4.0,), (6.0,), (2.0,), (4.0,))), 10.0)


def test_the_clock_waits_for_links_by_hand() -> None:
    clock = clock_of(two())
    assert clock.present() == (0,)
    clock.begin([0, 1])
    clock.compute(np.array([10.0, 10.0]))  # both until 1 s, reachable or not
    clock.upload(np.array([4.0, 6.0]))  # client 0 until 2 s; client 1 from 4 to 6 s, and from 14 to 15 s
    assert clock.ready.tolist() == [2.0, 15.0]
    assert clock.server == 15.25
    clock.download(np.array([8.0, 4.0]), 12.0)  # arrives at 15.5 s: for 1 s; until 16 s, then from 24 s on
    assert clock.ready.tolist() == [16.5, 24.5]
    assert clock.up_seconds.tolist() == [1.0, 3.0]  # on air
    assert clock.attendance is not None
    assert clock.attendance.waited.tolist() == [0.0, 3.0 + 8.0 + 8.0]
    now = clock.read()
    assert now.idle == (24.5 - 3.0, 24.5 - 5.0)
    assert now.clients.waiting == pytest.approx(0.5 * (21.5 + 19.5))
    found = clock.attendance.summary(now.seconds, now.idle)
    assert found["reachable"] == [1.0, 4.5 / 24.5]
    assert found["link_seconds"] == [0.0, 19.0]


def test_the_servers_rate_is_shared_by_those_that_send() -> None:
    """16 bits at 2 bit/s for all: each message takes 8 s of link time, and client 1 has only 2 s in every ten."""
    clock = clock_of(two(), server_rate=2.0)
    clock.begin([0, 1])
    clock.upload(np.array([8.0, 8.0]))
    assert clock.up_seconds.tolist() == [8.0, 8.0]
    assert clock.ready.tolist() == [8.0, 36.0]


def test_the_clock_moves_on_to_whoever_can_be_reached_first() -> None:
    """No client is reachable from 6 s on. Clients 0 and 1 are again at 14 s, client 2 later."""
    rows = [(4.0, 6.0), (4.0, 5.0), (5.0, 6.0)]
    trace = Trace(tuple(Reachable((a,), (b,), (1e6,), (1e6,)) for a, b in rows), 10.0)
    clock = clock_of(trace, [1.0, 1.0, 1.0])
    with pytest.warns(CutlayerWarning, match="moves on to 4.00 s"):
        assert clock.present() == (0, 1)
    assert clock.server == 4.0
    clock.begin([0, 1])
    clock.compute(np.array([1.0, 2.0, 0.0]))  # until 5 s and 6 s
    clock.upload(np.array([1.0, 0.0, 0.0]))
    clock.server = 7.0
    assert clock.present() == (0, 1)  # without a second warning
    clock.begin([0])
    assert clock.server == clock.ready[0] == 14.0
    assert clock.ready[1] == 7.0  # asleep since the end of the round
    assert clock.attendance is not None
    assert (clock.attendance.late_rounds, clock.attendance.late_seconds) == (2, 4.0 + 7.0)
    assert clock.read().idle[0] == pytest.approx(7.0 - 5.0)  # the rest of the round, without the sleep


def test_participants_are_drawn_among_those_present() -> None:
    assert draw_participants(0, 3, 10, 0.5, [2, 5, 7]) == tuple([2, 5, 7][k] for k in draw_participants(0, 3, 3, 0.5))
    assert len(draw_participants(0, 3, 10, 0.5, [2, 5, 7])) == 2  # of three clients, not of ten
    assert draw_participants(0, 3, 10, 0.1, [8]) == (8,)
    assert draw_participants(0, 3, 10, 1.0, [1, 4]) == (1, 4)
    assert draw_participants(7, 3, 10, 0.4, range(10)) == draw_participants(7, 3, 10, 0.4)


@pytest.mark.parametrize("algorithm", ["cl", "fl", "ssl", "psl", "sglr", "sfl", "gpsl"])
@pytest.mark.parametrize("rate", [None, 3.0])
def test_a_constant_trace_is_the_profiles_link(algorithm: str, rate: float | None, tmp_path: Path) -> None:
    options = {**MACHINES, "participation": 0.6, "server_mbps": rate, "rounds": 3, "stragglers": 0.0}
    if algorithm == "cl":
        options.pop("participation")
    options = {k: v for k, v in options.items() if v is not None}
    plain = train(algorithm, make(mlp), SIZES, (6,), **options, **_cut(algorithm))
    traced = train(algorithm, make(mlp), SIZES, (6,), **options, **_cut(algorithm), trace=written(tmp_path, always(3)))
    assert plain.result is not None
    assert traced.result is not None
    for name in ("virtual_seconds", "clients_joules", "clients_marginal_joules", "server_joules", "idle_seconds"):
        mine, theirs = getattr(traced.result, name), getattr(plain.result, name)
        assert mine == (theirs if rate is None else pytest.approx(theirs, rel=1e-12)), name
    assert traced.result.bytes == plain.result.bytes
    assert difference(client_state(traced), client_state(plain)) == 0
    assert (plain.result.availability, plain.result.reachable, traced.result.reachable) == (None, None, 1.0)


def _cut(algorithm: str) -> dict[str, Any]:
    return {} if algorithm in ("cl", "fl") else {"cut": "0"}


# The clients are reachable one after another, for a second or two each. For half a second, none of them is.
TURNS = "0,0.5,2,0.02,0.02\n1,1,3,0.01,0.02\n2,2.5,3.5,0.04,0.01\n"


@pytest.mark.parametrize("engine", ["local", "stacked"])
@pytest.mark.parametrize("algorithm", ["sglr", "fl"])
def test_a_run_goes_on_as_if_it_had_not_stopped(algorithm: str, engine: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "clients": 3, "partition": "column", "precision": "float64", "batch": 4, "rounds": 6, "engine": engine,
        "participation": 0.5, "checkpoint_every": 1, "client_optimizer": "sgd", "trace_period": 4.0, **MACHINES,
        **_cut(algorithm),
    }  # fmt: skip
    model, data = make(mlp), source(SIZES, (6,))
    trace = written(tmp_path, TURNS)
    begun = Run(algorithm=algorithm, model=model, data=data, out=tmp_path / "run", trace=trace, **options)
    with pytest.warns(CutlayerWarning, match="no client can be reached"):
        assert next(record for record in begun if record.round == 4)
    resumed = Run.resume(tmp_path / "run", model=model, data=data)
    again = resumed.run()
    whole = Run(algorithm=algorithm, model=model, data=data, trace=trace, **options)
    with pytest.warns(CutlayerWarning, match="no client can be reached"):
        result = whole.run()
    assert again.availability == result.availability
    assert again.virtual_seconds == result.virtual_seconds
    assert difference(client_state(resumed), client_state(whole)) == 0
    found = result.availability
    assert found is not None
    assert found["late_rounds"] > 0
    assert sum(found["rounds"]) >= 6
    assert np.count_nonzero(found["rounds"]) > 1  # not always the same client
    assert max(found["link_seconds"]) > 0
    assert result.link_seconds == pytest.approx(np.mean(found["link_seconds"]))
    assert result.idle_seconds == pytest.approx(np.mean(found["idle_seconds"]))
    Path(trace).write_text(HEAD + always(3), encoding="utf-8")
    with pytest.raises(ConfigError, match="trace_period = 4 ends before"):
        Run.resume(tmp_path / "run", model=model, data=data)
    Path(trace).write_text(HEAD + TURNS.replace("0.04", "0.05"), encoding="utf-8")
    with pytest.raises(RunFolderError, match="made with another trace than now"):
        Run.resume(tmp_path / "run", model=model, data=data).run()


def test_both_engines_draw_and_wait_alike(tmp_path: Path) -> None:
    trace, found = written(tmp_path, TURNS), []
    for engine in ("local", "stacked"):
        with pytest.warns(CutlayerWarning, match="no client can be reached"):
            run = train(
                "sfl",
                make(mlp),
                SIZES,
                (6,),
                cut="0",
                rounds=5,
                engine=engine,
                trace=trace,
                trace_period=4.0,
                **MACHINES,
            )
        assert run.result is not None
        found.append((run.result.availability, run.result.virtual_seconds, run.result.bytes))
    assert found[0] == found[1]


def test_clients_have_the_names_of_the_data(tmp_path: Path) -> None:
    rows = "oslo,0,inf,1,2\n0,0,1,5,6\n 0 ,1,inf,7,8\n\n"
    found = read_trace(written(tmp_path, rows), 2, ("rome", "oslo"))
    assert found.clients[1] == Reachable((0.0,), (math.inf,), (1e6,), (2e6,))
    assert found.clients[0] == Reachable((0.0, 1.0), (1.0, math.inf), (5e6, 7e6), (6e6, 8e6))
    # A name takes precedence over a number. Columns may be in any order, with others between them.
    path = tmp_path / "other.csv"
    path.write_text("\ufeffdown,up,who,to,from,client\n2,1,x,inf,0,1\n4,3,y,inf,0,0\n")
    assert [c.up[0] for c in read_trace(str(path), 2, ("1", "0")).clients] == [1e6, 3e6]


WRONG: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "missing column": ("client,from,to,up\n", {}, "has no column 'down': its first line has to name client, from, to"),
    "column twice": ("client,from,to,up,up,down\n", {}, "has more than one column 'up'"),
    "empty": ("", {}, "has no column 'client'"),
    "no rows": (HEAD, {}, "has no row for client 0, which could never be reached: give it one"),
    "a client without rows": ("0,0,inf,1,1\n2,0,inf,1,1\n", {}, "has no row for client 1"),
    "too few values": ("0,0,inf,1\n", {}, "line 2, has 4 values for 5 columns"),
    "unknown client": ("3,0,inf,1,1\n", {}, "line 2: client = '3' is not one of the run's: the clients are 0 to 2"),
    "no number": ("-1,0,inf,1,1\n", {}, "client = '-1' is not one"),
    "long number": (f"{'9' * 5000},0,inf,1,1\n", {}, r"client = '9{20,40}\S* is not one of the run's"),
    "not numeric": ("0,0,inf,fast,1\n", {}, "up = 'fast' is not a finite number: give Mbit/s as a number of 0 or more"),
    "nan": ("0,nan,inf,1,1\n", {}, "from = 'nan' is not a finite number: give seconds"),
    "infinite rate": ("0,0,inf,1,inf\n", {}, "down = 'inf' is not a finite number"),
    "negative": ("0,-5,inf,1,1\n", {}, "from = '-5' is negative: give seconds"),
    "no rate": ("0,0,inf,0,1\n", {}, "up = 0 carries nothing: give a rate above 0"),
    "no length": ("0,5,5,1,1\n", {}, "from = 5 is not before to = 5: give an interval longer than 0"),
    "backwards": ("0,5,4,1,1\n", {}, "from = 5 is not before to = 4"),
    "overlap": (
        "0,5,inf,1,1\n0,0,6,1,1\n1,0,inf,1,1\n2,0,inf,1,1\n", {},
        "rows of client 0 in lines 3 and 2 overlap, from 5 to 6 s",
    ),
    "starved for good": (
        "0,0,60,1,1\n1,0,inf,1,1\n2,0,inf,1,1\n", {},
        r"leaves client 0 without a link for good after 60 s \(line 2\): let it repeat, e.g. trace_period = 60",
    ),
    "longer than the period": (
        "0,0,60,1,1\n1,0,70,1,1\n2,0,50,1,1\n", {"trace_period": 65.0},
        "trace_period = 65 ends before the row of client 1 in line 3",
    ),
    "not text": ("client\x00,\udcff", {}, "is not a CSV file in UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_trace_is_refused_before_training(name: str, tmp_path: Path) -> None:
    text, options, reason = WRONG[name]
    path = tmp_path / "wrong.csv"
    rows = text[:1].isdigit() or text.startswith("-")
    path.write_bytes(((HEAD if rows else "") + text).encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=reason):
        train("psl", make(mlp), SIZES, (6,), cut="0", trace=str(path), **options, **MACHINES)


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    trace = written(tmp_path, always(10))
    with pytest.raises(ConfigError, match="has no effect without client_device"):
        Run(trace=trace)
    with pytest.raises(ConfigError, match="trace_period = 5 has no effect without trace"):
        Run(trace_period=5.0, **MACHINES)
    for option in ("up_mbps", "down_mbps", "rate_spread"):
        with pytest.raises(ConfigError, match=f"{option} = 2.0 has no effect beside trace"):
            Run(trace=trace, **MACHINES, **{option: 2.0})
    with pytest.raises(ConfigError, match=r"cannot read the trace 'nowhere\.csv': No such file"):
        Run(trace="nowhere.csv", **MACHINES)
    with pytest.raises(ConfigError, match="is for simulations: clients on other machines have links of their own"):
        sides.worker_of(RunConfig(model="mlp", trace=trace, **MACHINES), 0, name="client-0")


def test_a_client_that_may_be_alone_with_one_row_is_found(tmp_path: Path) -> None:
    """The server has batch normalisation. With other clients, the row would be one of several."""
    from torch import nn

    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()
    sizes = [8, 5]
    train("psl", net, sizes, (6,), cut="0", **MACHINES)
    with pytest.raises(ConfigError, match="leaves client 1"):
        train("psl", net, sizes, (6,), cut="0", trace=written(tmp_path, always(2)), **MACHINES)


def test_what_a_trace_meant_is_told(tmp_path: Path) -> None:
    trace = written(tmp_path, "0,0,1,0.5,0.5\n1,1,3,0.5,1\n")
    options = (
        "--clients", "2", "--samples-per-client", "16", "--data", "digits", "--model", "mlp", "--rounds", "2",
        "--client-device", "raspberry-pi-4", "--trace", trace, "--trace-period", "4",
    )  # fmt: skip
    done = call("run", *options, "--out", str(tmp_path / "run"))
    assert "can be reached" in done.stdout
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(stored["availability"]["idle_seconds"]) == 2
    entry = read(tmp_path / "run").entries[0]
    assert line(entry)["availability"][0].endswith(" %")
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("of that for its link") == 2  # the mean, and each client's value
    assert f"<td>{stored['availability']['rounds'][1]}</td>" in page
    compared = Comparison(
        algorithms=("psl", "fl"), seeds=(0,), clients=2, samples_per_client=16, model="mlp", rounds=1, trace=trace,
        trace_period=4.0, client_device="raspberry-pi-4",
    ).run()  # fmt: skip
    assert [row.link_seconds is not None and row.reachable is not None for row in compared] == [True, True]
