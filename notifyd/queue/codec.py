"""Notifications <-> the bytes that stores keep: JSON on one line, with a version number.

The shape is written down here and not taken from `Notification`, so that a field renamed there
changes nothing that is stored. A newer shape gets the next number, and a reader for the older one.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from notifyd.notification import EVERYONE, Audience, Notification, Priority

VERSION = 1

CorruptReason = Literal["not_json", "version", "shape"]


class CorruptEntry(Exception):
    """Stored bytes that are no notification of ours; `reason` is for counting, the text for the
    log."""

    def __init__(self, reason: CorruptReason, text: str) -> None:
        super().__init__(text)
        self.reason: CorruptReason = reason


class _Version(msgspec.Struct, gc=False):
    v: int


class _Stored(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    v: int
    id: str
    at: float
    event: str
    payload: msgspec.Raw
    priority: Priority = Priority.NORMAL
    ttl: int | None = None
    correlation: str | None = None
    source: str | None = None
    audience: Audience = EVERYONE
    ack: bool = False


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Stored).decode
_decode_version = msgspec.json.Decoder(_Version).decode


def encode_entry(notification: Notification) -> bytes:
    """The notification as a store keeps it."""
    return _encode(
        _Stored(
            VERSION,
            notification.id,
            notification.occurred_at,
            notification.event_type,
            notification.payload,
            notification.priority,
            notification.ttl,
            notification.correlation_id,
            notification.source,
            notification.audience,
            notification.require_ack,
        )
    )


def decode_entry(data: bytes) -> Notification:
    """What `encode_entry` was given. Raises CorruptEntry."""
    try:
        stored = _decode(data)
    except msgspec.MsgspecError as error:
        raise CorruptEntry(_reason(data), str(error)) from error
    if stored.v != VERSION:
        raise CorruptEntry("version", f"version {stored.v} and not {VERSION}")
    _check_one_line(data)
    return Notification(
        stored.id,
        stored.at,
        stored.event,
        stored.payload,
        stored.priority,
        stored.ttl,
        stored.correlation,
        stored.source,
        stored.audience,
        stored.ack,
    )


def _reason(data: bytes) -> CorruptReason:
    try:
        version = _decode_version(data).v
    except msgspec.ValidationError:
        return "shape"
    except msgspec.DecodeError:
        return "not_json"
    return "shape" if version == VERSION else "version"


def _check_one_line(data: bytes) -> None:
    """The payload goes out as it stands: a line break would end an SSE field, and bytes that are no
    UTF-8 a WebSocket connection (RFC 6455, section 8.1)."""
    if b"\n" in data or b"\r" in data:
        raise CorruptEntry("shape", "more than one line")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise CorruptEntry("not_json", str(error)) from error
