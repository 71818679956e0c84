"""What happens while something is awaited: a store that answers late, bytes that come early."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from notifyd.connections.registry import Registry
from notifyd.queue.memory import MemoryUserLogs
from tests.conftest import StartServer
from tests.front_door import PUBLISH_KEY, WAIT, Host, RawWebSocket, token, until, user


class LateStore:
    """Makes a call of the memory store answer only once it is let go, as a store on the network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()
        at_once: Callable[..., Any] = getattr(MemoryUserLogs, method)

        def call(*arguments: Any, **options: Any) -> Awaitable[Any]:
            async def late() -> Any:
                self.asked.set()
                await self.answer.wait()
                return at_once(*arguments, **options)

            return late()

        monkeypatch.setattr(MemoryUserLogs, method, call)


async def test_who_connects_while_the_store_is_asked_misses_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LateStore(monkeypatch, "enqueue")
    sending = asyncio.create_task(host.publish(user("ada")))
    await store.asked.wait()
    websocket = await host.websocket("ada")
    store.answer.set()
    sent = await sending
    assert sent["outcome"] == "queued"
    message = await websocket.expect("notification")
    assert message["id"] == sent["notification_id"]
    assert message["metadata"]["replayed"] is True


async def test_an_ack_is_answered_after_the_store_settled_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = (await host.publish(user("ada")))["notification_id"]
    websocket = await host.websocket("ada", query="acks=1")
    await websocket.expect("notification")
    await websocket.expect("caught_up")
    store = LateStore(monkeypatch, "settle")
    await websocket.send("Ack", {"notification_id": id})
    await store.asked.wait()
    await websocket.nothing_came()
    store.answer.set()
    assert await websocket.expect("acked") == {"type": "acked", "notification_id": id}


async def test_a_replay_that_is_slow_to_come_holds_back_what_is_live(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.publish(user("ada"), payload="queued")
    store = LateStore(monkeypatch, "read")
    websocket = await host.websocket("ada", greeted=False)
    await store.asked.wait()
    await host.publish(user("ada"), payload="live")
    await host.publish({"type": "broadcast"}, payload="for all")
    # The greeting and answers do not wait.
    await websocket.expect("connected")
    await websocket.nothing_came()
    store.answer.set()
    assert (await websocket.expect("notification"))["payload"] == "queued"
    await websocket.expect("caught_up")
    live = await websocket.notifications(2)
    assert [message["payload"] for message in live] == ["live", "for all"]


async def test_answers_keep_the_order_of_pipelined_requests(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LateStore(monkeypatch, "enqueue")
    reader, writer = await host.raw()
    body = json.dumps({"target": user("ada"), "event_type": "x", "payload": 1}).encode()
    slow = (
        f"POST /api/v1/notifications HTTP/1.1\r\nHost: a\r\nX-API-Key: {PUBLISH_KEY}\r\n"
        f"X-Request-ID: slow\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    quick = b"GET /health/live HTTP/1.1\r\nHost: a\r\nX-Request-ID: quick\r\n\r\n"
    broadcast = b'{"event_type":"x","payload":1}'
    fast = (
        f"POST /api/v1/notifications/broadcast HTTP/1.1\r\nHost: a\r\nX-API-Key: {PUBLISH_KEY}\r\n"
        f"X-Request-ID: fast\r\nContent-Length: {len(broadcast)}\r\n\r\n"
    ).encode() + broadcast
    writer.write(slow + quick + fast)
    await store.asked.wait()
    writer.write(
        quick.replace(b"quick", b"last").replace(b"Host: a", b"Host: a\r\nConnection: close")
    )
    store.answer.set()
    async with asyncio.timeout(WAIT):
        answers = (await reader.read()).decode()
    order = [
        line.partition(": ")[2]
        for line in answers.split("\r\n")
        if line.lower().startswith("x-request-id")
    ]
    assert order == ["slow", "quick", "fast", "last"]
    assert answers.count("HTTP/1.1 200 ") == 4


async def test_a_client_may_speak_right_behind_its_handshake(start_on: StartServer) -> None:
    host = await start_on("sockets")
    reader, writer = await host.raw()
    websocket = RawWebSocket(reader, writer)
    writer.write(
        f"GET /ws?token={token('ada')} HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    websocket.send("Subscribe", {"channels": ["orders"]})
    async with asyncio.timeout(WAIT):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    assert (await websocket.receive())["type"] == "connected"
    assert (await websocket.receive())["type"] == "subscribed"


async def test_a_fault_of_the_servers_own_costs_one_connection(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> bool:
        raise RuntimeError("a fault")

    websocket = await host.websocket("ada")
    other = await host.websocket("bob")
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "subscribe", fail)
        await websocket.send("Subscribe", {"channels": ["orders"]})
        code, told = await websocket.closed()
    assert (code, told[0]["code"]) == (1011, "INTERNAL")
    await other.subscribe("orders")


async def test_what_a_half_open_socket_holds_comes_in_pages(host: Host) -> None:
    half_open = await host.raw_websocket("ada", query="acks=1")
    sent: Sequence[str] = [
        (await host.publish(user("ada"), payload="x" * 40_000))["notification_id"]
        for _ in range(10)
    ]
    device = await host.websocket("ada", query="acks=1")
    assert [message["id"] for message in await device.notifications(10)] == sent
    assert (await device.expect("caught_up"))["replayed"] == 10
    assert (await half_open.receive())["id"] == sent[0]


async def test_a_backend_cannot_subscribe_beyond_the_limit(start: StartServer) -> None:
    host = await start(websocket={"max_subscriptions_per_connection": 2})
    websocket = await host.websocket("ada")
    await websocket.subscribe("a")
    response = await host.post("/api/v1/users/ada/subscribe", {"channels": ["b", "c"]})
    assert response.status_code == 422
    assert response.json()["error"]["details"]["field"] == "channels"
    await websocket.nothing_came()
    found = (await host.get("/api/v1/users/ada/subscriptions")).json()
    assert found["subscriptions"] == ["a"]


async def test_sockets_of_all_kinds_are_limited(start_on: StartServer) -> None:
    host = await start_on("sockets", server={"max_sockets": 2}, websocket={"max_connections": 2})
    first = await host.raw_websocket("ada")
    await host.raw()
    reader, _ = await host.raw()
    async with asyncio.timeout(WAIT):
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after" in answer.lower()
    assert b"x-request-id: " in answer.lower()
    first.vanish()
    await until(lambda: not host.notifyd._registry, "room")
    await host.raw_websocket("ada")
