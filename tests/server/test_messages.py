"""What clients say on their connections and are answered, and what backends change on them."""

from __future__ import annotations

import asyncio
import time

from notifyd.client import AsyncClient, Backoff, Event, Reconnect, Subscribed
from tests.conftest import StartServer
from tests.front_door import WAIT, Host, Listener, Transport, channel, token, until, user

RULES = {
    "rules": {
        "open:*": {"subscribe": "any"},
        "open:secret": {"subscribe": "none"},
        "team:*": {"subscribe": "claim"},
        "inbox:{user_id}": {"subscribe": "any"},
    }
}


# --- subscribing ---


async def test_subscribing_and_unsubscribing(host: Host) -> None:
    websocket = await host.websocket("ada")
    await websocket.send("Subscribe", {"channels": ["orders", "alerts", "orders"]})
    assert (await websocket.expect("subscribed"))["payload"] == ["orders", "alerts"]
    await host.publish(channel("orders"), payload=1)
    assert (await websocket.expect("notification"))["payload"] == 1
    await websocket.send("Unsubscribe", {"channels": ["orders", "never"]})
    assert (await websocket.expect("unsubscribed"))["payload"] == ["orders"]
    assert (await host.publish(channel("orders")))["outcome"] == "nobody"
    assert (await host.publish(channel("alerts")))["delivered_to"] == 1


async def test_a_listener_that_leaves_a_channel_and_comes_back_keeps_it(host: Host) -> None:
    told: list[Event] = []

    def subscribed() -> int:
        return sum(isinstance(event, Subscribed) for event in told)

    at_once = Reconnect(backoff=Backoff(initial=0.01, maximum=0.02))
    async with AsyncClient(host.url, token=token("ada")) as client:
        stream = client.listen(["orders"], on_event=told.append, reconnect=at_once)
        first = asyncio.ensure_future(anext(stream))
        await until(lambda: subscribed() == 1)
        await stream.unsubscribe("orders")
        await stream.subscribe("orders")
        await until(lambda: subscribed() == 2)
        assert stream.channels == ("orders",)
        (connection,) = host.notifyd.lifecycle.registry
        host.notifyd.lifecycle.close(connection, 1011, "the test ends it")
        await until(lambda: subscribed() == 3)
        assert (await host.publish(channel("orders"), payload=1))["delivered_to"] == 1
        assert (await first).payload == 1


async def test_rules_decide_who_may_subscribe(start: StartServer) -> None:
    host = await start(channels=RULES)
    websocket = await host.websocket(jwt=token("ada", channels=["team:*", "inbox:*", "open:a"]))
    asked = ["open:a", "open:b", "open:secret", "team:1", "inbox:ada", "inbox:bob", "other", "Ä"]
    await websocket.send("Subscribe", {"channels": asked})
    assert (await websocket.expect("subscribed"))["payload"] == ["open:a", "team:1", "inbox:ada"]
    error = await websocket.expect("error")
    assert error["code"] == "SUBSCRIPTION_ERROR"
    for refused in ("open:b", "open:secret", "inbox:bob", "other", "Ä"):
        assert f"{refused}: " in error["message"]
    for granted in ("open:a", "team:1", "inbox:ada"):
        assert f"{granted}: " not in error["message"]


async def test_a_token_without_the_claim_is_free_where_the_rule_is(start: StartServer) -> None:
    host = await start(channels=RULES)
    websocket = await host.websocket("ada")
    await websocket.subscribe("open:b")
    await websocket.send("Subscribe", {"channels": ["team:1"]})
    assert (await websocket.expect("error"))["code"] == "SUBSCRIPTION_ERROR"


async def test_a_connection_has_so_many_subscriptions_at_most(start: StartServer) -> None:
    host = await start(websocket={"max_subscriptions_per_connection": 2})
    websocket = await host.websocket("ada")
    await websocket.send("Subscribe", {"channels": ["a", "b", "c"]})
    assert (await websocket.expect("subscribed"))["payload"] == ["a", "b"]
    assert "c: " in (await websocket.expect("error"))["message"]
    await websocket.send("Subscribe", {"channels": ["a"]})
    assert (await websocket.expect("subscribed"))["payload"] == ["a"]
    await websocket.send("Unsubscribe", {"channels": ["a"]})
    await websocket.expect("unsubscribed")
    await websocket.subscribe("c")


async def test_what_a_claim_subscribes_beyond_the_limit_is_named(
    start: StartServer, transport: Transport
) -> None:
    host = await start(websocket={"max_subscriptions_per_connection": 2})
    jwt = token("ada", subscribe=["a", "b", "c"])
    if transport == "websocket":
        listener: Listener = await host.websocket(jwt=jwt)
    else:
        listener = await host.sse(jwt=jwt)
    assert listener.connected["session"]["subscriptions"] == ["a", "b"]
    error = await listener.expect("error")
    assert error["code"] == "SUBSCRIPTION_ERROR"
    assert "c: a connection may have at most 2 subscriptions" in error["message"]


async def test_what_a_new_token_subscribes_beyond_the_limit_is_named(start: StartServer) -> None:
    host = await start(websocket={"max_subscriptions_per_connection": 2})
    websocket = await host.websocket(jwt=token("ada", subscribe=["a"]))
    await websocket.send("Auth", {"token": token("ada", subscribe=["a", "b", "c"])})
    await websocket.expect("refreshed")
    assert (await websocket.expect("subscribed"))["payload"] == ["b"]
    assert "c: " in (await websocket.expect("error"))["message"]


async def test_backends_subscribe_users_without_a_rule(start: StartServer) -> None:
    host = await start(channels=RULES)
    websocket = await host.websocket("ada/1")
    stream = await host.sse("ada/1")
    path = "/api/v1/users/ada%2F1"
    response = await host.post(f"{path}/subscribe", {"channels": ["private", "more"]})
    assert response.json() == {"user_id": "ada/1", "channels": ["private", "more"], "changed": 2}
    for listener in (websocket, stream):
        assert (await listener.expect("subscribed"))["payload"] == ["private", "more"]
    assert (await host.publish(channel("private")))["delivered_to"] == 2
    for listener in (websocket, stream):
        await listener.expect("notification")
    response = await host.get(f"{path}/subscriptions")
    assert response.json() == {
        "user_id": "ada/1",
        "connection_count": 2,
        "subscriptions": ["more", "private"],
    }
    response = await host.post(f"{path}/unsubscribe", {"channels": ["private"]})
    assert response.json() == {"user_id": "ada/1", "channels": ["private"], "changed": 2}
    for listener in (websocket, stream):
        assert (await listener.expect("unsubscribed"))["payload"] == ["private"]
    assert (await host.publish(channel("private")))["outcome"] == "nobody"
    # Of somebody who is not there nothing changes, and it is no error.
    response = await host.post("/api/v1/users/bob/subscribe", {"channels": ["private"]})
    assert response.json()["changed"] == 0
    assert (await host.get("/api/v1/users/bob/subscriptions")).status_code == 404


async def test_backends_look_at_channels(host: Host) -> None:
    assert (await host.get("/api/v1/channels")).json() == {"channels": [], "total_channels": 0}
    ada = await host.listen("websocket", "ada", "orders", "alerts")
    await host.listen("sse", "bob", "orders")
    found = (await host.get("/api/v1/channels")).json()
    assert found["total_channels"] == 2
    assert {"name": "orders", "subscriber_count": 2} in found["channels"]
    one = (await host.get("/api/v1/channels/orders")).json()
    assert one["subscriber_count"] == 2
    assert one["created_at"].endswith("Z")
    await ada.close()
    await until(lambda: host.notifyd._registry.channels == 1, "the channel's end")
    assert (await host.get("/api/v1/channels/alerts")).status_code == 404


# --- pings and nonsense ---


async def test_a_ping_is_answered(host: Host) -> None:
    websocket = await host.websocket("ada")
    await websocket.send("Ping")
    assert await websocket.receive() == {"type": "pong"}
    async with asyncio.timeout(WAIT):
        await (await websocket.connection.ping(b"hello"))


NONSENSE: list[tuple[str | bytes, str]] = [
    ("not json", "INVALID_MESSAGE"),
    ("[]", "INVALID_MESSAGE"),
    ('{"type":"Shout"}', "INVALID_MESSAGE"),
    ('{"type":"subscribe","payload":{"channels":["a"]}}', "INVALID_MESSAGE"),
    ('{"type":"Subscribe"}', "INVALID_MESSAGE"),
    ('{"type":"Subscribe","payload":{"channels":"a"}}', "INVALID_MESSAGE"),
    ('{"type":"Ack","payload":{}}', "INVALID_ACK"),
    ('{"type":"Ack","payload":{"notification_id":"x"}}', "INVALID_ACK"),
    ('{"type":"Ack","payload":{"notification_ids":[]}}', "INVALID_ACK"),
    (b'{"type":"Ping"}', "UNSUPPORTED_FORMAT"),
]


async def test_nonsense_is_an_error_and_the_connection_lives(host: Host) -> None:
    websocket = await host.websocket("ada")
    for message, code in NONSENSE:
        await websocket.send_text(message)
        assert (await websocket.expect("error"))["code"] == code, message
    await websocket.send_text('{"type":"Ping","payload":{},"later":1}')
    await websocket.expect("pong")


async def test_a_message_over_the_limit_closes(start: StartServer) -> None:
    host = await start(websocket={"max_message_bytes": 2048})
    websocket = await host.websocket("ada")
    await websocket.send_text('{"type":"Ping","x":"' + "x" * 2000 + '"}')
    await websocket.expect("pong")
    await websocket.send_text('{"type":"Ping","x":"' + "x" * 2048 + '"}')
    assert (await websocket.closed())[0] == 1009


# --- a new token on the way ---


async def test_a_new_token_prolongs_the_connection(start: StartServer) -> None:
    host = await start(websocket={"heartbeat_interval": 0.05, "idle_timeout": 9000})
    websocket = await host.websocket(jwt=token("ada", expires_in=60))
    await websocket.send("Auth", {"token": token("ada", expires_in=7200)})
    refreshed = await websocket.expect("refreshed")
    assert refreshed["expires_at"][:13] == time.strftime(
        "%Y-%m-%dT%H", time.gmtime(time.time() + 7200)
    )
    host.clock.advance(600)
    await websocket.nothing_came()
    other = await host.websocket(jwt=token("bob", expires_in=7200))
    host.clock.advance(7200)
    assert (await websocket.closed())[0] == 4010
    assert (await other.closed())[0] == 4010


async def test_a_new_token_of_somebody_else_closes(host: Host) -> None:
    websocket = await host.websocket("ada")
    await websocket.send("Auth", {"token": token("bob")})
    code, told = await websocket.closed()
    assert (code, told[0]["code"]) == (4003, "FORBIDDEN")


async def test_a_bad_new_token_takes_nothing_away(host: Host) -> None:
    websocket = await host.websocket("ada")
    await websocket.send("Auth", {"token": "nonsense"})
    assert (await websocket.expect("error"))["code"] == "UNAUTHORIZED"
    await websocket.send("Auth", {"token": token("ada", expires_in=-60)})
    assert (await websocket.expect("error"))["code"] == "TOKEN_EXPIRED"
    await host.publish(user("ada"))
    await websocket.expect("notification")


async def test_grants_that_a_new_token_has_not_are_taken_back(start: StartServer) -> None:
    host = await start(channels=RULES)
    old = token("ada", channels=["team:*"], subscribe=["news", "open:x"])
    websocket = await host.websocket(jwt=old)
    await websocket.subscribe("team:1", "team:2")
    await host.post("/api/v1/users/ada/subscribe", {"channels": ["by-server"]})
    await websocket.expect("subscribed")
    new = token("ada", channels=["team:2"], subscribe=["more"])
    await websocket.send("Auth", {"token": new})
    await websocket.expect("refreshed")
    lost = (await websocket.expect("unsubscribed"))["payload"]
    assert set(lost) == {"team:1", "news", "open:x"}
    assert (await websocket.expect("subscribed"))["payload"] == ["more"]
    response = await host.get("/api/v1/users/ada/subscriptions")
    assert response.json()["subscriptions"] == ["by-server", "more", "team:2"]


# --- the end of a token ---


async def test_an_expired_token_closes_after_the_leeway(
    start: StartServer, transport: Transport
) -> None:
    host = await start(
        websocket={"heartbeat_interval": 0.05, "idle_timeout": 9000}, auth={"leeway_seconds": 5}
    )
    listener = await host.listen(transport, jwt=token("ada", expires_in=60))
    host.clock.advance(62)
    # Within the leeway it lives on, for several beats.
    beats = host.notifyd.metrics.loop_lag_seconds.count
    await until(lambda: host.notifyd.metrics.loop_lag_seconds.count >= beats + 3)
    await host.publish({"type": "broadcast"}, payload="still here")
    await listener.expect("notification")
    host.clock.advance(5)
    told = await listener.rest()
    assert [message["code"] for message in told] == ["TOKEN_EXPIRED"]
    if transport == "websocket":
        assert listener.end_told().startswith("4010")
    closed = await host.metric(
        "connections_closed_total", transport=transport, reason="token_expired"
    )
    assert closed == 1
