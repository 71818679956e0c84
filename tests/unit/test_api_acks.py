"""Acknowledging over HTTP, and looking at the ledger."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from tests.unit.api_server import ApiServer, error_of

SOME_ID = "0b6c1f0e-6a0e-4f3a-9d43-1f2f6b6f0c55"


async def sent(server: ApiServer, *users: str) -> str:
    body = {"target_user_ids": users, "event_type": "a", "payload": 1}
    id: str = (await server.publish("/send-to-users", body)).json()["notification_id"]
    return id


async def ack(server: ApiServer, user_id: str, body: object) -> Any:
    headers = {"Authorization": f"Bearer {server.token(user_id)}"}
    return await server.request("POST", "/api/v1/acks", body, key=None, headers=headers)


async def test_a_user_acknowledges_what_he_was_sent_and_the_backend_sees_it() -> None:
    server = ApiServer()
    server.connect("u1", transport="sse")
    id = await sent(server, "u1", "u2")
    answer = await ack(server, "u1", {"notification_id": id})
    assert answer.json() == {"acked": [id], "refused": []}
    report = (await server.request("GET", f"/api/v1/notifications/{id}/acks")).json()
    assert report["notification_id"] == id
    assert report["sent_at"] == "2026-01-01T12:00:00.000Z"
    assert (report["expected"], report["confirmed"]) == (2, 1)
    assert report["recipients"][0] == {
        "user_id": "u1",
        "state": "confirmed",
        "confirmed_at": "2026-01-01T12:00:00.000Z",
        "by": "ack",
    }
    assert report["recipients"][1] == {"user_id": "u2", "state": "queued"}


async def test_several_at_once_and_what_is_not_his() -> None:
    server = ApiServer()
    server.connect("u1")
    first, second = await sent(server, "u1"), await sent(server, "u1")
    body = {"notification_ids": [first, SOME_ID.upper(), second]}
    assert (await ack(server, "u1", body)).json() == {
        "acked": [first, second],
        "refused": [SOME_ID],
    }


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "notification_id"),
        ({"notification_id": SOME_ID, "notification_ids": [SOME_ID]}, "notification_id"),
        ({"notification_id": "x"}, "notification_id"),
        ({"notification_ids": []}, "notification_ids"),
        ({"notification_ids": [SOME_ID] * 101}, "notification_ids"),
        ({"notification_ids": [SOME_ID, "x"]}, "notification_ids[1]"),
    ],
)
async def test_acks_that_make_no_sense(body: object, field: str) -> None:
    response = await ack(ApiServer(), "u1", body)
    assert response.status_code == 422
    assert error_of(response)["details"]["field"] == field


@pytest.mark.parametrize("acks", [True, False])
async def test_what_the_ledger_does_not_know(acks: bool) -> None:
    path = f"/api/v1/notifications/{uuid.uuid4()}/acks"
    response = await ApiServer(acks=acks).request("GET", path)
    assert response.status_code == 404


async def test_the_ledger_is_asked_by_uuid() -> None:
    response = await ApiServer().request("GET", "/api/v1/notifications/x/acks")
    assert response.status_code == 422
