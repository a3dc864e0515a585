"""Records the requests to the seam, and the bytes of the tensors that cross, independently of the ledger."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from cutlayer.cohort import Cohort, Summed
from cutlayer.server import Server
from cutlayer.types import CutGradients, Smashed, TailGradients
from cutlayer.verbs import CLIENT_VERBS, SERVER_VERBS

_OPEN = frozenset({"samples", "masses", "shape", "holder"})
"""Attributes that an algorithm may also read, since they send nothing."""


class Recording:
    """A cohort as an algorithm sees it. `used` are the verbs that the algorithm has used, `strangers` its other
    requests.

    `up` and `down` are the bytes of all tensors that crossed, one by one. Tensors of a model named in `frozen` do not
    cross, and neither do gradients to clients whose lower parts do not train (`trains`).
    """

    def __init__(
        self, clients: Cohort, frozen: Collection[str] = (), *, trains: bool = True, asynchronous: bool = False
    ) -> None:
        self._clients, self._asynchronous = clients, asynchronous
        self._frozen, self._trains = frozen, trains
        self.used: set[str] = set()
        self.strangers: set[str] = set()
        self.up = self.down = 0
        self._late: set[int] = set()  # have missed an averaging
        self._at_work: set[int] = set()  # clients that work at their own pace

    def began(self, clients: Iterable[int]) -> None:
        """A round has begun with `clients`: those that have missed an averaging are sent the model, unless clients
        begin when they are named (`asynchronous`).
        """
        if not self._asynchronous:
            self._fetch(clients)

    def _fetch(self, clients: Iterable[int]) -> None:
        fetching = self._late & set(clients)
        self.down += sum(self._model(k) for k in fetching)
        self._late -= fetching

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._clients, name)
        if name in _OPEN:
            return found
        if name not in CLIENT_VERBS:
            self.strangers.add(name)
            return found

        def verb(*args: Any, **options: Any) -> Any:
            self.used.add(name)
            holder = self._clients.holder
            result = found(*args, **options)
            self._count(name, args, options, result, holder)
            return result

        return verb

    def _count(
        self, name: str, args: tuple[Any, ...], options: Mapping[str, Any], result: Any, holder: int | None
    ) -> None:
        if name == "arrivals":
            self._fetch(set(args[0]) - self._at_work)
            self._at_work |= set(args[0])
        for value in (*args, *options.values()):
            if isinstance(value, CutGradients) and self._trains:
                self.down += _bytes(value.own) + len(value.active) * _bytes(value.common)
            elif isinstance(value, Smashed):
                self.down += _bytes(value.rows)
        if isinstance(result, Smashed):
            self.up += _bytes((*result.rows, result.labels))
        elif isinstance(result, TailGradients):
            self.up += _bytes(result.rows)
        if name == "average" and result:
            models = sum(self._model(k) for k in result)
            self.up, self.down = self.up + models, self.down + models
            self._at_work -= set(result)
            self._late = set(range(len(self._clients.samples))) - set(result) - self._at_work
        if isinstance(result, Summed) and result.gave:
            size = self._clients.footprint(result.gave[0]).gradient
            self.up, self.down = self.up + len(result.gave) * size, self.down + len(result.took) * size
        if name == "align":
            self.down += sum(_bytes(head.values()) for head in args[0].values())
        now = self._clients.holder
        if name == "hand_over" and holder not in (None, now):
            moved = self._model(holder) + (self._clients.footprint(holder).optimizer if options["optimizer"] else 0)
            self.up, self.down = self.up + moved, self.down + moved

    def _model(self, client: int | None) -> int:
        assert client is not None
        return _bytes(t for name, t in self._clients.model_state(client).items() if name not in self._frozen)


class RecordedServer:
    """Makes `server` record which of its verbs are `used`, and the number of `rows` that passed through its models."""

    def __init__(self, server: Server) -> None:
        self.used: set[str] = set()
        self.rows = 0
        for verb in sorted(SERVER_VERBS):
            setattr(server, verb, self._noting(verb, getattr(server, verb)))
        for passing in ("forward", "step_copies"):  # all other steps go through `forward`
            setattr(server, passing, self._counting(getattr(server, passing)))

    def _noting(self, verb: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            self.used.add(verb)
            return method(*args, **options)

        return noted

    def _counting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(smashed: Smashed, *args: Any, **options: Any) -> Any:
            self.rows += len(smashed.labels)
            return method(smashed, *args, **options)

        return counted


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
