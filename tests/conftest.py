"""Fixtures of all tests that open sockets; what they are made of stands in front_door.py and
stores.py."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from typing import Any, Literal, Protocol
from uuid import uuid4

import pytest
import structlog
import uvloop
from hypothesis import settings

from tests.front_door import Host, Lane, Transport, running
from tests.stores import PostgresServer, RedisServer, schema, serving

SOCKETS = ("server", "adversity", "cluster")

# How long an example takes says how busy the machine is.
settings.register_profile("notifyd", deadline=None)
settings.load_profile("notifyd")

# The default draws a traceback with rich where that is installed, for a second or two at a time.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)

# Servers that tests start are compiled once, not at each start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests with real sockets run on the event loop that `notifyd serve` runs on."""
    if item.path.parent.name in SOCKETS:
        return {"uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is there to strain a server is not slowed down by counting its lines: what it reaches,
    a plainer test must reach too."""
    for item in items:
        if item.path.parent.name == "adversity" or item.path.stem == "test_isolation":
            item.add_marker(pytest.mark.no_cover)


class StartServer(Protocol):
    """Starts a server that ends with the test; see `front_door.running`."""

    async def __call__(self, lane: Lane | None = None, **given: Any) -> Host: ...


@pytest.fixture(params=["sockets", "asgi"])
def lane(request: pytest.FixtureRequest) -> Lane:
    """Every test that uses this runs against both servers."""
    chosen: Lane = request.param
    return chosen


@pytest.fixture
def places(request: pytest.FixtureRequest) -> None:
    """Where the test's servers keep things is there before them, and outlives them: else they would
    try in vain to store what their clients had not confirmed."""
    for name in ("postgres_url", "kept", "faulty"):
        if name in request.fixturenames:
            request.getfixturevalue(name)


@pytest.fixture
async def start_on(places: None) -> AsyncIterator[StartServer]:
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


@pytest.fixture(scope="session")
def running_redis() -> Iterator[RedisServer]:
    """One for the tests of this process; another xdist worker has its own."""
    with serving(RedisServer) as server:
        yield server


@pytest.fixture
def redis_server(running_redis: RedisServer) -> Iterator[RedisServer]:
    """A Redis that the test may do anything to: it is well and empty again afterwards."""
    yield running_redis
    running_redis.recover()
    running_redis.command("FLUSHALL")


@pytest.fixture
def redis_url(request: pytest.FixtureRequest) -> str:
    """A Redis to use, not to break; keep to a key prefix of the test's own.

    NOTIFYD_TEST_REDIS_URL names another one than the tests' own.
    """
    if given := os.environ.get("NOTIFYD_TEST_REDIS_URL"):
        return given
    server: RedisServer = request.getfixturevalue("running_redis")
    return server.url


@pytest.fixture(scope="session")
def running_postgres() -> Iterator[PostgresServer]:
    """One for the tests of this process; another xdist worker has its own."""
    with serving(PostgresServer) as server:
        yield server


@pytest.fixture
def postgres_server(running_postgres: PostgresServer) -> Iterator[PostgresServer]:
    """A PostgreSQL that the test may do anything to: it is well again afterwards."""
    yield running_postgres
    running_postgres.recover()


@pytest.fixture
async def postgres_url(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A schema of the test's own, in a PostgreSQL to use, not to break.

    NOTIFYD_TEST_POSTGRES_URL names another server than the tests' own.
    """
    url = os.environ.get("NOTIFYD_TEST_POSTGRES_URL")
    if not url:
        server: PostgresServer = request.getfixturevalue("running_postgres")
        url = server.url
    async with schema(url) as its_own:
        yield its_own


@pytest.fixture(params=["redis", "postgres"])
def store(request: pytest.FixtureRequest) -> Literal["redis", "postgres"]:
    """Every test that uses this runs with both."""
    chosen: Literal["redis", "postgres"] = request.param
    return chosen


def sections_of(request: pytest.FixtureRequest, store: str) -> dict[str, dict[str, Any]]:
    """Settings of one who keeps everything in `store`, in a place of the test's own."""
    of_store: dict[str, Any] = {"url": request.getfixturevalue(f"{store}_url")}
    if store == "redis":
        of_store["key_prefix"] = f"test-{uuid4().hex}"
    return {"queue": {"backend": store}, "ack": {"backend": store}, store: of_store}


@pytest.fixture
def kept(request: pytest.FixtureRequest, store: str) -> dict[str, dict[str, Any]]:
    """Settings of one who keeps everything in `store`."""
    return sections_of(request, store)
