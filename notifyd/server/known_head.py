"""The head of a request that came before on the same socket, so that it need not be parsed again.

Who publishes sends the same head each time, but for the length of the body. A chunk that begins
with the very bytes that were parsed before, where a request may begin, has that head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from notifyd.api.guard import Endpoint

# At the begin of a line, which no value can hold (RFC 9112, section 2.2).
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,8})[ \t]*\r\n", re.IGNORECASE)

_MAX_DIGITS = 8

Headers = Sequence[tuple[bytes, bytes]]


class KnownHead:
    """What was read in a head that the fast lane took; `forwarded`: it names its client."""

    __slots__ = ("_after", "_before", "_headers", "_place", "endpoint", "forwarded")

    def __init__(
        self,
        before: bytes,
        after: bytes,
        headers: Headers,
        place: int,
        endpoint: Endpoint,
        forwarded: bool,
    ) -> None:
        self._before = before
        self._after = after
        self._headers = headers
        self._place = place
        self.endpoint = endpoint
        self.forwarded = forwarded

    @classmethod
    def of(
        cls, data: bytes, headers: Headers, endpoint: Endpoint, *, forwarded: bool
    ) -> KnownHead | None:
        """The head that `data` begins with, where all of it is one request, whose headers these
        are, with one Content-Length; else None."""
        end = data.find(b"\r\n\r\n") + 4
        found = _CONTENT_LENGTH.search(data, 0, end)
        if found is None or len(data) != end + int(found[1]):
            return None
        place = [name for name, _ in headers].index(b"content-length")
        before, after = data[: found.start(1)], data[found.end(1) : end]
        return cls(before, after, tuple(headers), place, endpoint, forwarded)

    def body_of(self, data: bytes) -> bytes | None:
        """The body, where `data` is one whole request with this head; else None."""
        if not data.startswith(self._before):
            return None
        start = len(self._before)
        end = data.find(b"\r", start, start + _MAX_DIGITS + 1)
        if end < 0:
            return None
        after = self._after
        digits = data[start:end]
        if not digits.isdigit() or not data.startswith(after, end):
            return None
        length = int(digits)
        body = data[end + len(after) :]
        return body if len(body) == length <= self.endpoint.max_body else None

    def headers_of(self, body: bytes) -> list[tuple[bytes, bytes]]:
        """The headers with this body's length."""
        headers = list(self._headers)
        headers[self._place] = (b"content-length", b"%d" % len(body))
        return headers
