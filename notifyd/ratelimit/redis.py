"""Buckets in Redis, which all nodes share; this node's own stand in while Redis is away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files

from notifyd.errors import Unavailable
from notifyd.queue.redis_keys import RedisKeys
from notifyd.ratelimit.base import Verdict
from notifyd.ratelimit.bucket import Rate
from notifyd.ratelimit.local import LocalLimit
from notifyd.redis_client import Redis, Script

PATIENCE_SECONDS = 0.25
"""No call waits longer for its token: the limiter must not be what makes the server slow."""


class RedisLimit:
    """One rate for many, by Redis's clock; a `clock` (Unix seconds) stands in for it in tests.

    `name` tells limits apart. Where Redis does not answer in `patience_seconds`, or its breaker is
    open, `local` decides: each node by itself then lets the whole rate through.
    """

    def __init__(
        self,
        redis: Redis,
        keys: RedisKeys,
        name: str,
        local: LocalLimit,
        *,
        clock: Callable[[], float] | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._redis = redis
        self._patience_seconds = patience_seconds
        self._local = local
        self._clock = clock
        self._rate = rate = local.rate
        # Buckets of another rate hold other units, so that each rate has its own.
        self._name = f"{name}-{_text(rate)}"
        self._key = keys.rate_limit
        self._script = Script.read(files("notifyd.ratelimit") / "bucket.lua")
        self._words = (rate.count, rate.period, rate.burst)

    def take(self, who: str) -> Verdict | Awaitable[Verdict]:
        """See `Limit.take`; at once only where the breaker is open."""
        now = "" if self._clock is None else int(self._clock() * 1000)
        key = self._key(self._name, who)
        try:
            taken = self._redis.run(self._script, (key,), (*self._words, now), self._told)
        except Unavailable:
            return self._local.take(who)
        return self._within(taken, who)

    async def _within(self, taken: asyncio.Future[Verdict], who: str) -> Verdict:
        try:
            async with asyncio.timeout(self._patience_seconds):
                # Shielded, because a call that was given up would tell the breaker nothing.
                return await asyncio.shield(taken)
        except (TimeoutError, Unavailable):
            return self._local.take(who)

    def _told(self, answer: Sequence[int]) -> Verdict:
        allowed, units, now = answer
        return self._rate.verdict(units, now, allowed=allowed == 1)


def _text(rate: Rate) -> str:
    return f"{rate.count}.{rate.period}.{rate.burst}"
