"""What administrators and monitors see and do: devices, tokens, health, figures, metrics."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from typing import Any

import jwt
import pytest
from websockets.exceptions import InvalidStatus

from notifyd.queue.memory import MemoryUserLogs
from notifyd.server.serve import listen
from tests import front_door
from tests.conftest import StartServer
from tests.front_door import (
    ADMIN_KEY,
    ORIGIN,
    PUBLISH_KEY,
    READ_KEY,
    SECRET,
    WAIT,
    Host,
    Listener,
    Transport,
    channel,
    token,
    until,
    user,
)

PRODUCTION: dict[str, Any] = {
    "server": {"mode": "production"},
    "channels": {"rules": {"*": {"subscribe": "any"}}},
}


# --- users' devices ---


async def test_a_users_devices(host: Host) -> None:
    websocket = await host.websocket("ada", user_agent_header="phone/1")
    stream = await host.sse("ada", headers={"User-Agent": "laptop/2"})
    response = await host.get("/api/v1/users/ada/connections", key=READ_KEY)
    found = response.json()
    assert found["user_id"] == "ada"
    phone, laptop = found["connections"]
    assert phone["id"] == websocket.connected["connection_id"]
    assert laptop["id"] == stream.connected["connection_id"]
    assert (phone["transport"], phone["user_agent"]) == ("websocket", "phone/1")
    assert (laptop["transport"], laptop["user_agent"]) == ("sse", "laptop/2")
    assert phone["address"] == laptop["address"] == "127.0.0.1"
    assert phone["since"] <= phone["last_heard"]
    nobody = await host.get("/api/v1/users/bob/connections")
    assert nobody.json() == {"user_id": "bob", "connections": []}


async def test_who_is_online(host: Host) -> None:
    await host.websocket("ada")
    await host.sse("ada")
    body = {"user_ids": ["ada", "bob"]}
    response = await host.post("/api/v1/presence", body, key=READ_KEY)
    assert response.json() == {"online": {"ada": 2}}
    for count in (0, 1001):
        body = {"user_ids": [f"u{n}" for n in range(count)]}
        assert (await host.post("/api/v1/presence", body)).status_code == 422


async def told_to_stay_away(listener: Listener, transport: Transport, reason: str) -> None:
    """Disconnected by an administrator, with this reason."""
    told = await listener.rest()
    assert told == [{"type": "error", "code": "FORBIDDEN", "message": reason}]
    if transport == "websocket":
        assert listener.end_told() == f"4003 {reason}"


async def test_one_connection_is_closed(host: Host, transport: Transport) -> None:
    listener = await host.listen(transport, "ada")
    other = await host.websocket("ada")
    path = f"/api/v1/connections/{listener.connected['connection_id']}"
    assert (await host.request("DELETE", path, key=READ_KEY)).status_code == 403
    response = await host.request("DELETE", path, content=b'{"reason":"moved"}')
    assert response.status_code == 204
    await told_to_stay_away(listener, transport, "moved")
    await other.nothing_came()
    assert (await host.request("DELETE", path)).status_code == 404
    assert (await host.request("DELETE", "/api/v1/connections/x")).status_code == 422


async def test_a_user_is_disconnected_and_may_come_back(host: Host, transport: Transport) -> None:
    listener = await host.listen(transport, "ada")
    response = await host.post("/api/v1/users/ada/disconnect", b"")
    assert response.json() == {"user_id": "ada", "disconnected": 1, "revoked": False}
    await told_to_stay_away(listener, transport, "Disconnected by an administrator.")
    await host.listen(transport, "ada")


async def test_revoking_refuses_the_tokens_there_are(host: Host) -> None:
    seen, unseen = token("ada"), token("ada", jti="unseen")
    without_iat = token("ada", iat=None)
    listener = await host.websocket(jwt=seen)
    await host.websocket(jwt=without_iat)
    response = await host.post("/api/v1/users/ada/disconnect", {"revoke": True})
    assert response.json() == {"user_id": "ada", "disconnected": 2, "revoked": True}
    assert (await listener.closed())[0] == 4003
    for old in (seen, unseen, without_iat):
        with pytest.raises(InvalidStatus) as refused:
            await host.websocket(jwt=old, greeted=False)
        assert refused.value.response.status_code == 401
        authorization = {"Authorization": f"Bearer {old}"}
        assert (await host.get("/sse", key=None, headers=authorization)).status_code == 401
        ack = await host.post(
            "/api/v1/acks", {"notification_id": str(uuid.uuid4())}, key=None, headers=authorization
        )
        assert ack.status_code == 401
    late = await host.websocket(None, greeted=False)
    await late.send("Auth", {"token": seen})
    assert (await late.closed())[0] == 4001
    await host.websocket(jwt=token("ada", iat=int(time.time()) + 2))
    await host.websocket("bob")


async def test_a_token_is_made(host: Host) -> None:
    body = {"user_id": "ada", "ttl": 60, "roles": ["admin"], "channels": ["orders"]}
    response = await host.post("/api/v1/tokens", body)
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    made = response.json()
    claims = jwt.decode(made["token"], SECRET, algorithms=["HS256"])
    assert (claims["sub"], claims["roles"], claims["channels"]) == ("ada", ["admin"], ["orders"])
    # `iat` has a fraction, so that a token made right after a revocation is a new one.
    assert 60 <= claims["exp"] - claims["iat"] <= 61
    websocket = await host.websocket(jwt=made["token"])
    assert websocket.connected["session"]["expires_at"] == made["expires_at"]
    await websocket.send("Subscribe", {"channels": ["alerts"]})
    assert (await websocket.expect("error"))["code"] == "SUBSCRIPTION_ERROR"
    assert (await host.post("/api/v1/tokens", body, key=PUBLISH_KEY)).status_code == 403
    other_tenant = await host.post("/api/v1/tokens", {**body, "tenant_id": "acme"})
    assert other_tenant.status_code == 422


# --- scopes ---

READS = (
    "/api/v1/channels",
    "/api/v1/users/ada/connections",
    "/api/v1/templates",
    "/stats",
    "/api/v1/stats",
    "/api/v1/stats/acks",
)


async def test_reading_needs_the_scope(host: Host) -> None:
    for path in READS:
        statuses = [
            (await host.get(path, key=key)).status_code
            for key in (None, "nonsense", PUBLISH_KEY, READ_KEY, ADMIN_KEY)
        ]
        assert statuses == [401, 401, 403, 200, 200], path


async def test_a_key_that_expired_is_refused(start: StartServer) -> None:
    key = {
        "name": "late",
        "key": "a-key-that-will-expire",
        "scopes": ["read"],
        "expires_at": "2999-01-01T00:00:00Z",
    }
    host = await start(auth={"api_keys": [key]})
    assert (await host.get("/stats", key="a-key-that-will-expire")).status_code == 200
    host.clock.advance(1000 * 365.25 * 86400)
    assert (await host.get("/stats", key="a-key-that-will-expire")).status_code == 401


# --- health, figures, metrics ---


async def test_health(host: Host) -> None:
    await host.listen("websocket", "ada", "orders")
    await host.publish(user("bob"))
    health = (await host.get("/health", key=None)).json()
    assert health["status"] == "healthy"
    assert health["uptime_seconds"] >= 0
    assert health["connections"] == {"total": 1, "unique_users": 1, "channels_count": 1}
    assert health["queue"] == {"enabled": True, "backend": "memory", "total_messages": 1}
    assert health["redis"] == health["postgres"] == {"status": "disabled", "connected": False}
    assert health["cluster"] == {"enabled": False}
    assert (await host.get("/health/live", key=None)).json() == {"status": "alive"}
    assert (await host.get("/health/ready", key=None)).json() == {"status": "ready"}


async def test_production_tells_strangers_little(start: StartServer) -> None:
    host = await start(**PRODUCTION)
    strangers = (await host.get("/health", key=None)).json()
    assert set(strangers) == {"status", "version", "uptime_seconds"}
    assert set((await host.get("/health", key=PUBLISH_KEY)).json()) == set(strangers)
    assert "queue" in (await host.get("/health", key=READ_KEY)).json()
    statuses = [
        (await host.get("/metrics", key=key)).status_code for key in (None, PUBLISH_KEY, READ_KEY)
    ]
    assert statuses == [401, 403, 200]
    assert (await host.get("/demo", key=None)).status_code == 404


async def test_metrics_may_be_public_or_off(start: StartServer) -> None:
    host = await start(**PRODUCTION, metrics={"public": True})
    assert (await host.get("/metrics", key=None)).status_code == 200
    host = await start(metrics={"enabled": False})
    assert (await host.get("/metrics")).status_code == 404


async def test_production_masks_what_failed(
    start: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a secret of the house")

    monkeypatch.setattr(MemoryUserLogs, "enqueue", fail)
    body = {"target": user("ada"), "event_type": "x", "payload": 1}
    host = await start(**PRODUCTION)
    response = await host.post("/api/v1/notifications", body)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "INTERNAL")
    assert "secret of the house" not in response.text
    development = await start()
    response = await development.post("/api/v1/notifications", body)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "INTERNAL")
    assert "secret of the house" in response.text


async def test_development_says_how_to_mend_it(start: StartServer) -> None:
    host = await start()
    with pytest.raises(InvalidStatus) as refused:
        await host.websocket(jwt=token("ada", expires_in=-100))
    error = json.loads(refused.value.response.body or b"")["error"]
    assert re.search(r"expired \d+ s ago", error["hint"])
    production = await start(**PRODUCTION)
    with pytest.raises(InvalidStatus) as refused:
        await production.websocket(jwt=token("ada", expires_in=-100))
    assert "hint" not in json.loads(refused.value.response.body or b"")["error"]


async def test_figures(host: Host) -> None:
    ada = await host.websocket("ada")
    await ada.subscribe("orders")
    await host.sse("ada", query="channels=orders")
    await host.publish(user("ada"))
    await host.publish(user("bob"))
    await host.publish(channel("orders"))
    await host.publish({"type": "broadcast"})
    figures = (await host.get("/api/v1/stats", key=READ_KEY)).json()
    assert figures["connections"] == {
        "total_connections": 2,
        "unique_users": 1,
        "websocket": 1,
        "sse": 1,
        "channels": {"orders": 2},
    }
    assert figures["users"] == {"connected": 1}
    assert figures["channels"] == {"active": 1, "subscriptions": 2}
    assert figures["notifications"] == {
        "total_sent": 4,
        "total_delivered": 6,
        "total_failed": 0,
        "user_notifications": 2,
        "broadcast_notifications": 1,
        "channel_notifications": 1,
    }
    assert figures["queue"] == {"enabled": True, "backend": "memory", "total_messages": 1}
    assert figures["redis"]["connected"] is False
    assert figures["ack"]["enabled"] is True
    assert (await host.get("/stats")).json() == figures


DOCUMENTED = {
    "connections",
    "users_connected",
    "channels_active",
    "channel_subscriptions",
    "connections_opened_total",
    "connections_closed_total",
    "connection_duration_seconds",
    "notifications_total",
    "deliveries_total",
    "delivery_failures_total",
    "dispatch_seconds",
    "fanout_seconds",
    "outbox_bytes",
    "queue_messages",
    "queue_enqueued_total",
    "queue_replayed_total",
    "queue_expired_total",
    "queue_dropped_total",
    "queue_corrupt_total",
    "ack_pending",
    "ack_received_total",
    "ack_expired_total",
    "ack_seconds",
    "ack_notes_lost_total",
    "ratelimit_allowed_total",
    "ratelimit_denied_total",
    "http_requests_total",
    "http_request_seconds",
    "loop_lag_seconds",
}


async def test_every_documented_metric_is_there_and_nobody_elses_names(host: Host) -> None:
    await host.listen("websocket", "a-users-name", "a-channels-name")
    await host.publish(channel("a-channels-name"))
    await host.get("/api/v1/channels/a-channels-name")
    response = await host.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    types = dict(re.findall(r"^# TYPE notifyd_(\w+) (\w+)$", response.text, re.MULTILINE))
    assert set(types) == DOCUMENTED
    assert "a-users-name" not in response.text
    assert "a-channels-name" not in response.text


@pytest.mark.parametrize("sources", [False, True])
async def test_metrics_of_stores_are_those_of_the_stores_in_use(
    start_on: StartServer, redis_url: str, sources: bool
) -> None:
    chosen = {"trigger_enabled": True, "stream_key": "m:stream"} if sources else {}
    host = await start_on(
        ack={"backend": "redis"}, redis={"url": redis_url, "key_prefix": "m", **chosen}
    )
    found = set(re.findall(r"^# TYPE notifyd_(\w+) ", (await host.get("/metrics")).text, re.M))
    in_redis = {"redis_up", "redis_breaker_state", "redis_reconnects_total"}
    of_what_comes = {
        "redis_bad_messages_total",
        "redis_dead_letters_total",
        "redis_trigger_active",
    }
    assert found == DOCUMENTED | in_redis | (of_what_comes if sources else set())
    assert await host.metric("redis_up") == 1


async def test_metrics_move(start: StartServer) -> None:
    host = await start(
        websocket={"heartbeat_interval": 0.05},
        queue={"max_size_per_user": 1, "cleanup_interval_seconds": 0.05},
        ack={"timeout_seconds": 30, "cleanup_interval_seconds": 0.05},
    )
    websocket = await host.websocket("ada", query="acks=1")
    await websocket.subscribe("orders", "alerts")
    stream = await host.sse("bob")
    ada = (await host.publish(user("ada")))["notification_id"]
    await host.publish({"type": "broadcast"})
    await host.publish(user("cleo"), priority="Low")
    await host.publish(user("cleo"), ttl=60)
    assert await host.metric("queue_messages") == 1
    assert await host.metric("ack_pending") == 1
    await websocket.notifications(2)
    await websocket.ack(ada)
    late = await host.websocket("cleo", query="acks=1")
    await late.expect("gap")
    await late.notifications(1)
    await stream.close()
    await until(lambda: host.notifyd._registry.by_transport["sse"] == 0)
    host.clock.advance(61)
    expired = host.notifyd.metrics.queue_expired_total
    await until(lambda: expired.value == 1, "the expiry of what is queued")
    values = {
        ("connections", "transport=websocket"): 2.0,
        ("connections", "transport=sse"): 0.0,
        ("users_connected", ""): 2.0,
        ("channels_active", ""): 2.0,
        ("channel_subscriptions", ""): 2.0,
        ("connections_opened_total", "transport=sse"): 1.0,
        ("connection_duration_seconds_count", ""): 1.0,
        ("notifications_total", "target=user,source=http"): 3.0,
        ("notifications_total", "target=broadcast,source=http"): 1.0,
        ("deliveries_total", "transport=websocket"): 2.0,
        ("deliveries_total", "transport=sse"): 1.0,
        ("dispatch_seconds_count", ""): 4.0,
        ("queue_enqueued_total", ""): 2.0,
        ("queue_dropped_total", ""): 1.0,
        ("queue_replayed_total", ""): 1.0,
        ("queue_expired_total", ""): 1.0,
        ("queue_messages", ""): 0.0,
        ("ack_received_total", ""): 1.0,
        ("ack_seconds_count", ""): 1.0,
        ("ack_expired_total", ""): 1.0,
        ("ack_pending", ""): 0.0,
    }
    found = {}
    for name, labels in values:
        given = dict(pair.split("=") for pair in labels.split(",") if pair)
        found[name, labels] = await host.metric(name, **given)
    assert found == values
    for name in ("fanout_seconds_count", "loop_lag_seconds_count", "http_request_seconds_count"):
        assert await host.metric(name) > 0
    calls = {"method": "POST", "route": "/api/v1/notifications", "status": "200"}
    assert await host.metric("http_requests_total", **calls) == 4


# --- every answer ---


async def test_every_answer_has_a_request_id(host: Host) -> None:
    fast = {"target": user("ada"), "event_type": "x", "payload": 1}
    for request_id, kept in (("mine-1", True), ("x" * 128, True), ("x" * 129, False)):
        headers = {"X-Request-ID": request_id}
        answers = [
            await host.get("/health", headers=headers),
            await host.get("/nowhere", headers=headers),
            await host.get("/stats", key=None, headers=headers),
            await host.request("PATCH", "/health", headers=headers),
            await host.post("/api/v1/notifications", fast, headers=headers),
            await host.post("/api/v1/notifications", b"{", headers=headers),
            await host.get("/sse", key=None, headers=headers),
        ]
        assert [answer.status_code for answer in answers] == [200, 404, 401, 405, 200, 400, 401]
        for answer in answers:
            assert (answer.headers["x-request-id"] == request_id) is kept
    first, second = [(await host.get("/health")).headers["x-request-id"] for _ in range(2)]
    assert first != second
    assert first


async def test_a_method_that_is_not_there_says_which_are(host: Host) -> None:
    response = await host.request("DELETE", "/api/v1/channels")
    assert response.status_code == 405
    assert response.headers["allow"] == "GET, HEAD, OPTIONS"
    response = await host.request("HEAD", "/health")
    assert (response.status_code, response.content) == (200, b"")


async def test_pages_of_known_origins_may_call(host: Host) -> None:
    body = {"target": user("ada"), "event_type": "x", "payload": 1}
    for path, content in (("/health", None), ("/api/v1/notifications", json.dumps(body).encode())):
        for origin, allowed in ((ORIGIN, ORIGIN), ("https://evil.example", None)):
            response = await host.request(
                "GET" if content is None else "POST",
                path,
                headers={"Origin": origin},
                content=content,
            )
            assert response.headers.get("access-control-allow-origin") == allowed
            assert response.headers["vary"] == "Origin"
    asked = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    response = await host.request("OPTIONS", "/api/v1/acks", key=None, headers=asked)
    assert response.status_code == 204
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-headers"] == "authorization,content-type"
    foreign = {**asked, "Origin": "https://evil.example"}
    response = await host.request("OPTIONS", "/api/v1/acks", key=None, headers=foreign)
    assert "access-control-allow-origin" not in response.headers


async def test_a_trusted_proxy_tells_the_address(start: StartServer) -> None:
    host = await start(server={"forwarded_allow_ips": ["127.0.0.1", "10.0.0.0/8"]})
    forwarded = {"X-Forwarded-For": "192.0.2.1, 198.51.100.7, 10.1.2.3"}
    await host.websocket("ada", headers=forwarded)
    await host.sse("ada", headers=forwarded)
    found = (await host.get("/api/v1/users/ada/connections")).json()["connections"]
    assert [device["address"] for device in found] == ["198.51.100.7"] * 2
    if host.lane == "asgi":
        return  # Stock uvicorn believes a proxy on its own account.
    strict = await start(server={"forwarded_allow_ips": ["192.0.2.0/24"]})
    await strict.websocket("ada", headers=forwarded)
    found = (await strict.get("/api/v1/users/ada/connections")).json()["connections"]
    assert [device["address"] for device in found] == ["127.0.0.1"]


async def test_a_trusted_proxy_is_so_too_where_both_families_share_a_socket(
    start_on: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that listens on :: has it as ::ffff:127.0.0.1."""
    monkeypatch.setattr(front_door, "listen", lambda _, *given: listen("::", *given))
    host = await start_on(server={"forwarded_allow_ips": ["127.0.0.0/8"]})
    await host.websocket("ada", headers={"X-Forwarded-For": "192.0.2.1"})
    await host.websocket("ben")
    for user_id, address in (("ada", "192.0.2.1"), ("ben", "127.0.0.1")):
        found = (await host.get(f"/api/v1/users/{user_id}/connections")).json()["connections"]
        assert [device["address"] for device in found] == [address]


async def test_the_description_of_the_api_names_every_route(host: Host) -> None:
    response = await host.get("/openapi.json", key=None)
    described = response.json()
    assert described["openapi"].startswith("3.1")
    routes = {
        (method.upper(), path) for path, methods in described["paths"].items() for method in methods
    }
    assert {
        ("POST", "/api/v1/notifications"),
        ("POST", "/api/v1/notifications/batch"),
        ("GET", "/api/v1/notifications/{id}/acks"),
        ("POST", "/api/v1/acks"),
        ("DELETE", "/api/v1/connections/{id}"),
        ("POST", "/api/v1/tokens"),
        ("PUT", "/api/v1/templates/{id}"),
        ("GET", "/health/ready"),
        ("GET", "/metrics"),
    } <= routes


LATER = (
    "/api/v1/tenants",
    "/api/v1/me/notifications",
    "/asyncapi.json",
    "/console",
)


async def test_what_has_no_path_is_answered_like_all_else(host: Host) -> None:
    reader, writer = await host.raw()
    writer.write(
        b"OPTIONS * HTTP/1.1\r\nHost: x\r\nX-Request-ID: mine\r\nConnection: close\r\n\r\n"
    )
    async with asyncio.timeout(WAIT):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 ")
    assert b"x-request-id: mine" in head.lower()
    assert json.loads(body)["error"]["code"] == "NOT_FOUND"


async def test_what_a_later_step_brings_is_not_there(host: Host) -> None:
    for path in LATER:
        response = await host.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "NOT_FOUND")
