"""Callers, clients and connections that come too often, through the front door of both servers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.requests import HTTPConnection
from websockets.exceptions import InvalidStatus

from notifyd.identity import Identity
from tests.conftest import StartServer
from tests.front_door import (
    ADMIN_KEY,
    ORIGIN,
    PUBLISH_KEY,
    READ_KEY,
    SECRET,
    Host,
    Message,
    StillClock,
    token,
    user,
)

PUBLISH = "/api/v1/notifications"
EVENT = {"target": user("u1"), "event_type": "a", "payload": 1}
KEYS = (
    {"name": "admin", "key": ADMIN_KEY, "scopes": ["admin"]},
    {"name": "shop", "key": PUBLISH_KEY, "scopes": ["publish"], "rate": "3/hour"},
    {"name": "monitor", "key": READ_KEY, "scopes": ["read"]},
)
NO_KEYS = {"api_keys": KEYS[:1], "jwt_secret": SECRET}


async def limited(start: StartServer, **given: Any) -> Host:
    """A server whose clock stands still, and whose limits are the test's."""
    ratelimit = {"enabled": True, **given.pop("ratelimit", {})}
    return await start(clock=StillClock(), ratelimit=ratelimit, **given)


def told(response: httpx.Response) -> tuple[int, int, int]:
    """What an answer says of the bucket: limit, remaining, and in how many seconds it is full."""
    return (
        int(response.headers["X-RateLimit-Limit"]),
        int(response.headers["X-RateLimit-Remaining"]),
        int(response.headers["X-RateLimit-Reset"]),
    )


def refused(response: httpx.Response) -> int:
    """After how many seconds one who came too often may come again."""
    assert response.status_code == 429, response.text
    error = response.json()["error"]
    assert (error["code"], error["message"]) == ("RATE_LIMITED", "Too many requests.")
    return int(response.headers["Retry-After"])


async def counted(host: Host, kind: str) -> tuple[float, float]:
    metrics = host.notifyd.metrics
    return (
        metrics.ratelimit_allowed_total.labels(kind).value,
        metrics.ratelimit_denied_total.labels(kind).value,
    )


# --- requests -------------------------------------------------------------------------------------


async def test_where_limits_are_off_nothing_is_said_of_them(host: Host) -> None:
    for _ in range(300):
        response = await host.get("/api/v1/channels")
        assert response.status_code == 200
    assert not [name for name in response.headers if "ratelimit" in name]
    document = (await host.get("/openapi.json")).json()
    assert "429" not in document["paths"]["/api/v1/channels"]["get"]["responses"]


async def test_requests_by_api_key(start: StartServer) -> None:
    host = await limited(start, ratelimit={"http_requests_per_second": 2, "http_burst": 5})
    now = int(host.clock())
    for left in (4, 3, 2, 1, 0):
        response = await host.post(PUBLISH, EVENT)
        assert response.status_code == 200
        limit, remaining, reset = told(response)
        assert (limit, remaining) == (5, left)
        assert 0 <= reset - now <= 4
    response = await host.post(PUBLISH, EVENT)
    assert refused(response) == 1
    assert told(response)[:2] == (5, 0)
    assert refused(await host.get("/api/v1/channels")) == 1
    assert (await host.get("/api/v1/channels", key=READ_KEY)).status_code == 200
    host.clock.advance(0.5)
    assert (await host.post(PUBLISH, EVENT)).status_code == 200
    assert refused(await host.post(PUBLISH, EVENT)) == 1
    host.clock.advance(100)
    assert told(await host.get("/api/v1/channels"))[1] == 4
    assert await counted(host, "http") == (8, 3)


async def test_a_key_with_a_rate_of_its_own(start: StartServer) -> None:
    host = await limited(start, auth={"api_keys": KEYS})
    for left in (2, 1, 0):
        response = await host.post(PUBLISH, EVENT, key=PUBLISH_KEY)
        assert response.status_code == 200
        assert told(response)[:2] == (3, left)
    assert refused(await host.post(PUBLISH, EVENT, key=PUBLISH_KEY)) == 1200
    bearer = {"Authorization": f"Bearer {PUBLISH_KEY}"}
    assert refused(await host.post(PUBLISH, EVENT, key=None, headers=bearer)) == 1200
    assert told(await host.post(PUBLISH, EVENT))[:2] == (200, 199)


@pytest.mark.parametrize("junk_first", [True, False])
@pytest.mark.parametrize(
    ("name", "junk", "value"),
    [
        ("X-API-Key", "junk", PUBLISH_KEY),
        ("Authorization", "Bearer junk", f"Bearer {PUBLISH_KEY}"),
    ],
)
async def test_no_key_beside_another_escapes_its_rate(
    start_on: StartServer, name: str, junk: str, value: str, junk_first: bool
) -> None:
    host = await limited(start_on, auth={"api_keys": KEYS})
    given = [(name, junk), (name, value)]
    headers = given if junk_first else given[::-1]
    body = json.dumps(EVENT)
    for path, content in ((PUBLISH, body), (f"{PUBLISH}/batch", " " * 20_000 + body)):
        for _ in range(2):
            response = await host.http.post(path, content=content, headers=headers)
            assert response.status_code == 401
            assert told(response)[0] == 200  # the address's
    assert told(await host.post(PUBLISH, EVENT, key=PUBLISH_KEY))[:2] == (3, 2)


async def test_both_lanes_take_from_one_bucket_and_answer_alike(start_on: StartServer) -> None:
    host = await limited(
        start_on, ratelimit={"http_requests_per_second": 1, "http_burst": 4}, auth=NO_KEYS
    )
    answers = []
    for path in (PUBLISH, f"{PUBLISH}?x=1") * 3:
        response = await host.post(path, EVENT, headers={"X-Request-ID": "mine"})
        headers = dict(response.headers)
        headers.pop("date")
        answers.append((response.status_code, told(response)[1], headers))
    assert [answer[:2] for answer in answers] == [
        *((200, left) for left in (3, 2, 1, 0)),
        (429, 0),
        (429, 0),
    ]
    assert answers[4] == answers[5]
    assert set(answers[0][2]) == set(answers[1][2])


ASKED: list[tuple[str, dict[str, Any]]] = [
    ("a key that is not known", {"path": "/api/v1/channels", "key": "a-key-that-is-not-known"}),
    ("no key", {"path": "/api/v1/channels", "key": None}),
    ("nothing there", {"path": "/nothing", "key": None}),
    ("another method", {"path": "/api/v1/channels", "key": None, "method": "PUT"}),
    ("a body too large", {"path": PUBLISH, "key": None, "method": "POST", "content": b"x" * 70000}),
    ("a user", {"path": "/api/v1/acks", "key": None, "method": "POST", "content": b"{}"}),
    ("anybody", {"path": "/openapi.json", "key": None}),
]


async def test_without_a_key_that_is_known_it_is_by_address(start: StartServer) -> None:
    burst = len(ASKED) + 1
    host = await limited(start, ratelimit={"http_requests_per_second": 1, "http_burst": burst})
    await host.get("/openapi.json", key=None)
    for number, (_, asked) in enumerate(ASKED):
        response = await host.request(**{"method": "GET", **asked})
        assert response.status_code != 429
        assert told(response)[:2] == (burst, burst - 2 - number)
    for what, asked in ASKED:
        response = await host.request(**{"method": "GET", **asked})
        assert refused(response) == 1, what
        assert told(response)[1] == 0
    assert (await host.get("/api/v1/channels")).status_code == 200


async def test_a_stranger_s_large_body_counts_in_both_lanes(start_on: StartServer) -> None:
    host = await limited(start_on, ratelimit={"http_requests_per_second": 1, "http_burst": 2})
    body = {**EVENT, "payload": "x" * 30_000}
    for path, left in ((PUBLISH, 1), (f"{PUBLISH}?x=1", 0)):
        response = await host.post(path, body, key="a-key-that-is-not-known")
        assert (response.status_code, told(response)[1]) == (401, left)
    for path in (PUBLISH, f"{PUBLISH}?x=1"):
        assert refused(await host.post(path, body, key="a-key-that-is-not-known")) == 1
    assert (await host.post(PUBLISH, body)).status_code == 200


async def test_a_key_on_a_route_that_is_open_is_taken_for_its_caller(start: StartServer) -> None:
    host = await limited(start, ratelimit={"http_requests_per_second": 1, "http_burst": 1})
    assert (await host.get("/metrics", key=READ_KEY)).status_code == 200
    assert (await host.get("/metrics", key=None)).status_code == 200
    assert refused(await host.get("/metrics", key=READ_KEY)) == 1


async def test_health_checks_are_not_counted(start: StartServer) -> None:
    host = await limited(start, ratelimit={"http_requests_per_second": 1, "http_burst": 1})
    for path in ("/health", "/health/live", "/health/ready") * 3:
        response = await host.get(path, key=None)
        assert response.status_code == 200
        assert "X-RateLimit-Limit" not in response.headers
    assert await counted(host, "http") == (0, 0)


async def test_behind_a_proxy_that_is_trusted_clients_are_told_apart(start: StartServer) -> None:
    host = await limited(start, ratelimit={"http_requests_per_second": 1, "http_burst": 1})
    for client in ("198.51.100.1", "198.51.100.2", "2001:db8::1"):
        headers = {"X-Forwarded-For": f"203.0.113.9, {client}"}
        assert (await host.get("/openapi.json", key=None, headers=headers)).status_code == 200
        assert refused(await host.get("/openapi.json", key=None, headers=headers)) == 1
    same_network = {"X-Forwarded-For": "2001:db8::2"}
    assert refused(await host.get("/openapi.json", key=None, headers=same_network)) == 1


async def test_what_somebody_says_of_himself_makes_nobody_else_of_him(
    start_on: StartServer,
) -> None:
    # Stock uvicorn has proxies of its own that it trusts.
    host = await limited(
        start_on,
        ratelimit={
            "http_requests_per_second": 1,
            "http_burst": 1,
            "ws_connections_per_minute": 1,
        },
        server={"forwarded_allow_ips": []},
    )
    first, second = {"X-Forwarded-For": "198.51.100.1"}, {"X-Forwarded-For": "198.51.100.2"}
    assert (await host.get("/openapi.json", key=None, headers=first)).status_code == 200
    assert refused(await host.get("/openapi.json", key=None, headers=second)) == 1
    await host.websocket(headers=first)
    assert (await status_of_websocket(host, headers=second))[0] == 429


async def test_a_page_may_read_what_is_said_of_its_rate(start: StartServer) -> None:
    host = await limited(start)
    response = await host.get("/api/v1/channels", headers={"Origin": ORIGIN})
    exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"} <= set(exposed)


async def test_an_answer_that_is_repeated_has_the_bucket_as_it_is_now(start: StartServer) -> None:
    host = await limited(start, ratelimit={"http_burst": 2})
    headers = {"Idempotency-Key": "k"}
    first = await host.post(PUBLISH, EVENT, headers=headers)
    again = await host.post(PUBLISH, EVENT, headers=headers)
    assert again.headers["Idempotent-Replay"] == "true"
    assert (told(first)[1], told(again)[1]) == (1, 0)
    assert refused(await host.post(PUBLISH, EVENT, headers=headers)) == 1


async def test_openapi_says_so(start: StartServer) -> None:
    host = await limited(start)
    paths = (await host.get("/openapi.json")).json()["paths"]
    responses = paths["/api/v1/channels"]["get"]["responses"]
    assert "429" in responses
    assert "X-RateLimit-Reset" in responses["200"]["headers"]
    assert "429" not in paths["/health/live"]["get"]["responses"]


# --- connections ----------------------------------------------------------------------------------


async def status_of_websocket(host: Host, **options: Any) -> tuple[int, dict[str, str], Message]:
    """Status, headers and body of a refused handshake."""
    with pytest.raises(InvalidStatus) as refusal:
        await host.websocket(greeted=False, **options)
    response = refusal.value.response
    headers = {name.lower(): value for name, value in response.headers.raw_items()}
    return response.status_code, headers, json.loads(response.body or b"{}")


async def test_connections_of_an_address(start: StartServer) -> None:
    host = await limited(start, ratelimit={"ws_connections_per_minute": 3})
    await host.websocket("u1")
    await host.sse("u2")
    assert (await status_of_websocket(host, jwt="nonsense"))[0] == 401
    # Over it, whoever he is: as a status, as a close code, within a stream.
    status, headers, body = await status_of_websocket(host)
    assert (status, body["error"]["code"]) == (429, "RATE_LIMITED")
    assert headers["retry-after"] == "20"
    assert (headers["x-ratelimit-limit"], headers["x-ratelimit-remaining"]) == ("3", "0")
    page = await host.websocket(greeted=False, origin=ORIGIN)
    code, messages = await page.closed()
    assert code == 4029
    assert [(each["type"], each["code"], each["retry_after_seconds"]) for each in messages] == [
        ("error", "RATE_LIMITED", 20)
    ]
    assert (await status_of_websocket(host, headers={"Origin": "https://evil.example"}))[0] == 429
    stream = await host.sse(greeted=False)
    assert [each["code"] for each in await stream.rest()] == ["RATE_LIMITED"]
    assert stream.retry is not None
    assert 20_000 <= stream.retry <= 30_000
    elsewhere = await host.websocket(headers={"X-Forwarded-For": "198.51.100.1"})
    assert elsewhere.connected["user_id"] == "u1"
    host.clock.advance(20)
    await host.websocket("u3")
    assert (await status_of_websocket(host))[0] == 429
    assert await counted(host, "connection") == (5, 5)
    assert await counted(host, "http") == (0, 0)


async def test_connections_of_users_whom_the_application_knows(start_on: StartServer) -> None:
    async def authenticate(connection: HTTPConnection) -> Identity | None:
        return Identity("ada")

    host = await limited(
        start_on,
        lane="asgi",
        authenticate=authenticate,
        ratelimit={"ws_connections_per_minute": 1},
    )
    await host.websocket(None)
    assert (await status_of_websocket(host))[0] == 429


# --- messages -------------------------------------------------------------------------------------


async def talkative(start: StartServer) -> Host:
    return await limited(start, ratelimit={"ws_messages_per_second": 5, "ws_messages_burst": 10})


async def test_messages_first_a_warning_then_the_end(start: StartServer) -> None:
    host = await talkative(start)
    websocket = await host.websocket()
    for _ in range(12):
        await websocket.send("Ping")
    answers = [await websocket.receive() for _ in range(12)]
    assert [each["type"] for each in answers] == ["pong"] * 10 + ["error"] * 2
    assert answers[-1]["code"] == "RATE_LIMITED"
    assert answers[-1]["retry_after_seconds"] == 1
    # Who heeds it is where he was.
    host.clock.advance(3)
    for _ in range(10):
        await websocket.send("Ping")
        await websocket.expect("pong")
    # Who does not, second after second, is closed.
    for _ in range(2):
        await websocket.send("Subscribe", {"channels": ["news"]})
        assert (await websocket.expect("error"))["code"] == "RATE_LIMITED"
        host.clock.advance(1)
        for _ in range(5):
            await websocket.send("Ping")
            await websocket.expect("pong")
    await websocket.send("Ping")
    code, messages = await websocket.closed()
    assert (code, [each["code"] for each in messages]) == (4029, ["RATE_LIMITED"])
    closed = host.notifyd.metrics.connections_closed_total.labels("websocket", "rate_limited")
    assert closed.value == 1
    assert await counted(host, "message") == (30, 5)


@pytest.mark.parametrize("message", ['{"type":"Ping"}', "nonsense", b"\x00"])
async def test_a_flood_is_ended(start: StartServer, message: str | bytes) -> None:
    host = await talkative(start)
    websocket = await host.websocket()
    for _ in range(21):
        await websocket.send_text(message)
    code, messages = await websocket.closed()
    assert code == 4029
    assert "RATE_LIMITED" not in [each.get("code") for each in messages[:10]]
    # Behind another ASGI server, what it has not taken is not written at a close.
    assert {each.get("code") for each in messages[10:]} == {"RATE_LIMITED"}
    assert host.lane == "asgi" or len(messages) == 21


async def test_each_connection_has_its_own_rate(start: StartServer) -> None:
    host = await talkative(start)
    one, other = await host.websocket(), await host.websocket()
    for websocket in (one, other):
        for _ in range(10):
            await websocket.send("Ping")
            await websocket.expect("pong")


@pytest.mark.parametrize("query", ["", "acks=1"])
async def test_a_replay_of_500_acked_one_by_one(start: StartServer, query: str) -> None:
    host = await limited(
        start,
        ratelimit={
            "ws_messages_per_second": 5,
            "ws_messages_burst": 10,
            "http_burst": 1000,
        },
    )
    for number in range(500):
        await host.publish(user("u1"), payload=number)
    websocket = await host.websocket(query=query)
    ids = [each["id"] for each in await websocket.notifications(500)]
    await websocket.expect("caught_up")
    for id in ids:
        await websocket.send("Ack", {"notification_id": id})
    answers = [await websocket.receive() for _ in range(500)]
    assert [each.get("notification_id") for each in answers] == ids
    # Nothing is used up by it.
    for _ in range(10):
        await websocket.send("Ping")
        await websocket.expect("pong")
    again = await host.websocket("u1")
    await again.nothing_came()


async def test_acks_of_what_another_device_settled(start: StartServer) -> None:
    host = await limited(
        start,
        ratelimit={"ws_messages_per_second": 5, "ws_messages_burst": 10, "http_burst": 1000},
    )
    one, other = await host.websocket(query="acks=1"), await host.websocket(query="acks=1")
    for number in range(100):
        await host.publish(user("u1"), payload=number)
    ids = [each["id"] for each in await one.notifications(100)]
    await other.notifications(100)
    for device in (one, other):
        for id in ids:
            assert (await device.ack(id))["type"] == "acked"
    lists = await host.websocket(query="acks=1")
    for number in range(40):
        await host.publish(user("u1"), payload=number)
    ids = [each["id"] for each in await lists.notifications(40)]
    for start_at in range(0, 40, 20):
        answer = await lists.ack(*ids[start_at : start_at + 20])
        assert (answer["type"], "refused" in answer) == ("acked", False)


async def test_acks_of_nothing_are_refused_and_close_nothing(start: StartServer) -> None:
    host = await talkative(start)
    websocket = await host.websocket()
    await host.publish(user("u1"))
    id = (await websocket.expect("notification"))["id"]
    for _ in range(200):
        await websocket.send("Ack", {"notification_id": id})
    answers = [await websocket.receive() for _ in range(200)]
    # One for its delivery, ten of the burst.
    assert [each["type"] for each in answers] == ["acked"] * 11 + ["error"] * 189
    assert {each["code"] for each in answers[11:]} == {"RATE_LIMITED"}
    host.clock.advance(1)
    await websocket.send("Ack", {"notification_id": id})
    await websocket.expect("acked")
    await websocket.nothing_came()


async def test_a_stream_acks_by_http_at_its_address_s_rate(start: StartServer) -> None:
    host = await limited(start, ratelimit={"http_requests_per_second": 1, "http_burst": 3})
    stream = await host.sse(query="acks=1")
    await host.publish(user("u1"))
    id = (await stream.expect("notification"))["id"]
    headers = {"Authorization": f"Bearer {token('u1')}"}
    body = {"notification_id": id}
    for left in (2, 1, 0):
        response = await host.post("/api/v1/acks", body, key=None, headers=headers)
        assert response.json() == {"acked": [id], "refused": []}
        assert told(response)[1] == left
    refused(await host.post("/api/v1/acks", body, key=None, headers=headers))


async def test_many_at_once_get_as_many_as_there_are(start: StartServer) -> None:
    host = await limited(start, ratelimit={"http_requests_per_second": 1, "http_burst": 20})
    responses = await asyncio.gather(*(host.post(PUBLISH, EVENT) for _ in range(50)))
    assert sorted(each.status_code for each in responses) == [200] * 20 + [429] * 30
