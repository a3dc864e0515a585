"""What travels between a server and its clients, as bytes and as rules, without any input or output.

`tensors` and `codecs`: tensors as bytes. `coding` and `coded`: what codecs do to rows that cross. `messages` and
`frames`: what is said, and one message as bytes. `handshake`: do both mean the same run. `conversation`: what may be
said when.
"""

from cutlayer.wire.codecs import RAW, Codec, codec, error_bound
from cutlayer.wire.coding import Coding
from cutlayer.wire.conversation import ClientSide, ServerSide
from cutlayer.wire.frames import Frame, pack, unpack
from cutlayer.wire.handshake import agree, fingerprint
from cutlayer.wire.limits import Limits
from cutlayer.wire.messages import PROTOCOL, specs
from cutlayer.wire.tensors import (
    decode,
    decode_named,
    described,
    encode,
    encode_named,
    encoded_bytes,
    encoded_bytes_named,
    payload_sizes,
)

__all__ = [
    "PROTOCOL",
    "RAW",
    "ClientSide",
    "Codec",
    "Coding",
    "Frame",
    "Limits",
    "ServerSide",
    "agree",
    "codec",
    "decode",
    "decode_named",
    "described",
    "encode",
    "encode_named",
    "encoded_bytes",
    "encoded_bytes_named",
    "error_bound",
    "fingerprint",
    "pack",
    "payload_sizes",
    "specs",
    "unpack",
]
