"""The command line. Heavy imports are inside the commands, so `--help` and `list` answer at once."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cyclopts import App, CycloptsError, UnknownOptionError, UnusedCliTokensError
from cyclopts import ValidationError as FlagError
from pydantic import ValidationError

from cutlayer import __version__
from cutlayer.allocator import keep_memory
from cutlayer.cli import (  # noqa: F401  (importing them registers their commands)
    certs_command,
    leakage_command,
    listing,
    network_commands,
    planning_commands,
    reproduce_command,
    trained_commands,
    training_commands,
)
from cutlayer.cli.application import HELP
from cutlayer.cli.flags import COMMANDS, flags_of, own_things
from cutlayer.cli.launched import said_elsewhere
from cutlayer.cli.printing import fail, show_warning
from cutlayer.errors import CutlayerError
from cutlayer.files import is_full, unwritable
from cutlayer.options import CommonConfig, RunConfig, called_here, owners_of
from cutlayer.plugins import Entry, explain, load, positional

__all__ = ["application", "main"]

DEBUG = "--debug"  # of every command: the traceback too
HELP_ALL = "--help-all"  # of every command: all options, not only those that are needed first


def application(own: Sequence[Entry] = (), *, wide: bool = False) -> App:
    """All commands, with the options of the user's `own` things among their flags; `wide` help shows all of them."""
    app = App(name="cutlayer", version=__version__, help=HELP, help_format="markdown")
    for command in COMMANDS:
        command.add_to(app, own, wide=wide)
    return app


def main() -> NoReturn:
    """Run the command line. Every error gives one clear sentence on stderr and an exit code."""
    keep_memory()
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed here: pictures are drawn off screen
    warnings.showwarning = show_warning
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode shows ? for missing characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    words, own, missing = [word for word in sys.argv[1:] if word != DEBUG], list[Entry](), list[CutlayerError]()
    wide = HELP_ALL in words
    words = ["--help" if word == HELP_ALL else word for word in words]
    try:
        own, missing = own_things(words)
        application(own, wide=wide)(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        if said_elsewhere(error, words):
            sys.exit(2)
        # A thing that cannot be found has no flags, so the flags are not the error.
        fail(str(missing[0]) if missing else _flag_sentence(error, own), 2)
    except CutlayerError as error:
        if said_elsewhere(error, words):
            sys.exit(error.exit_code)
        if DEBUG in sys.argv:
            traceback.print_exception(error)
        more = f"; {DEBUG} shows the traceback" if error.__cause__ is not None and DEBUG not in sys.argv else ""
        fail(f"{error}{more}", error.exit_code)
    except OSError as error:
        if not is_full(error):
            raise
        full = unwritable(Path(error.filename or "."), error)
        fail(str(full), full.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    sys.exit(0)


def _flag_sentence(error: CycloptsError, own: Sequence[Entry]) -> str:
    """One sentence for a flag that cyclopts or a field's range refused."""
    cause = error.__cause__
    if isinstance(error, FlagError) and isinstance(cause, ValidationError):
        models = {m.__name__: m for command in COMMANDS for m in command.flags.values()}
        config = next((m for name, m in models.items() if name in cause.title), RunConfig)
        return str(explain(cause, flags_of(config, own)))
    if isinstance(error, UnknownOptionError) and (sentence := _elsewhere(error, own)):
        return sentence
    if isinstance(error, UnusedCliTokensError):
        unused = error.unused_tokens or []
        if unused and {word.lower() for word in unused} <= {"true", "false", "yes", "no", "on", "off"}:
            return f"unexpected {' '.join(unused)!r}: --NAME switches an option on and --no-NAME off, without a value"
        return f"unexpected {' '.join(unused)!r}: values follow their option, see `cutlayer --help`"
    return str(error).strip()


def _elsewhere(error: UnknownOptionError, own: Sequence[Entry]) -> str:
    """The sentence for a flag that has another name here, that is a parameter but not an option of the user's `own`
    things, or that belongs to an installed thing that is not chosen.
    """
    flag = (error.token.keyword or error.token.value or "").partition("=")[0]
    name = flag.removeprefix("--").replace("-", "_")
    known = [flag.removeprefix("--").replace("-", "_") for a in error.argument_collection for flag in a.names]
    if sentence := called_here(name, known, flags=True):
        return sentence
    if near := [entry.name for entry in own if name in positional(load(entry.kind, entry.name))]:
        return f"{name!r} is a parameter of {near[0]}, but not an option: write it behind a *, as in (*, {name}=...)"
    owners = [e.name for e in owners_of(name) if e.kind in CommonConfig.kinds]
    if not owners or "partition" not in known:  # of a command that chooses no things
        return ""
    return f"{flag} has no effect here: it belongs to {', '.join(owners)}; leave it out or choose one of these"
