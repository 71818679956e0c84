"""What is better shown without sockets; the way through them is in tests/server."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from notifyd.connections.admission import Handshake
from notifyd.connections.connection import State, Transport
from notifyd.connections.lifecycle import (
    AUTH_SECONDS,
    MAX_ACK_IDS,
    MAX_AUTHENTICATING,
    MAX_AUTHENTICATING_PER_ADDRESS,
    MAX_TOKEN_MESSAGE_BYTES,
    MAX_WAITING_MESSAGES,
    RETRY_OF_A_DAY_MS,
    reason_for,
)
from notifyd.connections.outbox import Bounds
from notifyd.errors import (
    ConnectionLimit,
    ShuttingDown,
    TokenExpired,
    Unauthorized,
    Unavailable,
    UserConnectionLimit,
    ValidationError,
)
from notifyd.eventually import Eventually
from notifyd.identifiers import new_uuid
from notifyd.identity import Identity
from notifyd.notification import Target
from notifyd.options import ChannelRule, RateLimitSettings
from tests.unit.connected import NOW, Connected, RecordingStream, World, limits_of

ORDERS = Target("channel", ("orders",))


def coming(
    query: bytes = b"", *, address: str = "192.0.2.1", transport: Transport = "websocket"
) -> Handshake:
    return Handshake(transport, query, [], address)


def never(token: str) -> Identity:
    raise AssertionError("no token is looked at")


class Keys:
    """Verification that must be awaited, answered when the test says so."""

    def __init__(self) -> None:
        self.answers: dict[str, asyncio.Future[Identity]] = {}

    def __call__(self, token: str) -> Eventually[Identity]:
        self.answers[token] = asyncio.get_running_loop().create_future()
        return self.answers[token]


class TestRoom:
    def test_a_handshake_says_who_comes(self) -> None:
        world = World()
        token = world.verifier.mint("u1", ttl=60)[0]
        identity = world.lifecycle.admit(coming(b"token=" + token.encode()))
        assert isinstance(identity, Identity)
        assert identity.user_id == "u1"
        assert world.lifecycle.admit(coming()) is None

    def test_no_more_than_there_may_be_those_that_authenticate_included(self) -> None:
        world = World(limits=limits_of(max_connections=2))
        world.connect()
        world.connect(anonymous=True)
        with pytest.raises(ConnectionLimit) as caught:
            world.lifecycle.check_room(coming(), Identity("u2"))
        assert (caught.value.retry_after, caught.value.close_code) == (30, 4029)

    def test_no_more_of_a_user_where_the_new_one_is_refused(self) -> None:
        limits = limits_of(max_connections_per_user=2, evict_on_user_limit=False)
        world = World(limits=limits)
        world.connect()
        world.connect()
        with pytest.raises(UserConnectionLimit) as caught:
            world.lifecycle.check_room(coming(), Identity("u1"))
        assert caught.value.close_code == 4009
        world.lifecycle.check_room(coming(), Identity("u2"))
        # Its room was taken while it was told that it may come.
        late = world.connect()
        world.flush()
        assert [message["type"] for message in late.sink.messages()] == ["error"]
        assert late.sink.closed is not None
        assert late.sink.closed[0] == 4009

    def test_no_more_of_a_tenant_than_it_may_have(self) -> None:
        world = World(limits=limits_of(max_connections_of_tenant=2, max_connections_per_user=2))
        world.connect("u1")
        world.connect("u1")
        with pytest.raises(ConnectionLimit) as caught:
            world.lifecycle.check_room(coming(), Identity("u2"))
        assert (caught.value.retry_after, caught.value.close_code) == (30, 4029)
        # One of his own is given up for it: there are no more than before.
        world.lifecycle.check_room(coming(), Identity("u1"))
        world.connect("u1")
        assert len(world.registry.tenant("default").connections) == 2
        world.lifecycle.check_room(coming(), Identity("u2", "globex"))

    def test_too_many_silent_ones_of_an_address(self) -> None:
        world = World()
        waiting = [world.connect(anonymous=True) for _ in range(MAX_AUTHENTICATING_PER_ADDRESS)]
        with pytest.raises(ConnectionLimit):
            world.lifecycle.check_room(coming(), None)
        world.lifecycle.check_room(coming(address="192.0.2.2"), None)
        world.lifecycle.check_room(coming(), Identity("u1"))
        waiting[0].lose()
        world.lifecycle.check_room(coming(), None)
        for each in waiting[1:]:
            each.lose()
        assert world.lifecycle._authenticating_per_address == {}
        assert world.lifecycle._authenticating == {}

    def test_the_addresses_of_one_network_are_one(self) -> None:
        """Whoever has IPv6 has 2**64 of them, and could keep everybody else from waiting."""
        world = World()
        waiting = [
            world.connect(anonymous=True, address=f"2001:db8::{n:x}")
            for n in range(MAX_AUTHENTICATING_PER_ADDRESS)
        ]
        with pytest.raises(ConnectionLimit):
            world.lifecycle.check_room(coming(address="2001:db8::ffff"), None)
        world.lifecycle.check_room(coming(address="2001:db8:0:1::1"), None)
        for each in waiting:
            each.lose()
        assert world.lifecycle._authenticating_per_address == {}

    def test_too_many_silent_ones_in_all(self) -> None:
        world = World(limits=limits_of(max_connections=10_000))
        for n in range(MAX_AUTHENTICATING):
            world.connect(anonymous=True, address=f"192.0.2.{n % 250}")
        with pytest.raises(ConnectionLimit):
            world.lifecycle.check_room(coming(address="198.51.100.1"), None)

    def test_nobody_while_shutting_down(self) -> None:
        world = World()
        world.connect()
        world.connect(anonymous=True)
        assert len(world.lifecycle.begin_drain()) == 2
        with pytest.raises(ShuttingDown) as caught:
            world.lifecycle.check_room(coming(), Identity("u1"))
        assert caught.value.retry_after is not None
        assert 1 <= caught.value.retry_after <= 10


class TestOpening:
    def test_is_told_who_and_what_he_has(self) -> None:
        world = World()
        client = world.connect(subscribe=("orders", "alerts"), expires_at=NOW + 60)
        (connected,) = client.read()
        assert connected == {
            "type": "connected",
            "connection_id": client.id,
            "user_id": "u1",
            "session": {
                "expires_at": "2027-01-15T08:01:00Z",
                "heartbeat_interval": 30,
                "subscriptions": ["orders", "alerts"],
            },
        }
        assert world.metrics.connections_opened_total.labels("websocket").value == 1

    def test_a_stream_is_told_when_to_return_and_what_it_asked_for(self) -> None:
        world = World(rules={"orders": ChannelRule(subscribe="any")})
        stream = world.connect(transport="sse", channels=["orders", "secret"])
        messages = stream.read()
        assert [each["type"] for each in messages] == ["retry", "connected", "subscribed", "error"]
        assert messages[0]["milliseconds"] == 3000
        assert messages[2]["payload"] == ["orders"]
        assert "secret" in messages[3]["message"]

    def test_the_one_heard_from_longest_ago_makes_room(self) -> None:
        world = World(limits=limits_of(max_connections_per_user=2))
        first, second = world.connect(), world.connect(transport="sse")
        first.read()
        second.read()
        world.clock.now += 5
        first.say("Ping")
        third = world.connect()
        assert second.sink.closed == (4009, "Given up for a newer connection of the same user.")
        told = second.read()
        assert [each["type"] for each in told] == ["retry", "error"]
        assert told[0]["milliseconds"] == RETRY_OF_A_DAY_MS
        assert told[1]["code"] == "CONNECTION_LIMIT"
        assert [first.sink.closed, third.sink.closed] == [None, None]
        closed = world.metrics.connections_closed_total.labels("sse", "evicted")
        assert closed.value == 1

    def test_what_the_evicted_one_held_comes_to_the_new_one(self) -> None:
        world = World(limits=limits_of(max_connections_per_user=1))
        world.connect()
        id = world.send("u1").notification_id
        assert world.connect().read_notifications() == [id]


class TestAuthenticating:
    def test_the_first_message_may_bring_the_token(self) -> None:
        world = World()
        client = world.connect(anonymous=True)
        assert client.read() == []
        token = world.verifier.mint("u1", ttl=60, roles=["admin"])[0]
        (connected,) = client.ask("Auth", token=token)
        assert (connected["type"], connected["user_id"]) == ("connected", "u1")
        assert client.connection.identity.roles == ("admin",)
        assert world.lifecycle._authenticating == {}
        world.manual.advance(AUTH_SECONDS + 1)
        assert client.connection.state is State.OPEN

    @pytest.mark.parametrize(
        "message",
        [
            '{"type":"Ping"}',
            "nonsense",
            '{"type":"Auth","payload":{"token":"nonsense"}}',
            '{"type":"Auth","payload":{"token":"' + "x" * MAX_TOKEN_MESSAGE_BYTES + '"}}',
        ],
    )
    def test_anything_else_ends_it(self, message: str) -> None:
        world = World()
        client = world.connect(anonymous=True)
        world.lifecycle.receive(client.connection, message)
        assert client.sink.closed is not None
        assert client.sink.closed[0] == 4001
        assert [each["type"] for each in client.read()] == ["error"]

    def test_an_expired_token_has_its_code(self) -> None:
        world = World()
        token = world.verifier.mint("u1", ttl=60)[0]
        world.clock.now += 100
        client = world.connect(anonymous=True)
        client.say("Auth", token=token)
        assert client.sink.closed is not None
        assert client.sink.closed[0] == 4010

    def test_nothing_in_time_ends_it(self) -> None:
        world = World()
        client = world.connect(anonymous=True)
        world.manual.advance(AUTH_SECONDS - 0.1)
        assert client.sink.closed is None
        world.manual.advance(0.2)
        assert client.sink.closed == (4001, "No Auth message came within 10 s.")

    def test_where_the_user_has_enough(self) -> None:
        limits = limits_of(max_connections_per_user=1, evict_on_user_limit=False)
        world = World(limits=limits)
        world.connect()
        late = world.connect(anonymous=True)
        late.say("Auth", token=world.verifier.mint("u1", ttl=60)[0])
        assert late.sink.closed is not None
        assert late.sink.closed[0] == 4009
        assert len(world.registry) == 1

    async def test_what_follows_waits_for_the_keys(self) -> None:
        keys = Keys()
        world = World(verify=keys)
        client = world.connect(anonymous=True)
        client.say("Auth", token="t")
        client.say("Subscribe", channels=["orders"])
        client.say("Ping")
        assert client.read() == []
        keys.answers["t"].set_result(Identity("u1"))
        await world.tasks_done()
        assert client.read_types() == ["connected", "subscribed", "pong"]

    async def test_too_much_that_follows_ends_it(self) -> None:
        keys = Keys()
        world = World(verify=keys)
        client = world.connect(anonymous=True)
        client.say("Auth", token="t")
        for _ in range(MAX_WAITING_MESSAGES + 1):
            client.say("Ping")
        assert client.sink.closed is not None
        assert client.sink.closed[0] == 4029
        keys.answers["t"].set_result(Identity("u1"))
        await world.tasks_done()
        assert world.lifecycle._verifying == {}
        assert len(world.registry) == 0

    @pytest.mark.parametrize(
        ("error", "code"),
        [(Unauthorized("x"), 4001), (TokenExpired("x"), 4010), (Unavailable("x"), 1011)],
    )
    async def test_keys_that_do_not_help(self, error: Exception, code: int) -> None:
        keys = Keys()
        world = World(verify=keys)
        client = world.connect(anonymous=True)
        client.say("Auth", token="t")
        client.say("Ping")
        keys.answers["t"].set_exception(error)
        await world.tasks_done()
        assert client.sink.closed is not None
        assert client.sink.closed[0] == code
        assert client.sink.closes == 1

    async def test_one_that_leaves_meanwhile(self) -> None:
        keys = Keys()
        world = World(verify=keys)
        client = world.connect(anonymous=True)
        client.say("Auth", token="t")
        client.lose()
        keys.answers["t"].set_result(Identity("u1"))
        await world.tasks_done()
        assert (len(world.registry), world.lifecycle._verifying) == (0, {})


class TestRefreshing:
    def test_a_new_token_takes_over(self) -> None:
        after = Identity("u1", roles=("admin",), expires_at=NOW + 600, subscribe=("news",))
        world = World(verify=lambda token: after)
        client = world.connect(expires_at=NOW + 60)
        messages = client.ask("Auth", token="t")
        assert messages == [
            {"type": "refreshed", "expires_at": "2027-01-15T08:10:00Z"},
            {"type": "subscribed", "payload": ["news"]},
        ]
        assert client.connection.identity is after

    def test_without_an_end(self) -> None:
        world = World(verify=lambda token: Identity("u1"))
        client = world.connect(expires_at=NOW + 60)
        assert client.ask("Auth", token="t") == [{"type": "refreshed"}]
        world.manual.advance(100)
        assert client.connection.state is State.OPEN

    @pytest.mark.parametrize("other", [Identity("u2"), Identity("u1", "acme")])
    def test_somebody_elses_ends_it(self, other: Identity) -> None:
        world = World(verify=lambda token: other)
        client = world.connect()
        client.say("Auth", token="t")
        assert client.sink.closed is not None
        assert client.sink.closed[0] == 4003

    def test_grants_it_lost_are_unsubscribed_and_told(self) -> None:
        before = Identity("u1", channels=("orders", "alerts"), subscribe=("mine",))
        after = Identity("u1", channels=("alerts",))
        world = World(verify=lambda token: after)
        client = world.connect(identity=before)
        client.ask("Subscribe", channels=["orders", "alerts"])
        # What the server itself subscribed rests on no token.
        world.lifecycle.subscribe_user("default", "u1", ["granted"])
        assert client.ask("Auth", token="t")[1:] == [
            {"type": "unsubscribed", "payload": ["mine", "orders"]}
        ]
        assert client.connection.subscriptions == ("alerts", "granted")

    def test_a_bad_one_takes_nothing_away(self) -> None:
        world = World()
        client = world.connect()
        (error,) = client.ask("Auth", token="nonsense")
        assert error["code"] == "UNAUTHORIZED"
        assert client.connection.state is State.OPEN

    async def test_nor_does_one_whose_keys_are_not_to_be_had(self) -> None:
        keys = Keys()
        world = World(verify=keys)
        client = world.connect()
        client.read()
        client.say("Auth", token="t")
        client.say("Ping")
        keys.answers["t"].set_exception(Unavailable("The keys are away."))
        await world.tasks_done()
        assert client.connection.state is State.OPEN
        assert client.read_types() == ["error", "pong"]

    def test_one_that_is_found_slow_by_the_answer_is_subscribed_to_nothing(self) -> None:
        after = Identity("u1", subscribe=("news",))
        bounds = Bounds(max_bytes=1000, max_messages=1000, total_bytes=1 << 30)
        world = World(verify=lambda token: after, bounds=bounds)
        other = world.connect("u2")
        client = world.connect()
        client.read()
        client.connection.outbox.pause()
        client.connection.outbox.put(b"x" * 999)
        client.say("Auth", token="t")
        assert client.connection.state is State.CLOSED
        assert world.registry.tenant("default").channels == {}
        assert other.connection.state is State.OPEN


class TestMessages:
    def test_ping(self) -> None:
        assert World().connect().ask("Ping") == [{"type": "pong"}]

    def test_what_is_no_message_is_told_and_the_connection_lives(self) -> None:
        world = World()
        client = world.connect()
        client.read()
        for message in ("nonsense", "{}", b'{"type":"Publish"}'):
            world.lifecycle.receive(client.connection, message)
        world.lifecycle.unsupported(client.connection)
        assert [each["code"] for each in client.read()] == [
            "INVALID_MESSAGE",
            "INVALID_MESSAGE",
            "INVALID_MESSAGE",
            "UNSUPPORTED_FORMAT",
        ]
        assert client.connection.state is State.OPEN

    def test_after_the_end_nothing_is_answered(self) -> None:
        world = World()
        client = world.connect()
        client.read()
        client.lose()
        client.say("Ping")
        client.say("Subscribe", channels=["orders"])
        assert client.read() == []
        assert world.registry.subscriptions == 0

    def test_a_fault_of_the_server_closes_and_tells_no_more_than_that(self) -> None:
        def broken(token: str) -> Identity:
            raise RuntimeError("secret detail")

        world = World(verify=broken)
        client = world.connect()
        (error,) = client.ask("Auth", token="t")
        assert (error["code"], error["message"]) == ("INTERNAL", "The server failed.")
        assert client.sink.closed == (1011, "The server failed.")

    def test_any_message_is_a_sign_of_life(self) -> None:
        world = World()
        client = world.connect()
        world.clock.now += 5
        client.say("Nonsense")
        assert client.connection.last_heard == NOW + 5


class TestChannels:
    def test_what_the_rules_allow_is_subscribed_and_the_rest_named(self) -> None:
        world = World(
            rules={
                "o*": ChannelRule(subscribe="any"),
                "private": ChannelRule(subscribe="none"),
            }
        )
        client = world.connect()
        subscribed, error = client.ask(
            "Subscribe", channels=["orders", "private", "news", "bad name", "orders"]
        )
        assert subscribed == {"type": "subscribed", "payload": ["orders"]}
        assert error["code"] == "SUBSCRIPTION_ERROR"
        for name in ("private: ", "news: ", "bad name: "):
            assert name in error["message"]
        assert client.connection.subscriptions == ("orders",)

    def test_again_is_no_error(self) -> None:
        client = World().connect()
        for _ in range(2):
            assert client.ask("Subscribe", channels=["orders"]) == [
                {"type": "subscribed", "payload": ["orders"]}
            ]
        assert client.ask("Subscribe", channels=[]) == [{"type": "subscribed", "payload": []}]

    def test_no_more_than_a_connection_may_have(self) -> None:
        world = World(limits=limits_of(max_subscriptions_per_connection=2))
        client = world.connect()
        subscribed, error = client.ask("Subscribe", channels=["a", "b", "c"])
        assert subscribed["payload"] == ["a", "b"]
        assert "c: a connection may have at most 2 subscriptions" in error["message"]
        assert client.ask("Subscribe", channels=["a"])[0]["payload"] == ["a"]
        assert world.connect(subscribe=("a", "b", "c")).connection.subscriptions == ("a", "b")

    def test_thousands_of_refusals_are_one_short_answer(self) -> None:
        client = World(rules={}).connect()
        (error,) = client.ask("Subscribe", channels=[f"channel-{n}" for n in range(5000)])
        assert len(error["message"]) < 10_000

    def test_unsubscribing(self) -> None:
        client = World().connect()
        client.say("Subscribe", channels=["a", "b"])
        assert client.ask("Unsubscribe", channels=["a", "c", "a"]) == [
            {"type": "unsubscribed", "payload": ["a"]}
        ]
        assert client.ask("Unsubscribe", channels=["a"]) == [
            {"type": "unsubscribed", "payload": []}
        ]

    def test_from_the_server_all_of_a_users_connections_and_they_are_told(self) -> None:
        world = World(rules={})
        websocket, stream = world.connect(), world.connect(transport="sse")
        websocket.read()
        stream.read()
        change = world.lifecycle.subscribe_user
        assert change("default", "u1", ["orders", "orders"]) == 2
        assert change("default", "u1", ["orders"]) == 0
        assert change("default", "nobody", ["orders"]) == 0
        assert world.send(ORDERS).delivered_to == 2
        assert websocket.read_types() == ["subscribed", "notification"]
        assert stream.read_types() == ["subscribed", "notification"]
        assert world.lifecycle.unsubscribe_user("default", "u1", ["orders", "x"]) == 2
        assert world.lifecycle.unsubscribe_user("default", "u1", ["orders"]) == 0
        assert stream.read_types() == ["unsubscribed"]

    def test_from_the_server_all_or_nothing(self) -> None:
        world = World(limits=limits_of(max_subscriptions_per_connection=2))
        world.connect()
        world.connect(subscribe=("a",))
        with pytest.raises(ValidationError):
            world.lifecycle.subscribe_user("default", "u1", ["b", "c"])
        assert world.registry.subscriptions == 1


class TestAcks:
    @pytest.mark.parametrize(
        "payload",
        [
            {},
            {"notification_id": None},
            {"notification_ids": []},
            {"notification_id": "nonsense"},
            {"notification_id": "0b6c1f0e-6a0e-4f3a-9d43-1f2f6b6f0c55"},
            {"notification_ids": ["0b6c1f0e-6a0e-4f3a-9d43-1f2f6b6f0c55"] * (MAX_ACK_IDS + 1)},
        ],
    )
    def test_of_nothing_that_could_be(self, payload: dict[str, object]) -> None:
        world = World()
        client = world.connect()
        client.read()
        message = json.dumps({"type": "Ack", "payload": payload})
        world.lifecycle.receive(client.connection, message)
        assert [each["code"] for each in client.read()] == ["INVALID_ACK"]

    def test_an_id_in_capitals_is_the_same(self) -> None:
        world = World()
        client = world.connect()
        id = world.send("u1").notification_id
        assert client.ask("Ack", notification_id=id.upper()) == [
            {"type": "acked", "notification_id": id}
        ]

    async def test_with_a_store_that_must_be_awaited(self) -> None:
        logs = World().logs

        class Awaited:
            down = False

            async def settle(self, *args: Any, **options: Any) -> frozenset[str]:
                if self.down:
                    raise Unavailable("The store is away.")
                settled: frozenset[str] = logs.settle(*args, **options)
                return settled

            def __getattr__(self, name: str) -> object:
                return getattr(logs, name)

        store = Awaited()
        world = World(logs=store)
        id = world.send("u1").notification_id
        client = world.connect()
        client.read()
        client.say("Ack", notification_id=id)
        assert client.read() == []
        await world.tasks_done()
        assert client.read() == [{"type": "acked", "notification_id": id}]
        store.down = True
        client.say("Ack", notification_id=new_uuid())
        await world.tasks_done()
        assert [each["code"] for each in client.read()] == ["UNAVAILABLE"]


class TestRates:
    """What a client may say; the rest of it goes through the front door (tests/server)."""

    FEW = RateLimitSettings(enabled=True, ws_messages_per_second=1, ws_messages_burst=3)

    @given(
        some.lists(
            some.one_of(
                some.tuples(some.just("send"), some.integers(1, 5)),
                some.tuples(some.just("ack"), some.integers(0, 1), some.integers(1, 100)),
                some.tuples(some.just("pong"), some.integers(0, 1)),
                some.tuples(some.just("reconnect"), some.integers(0, 1)),
            ),
            max_size=30,
        )
    )
    def test_acks_of_what_came_are_never_too_many(self, steps: list[tuple[Any, ...]]) -> None:
        world = World(ratelimit=self.FEW)
        devices = [world.connect(), world.connect()]
        received: list[list[str]] = [[], []]

        def read() -> None:
            for device, ids in zip(devices, received, strict=True):
                for message in device.read():
                    assert message.get("code") != "RATE_LIMITED"
                    if message["type"] == "notification":
                        ids.append(message["id"])

        for step, *args in steps:
            if step == "send":
                for _ in range(args[0]):
                    world.send("u1")
                read()
            elif step == "ack":
                ids, received[args[0]] = received[args[0]][: args[1]], received[args[0]][args[1] :]
                for id in ids[1:]:
                    devices[args[0]].say("Ack", notification_id=id)
                if ids:
                    devices[args[0]].say("Ack", notification_ids=ids[:1])
                read()
            elif step == "pong":
                device = devices[args[0]]
                world.confirmations.ask_waiting()
                asked = device.connection.asked
                if asked is not None:
                    world.lifecycle.pong(device.connection, asked[0].to_bytes(4, "big"))
                read()
            else:
                devices[args[0]].lose()
                devices[args[0]], received[args[0]] = world.connect(), []
                read()
        for device in devices:
            assert [device.ask("Ping")[0]["type"] for _ in range(3)] == ["pong"] * 3

    def test_an_id_that_is_repeated_counts_once(self) -> None:
        world = World(ratelimit=self.FEW)
        client = world.connect()
        id = world.send("u1").notification_id
        client.read()
        types = [client.ask("Ack", notification_ids=[id] * 100)[0]["type"] for _ in range(5)]
        assert types == ["acked"] * 4 + ["error"]
        assert client.connection.ack_credit == 0

    def test_acks_that_make_no_sense_have_a_rate_too(self) -> None:
        world = World(ratelimit=self.FEW)
        client = world.connect()
        client.read()
        codes = [client.ask("Ack", notification_id="x")[0]["code"] for _ in range(5)]
        assert codes == ["INVALID_ACK"] * 3 + ["RATE_LIMITED"] * 2
        assert client.connection.state is State.OPEN

    def test_who_has_not_said_who_he_is(self) -> None:
        world = World(ratelimit=self.FEW)
        client = world.connect(anonymous=True)
        for _ in range(7):
            world.lifecycle.unsupported(client.connection)
        assert client.sink.closed is not None
        assert client.sink.closed[0] == 4029
        world.lifecycle.unsupported(client.connection)

    def test_nothing_is_kept_of_who_says_nothing(self) -> None:
        world = World(ratelimit=self.FEW)
        client = world.connect()
        id = world.send("u1").notification_id
        client.ask("Ack", notification_id=id)
        assert client.connection.budget is None


class TestClosing:
    def test_what_waits_is_written_and_the_reason_told_first(self) -> None:
        world = World()
        client = world.connect()
        client.read()
        id = world.send("u1").notification_id
        world.lifecycle.disconnect(client.connection, "go away")
        messages = client.sink.messages()
        assert [each["type"] for each in messages] == ["notification", "error"]
        assert messages[0]["id"] == id
        assert (messages[1]["code"], messages[1]["message"]) == ("FORBIDDEN", "go away")
        assert client.sink.closed == (4003, "go away")
        assert world.logs.depth() == 1

    def test_once_with_one_reason(self) -> None:
        world = World()
        client = world.connect()
        closes: list[Callable[[], None]] = [
            lambda: world.lifecycle.disconnect(client.connection, "first"),
            lambda: world.lifecycle.idle(client.connection),
            lambda: world.lifecycle.too_slow(client.connection.outbox),
            lambda: world.lifecycle.token_expired(client.connection),
            lambda: world.lifecycle.lost(client.connection, "client"),
        ]
        for close in closes:
            close()
        assert client.sink.closed == (4003, "first")
        assert client.sink.closes == 1
        closed = world.metrics.connections_closed_total
        assert closed.labels("websocket", "forbidden").value == 1
        assert closed.labels("websocket", "client").value == 0

    def test_where_its_last_words_are_too_much_it_is_slow(self) -> None:
        bounds = Bounds(max_bytes=1000, max_messages=1000, total_bytes=1 << 30)
        world = World(bounds=bounds)
        client = world.connect()
        client.read()
        client.connection.outbox.pause()
        client.connection.outbox.put(b"x" * 999)
        world.lifecycle.disconnect(client.connection, "x")
        assert client.sink.closed == (4008, "too slow")
        assert client.sink.closes == 1

    def test_behind_a_replay_everything_is_written_in_order(self) -> None:
        world = World()
        client = world.connect()
        client.read()
        client.connection.outbox.hold_back()
        live = world.send("u1").notification_id
        world.lifecycle.disconnect(client.connection, "x")
        assert client.sink.notifications() == [live]
        assert world.flusher.waiting_bytes == 0

    def test_lost_it_tells_nobody(self) -> None:
        world = World()
        client = world.connect()
        client.read()
        world.send("u1")
        client.lose()
        world.flush()
        assert (client.sink.data, client.sink.closed) == (b"", None)
        closed = world.metrics.connections_closed_total.labels("websocket", "lost")
        assert closed.value == 1
        assert world.metrics.connection_duration_seconds.count == 1

    def test_going_away_says_when_to_return(self) -> None:
        world = World()
        websocket, stream = world.connect(), world.connect(transport="sse")
        waiting = world.connect(anonymous=True)
        for each in (websocket, stream):
            each.read()
        for connection in world.lifecycle.begin_drain():
            world.lifecycle.go_away(connection, "maintenance")
        for each in (websocket, stream, waiting):
            assert each.sink.messages() == [
                {"type": "shutdown", "reason": "maintenance", "reconnect_after_seconds": 6}
            ]
            assert each.sink.closed == (1001, "going away")
        assert (len(world.registry), world.lifecycle._authenticating) == (0, {})

    def test_reasons_have_names(self) -> None:
        codes = (1000, 1001, 1002, 1007, 1009, 1011)
        codes += (4001, 4003, 4008, 4009, 4010, 4012, 4029)  # type: ignore[assignment]  # more of them
        names = [reason_for(code) for code in codes]
        assert "other" not in names
        assert len(set(names)) == len(names)
        assert reason_for(4999) == "other"


class TestNothingIsKept:
    @pytest.mark.parametrize("transport", ["websocket", "sse"])
    def test_of_a_connection_that_ended(self, transport: Transport) -> None:
        world = World()
        others = [world.connect(), world.connect("u2", subscribe=("orders",))]
        client: Connected | None = world.connect(
            transport=transport, subscribe=("orders",), expires_at=NOW + 1000
        )
        assert client is not None
        world.send("u1")
        world.send(ORDERS)
        world.manual.advance(40)
        world.send("u1")
        client.lose()
        gone = weakref.ref(client.sink)
        client = None
        world.manual.advance(130)
        gc.collect()
        assert gone() is None
        assert all(other.connection is not None for other in others)

    def test_of_one_that_never_said_who_it_was(self) -> None:
        world = World()
        client: Connected | None = world.connect(anonymous=True, sink=RecordingStream())
        assert client is not None
        gone = weakref.ref(client.sink)
        client = None
        world.manual.advance(AUTH_SECONDS + 1)
        gc.collect()
        assert gone() is None
