"""What Flower's messages carry: an invitation to a run, and how that went at a node. No tensor is in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import msgspec
from flwr.app import ConfigRecord, Context, MetricRecord, RecordDict

from cutlayer.errors import WireError
from cutlayer.options import RunConfig, normalised

_INVITATION, _END, _WORK = "cutlayer-invitation", "cutlayer-end", "cutlayer-work"
_OF_THE_NODE = ("data", "data_format", "device")


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
                f"this message invites to no run of Cutlayer ({error}): use the same version on server and nodes"
            ) from None

    def config(self, context: Context) -> RunConfig:
        """The run's configuration at this node: what the node says of itself (`--node-config`: data, data-format,
        device) is put over what the server says. Raises ConfigError.
        """
        node: Mapping[str, Any] = normalised(context.node_config)
        own = {name: node[name] for name in _OF_THE_NODE if name in node}
        return RunConfig.of({**json.loads(self.options), **own})


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
                f"this reply is none of Cutlayer's ({error}): use the same version on server and nodes"
            ) from None
