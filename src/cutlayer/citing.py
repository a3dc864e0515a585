"""The parts of a run that have something to cite; `references` makes BibTeX of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cutlayer import attacks, plugins
from cutlayer.options import NAMING, RunConfig
from cutlayer.plugins import Entry
from cutlayer.references import Used, references
from cutlayer.wire.codecs.writing import Codec

_OPTIMIZERS = {
    "adam": "arXiv 1412.6980",
    "adamax": "arXiv 1412.6980",
    "adamw": "arXiv 1711.05101",
    "radam": "arXiv 1908.03265",
    "adadelta": "arXiv 1212.5701",
}


def used_by(
    config: RunConfig, metrics: Iterable[str], data: Iterable[str] = (), own: Mapping[str, str] | None = None
) -> list[Used]:
    """What a run used, in plain values that its folder keeps: the things that its options choose, the reported
    `metrics`, and the citations of the `data`. `own` are the names of a model and data that were given as objects from
    Python.
    """
    resolved, given = config.resolved(), dict(own or {})
    found = [_noted(entry) for entry in _entries(config, resolved, given)]
    found += [_noted(entry) for name in metrics if (entry := plugins.index("metric").get(name)) and _says(entry)]
    for cited in data:
        library = cited if cited in references() else ""
        found.append(_used("data", config.data, paper="" if library else cited, library=library))
    if not any(used["kind"] == "data" and used["paper"] for used in found):
        given.setdefault("data", str(config.data))
    found += [_used(kind, name, own=True) for kind, name in given.items() if not any(_is(u, kind) for u in found)]
    for role in ("client_optimizer", "server_optimizer"):
        name = str(resolved.get(role) or "")
        found += [_used("optimizer", name, paper=_OPTIMIZERS[name])] if name in _OPTIMIZERS else []
    if config.logit_adjust != "none":
        found.append(_used("option", "logit_adjust", paper="arXiv 2007.07314"))
    if config.specific.get("lora_rank"):
        found.append(_used("option", "lora_rank", paper="arXiv 2106.09685", library="peft"))
    return [used for number, used in enumerate(found) if used not in found[:number]]


def _is(used: Used, kind: str) -> bool:
    """Whether this is the citation of the model or the data. Libraries that read data are not."""
    return used["kind"] == kind and bool(used["paper"] or used["own"])


def _entries(config: RunConfig, resolved: Mapping[str, Any], own: Iterable[str]) -> Iterator[Entry]:
    """The things that the options choose, if they have an effect and a citation."""
    yield plugins.find("algorithm", config.algorithm)
    for option, kind in NAMING.items():
        value = resolved.get(option)
        if value and option not in ("algorithm", "algorithms", "log_to", *own):
            for name in [value] if isinstance(value, str) else value:
                entry = _entry(kind, str(name))
                if entry is not None and _says(entry):
                    yield entry
    yield from (entry for entry in config.chosen() if entry.kind == "defence")
    yield from (type(made).entry for made in attacks.of(config).made)


def _entry(kind: str, name: str) -> Entry | None:
    """The thing that a value names; None for a path, for torch's own names, and for options that are handled
    elsewhere.
    """
    if kind == "codec":
        return getattr(type(Codec.parse(name)), "entry", None)
    if kind in ("attack", "defence", "head"):
        return None
    known = plugins.known(kind, name) or plugins.is_reference(name)
    return plugins.find(kind, name) if known else None


def _says(entry: Entry) -> bool:
    """Whether a thing has a paper or a library, or is the user's own."""
    return bool(entry.facts.get("paper") or entry.facts.get("library")) or _is_own(entry)


def _is_own(entry: Entry) -> bool:
    return not entry.where.startswith("cutlayer.")


def _noted(entry: Entry) -> Used:
    facts = entry.facts
    return _used(
        entry.kind,
        entry.name,
        paper=facts.get("paper") or "",
        library=facts.get("library") or "",
        own=_is_own(entry) or bool(facts.get("argument")),
    )


def _used(kind: str, name: str, *, paper: str = "", library: str = "", own: bool = False) -> Used:
    return {"kind": kind, "name": name, "paper": paper, "library": library, "own": "yes" if own else ""}
