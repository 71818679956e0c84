"""WebSocket and SSE through any ASGI server: slower than sockets of our own, the same in all else.

Starlette's WebSocket and sse-starlette's EventSourceResponse stand behind the same outbox as sinks.
An ASGI server keeps Pings to itself, so that here a connection that lives on confirms, and silence
closes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar
from urllib.parse import unquote_to_bytes

from sse_starlette.sse import EventSourceResponse
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from notifyd import wire
from notifyd.api.guard import Guard, Request
from notifyd.connections.admission import Handshake
from notifyd.connections.lifecycle import Lifecycle
from notifyd.connections.refusal import as_stream, by_close_code
from notifyd.errors import Forbidden, NotifydError, Unauthorized
from notifyd.eventually import settled
from notifyd.forwarded import TrustedProxies
from notifyd.identifiers import request_id
from notifyd.identity import Identity

CLOSE_SECONDS = 5.0
TOKEN_STATE = "notifyd.query"  # noqa: S105  # a key of the scope
"""Where the outermost middleware keeps the query string whose token it took out."""

Authenticate = Callable[[HTTPConnection], Awaitable[Identity | None]]

_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


class AsgiSink:
    """Takes one batch at a time from the outbox, and hands it to a writer that may be slow."""

    pings: ClassVar[bool] = False

    def __init__(self) -> None:
        self.connection: Any = None
        self._batch = b""
        self._closed: tuple[int, str] | None = None
        self._wake = asyncio.Event()

    def write(self, data: bytes) -> None:
        """Take whole frames or events; the outbox waits until they are sent."""
        self._batch += data
        if self.connection is not None:
            self.connection.outbox.pause()
        self._wake.set()

    def close(self, code: int, reason: str) -> None:
        """End behind what was taken."""
        if self._closed is None:
            self._closed = (code, reason)
            self._wake.set()

    def release(self) -> None:
        """The connection is gone."""
        connection, self.connection = self.connection, None
        connection.outbox.let_connection_go()

    async def batch(self) -> bytes | tuple[int, str]:
        """The next bytes to send, or at the end the close code and reason."""
        connection = self.connection
        if connection is not None and connection.outbox.paused and not self._batch:
            connection.outbox.resume()
        while not self._batch:
            if self._closed is not None:
                return self._closed
            self._wake.clear()
            await self._wake.wait()
        data, self._batch = self._batch, b""
        return data


class Realtime:
    """The two realtime routes for ASGI servers.

    `authenticate` is the embedding application's own way to say who a connection is; without it, a
    JWT does.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        guard: Guard,
        proxies: TrustedProxies,
        *,
        max_message_bytes: int,
        spread: Callable[[float, float], float],
        authenticate: Authenticate | None,
    ) -> None:
        self._lifecycle = lifecycle
        self._guard = guard
        self._proxies = proxies
        self._max_message_bytes = max_message_bytes
        self._spread = spread
        self._authenticate = authenticate

    async def _admit(self, handshake: Handshake, scope: Scope) -> Identity | None:
        if self._authenticate is None:
            return await settled(self._lifecycle.admit(handshake))
        await settled(self._lifecycle.check_rate(handshake))
        if not self._lifecycle.admission.origin_allowed(handshake):
            raise Forbidden(
                "This origin may not connect.", hint=f'add "{handshake.origin}" to cors.origins'
            )
        if handshake.fault is not None:
            raise handshake.fault
        identity = await self._authenticate(HTTPConnection(scope))
        if identity is None:
            raise Unauthorized("The application does not know this client.")
        self._lifecycle.check_room(handshake, identity)
        return identity

    def _request(self, scope: Scope, route: str) -> Request:
        client = scope.get("client")
        address = self._proxies.client_address(client[0] if client else "", scope["headers"])
        query = scope.get("state", {}).get(TOKEN_STATE, scope["query_string"])
        request = Request("GET", route, {}, query, scope["headers"], b"", address)
        request.request_id = request_id(request.header(b"x-request-id"))
        return request

    def _refusal(self, request: Request, error: Exception) -> Response:
        answer = self._guard.refusal(request, error)
        labels = ("GET", request.route, str(answer.status))
        self._guard.metrics.http_requests_total.labels(*labels).inc()
        response = Response(answer.body, answer.status, media_type=answer.content_type.decode())
        for name, value in (*answer.headers, *self._common_headers(request)):
            response.headers.append(name.decode("latin-1"), value.decode("latin-1"))
        return response

    def _common_headers(self, request: Request) -> tuple[tuple[bytes, bytes], ...]:
        headers = ((b"x-request-id", request.request_id.encode()),)
        origin = request.header(b"origin")
        return headers if origin is None else (*headers, *self._guard.cors(origin))

    # --- WebSocket ---

    async def websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application behind `/ws`."""
        websocket = WebSocket(scope, receive, send)
        await websocket.receive()
        request = self._request(scope, "/ws")
        handshake = Handshake("websocket", request.query, request.headers, request.address)
        try:
            identity = await self._admit(handshake, scope)
        except NotifydError as error:
            await self._refuse_websocket(websocket, request, handshake, error)
            return
        await websocket.accept(subprotocol=handshake.chosen_subprotocol)
        sink = AsgiSink()
        connection = sink.connection = self._lifecycle.connect(handshake, identity, sink)
        writer = asyncio.create_task(self._write_frames(websocket, sink))
        reader = asyncio.create_task(self._read_messages(websocket, connection))
        try:
            await asyncio.wait({writer, reader}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done() and not writer.done():
                # The client left, or was told to: what is on its way gets a moment, no more.
                await asyncio.wait({writer}, timeout=CLOSE_SECONDS)
        finally:
            self._lifecycle.lost(connection)
            sink.release()
            for task in (writer, reader):
                task.cancel()
            for ended in await asyncio.gather(writer, reader, return_exceptions=True):
                if isinstance(ended, Exception):
                    raise ended

    async def _refuse_websocket(
        self,
        websocket: WebSocket,
        request: Request,
        handshake: Handshake,
        error: NotifydError,
    ) -> None:
        code = by_close_code(error, handshake, self._lifecycle.admission)
        if code is None:
            if "websocket.http.response" in websocket.scope.get("extensions", {}):
                await websocket.send_denial_response(self._refusal(request, error))
            else:
                # All that such a server can answer is its own 403.
                await websocket.close()
            return
        await websocket.accept(subprotocol=handshake.chosen_subprotocol)
        await websocket.send_text(wire.error_message(error).json.decode())
        await websocket.close(code, error.message)

    async def _read_messages(self, websocket: WebSocket, connection: Any) -> None:
        lifecycle = self._lifecycle
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                lifecycle.lost(connection, "client" if message.get("code") != 1006 else "lost")
                connection.outbox.sink.close(1000, "")
                return
            text = message.get("text")
            if text is None:
                lifecycle.heard(connection)
                lifecycle.unsupported(connection)
            elif (
                len(text) > self._max_message_bytes or len(text.encode()) > self._max_message_bytes
            ):
                lifecycle.close(connection, 1009, "the message is too big")
            else:
                lifecycle.receive(connection, text)
                if connection.must_wait:
                    answered = asyncio.Event()
                    connection.on_answered = answered.set
                    await answered.wait()

    async def _write_frames(self, websocket: WebSocket, sink: AsgiSink) -> None:
        while isinstance(batch := await sink.batch(), bytes):
            for text in wire.texts_of_frames(batch):
                try:
                    await websocket.send_text(text)
                except (WebSocketDisconnect, RuntimeError):
                    # Starlette's word for a peer that left while it was written to.
                    return
        if websocket.application_state is WebSocketState.CONNECTED and (
            websocket.client_state is WebSocketState.CONNECTED
        ):
            await websocket.close(*batch)

    # --- SSE ---

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application behind `GET /sse`."""
        request = self._request(scope, "/sse")
        sink = AsgiSink()
        handshake = Handshake("sse", request.query, request.headers, request.address)
        try:
            identity = await self._admit(handshake, scope)
        except NotifydError as error:
            events = as_stream(error, self._spread)
            if events is None:
                await self._refusal(request, error)(scope, receive, send)
                return
            sink.write(events)
            sink.close(error.close_code, error.message)
            await self._stream_response(request, sink)(scope, receive, send)
            return
        connection = sink.connection = self._lifecycle.connect(handshake, identity, sink)
        try:
            await self._stream_response(request, sink)(scope, receive, send)
        finally:
            self._lifecycle.lost(connection, "client")
            sink.release()

    def _stream_response(self, request: Request, sink: AsgiSink) -> EventSourceResponse:
        # Our own heartbeats are in the stream; a second kind of ping would only cost.
        response = EventSourceResponse(_events(sink), headers=_STREAM_HEADERS, ping=0)
        for name, value in self._common_headers(request):
            response.headers.append(name.decode("latin-1"), value.decode("latin-1"))
        return response


async def _events(sink: AsgiSink) -> AsyncIterator[bytes]:
    while isinstance(batch := await sink.batch(), bytes):
        yield batch


class AsgiEndpoint:
    """An ASGI application as a route's endpoint; Starlette would wrap a plain function."""

    def __init__(self, application: ASGIApp) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on."""
        await self._application(scope, receive, send)


def _is_token(parameter: bytes) -> bool:
    # Percent-encoded, a name is the same name (RFC 3986, section 6.2.2.2).
    return unquote_to_bytes(parameter.partition(b"=")[0]) == b"token"


class TokenOutOfQuery:
    """Takes the token out of the query string before anything can log it.

    The scope is changed in place: an ASGI server logs the very same one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on, without its token."""
        query = scope.get("query_string", b"")
        if query:
            parts = query.split(b"&")
            kept = [part for part in parts if not _is_token(part)]
            if len(kept) < len(parts):
                scope.setdefault("state", {})[TOKEN_STATE] = query
                scope["query_string"] = b"&".join(kept)
        await self._app(scope, receive, send)
