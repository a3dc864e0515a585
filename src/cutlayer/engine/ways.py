"""How a run computes its models: the choice among forms that give the same numbers except for the order of sums.

It is stored with the run, so that a resumed run computes like an uninterrupted one on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from cutlayer.stored import checked, form_of, remade

Way = Literal["lowered", "mapped", "each"]
Layout = Literal["plain", "pooled", "last"]
EngineName = Literal["local", "stacked", "union"]


@dataclass(frozen=True)
class Stacking:
    """How copies of a model are computed together.

    `way`: its operations lowered to stacked ones, the whole mapped by `torch.func.vmap`, or each copy by itself.
    `chunk`: the number of clients at a time (None: all). `keep`: the results of all their forward passes fit into
    memory until the backward passes (otherwise they run twice). `forms`: the measured forms of operations, by the name
    of their weight; missing ones follow the rule.
    """

    way: Way = "lowered"
    chunk: int | None = None
    keep: bool = True
    forms: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ways:
    """The engine; the layouts of the clients' and of the server's part (`layout.py`); how the clients' copies and the
    server's are computed, if the engine stacks them.
    """

    engine: EngineName = "local"
    client_layout: Layout = "plain"
    server_layout: Layout = "plain"
    clients: Stacking = field(default_factory=Stacking)
    copies: Stacking = field(default_factory=Stacking)

    def stored(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Self:
        """From the result of `stored`. Raises MalformedError for anything else."""
        found = checked(stored, form_of(cls, whole=True))
        stacked = {name: remade(Stacking, stored[name], name, whole=True) for name in ("clients", "copies")}
        return cls(found.engine, found.client_layout, found.server_layout, **stacked)

    def __str__(self) -> str:
        """In words."""
        images = {"plain": "", "pooled": "pooled before relu", "last": "images with their channels last"}
        words = {"lowered": "all at once", "mapped": "mapped by vmap", "each": "each by itself"}
        client = [words[self.clients.way]] if self.engine == "stacked" else []
        forms = ", ".join(f"{name} {form}" for name, form in self.clients.forms.items())
        client += [part for part in (images[self.client_layout], forms) if part]
        server = images[self.server_layout]
        return f"{self.engine} engine; clients {', '.join(client) or 'as they are'}; server {server or 'as it is'}"
