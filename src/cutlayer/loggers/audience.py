"""The loggers and callbacks of one run, in order, and what happens if one of them fails."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

from cutlayer import plugins
from cutlayer.data.own import own_code, place_of
from cutlayer.errors import ConfigError, CutlayerError, CutlayerWarning
from cutlayer.loggers.listening import Logger, RunStart

if TYPE_CHECKING:
    from cutlayer.run import Record, Result, Scores

_HOOKS = ("on_begin", "on_step", "on_evaluate", "on_end")


class Choosing(Protocol):
    """A configuration, as far as loggers are named in it."""

    @property
    def log_to(self) -> tuple[str, ...]:
        """The loggers' names."""

    def thing(self, kind: str, reference: str) -> Any:
        """A thing that is named, with its options."""

    def options_of(self, entry: plugins.Entry) -> dict[str, Any]:
        """The values of a thing's options."""


class Audience:
    """The loggers and callbacks of one run, by what they are called in messages.

    One that fails when the run begins ends it, with a ConfigError, before anything is trained. One that fails later is
    not called again: a warning says so, and training continues. An error of Cutlayer's own that a callback raises ends
    the run at any time.
    """

    def __init__(self, listeners: Mapping[str, object]) -> None:
        self._all, self._hearing = dict(listeners), dict[str, object]()

    @classmethod
    def of(cls, config: Choosing, callbacks: Sequence[object] = ()) -> Self:
        """The loggers that the configuration names, then `callbacks`. Raises ConfigError for an object without
        hooks.
        """
        if isinstance(callbacks, str) or not isinstance(callbacks, Sequence):
            raise ConfigError(
                f"callbacks = {callbacks!r} is not a list of objects: give callbacks=[...], and name loggers with "
                "log_to"
            )
        for name in config.log_to:
            if config.log_to.count(name) > 1:
                raise ConfigError(f"log_to names {name!r} twice: name it once")
        named = {f"the logger {name!r}": _logger(config, name) for name in config.log_to}
        return cls(named | {f"callback {n} ({type(c).__name__})": _checked(c) for n, c in enumerate(callbacks, 1)})

    def begin(self, run: RunStart) -> None:
        """Tell all that the run begins. Raises ConfigError if one fails; the others are then told that the run has
        ended.
        """
        for who, listener in self._all.items():
            try:
                with own_code(listener, who):
                    _tell(listener, "on_begin", run)
            except CutlayerError:
                raise
            except Exception as error:  # a logger of this package, or what it writes with
                raise ConfigError(
                    f"{who} cannot start ({_reason(error)}): correct that, or leave it out of log_to"
                ) from error
            self._hearing[who] = listener

    def step(self, record: Record) -> None:
        """Report a step to all that listen to steps."""
        for who, listener in self._told():
            if not isinstance(listener, Logger) or record.step % listener.log_every == 0:
                self._try(who, listener, "on_step", record)

    def evaluate(self, scores: Scores) -> None:
        """Report an evaluation."""
        for who, listener in self._told():
            self._try(who, listener, "on_evaluate", scores)

    def end(self, result: Result | None) -> None:
        """Report the end to all that were told of the beginning."""
        for who, listener in self._told():
            self._try(who, listener, "on_end", result)
        self._hearing.clear()

    def _told(self) -> Iterator[tuple[str, object]]:
        yield from list(self._hearing.items())

    def _try(self, who: str, listener: object, hook: str, what: object) -> None:
        try:
            _tell(listener, hook, what)
        except CutlayerError:
            raise
        except Exception as error:  # a user's code, or a service that is not available: any error is possible
            self._hearing.pop(who, None)
            warnings.warn(
                f"{who} failed in {hook}{place_of(listener, error)} ({_reason(error)}): it is not called again in this "
                "run, which continues",
                CutlayerWarning,
                stacklevel=3,
            )


def _tell(listener: object, hook: str, what: object) -> None:
    if (method := getattr(listener, hook, None)) is not None:
        method(what)


def _reason(error: Exception) -> str:
    first = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _logger(config: Choosing, name: str) -> object:
    """A logger of that name, with its options, made for one run."""
    made = config.thing("logger", name)
    entry = plugins.find("logger", name)
    if isinstance(made, plugins.Thing):
        made.check(frozenset(entry.option_names))
        return _checked(made)
    with own_code(made, f"making the logger {name!r}"):
        return _checked(made(**config.options_of(entry)))


def _checked(listener: object) -> object:
    """`listener`, which has a hook. Raises ConfigError."""
    if isinstance(listener, type) or not any(callable(getattr(listener, hook, None)) for hook in _HOOKS):
        raise ConfigError(
            f"{listener!r} cannot be a callback: give an object with a method {', '.join(_HOOKS[:-1])} or {_HOOKS[-1]}"
        )
    return listener
