"""Notifications that come from Redis, through a real one to real connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

import pytest
import redis.asyncio
from structlog.testing import capture_logs

from notifyd.eventually import settled
from notifyd.idempotency import fingerprint, key_scope
from notifyd.queue.redis import RedisIdempotencyKeys
from tests.conftest import StartServer
from tests.front_door import ADMIN_KEY, WAIT, Host, WebSocketListener, token, until
from tests.stores import RedisServer

EVENT = {"event_type": "order.created", "payload": {"n": 1}}
ID = "0b6c1f0e-6a0e-4f3a-9d43-1f2f6b6f0c55"
STREAM = "notifications"

Publish = Callable[[str, Any], Awaitable[Any]]


def text(message: Any) -> str | bytes:
    return message if isinstance(message, str | bytes) else json.dumps(message)


class Publisher:
    """A service that knows Redis and nothing of notifyd."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self.client = client

    async def publish(self, channel: str | bytes, message: Any) -> None:
        await self.client.publish(channel, text(message))

    async def add(self, message: Any, **fields: str) -> str:
        given: dict[Any, Any] = {**fields} or {"data": text(message)}
        id: Any = await self.client.xadd(STREAM, given)
        return str(id.decode())

    async def dead(self) -> list[dict[str, str]]:
        entries: Any = await self.client.xrange(f"{STREAM}:dead")
        return [
            {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}
            for _, fields in entries
        ]

    async def pending(self) -> int:
        told: Any = await self.client.xpending(STREAM, "notifyd")
        return int(told["pending"])


@pytest.fixture
async def publisher(redis_server: RedisServer) -> AsyncIterator[Publisher]:
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        yield Publisher(client)


@pytest.fixture
def sources(redis_server: RedisServer) -> dict[str, Any]:
    """The section redis of a server with both."""
    return {"url": redis_server.url, "trigger_enabled": True, "stream_key": STREAM}


@pytest.fixture
async def host(start_on: StartServer, sources: dict[str, Any]) -> Host:
    started = await start_on(redis=sources)
    await subscribed(started)
    return started


async def subscribed(host: Host) -> None:
    await until(lambda: host.notifyd.metrics.redis_trigger_active.value == 1, "the subscription")


async def listening(host: Host) -> WebSocketListener:
    websocket = await host.websocket("u1")
    await websocket.subscribe("orders")
    return websocket


def bad(host: Host) -> float:
    return host.notifyd.metrics.redis_bad_messages_total.value


USER = "notification:user:u1"
CHANNEL = "notification:channel:orders"
BROADCAST = "notification:broadcast"

FORMS: list[tuple[str, dict[str, Any]]] = [
    (USER, {"event": EVENT}),
    (USER, EVENT),
    (USER, {"type": "user", "target": "u1", "event": EVENT}),
    (USER, {"type": "user", "event": EVENT}),
    (USER, {"target": "u1", **EVENT}),
    (USER, {"tenant_id": "default", **EVENT}),
    (CHANNEL, {"event": EVENT}),
    (CHANNEL, EVENT),
    (CHANNEL, {"type": "channel", "target": "orders", "event": EVENT}),
    (BROADCAST, {"event": EVENT}),
    (BROADCAST, {"type": "Broadcast", "event": EVENT}),
    # What a message says counts before what its channel does.
    ("notification:user:somebody-else", {"target": "u1", **EVENT}),
    (USER, {"type": "channel", "target": "orders", **EVENT}),
    (BROADCAST, {"type": "users", "target": ["u1", "u2"], "event": EVENT}),
    (BROADCAST, {"type": "channels", "target": ["orders", "other"], "event": EVENT}),
]
ALONE = [
    (channel, message) for channel, message in FORMS if "type" in message and "target" in message
]


class TestForms:
    @pytest.mark.parametrize(("channel", "message"), FORMS)
    async def test_on_a_channel(
        self, host: Host, publisher: Publisher, channel: str, message: dict[str, Any]
    ) -> None:
        websocket = await listening(host)
        await publisher.publish(channel, message)
        told = await websocket.expect("notification")
        assert (told["event_type"], told["payload"]) == ("order.created", {"n": 1})
        assert told["metadata"]["source"] == "redis"
        await websocket.nothing_came()
        assert bad(host) == 0

    @pytest.mark.parametrize(("channel", "message"), ALONE)
    async def test_in_the_stream(
        self, host: Host, publisher: Publisher, channel: str, message: dict[str, Any]
    ) -> None:
        websocket = await listening(host)
        await publisher.add(message)
        told = await websocket.expect("notification")
        assert (told["event_type"], told["payload"]) == ("order.created", {"n": 1})
        await websocket.nothing_came()
        assert bad(host) == 0

    async def test_all_of_the_content(self, host: Host, publisher: Publisher) -> None:
        websocket = await listening(host)
        event = {
            **EVENT,
            "priority": "high",
            "ttl": 3600,
            "correlation_id": "c-1",
            "source": "shop",
            "audience": {"type": "Users", "value": ["u1"]},
            "id": ID.upper(),
        }
        await publisher.publish(BROADCAST, {"event": event})
        told = await websocket.expect("notification")
        assert told["id"] == ID
        assert told["metadata"] == {
            "source": "shop",
            "priority": "High",
            "ttl": 3600,
            "correlation_id": "c-1",
            "audience": {"type": "Users"},
        }

    async def test_a_template(self, host: Host, publisher: Publisher) -> None:
        made = await host.post(
            "/api/v1/templates",
            {
                "id": "hello",
                "name": "Hello",
                "event_type": "greeting",
                "payload_template": {"to": "{{name}}"},
            },
            key=ADMIN_KEY,
        )
        assert made.status_code in {200, 201}, made.text
        websocket = await listening(host)
        await publisher.publish(USER, {"template_id": "hello", "variables": {"name": "Ann"}})
        told = await websocket.expect("notification")
        assert (told["event_type"], told["payload"]) == ("greeting", {"to": "Ann"})

    async def test_where_it_came_in_is_counted(self, host: Host, publisher: Publisher) -> None:
        websocket = await listening(host)
        await publisher.publish(USER, EVENT)
        await publisher.add({"type": "user", "target": "u1", **EVENT})
        await websocket.notifications(2)
        for source in ("redis", "redis_stream"):
            assert await host.metric("notifications_total", target="user", source=source) == 1

    async def test_names_with_separators_are_one_users_own(
        self, host: Host, publisher: Publisher
    ) -> None:
        names = ["a:b", "{x}", "*", "ü", "a|b", "notification:user:u1"]
        websockets = [await host.websocket(name) for name in names]
        for name, websocket in zip(names, websockets, strict=True):
            await publisher.publish(f"notification:user:{name}", EVENT)
            await websocket.expect("notification")
        for websocket in websockets:
            await websocket.nothing_came()

    async def test_patterns_of_ones_own(
        self, start_on: StartServer, sources: dict[str, Any], publisher: Publisher
    ) -> None:
        patterns = ("shop:user:*", "shop:*", "plain")
        host = await start_on(redis={**sources, "trigger_patterns": patterns})
        await subscribed(host)
        websocket = await listening(host)
        # Two patterns match: it is one message all the same.
        await publisher.publish("shop:user:u1", {"type": "user", "target": "u1", **EVENT})
        await publisher.publish("plain", {"type": "user", "target": "u1", **EVENT})
        await websocket.notifications(2)
        await publisher.publish("notification:user:u1", EVENT)
        await publisher.publish("shop:user:u1", {"type": "user", "target": "u1", **EVENT})
        await publisher.publish("shop:user:u1", {"type": "user", "target": "u1", **EVENT})
        await websocket.notifications(2)
        await websocket.nothing_came()

    async def test_the_order_is_the_publishers(self, host: Host, publisher: Publisher) -> None:
        websocket = await listening(host)
        async with publisher.client.pipeline(transaction=False) as pipe:
            for n in range(500):
                message = {"event_type": "n", "payload": n}
                if n % 7 == 0:
                    message["idempotency_key"] = f"k{n}"  # has to wait for its claim
                pipe.publish(CHANNEL, text(message))
            await pipe.execute()
        told = await websocket.notifications(500)
        assert [message["payload"] for message in told] == list(range(500))

    @pytest.mark.parametrize("way", ["channel", "stream"])
    @pytest.mark.parametrize("key", [{"id": ID}, {"idempotency_key": "k"}])
    async def test_what_is_sent_twice_with_its_key_comes_once(
        self, host: Host, publisher: Publisher, way: str, key: dict[str, str]
    ) -> None:
        websocket = await listening(host)
        message = {"type": "user", "target": "u1", **EVENT, **key}
        for each in (message, message, {**message, **{name: str(uuid4()) for name in key}}):
            await (publisher.add(each) if way == "stream" else publisher.publish(USER, each))
        await websocket.notifications(2)
        await websocket.nothing_came()
        assert bad(host) == 0

    @pytest.mark.parametrize("way", ["channel", "stream"])
    @pytest.mark.parametrize("of_a_template", [False, True])
    async def test_what_comes_twice_at_once_with_two_keys_holds_up_nothing(
        self,
        start_on: StartServer,
        sources: dict[str, Any],
        publisher: Publisher,
        way: str,
        of_a_template: bool,
    ) -> None:
        """Each of the two would have one key, and wait for the other's."""
        own = {**sources, "key_prefix": f"test-{uuid4().hex}"}
        host = await start_on(redis=own, queue={"backend": "redis"})
        await subscribed(host)
        content: dict[str, Any] = EVENT
        if of_a_template:
            template = {"id": "t", "name": "t", "event_type": "e", "payload_template": {"n": 1}}
            await host.post("/api/v1/templates", template)
            content = {"template_id": "t"}
        websocket = await host.websocket("u1")
        message = {"type": "user", "target": "u1", **content, "id": ID, "idempotency_key": "k"}
        last = {"type": "user", "target": "u1", "event_type": "last", "payload": 1}
        async with publisher.client.pipeline(transaction=True) as pipe:
            for each in (message, message, last):
                if way == "stream":
                    pipe.xadd(STREAM, {"data": text(each)})
                else:
                    pipe.publish(USER, text(each))
            await pipe.execute()
        told = await websocket.notifications(2)
        assert (told[0]["id"], told[1]["event_type"]) == (ID, "last")
        await websocket.nothing_came()


JUNK: list[Any] = [
    b"",
    b"x",
    b"\xff\xfe",
    b"{",
    b"[" * 5000,
    b'"a text"',
    [],
    [1, 2],
    None,
    17,
    {},
    {"event": {}},
    {"event": None},
    {"event": [EVENT]},
    {"event": "order.created"},
    {"event": EVENT, **EVENT},
    {"event": EVENT, "ttl": 5},
    {"event": EVENT, "colour": "red"},
    {"event": {**EVENT, "colour": "red"}},
    {"event": {"event_type": "e"}},
    {"event": {"event_type": "", "payload": 1}},
    {"event": {"event_type": "e" * 129, "payload": 1}},
    {"event": {"event_type": "e", "payload": 1, "template_id": "t"}},
    {"event": {"template_id": "no-such"}},
    {"event": {"template_id": "no-such", "id": "no uuid"}},
    {"event": {"template_id": "no-such", "id": ID, "idempotency_key": ""}},
    {"event": {**EVENT, "priority": "urgent"}},
    {"event": {**EVENT, "ttl": -1}},
    {"event": {**EVENT, "ttl": "1"}},
    {"event": {**EVENT, "id": "no uuid"}},
    {"event": {**EVENT, "idempotency_key": ""}},
    {"event": {**EVENT, "exclude_connection": "no uuid"}},
    {"event": {**EVENT, "audience": {"type": "Nobody"}}},
    b'{"event":{"event_type":"e","payload":' + b"[" * 65 + b"]" * 65 + b"}}",
    b'{"event":{"event_type":"e","payload":"\\ud800"}}',
    b'{"event":{"event_type":"e","payload":"\xff"}}',
    b'{"event":{"event_type":"e","payload":NaN}}',
    {"type": "robot", "event": EVENT},
    {"type": 5, "event": EVENT},
    {"type": "user", "target": ["u1"], "event": EVENT},
    {"type": "user", "target": "", "event": EVENT},
    {"type": "user", "target": "a\nb", "event": EVENT},
    {"type": "user", "target": {"id": "u1"}, "event": EVENT},
    {"type": "users", "target": "u1", "event": EVENT},
    {"type": "users", "target": [], "event": EVENT},
    {"type": "users", "target": ["u1", ""], "event": EVENT},
    {"type": "users", "target": ["u1"] * 10_001, "event": EVENT},
    {"type": "channel", "target": "no channel!", "event": EVENT},
    {"type": "channels", "target": [], "event": EVENT},
    {"type": "channels", "target": ["c"] * 101, "event": EVENT},
    {"type": "broadcast", "target": "u1", "event": EVENT},
    {"type": "user", "target": "u1", "tenant_id": "acme", "event": EVENT},
    {"type": "user", "target": "u1", "tenant_id": "a/b", "event": EVENT},
    {"type": "user", "target": "u1", "tenant_id": 1, "event": EVENT},
    {"type": "user", "target": "u1", "event_type": "e", "payload": "x" * 65_600},
    {"type": "users", "target": ["u1"], "event_type": "e", "payload": "x" * 65_600},
    {"type": "users", "target": ["u" * 250] * 9000, "event_type": "e", "payload": "x" * 4_000_000},
]


class TestBadMessages:
    async def test_on_channels(self, host: Host, publisher: Publisher) -> None:
        websocket = await listening(host)
        with capture_logs() as logs:
            for count, junk in enumerate(JUNK, 1):
                await publisher.publish(USER, junk)
                await until(lambda count=count: bad(host) == count, f"{junk!r:.80}")  # type: ignore[misc]
            for channel in (b"notification:user:\xff", "notification:channel:no channel!"):
                await publisher.publish(channel, EVENT)
            await until(lambda: bad(host) == len(JUNK) + 2)
        warned = [entry for entry in logs if entry["log_level"] != "info"]
        assert [entry["event"] for entry in warned] == ["a message in Redis cannot be used"]
        assert warned[0]["problem"]
        await websocket.nothing_came()
        await publisher.publish(USER, EVENT)
        await websocket.expect("notification")
        await websocket.nothing_came()

    async def test_in_the_stream(self, host: Host, publisher: Publisher) -> None:
        websocket = await listening(host)
        ids = []
        with capture_logs() as logs:
            for junk in JUNK:
                ids.append(await publisher.add(junk))
            ids.append(await publisher.add(None, other="field"))
            ids.append(await publisher.add(None, data="{", more="fields"))
            ids.append(await publisher.add({"event": EVENT}))  # for whom?
            await until(lambda: bad(host) == len(ids), "all of them", 10)
        await publisher.add({"type": "user", "target": "u1", **EVENT})
        await websocket.expect("notification")
        await websocket.nothing_came()
        warned = [entry for entry in logs if entry["log_level"] != "info"]
        assert [entry["event"] for entry in warned] == ["a message in Redis cannot be used"]
        dead = await publisher.dead()
        assert [entry["entry"] for entry in dead] == ids
        assert all(entry["reason"] for entry in dead)
        assert (dead[1]["data"], dead[-3]["other"], dead[-2]["more"]) == ("x", "field", "fields")
        assert await publisher.pending() == 0
        assert await host.metric("redis_dead_letters_total") == len(ids)

    async def test_a_message_longer_than_any_ends_the_connection_and_no_more(
        self, host: Host, publisher: Publisher
    ) -> None:
        websocket = await listening(host)
        await publisher.publish(USER, b"x" * 20_000_000)
        await until(lambda: host.notifyd.metrics.redis_trigger_active.value == 0)
        await subscribed(host)
        await publisher.publish(USER, EVENT)
        await websocket.expect("notification")


class TestStream:
    async def test_what_was_added_while_nobody_read_comes_in_order(
        self, start_on: StartServer, sources: dict[str, Any], publisher: Publisher
    ) -> None:
        for n in range(1200):
            await publisher.add({"type": "user", "target": "u1", "event_type": "n", "payload": n})
        host = await start_on(redis=sources, queue={"max_size_per_user": 2000})
        websocket = await host.websocket("u1")
        told: list[int] = []
        while len(told) < 1200:
            message = await websocket.receive()
            if message["type"] == "notification":
                told.append(message["payload"])
        assert told == list(range(1200))
        await until_async(publisher.pending, 0)

    async def test_an_entry_has_its_time_and_an_id_that_follows_from_its_own(
        self, start_on: StartServer, sources: dict[str, Any], publisher: Publisher
    ) -> None:
        message = text({"type": "user", "target": "u1", "ttl": 60, **EVENT})
        at = 1_700_000_000_000
        for id in (f"{at}-5", f"{at}-6"):
            await publisher.client.xadd(STREAM, {"data": message}, id=id)
        host = await start_on(redis=sources)
        await until(lambda: total(host) == 2)
        # Long over its ttl.
        assert await host.metric("queue_messages") == 0
        websocket = await host.websocket("u1")
        await publisher.client.delete(STREAM)
        await publisher.client.xadd(STREAM, {"data": text(json.loads(message))}, id="1-1")
        told = await websocket.expect("notification")
        assert told["id"][14] == "8"

    async def test_a_stream_that_is_deleted_is_begun_anew(
        self, host: Host, publisher: Publisher
    ) -> None:
        websocket = await listening(host)
        await publisher.add({"type": "user", "target": "u1", **EVENT})
        await websocket.expect("notification")
        await publisher.client.delete(STREAM)
        await publisher.add({"type": "user", "target": "u1", **EVENT})
        await websocket.expect("notification")

    async def test_what_a_server_leaves_is_taken_over_and_what_was_trimmed_forgotten(
        self, start_on: StartServer, sources: dict[str, Any], publisher: Publisher
    ) -> None:
        message = {"type": "user", "target": "u1", **EVENT}
        ids = [await publisher.add({**message, "correlation_id": str(n)}) for n in range(5)]
        await publisher.client.xgroup_create(STREAM, "notifyd", "0")
        await publisher.client.xreadgroup("notifyd", "somebody dead", {STREAM: ">"}, count=4)
        await publisher.client.xdel(STREAM, ids[1])
        host = await start_on(redis=sources)
        await until(lambda: total(host) == 4)
        websocket = await host.websocket("u1")
        told = [each["metadata"]["correlation_id"] for each in await websocket.notifications(4)]
        assert told == ["0", "2", "3", "4"]
        await until_async(publisher.pending, 0)

    async def test_who_has_confirmed_it_does_not_get_it_from_the_next_reader(
        self, start_on: StartServer, sources: dict[str, Any], publisher: Publisher
    ) -> None:
        in_redis: dict[str, Any] = {"queue": {"backend": "redis"}, "ack": {"backend": "redis"}}
        host = await start_on(redis=sources, **in_redis)
        websocket = await host.websocket("u1", query="acks=1")
        await publisher.add({"type": "users", "target": ["u1", "u2"], **EVENT})
        await publisher.add({"type": "user", "target": "u1", **EVENT})
        ids = [each["id"] for each in await websocket.notifications(2)]
        await websocket.ack(*ids)
        await until_async(publisher.pending, 0)
        await host.stop()
        # As if it had died before it acknowledged them.
        await publisher.client.xgroup_setid(STREAM, "notifyd", "0")
        await publisher.client.xreadgroup("notifyd", "somebody dead", {STREAM: ">"})
        host = await start_on(redis=sources, **in_redis)
        await until_async(publisher.pending, 0)
        assert host.notifyd._logs is not None
        assert not (await settled(host.notifyd._logs.read("default", "u1"))).entries
        other = await host.websocket("u2")
        assert [each["id"] for each in await other.notifications(1)] == ids[:1]
        await other.expect("caught_up")
        await other.nothing_came()

    async def test_a_key_that_a_dead_node_was_at_work_on_keeps_nobody_waiting(
        self, start_on: StartServer, sources: dict[str, Any], publisher: Publisher
    ) -> None:
        host = await start_on(redis=sources, queue={"backend": "redis"})
        websocket = await host.websocket("u1")
        message = {"type": "user", "target": "u1", **EVENT, "id": ID}
        left = await left_at_work(host, "redis_stream", text(message))
        for _ in range(2):
            await publisher.add(message)
        await publisher.add({"type": "user", "target": "u1", **EVENT})
        assert (await websocket.notifications(2))[0]["id"] == ID
        await websocket.nothing_came()
        del left

    async def test_what_failed_five_times_is_a_dead_letter(
        self, start_on: StartServer, sources: dict[str, Any], publisher: Publisher
    ) -> None:
        message = {"type": "user", "target": "u1", **EVENT}
        ids = [await publisher.add(message) for _ in range(4)]
        await publisher.client.xgroup_create(STREAM, "notifyd", "0")
        await publisher.client.xreadgroup("notifyd", "somebody dead", {STREAM: ">"}, count=3)
        # Each of its nodes ended with the second one.
        await publisher.client.xclaim(
            STREAM, "notifyd", "somebody dead", 0, (ids[1],), retrycount=5, justid=True
        )
        host = await start_on(redis=sources)
        await until_async(publisher.pending, 0)
        await until(lambda: total(host) == 3)
        (dead,) = await publisher.dead()
        assert (dead["entry"], dead["attempts"]) == (ids[1], "5")
        assert json.loads(dead["data"]) == message

    async def test_an_entry_whose_dispatch_fails_is_tried_five_times(
        self, host: Host, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        websocket = await listening(host)
        assert host.notifyd._sources is not None
        stream = host.notifyd._sources.stream
        assert stream is not None
        send, tried = stream._intake.send, []

        def failing(ready: Any) -> Any:
            if ready.notification.event_type == "poison":
                tried.append(ready)
                raise RuntimeError("a fault of ours")
            return send(ready)

        monkeypatch.setattr(stream._intake, "send", failing)
        await publisher.add({"type": "user", "target": "u1", "event_type": "poison", "payload": 1})
        await publisher.add({"type": "user", "target": "u1", **EVENT})
        await websocket.expect("notification")
        await until(lambda: host.notifyd.metrics.redis_dead_letters_total.value == 1)
        assert len(tried) == 5
        (dead,) = await publisher.dead()
        assert dead["reason"] == "Dispatching it failed 5 times: RuntimeError."
        assert await publisher.pending() == 0


async def left_at_work(host: Host, source: str, message: str | bytes) -> object:
    """Claim a message's id as a node would that dies then: while what is returned lives."""
    redis = host.notifyd._backends.redis
    assert redis is not None
    keys = RedisIdempotencyKeys(redis, host.notifyd._backends.redis_keys, window_seconds=60)
    body = message.encode() if isinstance(message, str) else message
    return await keys.claim(key_scope("default", "", f"{source} id", ID), fingerprint(body))


def total(host: Host) -> float:
    return host.notifyd.metrics.notifications_total.labels("user", "redis_stream").value


async def until_async(ask: Callable[[], Awaitable[int]], wanted: int) -> None:
    async with asyncio.timeout(WAIT):
        while await ask() != wanted:  # noqa: ASYNC110  # Redis tells nobody
            await asyncio.sleep(0.01)


async def test_a_server_without_redis_has_no_such_metrics(start_on: StartServer) -> None:
    host = await start_on()
    response = await host.get("/metrics", key=ADMIN_KEY)
    assert "notifyd_redis" not in response.text


async def test_it_leaves_what_comes_to_another_when_it_stops(
    start_on: StartServer, sources: dict[str, Any], publisher: Publisher
) -> None:
    first = await start_on(redis=sources)
    await subscribed(first)
    await publisher.add({"type": "user", "target": "u1", **EVENT})
    await until(lambda: total(first) == 1)
    second = await start_on(redis=sources)
    websocket = await second.websocket("u1")
    await first.stop()
    await publisher.add({"type": "user", "target": "u1", **EVENT})
    await websocket.expect("notification")


async def test_a_message_is_for_the_tenant_that_it_names(
    start_on: StartServer, sources: dict[str, Any], publisher: Publisher
) -> None:
    host = await start_on(redis=sources, tenant={"enabled": True, "auto_create": True})
    await subscribed(host)
    acme = await host.websocket(jwt=token("u1", tenant_id="acme"))
    default = await host.websocket("u1")
    for refused in (EVENT, {**EVENT, "tenant_id": "a:b"}, {**EVENT, "tenant_id": "acme\n"}):
        before = bad(host)
        await publisher.publish(USER, refused)
        await until(lambda before=before: bad(host) == before + 1, "the refusal")  # type: ignore[misc]  # bound now
    for source in (publisher.publish, lambda _, message: publisher.add(message)):
        message = {"type": "user", "target": "u1", "tenant_id": "acme", "event": EVENT}
        await source(BROADCAST, message)
        assert (await acme.expect("notification"))["event_type"] == "order.created"
    await publisher.publish(BROADCAST, {"tenant_id": "default", "event": EVENT})
    await default.expect("notification")
    await acme.nothing_came()
    await default.nothing_came()
