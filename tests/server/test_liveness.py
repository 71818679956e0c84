"""Heartbeats, silence, and clients that read too slowly."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from notifyd.server import door
from notifyd.server.serve import listen
from tests.conftest import StartServer
from tests.front_door import WAIT, Host, RawWebSocket, Transport, channel, token, until, user

LARGE = "x" * 60_000


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has none")
async def test_the_kernel_gives_up_a_peer_that_acknowledges_nothing(
    start_on: StartServer, transport: Transport
) -> None:
    """RFC 5482: of a stream's client that is gone, nothing else tells."""
    listener = listen("127.0.0.1", 0, 77.5)
    with listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 77_500
    host = await start_on("sockets", websocket={"idle_timeout": 90})
    await host.listen(transport, "ada")
    (connection,) = host.notifyd._registry
    sink: Any = connection.outbox.sink
    accepted = sink._transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 90_000


async def test_a_websocket_gets_heartbeats(start: StartServer) -> None:
    host = await start(websocket={"heartbeat_interval": 0.05})
    websocket = await host.websocket("ada")
    async with asyncio.timeout(WAIT):
        for _ in range(3):
            assert await websocket.next_message() == {"type": "heartbeat"}
    assert await host.metric("loop_lag_seconds_count") > 0


async def test_a_stream_gets_heartbeats_with_the_time(start: StartServer) -> None:
    host = await start(websocket={"heartbeat_interval": 0.05})
    stream = await host.sse("ada")
    async with asyncio.timeout(WAIT):
        message = await stream.next_message()
    assert message is not None
    assert message["type"] == "heartbeat"
    assert message["timestamp"].endswith("Z")


async def test_notifyds_own_sockets_ping_with_each_heartbeat(start_on: StartServer) -> None:
    host = await start_on("sockets", websocket={"heartbeat_interval": 0.05})
    websocket = await host.raw_websocket("ada")
    assert (await websocket.receive_frame())[0] == 1
    assert (await websocket.receive_frame())[0] == 9


async def test_who_is_silent_is_closed_and_who_answers_pings_is_not(start_on: StartServer) -> None:
    host = await start_on("sockets", websocket={"heartbeat_interval": 0.05, "idle_timeout": 60})
    silent = await host.raw_websocket("silent")
    answering = await host.websocket("ada")
    stream = await host.sse("bob")
    host.clock.advance(40)
    connection = host.notifyd._registry.tenant("default").of_user("ada")[0]
    await until(lambda: connection.last_heard > host.clock() - 30, "a Pong")
    host.clock.advance(40)
    assert await silent.close_code() == 4012
    await answering.nothing_came()
    await host.publish(user("bob"))
    await stream.expect("notification")
    assert await host.metric("connections_closed_total", transport="websocket", reason="idle") == 1


async def test_many_who_connect_at_once_keep_nobody_else_waiting(
    start_on: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is in is answered between them; a thousand handshakes take a third of a second."""
    monkeypatch.setattr(door, "NEW_SECONDS", 0.0)  # one in a turn of the event loop
    host = await start_on("sockets")
    ada = await host.raw_websocket("ada")
    fresh = [await host.raw() for _ in range(60)]
    for number, (_, writer) in enumerate(fresh):
        writer.write(host.handshake(f"u{number}"))
    ada.send_frame(9, b"still there?")
    assert await ada.receive_frame() == (10, b"still there?")
    assert len(host.notifyd._registry) < 30
    for reader, _ in fresh:
        async with asyncio.timeout(WAIT):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    assert len(host.notifyd._registry) == 61


async def test_who_leaves_while_waiting_to_be_heard_is_forgotten(
    start_on: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "NEW_SECONDS", 0.0)
    host = await start_on("sockets")
    fresh = [await host.raw() for _ in range(20)]
    for number, (_, writer) in enumerate(fresh):
        writer.write(host.handshake(f"u{number}"))
        if number % 2:
            writer.transport.abort()
    for reader, _ in fresh[::2]:
        async with asyncio.timeout(WAIT):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    await until(lambda: len(host.notifyd._registry) == 10, "those who stayed")


async def open_and_stop_reading(host: Host, transport: Transport, **claims: Any) -> RawWebSocket:
    """A client of either kind that takes its greeting, then nothing."""
    jwt = token("ada", **claims)
    if transport == "websocket":
        return await host.raw_websocket(jwt=jwt, receive_buffer=4096)
    reader, writer = await host.raw(4096)
    head = f"GET /sse HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {jwt}\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(WAIT):
        await reader.readuntil(b"event: connected")
    return RawWebSocket(reader, writer)


async def publish_until_it_is_too_much(host: Host) -> list[str]:
    """Ids in order; the last one found nobody connected any more."""
    ids: list[str] = []
    while len(ids) < 1000:
        answer = await host.publish(user("ada"), payload={"n": len(ids), "x": LARGE})
        ids.append(answer["notification_id"])
        if answer["outcome"] == "queued":
            return ids
        assert answer["outcome"] == "delivered"
    raise AssertionError("the client took it all")


async def test_a_receipt_of_a_channel_leaves_out_who_was_too_slow_for_it(
    start: StartServer, transport: Transport
) -> None:
    host = await start(websocket={"outbox_max_bytes": 262_144})
    reading = await host.websocket(jwt=token("bob", subscribe=["news"]))
    await open_and_stop_reading(host, transport, subscribe=["news"])
    delivered_to: list[int] = []
    while len(delivered_to) < 1000 and delivered_to[-1:] != [1]:
        answer = await host.publish(channel("news"), payload={"x": LARGE})
        delivered_to.append(answer["delivered_to"])
        await reading.expect("notification")
    assert delivered_to == [2] * (len(delivered_to) - 1) + [1]
    assert await host.metric("connections_closed_total", transport=transport, reason="slow") == 1
    assert await host.metric("delivery_failures_total", reason="slow") == 1


async def test_a_slow_consumer_is_closed_and_what_it_held_is_kept(
    start: StartServer, transport: Transport
) -> None:
    host = await start(websocket={"outbox_max_bytes": 262_144})
    slow = await open_and_stop_reading(host, transport)
    ids = await publish_until_it_is_too_much(host)
    assert len(ids) > 3
    assert await host.metric("connections_closed_total", transport=transport, reason="slow") == 1
    assert await host.metric("delivery_failures_total", reason="slow") == 1
    assert await host.metric("outbox_bytes") == 0
    if transport == "websocket":
        assert await slow.close_code() == 4008
    websocket = await host.websocket("ada")
    replayed = await websocket.notifications(len(ids))
    assert [message["id"] for message in replayed] == ids
    assert all(message["metadata"]["replayed"] for message in replayed)
    assert await websocket.expect("caught_up") == {"type": "caught_up", "replayed": len(ids)}
    await websocket.nothing_came()


async def test_messages_that_wait_are_limited_in_number_too(start: StartServer) -> None:
    host = await start(websocket={"outbox_max_messages": 20})
    await open_and_stop_reading(host, "websocket")
    ids = await publish_until_it_is_too_much(host)
    websocket = await host.websocket("ada")
    assert [message["id"] for message in await websocket.notifications(len(ids))] == ids


async def test_beyond_the_bytes_of_all_the_largest_is_given_up(start: StartServer) -> None:
    host = await start(websocket={"outbox_max_bytes": 1_048_576, "outbox_total_bytes": 1_048_576})
    await open_and_stop_reading(host, "websocket")
    reading = await host.websocket("bob")
    while (await host.publish(user("ada"), payload=LARGE))["outcome"] == "delivered":
        pass
    assert await host.metric("connections_closed_total", reason="slow", transport="websocket") == 1
    await reading.nothing_came()


async def test_what_is_live_waits_behind_a_long_replay(start: StartServer) -> None:
    host = await start(websocket={"outbox_max_bytes": 262_144, "heartbeat_interval": 0.05})
    count = 150
    for n in range(count):
        assert (await host.publish(user("ada"), payload=[n, LARGE]))["outcome"] == "queued"
    websocket = await host.raw_websocket("ada", receive_buffer=4096)
    # The replay has not come to its end: the client has read none of it.
    connection = host.notifyd._registry.tenant("default").of_user("ada")[0]
    await until(lambda: connection.outbox.paused, "a full socket")
    assert (await host.publish(user("ada"), payload=["live"]))["outcome"] == "delivered"
    for n in range(count):
        message = await websocket.receive()
        assert (message["payload"][0], message["metadata"]["replayed"]) == (n, True)
    assert await websocket.receive() == {"type": "caught_up", "replayed": count}
    live = await websocket.receive()
    assert live["payload"] == ["live"]
    assert "replayed" not in live["metadata"]


async def test_a_flood_of_pings_is_answered_in_order(host: Host) -> None:
    websocket = await host.raw_websocket("ada")
    for n in range(500):
        websocket.send_frame(1, json.dumps({"type": "Ping", "n": n}).encode())
    for _ in range(500):
        assert (await websocket.receive())["type"] == "pong"
    websocket.send("Subscribe", {"channels": ["a"]})
    assert (await websocket.receive())["type"] == "subscribed"


@pytest.mark.parametrize("end", ["close", "vanish"])
async def test_whoever_leaves_is_counted(host: Host, end: str) -> None:
    websocket = await host.raw_websocket("ada")
    if end == "close":
        websocket.send_frame(8, (1000).to_bytes(2, "big"))
        assert await websocket.close_code() == 1000
    else:
        websocket.vanish()
    # Stock uvicorn reports a lost connection as a close without a code, which clients send too.
    reason = "client" if end == "close" or host.lane == "asgi" else "lost"
    closed = host.notifyd.metrics.connections_closed_total.labels("websocket", reason)
    await until(lambda: closed.value == 1, "the end")
    assert await host.metric("connections", transport="websocket") == 0
    assert await host.metric("connection_duration_seconds_count") == 1
