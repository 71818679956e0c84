"""A real server on a real socket, and clients of every kind, for tests through the front door.

`Host` runs a server in the test's own event loop, on a free port of loopback, in one of two lanes:
`sockets`, notifyd's own protocols as `notifyd serve` runs them, or `asgi`, `Notifyd.app` on stock
uvicorn. Its clock can be moved (`host.clock.advance`), so that nothing has to be waited for that a
clock decides. All clients read with a timeout; none sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Literal

import httpx
import jwt
import msgspec
import uvicorn
from starlette.types import ASGIApp
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin, Subprotocol

from notifyd.api.realtime import Authenticate
from notifyd.app import Notifyd, sockets_of
from notifyd.options import Settings, sections
from notifyd.server.serve import Server, listen, make_server

Lane = Literal["sockets", "asgi"]
Transport = Literal["websocket", "sse"]
Message = dict[str, Any]

SECRET = "a secret of at least thirty-two bytes"
ADMIN_KEY = "admin-key-0123456789"
PUBLISH_KEY = "publish-key-0123456789"
READ_KEY = "read-key-0123456789"
ORIGIN = "https://app.example.com"
WAIT = 20.0
"""Seconds that anything may take on a machine that has other things to do; what takes longer does
not come. No test that passes waits so long."""

WITHOUT_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients that speak to http:// alone: reading every authority that the system trusts takes
longer than most tests. It trusts none."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "server": {"port": 0, "shutdown_grace_seconds": 2},
    "auth": {
        "jwt_secret": SECRET,
        "api_keys": (
            {"name": "admin", "key": ADMIN_KEY, "scopes": ["admin"]},
            {"name": "shop", "key": PUBLISH_KEY, "scopes": ["publish"]},
            {"name": "monitor", "key": READ_KEY, "scopes": ["read"]},
        ),
    },
    "cors": {"origins": (ORIGIN,)},
}


class Clock:
    """The real time, moved by as much as `advance` was told."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead

    def advance(self, seconds: float) -> None:
        """Let so much time have passed."""
        self.ahead += seconds


class StillClock(Clock):
    """Stands still from now on, but for what `advance` was told."""

    def __init__(self) -> None:
        super().__init__()
        self.since = time.time()

    def __call__(self) -> float:
        return self.since + self.ahead


def settings_of(**given: dict[str, Any]) -> Settings:
    """Settings of a test: development with known keys, and what is given by section over it."""
    made: dict[str, Any] = {}
    for name, section in sections().items():
        values = {**_DEFAULTS.get(name, {}), **given.get(name, {})}
        if values:
            made[name] = msgspec.convert(values, section)
    assert not set(given) - set(sections()), "no such section"
    return Settings(**made)


def token(
    user_id: str = "u1", *, expires_in: float = 3600, secret: str = SECRET, **claims: Any
) -> str:
    """A user's JWT (HS256), issued now; a claim given as None is left out."""
    now = time.time()
    all_claims = {"sub": user_id, "iat": int(now), "exp": int(now + expires_in), **claims}
    wanted = {name: value for name, value in all_claims.items() if value is not None}
    return jwt.encode(wanted, secret, algorithm="HS256")


def user(user_id: str) -> dict[str, str]:
    """The target that is one user."""
    return {"type": "user", "value": user_id}


def channel(name: str) -> dict[str, str]:
    """The target that is one channel."""
    return {"type": "channel", "value": name}


async def until(
    condition: Callable[[], bool], what: str = "the condition", wait: float = WAIT
) -> None:
    """Return once the condition holds; fails when it does not in time."""
    deadline = time.monotonic() + wait
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come in {wait:g} s"
        await asyncio.sleep(0.002)


class Listener:
    """What a WebSocket and an SSE client have in common: messages, as objects with a `type`."""

    connected: Message

    async def next_message(self) -> Message | None:
        """The next message, heartbeats too; None at the end."""
        raise NotImplementedError

    async def close(self) -> None:
        """Leave."""
        raise NotImplementedError

    async def receive(self, *, wait: float = WAIT) -> Message:
        """The next message that is no heartbeat; fails at the end or after `wait` seconds."""
        async with asyncio.timeout(wait):
            while True:
                message = await self.next_message()
                assert message is not None, f"the connection ended: {self.end_told()}"
                if message["type"] != "heartbeat":
                    return message

    async def expect(self, type: str, *, wait: float = WAIT) -> Message:
        """The next message, which must be of this type."""
        message = await self.receive(wait=wait)
        assert message["type"] == type, f"expected {type}, got {message}"
        return message

    async def notifications(self, count: int) -> list[Message]:
        """The next `count` messages, all of them notifications."""
        return [await self.expect("notification") for _ in range(count)]

    async def rest(self) -> list[Message]:
        """All messages up to the end of the connection, heartbeats left out."""
        messages: list[Message] = []
        async with asyncio.timeout(WAIT):
            while (message := await self.next_message()) is not None:
                if message["type"] != "heartbeat":
                    messages.append(message)
        return messages

    def end_told(self) -> str:
        """How the connection ended, for a failing test."""
        return ""

    async def __aenter__(self) -> Listener:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


class WebSocketListener(Listener):
    """A WebSocket of the `websockets` package, which answers Pings by itself."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.connected = {}

    async def next_message(self) -> Message | None:
        """The next message; None once the server has closed."""
        try:
            data = await self.connection.recv()
        except ConnectionClosed:
            return None
        message: Message = json.loads(data)
        return message

    async def send(self, type: str, payload: dict[str, Any] | None = None) -> None:
        """Send a client message."""
        await self.send_text(
            json.dumps({"type": type} if payload is None else {"type": type, "payload": payload})
        )

    async def send_text(self, text: str | bytes) -> None:
        """Send one message as it is; bytes make a binary one."""
        await self.connection.send(text)

    async def subscribe(self, *channels: str) -> None:
        """Subscribe to channels, all of which must be granted."""
        await self.send("Subscribe", {"channels": list(channels)})
        message = await self.expect("subscribed")
        assert message["payload"] == list(channels)

    async def ack(self, *ids: str) -> Message:
        """Acknowledge one id, or several as a list; the answer."""
        await self.send(
            "Ack", {"notification_id": ids[0]} if len(ids) == 1 else {"notification_ids": list(ids)}
        )
        return await self.receive()

    async def nothing_came(self) -> None:
        """Nothing came: the answer to a Ping sent now is the next message."""
        await self.send("Ping")
        await self.expect("pong")

    async def closed(self) -> tuple[int, list[Message]]:
        """The close code, and what was told before."""
        told = await self.rest()
        assert self.connection.close_code is not None
        return self.connection.close_code, told

    def end_told(self) -> str:
        """Code and reason of the close."""
        return f"{self.connection.close_code} {self.connection.close_reason}"

    async def close(self) -> None:
        """Close, and wait for the server's close."""
        await self.connection.close()


class SseListener(Listener):
    """An EventSource: events as messages, `retry` and the last `id` beside them."""

    def __init__(self, response: httpx.Response, stack: AsyncExitStack) -> None:
        self.response = response
        self._stack = stack
        self._chunks = response.aiter_bytes()
        self._buffer = b""
        self.retry: int | None = None
        self.connected = {}

    async def next_message(self) -> Message | None:
        """The next event, its data with the event's name as `type`; None at the end."""
        while True:
            event, found, rest = self._buffer.replace(b"\r\n", b"\n").partition(b"\n\n")
            if not found:
                try:
                    self._buffer += await anext(self._chunks)
                except (StopAsyncIteration, httpx.RemoteProtocolError):
                    return None
                continue
            self._buffer = rest
            message = self._parsed(event.decode())
            if message is not None:
                return message

    def _parsed(self, event: str) -> Message | None:
        name, data = "message", []
        for line in event.split("\n"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
            elif field == "retry":
                self.retry = int(value)
        if not data:
            return None
        parsed = json.loads("\n".join(data))
        return {"type": name, **(parsed if isinstance(parsed, dict) else {"payload": parsed})}

    async def close(self) -> None:
        """Leave."""
        await self._stack.aclose()


class RawWebSocket:
    """A WebSocket by hand: answers no Ping unless told to, and sends any frame at all."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send_frame(self, opcode: int, payload: bytes = b"", *, final: bool = True) -> None:
        """Write one masked frame."""
        mask = os.urandom(4)
        head = bytes([(0x80 if final else 0) | opcode])
        size = len(payload)
        if size < 126:
            head += bytes([0x80 | size])
        elif size < 65536:
            head += struct.pack("!BH", 0x80 | 126, size)
        else:
            head += struct.pack("!BQ", 0x80 | 127, size)
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        self.writer.write(head + mask + masked)

    def send(self, type: str, payload: dict[str, Any] | None = None) -> None:
        """Write a client message."""
        message = {"type": type} if payload is None else {"type": type, "payload": payload}
        self.send_frame(1, json.dumps(message).encode())

    async def receive_frame(self, *, wait: float = WAIT) -> tuple[int, bytes]:
        """The next frame's opcode and payload; IncompleteReadError at the end of the stream."""
        async with asyncio.timeout(wait):
            first, second = await self.reader.readexactly(2)
            size = second & 0x7F
            if size == 126:
                size = int.from_bytes(await self.reader.readexactly(2), "big")
            elif size == 127:
                size = int.from_bytes(await self.reader.readexactly(8), "big")
            return first & 0x0F, await self.reader.readexactly(size)

    async def receive(self, *, wait: float = WAIT) -> Message:
        """The next message that is no heartbeat; Pings go unanswered."""
        while True:
            opcode, payload = await self.receive_frame(wait=wait)
            assert opcode != 8, f"closed with {int.from_bytes(payload[:2], 'big')} {payload[2:]!r}"
            if opcode == 1:
                message: Message = json.loads(payload)
                if message["type"] != "heartbeat":
                    return message

    async def close_code(self) -> int:
        """Read up to the server's Close; its code."""
        while True:
            opcode, payload = await self.receive_frame()
            if opcode == 8:
                return int.from_bytes(payload[:2], "big")

    def vanish(self) -> None:
        """Be gone without a word, as a process that is killed."""
        self.writer.transport.abort()


class Host:
    """One running server and whoever is connected to it; `stop` ends both.

    `app` is what stock uvicorn serves, `root` where in it the server is mounted.
    """

    def __init__(
        self,
        lane: Lane,
        notifyd: Notifyd,
        clock: Clock,
        *,
        app: ASGIApp | None = None,
        root: str = "",
    ) -> None:
        self.lane = lane
        self.notifyd = notifyd
        self.clock = clock
        self.app = app or notifyd.app
        self.root = root
        self.port = 0
        self.secure = notifyd.settings.server.tls_cert is not None
        self.http: httpx.AsyncClient
        self._clients = AsyncExitStack()
        self._server: uvicorn.Server
        self._running = False

    @property
    def authority(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Where HTTP is answered."""
        return f"{'https' if self.secure else 'http'}://{self.authority}{self.root}"

    @property
    def ws_url(self) -> str:
        """Where WebSockets are."""
        return f"{'wss' if self.secure else 'ws'}://{self.authority}{self.root}/ws"

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        """Listen. The server's own main loop is left out: the test says when it ends."""
        settings = self.notifyd.settings
        listener = listen("127.0.0.1", settings.server.port, settings.websocket.idle_timeout)
        self.port = listener.getsockname()[1]
        if self.lane == "sockets":
            self._server = make_server(
                sockets_of(self.notifyd), settings.server, announce=lambda: None
            )
        else:
            self._server = uvicorn.Server(
                uvicorn.Config(
                    self.app,
                    log_config=None,
                    access_log=False,
                    lifespan="on",
                    timeout_graceful_shutdown=1,
                    ssl_certfile=settings.server.tls_cert,
                    ssl_keyfile=settings.server.tls_key,
                )
            )
        self._server.config.load()
        self._server.lifespan = self._server.config.lifespan_class(self._server.config)
        await self._server.startup([listener])
        await self._server.on_tick(0)
        self._running = True
        self.http = await self._clients.enter_async_context(
            httpx.AsyncClient(
                base_url=self.url, timeout=WAIT, trust_env=False, verify=tls or WITHOUT_TLS
            )
        )

    async def shut_down(self) -> None:
        """Stop as on a signal, with everybody still connected."""
        if self._running:
            self._running = False
            await self._server.shutdown()

    async def stop(self) -> None:
        """Let the clients leave; once nothing is left of them, stop without uvicorn's waits."""
        await self._clients.aclose()
        if not self._running:
            return
        self._running = False
        server = self._server
        for listener in server.servers:
            listener.close()
        door = server.door if isinstance(server, Server) else None
        state = server.server_state
        # A browser that is still there keeps its streams, and its connections for the next request.
        await self.notifyd.drain()
        for connection in list(state.connections):
            connection.shutdown()
        await until(lambda: not (state.connections or state.tasks), "the end of all requests")
        if door is not None:
            await until(lambda: not door.detached, "the end of all connections")
            door.stop()
        await server.lifespan.shutdown()

    # --- HTTP ---

    async def post(
        self,
        path: str,
        body: Any,
        *,
        key: str | None = ADMIN_KEY,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """POST an object, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.request("POST", path, key=key, headers=headers, content=content)

    async def get(
        self, path: str, *, key: str | None = ADMIN_KEY, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        """GET a path."""
        return await self.request("GET", path, key=key, headers=headers)

    async def request(
        self,
        method: str,
        path: str,
        *,
        key: str | None = ADMIN_KEY,
        headers: dict[str, str] | None = None,
        content: bytes | None = None,
    ) -> httpx.Response:
        """Any request, with an API key unless that is None."""
        given = dict(headers or {})
        if key is not None:
            given.setdefault("X-API-Key", key)
        return await self.http.request(method, path, headers=given, content=content)

    async def publish(
        self,
        target: dict[str, Any],
        event_type: str = "test.event",
        payload: Any = None,
        **content: Any,
    ) -> Message:
        """Send one notification by `POST /api/v1/notifications`; the answer, which must be 200."""
        body = {"target": target, "event_type": event_type, "payload": payload, **content}
        response = await self.post("/api/v1/notifications", body, key=PUBLISH_KEY)
        assert response.status_code == 200, response.text
        answer: Message = response.json()
        return answer

    async def metric(self, name: str, **labels: str) -> float:
        """One sample of GET /metrics, 0 where there is none yet; `name` without its prefix."""
        response = await self.get("/metrics", key=READ_KEY)
        for line in response.text.splitlines():
            sample, _, value = line.rpartition(" ")
            found, _, given = sample.rstrip("}").partition("{")
            if found == f"notifyd_{name}" and all(
                f'{label}="{text}"' in given.split(",") for label, text in labels.items()
            ):
                return float(value)
        return 0.0

    # --- connections ---

    async def websocket(
        self,
        user_id: str | None = "u1",
        *,
        jwt: str | None = None,
        query: str = "",
        headers: dict[str, str] | None = None,
        origin: str | None = None,
        subprotocols: Sequence[str] = (),
        greeted: bool = True,
        **options: Any,
    ) -> WebSocketListener:
        """Connect, with a token of this user in the Authorization header; None sends no token.

        `greeted` waits for the `connected` message.
        """
        given = dict(headers or {})
        if jwt is not None or user_id is not None:
            given["Authorization"] = f"Bearer {jwt or token(str(user_id))}"
        connection = await self._clients.enter_async_context(
            connect(
                f"{self.ws_url}{f'?{query}' if query else ''}",
                origin=None if origin is None else Origin(origin),
                subprotocols=[Subprotocol(name) for name in subprotocols] or None,
                additional_headers=given,
                ping_interval=None,
                compression=None,
                proxy=None,
                open_timeout=WAIT,
                close_timeout=WAIT,
                # What a test does not read must not keep the answer to a Close from being read.
                max_queue=None,
                **options,
            )
        )
        listener = WebSocketListener(connection)
        if greeted:
            listener.connected = await listener.expect("connected")
        return listener

    async def sse(
        self,
        user_id: str | None = "u1",
        *,
        jwt: str | None = None,
        query: str = "",
        headers: dict[str, str] | None = None,
        greeted: bool = True,
    ) -> SseListener:
        """Open a stream, in the same way; its status must be 200."""
        given = dict(headers or {})
        if jwt is not None or user_id is not None:
            given["Authorization"] = f"Bearer {jwt or token(str(user_id))}"
        stack = AsyncExitStack()
        # A client of its own: closing it closes the socket.
        client = await stack.enter_async_context(
            httpx.AsyncClient(timeout=WAIT, trust_env=False, verify=self.http_verify)
        )
        path = f"{self.url}/sse{f'?{query}' if query else ''}"
        response = await stack.enter_async_context(client.stream("GET", path, headers=given))
        listener = SseListener(response, stack)
        # Kept until the end: an abandoned iterator would close the stream.
        self._clients.push_async_callback(listener.close)
        assert response.status_code == 200, await response.aread()
        if greeted:
            listener.connected = await listener.expect("connected")
        return listener

    http_verify: ssl.SSLContext = WITHOUT_TLS

    async def listen(
        self, transport: Transport, user_id: str = "u1", *channels: str, jwt: str | None = None
    ) -> Listener:
        """A connection of either kind, subscribed to these channels."""
        if transport == "websocket":
            websocket = await self.websocket(user_id, jwt=jwt)
            if channels:
                await websocket.subscribe(*channels)
            return websocket
        query = f"channels={','.join(channels)}" if channels else ""
        stream = await self.sse(user_id, jwt=jwt, query=query)
        if channels:
            assert (await stream.expect("subscribed"))["payload"] == list(channels)
        return stream

    async def raw(
        self, receive_buffer: int | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection to the server; with a small receive buffer it is soon full."""
        bare = socket.socket()
        bare.setblocking(False)
        if receive_buffer is not None:
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(bare, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=bare)
        self._clients.push_async_callback(_hang_up, writer)
        return reader, writer

    def handshake(
        self, user_id: str | None = "u1", *, jwt: str | None = None, query: str = ""
    ) -> bytes:
        """What a client sends to open a WebSocket."""
        head = [
            f"GET /ws{f'?{query}' if query else ''} HTTP/1.1",
            f"Host: {self.authority}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version: 13",
        ]
        if jwt is not None or user_id is not None:
            head.append(f"Authorization: Bearer {jwt or token(str(user_id))}")
        return "\r\n".join([*head, "", ""]).encode()

    async def raw_websocket(
        self,
        user_id: str | None = "u1",
        *,
        jwt: str | None = None,
        query: str = "",
        greeted: bool = True,
        receive_buffer: int | None = None,
    ) -> RawWebSocket:
        """A WebSocket that answers nothing by itself, after its handshake."""
        reader, writer = await self.raw(receive_buffer)
        writer.write(self.handshake(user_id, jwt=jwt, query=query))
        async with asyncio.timeout(WAIT):
            answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 101 "), answer
        websocket = RawWebSocket(reader, writer)
        if greeted:
            assert (await websocket.receive())["type"] == "connected"
        return websocket


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def running(
    lane: Lane,
    *,
    settings: Settings | None = None,
    authenticate: Authenticate | None = None,
    tls: ssl.SSLContext | None = None,
    embed: Callable[[Notifyd], ASGIApp] | None = None,
    root: str = "",
    clock: Clock | None = None,
    **given: dict[str, Any],
) -> AsyncIterator[Host]:
    """A server while the block runs; `given` are sections of settings, as `settings_of` has them.

    `tls` is what its clients verify its certificate with; `embed` mounts it under `root` in an
    application of the test's own.
    """
    clock = clock or Clock()
    notifyd = Notifyd(settings or settings_of(**given), authenticate=authenticate, clock=clock)
    host = Host(lane, notifyd, clock, app=embed(notifyd) if embed else None, root=root)
    if tls is not None:
        host.http_verify = tls
    await host.start(tls)
    try:
        yield host
    finally:
        await host.stop()
