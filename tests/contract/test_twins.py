"""Whatever is done in whatever order, a store answers as memory does, which is small enough to be
believed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from notifyd.eventually import settled
from notifyd.notification import Notification, Priority
from notifyd.queue.base import AckLedger, UserLogs
from notifyd.queue.redis_keys import bucket_of, member
from tests.contract.backends import (
    BACKENDS,
    NOW,
    Backend,
    Clock,
    Memory,
    PostgresBackend,
    RedisBackend,
    a_notification,
    memory,
)

USERS = ["ann", "bob", "cleo"]
ID = "6f1de0fd-0000-4000-8000-{:012d}"

LOG_STEPS = st.one_of(
    st.tuples(
        st.just("enqueue"),
        st.lists(st.sampled_from(USERS), min_size=1, unique=True),
        st.integers(0, 15),
        st.sampled_from(Priority),
        st.none() | st.integers(1, 30),
        st.booleans(),
    ),
    st.tuples(
        st.just("enqueue"),
        st.just(["ann"]),
        st.integers(16, 1000),
        st.sampled_from(Priority),
        st.none(),
        st.booleans(),
    ),
    st.tuples(
        st.just("settle"), st.sampled_from(USERS), st.lists(st.integers(0, 17)), st.booleans()
    ),
    st.tuples(st.just("read"), st.sampled_from(USERS), st.integers(300, 3000)),
    st.tuples(st.just("erase"), st.sampled_from(USERS)),
    st.tuples(st.just("wait"), st.integers(1, 20)),
    st.tuples(st.just("expire")),
)
LEDGER_STEPS = st.one_of(
    st.tuples(
        st.just("expect"),
        st.integers(0, 5),
        st.lists(st.sampled_from(USERS), min_size=1, unique=True),
        st.booleans(),
    ),
    st.tuples(st.just("anyone"), st.integers(4, 7)),
    st.tuples(
        st.sampled_from(["acknowledge", "confirm"]),
        st.sampled_from(USERS),
        st.lists(st.integers(0, 8), unique=True),
    ),
    st.tuples(st.just("wait"), st.sampled_from([1, 10, 1000])),
    st.tuples(st.just("expire")),
    st.tuples(st.just("report"), st.integers(0, 8)),
)
WITHIN_BOUND_STEPS = st.one_of(
    LEDGER_STEPS,
    st.tuples(
        st.just("expect_each"),
        st.lists(st.tuples(st.integers(0, 8), st.sampled_from(USERS)), unique=True, max_size=6),
    ),
    st.tuples(
        st.just("resent"),
        st.sampled_from(USERS),
        st.lists(st.integers(0, 8), unique=True, max_size=6),
        st.sampled_from(["acknowledge", "confirm"]),
        st.lists(st.integers(0, 8), unique=True),
    ),
)
A_FEW = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


async def do_to_logs(logs: UserLogs, clock: Clock, step: Any) -> object:
    """What a step answers, but for what may differ: offsets."""
    match step:
        case ("enqueue", users, number, priority, ttl, owed):
            notification = a_notification(
                id=ID.format(number), priority=priority, ttl=ttl, now=clock.now
            )
            return list(await settled(logs.enqueue("acme", users, notification, owed=owed)))
        case ("settle", user, numbers, heard):
            ids = [ID.format(number) for number in numbers]
            await settled(logs.expire())  # what is dead may have made room already, or not
            return await settled(logs.settle("acme", user, ids, heard=heard))
        case ("read", user, max_bytes):
            return await read_all(logs, user, max_bytes)
        case ("erase", user):
            await settled(logs.expire())  # as above
            return await settled(logs.erase("acme", user))
        case ("expire",):
            # What a read or an enqueue came across may have been counted before.
            return await settled(logs.expire()) and None
    raise AssertionError(step)


async def read_all(
    logs: UserLogs, user: str, max_bytes: int
) -> tuple[int | None, list[list[Notification]]]:
    pages: list[list[Notification]] = []
    told: int | None = None
    cursor: int | None = 0
    while cursor is not None:
        page = await settled(logs.read("acme", user, after=cursor, max_bytes=max_bytes))
        if page.overflow is not None:
            told = page.overflow.count
        offsets = [entry.offset for entry in page.entries]
        assert offsets == sorted(set(offsets))
        pages.append([entry.notification for entry in page.entries])
        cursor = page.cursor
    return told, pages


async def do_to_ledger(ledger: AckLedger, step: Any) -> object:
    match step:
        case ("expect", number, users, queued):
            await settled(ledger.expect("acme", ID.format(number), users, queued=queued))
        case ("expect_each", sent):
            each = [(ID.format(number), user) for number, user in sent]
            await settled(ledger.expect_each("acme", each))
        case ("resent", user, again, how, numbers):
            noted = ledger.resent("acme", user, [ID.format(number) for number in again])
            answer = await do_to_ledger(ledger, (how, user, numbers))
            await settled(noted)
            return answer
        case ("anyone", number):
            await settled(ledger.expect_anyone("acme", ID.format(number)))
        case ("acknowledge", user, numbers):
            ids = [ID.format(number) for number in numbers]
            return await settled(ledger.acknowledge("acme", user, ids))
        case ("confirm", user, numbers):
            await settled(ledger.confirm("acme", user, [ID.format(each) for each in numbers]))
        case ("expire",):
            return await settled(ledger.expire())
        case ("report", number):
            found = await settled(ledger.report("acme", ID.format(number)))
            if found is None:
                return None
            return found.sent_at, found.acks, {each.user_id: each for each in found.recipients}
    return None


@pytest.fixture(params=["redis", "postgres"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """One for all examples: making a schema takes longer than an example does."""
    async with BACKENDS[request.param](Clock(), request.getfixturevalue) as backend:
        yield backend


async def emptied(backend: Backend) -> Backend:
    """As it was before the first example."""
    backend.clock.now = NOW
    backend.told.__init__()  # type: ignore[misc]  # the backends' callbacks are bound to it
    if isinstance(backend, RedisBackend):
        keys = await backend.redis.command("KEYS", f"{backend.keys._prefix}:*")
        if keys:
            await backend.redis.command("DEL", *keys)
    elif isinstance(backend, PostgresBackend):

        async def empty(connection: Any) -> None:
            await connection.execute(
                "DELETE FROM notifyd_logs; DELETE FROM notifyd_entries;"
                " DELETE FROM notifyd_ack_records; DELETE FROM notifyd_acks;"
                " UPDATE notifyd_log_totals SET pending = 0;"
                " UPDATE notifyd_ack_totals SET size = 0, pending = 0, acknowledged = 0,"
                " expired = 0, seconds = 0, recent = '{}'"
            )

        await backend.postgres.transaction(empty)
    return backend


DEAD_AND_SENT_ANEW = [
    ("enqueue", ["ann"], 0, Priority.LOW, None, False),
    ("enqueue", ["ann"], 1, Priority.LOW, None, False),
    ("wait", 25),
    ("enqueue", ["ann"], 0, Priority.LOW, None, False),
]


@given(steps=st.lists(LOG_STEPS, max_size=40), max_size=st.sampled_from([1, 2, 5]))
@example(steps=DEAD_AND_SENT_ANEW, max_size=1)
@example(steps=DEAD_AND_SENT_ANEW, max_size=2)
@example(steps=DEAD_AND_SENT_ANEW, max_size=5)
@A_FEW
async def test_logs(
    store: Backend, steps: list[Any], max_size: int, request: pytest.FixtureRequest
) -> None:
    backend = await emptied(store)
    clock = backend.clock
    async with memory(clock, request.getfixturevalue) as model:
        expected, actual = [
            await each.logs(max_size_per_user=max_size, message_ttl_seconds=25)
            for each in (model, backend)
        ]
        for step in [*steps, *[("read", user, 3000) for user in USERS]]:
            if step[0] == "wait":
                clock.now += step[1]
                continue
            answers = [await do_to_logs(each, clock, step) for each in (expected, actual)]
            assert answers[0] == answers[1], step
            if isinstance(backend, RedisBackend):
                await check_what_stands_in_redis(backend)
        assert model.told.dropped == backend.told.dropped
        for logs in (expected, actual):
            await settled(logs.expire())
        assert await settled(expected.depth()) == await settled(actual.depth())


async def check_what_stands_in_redis(backend: RedisBackend) -> None:
    """What log.lua says is kept true."""
    redis = backend.redis
    for number in sorted({bucket_of(member("acme", user)) for user in USERS}):
        bucket = backend.keys.buckets[number]
        logs = await redis.command("KEYS", f"{bucket.log}*")
        orders = await redis.command("KEYS", f"{bucket.order}*")
        due = set(await redis.command("ZRANGE", bucket.due, 0, -1))
        depth = 0
        for key in logs:
            name = key[len(bucket.log) :]
            ids = set(await redis.command("ZRANGE", bucket.order + name.decode(), 0, -1))
            fields = await redis.command("HKEYS", key)
            assert {field for field in fields if len(field) > 1} == ids
            assert (name in due) == bool(ids)
            depth += len(ids)
            for each in (key, bucket.order + name.decode()):
                assert await redis.command("TTL", each) != -1
        assert len(orders) <= len(logs)
        assert int(await redis.command("GET", bucket.depth) or 0) == depth


@given(steps=st.lists(LEDGER_STEPS, max_size=40))
@A_FEW
async def test_ledger(store: Backend, steps: list[Any], request: pytest.FixtureRequest) -> None:
    await compare_ledgers(store, steps, request, max_pending=9)


@given(steps=st.lists(WITHIN_BOUND_STEPS, max_size=40))
@A_FEW
async def test_ledger_within_its_bound(
    store: Backend, steps: list[Any], request: pytest.FixtureRequest
) -> None:
    """What is noted together, or later, lets go of others together, or later."""
    await compare_ledgers(store, steps, request, max_pending=1000)


async def compare_ledgers(
    store: Backend, steps: list[Any], request: pytest.FixtureRequest, *, max_pending: int
) -> None:
    """Take the same steps in both; fails where they tell different things."""
    backend = await emptied(store)
    clock = backend.clock
    async with memory(clock, request.getfixturevalue) as model:
        expected = await model.ledger(timeout_seconds=15, max_pending=max_pending)
        actual = await backend.ledger(timeout_seconds=15, max_pending=max_pending)
        assert isinstance(model, Memory)
        for step in [*steps, *[("report", number) for number in range(8)]]:
            # Who was sent first goes first; at one and the same time it may be either.
            clock.now += 0.5
            if step[0] == "wait":
                clock.now += step[1]
                continue
            answers = [await do_to_ledger(each, step) for each in (expected, actual)]
            assert answers[0] == answers[1], step
            figures = [await settled(each.stats()) for each in (expected, actual)]
            assert (figures[0].pending, figures[0].acknowledged, figures[0].expired) == (
                figures[1].pending,
                figures[1].acknowledged,
                figures[1].expired,
            ), step
        assert backend.told.acknowledged == pytest.approx(model.told.acknowledged)
        assert backend.told.expired == model.told.expired
