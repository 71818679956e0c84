from __future__ import annotations

import gc
import weakref

import pytest

from notifyd.connections.connection import MAX_LEFT_TO_LOG, TAKERS_PER_HOLDER, HeldTogether
from notifyd.connections.lifecycle import TOO_SLOW
from notifyd.connections.outbox import Bounds
from notifyd.dispatch.confirmation import ASK_AT, KEPT_SETTLED
from notifyd.identifiers import new_uuid
from notifyd.notification import Outcome, Priority, Target
from notifyd.queue.base import Page
from tests.unit.connected import Connected, RecordingSink, RecordingStream, World, a_notification

EVERYBODY = Target("broadcast")
THREE = Target("users", ("ann", "bob", "eve"))


def pending(world: World, user_id: str = "u1") -> list[str]:
    """What the user's log has."""
    page = world.logs.read("default", user_id)
    assert isinstance(page, Page)
    return [entry.notification.id for entry in page.entries]


def state(world: World, id: str, user_id: str = "u1") -> str | None:
    """What the ledger says of one recipient."""
    report = world.ledger.report("default", id)
    return next((each.state for each in report.recipients if each.user_id == user_id), None)


def asked(connected: Connected) -> list[bytes]:
    """The Pings with a counter that were written so far."""
    connected.world.flush()
    return [payload for payload in connected.sink.pinged() if payload]


class TestHolding:
    def test_what_is_delivered_is_held_until_it_is_acked(self) -> None:
        world = World()
        client = world.connect(acks=True)
        id = world.send("u1").notification_id
        assert client.held() == [id]
        assert world.confirmations.held == 1
        (answer,) = client.ask("Ack", notification_id=id)
        assert answer == {"type": "acked", "notification_id": id}
        assert (client.held(), world.confirmations.held) == ([], 0)
        assert state(world, id) == "confirmed"
        client.lose()
        assert pending(world) == []

    def test_any_device_settles_it_for_all(self) -> None:
        world = World()
        devices = [world.connect(acks=True) for _ in range(3)]
        id = world.send("u1").notification_id
        devices[1].say("Ack", notification_id=id)
        assert [device.held() for device in devices] == [[], [], []]
        for device in devices:
            device.lose()
        assert pending(world) == []
        assert world.confirmations.held == 0

    @pytest.mark.parametrize("acking", [0, 1])
    def test_it_is_settled_in_the_log_where_only_one_device_got_it_from_there(
        self, acking: int
    ) -> None:
        world = World()
        devices = [world.connect(acks=True)]
        notification = a_notification()
        world.send("u1", notification)
        # As by another node, which was sent the same.
        world.logs.enqueue("default", ("u1",), notification)
        devices.append(world.connect(acks=True))
        assert [device.held() for device in devices] == [[notification.id]] * 2
        devices[acking].say("Ack", notification_id=notification.id)
        assert pending(world) == []

    def test_it_goes_to_the_log_with_the_last_that_held_it_in_order(self) -> None:
        world = World()
        first, second = world.connect(), world.connect()
        ids = [world.send("u1").notification_id for _ in range(5)]
        first.lose()
        assert pending(world) == []
        assert world.confirmations.held == 5
        second.lose()
        assert pending(world) == ids
        assert world.confirmations.held == 0
        assert {state(world, id) for id in ids} == {"queued"}

    def test_another_users_ack_settles_nothing(self) -> None:
        world = World()
        client, stranger = world.connect(), world.connect("u2")
        id = world.send("u1").notification_id
        (answer,) = stranger.ask("Ack", notification_id=id)
        assert (answer["type"], answer["code"]) == ("error", "INVALID_ACK")
        assert client.held() == [id]

    def test_the_same_user_id_in_another_tenant_settles_nothing(self) -> None:
        world = World()
        client, stranger = world.connect(), world.connect(tenant="acme")
        id = world.send("u1").notification_id
        stranger.say("Ack", notification_id=id)
        assert client.held() == [id]

    def test_what_is_over_its_ttl_when_it_would_return_is_lost_and_told(self) -> None:
        world = World()
        client = world.connect()
        late = a_notification(ttl=10)
        only_now = a_notification(ttl=0)
        kept = a_notification(ttl=1000)
        for each in (late, only_now, kept):
            world.send("u1", each)
        world.clock.now += 20
        client.lose()
        assert pending(world) == [kept.id]
        assert world.lost == [late, only_now]
        assert world.confirmations.held == 0

    def test_what_a_full_log_refuses_when_it_returns_is_told_and_not_called_queued(self) -> None:
        world = World(max_size_per_user=1)
        client = world.connect()

        low = a_notification(priority=Priority.LOW)
        critical = a_notification(priority=Priority.CRITICAL)
        world.send("u1", critical)
        world.send("u1", low)
        client.lose()
        assert pending(world) == [critical.id]
        assert world.lost == [low]
        assert state(world, low.id) == "pending"

    def test_without_a_queue_it_is_lost_and_told(self) -> None:
        world = World(queue=False)
        client = world.connect()
        id = world.send("u1").notification_id
        client.lose()
        assert [each.id for each in world.lost] == [id]

    def test_without_a_ledger_what_is_held_can_be_acked(self) -> None:
        world = World(ledger=False)
        client = world.connect()
        id = world.send("u1").notification_id
        assert client.ask("Ack", notification_id=id) == [{"type": "acked", "notification_id": id}]
        (error,) = client.ask("Ack", notification_id=id)
        assert error["code"] == "INVALID_ACK"
        queued = world.send("u2")
        assert queued.outcome is Outcome.QUEUED

    def test_the_same_id_again_is_held_once(self) -> None:
        world = World()
        client = world.connect()
        twice = a_notification()
        world.send("u1", twice)
        late = world.connect()
        world.send("u1", twice)
        assert world.confirmations.held == 1
        assert late.held() == client.held() == [twice.id]
        client.lose()
        late.lose()
        assert pending(world) == [twice.id]
        assert world.confirmations.held == 0


class TestMaxPending:
    def test_the_oldest_held_move_to_the_log(self) -> None:
        world = World(max_pending=3)
        client = world.connect(acks=True)
        ids = [world.send("u1").notification_id for _ in range(5)]
        assert client.held() == ids[2:]
        assert pending(world) == ids[:2]
        assert world.confirmations.held == 3

    def test_over_all_users(self) -> None:
        world = World(max_pending=2)
        ann, bob = world.connect("ann"), world.connect("bob")
        first = world.send("ann").notification_id
        second = world.send("bob").notification_id
        third = world.send("bob").notification_id
        assert (ann.held(), bob.held()) == ([], [second, third])
        assert pending(world, "ann") == [first]

    def test_what_moved_is_acked_from_the_log(self) -> None:
        world = World(max_pending=1)
        client = world.connect(acks=True)
        first = world.send("u1").notification_id
        world.send("u1")
        assert client.ask("Ack", notification_id=first)[-1]["type"] == "acked"
        assert pending(world) == []

    def test_what_was_settled_does_not_count(self) -> None:
        world = World(max_pending=2)
        client = world.connect(acks=True)
        for _ in range(10):
            client.say("Ack", notification_id=world.send("u1").notification_id)
        ids = [world.send("u1").notification_id for _ in range(2)]
        assert client.held() == ids
        assert pending(world) == []

    def test_what_was_settled_is_not_kept_in_memory(self) -> None:
        world = World(
            max_pending=100_000,
            bounds=Bounds(max_bytes=1 << 30, max_messages=1 << 20, total_bytes=1 << 30),
        )
        client = world.connect(acks=True)
        ids = [world.send("u1").notification_id for _ in range(2000)]
        for start in range(0, len(ids), 100):
            client.say("Ack", notification_ids=ids[start : start + 100])
        assert world.confirmations.held == 0
        assert len(world.confirmations._oldest_first) <= KEPT_SETTLED

    async def test_what_moved_does_not_come_again_on_the_same_connection(self) -> None:
        world = World(max_pending=2)
        client = world.connect(acks=True)
        ids = [world.send("u1").notification_id for _ in range(4)]
        assert client.read_notifications() == ids
        world.replayer.again(client.connection)
        await world.tasks_done()
        assert client.read_notifications() == []
        client.lose()
        assert world.connect().read_notifications() == ids

    def test_what_moved_is_settled_by_the_pong_to_the_ping_behind_it(self) -> None:
        world = World(max_pending=2)
        client = world.connect()
        ids = [world.send("u1").notification_id for _ in range(2)]
        world.confirmations.ask_waiting()
        later = world.send("u1").notification_id
        world.flush()
        assert pending(world) == ids[:1]
        client.pong_last()
        assert (pending(world), client.held()) == ([], [later])

    def test_of_what_the_log_has_no_more_is_held(self) -> None:
        world = World(max_pending=3, store_first=True)
        client = world.connect(acks=True)
        ids = [world.send("u1").notification_id for _ in range(20)]
        assert client.read_notifications() == ids
        assert client.held() == ids[-3:]
        assert pending(world) == ids
        client.say("Ack", notification_ids=ids)
        assert (pending(world), client.held()) == ([], [])
        assert world.confirmations._stored == 0
        assert not world.confirmations._stored_first

    def test_of_what_left_for_the_log_the_latest_are_known(self) -> None:
        world = World(max_pending=1, max_size_per_user=2000)
        client = world.connect(acks=True)
        ids = [world.send("u1").notification_id for _ in range(MAX_LEFT_TO_LOG + 10)]
        assert list(client.connection.left_to_log or ()) == ids[9:-1]

    def test_nothing_keeps_a_connection_after_its_end(self) -> None:
        world = World()
        client = world.connect()
        for _ in range(ASK_AT + 1):
            world.send("u1")
        client.pong_last()
        world.send("u1")
        client.lose()
        world.flush()
        world.manual.advance(200)
        gone = weakref.ref(client.sink)
        del client
        gc.collect()
        assert gone() is None


class TestAsking:
    def test_a_pong_confirms_what_was_written_before_its_ping_and_no_more(self) -> None:
        world = World()
        client = world.connect()
        before = world.send("u1").notification_id
        world.confirmations.ask_waiting()
        after = world.send("u1").notification_id
        client.pong_last()
        assert client.held() == [after]
        assert state(world, before) == "confirmed"
        assert state(world, after) == "pending"
        report = world.ledger.report("default", before)
        assert [each.by for each in report.recipients] == ["transport"]

    def test_what_was_not_confirmed_is_asked_for_again(self) -> None:
        world = World()
        client = world.connect()
        world.send("u1")
        world.confirmations.ask_waiting()
        world.send("u1")
        client.pong_last()
        world.confirmations.ask_waiting()
        client.pong_last()
        assert client.held() == []
        assert len(asked(client)) == 2
        world.confirmations.ask_waiting()
        assert len(asked(client)) == 2

    def test_the_ping_stands_behind_what_it_asks_for(self) -> None:
        world = World()
        client = world.connect()
        client.read()
        world.send("u1")
        world.confirmations.ask_waiting()
        world.flush()
        assert client.sink.data.endswith(b"\x89\x04" + asked(client)[-1])
        assert client.sink.notifications() != []

    def test_one_ping_is_out_at_a_time_and_each_has_its_counter(self) -> None:
        world = World()
        one, two = world.connect("u1"), world.connect("u2")
        world.send("u1")
        world.confirmations.ask_waiting()
        world.send("u2")
        for _ in range(3):
            world.confirmations.ask_waiting()
        assert len(asked(one)) == len(asked(two)) == 1
        assert asked(one) != asked(two)
        world.lifecycle.pong(one.connection, asked(two)[0])
        assert len(one.held()) == 1

    def test_other_pongs_confirm_nothing(self) -> None:
        world = World()
        client = world.connect()
        world.send("u1")
        world.lifecycle.pong(client.connection, b"")
        world.confirmations.ask_waiting()
        world.lifecycle.pong(client.connection, b"")
        world.lifecycle.pong(client.connection, b"\xff\xff\xff\xff")
        assert len(client.held()) == 1

    def test_many_unconfirmed_are_asked_about_at_once(self) -> None:
        world = World()
        client = world.connect()
        for _ in range(ASK_AT - 1):
            world.send("u1")
        assert asked(client) == []
        world.send("u1")
        assert len(asked(client)) == 1
        client.pong_last()
        assert client.held() == []

    def test_a_client_that_acks_is_not_asked(self) -> None:
        world = World()
        client = world.connect(acks=True)
        for _ in range(ASK_AT + 1):
            world.send("u1")
        world.confirmations.ask_waiting()
        assert asked(client) == []

    def test_one_that_begins_to_ack_is_not_confirmed_by_a_pong_any_more(self) -> None:
        world = World()
        client = world.connect()
        first = world.send("u1").notification_id
        second = world.send("u1").notification_id
        world.confirmations.ask_waiting()
        client.say("Ack", notification_id=first)
        client.pong_last()
        assert client.held() == [second]

    def test_behind_a_replay_nothing_is_asked(self) -> None:
        world = World()
        client = world.connect()
        client.connection.outbox.hold_back()
        for _ in range(ASK_AT + 1):
            world.send("u1")
        world.confirmations.ask_waiting()
        assert asked(client) == []
        client.connection.outbox.let_go()
        world.confirmations.ask_waiting()
        client.pong_last()
        assert client.held() == []

    def test_what_another_device_settled_needs_no_ping(self) -> None:
        world = World()
        client, other = world.connect(), world.connect(acks=True)
        id = world.send("u1").notification_id
        other.say("Ack", notification_id=id)
        world.confirmations.ask_waiting()
        assert asked(client) == []

    def test_one_that_ended_is_not_asked_and_not_kept(self) -> None:
        world = World()
        client = world.connect()
        world.send("u1")
        world.confirmations.ask_waiting()
        world.send("u1")
        client.lose()
        world.confirmations.ask_waiting()
        assert world.confirmations._to_ask == {}
        world.lifecycle.pong(client.connection, b"\0\0\0\1")

    def test_a_ping_that_is_too_much_closes_and_hands_back(self) -> None:
        world = World(
            max_size_per_user=ASK_AT,
            bounds=Bounds(max_bytes=1 << 20, max_messages=ASK_AT, total_bytes=1 << 30),
        )
        client = world.connect()
        other = world.connect("u2")
        client.read()
        client.connection.outbox.pause()
        ids = [world.send("u1").notification_id for _ in range(ASK_AT)]
        assert client.sink.closed == (TOO_SLOW, "too slow")
        assert pending(world) == ids
        assert world.confirmations.held == 0
        assert other.held() == []
        world.confirmations.ask_waiting()
        assert world.confirmations._to_ask == {}


class TestOutliving:
    """Where there are no Pings: SSE, and WebSockets behind an ASGI server."""

    def test_what_was_written_and_outlived_is_confirmed(self) -> None:
        world = World(idle_timeout=100)
        client = world.connect(transport="sse")
        first = world.send("u1").notification_id
        world.clock.now += 60
        second = world.send("u1").notification_id
        world.clock.now += 39
        world.confirmations.confirm_outlived(client.connection, world.clock())
        assert client.held() == [first, second]
        world.clock.now += 1
        world.confirmations.confirm_outlived(client.connection, world.clock())
        assert client.held() == [second]
        assert state(world, first) == "confirmed"
        assert asked(client) == []

    def test_not_by_one_that_acks_or_does_not_take(self) -> None:
        world = World(idle_timeout=100)
        acking = world.connect("u1", transport="sse", acks=True)
        paused = world.connect("u2", sink=RecordingStream())
        replaying = world.connect("u3", transport="sse")
        for user_id in ("u1", "u2", "u3"):
            world.send(user_id)
        paused.connection.outbox.pause()
        replaying.connection.outbox.hold_back()
        world.clock.now += 1000
        for each in (acking, paused, replaying):
            world.confirmations.confirm_outlived(each.connection, world.clock())
            assert len(each.held()) == 1
        paused.connection.outbox.resume()
        world.confirmations.confirm_outlived(paused.connection, world.clock())
        assert paused.held() == []

    def test_a_new_stream_has_not_outlived_what_an_old_connection_shared_with_it(self) -> None:
        world = World(idle_timeout=100)
        half_open = world.connect(acks=True)
        id = world.send("u1").notification_id
        world.clock.now += 99
        stream = world.connect(transport="sse")
        world.clock.now += 30
        world.confirmations.confirm_outlived(stream.connection, world.clock())
        assert stream.held() == half_open.held() == [id]
        world.clock.now += 70
        world.confirmations.confirm_outlived(stream.connection, world.clock())
        assert stream.held() == half_open.held() == []


class TestFromTheLog:
    def test_what_was_replayed_stays_in_the_log_until_it_is_confirmed(self) -> None:
        world = World()
        id = world.send("u1").notification_id
        client = world.connect()
        assert client.read_notifications() == [id]
        assert pending(world) == [id]
        assert world.confirmations.held == 0
        client.lose()
        assert pending(world) == [id]
        again = world.connect()
        world.confirmations.ask_waiting()
        again.pong_last()
        assert pending(world) == []
        assert state(world, id) == "confirmed"

    def test_each_of_two_devices_may_have_it_and_one_confirmation_settles_it(self) -> None:
        world = World()
        id = world.send("u1").notification_id
        one, two = world.connect(acks=True), world.connect(acks=True)
        assert one.read_notifications() == two.read_notifications() == [id]
        one.say("Ack", notification_id=id)
        assert (one.held(), two.held(), pending(world)) == ([], [], [])
        world.send("u1")
        one.lose()
        two.lose()
        assert len(pending(world)) == 1

    def test_a_second_ack_is_acked_again(self) -> None:
        world = World()
        id = world.send("u1").notification_id
        client = world.connect()
        for _ in range(2):
            assert client.ask("Ack", notification_id=id)[-1] == {
                "type": "acked",
                "notification_id": id,
            }
        assert len(world.acked) == 1


class TestAcknowledging:
    def test_a_list_names_what_was_refused(self) -> None:
        world = World()
        client = world.connect()
        id, unknown = world.send("u1").notification_id, new_uuid()
        (answer,) = client.ask("Ack", notification_ids=[id, unknown, "nonsense"])
        assert answer == {
            "type": "acked",
            "notification_id": id,
            "notification_ids": [id],
            "refused": [unknown, "nonsense"],
        }

    def test_of_a_broadcast_anybody_of_its_tenant(self) -> None:
        world = World()
        client, other = world.connect("u1"), world.connect("u2")
        foreign = world.connect("u1", tenant="acme")
        id = world.send(EVERYBODY).notification_id
        for each in (client, other):
            assert each.ask("Ack", notification_id=id)[-1]["type"] == "acked"
        assert foreign.ask("Ack", notification_id=id)[-1]["type"] == "error"
        report = world.ledger.report("default", id)
        assert (report.acks, list(report.recipients)) == (2, [])

    def test_of_a_broadcast_that_requires_it_its_recipients(self) -> None:
        world = World()
        client = world.connect("u1")
        id = world.send(EVERYBODY, require_ack=True).notification_id
        late = world.connect("u2")
        assert late.ask("Ack", notification_id=id)[-1]["type"] == "error"
        assert client.ask("Ack", notification_id=id)[-1]["type"] == "acked"
        assert state(world, id) == "confirmed"

    def test_after_the_ledgers_timeout_it_still_settles(self) -> None:
        world = World()
        client = world.connect(acks=True)
        id = world.send("u1").notification_id
        world.clock.now += 10_000
        assert client.ask("Ack", notification_id=id)[-1]["type"] == "acked"
        client.lose()
        assert pending(world) == []


class TestUnderPressure:
    """Closing one connection while another takes something."""

    @staticmethod
    def tight() -> World:
        return World(bounds=Bounds(max_bytes=1 << 20, max_messages=1000, total_bytes=20_000))

    def test_one_that_took_it_and_is_given_up_for_the_next_does_not_hold_it(self) -> None:
        world = self.tight()
        first, second = world.connect(acks=True), world.connect(acks=True)
        world.flush()
        first.connection.outbox.pause()
        first.connection.outbox.put(b"x" * 19_600)
        receipt = world.send("u1")
        assert first.sink.closed is not None
        assert receipt.delivered_to == 1
        assert first.connection.unconfirmed is None
        second.lose()
        assert pending(world) == [receipt.notification_id]
        assert world.confirmations.held == 0

    async def test_what_returns_while_it_is_shared_is_in_the_log_and_settled_once(self) -> None:
        world = self.tight()
        old = world.connect(acks=True)
        world.flush()
        old.connection.outbox.pause()
        ids = [world.send("u1", payload=b'"%s"' % (b"x" * 8000)).notification_id for _ in range(2)]
        new = world.connect(acks=True, sink=RecordingSink())
        assert old.sink.closed is not None
        assert pending(world) == ids
        await world.tasks_done()
        assert new.read_notifications() == ids
        assert new.held() == ids
        assert world.confirmations.held == 0
        new.say("Ack", notification_ids=ids)
        assert (pending(world), new.held(), world.confirmations.held) == ([], [], 0)


class TestManyAtOnce:
    """One notification to several users, of each of whom one device took it."""

    def test_each_confirms_for_himself(self) -> None:
        world = World()
        clients = [world.connect(name) for name in ("ann", "bob", "eve")]
        id = world.send(THREE).notification_id
        assert [each.held() for each in clients] == [[id]] * 3
        world.confirmations.ask_waiting()
        clients[0].pong_last()
        assert [each.held() for each in clients] == [[], [id], [id]]
        assert world.confirmations.held == 2
        assert [state(world, id, name) for name in ("ann", "bob", "eve")] == [
            "confirmed",
            "pending",
            "pending",
        ]
        assert clients[1].ask("Ack", notification_id=id)[0]["type"] == "acked"
        clients[2].lose()
        assert pending(world, "eve") == [id]
        assert (pending(world, "ann"), pending(world, "bob")) == ([], [])
        assert world.confirmations.held == 0
        assert world.ledger.stats().pending == 0

    def test_the_same_id_again_is_held_once(self) -> None:
        world = World()
        clients = [world.connect(name) for name in ("ann", "bob", "eve")]
        clients[0].connection.acks = True
        notification = a_notification()
        world.send("ann", notification)
        for _ in range(2):
            world.send(THREE, notification)
        assert world.confirmations.held == 3
        clients[0].say("Ack", notification_id=notification.id)
        world.confirmations.ask_waiting()
        for each in clients[1:]:
            each.pong_last()
        assert [each.held() for each in clients] == [[]] * 3
        assert world.confirmations.held == 0

    def test_beyond_the_bound_so_many_of_them_move_to_their_logs(self) -> None:
        world = World(max_pending=2)
        clients = [world.connect(name) for name in ("ann", "bob", "eve")]
        first = world.send(THREE).notification_id
        assert [each.held() for each in clients] == [[], [first], [first]]
        assert [pending(world, name) for name in ("ann", "bob", "eve")] == [[first], [], []]
        second = world.send("eve").notification_id
        assert [each.held() for each in clients] == [[], [], [first, second]]
        assert world.confirmations.held == 2

    def test_a_second_device_of_one_of_them_shares_it(self) -> None:
        world = World(max_pending=4)
        first, bob = world.connect("ann"), world.connect("bob")
        id = world.send(THREE).notification_id
        assert pending(world, "eve") == [id]
        second = world.connect("ann")
        assert (first.held(), second.held(), bob.held()) == ([id], [id], [id])
        first.lose()
        assert pending(world, "ann") == []
        assert world.confirmations.held == 2
        # The oldest of all is still the one that the second device took over.
        later = [world.send("bob").notification_id for _ in range(4)]
        assert (second.held(), bob.held()) == ([], later)
        assert (pending(world, "ann"), pending(world, "bob")) == ([id], [id])

    def test_one_that_is_given_up_meanwhile_finds_it_in_his_log(self) -> None:
        world = World(bounds=Bounds(max_bytes=1 << 20, max_messages=1000, total_bytes=700))
        ann, bob = world.connect("ann"), world.connect("bob")
        world.flush()
        ann.connection.outbox.pause()
        receipt = world.send(Target("users", ("ann", "bob")), payload=b'"%s"' % (b"x" * 300))
        assert ann.sink.closed == (4008, "too slow")
        assert receipt.results is not None
        assert receipt.results["ann"].outcome is Outcome.QUEUED
        assert receipt.results["bob"].outcome is Outcome.DELIVERED
        assert pending(world, "ann") == [receipt.notification_id]
        assert bob.held() == [receipt.notification_id]
        assert world.confirmations.held == 1
        assert world.metrics.deliveries_total.labels("websocket").value == 1

    def test_one_that_never_confirms_does_not_keep_the_others_in_memory(self) -> None:
        world = World()
        names = [f"user-{number}" for number in range(200)]
        clients = [world.connect(name) for name in names]
        world.send(Target("users", tuple(names)))
        world.confirmations.ask_waiting()
        for each in clients[1:]:
            each.pong_last()
        # Who confirms the same as those before him is counted off at the tick at the latest.
        world.confirmations.ask_waiting()
        (held,) = (clients[0].connection.unconfirmed or {}).values()
        assert isinstance(held, HeldTogether)
        assert held.left == 1
        assert len(held.takers) <= TAKERS_PER_HOLDER
        assert clients[0].connection in held.takers

    def test_who_was_just_asked_is_not_asked_again_at_the_tick(self) -> None:
        world = World()
        clients = [world.connect(name) for name in ("ann", "bob", "eve")]
        for _ in range(ASK_AT):
            world.send(THREE)
        for each in clients:
            each.pong_last()
        id = world.send(THREE).notification_id
        world.confirmations.ask_waiting()
        assert [len(asked(each)) for each in clients] == [1, 1, 1]
        world.confirmations.ask_waiting()
        assert [len(asked(each)) for each in clients] == [2, 2, 2]
        assert [each.held() for each in clients] == [[id]] * 3
