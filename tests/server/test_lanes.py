"""The fast lane and Starlette answer alike: one corpus of requests through both, on one server.

The same request takes the slow lane when its target has a query, which no publishing call reads;
and where requests with its head came before on the socket, the fast lane does not parse it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.adversity.hosting import Hosted, hosted
from tests.adversity.raw import Response, request
from tests.front_door import ADMIN_KEY, ORIGIN, PUBLISH_KEY, READ_KEY

API = "/api/v1/notifications"
ID = "6b9c0a52-0d0d-4c0a-9a53-0c6a5b3b5f0e"
CONTENT = '"event_type": "order.created", "payload": {"order_id": "A-1", "n": 1.50}'
KEY = f"X-API-Key: {ADMIN_KEY}"
BEARER = f"Authorization: Bearer {PUBLISH_KEY}"


def _batch(*items: str, options: str = "{}") -> str:
    return f'{{"notifications": [{", ".join(items)}], "options": {options}}}'


_ITEM = f'{{"target": {{"type": "user", "value": "u1"}}, {CONTENT}}}'

CORPUS: list[tuple[str, str, tuple[str, ...]]] = [
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', (KEY,)),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', (BEARER,)),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}, "ttl": 0}}', (KEY,)),
    ("/send", f'{{"target_user_id": "ü 😀", {CONTENT}, "priority": "low"}}', (KEY,)),
    ("", _ITEM, (KEY,)),
    ("", _ITEM.replace('"user"', '"USER"'), (KEY,)),
    ("", _ITEM.replace('"user"', '"none"'), (KEY,)),
    ("/send-to-users", f'{{"target_user_ids": ["u1", "u2"], {CONTENT}}}', (KEY,)),
    ("/send-to-users", f'{{"target_user_ids": [], {CONTENT}}}', (KEY,)),
    ("/broadcast", f"{{{CONTENT}}}", (KEY,)),
    ("/broadcast", f'{{{CONTENT}, "audience": {{"type": "Roles", "value": ["a"]}}}}', (KEY,)),
    ("/channel", f'{{"channel": "orders", {CONTENT}}}', (KEY,)),
    ("/channel", f'{{"channel": "or ders", {CONTENT}}}', (KEY,)),
    ("/channels", f'{{"channels": ["orders", "b:c"], {CONTENT}}}', (KEY,)),
    ("/batch", _batch(_ITEM, "{}", _ITEM), (KEY,)),
    ("/batch", _batch(_ITEM, "7", _ITEM, options='{"stop_on_error": true}'), (KEY,)),
    ("/batch", _batch(_ITEM, _ITEM, options='{"deduplicate": true}'), (KEY,)),
    ("/batch", _batch(), (KEY,)),
    # who may not
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', ()),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', ("X-API-Key: wrong-key-0123456789",)),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', (f"X-API-Key: {READ_KEY}",)),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', ("Authorization: Basic eDp5",)),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', (KEY, "X-Tenant-ID: acme")),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', (KEY, "X-Tenant-ID: default")),
    # what is odd, or wrong
    ("/send", "", (KEY,)),
    ("/send", "{", (KEY,)),
    ("/send", "[]", (KEY,)),
    ("/send", '{"target_user": "u1"}', (KEY,)),
    ("/send", f'{{"target_user_id": "u\\u0000", {CONTENT}}}', (KEY,)),
    ("/send", f'{{"target_user_id": "{"u" * 300}", {CONTENT}}}', (KEY,)),
    ("/send", '{"target_user_id": "u1", "template_id": "none", "variables": {}}', (KEY,)),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}'.ljust(65_536), (KEY,)),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}'.ljust(65_537), (KEY,)),
    ("/send", '{"target_user_id": "u1", "event_type": "e", "payload": "\udcff"}', (KEY,)),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', (KEY, "X-Request-ID: mine")),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', (KEY, f"X-Request-ID: {'x' * 129}")),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', (KEY, f"Origin: {ORIGIN}")),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', (KEY, "Origin: https://evil.example")),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', (KEY, "Origin: null")),
    ("/send", "{", (KEY, f"Origin: {ORIGIN}")),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', (KEY, "Content-Type: text/plain")),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', (KEY, "Idempotency-Key: {lane}-1")),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', (KEY, "Idempotency-Key: {lane}-1")),
    ("/send", f'{{"target_user_id": "u2", {CONTENT}}}', (KEY, "Idempotency-Key: {lane}-1")),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}}}', (KEY, f"Idempotency-Key: {'k' * 257}")),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}, "id": "{{lane_id}}"}}', (KEY,)),
    ("/send", f'{{"target_user_id": "u1", {CONTENT}, "id": "{{lane_id}}"}}', (KEY,)),
    ("/nowhere", "{}", (KEY,)),
]

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


@pytest.fixture(scope="module")
def both() -> Iterator[Hosted]:
    """One server of our own sockets, which has both lanes."""
    with hosted("sockets") as server:
        yield server


def comparable(answer: Response) -> tuple[int, object, list[tuple[str, str]]]:
    """An answer without what no two answers share."""
    text = _TIME.sub("TIME", _UUID.sub("ID", answer.body.decode()))
    headers = sorted(
        (name, _UUID.sub("ID", value)) for name, value in answer.headers if name != "date"
    )
    if "TIME" in text:
        # Fractions of seconds are of different lengths.
        headers = [header for header in headers if header[0] != "content-length"]
    return answer.status, json.loads(text) if text else None, headers


async def through(
    server: Hosted, lane: str, case: tuple[str, str, tuple[str, ...]], beside: str = "fast"
) -> Response:
    """The answer of one lane, to be compared with that of the one `beside`."""
    path, body, headers = case
    target = API + path + ("?x=1" if lane == "slow" else "")
    # Nothing is sent again that another lane sent, or the same one for another comparison.
    mark = {"slow": "a1", "fast": "b2", "known": "c3"}
    lane_id = ID.replace("6b9c", mark[lane] + mark[beside])
    head = ("POST", target, *[each.replace("{lane}", f"{lane}-{beside}") for each in headers])
    async with server.connected() as client:
        for _ in range(2 if lane == "known" else 0):
            await client.send(request(*head, body=b"{}"))
            await client.response()
        data = body.replace("{lane_id}", lane_id).encode("utf-8", "surrogateescape")
        await client.send(request(*head, body=data))
        return await client.response()


@pytest.mark.parametrize(
    ("index", "lane"),
    [
        (index, lane)
        for index, (_, _, headers) in enumerate(CORPUS)
        for lane in ("fast", "known")
        # What comes before a known one would have its idempotency key.
        if lane == "fast" or not any("{lane}" in header for header in headers)
    ],
)
async def test_both_lanes_answer_alike(both: Hosted, index: int, lane: str) -> None:
    fast = await through(both, lane, CORPUS[index], "slow")
    slow = await through(both, "slow", CORPUS[index], lane)
    assert comparable(fast) == comparable(slow)


async def test_the_corpus_takes_the_lanes_that_it_names(
    both: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    from notifyd.server.http import HttpProtocol

    taken: list[str] = []
    answer_fast, answer_known = HttpProtocol._answer_fast, HttpProtocol._answer_known

    def fast(self: HttpProtocol, endpoint: object) -> None:
        taken.append("fast")
        answer_fast(self, endpoint)  # type: ignore[arg-type]  # it is an Endpoint

    def known(self: HttpProtocol, head: object, body: bytes) -> None:
        taken.append("known")
        answer_known(self, head, body)  # type: ignore[arg-type]  # it is a KnownHead

    monkeypatch.setattr(HttpProtocol, "_answer_fast", fast)
    monkeypatch.setattr(HttpProtocol, "_answer_known", known)
    await through(both, "fast", CORPUS[0])
    assert taken == ["fast"]
    await through(both, "slow", CORPUS[0])
    assert taken == ["fast"]
    await through(both, "known", CORPUS[0])
    assert taken == ["fast", "fast", "fast", "known", "fast"]


async def test_both_lanes_count_the_same_route(both: Hosted) -> None:
    counter = both.notifyd.metrics.http_requests_total.labels("POST", f"{API}/send", "200")
    before = counter.value
    await through(both, "fast", CORPUS[0])
    await through(both, "slow", CORPUS[0])
    assert counter.value == before + 2


@pytest.mark.parametrize("query", ["", "?x=1"])
async def test_both_lanes_on_one_connection(both: Hosted, query: str) -> None:
    async with both.connected() as client:
        for path, body, headers in CORPUS:
            if len(body) > 65_536:
                continue
            for target in (API + path, API + path + query):
                data = body.encode("utf-8", "surrogateescape")
                await client.send(request("POST", target, *headers, body=data))
                answer = await client.response()
                assert answer.status < 500
                assert answer.header("connection") is None
