"""`list`: everything that can be chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rich.text import Text

from cutlayer import plugins
from cutlayer.cli.application import out
from cutlayer.cli.flags import command
from cutlayer.cli.printing import print_table
from cutlayer.options import CommonConfig, about
from cutlayer.plugins import Entry

if TYPE_CHECKING:
    from cutlayer.costs.profiles import Profiles

What = Literal[
    "all",
    "algorithms",
    "tasks",
    "metrics",
    "data",
    "formats",
    "partitions",
    "models",
    "schedules",
    "averagings",
    "screenings",
    "codecs",
    "defences",
    "attacks",
    "loggers",
    "searches",
    "profiles",
]


@command(sort_key=7, name="list")
def list_(what: What = "all", /) -> None:
    """List everything that you can choose: algorithms, tasks, metrics, data sets, models and so on, with their options.

    Models are listed with their cut points, and profiles of devices and links with their figures. Things from installed
    packages are listed, too.

    Parameters
    ----------
    what
        What to list.
    """
    for name, show in _SHOWN.items():
        if what in ("all", name):
            show()


def _print_algorithms() -> None:
    rows = [(e.name, e.title, e.summary, _options(e), e.facts["paper"]) for e in plugins.listing("algorithm")]
    print_table("Algorithms", ("name", "title", "what it does", "options of its own", "paper"), rows)
    split = [n for n, f in CommonConfig.model_fields.items() if about(f, "when") == "split"]
    out.print(f"All that cut the model also have: {', '.join(split)}.\n")


def _print_models() -> None:
    rows = [
        (e.name, e.summary, ", ".join(e.facts.get("cuts", ())), e.facts.get("default_cut") or "", _options(e))
        for e in plugins.listing("model")
    ]
    print_table("Models", ("name", "what it is", "cut points, in order", "default", "options of its own"), rows)


def _print_kind(kind: str, title: str, names: str = "name") -> None:
    entries = list(plugins.listing(kind))
    rows = [(e.name, e.summary, _options(e)) for e in entries]
    if any(e.options for e in entries):
        print_table(title, (names, "what it is", "options of its own"), rows)
    else:
        print_table(title, (names, "what it is"), [row[:2] for row in rows])


def _options(entry: Entry) -> str:
    return ", ".join(o.name for o in entry.options)


def _print_profiles() -> None:
    """Print the figures of devices and links with their sources."""
    from cutlayer.costs.profiles import Profiles

    found = Profiles.load()
    _print_devices(found)
    out.print()
    _print_links(found)
    out.print(Text("\nYour own: --profiles FILE, a TOML file with tables [device.NAME] and [link.NAME]."))


def _print_devices(profiles: Profiles) -> None:
    devices = profiles.devices.values()
    rows = [
        (
            d.name,
            d.title,
            _figure(d.flops_per_second / 1e9, "GFLOP/s"),
            _figure(d.watts, "W"),
            _figure(d.idle_watts, "W"),
        )
        for d in devices
    ]
    print_table("Devices", ("name", "what it is", "speed", "power", "idle"), rows)
    for d in devices:
        out.print(Text(f"{d.name}: {d.basis}; {d.source}"), soft_wrap=True)
    out.print()
    _print_rates(profiles)


def _print_rates(profiles: Profiles) -> None:
    """Print the devices' speeds in other precisions than float32."""
    from cutlayer.costs.profiles import Rates

    found = [d for d in profiles.devices.values() if d.rates != Rates()]
    precisions = tuple(Rates.model_fields)
    rows = [(d.name, *(_gflops(getattr(d.rates, p)) for p in precisions)) for d in found]
    print_table("Speeds in other precisions, in GFLOP/s", ("name", *precisions), rows)
    for d in found:
        if d.rates_source:
            out.print(Text(f"{d.name}: {d.rates_source}"), soft_wrap=True)
    out.print(
        Text("If a speed is not known, the device's speed above is used, which stands for float32."), soft_wrap=True
    )


def _gflops(rate: float | None) -> str:
    return "not known" if rate is None else f"{rate / 1e9:,g}"


def _print_links(profiles: Profiles) -> None:
    links = profiles.links.values()
    rows = [
        (
            p.name,
            _figure(p.up_mbps, "Mbit/s"),
            _figure(p.down_mbps, "Mbit/s"),
            _figure(p.latency_ms, "ms"),
            _power(p.up_watts, p.up_watts_per_mbps),
            _power(p.down_watts, p.down_watts_per_mbps),
        )
        for p in links
    ]
    print_table("Links", ("name", "up", "down", "latency", "W sending at R Mbit/s", "W receiving"), rows)
    for p in links:
        out.print(Text(f"{p.name}: {p.title}; {p.source}"), soft_wrap=True)


def _figure(value: float | None, unit: str) -> str:
    return "not known" if value is None else f"{value:g} {unit}"


def _power(base: float | None, per_mbps: float | None) -> str:
    """The power of a radio that sends or receives at R Mbit/s."""
    return "not known" if base is None or per_mbps is None else f"{base:g} + {per_mbps:g} R"


_SHOWN = {
    "algorithms": _print_algorithms,
    "tasks": lambda: _print_kind("task", "Tasks", "--task"),
    "metrics": lambda: _print_kind("metric", "Metrics", "--metrics"),
    "data": lambda: _print_kind("data", "Data sets"),
    "formats": lambda: _print_kind("format", "Formats of your own data", "--data-format"),
    "partitions": lambda: _print_kind("partition", "Partitions"),
    "models": _print_models,
    "schedules": lambda: _print_kind("schedule", "Schedules of the learning rates", "--lr-schedule"),
    "averagings": lambda: _print_kind("averaging", "Averaging rules", "--averaging"),
    "screenings": lambda: _print_kind("screening", "Screenings of rows", "--screening"),
    "codecs": lambda: _print_kind("codec", "Codecs", "--up-codec, --down-codec"),
    "defences": lambda: _print_kind("defence", "Defences of the smashed data"),
    "attacks": lambda: _print_kind("attack", "Attacks of simulated clients", "--attack"),
    "loggers": lambda: _print_kind("logger", "Loggers", "--log-to"),
    "searches": lambda: _print_kind("search", "Searches of a comparison that tunes", "tuning.how"),
    "profiles": _print_profiles,
}
