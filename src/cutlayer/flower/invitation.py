"""What Flower's messages carry: an invitation to a run, and how that went at a node. No tensor is in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import msgspec
from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict

from cutlayer import plugins
from cutlayer.errors import ConfigError, WireError
from cutlayer.options import NAMING, RunConfig, normalised

_INVITATION, _END, _WORK = "cutlayer-invitation", "cutlayer-end", "cutlayer-work"
_CODE = {option: kind for option, kind in NAMING.items() if option != "algorithms"}  # a run has one
"""Options that name things, and of which kind: what is imported for them is named by the node itself, or built in."""
_OF_THE_NODE = ("device", *_CODE)


@dataclass(frozen=True)
class Invitation:
    """Who the node is in this run (`client-<k>`), where to dial, the authority (PEM) that the server's certificate must
    be by, the token that proves the client, the run's options as JSON, and seconds of trying after which it gives up.
    """

    client: str
    address: str
    authority: str
    options: str
    give_up_after: float
    token: str = field(repr=False)

    def content(self) -> RecordDict:
        """As a message's content."""
        return RecordDict({_INVITATION: ConfigRecord(asdict(self))})

    @classmethod
    def of(cls, content: RecordDict) -> Self:
        """What a message invites to. Raises WireError where it is no invitation."""
        try:
            return msgspec.convert(dict(content.config_records[_INVITATION]), cls)
        except (KeyError, msgspec.ValidationError) as error:
            raise WireError(
                f"this message is not an invitation to a run of Cutlayer ({error}): use the same version on server and "
                "nodes"
            ) from None

    def config(self, context: Context) -> RunConfig:
        """The run's configuration at this node: what the node says of itself (`--node-config`: device, data, algorithm,
        ...) is put over what the server says.

        Raises ConfigError, also where the server names a file or a module that the node does not name: nothing that
        a message names is imported.
        """
        node: Mapping[str, Any] = normalised(context.node_config)
        own = {name: node[name] for name in _OF_THE_NODE if name in node}
        for name in ("defences", "metrics"):  # Flower has no lists
            if isinstance(own.get(name), str):
                own[name] = own[name].split()
        said = json.loads(self.options)
        for name in _CODE.keys() - own.keys():
            _refuse_code(name, said.get(name))
        return RunConfig.of({**said, **own})


def _refuse_code(name: str, value: object) -> None:
    """Raises ConfigError for a reference to a file or a module."""
    for reference in value if isinstance(value, list) else [value]:
        if isinstance(reference, str) and _is_code(_CODE[name], reference):
            raise ConfigError(
                f"the server's {name} = {reference!r} is code of its own, which this node does not import: look at "
                f"that code, put it here, and name it with --node-config '{name}=\"path/to/file.py:Name\"'"
            )


def _is_code(kind: str, reference: str) -> bool:
    if kind == "codec":  # NAME:ARGUMENT is none
        return ":" in reference and not plugins.known(kind, reference.partition(":")[0])
    return plugins.is_reference(reference)


@dataclass(frozen=True)
class Farewell:
    """How a client's work ended: the reason that the server gave, and with how many samples it took part."""

    reason: str
    samples: int

    def content(self) -> RecordDict:
        """As a message's content."""
        return RecordDict({_END: ConfigRecord({"reason": self.reason}), _WORK: MetricRecord({"samples": self.samples})})

    @classmethod
    def of(cls, content: RecordDict) -> Self:
        """What a reply says. Raises WireError where it is no farewell."""
        try:
            return msgspec.convert({**content.config_records[_END], **content.metric_records[_WORK]}, cls)
        except (KeyError, msgspec.ValidationError) as error:
            raise WireError(
                f"this reply is not from Cutlayer ({error}): use the same version on server and nodes"
            ) from None
