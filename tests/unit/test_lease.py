"""notifyd.cluster.lease with a Redis that says what a test wants; real ones are in adversity."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import pytest

from notifyd.cluster.lease import Lease
from notifyd.errors import Unavailable
from notifyd.options import BreakerSettings
from notifyd.redis_client import Redis, Script
from notifyd.resilience import CircuitBreaker


class OneKey:
    """A Redis that knows one key, as lease.lua has it, or is away."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.holder: str | None = None
        self.until = 0.0
        self.away = False
        self.takes = 0.0
        """Seconds that an answer takes."""

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> int:
        assert keys == ["k"]
        self.clock.now += self.takes / 2
        if self.away:
            raise Unavailable("Redis does not answer.", retry_after=1)
        if script.name == "release.lua":
            if self.holder == args[0]:
                self.until = 0.0
            return 1
        now, ttl = self.clock.now, args[1] / 1000
        if self.holder is None:
            self.holder, self.until = "", now + ttl
        his = self.holder == args[0] or (self.holder == "" and args[2])
        if not his and self.until > now:
            return max(1, int((self.until - now) * 1000))
        self.holder, self.until = args[0], now + ttl
        self.clock.now += self.takes / 2
        return 0

    def forget(self) -> None:
        """As FLUSHALL does."""
        self.holder = None


class Clock:
    """Time that goes on only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def redis(clock: Clock) -> OneKey:
    """It knows of a lease that lapsed long ago."""
    redis = OneKey(clock)
    redis.holder = "before"
    return redis


def a_lease(
    redis: OneKey, holder: str = "a", told: list[bool] | None = None, *, shared: bool = True
) -> Lease:
    told = [] if told is None else told
    clock = redis.clock
    return Lease(
        redis,  # type: ignore[arg-type]  # all of it that a lease needs
        "k",
        holder,
        shared=shared,
        clock=clock,
        sleep=clock.sleep,
        on_change=told.append,
    )


async def test_one_holds_it(redis: OneKey) -> None:
    first, second = a_lease(redis), a_lease(redis, "b")
    assert not first.held
    assert await first.renew()
    assert not await second.renew()
    assert (first.held, second.held) == (True, False)


async def test_who_cannot_renew_stops_before_another_can_have_it(redis: OneKey) -> None:
    first, second = a_lease(redis), a_lease(redis, "b")
    redis.takes = 1.0
    await first.renew()
    redis.takes = 0.0
    while first.held:
        assert not await second.renew()
        redis.clock.now += 0.01
    assert not await second.renew()
    assert redis.until - redis.clock.now > 0.24
    redis.clock.now = redis.until
    assert await second.renew()


async def test_it_is_renewed_and_lapses_while_redis_is_away(redis: OneKey) -> None:
    told: list[bool] = []
    lease = a_lease(redis, told=told)
    running = asyncio.ensure_future(lease.run())
    await lease.acquired()
    begun = redis.clock.now
    while redis.clock.now < begun + 20:
        assert lease.held
        await asyncio.sleep(0)
    redis.away = True
    await lease.lapsed()
    assert told == [True, False]
    redis.away = False
    await lease.acquired()
    assert told == [True, False, True]
    running.cancel()
    await asyncio.wait([running])


async def test_it_is_left_to_another(redis: OneKey) -> None:
    first, second = a_lease(redis), a_lease(redis, "b")
    await second.release()
    await first.renew()
    assert not await second.release()
    assert redis.until > redis.clock.now
    await first.release()
    assert not first.held
    assert await second.renew()


async def test_it_lapses_where_it_cannot_be_released(redis: OneKey) -> None:
    lease = a_lease(redis)
    await lease.renew()
    redis.away = True
    with pytest.raises(Unavailable):
        await lease.release()
    assert not lease.held


async def test_where_redis_forgot_it_its_holder_has_it_again(redis: OneKey) -> None:
    first, second = a_lease(redis), a_lease(redis, "b")
    await first.renew()
    redis.clock.now += 1
    redis.forget()
    for _ in range(20):
        # Others ask before he does.
        assert not await second.renew()
        assert await first.renew()
        assert not await second.renew()
        redis.clock.now += 1


async def test_where_redis_forgot_it_another_has_it_when_its_holder_cannot(redis: OneKey) -> None:
    first, second = a_lease(redis), a_lease(redis, "b")
    await first.renew()
    redis.forget()
    asking = asyncio.ensure_future(second.run())
    begun = redis.clock.now
    await second.acquired()
    assert not first.held
    assert redis.clock.now - begun <= 4
    asking.cancel()
    await asyncio.wait([asking])
    # He was frozen, and asks again.
    assert not await first.renew()


async def test_what_was_taken_and_forgotten_between_two_looks_is_not_taken_for_free(
    redis: OneKey,
) -> None:
    first, second = a_lease(redis), a_lease(redis, "b")
    redis.forget()
    assert not await first.renew()
    assert not await second.renew()
    redis.clock.now += 3
    assert await first.renew()
    redis.forget()
    assert not await second.renew()
    assert await first.renew()


async def test_who_is_alone_waits_for_nobody(redis: OneKey) -> None:
    redis.forget()
    assert await a_lease(redis, shared=False).renew()


async def test_who_is_told_that_it_was_given_up_asks_at_once(redis: OneKey) -> None:
    first, second = a_lease(redis), a_lease(redis, "b")
    await first.renew()
    assert not await second.renew()
    assert await first.release()
    begun = redis.clock.now
    second.ask()
    await second.acquired()
    assert redis.clock.now == begun
    assert not await first.release()


async def test_a_clock_of_redis_that_was_set_back_keeps_nobody_waiting(redis_url: str) -> None:
    """As where a replica took over, whose clock is behind, and the holder died with the master."""
    redis = Redis(redis_url, CircuitBreaker(BreakerSettings()))
    await redis.start()
    key = f"test-{uuid4().hex}"
    in_an_hour = int((time.time() + 3600) * 1000)
    await redis.command("SET", key, f"{in_an_hour} dead")
    lease = Lease(redis, key, "a", time_to_live=3)
    assert not await lease.renew()
    lapses, _, holder = (await redis.command("GET", key)).partition(b" ")
    assert 0 < int(lapses) - time.time() * 1000 <= 3000
    assert holder == b"dead"
    # It is not put off by who asks again.
    assert not await lease.renew()
    assert (await redis.command("GET", key)).partition(b" ")[0] == lapses
    await redis.command("DEL", key)
    await redis.aclose()
