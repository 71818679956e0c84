"""The publishing calls: what they answer, who receives, and what is refused."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest

from notifyd.client import AsyncClient, StatusError
from notifyd.errors import Unavailable
from notifyd.queue.memory import MemoryUserLogs
from tests.conftest import StartServer
from tests.front_door import (
    PUBLISH_KEY,
    READ_KEY,
    Host,
    Listener,
    Message,
    Transport,
    channel,
    token,
    user,
)

CONTENT = {"event_type": "order.created", "payload": {"order_id": "A-1"}}
BASE = "/api/v1/notifications"


async def call(host: Host, path: str, body: Any, **headers: str) -> Message:
    """A publishing call that must be taken; its answer."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    response = await host.post(BASE + path, body, key=PUBLISH_KEY, headers=given)
    assert response.status_code == 200, response.text
    answer: Message = response.json()
    return answer


async def refused(host: Host, path: str, body: Any, status: int = 422) -> Message:
    """A publishing call that must be refused; the error."""
    response = await host.post(BASE + path, body, key=PUBLISH_KEY)
    assert response.status_code == status, response.text
    error: Message = response.json()["error"]
    return error


def stable(answer: Message) -> Message:
    """The answer without what differs every time, once that is well formed."""
    assert str(uuid.UUID(answer["notification_id"])) == answer["notification_id"]
    assert len(answer["timestamp"]) == 24
    return {
        name: value
        for name, value in answer.items()
        if name not in {"notification_id", "timestamp"}
    }


# --- the calls ---


async def test_one_user(host: Host, transport: Transport) -> None:
    listeners = [await host.listen(transport, "ada") for _ in range(2)]
    answer = await call(host, "/send", {"target_user_id": "ada", **CONTENT})
    assert stable(answer) == {
        "success": True,
        "delivered_to": 2,
        "failed": 0,
        "outcome": "delivered",
        "routed": 0,
        "queued": 0,
    }
    for listener in listeners:
        assert await listener.expect("notification") == {
            "type": "notification",
            "id": answer["notification_id"],
            "occurred_at": answer["timestamp"],
            "event_type": "order.created",
            "payload": {"order_id": "A-1"},
            "metadata": {
                "source": "http-api",
                "priority": "Normal",
                "audience": {"type": "All"},
            },
        }


async def test_one_user_who_is_away(host: Host) -> None:
    answer = await call(host, "/send", {"target_user_id": "ada", **CONTENT})
    assert stable(answer) == {
        "success": True,
        "delivered_to": 0,
        "failed": 0,
        "outcome": "queued",
        "routed": 0,
        "queued": 1,
    }


async def test_several_users(host: Host) -> None:
    ada = [await host.websocket("ada") for _ in range(2)]
    names = ["ada", "bob", "ada"]
    answer = await call(host, "/send-to-users", {"target_user_ids": names, **CONTENT})
    assert stable(answer) == {
        "success": True,
        "delivered_to": 2,
        "failed": 0,
        "outcome": "delivered",
        "routed": 0,
        "queued": 1,
        "results": {
            "ada": {"outcome": "delivered", "connections": 2},
            "bob": {"outcome": "queued"},
        },
    }
    for websocket in ada:
        await websocket.expect("notification")
        await websocket.nothing_came()


async def test_everybody(host: Host) -> None:
    listeners: list[Listener] = [await host.websocket("ada"), await host.sse("bob")]
    answer = await call(host, "/broadcast", CONTENT)
    assert (answer["outcome"], answer["delivered_to"], answer["queued"]) == ("delivered", 2, 0)
    for listener in listeners:
        await listener.expect("notification")


async def test_a_channel(host: Host) -> None:
    listeners = [
        await host.listen("websocket", "ada", "orders"),
        await host.listen("sse", "bob", "orders"),
    ]
    outside = await host.websocket("cleo")
    answer = await call(host, "/channel", {"channel": "orders", **CONTENT})
    assert stable(answer) == {
        "success": True,
        "delivered_to": 2,
        "failed": 0,
        "outcome": "delivered",
        "routed": 0,
        "queued": 0,
        "channel": "orders",
    }
    for listener in listeners:
        await listener.expect("notification")
    await outside.nothing_came()


async def test_several_channels_reach_a_connection_once(host: Host) -> None:
    both = await host.websocket("ada")
    await both.subscribe("orders", "alerts")
    one = await host.websocket("bob")
    await one.subscribe("alerts")
    channels = ["orders", "alerts", "empty"]
    answer = await call(host, "/channels", {"channels": channels, **CONTENT})
    assert stable(answer) == {
        "success": True,
        "delivered_to": 2,
        "failed": 0,
        "outcome": "delivered",
        "routed": 0,
        "queued": 0,
        "channels": {
            "orders": {"delivered_to": 1},
            "alerts": {"delivered_to": 2},
            "empty": {"delivered_to": 0},
        },
        "total_delivered": 2,
    }
    for websocket in (both, one):
        await websocket.expect("notification")
        await websocket.nothing_came()


@pytest.mark.parametrize(
    ("target", "extra"),
    [
        ({"type": "user", "value": "ada"}, {}),
        ({"type": "USERS", "value": ["ada"]}, {"results"}),
        ({"type": "Broadcast"}, {}),
        ({"type": "channel", "value": "orders"}, {"channel"}),
        ({"type": "channels", "value": ["orders"]}, {"channels", "total_delivered"}),
    ],
)
async def test_the_one_call_for_every_target(
    host: Host, target: dict[str, Any], extra: set[str]
) -> None:
    websocket = await host.websocket("ada")
    await websocket.subscribe("orders")
    answer = await call(host, "", {"target": target, **CONTENT})
    assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 1)
    always = {"success", "notification_id", "delivered_to", "failed", "timestamp", "outcome"}
    assert set(answer) == {*always, "routed", "queued", *extra}
    await websocket.expect("notification")


async def test_nobody_there_says_how_to_mend_it_in_development(start: StartServer) -> None:
    host = await start()
    for target in (channel("orders"), {"type": "broadcast"}):
        answer = await host.publish(target)
        assert (answer["outcome"], answer["success"]) == ("nobody", False)
        assert answer["hint"]


# --- what goes along ---


async def test_everything_that_may_go_along_arrives(host: Host) -> None:
    websocket = await host.websocket("ada")
    id = "6F9619FF-8B86-D011-B42D-00C04FC964FF"
    answer = await host.publish(
        user("ada"),
        "order.created",
        {"text": "ä\u2028\U0001f600\n", "number": 1.0, "big": 12345678901234567890},
        priority="cRITICAL",
        ttl=3600,
        correlation_id="c-1",
        source="shop",
        id=id,
        audience={"type": "users", "value": ["ada", "bob"]},
    )
    assert answer["notification_id"] == id.lower()
    message = await websocket.expect("notification")
    assert message["id"] == id.lower()
    assert message["payload"]["text"] == "ä\u2028\U0001f600\n"
    assert message["payload"]["big"] == 12345678901234567890
    assert message["metadata"] == {
        "source": "shop",
        "priority": "Critical",
        "ttl": 3600,
        "correlation_id": "c-1",
        "audience": {"type": "Users"},
    }


async def test_a_payload_may_be_any_json(host: Host) -> None:
    listeners: list[Listener] = [await host.websocket("ada"), await host.sse("ada")]
    for payload in (None, True, 0, "text", [], [1, {"a": None}]):
        await host.publish(user("ada"), payload=payload)
        for listener in listeners:
            assert (await listener.expect("notification"))["payload"] == payload


async def test_the_audience_narrows_who_receives(host: Host) -> None:
    admin = await host.websocket(jwt=token("ada", roles=["admin", "staff"]))
    single = await host.websocket(jwt=token("bob", roles="admin"))
    plain = await host.websocket("cleo")
    for websocket in (admin, single, plain):
        await websocket.subscribe("orders")
    await plain.subscribe("vip")
    everybody = [admin, single, plain]

    async def reached(target: dict[str, Any], audience: dict[str, Any]) -> list[int]:
        answer = await host.publish(target, audience=audience)
        found = []
        for index, websocket in enumerate(everybody):
            await websocket.send("Ping")
            message = await websocket.receive()
            if message["type"] == "notification":
                assert message["metadata"]["audience"] == {"type": audience["type"].title()}
                found.append(index)
                message = await websocket.receive()
            assert message["type"] == "pong"
        assert answer["delivered_to"] == len(found)
        return found

    everyone = {"type": "broadcast"}
    assert await reached(everyone, {"type": "All"}) == [0, 1, 2]
    assert await reached(everyone, {"type": "Roles", "value": ["admin"]}) == [0, 1]
    assert await reached(channel("orders"), {"type": "Roles", "value": ["staff"]}) == [0]
    assert await reached(everyone, {"type": "users", "value": ["bob", "zoe"]}) == [1]
    assert await reached(everyone, {"type": "Channels", "value": ["vip"]}) == [2]
    answer = await host.publish(user("cleo"), audience={"type": "Roles", "value": ["admin"]})
    assert (answer["outcome"], answer["success"]) == ("filtered", False)
    assert answer["hint"]
    answer = await host.publish(user("away"), audience={"type": "Users", "value": ["ada"]})
    assert answer["outcome"] == "filtered"


async def test_the_audience_is_held_to_on_replay_too(host: Host) -> None:
    answer = await host.publish(user("ada"), audience={"type": "Roles", "value": ["admin"]})
    assert answer["outcome"] == "queued"
    await (await host.websocket("ada")).nothing_came()
    admin = await host.websocket(jwt=token("ada", roles=["admin"]))
    assert (await admin.expect("notification"))["id"] == answer["notification_id"]


async def test_the_senders_own_connection_is_left_out(host: Host, transport: Transport) -> None:
    own = await host.listen(transport, "ada", "orders")
    other = await host.websocket("bob")
    await other.subscribe("orders")
    exclude = own.connected["connection_id"]
    assert (await host.publish(channel("orders"), exclude_connection=exclude))["delivered_to"] == 1
    assert (await host.publish({"type": "broadcast"}, exclude_connection=exclude))[
        "delivered_to"
    ] == 1
    only = await host.publish(user("ada"), exclude_connection=exclude.upper())
    assert (only["outcome"], only["queued"]) == ("filtered", 0)
    await host.publish(user("ada"), payload="this one")
    assert (await own.expect("notification"))["payload"] == "this one"


async def test_a_connection_that_can_be_none_is_not_left_out_in_silence(host: Host) -> None:
    item = {"target": user("ada"), "event_type": "a", "payload": 1, "exclude_connection": "mine"}
    field = "exclude_connection"
    response = await host.post(BASE, item)
    assert response.status_code == 422
    assert response.json()["error"]["details"] == {"field": field, "constraint": "a UUID"}
    good = {**item, field: str(uuid.uuid4())}
    for options in ({}, {"deduplicate": True}):
        batch = {"notifications": [good, {**item, "event_type": "b"}], "options": options}
        results = (await call(host, "/batch", batch))["results"]
        assert [each["success"] for each in results] == [True, False]
        assert field in results[1]["error"]


# --- what is refused ---


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "target"),
    ({"target": user("ada")}, "event_type"),
    ({"target": user("ada"), "event_type": "x"}, "payload"),
    ({"target": user("ada"), "event_type": "", "payload": 1}, "event_type"),
    ({"target": user("ada"), "event_type": "x" * 129, "payload": 1}, "event_type"),
    ({"target": user(""), **CONTENT}, "target.value"),
    ({"target": user("x" * 257), **CONTENT}, "target.value"),
    ({"target": channel("a b"), **CONTENT}, "target.value"),
    ({"target": channel(":a"), **CONTENT}, "target.value"),
    ({"target": {"type": "users", "value": []}, **CONTENT}, "target.value"),
    ({"target": {"type": "planet", "value": "x"}, **CONTENT}, "target.type"),
    ({"target": user("ada"), **CONTENT, "priority": "urgent"}, "priority"),
    ({"target": user("ada"), **CONTENT, "ttl": -1}, "ttl"),
    ({"target": user("ada"), **CONTENT, "ttl": 31_536_001}, "ttl"),
    ({"target": user("ada"), **CONTENT, "ttl": "60"}, "ttl"),
    ({"target": user("ada"), **CONTENT, "id": "not-a-uuid"}, "id"),
    ({"target": user("ada"), **CONTENT, "audience": {"type": "Roles"}}, "audience.value"),
    ({"target": user("ada"), **CONTENT, "template_id": "t"}, "event_type"),
]


async def test_what_is_wrong_is_named(host: Host) -> None:
    for body, field in WRONG:
        error = await refused(host, "", body)
        assert (error["code"], error["details"]["field"]) == ("VALIDATION_ERROR", field), body


async def test_an_unknown_field_names_the_nearest(host: Host) -> None:
    error = await refused(host, "", {"target": user("ada"), **CONTENT, "prioritty": "High"})
    assert error["details"]["field"] == "prioritty"
    assert "priority" in error["message"]


async def test_sizes_are_limited(host: Host) -> None:
    large = {"target": user("ada"), "event_type": "x", "payload": "x" * 65_500}
    assert (await refused(host, "", large, 413))["code"] == "PAYLOAD_TOO_LARGE"
    within = {"target": user("ada"), "event_type": "x", "payload": "x" * 65_000}
    assert (await call(host, "", within))["outcome"] == "queued"
    names = {"target_user_ids": [f"u{n}" for n in range(10_001)], **CONTENT}
    assert (await refused(host, "/send-to-users", names))["details"]["field"] == "target_user_ids"
    many = {"target_user_ids": [f"u{n}" for n in range(10_000)], **CONTENT}
    assert (await call(host, "/send-to-users", many))["queued"] == 10_000


async def test_a_key_with_the_scope_is_needed(host: Host) -> None:
    for path in ("", "/send", "/send-to-users", "/broadcast", "/channel", "/channels", "/batch"):
        for key, status in ((None, 401), ("nonsense", 401), (READ_KEY, 403)):
            response = await host.post(BASE + path, CONTENT, key=key)
            assert response.status_code == status
        bearer = {"Authorization": f"Bearer {PUBLISH_KEY}"}
        response = await host.post(BASE + path, b"not json", key=None, headers=bearer)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "BAD_REQUEST")


async def test_a_tenant_is_refused(host: Host) -> None:
    body = {"target": user("ada"), **CONTENT}
    response = await host.post(BASE, body, headers={"X-Tenant-ID": "acme"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "BAD_REQUEST")
    response = await host.post(BASE, body, headers={"X-Tenant-ID": "default"})
    assert response.status_code == 200


# --- batch ---


async def test_a_batch(host: Host) -> None:
    ada = await host.websocket("ada")
    await ada.subscribe("orders", "alerts")
    items = [
        {"target": user("ada"), **CONTENT},
        {"target": {"type": "users", "value": ["ada", "bob"]}, **CONTENT},
        {"target": {"type": "planet"}, **CONTENT},
        {"target": channel("orders"), **CONTENT},
        {"target": {"type": "channels", "value": ["orders", "alerts"]}, **CONTENT},
        {"target": {"type": "broadcast"}, **CONTENT},
        {"target": channel("empty"), **CONTENT},
        "nonsense",
    ]
    answer = await call(host, "/batch", {"notifications": items})
    assert str(uuid.UUID(answer["batch_id"])) == answer["batch_id"]
    assert answer["timestamp"].endswith("Z")
    outcomes = [result["outcome"] for result in answer["results"]]
    assert outcomes == ["delivered", "delivered", "failed", *["delivered"] * 3, "nobody", "failed"]
    assert [result["index"] for result in answer["results"]] == list(range(8))
    assert answer["results"][1]["queued"] == 1
    assert "target.type" in answer["results"][2]["error"]
    assert answer["summary"] == {
        "total": 8,
        "succeeded": 5,
        "failed": 3,
        "skipped": 0,
        "total_delivered": 5,
    }
    got = [message["id"] for message in await ada.notifications(5)]
    assert got == [answer["results"][n]["notification_id"] for n in (0, 1, 3, 4, 5)]


@pytest.mark.parametrize("options", [{}, {"deduplicate": True}, {"stop_on_error": True}])
async def test_half_a_surrogate_pair_is_an_error_of_its_item_alone(
    host: Host, options: dict[str, bool]
) -> None:
    ada = await host.websocket("ada")
    payloads = [
        "1.50",
        r'"\\ud800 \ud83d\ude00"',
        r'"\ud83d"',
        "12345678901234567890.10",
        r'{"\udE00":1}',
    ]
    items = [
        f'{{"target":{{"type":"user","value":"ada"}},"event_type":"e{n}","payload":{payload}}}'
        for n, payload in enumerate(payloads)
    ]
    items.append(items[0].replace("{", '{"id":"6f1de0fd-0000-4000-8000-000000000001",', 1))
    body = f'{{"options":{json.dumps(options)},"notifications":[{",".join(items)}]}}'
    response = await host.request("POST", f"{BASE}/batch", content=body.encode())
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    assert "half of a surrogate pair" in results[2]["error"]
    sent = [0, 1] if "stop_on_error" in options else [0, 1, 3, 5]
    if "deduplicate" in options:
        assert results[5]["skipped"]
        sent = [0, 1, 3]
    delivered = [each for each in results if each["delivered_to"]]
    assert [each["index"] for each in delivered] == sent
    for each in delivered:
        notification = await ada.expect("notification")
        assert notification["id"] == each["notification_id"]
        told = {0: 1.5, 1: "\\ud800 \U0001f600", 3: 12345678901234567890.1, 5: 1.5}
        assert notification["payload"] == told[each["index"]]
    await ada.nothing_came()


async def test_half_a_surrogate_pair_outside_of_items_refuses_the_batch(host: Host) -> None:
    body = '{"idempotency_key":"\\ud800","notifications":[7]}'
    response = await host.request("POST", f"{BASE}/batch", content=body.encode())
    assert response.status_code == 422
    assert "half of a surrogate pair" in response.json()["error"]["message"]


async def test_a_batch_that_stops_at_the_first_error(host: Host) -> None:
    items = [
        {"target": channel("empty"), **CONTENT},
        {"target": user("ada"), **CONTENT},
        {"target": user("ada")},
        {"target": user("bob"), **CONTENT},
    ]
    body = {"notifications": items, "options": {"stop_on_error": True}}
    answer = await call(host, "/batch", body)
    assert [result["success"] for result in answer["results"]] == [False, True, False, False]
    assert answer["results"][3]["skipped"] is True
    assert answer["summary"]["skipped"] == 1
    await (await host.websocket("bob")).nothing_came()


async def test_the_python_client_takes_any_key_that_the_server_does(host: Host) -> None:
    keys = ["\u00fc" * 128, "\u00fc" * 127, " a", "a", "a ", " ", "k" * 256, "a\nb"]
    ids = []
    async with AsyncClient(host.url, api_key=PUBLISH_KEY) as client:
        for key in [*keys, *keys]:
            receipt = await client.send(user="ada", event="x", idempotency_key=key)
            ids.append(receipt.notification_id)
        assert ids[: len(keys)] == ids[len(keys) :]
        assert len(set(ids)) == len(keys)
        for key in ("", "\u00fc" * 129, "k" * 257):
            with pytest.raises(StatusError) as caught:
                await client.send(user="ada", event="x", idempotency_key=key)
            assert caught.value.status == 422


async def test_a_batch_without_repetitions(host: Host) -> None:
    ada = await host.websocket("ada")
    items = [
        {"target": user("ada"), **CONTENT},
        {"target": user("ada"), **CONTENT, "payload": "another"},
        {"target": user("ada"), **CONTENT, "event_type": "order.paid"},
        {"target": {"type": "users", "value": ["ada"]}, **CONTENT},
    ]
    body = {"notifications": items, "options": {"deduplicate": True}}
    answer = await call(host, "/batch", body)
    skipped = [result.get("skipped", False) for result in answer["results"]]
    assert skipped == [False, True, False, False]
    await ada.notifications(3)
    await ada.nothing_came()


async def test_what_was_refused_makes_no_repetition(host: Host) -> None:
    ada = await host.websocket("ada")
    item = {"target": user("ada"), **CONTENT}
    items = [
        {**item, "exclude_connection": "no id"},
        {**item, "idempotency_key": "k" * 257},
        {**item, "payload": "x" * 65_536},
        {**item, "payload": "x" * 65_536, "idempotency_key": "k"},
        item,
        item,
    ]
    body = {"notifications": items, "options": {"deduplicate": True}}
    results = (await call(host, "/batch", body))["results"]
    told = [(result["success"], result.get("skipped", False)) for result in results]
    assert told == [*[(False, False)] * 4, (True, False), (True, True)]
    await ada.notifications(1)
    await ada.nothing_came()


async def test_a_batch_has_1_to_100_items(host: Host) -> None:
    for count in (0, 101):
        body = {"notifications": [{"target": user("ada"), **CONTENT}] * count}
        assert (await refused(host, "/batch", body))["details"]["field"] == "notifications"


# --- templates ---

TEMPLATE = {
    "id": "order-shipped",
    "name": "Order shipped",
    "event_type": "order.shipped",
    "payload_template": {
        "title": "Order {{order.id}} is on its way",
        "count": "{{order.count}}",
        "list": ["{{order.items}}", "{{ who }}"],
    },
    "priority": "High",
    "ttl": 600,
}


async def test_a_templates_life(host: Host) -> None:
    response = await host.post("/api/v1/templates", TEMPLATE)
    assert response.status_code == 201
    created = response.json()
    assert {name: created[name] for name in TEMPLATE} == TEMPLATE
    assert (await host.post("/api/v1/templates", TEMPLATE)).status_code == 409
    path = "/api/v1/templates/order-shipped"
    assert (await host.get(path)).json() == created
    assert (await host.get("/api/v1/templates")).json() == {"templates": [created], "total": 1}
    changed = json.dumps({**TEMPLATE, "name": "Shipped"}).encode()
    response = await host.request("PUT", path, content=changed)
    assert (response.status_code, response.json()["name"]) == (200, "Shipped")
    assert (await host.request("DELETE", path)).status_code == 204
    assert (await host.get(path)).status_code == 404
    assert (await host.request("DELETE", path)).status_code == 404
    response = await host.post("/api/v1/templates", TEMPLATE, key=PUBLISH_KEY)
    assert response.status_code == 403


async def test_a_template_is_filled_in(host: Host) -> None:
    await host.post("/api/v1/templates", TEMPLATE)
    websocket = await host.websocket("ada")
    order = {"id": "A-1", "count": 2, "items": [{"sku": 7}]}
    body = {
        "target_user_id": "ada",
        "template_id": "order-shipped",
        "variables": {"order": order, "who": 'a "friend"'},
    }
    await call(host, "/send", body)
    message = await websocket.expect("notification")
    assert message["event_type"] == "order.shipped"
    assert message["payload"] == {
        "title": "Order A-1 is on its way",
        "count": 2,
        "list": [[{"sku": 7}], 'a "friend"'],
    }
    assert (message["metadata"]["priority"], message["metadata"]["ttl"]) == ("High", 600)
    error = await refused(host, "/send", {**body, "variables": {"order": {"id": 1, "count": 2}}})
    assert "order.items" in error["message"]
    error = await refused(host, "/send", {**body, "template_id": "unknown"}, 404)
    assert error["code"] == "NOT_FOUND"
    doubling = {"id": "doubling", "name": "d", "event_type": "x", "payload_template": ["{{x}}"] * 2}
    await host.post("/api/v1/templates", doubling)
    growing = {"target_user_id": "ada", "template_id": "doubling", "variables": {"x": "x" * 40_000}}
    assert (await refused(host, "/send", growing))["code"] == "VALIDATION_ERROR"
    item = {"target": user("ada"), "template_id": "order-shipped", "variables": {"who": 1}}
    answer = await call(host, "/batch", {"notifications": [item]})
    assert "order" in answer["results"][0]["error"]


# --- idempotency ---


@pytest.mark.parametrize("by", ["header", "field", "id"])
async def test_a_repeated_call_delivers_nothing_twice(host: Host, by: str) -> None:
    websocket = await host.websocket("ada")
    body: dict[str, Any] = {"target_user_id": "ada", **CONTENT}
    headers: dict[str, str] = {}
    if by == "header":
        headers["Idempotency-Key"] = "key-1"
    elif by == "field":
        body["idempotency_key"] = "key-1"
    else:
        body["id"] = str(uuid.uuid4())
    answers = [
        await host.post(f"{BASE}/send", body, key=PUBLISH_KEY, headers=headers) for _ in range(2)
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content
    assert "idempotent-replay" not in answers[0].headers
    assert answers[1].headers["idempotent-replay"] == "true"
    await websocket.notifications(1)
    await websocket.nothing_came()
    other = await host.post(
        f"{BASE}/send", {**body, "payload": 2}, key=PUBLISH_KEY, headers=headers
    )
    assert other.status_code == 422
    assert other.json()["error"]["code"] == "VALIDATION_ERROR"


async def test_a_key_is_good_for_its_caller_and_route(host: Host) -> None:
    body = {"target_user_id": "ada", **CONTENT}
    key = {"Idempotency-Key": "key-1"}
    first = await host.post(f"{BASE}/send", body, key=PUBLISH_KEY, headers=key)
    same_key_of_another = await host.post(f"{BASE}/send", body, headers=key)
    elsewhere = await host.post(
        BASE, {"target": user("ada"), **CONTENT}, key=PUBLISH_KEY, headers=key
    )
    ids = {each.json()["notification_id"] for each in (first, same_key_of_another, elsewhere)}
    assert len(ids) == 3
    too_long = await host.post(f"{BASE}/send", body, headers={"Idempotency-Key": "k" * 257})
    assert too_long.status_code == 422


async def test_an_idempotency_key_is_forgotten_after_its_window(start: StartServer) -> None:
    host = await start(idempotency={"max_keys": 2})
    body = {"target_user_id": "ada", **CONTENT}

    async def replayed(key: str) -> bool:
        response = await host.post(f"{BASE}/send", body, headers={"Idempotency-Key": key})
        return "idempotent-replay" in response.headers

    assert [await replayed(key) for key in ("1", "2", "1", "2", "3", "1")] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]


async def test_a_repetition_waits_for_the_first(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store answers late; both calls are at work at the same time."""
    asked = asyncio.Event()
    answer = asyncio.Event()
    calls = 0

    def enqueue_late(*arguments: object) -> Any:
        async def late() -> list[None]:
            await answer.wait()
            return [None]

        nonlocal calls
        calls += 1
        asked.set()
        return late()

    monkeypatch.setattr(MemoryUserLogs, "enqueue", enqueue_late)
    headers = {"Idempotency-Key": "key-1"}
    body = {"target_user_id": "ada", **CONTENT}
    requests = [
        asyncio.create_task(host.post(f"{BASE}/send", body, key=PUBLISH_KEY, headers=headers))
        for _ in range(5)
    ]
    await asked.wait()
    other = await host.post(
        f"{BASE}/send", {**body, "payload": 2}, key=PUBLISH_KEY, headers=headers
    )
    assert other.status_code == 422
    answer.set()
    answers = await asyncio.gather(*requests)
    assert {each.content for each in answers} == {answers[0].content}
    assert sum("idempotent-replay" in each.headers for each in answers) == 4
    assert calls == 1


async def test_an_answer_that_failed_is_not_kept(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: object) -> None:
        raise Unavailable("The queue cannot be reached.", retry_after=2)

    body = {"target_user_id": "ada", **CONTENT}
    headers = {"Idempotency-Key": "key-1"}
    with monkeypatch.context() as patch:
        patch.setattr(MemoryUserLogs, "enqueue", away)
        failed = await host.post(f"{BASE}/send", body, headers=headers)
    assert failed.status_code == 503
    assert failed.headers["retry-after"] == "2"
    assert failed.json()["error"]["code"] == "UNAVAILABLE"
    answer = await host.post(f"{BASE}/send", body, headers=headers)
    assert (answer.status_code, answer.json()["outcome"]) == (200, "queued")
    assert "idempotent-replay" not in answer.headers


async def test_items_of_a_batch_have_keys_of_their_own(host: Host) -> None:
    websocket = await host.websocket("ada")
    item = {"target": user("ada"), **CONTENT, "idempotency_key": "item-1"}
    answer = await call(host, "/batch", {"notifications": [item, item]})
    ids = [result["notification_id"] for result in answer["results"]]
    assert ids[0] == ids[1]
    again = await call(host, "/batch", {"notifications": [item]})
    assert again["results"][0]["notification_id"] == ids[0]
    await websocket.notifications(1)
    await websocket.nothing_came()
    whole = {"notifications": [{"target": user("ada"), **CONTENT}]}
    first = await call(host, "/batch", whole, Idempotency_Key="batch-1")
    assert await call(host, "/batch", whole, Idempotency_Key="batch-1") == first
    await websocket.notifications(1)
    await websocket.nothing_came()
