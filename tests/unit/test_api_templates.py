"""Templates over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.api_server import ApiServer, error_of

TEMPLATES = "/api/v1/templates"
TEMPLATE = {
    "id": "order-shipped",
    "name": "Order shipped",
    "event_type": "order.shipped",
    "payload_template": {"text": "Order {{order_id}}", "price": 1.50},
    "priority": "high",
    "ttl": 86400,
}


async def test_from_creation_to_deletion() -> None:
    server = ApiServer()
    created = await server.request("POST", TEMPLATES, TEMPLATE)
    assert created.status_code == 201
    expected = {
        **TEMPLATE,
        "priority": "High",
        "created_at": "2026-01-01T12:00:00.000Z",
        "updated_at": "2026-01-01T12:00:00.000Z",
    }
    assert created.json() == expected
    one = f"{TEMPLATES}/order-shipped"
    assert (await server.request("GET", one)).json() == expected
    assert (await server.request("GET", TEMPLATES)).json() == {"templates": [expected], "total": 1}

    taken = await server.request("POST", TEMPLATES, TEMPLATE)
    assert (taken.status_code, error_of(taken)["code"]) == (409, "CONFLICT")

    server.clock.now += 60
    replacement = {"name": "Shipped", "event_type": "shipped", "payload_template": "{{a}}"}
    replaced = (await server.request("PUT", one, replacement)).json()
    assert replaced == {
        "id": "order-shipped",
        **replacement,
        "priority": "Normal",
        "ttl": None,
        "created_at": "2026-01-01T12:00:00.000Z",
        "updated_at": "2026-01-01T12:01:00.000Z",
    }

    assert (await server.request("DELETE", one)).status_code == 204
    for method, body in (("GET", None), ("DELETE", None), ("PUT", replacement)):
        assert (await server.request(method, one, body)).status_code == 404


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": "a b"}, "id"),
        ({"name": ""}, "name"),
        ({"event_type": ""}, "event_type"),
        ({"priority": "urgent"}, "priority"),
        ({"ttl": -1}, "ttl"),
        ({"payload": {}}, "payload"),
        ({"payload_template": "{{}}"}, "payload_template"),
    ],
)
async def test_a_template_that_makes_no_sense(change: dict[str, Any], field: str) -> None:
    response = await ApiServer().request("POST", TEMPLATES, {**TEMPLATE, **change})
    assert response.status_code == 422
    assert error_of(response)["details"]["field"].startswith(field)


async def test_a_template_keeps_its_id() -> None:
    server = ApiServer()
    await server.request("POST", TEMPLATES, TEMPLATE)
    same = await server.request("PUT", f"{TEMPLATES}/order-shipped", TEMPLATE)
    assert same.status_code == 200
    other = await server.request("PUT", f"{TEMPLATES}/order-shipped", {**TEMPLATE, "id": "other"})
    assert other.status_code == 422
    assert error_of(other)["details"]["field"] == "id"
