"""Servers in threads of this process, so that tests and coverage see them from the inside."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import uvicorn
import uvloop

from notifyd.app import Notifyd, sockets_of
from notifyd.server.door import Timeouts
from notifyd.server.serve import listen, make_server
from notifyd.settings import ChannelRule, Settings
from tests.adversity.raw import RawClient, Response, connected, handshake, request
from tests.front_door import ADMIN_KEY, Lane, settings_of, token


def open_settings(**given: dict[str, Any]) -> Settings:
    """Settings of a test, with every channel open to everybody."""
    return settings_of(channels={"rules": {"*": ChannelRule(subscribe="any")}}, **given)


@dataclass
class Hosted:
    """A server that listens."""

    lane: Lane
    port: int
    notifyd: Notifyd
    failures: list[str] = field(default_factory=list)
    """What the event loop or uvicorn reported as an error."""

    @contextlib.asynccontextmanager
    async def connected(self, *, receive_buffer: int | None = None) -> AsyncIterator[RawClient]:
        """A TCP connection."""
        async with connected(self.port, receive_buffer=receive_buffer) as client:
            yield client

    @contextlib.asynccontextmanager
    async def websocket(
        self,
        user: str | None = None,
        *,
        query: str = "",
        early: bytes = b"",
        receive_buffer: int | None = None,
    ) -> AsyncIterator[RawClient]:
        """A WebSocket that has read `connected`, of a user of its own unless one is named.

        `early` goes out with the handshake.
        """
        async with self.connected(receive_buffer=receive_buffer) as client:
            await client.send(handshake(f"/ws?token={token(user or uuid4().hex)}{query}"), early)
            response = await client.response()
            assert response.status == 101, response
            await client.message("connected")
            yield client

    @contextlib.asynccontextmanager
    async def stream(self, user: str = "u1", query: str = "") -> AsyncIterator[RawClient]:
        """An SSE stream that has read `connected`."""
        async with self.connected() as client:
            await client.send(request("GET", f"/sse?token={token(user)}{query}"))
            assert (await client.response_head()).status == 200
            await client.event("connected")
            yield client

    async def call(
        self, method: str, path: str, body: bytes | None = None, *headers: str
    ) -> Response:
        """One request of its own connection, with the API key."""
        async with self.connected() as client:
            await client.send(self.request(method, path, *headers, body=body))
            return await client.response(head=method == "HEAD")

    def request(
        self,
        method: str,
        path: str,
        *headers: str,
        body: bytes | None = None,
        version: str = "HTTP/1.1",
    ) -> bytes:
        """The bytes of a request with the API key."""
        return request(
            method, path, f"X-API-Key: {ADMIN_KEY}", *headers, body=body, version=version
        )

    async def serves(self) -> None:
        """Assert that others are served, over a WebSocket and over HTTP."""
        async with self.websocket("control") as client:
            await client.pings()
        assert (await self.call("GET", "/health")).status == 200


class _ErrorRecords(logging.Handler):
    def __init__(self, failures: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._failures = failures

    def emit(self, record: logging.LogRecord) -> None:
        # uvicorn 0.54 says so of every denial response (ASGI's extension), which it has sent.
        if record.getMessage() != "ASGI callable returned without completing handshake.":
            self._failures.append(self.format(record))


@contextlib.contextmanager
def hosted(
    lane: Lane, configured: Settings | None = None, timeouts: Timeouts | None = None
) -> Iterator[Hosted]:
    """A server in a thread with an event loop of its own, stopped at the end."""
    configured = configured or open_settings()
    notifyd = Notifyd(configured)
    started = threading.Event()
    listener = listen("127.0.0.1", 0, configured.websocket.idle_timeout)
    server: uvicorn.Server
    if lane == "sockets":
        serving = sockets_of(notifyd, timeouts)
        server = make_server(serving, configured.server, announce=started.set)
    else:
        server = _Announcing(
            uvicorn.Config(notifyd.app, lifespan="on", log_config=None, ws="websockets-sansio"),
            started,
        )
    here = Hosted(lane, listener.getsockname()[1], notifyd)
    records = _ErrorRecords(here.failures)
    logging.getLogger("uvicorn.error").addHandler(records)
    thread = threading.Thread(target=_run, args=(server, listener, here), name=f"server {lane}")
    thresholds = gc.get_threshold()
    thread.start()
    try:
        assert started.wait(20), here.failures
        # What a server of long life does with the garbage collector is not for a test's process.
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        yield here
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        logging.getLogger("uvicorn.error").removeHandler(records)
    assert not thread.is_alive()


class _Announcing(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: threading.Event) -> None:
        super().__init__(config)
        self._announced = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announced.set()


def _run(server: uvicorn.Server, listener: socket.socket, here: Hosted) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(
            lambda loop, context: here.failures.append(
                f"{context['message']}: {context.get('exception')!r}"
            )
        )
        # Signals belong to the main thread, which is pytest's.
        await server._serve(sockets=[listener])

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


def free_port() -> int:
    """A port of loopback that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
