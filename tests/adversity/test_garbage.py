"""What a connection was made of is freed when it ends, not when the garbage collector comes by.

A server of many connections collects seldom (`GC_THRESHOLDS`): what refers to itself would stay for
hours, with the 64 KiB that a stranger had begun to send.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from websockets.server import ServerProtocol

from notifyd.connections.connection import Connection
from notifyd.server.door import Doorman
from notifyd.server.http import HttpProtocol
from notifyd.server.stream import StreamProtocol
from notifyd.server.websocket import WebSocketProtocol
from tests.adversity.hosting import Hosted
from tests.adversity.raw import TEXT, RawClient, frame, handshake, request, text
from tests.front_door import token, until

CHANNEL = "/api/v1/notifications/channel"
BODY = b'{"channel":"nobody","event_type":"e","payload":{}}'
WATCHED = (Connection, HttpProtocol, WebSocketProtocol, StreamProtocol, Doorman,
           RequestResponseCycle, ServerProtocol)  # fmt: skip


def alive() -> Counter[str]:
    """How many of what a connection is made of there are."""
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in WATCHED)


async def nothing(server: Hosted, client: RawClient) -> None:
    """Say nothing."""


async def garbage(server: Hosted, client: RawClient) -> None:
    await client.send(b"\x00" * 40)
    await client.response()


async def half_a_body(server: Hosted, client: RawClient) -> None:
    await client.send(server.request("POST", CHANNEL, "Content-Length: 60000"), b"{" * 999)


async def half_a_body_for_asgi(server: Hosted, client: RawClient) -> None:
    await client.send(server.request("POST", f"{CHANNEL}?x", "Content-Length: 60000"), b"{" * 999)


async def pipelined(server: Hosted, client: RawClient) -> None:
    await client.send(*[server.request("POST", f"{CHANNEL}?x", body=BODY)] * 100)
    await client.response()


async def bad_batch(server: Hosted, client: RawClient) -> None:
    batch = {"notifications": [{"unknown": 1}] * 50}
    body = json.dumps(batch).encode()
    await client.send(server.request("POST", "/api/v1/notifications/batch", body=body))
    assert (await client.response()).status == 200


async def expired(server: Hosted, client: RawClient) -> None:
    await client.send(handshake(f"/ws?token={token(expires_in=-99)}"))
    await client.response()


async def unauthenticated(server: Hosted, client: RawClient) -> None:
    await client.send(handshake("/ws"))
    await client.response()


async def websocket(server: Hosted, client: RawClient) -> None:
    await client.send(handshake(f"/ws?token={token('garbage')}"))
    assert (await client.response()).status == 101
    await client.message("connected")
    await client.pings()


async def half_a_frame(server: Hosted, client: RawClient) -> None:
    await websocket(server, client)
    await client.send(frame(TEXT, b"x" * 60_000)[:-1])


async def half_a_message(server: Hosted, client: RawClient) -> None:
    await websocket(server, client)
    await client.send(frame(TEXT, b"x" * 60_000, fin=False))


async def broken(server: Hosted, client: RawClient) -> None:
    await websocket(server, client)
    await client.send(text(b"x" * 65_537))
    await client.close_code()


async def stream(server: Hosted, client: RawClient) -> None:
    await client.send(request("GET", f"/sse?token={token('garbage')}"))
    await client.response_head()
    await client.event("connected")


Visit = Callable[[Hosted, RawClient], Awaitable[None]]


@pytest.mark.parametrize(
    "visit",
    [nothing, garbage, half_a_body, half_a_body_for_asgi, pipelined, bad_batch, expired,
     unauthenticated, websocket, half_a_frame, half_a_message, broken, stream],
    ids=lambda visit: visit.__name__,
)  # fmt: skip
async def test_what_ends_is_freed(sockets: Hosted, visit: Visit) -> None:
    async def visited() -> None:
        async with sockets.connected() as client:
            await visit(sockets, client)

    await visited()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(5):
            await visited()
        await until(lambda: not alive() - before, "that everything is freed")
    finally:
        gc.enable()
