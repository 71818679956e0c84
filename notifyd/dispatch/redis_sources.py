"""What comes from Redis, as one: the trigger, the stream, and the lease of both.

A stream is read by the holder of the lease, always. Of what is published each server takes its
copy, unless they are nodes of a cluster: there the holder dispatches to the users of all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from notifyd.api.notifications import Composer
from notifyd.cluster.lease import Lease
from notifyd.dispatch import redis_stream, redis_trigger
from notifyd.dispatch.dispatcher import Dispatcher
from notifyd.dispatch.redis_stream import BLOCK_SECONDS, RedisStream
from notifyd.dispatch.redis_trigger import BadMessages, Intake, RedisTrigger, TenantOf
from notifyd.errors import Unavailable
from notifyd.idempotency import IdempotencyKeys
from notifyd.identifiers import new_uuid
from notifyd.metrics import Metrics
from notifyd.options import RedisSettings
from notifyd.queue.redis_keys import RedisKeys
from notifyd.redis_client import Redis
from notifyd.templates import TemplateStore

SILENCE_SECONDS = 30.0
"""After so much silence a subscription is probed."""


class RedisSources:
    """The trigger and the stream where the settings want them.

    `clustered`: this is a node of a cluster. `keeps_up` is what `RedisTrigger` has it for. `clock`
    gives Unix seconds.
    """

    def __init__(
        self,
        settings: RedisSettings,
        redis: Redis,
        keys: RedisKeys,
        dispatcher: Dispatcher,
        *,
        templates: TemplateStore,
        idempotency: IdempotencyKeys,
        metrics: Metrics,
        clock: Callable[[], float],
        tenant_of: TenantOf,
        clustered: bool,
        ledger_in_redis: bool,
    ) -> None:
        self._log = structlog.get_logger("notifyd")
        self._lease: Lease | None = None
        self._renewing: asyncio.Task[None] | None = None
        if settings.stream_key is not None or clustered:
            self._lease = Lease(
                redis, keys.trigger_lease, new_uuid(), on_change=self._told_of_lease
            )
        bad = BadMessages(metrics)

        def intake(source: str) -> Intake:
            compose = Composer(templates, source="redis", clock=clock, new_id=new_uuid)
            return Intake(dispatcher, compose, idempotency, source=source, tenant_of=tenant_of)

        self.trigger: RedisTrigger | None = None
        if settings.trigger_enabled:
            self.trigger = RedisTrigger(
                redis,
                intake(redis_trigger.SOURCE),
                metrics,
                bad,
                patterns=settings.trigger_patterns,
                probe_prefix=keys.probe,
                lease=self._lease if clustered else None,
                keeps_up=(lambda: redis.command("PING")) if ledger_in_redis else None,
                silence=SILENCE_SECONDS,
                probe_timeout=settings.command_timeout_seconds,
            )
        self.stream: RedisStream | None = None
        if settings.stream_key is not None and self._lease is not None:
            self.stream = RedisStream(
                redis,
                redis.another(timeout=settings.command_timeout_seconds + BLOCK_SECONDS),
                intake(redis_stream.SOURCE),
                metrics,
                bad,
                key=settings.stream_key,
                group=settings.key_prefix,
                lease=self._lease,
                clock=clock,
            )

    def _told_of_lease(self, held: bool) -> None:
        self._log.info(
            "this node runs the trigger now" if held else "this node no longer runs the trigger"
        )

    def start(self) -> None:
        """Begin to take messages."""
        if self._lease is not None:
            self._renewing = asyncio.ensure_future(self._lease.run())
        for source in (self.trigger, self.stream):
            if source is not None:
                source.start()

    async def aclose(self) -> None:
        """Take no more, finish what was taken, and leave the lease to another."""
        for source in (self.trigger, self.stream):
            if source is not None:
                await source.aclose()
        if self._renewing is not None and self._lease is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
            self._renewing = None
            try:
                await self._lease.release()
            except Unavailable:
                self._log.info(
                    "the trigger's lease was not released and will expire: Redis is unreachable"
                )
