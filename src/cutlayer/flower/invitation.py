"""The content of Flower's messages: an invitation to a run, and the end of the work at a node. They have no tensors."""

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
"""Options that name things, with their kinds. Things that are imported for them are named by the node itself, or built
in.
"""
_OF_THE_NODE = ("device", *_CODE)


@dataclass(frozen=True)
class Invitation:
    """The node's name in this run (`client-<k>`), the server's address, the authority (PEM) of the server's
    certificate, the token that proves the client, the run's options as JSON, and the seconds after which it gives up.
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
        """The invitation in a message. Raises WireError if it is not an invitation."""
        try:
            return msgspec.convert(dict(content.config_records[_INVITATION]), cls)
        except (KeyError, msgspec.ValidationError) as error:
            raise WireError(
                f"this message is not an invitation to a run of Cutlayer ({error}): use the same version on server and "
                "nodes"
            ) from None

    def config(self, context: Context) -> RunConfig:
        """The run's configuration at this node: the node's own settings (`--node-config`: device, data, algorithm, ...)
        override the server's.

        Raises ConfigError, also if the server names a file or a module that the node does not name: code named in a
        message is never imported.
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
    if kind == "codec":  # NAME:ARGUMENT is not a reference
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
        """The content of a reply. Raises WireError if it is not a farewell."""
        try:
            return msgspec.convert({**content.config_records[_END], **content.metric_records[_WORK]}, cls)
        except (KeyError, msgspec.ValidationError) as error:
            raise WireError(
                f"this reply is not from Cutlayer ({error}): use the same version on server and nodes"
            ) from None
