"""notifyd.cluster.lease with a Redis that says what a test wants; real ones are in adversity."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from notifyd.cluster.lease import Lease
from notifyd.errors import Unavailable
from notifyd.redis_client import Script


class OneKey:
    """A Redis that knows one key, or is away."""

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
        if self.clock.now >= self.until:
            self.holder = None
        if script.name == "release.lua":
            if self.holder == args[0]:
                self.holder = None
            return 1
        if self.holder not in {None, args[0]}:
            return 0
        self.holder, self.until = args[0], self.clock.now + args[1] / 1000
        self.clock.now += self.takes / 2
        return 1


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
    return OneKey(clock)


def a_lease(redis: OneKey, holder: str = "a", told: list[bool] | None = None) -> Lease:
    told = [] if told is None else told
    clock = redis.clock
    return Lease(redis, "k", holder, clock=clock, sleep=clock.sleep, on_change=told.append)  # type: ignore[arg-type]  # all of it that a lease needs


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
    await second.release()
    assert redis.holder == "a"
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
