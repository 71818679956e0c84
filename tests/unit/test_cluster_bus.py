"""When the bus stops to wait for answers, and what it puts into one message."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast
from uuid import uuid4

import msgspec
import pytest
import uvloop
from structlog.testing import capture_logs

from notifyd.cluster import bus as bus_module
from notifyd.cluster.bus import Awaited, Bus
from notifyd.cluster.messages import (
    Alive,
    Answer,
    Body,
    Held,
    Incoming,
    Reached,
    Replay,
    Routed,
    Spread,
    Told,
    encode,
    encode_value,
    wired,
)
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
        self.gathered = 0

    def gather(self, send: Callable[[], None]) -> None:
        self.gathered += 1
        asyncio.get_running_loop().call_soon(send)

    def command(self, *words: Any, convert: Any) -> asyncio.Future[None]:
        assert words[0] == "PUBLISH"
        self.published.append(words[2])
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(convert(2))
        return answer


@pytest.fixture
def redis() -> FakeRedis:
    return FakeRedis()


def a_bus(
    redis: FakeRedis, receive: Callable[[Incoming, Body], None], metrics: Metrics | None = None
) -> Bus:
    """A bus that hears nobody by itself."""
    made = Bus(
        cast(Redis, redis),
        RedisKeys("test").cluster(0),
        "node",
        metrics or Metrics(),
        receive=receive,
        on_up=lambda up: None,
    )
    made.run().close()
    made._subscriber.up = True
    return made


@pytest.fixture
async def bus(redis: FakeRedis) -> Bus:
    """A bus that hears nobody by itself."""
    return a_bus(redis, lambda incoming, body: None)


def nothing(awaited: Awaited) -> None:
    pass


async def test_what_is_late_for_long_does_not_hold_up_what_comes_after(bus: Bus) -> None:
    def finish(awaited: Awaited) -> None:
        awaited.after = nothing

    late = bus.await_answers(Told, finish)
    bus.reached(late, 1)
    await until(lambda: late.finished, "what is late")
    asked_at = time.monotonic()
    told: list[float] = []
    bus.reached(bus.await_answers(Told, lambda awaited: told.append(time.monotonic())), 1)
    await until(lambda: bool(told), "the second one")
    assert told[0] - asked_at < 0.5
    bus.give_up()


def test_what_is_due_at_once_is_so_on_uvloop_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a turn of the loop that takes longer than anybody waits."""
    monkeypatch.setattr(bus_module, "ANSWER_SECONDS", 0.0)

    async def ask() -> None:
        bus = a_bus(FakeRedis(), lambda incoming, body: None)
        told: list[Awaited] = []
        for _ in range(2):
            bus.reached(bus.await_answers(Told, told.append, seconds=0.0), 1)
        await until(lambda: len(told) == 2)
        bus.give_up()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(ask())


async def test_what_redis_was_slow_for_is_given_up_all_the_same(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_module, "AFTER_SECONDS", 0.1)
    lost: list[Awaited] = []

    def finish(awaited: Awaited) -> None:
        awaited.after = lost.append

    awaited = bus.await_answers(Told, finish, patient=True)
    await until(lambda: awaited.late, "what Redis does not say")
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


@pytest.mark.parametrize(
    "long",
    [{"names": tuple(f"channel-{n:050}" for n in range(100))}, {"values": ("x" * 250,) * 90}],
)
async def test_names_and_members_of_audiences_count_as_what_is_long(
    bus: Bus, redis: FakeRedis, long: dict[str, Any]
) -> None:
    content = wired(Notification(str(uuid4()), 1.0, "e", msgspec.Raw(b"1")))
    content = msgspec.structs.replace(content, values=long.get("values", ()))
    body = Spread(1, "default", "channels", long.get("names", ()), content)
    for _ in range(1000):
        bus.to_all(body)
    await asyncio.sleep(0)
    assert max(map(len, redis.published)) < 2 * bus_module.MAX_TOGETHER_BYTES
    assert sum(len(Incoming(data)) for data in redis.published) == 1000


async def test_nothing_that_is_too_long_is_sent_to_anybody(bus: Bus, redis: FakeRedis) -> None:
    content = wired(Notification(str(uuid4()), 1.0, "e", msgspec.Raw(b"1")))
    long = msgspec.structs.replace(content, values=("x" * MAX_MESSAGE_BYTES,))
    spread = Spread(1, "default", "broadcast", (), content)
    waiting = bus.await_answers(Reached, nothing)
    bus.to_all(msgspec.structs.replace(spread, notification=long), waiting)
    bus.to_all(spread)
    told: list[bool] = []
    routed = Routed(1, "default", ("anna",), long)
    bus.now_to("other", routed, several=False, done=told.append)
    assert bus.encoded(routed) is None
    await asyncio.sleep(0)
    (data,) = redis.published
    assert Incoming(data).body(0) == spread
    assert (waiting.expected, told) == (0, [False])


async def test_what_makes_a_node_fail_is_logged_once_a_minute(
    redis: FakeRedis,
) -> None:
    def fail(incoming: Incoming, body: Body) -> None:
        raise KeyError("a fault of ours")

    metrics = Metrics()
    bus = a_bus(redis, fail, metrics)
    message = b"\0" + encode("x" * 1000, [Replay("default", ("anna",))] * 100)
    with capture_logs() as logs:
        for _ in range(10):
            bus._heard(b"", b"", message)
    (entry,) = logs
    assert (entry["exc_info"], entry["error"]) == (True, "'a fault of ours'")
    assert len(entry["node"]) == 100
    assert metrics.cluster_bad_messages_total.labels("failed").value == 1000


async def test_what_a_turn_says_goes_out_with_what_it_stores(bus: Bus, redis: FakeRedis) -> None:
    bus.to_all(Alive())
    bus.to_node("other", Alive())
    bus.to_all(Alive())
    assert (redis.gathered, redis.published) == (1, [])
    await asyncio.sleep(0)
    assert [len(Incoming(each)) for each in redis.published] == [2, 1]
    bus.to_all(Alive())
    assert redis.gathered == 2
