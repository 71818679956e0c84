"""Races between a store that answers late and users who come and go, forced: the test holds the
store's answers back, and lets them go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Literal

import asyncpg
import pytest

from notifyd.connections import replay
from notifyd.dispatch import store_writes
from tests.adversity.store_faults import FaultyStore, faulty_postgres, faulty_redis
from tests.conftest import StartServer
from tests.front_door import WAIT, Host, Message, RawWebSocket, WebSocketListener, until, user
from tests.stores import RedisServer

LARGE = "x" * 40_000
QUEUED = 150
"""So many large ones are many pages, and more than the buffers of a socket hold."""


@pytest.fixture
async def held(
    request: pytest.FixtureRequest, store: Literal["redis", "postgres"]
) -> AsyncIterator[FaultyStore]:
    """Either store, behind a network that the test may hold. Nothing in it is a failure."""
    server = request.getfixturevalue(f"{store}_server")
    async with faulty_redis(server) if store == "redis" else faulty_postgres(server) as made:
        made.sections[store]["command_timeout_seconds"] = 10
        yield made


@contextlib.asynccontextmanager
async def holding(store: FaultyStore) -> AsyncIterator[None]:
    """The store's answers come at the end of the block."""
    store.network.hold()
    try:
        yield
    finally:
        store.network.release()


@contextlib.asynccontextmanager
async def storing_late(host: Host, store: FaultyStore) -> AsyncIterator[None]:
    """Nothing is stored before the end of the block. What is read in it is answered before that:
    with PostgreSQL in the block, with Redis at its end."""
    if store.name == "redis":
        # It must be told the script that stores, but not the one that reads.
        assert isinstance(store.server, RedisServer)
        await asyncio.to_thread(store.server.command, "SCRIPT", "FLUSH")
        await replayed(await host.websocket("somebody"))
        async with holding(store):
            yield
        return
    blocker = await asyncpg.connect(store.sections["postgres"]["url"])
    try:
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE notifyd_entries IN SHARE MODE")
            yield
    finally:
        await blocker.close()


async def replayed(device: WebSocketListener) -> list[Message]:
    """What came up to the end of the replay: what is no reply waits behind it."""
    await device.send("Subscribe", {"channels": ["end-of-replay"]})
    messages = []
    while (message := await device.receive())["type"] != "subscribed":
        messages.append(message)
    return messages


async def comes(device: WebSocketListener, id: str) -> bool:
    """The next notification is this one; whether it is marked."""
    while (message := await device.receive())["type"] != "notification":
        assert message["type"] == "caught_up"
    assert message["id"] == id
    return bool(message["metadata"].get("replayed", False))


def notifications(messages: list[Message]) -> list[tuple[str, bool]]:
    """The ids, and whether each is marked."""
    return [
        (message["id"], message["metadata"].get("replayed", False))
        for message in messages
        if message["type"] == "notification"
    ]


async def asked_to_send(host: Host) -> asyncio.Task[Message]:
    """A publishing call whose notification is on its way into the store."""
    calls = host.notifyd.metrics.notifications_total.labels("user", "http")
    before = calls.value
    sending = asyncio.create_task(host.publish(user("ada")))
    await until(lambda: calls.value > before, "the call")
    return sending


@pytest.mark.parametrize("mode", ["offline", "always"])
async def test_who_connects_while_it_is_stored_gets_it_once_and_in_order(
    held: FaultyStore, start_on: StartServer, mode: str
) -> None:
    host = await start_on("sockets", **held.given(queue={"mode": mode}))
    async with storing_late(host, held):
        sending = await asked_to_send(host)
        device = await host.websocket("ada", query="acks=1")
        if held.name == "postgres":
            assert notifications(await replayed(device)) == []
        assert not sending.done()
    first = await sending
    assert (first["outcome"], first["queued"]) == ("queued", 1)
    second = await host.publish(user("ada"))
    ids = [first["notification_id"], second["notification_id"]]
    assert await comes(device, ids[0]) is True
    await comes(device, ids[1])
    # Nothing more, and nothing again once it is acked.
    assert notifications(await replayed(device)) == []
    assert (await device.ack(*ids))["notification_ids"] == ids
    await device.close()
    assert await replayed(await host.websocket("ada")) == []


@pytest.mark.parametrize("mode", ["offline", "always"])
async def test_who_connects_while_his_store_is_held_gets_it_once(
    held: FaultyStore, start_on: StartServer, mode: str
) -> None:
    host = await start_on("sockets", **held.given(queue={"mode": mode}))
    async with holding(held):
        sending = await asked_to_send(host)
        device = await host.websocket("ada")
    sent = await sending
    assert sent["outcome"] == "queued"
    live = await host.publish(user("ada"))
    assert await comes(device, sent["notification_id"]) is True
    await comes(device, live["notification_id"])
    assert notifications(await replayed(device)) == []


async def test_who_leaves_while_his_log_is_read_loses_nothing(
    held: FaultyStore, start_on: StartServer
) -> None:
    host = await start_on("sockets", **held.given())
    ids = [(await host.publish(user("ada"), payload=n))["notification_id"] for n in range(3)]
    async with holding(held):
        leaving = await host.raw_websocket("ada")
        leaving.vanish()
        await until(lambda: not host.notifyd._registry, "the end of the connection")
        live = await asked_to_send(host)
    ids.append((await live)["notification_id"])
    messages = await replayed(await host.websocket("ada"))
    assert notifications(messages) == [(id, True) for id in ids]
    assert messages[-1] == {"type": "caught_up", "replayed": len(ids)}
    assert host.notifyd._replayer._again == {}


async def test_who_is_cut_while_it_is_stored_before_it_is_sent_gets_it_on_return(
    held: FaultyStore, start_on: StartServer
) -> None:
    host = await start_on("sockets", **held.given(queue={"mode": "always"}))
    leaving = await host.websocket("ada")
    assert await replayed(leaving) == []
    async with holding(held):
        sending = await asked_to_send(host)
        await leaving.close()
        await until(lambda: not host.notifyd._registry, "the end of the connection")
    sent = await sending
    assert sent["outcome"] == "queued"
    messages = await replayed(await host.websocket("ada"))
    assert notifications(messages) == [(sent["notification_id"], True)]


async def test_what_the_application_waits_for_no_longer_is_sent_all_the_same(
    held: FaultyStore, start_on: StartServer
) -> None:
    host = await start_on("sockets", **held.given(queue={"mode": "always"}))
    device = await host.websocket("ada", query="acks=1")
    assert await replayed(device) == []
    calls = host.notifyd.metrics.notifications_total.labels("user", "python")
    async with holding(held):
        sending = asyncio.create_task(host.notifyd.send(user="ada", event="x", payload=1))
        await until(lambda: calls.value == 1, "the call")
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
    assert (await device.expect("notification"))["payload"] == 1


async def test_who_comes_back_at_once_gets_first_what_is_still_being_stored(
    held: FaultyStore, start_on: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "STORE_SECONDS", WAIT)
    host = await start_on("sockets", **held.given())
    phone = await host.raw_websocket("ada", query="acks=1")
    await until(lambda: not host.notifyd._replayer._again, "the end of the replay")
    first = await host.publish(user("ada"))
    async with storing_late(host, held):
        phone.vanish()
        users = host.notifyd._registry.tenant("default").users
        await until(lambda: "ada" not in users, "the end of the connection")
        device = await host.websocket("ada", query="acks=1")
        second = await host.publish(user("ada"))
        assert second["outcome"] == "delivered"
    messages = await replayed(device)
    ids = [first["notification_id"], second["notification_id"]]
    assert notifications(messages) == [(ids[0], True), (ids[1], False)]
    assert messages[1] == {"type": "caught_up", "replayed": 1}


async def test_who_comes_while_it_moves_to_the_queue_gets_it(
    held: FaultyStore, start_on: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond `ack.max_pending`: the other device has got it, and does not hold it any more."""
    monkeypatch.setattr(replay, "STORE_SECONDS", WAIT)
    host = await start_on("sockets", **held.given(ack={"max_pending": 1}))
    other = await host.websocket("ada", query="acks=1")
    await until(lambda: not host.notifyd._replayer._again, "the end of the replay")
    async with storing_late(host, held):
        sent = [await host.publish(user("ada")) for _ in range(2)]
        device = await host.websocket("ada", query="acks=1")
    ids = [each["notification_id"] for each in sent]
    assert notifications(await replayed(device)) == [(id, True) for id in ids]
    assert [each["id"] for each in await other.notifications(2)] == ids


async def test_what_waits_for_its_turn_is_stored_before_what_is_sent_later(
    held: FaultyStore, start_on: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where more is handed back at once than a store is given at a time."""
    monkeypatch.setattr(store_writes, "MAX_ON_THEIR_WAY", 1)
    host = await start_on("sockets", **held.given())
    phones = []
    for name in ("eve", "ada"):
        phones.append(await host.raw_websocket(name, query="acks=1"))
        await until(lambda: not host.notifyd._replayer._again, "the end of the replay")
    sent = [(await host.publish(user(name)))["notification_id"] for name in ("eve", "ada")]
    async with holding(held):
        # One after the other, so that it is the second that waits.
        users = host.notifyd._registry.tenant("default").users
        phones[0].vanish()
        await until(lambda: "eve" not in users, "the end of the first")
        phones[1].vanish()
        await until(lambda: not users, "the end of the second")
        assert host.notifyd._writes._in_line
        sending = await asked_to_send(host)
    ids = [sent[1], (await sending)["notification_id"]]
    messages = await replayed(await host.websocket("ada"))
    assert notifications(messages) == [(id, True) for id in ids]


async def test_a_connection_that_dies_in_mid_replay_loses_nothing(
    held: FaultyStore, start_on: StartServer
) -> None:
    host = await start_on("sockets", **held.given())
    ids: list[str] = []
    for n in range(QUEUED):
        answer = await host.publish(user("ada"), payload=[n, LARGE])
        ids.append(answer["notification_id"])
    acked: list[str] = []
    for part in (5, 12, 30):
        dying = await host.raw_websocket("ada", query="acks=1", receive_buffer=4096)
        left = [id for id in ids if id not in acked]
        assert await first_of(dying, part) == left[:part]
        assert host.notifyd._replayer._again
        some = left[1:part:2]
        dying.send("Ack", {"notification_ids": some})
        while (message := await dying.receive())["type"] != "acked":
            assert message["type"] in {"notification", "caught_up"}
        assert message["notification_ids"] == some
        acked += some
        dying.vanish()
        await until(lambda: not host.notifyd._registry, "the end of the connection")
    left = [id for id in ids if id not in acked]
    messages = await replayed(await host.websocket("ada"))
    assert notifications(messages) == [(id, True) for id in left]
    assert messages[-1] == {"type": "caught_up", "replayed": len(left)}


async def first_of(device: RawWebSocket, count: int) -> list[str]:
    """The ids of the first so many notifications."""
    ids: list[str] = []
    while len(ids) < count:
        message = await device.receive()
        assert message["type"] == "notification", message
        ids.append(message["id"])
    return ids
