"""What comes from Redis, as one: the trigger, the stream, and the lease of both.

A stream is read by the holder of the lease, always. Of what is published each server takes its
copy, unless they are nodes of a cluster: there the holder dispatches to the users of all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from notifyd.cluster.lease import Lease
from notifyd.cluster.router import Cluster
from notifyd.compose import Composer
from notifyd.dispatch import redis_stream, redis_trigger
from notifyd.dispatch.dispatcher import Dispatcher
from notifyd.dispatch.redis_stream import BLOCK_SECONDS, RedisStream
from notifyd.dispatch.redis_trigger import BadMessages, Intake, RedisTrigger, TenantOf
from notifyd.errors import Unavailable
from notifyd.idempotency import IdempotencyKeys
from notifyd.identifiers import new_uuid
from notifyd.metrics import Metrics
from notifyd.options import RedisSettings
from notifyd.queue.base import AckLedger
from notifyd.queue.redis_keys import RedisKeys
from notifyd.redis_client import Redis
from notifyd.templates import TemplateStore

LEASE_GIVEN_UP = "lease_given_up"
"""Told to the other nodes, of which one then goes on at once."""

SILENCE_SECONDS = 30.0
"""After so much silence a subscription is probed."""


class RedisSources:
    """The trigger and the stream where the settings want them.

    `cluster` is None where this is no node of one. `ledger_in_redis`: it is asked now and then
    whether it keeps up. `clock` gives Unix seconds.
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
        ledger: AckLedger | None,
        metrics: Metrics,
        clock: Callable[[], float],
        tenant_of: TenantOf,
        cluster: Cluster | None,
        ledger_in_redis: bool,
    ) -> None:
        self._log = structlog.get_logger("notifyd")
        self._lease: Lease | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._cluster = cluster
        if settings.stream_key is not None or cluster is not None:
            self._lease = Lease(
                redis,
                keys.trigger_lease,
                new_uuid(),
                shared=cluster is not None,
                on_change=self._told_of_lease,
            )
        if cluster is not None:
            cluster.answers[LEASE_GIVEN_UP] = self._told_that_it_was_given_up
        bad = BadMessages(metrics)

        def intake(source: str, *, alone: bool, again: bool = False) -> Intake:
            compose = Composer(templates, source="redis", clock=clock, new_id=new_uuid)
            return Intake(
                dispatcher,
                compose,
                idempotency,
                source=source,
                alone=alone,
                again=again,
                tenant_of=tenant_of,
            )

        self.trigger: RedisTrigger | None = None
        if settings.trigger_enabled:
            self.trigger = RedisTrigger(
                redis,
                intake(redis_trigger.SOURCE, alone=cluster is not None),
                metrics,
                bad,
                patterns=settings.trigger_patterns,
                probe_prefix=keys.probe,
                lease=None if cluster is None else self._lease,
                keeps_up=(lambda: redis.command("PING")) if ledger_in_redis else None,
                silence=SILENCE_SECONDS,
                probe_timeout=settings.command_timeout_seconds,
            )
        self.stream: RedisStream | None = None
        if settings.stream_key is not None and self._lease is not None:
            self.stream = RedisStream(
                redis,
                redis.another(timeout=settings.command_timeout_seconds + BLOCK_SECONDS),
                intake(redis_stream.SOURCE, alone=True, again=True),
                metrics,
                bad,
                ledger,
                key=settings.stream_key,
                group=settings.key_prefix,
                lease=self._lease,
                clock=clock,
            )

    def _told_of_lease(self, held: bool) -> None:
        self._log.info(
            "this node runs the trigger now" if held else "this node no longer runs the trigger"
        )

    def _told_that_it_was_given_up(self, about: object) -> None:
        if self._lease is not None and self._renewing is not None:
            self._lease.ask()

    def start(self) -> None:
        """Begin to take messages."""
        if self._lease is not None:
            self._renewing = asyncio.ensure_future(self._lease.run())
        for source in (self.trigger, self.stream):
            if source is not None:
                source.start()

    async def aclose(self) -> None:
        """Take no more, finish what was taken, and leave the lease to another."""
        # What is published is lost until another has subscribed, so that goes on longest.
        for source in (self.stream, self.trigger):
            if source is not None:
                await source.aclose()
        if self._renewing is not None and self._lease is not None:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
            self._renewing = None
            await self._give_up(self._lease)

    async def _give_up(self, lease: Lease) -> None:
        try:
            if await lease.release() and self._cluster is not None:
                await self._cluster.ask(LEASE_GIVEN_UP)
        except Unavailable:
            self._log.info(
                "the trigger's lease was not released and will expire: Redis is unreachable"
            )
