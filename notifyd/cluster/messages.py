"""What nodes say to each other, and its bytes: msgpack, an envelope with a version around items.

    one byte 0 or 1 (`several`, see Routed), then [version, sender, [[kind, body], …]]

A body is an array whose fields are known by their place. A later version appends fields, which an
earlier one passes over, and which have defaults where an earlier one left them out; or it adds a
kind, which an earlier one counts and ignores. So a node of the previous version works beside one of
this. A field never changes its meaning; where that had to be, the kind would get another name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw
from msgspec.msgpack import Decoder, Encoder

from notifyd.identifiers import LAST_SECOND, is_canonical_uuid
from notifyd.notification import (
    EVERYONE,
    MAX_NOTIFICATION_BYTES,
    Audience,
    AudienceType,
    Notification,
    Priority,
)
from notifyd.templates import MAX_EVENT_TYPE
from notifyd.tenants import MAX_TENANTS

VERSION = 2
"""Of this program's messages; it grows when a field or a kind is added."""

ALONE = b"\x00"
SEVERAL = b"\x01"

MAX_CONNECTIONS = 10_000_000
"""Of one tenant at one node."""

BadReason = Literal["not_msgpack", "shape", "unknown", "payload", "failed"]

T = TypeVar("T")


class BadMessage(Exception):
    """Bytes that are no message of a node; `reason` is for counting, the text for the log."""

    def __init__(self, reason: BadReason, text: str) -> None:
        super().__init__(text)
        self.reason: BadReason = reason


class Body(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What all bodies have in common: their fields are known by their place."""


class Wired(Body, frozen=True):
    """A notification between nodes; see `Notification`."""

    id: str
    at: Annotated[float, Meta(ge=0, le=LAST_SECOND)]
    event: Annotated[str, Meta(min_length=1, max_length=MAX_EVENT_TYPE)]
    payload: Annotated[bytes, Meta(max_length=MAX_NOTIFICATION_BYTES)]
    priority: Priority = Priority.NORMAL
    ttl: int | None = None
    correlation: str | None = None
    source: str | None = None
    audience: AudienceType = "All"
    values: tuple[str, ...] = ()
    ack: bool = False
    entry: str | None = None


class Routed(Body, frozen=True):
    """A notification for users of a node. `seq` numbers what the sender waits for; `stored`: their
    logs have it. That several nodes have one of these users stands in the byte before."""

    seq: int
    tenant: str
    users: tuple[str, ...]
    notification: Wired
    exclude: str | None = None
    stored: bool = False


class Spread(Body, frozen=True):
    """A notification for who is connected: a channel, channels, or everybody (no names)."""

    seq: int
    tenant: str
    target: Literal["broadcast", "channel", "channels"]
    names: tuple[str, ...]
    notification: Wired
    exclude: str | None = None


class Told(Body, frozen=True):
    """What became of a Routed: for each of its users, in order, an outcome and its connections."""

    seq: int
    users: tuple[tuple[UserOutcome, int], ...]


UserOutcome = Literal["delivered", "filtered", "queued", "nobody"]


class Reached(Body, frozen=True):
    """What became of a Spread: connections that took it, whether there were others that the
    audience left out, and the connections by channel, for `channels`."""

    seq: int
    connections: int
    filtered: bool = False
    channels: tuple[int, ...] = ()


class Replay(Body, frozen=True):
    """Something is in the logs of these users: replay it to those who are connected, `before_live`
    ahead of what is sent from now on."""

    tenant: str
    users: tuple[str, ...]
    before_live: bool = False


Uuid = Annotated[str, Meta(min_length=36, max_length=36)]
"""As long as a UUID is, so that in a store it names nothing else."""


class Settled(Body, frozen=True):
    """A device of the user confirmed these; `seq` above 0 asks which of them the node held."""

    seq: int
    tenant: str
    user: str
    ids: tuple[Uuid, ...]


class Held(Body, frozen=True):
    """The answer to a Settled: those that were held."""

    seq: int
    ids: tuple[str, ...]


class Ask(Body, frozen=True):
    """A question or an order of the API to all nodes; `about` is its own business."""

    seq: int
    what: str
    about: Raw


class Answer(Body, frozen=True):
    """The answer to an Ask; empty where this node does not know what was asked."""

    seq: int
    said: Raw


class Alive(Body, frozen=True):
    """A node began, or goes on."""

    ending: bool = False


class Revoked(Body, frozen=True):
    """Tokens of a user are refused that were issued up to `at` (Unix seconds)."""

    tenant: str
    user: str
    at: float


class Connected(Body, frozen=True):
    """Connections at the sender, of each tenant that changed, or of all tenants that have any
    (`whole`)."""

    counts: Annotated[
        dict[str, Annotated[int, Meta(ge=0, le=MAX_CONNECTIONS)]], Meta(max_length=MAX_TENANTS)
    ]
    whole: bool = False


KINDS: dict[str, type[Body]] = {
    "routed": Routed,
    "spread": Spread,
    "told": Told,
    "reached": Reached,
    "replay": Replay,
    "settled": Settled,
    "held": Held,
    "ask": Ask,
    "answer": Answer,
    "alive": Alive,
    "revoked": Revoked,
    "connected": Connected,
}

_NAMES = {kind: name for name, kind in KINDS.items()}


class _Item(msgspec.Struct, frozen=True, array_like=True, gc=False):
    kind: str
    body: Raw


class _Envelope(msgspec.Struct, frozen=True, array_like=True, gc=False):
    version: int
    sender: str
    items: list[_Item]


class _Outgoing(msgspec.Struct, frozen=True, array_like=True, gc=False):
    version: int
    sender: str
    items: list[tuple[str, Body]]


encode_value = Encoder().encode
_decode_envelope = Decoder(_Envelope).decode
_decoders: dict[str, Decoder[Body]] = {name: Decoder(kind) for name, kind in KINDS.items()}


def encode(sender: str, bodies: Sequence[Body]) -> bytes:
    """One message of these bodies, without the byte before it."""
    items = [(_NAMES[type(body)], body) for body in bodies]
    return encode_value(_Outgoing(VERSION, sender, items))


class Incoming:
    """A message as it came: whose it is, and its items, not looked into yet."""

    __slots__ = ("_items", "sender", "several", "version")

    def __init__(self, data: bytes) -> None:
        if data[:1] not in (ALONE, SEVERAL):
            raise BadMessage("not_msgpack", "neither of the two first bytes")
        self.several = data[:1] == SEVERAL
        try:
            envelope = _decode_envelope(memoryview(data)[1:])
        except msgspec.ValidationError as error:
            raise BadMessage("shape", str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadMessage("not_msgpack", str(error)) from error
        self.version = envelope.version
        self.sender = envelope.sender
        self._items = envelope.items

    def __len__(self) -> int:
        return len(self._items)

    def body(self, index: int) -> Body:
        """One item. Raises BadMessage."""
        item = self._items[index]
        decoder = _decoders.get(item.kind)
        if decoder is None:
            raise BadMessage("unknown", f"kind {item.kind[:40]!r} of version {self.version}")
        return decoded(decoder, item.body)


def decoded(decoder: Decoder[T], data: Raw) -> T:
    """Raises BadMessage."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise BadMessage("shape", str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage("not_msgpack", str(error)) from error


def wired(notification: Notification) -> Wired:
    """A notification as it goes to another node."""
    audience = notification.audience
    return Wired(
        notification.id,
        notification.occurred_at,
        notification.event_type,
        bytes(notification.payload),
        notification.priority,
        notification.ttl,
        notification.correlation_id,
        notification.source,
        audience.type,
        tuple(audience.values),
        notification.require_ack,
        notification.entry,
    )


def unwired(wired: Wired) -> Notification:
    """The reverse of `wired`. Raises BadMessage for an id that is no UUID, and for a payload that
    would break what it is written into: an event's line, or a text frame (RFC 6455, section 8.1).
    """
    if not is_canonical_uuid(wired.id):
        raise BadMessage("shape", "an id that is no UUID")
    payload = wired.payload
    try:
        if b"\n" in payload or b"\r" in payload:
            raise BadMessage("payload", "more than one line")
        payload.decode()
        msgspec.json.decode(payload, type=Raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage("payload", str(error)) from error
    return Notification(
        wired.id,
        wired.at,
        wired.event,
        Raw(payload),
        wired.priority,
        wired.ttl,
        wired.correlation,
        wired.source,
        EVERYONE if wired.audience == "All" else Audience(wired.audience, frozenset(wired.values)),
        wired.ack,
        wired.entry,
    )
