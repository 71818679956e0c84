"""The server inside somebody's FastAPI application, on stock uvicorn."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI, Request
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp
from websockets.exceptions import InvalidStatus

from notifyd import Notifyd
from notifyd.client import Message
from notifyd.errors import NotFound, ValidationError
from notifyd.identity import Identity
from tests.conftest import StartServer
from tests.front_door import ORIGIN, Host, Transport, token, user

NO_KEYS = {"jwt_secret": None}


async def by_session(connection: HTTPConnection) -> Identity | None:
    """The application's own sessions: the cookie is the user's name, `admin` has a role."""
    name = connection.cookies.get("session")
    if name is None:
        return None
    return Identity(name, roles=("admin",) if name == "root" else (), subscribe=("news",))


def in_fastapi(notifyd: Notifyd) -> ASGIApp:
    """An application with a route of its own that publishes."""
    app = FastAPI(lifespan=notifyd.lifespan)

    @app.post("/orders/{user_id}")
    async def order(user_id: str, request: Request) -> dict[str, object]:
        receipt = await notifyd.send(
            user=user_id, event="order.created", payload=await request.json(), priority="High"
        )
        return {"outcome": receipt.outcome, "delivered_to": receipt.delivered_to}

    app.mount("/realtime", notifyd.app)
    return app


@pytest.fixture
async def host(start_on: StartServer) -> Host:
    """The FastAPI application, with JWTs."""
    return await start_on("asgi", embed=in_fastapi, root="/realtime")


async def test_two_applications_are_nodes_of_one_cluster(
    start_on: StartServer, redis_url: str
) -> None:
    prefix = f"test-{uuid.uuid4().hex}"
    nodes = [
        await start_on(
            "asgi",
            embed=in_fastapi,
            root="/realtime",
            redis={"url": redis_url, "key_prefix": prefix},
            queue={"backend": "redis"},
            # The two are in one process, whose number would otherwise name both.
            cluster={"enabled": True, "node_id": f"application-{number}"},
        )
        for number in range(2)
    ]
    listener = await nodes[1].websocket("ada")
    response = await nodes[0].http.post(f"http://{nodes[0].authority}/orders/ada", json=1)
    assert response.json() == {"outcome": "delivered", "delivered_to": 1}
    await listener.expect("notification")


async def test_the_application_publishes_to_its_users(host: Host, transport: Transport) -> None:
    listener = await host.listen(transport, "ada")
    response = await host.http.post(f"http://{host.authority}/orders/ada", json={"order_id": 42})
    assert response.json() == {"outcome": "delivered", "delivered_to": 1}
    message = await listener.expect("notification")
    assert (message["event_type"], message["payload"]) == ("order.created", {"order_id": 42})
    assert message["metadata"]["priority"] == "High"
    labels = {"target": "user", "source": "python"}
    assert await host.metric("notifications_total", **labels) == 1


async def test_everything_is_there_below_where_it_is_mounted(host: Host) -> None:
    websocket = await host.websocket(None, query=f"token={token('ada/1')}")
    await websocket.subscribe("orders")
    await host.publish(user("ada/1"), payload=1)
    assert (await websocket.expect("notification"))["payload"] == 1
    found = await host.get("/api/v1/users/ada%2F1/subscriptions")
    assert found.json()["subscriptions"] == ["orders"]
    assert (await host.get("/health/ready", key=None)).status_code == 200
    assert (await host.get("/nothing")).json()["error"]["code"] == "NOT_FOUND"
    with pytest.raises(InvalidStatus) as refused:
        await host.websocket(None, query="token=nonsense")
    assert refused.value.response.status_code == 401


async def test_publishing_in_process(host: Host) -> None:
    notifyd = host.notifyd
    websocket = await host.websocket("ada")
    await websocket.subscribe("orders")
    id = str(uuid.uuid4())
    first = await notifyd.send(channel="orders", event="x", payload=[1], id=id)
    again = await notifyd.send(channel="orders", event="x", payload=[1], id=id)
    assert (first.notification_id, first.outcome) == (id, "delivered")
    assert again.notification_id == id
    several = await notifyd.send(users=["ada", "bob"], event="x", payload={})
    assert several.outcome == "delivered"
    everybody = await notifyd.send(broadcast=True, event="x")
    assert everybody.delivered_to == 1
    batch = await notifyd.batch(
        [Message(user="ada", event="x"), Message(channels=["orders", "none"], event="x")]
    )
    assert batch.summary.total_delivered == 2
    await websocket.notifications(5)
    await websocket.nothing_came()
    with pytest.raises(ValidationError) as wrong:
        await notifyd.send(channel="not a name", event="x")
    assert wrong.value.field is not None
    with pytest.raises(NotFound):
        await notifyd.send(user="ada", template="unknown")


@pytest.fixture
async def with_sessions(start_on: StartServer) -> Host:
    """The same with the application's own sessions, and no secret for tokens at all."""
    return await start_on(
        "asgi", embed=in_fastapi, root="/realtime", authenticate=by_session, auth=NO_KEYS
    )


async def test_the_applications_own_sessions_say_who_is_there(
    with_sessions: Host, transport: Transport
) -> None:
    host = with_sessions
    cookie = {"Cookie": "session=ada"}
    listener = (
        await host.websocket(None, headers=cookie, origin=ORIGIN)
        if transport == "websocket"
        else await host.sse(None, headers={**cookie, "Origin": ORIGIN})
    )
    assert listener.connected["user_id"] == "ada"
    assert listener.connected["session"]["subscriptions"] == ["news"]
    assert "expires_at" not in listener.connected["session"]
    sent = await host.notifyd.send(user="ada", event="x", payload=None)
    assert (await listener.expect("notification"))["id"] == sent.notification_id
    body = {"notification_id": sent.notification_id}
    response = await host.post("/api/v1/acks", body, key=None, headers=cookie)
    assert response.json() == {"acked": [sent.notification_id], "refused": []}


async def test_a_foreign_page_acknowledges_nothing_with_the_users_session(
    with_sessions: Host,
) -> None:
    host = with_sessions
    sent = await host.notifyd.send(user="ada", event="x", payload=None)
    body = {"notification_id": sent.notification_id}
    for origin, status in (("https://evil.example", 403), ("null", 403), (ORIGIN, 200)):
        headers = {"Cookie": "session=ada", "Origin": origin}
        response = await host.post("/api/v1/acks", body, key=None, headers=headers)
        assert response.status_code == status


async def test_whom_the_application_does_not_know_is_refused(with_sessions: Host) -> None:
    host = with_sessions
    with pytest.raises(InvalidStatus) as refused:
        await host.websocket(None)
    assert refused.value.response.status_code == 401
    browser = await host.websocket(None, origin=ORIGIN, greeted=False)
    assert (await browser.closed())[0] == 4001
    cookie = {"Cookie": "session=ada"}
    with pytest.raises(InvalidStatus) as refused:
        await host.websocket(None, headers=cookie, origin="https://evil.example")
    assert refused.value.response.status_code == 403
    foreign = {**cookie, "Origin": "https://evil.example"}
    assert (await host.get("/sse", key=None, headers=foreign)).status_code == 403
    assert (await host.get("/sse", key=None)).status_code == 401
    body = {"notification_id": str(uuid.uuid4())}
    assert (await host.post("/api/v1/acks", body, key=None)).status_code == 401


async def test_it_runs_within_a_lifespan_of_the_applications_own(start_on: StartServer) -> None:
    seen: list[str] = []

    def embed(notifyd: Notifyd) -> ASGIApp:
        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            seen.append("up")
            async with notifyd.lifespan(app):
                yield
            seen.append("down")

        app = FastAPI(lifespan=lifespan)
        app.mount("/realtime", notifyd.app)
        return app

    host = await start_on("asgi", embed=embed, root="/realtime")
    await host.publish(user("ada"))
    await host.stop()
    assert seen == ["up", "down"]
