"""Who may connect: the request of a WebSocket or SSE client, before it has a connection.

The token comes by query, header, subprotocol or cookie, in that order; a WebSocket may also come
without one and authenticate with its first message.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import parse_qsl

from notifyd.auth import Origins, TokenVerifier
from notifyd.connections.connection import Transport
from notifyd.errors import BadRequest, Forbidden, Unauthorized
from notifyd.eventually import Eventually
from notifyd.identity import Identity

SUBPROTOCOL = "notifyd.v1"
BEARER_SUBPROTOCOL = "bearer."
MAX_USER_AGENT = 256
MAX_PARAMETERS = 32


class Handshake:
    """What a client asked for when it came.

    `headers` have lower-case names; `query` is the raw query string with its token, if any. `fault`
    is what refuses it where the query is not UTF-8 or a parameter makes no sense: the rest is read
    all the same, and says how the client can be told.
    """

    __slots__ = (
        "acks",
        "address",
        "channels",
        "cookie",
        "fault",
        "origin",
        "same_origin",
        "subprotocols",
        "token",
        "transport",
        "user_agent",
    )

    def __init__(
        self,
        transport: Transport,
        query: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        address: str,
    ) -> None:
        self.transport: Transport = transport
        self.address = address
        self.token: str | None = None
        self.acks = False
        self.channels: tuple[str, ...] = ()
        self.origin: str | None = None
        self.same_origin = False
        self.cookie = ""
        self.user_agent = ""
        self.subprotocols: list[str] = []
        self.fault: BadRequest | None = None
        bearer: str | None = None
        for name, value in headers:
            if name == b"authorization":
                scheme, _, credentials = value.decode("latin-1").partition(" ")
                if scheme.lower() == "bearer":
                    # Of two, none is taken: whoever checked one on the way may mean the other.
                    bearer = credentials.strip() if bearer is None else f"{bearer},{credentials}"
            elif name == b"origin":
                self.origin = value.decode("latin-1")
            elif name == b"user-agent":
                self.user_agent = value.decode("latin-1")[:MAX_USER_AGENT]
            elif name == b"cookie":
                # HTTP/2 may bring them in several (RFC 9113, section 8.2.3).
                self.cookie += f"{value.decode('latin-1')};"
            elif name == b"sec-fetch-site":
                self.same_origin = value == b"same-origin"
            elif name == b"sec-websocket-protocol":
                self.subprotocols += [token.strip() for token in value.decode("latin-1").split(",")]
        if query:
            try:
                self._read_query(query)
            except BadRequest as fault:
                self.fault = fault
        if self.token is None:
            self.token = bearer
        if self.token is None:
            for subprotocol in self.subprotocols:
                if subprotocol.startswith(BEARER_SUBPROTOCOL):
                    self.token = subprotocol.removeprefix(BEARER_SUBPROTOCOL)
                    break

    def _read_query(self, query: bytes) -> None:
        for name, value in _parameters(query):
            if name == "token":
                self.token = value
            elif name == "acks":
                if value not in ("0", "1"):
                    raise BadRequest("acks is 0 or 1.", field="acks", constraint="0 or 1")
                self.acks = value == "1"
            elif name == "channels" and self.transport == "sse":
                self.channels += tuple(channel for channel in value.split(",") if channel)

    @property
    def chosen_subprotocol(self) -> str | None:
        """`notifyd.v1` where it is offered; a lone `bearer.<jwt>` is echoed, or browsers fail."""
        if SUBPROTOCOL in self.subprotocols:
            return SUBPROTOCOL
        for subprotocol in self.subprotocols:
            if subprotocol.startswith(BEARER_SUBPROTOCOL):
                return subprotocol
        return None


def _parameters(query: bytes) -> list[tuple[str, str]]:
    """Names and values of a query string; raises BadRequest."""
    try:
        text = query.decode("ascii")
        if "%" not in text and "+" not in text and ";" not in text:
            # Nothing is escaped, as in any JWT.
            pairs = [part.partition("=") for part in text.split("&", MAX_PARAMETERS)]
            if len(pairs) <= MAX_PARAMETERS:
                return [(name, value) for name, _, value in pairs]
        return parse_qsl(
            text, keep_blank_values=True, errors="strict", max_num_fields=MAX_PARAMETERS
        )
    except ValueError as error:
        raise BadRequest(
            f"The query string is not UTF-8, or has more than {MAX_PARAMETERS} parameters."
        ) from error


class Admission:
    """Decides who a handshake's client is."""

    def __init__(
        self, verifier: TokenVerifier, origins: Origins, *, cookie_name: str | None
    ) -> None:
        self._verifier = verifier
        self._origins = origins
        self._cookie_name = cookie_name

    def origin_allowed(self, handshake: Handshake) -> bool:
        """Whether a browser page of this origin may connect; no origin means no browser."""
        return self._origins.allows(handshake.origin)

    def identify(self, handshake: Handshake) -> Eventually[Identity | None]:
        """The user, or None for a WebSocket that is to authenticate with its first message.

        Raises Forbidden for a foreign origin, BadRequest for a handshake with a fault, Unauthorized
        or TokenExpired for a token that is invalid, Unavailable where the keys to check it cannot
        be had.
        """
        if not self._origins.allows(handshake.origin):
            raise Forbidden(
                "This origin may not connect.",
                hint=f'add "{handshake.origin}" to cors.origins',
            )
        if handshake.fault is not None:
            raise handshake.fault
        token = handshake.token
        if token is None:
            token = self._from_cookie(handshake)
        if token is not None:
            return self._verifier.verify(token)
        if handshake.transport == "sse":
            raise Unauthorized(
                "A token is missing.",
                hint="give it as ?token=… or as Authorization: Bearer …",
            )
        return None

    def _from_cookie(self, handshake: Handshake) -> str | None:
        if not self._cookie_name or not handshake.cookie:
            return None
        value = _cookie(handshake.cookie, self._cookie_name)
        if value is None:
            return None
        # A cookie goes along with every site's requests, so the page must be known (CSRF).
        if handshake.origin is None and not handshake.same_origin:
            raise Forbidden(
                "A cookie is taken only with an allowed Origin or Sec-Fetch-Site: same-origin."
            )
        return value


def _cookie(header: str, name: str) -> str | None:
    """The first cookie of this name: the one with the longest path (RFC 6265, section 5.4).

    Not by `http.cookies`, which finds none at all where another cookie holds, say, JSON.
    """
    for pair in header.split(";"):
        found, equals, value = pair.partition("=")
        if equals and found.strip() == name:
            return value.strip().strip('"')
    return None
