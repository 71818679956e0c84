"""Order, and once on a connection, where a store answers later: each answer comes when the test
says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from notifyd.eventually import Eventually
from notifyd.notification import Receipt, Target
from notifyd.queue.base import Page, Rejection
from notifyd.queue.memory import MemoryUserLogs
from tests.unit.connected import NOW, Connected, World, a_notification

T = TypeVar("T")


class LateLogs:
    """A store at some distance: what is written arrives when it is answered, what is read was read
    when it was asked for."""

    def __init__(self) -> None:
        self._logs = MemoryUserLogs(
            max_size_per_user=100,
            max_messages=100,
            message_ttl_seconds=1000,
            clock=lambda: NOW,
            on_dropped=lambda: None,
        )
        self._waiting: list[tuple[str, Callable[[], object]]] = []

    def _later(self, name: str, work: Callable[[], T]) -> asyncio.Future[T]:
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((name, lambda: answer.set_result(work())))
        return answer

    def answer_now(self, name: str) -> None:
        """Answer the oldest call of this method."""
        found = next(waiting for waiting in self._waiting if waiting[0] == name)
        self._waiting.remove(found)
        found[1]()

    async def answer(self, name: str) -> None:
        """Answer the oldest call of this method, and let everybody who waited go on."""
        self.answer_now(name)
        await turns()

    def is_asked(self, name: str) -> bool:
        """Whether a call of this method waits for its answer."""
        return any(waiting == name for waiting, _ in self._waiting)

    async def answer_all(self) -> None:
        """Answer everything, in order, until nothing is asked."""
        while self._waiting:
            await self.answer(self._waiting[0][0])

    def enqueue(self, *args: Any, **options: Any) -> Eventually[Sequence[Rejection | None]]:
        return self._later("enqueue", lambda: self._logs.enqueue(*args, **options))

    def read(self, *args: Any, **options: Any) -> Eventually[Page]:
        page = self._logs.read(*args, **options)
        return self._later("read", lambda: page)

    def settle(self, *args: Any, **options: Any) -> Eventually[frozenset[str]]:
        return self._later("settle", lambda: self._logs.settle(*args, **options))


class LateAnswers(LateLogs):
    """What is written arrives at once, and only the answer is late."""

    def enqueue(self, *args: Any) -> Eventually[Sequence[Rejection | None]]:
        rejections = self._logs.enqueue(*args)
        return self._later("enqueue", lambda: rejections)


async def turns() -> None:
    """Whatever goes on by itself has gone on."""
    for _ in range(20):
        await asyncio.sleep(0)


class Late:
    """A world over such a store, and a publisher who sends to u1."""

    def __init__(
        self, *, store_first: bool = False, logs: LateLogs | None = None, **options: Any
    ) -> None:
        self.logs = logs or LateLogs()
        loop = asyncio.get_running_loop()
        self.world = World(logs=self.logs, store_first=store_first, loop=loop, **options)

    def send(self, to: str | Target = "u1", **options: Any) -> asyncio.Future[Receipt]:
        receipt = self.world.dispatch(to, **options)
        if isinstance(receipt, Receipt):
            answered: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
            answered.set_result(receipt)
            return answered
        return asyncio.ensure_future(receipt)

    async def sent(self, **options: Any) -> str:
        """The id of one that was answered."""
        receipt = self.send(**options)
        await turns()
        await self.logs.answer_all()
        return (await receipt).notification_id

    async def connected(self, **options: Any) -> Connected:
        """Connected, and replayed to."""
        client = self.world.connect("u1", **options)
        await turns()
        await self.logs.answer_all()
        client.read()
        return client

    async def replayed(self) -> list[str]:
        """What a new device gets."""
        client = self.world.connect("u1", acks=True)
        await turns()
        await self.logs.answer_all()
        return client.read_notifications()


async def test_what_was_queued_during_the_connecting_comes_before_what_is_sent_next() -> None:
    late = Late()
    first = late.send()
    await turns()
    client = late.world.connect("u1")
    await turns()
    await late.logs.answer("read")
    await late.logs.answer("enqueue")
    second = late.send()
    await turns()
    await late.logs.answer_all()
    messages = [each for each in client.read() if each["type"] == "notification"]
    ids = [(await first).notification_id, (await second).notification_id]
    assert [each["id"] for each in messages] == ids
    assert [each["metadata"].get("replayed") for each in messages] == [True, None]


async def test_what_is_queued_during_a_replay_comes_before_what_is_sent_next() -> None:
    late = Late()
    earlier = await late.sent()
    first = late.send()
    client = late.world.connect("u1")
    await turns()
    await late.logs.answer("enqueue")
    second = late.send()
    await turns()
    await late.logs.answer_all()
    ids = [earlier, (await first).notification_id, (await second).notification_id]
    messages = client.read()
    assert [each["id"] for each in messages if each["type"] == "notification"] == ids
    kinds = [each["type"] for each in messages]
    assert kinds == ["connected", "notification", "notification", "caught_up", "notification"]


async def test_stored_first_it_comes_in_order_whatever_is_replayed() -> None:
    late = Late(store_first=True)
    sent = [await late.sent()]
    client = late.world.connect("u1")
    await turns()
    # Not in the page that is under way; its answer comes when that replay is over.
    receipts = [late.send()]
    await turns()
    await late.logs.answer("read")
    assert not receipts[0].done()
    receipts.append(late.send())
    await late.logs.answer("enqueue")
    receipts.append(late.send())
    await turns()
    await late.logs.answer_all()
    receipts.append(late.send())
    await turns()
    await late.logs.answer_all()
    sent += [(await receipt).notification_id for receipt in receipts]
    assert client.read_notifications() == sent


async def test_other_streams_do_not_wait_until_a_busy_user_is_sent_nothing_more() -> None:
    late = Late(store_first=True)
    client = await late.connected(subscribe=("news",))
    client.connection.outbox.hold_back()
    late.world.replayer.again(client.connection)
    await turns()
    news = late.world.send(Target("channel", ("news",)))
    for _ in range(3):
        late.send()
        await turns()
        await late.logs.answer("enqueue")
        await late.logs.answer("read")
    assert news.notification_id in client.read_notifications()
    assert client.connection.outbox.holds_back
    await late.logs.answer_all()
    assert not client.connection.outbox.holds_back


async def test_a_page_does_not_bring_again_what_was_acked_since_it_was_asked_for() -> None:
    late = Late(store_first=True)
    client = await late.connected(acks=True)
    id = await late.sent()
    assert client.read_notifications() == [id]
    late.world.replayer.again(client.connection)
    await turns()
    client.say("Ack", notification_id=id)
    await turns()
    await late.logs.answer("settle")
    await late.logs.answer("read")
    assert client.read_types() == ["acked"]
    assert late.world.confirmations._settled_during_replay == {}


async def test_stored_first_it_does_not_come_again_after_a_replay_has_brought_it() -> None:
    late = Late(store_first=True, logs=LateAnswers())
    client = await late.connected(acks=True)
    receipt = late.send()
    await turns()
    late.world.replayer.again(client.connection)
    await turns()
    await late.logs.answer("read")
    (id,) = client.read_notifications()
    client.say("Ack", notification_id=id)
    await turns()
    await late.logs.answer("settle")
    assert client.read_types() == ["acked"]
    await late.logs.answer_all()
    assert (await receipt).notification_id == id
    assert client.read_notifications() == []


async def test_a_page_does_not_bring_again_what_is_being_settled() -> None:
    late = Late(store_first=True)
    client = await late.connected(acks=True)
    id = await late.sent()
    assert client.read_notifications() == [id]
    client.say("Ack", notification_id=id)
    await turns()
    late.world.replayer.again(client.connection)
    await turns()
    await late.logs.answer("settle")
    await late.logs.answer("read")
    assert client.read_types() == ["acked"]
    assert list(late.world.writes.settling("default", "u1")) == []


async def test_two_acks_of_the_same_are_one_settling_until_both_are_answered() -> None:
    late = Late(store_first=True)
    client = await late.connected(acks=True)
    id = await late.sent()
    for _ in range(2):
        client.say("Ack", notification_id=id)
    await turns()
    await late.logs.answer("settle")
    assert list(late.world.writes.settling("default", "u1")) == [id]
    await late.logs.answer("settle")
    assert list(late.world.writes.settling("default", "u1")) == []
    assert client.read_types() == ["notification", "acked", "acked"]


async def test_the_senders_own_connection_is_not_replayed_to() -> None:
    late = Late(store_first=True)
    client = await late.connected()
    other = await late.connected()
    id = await late.sent(exclude_connection=client.id)
    assert other.read_notifications() == [id]
    assert client.read_notifications() == []


async def test_what_moves_while_what_moved_before_is_looked_for_comes_too() -> None:
    late = Late(max_pending=2)
    other = await late.connected(acks=True)
    ids = [(await late.send()).notification_id for _ in range(2)]
    device = late.world.connect("u1", acks=True)
    await turns()
    ids.append((await late.send()).notification_id)
    await late.logs.answer("read")
    await late.logs.answer("enqueue")
    ids.append((await late.send()).notification_id)
    await late.logs.answer_all()
    for client in (other, device):
        messages = client.read()
        assert [each["id"] for each in messages if each["type"] == "notification"] == ids


async def test_a_replay_ends_though_something_moves_to_the_log_all_the_time() -> None:
    late = Late(max_pending=1)
    other = await late.connected(acks=True)
    ids = [(await late.send()).notification_id]
    device = late.world.connect("u1", acks=True)
    for _ in range(40):
        ids.append((await late.send()).notification_id)
        await turns()
        await late.logs.answer("enqueue")
        if late.logs.is_asked("read"):
            await late.logs.answer("read")
    assert not device.connection.outbox.holds_back
    for client in (other, device):
        messages = client.read()
        assert [each["id"] for each in messages if each["type"] == "notification"] == ids


async def test_what_a_replay_brought_goes_back_before_what_came_live_meanwhile() -> None:
    late = Late()
    other = await late.connected(acks=True)
    ids = []
    for _ in range(2):
        ids.append(await late.sent())
        late.world.clock.now += 1
    device = late.world.connect("u1", acks=True)
    await turns()
    ids.append((await late.send()).notification_id)
    await late.logs.answer_all()
    assert device.read_notifications() == ids
    other.lose()
    device.lose()
    await late.logs.answer_all()
    again = await late.replayed()
    assert again == ids


async def test_what_moved_and_was_acked_does_not_go_back_with_who_had_yet_to_get_it() -> None:
    late = Late(max_pending=1)
    other = await late.connected(acks=True)
    moved = (await late.send()).notification_id
    late.world.clock.now += 1
    device = late.world.connect("u1", acks=True)
    await turns()
    live = (await late.send()).notification_id
    await late.logs.answer("enqueue")
    other.say("Ack", notification_id=moved)
    await late.logs.answer("settle")
    other.lose()
    device.lose()
    await late.logs.answer_all()
    assert late.world.confirmations.held == 0
    assert await late.replayed() == [live]


async def test_what_a_device_gave_back_comes_before_what_another_holds() -> None:
    """Also where it is stored before the replay looks what is on its way."""
    late = Late()
    queued = await late.sent()
    ids = [queued]
    first = late.world.connect("u1", acks=True)
    other = late.world.connect("u1", acks=True)
    await turns()
    await late.logs.answer_all()
    ids.append(await late.sent(exclude_connection=other.id))
    late.world.clock.now += 1
    ids.append(await late.sent())
    device = late.world.connect("u1", acks=True)
    await turns()
    first.lose()
    late.logs.answer_now("read")
    await late.logs.answer("enqueue")
    await late.logs.answer_all()
    assert device.read_notifications() == ids


async def test_those_who_wait_to_store_keep_their_order() -> None:
    """Also where the second is for one of them alone, who waits for nothing himself."""
    late = Late(store_first=True)
    for _ in range(2):
        late.world.writes.give_back("default", "u1", (a_notification(),))
    both = late.send(to=Target("users", ("u1", "u2")))
    one = late.send(to="u2")
    await turns()
    await late.logs.answer_all()
    ids = [(await each).notification_id for each in (both, one)]
    client = late.world.connect("u2", acks=True)
    await turns()
    await late.logs.answer_all()
    assert client.read_notifications() == ids


async def test_what_is_queued_waits_for_what_is_in_line_before_it() -> None:
    """It stands behind something of the same user that is on its way to the log."""
    late = Late(max_pending=1)
    client = await late.connected(acks=True)
    ids = [(await late.send()).notification_id for _ in range(2)]
    client.lose()
    queued = late.send()
    await turns()
    await late.logs.answer_all()
    assert (await queued).queued == 1
    ids.append((await queued).notification_id)
    assert await late.replayed() == ids


async def test_stored_first_it_waits_for_what_is_in_line_before_it() -> None:
    late = Late(store_first=True)
    ids = []
    for _ in range(3):
        notification = a_notification()
        ids.append(notification.id)
        # As what another node was sent, and did not say that it has it.
        late.world.writes.give_back("default", "u1", (notification,))
    sent = [late.send(), late.send(to=Target("users", ("u1", "u2")))]
    await turns()
    await late.logs.answer_all()
    assert [each.queued for each in await asyncio.gather(*sent)] == [1, 2]
    ids += [each.notification_id for each in await asyncio.gather(*sent)]
    assert await late.replayed() == ids


async def test_what_moves_to_the_log_after_the_page_was_asked_for_comes_in_its_order() -> None:
    """Beyond `ack.max_pending`, while another device connects, which finds it in no page, and
    nobody holds it any more."""
    late = Late(max_pending=1)
    other = await late.connected(acks=True)
    ids = [(await late.send()).notification_id]
    device = late.world.connect("u1", acks=True)
    await turns()
    ids.append((await late.send()).notification_id)
    await turns()
    # Moved, and stored, before the page has come that was asked for before that.
    await late.logs.answer("enqueue")
    await late.logs.answer("read")
    await late.logs.answer_all()
    for client in (other, device):
        messages = client.read()
        assert [each["id"] for each in messages if each["type"] == "notification"] == ids
