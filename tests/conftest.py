"""Fixtures of all tests that open sockets; what they are made of stands in front_door.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, Protocol

import pytest
import uvloop

from tests.front_door import Host, Lane, Transport, running

SOCKETS = ("server", "adversity")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests with real sockets run on the event loop that `notifyd serve` runs on."""
    if item.path.parent.name in SOCKETS:
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


class StartServer(Protocol):
    """Starts a server that ends with the test; see `front_door.running`."""

    async def __call__(self, lane: Lane | None = None, **given: Any) -> Host: ...


@pytest.fixture(params=["sockets", "asgi"])
def lane(request: pytest.FixtureRequest) -> Lane:
    """Every test that uses this runs against both servers."""
    chosen: Lane = request.param
    return chosen


@pytest.fixture
async def start_on() -> AsyncIterator[StartServer]:
    """Start a server in the lane that the test names (`sockets` if it names none)."""
    async with AsyncExitStack() as stack:

        async def start(lane: Lane | None = None, **given: Any) -> Host:
            return await stack.enter_async_context(running(lane or "sockets", **given))

        yield start


@pytest.fixture
async def start(lane: Lane, start_on: StartServer) -> StartServer:
    """Start a server with settings of the test's own, once in each lane."""

    async def in_lane(lane: Lane | None = lane, **given: Any) -> Host:
        return await start_on(lane, **given)

    return in_lane


@pytest.fixture
async def host(start: StartServer) -> Host:
    """A server with default settings, once in each lane."""
    return await start()


@pytest.fixture(params=["websocket", "sse"])
def transport(request: pytest.FixtureRequest) -> Transport:
    """Every test that uses this runs over both transports."""
    chosen: Transport = request.param
    return chosen
