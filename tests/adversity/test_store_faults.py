"""A server whose store fails, through the front door: what goes on, what is refused and how fast,
and that everything works again by itself."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from tests.adversity.store_faults import (
    AWAY,
    FAULTS,
    MOMENTARY,
    THRESHOLD,
    TIMEOUT,
    UNWRITABLE,
    Fault,
    FaultyStore,
    StoreName,
    cases,
    faulty_postgres,
    faulty_redis,
)
from tests.conftest import StartServer
from tests.front_door import PUBLISH_KEY, READ_KEY, WAIT, Host, user

DOWN = cases(AWAY, UNWRITABLE)
ALL = cases(MOMENTARY, AWAY, UNWRITABLE)


@pytest.fixture
async def faulty(request: pytest.FixtureRequest, store: StoreName) -> AsyncIterator[FaultyStore]:
    """The store that the test's parameter names."""
    server = request.getfixturevalue(f"{store}_server")
    async with faulty_redis(server) if store == "redis" else faulty_postgres(server) as made:
        yield made


@pytest.fixture
def fault(fault_name: str) -> Fault:
    """The fault that the test's parameter names."""
    return FAULTS[fault_name]


async def send(host: Host, *users: str, payload: Any = None) -> httpx.Response:
    target = user(users[0]) if len(users) == 1 else {"type": "users", "value": list(users)}
    body = {"target": target, "event_type": "test.event", "payload": payload}
    return await host.post("/api/v1/notifications", body, key=PUBLISH_KEY)


async def breaker(host: Host, store: FaultyStore) -> int:
    return int(await host.metric(f"{store.name}_breaker_state"))


async def eventually(ask: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not await ask():
        assert time.monotonic() < deadline, f"{what} did not come in {WAIT:g} s"


async def opened(host: Host, store: FaultyStore) -> None:
    """Publish to somebody who is away until the breaker is open."""
    for _ in range(THRESHOLD):
        refused = await send(host, "away")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "UNAVAILABLE")
    assert await breaker(host, store) != 0


async def recovered(host: Host, store: FaultyStore) -> None:
    """The breaker is closed, and the store's client connected."""

    async def well() -> bool:
        health = (await host.get("/health", key=READ_KEY)).json()
        status: str = health[store.name]["status"]
        return health["status"] == "healthy" and status == "connected"

    await eventually(well, f"the recovery of {store.name}")
    assert await breaker(host, store) == 0
    assert await host.metric(f"{store.name}_up") == 1


@pytest.mark.parametrize(("store", "fault_name"), DOWN)
async def test_users_who_are_connected_notice_nothing(
    start_on: StartServer, faulty: FaultyStore, fault: Fault
) -> None:
    host = await start_on("sockets", **faulty.given())
    ann = await host.websocket("ann")
    async with fault(faulty):
        for n in range(THRESHOLD + 2):
            answer = await host.publish(user("ann"), payload=n)
            assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 1)
        assert [each["payload"] for each in await ann.notifications(5)] == list(range(5))
    await recovered(host, faulty)


@pytest.mark.parametrize(("store", "fault_name"), DOWN)
async def test_who_is_away_is_refused_and_soon_at_once(
    start_on: StartServer, faulty: FaultyStore, fault: Fault
) -> None:
    host = await start_on("sockets", **faulty.given())
    ann = await host.websocket("ann")
    async with fault(faulty):
        started = time.perf_counter()
        await opened(host, faulty)
        assert time.perf_counter() - started < THRESHOLD * (TIMEOUT + 0.3)
        for _ in range(10):
            started = time.perf_counter()
            refused = await send(host, "away")
            assert time.perf_counter() - started < 0.05
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) >= 1
        several = (await send(host, "ann", "away")).json()
        assert several["results"]["ann"]["outcome"] == "delivered"
        assert several["results"]["away"]["outcome"] == "failed"
        assert (several["delivered_to"], several["queued"], several["failed"]) == (1, 0, 1)
        health = (await host.get("/health", key=READ_KEY)).json()
        assert (health["status"], health[faulty.name]["status"]) == ("degraded", "degraded")
        assert (await host.get("/health/ready", key=None)).status_code == 200
    await recovered(host, faulty)
    await ann.notifications(1)
    # Nothing that was refused was stored all the same.
    away = await host.websocket("away")
    assert (await host.publish(user("away"), payload="first"))["outcome"] == "delivered"
    assert (await away.expect("notification"))["payload"] == "first"


@pytest.mark.parametrize(("store", "fault_name"), cases(AWAY))
async def test_who_connects_meanwhile_is_told_and_gets_his_queue_when_it_is_back(
    start_on: StartServer, faulty: FaultyStore, fault: Fault
) -> None:
    host = await start_on("sockets", **faulty.given())
    for n in range(3):
        assert (await host.publish(user("ann"), payload=n))["outcome"] == "queued"
    async with fault(faulty):
        ann = await host.websocket("ann")
        gap = await ann.expect("gap")
        assert (gap["stream"], gap["reason"]) == ("user:ann", "queue_unavailable")
        assert (await host.publish(user("ann"), payload="live"))["outcome"] == "delivered"
        live = await ann.expect("notification")
        assert (live["payload"], live["metadata"].get("replayed")) == ("live", None)
    replayed = await ann.notifications(3)
    assert [each["payload"] for each in replayed] == [0, 1, 2]
    assert all(each["metadata"]["replayed"] for each in replayed)
    await recovered(host, faulty)


@pytest.mark.parametrize(("store", "fault_name"), ALL)
async def test_what_was_answered_queued_arrives(
    start_on: StartServer, faulty: FaultyStore, fault: Fault
) -> None:
    host = await start_on("sockets", **faulty.given())
    stored = []

    async def some(label: str) -> None:
        for n in range(THRESHOLD + 1):
            answer = await send(host, "ann", payload=f"{label}-{n}")
            if answer.status_code == 200:
                assert answer.json()["outcome"] == "queued"
                stored.append(f"{label}-{n}")
            else:
                assert answer.status_code == 503

    await some("before")
    assert len(stored) == THRESHOLD + 1
    async with fault(faulty):
        await some("meanwhile")
    await recovered(host, faulty)
    await some("after")
    assert stored[-1] == f"after-{THRESHOLD}"
    ann = await host.websocket("ann", query="acks=1")
    got = []
    while (message := await ann.receive())["type"] == "notification":
        got.append(message)
    assert message["type"] == "caught_up"
    payloads = [each["payload"] for each in got]
    # One that timed out may have been stored: it is reported failed, and may come.
    assert [each for each in payloads if each in stored] == stored
    assert set(payloads) - set(stored) <= {f"meanwhile-{n}" for n in range(THRESHOLD + 1)}
    assert (await ann.ack(*(each["id"] for each in got)))["type"] == "acked"
    await ann.close()
    again = await host.websocket("ann", query="acks=1")
    await host.publish(user("ann"), payload="next")
    assert (await again.expect("notification"))["payload"] == "next"


@pytest.mark.parametrize(("store", "fault_name"), DOWN)
async def test_always_sends_nothing_that_is_not_stored(
    start_on: StartServer, faulty: FaultyStore, fault: Fault
) -> None:
    host = await start_on("sockets", **faulty.given(queue={"mode": "always"}))
    ann = await host.websocket("ann")
    assert (await host.get("/health/ready", key=None)).status_code == 200
    async with fault(faulty):
        for _ in range(THRESHOLD):
            assert (await send(host, "ann", payload="refused")).status_code == 503
        started = time.perf_counter()
        assert (await send(host, "ann", payload="refused")).status_code == 503
        assert time.perf_counter() - started < 0.05
        ready = await host.get("/health/ready", key=None)
        assert ready.status_code == 503
        assert faulty.name in ready.json()["error"]["message"]
    await recovered(host, faulty)
    assert (await host.get("/health/ready", key=None)).status_code == 200
    answer = await host.publish(user("ann"), payload="stored")
    assert answer["outcome"] == "delivered"
    heard = [await ann.expect("notification")]
    while heard[-1]["payload"] != "stored":
        # One that timed out may have been stored: it comes from there, marked.
        assert heard[-1]["metadata"]["replayed"]
        heard.append(await ann.expect("notification"))


@pytest.mark.parametrize("store", ["redis", "postgres"])
async def test_a_repeated_call_delivers_once_though_the_store_is_down(
    start_on: StartServer, faulty: FaultyStore
) -> None:
    host = await start_on("sockets", **faulty.given())
    ann = await host.websocket("ann")
    body = {"target": user("ann"), "event_type": "test.event", "payload": 1}

    async def call(key: str) -> httpx.Response:
        headers = {"Idempotency-Key": key}
        return await host.post("/api/v1/notifications", body, key=PUBLISH_KEY, headers=headers)

    first = await call("before")
    async with FAULTS["refused"](faulty):
        again = await call("before")
        assert (again.status_code, again.content) == (200, first.content)
        assert again.headers["Idempotent-Replay"] == "true"
        meanwhile = await call("meanwhile")
        assert meanwhile.status_code == 200
        assert (await call("meanwhile")).content == meanwhile.content
    await recovered(host, faulty)
    assert (await call("meanwhile")).content == meanwhile.content
    assert len(await ann.notifications(2)) == 2
    await host.publish(user("ann"), payload="last")
    assert (await ann.expect("notification"))["payload"] == "last"


@pytest.mark.parametrize("store", ["redis", "postgres"])
async def test_a_template_that_was_used_is_used_without_the_store(
    start_on: StartServer, faulty: FaultyStore
) -> None:
    host = await start_on("sockets", **faulty.given())
    ann = await host.websocket("ann")
    template = {
        "id": "order",
        "name": "Order",
        "event_type": "order.created",
        "payload_template": {"id": "{{id}}"},
    }
    assert (await host.post("/api/v1/templates", template)).status_code == 201
    body = {"target": user("ann"), "template_id": "order", "variables": {"id": 1}}
    assert (await host.post("/api/v1/notifications", body, key=PUBLISH_KEY)).status_code == 200
    async with FAULTS["refused"](faulty):
        sent = await host.post("/api/v1/notifications", body, key=PUBLISH_KEY)
        assert sent.json()["outcome"] == "delivered"
        assert (await host.get("/api/v1/templates")).status_code == 503
    assert [each["payload"] for each in await ann.notifications(2)] == [{"id": 1}] * 2
    await recovered(host, faulty)


@pytest.mark.parametrize("store", ["redis", "postgres"])
async def test_figures_are_told_without_the_store(
    start_on: StartServer, faulty: FaultyStore
) -> None:
    host = await start_on("sockets", **faulty.given())
    async with FAULTS["refused"](faulty):
        await opened(host, faulty)
        figures = (await host.get("/stats", key=READ_KEY)).json()
        assert (figures["queue"]["total_messages"], figures["ack"]) == (None, None)
        assert figures[faulty.name]["status"] == "degraded"
        assert figures[faulty.name]["breaker"] in {"open", "half_open"}
        assert await host.metric(f"{faulty.name}_up") == 0
    await recovered(host, faulty)
    figures = (await host.get("/stats", key=READ_KEY)).json()
    assert figures["queue"]["total_messages"] == 0
