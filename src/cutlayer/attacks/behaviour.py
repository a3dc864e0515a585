"""What an attack is: the values that a hostile client sends instead of the correct ones. Simulations only.

A configuration names attacks with the clients that make them: `attack = ["scale:1e6@3", "labels@0,4-6"]`, that is
NAME:PARAMETER@CLIENTS. An attack of your own is a subclass of `Attack` under `@attack("name")`, in a file that the
configuration names: `path/to/file.py:Name:2.5@3`.

Apart from its attack, a hostile client behaves like all others: it draws the same batches, and its messages have the
same shapes and sizes. Draws are named by client, round and step, so every engine draws the same numbers. Numbers that
overflow become the largest ones of their type, since a client that sends numbers that are not finite would be noticed.

Shape legend: b rows of a client's batch, s... the shape of one row, d numbers of a model (parameters and real buffers).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from cutlayer import plugins
from cutlayer.errors import ConfigError
from cutlayer.verbs import BACKWARD, Traits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cutlayer.types import Rows

_ACTS = ("rows", "gradient", "update", "targets")
_MEANT = {
    "rows": "smashed data",
    "gradient": "cut gradients",
    "update": "models that leave a client",
    "targets": "targets",
}


@dataclass(frozen=True)
class Attack:
    """Base of attacks: an honest client. A subclass says what the client does instead.

    `parameter` is the number after the attack's name; without one it is the class's `default`.
    """

    entry: ClassVar[plugins.Entry]
    default: ClassVar[float] = 1.0

    parameter: float

    def check(self) -> None:
        """Raises ConfigError if the parameter is not possible."""

    def rows(self, rows: Rows, draw: torch.Generator) -> Rows:
        """The rows that are sent instead of smashed data (in the U-shape, also instead of gradients of features): real
        rows, [b, s...].
        """
        return rows

    def gradient(self, gradient: Rows, draw: torch.Generator) -> Rows:
        """The gradient that the client uses instead of the received cut gradient: each [b, s...]."""
        return gradient

    def update(self, update: Tensor, draw: torch.Generator) -> Tensor:
        """The update that the client sends when its model is averaged or moves on, instead of the true one: [d],
        float64. An update is the client's model minus the model that it had received.
        """
        return update

    def targets(self, targets: Tensor, classes: int, draw: torch.Generator) -> Tensor:
        """The client's targets [n, t...], instead of its own; `classes` is 0 if they are not one class per sample."""
        return targets

    def acts_on(self, traits: Traits) -> frozenset[str]:
        """Which of "rows", "gradient", "update" and "targets" it changes, with an algorithm of these traits."""
        possible = {
            "rows": traits.split,
            "gradient": BACKWARD in traits.needs,
            "update": traits.models_cross,
            "targets": not traits.central,
        }
        return frozenset(name for name in self.changes if possible[name])

    @property
    def changes(self) -> tuple[str, ...]:
        """The methods that its class defines."""
        return tuple(name for name in _ACTS if getattr(type(self), name) is not getattr(Attack, name))


A = TypeVar("A", bound=type[Attack])


def attack(name: str, *, title: str = "", paper: str = "") -> Callable[[A], A]:
    """A decorator that registers a subclass of `Attack`."""

    def decorate(made: A) -> A:
        return plugins.register("attack", name, title=title, paper=paper)(made)

    return decorate


@dataclass(frozen=True)
class Attacks:
    """The attacks of a run: for each hostile client, what it does, in the order in which it was named. `acts` lists the
    effective parts of each attack, by its position in `named`; `seed` names all draws.
    """

    seed: int = 0
    named: tuple[str, ...] = ()
    made: tuple[Attack, ...] = ()
    clients: tuple[tuple[int, ...], ...] = ()
    acts: tuple[frozenset[str], ...] = field(default=())

    def __bool__(self) -> bool:
        return bool(self.named)

    @property
    def hostile(self) -> tuple[int, ...]:
        """The clients that attack, in order."""
        return tuple(sorted({k for clients in self.clients for k in clients}))

    def by(self, what: str) -> dict[int, list[Attack]]:
        """For each client that changes `what` ("rows", ...), the attacks that do it."""
        found: dict[int, list[Attack]] = {}
        for made, clients, acts in zip(self.made, self.clients, self.acts, strict=True):
            for k in clients if what in acts else ():
                found.setdefault(k, []).append(made)
        return found

    def remark(self, clients: int) -> str:
        """A line about a run with this number of clients; empty if no client attacks."""
        if not self:
            return ""
        hostile = self.hostile
        who = f"client {hostile[0]} is" if len(hostile) == 1 else f"clients {', '.join(map(str, hostile))} are"
        honest = clients - len(hostile)
        whose = f"scores are those of the other {honest}" if honest else "no client is honest"
        return f"Attacked: {', '.join(self.named)}; {who} hostile, {whose}"


def of(config: Any) -> Attacks:
    """The attacks that a run's configuration names. Raises ConfigError if one is not possible or has no effect."""
    named: tuple[str, ...] = tuple(config.attack)
    parsed = [_parse(text, config.clients) for text in named]
    acts = []
    for text, (made, _) in zip(named, parsed, strict=True):
        acts.append(made.acts_on(config.traits))
        if not acts[-1]:
            where = " and ".join(_MEANT[name] for name in made.changes) or "nothing"
            raise ConfigError(
                f"attack {text!r} has no effect on {config.algorithm}: it changes {where}; leave it out or choose "
                "another (see `cutlayer list attacks`)"
            )
    return Attacks(
        config.seed, named, tuple(made for made, _ in parsed), tuple(clients for _, clients in parsed), tuple(acts)
    )


def _parse(text: str, clients: int) -> tuple[Attack, tuple[int, ...]]:
    body, at, who = text.rpartition("@")
    if not at:
        raise ConfigError(
            f"attack {text!r} does not name the clients that attack: write NAME:PARAMETER@CLIENTS, e.g. scale:1e6@3"
        )
    reference, parameter = _parted(text, body)
    plugins.find("attack", reference)
    kind = plugins.load("attack", reference)
    if not (isinstance(kind, type) and issubclass(kind, Attack)):
        raise ConfigError(f"attack {text!r}: {reference} is not a subclass of cutlayer.attacks.Attack; make it one")
    made = kind(kind.default if parameter is None else parameter)
    try:
        made.check()
    except ConfigError as error:
        raise ConfigError(f"attack {text!r}: {error}") from None
    return made, _numbers(text, who, clients)


def _parted(text: str, body: str) -> tuple[str, float | None]:
    """(name or reference, parameter). A reference has a colon of its own. Raises ConfigError."""
    reference, colon, argument = body.rpartition(":")
    if not colon or (plugins.is_reference(body) and not plugins.known("attack", reference)):
        return body, None
    try:
        value = float(argument)
    except ValueError:
        value = float("nan")
    if value != value or value in (float("inf"), float("-inf")):
        raise ConfigError(f"attack {text!r}: the parameter {argument!r} is not a finite number: write e.g. scale:1e6@3")
    return reference, value


def _numbers(text: str, who: str, clients: int) -> tuple[int, ...]:
    """The clients that "0,4-6" names. Raises ConfigError."""
    found: list[int] = []
    for part in who.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip(), re.ASCII)
        if match is None:
            raise ConfigError(f"attack {text!r}: {who!r} does not name clients: write numbers or ranges, e.g. 0,4-6")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= clients:
            raise ConfigError(f"attack {text!r}: there is no client {part.strip()} among {clients}, 0 to {clients - 1}")
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))
