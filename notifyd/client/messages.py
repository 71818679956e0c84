"""What the server says over a WebSocket, as structs. Unknown fields and types are ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeAlias, TypeVar

import msgspec

A_co = TypeVar("A_co", covariant=True)


class AudienceKind(msgspec.Struct, frozen=True):
    """Whom a notification was narrowed to; never by name."""

    type: str = "All"


class Metadata(msgspec.Struct, frozen=True):
    """What came with a notification; `ttl` is in seconds."""

    source: str | None = None
    priority: str | None = None
    ttl: int | None = None
    correlation_id: str | None = None
    audience: AudienceKind | None = None
    replayed: bool = False


class NotificationMessage(msgspec.Struct, frozen=True):
    """A notification as it came."""

    id: str
    event_type: str
    occurred_at: datetime
    payload: Any = None
    metadata: Metadata = msgspec.field(default_factory=Metadata)


@dataclass(frozen=True, slots=True)
class Notification(Generic[A_co]):
    """A notification that a listener yields.

    `ack()` confirms it: at once from a `Stream`, to be awaited from an `AsyncStream`. A
    confirmation that finds no connection is sent over the next one.
    """

    id: str
    event_type: str
    payload: Any
    occurred_at: datetime
    metadata: Metadata
    _acknowledge: Callable[[str], A_co] = field(repr=False, compare=False)

    @property
    def replayed(self) -> bool:
        """Whether it was kept for us, or given to a connection before this one."""
        return self.metadata.replayed

    def ack(self) -> A_co:
        """Confirm: the server keeps it no longer, for none of the user's devices."""
        return self._acknowledge(self.id)

    @classmethod
    def of(
        cls, message: NotificationMessage, acknowledge: Callable[[str], A_co]
    ) -> Notification[A_co]:
        """`message`, with the way to confirm it."""
        return cls(
            message.id,
            message.event_type,
            message.payload,
            message.occurred_at,
            message.metadata,
            acknowledge,
        )


class Session(msgspec.Struct, frozen=True):
    """The terms of a connection; `heartbeat_interval` is in seconds."""

    expires_at: datetime | None = None
    heartbeat_interval: float = 30.0
    subscriptions: list[str] = []


class Connected(msgspec.Struct, frozen=True):
    """A connection stands. What was missed, if anything, follows."""

    connection_id: str
    user_id: str = ""
    session: Session = msgspec.field(default_factory=Session)


class Subscribed(msgspec.Struct, frozen=True):
    """These channels are subscribed now, by us or by the server."""

    channels: list[str] = msgspec.field(name="payload")


class Unsubscribed(msgspec.Struct, frozen=True):
    """These channels are subscribed no longer; the listener does not ask for them again."""

    channels: list[str] = msgspec.field(name="payload")


class Acked(msgspec.Struct, frozen=True):
    """These notifications are settled; `refused` are unknown to the server."""

    notification_id: str | None = None
    notification_ids: list[str] = []
    refused: list[str] = []


class CaughtUp(msgspec.Struct, frozen=True):
    """The replay is over; what comes now is live."""

    replayed: int = 0


class Gap(msgspec.Struct, frozen=True):
    """Something of `stream` was missed and does not come: fetch the state anew."""

    stream: str
    reason: str = ""
    from_offset: int | None = msgspec.field(default=None, name="from")
    to_offset: int | None = msgspec.field(default=None, name="to")


class Dismissed(msgspec.Struct, frozen=True):
    """Withdrawn by its sender, or settled on another device."""

    notification_id: str


class Refreshed(msgspec.Struct, frozen=True):
    """A new token was taken; the session lasts until `expires_at`."""

    expires_at: datetime | None = None


class Problem(msgspec.Struct, frozen=True):
    """An `error` message: the connection lives; `code` as the protocol lists them."""

    code: str
    message: str = ""
    retry_after_seconds: float | None = None


class Shutdown(msgspec.Struct, frozen=True):
    """The server is about to go; the listener comes back when it was told to."""

    reason: str = ""
    reconnect_after_seconds: float | None = None


class Disconnected(msgspec.Struct, frozen=True):
    """A connection ended or was not made.

    `code` is the close code, 1006 where none came; or the HTTP status of a refused handshake.
    `retry_in` is in seconds, None where the listener stops.
    """

    code: int
    reason: str
    retry_in: float | None


Event: TypeAlias = (
    Connected
    | Subscribed
    | Unsubscribed
    | Acked
    | CaughtUp
    | Gap
    | Dismissed
    | Refreshed
    | Problem
    | Shutdown
    | Disconnected
)

Told: TypeAlias = NotificationMessage | Event

_TYPES: dict[str, type[Told]] = {
    "notification": NotificationMessage,
    "connected": Connected,
    "subscribed": Subscribed,
    "unsubscribed": Unsubscribed,
    "acked": Acked,
    "caught_up": CaughtUp,
    "gap": Gap,
    "dismissed": Dismissed,
    "refreshed": Refreshed,
    "error": Problem,
    "shutdown": Shutdown,
}


class _Head(msgspec.Struct):
    type: str


_head = msgspec.json.Decoder(_Head)
_decoders = {name: msgspec.json.Decoder(kind) for name, kind in _TYPES.items()}


def parse(data: bytes) -> Told | None:
    """What a message says; None for what only shows that the server lives, or is newer than us.

    Raises msgspec.DecodeError (ValidationError) or UnicodeDecodeError for what is no message.
    """
    decoder = _decoders.get(_head.decode(data).type)
    return None if decoder is None else decoder.decode(data)


def subscribe(channels: list[str]) -> bytes:
    """Ask for channels."""
    return msgspec.json.encode({"type": "Subscribe", "payload": {"channels": channels}})


def unsubscribe(channels: list[str]) -> bytes:
    """Ask for no more of channels."""
    return msgspec.json.encode({"type": "Unsubscribe", "payload": {"channels": channels}})


def ack(notification_ids: list[str]) -> bytes:
    """Confirm up to 100 notifications; as a list, so that the answer names those refused."""
    return msgspec.json.encode({"type": "Ack", "payload": {"notification_ids": notification_ids}})


def auth(token: str) -> bytes:
    """Show a newer token."""
    return msgspec.json.encode({"type": "Auth", "payload": {"token": token}})
