"""Dispatcher, confirmations and replay while their store is slow, fails, hangs, or is back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from notifyd.connections import replay
from notifyd.errors import Unavailable
from notifyd.eventually import Eventually, settled
from notifyd.identifiers import new_uuid
from notifyd.notification import Audience, Notification, Outcome, Target
from notifyd.queue.base import Page
from tests.unit.connected import Connected, World, a_notification


class Store:
    """Stands before memory's logs or ledger: `up` it answers after a turn of the loop, `down` it
    refuses at once, `failing` after a turn, and `hanging` when the test says so."""

    def __init__(self, behind: Any) -> None:
        self.behind = behind
        self.state = "up"
        self.delay = 0.0
        self.go_on = asyncio.Event()
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            if self.state == "down":
                raise Unavailable("The store is away.", retry_after=3)
            # As the stores do: the call is made, awaited or not.
            return asyncio.ensure_future(self._later(getattr(self.behind, name), args, options))

        return call

    async def _later(self, work: Callable[..., Any], args: Any, options: Any) -> Any:
        state = self.state
        if state == "hanging":
            await self.go_on.wait()
        if self.delay:
            await asyncio.sleep(self.delay)
        if state == "failing":
            raise Unavailable("The store does not answer.", retry_after=3)
        return await settled(work(*args, **options))


class Away(World):
    """A world whose logs (and ledger) can be away."""

    def __init__(self, **options: Any) -> None:
        memory = World()
        self.store = Store(memory.logs)
        self.accounts = Store(memory.ledger)
        super().__init__(logs=self.store, ack_ledger=self.accounts, **options)
        self.memory = memory.logs

    def pending(self, user_id: str = "u1") -> list[str]:
        return [each.notification.id for each in self.memory.read("default", user_id).entries]

    async def tasks_done(self) -> None:
        """Also what is not spawned as a task: some turns are enough for all but what hangs."""
        await super().tasks_done()
        for _ in range(20):
            await asyncio.sleep(0)
        await super().tasks_done()

    async def sent(self, *args: Any, **fields: Any) -> Any:
        receipt = await settled(self.dispatch(*args, **fields))
        await self.tasks_done()
        return receipt

    async def online(self, user_id: str = "u1", **options: Any) -> Connected:
        """Connected, and replayed to."""
        client = self.connect(user_id, **options)
        await self.tasks_done()
        client.read()
        return client

    async def back(self) -> None:
        """As the application does when the store is back."""
        self.store.state = self.accounts.state = "up"
        await self.writes.retry()
        self.replayer.store_is_back()
        await self.tasks_done()


def users(*names: str) -> Target:
    return Target("users", names)


FAILING = pytest.mark.parametrize("how", ["down", "failing"])


class TestAcks:
    @pytest.mark.parametrize("how", ["down", "failing"])
    async def test_what_could_not_be_settled_does_not_come_again_on_the_same_connection(
        self, how: str
    ) -> None:
        world = Away()
        id = (await world.sent("u1")).notification_id
        client = world.connect(acks=True)
        await world.tasks_done()
        assert client.read_notifications() == [id]
        world.store.state = how
        client.say("Ack", notification_id=id)
        await world.tasks_done()
        assert [each["code"] for each in client.read()] == ["UNAVAILABLE"]
        world.store.state = "up"
        world.replayer.again(client.connection)
        await world.tasks_done()
        assert client.read_notifications() == []
        client.say("Ack", notification_id=id)
        await world.tasks_done()
        assert [each["type"] for each in client.read()] == ["acked"]
        assert world.pending() == []

    @pytest.mark.parametrize("how", ["down", "failing"])
    @pytest.mark.parametrize("sent_here", [True, False])
    async def test_what_neither_store_knows_is_acked_when_it_is_asked_again(
        self, how: str, sent_here: bool
    ) -> None:
        """A device that died held it while both were away; it waits for them, or was sent on."""
        world = Away()
        dying = await world.online(acks=True)
        world.store.state = world.accounts.state = how
        id = (await world.sent("u1")).notification_id
        dying.lose()
        await world.tasks_done()
        client = world.connect(acks=True)
        if sent_here:
            await world.tasks_done()
            assert client.read_notifications() == [id]
        for _ in range(2):
            client.say("Ack", notification_id=id)
            await world.tasks_done()
            assert client.read()[-1]["code"] == "UNAVAILABLE"
        world.store.state = world.accounts.state = "up"
        client.say("Ack", notification_id=id)
        await world.tasks_done()
        assert client.read_types() == ["acked"]
        await world.writes.retry()
        await world.tasks_done()
        assert (world.pending(), client.read()) == ([], [])

    async def test_what_was_settled_before_the_ledger_failed_is_acked_again(self) -> None:
        world = Away()
        id = (await world.sent("u1")).notification_id
        client = world.connect(acks=True)
        # The account of it is lost too.
        world.accounts.behind = World().ledger
        world.accounts.state = "down"
        client.say("Ack", notification_ids=[id, new_uuid()])
        await world.tasks_done()
        assert "UNAVAILABLE" in [each.get("code") for each in client.read()]
        assert world.pending() == []
        world.accounts.state = "up"
        client.say("Ack", notification_id=id)
        await world.tasks_done()
        assert client.read_types() == ["acked"]


class TestOffline:
    """`queue.mode = "offline"`."""

    @FAILING
    async def test_online_delivery_goes_on_untouched(self, how: str) -> None:
        world = Away()
        client = await world.online()
        world.store.state = world.accounts.state = how
        receipt = await world.sent("u1")
        assert (receipt.outcome, receipt.delivered_to) == (Outcome.DELIVERED, 1)
        assert client.read_notifications() == [receipt.notification_id]
        assert len(world.notes_lost) == 1

    @FAILING
    async def test_to_one_who_is_away_it_is_an_error(self, how: str) -> None:
        world = Away()
        world.store.state = how
        with pytest.raises(Unavailable) as caught:
            await world.sent("u1")
        assert caught.value.retry_after == 3

    @FAILING
    async def test_of_several_those_who_are_away_failed(self, how: str) -> None:
        world = Away()
        await world.online("u1")
        world.store.state = how
        receipt = await world.sent(users("u1", "u2", "u3"))
        outcomes = {name: (each.outcome, each.reason) for name, each in receipt.results.items()}
        failed = (Outcome.FAILED, "unavailable")
        assert outcomes == {"u1": (Outcome.DELIVERED, None), "u2": failed, "u3": failed}
        assert (receipt.delivered_to, receipt.failed, receipt.queued) == (1, 2, 0)
        assert world.metrics.delivery_failures_total.labels("unavailable").value == 2

    @pytest.mark.parametrize("store_first", [False, True])
    async def test_each_failure_is_counted_by_its_reason(self, store_first: bool) -> None:
        """A store in parts may have answered for some."""
        world = Away(store_first=store_first)

        class InParts:
            def enqueue(self, *args: Any, **options: Any) -> list[str | None]:
                return ["queue_full", None, "unavailable", "unavailable"]

        world.store.behind = InParts()
        receipt = await world.sent(Target("users", ("u1", "u2", "u3", "u4")))
        assert (receipt.queued, receipt.failed) == (1, 3)
        failures = world.metrics.delivery_failures_total
        assert failures.labels("queue_full").value == 1
        assert failures.labels("unavailable").value == 2

    @pytest.mark.parametrize("store_first", [False, True])
    @FAILING
    async def test_what_waits_for_the_store_goes_before_what_is_sent_later(
        self, store_first: bool, how: str
    ) -> None:
        world = Away(store_first=store_first)
        world.store.state = how
        early = a_notification()
        world.writes.give_back("default", "u1", (early,))
        await world.tasks_done()
        world.store.state = "up"
        # Nobody has tried again yet.
        late = await world.sent("u1")
        assert late.outcome is Outcome.QUEUED
        assert world.pending() == [early.id, late.notification_id]

    async def test_a_ledger_that_is_away_keeps_nobody_from_being_queued(self) -> None:
        world = Away()
        world.accounts.state = "failing"
        receipt = await world.sent("u1")
        assert receipt.outcome is Outcome.QUEUED
        assert world.pending() == [receipt.notification_id]


class TestStoredFirst:
    """`queue.mode = "always"`."""

    async def test_nothing_is_sent_before_it_is_stored(self) -> None:
        world = Away(store_first=True)
        client = await world.online()
        world.store.state = "hanging"
        pending = asyncio.ensure_future(settled(world.dispatch("u1")))
        await asyncio.sleep(0)
        assert client.read() == []
        world.store.go_on.set()
        receipt = await pending
        assert (receipt.outcome, receipt.delivered_to) == (Outcome.DELIVERED, 1)
        assert client.read_notifications() == world.pending() == [receipt.notification_id]
        await world.tasks_done()

    async def test_who_ends_without_a_word_leaves_it_in_the_log(self) -> None:
        world = Away(store_first=True)
        client = await world.online()
        receipt = await world.sent("u1")
        calls = len(world.store.calls)
        client.lose()
        # It is there already: nothing goes back.
        assert len(world.store.calls) == calls
        again = world.connect()
        await world.tasks_done()
        assert again.read_notifications() == [receipt.notification_id]

    async def test_who_acks_settles_it_there(self) -> None:
        world = Away(store_first=True)
        client = await world.online(acks=True)
        receipt = await world.sent("u1")
        client.say("Ack", notification_id=receipt.notification_id)
        await world.tasks_done()
        assert [each["type"] for each in client.read()][-1] == "acked"
        assert world.pending() == []

    async def test_who_is_away_gets_it_when_he_comes(self) -> None:
        world = Away(store_first=True)
        receipt = await world.sent("u1")
        assert (receipt.outcome, receipt.queued) == (Outcome.QUEUED, 1)
        client = world.connect()
        await world.tasks_done()
        assert client.read_notifications() == [receipt.notification_id]

    async def test_who_connects_meanwhile_gets_it_once(self) -> None:
        world = Away(store_first=True)
        world.store.state = "hanging"
        pending = asyncio.ensure_future(settled(world.dispatch("u1")))
        await asyncio.sleep(0)
        world.store.state = "up"
        client = await world.online()
        world.store.go_on.set()
        receipt = await pending
        await world.tasks_done()
        assert receipt.outcome in {Outcome.QUEUED, Outcome.DELIVERED}
        assert client.read_notifications() == [receipt.notification_id]

    @FAILING
    async def test_a_store_that_is_away_is_an_error_and_nothing_is_sent(self, how: str) -> None:
        world = Away(store_first=True)
        client = await world.online()
        world.store.state = how
        with pytest.raises(Unavailable):
            await world.sent("u1")
        receipt = await world.sent(users("u1", "u2"))
        assert (receipt.outcome, receipt.failed) == (Outcome.FAILED, 2)
        assert client.read() == []
        assert client.held() == []

    async def test_what_is_for_the_moment_is_not_stored(self) -> None:
        world = Away(store_first=True)
        client = await world.online()
        world.store.state = "down"
        receipt = await world.sent("u1", a_notification(ttl=0, now=world.clock.now))
        assert receipt.outcome is Outcome.DELIVERED
        assert client.read_notifications() == [receipt.notification_id]

    async def test_an_audience_is_kept_to(self) -> None:
        world = Away(store_first=True)
        client = await world.online()
        admins = Audience("Roles", frozenset({"admin"}))
        receipt = await world.sent("u1", a_notification(audience=admins, now=world.clock.now))
        assert receipt.outcome is Outcome.FILTERED
        assert (client.read(), world.pending()) == ([], [])


class TestConfirming:
    async def test_what_a_connection_held_waits_for_the_store(self) -> None:
        world = Away()
        client = await world.online()
        ids = [(await world.sent("u1")).notification_id for _ in range(3)]
        world.store.state = "down"
        client.lose()
        assert world.pending() == []
        await world.back()
        assert world.pending() == ids
        assert world.lost == []

    async def test_who_comes_before_the_store_does_gets_it_all_the_same(self) -> None:
        world = Away()
        client = await world.online()
        ids = [(await world.sent("u1")).notification_id for _ in range(3)]
        world.store.state = "down"
        client.lose()
        again = world.connect()
        await world.tasks_done()
        messages = again.read()
        assert [each["id"] for each in messages if each["type"] == "notification"] == ids
        await world.back()
        assert again.read_notifications() == []
        again.lose()
        await world.tasks_done()
        assert world.pending() == ids

    @FAILING
    async def test_an_ack_that_cannot_be_settled_is_not_acked(self, how: str) -> None:
        world = Away(store_first=True)
        client = await world.online(acks=True)
        id = (await world.sent("u1")).notification_id
        client.read()
        world.store.state = how
        client.say("Ack", notification_id=id)
        await world.tasks_done()
        assert [each["code"] for each in client.read()] == ["UNAVAILABLE"]
        await world.back()
        client.say("Ack", notification_id=id)
        await world.tasks_done()
        assert [each["type"] for each in client.read()][-1:] == ["acked"]
        assert world.pending() == []

    async def test_what_is_held_here_alone_needs_no_store(self) -> None:
        world = Away()
        client = await world.online(acks=True)
        id = (await world.sent("u1")).notification_id
        client.read()
        world.store.state = world.accounts.state = "down"
        client.say("Ack", notification_id=id)
        assert client.read() == [{"type": "acked", "notification_id": id}]

    async def test_what_waits_for_the_store_is_acked_and_goes_nowhere(self) -> None:
        world = Away()
        client = await world.online(acks=True)
        id = (await world.sent("u1")).notification_id
        world.store.state = "down"
        client.lose()
        # The store is back, and nobody has tried yet.
        world.store.state = "up"
        answer = await settled(world.confirmations.acknowledge("default", "u1", [id]))
        assert (answer.acked, answer.refused) == ([id], [])
        await world.back()
        assert world.pending() == []

    async def test_a_pong_also_confirms_what_was_stored_though_nobody_said_so(self) -> None:
        world = Away()
        client = await world.online()
        notification = a_notification(now=world.clock.now)
        await world.sent("u1", notification)
        world.store.state = "down"
        client.lose()
        # It was stored all the same, and the answer was lost.
        world.memory.enqueue("default", ("u1",), notification)
        world.store.state = "up"
        again = world.connect()
        await world.tasks_done()
        assert again.read_notifications() == [notification.id]
        world.confirmations.ask_waiting()
        again.pong_last()
        await world.tasks_done()
        assert world.pending() == []
        await world.back()
        assert (again.read_notifications(), world.pending()) == ([], [])

    async def test_a_strangers_ack_is_refused(self) -> None:
        world = Away()
        id = new_uuid()
        answer = await settled(world.confirmations.acknowledge("default", "u1", [id]))
        assert (answer.acked, answer.refused) == ([], [id])

    async def test_a_pong_settles_when_the_store_is_back(self) -> None:
        world = Away(store_first=True)
        client = await world.online()
        id = (await world.sent("u1")).notification_id
        world.confirmations.ask_waiting()
        world.store.state = "down"
        client.pong_last()
        assert client.held() == []
        # Who comes meanwhile does not get it again, though the log still has it.
        world.store.state = "up"
        second = world.connect()
        await world.tasks_done()
        assert (second.read_notifications(), world.pending()) == ([], [id])
        await world.back()
        assert world.pending() == []


class TestReplaying:
    async def gaps(self, client: Connected) -> list[str]:
        await client.world.tasks_done()
        return [each["reason"] for each in client.read() if each["type"] == "gap"]

    @FAILING
    async def test_who_connects_is_told_and_gets_it_when_the_store_is_back(self, how: str) -> None:
        world = Away()
        ids = [(await world.sent("u1")).notification_id for _ in range(2)]
        world.store.state = how
        client = world.connect()
        assert await self.gaps(client) == ["queue_unavailable"]
        live = await world.sent("u1")
        assert client.read_notifications() == [live.notification_id]
        await world.back()
        messages = client.read()
        assert [each["id"] for each in messages] == ids
        assert all(each["metadata"]["replayed"] for each in messages)

    async def test_while_it_stays_away_he_is_told_once(self) -> None:
        world = Away()
        world.store.state = "down"
        client = world.connect()
        assert await self.gaps(client) == ["queue_unavailable"]
        for _ in range(3):
            world.replayer.store_is_back()
            assert await self.gaps(client) == []
        await world.back()
        world.store.state = "down"
        world.replayer.again(client.connection)
        # It went away once more, with something that may be in it.
        assert await self.gaps(client) == ["queue_unavailable"]

    async def test_one_that_hangs_is_waited_for_no_longer_than_a_second(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert replay.STORE_SECONDS == 1
        monkeypatch.setattr(replay, "STORE_SECONDS", 0.01)
        monkeypatch.setattr(replay, "PATIENT_SECONDS", 0.01)
        world = Away()
        id = (await world.sent("u1")).notification_id
        world.store.state = "hanging"
        client = world.connect()
        assert await self.gaps(client) == ["queue_unavailable"]
        world.store.go_on.set()
        await world.back()
        assert client.read_notifications() == [id]

    async def test_one_that_is_slow_keeps_nobody_waiting_for_his_turn(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each page takes 0.3 s, so that the last of five lines of eight would wait for 1.2 s."""
        monkeypatch.setattr(replay, "STORE_SECONDS", 0.4)
        world = Away()
        users = [f"u{number}" for number in range(5 * replay.READERS)]
        ids = {user: (await world.sent(user)).notification_id for user in users}
        world.store.delay = 0.3
        clients = [world.connect(user) for user in users]
        live = {user: (await settled(world.dispatch(user))).notification_id for user in users}
        await world.tasks_done()
        told = [each.read() for each in clients]
        in_order = ["connected", "notification", "caught_up", "notification"]
        meanwhile = ["connected", "gap", "notification", "notification"]
        for user, messages in zip(users, told, strict=True):
            types = [each["type"] for each in messages]
            assert types in (in_order, meanwhile)
            got = [each["id"] for each in messages if each["type"] == "notification"]
            expected = [ids[user], live[user]]
            assert got == (expected if types == in_order else expected[::-1])
        kinds = [[each["type"] for each in messages] for messages in told]
        assert kinds[0] == in_order
        assert kinds[-1] == meanwhile

    async def test_one_that_goes_away_in_the_middle(self) -> None:
        world = Away(page_bytes=600)
        ids = [(await world.sent("u1")).notification_id for _ in range(6)]
        client = world.connect()
        for _ in range(100):
            if client.held():
                break
            await asyncio.sleep(0)
            world.flush()
        world.store.state = "down"
        assert await self.gaps(client) == ["queue_unavailable"]
        got = client.held()
        assert 0 < len(got) < 6
        await world.back()
        assert client.read_notifications() == ids[len(got) :]
        assert client.held() == ids

    @FAILING
    async def test_what_waits_for_the_store_comes_in_pages(self, how: str) -> None:
        world = Away(page_bytes=1024, loop=asyncio.get_running_loop())
        client = await world.online()
        sent = [(await world.sent("u1")).notification_id for _ in range(12)]
        world.store.state = how
        client.lose()
        await world.tasks_done()
        again = world.connect()
        await world.tasks_done()
        await again.connection.outbox.drained()
        assert max(map(len, again.sink.writes)) < 2048
        assert again.sink.notifications() == again.held() == sent
        assert not world.writes.has_homeless("default", "u1")

    async def test_who_left_is_forgotten(self) -> None:
        world = Away()
        world.store.state = "down"
        client = world.connect()
        await world.tasks_done()
        client.lose()
        calls = len(world.store.calls)
        await world.back()
        assert len(world.store.calls) == calls

    async def test_what_a_pong_confirmed_meanwhile_does_not_come_again(self) -> None:
        world = Away()
        id = (await world.sent("u1")).notification_id
        client = world.connect()
        await world.tasks_done()
        assert client.read_notifications() == [id]
        world.confirmations.ask_waiting()
        world.store.state = "down"
        client.pong_last()
        world.store.state = "up"
        # A page is on its way while what waited is settled.
        world.replayer.again(client.connection)
        await asyncio.sleep(0)
        await world.back()
        assert (client.read_notifications(), world.pending()) == ([], [])

    @pytest.mark.parametrize("again", [False, True])
    async def test_after_a_fault_of_ours_what_is_live_does_not_wait(self, again: bool) -> None:
        world = Away()
        client = await world.online() if again else None

        def faulty(*args: Any, **options: Any) -> Page:
            raise ValueError("a fault")

        world.memory.read = faulty
        if client is None:
            client = world.connect()
        else:
            world.replayer.again(client.connection, before_live=True)
        with pytest.raises(ValueError, match="a fault"):
            await world.tasks_done()
        live = await settled(world.dispatch("u1"))
        assert client.read_types()[-2:] == ["gap", "notification"]
        assert client.held() == [live.notification_id]
        assert world.replayer._again == {}

    async def test_what_a_log_gave_up_is_told_to_each_until_something_is_settled(self) -> None:
        world = World(max_size_per_user=2)
        for _ in range(3):
            world.send("u1")
        first = world.connect(acks=True)
        assert await self.gaps(first) == ["queue_overflow"]
        world.replayer.again(first.connection)
        assert await self.gaps(first) == []
        # It may never have reached him.
        first.lose()
        second = world.connect(acks=True)
        assert await self.gaps(second) == ["queue_overflow"]
        second.say("Ack", notification_id=second.held()[0])
        second.lose()
        assert await self.gaps(world.connect()) == []

    @pytest.mark.parametrize("acks", [False, True])
    async def test_what_a_log_gave_up_is_told_until_one_confirms_who_was_told(
        self, acks: bool
    ) -> None:
        world = World(max_size_per_user=2)

        def confirm(client: Connected) -> None:
            if acks:
                client.say("Ack", notification_id=client.held()[-1])
            else:
                world.confirmations.ask_waiting()
                client.pong_last()

        ids = [world.send("u1").notification_id for _ in range(2)]
        before = world.connect(acks=acks)
        assert await self.gaps(before) == []
        assert before.held() == ids
        await settled(world.logs.enqueue("default", ["u1"], a_notification()))
        half_open = world.connect(acks=acks)
        assert await self.gaps(half_open) == ["queue_overflow"]
        # It confirms what the other was told of behind the gap, and has heard of none.
        confirm(before)
        behind = world.connect(acks=acks)
        assert await self.gaps(behind) == ["queue_overflow"]
        confirm(behind)
        assert await self.gaps(world.connect(acks=acks)) == []

    async def test_what_was_sent_before_a_gap_confirms_nothing_of_it(self) -> None:
        world = World(max_size_per_user=2)
        ids = [world.send("u1").notification_id for _ in range(2)]
        client = world.connect(acks=True)
        await settled(world.logs.enqueue("default", ["u1"], a_notification()))
        world.replayer.again(client.connection)
        assert await self.gaps(client) == ["queue_overflow"]
        client.say("Ack", notification_id=ids[1])
        client.lose()
        assert await self.gaps(world.connect(acks=True)) == ["queue_overflow"]


def held_elsewhere(world: World, client: Connected) -> Notification:
    notification = a_notification(now=world.clock.now)
    world.confirmations.hold(notification, (client.connection,))
    return notification


class TestBoth:
    async def test_what_is_held_here_and_in_the_log_is_settled_there_too(self) -> None:
        world = World()
        client = world.connect(acks=True)
        client.read()
        notification = held_elsewhere(world, client)
        stored: Eventually[Any] = world.logs.enqueue("default", ["u1"], notification)
        await settled(stored)
        world.replayer.again(client.connection)
        await world.tasks_done()
        assert client.read_notifications() == []
        client.say("Ack", notification_id=notification.id)
        assert client.read_types() == ["acked"]
        assert list(world.logs.read("default", "u1").entries) == []
