"""`list`: what there is to choose from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rich.text import Text

from cutlayer.catalog import ALGORITHMS, DATA_FORMATS, DATASETS, MODELS
from cutlayer.cli.application import app, out
from cutlayer.cli.printing import print_table
from cutlayer.options import applicable

if TYPE_CHECKING:
    from cutlayer.costs.profiles import Profiles


@app.command(name="list", sort_key=7)
def list_(what: Literal["all", "algorithms", "data", "models", "profiles"] = "all", /) -> None:
    """Name the algorithms with their options, the data sets and formats, the models with their cut points, and the
    profiles of devices and links with their figures.

    Parameters
    ----------
    what
        Which of them.
    """
    for name, show in _SHOWN.items():
        if what in ("all", name):
            show()


def _print_algorithms() -> None:
    rows = [(n, i.title, i.summary, ", ".join(sorted(i.options))) for n, i in ALGORITHMS.items()]
    print_table("Algorithms", ("name", "title", "what it does", "options of its own"), rows)
    shared = sorted(applicable("psl") - ALGORITHMS["psl"].options)
    out.print(f"All that cut the model also have: {', '.join(shared)}; fl has participation and start.\n")


def _print_data() -> None:
    print_table("Data sets", ("name", "what it is"), [(n, i.summary) for n, i in DATASETS.items()])
    print_table("Formats of your own data", ("--data-format", "what it is"), DATA_FORMATS.items())


def _print_models() -> None:
    rows = [(n, i.summary, ", ".join(i.cuts), i.default_cut) for n, i in MODELS.items()]
    print_table("Models", ("name", "what it is", "cut points, in order", "default"), rows)


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
    "data": _print_data,
    "models": _print_models,
    "profiles": _print_profiles,
}
