"""The seven publishing calls, on real core objects."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable
from typing import Any

import pytest

from notifyd.api.batches import NO_ID
from notifyd.api.guard import Request
from notifyd.errors import NotFound, Unavailable, ValidationError
from notifyd.eventually import Eventually, settled
from notifyd.templates import MemoryTemplates, Template
from tests.unit.api_server import ADMIN, PUBLISH, ApiServer, LaterLogs, ListSink, error_of

EVENT = {"event_type": "order.created", "payload": {"order_id": "A-1"}}


async def told(sink: ListSink) -> list[dict[str, Any]]:
    """The notifications that a connection was written, after the outbox was flushed."""
    await asyncio.sleep(0)
    return [message for message in sink.messages() if message["type"] == "notification"]


# --- each call ------------------------------------------------------------------------------------


async def test_send_to_a_user() -> None:
    server = ApiServer()
    _, first = server.connect("u1")
    _, second = server.connect("u1")
    response = await server.publish("/send", {"target_user_id": "u1", **EVENT})
    answer = response.json()
    assert response.status_code == 200
    assert uuid.UUID(answer.pop("notification_id")).version == 4
    assert answer == {
        "success": True,
        "delivered_to": 2,
        "failed": 0,
        "timestamp": "2026-01-01T12:00:00.000Z",
        "outcome": "delivered",
        "routed": 0,
        "queued": 0,
    }
    for sink in (first, second):
        (notification,) = await told(sink)
        assert notification["payload"] == {"order_id": "A-1"}
        assert notification["metadata"] == {
            "source": "http-api",
            "priority": "Normal",
            "audience": {"type": "All"},
        }


async def test_send_to_a_user_who_is_away_is_queued() -> None:
    answer = (await ApiServer().publish("/send", {"target_user_id": "u1", **EVENT})).json()
    assert (answer["success"], answer["outcome"], answer["queued"]) == (True, "queued", 1)


async def test_send_to_users_has_one_result_for_each() -> None:
    server = ApiServer()
    server.connect("u1")
    body = {"target_user_ids": ["u1", "u2", "u1"], **EVENT}
    answer = (await server.publish("/send-to-users", body)).json()
    assert answer["results"] == {
        "u1": {"outcome": "delivered", "connections": 1},
        "u2": {"outcome": "queued"},
    }
    assert (answer["delivered_to"], answer["queued"], answer["outcome"]) == (1, 1, "delivered")


async def test_send_to_channel_channels_and_all() -> None:
    server = ApiServer()
    _, sink = server.connect("u1", "orders", "alerts")
    server.connect("u2", "alerts")
    one = (await server.publish("/channel", {"channel": "orders", **EVENT})).json()
    assert (one["channel"], one["delivered_to"]) == ("orders", 1)
    body = {"channels": ["orders", "alerts", "none"], **EVENT}
    several = (await server.publish("/channels", body)).json()
    assert several["channels"] == {
        "orders": {"delivered_to": 1},
        "alerts": {"delivered_to": 2},
        "none": {"delivered_to": 0},
    }
    assert several["total_delivered"] == several["delivered_to"] == 2
    everybody = (await server.publish("/broadcast", EVENT)).json()
    assert everybody["delivered_to"] == 2
    assert len(await told(sink)) == 3


@pytest.mark.parametrize(
    ("target", "more"),
    [
        ({"type": "user", "value": "u1"}, set()),
        ({"type": "USERS", "value": ["u1"]}, {"results"}),
        ({"type": "Broadcast"}, set()),
        ({"type": "channel", "value": "orders"}, {"channel"}),
        ({"type": "channels", "value": ["orders"]}, {"channels", "total_delivered"}),
    ],
)
async def test_one_call_for_every_target(target: dict[str, Any], more: set[str]) -> None:
    server = ApiServer()
    server.connect("u1", "orders")
    answer = (await server.publish("", {"target": target, **EVENT})).json()
    assert answer["delivered_to"] == 1
    assert more <= answer.keys()


@pytest.mark.parametrize(
    "target",
    [
        {"type": "user"},
        {"type": "user", "value": ["u1"]},
        {"type": "users", "value": "u1"},
        {"type": "users", "value": []},
        {"type": "channel", "value": ["a"]},
        {"type": "channel", "value": "a b"},
        {"type": "channels", "value": ["a"] * 101},
        {"type": "channels", "value": ["a", "b\x00"]},
        {"type": "broadcast", "value": "all"},
        {"type": "everybody"},
    ],
)
async def test_a_target_that_makes_no_sense(target: dict[str, Any]) -> None:
    response = await ApiServer().publish("", {"target": target, **EVENT})
    assert response.status_code == 422
    assert error_of(response)["details"]["field"].startswith("target.")


# --- content --------------------------------------------------------------------------------------


async def test_everything_a_caller_may_say_reaches_the_recipient() -> None:
    server = ApiServer()
    _, sink = server.connect("u1", "orders", roles=("admin",))
    id = str(uuid.uuid4())
    body = {
        "channel": "orders",
        "priority": "hIGH",
        "ttl": 60,
        "correlation_id": "c-1",
        "source": "shop",
        "id": id.upper(),
        "require_ack": True,
        "audience": {"type": "roles", "value": ["admin"]},
        **EVENT,
    }
    answer = (await server.publish("/channel", body)).json()
    assert answer["notification_id"] == id
    (notification,) = await told(sink)
    assert notification["id"] == id
    assert notification["metadata"] == {
        "source": "shop",
        "priority": "High",
        "ttl": 60,
        "correlation_id": "c-1",
        "audience": {"type": "Roles"},
    }
    report = (await server.request("GET", f"/api/v1/notifications/{id}/acks")).json()
    assert report["recipients"] == [{"user_id": "u1", "state": "pending"}]


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"priority": "urgent"}, "priority"),
        ({"id": "no-uuid"}, "id"),
        ({"payload": None, "template_id": "t"}, "event_type"),
        ({"variables": {}}, "variables"),
        ({"audience": {"type": "Nobody"}}, "audience.type"),
        ({"audience": {"type": "All", "value": ["a"]}}, "audience.value"),
        ({"audience": {"type": "Roles"}}, "audience.value"),
        ({"audience": {"type": "Users", "value": ["a", ""]}}, "audience.value[1]"),
        ({"audience": {"type": "Channels", "value": ["a b"]}}, "audience.value[0]"),
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": "é" * 129}, "idempotency_key"),
        ({"channel": ":a"}, "channel"),
        ({"event_type": "x" * 129}, "event_type"),
        ({"correlation_id": "x" * 513}, "correlation_id"),
    ],
)
async def test_content_out_of_bounds(extra: dict[str, Any], field: str) -> None:
    response = await ApiServer().publish("/channel", {"channel": "orders", **EVENT, **extra})
    assert response.status_code == 422
    assert error_of(response)["details"]["field"] == field


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"payload": 1}, "event_type"),
        ({"event_type": "a"}, "payload"),
        ({}, "event_type"),
        ({"template_id": "t", "payload": 1}, "payload"),
    ],
)
async def test_either_an_event_or_a_template(body: dict[str, Any], field: str) -> None:
    response = await ApiServer().publish("/broadcast", body)
    assert response.status_code == 422
    assert error_of(response)["details"]["field"] == field


@pytest.mark.parametrize(
    "payload", ["null", "0", '"text"', "[]", "{}", "1.50", "12345678901234567890"]
)
async def test_any_json_is_a_payload_and_numbers_keep_their_digits(payload: str) -> None:
    server = ApiServer()
    _, sink = server.connect("u1")
    content = f'{{"event_type":"a", "payload" :\n {payload} }}'.encode()
    response = await server.publish("/broadcast", None, content=content)
    assert response.status_code == 200
    await asyncio.sleep(0)
    assert f'"payload":{payload},'.encode() in b"".join(sink.written)


async def test_a_payload_is_one_line_and_at_most_64_deep() -> None:
    server = ApiServer()
    fits = b'{"event_type":"a","payload":' + b"[" * 64 + b"]" * 64 + b"}"
    assert (await server.publish("/broadcast", None, content=fits)).status_code == 200
    deeper = b'{"event_type":"a","payload":' + b"[" * 65 + b"]" * 65 + b"}"
    response = await server.publish("/broadcast", None, content=deeper)
    assert response.status_code == 422
    assert error_of(response)["details"]["field"] == "payload"


async def test_a_notification_is_at_most_64_kib_when_encoded() -> None:
    server = ApiServer()
    server.connect("u1")
    # Within the body's limit, and over the notification's once its metadata is there.
    body = json.dumps({"event_type": "a", "payload": "x" * 65480}, separators=(",", ":")).encode()
    assert len(body) <= 65536
    response = await server.publish("/broadcast", None, content=body)
    assert response.status_code == 422
    assert error_of(response)["details"] == {
        "field": "payload",
        "constraint": "at most 65536 bytes",
    }


async def test_the_sender_s_own_connection_can_be_left_out() -> None:
    server = ApiServer()
    own, own_sink = server.connect("u1", "room")
    _, other_sink = server.connect("u2", "room")
    body = {"channel": "room", "exclude_connection": own.id, **EVENT}
    assert (await server.publish("/channel", body)).json()["delivered_to"] == 1
    assert await told(own_sink) == []
    assert len(await told(other_sink)) == 1


# --- what nobody got ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "body", "hint"),
    [
        ("/channel", {"channel": "none", **EVENT}, 'nobody is subscribed to "none"'),
        ("/channels", {"channels": list("abcde"), **EVENT}, '"a", "b", "c" and 2 more'),
        ("/send", {"target_user_id": "u9", "ttl": 0, **EVENT}, '"u9": not connected'),
        (
            "/send",
            {"target_user_id": "u1", "audience": {"type": "Users", "value": []}, **EVENT},
            "audience",
        ),
    ],
)
async def test_development_says_why_nobody_was_reached(call: str, body: Any, hint: str) -> None:
    for production in (False, True):
        server = ApiServer(production=production)
        server.connect("u1")
        answer = (await server.publish(call, body)).json()
        assert not answer["success"]
        assert (hint in answer["hint"]) if not production else ("hint" not in answer)


async def test_development_says_why_a_broadcast_reached_nobody() -> None:
    answer = (await ApiServer(production=False).publish("/broadcast", EVENT)).json()
    assert "/demo" in answer["hint"]


async def test_a_full_queue_says_why_it_failed() -> None:
    server = ApiServer(production=False)
    for _ in range(3):
        await server.publish("/send", {"target_user_id": "u1", "priority": "High", **EVENT})
    body = {"target_user_id": "u1", "priority": "Low", **EVENT}
    answer = (await server.publish("/send", body)).json()
    assert (answer["outcome"], answer["failed"], answer["reason"]) == ("failed", 1, "queue_full")
    assert "hint" not in answer


# --- templates ------------------------------------------------------------------------------------

TEMPLATE = {
    "id": "shipped",
    "name": "Shipped",
    "event_type": "order.shipped",
    "payload_template": {"text": "Order {{order.id}}", "count": "{{n}}"},
    "priority": "high",
    "ttl": 60,
}


class LaterTemplates(MemoryTemplates):
    """Answers as a store does: with an awaitable."""

    async def _later(self, tenant: str, id: str) -> Template:
        return super().get(tenant, id)

    def get(self, tenant: str, id: str) -> Eventually[Template]:  # type: ignore[override]  # the protocol allows both
        return self._later(tenant, id)


@pytest.mark.parametrize("templates", [MemoryTemplates, LaterTemplates])
async def test_a_template_is_filled_in(templates: type[MemoryTemplates]) -> None:
    server = ApiServer(templates=templates())
    _, sink = server.connect("u1")
    assert (await server.request("POST", "/api/v1/templates", TEMPLATE)).status_code == 201
    item = {"template_id": "shipped", "variables": {"order": {"id": "A-1"}, "n": 3}}
    target = {"type": "user", "value": "u1"}
    assert (await server.publish("/broadcast", item)).json()["delivered_to"] == 1
    batch = {"notifications": [{"target": target, **item, "priority": "Low", "ttl": 5}]}
    result = (await server.publish("/batch", batch)).json()["results"][0]
    assert result["delivered_to"] == 1
    first, second = await told(sink)
    assert first["event_type"] == "order.shipped"
    assert first["payload"] == {"text": "Order A-1", "count": 3}
    assert (first["metadata"]["priority"], first["metadata"]["ttl"]) == ("High", 60)
    assert (second["metadata"]["priority"], second["metadata"]["ttl"]) == ("Low", 5)


@pytest.mark.parametrize("templates", [MemoryTemplates, LaterTemplates])
async def test_a_template_that_is_not_there_or_lacks_a_variable(
    templates: type[MemoryTemplates],
) -> None:
    server = ApiServer(templates=templates())
    await server.request("POST", "/api/v1/templates", TEMPLATE)
    missing = await server.publish("/broadcast", {"template_id": "none"})
    assert (missing.status_code, error_of(missing)["code"]) == (404, "NOT_FOUND")
    lacking = await server.publish("/broadcast", {"template_id": "shipped", "variables": {"n": 1}})
    assert lacking.status_code == 422
    assert error_of(lacking)["details"]["field"] == "variables.order.id"
    item = {"target": {"type": "broadcast"}, "template_id": "shipped"}
    results = (await server.publish("/batch", {"notifications": [item]})).json()["results"]
    assert results[0]["outcome"] == "failed"
    assert "order.id" in results[0]["error"]


# --- batches --------------------------------------------------------------------------------------


def item(type: str, value: object = None, **content: object) -> dict[str, Any]:
    """One item of a batch."""
    target = {"type": type} if value is None else {"type": type, "value": value}
    return {"target": target, **(content or EVENT)}


async def test_a_bad_item_is_an_error_of_that_item_alone() -> None:
    server = ApiServer()
    _, sink = server.connect("u1", "orders")
    items = [
        item("user", "u1"),
        item("user"),
        "nonsense",
        item("channel", "orders", event_type="a", payload=[[]], ttl=-1),
        item("channels", ["orders"], event_type="a", payload=1, ttll=1),
        item("channel", "orders"),
    ]
    answer = (await server.publish("/batch", {"notifications": items})).json()
    uuid.UUID(answer["batch_id"])
    results = answer["results"]
    assert [result["index"] for result in results] == list(range(len(items)))
    assert [result["success"] for result in results] == [True] + [False] * (len(items) - 2) + [True]
    for result in results[1:-1]:
        assert result["notification_id"] == NO_ID
        assert result["outcome"] == "failed"
        assert result["error"]
    assert answer["summary"] == {
        "total": len(items),
        "succeeded": 2,
        "failed": len(items) - 2,
        "skipped": 0,
        "total_delivered": 2,
    }
    assert len(await told(sink)) == 2


@pytest.mark.parametrize("count", [0, 101])
async def test_a_batch_has_1_to_100_items(count: int) -> None:
    body = {"notifications": [item("broadcast")] * count}
    response = await ApiServer().publish("/batch", body)
    assert response.status_code == 422
    assert error_of(response)["details"]["field"] == "notifications"


async def test_stop_on_error_stops_at_errors_and_not_at_nobody() -> None:
    server = ApiServer()
    server.connect("u1")
    items = [item("channel", "none"), item("user", "u1"), item("user"), item("user", "u1")]
    options = {"stop_on_error": True}
    answer = (await server.publish("/batch", {"notifications": items, "options": options})).json()
    results = answer["results"]
    assert [result.get("outcome") for result in results] == ["nobody", "delivered", "failed", None]
    assert results[3]["skipped"] is True
    assert results[3]["success"] is False
    assert answer["summary"] == {
        "total": 4,
        "succeeded": 1,
        "failed": 2,
        "skipped": 1,
        "total_delivered": 1,
    }


async def test_stop_on_error_stops_at_a_failure() -> None:
    server = ApiServer()
    full = [item("user", "u2", priority="High", **EVENT)] * 3
    low = item("user", "u2", priority="Low", **EVENT)
    body = {"notifications": [*full, low, *full], "options": {"stop_on_error": True}}
    results = (await server.publish("/batch", body)).json()["results"]
    assert results[3]["outcome"] == "failed"
    assert results[3]["error"] == "queue_full"
    assert all(result.get("skipped") for result in results[4:])


async def test_deduplicate_skips_a_repeated_target_with_the_same_event() -> None:
    server = ApiServer()
    _, sink = server.connect("u1")
    items = [
        item("users", ["u1", "u2"]),
        item("users", ["u2", "u1"]),
        item("users", ["u1", "u2"], event_type="other", payload=1),
    ]
    options = {"deduplicate": True}
    answer = (await server.publish("/batch", {"notifications": items, "options": options})).json()
    assert [result.get("skipped", False) for result in answer["results"]] == [False, True, False]
    assert answer["results"][1]["success"] is True
    assert answer["summary"]["skipped"] == 1
    assert len(await told(sink)) == 2


async def test_a_store_that_answers_later_gets_every_item_before_the_first_is_awaited() -> None:
    begun: list[str] = []
    answer = asyncio.Event()

    def enqueue(tenant: str, users: Any, notification: Any) -> Awaitable[Any]:
        begun.append(users[0])
        return finish(users[0])

    async def finish(user: str) -> Any:
        if user == "u1":
            assert begun == ["u1", "down", "u3"]
            answer.set()
        await answer.wait()
        if user == "down":
            raise Unavailable("The store is away.")
        return [None]

    server = ApiServer(logs=LaterLogs(enqueue))
    items = [item("user", "u1"), item("user", "down"), item("user", "u3")]
    results = (await server.publish("/batch", {"notifications": items})).json()["results"]
    assert [result["outcome"] for result in results] == ["queued", "failed", "queued"]
    assert results[1]["error"] == "The store is away."


async def test_stop_on_error_awaits_each_item_before_the_next() -> None:
    begun: list[str] = []

    async def enqueue(tenant: str, users: Any, notification: Any) -> Any:
        begun.append(users[0])
        if users[0] == "down":
            raise Unavailable("The store is away.")
        return [None]

    server = ApiServer(logs=LaterLogs(enqueue))
    items = [item("user", "u1"), item("user", "down"), item("user", "u3")]
    body = {"notifications": items, "options": {"stop_on_error": True, "deduplicate": True}}
    results = (await server.publish("/batch", body)).json()["results"]
    assert begun == ["u1", "down"]
    assert [result.get("skipped", False) for result in results] == [False, False, True]


async def test_a_store_that_is_down_is_503_for_one_recipient() -> None:
    async def enqueue(*args: Any) -> Any:
        raise Unavailable("The store is away.", retry_after=3)

    server = ApiServer(logs=LaterLogs(enqueue))
    body = {"target_user_id": "u1", "idempotency_key": "k", **EVENT}
    for _ in range(2):
        response = await server.publish("/send", body)
        assert response.status_code == 503
        assert response.headers["Retry-After"] == "3"
        assert "Idempotent-Replay" not in response.headers


# --- idempotency ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"Idempotency-Key": "k-1"}, {}),
        ({}, {"idempotency_key": "k-1"}),
        ({"Idempotency-Key": "k-1"}, {"idempotency_key": "k-1"}),
        ({}, {"id": "0b6c1f0e-6a0e-4f3a-9d43-1f2f6b6f0c55"}),
        ({"Idempotency-Key": "k-1"}, {"id": "0b6c1f0e-6a0e-4f3a-9d43-1f2f6b6f0c55"}),
    ],
)
async def test_a_repeated_call_delivers_nothing_twice(
    headers: dict[str, str], field: dict[str, str]
) -> None:
    server = ApiServer()
    _, sink = server.connect("u1", "orders")
    body = {"channel": "orders", **EVENT, **field}
    first = await server.publish("/channel", body, headers=headers)
    again = await server.publish("/channel", body, headers=headers)
    assert first.json() == again.json()
    assert "Idempotent-Replay" not in first.headers
    assert again.headers["Idempotent-Replay"] == "true"
    assert first.headers["X-Request-ID"] != again.headers["X-Request-ID"]
    assert len(await told(sink)) == 1
    # Another body, another route, another API key.
    other = await server.publish("/channel", {**body, "ttl": 1}, headers=headers)
    assert other.status_code == 422
    route = await server.publish("/broadcast", {**EVENT, **field}, headers=headers)
    assert route.json()["delivered_to"] == 1
    key = await server.publish("/channel", body, headers=headers, key=ADMIN)
    assert "Idempotent-Replay" not in key.headers


async def test_an_id_is_known_again_under_another_key() -> None:
    server = ApiServer()
    _, sink = server.connect("u1")
    body = {**EVENT, "id": str(uuid.uuid4())}
    await server.publish("/broadcast", body, headers={"Idempotency-Key": "a"})
    again = await server.publish("/broadcast", body, headers={"Idempotency-Key": "b"})
    assert again.headers["Idempotent-Replay"] == "true"
    assert len(await told(sink)) == 1


async def test_a_header_and_a_field_that_differ() -> None:
    body = {**EVENT, "idempotency_key": "a"}
    response = await ApiServer().publish("/broadcast", body, headers={"Idempotency-Key": "b"})
    assert response.status_code == 422
    assert error_of(response)["details"]["field"] == "idempotency_key"


async def test_a_refusal_is_kept_too() -> None:
    server = ApiServer()
    headers = {"Idempotency-Key": "k"}
    first = await server.publish("/broadcast", {"template_id": "none"}, headers=headers)
    again = await server.publish("/broadcast", {"template_id": "none"}, headers=headers)
    assert first.status_code == again.status_code == 404
    assert again.headers["Idempotent-Replay"] == "true"


async def test_the_second_call_waits_for_the_first() -> None:
    begun, release = asyncio.Event(), asyncio.Event()
    ids: list[str] = []

    async def enqueue(tenant: str, users: Any, notification: Any) -> Any:
        ids.append(notification.id)
        begun.set()
        await release.wait()
        return [None]

    server = ApiServer(logs=LaterLogs(enqueue))
    body = {"target_user_id": "u1", "idempotency_key": "k", **EVENT}
    calls = [asyncio.create_task(server.publish("/send", body)) for _ in range(2)]
    await begun.wait()
    release.set()
    first, second = [(await call).json() for call in calls]
    assert first == second
    assert ids == [first["notification_id"]]


async def test_keys_of_a_batch_and_of_its_items() -> None:
    server = ApiServer()
    _, sink = server.connect("u1")
    keyed = item("user", "u1", idempotency_key="k", **EVENT)
    named = item("user", "u1", id=str(uuid.uuid4()), **EVENT)
    # The batch's own key is none of its items'.
    body = {"notifications": [keyed, named, keyed], "idempotency_key": "k"}
    first = (await server.publish("/batch", body)).json()
    assert first["summary"]["succeeded"] == 3
    assert first["results"][0]["notification_id"] == first["results"][2]["notification_id"]
    assert len(await told(sink)) == 2
    again = await server.publish("/batch", body)
    assert again.headers["Idempotent-Replay"] == "true"
    assert again.json() == first
    changed = {**keyed, "ttl": 7}
    body = {"notifications": [keyed, named, changed]}
    second = (await server.publish("/batch", body, headers={"Idempotency-Key": "b"})).json()
    assert [result["success"] for result in second["results"]] == [True, True, False]
    assert "another body" in second["results"][2]["error"]
    assert len(await told(sink)) == 2


async def test_a_bad_item_with_a_key_is_told_as_itself() -> None:
    server = ApiServer()
    server.connect("u1")
    keyed = item("user", "u1", idempotency_key="k", event_type="a", payload="x" * 65536)
    results = (await server.publish("/batch", {"notifications": [keyed]})).json()["results"]
    assert "65536" in results[0]["error"]


# --- in process -----------------------------------------------------------------------------------


async def test_notifications_are_counted_by_target_and_source() -> None:
    server = ApiServer()
    await server.publish("/broadcast", EVENT)
    assert server.metrics.notifications_total.labels("broadcast", "http").value == 1


async def test_the_embedding_application_needs_no_key_and_gets_errors_raised() -> None:
    server = ApiServer()
    _, sink = server.connect("u1")
    endpoint = server.endpoint("POST", "/api/v1/notifications/broadcast")

    async def call(body: dict[str, Any], key: str | None = None) -> dict[str, Any]:
        content = json.dumps(body).encode()
        request = Request("POST", endpoint.path, {}, b"", [], content, "")
        request.source = "python"
        request.idempotency_key = key
        answer: dict[str, Any] = json.loads(await settled(endpoint.in_process(request)))
        return answer

    id = str(uuid.uuid4())
    assert (await call({**EVENT, "id": id}))["notification_id"] == id
    first = await call(EVENT, "k")
    assert await call(EVENT, "k") == first
    assert len(await told(sink)) == 2
    assert server.metrics.notifications_total.labels("broadcast", "python").value == 2
    for key in (None, "other"):
        with pytest.raises(ValidationError) as refused:
            await call({"event_type": "a"}, key)
        assert refused.value.field == "payload"
        with pytest.raises(NotFound):
            await call({"template_id": "none"}, key and key + "2")


@pytest.mark.parametrize("scope_key", [PUBLISH, ADMIN])
async def test_publish_and_admin_keys_may_publish(scope_key: str) -> None:
    response = await ApiServer().publish("/broadcast", EVENT, key=scope_key)
    assert response.status_code == 200
