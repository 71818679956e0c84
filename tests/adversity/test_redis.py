"""A real Redis that is stopped, killed, cut off, full, read-only: what its callers see, and that
everything works again by itself."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, suppress
from itertools import count
from statistics import median

import pytest

from notifyd.errors import Unavailable
from notifyd.identifiers import new_uuid
from notifyd.options import BreakerSettings
from notifyd.queue.redis import RedisAckLedger, RedisIdempotencyKeys, RedisUserLogs
from notifyd.queue.redis import logs as redis_logs
from notifyd.queue.redis_keys import RedisKeys, bucket_of, member
from notifyd.redis_client import Redis, Script
from notifyd.resilience import BreakerState, CircuitBreaker
from tests.contract.backends import Told, a_notification
from tests.stores import RedisServer, proxy

TIMEOUT = 0.3
PATIENCE = 10.0
"""Seconds within which a busy machine too comes to give up a call; without a timeout, none does."""
THRESHOLD = 3
ECHO = Script("echo", b"return ARGV[1]")


def a_client(url: str, on_up: Callable[[bool], None] = lambda up: None) -> Redis:
    settings = BreakerSettings(
        failure_threshold=THRESHOLD, backoff_initial_ms=10, backoff_max_ms=50
    )
    return Redis(url, CircuitBreaker(settings), timeout=TIMEOUT, on_up=on_up)


@pytest.fixture
def down() -> asyncio.Event:
    """The connection was lost."""
    return asyncio.Event()


@pytest.fixture
async def redis(redis_server: RedisServer, down: asyncio.Event) -> AsyncIterator[Redis]:
    client = a_client(redis_server.url, lambda up: None if up else down.set())
    await client.start()
    watching = asyncio.create_task(client.watch())
    yield client
    watching.cancel()
    await asyncio.wait([watching])
    await client.aclose()


def state(redis: Redis) -> BreakerState:
    return redis.breaker.state


def some_logs(redis: Redis, told: Told | None = None) -> RedisUserLogs:
    told = told or Told()
    return RedisUserLogs(
        redis,
        RedisKeys("test"),
        max_size_per_user=100,
        message_ttl_seconds=1000,
        on_dropped=told.on_dropped,
        on_corrupt=told.corrupt.append,
    )


async def echo(redis: Redis, text: str) -> str:
    answer: bytes = await redis.run(ECHO, (), (text,))
    return answer.decode()


async def recovered(redis: Redis) -> None:
    """The breaker is closed."""
    closed = asyncio.Event()

    def look(now: BreakerState) -> None:
        if now is BreakerState.CLOSED:
            closed.set()

    redis.breaker.subscribe(look)
    look(state(redis))
    async with asyncio.timeout(10):
        await closed.wait()
    redis.breaker.unsubscribe(look)


async def until_it_fails(redis: Redis) -> int:
    """Call until the breaker is open; how many calls that took."""
    calls = 0
    while state(redis) is BreakerState.CLOSED:
        calls += 1
        with pytest.raises(Unavailable):
            await echo(redis, "x")
    return calls


async def refused_at_once(redis: Redis) -> None:
    took = []
    for _ in range(5):
        started = time.perf_counter()
        with pytest.raises(Unavailable) as caught:
            await echo(redis, "x")
        took.append(time.perf_counter() - started)
        assert caught.value.retry_after == 1
    assert median(took) < 0.05


class TestStopped:
    async def test_it_fails_in_time_and_late_answers_are_nobody_elses(
        self, redis: Redis, redis_server: RedisServer
    ) -> None:
        redis_server.stop()
        started = time.perf_counter()
        calls = [asyncio.ensure_future(echo(redis, f"late-{n}")) for n in range(2)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in outcomes] == [Unavailable, Unavailable]
        assert TIMEOUT <= time.perf_counter() - started < PATIENCE
        assert not redis.up
        redis_server.cont()
        await recovered(redis)
        assert [await echo(redis, f"new-{n}") for n in range(3)] == ["new-0", "new-1", "new-2"]

    async def test_the_breaker_opens_refuses_at_once_and_closes_by_itself(
        self, redis: Redis, redis_server: RedisServer
    ) -> None:
        redis_server.stop()
        assert await until_it_fails(redis) <= THRESHOLD
        await refused_at_once(redis)
        redis_server.cont()
        await recovered(redis)
        assert await echo(redis, "back") == "back"

    async def test_a_loop_that_was_late_is_not_taken_for_redis(self, redis: Redis) -> None:
        call = asyncio.ensure_future(echo(redis, "x"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(1.5 * TIMEOUT)  # noqa: ASYNC251  # this is what is late
        assert await call == "x"

    async def test_what_is_refused_leaves_no_work_to_the_garbage_collector(
        self, redis: Redis, redis_server: RedisServer
    ) -> None:
        """Thousands of circles would be collected in one pause, in the midst of an outage."""
        ledger = RedisAckLedger(
            redis,
            RedisKeys("test"),
            timeout_seconds=30,
            max_pending=100,
            on_acknowledged=lambda seconds: None,
            on_expired=lambda count: None,
        )
        logs = some_logs(redis)
        redis_server.stop()
        try:
            await until_it_fails(redis)
            gc.collect()
            gc.disable()
            refused = []
            for number in range(3):
                noted = ledger.expect("acme", f"n{number}", ("ann",))
                stored = logs.enqueue("acme", ("ann",), a_notification(now=time.time()))
                for each in (noted, stored):
                    assert isinstance(each, asyncio.Future)
                    await asyncio.wait([each])
                    assert isinstance(each.exception(), Unavailable)
                    refused.append(weakref.ref(each))
                    del each
                del noted, stored
            await asyncio.sleep(0)
            # But for the last, which the ledger shows to whoever comes in the same turn.
            assert [each() for each in refused[:-2]] == [None] * 4
        finally:
            gc.enable()
            redis_server.cont()


class TestKilled:
    async def test_calls_fail_at_once_and_a_restart_is_noticed(
        self, redis: Redis, redis_server: RedisServer
    ) -> None:
        assert await echo(redis, "before") == "before"
        await asyncio.to_thread(redis_server.kill)
        assert await until_it_fails(redis) <= THRESHOLD
        await refused_at_once(redis)
        await asyncio.to_thread(redis_server.start)
        await recovered(redis)
        # It has forgotten the script.
        assert await echo(redis, "after") == "after"

    async def test_what_was_answered_is_there_after_a_restart(
        self, redis: Redis, redis_server: RedisServer
    ) -> None:
        logs = some_logs(redis)
        stored = []
        for _ in range(20):
            notification = a_notification(now=time.time())
            assert await logs.enqueue("acme", ("ann",), notification) == [None]
            stored.append(notification.id)
        await asyncio.to_thread(redis_server.kill)
        await asyncio.to_thread(redis_server.start)
        for _ in range(THRESHOLD):
            with suppress(Unavailable):
                await echo(redis, "x")
        await recovered(redis)
        page = await logs.read("acme", "ann")
        assert [entry.notification.id for entry in page.entries] == stored

    async def test_forgotten_scripts_are_loaded_again(
        self, redis: Redis, redis_server: RedisServer
    ) -> None:
        assert await echo(redis, "a") == "a"
        redis_server.command("SCRIPT", "FLUSH")
        assert [*await asyncio.gather(echo(redis, "b"), echo(redis, "c"))] == ["b", "c"]


class TestCut:
    async def test_between_calls_nothing_is_lost(
        self, redis: Redis, redis_server: RedisServer, down: asyncio.Event
    ) -> None:
        assert await echo(redis, "a") == "a"
        await asyncio.to_thread(redis_server.cut_connections)
        await down.wait()
        assert await echo(redis, "b") == "b"
        assert redis.up

    async def test_in_mid_call_it_fails_and_is_not_sent_again(
        self, redis_server: RedisServer
    ) -> None:
        reconnects: list[None] = []
        async with proxy(redis_server.port) as between:
            redis = Redis(
                f"redis://127.0.0.1:{between.port}",
                CircuitBreaker(BreakerSettings()),
                timeout=5,
                on_reconnect=lambda: reconnects.append(None),
            )
            await redis.start()
            assert await redis.command("INCR", "n") == 1
            between.hold()
            call = redis.command("INCR", "n")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            between.cut()
            with pytest.raises(Unavailable):
                await call
            between.release()
            assert await redis.command("GET", "n") in (b"1", b"2")
            assert (between.accepted, len(reconnects)) == (2, 1)
            await redis.aclose()

    async def test_a_silent_network_is_a_failure(self, redis_server: RedisServer) -> None:
        async with proxy(redis_server.port) as between:
            redis = a_client(f"redis://127.0.0.1:{between.port}")
            await redis.start()
            between.hold()
            with pytest.raises(Unavailable):
                await echo(redis, "a")
            between.release()
            assert await echo(redis, "b") == "b"
            await redis.aclose()


class TestRefusing:
    @pytest.fixture(params=["full", "read-only"])
    def fault(
        self, request: pytest.FixtureRequest, redis_server: RedisServer
    ) -> AbstractContextManager[None]:
        if request.param == "full":
            return redis_server.out_of_memory()
        return redis_server.read_only()

    async def test_nothing_is_half_stored_and_all_is_well_again(
        self, redis: Redis, redis_server: RedisServer, fault: AbstractContextManager[None]
    ) -> None:
        logs = some_logs(redis)
        kept, refused = a_notification(now=time.time()), a_notification(now=time.time())
        await logs.enqueue("acme", ("ann",), kept)
        with fault:
            calls = 0
            while state(redis) is BreakerState.CLOSED:
                calls += 1
                with pytest.raises(Unavailable):
                    await logs.enqueue("acme", ("ann",), refused)
            assert calls <= THRESHOLD
            await refused_at_once(redis)
            # A PING would be answered, and the probe is none.
            await asyncio.sleep(0.2)
            assert state(redis) is not BreakerState.CLOSED
        await recovered(redis)
        page = await logs.read("acme", "ann")
        assert [entry.notification.id for entry in page.entries] == [kept.id]
        assert await logs.depth() == 1
        assert await logs.enqueue("acme", ("ann",), refused) == [None]

    async def test_a_full_redis_still_lets_users_read_and_settle(
        self, redis: Redis, redis_server: RedisServer
    ) -> None:
        logs = some_logs(redis)
        notification = a_notification(now=time.time())
        await logs.enqueue("acme", ("ann",), notification)
        with redis_server.out_of_memory():
            assert len((await logs.read("acme", "ann")).entries) == 1
            assert await logs.settle("acme", "ann", [notification.id]) == {notification.id}
        assert await logs.depth() == 0

    async def test_a_replica_is_left_for_whom_its_name_leads_to_now(
        self, redis: Redis, redis_server: RedisServer, down: asyncio.Event
    ) -> None:
        logs = some_logs(redis)
        with redis_server.read_only():
            with pytest.raises(Unavailable):
                await logs.enqueue("acme", ("ann",), a_notification(now=time.time()))
            await down.wait()


class TestCorrupt:
    """Written by somebody else, or by another version."""

    @pytest.fixture
    def told(self) -> Told:
        return Told()

    @pytest.mark.parametrize(
        ("bad", "reason"),
        [
            ("", "not_json"),
            ("\x00\xff", "not_json"),
            ("9" * 13 + "00000300" + '{"v":1,"id":', "not_json"),
            ("9" * 13 + "00000300" + '{"v":0,"body":{}}', "version"),
            ("9" * 13 + "00000300" + '{"v":1,"what":"ever"}', "shape"),
            (
                "9" * 13 + "00000300" + '{"v":1,"id":"x","at":1,"event":"e","payload":1}',
                "shape",
            ),
        ],
    )
    async def test_entries_are_set_aside_and_the_replay_goes_on(
        self, redis: Redis, redis_server: RedisServer, told: Told, bad: str, reason: str
    ) -> None:
        logs = some_logs(redis, told)
        three = [a_notification(now=time.time()) for _ in range(3)]
        for each in three:
            await logs.enqueue("acme", ("ann",), each)
        number = bucket_of(member("acme", "ann"))
        log = f"test:{{{number}}}:log:acme|ann"
        redis_server.command("HSET", log, three[1].id, bad)
        for _ in range(2):
            page = await logs.read("acme", "ann")
            assert [entry.notification.id for entry in page.entries] == [three[0].id, three[2].id]
        assert told.corrupt == [reason]
        assert await logs.depth() == 2
        assert redis_server.command("LLEN", f"test:{{{number}}}:corrupt") == 1
        assert redis_server.command("TTL", f"test:{{{number}}}:corrupt") > 0

    async def test_one_that_is_gone_from_the_hash_is_none(
        self, redis: Redis, redis_server: RedisServer
    ) -> None:
        logs = some_logs(redis)
        two = [a_notification(now=time.time()) for _ in range(2)]
        for each in two:
            await logs.enqueue("acme", ("ann",), each)
        log = f"test:{{{bucket_of(member('acme', 'ann'))}}}:log:acme|ann"
        redis_server.command("HDEL", log, two[0].id)
        page = await logs.read("acme", "ann")
        assert [entry.notification.id for entry in page.entries] == [two[1].id]
        assert await logs.depth() == 1

    async def test_logs_that_do_not_say_when_they_expire_keep_nobody_from_being_cleaned(
        self, redis: Redis, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis_logs, "USERS_PER_CALL", 1)
        logs = some_logs(redis)
        bucket = bucket_of(member("acme", "ann"))
        beside = (f"ann-{number}" for number in count())
        bob = next(each for each in beside if bucket_of(member("acme", each)) == bucket)
        tag = f"test:{{{bucket}}}"
        for user in ("ann", bob):
            one = a_notification(now=time.time())
            await logs.enqueue("acme", (user,), one)
            if user == "ann":
                redis_server.command("HSET", f"{tag}:log:acme|ann", one.id, "whenever")
            else:
                stored = f"{int(time.time() * 1000) - 1:013}00000300" + "{}"
                redis_server.command("HSET", f"{tag}:log:acme|{bob}", one.id, stored)
        redis_server.command("ZADD", f"{tag}:due", 1, "acme|ann")
        redis_server.command("ZADD", f"{tag}:due", 2, f"acme|{bob}")
        async with asyncio.timeout(PATIENCE):
            assert await logs.expire() == 1
            assert await logs.expire() == 0
        # It is still there to be set aside, and looked at again another day.
        assert await logs.depth() == 1
        due = float(str(redis_server.command("ZSCORE", f"{tag}:due", "acme|ann")))
        assert due > time.time() * 1000

    async def test_a_log_that_went_by_itself_is_counted_off(
        self, redis: Redis, redis_server: RedisServer
    ) -> None:
        logs = some_logs(redis)
        for user in ("ann", "bob"):
            await logs.enqueue("acme", (user,), a_notification(now=time.time()))
        tag = f"test:{{{bucket_of(member('acme', 'ann'))}}}"
        for key in ("log", "order"):
            redis_server.command("DEL", f"{tag}:{key}:acme|ann")
        assert await logs.depth() == 2
        # As if its time had come.
        redis_server.command("ZADD", f"{tag}:due", 1, "acme|ann")
        await logs.expire()
        assert await logs.depth() == 1

    async def test_a_count_that_went_by_itself_is_found_again(
        self, redis: Redis, redis_server: RedisServer
    ) -> None:
        logs = some_logs(redis)
        two = [a_notification(now=time.time()) for _ in range(2)]
        for each in two:
            await logs.enqueue("acme", ("ann",), each)
        depth = f"test:{{{bucket_of(member('acme', 'ann'))}}}:depth"
        redis_server.command("DEL", depth)
        await logs.settle("acme", "ann", [two[0].id])
        assert await logs.depth() == 0
        assert await logs.expire() == 0
        assert await logs.depth() == 1
        assert redis_server.command("TTL", depth) > 0
        redis_server.command("DEL", depth)
        await logs.enqueue("acme", ("ann",), a_notification(now=time.time()))
        assert redis_server.command("TTL", depth) > 0

    async def test_a_full_redis_tells_what_a_log_gave_up(
        self, redis: Redis, redis_server: RedisServer
    ) -> None:
        logs = some_logs(redis)
        notifications = [a_notification(now=time.time()) for _ in range(101)]
        for each in notifications:
            await logs.enqueue("acme", ("ann",), each)
        with redis_server.out_of_memory():
            for _ in range(2):
                told = (await logs.read("acme", "ann")).overflow
                assert told is not None
                assert told.count == 1
            await logs.settle("acme", "ann", [notifications[-1].id], heard=True)
            assert (await logs.read("acme", "ann")).overflow is None


class TestHousekeeping:
    async def test_every_key_expires_and_scripts_keep_to_one_tag(
        self, redis: Redis, redis_server: RedisServer
    ) -> None:
        logs = some_logs(redis)
        keys = RedisKeys("test")
        ledger = RedisAckLedger(
            redis,
            keys,
            timeout_seconds=30,
            max_pending=100,
            on_acknowledged=lambda seconds: None,
            on_expired=lambda count: None,
        )
        idempotency = RedisIdempotencyKeys(redis, keys, window_seconds=60)
        claim = await idempotency.claim(("a", "b", "c", "d"), b"x" * 16)
        users = ["ann", "bob", "ü", "a|b", "{x}", "*"]
        stored = [a_notification(now=time.time()) for _ in range(3)]
        for notification in stored:
            await logs.enqueue("acme", users, notification)
            await ledger.expect("acme", notification.id, users)
        await logs.settle("acme", "ann", [each.id for each in stored])
        await logs.erase("acme", "bob")
        await ledger.acknowledge("acme", "ann", [stored[0].id])
        await ledger.expect_anyone("acme", new_uuid())
        found = redis_server.command("KEYS", "*")
        assert len(found) > 20
        for key in found:
            assert redis_server.command("TTL", key) > 0, key
            assert key.startswith("test:{")
        del claim

    async def test_what_is_stored_expires_by_redis_own_clock(self, redis: Redis) -> None:
        logs = some_logs(redis)
        past = a_notification(now=time.time() - 100, ttl=50)
        await logs.enqueue("acme", ("ann",), past)
        assert (await logs.read("acme", "ann")).entries == []
        assert await logs.expire() == 1
        assert await logs.depth() == 0

    async def test_two_nodes_share_one_log(self, redis: Redis, redis_server: RedisServer) -> None:
        other = a_client(redis_server.url)
        await other.start()
        here, there = some_logs(redis), some_logs(other)
        notifications = [a_notification(now=time.time()) for _ in range(50)]
        await asyncio.gather(
            *[
                logs.enqueue("acme", ("ann",), notification)
                for notification in notifications
                for logs in (here, there)
            ]
        )
        page = await here.read("acme", "ann")
        assert {entry.notification.id for entry in page.entries} == {
            each.id for each in notifications
        }
        assert [entry.offset for entry in page.entries] == list(range(1, 51))
        await other.aclose()

    async def test_a_key_of_a_dead_node_becomes_free(
        self, redis: Redis, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("notifyd.queue.redis.idempotency.LEASE_SECONDS", 0.05)
        monkeypatch.setattr(RedisIdempotencyKeys, "lost", lambda self, claim: None)
        keys = RedisIdempotencyKeys(redis, RedisKeys("test"), window_seconds=60)
        scope = ("acme", "backend", "/send", "k")
        dead = await keys.claim(scope, b"x" * 16)
        waiting = await keys.claim(scope, b"x" * 16)
        handed = await keys.wait(scope, b"x" * 16)
        assert {type(dead), type(handed)} == {type(handed)}
        assert type(waiting) is not type(handed)
