"""The command line. Heavy imports happen inside the commands: `--help` and `list` answer at once."""

from __future__ import annotations

import sys
import warnings
from typing import NoReturn

from cyclopts import CycloptsError, UnusedCliTokensError
from cyclopts import ValidationError as FlagError
from pydantic import ValidationError

from cutlayer.allocator import keep_memory
from cutlayer.cli import (  # noqa: F401  (importing them registers their commands)
    certs_command,
    leakage_command,
    listing,
    network_commands,
    planning_commands,
    reproduce_command,
    training_commands,
)
from cutlayer.cli.application import app
from cutlayer.cli.printing import fail, show_warning
from cutlayer.errors import CutlayerError
from cutlayer.options import CompareConfig, FaultConfig, PlanConfig, RunConfig, explain

__all__ = ["app", "main"]


def main() -> NoReturn:
    """Run the command line: one clear sentence on stderr and an exit code for everything that goes wrong."""
    keep_memory()
    warnings.showwarning = show_warning
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        fail(_flag_sentence(error), 2)
    except CutlayerError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    sys.exit(0)


def _flag_sentence(error: CycloptsError) -> str:
    """One sentence for a flag that cyclopts or a field's range refused."""
    cause = error.__cause__
    if isinstance(error, FlagError) and isinstance(cause, ValidationError):
        models = (CompareConfig, FaultConfig, PlanConfig)
        return str(explain(cause, next((m for m in models if m.__name__ in cause.title), RunConfig)))
    if isinstance(error, UnusedCliTokensError):
        return f"unexpected {' '.join(error.unused_tokens or [])!r}: values follow their option, see `cutlayer --help`"
    return str(error).strip()
