"""The composition root: what the settings choose, and its life. Serving is in tests/server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.requests import HTTPConnection

from notifyd.app import Notifyd, sockets_of
from notifyd.connections.admission import Handshake
from notifyd.connections.connection import State
from notifyd.errors import ConfigurationError, NotFound, Unavailable, ValidationError
from notifyd.identity import Identity
from notifyd.options import (
    AckSettings,
    AuthSettings,
    ChannelRule,
    ChannelSettings,
    CorsSettings,
    QueueSettings,
    RateLimitSettings,
    ServerSettings,
    Settings,
    TenantSettings,
    WebSocketSettings,
)
from tests.unit.connected import SECRET, Clock, RecordingSink, RecordingStream

AUTH = AuthSettings(jwt_secret=SECRET)


def settings(**sections: Any) -> Settings:
    return Settings(**{"auth": AUTH, **sections})


async def nobody(connection: HTTPConnection) -> Identity | None:
    return None


def connect(notifyd: Notifyd, user_id: str, sink: RecordingSink | None = None) -> RecordingSink:
    """A client whose bytes a test sees."""
    sink = sink or RecordingSink()
    handshake = Handshake("websocket" if sink.pings else "sse", b"", [], "192.0.2.1")
    connection = notifyd.lifecycle.connect(handshake, Identity(user_id), sink)
    sink.outbox = connection.outbox
    return sink


async def read(sink: RecordingSink) -> list[dict[str, Any]]:
    assert sink.outbox is not None
    await sink.outbox.drained()
    return sink.messages()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # nothing tells when a metric has changed
            await asyncio.sleep(0)


class TestSettings:
    def test_what_cannot_be_meant_is_refused_all_at_once(self) -> None:
        wrong = settings(
            websocket=WebSocketSettings(heartbeat_interval=60, idle_timeout=30),
            server=ServerSettings(max_sockets=10),
        )
        with pytest.raises(ConfigurationError) as caught:
            Notifyd(wrong)
        assert "websocket.idle_timeout" in str(caught.value)
        assert "server.max_sockets" in str(caught.value)

    def test_tokens_need_a_secret_unless_the_application_authenticates(self) -> None:
        without = Settings(
            auth=AuthSettings(api_key="k" * 32),
            server=ServerSettings(mode="production"),
            cors=CorsSettings(origins=("https://app.example",)),
            channels=ChannelSettings(rules={"*": ChannelRule(subscribe="any")}),
        )
        with pytest.raises(ConfigurationError, match=r"^auth\.jwt"):
            Notifyd(without)
        Notifyd(without, authenticate=nobody)

    def test_production_needs_more(self) -> None:
        with pytest.raises(ConfigurationError) as caught:
            Notifyd(settings(server=ServerSettings(mode="production")))
        for option in ("auth.api_key", "cors.origins", "channels.rules"):
            assert option in str(caught.value)

    async def test_what_is_switched_off_is_not_there(self) -> None:
        notifyd = Notifyd(
            settings(queue=QueueSettings(enabled=False), ack=AckSettings(enabled=False))
        )
        async with notifyd.lifespan():
            assert (await notifyd.send(user="u1", event="x", payload=1)).outcome == "nobody"
            assert len(notifyd._tasks._tasks) == 0


class TestLife:
    async def test_ready_while_the_lifespan_runs(self) -> None:
        notifyd = Notifyd(settings())

        async def ready() -> int:
            transport = httpx.ASGITransport(notifyd.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return (await client.get("/health/ready")).status_code

        assert await ready() == 503
        async with notifyd.lifespan():
            assert await ready() == 200
        assert await ready() == 503

    async def test_at_its_end_everybody_is_told_and_nothing_runs(self) -> None:
        notifyd = Notifyd(settings())
        async with notifyd.lifespan():
            sinks = [connect(notifyd, f"u{n}") for n in range(450)]
            stream = connect(notifyd, "u1", RecordingStream())
            await read(sinks[0])
        for sink in [*sinks, stream]:
            assert sink.closed == (1001, "going away")
            assert sink.messages()[-1]["type"] == "shutdown"
        assert notifyd._tasks._tasks == set()
        assert len(notifyd._registry) == 0

    async def test_one_that_left_while_the_others_are_told(self) -> None:
        notifyd = Notifyd(settings())
        async with notifyd.lifespan():
            sinks = [connect(notifyd, f"u{n}") for n in range(250)]
            last = sinks[-1].outbox
            assert last is not None
            draining = asyncio.ensure_future(notifyd.drain())
            await asyncio.sleep(0)
            assert last.connection.state is State.OPEN
            notifyd.lifecycle.lost(last.connection)
            await draining
            assert sinks[-1].closed is None
            assert sinks[0].closed is not None

    async def test_keys_that_cannot_be_had_do_not_keep_it_from_starting(self) -> None:
        auth = AuthSettings(jwks_url="https://keys.example/jwks", jwt_algorithms=("RS256",))
        notifyd = Notifyd(settings(auth=auth))
        notifyd.verifier._jwks = None
        async with notifyd.lifespan():
            pass

    async def test_what_is_too_old_goes_by_itself(self) -> None:
        clock = Clock()
        notifyd = Notifyd(
            settings(
                queue=QueueSettings(cleanup_interval_seconds=0.001),
                ack=AckSettings(cleanup_interval_seconds=0.001),
            ),
            clock=clock,
        )
        async with notifyd.lifespan():
            await notifyd.send(user="away", event="x", payload=1, ttl=10)
            connect(notifyd, "u1")
            await notifyd.send(user="u1", event="x", payload=1)
            clock.now += 100
            metrics = notifyd.metrics
            await until(
                lambda: metrics.queue_expired_total.value == 1 == metrics.ack_expired_total.value
            )
            assert notifyd.metrics.queue_messages.value == 0

    async def test_who_has_not_called_for_long_is_forgotten_by_the_rate_limits(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("notifyd.app.SWEEP_SECONDS", 0.001)
        clock = Clock()
        notifyd = Notifyd(settings(ratelimit=RateLimitSettings(enabled=True)), clock=clock)
        async with notifyd.lifespan():
            limits = notifyd._backends.rate_limits
            assert limits is not None
            limits.request_by_address("192.0.2.1")
            buckets = notifyd._backends._local_limits
            assert sum(map(len, buckets)) == 1
            clock.now += 1000
            await until(lambda: not any(map(len, buckets)))

    async def test_where_tenants_cannot_be_loaded_nothing_stays_open(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        notifyd = Notifyd(settings(tenant=TenantSettings(enabled=True)))
        closed = asyncio.Event()

        async def load() -> None:
            raise Unavailable("The store is away.")

        async def aclose() -> None:
            closed.set()

        monkeypatch.setattr(notifyd.tenants, "load", load)
        monkeypatch.setattr(notifyd._backends, "aclose", aclose)
        with pytest.raises(ConfigurationError, match=r"tenant: .*The store is away"):
            await notifyd.start()
        assert closed.is_set()


class TestWiring:
    async def test_metrics_show_what_is(self) -> None:
        notifyd = Notifyd(settings())
        metrics = notifyd.metrics
        async with notifyd.lifespan():
            websocket = connect(notifyd, "u1")
            connect(notifyd, "u2", RecordingStream())
            notifyd.lifecycle.subscribe_user("default", "u1", ["orders"])
            assert metrics.outbox_bytes.value > 0
            sent = await notifyd.send(user="u1", event="x", payload=1)
            await notifyd.send(user="away", event="x", payload=1)
            await read(websocket)
            assert [
                metrics.connections.labels("websocket").value,
                metrics.connections.labels("sse").value,
                metrics.users_connected.value,
                metrics.channels_active.value,
                metrics.channel_subscriptions.value,
                metrics.queue_messages.value,
                metrics.ack_pending.value,
            ] == [1, 1, 2, 1, 1, 1, 1]
            outbox = websocket.outbox
            assert outbox is not None
            notifyd.lifecycle.receive(
                outbox.connection,
                f'{{"type":"Ack","payload":{{"notification_id":"{sent.notification_id}"}}}}',
            )
            assert (metrics.ack_pending.value, metrics.ack_received_total.value) == (0, 1)
            assert metrics.ack_seconds.count == 1

    async def test_slow_idle_and_expired_ones_are_closed(self) -> None:
        clock = Clock()
        notifyd = Notifyd(
            settings(
                websocket=WebSocketSettings(
                    heartbeat_interval=0.01, idle_timeout=0.02, outbox_max_messages=3
                )
            ),
            clock=clock,
        )
        async with notifyd.lifespan():
            slow, idle, expired = RecordingSink(), RecordingSink(), RecordingStream()
            connect(notifyd, "slow", slow)
            await read(slow)
            assert slow.outbox is not None
            slow.outbox.pause()
            for _ in range(4):
                await notifyd.send(user="slow", event="x", payload=1)
            assert slow.closed == (4008, "too slow")
            connect(notifyd, "idle", idle)
            handshake = Handshake("sse", b"", [], "")
            identity = Identity("expired", expires_at=clock() + 60)
            connection = notifyd.lifecycle.connect(handshake, identity, expired)
            expired.outbox = connection.outbox
            clock.now += 100
            await until(lambda: None not in (idle.closed, expired.closed))
            assert idle.closed == (4012, "nothing heard")
            assert expired.closed == (4010, "The token expired.")

    async def test_what_nothing_keeps_is_counted_as_dropped(self) -> None:
        notifyd = Notifyd(settings(queue=QueueSettings(enabled=False)))
        async with notifyd.lifespan():
            sink = connect(notifyd, "u1")
            assert sink.outbox is not None
            await notifyd.send(user="u1", event="x", payload=1)
            await notifyd.send(user="u1", event="x", payload=1, ttl=0)
            notifyd.lifecycle.lost(sink.outbox.connection)
            assert notifyd.metrics.queue_dropped_total.value == 1

    async def test_while_the_store_is_down_nobody_asks_it_in_vain(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        notifyd = Notifyd(settings(queue=QueueSettings(backend="redis")))
        asked: list[None] = []
        monkeypatch.setattr(notifyd._replayer, "store_is_back", lambda: asked.append(None))
        redis = notifyd._backends.redis
        assert redis is not None
        await notifyd._retry()
        assert (len(asked), notifyd._backends.logs_away) == (1, False)
        for _ in range(notifyd.settings.breaker.failure_threshold):
            redis.breaker.failed()
        await notifyd._retry()
        assert (len(asked), notifyd._backends.logs_away) == (1, True)

    async def test_sockets_take_the_publishing_calls(self) -> None:
        services = sockets_of(Notifyd(settings())).services
        assert b"/api/v1/notifications/channel" in services.fast
        assert all(path.startswith(b"/api/v1/notifications") for path in services.fast)


class TestInProcess:
    async def test_publishes_and_says_what_became_of_it(self) -> None:
        notifyd = Notifyd(settings())
        async with notifyd.lifespan():
            sink = connect(notifyd, "u1")
            receipt = await notifyd.send(user="u1", event="order.created", payload={"n": 1})
            assert (receipt.outcome, receipt.delivered_to) == ("delivered", 1)
            message = (await read(sink))[-1]
            assert (message["id"], message["payload"]) == (receipt.notification_id, {"n": 1})

    async def test_errors_are_those_of_the_server(self) -> None:
        notifyd = Notifyd(settings())
        async with notifyd.lifespan():
            with pytest.raises(ValidationError):
                await notifyd.send(user="u1", event="", payload=1)
            with pytest.raises(NotFound):
                await notifyd.send(user="u1", template="unknown", variables={})

    async def test_a_key_of_the_callers_counts(self) -> None:
        notifyd = Notifyd(settings())
        async with notifyd.lifespan():
            first, second = [
                await notifyd.send(user="u1", event="x", payload=1, idempotency_key="k")
                for _ in range(2)
            ]
            assert first.notification_id == second.notification_id
            assert notifyd.metrics.queue_messages.value == 1
