"""Everything Cutlayer raises on purpose.

CutlayerError
├── UsageError              the input is wrong; nothing was trained or written (exit code 2)
│   ├── ConfigError         an option: unknown, out of range, or without effect on this algorithm
│   ├── DataError           a data set: missing, truncated, wrongly shaped, impossible to partition
│   ├── CutError            a model cannot be cut there, or its parts are not the whole
│   ├── RunFolderError      a run folder: in use, not a run, or of another configuration
│   └── RefusedError        one side of a connection does not take the other
├── NetworkError            the other side of a connection cannot be reached any more (exit code 1)
├── DistrustError           the server's gradients are not those of the task, says a client's watch (exit code 1)
├── DiskFullError           a disk is full (exit code 3)
├── WireError               a message is malformed, too large, of another protocol, or not expected now
└── TrainingError           training cannot go on (exit code 1)
    └── NonFiniteError      NaN or Inf in a loss or a gradient

Every message is one sentence or two: the offending value, the reason, the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CutlayerWarning(UserWarning):
    """Something is done in another way than one would expect; the message says why."""


class CutlayerError(Exception):
    """Base of every error that Cutlayer raises on purpose."""

    exit_code = 1


class UsageError(CutlayerError):
    """The input is wrong. Raised before anything is trained or written."""

    exit_code = 2


class ConfigError(UsageError):
    """An option is unknown, out of range, or has no effect on the chosen algorithm."""


class DataError(UsageError):
    """A data set is missing, truncated, wrongly shaped, or cannot be partitioned as asked."""


class CutError(UsageError):
    """A model cannot be cut at the named place, or its parts do not equal the whole."""


class RunFolderError(UsageError):
    """A run folder is in use, is not a run, or belongs to another configuration."""


class RefusedError(UsageError):
    """One side of a connection does not take the other: another run, model or protocol, a wrong token or certificate.

    `reason` is that of the message `Refused`, or "certificate".
    """

    def __init__(self, reason: str, sentence: str) -> None:
        self.reason, self.sentence = reason, sentence
        super().__init__(sentence)


class NetworkError(CutlayerError):
    """The other side of a connection cannot be reached, or cannot be reached any more."""


class DistrustError(CutlayerError):
    """A client's watch says that the server's gradients are not those of the task, and the client was told to leave."""


class DiskFullError(CutlayerError):
    """A disk is full, or a quota is used up. What was being written is removed; what was there before remains."""

    exit_code = 3


class WireError(CutlayerError):
    """A message between server and client is malformed, too large, of another protocol, or not expected now."""


class TrainingError(CutlayerError):
    """Training cannot go on."""


class NonFiniteError(TrainingError):
    """NaN or Inf appeared in a loss or a gradient.

    `what` says where ("loss", "cut gradient", "weight gradient"), `clients` whose rows or weights,
    `step` at which step of the run (while it is on its way to the run loop: of the client's local steps, if any).
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
