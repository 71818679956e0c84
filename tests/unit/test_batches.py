"""A batch's plain items go together, and nobody can tell."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notifyd.api import batches as batch_calls
from notifyd.connections.connection import Connection
from notifyd.errors import Unavailable
from notifyd.idempotency import FallbackIdempotencyKeys, MemoryIdempotencyKeys
from notifyd.identifiers import new_uuid
from notifyd.notification import MAX_NOTIFICATION_BYTES
from notifyd.options import IdempotencySettings
from notifyd.templates import CachedTemplates, MemoryTemplates
from notifyd.wire import notification_message
from tests.unit.api_server import ADMIN, ApiServer, LaterLogs, ListSink

EVENT = {"event_type": "order.created", "payload": {"order_id": "A-1", "total": 12.50}}
TEMPLATE = {
    "id": "shipped",
    "name": "Shipped",
    "event_type": "order.shipped",
    "payload_template": {"order": "{{order}}"},
}
NESTED = "[" * 65 + "]" * 65


def to(user: object, **content: object) -> dict[str, object]:
    return {"target": {"type": "user", "value": user}, **(content or EVENT)}


PLAIN: list[object] = [
    to("alone"),
    to("two"),
    to("stream"),
    to("away"),
    to("acks"),
    to("alone", event_type="ümlaut \u2028", payload={"text": 'ü \ud83d\ude00 "quoted" \\u0041'}),
    to("alone", event_type="a", payload=None),
    to("alone", event_type="a", payload="x" * 200, ttl=0),
    to("away", event_type="a", payload=[1, {"b": []}], ttl=0),
    to("alone", event_type="a", payload=-0.0, ttl=3600, correlation_id="c-1", source="shop"),
    to("two", event_type="a", payload=1, require_ack=True),
    to("stream", event_type="a", payload={"digits": 123456789012345678901234567890}),
]
OTHERS: list[object] = [
    {"target": {"type": "User", "value": "alone"}, **EVENT},
    {"target": {"type": "users", "value": ["alone", "away"]}, **EVENT},
    {"target": {"type": "broadcast"}, **EVENT},
    {"target": {"type": "channel", "value": "orders"}, **EVENT},
    to("alone", template_id="shipped", variables={"order": "A-1"}),
    to("alone", template_id="unknown"),
    to("alone", **EVENT, priority="High"),
    to("away", **EVENT, priority="low"),
    to("alone", **EVENT, priority="Urgent"),
    to("alone", **EVENT, audience={"type": "Roles", "value": ["admin"]}),
    to("alone", **EVENT, audience={"type": "All"}),
    to("alone", **EVENT, exclude_connection="nobody's"),
    to("alone", **EVENT, id="6F1DE0FD-0000-4000-8000-000000000001"),
    to("alone", **EVENT, idempotency_key="k"),
    to("alone", event_type="a", payload="x" * 60000),
    to("alone", event_type="a", payload="x" * MAX_NOTIFICATION_BYTES),
    to("alone", event_type="a"),
    to("alone", payload=1),
    to("alone", **EVENT, variables={}),
    to(""),
    to("tab\t"),
    to(["alone"]),
    to(None),
    to("alone", event_type="a", payload="\ud800"),
    to("\ud800"),
    to("alone", event_type="a", payload=json.loads(NESTED)),
]
WRONG: list[object] = [
    to("alone", **EVENT, prioritty="High"),
    to("alone", event_type=7, payload=1),
    to("alone", event_type="", payload=1),
    to("alone", event_type="a", payload=1, ttl=-1),
    {"target": {"value": "alone"}, **EVENT},
    7,
    None,
    to("alone", event_type="a", payload=json.loads("[" * 500 + "]" * 500)),
]


class World:
    """A server with users of every kind."""

    def __init__(self) -> None:
        self.server = ApiServer()
        self.connections: list[tuple[Connection, ListSink]] = [
            self.server.connect("alone", "orders"),
            self.server.connect("two"),
            self.server.connect("two"),
            self.server.connect("stream", transport="sse"),
            self.server.connect("acks"),
        ]
        self.connections[-1][0].acks = True

    async def account(self, content: bytes) -> dict[str, Any]:
        """Everything that a batch of these bytes changes; ids are numbered as they come."""
        server = self.server
        assert server.ledger is not None
        assert server.logs is not None
        await server.request("POST", "/api/v1/templates", TEMPLATE, key=ADMIN)
        await asyncio.sleep(0)
        for _, sink in self.connections:
            sink.written.clear()
        response = await server.publish("/batch", None, content=content)
        await asyncio.sleep(0)
        answer = response.json()
        ids = {each["notification_id"]: f"n{n}" for n, each in enumerate(answer.get("results", []))}
        told: dict[str, Any] = {
            "written": [b"".join(sink.written) for _, sink in self.connections],
            "held": [list(each.unconfirmed or ()) for each, _ in self.connections],
            "asked": sorted(each.identity.user_id for each in server.confirmations._to_ask),
            "queued": [
                notification_message(each.notification).json
                for each in server.logs.read("default", "away").entries
            ],
            "reports": [server.ledger.report("default", id) for id in ids],
            "stats": server.ledger.stats(),
            "counted": [
                line
                for line in server.metrics.render().decode().splitlines()
                if "seconds" not in line and "created" not in line
            ],
            "dispatched": server.metrics.dispatch_seconds.count,
        }
        answer.pop("batch_id", None)
        text = repr((response.status_code, answer, told))
        for id, name in ids.items():
            text = text.replace(id, name)
        return {"text": text}


async def both_accounts(content: bytes) -> tuple[str, str]:
    together = await World().account(content)
    with patch.object(batch_calls, "_whole_batch", lambda data: None):
        one_by_one = await World().account(content)
    return together["text"], one_by_one["text"]


def body_of(items: list[object], *, spaced: bool, ascii: bool) -> bytes:
    text = json.dumps({"notifications": items}, indent=2 if spaced else None, ensure_ascii=ascii)
    return text.encode("utf-8", "surrogatepass")


ITEMS = PLAIN + OTHERS + WRONG

batches = st.one_of(
    *(
        st.lists(st.integers(0, kinds - 1), max_size=12)
        for kinds in (len(PLAIN), len(PLAIN + OTHERS), len(ITEMS))
    )
)


@settings(deadline=None, max_examples=100)
@given(numbers=batches, spaced=st.booleans(), ascii=st.booleans())
def test_together_or_one_by_one_the_same_happens(
    numbers: list[int], spaced: bool, ascii: bool
) -> None:
    items = [ITEMS[number] for number in numbers]
    together, one_by_one = asyncio.run(both_accounts(body_of(items, spaced=spaced, ascii=ascii)))
    assert together == one_by_one


@pytest.mark.parametrize("item", ITEMS)
async def test_each_kind_of_item_between_plain_ones(item: object) -> None:
    content = body_of([PLAIN[0], item, PLAIN[1]], spaced=False, ascii=True)
    together, one_by_one = await both_accounts(content)
    assert together == one_by_one


@pytest.mark.parametrize("count", [1, 100])
async def test_plain_items_are_sent_in_one_call(count: int) -> None:
    world = World()
    content = body_of([to("alone")] * count, spaced=True, ascii=True)
    with patch.object(batch_calls.Batches, "_item", side_effect=AssertionError):
        answer = (await world.server.publish("/batch", None, content=content)).json()
    assert answer["summary"]["total_delivered"] == count


async def test_an_item_whose_store_is_away_fails_alone() -> None:
    async def enqueue(tenant: str, users: Any, notification: Any) -> Any:
        raise Unavailable("The store is away.")

    def refuse(tenant: str, users: Any, notification: Any) -> Any:
        raise Unavailable("The store is away.")

    for logs in (LaterLogs(enqueue), LaterLogs(refuse)):
        server = ApiServer(logs=logs)
        body = {"notifications": [to("u1"), to("u2")]}
        results = (await server.publish("/batch", body)).json()["results"]
        assert [each["error"] for each in results] == ["The store is away."] * 2
        assert [each["index"] for each in results] == [0, 1]


@pytest.mark.parametrize("spaced", [False, True])
async def test_who_must_wait_before_he_is_sent_is_not_overtaken(spaced: bool) -> None:
    server = ApiServer(templates=CachedTemplates(MemoryTemplates()))
    stored, memory = (MemoryIdempotencyKeys(IdempotencySettings()) for _ in range(2))
    server.guard.idempotency = FallbackIdempotencyKeys(stored, memory)
    await server.request("POST", "/api/v1/templates", TEMPLATE, key=ADMIN)
    _, sink = server.connect("alone")
    await asyncio.sleep(0)
    sink.written.clear()
    templated = to("alone", template_id="shipped", variables={"order": "A-1"})
    items = [
        to("alone", event_type="first", payload=1),
        templated,
        to("alone", event_type="second", payload=1),
        to("alone", event_type="keyed", payload=1, idempotency_key="k"),
        to("alone", event_type="third", payload=1),
        {"target": {"type": "user", "value": "alone"}},
        to("alone", event_type="named", payload=1, id=new_uuid()),
        to("alone", event_type="fourth", payload=1),
        templated,
        to("alone", event_type="last", payload=1),
    ]
    content = body_of(items, spaced=spaced, ascii=True)
    results = (await server.publish("/batch", None, content=content)).json()["results"]
    await asyncio.sleep(0)
    assert [each["event_type"] for each in sink.messages() if "event_type" in each] == [
        "first",
        "order.shipped",
        "second",
        "keyed",
        "third",
        "named",
        "fourth",
        "order.shipped",
        "last",
    ]
    assert [each["index"] for each in results] == list(range(10))
    assert [each["success"] for each in results] == [True] * 5 + [False] + [True] * 4
