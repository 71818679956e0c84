"""Shutting down: everybody is told when to come back, and what was held is not mourned twice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from tests.conftest import StartServer
from tests.front_door import ORIGIN, WAIT, Host, Transport, token, user


def is_shutdown(message: dict[str, Any]) -> bool:
    """A `shutdown` that says when to come back."""
    return message["type"] == "shutdown" and message["reconnect_after_seconds"] in range(1, 11)


async def test_clients_are_told_and_closed(host: Host, transport: Transport) -> None:
    """What they were sent before comes first. Stock uvicorn closes WebSockets by itself (1012)
    before the application hears of it, so there its lifespan says it: see the test of embedding."""
    listener = await host.listen(transport, "ada")
    await host.publish(user("ada"))
    await host.notifyd.drain()
    told = await listener.rest()
    assert [message["type"] for message in told[:-1]] == ["notification"]
    assert is_shutdown(told[-1])
    if transport == "websocket":
        assert listener.end_told().startswith("1001")


async def test_nobody_new_comes_in_while_draining(host: Host) -> None:
    await host.notifyd.drain()
    with pytest.raises(InvalidStatus) as refused:
        await host.websocket("ada")
    assert refused.value.response.status_code == 503
    assert int(refused.value.response.headers["Retry-After"]) > 0
    browser = await host.websocket("ada", origin=ORIGIN, greeted=False)
    code, told = await browser.closed()
    assert (code, told[0]["code"]) == (1001, "UNAVAILABLE")
    stream = await host.sse("ada", greeted=False)
    assert [message["code"] for message in await stream.rest()] == ["UNAVAILABLE"]
    assert stream.retry is not None
    ready = await host.get("/health/ready", key=None)
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "UNAVAILABLE")
    assert (await host.get("/health/live", key=None)).status_code == 200
    assert (await host.get("/health", key=None)).json()["status"] == "degraded"


async def test_our_own_server_stops_with_everybody_connected(start_on: StartServer) -> None:
    host = await start_on("sockets")
    websocket = await host.websocket("ada")
    waiting = await host.websocket(None, greeted=False)
    stream = await host.sse("bob")
    silent_reader, _ = await host.raw()
    stopping = asyncio.create_task(host.shut_down())
    assert is_shutdown((await websocket.rest())[-1])
    assert websocket.end_told().startswith("1001")
    assert is_shutdown((await stream.rest())[-1])
    assert (await waiting.closed())[0] == 1001
    async with asyncio.timeout(WAIT):
        assert await silent_reader.read() == b""
        await stopping
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", host.port)


async def test_a_client_that_does_not_close_does_not_hold_it_up(start_on: StartServer) -> None:
    host = await start_on("sockets", server={"shutdown_grace_seconds": 0.1})
    stubborn = await host.raw_websocket("ada")
    async with asyncio.timeout(WAIT):
        await host.shut_down()
    assert is_shutdown(await stubborn.receive())
    assert await stubborn.close_code() == 1001


async def test_requests_at_work_are_answered_first(start_on: StartServer) -> None:
    host = await start_on("sockets")
    reader, writer = await host.raw()
    body = b'{"user_ids":["ada"]}'
    head = f"POST /api/v1/presence HTTP/1.1\r\nHost: a\r\nX-API-Key: {'admin-key-0123456789'}\r\n"
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body[:5])
    # The server has read the head: the answer to another request came back after it.
    await host.get("/health")
    stopping = asyncio.create_task(host.shut_down())
    writer.write(body[5:])
    async with asyncio.timeout(WAIT):
        answer = await reader.read()
        await stopping
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b'{"online":{}}')


async def test_stock_uvicorn_ends_streams_through_the_lifespan(start_on: StartServer) -> None:
    host = await start_on("asgi")
    stream = await host.sse("ada", jwt=token("ada"))
    websocket = await host.websocket("bob")
    async with asyncio.timeout(WAIT):
        await host.shut_down()
    assert (await websocket.closed())[0] in {1001, 1012}
    await stream.rest()
