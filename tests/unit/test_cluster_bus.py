"""When the bus stops to wait for answers, and what it puts into one message."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast
from uuid import uuid4

import msgspec
import pytest

from notifyd.cluster import bus as bus_module
from notifyd.cluster.bus import Awaited, Bus
from notifyd.cluster.messages import Answer, Held, Incoming, Spread, Told, encode_value, wired
from notifyd.metrics import Metrics
from notifyd.notification import Notification
from notifyd.queue.redis_keys import RedisKeys
from notifyd.redis_client import Redis
from notifyd.redis_subscriber import MAX_MESSAGE_BYTES
from tests.front_door import until


class FakeRedis:
    """Keeps what is published; two listen to everything, of whom one is the publisher."""

    def __init__(self) -> None:
        self.published: list[bytes] = []

    def command(self, *words: Any, convert: Any) -> asyncio.Future[None]:
        assert words[0] == "PUBLISH"
        self.published.append(words[2])
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(convert(2))
        return answer


@pytest.fixture
def redis() -> FakeRedis:
    return FakeRedis()


@pytest.fixture
async def bus(redis: FakeRedis) -> Bus:
    """A bus that hears nobody by itself."""
    made = Bus(
        cast(Redis, redis),
        RedisKeys("test").cluster(0),
        "node",
        Metrics(),
        receive=lambda incoming, body: None,
        on_up=lambda up: None,
    )
    made.run().close()
    made._subscriber.up = True
    return made


def nothing(awaited: Awaited) -> None:
    pass


async def test_what_is_late_for_long_does_not_hold_up_what_comes_after(bus: Bus) -> None:
    def finish(awaited: Awaited) -> None:
        awaited.after = nothing

    bus.reached(bus.await_answers(Told, finish), 1)
    await asyncio.sleep(0.25)
    asked_at = time.monotonic()
    told: list[float] = []
    bus.reached(bus.await_answers(Told, lambda awaited: told.append(time.monotonic())), 1)
    await until(lambda: bool(told), "the second one")
    assert told[0] - asked_at < 0.5
    bus.give_up()


async def test_what_redis_was_slow_for_is_given_up_all_the_same(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_module, "AFTER_SECONDS", 0.1)
    lost: list[Awaited] = []

    def finish(awaited: Awaited) -> None:
        awaited.after = lost.append

    awaited = bus.await_answers(Told, finish, patient=True)
    await asyncio.sleep(0.3)
    bus.reached(awaited, 1)
    await until(lambda: lost == [awaited], "the end of all patience")


async def test_what_goes_out_in_one_turn_is_no_longer_than_a_message_may_be(
    bus: Bus, redis: FakeRedis
) -> None:
    payload = msgspec.Raw(b'"' + b"x" * 60_000 + b'"')
    ids = [str(uuid4()) for _ in range(200)]
    waiting = []
    for id in ids:
        content = wired(Notification(id, 1.0, "e", payload))
        waiting.append(bus.await_answers(Told, nothing))
        bus.to_all(Spread(1, "default", "broadcast", (), content), waiting[-1])
    await asyncio.sleep(0)
    assert max(map(len, redis.published)) < MAX_MESSAGE_BYTES / 4
    assert len(redis.published) < 20
    got = []
    for data in redis.published:
        incoming = Incoming(data)
        for index in range(len(incoming)):
            body = incoming.body(index)
            assert isinstance(body, Spread)
            got.append(body.notification.id)
    assert got == ids
    assert {each.expected for each in waiting} == {1}
    bus.give_up()


async def test_an_answer_that_is_too_long_costs_nobody_his_subscription(
    bus: Bus, redis: FakeRedis
) -> None:
    bus.to_node("other", Answer(1, msgspec.Raw(encode_value(b"x" * MAX_MESSAGE_BYTES))))
    bus.to_node("other", Held(2, ()))
    await asyncio.sleep(0)
    (data,) = redis.published
    assert Incoming(data).body(0) == Held(2, ())
