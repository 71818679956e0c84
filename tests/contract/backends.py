"""The backends that keep what we promise to keep, each as a factory for one test.

A backend gets the bounds that a test names, its clock, and remembers what it was told to tell.
Redis and Postgres get factories of their own beside `memory`; the suites stay as they are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import msgspec

from notifyd.idempotency import IdempotencyKeys, MemoryIdempotencyKeys
from notifyd.identifiers import new_uuid
from notifyd.notification import Notification, Priority
from notifyd.options import IdempotencySettings
from notifyd.queue.base import AckLedger, UserLogs
from notifyd.queue.memory import MemoryAckLedger, MemoryUserLogs
from notifyd.templates import MemoryTemplates, TemplateStore

NOW = 1_800_000_000.0


class Clock:
    """Unix seconds that stand still until a test says otherwise."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class Told:
    """What a backend told: entries given up, acks in seconds, expiries."""

    def __init__(self) -> None:
        self.dropped = 0
        self.acknowledged: list[float] = []
        self.expired = 0

    def on_dropped(self) -> None:
        self.dropped += 1

    def on_acknowledged(self, seconds: float) -> None:
        self.acknowledged.append(seconds)

    def on_expired(self, count: int) -> None:
        self.expired += count


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


@asynccontextmanager
async def memory(clock: Clock) -> AsyncIterator[Memory]:
    """Nothing to start or to end."""
    yield Memory(clock)


Backend = Memory

BACKENDS: dict[str, Callable[[Clock], AbstractAsyncContextManager[Backend]]] = {"memory": memory}


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
