"""Client and server messages <-> bytes. What many connections get is encoded once.

A server message is a JSON object with a `type`. On WebSocket it is one text frame (RFC 6455,
section 5.6); on SSE (WHATWG, "Server-sent events") the type becomes the event's name and the data
is the object without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, get_args

import msgspec

from notifyd.errors import NotifydError, ValidationError
from notifyd.identifiers import timestamp_text
from notifyd.notification import (
    MAX_NOTIFICATION_BYTES,
    MAX_PAYLOAD_DEPTH,
    AudienceType,
    Notification,
)

MAX_REASON = 200
"""Characters of a decoder's sentence that are told."""

MAX_CONTROL_PAYLOAD = 125
"""Bytes that a control frame may carry (RFC 6455, section 5.5)."""

_encode = msgspec.json.Encoder().encode


def text_frame(data: bytes) -> bytes:
    """One unmasked text frame (RFC 6455, section 5.2)."""
    length = len(data)
    if length < 126:
        return b"\x81%c" % length + data
    if length < 65536:
        return b"\x81\x7e" + length.to_bytes(2, "big") + data
    return b"\x81\x7f" + length.to_bytes(8, "big") + data


def ping_frame(payload: bytes = b"") -> bytes:
    """A Ping with at most 125 bytes of payload."""
    return b"\x89%c" % len(payload) + payload


def pong_frame(payload: bytes) -> bytes:
    """The answer to a Ping, with the Ping's own payload."""
    return b"\x8a%c" % len(payload) + payload


def texts_of_frames(data: bytes) -> Iterator[str]:
    """The texts of whole frames that this module made; Pings are passed over.

    For an ASGI server, which frames messages itself.
    """
    position = 0
    while position < len(data):
        opcode, length = data[position] & 0x0F, data[position + 1]
        position += 2
        if length > 125:
            size = 2 if length == 126 else 8
            length = int.from_bytes(data[position : position + size], "big")
            position += size
        if opcode == 1:
            yield data[position : position + length].decode()
        position += length


class Message(msgspec.Struct, eq=False, gc=False):
    """One server message, encoded lazily and once for each transport.

    `json` is the whole object on one line, its `type` first.
    """

    type: str
    json: bytes
    _websocket: bytes | None = None
    _sse: bytes | None = None

    @property
    def body(self) -> bytes:
        """The object without its `type`."""
        rest = self.json[len(b'{"type":""') + len(self.type) :]
        return b"{}" if rest == b"}" else b"{" + rest[1:]

    @property
    def websocket(self) -> bytes:
        """The message as one text frame."""
        frame = self._websocket
        if frame is None:
            frame = self._websocket = text_frame(self.json)
        return frame

    @property
    def sse(self) -> bytes:
        """The message as one event; JSON on one line needs no second `data:`."""
        event = self._sse
        if event is None:
            event = self._sse = b"event: %b\ndata: %b\n\n" % (self.type.encode(), self.body)
        return event


# --- server -> client ---


class _Audience(msgspec.Struct, gc=False):
    type: str


class _Metadata(msgspec.Struct, gc=False, omit_defaults=True):
    source: str | None
    priority: str
    audience: _Audience
    ttl: int | None = None
    correlation_id: str | None = None
    replayed: bool = False


class _Notification(msgspec.Struct, gc=False, tag_field="type", tag="notification"):
    id: str
    occurred_at: str
    event_type: str
    payload: msgspec.Raw
    metadata: msgspec.Raw


# An event has the type for its name, so it is none of the notification's own bytes.
_TYPE_BYTES = len(b'"type":"notification",')
_AUDIENCES = {name: _Audience(name) for name in get_args(AudienceType)}


def notification_message(notification: Notification, *, replayed: bool = False) -> Message:
    """The `notification` message; the audience's members stay behind.

    Raises ValidationError where it would be over 64 KiB.
    """
    metadata = _metadata if notification.correlation_id is None else _metadata.__wrapped__
    json = _encode(
        _Notification(
            notification.id,
            timestamp_text(notification.occurred_at),
            notification.event_type,
            notification.payload,
            metadata(
                notification.source,
                notification.priority._value_,
                notification.audience.type,
                notification.ttl,
                notification.correlation_id,
                replayed,
            ),
        )
    )
    # What marks a replay must not push over the limit what was within it when it was accepted.
    size = len(json) - _TYPE_BYTES
    if size > MAX_NOTIFICATION_BYTES and not replayed:
        raise ValidationError(
            f"The notification is {size} bytes when encoded, "
            f"over the limit of {MAX_NOTIFICATION_BYTES}.",
            field="payload",
            constraint=f"at most {MAX_NOTIFICATION_BYTES} bytes",
        )
    return Message("notification", json)


@lru_cache(maxsize=256)
def _metadata(
    source: str | None,
    priority: str,
    audience: AudienceType,
    ttl: int | None,
    correlation_id: str | None,
    replayed: bool,
) -> msgspec.Raw:
    """Encoded once for the many notifications that have the same."""
    metadata = _Metadata(source, priority, _AUDIENCES[audience], ttl, correlation_id, replayed)
    return msgspec.Raw(_encode(metadata))


def message(type: str, **fields: Any) -> Message:
    """Any other server message; fields that are None are left out."""
    told = {name: value for name, value in fields.items() if value is not None}
    return Message(type, _encode({"type": type, **told}))


def connected_message(
    connection_id: str,
    user_id: str,
    *,
    expires_at: float | None,
    heartbeat_interval: float,
    subscriptions: Sequence[str],
) -> Message:
    """The first message of a connection; times in Unix seconds and seconds."""
    session: dict[str, Any] = {}
    if expires_at is not None:
        session["expires_at"] = second_text(expires_at)
    session["heartbeat_interval"] = whole(heartbeat_interval)
    session["subscriptions"] = subscriptions
    return message("connected", connection_id=connection_id, user_id=user_id, session=session)


def gap_message(
    stream: str, reason: str, first: int | None = None, last: int | None = None
) -> Message:
    """What was missed, in band: offsets `first` to `last` of the stream, where they are known."""
    fields: dict[str, Any] = {"stream": stream, "from": first, "to": last, "reason": reason}
    return message("gap", **fields)


def error_message(error: NotifydError) -> Message:
    """An error as a client of a stream sees it."""
    return message(
        "error", code=error.code, message=error.message, retry_after_seconds=error.retry_after
    )


def second_text(unix_seconds: float) -> str:
    """RFC 3339 in UTC, to the second."""
    return f"{timestamp_text(unix_seconds)[:19]}Z"


def whole(number: float) -> float:
    """`number` as an int where it is one, so that 30.0 is written 30."""
    return int(number) if number == int(number) else number


PONG = Message("pong", b'{"type":"pong"}')
HEARTBEAT = Message("heartbeat", b'{"type":"heartbeat"}')


def sse_heartbeat(unix_seconds: float) -> bytes:
    """The heartbeat event of one sweep, shared by all of its connections."""
    return b'event: heartbeat\ndata: {"timestamp":"%b"}\n\n' % timestamp_text(unix_seconds).encode()


def sse_retry(milliseconds: int) -> bytes:
    """Tells an EventSource how long to wait before it reconnects."""
    return b"retry: %d\n\n" % milliseconds


# --- client -> server ---


class InvalidMessage(NotifydError):
    """A client message that is not one; the connection lives."""

    code = "INVALID_MESSAGE"


class Channels(msgspec.Struct, frozen=True):
    """The payload of Subscribe and Unsubscribe."""

    channels: list[str]


class Subscribe(msgspec.Struct, frozen=True, tag=True):
    """Asks for channels."""

    payload: Channels


class Unsubscribe(msgspec.Struct, frozen=True, tag=True):
    """Gives channels up."""

    payload: Channels


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Asks for a `pong`."""


class AckPayload(msgspec.Struct, frozen=True):
    """One id, or up to 100."""

    notification_id: str | None = None
    notification_ids: list[str] | None = None


class Ack(msgspec.Struct, frozen=True, tag=True):
    """Confirms notifications."""

    payload: AckPayload


class AuthPayload(msgspec.Struct, frozen=True):
    """A JWT."""

    token: str

    def __repr__(self) -> str:
        return "AuthPayload(token=…)"


class Auth(msgspec.Struct, frozen=True, tag=True):
    """Authenticates a connection, or refreshes its token."""

    payload: AuthPayload


ClientMessage = Subscribe | Unsubscribe | Ping | Ack | Auth

_client_messages: msgspec.json.Decoder[ClientMessage] = msgspec.json.Decoder(ClientMessage)
_KNOWN_TYPES = ("Subscribe", "Unsubscribe", "Ping", "Ack", "Auth")


def decode_client_message(text: str | bytes) -> ClientMessage:
    """One client message; unknown fields are ignored (newer clients meet older servers).

    Raises InvalidMessage with the reason.
    """
    try:
        return _client_messages.decode(text)
    except msgspec.ValidationError as error:
        text = str(error)
        # It may hold what the client sent, up to 64 KiB of it.
        shown = text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}…"
        raise InvalidMessage(
            f"{shown}. Known types: {', '.join(_KNOWN_TYPES)}."
            if "$.type" in text or "`type`" in text
            else f"{shown}."
        ) from error
    except msgspec.DecodeError as error:
        raise InvalidMessage(f"The message is not JSON: {error}.") from error
    except RecursionError as error:
        raise InvalidMessage("The message is nested too deeply.") from error


# --- payloads ---

# Numbers stay text: a recipient may read digits that no float holds.
_decode_strings = msgspec.json.Decoder(float_hook=str).decode
BACKSLASH = 0x5C
SURELY_FLAT = 2 * MAX_PAYLOAD_DEPTH
"""So few bytes are not nested too deeply: each level takes two brackets."""

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")


def nested_too_deep(data: bytes) -> bool:
    """Whether valid JSON is nested more than 64 deep."""
    if data.count(b"{") + data.count(b"[") <= MAX_PAYLOAD_DEPTH:
        return False
    brackets = _STRING.sub(b"", data).translate(_STEPS, _NOT_BRACKETS)
    return max(accumulate(memoryview(brackets).cast("b")), default=0) > MAX_PAYLOAD_DEPTH


def normalise_payload(raw: msgspec.Raw | bytes, field: str = "payload") -> msgspec.Raw:
    """A caller's JSON as every recipient can read it: valid, on one line, at most 64 deep.

    `raw` must be strict UTF-8 already (a body is decoded strictly before its JSON is). Numbers keep
    their digits. Raises ValidationError.
    """
    try:
        return _checked_payload(msgspec.json.format(raw, indent=-1), field)
    except msgspec.DecodeError as error:
        raise ValidationError(f"{field} is not valid JSON: {error}.", field=field) from error
    except RecursionError as error:
        raise _too_deep(field) from error


def payload_of_compact(raw: msgspec.Raw) -> msgspec.Raw | None:
    """`normalise_payload` for a part of valid JSON without whitespace; None where that would raise.

    The part is copied out of the whole.
    """
    data = bytes(raw)
    if len(data) <= SURELY_FLAT and BACKSLASH not in data:
        return msgspec.Raw(data)
    try:
        return _checked_payload(data, "payload")
    except (ValidationError, msgspec.DecodeError, RecursionError):
        return None


def _checked_payload(data: bytes, field: str) -> msgspec.Raw:
    if BACKSLASH in data and b"\\u" in data:
        # A lone surrogate is valid by JSON's grammar, and no strict client could decode it.
        _decode_strings(data)
    if len(data) > SURELY_FLAT and nested_too_deep(data):
        raise _too_deep(field)
    return msgspec.Raw(data)


def _too_deep(field: str) -> ValidationError:
    return ValidationError(
        f"{field} is nested more than {MAX_PAYLOAD_DEPTH} deep.",
        field=field,
        constraint=f"nested at most {MAX_PAYLOAD_DEPTH} deep",
    )


def acked_message(acked: Sequence[str], refused: Sequence[str], *, single: bool) -> Message:
    """The answer to an Ack: of one id as Ara has it, of a list with what was refused."""
    if single:
        return message("acked", notification_id=acked[0])
    return message(
        "acked",
        notification_id=acked[0] if acked else None,
        notification_ids=list(acked),
        refused=list(refused) or None,
    )


def names_message(type: str, names: Iterable[str]) -> Message:
    """`subscribed` or `unsubscribed`."""
    return message(type, payload=list(names))
