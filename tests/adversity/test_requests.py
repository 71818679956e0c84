"""Requests that are odd or wrong as HTTP/1.1 (RFC 9112), through raw sockets.

What stock uvicorn decides by itself is asked of our own sockets only.
"""

from __future__ import annotations

import asyncio
import json
import time
from uuid import uuid4

import pytest

from tests.adversity.hosting import Hosted
from tests.adversity.raw import RawClient, handshake, request
from tests.adversity.test_bodies import API, GOOD, SEND
from tests.front_door import ORIGIN, READ_KEY, token

KEY_CONFLICTS = "Idempotency-Key: {}"


async def refused(client: RawClient, status: int, code: str) -> None:
    """Assert the answer, and that the connection ends behind it."""
    answer = await client.response()
    assert (answer.status, answer.code) == (status, code), answer
    assert answer.header("connection") == "close"
    assert answer.header("x-request-id")
    assert answer.header("content-type") == "application/json"
    assert await client.rest() == b""


# --- heads ---


async def test_a_head_without_end(sockets: Hosted) -> None:
    async with sockets.connected() as client:
        await client.send(b"POST /api/v1/notifications/send HTTP/1.1\r\n")
        for number in range(90):
            await client.send(b"X-%d: %b\r\n" % (number, b"x" * 200))
        await refused(client, 431, "HEAD_TOO_LARGE")


@pytest.mark.parametrize("piece", [1000, 4096, 20_000])
async def test_one_header_without_end(sockets: Hosted, piece: int) -> None:
    async with sockets.connected() as client:
        await client.send(b"GET /health HTTP/1.1\r\nX-Long: ")
        for _ in range(17_000 // piece + 1):
            await client.send(b"x" * piece)
            # Each piece is a read of its own at the server.
            await asyncio.sleep(0.001)
        await refused(client, 431, "HEAD_TOO_LARGE")


async def test_one_header_of_16_kib_in_one_piece(sockets: Hosted) -> None:
    async with sockets.connected() as client:
        await client.send(sockets.request("GET", "/health", f"X-Long: {'x' * 16_384}"))
        await refused(client, 431, "HEAD_TOO_LARGE")


async def test_a_path_without_end(sockets: Hosted) -> None:
    async with sockets.connected() as client:
        await client.send(b"GET /" + b"x" * 17_000)
        await refused(client, 431, "HEAD_TOO_LARGE")


@pytest.mark.parametrize(("headers", "status"), [(98, 200), (99, 431), (200, 431)])
@pytest.mark.parametrize("path", ["/health", SEND])
async def test_the_number_of_headers(sockets: Hosted, path: str, headers: int, status: int) -> None:
    # With the API key and Host, 98 are 100; a body adds its Content-Length.
    more = [f"X-{number}: x" for number in range(headers - (path == SEND))]
    async with sockets.connected() as client:
        body = GOOD if path == SEND else None
        method = "POST" if path == SEND else "GET"
        await client.send(sockets.request(method, path, *more, body=body))
        if status == 431:
            await refused(client, 431, "HEAD_TOO_LARGE")
        else:
            assert (await client.response()).status == 200


async def test_a_head_just_within_its_limit_is_taken(sockets: Hosted) -> None:
    async with sockets.connected() as client:
        for _ in range(3):
            await client.send(sockets.request("GET", "/health", f"X-Long: {'x' * 16_000}"))
            assert (await client.response()).status == 200


MALFORMED = [
    pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
    pytest.param(b"\x00" * 64, id="zeros"),
    pytest.param(b"hello\r\n\r\n", id="word"),
    pytest.param(b"GET / HTTP/9.9\r\n\r\n", id="version"),
    pytest.param(b"GET /\x01 HTTP/1.1\r\nHost: t\r\n\r\n", id="control character in the path"),
    pytest.param(b"GET / HTTP/1.1\r\nHost t\r\n\r\n", id="header without colon"),
    pytest.param(b"GET / HTTP/1.1\r\nX\x00Y: t\r\n\r\n", id="NUL in a name"),
    pytest.param(b"GET / HTTP/1.1\r\nX: a\x00b\r\n\r\n", id="NUL in a value"),
    pytest.param(b"GET / HTTP/1.1\r\nX : a\r\n\r\n", id="space before the colon"),
    pytest.param(b"get /health HTTP/1.1\r\nHost: t\r\n\r\n", id="lower-case method"),
    pytest.param(b"BREW /pot HTTP/1.1\r\nHost: t\r\n\r\n", id="unknown method"),
    pytest.param(b"CONNECT example.com:443 HTTP/1.1\r\nHost: t\r\n\r\n", id="CONNECT"),
    pytest.param(
        b"POST /x HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        id="Content-Length beside Transfer-Encoding",
    ),
    pytest.param(
        b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        id="Transfer-Encoding beside Content-Length",
    ),
    pytest.param(
        b"POST /x HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        id="two Content-Lengths",
    ),
    pytest.param(
        b"POST /x HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        id="two different Content-Lengths",
    ),
    pytest.param(b"POST /x HTTP/1.1\r\nContent-Length: 3, 3\r\n\r\nabc", id="a list of lengths"),
    pytest.param(b"POST /x HTTP/1.1\r\nContent-Length: -1\r\n\r\n", id="negative length"),
    pytest.param(b"POST /x HTTP/1.1\r\nContent-Length: +3\r\n\r\nabc", id="signed length"),
    pytest.param(b"POST /x HTTP/1.1\r\nContent-Length: 0x3\r\n\r\nabc", id="hexadecimal length"),
    pytest.param(b"POST /x HTTP/1.1\r\nContent-Length: 1" + b"0" * 30 + b"\r\n\r\n", id="10^30"),
    pytest.param(b"POST /x HTTP/1.1\r\nContent-Length:\r\n\r\n", id="empty length"),
    pytest.param(
        b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked, gzip\r\n\r\n", id="chunked not last"
    ),
    pytest.param(b"POST /x HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", id="unknown coding"),
    pytest.param(
        b"POST /x HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        id="unknown coding before chunked",
    ),
    pytest.param(b"CONNECT /x HTTP/1.1\r\nHost: t\r\n\r\n", id="CONNECT to a path"),
    pytest.param(b"CONNECT /health HTTP/1.1\r\nHost: t\r\n\r\n", id="CONNECT to another"),
    pytest.param(b"GET /health HTTP/1.1\r\nHost: t\r\nHost: t\r\n\r\n", id="two Hosts"),
    pytest.param(
        b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\n",
        id="chunked twice",
    ),
    pytest.param(b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", id="bad chunk"),
]


@pytest.mark.parametrize("data", MALFORMED)
@pytest.mark.parametrize("path", [b"/x", SEND.encode()])
async def test_what_is_no_valid_request_is_a_400_and_the_end(
    sockets: Hosted, data: bytes, path: bytes
) -> None:
    async with sockets.connected() as client:
        if b"Host" not in data:
            data = data.replace(b" HTTP/1.1\r\n", b" HTTP/1.1\r\nHost: t\r\n")
        await client.send(data.replace(b"/x ", path + b" "))
        await refused(client, 400, "BAD_REQUEST")


@pytest.mark.parametrize("target", ["/health", SEND, f"{SEND}?x=1", "/sse", "/ws"])
async def test_without_a_host_it_is_no_request_of_1_1(sockets: Hosted, target: str) -> None:
    whole = sockets.request("POST" if SEND in target else "GET", target, body=GOOD)
    if target == "/sse":
        whole = request("GET", f"/sse?token={token('u1')}")
    if target == "/ws":
        whole = handshake(f"/ws?token={token('u1')}")
    async with sockets.connected() as client:
        await client.send(whole.replace(b"Host: test\r\n", b""))
        await refused(client, 400, "BAD_REQUEST")


async def test_where_a_websocket_is_it_is_said_so(server: Hosted) -> None:
    answer = await server.call("GET", "/ws")
    assert (answer.status, answer.header("upgrade")) == (426, "websocket")
    if server.lane == "sockets":
        assert "WebSocket" in answer.json["error"]["message"]
    assert (await server.call("POST", "/ws", b"")).status == 405


async def test_a_length_that_is_huge_but_a_number_is_a_413(server: Hosted) -> None:
    async with server.connected() as client:
        await client.send(server.request("POST", SEND, "Content-Length: 1000000000000000"))
        answer = await client.response()
        assert (answer.status, answer.code) == (413, "PAYLOAD_TOO_LARGE")
        assert answer.header("connection") == "close"
        assert await client.rest() == b""


# --- time ---


async def ended(client: RawClient) -> bytes:
    """What came until the server ended the connection, which it does in time."""
    began = time.monotonic()
    told = await client.rest()
    assert time.monotonic() - began < 5
    return told


async def test_a_socket_that_says_nothing_is_closed(hasty: Hosted) -> None:
    async with hasty.connected() as client:
        assert await ended(client) == b""


async def test_a_head_that_trickles_is_a_408(hasty: Hosted) -> None:
    async with hasty.connected() as client:

        async def trickle() -> None:
            while True:
                client.writer.write(b"x")
                await asyncio.sleep(0.05)

        await client.send(b"GET /health HTTP/1.1\r\nX-Slow: ")
        task = asyncio.create_task(trickle())
        try:
            await refused(client, 408, "REQUEST_TIMEOUT")
        finally:
            task.cancel()


@pytest.mark.parametrize("path", [SEND, f"{SEND}?x=1"], ids=["fast lane", "ASGI"])
async def test_a_body_that_trickles_is_a_408(hasty: Hosted, path: str) -> None:
    async with hasty.connected() as client:

        async def trickle() -> None:
            while True:
                client.writer.write(b" ")
                await asyncio.sleep(0.05)

        await client.send(hasty.request("POST", path, "Content-Length: 60000"), b"{")
        task = asyncio.create_task(trickle())
        try:
            await refused(client, 408, "REQUEST_TIMEOUT")
        finally:
            task.cancel()


async def test_a_connection_that_is_kept_alive_for_nothing_is_closed(hasty: Hosted) -> None:
    for path in (SEND, f"{SEND}?x=1"):
        async with hasty.connected() as client:
            await client.send(hasty.request("POST", path, body=GOOD))
            assert (await client.response()).status == 200
            assert await ended(client) == b""


# --- bodies ---


def chunked(*chunks: bytes, trailer: bytes = b"") -> bytes:
    """A body in chunks (RFC 9112, section 7.1)."""
    coded = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return coded + b"0\r\n" + trailer + b"\r\n"


CHUNKED = "Transfer-Encoding: chunked"


async def test_chunked_bodies(server: Hosted) -> None:
    async with server.connected() as client:
        for body in (
            chunked(GOOD),
            chunked(*(GOOD[at : at + 1] for at in range(len(GOOD)))),
            chunked(GOOD, trailer=b"X-Trailer: yes\r\n"),
            b"%x;ext=1\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD),
        ):
            await client.send(server.request("POST", SEND, CHUNKED), body)
            assert (await client.response()).status == 200


async def test_a_chunked_body_over_its_limit_is_a_413(server: Hosted) -> None:
    async with server.connected() as client:
        body = chunked(*[b" " * 8192] * 9)
        await client.send(server.request("POST", SEND, CHUNKED), body)
        answer = await client.response()
        assert (answer.status, answer.code) == (413, "PAYLOAD_TOO_LARGE")


async def test_a_chunked_body_without_end_is_cut_off(server: Hosted) -> None:
    async with server.connected() as client:
        await client.send(server.request("POST", SEND, CHUNKED))

        async def flood() -> None:
            while True:
                await client.send(b"10000\r\n" + b" " * 65536 + b"\r\n")

        task = asyncio.create_task(flood())
        told = await client.rest()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # Some megabytes late it is told why, unless the reset of what is still coming is faster.
        assert told == b"" or b" 413 " in told


async def test_a_trailer_without_end_is_a_431(sockets: Hosted) -> None:
    async with sockets.connected() as client:
        await client.send(sockets.request("POST", SEND, CHUNKED), b"0\r\nX-Trailer: ")

        async def flood() -> None:
            while True:
                await client.send(b"x" * 8192)

        task = asyncio.create_task(flood())
        told = await client.rest()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # The answer may be lost to the reset of what is still coming; the end is not.
        assert told == b"" or b" 431 " in told


async def test_expect_100_continue(server: Hosted) -> None:
    async with server.connected() as client:
        for _ in range(2):
            expecting = server.request(
                "POST", SEND, "Expect: 100-continue", f"Content-Length: {len(GOOD)}"
            )
            await client.send(expecting)
            assert (await client.response()).status == 100
            await client.send(GOOD)
            assert (await client.response()).status == 200


async def test_who_expects_is_refused_before_he_sends(server: Hosted) -> None:
    async with server.connected() as client:
        await client.send(
            server.request("POST", SEND, "Expect: 100-continue", "Content-Length: 100000")
        )
        assert (await client.response()).status == 413
        assert await client.rest() == b""


@pytest.mark.parametrize(
    ("key", "status"), [("X-API-Key: a-stranger", 401), (f"X-API-Key: {READ_KEY}", 403)]
)
@pytest.mark.parametrize("length", ["Content-Length: 4000000", "Transfer-Encoding: chunked"])
async def test_a_strangers_large_body_is_refused_before_it_comes(
    server: Hosted, length: str, key: str, status: int
) -> None:
    async with server.connected() as client:
        await client.send(
            f"POST {API}/send-to-users HTTP/1.1\r\nHost: x\r\n{key}\r\n{length}\r\n\r\n".encode()
        )
        answer = await client.response()
        assert answer.status == status
        assert answer.header("x-request-id")
        assert await client.rest() == b""


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (SEND, "X-API-Key: a-stranger"),
        (f"{SEND}?x=1", "X-API-Key: a-stranger"),
        (SEND, f"X-API-Key: {READ_KEY}"),
        ("/api/v1/acks", "Authorization: Bearer a-stranger"),
        ("/api/v1/acks", "X-Nothing: at all"),
    ],
)
async def test_a_strangers_small_body_is_not_taken_in(server: Hosted, path: str, key: str) -> None:
    async with server.connected() as client:
        await client.send(request("POST", path, key, "Content-Length: 900"), b"{")
        answer = await client.response()
        assert answer.status == (403 if READ_KEY in key else 401)
        assert answer.header("connection") == "close"
        assert answer.header("x-request-id")
        assert await client.rest() == b""


async def test_in_the_fast_lane_it_is_not_even_waited_for(sockets: Hosted) -> None:
    async with sockets.connected() as client:
        await client.send(request("POST", SEND, "X-API-Key: a-stranger", "Content-Length: 900"))
        await refused(client, 401, "UNAUTHORIZED")


async def test_who_may_call_sends_his_body_when_he_likes(server: Hosted) -> None:
    ack = json.dumps({"notification_id": str(uuid4())}).encode()
    bearer = f"Authorization: Bearer {token('u1')}"
    async with server.connected() as client:
        for path, body, headers in (
            (SEND, GOOD, ()),
            (f"{SEND}?x=1", GOOD, ()),
            ("/api/v1/acks", ack, (bearer,)),
        ):
            length = f"Content-Length: {len(body)}"
            await client.send(server.request("POST", path, length, *headers))
            # In a read of its own at the server.
            await server.serves()
            await client.send(body[:1])
            await server.serves()
            await client.send(body[1:])
            assert (await client.response()).status == 200


async def test_a_request_in_single_bytes(server: Hosted) -> None:
    async with server.connected() as client:
        for byte in server.request("POST", SEND, body=GOOD):
            client.writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await client.response()).status == 200


# --- several requests on one connection ---


async def test_pipelined_requests_are_answered_in_order(server: Hosted) -> None:
    """Each lane before each other: fast, ASGI, refused by the API, unknown path, GET."""
    async with server.connected() as client:
        paths = [SEND, f"{SEND}?x=1", "/nowhere", SEND, SEND, "/api/v1/templates", SEND]
        requests = []
        for number in range(70):
            path = paths[number % len(paths)]
            requests.append(server.request("POST", path, f"X-Request-ID: {number}", body=GOOD))
        await client.send(*requests)
        statuses = []
        for number in range(70):
            answer = await client.response()
            assert answer.header("x-request-id") == str(number)
            statuses.append(answer.status)
        assert statuses == [200, 200, 404, 200, 200, 422, 200] * 10


async def test_a_slow_request_before_fast_ones(server: Hosted) -> None:
    """The first waits for another connection's answer under the same idempotency key."""
    held = asyncio.Event()
    release = asyncio.Event()
    dispatch = server.notifyd.endpoints
    send = next(each for each in dispatch if each.path == SEND)
    handler = send.handler
    loop = asyncio.get_running_loop()

    def slow(request: object) -> object:
        if b'"slow"' not in getattr(request, "body", b""):
            return handler(request)  # type: ignore[arg-type]  # it is a Request

        async def later() -> object:
            loop.call_soon_threadsafe(held.set)
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(release.wait(), loop))
            return handler(request)  # type: ignore[arg-type]  # as above

        return later()

    send.handler = slow  # type: ignore[assignment]  # the test's own
    try:
        slow_body = GOOD.replace(b'"e"', b'"slow"')
        async with server.connected() as client:
            await client.send(
                server.request("POST", SEND, "X-Request-ID: slow", body=slow_body),
                server.request("POST", SEND, "X-Request-ID: fast", body=GOOD),
                server.request("POST", f"{SEND}?x=1", "X-Request-ID: asgi", body=GOOD),
            )
            await asyncio.wait_for(held.wait(), 10)
            # Others are served meanwhile.
            assert (await server.call("POST", SEND, GOOD)).status == 200
            # More comes while the first is at work, in a read of its own.
            await client.send(server.request("POST", SEND, "X-Request-ID: last", body=GOOD))
            release.set()
            for name in ("slow", "fast", "asgi", "last"):
                answer = await client.response()
                assert (answer.status, answer.header("x-request-id")) == (200, name)
    finally:
        release.set()
        send.handler = handler


async def test_a_client_that_leaves_while_its_request_is_at_work(server: Hosted) -> None:
    async with server.connected() as client:
        await client.send(server.request("POST", SEND, "Content-Length: 100"), b"{")
    async with server.connected() as client:
        await client.send(server.request("POST", f"{SEND}?x=1", "Content-Length: 100"), b"{")
    async with server.connected() as client:
        await client.send(*[server.request("POST", f"{SEND}?x=1", body=GOOD)] * 50)


@pytest.mark.parametrize("path", [SEND, f"{SEND}?x=1"])
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
async def test_connection_close(server: Hosted, path: str, version: str) -> None:
    headers = ["Connection: close"] if version == "HTTP/1.1" else []
    async with server.connected() as client:
        await client.send(server.request("POST", path, *headers, body=GOOD, version=version))
        answer = await client.response()
        assert answer.status == 200
        assert answer.header("connection") == "close"
        assert await client.rest() == b""


async def test_what_is_pipelined_behind_a_close_is_not_answered(sockets: Hosted) -> None:
    async with sockets.connected() as client:
        await client.send(
            sockets.request("POST", SEND, "Connection: close", body=GOOD),
            sockets.request("POST", SEND, body=GOOD),
        )
        assert (await client.response()).status == 200
        assert await client.rest() == b""


async def test_garbage_behind_a_request(sockets: Hosted) -> None:
    async with sockets.connected() as client:
        await client.send(sockets.request("POST", SEND, body=GOOD) + b"garbage\r\n\r\n")
        assert (await client.response()).status == 200
        await refused(client, 400, "BAD_REQUEST")


async def test_nothing_is_answered_within_a_stream(sockets: Hosted) -> None:
    async with sockets.connected() as client:
        await client.send(
            request("GET", f"/sse?token={token('stream')}"),
            sockets.request("GET", "/health"),
            sockets.request("POST", SEND, body=GOOD.replace(b"u1", b"stream")),
        )
        assert (await client.response_head()).status == 200
        await client.event("connected")
        await client.send(sockets.request("GET", "/health"))
        sent = await sockets.call("POST", SEND, GOOD.replace(b"u1", b"stream"))
        assert sent.json["delivered_to"] == 1
        seen = b""
        while b"event: notification" not in seen:
            seen += await client.line()
        assert b"HTTP/1.1" not in seen
        assert b"healthy" not in seen


async def test_a_request_within_a_body_is_not_taken_for_one(server: Hosted) -> None:
    inner = server.request("POST", SEND, "X-Request-ID: smuggled", body=GOOD)
    async with server.connected() as client:
        await client.send(
            server.request("POST", SEND, "X-Request-ID: outer", body=inner),
            server.request("POST", SEND, "X-Request-ID: next", body=GOOD),
        )
        outer = await client.response()
        assert (outer.status, outer.header("x-request-id")) == (400, "outer")
        assert (await client.response()).header("x-request-id") == "next"


# --- methods and targets ---


async def test_absolute_form(server: Hosted) -> None:
    """RFC 9112, section 3.2.2: a server must accept it."""
    async with server.connected() as client:
        await client.send(server.request("POST", f"http://test{SEND}", body=GOOD))
        assert (await client.response()).status == 200
        await client.send(server.request("GET", "http://test/health"))
        assert (await client.response()).status == 200


async def test_head_and_options(server: Hosted) -> None:
    async with server.connected() as client:
        await client.send(server.request("GET", "/health"))
        whole = await client.response()
        await client.send(server.request("HEAD", "/health"))
        answer = await client.response(head=True)
        assert answer.status == 200
        assert int(answer.header("content-length") or 0) >= len(whole.body) - 8
        await client.send(server.request("HEAD", SEND))
        assert (await client.response(head=True)).status == 405
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            await client.send(server.request(method, SEND))
            answer = await client.response()
            assert (answer.status, answer.code) == (405, "METHOD_NOT_ALLOWED")
            assert answer.header("allow") == "OPTIONS, POST"
        await client.send(server.request("OPTIONS", SEND))
        answer = await client.response()
        assert (answer.status, answer.header("allow")) == (204, "OPTIONS, POST")


async def test_what_is_asked_of_sse_but_get(server: Hosted) -> None:
    async with server.connected() as client:
        await client.send(server.request("HEAD", f"/sse?token={token()}"))
        assert (await client.response(head=True)).status == 405
        await client.send(server.request("POST", f"/sse?token={token()}", body=b"{}"))
        assert (await client.response()).code == "METHOD_NOT_ALLOWED"
        # A page that opens its stream with fetch and an Authorization header asks first.
        await client.send(
            server.request(
                "OPTIONS",
                "/sse",
                f"Origin: {ORIGIN}",
                "Access-Control-Request-Method: GET",
                "Access-Control-Request-Headers: authorization",
            )
        )
        answer = await client.response()
        assert answer.status == 204
        assert answer.header("access-control-allow-origin") == ORIGIN
        assert answer.header("access-control-allow-headers") == "authorization"


@pytest.mark.parametrize(
    "target",
    ["//", "/%2e%2e/etc/passwd", "/api/v1/notifications/send/", "/API/V1/notifications/send",
     "/ws/", "/?x", "/%", "/api//v1", "/demo/../health", "/\xff"],
)  # fmt: skip
async def test_odd_targets(server: Hosted, target: str) -> None:
    async with server.connected() as client:
        await client.send(server.request("GET", target))
        answer = await client.response()
        assert answer.status in (400, 404, 405), answer
        if server.lane == "sockets":
            assert answer.code


async def test_upgrades_that_are_none(sockets: Hosted) -> None:
    """Another protocol's upgrade is ignored (RFC 9110, section 7.8), and the request answered."""
    upgrade = ("Connection: Upgrade", "Upgrade: h2c")
    async with sockets.connected() as client:
        await client.send(sockets.request("GET", "/health", *upgrade))
        assert (await client.response()).status == 200
    async with sockets.connected() as client:
        await client.send(sockets.request("POST", SEND, *upgrade, body=GOOD))
        assert (await client.response()).status == 200
    # … with its body, in a segment of its own too, which is no request of its own
    inner = sockets.request("POST", SEND, "X-Request-ID: smuggled", body=GOOD)
    async with sockets.connected() as client:
        await client.send(
            sockets.request("POST", f"{SEND}?x=1", *upgrade, f"Content-Length: {len(inner)}")
        )
        await asyncio.sleep(0.01)
        await client.send(inner)
        assert (await client.response()).code == "BAD_REQUEST"
        await client.send(sockets.request("POST", SEND, "X-Request-ID: next", body=GOOD))
        assert (await client.response()).header("x-request-id") == "next"
    async with sockets.connected() as client:
        await client.send(*[sockets.request("GET", "/health", *upgrade)] * 5000)
        # The first may be at work, and then nothing can be told of the others.
        await client.rest()
    async with sockets.connected() as client:
        await client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert b" 400 " in await client.rest()


async def test_a_token_as_an_idempotency_key_or_request_id_is_not_echoed_unchecked(
    server: Hosted,
) -> None:
    async with server.connected() as client:
        await client.send(server.request("POST", SEND, f"X-Request-ID: {'x' * 129}", body=GOOD))
        echoed = (await client.response()).header("x-request-id")
        assert echoed is not None
        assert len(echoed) == 36
        await client.send(server.request("POST", SEND, "X-Request-ID: a\tb", body=GOOD))
        assert (await client.response()).header("x-request-id") != "a\tb"
        await client.send(server.request("POST", SEND, f"Idempotency-Key: {'k' * 257}", body=GOOD))
        assert (await client.response()).status == 422
        await client.send(server.request("POST", SEND, "X-API-Key: wrong", body=GOOD))
        assert json.loads((await client.response()).body)
