"""Whatever happens in whatever order: nothing is lost, nothing twice, and the sums agree."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from notifyd.connections.connection import HeldTogether, State
from notifyd.connections.outbox import Bounds
from notifyd.notification import Outcome, Target
from tests.unit.connected import Connected, RecordingSink, RecordingStream, World

USERS = st.sampled_from(["ann", "bob"])
PAYLOADS = st.sampled_from([b"1", b'"%s"' % (b"x" * 300), b'"%s"' % (b"x" * 3000)])


class TightWorld(World):
    """Tight everywhere; a replay of several pages goes on when the test says so."""

    def __init__(self) -> None:
        super().__init__(
            max_pending=12,
            max_size_per_user=10_000,
            page_bytes=4500,
            bounds=Bounds(max_bytes=9000, max_messages=15, total_bytes=16_000),
        )
        self.replays = asyncio.new_event_loop()
        self.manual.create_future = self.replays.create_future  # type: ignore[method-assign]  # theirs

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.replays.create_task(coroutine)
        self.tasks.append(task)
        return task

    def go_on(self) -> None:
        """Let replays come as far as they can."""
        for _ in range(4):
            self.replays.run_until_complete(asyncio.sleep(0))
            self.manual.settle()
        for task in [task for task in self.tasks if task.done()]:
            self.tasks.remove(task)
            task.result()

    def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            self.replays.run_until_complete(asyncio.wait(self.tasks))
        self.replays.close()


class NothingIsLost(RuleBasedStateMachine):
    """Users with connections that read, stall, ack, answer Pings and vanish."""

    @initialize()
    def begin(self) -> None:
        self.world = TightWorld()
        self.clients: list[Connected] = []
        self.sent: set[tuple[str, str]] = set()
        self.confirmed: set[tuple[str, str]] = set()

    def pick(self, number: int) -> Connected:
        return self.clients[number % len(self.clients)]

    @rule(user=USERS, acks=st.booleans(), stream=st.booleans())
    def connect(self, user: str, acks: bool, stream: bool) -> None:
        sink = RecordingStream() if stream else RecordingSink()
        client = self.world.connect(
            user,
            sink=sink,
            transport="sse" if stream else "websocket",
            acks=acks,
            subscribe=("orders",),
        )
        self.clients.append(client)

    @rule(user=USERS, payload=PAYLOADS)
    def send(self, user: str, payload: bytes) -> None:
        receipt = self.world.send(user, payload=payload)
        assert receipt.outcome in (Outcome.DELIVERED, Outcome.QUEUED)
        self.sent.add((user, receipt.notification_id))

    @rule(payload=PAYLOADS)
    def send_to_both(self, payload: bytes) -> None:
        receipt = self.world.send(Target("users", ("ann", "bob")), payload=payload)
        self.sent |= {(user, receipt.notification_id) for user in ("ann", "bob")}

    @rule(payload=PAYLOADS)
    def broadcast(self, payload: bytes) -> None:
        self.world.send(Target("broadcast"), payload=payload)
        self.world.send(Target("channel", ("orders",)), payload=payload)

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 7))
    def send_all_but_one(self, number: int) -> None:
        client = self.pick(number)
        user = client.connection.identity.user_id
        receipt = self.world.send(user, exclude_connection=client.id)
        if receipt.success:
            self.sent.add((user, receipt.notification_id))

    @rule()
    def turn(self) -> None:
        self.world.flush()

    @rule()
    def go_on(self) -> None:
        self.world.go_on()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.end()

    @rule()
    def tick(self) -> None:
        self.world.confirmations.ask_waiting()

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 7))
    def stall(self, number: int) -> None:
        self.pick(number).connection.outbox.pause()

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 7))
    def take_again(self, number: int) -> None:
        self.pick(number).connection.outbox.resume()

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 7))
    def hold_back(self, number: int) -> None:
        outbox = self.pick(number).connection.outbox
        if outbox.closed:
            return
        if outbox.holds_back:
            outbox.let_go()
        else:
            outbox.hold_back()

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 7))
    def vanish(self, number: int) -> None:
        self.clients.pop(number % len(self.clients)).lose()

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 7))
    def disconnect(self, number: int) -> None:
        self.world.lifecycle.disconnect(self.pick(number).connection, "x")

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 7), which=st.integers(0, 7))
    def ack(self, number: int, which: int) -> None:
        client = self.pick(number)
        held = client.held()
        if client.connection.state is State.OPEN and held:
            id = held[which % len(held)]
            client.say("Ack", notification_id=id)
            self.confirmed.add((client.connection.identity.user_id, id))

    @precondition(lambda self: self.clients)
    @rule(number=st.integers(0, 7))
    def pong(self, number: int) -> None:
        connection = self.pick(number).connection
        asked = connection.asked
        if asked is not None and not connection.outbox.paused:
            before = set(connection.unconfirmed or ())
            self.world.lifecycle.pong(connection, asked[0].to_bytes(4, "big"))
            user = connection.identity.user_id
            self.confirmed |= {(user, id) for id in before - set(connection.unconfirmed or ())}

    @invariant()
    def waiting_bytes_are_those_of_the_outboxes(self) -> None:
        if not hasattr(self, "world"):
            return
        flusher = self.world.flusher
        open_ = [each.connection.outbox for each in self.clients]
        assert flusher.waiting_bytes == sum(outbox.size for outbox in open_)
        assert all(outbox.size == 0 for outbox in open_ if outbox.closed)
        assert all(not outbox.closed for outbox in flusher._paused)

    @invariant()
    def everything_is_held_or_pending_or_confirmed(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        held: set[int] = set()
        held_together: list[HeldTogether] = []
        kept: set[tuple[str, str]] = set()
        for client in self.clients:
            connection = client.connection
            if connection.state is State.CLOSED:
                assert connection.unconfirmed is None
                continue
            for name, each in (connection.unconfirmed or {}).items():
                assert not each.settled
                kept.add((connection.identity.user_id, name))
                if isinstance(each, HeldTogether):
                    assert connection in each.takers
                    held_together.append(each)
                    continue
                assert connection in each.connections
                if not each.stored:
                    held.add(id(each))
        assert world.confirmations.held == len(held) + len(held_together)
        for together in held_together:
            assert together.left >= held_together.count(together)
        assert world.confirmations.held <= 12
        for user in ("ann", "bob"):
            cursor: int | None = 0
            while cursor is not None:
                page = world.logs.read("default", user, after=cursor)
                for entry in page.entries:
                    kept.add((user, entry.notification.id))
                cursor = page.cursor
        assert kept == self.sent - self.confirmed
        assert world.lost == []

    @invariant()
    def nothing_came_twice_over_one_connection(self) -> None:
        for client in getattr(self, "clients", ()):
            ids = client.sink.notifications()
            assert len(ids) == len(set(ids))


def test_a_device_that_is_given_up_while_the_next_one_is_replayed_to() -> None:
    """What it held returns to the log in the middle of that: it is one replay all the same."""
    state = NothingIsLost()
    state.begin()
    long = b'"%s"' % (b"x" * 3000)
    state.connect("bob", False, False)
    state.send_to_both(long)
    state.connect("ann", False, False)
    state.send_to_both(long)
    state.go_on()
    state.broadcast(long)
    state.stall(0)
    state.go_on()
    state.connect("ann", False, False)
    state.connect("bob", False, False)
    assert state.clients[0].connection.state is State.CLOSED
    state.go_on()
    state.everything_is_held_or_pending_or_confirmed()
    state.nothing_came_twice_over_one_connection()
    state.teardown()


TestNothingIsLost = NothingIsLost.TestCase
TestNothingIsLost.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, database=None
)
