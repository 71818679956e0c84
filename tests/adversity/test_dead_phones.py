"""`queue.mode = "offline"`: what was written to a phone that is dead comes to the next device.

Its network goes silent, so that nothing says that it is gone but the silence, or it takes nothing
any more until it is given up as too slow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.adversity.raw import RawClient, handshake
from tests.adversity.raw import connected as connected_to
from tests.conftest import StartServer, sections_of
from tests.front_door import WAIT, Host, Message, WebSocketListener, token, until, user
from tests.stores import Proxy, proxy

WRITTEN = 50
IDLE_TIMEOUT = 60.0
LARGE = "x" * 50_000

# Looked at often; the time that passes is the test's.
QUICK = {"heartbeat_interval": 0.05, "idle_timeout": IDLE_TIMEOUT}


@pytest.fixture(params=["memory", "redis", "postgres"])
def kept(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Settings of one who keeps everything there."""
    if request.param == "memory":
        return {}
    return sections_of(request, request.param)


class Phone(RawClient):
    """A device that answers no Ping, behind a network that may go silent."""

    network: Proxy


@contextlib.asynccontextmanager
async def phone(host: Host, query: str) -> AsyncIterator[Phone]:
    async with proxy(host.port) as network, connected_to(network.port) as client:
        await client.send(handshake(f"/ws?token={token('ada')}{query}"))
        assert (await client.response()).status == 101
        await client.message("connected")
        made = Phone(client.reader, client.writer)
        made.network = network
        yield made


async def written(host: Host, count: int = WRITTEN) -> list[str]:
    """The ids of so many, all of them taken by a connection."""
    ids = []
    for n in range(count):
        answer = await host.publish(user("ada"), payload=n)
        assert answer["outcome"] == "delivered"
        ids.append(answer["notification_id"])
    return ids


async def gets_first(device: WebSocketListener, ids: list[str]) -> None:
    """These come first, in order and marked."""
    messages = await device.notifications(len(ids))
    assert [message["id"] for message in messages] == ids
    assert all(message["metadata"]["replayed"] is True for message in messages)
    assert (await device.expect("caught_up"))["replayed"] == len(ids)


async def gets_live(host: Host, device: WebSocketListener) -> None:
    """What is published now comes next, unmarked."""
    answer = await host.publish(user("ada"))
    message = await device.expect("notification")
    assert message["id"] == answer["notification_id"]
    assert "replayed" not in message["metadata"]


async def stored(host: Host) -> int:
    """How many wait in the queue."""
    figures: Message = (await host.get("/stats")).json()
    count: int = figures["queue"]["total_messages"]
    return count


async def silence(host: Host) -> None:
    """Nothing is heard for `idle_timeout`, and no longer than that."""
    assert len(host.notifyd._registry) == 1
    host.clock.advance(IDLE_TIMEOUT)
    await until(lambda: not host.notifyd._registry, "the end of the silent one")


async def all_stored(host: Host, count: int) -> None:
    """So many come to be in the queue."""
    async with asyncio.timeout(WAIT):
        while await stored(host) != count:
            pass


@pytest.mark.parametrize("query", ["", "&acks=1"], ids=["pongs", "acks"])
async def test_what_a_silent_phone_did_not_confirm_comes_to_the_next_device(
    kept: dict[str, Any], start_on: StartServer, query: str
) -> None:
    host = await start_on(websocket=QUICK, **kept)
    async with phone(host, query) as dead:
        dead.network.hold()
        ids = await written(host)
        assert await stored(host) == 0
        await silence(host)
        await all_stored(host, WRITTEN)
        device = await host.websocket("ada", query="acks=1")
        await gets_first(device, ids)
        await gets_live(host, device)
        assert (await device.ack(*ids))["notification_ids"] == ids
        await all_stored(host, 0)


async def test_what_a_phone_read_and_did_not_ack_comes_to_the_next_device(
    kept: dict[str, Any], start_on: StartServer
) -> None:
    host = await start_on(websocket=QUICK, **kept)
    async with phone(host, "&acks=1") as dead:
        ids = await written(host)
        for id in ids:
            assert (await dead.message("notification"))["id"] == id
        dead.network.hold()
        await silence(host)
        await all_stored(host, WRITTEN)
        await gets_first(await host.websocket("ada"), ids)


async def test_what_a_slow_consumer_did_not_take_comes_to_the_next_device(
    kept: dict[str, Any], start_on: StartServer
) -> None:
    host = await start_on(websocket={"outbox_max_bytes": 262_144}, **kept)
    slow = await host.raw_websocket("ada", receive_buffer=4096)
    ids = []
    outcome = "delivered"
    while outcome == "delivered":
        answer = await host.publish(user("ada"), payload=LARGE)
        outcome = answer["outcome"]
        ids.append(answer["notification_id"])
    assert outcome == "queued"
    assert await host.metric("connections_closed_total", reason="slow") == 1
    while len(ids) < WRITTEN:
        ids.append((await host.publish(user("ada")))["notification_id"])
    await all_stored(host, len(ids))
    assert await slow.close_code() == 4008
    device = await host.websocket("ada")
    await gets_first(device, ids)
    await gets_live(host, device)


async def test_a_half_open_phone_withholds_nothing_from_the_next_device(
    kept: dict[str, Any], start_on: StartServer
) -> None:
    host = await start_on(**kept)
    async with phone(host, "&acks=1") as half_open:
        half_open.network.hold()
        ids = await written(host)
        device = await host.websocket("ada", query="acks=1")
        assert len(host.notifyd._registry) == 2
        await gets_first(device, ids)
        await gets_live(host, device)
        assert (await device.ack(*ids))["notification_ids"] == ids
        half_open.network.cut()
        await until(lambda: len(host.notifyd._registry) == 1, "the end of the half-open one")
    await device.nothing_came()
    await device.close()
    await until(lambda: not host.notifyd._registry, "the end of all connections")
    # All but the last one are settled.
    await all_stored(host, 1)
