from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as some

from notifyd.ratelimit.bucket import Bucket, Rate
from notifyd.ratelimit.local import SWEPT_PER_TURN, LocalLimit
from tests.unit.connected import NOW, Clock

SECOND = Rate.parse("10/second")


def a_limit(rate: Rate = SECOND, *, max_buckets: int = 100) -> tuple[LocalLimit, Clock]:
    clock = Clock()
    return LocalLimit(rate, clock=clock, max_buckets=max_buckets), clock


@given(some.lists(some.tuples(some.sampled_from("abc"), some.integers(0, 300)), max_size=100))
def test_each_has_a_bucket_of_his_own(calls: list[tuple[str, int]]) -> None:
    limit, clock = a_limit()
    buckets = {who: Bucket(SECOND, int(NOW * 1000)) for who in "abc"}
    milliseconds = int(NOW * 1000)
    for who, passed in calls:
        milliseconds += passed
        clock.now = milliseconds / 1000 + 1e-5
        verdict = limit.take(who)
        assert verdict.allowed == buckets[who].take(SECOND, milliseconds)
        assert verdict.remaining == buckets[who].units // SECOND.period


def test_a_flood_of_callers_takes_no_more_than_its_place() -> None:
    limit, _ = a_limit(max_buckets=100)
    for number in range(10_000):
        limit.take(f"192.0.2.{number}")
        assert len(limit) <= 100


def test_beyond_it_who_was_seen_longest_ago_begins_anew() -> None:
    limit, _ = a_limit(Rate.parse("1/hour"), max_buckets=3)
    for who in "abc":
        assert limit.take(who).allowed
    assert not limit.take("a").allowed
    limit.take("d")
    assert not limit.take("a").allowed
    assert limit.take("b").allowed


async def test_whose_bucket_is_full_again_is_swept() -> None:
    limit, clock = a_limit()
    for number in range(50):
        limit.take(f"{number}")
    clock.now += 0.5
    limit.take("late")
    limit.take("0")
    await limit.sweep()
    assert len(limit) == 51
    clock.now += 0.75
    await limit.sweep()
    assert len(limit) == 2
    clock.now += 0.5
    await limit.sweep()
    assert len(limit) == 0


async def test_sweeping_yields() -> None:
    limit, clock = a_limit(max_buckets=10_000)
    for number in range(3 * SWEPT_PER_TURN):
        limit.take(f"{number}")
    clock.now += 10
    sweeping = asyncio.ensure_future(limit.sweep())
    await asyncio.sleep(0)
    assert 0 < len(limit) < 3 * SWEPT_PER_TURN
    await sweeping
    assert len(limit) == 0
