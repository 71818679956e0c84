"""A server whose store fails, through the front door: what goes on, what is refused and how fast,
and that everything works again by itself."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from statistics import median
from typing import Any
from uuid import uuid4

import httpx
import pytest
from structlog.testing import capture_logs

from notifyd.connections.connection import MAX_UNANSWERED
from notifyd.connections.lifecycle import MAX_ACK_IDS
from notifyd.resilience import BreakerState
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
from tests.front_door import (
    PUBLISH_KEY,
    READ_KEY,
    WAIT,
    Host,
    Lane,
    Message,
    WebSocketListener,
    channel,
    until,
    user,
)
from tests.stores import PostgresServer

AT_ONCE = 0.05
"""Seconds within which who is away is refused once the breaker is open."""

DOWN = cases(AWAY, UNWRITABLE)
ALL = cases(MOMENTARY, AWAY, UNWRITABLE)
# Where only what the server does behind its breaker is looked at: one store that answers nothing,
# one that is not there, and one that answers with an error.
DISTINCT = [
    ("redis", "silent"),
    ("redis", "out_of_memory"),
    ("postgres", "killed"),
    ("postgres", "read_only"),
]


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


async def settled_in(host: Host, user_id: str, query: str = "") -> WebSocketListener:
    """A connection whose replay is over: before that, a store that fails is told by `gap`."""
    websocket = await host.websocket(user_id, query=query)
    await host.publish(user(user_id), payload="hello")
    while (message := await websocket.receive())["type"] == "gap":
        pass  # On a busy machine the store may be late without any fault.
    assert message["payload"] == "hello"
    # Stored first, it may have come while the replay was under way, which then looks once more.
    await until(lambda: not host.notifyd._replayer._again, "the end of the replay")
    await websocket.send("Ping")
    while (await websocket.receive())["type"] != "pong":
        pass
    return websocket


async def acked(websocket: WebSocketListener, *ids: str) -> Message:
    """The answer once the store could settle; a client repeats what is UNAVAILABLE."""
    deadline = time.monotonic() + WAIT
    while (answer := await websocket.ack(*ids))["type"] == "error":
        assert answer["code"] == "UNAVAILABLE"
        assert time.monotonic() < deadline
    assert answer["type"] == "acked"
    return answer


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
        # In one look: what failed last may still be on its way to the breaker.
        return (
            health["status"] == "healthy"
            and status == "connected"
            and await breaker(host, store) == 0
            and await host.metric(f"{store.name}_up") == 1
        )

    await eventually(well, f"the recovery of {store.name}")


@pytest.mark.parametrize(("store", "fault_name"), DOWN)
async def test_users_who_are_connected_notice_nothing(
    faulty: FaultyStore, fault: Fault, start_on: StartServer
) -> None:
    host = await start_on("sockets", **faulty.given())
    ann = await settled_in(host, "ann")
    await ann.subscribe("orders")
    took = []
    async with fault(faulty):
        for n in range(2 * THRESHOLD):
            for target in (user("ann"), channel("orders"), {"type": "broadcast"}):
                started = time.perf_counter()
                answer = await host.publish(target, payload=n)
                took.append(time.perf_counter() - started)
                assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 1)
        heard = [each["payload"] for each in await ann.notifications(6 * THRESHOLD)]
        assert heard == [n for n in range(2 * THRESHOLD) for _ in range(3)]
    # None of them waited for the store, not even the first ones, before its breaker opened.
    assert max(took) < TIMEOUT / 2
    await recovered(host, faulty)


@pytest.mark.parametrize(("store", "fault_name"), DOWN)
async def test_who_is_away_is_refused_and_soon_at_once(
    faulty: FaultyStore, fault: Fault, fault_name: str, start_on: StartServer
) -> None:
    host = await start_on("sockets", **faulty.given())
    ann = await settled_in(host, "ann")
    took = []
    async with fault(faulty):
        await opened(host, faulty)
        for _ in range(9):
            started = time.perf_counter()
            refused = await send(host, "away", payload="refused")
            took.append(time.perf_counter() - started)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "UNAVAILABLE")
            assert int(refused.headers["Retry-After"]) >= 1
        assert median(took) < AT_ONCE
        several = (await send(host, "ann", "away", payload="several")).json()
        assert several["results"]["ann"] == {"outcome": "delivered", "connections": 1}
        assert several["results"]["away"]["outcome"] == "failed"
        assert several["results"]["away"]["reason"] == "unavailable"
        assert (several["delivered_to"], several["queued"], several["failed"]) == (1, 0, 1)
        health = (await host.get("/health", key=READ_KEY)).json()
        assert (health["status"], health[faulty.name]["status"]) == ("degraded", "degraded")
        assert health["queue"]["total_messages"] is None
        # Without it those who are connected are served all the same.
        assert (await host.get("/health/ready", key=None)).status_code == 200
        assert await host.metric("delivery_failures_total", reason="unavailable") > 0
        if faulty.name == "postgres" or fault_name in AWAY:
            assert await host.metric(f"{faulty.name}_up") == 0
        elif fault_name == "out_of_memory":
            # It is connected, which is what the metric says of Redis, and refuses what is asked.
            assert await host.metric("redis_up") == 1
    await recovered(host, faulty)
    assert await host.metric(f"{faulty.name}_up") == 1
    assert (await ann.expect("notification"))["payload"] == "several"
    # What was refused at once is nowhere; what timed out before may have been stored all the same.
    away = await host.websocket("away")
    await host.publish(user("away"), payload="first")
    while (message := await away.receive()).get("payload") != "first":
        assert message.get("payload") not in {"refused", "several"}


# What can be read is replayed until a write finds that the store takes none.
@pytest.mark.parametrize(
    ("store", "fault_name", "breaker_is"),
    [
        *((*case, "open") for case in DISTINCT),
        *((*case, "closed") for case in cases(AWAY)),
    ],
)
async def test_who_connects_meanwhile_is_told_and_gets_his_queue_when_it_is_back(
    faulty: FaultyStore, fault: Fault, start_on: StartServer, breaker_is: str
) -> None:
    host = await start_on("sockets", **faulty.given())
    for n in range(3):
        assert (await host.publish(user("ann"), payload=n))["outcome"] == "queued"
    async with fault(faulty):
        if breaker_is == "open":
            await opened(host, faulty)
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
    await acked(ann, *(each["id"] for each in replayed))


@pytest.mark.parametrize("store", ["redis", "postgres"])
async def test_a_stream_is_told_and_gets_its_queue_when_it_is_back(
    faulty: FaultyStore, start_on: StartServer
) -> None:
    host = await start_on("sockets", **faulty.given())
    await host.publish(user("ann"), payload="queued")
    async with FAULTS["refused"](faulty):
        ann = await host.sse("ann")
        assert (await ann.expect("gap"))["reason"] == "queue_unavailable"
        await host.publish(user("ann"), payload="live")
        assert (await ann.expect("notification"))["payload"] == "live"
    replayed = await ann.expect("notification")
    assert (replayed["payload"], replayed["metadata"]["replayed"]) == ("queued", True)


@pytest.mark.parametrize("store", ["redis", "postgres"])
async def test_who_connects_waits_for_no_store_however_long_its_timeout(
    faulty: FaultyStore, start_on: StartServer
) -> None:
    """No call is given up here and no breaker opens: the store is slow, and not away."""
    given = faulty.given()
    given[faulty.name]["command_timeout_seconds"] = 600.0
    host = await start_on("sockets", **given)
    await host.publish(user("ann"), payload="queued")
    async with FAULTS["stopped"](faulty):
        ann = await host.websocket("ann")
        assert (await ann.expect("gap"))["reason"] == "queue_unavailable"
        await host.publish(user("ann"), payload="live")
        assert (await ann.expect("notification"))["payload"] == "live"
        assert getattr(host.notifyd._backends, faulty.name).breaker.state is BreakerState.CLOSED
    replayed = await ann.expect("notification")
    assert (replayed["payload"], replayed["metadata"]["replayed"]) == ("queued", True)


@pytest.mark.parametrize("comes_back", ["meanwhile", "afterwards"])
@pytest.mark.parametrize(("store", "fault_name"), DISTINCT)
async def test_what_a_dying_connection_held_is_kept_until_the_store_is_back(
    faulty: FaultyStore, fault: Fault, start_on: StartServer, comes_back: str
) -> None:
    host = await start_on("sockets", **faulty.given())
    writes = host.notifyd._writes
    dying = await host.raw_websocket("ann", query="acks=1")
    await host.publish(user("ann"), payload="first")
    while (first := await dying.receive())["type"] == "gap":
        pass  # As in settled_in.
    await until(lambda: not host.notifyd._replayer._again, "the end of the replay")
    async with fault(faulty):
        ids = [first["id"]]
        for n in range(3):
            ids.append((await host.publish(user("ann"), payload=n))["notification_id"])
            assert (await dying.receive())["payload"] == n
        dying.vanish()
        await until(lambda: not host.notifyd._registry, "the end of the connection")
        await opened(host, faulty)
        if comes_back == "meanwhile":
            ann = await host.websocket("ann", query="acks=1")
            heard = [await ann.receive()]
            while heard[-1]["type"] != "caught_up":
                heard.append(await ann.receive())
            assert {each["reason"] for each in heard if each["type"] == "gap"} == {
                "queue_unavailable"
            }
            assert heard[-1]["replayed"] == 4, heard
            heard = [each for each in heard if each["type"] == "notification"]
            # Neither store knows of them, and the client has been sent all of them.
            assert (await ann.ack(*ids))["code"] == "UNAVAILABLE"
    await recovered(host, faulty)
    if comes_back == "afterwards":
        await until(lambda: not writes._homeless and not writes._under_way, "the storing")
        ann = await host.websocket("ann", query="acks=1")
        heard = await ann.notifications(4)
        assert (await ann.expect("caught_up"))["replayed"] == 4
    assert [each["id"] for each in heard] == ids
    assert all(each["metadata"]["replayed"] for each in heard)
    assert (await acked(ann, *ids))["notification_ids"] == ids
    await ann.close()
    again = await host.websocket("ann")
    await host.publish(user("ann"), payload="next")
    assert (await again.expect("notification"))["payload"] == "next"


@pytest.mark.parametrize("store", ["redis", "postgres"])
async def test_what_was_given_up_is_not_stored_after_it_was_settled(
    faulty: FaultyStore, start_on: StartServer
) -> None:
    """A network that was silent delivers what it held behind what was sent again."""
    host = await start_on("sockets", **faulty.given())
    dying = await host.raw_websocket("ann", query="acks=1")
    await host.publish(user("ann"), payload="first")
    while (await dying.receive())["type"] == "gap":
        pass  # As in settled_in.
    await until(lambda: not host.notifyd._replayer._again, "the end of the replay")
    faulty.network.hold()
    dying.vanish()
    await until(lambda: bool(host.notifyd._writes._homeless), "the giving up")
    faulty.network.heal()
    await recovered(host, faulty)
    ann = await host.websocket("ann", query="acks=1")
    first = await ann.expect("notification")
    assert first["payload"] == "first"
    await ann.expect("caught_up")
    await acked(ann, first["id"])
    faulty.network.release()
    # Over the connections that there are now, so that what was late has come before.
    await send(host, "bob")
    await ann.close()
    deadline = time.monotonic() + WAIT
    while True:
        assert time.monotonic() < deadline, "the store does not stay well"
        again = await host.websocket("ann", query="acks=1")
        await host.publish(user("ann"), payload="next")
        if (message := await again.receive())["type"] != "gap":
            break
        # What was asked over the silent network was given up only now, and so opened the breaker.
        await recovered(host, faulty)
        assert (await again.expect("notification"))["payload"] == "next"
        await again.close()
    assert message["payload"] == "next"


@pytest.mark.parametrize(("store", "fault_name"), cases(AWAY))
async def test_acks_meanwhile(faulty: FaultyStore, fault: Fault, start_on: StartServer) -> None:
    """`acked` is answered where the store need not settle anything, and refused where it must."""
    host = await start_on("sockets", **faulty.given())
    queued = (await host.publish(user("ann"), payload="queued"))["notification_id"]
    ann = await host.websocket("ann", query="acks=1")
    assert (await ann.expect("notification"))["id"] == queued
    await ann.expect("caught_up")
    async with fault(faulty):
        await opened(host, faulty)
        live = (await host.publish(user("ann"), payload="live"))["notification_id"]
        await ann.notifications(1)
        assert await ann.ack(live) == {"type": "acked", "notification_id": live}
        refused = await ann.ack(queued)
        assert (refused["type"], refused["code"]) == ("error", "UNAVAILABLE")
    await recovered(host, faulty)
    assert await acked(ann, queued) == {"type": "acked", "notification_id": queued}
    await ann.close()
    again = await host.websocket("ann")
    await host.publish(user("ann"), payload="next")
    assert (await again.expect("notification"))["payload"] == "next"


@pytest.mark.parametrize("lane", ["sockets", "asgi"])
@pytest.mark.parametrize("store", ["redis", "postgres"])
async def test_who_acks_without_end_waits_and_loses_nothing(
    faulty: FaultyStore, start_on: StartServer, lane: Lane
) -> None:
    given = faulty.given()
    given[faulty.name]["command_timeout_seconds"] = 600.0
    host = await start_on(lane, **given)
    eve = await host.raw_websocket("eve", query="acks=1")
    ann = await settled_in(host, "ann")
    async with FAULTS["stopped"](faulty):
        asked = [[str(uuid4()) for _ in range(MAX_ACK_IDS)] for _ in range(40)]
        for ids in asked[:-1]:
            eve.send("Ack", {"notification_ids": ids})
        last = json.dumps({"type": "Ack", "payload": {"notification_ids": asked[-1]}}).encode()
        eve.send_frame(1, last[:1000], final=False)
        eve.send_frame(0, last[1000:])
        eve.send("Ping")
        (connection,) = host.notifyd._registry.tenant("default").of_user("eve")
        await until(lambda: connection.must_wait, "the waiting")
        for n in range(3):
            assert (await host.publish(user("ann"), payload=n))["outcome"] == "delivered"
        assert [each["payload"] for each in await ann.notifications(3)] == [0, 1, 2]
        # What is read at once, and answered by nothing, is all that the server has of it.
        assert connection.unanswered < MAX_UNANSWERED + MAX_ACK_IDS
    answers = [await eve.receive() for _ in (*asked, "Ping")]
    refused = [each["refused"] for each in answers if each["type"] == "acked"]
    assert sorted(refused) == sorted(asked)
    assert [each["type"] for each in answers if each["type"] != "acked"] == ["pong"]
    # A connection that ends meanwhile takes what it said with it.
    async with FAULTS["stopped"](faulty):
        for ids in asked:
            eve.send("Ack", {"notification_ids": ids})
        await until(lambda: connection.must_wait, "the waiting")
        eve.vanish()
    await until(lambda: not host.notifyd._registry.tenant("default").of_user("eve"), "its end")


async def test_one_connection_that_is_reset_fails_nobody(
    postgres_server: PostgresServer, start_on: StartServer
) -> None:
    async with faulty_postgres(postgres_server) as faulty:
        host = await start_on("sockets", **faulty.given())
        await asyncio.gather(*(send(host, f"u{n}") for n in range(4)))
        faulty.network.cut()
        answers = await asyncio.gather(*(send(host, f"u{n}") for n in range(40)))
        assert {each.status_code for each in answers} == {200}
        assert await breaker(host, faulty) == 0


@pytest.mark.parametrize("store", ["redis", "postgres"])
async def test_a_pong_confirms_though_the_store_is_down(
    faulty: FaultyStore, start_on: StartServer
) -> None:
    """What it settles in the log is settled later, and does not come again meanwhile."""
    given = faulty.given(websocket={"heartbeat_interval": 0.05, "idle_timeout": 600})
    host = await start_on("sockets", **given)
    await host.publish(user("ann"), payload="queued")
    ann = await host.raw_websocket("ann")
    assert (await ann.receive())["payload"] == "queued"
    ping = b""
    while not ping:
        opcode, payload = await ann.receive_frame()
        ping = payload if opcode == 9 else b""
    async with FAULTS["refused"](faulty):
        await opened(host, faulty)
        ann.send_frame(10, ping)
        await until(lambda: bool(host.notifyd._writes._unsettled), "the confirmation")
        ann.vanish()
        await until(lambda: not host.notifyd._registry, "the end of the connection")
        again = await host.websocket("ann")
        await again.expect("gap")
    await recovered(host, faulty)
    await host.publish(user("ann"), payload="next")
    assert (await again.expect("notification"))["payload"] == "next"

    async def settled() -> bool:
        return await host.metric("queue_messages") == 0

    await eventually(settled, "the settling")


@pytest.mark.parametrize(("store", "fault_name"), ALL)
async def test_what_was_answered_queued_arrives(
    faulty: FaultyStore, fault: Fault, start_on: StartServer, fault_name: str
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
    if faulty.name == "redis" and fault_name not in UNWRITABLE:
        assert await host.metric("redis_reconnects_total") >= 1
    ann = await host.websocket("ann", query="acks=1")
    got = []
    while (message := await ann.receive())["type"] == "notification":
        got.append(message)
    assert message["type"] == "caught_up"
    payloads = [each["payload"] for each in got]
    # One that timed out may have been stored: it is reported failed, and may come.
    assert [each for each in payloads if each in stored] == stored
    assert set(payloads) - set(stored) <= {f"meanwhile-{n}" for n in range(THRESHOLD + 1)}
    await acked(ann, *(each["id"] for each in got))
    await ann.close()
    again = await host.websocket("ann", query="acks=1")
    await host.publish(user("ann"), payload="next")
    assert (await again.expect("notification"))["payload"] == "next"


@pytest.mark.parametrize(("store", "fault_name"), DISTINCT)
async def test_always_sends_nothing_that_is_not_stored(
    faulty: FaultyStore, fault: Fault, start_on: StartServer
) -> None:
    host = await start_on("sockets", **faulty.given(queue={"mode": "always"}))
    ann = await settled_in(host, "ann")
    assert (await host.get("/health/ready", key=None)).status_code == 200
    async with fault(faulty):
        took = []
        for _ in range(THRESHOLD + 9):
            started = time.perf_counter()
            assert (await send(host, "ann", payload="refused")).status_code == 503
            took.append(time.perf_counter() - started)
        assert median(took[THRESHOLD:]) < AT_ONCE
        several = (await send(host, "ann", "bob", payload="refused")).json()
        assert (several["delivered_to"], several["queued"], several["failed"]) == (0, 0, 2)
        assert {each["reason"] for each in several["results"].values()} == {"unavailable"}
        await ann.nothing_came()
        # What nothing keeps goes on.
        await host.publish({"type": "broadcast"}, payload="for all")
        await host.publish(user("ann"), payload="now or never", ttl=0)
        assert [each["payload"] for each in await ann.notifications(2)] == [
            "for all",
            "now or never",
        ]
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
async def test_what_the_ledger_is_not_told_is_counted(
    faulty: FaultyStore, start_on: StartServer
) -> None:
    """Whom it was sent to, and the ack, which is answered all the same."""
    host = await start_on("sockets", **faulty.given(queue={"backend": "memory"}))
    ann = await host.websocket("ann", query="acks=1")

    async def lost(count: int) -> bool:
        return await host.metric("ack_notes_lost_total") == count

    assert await lost(0)
    async with FAULTS["refused"](faulty):
        sent = (await host.publish(user("ann")))["notification_id"]
        await ann.notifications(1)
        await eventually(lambda: lost(1), "the loss of what was sent")
        assert await ann.ack(sent) == {"type": "acked", "notification_id": sent}
        assert await lost(2)


@pytest.mark.parametrize("store", ["redis", "postgres"])
async def test_a_store_that_hangs_does_not_hold_up_the_end(
    faulty: FaultyStore, start_on: StartServer
) -> None:
    given = faulty.given(server={"shutdown_grace_seconds": 0.5})
    given[faulty.name]["command_timeout_seconds"] = 600.0
    host = await start_on("sockets", **given)
    ann = await settled_in(host, "ann", "acks=1")
    await host.publish(user("ann"), payload="second")
    await ann.notifications(1)
    async with FAULTS["stopped"](faulty):
        with capture_logs() as log:
            async with asyncio.timeout(2 * WAIT):
                await host.shut_down()
    assert [each["lost"] for each in log if "lost" in each] == [2]


@pytest.mark.parametrize("store", ["redis", "postgres"])
async def test_a_store_that_comes_back_before_the_end_gets_what_was_held(
    faulty: FaultyStore, start_on: StartServer
) -> None:
    host = await start_on("sockets", **faulty.given())
    ann = await settled_in(host, "ann", "acks=1")
    sent = await host.publish(user("ann"), payload="second")
    await ann.notifications(1)
    writes = host.notifyd._writes
    with capture_logs() as log:
        async with FAULTS["refused"](faulty):
            stopping = asyncio.ensure_future(host.shut_down())
            await until(lambda: writes._failures > 1 and not writes._under_way, "the store's loss")
        await stopping
    assert [each for each in log if "lost" in each] == []
    other = await start_on("sockets", **faulty.given())
    again = await other.websocket("ann", query="acks=1")
    assert (await again.notifications(2))[-1]["id"] == sent["notification_id"]


@pytest.mark.parametrize("store", ["redis", "postgres"])
async def test_a_repeated_call_delivers_once_though_the_store_is_down(
    faulty: FaultyStore, start_on: StartServer
) -> None:
    host = await start_on("sockets", **faulty.given())
    ann = await settled_in(host, "ann")
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
    faulty: FaultyStore, start_on: StartServer
) -> None:
    host = await start_on("sockets", **faulty.given())
    ann = await settled_in(host, "ann")
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
    faulty: FaultyStore, start_on: StartServer
) -> None:
    host = await start_on("sockets", **faulty.given())
    breaker = getattr(host.notifyd._backends, faulty.name).breaker
    with capture_logs() as log:
        async with FAULTS["refused"](faulty):
            await opened(host, faulty)
            await until(lambda: breaker.period > 5, "probes that fail")
        await recovered(host, faulty)
    said = [each["event"] for each in log if each.get("store") == faulty.name]
    assert said == ["a store is down", "a store is back"]
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
