"""What a client can meet, in one tree, named as httpx names its own.

NotifydClientError
├── TransportError            no answer: refused, reset, or not HTTP
│   ├── ConnectError          no connection could be made
│   └── TimeoutException      one of the four timeouts of `httpx.Timeout` passed
├── StatusError               an answer that is an error; carries the server's code and field
├── InvalidResponse           an answer of 2xx that is not what the protocol promises
└── ConnectionClosed          the server closed a listener for good; carries the close code
"""

from __future__ import annotations

import email.utils
from collections.abc import Mapping

import httpx
import msgspec


class NotifydClientError(Exception):
    """The root: catch this to catch everything a client raises of its own."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class TransportError(NotifydClientError):
    """No answer came; `__cause__` is the httpx or websockets error behind it.

    Whether the server acted is unknown, unless this is a `ConnectError`.
    """


class ConnectError(TransportError):
    """No connection could be made, so the server did not act."""


class TimeoutException(TransportError):
    """One of the four timeouts of `httpx.Timeout` passed."""


class InvalidResponse(NotifydClientError):
    """An answer of 2xx whose body is not what the protocol promises: another server is there."""


class ConnectionClosed(NotifydClientError):
    """The server closed a listening connection with a code that forbids to come back."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"closed with {code}: {reason}" if reason else f"closed with {code}")
        self.code = code
        self.reason = reason


class StatusError(NotifydClientError):
    """An HTTP answer that is an error.

    `status` is the HTTP status, `code` the protocol's (`VALIDATION_ERROR`; `HTTP_502` where a
    gateway answered), `field` and `constraint` name the offending input, `request_id` is what to
    quote in a report, `retry_after` is in seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        field: str | None = None,
        constraint: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.field = field
        self.constraint = constraint
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        where = f" (field {self.field})" if self.field else ""
        quote = f" [request {self.request_id}]" if self.request_id else ""
        return f"{self.status} {self.code}: {self.message}{where}{quote}"


class _Details(msgspec.Struct):
    field: str | None = None
    constraint: str | None = None


class _Body(msgspec.Struct):
    code: str
    message: str = ""
    details: _Details | None = None


class _Envelope(msgspec.Struct):
    error: _Body


def status_error(status: int, headers: Mapping[str, str], content: bytes) -> StatusError:
    """The error that an HTTP answer tells; a body of another shape (a gateway's) is left out.

    `headers` must be looked up without regard to case, as httpx and websockets do.
    """
    try:
        told = msgspec.json.decode(content, type=_Envelope).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        phrase = httpx.codes.get_reason_phrase(status) or "an unexpected status"
        told = _Body(code=f"HTTP_{status}", message=phrase)
    details = told.details or _Details()
    return StatusError(
        told.message,
        status=status,
        code=told.code,
        field=details.field,
        constraint=details.constraint,
        request_id=headers.get("X-Request-ID"),
        retry_after=retry_after(headers),
    )


def transport_error(error: httpx.TransportError) -> TransportError:
    """Our name for an httpx error; the caller chains it with `raise … from`."""
    text = str(error) or type(error).__name__
    # RFC 9110 9.2.2 lets a client repeat what surely never arrived, so these are told apart.
    if isinstance(error, httpx.TimeoutException):
        return TimeoutException(text)
    if isinstance(error, httpx.ConnectError):
        return ConnectError(text)
    return TransportError(text)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds told by `Retry-After` (RFC 9110 10.2.3), None where absent or not understood.

    A date is measured against the answer's own `Date`, so that no clock of ours is asked.
    """
    value = headers.get("Retry-After")
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value)
        since = email.utils.parsedate_to_datetime(headers.get("Date", ""))
        return max(0.0, (until - since).total_seconds())
    except (TypeError, ValueError):
        return None
