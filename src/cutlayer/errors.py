"""Everything Cutlayer raises on purpose, and the exit code of each.

CutlayerError
├── UsageError              the input is wrong; nothing was trained or written (2)
│   ├── ConfigError         an option: unknown, out of range, or without effect on this algorithm
│   │   └── PortInUseError  another program listens at that port (75)
│   ├── DataError           a data set: missing, truncated, wrongly shaped, impossible to partition
│   ├── CutError            a model cannot be cut there, or its parts are not the whole
│   ├── RunFolderError      a run folder: not a run, damaged, or of another configuration
│   │   └── FolderInUseError  another process works in that folder (75)
│   └── RefusedError        one side of a connection does not take the other (2, or 75: see `REFUSALS`)
├── NetworkError            the other side of a connection cannot be reached any more (75)
│   └── LostRankError       another process of the same run is gone (75)
├── DistrustError           the server's gradients are not those of the task, says a client's watch (2)
├── DiskFullError           a disk is full (3)
├── WireError               a message is malformed, too large, of another protocol, or not expected now (1)
│   └── ForbiddenError      the server asks for what the client's own configuration does not permit (2)
│       └── BudgetError     the server asks for more than the client's budget (2)
└── TrainingError           training cannot go on (1)
    ├── AbsentError         clients are missing; the run goes on when they are back (75)
    └── NonFiniteError      NaN or Inf in a loss or a gradient

Every message is one sentence or two: the offending value, the reason, the remedy. The exit codes are those of
`ExitCode`; what a supervisor should do with each is said in docs/deployment.md.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any, ClassVar


class ExitCode(IntEnum):
    """The exit code of a process. WRONG: a person has to do something first. TRY_AGAIN: the same command may succeed
    later without changes; the number is that of EX_TEMPFAIL in sysexits.h.
    """

    DONE = 0
    FAILED = 1
    WRONG = 2
    DISK_FULL = 3
    TRY_AGAIN = 75
    INTERRUPTED = 130


REFUSALS: Mapping[str, ExitCode] = {
    "protocol": ExitCode.WRONG,
    "run": ExitCode.WRONG,
    "token": ExitCode.WRONG,
    "client": ExitCode.WRONG,
    "taken": ExitCode.TRY_AGAIN,  # an earlier connection of the same client has not ended yet
    "full": ExitCode.TRY_AGAIN,  # too many clients wait at once
    "state": ExitCode.WRONG,
    "data": ExitCode.WRONG,
    "model": ExitCode.WRONG,
    "crossing": ExitCode.WRONG,
    "algorithm": ExitCode.WRONG,
    "step": ExitCode.WRONG,
    "codec": ExitCode.WRONG,
    "excluded": ExitCode.WRONG,
    "certificate": ExitCode.WRONG,
}
"""The exit code of a client that is refused, or refuses, for each reason of the message `Refused`, and "certificate".
"""


class CutlayerWarning(UserWarning):
    """Something is done in an unexpected way; the message says why."""


class CutlayerError(Exception):
    """Base of every error that Cutlayer raises on purpose."""

    code: ClassVar[ExitCode] = ExitCode.FAILED

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of the command line."""
        return self.code

    def __reduce__(self) -> tuple[Any, ...]:
        """The same error in another process, however its class is constructed."""
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[CutlayerError], args: tuple[Any, ...], state: dict[str, Any]) -> CutlayerError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class UsageError(CutlayerError):
    """The input is wrong. Raised before anything is trained or written."""

    code = ExitCode.WRONG

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the sentence alone, unless an error of the user's own code is behind it. `%tb` still
        shows where it was raised.
        """
        if self.__cause__ is not None:
            return "".join(traceback.format_exception(self)).splitlines()
        return [f"{type(self).__name__}: {self}"]


class ConfigError(UsageError):
    """An option is unknown, out of range, or has no effect on the chosen algorithm."""


class PortInUseError(ConfigError):
    """Another program listens at that port. It may be an earlier process of this server that is about to end."""

    code = ExitCode.TRY_AGAIN


class DataError(UsageError):
    """A data set is missing, truncated, wrongly shaped, or cannot be partitioned as asked."""


class CutError(UsageError):
    """A model cannot be cut at the named place, or its parts do not equal the whole."""


class RunFolderError(UsageError):
    """A run folder is not a run, is damaged, or belongs to another configuration."""


class FolderInUseError(RunFolderError):
    """Another process works in that folder. It may be an earlier process of this run that is about to end."""

    code = ExitCode.TRY_AGAIN


class RefusedError(UsageError):
    """One side of a connection refuses the other: another run, model or protocol, or a wrong token or certificate.

    `reason` is that of the message `Refused`, or "certificate"; the exit code follows from it.
    """

    def __init__(self, reason: str, sentence: str) -> None:
        self.reason, self.sentence = reason, sentence
        super().__init__(sentence)

    @property
    def exit_code(self) -> ExitCode:
        """The exit code of the reason."""
        return REFUSALS.get(self.reason, self.code)


class NetworkError(CutlayerError):
    """The other side of a connection cannot be reached, or cannot be reached any more."""

    code = ExitCode.TRY_AGAIN


class LostRankError(NetworkError):
    """Another of the processes that train one run together is gone, or does not answer."""


class DistrustError(CutlayerError):
    """A client's watch says that the server's gradients are not those of the task, and the client was told to leave.

    A person has to look at this. If the client were restarted automatically, it would give such a server more data.
    """

    code = ExitCode.WRONG


class DiskFullError(CutlayerError):
    """A disk is full, or a quota is used up. What was being written is removed; what was there before remains."""

    code = ExitCode.DISK_FULL


class WireError(CutlayerError):
    """A message between server and client is malformed, too large, of another protocol, or not expected now."""


class ForbiddenError(WireError):
    """The server asks a client for something that the client's own configuration does not permit.

    Nothing was answered, and the client leaves. Starting again does not help: a person has to look at this.
    """

    code = ExitCode.WRONG


class BudgetError(ForbiddenError):
    """The server asks for more than the client's budget."""


class TrainingError(CutlayerError):
    """Training cannot go on."""


class AbsentError(TrainingError):
    """Clients that the run needs are missing. It continues from its checkpoint when they are back."""

    code = ExitCode.TRY_AGAIN


class StepLostError(AbsentError):
    """All `clients` of a step were lost during the step, so it did not happen."""

    def __init__(self, clients: tuple[int, ...]) -> None:
        self.clients = clients
        super().__init__(
            f"clients {', '.join(map(str, clients))} were lost before they could finish a step: the run goes on where "
            "others are there"
        )


class NonFiniteError(TrainingError):
    """NaN or Inf appeared in a loss or a gradient.

    `what` says where ("loss", "cut gradient", "weight gradient"), `clients` are those whose rows or weights were
    affected, and `step` is the step of the run (before the error reaches the run loop: of the client's local steps, if
    any).
    """

    def __init__(self, what: str, clients: tuple[int, ...] = (), step: int | None = None) -> None:
        self.what, self.clients, self.step = what, clients, step
        whose = f" of client{'s' if len(clients) > 1 else ''} {', '.join(map(str, clients))}" if clients else ""
        when = f" at step {step}" if step is not None else ""
        super().__init__(
            f"the {what}{whose} is NaN or Inf{when}: try lower rates (client_lr, server_lr, or alpha, which "
            "multiplies the server's rate), and look for NaN or very large values in that client's inputs"
        )

    def at(self, step: int) -> NonFiniteError:
        """The same error with the step at which it happened."""
        return NonFiniteError(self.what, self.clients, step)


def unknown(kind: str, value: str, known: Iterable[str]) -> str:
    """The sentence for an unknown name: the value, the nearest known name, all known names."""
    names = list(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {value!r}: {hint}known: {', '.join(names)}"
