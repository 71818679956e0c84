"""notifyd.dispatch.redis_stream on a real Redis, with stores that fail when a test says so."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from notifyd.dispatch import redis_stream
from notifyd.dispatch.redis_trigger import BadMessages
from notifyd.errors import Unavailable
from notifyd.notification import Outcome, Receipt, RecipientResult, Target
from notifyd.options import BreakerSettings
from notifyd.queue.memory import MemoryAckLedger
from notifyd.redis_client import Redis, Word
from notifyd.resilience import Backoff, CircuitBreaker
from tests.front_door import until
from tests.unit.test_redis_trigger import ID, Parts


class Lease:
    """Held until a test says otherwise."""

    def __init__(self) -> None:
        self.held = True
        self.missed = asyncio.Event()
        self.back = asyncio.Event()

    async def acquired(self) -> None:
        if not self.held:
            self.missed.set()
            await self.back.wait()


class Reading:
    """A stream of a test's own and what reads it."""

    def __init__(self, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
        self.redis = redis
        self.key = f"stream-{uuid4()}"
        self.parts = Parts(again=True)
        self.lease = Lease()
        self.ledger: MemoryAckLedger | None = None
        # Pauses that a test does not wait for.
        monkeypatch.setattr(redis_stream, "Backoff", lambda *_: Backoff(0.001, 0.01))
        self.stream = self.reader()

    def reader(self) -> redis_stream.RedisStream:
        return redis_stream.RedisStream(
            self.redis,
            self.redis.another(timeout=3),
            self.parts.intake,
            self.parts.metrics,
            BadMessages(self.parts.metrics),
            self.ledger,
            key=self.key,
            group="g",
            lease=self.lease,  # type: ignore[arg-type]  # all of it that is needed
        )

    async def add(self, payload: Any, target: str | list[str] = "u1", **more: str) -> bytes:
        type = "user" if isinstance(target, str) else "users"
        message = {"type": type, "target": target, "event_type": "e", "payload": payload, **more}
        id: bytes = await self.redis.command("XADD", self.key, "*", "data", json.dumps(message))
        return id

    async def deliveries(self) -> list[int]:
        """How often each entry that is not acknowledged was delivered."""
        found = await self.redis.command("XPENDING", self.key, "g", "-", "+", 100)
        return [deliveries for *_, deliveries in found]

    async def acknowledged(self) -> None:
        async with asyncio.timeout(5):
            while await self.deliveries():  # noqa: ASYNC110  # Redis tells nobody
                await asyncio.sleep(0.01)

    @property
    def sent(self) -> list[Any]:
        return self.parts.dispatcher.sent

    @property
    def dead(self) -> float:
        return self.parts.metrics.redis_dead_letters_total.value


@pytest.fixture
async def reading(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Reading]:
    redis = Redis(redis_url, CircuitBreaker(BreakerSettings()))
    await redis.start()
    made = Reading(redis, monkeypatch)
    await redis.command("XGROUP", "CREATE", made.key, "g", "0", "MKSTREAM")
    yield made
    await made.stream.aclose()
    await redis.command("DEL", made.key, f"{made.key}:dead")
    await redis.aclose()


async def test_what_a_store_does_not_take_waits_and_is_not_blamed(reading: Reading) -> None:
    reading.parts.dispatcher.fails = Unavailable("away")
    for n in range(3):
        await reading.add(n)
    reading.stream.start()
    async with asyncio.timeout(5):
        while await reading.deliveries() != [0, 0, 0]:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.01)
    failed = reading.parts.dispatcher.failed
    await until(lambda: reading.parts.dispatcher.failed > failed + 30, "many attempts")
    reading.parts.dispatcher.fails = None
    await reading.add(3)
    await until(lambda: reading.sent == [0, 1, 2, 3])
    await reading.acknowledged()
    assert reading.dead == 0


async def test_who_has_it_does_not_get_it_again(reading: Reading) -> None:
    stores = reading.parts.dispatcher.stores = []
    await reading.add(1, ["u1", "u2", "u3"])
    reading.stream.start()
    await until(lambda: len(stores) == 1)
    results = {
        "u1": RecipientResult(Outcome.DELIVERED, 1),
        "u2": RecipientResult(Outcome.FAILED, reason="unavailable"),
        "u3": RecipientResult(Outcome.FAILED, reason="queue_full"),
    }
    stores[0].set_result(Receipt("id", Outcome.DELIVERED, 1, failed=2, results=results))
    await until(lambda: len(stores) == 2)
    stores[1].set_result(Receipt("id", Outcome.QUEUED, queued=1))
    await reading.acknowledged()
    assert reading.parts.dispatcher.targets[1] == Target("users", ("u2",))
    assert reading.sent == [1, 1]


def taken_by(*names: str, without: tuple[str, ...] = ()) -> Receipt:
    """Of an entry whose store was away for some of them."""
    results = {name: RecipientResult(Outcome.DELIVERED, 1) for name in names}
    away = RecipientResult(Outcome.FAILED, reason="unavailable")
    results |= dict.fromkeys(without, away)
    return Receipt("id", Outcome.DELIVERED, 1, failed=len(without), results=results)


async def test_who_has_it_does_not_get_it_again_while_the_last_ones_store_is_away(
    reading: Reading,
) -> None:
    """For one recipient that is an error, not a result."""
    dispatcher = reading.parts.dispatcher
    stores = dispatcher.stores = []
    await reading.add(1, ["u1", "u2"])
    reading.stream.start()
    await until(lambda: len(stores) == 1)
    stores[0].set_result(taken_by("u1", without=("u2",)))
    for attempt in (2, 3):
        await until(lambda n=attempt: len(stores) == n)  # type: ignore[misc]  # bound now
        stores[-1].set_exception(Unavailable("away"))
    await until(lambda: len(stores) == 4)
    stores[-1].set_result(Receipt("id", Outcome.QUEUED, queued=1))
    await reading.acknowledged()
    assert dispatcher.targets == [Target("users", ("u1", "u2")), *[Target("users", ("u2",))] * 3]


@pytest.mark.parametrize("key", [{"id": ID}, {"idempotency_key": "k"}])
async def test_who_has_it_not_gets_it_from_the_next_holder_though_it_has_a_key(
    reading: Reading, key: dict[str, str]
) -> None:
    dispatcher = reading.parts.dispatcher
    stores = dispatcher.stores = []
    await reading.add(1, ["u1", "u2"], **key)
    reading.stream.start()
    await until(lambda: len(stores) == 1)
    reading.lease.held = False
    stores[0].set_result(taken_by("u1", without=("u2",)))
    await until(lambda: not reading.stream._busy)
    reading.lease.held = True
    reading.lease.back.set()
    await until(lambda: len(stores) == 2)
    stores[1].set_result(taken_by("u1", "u2"))
    await reading.acknowledged()
    assert "u2" in dispatcher.targets[1].names


async def test_what_comes_twice_waits_for_the_first_while_a_store_is_away(
    reading: Reading,
) -> None:
    stores = reading.parts.dispatcher.stores = []
    for _ in range(2):
        await reading.add(1, ["u1", "u2"], id=ID)
    await reading.add(2)
    reading.stream.start()
    await until(lambda: len(stores) == 1)
    stores[0].set_result(taken_by("u1", without=("u2",)))
    # What is behind them waits for nothing; then the first is tried again, and no other.
    await until(lambda: reading.sent == [1, 2])
    stores[1].set_result(Receipt("id", Outcome.QUEUED, queued=1))
    await until(lambda: reading.sent == [1, 2, 1])
    stores[2].set_result(taken_by("u2"))
    await reading.acknowledged()
    assert reading.sent == [1, 2, 1]


async def test_who_confirmed_it_does_not_get_it_from_the_next_holder_where_a_store_was_away(
    reading: Reading,
) -> None:
    """That a store was away is not held against an entry, which has been dispatched all the
    same."""
    reading.ledger = MemoryAckLedger(
        timeout_seconds=60,
        max_pending=10,
        clock=lambda: 1.0,
        on_acknowledged=lambda seconds: None,
        on_expired=lambda count: None,
    )
    reading.stream = reading.reader()
    dispatcher = reading.parts.dispatcher
    stores = dispatcher.stores = []
    id = await reading.add(1, ["u1", "u2"])
    reading.stream.start()
    await until(lambda: len(stores) == 1)
    stores[0].set_result(taken_by("u1", without=("u2",)))
    await until(lambda: len(stores) == 2)
    assert await reading.deliveries() == [0]
    notification_id = redis_stream._uuid_of(reading.key, id)
    reading.ledger.expect("default", notification_id, ("u1",))
    reading.ledger.confirm("default", "u1", (notification_id,))
    reading.lease.held = False
    stores[1].set_result(taken_by(without=("u2",)))
    await until(lambda: not reading.stream._busy)
    reading.lease.held = True
    reading.lease.back.set()
    await until(lambda: len(stores) == 3)
    stores[2].set_result(taken_by("u2"))
    await reading.acknowledged()
    assert dispatcher.targets[2] == Target("users", ("u2",))


async def test_it_acknowledges_only_what_the_store_has(reading: Reading) -> None:
    stores = reading.parts.dispatcher.stores = []
    await reading.add(1)
    await reading.add(2)
    reading.stream.start()
    await until(lambda: len(stores) == 2)
    assert await reading.deliveries() == [1, 1]
    stores[1].set_result(Receipt("id", Outcome.QUEUED))
    # It does not wait for the other.
    async with asyncio.timeout(5):
        while await reading.deliveries() != [1]:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.01)
    stores[0].set_result(Receipt("id", Outcome.QUEUED))
    await reading.acknowledged()


async def test_it_acknowledges_while_it_dispatches(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that dies in the middle of a batch leaves little of it."""
    for n in range(2 * redis_stream.PER_TURN):
        await reading.add(n)
    send, left = reading.parts.intake.send, []

    def counting(ready: Any) -> Any:
        left.append(reading.redis.command("XPENDING", reading.key, "g"))
        return send(ready)

    monkeypatch.setattr(reading.parts.intake, "send", counting)
    reading.stream.start()
    await until(lambda: len(reading.sent) == 2 * redis_stream.PER_TURN)
    assert [(await each)[0] for each in left[:: redis_stream.PER_TURN]] == [200, 100]


async def test_without_the_lease_it_leaves_all_to_the_next_holder(reading: Reading) -> None:
    reading.parts.dispatcher.fails = Unavailable("away")
    await reading.add(1)
    reading.stream.start()
    async with asyncio.timeout(5):
        while await reading.deliveries() != [0]:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.01)
    reading.lease.held = False
    reading.parts.dispatcher.fails = None
    await reading.lease.missed.wait()
    await reading.add(2)
    assert reading.sent == []
    reading.lease.held = True
    reading.lease.back.set()
    await until(lambda: reading.sent == [1, 2])
    await reading.acknowledged()


async def test_what_came_to_a_former_holder_is_found(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_stream, "TAKE_OVER_SECONDS", 0.05)
    await reading.add(1)
    reading.stream.start()
    await until(lambda: reading.sent == [1])
    # It asked while it had the lease, and Redis answers only now.
    late = reading.redis.another(timeout=5)
    answer = late.command(
        *("XREADGROUP", "GROUP", "g", "former", "BLOCK", 5000, "STREAMS", reading.key, ">")
    )
    await reading.add(2)
    await reading.add(3)
    await until(lambda: sorted(reading.sent) == [1, 2, 3])
    await reading.acknowledged()
    answer.cancel()
    await late.aclose(0)


async def test_what_was_dispatched_is_not_dispatched_again_where_redis_lost_the_word(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, failures = reading.redis.command, [1, 2]

    def failing(*words: Any, **given: Any) -> asyncio.Future[Any]:
        if words[0] == "XACK" and failures:
            failures.pop()
            raise Unavailable("away")
        return command(*words, **given)

    monkeypatch.setattr(reading.redis, "command", failing)
    await reading.add(1)
    with capture_logs():
        reading.stream.start()
        await until(lambda: not failures)
        await reading.add(2)
        await until(lambda: 2 in reading.sent)
    await reading.acknowledged()
    assert reading.sent == [1, 2]


async def test_a_dead_letter_is_written_once_where_its_answer_is_lost(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, command = reading.redis.run, reading.redis.command
    lost: list[str] = []

    async def losing_run(script: Any, *given: Any) -> Any:
        answer = await run(script, *given)
        if script.name == "bury.lua" and not lost:
            lost.append(script.name)
            raise Unavailable("away")
        return answer

    def losing_command(*words: Any, **given: Any) -> asyncio.Future[Any]:
        if words[0] == "XACK" and not lost:
            lost.append("XACK")
            raise Unavailable("away")
        return command(*words, **given)

    monkeypatch.setattr(reading.redis, "run", losing_run)
    monkeypatch.setattr(reading.redis, "command", losing_command)
    await command("XADD", reading.key, "*", "no", "data")
    with capture_logs():
        reading.stream.start()
        await until(lambda: bool(lost))
        await reading.add(1)
        await until(lambda: 1 in reading.sent)
        await reading.acknowledged()
    assert await command("XLEN", f"{reading.key}:dead") == 1


async def test_a_dead_letter_of_more_fields_than_a_script_can_hand_on(reading: Reading) -> None:
    words: list[Word] = ["XADD", reading.key, "*"]
    await reading.redis.command(*words, *(f"f{n // 2}" for n in range(20_000)))
    reading.stream.start()
    await until(lambda: reading.dead == 1)
    await reading.acknowledged()


async def test_a_poisonous_entry_takes_no_other_with_it(reading: Reading) -> None:
    """Its node died with it three times, and with those that were read beside it."""
    ids = [await reading.add(n) for n in range(4)]
    await reading.redis.command("XREADGROUP", "GROUP", "g", "x", "STREAMS", reading.key, ">")
    words: list[Word] = ["XCLAIM", reading.key, "g", "x", 0, *ids, "RETRYCOUNT", 3, "JUSTID"]
    await reading.redis.command(*words)
    stores = reading.parts.dispatcher.stores = []
    reading.stream.start()
    for n in range(4):
        await until(lambda n=n: len(stores) == n + 1)  # type: ignore[misc]
        assert await reading.deliveries() == [4] + [3] * (3 - n)
        stores[n].set_result(Receipt("id", Outcome.QUEUED))
    await reading.acknowledged()
    assert reading.sent == [0, 1, 2, 3]


async def test_less_is_read_at_once_where_entries_are_large(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_stream, "MAX_BATCH_BYTES", 10_000)
    for n in range(30):
        await reading.add("x" * 2000 if n < 20 else n)
    reading.stream.start()
    await until(lambda: len(reading.sent) == 30)
    assert reading.stream._count < redis_stream.MAX_BATCH
    await reading.acknowledged()


async def test_a_key_that_is_no_stream_is_told_and_tried_again(reading: Reading) -> None:
    await reading.redis.command("SET", reading.key, "a text")
    with capture_logs() as logs:
        reading.stream.start()
        await until(lambda: any("stream" in entry["event"] for entry in logs))
    assert any("WRONGTYPE" in str(entry.get("reason")) for entry in logs)
    await reading.redis.command("DEL", reading.key)
    await reading.add(1)
    await until(lambda: reading.sent == [1])


async def test_a_fault_of_ours_is_logged_and_reading_goes_on(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, faults = reading.stream._work, [1]

    async def failing(entries: Any) -> None:
        if faults:
            faults.pop()
            raise RuntimeError("a fault")
        await work(entries)

    monkeypatch.setattr(reading.stream, "_work", failing)
    await reading.add(1)
    with capture_logs() as logs:
        reading.stream.start()
        await until(lambda: reading.sent == [1])
    assert [entry["log_level"] for entry in logs] == ["error"]


def test_an_id_follows_from_the_entrys() -> None:
    id = redis_stream._uuid_of("s", b"1-1")
    assert id == redis_stream._uuid_of("s", b"1-1")
    others = {redis_stream._uuid_of(*each) for each in (("s", b"1-2"), ("t", b"1-1"))}
    assert id not in others
    for each in {id, *others}:
        assert re.fullmatch(
            r"[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", each
        )


async def test_who_lost_the_lease_in_a_stall_reads_no_further(reading: Reading) -> None:
    """What is read then, the next holder would find behind what came later."""
    stream, reads = reading.stream, 0
    read = stream._read

    def read_and_lose() -> asyncio.Future[Any]:
        nonlocal reads
        reads += 1
        found = read()
        found.add_done_callback(lambda _: setattr(reading.lease, "held", False))
        return found

    stream._read = read_and_lose  # type: ignore[method-assign]  # the stall
    stream._count = 2
    for n in range(4):
        await reading.add(n)
    stream.start()
    await until(lambda: not reading.lease.held and not stream._busy)
    await until(lambda: stream._reading is None)
    assert (reads, await reading.deliveries(), reading.sent) == (1, [1, 1], [])
    reading.lease.held = True
    stream._read = read  # type: ignore[method-assign]  # it has the lease again
    reading.lease.back.set()
    await until(lambda: reading.sent == [0, 1, 2, 3])
    await reading.acknowledged()
