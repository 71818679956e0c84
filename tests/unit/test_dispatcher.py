from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from notifyd.connections.outbox import Bounds
from notifyd.dispatch.repeats import Repeats
from notifyd.errors import Unavailable, ValidationError
from notifyd.eventually import settled
from notifyd.notification import (
    Audience,
    Outcome,
    Priority,
    Receipt,
    RecipientResult,
    Target,
)
from notifyd.queue.base import Rejection
from notifyd.wire import notification_message
from tests.unit.connected import Connected, RecordingSink, World, a_notification

EVERYBODY = Target("broadcast")
ORDERS = Target("channel", ("orders",))


def users(*names: str) -> Target:
    return Target("users", names)


def subscriber(world: World, user_id: str, *channels: str, **claims: Any) -> Connected:
    client = world.connect(user_id, subscribe=channels, **claims)
    client.read()
    return client


def states(world: World, id: str) -> dict[str, str]:
    report = world.ledger.report("default", id)
    return {} if report is None else {each.user_id: each.state for each in report.recipients}


class TestUser:
    def test_delivered_to_each_of_his_connections(self) -> None:
        world = World()
        websocket, stream = world.connect(), world.connect(transport="sse")
        receipt = world.send("u1")
        assert receipt == Receipt(receipt.notification_id, Outcome.DELIVERED, delivered_to=2)
        assert receipt.success
        assert (
            websocket.read_notifications()
            == stream.read_notifications()
            == [receipt.notification_id]
        )
        assert states(world, receipt.notification_id) == {"u1": "pending"}
        assert world.metrics.deliveries_total.labels("websocket").value == 1
        assert world.metrics.deliveries_total.labels("sse").value == 1

    def test_queued_where_he_is_away(self) -> None:
        world = World()
        receipt = world.send("u1")
        assert receipt == Receipt(receipt.notification_id, Outcome.QUEUED, queued=1)
        assert states(world, receipt.notification_id) == {"u1": "queued"}
        assert world.metrics.queue_enqueued_total.value == 1

    def test_nobody_where_nothing_keeps_it(self) -> None:
        world = World(queue=False)
        receipt = world.send("u1")
        assert receipt == Receipt(receipt.notification_id, Outcome.NOBODY)
        assert not receipt.success
        assert World().send("u1", ttl=0).outcome is Outcome.NOBODY

    def test_ttl_0_reaches_who_is_connected(self) -> None:
        world = World()
        client = world.connect()
        assert world.send("u1", ttl=0).outcome is Outcome.DELIVERED
        assert len(client.read_notifications()) == 1

    def test_filtered_by_its_audience(self) -> None:
        world = World()
        client = world.connect(roles=("user",))
        client.read()
        admins = Audience("Roles", frozenset({"admin"}))
        assert world.send("u1", audience=admins).outcome is Outcome.FILTERED
        assert client.read() == []

    def test_filtered_where_his_only_connection_is_the_sender(self) -> None:
        world = World()
        client = world.connect()
        assert world.send("u1", exclude_connection=client.id).outcome is Outcome.FILTERED
        other = world.connect()
        client.read()
        receipt = world.send("u1", exclude_connection=client.id)
        assert (receipt.outcome, receipt.delivered_to) == (Outcome.DELIVERED, 1)
        assert len(other.read_notifications()) == 1
        assert client.read() == []

    @pytest.mark.parametrize(
        ("audience", "outcome"),
        [
            (Audience("Users", frozenset({"u1"})), Outcome.QUEUED),
            (Audience("Users", frozenset({"u2"})), Outcome.FILTERED),
            (Audience("Roles", frozenset({"admin"})), Outcome.QUEUED),
            (Audience("Channels", frozenset({"orders"})), Outcome.FILTERED),
            (Audience("All"), Outcome.QUEUED),
        ],
    )
    def test_away_he_is_judged_by_what_can_be_known(
        self, audience: Audience, outcome: Outcome
    ) -> None:
        assert World().send("u1", audience=audience).outcome is outcome

    def test_expired(self) -> None:
        world = World()
        client = world.connect()
        client.read()
        old = a_notification(ttl=10)
        world.clock.now += 10
        assert world.send("u1", old) == Receipt(old.id, Outcome.EXPIRED)
        assert world.send(users("u1", "u2"), old).outcome is Outcome.EXPIRED
        assert world.send(EVERYBODY, old).outcome is Outcome.EXPIRED
        assert client.read() == []

    def test_failed_where_a_full_queue_gives_up_the_new_one(self) -> None:
        world = World(max_size_per_user=1)
        world.send("u1", priority=Priority.HIGH)
        receipt = world.send("u1", priority=Priority.LOW)
        assert receipt == Receipt(
            receipt.notification_id, Outcome.FAILED, failed=1, reason="queue_full"
        )
        assert not receipt.success
        assert states(world, receipt.notification_id) == {}
        assert world.metrics.delivery_failures_total.labels("queue_full").value == 1

    def test_queued_where_his_connection_was_too_slow_behind_what_it_had(self) -> None:
        world = World(bounds=Bounds(max_bytes=1 << 20, max_messages=2, total_bytes=1 << 30))
        client = world.connect()
        client.read()
        client.connection.outbox.pause()
        ids = [world.send("u1").notification_id for _ in range(2)]
        receipt = world.send("u1")
        assert receipt.outcome is Outcome.QUEUED
        assert client.sink.closed == (4008, "too slow")
        entries = world.logs.read("default", "u1").entries
        assert [each.notification.id for each in entries] == [*ids, receipt.notification_id]
        assert world.metrics.delivery_failures_total.labels("slow").value == 1

    def test_another_tenants_user_is_not_he(self) -> None:
        world = World()
        client = world.connect(tenant="acme")
        client.read()
        assert world.send("u1").outcome is Outcome.QUEUED
        assert client.read() == []
        assert world.send("u1", tenant="acme").outcome is Outcome.DELIVERED

    def test_without_a_ledger(self) -> None:
        world = World(ledger=False)
        world.connect()
        assert world.send("u1").outcome is Outcome.DELIVERED
        assert world.send(users("u1", "u2")).delivered_to == 1
        assert world.send(EVERYBODY).delivered_to == 1

    def test_order_is_that_of_the_calls_whatever_the_priority(self) -> None:
        world = World()
        client = subscriber(world, "u1", "orders")
        order = [Priority.LOW, Priority.CRITICAL, Priority.NORMAL, Priority.HIGH] * 3
        targets: list[Target | str] = ["u1", ORDERS, EVERYBODY, users("u1")]
        ids = [
            world.send(target, priority=priority).notification_id
            for priority in order
            for target in targets
        ]
        assert client.read_notifications() == ids


class TestUsers:
    def test_each_has_an_outcome_and_the_call_the_best(self) -> None:
        world = World(max_size_per_user=1)
        world.connect("here")
        world.connect("here")
        filtered = world.connect("filtered")
        world.send("full", priority=Priority.CRITICAL)
        receipt = world.send(
            users("here", "away", "full", "filtered", "here"), exclude_connection=filtered.id
        )
        assert receipt.results == {
            "here": RecipientResult(Outcome.DELIVERED, 2),
            "away": RecipientResult(Outcome.QUEUED),
            "full": RecipientResult(Outcome.FAILED, reason="queue_full"),
            "filtered": RecipientResult(Outcome.FILTERED),
        }
        assert (receipt.outcome, receipt.delivered_to, receipt.queued, receipt.failed) == (
            Outcome.DELIVERED,
            2,
            1,
            1,
        )
        assert states(world, receipt.notification_id) == {"here": "pending", "away": "queued"}

    @pytest.mark.parametrize(
        ("options", "fields", "outcome"),
        [
            ({}, {}, Outcome.QUEUED),
            ({"queue": False}, {}, Outcome.NOBODY),
            ({}, {"ttl": 0}, Outcome.NOBODY),
            ({}, {"audience": Audience("Channels", frozenset({"x"}))}, Outcome.FILTERED),
        ],
    )
    def test_all_away(
        self, options: dict[str, Any], fields: dict[str, Any], outcome: Outcome
    ) -> None:
        receipt = World(**options).send(users("u1", "u2"), **fields)
        assert receipt.outcome is outcome
        assert receipt.results is not None
        assert [each.outcome for each in receipt.results.values()] == [outcome] * 2

    def test_a_named_audience_narrows_them(self) -> None:
        world = World()
        world.connect("u1")
        audience = Audience("Users", frozenset({"u1", "u3"}))
        receipt = world.send(users("u1", "u2", "u3"), audience=audience)
        assert receipt.results is not None
        assert [each.outcome for each in receipt.results.values()] == [
            Outcome.DELIVERED,
            Outcome.FILTERED,
            Outcome.QUEUED,
        ]


class TestConnected:
    def test_a_broadcast_reaches_everybody_of_the_tenant(self) -> None:
        world = World()
        here = [world.connect("u1"), world.connect("u2", transport="sse")]
        foreign = world.connect("u1", tenant="acme")
        receipt = world.send(EVERYBODY)
        assert (receipt.outcome, receipt.delivered_to) == (Outcome.DELIVERED, 2)
        assert all(each.read_notifications() == [receipt.notification_id] for each in here)
        assert foreign.read_notifications() == []
        assert all(each.held() == [] for each in here)

    def test_a_channel_its_subscribers(self) -> None:
        world = World()
        inside, outside = subscriber(world, "u1", "orders"), subscriber(world, "u2", "alerts")
        receipt = world.send(ORDERS)
        assert receipt == Receipt(receipt.notification_id, Outcome.DELIVERED, delivered_to=1)
        assert inside.read_notifications() == [receipt.notification_id]
        assert outside.read() == []

    def test_several_channels_reach_each_connection_once_and_count_it_in_each(self) -> None:
        world = World()
        both = subscriber(world, "u1", "a", "b")
        subscriber(world, "u2", "a")
        left_out = subscriber(world, "u3", "b")
        receipt = world.send(Target("channels", ("a", "b", "c")), exclude_connection=left_out.id)
        assert receipt.delivered_to == 2
        assert receipt.channels == {"a": 2, "b": 1, "c": 0}
        assert both.read_notifications() == [receipt.notification_id]

    def test_nobody_is_there(self) -> None:
        world = World()
        subscriber(world, "u1", "a")
        assert world.send(ORDERS).outcome is Outcome.NOBODY
        receipt = world.send(Target("channels", ("b", "c")))
        assert (receipt.outcome, receipt.channels) == (Outcome.NOBODY, {"b": 0, "c": 0})
        assert World().send(EVERYBODY).outcome is Outcome.NOBODY
        assert world.ledger.report("default", receipt.notification_id) is None

    def test_nobody_is_meant(self) -> None:
        world = World()
        client = subscriber(world, "u1", "orders")
        assert world.send(EVERYBODY, exclude_connection=client.id).outcome is Outcome.FILTERED
        admins = Audience("Roles", frozenset({"admin"}))
        assert world.send(ORDERS, audience=admins).outcome is Outcome.FILTERED
        receipt = world.send(Target("channels", ("orders",)), audience=admins)
        assert (receipt.outcome, receipt.channels) == (Outcome.FILTERED, {"orders": 0})
        assert client.read() == []

    @pytest.mark.parametrize(
        ("audience", "reached"),
        [
            (Audience(), {"ann", "bob", "cleo"}),
            (Audience("Roles", frozenset({"admin", "root"})), {"ann"}),
            (Audience("Users", frozenset({"bob", "zoe"})), {"bob"}),
            (Audience("Channels", frozenset({"alerts"})), {"bob", "cleo"}),
        ],
    )
    def test_an_audience_narrows(self, audience: Audience, reached: set[str]) -> None:
        world = World()
        clients = {
            "ann": subscriber(world, "ann", "orders", roles=("admin", "user")),
            "bob": subscriber(world, "bob", "orders", "alerts"),
            "cleo": subscriber(world, "cleo", "alerts"),
        }
        assert world.send(EVERYBODY, audience=audience).delivered_to == len(reached)
        assert {name for name, each in clients.items() if each.read_notifications()} == reached

    def test_who_must_ack_is_expected_to(self) -> None:
        world = World()
        subscriber(world, "u1", "orders")
        subscriber(world, "u1", "orders")
        subscriber(world, "u2", "orders")
        required = world.send(ORDERS, require_ack=True)
        assert states(world, required.notification_id) == {"u1": "pending", "u2": "pending"}
        plain = world.send(ORDERS)
        report = world.ledger.report("default", plain.notification_id)
        assert (list(report.recipients), report.acks) == ([], 0)

    def test_one_that_leaves_is_not_reached(self) -> None:
        world = World()
        staying, leaving = subscriber(world, "u1", "orders"), subscriber(world, "u2", "orders")
        world.send(ORDERS)
        leaving.lose()
        assert world.send(ORDERS).delivered_to == 1
        staying.say("Unsubscribe", channels=["orders"])
        assert world.send(ORDERS).outcome is Outcome.NOBODY
        assert len(staying.read_notifications()) == 2

    def test_a_slow_one_does_not_keep_it_from_the_others(self) -> None:
        world = World(bounds=Bounds(max_bytes=1000, max_messages=1000, total_bytes=1 << 30))
        clients = [subscriber(world, f"u{n}", "orders") for n in range(3)]
        slow = clients[1]
        slow.connection.outbox.pause()
        slow.connection.outbox.put(b"x" * 999)
        assert world.send(ORDERS).delivered_to == 2
        assert world.metrics.delivery_failures_total.labels("slow").value == 1
        world.flush()
        assert slow.sink.closed == (4008, "too slow")
        assert [len(each.read_notifications()) for each in (clients[0], clients[2])] == [1, 1]
        assert world.send(ORDERS).delivered_to == 2

    def test_what_is_on_its_way_to_one_that_stopped_reading_counts_against_his_room(self) -> None:
        size = len(notification_message(a_notification()).websocket)
        world = World(bounds=Bounds(max_bytes=3 * size, max_messages=1000, total_bytes=1 << 30))
        slow = subscriber(world, "u1", "orders")
        world.flush()
        slow.connection.outbox.pause()
        outcomes = [world.send(ORDERS).outcome for _ in range(4)]
        assert outcomes == [Outcome.DELIVERED] * 3 + [Outcome.NOBODY]
        assert slow.sink.closed == (4008, "too slow")

    def test_room_in_messages_is_looked_at_as_well(self) -> None:
        world = World(bounds=Bounds(max_bytes=1 << 20, max_messages=2, total_bytes=1 << 30))
        slow, stranger = subscriber(world, "u1", "orders"), subscriber(world, "u2", "other")
        world.flush()
        for each in (slow, stranger):
            each.connection.outbox.pause()
        stranger.connection.outbox.put(b"one")
        stranger.connection.outbox.put(b"two")
        outcomes = [world.send(ORDERS).outcome for _ in range(3)]
        assert outcomes == [Outcome.DELIVERED] * 2 + [Outcome.NOBODY]
        assert stranger.sink.closed is None


class TestTheSameIdAgain:
    @pytest.mark.parametrize("target", ["u1", users("u1"), users("u1", "u2")])
    @pytest.mark.parametrize("devices", [1, 2])
    def test_never_comes_twice_on_one_connection(self, target: Target | str, devices: int) -> None:
        world = World()
        clients = [world.connect() for _ in range(devices)]
        first = a_notification()
        world.send("u1", first)
        late = world.connect()
        late.lose()
        receipt = world.send(target, first)
        assert receipt.delivered_to == devices
        assert [len(each.read_notifications()) for each in clients] == [1] * devices

    def test_reaches_a_device_that_has_not_got_it(self) -> None:
        world = World()
        one, other = world.connect(), world.connect()
        first = a_notification()
        world.dispatcher.dispatch(
            "default",
            Target("user", ("u1",)),
            first,
            exclude_connection=other.connection.id,
            source="test",
        )
        assert world.send("u1", first).delivered_to == 2
        assert [len(each.read_notifications()) for each in (one, other)] == [1, 1]


class TestAnEntryAgain:
    """What a stream's next reader dispatches again."""

    @pytest.mark.parametrize("store_first", [False, True])
    @pytest.mark.parametrize("target", ["u1", users("u1", "u2")])
    @pytest.mark.parametrize("devices", [1, 2])
    def test_does_not_come_after_it_was_acked(
        self, target: Target | str, devices: int, store_first: bool
    ) -> None:
        world = World(store_first=store_first)
        clients = [world.connect(acks=True) for _ in range(devices)]
        entry = a_notification(entry="e")
        assert world.send(target, entry).delivered_to == devices
        assert [each.read_notifications() for each in clients] == [[entry.id]] * devices
        clients[0].ask("Ack", notification_id=entry.id)
        receipt = world.send(target, entry)
        assert (receipt.outcome, receipt.delivered_to) == (Outcome.DELIVERED, devices)
        assert [each.read_notifications() for each in clients] == [[]] * devices

    @pytest.mark.parametrize("target", [EVERYBODY, ORDERS, Target("channels", ("orders", "x"))])
    def test_does_not_come_twice_to_who_is_connected(self, target: Target) -> None:
        world = World()
        client = subscriber(world, "u1", "orders")
        entry = a_notification(entry="e")
        first = world.send(target, entry)
        subscriber(world, "u2", "orders")
        assert world.send(target, entry) == first
        assert client.read_notifications() == [entry.id]

    def test_comes_to_who_has_not_got_it(self) -> None:
        world = World()
        entry = a_notification(entry="e")
        assert world.send(ORDERS, entry).outcome is Outcome.NOBODY
        client = subscriber(world, "u1", "orders")
        assert world.send(ORDERS, entry).delivered_to == 1
        assert client.read_notifications() == [entry.id]

    def test_another_of_the_same_id_comes(self) -> None:
        world = World()
        client = world.connect(acks=True)
        first = a_notification(entry="e")
        for entry in ("e", "f"):
            world.send("u1", msgspec.structs.replace(first, entry=entry))
            assert client.read_notifications() == [first.id]
            client.ask("Ack", notification_id=first.id)

    def test_what_is_remembered_is_bounded(self) -> None:
        repeats = Repeats(limit=3)
        for n in range(10):
            repeats.note_user(f"e{n}", "u1", 1)
            repeats.note_connected(f"e{n}", Receipt("id", Outcome.DELIVERED, n))
        known = [n for n in range(10) if repeats.given_to_user(f"e{n}", "u1")]
        assert known == [n for n in range(10) if repeats.given_to_connected(f"e{n}")] == [7, 8, 9]


class TestLimits:
    def test_over_64_kib_encoded_is_refused_whoever_is_there(self) -> None:
        world = World()
        large = a_notification(payload=b'"%s"' % (b"x" * 65_530))
        for target in ("u1", users("u1"), ORDERS, EVERYBODY):
            with pytest.raises(ValidationError) as caught:
                world.send(target, large)
            assert caught.value.field == "payload"
        assert world.logs.depth() == 0

    def test_what_fits_is_encoded_once(self) -> None:
        world = World()
        clients = [world.connect(f"u{n}", sink=RecordingSink()) for n in range(2)]
        for each in clients:
            each.read()
        world.send(EVERYBODY)
        world.flush()
        assert clients[0].sink.writes[0] is clients[1].sink.writes[0]


class SlowStore:
    """A store that must be awaited, in front of the memory's; it answers when a test has looked."""

    def __init__(self, logs: Any, *, down: bool = False) -> None:
        self.logs = logs
        self.down = down

    async def enqueue(self, *args: Any, **options: Any) -> Sequence[Rejection | None]:
        if self.down:
            raise Unavailable("The store is away.", retry_after=1)
        stored: Sequence[Rejection | None] = self.logs.enqueue(*args, **options)
        return stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self.logs, name)


class TestAwaiting:
    @staticmethod
    def world(*, down: bool = False) -> World:
        return World(logs=SlowStore(World().logs, down=down))

    async def test_who_is_connected_is_reached_at_once(self) -> None:
        world = self.world()
        world.connect()
        assert isinstance(world.dispatch("u1"), Receipt)

    async def test_the_receipt_comes_with_the_stores_answer(self) -> None:
        world = self.world()
        pending = world.dispatch("u1")
        assert not isinstance(pending, Receipt)
        receipt = await pending
        assert (receipt.outcome, receipt.queued) == (Outcome.QUEUED, 1)
        several = await settled(world.dispatch(users("u1", "u2")))
        assert several.queued == 2

    async def test_who_connected_meanwhile_gets_it_marked(self) -> None:
        world = self.world()
        pending = world.dispatch("u1")
        client = world.connect()
        client.read()
        receipt = await settled(pending)
        await world.tasks_done()
        messages = client.read()
        assert [each["id"] for each in messages] == [receipt.notification_id]
        assert messages[0]["metadata"]["replayed"] is True

    async def test_a_store_that_is_down_is_told(self) -> None:
        world = self.world(down=True)
        with pytest.raises(Unavailable):
            await settled(world.dispatch("u1"))
        assert world.metrics.queue_enqueued_total.value == 0


def test_receipts_are_small() -> None:
    assert msgspec.json.encode(RecipientResult(Outcome.QUEUED)) == b'{"outcome":"queued"}'


class TestEach:
    """Many notifications to one user each; tests/unit/test_batches.py compares with one by one."""

    def test_who_turns_out_too_slow_gets_the_rest_from_his_queue(self) -> None:
        world = World(bounds=Bounds(max_bytes=1 << 20, max_messages=2, total_bytes=1 << 30))
        slow, other = world.connect("slow"), world.connect("other")
        slow.read()
        slow.connection.outbox.pause()
        sends = [(user, a_notification()) for user in ("slow", "slow", "slow", "other", "slow")]
        receipts = world.dispatcher.dispatch_each("default", sends, source="http")
        outcomes = [receipt.outcome for receipt in receipts if isinstance(receipt, Receipt)]
        delivered, queued = Outcome.DELIVERED, Outcome.QUEUED
        assert outcomes == [delivered, delivered, queued, delivered, queued]
        assert slow.sink.closed == (4008, "too slow")
        assert len(other.read_notifications()) == 1
        expected = [states(world, notification.id) for _, notification in sends]
        assert expected == [{"slow": "queued"}] * 3 + [{"other": "pending"}, {"slow": "queued"}]
        kept = world.logs.read("default", "slow").entries
        assert {each.notification.id for each in kept} == {
            notification.id for user, notification in sends if user == "slow"
        }

    def test_none_is_expected_to_confirm_where_all_are_away(self) -> None:
        world = World()
        notification = a_notification(ttl=0)
        (receipt,) = world.dispatcher.dispatch_each(
            "default", [("u1", notification)], source="http"
        )
        assert receipt == Receipt(notification.id, Outcome.NOBODY)
        assert states(world, notification.id) == {}

    def test_what_is_over_its_ttl_is_not_sent(self) -> None:
        world = World()
        client = world.connect("u1")
        late = a_notification(ttl=1)
        world.clock.now = late.occurred_at + 1
        (receipt,) = world.dispatcher.dispatch_each("default", [("u1", late)], source="http")
        assert receipt == Receipt(late.id, Outcome.EXPIRED)
        assert client.read_notifications() == []
