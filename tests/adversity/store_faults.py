"""Stores that fail when a test says so: what can happen to a Redis or PostgreSQL behind a server.

A fault is a context: it lasts while its block does, and the store is well again behind it. Faults
of `MOMENTARY` are over as soon as the block begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal
from uuid import uuid4

import asyncpg

from tests.stores import PostgresServer, Proxy, RedisServer, proxy, schema

TIMEOUT = 0.9
"""Seconds after which a call to these stores is given up; a busy machine may take half of it."""

THRESHOLD = 3
"""Failures that open the breaker."""

StoreName = Literal["redis", "postgres"]


class FaultyStore:
    """A real server, and a proxy before it that is the network. `sections` are settings of one who
    keeps everything there."""

    def __init__(
        self, name: StoreName, server: RedisServer | PostgresServer, network: Proxy, url: str
    ) -> None:
        self.name = name
        self.server = server
        self.network = network
        self.sections: dict[str, dict[str, Any]] = {
            "queue": {"backend": name},
            "ack": {"backend": name},
            "breaker": {
                "failure_threshold": THRESHOLD,
                "backoff_initial_ms": 10,
                "backoff_max_ms": 50,
            },
            name: {"url": url, "command_timeout_seconds": TIMEOUT},
        }
        if name == "redis":
            self.sections["redis"]["key_prefix"] = f"test-{uuid4().hex}"

    def given(self, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Its settings, with those of a test over them."""
        names = {*self.sections, *sections}
        return {name: self.sections.get(name, {}) | sections.get(name, {}) for name in names}


@asynccontextmanager
async def faulty_redis(server: RedisServer) -> AsyncIterator[FaultyStore]:
    """A Redis behind a proxy."""
    async with proxy(server.port) as network:
        yield FaultyStore("redis", server, network, f"redis://127.0.0.1:{network.port}/0")


@asynccontextmanager
async def faulty_postgres(server: PostgresServer) -> AsyncIterator[FaultyStore]:
    """A PostgreSQL behind a proxy, with a schema of its own."""
    async with schema(server.url) as url, proxy(server.port) as network:
        through = url.replace(f":{server.port}/", f":{network.port}/")
        try:
            yield FaultyStore("postgres", server, network, through)
        finally:
            # The schema can go only where the server is well.
            await asyncio.to_thread(server.recover)


# --- what can happen ------------------------------------------------------------------------------


@asynccontextmanager
async def stopped(store: FaultyStore) -> AsyncIterator[None]:
    """The server hangs: it takes connections and answers nothing (SIGSTOP)."""
    store.server.stop()
    try:
        yield
    finally:
        store.server.cont()


@asynccontextmanager
async def killed(store: FaultyStore) -> AsyncIterator[None]:
    """The server is gone (SIGKILL); it comes back with its data."""
    await asyncio.to_thread(store.server.kill)
    try:
        yield
    finally:
        await asyncio.to_thread(store.server.start)


@asynccontextmanager
async def restarted(store: FaultyStore) -> AsyncIterator[None]:
    """The server was ended in good order and started again."""
    await asyncio.to_thread(store.server.restart)
    yield


@asynccontextmanager
async def cut(store: FaultyStore) -> AsyncIterator[None]:
    """Every connection was reset."""
    store.network.cut()
    yield


@asynccontextmanager
async def refused(store: FaultyStore) -> AsyncIterator[None]:
    """Nobody listens any more."""
    await store.network.refuse()
    try:
        yield
    finally:
        await store.network.accept()


@asynccontextmanager
async def silent(store: FaultyStore) -> AsyncIterator[None]:
    """The network swallows everything, and closes nothing."""
    store.network.hold()
    try:
        yield
    finally:
        # What it held arrives now, of those who still have it to send.
        store.network.release()


@asynccontextmanager
async def out_of_memory(store: FaultyStore) -> AsyncIterator[None]:
    """`OOM command not allowed`."""
    assert isinstance(store.server, RedisServer)
    with store.server.out_of_memory():
        yield


@asynccontextmanager
async def read_only(store: FaultyStore) -> AsyncIterator[None]:
    """The server has become a replica: it answers, and takes no writes."""
    if isinstance(store.server, RedisServer):
        with store.server.read_only():
            yield
        return
    owner = await asyncpg.connect(store.server.url)
    try:
        # Sessions that there are keep what they began with, and end: unlike a reload of the
        # configuration, this is so for all at the same moment.
        await owner.execute("SET default_transaction_read_only = off")
        await owner.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
        await owner.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        yield
    finally:
        await owner.execute("ALTER DATABASE postgres RESET default_transaction_read_only")
        await owner.close()


Fault = Callable[[FaultyStore], AbstractAsyncContextManager[None]]

MOMENTARY: Mapping[str, Fault] = {"restarted": restarted, "cut": cut}
AWAY: Mapping[str, Fault] = {
    "stopped": stopped,
    "killed": killed,
    "refused": refused,
    "silent": silent,
}
UNWRITABLE: Mapping[str, Fault] = {"read_only": read_only, "out_of_memory": out_of_memory}
FAULTS: Mapping[str, Fault] = {**MOMENTARY, **AWAY, **UNWRITABLE}


def cases(*kinds: Mapping[str, Fault]) -> list[tuple[StoreName, str]]:
    """Every store with every fault of these kinds that it can have."""
    return [
        (store, name)
        for store in ("redis", "postgres")
        for kind in kinds
        for name in kind
        if store == "redis" or name != "out_of_memory"
    ]
