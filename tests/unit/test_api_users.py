"""Channels, users, presence and tokens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from notifyd.errors import Unauthorized
from notifyd.eventually import settled
from tests.unit.api_server import ADMIN, NOW, ApiServer, error_of


async def test_channels_are_listed_by_name_and_looked_up() -> None:
    server = ApiServer()
    server.connect("u1", "orders", "alerts")
    server.clock.now += 60
    server.connect("u2", "orders")
    assert (await server.request("GET", "/api/v1/channels")).json() == {
        "channels": [
            {"name": "alerts", "subscriber_count": 1},
            {"name": "orders", "subscriber_count": 2},
        ],
        "total_channels": 2,
    }
    assert (await server.request("GET", "/api/v1/channels/orders")).json() == {
        "name": "orders",
        "subscriber_count": 2,
        "created_at": "2026-01-01T12:00:00.000Z",
    }
    missing = await server.request("GET", "/api/v1/channels/none")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "NOT_FOUND")
    assert (await server.request("GET", "/api/v1/channels/a%20b")).status_code == 422


async def test_a_user_s_subscriptions_and_devices() -> None:
    server = ApiServer()
    first, _ = server.connect("u1", "orders")
    server.clock.now += 60
    second, _ = server.connect("u1", "alerts", "orders", transport="sse")
    assert (await server.request("GET", "/api/v1/users/u1/subscriptions")).json() == {
        "user_id": "u1",
        "connection_count": 2,
        "subscriptions": ["alerts", "orders"],
    }
    assert (await server.request("GET", "/api/v1/users/u2/subscriptions")).status_code == 404
    devices = (await server.request("GET", "/api/v1/users/u1/connections")).json()
    assert devices["user_id"] == "u1"
    assert [device["id"] for device in devices["connections"]] == [first.id, second.id]
    assert devices["connections"][1] == {
        "id": second.id,
        "transport": "sse",
        "address": "192.0.2.7",
        "user_agent": "tests/1.0",
        "since": "2026-01-01T12:01:00.000Z",
        "last_heard": "2026-01-01T12:01:00.000Z",
    }
    nobody = (await server.request("GET", "/api/v1/users/u2/connections")).json()
    assert nobody == {"user_id": "u2", "connections": []}


async def test_one_connection_is_closed() -> None:
    server = ApiServer()
    connection, sink = server.connect("u1")
    _, other = server.connect("u1")
    path = f"/api/v1/connections/{connection.id}"
    response = await server.request("DELETE", path)
    assert response.status_code == 204
    assert response.content == b""
    assert sink.closed == (4003, "Disconnected by an administrator.")
    assert other.closed is None
    assert (await server.request("DELETE", path)).status_code == 404
    assert (await server.request("DELETE", "/api/v1/connections/x")).status_code == 422


async def test_a_user_is_disconnected_with_a_reason() -> None:
    server = ApiServer()
    sinks = [server.connect("u1")[1] for _ in range(2)]
    path = "/api/v1/users/u1/disconnect"
    answer = (await server.request("POST", path, {"reason": "moved"})).json()
    assert answer == {"user_id": "u1", "disconnected": 2, "revoked": False}
    assert [sink.closed for sink in sinks] == [(4003, "moved")] * 2
    without_body = await server.request("POST", path)
    assert without_body.json()["disconnected"] == 0
    unknown = await server.request("POST", path, {"revok": True})
    assert '"revoke"' in error_of(unknown)["message"]


async def test_revoked_tokens_are_refused_from_then_on() -> None:
    server = ApiServer()
    token = server.token("u1")
    assert (await settled(server.verifier.verify(token))).user_id == "u1"
    server.clock.now += 1
    path = "/api/v1/users/u1/disconnect"
    answer = (await server.request("POST", path, {"revoke": True})).json()
    assert answer["revoked"] is True
    with pytest.raises(Unauthorized):
        await settled(server.verifier.verify(token))
    server.clock.now += 1
    assert (await settled(server.verifier.verify(server.token("u1")))).user_id == "u1"


async def test_revoking_with_a_connection_revokes_its_user_s_tokens() -> None:
    server = ApiServer()
    connection, _ = server.connect("u1")
    token = server.token("u1")
    server.clock.now += 1
    await server.request("DELETE", f"/api/v1/connections/{connection.id}", {"revoke": True})
    with pytest.raises(Unauthorized):
        await settled(server.verifier.verify(token))


async def test_a_user_is_subscribed_and_unsubscribed_and_told() -> None:
    server = ApiServer()
    _, sink = server.connect("u1", "orders")
    _, both = server.connect("u1", "orders", "alerts")
    body = {"channels": ["orders", "alerts"]}
    answer = (await server.request("POST", "/api/v1/users/u1/subscribe", body)).json()
    assert answer == {"user_id": "u1", "channels": ["orders", "alerts"], "changed": 1}
    answer = (await server.request("POST", "/api/v1/users/u1/unsubscribe", body)).json()
    assert answer["changed"] == 2
    await asyncio.sleep(0)
    assert [message["type"] for message in sink.messages()] == [
        "connected",
        "subscribed",
        "unsubscribed",
    ]
    assert sink.messages()[1]["payload"] == ["alerts"]
    assert both.messages()[1]["type"] == "unsubscribed"
    absent = (await server.request("POST", "/api/v1/users/u9/subscribe", body)).json()
    assert absent["changed"] == 0


@pytest.mark.parametrize("body", [{}, {"channels": []}, {"channels": ["a b"]}, {"channels": "a"}])
async def test_channels_to_subscribe_to_are_checked(body: Any) -> None:
    response = await ApiServer().request("POST", "/api/v1/users/u1/subscribe", body)
    assert response.status_code == 422


async def test_too_many_subscriptions_are_refused() -> None:
    server = ApiServer()
    server.connect("u1")
    body = {"channels": [f"c{number}" for number in range(51)]}
    response = await server.request("POST", "/api/v1/users/u1/subscribe", body)
    assert response.status_code == 422
    assert error_of(response)["details"]["field"] == "channels"


async def test_presence() -> None:
    server = ApiServer()
    server.connect("u1")
    server.connect("u1")
    body = {"user_ids": ["u1", "u2", "u1"]}
    assert (await server.request("POST", "/api/v1/presence", body)).json() == {"online": {"u1": 2}}
    for bad in ([], ["a"] * 1001, ["\x00"]):
        response = await server.request("POST", "/api/v1/presence", {"user_ids": bad})
        assert response.status_code == 422


async def test_a_token_is_made_that_this_server_takes() -> None:
    server = ApiServer()
    body = {"user_id": "u1", "ttl": 60, "roles": ["admin"], "channels": ["order:*"]}
    response = await server.request("POST", "/api/v1/tokens", body)
    assert response.headers["Cache-Control"] == "no-store"
    answer = response.json()
    assert answer["expires_at"] == "2026-01-01T12:01:00Z"
    identity = await settled(server.verifier.verify(answer["token"]))
    assert (identity.user_id, identity.roles, identity.channels) == ("u1", ("admin",), ("order:*",))
    assert identity.expires_at == NOW + 60


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"ttl": 0}, "ttl"),
        ({"ttl": True}, "ttl"),
        ({"ttl": None}, "ttl"),
        ({"user_id": ""}, "user_id"),
        ({"tenant_id": "acme"}, "tenant_id"),
        ({"role": "admin"}, "role"),
        ({"channels": ["a b"]}, "channels"),
    ],
)
async def test_a_token_that_makes_no_sense(change: dict[str, Any], field: str) -> None:
    body = {"user_id": "u1", "ttl": 60, **change}
    response = await ApiServer().request("POST", "/api/v1/tokens", body, key=ADMIN)
    assert response.status_code == 422
    assert error_of(response)["details"]["field"] == field
