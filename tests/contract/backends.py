"""The backends that keep what we promise to keep, each as a factory for one test.

A backend gets the bounds that a test names, its clock, and remembers what it was told to tell.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import msgspec
import pytest

from notifyd.idempotency import IdempotencyKeys, MemoryIdempotencyKeys
from notifyd.identifiers import new_uuid
from notifyd.notification import Notification, Priority
from notifyd.options import BreakerSettings, IdempotencySettings
from notifyd.postgres import Postgres
from notifyd.queue.base import AckLedger, UserLogs
from notifyd.queue.memory import MemoryAckLedger, MemoryUserLogs
from notifyd.queue.postgres import (
    MIGRATIONS,
    PostgresAckLedger,
    PostgresIdempotencyKeys,
    PostgresTemplates,
    PostgresTenants,
    PostgresUserLogs,
)
from notifyd.queue.redis import (
    RedisAckLedger,
    RedisIdempotencyKeys,
    RedisTemplates,
    RedisTenants,
    RedisUserLogs,
)
from notifyd.queue.redis_keys import RedisKeys
from notifyd.redis_client import Redis
from notifyd.resilience import CircuitBreaker
from notifyd.templates import MemoryTemplates, TemplateStore
from notifyd.tenants import MemoryTenants, TenantStore
from tests.stores import TransactionPooler, schema

NOW = 1_800_000_000.0


class Clock:
    """Unix seconds that stand still until a test says otherwise."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class Told:
    """What a backend told: entries given up or not to be read, acks in seconds, expiries."""

    def __init__(self) -> None:
        self.dropped = 0
        self.corrupt: list[str] = []
        self.acknowledged: list[float] = []
        self.expired = 0

    def on_dropped(self) -> None:
        self.dropped += 1

    def on_acknowledged(self, seconds: float) -> None:
        self.acknowledged.append(seconds)

    def on_expired(self, count: int) -> None:
        self.expired += count


class Backend(Protocol):
    """One store for one test."""

    clock: Clock
    told: Told

    async def logs(
        self,
        *,
        max_size_per_user: int = 100,
        max_messages: int = 10_000,
        message_ttl_seconds: float = 1000,
    ) -> UserLogs: ...

    async def ledger(
        self, *, timeout_seconds: float = 30, max_pending: int = 1000
    ) -> AckLedger: ...

    async def idempotency_keys(
        self, *, window_seconds: int = 60, max_keys: int = 100
    ) -> IdempotencyKeys: ...

    async def templates(self, *, max_per_tenant: int = 100) -> TemplateStore: ...

    async def tenants(self, *, max_tenants: int = 100) -> TenantStore: ...


class Memory:
    """This process's memory."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.told = Told()

    async def logs(
        self,
        *,
        max_size_per_user: int = 100,
        max_messages: int = 10_000,
        message_ttl_seconds: float = 1000,
    ) -> UserLogs:
        return MemoryUserLogs(
            max_size_per_user=max_size_per_user,
            max_messages=max_messages,
            message_ttl_seconds=message_ttl_seconds,
            clock=self.clock,
            on_dropped=self.told.on_dropped,
        )

    async def ledger(self, *, timeout_seconds: float = 30, max_pending: int = 1000) -> AckLedger:
        return MemoryAckLedger(
            timeout_seconds=timeout_seconds,
            max_pending=max_pending,
            clock=self.clock,
            on_acknowledged=self.told.on_acknowledged,
            on_expired=self.told.on_expired,
        )

    async def idempotency_keys(
        self, *, window_seconds: int = 60, max_keys: int = 100
    ) -> IdempotencyKeys:
        settings = IdempotencySettings(window_seconds=window_seconds, max_keys=max_keys)
        return MemoryIdempotencyKeys(settings, clock=self.clock)

    async def templates(self, *, max_per_tenant: int = 100) -> TemplateStore:
        return MemoryTemplates(max_per_tenant=max_per_tenant)

    async def tenants(self, *, max_tenants: int = 100) -> TenantStore:
        return MemoryTenants(max_tenants=max_tenants)


class PostgresBackend:
    """A schema of its own in a real PostgreSQL."""

    def __init__(self, clock: Clock, postgres: Postgres) -> None:
        self.clock = clock
        self.told = Told()
        self.postgres = postgres
        self.closers: list[Callable[[], Awaitable[None]]] = []

    async def logs(
        self,
        *,
        max_size_per_user: int = 100,
        max_messages: int = 10_000,
        message_ttl_seconds: float = 1000,
    ) -> UserLogs:
        logs = PostgresUserLogs(
            self.postgres,
            max_size_per_user=max_size_per_user,
            max_messages=max_messages,
            message_ttl_seconds=message_ttl_seconds,
            clock=self.clock,
            on_dropped=self.told.on_dropped,
            on_corrupt=self.told.corrupt.append,
        )
        self.closers.append(logs.aclose)
        return logs

    async def ledger(self, *, timeout_seconds: float = 30, max_pending: int = 1000) -> AckLedger:
        ledger = PostgresAckLedger(
            self.postgres,
            timeout_seconds=timeout_seconds,
            max_pending=max_pending,
            clock=self.clock,
            on_acknowledged=self.told.on_acknowledged,
            on_expired=self.told.on_expired,
        )
        self.closers.append(ledger.aclose)
        return ledger

    async def idempotency_keys(
        self, *, window_seconds: int = 60, max_keys: int = 100
    ) -> IdempotencyKeys:
        keys = PostgresIdempotencyKeys(
            self.postgres, window_seconds=window_seconds, clock=self.clock
        )
        self.closers.append(keys.aclose)
        return keys

    async def templates(self, *, max_per_tenant: int = 100) -> TemplateStore:
        return PostgresTemplates(
            self.postgres, on_corrupt=self.told.corrupt.append, max_per_tenant=max_per_tenant
        )

    async def tenants(self, *, max_tenants: int = 100) -> TenantStore:
        return PostgresTenants(
            self.postgres, on_corrupt=self.told.corrupt.append, max_tenants=max_tenants
        )


class RedisBackend:
    """Keys of its own in a real Redis."""

    def __init__(self, clock: Clock, redis: Redis, keys: RedisKeys) -> None:
        self.clock = clock
        self.told = Told()
        self.redis = redis
        self.keys = keys

    async def logs(
        self,
        *,
        max_size_per_user: int = 100,
        max_messages: int = 10_000,
        message_ttl_seconds: float = 1000,
    ) -> UserLogs:
        if max_messages < 10_000:
            pytest.skip("Redis's own memory is what bounds the logs of all users together")
        return RedisUserLogs(
            self.redis,
            self.keys,
            max_size_per_user=max_size_per_user,
            message_ttl_seconds=message_ttl_seconds,
            clock=self.clock,
            on_dropped=self.told.on_dropped,
            on_corrupt=self.told.corrupt.append,
        )

    async def ledger(self, *, timeout_seconds: float = 30, max_pending: int = 1000) -> AckLedger:
        return RedisAckLedger(
            self.redis,
            self.keys,
            timeout_seconds=timeout_seconds,
            max_pending=max_pending,
            clock=self.clock,
            on_acknowledged=self.told.on_acknowledged,
            on_expired=self.told.on_expired,
            # What is confirmed in the same turn of the loop is noted with that.
            resent_seconds=0,
        )

    async def idempotency_keys(
        self, *, window_seconds: int = 60, max_keys: int = 100
    ) -> IdempotencyKeys:
        return RedisIdempotencyKeys(
            self.redis, self.keys, window_seconds=window_seconds, clock=self.clock
        )

    async def templates(self, *, max_per_tenant: int = 100) -> TemplateStore:
        return RedisTemplates(
            self.redis,
            self.keys,
            on_corrupt=self.told.corrupt.append,
            max_per_tenant=max_per_tenant,
        )

    async def tenants(self, *, max_tenants: int = 100) -> TenantStore:
        return RedisTenants(
            self.redis,
            self.keys,
            on_corrupt=self.told.corrupt.append,
            max_tenants=max_tenants,
        )


Fixture = Callable[[str], Any]


@asynccontextmanager
async def memory(clock: Clock, fixture: Fixture) -> AsyncIterator[Backend]:
    """Nothing to start or to end."""
    yield Memory(clock)


@asynccontextmanager
async def postgres(clock: Clock, fixture: Fixture) -> AsyncIterator[PostgresBackend]:
    """Migrated, and gone with the test."""
    url = os.environ.get("NOTIFYD_TEST_POSTGRES_URL") or fixture("running_postgres").url
    async with schema(url) as its_own, migrated(clock, its_own) as backend:
        yield backend


@asynccontextmanager
async def pooled_postgres(clock: Clock, fixture: Fixture) -> AsyncIterator[Backend]:
    """Behind a transaction pooler: each transaction has another session of the server."""
    server = fixture("running_postgres")
    async with TransactionPooler(server.port) as pooler, schema(server.url) as its_own:
        through = its_own.replace(f":{server.port}/", f":{pooler.port}/")
        async with migrated(clock, through, statement_cache_size=0) as backend:
            yield backend


@asynccontextmanager
async def migrated(
    clock: Clock, url: str, *, statement_cache_size: int = 100
) -> AsyncIterator[PostgresBackend]:
    """Connected to a database of its own."""
    store = Postgres(
        url,
        CircuitBreaker(BreakerSettings()),
        migrations=MIGRATIONS,
        pool_max=4,
        statement_cache_size=statement_cache_size,
    )
    await store.start()
    backend = PostgresBackend(clock, store)
    try:
        await store.migrate()
        yield backend
    finally:
        for close in backend.closers:
            await close()
        await store.aclose()


@asynccontextmanager
async def redis(clock: Clock, fixture: Fixture) -> AsyncIterator[RedisBackend]:
    """Connected, under a prefix of its own."""
    url = os.environ.get("NOTIFYD_TEST_REDIS_URL") or fixture("running_redis").url
    keys = RedisKeys(f"test-{new_uuid()}")
    client = Redis(url, CircuitBreaker(BreakerSettings()), probe_key=keys.probe)
    await client.start()
    try:
        yield RedisBackend(clock, client, keys)
    finally:
        await client.aclose()


BACKENDS: dict[str, Callable[[Clock, Fixture], AbstractAsyncContextManager[Backend]]] = {
    "memory": memory,
    "postgres": postgres,
    "postgres-pooled": pooled_postgres,
    "redis": redis,
}


def a_notification(
    *,
    id: str | None = None,
    payload: bytes = b'{"n":1}',
    priority: Priority = Priority.NORMAL,
    now: float = NOW,
    **fields: Any,
) -> Notification:
    return Notification(
        id or new_uuid(), now, "order.created", msgspec.Raw(payload), priority, **fields
    )
