"""Figures, health and metrics."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from notifyd.api.stats import Stores
from notifyd.errors import Unavailable
from notifyd.options import BreakerSettings
from notifyd.resilience import CircuitBreaker
from tests.unit.api_server import READ, ApiServer, LaterLogs, error_of

EVENT = {"event_type": "a", "payload": 1}


async def test_the_figures() -> None:
    server = ApiServer()
    server.connect("u1", "orders", "alerts")
    server.connect("u2", "orders", transport="sse")
    await server.publish("/send", {"target_user_id": "u1", **EVENT})
    await server.publish("/send", {"target_user_id": "u9", **EVENT})
    await server.publish("/broadcast", EVENT)
    await server.publish("/channel", {"channel": "orders", **EVENT})
    figures = (await server.request("GET", "/stats")).json()
    assert figures == {
        "connections": {
            "total_connections": 2,
            "unique_users": 2,
            "websocket": 1,
            "sse": 1,
            "channels": {"orders": 2, "alerts": 1},
        },
        "users": {"connected": 2},
        "channels": {"active": 2, "subscriptions": 3},
        "notifications": {
            "total_sent": 4,
            "total_delivered": 5,
            "total_failed": 0,
            "user_notifications": 2,
            "broadcast_notifications": 1,
            "channel_notifications": 1,
        },
        "queue": {"enabled": True, "backend": "memory", "total_messages": 1},
        "ack": {
            "enabled": True,
            "total_tracked": 1,
            "total_acked": 0,
            "total_expired": 0,
            "pending_count": 1,
            "ack_rate": 0.0,
            "avg_latency_ms": None,
            "p95_latency_ms": None,
        },
        "redis": {"status": "disabled", "connected": False},
        "postgres": {"status": "disabled", "connected": False},
    }
    assert (await server.request("GET", "/api/v1/stats")).json() == figures
    assert (await server.request("GET", "/api/v1/stats/acks")).json() == figures["ack"]


async def test_the_figures_of_acks() -> None:
    server = ApiServer()
    server.connect("u1")
    id = (await server.publish("/send", {"target_user_id": "u1", **EVENT})).json()[
        "notification_id"
    ]
    server.clock.now += 0.5
    headers = {"Authorization": f"Bearer {server.token('u1')}"}
    await server.request("POST", "/api/v1/acks", {"notification_id": id}, key=None, headers=headers)
    figures = (await server.request("GET", "/api/v1/stats/acks")).json()
    assert (figures["total_acked"], figures["ack_rate"], figures["avg_latency_ms"]) == (1, 1, 500)


async def test_what_is_switched_off_has_no_figures() -> None:
    figures = (await ApiServer(queue=False, acks=False).request("GET", "/stats")).json()
    assert figures["queue"] == {"enabled": False, "backend": "memory", "total_messages": 0}
    assert figures["ack"]["enabled"] is False


async def test_a_store_may_answer_later() -> None:
    async def enqueue(*args: Any) -> Any:
        return [None]

    server = ApiServer(logs=LaterLogs(enqueue))
    assert (await server.request("GET", "/stats")).json()["queue"]["total_messages"] == 7
    health = (await server.request("GET", "/health", key=READ)).json()
    assert health["queue"]["total_messages"] == 7


class FakeStore:
    """What a store's client says of itself."""

    def __init__(self) -> None:
        self.up = True
        self.breaker = CircuitBreaker(BreakerSettings(failure_threshold=1), random=lambda: 1.0)


async def test_how_the_stores_do() -> None:
    store = FakeStore()
    server = ApiServer(stores=Stores(redis=store))

    async def told() -> tuple[str, object]:
        health = (await server.request("GET", "/health", key=READ)).json()
        figures = (await server.request("GET", "/stats", key=READ)).json()
        assert figures["redis"] == health["redis"]
        assert figures["postgres"] == health["postgres"]
        assert health["postgres"] == {"status": "disabled", "connected": False}
        stranger = (await server.request("GET", "/health", key=None)).json()
        assert stranger["status"] == health["status"]
        return health["status"], health["redis"]

    well = {"status": "connected", "connected": True, "breaker": "closed"}
    assert await told() == ("healthy", well)
    store.breaker.failed()
    assert await told() == (
        "degraded",
        {"status": "degraded", "connected": True, "breaker": "open"},
    )
    store.up = False
    assert await told() == (
        "degraded",
        {"status": "degraded", "connected": False, "breaker": "open"},
    )
    store.breaker = CircuitBreaker(BreakerSettings())
    assert await told() == (
        "degraded",
        {"status": "degraded", "connected": False, "breaker": "closed"},
    )
    store.up = True
    assert await told() == ("healthy", well)


async def test_ready_without_a_store_unless_it_is_required() -> None:
    for required, status in ((False, 200), (True, 503)):
        store = FakeStore()
        names: frozenset[Literal["redis", "postgres"]] = frozenset({"postgres"} if required else ())
        server = ApiServer(stores=Stores(postgres=store, required=names))
        assert (await server.request("GET", "/health/ready", key=None)).status_code == 200
        store.up = False
        ready = await server.request("GET", "/health/ready", key=None)
        assert ready.status_code == status
        assert (await server.request("GET", "/health/live", key=None)).status_code == 200
        if status == 503:
            assert error_of(ready)["message"] == "A store does not answer: postgres."
            assert ready.headers["Retry-After"]


@pytest.mark.parametrize("at_once", [True, False])
async def test_figures_without_a_store(at_once: bool) -> None:
    async def unavailable() -> Any:
        raise Unavailable("The store does not answer.", retry_after=1)

    def refused() -> Any:
        if at_once:
            raise Unavailable("The store does not answer.", retry_after=1)
        return unavailable()

    logs = LaterLogs(lambda *args: unavailable())
    logs.depth = refused  # type: ignore[method-assign]  # a fault
    server = ApiServer(logs=logs)
    server.ledger.stats = refused  # type: ignore[union-attr,method-assign]  # a fault
    figures = (await server.request("GET", "/stats")).json()
    assert figures["queue"] == {"enabled": True, "backend": "memory", "total_messages": None}
    assert figures["ack"] is None
    assert figures["connections"]["total_connections"] == 0
    health = (await server.request("GET", "/health", key=READ)).json()
    assert health["queue"]["total_messages"] is None
    acks = await server.request("GET", "/api/v1/stats/acks")
    assert (acks.status_code, error_of(acks)["code"]) == (503, "UNAVAILABLE")


async def test_health_tells_strangers_little() -> None:
    server = ApiServer()
    for key in (None, "wrong"):
        health = (await server.request("GET", "/health", key=key)).json()
        assert health == {"status": "healthy", "version": "0.1.0", "uptime_seconds": 90}


@pytest.mark.parametrize(("production", "key"), [(True, READ), (False, None)])
async def test_health_in_full(production: bool, key: str | None) -> None:
    server = ApiServer(production=production)
    server.connect("u1", "orders")
    health = (await server.request("GET", "/health", key=key)).json()
    assert health == {
        "status": "healthy",
        "version": "0.1.0",
        "uptime_seconds": 90,
        "redis": {"status": "disabled", "connected": False},
        "postgres": {"status": "disabled", "connected": False},
        "connections": {"total": 1, "unique_users": 1, "channels_count": 1},
        "queue": {"enabled": True, "backend": "memory", "total_messages": 0},
        "cluster": {"enabled": False},
    }


@pytest.mark.parametrize("phase", ["starting", "ready", "draining"])
async def test_alive_and_ready(phase: str) -> None:
    server = ApiServer()
    server.phase = phase
    live = await server.request("GET", "/health/live", key=None)
    assert (live.status_code, live.json()) == (200, {"status": "alive"})
    ready = await server.request("GET", "/health/ready", key=None)
    health = (await server.request("GET", "/health", key=None)).json()
    if phase == "ready":
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
        assert health["status"] == "healthy"
    else:
        assert ready.status_code == 503
        assert error_of(ready)["code"] == "UNAVAILABLE"
        assert ready.headers["Retry-After"]
        assert health["status"] == "degraded"


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"production": True}, 401),
        ({"production": False}, 200),
        ({"production": True, "metrics_public": True}, 200),
        ({"metrics_enabled": False}, 404),
    ],
)
async def test_who_may_see_the_metrics(options: dict[str, bool], status: int) -> None:
    response = await ApiServer(**options).request("GET", "/metrics", key=None)  # type: ignore[arg-type]  # all are flags
    assert response.status_code == status
    if status == 200:
        assert response.headers["Content-Type"].startswith("text/plain")
        assert "notifyd_http_requests_total" in response.text
