"""Servers for strangers: each test leaves its server serving the others, and without an error."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from notifyd.server.door import Timeouts
from tests.adversity.hosting import Hosted, hosted


@pytest.fixture(scope="session")
def _sockets_server() -> Iterator[Hosted]:
    with hosted("sockets") as server:
        yield server


@pytest.fixture(scope="session")
def _asgi_server() -> Iterator[Hosted]:
    with hosted("asgi") as server:
        yield server


@pytest.fixture(scope="session")
def _hasty_server() -> Iterator[Hosted]:
    timeouts = Timeouts(
        first_byte=0.3, head=0.3, body=0.3, keep_alive=0.3, message=0.3, close=0.3, sweep=0.05
    )
    with hosted("sockets", timeouts=timeouts) as server:
        yield server


@contextlib.asynccontextmanager
async def _watched(server: Hosted) -> AsyncIterator[Hosted]:
    server.failures.clear()
    async with server.websocket("bystander") as bystander:
        yield server
        await bystander.pings()
    await server.serves()
    assert server.failures == []


@pytest_asyncio.fixture
async def sockets(_sockets_server: Hosted) -> AsyncIterator[Hosted]:
    """`notifyd serve`'s server; a bystander's WebSocket lives through the test."""
    async with _watched(_sockets_server) as watched:
        yield watched


@pytest_asyncio.fixture
async def hasty(_hasty_server: Hosted) -> AsyncIterator[Hosted]:
    """The same with timeouts of 0.3 s."""
    async with _watched(_hasty_server) as watched:
        yield watched


@pytest_asyncio.fixture(params=["sockets", "asgi"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Hosted]:
    """The same, and its twin: `Notifyd.app` on stock uvicorn."""
    chosen: Hosted = request.getfixturevalue(f"_{request.param}_server")
    async with _watched(chosen) as watched:
        yield watched
