"""HTTP/1.1 on uvicorn's parser and bookkeeping, with lanes of our own beside its ASGI cycle.

The hot publishing routes are answered in `on_message_complete`, without a task or an ASGI cycle;
WebSocket upgrades and SSE streams leave this protocol for their own. All else goes to uvicorn. This
module and `serve` are the only ones that know uvicorn; `UVICORN_ATTRIBUTES` lists what they touch.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NoReturn, cast

import httptools
import structlog
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState
from websockets.utils import accept_key

from notifyd import wire
from notifyd.api.guard import Answer, Endpoint, Guard, Request
from notifyd.connections.admission import Handshake
from notifyd.connections.lifecycle import Lifecycle
from notifyd.connections.refusal import as_stream, by_close_code
from notifyd.errors import (
    BadRequest,
    HeadTooLarge,
    NotFound,
    NotifydError,
    RequestTimeout,
)
from notifyd.eventually import Eventually, is_awaitable
from notifyd.forwarded import TrustedProxies
from notifyd.identifiers import request_id
from notifyd.identity import Identity
from notifyd.server.door import Door, Timeouts
from notifyd.server.known_head import KnownHead
from notifyd.server.stream import StreamProtocol
from notifyd.server.websocket import WebSocketProtocol

TESTED_UVICORN = "0.54"

UVICORN_ATTRIBUTES: Final = {
    "HttpToolsProtocol": (
        "_should_upgrade",
        "_start_asgi_task",
        "_unset_keepalive_if_required",
        "app_state",
        "client",
        "connections",
        "cycle",
        "expect_100_continue",
        "flow",
        "headers",
        "loop",
        "parser",
        "pipeline",
        "scheme",
        "scope",
        "server",
        "server_state",
        "transport",
        "url",
    ),
    "RequestResponseCycle": (
        "disconnected",
        "keep_alive",
        "message_event",
        "more_body",
        "response_complete",
        "response_started",
    ),
    "Config": ("ssl",),
    "FlowControl": ("pause_reading", "resume_reading", "resume_writing", "write_paused"),
    "ServerState": ("connections", "default_headers", "tasks", "total_requests"),
}

OF_ONE_SOCKET: Final = ("parser", "pipeline")
"""What `HttpToolsProtocol` makes for each socket anew."""

MAX_HEAD_BYTES = 16384
MAX_HEADERS = 100
MAX_EARLY_BYTES = 65536

MAX_NEW_HEADS = 8
"""Who sends another head each time is not expected to send one again."""

_NEVER = float("inf")

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-store\r\n"
    b"x-accel-buffering: no\r\nconnection: close\r\n"
)


class Services:
    """What every socket's protocol needs to answer."""

    def __init__(
        self,
        *,
        lifecycle: Lifecycle,
        guard: Guard,
        fast: Mapping[bytes, Endpoint],
        proxies: TrustedProxies,
        max_message_bytes: int,
        spread: Callable[[float, float], float],
        timeouts: Timeouts,
    ) -> None:
        self.lifecycle = lifecycle
        self.guard = guard
        self.fast = fast
        self.proxies = proxies
        self.max_message_bytes = max_message_bytes
        self.spread = spread
        self.timeouts = timeouts
        self.log = structlog.get_logger("notifyd.server")


class _NoEvent:
    """Nobody waits for a message of a request that the fast lane has."""

    __slots__ = ()

    def set(self) -> None:
        """There is nobody to wake."""


class FastCycle:
    """Stands where uvicorn keeps its request cycle, while and after the fast lane answers."""

    __slots__ = ("disconnected", "keep_alive", "response_complete")

    message_event = _NoEvent()
    more_body = False
    response_started = False

    def __init__(self, *, response_complete: bool) -> None:
        self.response_complete = response_complete
        self.keep_alive = True
        self.disconnected = False


class Beginning:
    """What uvicorn's protocol has before its socket: all but the parser and the pipeline is the
    same for every one of them."""

    __slots__ = ("shared",)

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.shared = vars(HttpToolsProtocol(config, server_state, app_state, _loop))
        for name in OF_ONE_SOCKET:
            del self.shared[name]


def _new_parser(protocol: HttpToolsProtocol) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(protocol)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
    return parser


class HttpProtocol(HttpToolsProtocol):
    """One client's socket while it speaks HTTP."""

    # Where every socket begins; it gets its own of what changes.
    deadline = _NEVER
    _in_head = False
    _head_bytes = 0
    _head_began = False
    _ended = False
    _upgrades = False
    _upgrade_ignored = False
    _refused = False
    _endpoint: Endpoint | None = None
    _answered_fast = False
    _known: KnownHead | None = None
    _within_request = False
    _known_is_next = False
    _new_heads = -1
    _caller_known = False
    _body: bytes | bytearray = b""
    _trailer = False
    _trailer_bytes = 0
    _forwarded = False
    _host = ""
    _stream = False
    _early: bytearray | None = None
    _refusal: NotifydError | None = None
    _default_headers: Sequence[tuple[bytes, bytes]] = ()
    _default_head = b""

    def __init__(self, services: Services, door: Door, beginning: Beginning) -> None:
        # Instead of uvicorn's own, which finds out the same for every socket.
        vars(self).update(beginning.shared)
        self.pipeline = deque()
        self.parser = _new_parser(self)
        self._services = services
        self._door = door
        self._timeouts = services.timeouts

    # --- the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The doorman hands the socket over with its first bytes."""
        # As uvicorn does it, but for its look at the socket, which costs more than the rest.
        self.transport = cast(asyncio.Transport, transport)
        self.connections.add(self)
        self.flow = FlowControl(self.transport)
        self.client = _address(transport, "peername")
        self._host = self.client[0] if self.client else ""
        self.scheme = "https" if transport.get_extra_info("sslcontext") else "http"
        self.deadline = self.loop.time() + self._timeouts.head
        self._door.waiting[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone."""
        self._door.waiting.pop(self, None)
        self._door.leave()
        super().connection_lost(exc)
        # Requests that were waiting for their turn refer to this protocol, as it does to them.
        self.pipeline.clear()
        self.cycle = None  # type: ignore[assignment]  # as it is before the first request

    def data_received(self, data: bytes) -> None:
        """Feed the parser; count what belongs to a head, which uvicorn would let grow without
        end.
        """
        if self._early is not None:
            if self._refused:
                return
            # A client speaks before its handshake is answered: kept for its WebSocket.
            self._early += data
            if len(self._early) > MAX_EARLY_BYTES:
                self.transport.close()
            return
        known = self._known
        if known is not None and self._known_is_next:
            body = known.body_of(data)
            if body is not None and not self._busy():
                self._answer_known(known, body)
                return
        self._known_is_next = self._answered_fast = self._head_began = self._ended = False
        began_between = not self._within_request
        in_trailer = self._trailer
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if not self._upgrade_ignored:
                    self._upgrade(data[upgrade.args[0] :])
                    return
                data = self._without_upgrade(data[upgrade.args[0] :])
                self._head_began = self._ended = False
                self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse_and_close(BadRequest("An upgrade cannot be pipelined."))
            return
        except httptools.HttpParserError:
            if not self._stream:
                refusal = self._refusal or BadRequest("This is not a valid HTTP request.")
                self._refuse_and_close(refusal)
            return
        if in_trailer and self._trailer:
            # Behind the last chunk the parser gathers a header until it ends, and no limit of a
            # body looks there (RFC 9112, section 7.1.2).
            self._trailer_bytes += len(data)
            if self._trailer_bytes > MAX_HEAD_BYTES:
                self._refuse_and_close(_head_too_large())
        if self._in_head and not (self._head_began and self._ended):
            # The head of one request spans this whole chunk.
            self._head_bytes = len(data) + (0 if self._head_began else self._head_bytes)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_and_close(_head_too_large())
        elif self._endpoint is not None and not self._caller_known:
            self._look_at_caller(self._endpoint)
        elif self._answered_fast and began_between:
            self._learn_head(data)

    def timed_out(self) -> None:
        """The deadline for a head or a body passed; an idle connection is just closed."""
        self.deadline = _NEVER
        if self._refused:
            self.transport.close()
        elif self._in_head or self._endpoint is not None or self._body_is_due():
            what = "head" if self._in_head else "body"
            self._refuse_and_close(RequestTimeout(f"The request's {what} did not arrive in time."))
        else:
            self.transport.close()

    def shutdown(self) -> None:
        """The server stops: finish what is being answered, take nothing new."""
        if self._refused:
            self.transport.close()
            return
        if self._endpoint is not None and not self.transport.is_closing():
            self._refuse_and_close(RequestTimeout("The server is shutting down."))
            return
        super().shutdown()

    # --- the parser ---

    def on_message_begin(self) -> None:
        """A request's first byte."""
        if self._stream:
            raise BadRequest("Nothing can be asked behind a stream.")
        # uvicorn would make the ASGI scope here, which only its own lane needs.
        self.scope = None  # type: ignore[assignment]  # until `_make_scope`
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._in_head = True
        self._within_request = True
        self._head_began = True
        self._head_bytes = 0
        self.deadline = self.loop.time() + self._timeouts.head

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        if self._head_began:
            self._head_bytes += len(url)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refusal = _head_too_large()
            raise self._refusal
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header. As uvicorn does it, in one call."""
        headers = self.headers
        if self._head_began:
            self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > MAX_HEAD_BYTES or len(headers) >= MAX_HEADERS:
            self._refusal = _head_too_large()
            raise self._refusal
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        headers.append((name, value))

    def _make_scope(self) -> None:
        """The scope for ASGI, of the head that is read already."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        if self.server is None:
            self.server = _address(self.transport, "sockname")
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers += headers

    def on_headers_complete(self) -> None:
        """Choose the lane."""
        self._in_head = False
        parser = self.parser
        method = parser.get_method()
        if parser.should_upgrade() and method != b"CONNECT":
            if self._should_upgrade():
                # The parser ends behind this head, and no scope is needed.
                self._check_head()
                self._upgrades = True
            else:
                self._upgrade_ignored = True
            return
        if method == b"POST":
            endpoint = self._services.fast.get(self.url)
            if endpoint is not None and self._takes_fast_lane(endpoint):
                self._endpoint = endpoint
                self._caller_known = False
                self._body = b""
                self.deadline = self.loop.time() + self._timeouts.body
                return
        self._check_head()
        if method == b"CONNECT":
            self._refuse_head("This is no proxy: there is nothing to CONNECT to.")
        if method == b"GET" and self._is_stream():
            self._stream = True
            return
        self.deadline = self.loop.time() + self._timeouts.body
        self._make_scope()
        super().on_headers_complete()

    def _look_at_caller(self, endpoint: Endpoint) -> None:
        """The body did not come with its head: a stranger's is not waited for."""
        self._caller_known = True
        address = self._peer() if self._forwarded else self._host
        request = Request("POST", endpoint.path, {}, b"", self.headers, b"", address)
        try:
            endpoint.check_key(request)
        except NotifydError as error:
            answer = endpoint.refuse(request, error)
            self._endpoint = None
            if is_awaitable(answer):
                self._take_no_more()
                task = self.loop.create_task(self._end_later(answer))
                self.server_state.tasks.add(task)
                task.add_done_callback(self.server_state.tasks.discard)
            else:
                self._end_with(answer)

    async def _end_later(self, pending: Awaitable[Answer]) -> None:
        answer = await pending
        if not self.transport.is_closing():
            self._end_with(answer)

    def _check_head(self) -> None:
        """Two ways to say where a body ends are a way to smuggle a request (RFC 9112, section 6.3),
        a coding that is not undone garbles its body (6.1), and a Host there must be (3.2).
        """
        names = [name for name, _ in self.headers if name in _CHECKED]
        if names == [b"host"]:
            return
        hosts = names.count(b"host")
        if len(names) - hosts > 1:
            self._refuse_head(
                "A request has one Content-Length or one Transfer-Encoding, not both and not two."
            )
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            self._refuse_head("A request has one Host.")
        for name, value in self.headers:
            if name == b"transfer-encoding" and value.lower() != b"chunked":
                self._refuse_head("The only Transfer-Encoding known here is chunked.")

    def _refuse_head(self, reason: str) -> NoReturn:
        self._refusal = BadRequest(reason)
        raise self._refusal

    def _takes_fast_lane(self, endpoint: Endpoint) -> bool:
        parser = self.parser
        if not parser.should_keep_alive() or parser.get_http_version() != "1.1" or self._busy():
            return False
        length = -1
        hosts = 0
        self._forwarded = False
        for name, value in self.headers:
            if name in _LOOKED_AT:
                if name == b"host":
                    hosts += 1
                elif name == b"x-forwarded-for":
                    self._forwarded = True
                elif name != b"content-length" or length >= 0 or not value.isdigit():
                    return False
                else:
                    length = int(value)
        return hosts == 1 and 0 <= length <= endpoint.max_body

    def _busy(self) -> bool:
        """Whether a request before this one is still being answered, or its client does not
        read.
        """
        cycle = self.cycle
        return (
            (cycle is not None and not cycle.response_complete)
            or bool(self.pipeline)
            or self.flow.write_paused
        )

    def _is_stream(self) -> bool:
        if self.url.partition(b"?")[0] != b"/sse":
            return False
        # HTTP/1.0 too, as many proxies speak it: uvicorn would send it chunks, which it has not.
        if self.parser.get_http_version() not in {"1.1", "1.0"}:
            return False
        if self.parser.should_upgrade() or self._busy():
            return False
        return not any(
            name in (b"content-length", b"transfer-encoding", b"expect") for name, _ in self.headers
        )

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._trailer = False
        if self._endpoint is None:
            super().on_body(body)
        elif not self._body:
            self._body = body
        else:
            # Many small pieces must not copy all that came before them.
            if not isinstance(self._body, bytearray):
                self._body = bytearray(self._body)
            self._body += body

    def on_chunk_header(self) -> None:
        """A chunk is announced: what comes next is its body, or a trailer where it is the last."""
        self._trailer = True
        self._trailer_bytes = 0

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._ended = True
        self._within_request = False
        self._trailer = False
        endpoint = self._endpoint
        if endpoint is not None:
            self._endpoint = None
            self._answered_fast = True
            self.deadline = _NEVER
            self._answer_fast(endpoint)
        elif self._stream:
            self._open_stream()
        elif self._upgrades or self._upgrade_ignored:
            # The parser takes what follows for another protocol's bytes; if it is this request's
            # body, the request is begun anew.
            return
        else:
            answered = self.cycle is not None and self.cycle.response_complete
            self.deadline = self.loop.time() + self._timeouts.keep_alive if answered else _NEVER
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is written. As uvicorn does it, with our sweep in place of a timer each."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self.deadline == _NEVER:
            self.deadline = self.loop.time() + self._timeouts.keep_alive

    # --- the fast lane ---

    def _answer_fast(self, endpoint: Endpoint) -> None:
        body, self._body = bytes(self._body), b""
        address = self._peer() if self._forwarded else self._host
        request = Request("POST", endpoint.path, {}, b"", self.headers, body, address)
        answer = endpoint(request)
        if is_awaitable(answer):
            cycle = FastCycle(response_complete=False)
            self.cycle = cycle  # type: ignore[assignment]  # what uvicorn reads of a cycle is there
            task = self.loop.create_task(self._answer_later(cycle, answer))
            self.server_state.tasks.add(task)
            task.add_done_callback(self.server_state.tasks.discard)
            return
        self.cycle = _ANSWERED  # type: ignore[assignment]  # as above
        self.transport.write(self._render(answer))
        self.on_response_complete()

    def _learn_head(self, data: bytes) -> None:
        """A chunk that began between requests had one of the fast lane; where that was all of it,
        the next one may have the same head. Not the first on a socket, which is the only one of
        many."""
        if self._new_heads < MAX_NEW_HEADS:
            self._new_heads += 1
            endpoint = self._services.fast.get(self.url)
            if self._new_heads and endpoint is not None:
                self._known = KnownHead.of(data, self.headers, endpoint, forwarded=self._forwarded)
                self._known_is_next = self._known is not None
        else:
            self._known = None

    def _answer_known(self, known: KnownHead, body: bytes) -> None:
        """Answer a request whose head came before, past the parser, which is between requests."""
        self._new_heads = 0
        self.headers = known.headers_of(body)
        self._forwarded = known.forwarded
        self._body = body
        self.deadline = _NEVER
        self._answer_fast(known.endpoint)

    async def _answer_later(self, cycle: FastCycle, pending: Awaitable[Answer]) -> None:
        answer = await pending
        cycle.response_complete = True
        if cycle.disconnected or self.transport.is_closing():
            return
        self.transport.write(self._render(answer, close=not cycle.keep_alive))
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _render(self, answer: Answer, *, close: bool = False) -> bytes:
        defaults = self.server_state.default_headers
        if defaults is not self._default_headers:
            # uvicorn makes a new list each second, with the new date.
            self._default_headers = defaults
            self._default_head = b"".join([b"%b: %b\r\n" % header for header in defaults])
        head = STATUS_LINE[answer.status] + self._default_head
        for name, value in answer.headers:
            head += b"%b: %b\r\n" % (name, value)
        if close:
            head += b"connection: close\r\n"
        if answer.status == 204:
            return head + b"\r\n"
        return b"%bcontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (
            head,
            answer.content_type,
            len(answer.body),
            answer.body,
        )

    def _peer(self) -> str:
        return self._services.proxies.client_address(self._host, self.headers)

    # --- refusing ---

    def _refusal_answer(self, error: Exception, route: str) -> Answer:
        guard = self._services.guard
        method = (
            self.scope["method"] if self.scope is not None and "method" in self.scope else "GET"
        )
        if route.encode() in self._services.fast:
            method = "POST"
        request = Request(method, route, {}, b"", self.headers or [], b"", "")
        request.request_id = request_id(request.header(b"x-request-id"))
        answer = guard.refusal(request, error)
        headers = (*answer.headers, (b"x-request-id", request.request_id.encode()))
        origin = request.header(b"origin")
        if origin is not None:
            headers += guard.cors(origin)
        guard.metrics.http_requests_total.labels(method, route, str(answer.status)).inc()
        return Answer(answer.status, answer.body, headers, answer.content_type)

    def _refuse_and_close(self, error: Exception, route: str = "invalid") -> None:
        """Answer what cannot go on, and end the connection."""
        self._endpoint = None
        self.deadline = _NEVER
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if self._body_is_due():
            # It is this cycle's own request that goes wrong.
            cycle.disconnected = True
            cycle.message_event.set()
        elif cycle is not None and not cycle.response_complete:
            # An answer now would be taken for that of the request before it.
            self.transport.close()
            return
        self._end_with(self._refusal_answer(error, route))

    def _end_with(self, answer: Answer) -> None:
        self.transport.write(self._render(answer, close=True))
        if self not in self._door.waiting or not self.transport.can_write_eof():
            self.transport.close()
            return
        # Its client may be sending still: closing with bytes unread would reset the connection, and
        # the answer be lost with it (RFC 9112, section 9.6).
        self.transport.write_eof()
        self._take_no_more()
        self.deadline = self.loop.time() + self._timeouts.close

    def _take_no_more(self) -> None:
        self._refused = True
        self._early = bytearray()
        self.deadline = _NEVER

    def _body_is_due(self) -> bool:
        """Whether ASGI has a request whose body is not yet whole, and has answered nothing."""
        cycle = self.cycle
        return (
            cycle is not None
            and cycle.more_body
            and not cycle.response_started
            and not self.pipeline
        )

    # --- leaving for a protocol of its own ---

    def _forget_parser(self) -> None:
        """It and this protocol refer to each other, and would outlive what they were for."""
        self.parser = None  # type: ignore[assignment]  # as uvicorn does at the end

    def _leave(self) -> None:
        """uvicorn and the sweep forget this protocol; the socket stays, and stays counted."""
        self.connections.discard(self)
        self._door.waiting.pop(self, None)
        self._unset_keepalive_if_required()

    def _handshake(
        self, transport: str, query: bytes
    ) -> Eventually[tuple[Handshake, Identity | None]]:
        services = self._services
        handshake = Handshake(transport, query, self.headers, self._peer())  # type: ignore[arg-type]
        try:
            identity = services.lifecycle.admit(handshake)
        except NotifydError as error:
            raise _Refused(handshake, error) from error
        if is_awaitable(identity):
            return self._handshake_later(handshake, identity)
        return handshake, identity

    async def _handshake_later(
        self, handshake: Handshake, pending: Awaitable[Identity | None]
    ) -> tuple[Handshake, Identity | None]:
        try:
            return handshake, await pending
        except NotifydError as error:
            raise _Refused(handshake, error) from error

    def _arrive(
        self,
        transport: str,
        query: bytes,
        accept: Callable[[Handshake, Identity | None], None],
        refuse: Callable[[Handshake, NotifydError], None],
    ) -> None:
        try:
            arrived = self._handshake(transport, query)
        except _Refused as refused:
            refuse(refused.handshake, refused.error)
        else:
            if is_awaitable(arrived):
                task = self.loop.create_task(self._arrive_later(arrived, accept, refuse))
                self.server_state.tasks.add(task)
                task.add_done_callback(self.server_state.tasks.discard)
            else:
                accept(*arrived)

    async def _arrive_later(
        self,
        arriving: Awaitable[tuple[Handshake, Identity | None]],
        accept: Callable[[Handshake, Identity | None], None],
        refuse: Callable[[Handshake, NotifydError], None],
    ) -> None:
        try:
            handshake, identity = await arriving
        except _Refused as refused:
            if not self.transport.is_closing():
                refuse(refused.handshake, refused.error)
            return
        if self.transport.is_closing():
            return
        try:
            # Others may have taken the room while the token's key was fetched.
            self._services.lifecycle.check_room(handshake, identity)
        except NotifydError as error:
            refuse(handshake, error)
        else:
            accept(handshake, identity)

    # --- WebSocket ---

    def _without_upgrade(self, rest: bytes) -> bytes:
        """The request again, with `rest` behind its head, for a new parser.

        Any other upgrade may be ignored (RFC 9110, section 7.8); Java's client offers HTTP/2 with
        every request. But the parser gives up a body for the new protocol's bytes, and would take
        it for the next request.
        """
        self._upgrade_ignored = False
        head = b"%b %b HTTP/%b\r\n" % (
            self.parser.get_method(),
            self.url,
            self.parser.get_http_version().encode(),
        )
        for name, value in self.headers:
            if name != b"upgrade":
                head += b"%b: %b\r\n" % (name, value)
        self.parser = _new_parser(self)
        return head + b"\r\n" + rest

    def _upgrade(self, early: bytes) -> None:
        path, _, query = self.url.partition(b"?")
        self.deadline = _NEVER
        if self._busy():
            self._refuse_and_close(BadRequest("An upgrade cannot be pipelined."))
            return
        if path != b"/ws":
            self._refuse_and_close(NotFound("There is no WebSocket under this path; it is /ws."))
            return
        self._leave()
        self._early = bytearray(early)
        try:
            key = self._websocket_key()
        except NotifydError as error:
            self._refuse_and_close(error, "/ws")
            return
        self._arrive(
            "websocket",
            query,
            partial(self._accept_websocket, key),
            partial(self._refuse_websocket, key),
        )

    def _websocket_key(self) -> str:
        """The handshake's nonce (RFC 6455, section 4.2.1). Raises BadRequest."""
        key = version = None
        for name, value in self.headers:
            if name == b"sec-websocket-key":
                if key is not None:
                    raise BadRequest("Sec-WebSocket-Key is given twice.")
                key = value
            elif name == b"sec-websocket-version":
                version = value
        if self.parser.get_method() != b"GET" or version != b"13":
            raise BadRequest("A WebSocket handshake is a GET with Sec-WebSocket-Version: 13.")
        try:
            if key is None or len(base64.b64decode(key, validate=True)) != 16:
                raise BadRequest("Sec-WebSocket-Key is 16 bytes in base64.")
        except binascii.Error as error:
            raise BadRequest("Sec-WebSocket-Key is 16 bytes in base64.") from error
        return key.decode("ascii")

    def _switch(self) -> tuple[WebSocketProtocol, bytes]:
        """The socket to its new protocol; what the client sent behind its head comes back."""
        websocket = WebSocketProtocol(
            self.transport,
            self._services.lifecycle,
            max_message_bytes=self._services.max_message_bytes,
            timeouts=self._timeouts,
            on_gone=self._door.leave_detached,
        )
        early = bytes(self._early or b"")
        self._door.detach()
        self._forget_parser()
        self.transport.set_protocol(websocket)
        return websocket, early

    def _accept_websocket(self, key: str, handshake: Handshake, identity: Identity | None) -> None:
        websocket, early = self._switch()
        connection = self._services.lifecycle.connect(
            handshake, identity, websocket, opening=_switching(key, handshake)
        )
        websocket.begin(connection)
        connection.outbox.flush()
        if early:
            websocket.data_received(early)

    def _refuse_websocket(self, key: str, handshake: Handshake, error: NotifydError) -> None:
        code = by_close_code(error, handshake, self._services.lifecycle.admission)
        if code is None:
            self._refuse_and_close(error, "/ws")
            return
        websocket, _ = self._switch()
        websocket.write(_switching(key, handshake) + wire.error_message(error).websocket)
        websocket.close(code, error.message)

    # --- SSE ---

    def _open_stream(self) -> None:
        self.deadline = _NEVER
        self._leave()
        self._early = bytearray()
        _, _, query = self.url.partition(b"?")
        self._arrive("sse", query, self._accept_stream, self._refuse_stream)

    def _stream_head(self) -> bytes:
        guard = self._services.guard
        request = Request("GET", "/sse", {}, b"", self.headers, b"", "")
        head = (
            STREAM_HEAD
            + b"x-request-id: %b\r\n" % request_id(request.header(b"x-request-id")).encode()
        )
        origin = request.header(b"origin")
        for name, value in guard.cors(origin) if origin is not None else ():
            head += b"%b: %b\r\n" % (name, value)
        return head + b"\r\n"

    def _accept_stream(self, handshake: Handshake, identity: Identity | None) -> None:
        lifecycle = self._services.lifecycle
        stream = StreamProtocol(
            self.transport,
            lifecycle,
            close_seconds=self._timeouts.close,
            on_gone=self._door.leave_detached,
        )
        self._door.detach()
        self._forget_parser()
        self.transport.set_protocol(stream)
        connection = lifecycle.connect(handshake, identity, stream, opening=self._stream_head())
        stream.begin(connection)
        connection.outbox.flush()

    def _refuse_stream(self, handshake: Handshake, error: NotifydError) -> None:
        events = as_stream(error, self._services.spread)
        if events is None:
            self._refuse_and_close(error, "/sse")
            return
        self.transport.write(self._stream_head() + events)
        self.transport.close()


_LOOKED_AT: Final = frozenset(
    {b"host", b"content-length", b"transfer-encoding", b"expect", b"x-forwarded-for"}
)

_CHECKED: Final = frozenset({b"host", b"content-length", b"transfer-encoding"})

_ANSWERED: Final = FastCycle(response_complete=True)


def _switching(key: str, handshake: Handshake) -> bytes:
    """The answer that makes a WebSocket of the connection (RFC 6455, section 4.2.2)."""
    subprotocol = handshake.chosen_subprotocol
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
        b"sec-websocket-accept: %b\r\n%b\r\n"
        % (
            accept_key(key).encode("ascii"),
            b"sec-websocket-protocol: %b\r\n" % subprotocol.encode("latin-1")
            if subprotocol
            else b"",
        )
    )


def _address(transport: asyncio.BaseTransport, name: str) -> tuple[str, int] | None:
    """Host and port of one end of a TCP connection."""
    address = transport.get_extra_info(name)
    return (str(address[0]), int(address[1])) if isinstance(address, tuple) else None


class _Refused(Exception):
    """An error, with the handshake that it refuses."""

    def __init__(self, handshake: Handshake, error: NotifydError) -> None:
        super().__init__(error.message)
        self.handshake = handshake
        self.error = error


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(
        f"A request's head is at most {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers.",
        constraint=f"at most {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers",
    )
