"""How a client that may not connect is told, so that it can act on it.

A browser reads neither the status of a refused WebSocket handshake nor anything of a refused
EventSource: the one is upgraded, told and closed, the other gets a stream that says why and ends.
"""

from __future__ import annotations

from collections.abc import Callable

from notifyd import wire
from notifyd.connections.admission import Admission, Handshake
from notifyd.errors import NotifydError

DEFAULT_RETRY_SECONDS = 5
PROTOCOL_ERROR = 1002
"""The client must be mended, and should not come again as it is."""


def by_close_code(error: NotifydError, handshake: Handshake, admission: Admission) -> int | None:
    """The close code that tells a browser's WebSocket, None where the HTTP status does.

    Without an Origin nobody is a browser; a foreign page is told nothing but the status.
    """
    if handshake.origin is None or not admission.origin_allowed(handshake):
        return None
    if error.http_status == 400:
        return PROTOCOL_ERROR
    if error.http_status == 401:
        return 4001
    return error.close_code if error.http_status in (429, 503) else None


def as_stream(error: NotifydError, spread: Callable[[float, float], float]) -> bytes | None:
    """The events that tell an EventSource, None where the HTTP status does.

    An EventSource gives up for good on any status but 200 (WHATWG, "Server-sent events"), which is
    right for 401 and 403 and wrong for what passes.
    """
    if error.http_status not in (429, 503):
        return None
    seconds = error.retry_after or DEFAULT_RETRY_SECONDS
    retry = wire.sse_retry(int(spread(seconds * 1000, seconds * 1500)))
    return retry + wire.error_message(error).sse
