"""What a `Limit` promises, in this process or in Redis, and that both let the same through."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from notifyd.eventually import settled
from notifyd.identifiers import new_uuid
from notifyd.options import BreakerSettings
from notifyd.queue.redis_keys import RedisKeys
from notifyd.ratelimit.base import Limit, Verdict
from notifyd.ratelimit.bucket import Rate
from notifyd.ratelimit.local import LocalLimit
from notifyd.ratelimit.redis import RedisLimit
from notifyd.redis_client import Redis
from notifyd.resilience import CircuitBreaker
from tests.contract.backends import NOW, Clock

Make = Callable[[Rate], Limit]

SLOW = Rate.parse("10/hour")
"""A bucket of it stays in Redis for longer than a test, whose clock may stand still, takes."""


def no_clock() -> float:
    raise AssertionError("Redis is there")


def shared(redis: Redis, keys: RedisKeys, rate: Rate, clock: Clock | None = None) -> RedisLimit:
    """With more patience than a busy machine takes of it."""
    local = LocalLimit(rate, clock=no_clock, max_buckets=100)
    return RedisLimit(redis, keys, "test", local, clock=clock, patience_seconds=30)


async def a_redis(url: str, stack: AsyncExitStack, keys: RedisKeys) -> Redis:
    redis = Redis(url, CircuitBreaker(BreakerSettings()), probe_key=keys.probe)
    await redis.start()
    stack.push_async_callback(redis.aclose)
    return redis


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def keys() -> RedisKeys:
    return RedisKeys(f"test-{new_uuid()}")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["local", "redis"])
async def make(
    request: pytest.FixtureRequest, stack: AsyncExitStack, keys: RedisKeys, clock: Clock
) -> Make:
    if request.param == "local":
        return lambda rate: LocalLimit(rate, clock=clock, max_buckets=100)
    redis = await a_redis(request.getfixturevalue("redis_url"), stack, keys)
    return lambda rate: shared(redis, keys, rate, clock)


async def take(limit: Limit, who: str = "a", times: int = 1) -> list[Verdict]:
    return [await settled(limit.take(who)) for _ in range(times)]


async def test_a_burst_and_then_what_the_rate_brings(make: Make, clock: Clock) -> None:
    limit = make(SLOW)
    verdicts = await take(limit, times=12)
    assert [each.allowed for each in verdicts] == [True] * 10 + [False] * 2
    assert [each.remaining for each in verdicts] == [*range(9, -1, -1), 0, 0]
    assert {each.limit for each in verdicts} == {10}
    assert verdicts[0] == Verdict(True, 10, 9, int(NOW) + 360, 0)
    assert verdicts[-1] == Verdict(False, 10, 0, int(NOW) + 3600, 360)
    clock.now += 359.999
    assert not (await take(limit))[0].allowed
    clock.now += 0.001
    assert [each.allowed for each in await take(limit, times=2)] == [True, False]
    clock.now += 3600 * 24 * 365
    assert sum(each.allowed for each in await take(limit, times=12)) == 10


async def test_names_do_not_reach_each_other(make: Make) -> None:
    limit = make(Rate.parse("1/hour"))
    for who in ("a", "a|b", "a:b", "{a}", "a\nb", "", "ü", "2001:db8::"):
        assert [each.allowed for each in await take(limit, who, 2)] == [True, False], who


async def test_a_clock_that_is_set_back(make: Make, clock: Clock) -> None:
    limit = make(SLOW)
    await take(limit, times=10)
    clock.now -= 86_400
    assert not (await take(limit))[0].allowed
    clock.now += 360
    assert [each.allowed for each in await take(limit, times=2)] == [True, False]


@given(
    rate=some.builds(Rate.of, some.integers(1, 2000), some.just(3_600_000), some.integers(1, 50)),
    calls=some.lists(some.tuples(some.integers(0, 1_000_000), some.integers(1, 9)), max_size=12),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_redis_lets_the_same_through_as_this_process(
    redis_url: str, rate: Rate, calls: list[tuple[int, int]]
) -> None:
    import asyncio

    async def compared() -> None:
        async with AsyncExitStack() as stack:
            clock, keys = Clock(), RedisKeys(f"test-{new_uuid()}")
            redis = await a_redis(redis_url, stack, keys)
            here = LocalLimit(rate, clock=clock, max_buckets=100)
            there = shared(redis, keys, rate, clock)
            milliseconds = int(NOW * 1000)
            for passed, times in calls:
                milliseconds += passed
                clock.now = milliseconds / 1000 + 1e-5
                assert await take(here, times=times) == await take(there, times=times)

    asyncio.run(compared())


class TestRedis:
    """What only a Redis that several share can show."""

    async def test_calls_of_one_turn_share_one_budget(
        self, redis_url: str, stack: AsyncExitStack, keys: RedisKeys
    ) -> None:
        import asyncio

        limits = [shared(await a_redis(redis_url, stack, keys), keys, SLOW) for _ in range(3)]
        verdicts = await asyncio.gather(
            *(settled(limit.take("a")) for limit in limits for _ in range(10))
        )
        assert sum(each.allowed for each in verdicts) == 10

    async def test_every_bucket_has_one_key_that_goes_when_it_is_full(
        self, redis_url: str, stack: AsyncExitStack, keys: RedisKeys
    ) -> None:
        redis = await a_redis(redis_url, stack, keys)
        limit = shared(redis, keys, SLOW)
        await take(limit, "a b", 3)
        key = keys.rate_limit("test-1.360000.10", "a b")
        assert key.endswith(":{rate|test-1.360000.10|a%20b}")
        left = await redis.command("PTTL", key)
        assert 3 * 360_000 < left <= 3 * 360_000 + 1000
        await take(limit, "a b", 20)
        assert 10 * 360_000 - 1000 < await redis.command("PTTL", key) <= 10 * 360_000 + 1000

    async def test_another_rate_has_another_bucket(
        self, redis_url: str, stack: AsyncExitStack, keys: RedisKeys
    ) -> None:
        redis = await a_redis(redis_url, stack, keys)
        for rate in (SLOW, Rate.parse("20/hour")):
            limit = shared(redis, keys, rate)
            assert sum(each.allowed for each in await take(limit, times=25)) == rate.burst
