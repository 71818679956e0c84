"""From ASGI to endpoints and back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from notifyd.api.routes import MAX_DISCARDED_BYTES
from tests.unit.api_server import ADMIN, PUBLISH, ApiServer, error_of

EVENT = b'{"event_type":"a","payload":1}'


def part(body: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


async def call(
    server: ApiServer,
    *messages: dict[str, Any],
    path: str = "/api/v1/notifications/broadcast",
    headers: Iterable[tuple[bytes, bytes]] = (),
    endless: bool = False,
) -> tuple[int, dict[bytes, bytes], bytes] | None:
    """One POST with these ASGI messages; None where nothing was answered."""
    incoming = list(messages)
    sent: list[Any] = []

    async def receive() -> Any:
        if not incoming and endless:
            await asyncio.Event().wait()
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"x-api-key", PUBLISH.encode()), *headers],
        "client": None,
    }
    await server.app(scope, receive, send)
    if not sent:
        return None
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


async def test_a_body_comes_in_parts() -> None:
    answer = await call(ApiServer(), part(EVENT[:5], more=True), part(EVENT[5:]))
    assert answer is not None
    assert answer[0] == 200


@pytest.mark.parametrize(
    ("headers", "messages"),
    [
        ([(b"content-length", b"65537"), (b"expect", b"100-continue")], []),
        ([(b"content-length", b"%d" % (65536 + MAX_DISCARDED_BYTES + 1))], []),
        ([], [part(b"x" * (65536 + MAX_DISCARDED_BYTES), more=True), part(b"x", more=True)]),
    ],
)
async def test_a_body_over_its_limit_is_refused_before_its_end(
    headers: list[tuple[bytes, bytes]], messages: list[dict[str, Any]]
) -> None:
    answer = await call(ApiServer(), *messages, headers=headers)
    assert answer is not None
    status, answered, body = answer
    assert status == 413
    assert b"PAYLOAD_TOO_LARGE" in body
    assert answered[b"connection"] == b"close"
    assert answered[b"x-request-id"]


async def test_what_is_somewhat_too_large_is_read_so_that_its_sender_reads_the_answer() -> None:
    messages = [part(b"x" * 65536, more=True), part(b"x", more=True), part(b"x")]
    answer = await call(ApiServer(), *messages, headers=[(b"content-length", b"65538")])
    assert answer is not None
    assert answer[0] == 413


@pytest.mark.parametrize(
    ("path", "limit"), [("/batch", 1_048_576), ("/send-to-users", 4_194_304), ("/send", 65_536)]
)
async def test_each_call_has_its_own_limit(path: str, limit: int) -> None:
    server = ApiServer()
    path = "/api/v1/notifications" + path
    fits = await call(server, part(b" " * limit), path=path)
    over = await call(server, part(b" " * (limit + 1)), path=path)
    assert fits is not None
    assert over is not None
    assert (fits[0], over[0]) == (400, 413)


async def test_a_body_that_does_not_end_in_time() -> None:
    server = ApiServer(body_seconds=0.01)
    answer = await call(server, part(b"x", more=True), endless=True)
    assert answer is not None
    status, headers, body = answer
    assert status == 408
    assert b"REQUEST_TIMEOUT" in body
    assert headers[b"connection"] == b"close"


async def test_a_client_that_goes_away_is_told_nothing() -> None:
    gone = {"type": "http.disconnect"}
    assert await call(ApiServer(), part(b"x", more=True), gone) is None


async def test_nothing_under_a_path() -> None:
    server = ApiServer()
    for path in (
        "/",
        "/api/v1",
        "/health/",
        "/api/v1/users//connections",
        "/api/v1/cluster",
    ):
        response = await server.request("GET", path)
        assert response.status_code == 404
        assert error_of(response)["code"] == "NOT_FOUND"


async def test_a_method_that_a_path_does_not_have() -> None:
    response = await ApiServer().request("PATCH", "/api/v1/templates/a")
    assert response.status_code == 405
    assert error_of(response)["code"] == "METHOD_NOT_ALLOWED"
    assert response.headers["Allow"] == "DELETE, GET, HEAD, OPTIONS, PUT"
    response = await ApiServer().request("GET", "/api/v1/notifications/send")
    assert response.headers["Allow"] == "OPTIONS, POST"


async def test_options_without_a_browser() -> None:
    response = await ApiServer().request("OPTIONS", "/health", key=None)
    assert response.status_code == 204
    assert response.headers["Allow"] == "GET, HEAD, OPTIONS"


async def test_head_is_get_without_its_body() -> None:
    server = ApiServer()
    head = await server.request("HEAD", "/health", key=None)
    get = await server.request("GET", "/health", key=None)
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["Content-Length"] == str(len(get.content))


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("a%2Fb", "a/b"),
        ("%C3%A9", "é"),
        ("a%20b", "a b"),
        ("100%25", "100%"),
        ("a+b", "a+b"),
        ("a%252Fb", "a%2Fb"),
        ("%2E%2E", ".."),
        ("connections", "connections"),
    ],
)
async def test_user_ids_are_percent_encoded_in_paths(written: str, name: str) -> None:
    server = ApiServer()
    server.connect(name)
    url = httpx.URL("http://notifyd.test").copy_with(
        raw_path=f"/api/v1/users/{written}/subscriptions".encode()
    )
    transport = httpx.ASGITransport(server.app)
    async with httpx.AsyncClient(transport=transport) as client:
        response = await client.get(url, headers={"X-API-Key": ADMIN})
    assert response.json() == {"user_id": name, "connection_count": 1, "subscriptions": []}


@pytest.mark.parametrize(
    ("written", "status"),
    [("%", 400), ("%4", 400), ("%zz", 400), ("%FF", 400), ("%00", 422), ("x" * 257, 422)],
)
async def test_names_in_paths_that_are_none(written: str, status: int) -> None:
    server = ApiServer()
    url = httpx.URL("http://notifyd.test").copy_with(
        raw_path=f"/api/v1/users/{written}/subscriptions".encode()
    )
    transport = httpx.ASGITransport(server.app)
    async with httpx.AsyncClient(transport=transport) as client:
        response = await client.get(url, headers={"X-API-Key": ADMIN})
    assert response.status_code == status


@pytest.mark.parametrize("prefix", ["/realtime", "/réal"])
async def test_a_mounted_application_finds_its_paths(prefix: str) -> None:
    server = ApiServer()
    server.connect("a/b")
    transport = httpx.ASGITransport(Starlette(routes=[Mount(prefix, app=server.app)]))
    async with httpx.AsyncClient(transport=transport, base_url="http://notifyd.test") as client:
        headers = {"X-API-Key": ADMIN}
        found = await client.get(f"{prefix}/api/v1/users/a%2Fb/subscriptions", headers=headers)
        health = await client.get(f"{prefix}/health")
        missing = await client.get(f"{prefix}/", headers=headers)
    assert found.json()["user_id"] == "a/b"
    assert health.status_code == 200
    assert missing.status_code == 404


async def test_without_a_raw_path_the_path_will_do() -> None:
    answer = await call(ApiServer(), part(EVENT))
    assert answer is not None
    assert answer[0] == 200


async def test_a_websocket_to_the_api_is_refused() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    await ApiServer().app({"type": "websocket"}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1000}]
