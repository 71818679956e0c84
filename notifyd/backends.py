"""What the settings chose to keep things in: memory, Redis or PostgreSQL, opened and closed as one.

A backend that is chosen and cannot be reached stops the start; it never becomes memory. One that
goes away later is behind its breaker, and what waited for it is told when it is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeAlias

import structlog

from notifyd.api.stats import Stores
from notifyd.errors import ConfigurationError
from notifyd.idempotency import FallbackIdempotencyKeys, IdempotencyKeys, MemoryIdempotencyKeys
from notifyd.metrics import Metrics
from notifyd.options import Backend, Settings
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
from notifyd.ratelimit.base import Limit
from notifyd.ratelimit.bucket import Rate
from notifyd.ratelimit.limits import RateLimits, Rates
from notifyd.ratelimit.local import MAX_BUCKETS, LocalLimit
from notifyd.ratelimit.redis import RedisLimit
from notifyd.redis_client import Redis
from notifyd.resilience import BreakerState, CircuitBreaker
from notifyd.templates import CachedTemplates, MemoryTemplates, TemplateStore
from notifyd.tenants import MemoryTenants, TenantStore

StoreName: TypeAlias = Literal["redis", "postgres"]


class Backends:
    """Logs, ledger, templates, tenants and idempotency keys where the settings say; `logs` and
    `ledger` are None where they are switched off. `clock` gives Unix seconds.

    `on_acknowledged` is told how long each ack took (seconds). Raises ConfigurationError where an
    address cannot be read.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        clock: Callable[[], float],
        on_acknowledged: Callable[[float], None],
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._log = structlog.get_logger("notifyd")
        self._closers: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self.redis = self._make_redis() if "redis" in settings.backends else None
        self.redis_keys = RedisKeys(settings.redis.key_prefix)
        self.postgres = self._make_postgres() if "postgres" in settings.backends else None
        for store in ("redis", "postgres"):
            if store not in settings.backends:
                metrics.leave_out(store)
        if not settings.redis.trigger_enabled:
            metrics.leave_out("redis_trigger")
        if settings.redis.stream_key is None:
            metrics.leave_out("redis_dead")
        if not settings.redis.has_sources:
            metrics.leave_out("redis_bad")
        self.logs = self._make_logs() if settings.queue.enabled else None
        self.ledger = self._make_ledger(on_acknowledged) if settings.ack.enabled else None
        # Nodes share these even where there is no queue.
        without_queue: Backend = "redis" if settings.cluster.enabled else "memory"
        kept_in = settings.queue.backend if settings.queue.enabled else without_queue
        self.templates = self._make_templates(kept_in)
        self.tenants = self._make_tenants(kept_in)
        self.idempotency = self._make_idempotency_keys(kept_in)
        self._local_limits: list[LocalLimit] = []
        self.rate_limits = self._make_rate_limits() if settings.ratelimit.enabled else None
        required: set[StoreName] = set()
        if settings.queue.mode == "always" and kept_in != "memory":
            # Without it nothing can be sent to a user.
            required.add(kept_in)
        self.stores = Stores(self.redis, self.postgres, frozenset(required))

    # --- clients ---

    def _make_redis(self) -> Redis:
        settings, metrics = self._settings.redis, self._metrics
        breaker = self._breaker("redis")
        metrics.redis_breaker_state.read_from(lambda: breaker.state)
        redis = Redis(
            settings.url,
            breaker,
            timeout=settings.command_timeout_seconds,
            probe_key=RedisKeys(settings.key_prefix).probe,
            on_reconnect=metrics.redis_reconnects_total.inc,
        )
        metrics.redis_up.read_from(lambda: redis.up)
        return redis

    def _make_postgres(self) -> Postgres:
        settings, metrics = self._settings.postgres, self._metrics
        if settings.url is None:
            raise ConfigurationError("postgres.url: is not set.")
        breaker = self._breaker("postgres")
        metrics.postgres_breaker_state.read_from(lambda: breaker.state)
        postgres = Postgres(
            settings.url,
            breaker,
            migrations=MIGRATIONS,
            pool_min=settings.pool_min,
            pool_max=settings.pool_max,
            command_timeout_seconds=settings.command_timeout_seconds,
            statement_cache_size=settings.statement_cache_size,
        )
        metrics.postgres_up.read_from(lambda: postgres.up)
        return postgres

    def _breaker(self, store: StoreName) -> CircuitBreaker:
        down = False

        def changed(state: BreakerState) -> None:
            nonlocal down
            if state is BreakerState.OPEN and not down:
                # Once: it opens again after each probe that fails.
                down = True
                self._log.warning("a store is down", store=store)
            elif state is BreakerState.CLOSED:
                down = False
                self._log.info("a store is back", store=store)

        return CircuitBreaker(self._settings.breaker, on_change=changed)

    # --- what is kept in them ---

    def _make_logs(self) -> UserLogs:
        settings, metrics = self._settings.queue, self._metrics
        logs: UserLogs
        if self.redis is not None and settings.backend == "redis":
            logs = RedisUserLogs(
                self.redis,
                self.redis_keys,
                max_size_per_user=settings.max_size_per_user,
                message_ttl_seconds=settings.message_ttl_seconds,
                on_dropped=metrics.queue_dropped_total.inc,
                on_corrupt=self._corrupt,
            )
        elif self.postgres is not None and settings.backend == "postgres":
            logs = postgres_logs = PostgresUserLogs(
                self.postgres,
                max_size_per_user=settings.max_size_per_user,
                # The disk is what bounds the logs of all users together.
                max_messages=None,
                message_ttl_seconds=settings.message_ttl_seconds,
                clock=self._clock,
                on_dropped=metrics.queue_dropped_total.inc,
                on_corrupt=self._corrupt,
            )
            self._closers.append(postgres_logs.aclose)
        else:
            logs = memory_logs = MemoryUserLogs(
                max_size_per_user=settings.max_size_per_user,
                max_messages=settings.max_messages,
                message_ttl_seconds=settings.message_ttl_seconds,
                clock=self._clock,
                on_dropped=metrics.queue_dropped_total.inc,
            )
            metrics.queue_messages.read_from(memory_logs.depth)
        return logs

    def _make_ledger(self, on_acknowledged: Callable[[float], None]) -> AckLedger:
        settings, metrics = self._settings.ack, self._metrics
        ledger: AckLedger
        if self.redis is not None and settings.backend == "redis":
            ledger = redis_ledger = RedisAckLedger(
                self.redis,
                self.redis_keys,
                timeout_seconds=settings.timeout_seconds,
                max_pending=settings.max_pending,
                on_acknowledged=on_acknowledged,
                on_expired=metrics.ack_expired_total.inc,
            )
            self._closers.append(redis_ledger.aclose)
        elif self.postgres is not None and settings.backend == "postgres":
            ledger = postgres_ledger = PostgresAckLedger(
                self.postgres,
                timeout_seconds=settings.timeout_seconds,
                max_pending=settings.max_pending,
                clock=self._clock,
                on_acknowledged=on_acknowledged,
                on_expired=metrics.ack_expired_total.inc,
            )
            self._closers.append(postgres_ledger.aclose)
        else:
            ledger = memory_ledger = MemoryAckLedger(
                timeout_seconds=settings.timeout_seconds,
                max_pending=settings.max_pending,
                clock=self._clock,
                on_acknowledged=on_acknowledged,
                on_expired=metrics.ack_expired_total.inc,
            )
            metrics.ack_pending.read_from(lambda: memory_ledger.stats().pending)
        return ledger

    def _make_templates(self, kept_in: Backend) -> TemplateStore:
        if self.redis is not None and kept_in == "redis":
            in_redis = RedisTemplates(self.redis, self.redis_keys, on_corrupt=self._corrupt)
            return CachedTemplates(in_redis)
        if self.postgres is not None and kept_in == "postgres":
            return CachedTemplates(PostgresTemplates(self.postgres, on_corrupt=self._corrupt))
        return MemoryTemplates()

    def _make_tenants(self, kept_in: Backend) -> TenantStore:
        if self.redis is not None and kept_in == "redis":
            return RedisTenants(self.redis, self.redis_keys, on_corrupt=self._corrupt)
        if self.postgres is not None and kept_in == "postgres":
            return PostgresTenants(self.postgres, on_corrupt=self._corrupt)
        return MemoryTenants()

    def _make_idempotency_keys(self, kept_in: Backend) -> IdempotencyKeys:
        settings = self._settings.idempotency
        memory = MemoryIdempotencyKeys(settings)
        if self.redis is not None and kept_in == "redis":
            in_redis = RedisIdempotencyKeys(
                self.redis, self.redis_keys, window_seconds=settings.window_seconds
            )
            return FallbackIdempotencyKeys(in_redis, memory)
        if self.postgres is not None and kept_in == "postgres":
            in_postgres = PostgresIdempotencyKeys(
                self.postgres, window_seconds=settings.window_seconds, clock=self._clock
            )
            self._closers.append(in_postgres.aclose)
            return FallbackIdempotencyKeys(in_postgres, memory)
        return memory

    def _make_rate_limits(self) -> RateLimits:
        settings = self._settings
        return RateLimits(Rates(settings.ratelimit, settings.auth), self._make_limit, self._metrics)

    def _make_limit(self, name: str, rate: Rate) -> Limit:
        local = LocalLimit(rate, clock=self._clock, max_buckets=MAX_BUCKETS)
        self._local_limits.append(local)
        if self.redis is not None and self._settings.ratelimit.backend == "redis":
            return RedisLimit(self.redis, self.redis_keys, name, local)
        return local

    def _corrupt(self, reason: str) -> None:
        self._metrics.queue_corrupt_total.labels(reason).inc()

    # --- their life ---

    async def start(self) -> None:
        """Connect to what was chosen, and migrate where that is allowed.

        Raises ConfigurationError where one cannot be used; nothing stays open then.
        """
        try:
            if self.redis is not None:
                await self.redis.start()
                await self._look_at_eviction(self.redis)
            if self.postgres is not None:
                await self.postgres.start()
                await self._migrate(self.postgres)
        except BaseException:
            await self.aclose()
            raise

    async def _look_at_eviction(self, redis: Redis) -> None:
        queue, ack = self._settings.queue, self._settings.ack
        kept = (queue.enabled and queue.backend == "redis") or (
            ack.enabled and ack.backend == "redis"
        )
        if kept and (policy := await redis.eviction_policy()) is not None:
            self._log.warning(
                "Redis gives up what it is to keep when its memory is full;"
                " set its maxmemory-policy to noeviction",
                maxmemory_policy=policy,
            )

    async def _migrate(self, postgres: Postgres) -> None:
        if self._settings.postgres.migrate_on_start:
            for name in await postgres.migrate():
                self._log.info("a migration was applied", migration=name)
        elif missing := await postgres.check():
            raise ConfigurationError(
                f"postgres: the schema lacks {', '.join(missing)}; run `notifyd migrate`, or set "
                "postgres.migrate_on_start"
            )

    def watch(self, spawn: Callable[[Coroutine[Any, Any, None]], object]) -> None:
        """Look in the background whether a store that is down is back."""
        for store in (self.redis, self.postgres):
            if store is not None:
                spawn(store.watch())

    async def sweep(self) -> None:
        """Forget callers whose rate they have not used for long."""
        for limit in self._local_limits:
            await limit.sweep()

    def _store_of_logs(self) -> Redis | Postgres | None:
        if self.logs is None:
            return None
        stores = {"redis": self.redis, "postgres": self.postgres, "memory": None}
        return stores[self._settings.queue.backend]

    @property
    def logs_away(self) -> bool:
        """Whether the store of the logs is not asked for now."""
        store = self._store_of_logs()
        return store is not None and store.breaker.state is not BreakerState.CLOSED

    def on_back(self, tell: Callable[[], None]) -> None:
        """Call `tell` each time when the store of the logs is back."""

        def changed(state: BreakerState) -> None:
            if state is BreakerState.CLOSED:
                tell()

        if (store := self._store_of_logs()) is not None:
            store.breaker.subscribe(changed)

    async def aclose(self) -> None:
        """Fail what still waits, and disconnect."""
        await asyncio.gather(*(close() for close in self._closers))
        for store in (self.redis, self.postgres):
            if store is not None:
                await store.aclose()
