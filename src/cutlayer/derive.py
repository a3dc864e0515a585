"""Writes what is derived from the registrations: `index.json`, `keywords.py`, docs/options.md, and the table of what
leaves a client in docs/security.md.

    python -m cutlayer.derive            # or: make derive

A test compares the files with what would be written.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from cutlayer import plugins
from cutlayer.algorithms.contract import traits_of
from cutlayer.options import CommonConfig, CompareConfig, PlanConfig, RunConfig, about
from cutlayer.plugins import Entry, Option
from cutlayer.verbs import LEAVING

_PACKAGE = Path(__file__).parent
KEYWORDS = _PACKAGE / "keywords.py"
_DOCS = _PACKAGE.parents[1] / "docs"
OPTIONS, SECURITY = _DOCS / "options.md", _DOCS / "security.md"
_BEGIN, _END = "<!-- what leaves a client: written by `make derive` -->\n", "<!-- end -->\n"
_WORDS = {
    "algorithm": "Algorithms",
    "partition": "Partitions",
    "schedule": "Schedules of the learning rates",
    "averaging": "Averaging rules",
    "screening": "Screenings of rows",
    "model": "Models",
    "data": "Data sets",
    "format": "Formats of your own data",
    "codec": "Codecs",
    "defence": "Defences of the smashed data",
    "attack": "Attacks of simulated clients",
    "logger": "Loggers",
    "search": "Searches of a comparison that tunes",
}


def keywords() -> str:
    """The text of `keywords.py`: the options of runs and comparisons as typed keywords, for editors and checkers."""
    lines = [
        '"""The options of runs and comparisons as typed keywords. Written by cutlayer.derive: do not edit."""',
        "",
        "from __future__ import annotations",
        "",
        "from typing import Any, Literal, TypedDict",
        "",
    ]
    for name, config, skipped in (
        ("CommonKeywords", CommonConfig, {"data", "loss", "metrics", "model"}),
        ("RunKeywords", RunConfig, set(CommonConfig.model_fields)),
        ("CompareKeywords", CompareConfig, set(CommonConfig.model_fields)),
    ):
        common = config is CommonConfig
        base = "TypedDict" if common else "CommonKeywords"
        what = {"CommonKeywords": "a run or comparison", "RunKeywords": "a run", "CompareKeywords": "a comparison"}[
            name
        ]
        lines += ["", f"class {name}({base}, total=False):", f'    """Keywords of {what}."""', ""]
        for option, info in config.model_fields.items():
            if option not in skipped:
                lines.append(f"    {option}: {_shown(option, info.annotation)}")
        lines += [
            f"    {o.name}: {_shown(o.name, o.annotation)}"
            for o in (_specific() if common else ())
            if o.name not in skipped
        ]
        lines.append("")
    return "\n".join(lines)


_OBJECTS = {"algorithm", "partition", "lr_schedule", "server_lr_schedule", "defences", "algorithms"}
_OBJECTS |= {"client_optimizer", "server_optimizer", "averaging", "screening", "log_to"}


def _shown(name: str, annotation: Any) -> str:
    """A type as it is written in a program. Options that also accept objects are Any."""
    if name in _OBJECTS:
        return "Any"
    if name == "param_groups":
        return "tuple[dict[str, Any], ...]"
    if name.endswith("_options"):
        return "dict[str, Any] | None" if "None" in str(annotation) else "dict[str, Any]"
    return _type(annotation)


def _type(annotation: Any) -> str:
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is Any:
        return "Any"
    origin, args = get_origin(annotation), get_args(annotation)
    if str(origin) == "typing.Literal":
        return f"Literal[{', '.join(map(_quoted, args))}]"
    if origin is tuple:
        return f"tuple[{_type(args[0])}, ...]"
    if origin is dict:
        return f"dict[{_type(args[0])}, {_type(args[1])}]"
    if origin is not None:  # a union
        return " | ".join(map(_type, args))
    return str(annotation.__name__)


def _quoted(word: str) -> str:
    return f'"{word}"'


def _specific() -> Iterator[Option]:
    """The options of all things of this package, each once."""
    seen = set(CommonConfig.model_fields)
    for entry in plugins.flat():
        for option in entry.options:
            if option.name not in seen:
                seen.add(option.name)
                yield option


def options() -> str:
    """The text of docs/options.md: every option, with its default and meaning."""
    lines = [
        "# Options",
        "",
        "Written by `make derive` from the declarations. Every option is a flag (`--lr-schedule`), a TOML key",
        "(`lr_schedule`) and a keyword of `cutlayer.Run`. An option that has no effect on what is chosen is an error.",
        "",
    ]
    for title, config in (
        ("Of every run", RunConfig),
        ("Of a comparison, besides", CompareConfig),
        ("Of a plan", PlanConfig),
    ):
        skipped = set(CommonConfig.model_fields) if config is not RunConfig else set[str]()
        lines += [f"## {title}", "", "| option | default | what it does |", "|---|---|---|"]
        for name, info in config.model_fields.items():
            if name not in skipped and about(info, "group"):
                lines.append(f"| `{name}` | {_default(info.get_default())} | {_meaning(info.description)} |")
        lines.append("")
    for kind, word in _WORDS.items():
        lines += [f"## {word}", ""]
        for entry in plugins.index(kind).values():
            lines += [*_section(entry), ""]
    return "\n".join(lines).rstrip() + "\n"


def _section(entry: Entry) -> list[str]:
    paper = f" ({entry.facts['paper']})" if entry.facts.get("paper") else ""
    lines = [f"**{entry.name}**{paper}: {(entry.summary or entry.title).rstrip('.')}."]
    if entry.options:
        lines += ["", "| option | default | what it does |", "|---|---|---|"]
        lines += [f"| `{o.name}` | {_default(o.default)} | {_meaning(o.help)} |" for o in entry.options]
    return lines


def _meaning(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _default(value: Any) -> str:
    if value is None or value in ((), {}):
        return ""
    return f"`{', '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def leaving() -> str:
    """The table of docs/security.md: what each algorithm takes from a client, and what the client receives."""
    lines = [f"| algorithm | {' | '.join(LEAVING)} | arrives |", "|" + "---|" * (len(LEAVING) + 2)]
    for entry in plugins.index("algorithm").values():
        traits = traits_of(entry)
        given = [traits.leaving.get(word, "") for word in LEAVING]
        lines.append(f"| {entry.name} | {' | '.join(given)} | {', '.join(traits.arriving)} |")
    return "\n".join(lines) + "\n"


def security(text: str) -> str:
    """The text of docs/security.md, with the table as it is derived."""
    before, _, rest = text.partition(_BEGIN)
    return f"{before}{_BEGIN}{leaving()}{_END}{rest.partition(_END)[2]}"


def write() -> list[Path]:
    """Write all derived files, and return their paths."""
    paths = [plugins.write_index()]
    for path, text in ((KEYWORDS, keywords()), (OPTIONS, options())):
        if path.parent.is_dir():  # there are no docs beside an installed package
            path.write_text(text, encoding="utf-8")
            paths.append(path)
    if SECURITY.is_file():
        SECURITY.write_text(security(SECURITY.read_text(encoding="utf-8")), encoding="utf-8")
        paths.append(SECURITY)
    return paths


if __name__ == "__main__":
    for written in write():
        print(written)  # noqa: T201
