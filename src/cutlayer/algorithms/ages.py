"""The age of clients' batches and models when they are used, in algorithms whose clients work at their own pace.

The age of a batch is the number of server steps between the client's last download before it (a gradient or a model)
and the step that uses it. The age of a model is the number of averagings between the one from which it began and its
own. In synchronous learning, both are 0. Counts are tensors [C] in the server's `kept`, so that a checkpoint has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_COUNTS = ("since step", "since averaging", *(f"{a} {b}" for a in ("batches", "models") for b in ("", "sum", "most")))


class Ages:
    """The ages of batches and models, kept in `kept`: C clients."""

    def __init__(self, kept: dict[str, Tensor], clients: int) -> None:
        self._kept = kept
        for name in _COUNTS:
            kept.setdefault(f"ages {name}", torch.zeros(clients, dtype=torch.int64))
        kept.setdefault("ages clock", torch.zeros(2, dtype=torch.int64))  # server steps, averagings

    @property
    def steps(self) -> int:
        """Server steps so far."""
        return int(self._kept["ages clock"][0])

    def begun(self, client: int) -> None:
        """The client has fetched the model."""
        self._of("since averaging")[client] = self._kept["ages clock"][1]
        self.answered(client)

    def answered(self, client: int) -> None:
        """The client has received its gradient."""
        self._of("since step")[client] = self._kept["ages clock"][0]

    def since(self, client: int) -> int:
        """Server steps before the client's last download."""
        return int(self._of("since step")[client])

    def stepped(self, used: Iterable[tuple[int, int]]) -> None:
        """The server has stepped on batches, each (client, server steps before the download on which it is based)."""
        for client, since in used:
            self._count("batches", client, self.steps - since)
        self._kept["ages clock"][0] += 1

    def averaged(self, clients: Iterable[int]) -> None:
        """The models of these clients were averaged."""
        for client in clients:
            age = self._kept["ages clock"][1] - self._of("since averaging")[client]
            self._count("models", client, int(age))
        self._kept["ages clock"][1] += 1

    def summary(self) -> dict[str, Any]:
        """Plain values; lists have a value for each client, None where it has sent nothing that was used. `batch_age`
        and `model_age` are the means over all batches and models.
        """
        steps, averagings = self._kept["ages clock"].tolist()
        found: dict[str, Any] = {"server_steps": steps, "averagings": averagings}
        for what, age in (("batches", "batch_age"), ("models", "model_age")):
            counts, sums, most = (self._of(f"{what} {name}").tolist() for name in ("", "sum", "most"))
            found[age] = sum(sums) / sum(counts) if any(counts) else None
            found[what] = counts
            found[f"{what}_mean"] = [total / n if n else None for total, n in zip(sums, counts, strict=True)]
            found[f"{what}_most"] = [oldest if n else None for oldest, n in zip(most, counts, strict=True)]
        return found

    def _of(self, name: str) -> Tensor:
        return self._kept[f"ages {name}"]

    def _count(self, what: str, client: int, age: int) -> None:
        self._of(f"{what} ")[client] += 1
        self._of(f"{what} sum")[client] += age
        self._of(f"{what} most")[client] = max(age, int(self._of(f"{what} most")[client]))
