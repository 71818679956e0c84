from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from notifyd.connections.connection import MAX_LEFT_OUT, State, Transport
from notifyd.connections.outbox import Bounds
from notifyd.connections.replay import READERS, _Readers
from notifyd.notification import Audience, Notification, Target
from notifyd.queue.base import Page, entry_bytes
from tests.unit.connected import Connected, RecordingSink, World, a_notification


def queue(world: World, count: int, user_id: str = "u1") -> list[str]:
    return [world.send(user_id).notification_id for _ in range(count)]


def a_world(**options: object) -> World:
    """Pages of two entries, so that most replays take several."""
    return World(page_bytes=2 * entry_bytes(a_notification()), **options)  # type: ignore[arg-type]  # passed on


PAGE_BYTES = 4096


def long_texts() -> Notification:
    return a_notification(source="s" * 512, correlation_id="c" * 512)


class TestStart:
    def test_one_page_is_written_without_a_task(self) -> None:
        world = World()
        ids = queue(world, 3)
        client = world.connect()
        messages = client.read()
        assert [each["type"] for each in messages] == [
            "connected",
            *["notification"] * 3,
            "caught_up",
        ]
        assert [each["id"] for each in messages[1:4]] == ids
        assert all(each["metadata"]["replayed"] is True for each in messages[1:4])
        assert messages[-1] == {"type": "caught_up", "replayed": 3}
        assert world.tasks == []
        assert world.metrics.queue_replayed_total.value == 3

    def test_who_got_many_is_asked_behind_them(self) -> None:
        """And not at the tick, with all others who returned."""
        world = World()
        queue(world, 20)
        client = world.connect()
        assert client.connection.asked is not None
        assert len(client.connection.asked[1]) == 20
        few = queue(world, 3, "u2")
        other = world.connect("u2")
        assert other.held() == few
        assert other.connection.asked is None
        assert world.connect("u3").connection.asked is None

    async def test_who_got_many_in_pages_is_asked_behind_the_last(self) -> None:
        world = a_world()
        ids = queue(world, 21)
        client = world.connect()
        await world.tasks_done()
        assert client.connection.asked is not None
        assert client.connection.asked[1] == tuple(ids)

    def test_a_stream_gets_the_same(self) -> None:
        world = World()
        ids = queue(world, 2)
        stream = world.connect(transport="sse")
        messages = stream.read()
        assert [each["type"] for each in messages] == [
            "retry",
            "connected",
            "notification",
            "notification",
            "caught_up",
        ]
        assert [each["id"] for each in messages[2:4]] == ids

    def test_with_nothing_to_replay_nothing_is_said(self) -> None:
        world = World()
        assert world.connect().read_types() == ["connected"]
        assert World(queue=False).connect().read_types() == ["connected"]

    async def test_several_pages_are_one_replay(self) -> None:
        world = a_world()
        ids = queue(world, 7)
        client = world.connect()
        await world.tasks_done()
        messages = client.read()
        assert [each["id"] for each in messages if each["type"] == "notification"] == ids
        assert messages[-1] == {"type": "caught_up", "replayed": 7}
        assert world.replayer._again == {}

    @pytest.mark.parametrize("transport", ["websocket", "sse"])
    async def test_a_page_is_bounded_by_what_is_written(self, transport: Transport) -> None:
        world = World(page_bytes=PAGE_BYTES, loop=asyncio.get_running_loop())
        ids = [world.send("u1", long_texts()).notification_id for _ in range(12)]
        client = world.connect(transport=transport)
        await asyncio.wait_for(asyncio.gather(*world.tasks), 5)
        await client.connection.outbox.drained()
        assert client.sink.notifications() == ids
        assert max(map(len, client.sink.writes)) < 2 * PAGE_BYTES
        assert client.sink.messages()[-1]["replayed"] == 12

    async def test_what_is_live_meanwhile_comes_behind_it(self) -> None:
        world = a_world()
        ids = queue(world, 5)
        client = world.connect(channels=[], identity=None)
        client.say("Subscribe", channels=["orders"])
        live = world.send("u1").notification_id
        on_channel = world.send(Target("channel", ("orders",))).notification_id
        client.say("Ping")
        await world.tasks_done()
        later = world.send("u1").notification_id
        messages = client.read()
        types = [each["type"] for each in messages if each["type"] != "notification"]
        assert types == ["connected", "pong", "caught_up", "subscribed"]
        assert [each.get("id") for each in messages if each["type"] == "notification"] == [
            *ids,
            live,
            on_channel,
            later,
        ]
        marked = [each["metadata"].get("replayed") for each in messages if "metadata" in each]
        assert marked == [True] * 5 + [None] * 3

    async def test_a_page_waits_until_the_one_before_is_taken(self) -> None:
        world = a_world(loop=asyncio.get_running_loop())
        ids = queue(world, 6)
        sink = RecordingSink(pauses_after=1)
        client = world.connect(sink=sink)
        client.connection.outbox.pause()
        for _ in range(20):
            await asyncio.sleep(0)
        assert client.held() == ids[:2]
        assert sink.notifications() == []
        while client.held() != ids:
            sink.pauses_after = 1
            client.connection.outbox.resume()
            for _ in range(5):
                await asyncio.sleep(0)
        client.connection.outbox.resume()
        await asyncio.wait_for(asyncio.gather(*world.tasks), 5)
        sink.pauses_after = None
        client.connection.outbox.resume()
        await client.connection.outbox.drained()
        assert sink.notifications() == ids
        assert sink.types()[-1] == "caught_up"

    async def test_one_that_leaves_in_the_middle_ends_it(self) -> None:
        world = a_world(loop=asyncio.get_running_loop())
        ids = queue(world, 6)
        client = world.connect()
        client.connection.outbox.pause()
        await asyncio.sleep(0)
        client.lose()
        await asyncio.wait_for(asyncio.gather(*world.tasks), 5)
        assert world.replayer._again == {}
        again = world.connect()
        await asyncio.wait_for(asyncio.gather(*world.tasks), 5)
        await again.connection.outbox.drained()
        assert again.sink.notifications() == ids

    def test_what_its_audience_keeps_from_it_stays_for_others(self) -> None:
        world = World()
        admins = Audience("Roles", frozenset({"admin"}))
        for_admins = a_notification(audience=admins)
        for_all = a_notification()
        for each in (for_admins, for_all):
            world.send("u1", each)
        assert world.connect().read_notifications() == [for_all.id]
        assert world.connect(roles=("admin",)).read_notifications() == [for_admins.id, for_all.id]

    def test_what_a_full_queue_gave_up_is_told_before_it(self) -> None:
        world = World(max_size_per_user=2)
        queue(world, 5)
        messages = world.connect().read()
        assert messages[1] == {
            "type": "gap",
            "stream": "user:u1",
            "from": 1,
            "to": 3,
            "reason": "queue_overflow",
        }
        assert [each["type"] for each in messages[2:]] == ["notification"] * 2 + ["caught_up"]

    def test_what_is_over_its_ttl_does_not_come(self) -> None:
        world = World()
        world.send("u1", a_notification(ttl=10))
        kept = world.send("u1").notification_id
        world.clock.now += 11
        assert world.connect().read_notifications() == [kept]


class TestWhatOthersHold:
    async def test_a_page_is_bounded_by_what_is_written(self) -> None:
        world = World(page_bytes=PAGE_BYTES, loop=asyncio.get_running_loop())
        world.connect()
        ids = [world.send("u1", long_texts()).notification_id for _ in range(12)]
        client = world.connect()
        await asyncio.wait_for(asyncio.gather(*world.tasks), 5)
        await client.connection.outbox.drained()
        assert client.sink.notifications() == ids
        assert max(map(len, client.sink.writes)) < 2 * PAGE_BYTES

    def test_a_half_open_connection_withholds_nothing(self) -> None:
        world = World()
        half_open = world.connect()
        ids = queue(world, 3)
        client = world.connect()
        messages = client.read()
        assert [each["id"] for each in messages if each["type"] == "notification"] == ids
        assert all(each["metadata"]["replayed"] for each in messages if "metadata" in each)
        assert messages[-1] == {"type": "caught_up", "replayed": 3}
        assert half_open.held() == client.held() == ids
        assert world.confirmations.held == 3
        client.say("Ack", notification_ids=ids)
        half_open.lose()
        assert world.connect().read_notifications() == []

    def test_held_by_several_it_comes_once_and_in_order(self) -> None:
        world = World()
        first = world.connect()
        one = world.send("u1").notification_id
        second = world.connect()
        world.clock.now += 1
        two = world.send("u1", exclude_connection=second.id).notification_id
        world.clock.now += 1
        three = world.send("u1", exclude_connection=first.id).notification_id
        assert world.connect().read_notifications() == [one, two, three]

    def test_the_log_comes_first(self) -> None:
        world = World(max_pending=2)
        world.connect()
        ids = queue(world, 4)
        client = world.connect()
        assert client.read_notifications() == ids

    async def test_more_than_a_page_is_written_page_by_page_and_counted_whole(self) -> None:
        world = a_world()
        world.connect()
        ids = queue(world, 7)
        client = world.connect()
        assert client.held() == ids[:2]
        await world.tasks_done()
        messages = client.read()
        assert [each["id"] for each in messages if each["type"] == "notification"] == ids
        assert messages[-1] == {"type": "caught_up", "replayed": 7}

    async def test_what_comes_live_meanwhile_comes_once(self) -> None:
        world = a_world()
        world.connect()
        ids = queue(world, 5)
        client = world.connect()
        live = world.send("u1").notification_id
        await world.tasks_done()
        assert client.read_notifications() == [*ids, live]

    def test_not_what_its_audience_keeps_from_it(self) -> None:
        world = World()
        world.connect(roles=("admin",))
        world.send("u1", a_notification(audience=Audience("Roles", frozenset({"admin"}))))
        assert world.connect().read_types() == ["connected"]

    def test_without_a_queue_too(self) -> None:
        world = World(queue=False)
        world.connect()
        ids = queue(world, 2)
        assert world.connect().read_notifications() == ids


class TestAgain:
    """What returns to the log of a user who is connected elsewhere."""

    @staticmethod
    def returned(world: World, dying: Connected, staying: Connected) -> Notification:
        """Something that only `dying` has: `staying` was not admitted then, and is now."""
        notification = a_notification(audience=Audience("Roles", frozenset({"admin"})))
        with_role = msgspec.structs.replace(dying.connection.identity, roles=("admin",))
        dying.connection.identity = with_role
        world.send("u1", notification)
        staying.connection.identity = with_role
        return notification

    async def test_does_not_go_to_who_was_left_out(self) -> None:
        world = World()
        dying, sender = world.connect(), world.connect()
        sender.read()
        notification = a_notification()
        world.send("u1", notification, exclude_connection=sender.id)
        dying.lose()
        await world.tasks_done()
        assert sender.read() == []
        assert world.connect().read_notifications() == [notification.id]

    def test_of_what_one_was_left_out_of_the_latest_are_known(self) -> None:
        world = World()
        world.connect()
        sender = world.connect()
        ids = [
            world.send("u1", exclude_connection=sender.id).notification_id
            for _ in range(MAX_LEFT_OUT + 10)
        ]
        assert list(sender.connection.left_out or ()) == ids[10:]

    async def test_is_replayed_to_him_marked_and_without_caught_up(self) -> None:
        world = World()
        dying, staying = world.connect(), world.connect()
        staying.read()
        notification = self.returned(world, dying, staying)
        dying.lose()
        await world.tasks_done()
        messages = staying.read()
        assert [(each["type"], each["id"]) for each in messages] == [
            ("notification", notification.id)
        ]
        assert messages[0]["metadata"]["replayed"] is True
        assert staying.held() == [notification.id]
        assert world.replayer._again == {}

    async def test_several_times_at_once_is_once_more(self) -> None:
        world = World()
        staying = world.connect()
        dying = [world.connect() for _ in range(3)]
        staying.read()
        ids = []
        for each in dying:
            notification = a_notification()
            ids.append(notification.id)
            world.confirmations.hold(notification, (each.connection,))
        for each in dying:
            each.lose()
        await world.tasks_done()
        assert staying.read_notifications() == ids
        # One for the first, in which the others came along; the rest were for those who left.
        assert world.replayer._again == {}

    async def test_what_returns_during_a_replay_follows_it(self) -> None:
        world = a_world()
        ids = queue(world, 5)
        dying = world.connect(acks=True)
        await world.tasks_done()
        extra = a_notification()
        world.confirmations.hold(extra, (dying.connection,))
        staying = world.connect()
        assert len(staying.held()) < 5
        dying.lose()
        await world.tasks_done()
        assert sorted(staying.read_notifications()) == sorted([*ids, extra.id])
        assert world.replayer._again == {}

    async def test_a_page_that_is_too_much_closes_and_leaves_it_in_the_log(self) -> None:
        world = World(bounds=Bounds(max_bytes=1500, max_messages=1000, total_bytes=1 << 30))
        client = world.connect()
        client.read()
        notification = a_notification()
        world.logs.enqueue("default", ["u1"], notification)
        logs = world.logs

        class Slow:
            async def read(self, *args: Any, **options: Any) -> Page:
                client.connection.outbox.pause()
                assert client.connection.outbox.put(b"x" * 1500)
                page: Page = logs.read(*args, **options)
                return page

        world.replayer._logs = Slow()  # type: ignore[assignment]  # only read is called
        world.replayer.again(client.connection)
        await world.tasks_done()
        world.replayer._logs = logs
        assert client.connection.state is State.CLOSED
        assert client.connection.unconfirmed is None
        assert world.connect().read_notifications() == [notification.id]

    async def test_one_that_ended_gets_nothing(self) -> None:
        world = World()
        client = world.connect()
        client.lose()
        world.replayer.again(client.connection)
        assert world.tasks == []

    async def test_without_a_queue_nothing_returns(self) -> None:
        world = World(queue=False)
        client = world.connect()
        world.replayer.again(client.connection)
        assert world.tasks == []

    async def test_cut_short_by_the_end_of_its_connection(self) -> None:
        world = a_world(loop=asyncio.get_running_loop())
        staying = world.connect()
        queue(world, 0)
        for _ in range(5):
            world.logs.enqueue("default", ["u1"], a_notification())
        staying.connection.outbox.pause()
        world.replayer.again(staying.connection)
        await asyncio.sleep(0)
        world.replayer.again(staying.connection)
        staying.lose()
        await asyncio.wait_for(asyncio.gather(*world.tasks), 5)
        assert world.replayer._again == {}


class TestReaders:
    @pytest.mark.parametrize("patient", [False, True])
    async def test_one_that_is_cancelled_when_its_turn_has_come_lets_the_next_one(
        self, patient: bool
    ) -> None:
        readers = _Readers()
        assert all(readers.enter_at_once() for _ in range(READERS))
        waiting = asyncio.ensure_future(readers.enter(patient=patient))
        await asyncio.sleep(0)
        readers.leave(answered=True)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert readers.enter_at_once()


class TestFailing:
    async def test_a_store_that_fails_leaves_no_trace(self) -> None:
        world = World()
        client = world.connect()

        class Away:
            async def read(self, *args: object, **options: object) -> object:
                raise ConnectionError("away")

        world.replayer._logs = Away()  # type: ignore[assignment]  # only read is called
        world.replayer.again(client.connection)
        with pytest.raises(ConnectionError):
            await world.tasks[0]
        assert world.replayer._again == {}
