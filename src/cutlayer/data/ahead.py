"""Requests that worker processes answer in order, before the answers are needed.

The processes are those of torch's DataLoader, which keeps `_EACH` requests per worker in flight. The list of requests
may grow while they work. Samplers cannot do this, so each worker receives its requests through a pipe.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.multiprocessing import Pipe

from cutlayer.errors import DataError

Answer = Callable[[Any], Any]
"""A worker's answer to a request."""

_EACH = 2  # requests of each worker that are answered, or being answered, before the first of them is needed
_LOOK = 5.0  # seconds between a waiting worker's checks that its parent still exists


class ReadAhead:
    """Answers requests by `answer`, in `workers` processes that start with the first request (0: in this one)."""

    def __init__(self, answer: Answer, workers: int) -> None:
        self._answer, self.workers = answer, workers
        self._stream: Iterator[Any] | None = None
        self._senders: list[Connection] = []
        self._sent: deque[Hashable] = deque()  # the workers have them
        self._waiting: dict[Hashable, None] = {}  # in order
        self._ready: dict[Hashable, Any] = {}  # answers that were not taken yet
        self._count = 0  # requests that were sent to the present workers

    @property
    def depth(self) -> int:
        """The useful number of requests in advance; 0 if no worker would answer them in the meantime."""
        return _EACH * self.workers

    def ask(self, requests: Iterable[Hashable]) -> None:
        """Request these next, in this order, after earlier requests. Repeated requests are left out, and all are if
        many answers wait to be taken.
        """
        if not self.workers or len(self._ready) > 2 * self.depth:
            return
        for request in requests:
            if request not in self._ready and request not in self._sent:
                self._waiting.setdefault(request)
        self._send()

    def take(self, request: Hashable) -> Any:
        """The answer to a request, requested in advance or not. Raises DataError if a worker process has ended."""
        if not self.workers:
            return self._answer(request)
        if request in self._waiting or not (request in self._ready or request in self._sent):
            self._waiting = {request: None, **self._waiting}
        self._send()
        while request not in self._ready:
            self._receive()
        return self._ready.pop(request)

    def close(self) -> None:
        """End the worker processes, and drop open requests. They start again with the next request."""
        for sender in self._senders:
            try:
                sender.send(None)
                sender.close()
            except OSError:  # that worker has ended
                continue
        self._stream = None
        self._senders, self._count = [], 0
        self._sent.clear()
        self._waiting.clear()
        self._ready.clear()

    def _receive(self) -> None:
        """Wait for the answer to the oldest request."""
        assert self._stream is not None, "it was asked for"
        try:
            found = next(self._stream)
        except RuntimeError as error:
            workers = self.workers
            self.close()
            raise DataError(
                f"a process that reads items has ended ({str(error).splitlines()[0]}): it may have lacked memory; "
                f"pass fewer data_workers than {workers}, or 0 to read in the process that trains"
            ) from error
        self._ready[self._sent.popleft()] = found
        self._send()

    def _send(self) -> None:
        """Hand on requests, as long as workers have less than their share."""
        while self._waiting and len(self._sent) < self.depth:
            if self._stream is None:
                self._start()
            request = next(iter(self._waiting))
            del self._waiting[request]
            self._sent.append(request)
            with contextlib.suppress(OSError):  # if the worker has ended: this is noticed when its answer is taken
                self._senders[self._count % self.workers].send(request)
            self._count += 1

    def _start(self) -> None:
        receivers, senders = zip(*(Pipe(duplex=False) for _ in range(self.workers)), strict=True)
        self._senders = list(senders)
        loader = torch.utils.data.DataLoader(
            _Answers(self._answer, receivers, senders),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=_EACH,
            collate_fn=_unchanged,
            worker_init_fn=_obey,
            generator=torch.Generator(),
        )
        self._stream = iter(loader)
        for receiver in receivers:
            receiver.close()


class _Answers(torch.utils.data.IterableDataset[Any]):
    """A worker's loop: one request after another, from its own pipe."""

    def __init__(self, answer: Answer, receivers: Sequence[Connection], senders: Sequence[Connection]) -> None:
        self.answer, self.receivers, self.senders, self.parent = answer, receivers, senders, os.getpid()

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None, "only workers answer"
        for sender in self.senders:  # this process has copies, beside which the parent's end would go unnoticed
            sender.close()
        receiver = self.receivers[worker.id]
        while True:
            while not receiver.poll(_LOOK):
                if os.getppid() != self.parent:
                    return
            try:
                request = receiver.recv()
            except EOFError:
                return
            if request is None:
                return
            yield self.answer(request)


def _unchanged(answer: Any) -> Any:
    return answer


def _obey(worker: int) -> None:
    """A worker process only ends when this one ends it. All processes receive a keyboard interrupt, and this one
    handles it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
