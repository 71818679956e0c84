from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pytest

from notifyd.cluster.router import Waiting
from notifyd.dispatch import store_writes
from notifyd.dispatch.store_writes import StoreWrites
from notifyd.errors import Unavailable
from notifyd.eventually import Eventually
from notifyd.notification import Notification
from notifyd.queue.base import Rejection
from tests.unit.connected import NOW, Clock, a_notification

T = TypeVar("T")

ANN = ("acme", "ann")


def away() -> Unavailable:
    return Unavailable("The store does not answer.", retry_after=1)


class Logs:
    """Answers at once, later when the test says so, or not at all."""

    def __init__(self) -> None:
        self.stored: dict[tuple[str, str], list[str]] = {}
        self.settled: list[tuple[str, str, tuple[str, ...]]] = []
        self.late = False
        self.down = False
        self.full = False
        self.asked: list[asyncio.Future[Any]] = []

    def enqueue(
        self,
        tenant: str,
        recipients: Sequence[str],
        notification: Notification,
        *,
        owed: bool = False,
    ) -> Eventually[Sequence[Rejection | None]]:
        def store() -> Sequence[Rejection | None]:
            if self.full:
                return ["queue_full"]
            log = self.stored.setdefault((tenant, recipients[0]), [])
            if notification.id not in log:
                log.append(notification.id)
            return [None]

        return self._answer(store)

    def settle(
        self, tenant: str, user_id: str, ids: Sequence[str], *, heard: bool = False
    ) -> Eventually[frozenset[str]]:
        def settle() -> frozenset[str]:
            self.settled.append((tenant, user_id, tuple(ids)))
            return frozenset(ids)

        return self._answer(settle)

    def _answer(self, work: Callable[[], T]) -> Eventually[T]:
        if self.down:
            raise away()
        if not self.late:
            return work()
        answer = asyncio.get_running_loop().create_future()
        self.asked.append(answer)

        async def later() -> T:
            await answer
            return work()

        return asyncio.ensure_future(later())

    def answer(self, error: Exception | None = None, count: int | None = None) -> None:
        """Answer the first that were asked, or fail them."""
        asked, self.asked = self.asked[:count], self.asked[len(self.asked[:count]) :]
        for each in asked:
            if error is None:
                each.set_result(None)
            else:
                each.set_exception(error)


class Ledger:
    """Remembers whom it was to expect."""

    def __init__(self) -> None:
        self.expected: list[tuple[str, bool]] = []
        self.error: Exception | None = None
        self.kind = "now"

    def expect(
        self, tenant: str, id: str, recipients: Sequence[str], *, queued: bool = False
    ) -> Eventually[None]:
        if self.kind == "now":
            if self.error is not None:
                raise self.error
            self.expected.append((id, queued))
            return None
        return self._later(id, queued)

    def _later(self, id: str, queued: bool) -> Awaitable[None]:
        async def later() -> None:
            if self.error is not None:
                raise self.error
            self.expected.append((id, queued))

        return asyncio.ensure_future(later()) if self.kind == "future" else later()


class Writes:
    """A StoreWrites, its stores, and what it told."""

    def __init__(self, *, max_waiting: int = 100, queue: bool = True) -> None:
        self.clock = Clock()
        self.is_away = False
        self.logs = Logs()
        self.ledger = Ledger()
        self.lost: list[str] = []
        self.returned: list[tuple[str, str]] = []
        self.returned_elsewhere: list[tuple[str, str]] = []
        self.unavailable: list[Unavailable] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.writes = StoreWrites(
            self.logs if queue else None,  # type: ignore[arg-type]  # what is called is there
            self.ledger,  # type: ignore[arg-type]  # as above
            max_waiting=max_waiting,
            clock=self.clock,
            spawn=lambda work: self.tasks.append(asyncio.ensure_future(work)),
            on_lost=lambda notification: self.lost.append(notification.id),
            on_unavailable=self.unavailable.append,
            is_away=lambda: self.is_away,
        )
        self.writes.on_returned = self._returned

    def _returned(
        self, tenant: str, user_id: str, *, before_live: bool = False, here: bool = True
    ) -> None:
        (self.returned if here else self.returned_elsewhere).append((tenant, user_id))

    def give_back(self, *notifications: Notification, user_id: str = "ann") -> None:
        self.writes.give_back("acme", user_id, notifications)

    def waiting(self, user_id: str = "ann") -> list[str]:
        """Take what waits, to look at it, and leave it so."""
        taken = self.writes.take_homeless("acme", user_id)
        self.writes._keep_homeless(("acme", user_id), taken)
        return [each.id for each in taken]

    async def done(self) -> None:
        while self.writes._under_way:
            await asyncio.wait(set(self.writes._under_way))


def some(count: int, **fields: Any) -> list[Notification]:
    return [a_notification(**fields) for _ in range(count)]


def ids(notifications: Sequence[Notification]) -> list[str]:
    return [each.id for each in notifications]


class TestGivingBack:
    def test_is_stored_in_order_noted_and_told(self) -> None:
        writes = Writes()
        three = some(3)
        writes.give_back(*three)
        assert writes.logs.stored == {ANN: ids(three)}
        assert writes.ledger.expected == [(each.id, True) for each in three]
        assert writes.returned == [ANN]

    async def test_a_store_that_answers_late_is_waited_for(self) -> None:
        writes = Writes()
        writes.logs.late = True
        three = some(3)
        writes.give_back(*three)
        assert writes.returned == []
        writes.logs.answer()
        await writes.done()
        assert writes.logs.stored == {ANN: ids(three)}
        assert writes.returned == [ANN]
        assert writes.waiting() == []

    async def test_nothing_sets_out_before_what_is_on_its_way_has_arrived(self) -> None:
        writes = Writes()
        writes.logs.late = True
        three = some(3)
        for each in three:
            writes.give_back(each)
        assert len(writes.logs.asked) == 1
        writes.logs.answer(away())
        # It fails, and is behind nothing that came later.
        await writes.done()
        writes.logs.late = False
        await writes.writes.retry()
        assert writes.logs.stored == {ANN: ids(three)}

    async def test_so_many_are_on_their_way_at_a_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(store_writes, "MAX_ON_THEIR_WAY", 4)
        writes = Writes()
        writes.logs.late = True
        users = [f"u{n}" for n in range(5)]
        given = {user: some(2) for user in users}
        for user, notifications in given.items():
            writes.give_back(*notifications, user_id=user)
        most = 0
        while writes.logs.asked:
            most = max(most, len(writes.logs.asked))
            writes.logs.answer()
            for _ in range(5):
                await asyncio.sleep(0)
        assert most == 4
        assert writes.logs.stored == {("acme", user): ids(given[user]) for user in users}

    def test_where_nothing_keeps_it_it_is_lost(self) -> None:
        writes = Writes(queue=False)
        (one,) = some(1)
        writes.give_back(one)
        assert writes.lost == [one.id]

    def test_what_is_over_or_for_those_connected_then_is_lost(self) -> None:
        writes = Writes()
        late, momentary = a_notification(ttl=10), a_notification(ttl=0)
        writes.clock.now = NOW + 10
        writes.give_back(late, momentary)
        assert writes.lost == [late.id, momentary.id]
        assert (writes.logs.stored, writes.returned) == ({}, [])

    def test_what_a_full_log_refuses_is_lost(self) -> None:
        writes = Writes()
        writes.logs.full = True
        (one,) = some(1)
        writes.give_back(one)
        assert (writes.lost, writes.returned, writes.ledger.expected) == ([one.id], [], [])

    async def test_a_fault_of_ours_while_it_is_stored_loses_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writes = Writes()
        three = some(3)

        answers: list[asyncio.Future[object]] = [asyncio.Future() for _ in three]
        with monkeypatch.context() as fault:
            fault.setattr(writes.logs, "enqueue", lambda *given, **how: answers.pop(0))
            answers[0].set_exception(RuntimeError("a fault"))
            writes.give_back(*three)
            with pytest.raises(RuntimeError):
                await asyncio.gather(*writes.writes._under_way)
        assert writes.waiting() == ids(three)
        await writes.writes.retry()
        assert writes.logs.stored == {ANN: ids(three)}

    def test_where_he_has_it_already_only_others_are_told(self) -> None:
        writes = Writes()
        writes.writes.give_back("acme", "ann", some(1), replay=False)
        assert (writes.returned, writes.returned_elsewhere) == ([], [ANN])

    def test_what_waited_before_it_he_may_be_without(self) -> None:
        writes = Writes()
        writes.logs.down = True
        writes.give_back(*some(1))
        writes.logs.down = False
        writes.writes.give_back("acme", "ann", some(1), replay=False)
        assert writes.returned == [ANN]


class TestWaiting:
    def test_a_store_that_is_away_gets_it_later(self) -> None:
        writes = Writes()
        writes.logs.down = True
        two = some(2)
        writes.give_back(*two)
        assert (writes.waiting(), writes.returned) == (ids(two), [])

    async def test_one_that_fails_late_too(self) -> None:
        writes = Writes()
        writes.logs.late = True
        three = some(3)
        writes.give_back(*three)
        writes.logs.answer(count=1)
        writes.logs.answer(away())
        await writes.done()
        assert writes.logs.stored == {ANN: ids(three[:1])}
        assert writes.waiting() == ids(three[1:])
        assert writes.returned == [ANN]

    async def test_a_fault_of_ours_is_not_taken_for_the_stores(self) -> None:
        writes = Writes()
        writes.logs.late = True
        writes.give_back(*some(1))
        (task,) = writes.writes._under_way
        writes.logs.answer(ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            await task

    async def test_retrying_stores_it_in_order_and_replays_it(self) -> None:
        writes = Writes()
        writes.logs.down = True
        two = some(2)
        writes.give_back(*two)
        writes.logs.down = False
        await writes.writes.retry()
        assert writes.logs.stored == {ANN: ids(two)}
        assert (writes.waiting(), writes.returned) == ([], [ANN])

    async def test_retrying_stops_at_the_first_that_fails(self) -> None:
        writes = Writes()
        writes.logs.down = True
        for user in ("ann", "bob", "cleo"):
            writes.give_back(*some(1), user_id=user)
        writes.logs.down, writes.logs.late = False, True
        retrying = asyncio.ensure_future(writes.writes.retry())
        await asyncio.sleep(0)
        assert len(writes.logs.asked) == 1
        writes.logs.answer(away())
        await retrying
        assert writes.logs.asked == []
        assert [len(writes.waiting(user)) for user in ("ann", "bob", "cleo")] == [1, 1, 1]

    async def test_what_comes_later_stays_behind_what_waits(self) -> None:
        writes = Writes()
        writes.logs.down = True
        early, late = some(2), some(1)
        writes.give_back(*early)
        writes.logs.down = False
        # The store is back, and nobody has tried yet.
        writes.give_back(*late)
        assert writes.logs.stored == {ANN: ids([*early, *late])}
        assert writes.waiting() == []

    async def test_what_is_stored_for_another_stays_behind_it_too(self) -> None:
        writes = Writes()
        writes.logs.down = True
        early = some(2)
        writes.give_back(*early)
        writes.writes.go_before("acme", ("ann",))
        assert writes.waiting() == ids(early)
        writes.logs.down = False
        # The store is back, and nobody has tried yet.
        writes.writes.go_before("acme", ("bob", "ann"))
        assert writes.logs.stored == {ANN: ids(early)}
        assert writes.waiting() == []

    def test_a_store_that_is_known_to_be_away_is_not_asked_at_each_publish(self) -> None:
        writes = Writes()
        writes.logs.down = True
        early = some(2)
        writes.give_back(*early)
        writes.logs.down, writes.is_away = False, True
        writes.writes.go_before("acme", ("ann",))
        assert writes.waiting() == ids(early)
        assert writes.logs.stored == {}

    async def test_other_nodes_are_asked_before_what_a_store_did_not_answer_for_goes(self) -> None:
        writes = Writes()
        asked = []

        async def settle_confirmed(waiting: Waiting) -> None:
            asked.append(waiting)

        writes.writes.settle_confirmed = settle_confirmed
        writes.logs.down = True
        early = some(2)
        writes.give_back(*early)
        writes.logs.down = False
        writes.writes.go_before("acme", ("ann",))
        assert writes.waiting() == ids(early)
        await writes.writes.retry()
        assert asked == [[(*ANN, tuple(ids(early)))]]
        assert writes.logs.stored == {ANN: ids(early)}

    def test_beyond_the_bound_the_oldest_are_given_up_one_by_one(self) -> None:
        writes = Writes(max_waiting=4)
        writes.logs.down = True
        anns, bobs = some(3), some(3)
        writes.give_back(*anns)
        writes.give_back(*bobs, user_id="bob")
        assert writes.lost == ids(anns[:2])
        assert (writes.waiting("ann"), writes.waiting("bob")) == (ids(anns[2:]), ids(bobs))

    def test_what_is_over_meanwhile_is_lost(self) -> None:
        writes = Writes()
        writes.logs.down = True
        short, long = a_notification(ttl=10), a_notification()
        writes.give_back(short, long)
        writes.clock.now += 10
        assert ids(writes.writes.take_homeless(*ANN)) == [long.id]
        assert writes.lost == [short.id]

    def test_twice_is_once(self) -> None:
        writes = Writes()
        writes.logs.down = True
        (one,) = some(1)
        writes.give_back(one)
        writes.give_back(one)
        assert writes.waiting() == [one.id]
        assert writes.writes._waiting == 1


class TestConfirmedMeanwhile:
    """What the user acked goes to no log any more, or he would get it again."""

    def test_what_waits_is_forgotten(self) -> None:
        writes = Writes()
        writes.logs.down = True
        two = some(2)
        writes.give_back(*two)
        assert writes.writes.confirmed(*ANN, [two[0].id, "unknown"]) == {two[0].id}
        assert writes.waiting() == [two[1].id]
        assert writes.writes.confirmed(*ANN, [two[1].id]) == {two[1].id}
        assert writes.writes._waiting == 0

    async def test_what_is_on_its_way_is_not_tried_again(self) -> None:
        writes = Writes()
        writes.logs.late = True
        two = some(2)
        writes.give_back(*two)
        assert writes.writes.confirmed(*ANN, [two[0].id]) == {two[0].id}
        writes.logs.answer(away())
        await writes.done()
        assert writes.waiting() == [two[1].id]

    def test_elsewhere_nothing_is_known(self) -> None:
        assert Writes().writes.confirmed(*ANN, ["x"]) == frozenset()


class TestSettling:
    async def test_late_or_at_once(self) -> None:
        writes = Writes()
        writes.writes.settle(*ANN, ["a"])
        writes.logs.late = True
        writes.writes.settle(*ANN, ["b"])
        writes.logs.answer()
        await writes.done()
        assert writes.logs.settled == [(*ANN, ("a",)), (*ANN, ("b",))]

    async def test_what_the_store_did_not_take_is_known_here_and_repeated(self) -> None:
        writes = Writes()
        writes.logs.down = True
        writes.writes.settle(*ANN, ["a"])
        writes.logs.down, writes.logs.late = False, True
        writes.writes.settle(*ANN, ["b"])
        writes.logs.answer(away())
        await writes.done()
        assert [writes.writes.is_unsettled(*ANN, id) for id in "abc"] == [True, True, False]
        writes.logs.late = False
        await writes.writes.retry()
        assert writes.logs.settled == [(*ANN, ("a", "b"))]
        assert not writes.writes.is_unsettled(*ANN, "a")

    async def test_one_that_fails_again_is_kept(self) -> None:
        writes = Writes()
        writes.logs.down = True
        writes.writes.settle(*ANN, ["a"])
        await writes.writes.retry()
        assert writes.writes.is_unsettled(*ANN, "a")

    def test_is_bounded(self) -> None:
        writes = Writes(max_waiting=2)
        writes.logs.down = True
        for user in ("ann", "bob", "cleo"):
            writes.writes.settle("acme", user, ["a"])
        known = [writes.writes.is_unsettled("acme", user, "a") for user in ("ann", "bob", "cleo")]
        assert known == [False, True, True]

    def test_is_bounded_by_what_is_settled_and_not_by_who(self) -> None:
        writes = Writes(max_waiting=2)
        writes.logs.down = True
        writes.writes.settle("acme", "ann", ["a", "b", "c"])
        assert [writes.writes.is_unsettled("acme", "ann", id) for id in "abc"] == [
            False,
            True,
            True,
        ]

    def test_without_a_queue_there_is_nothing_to_settle(self) -> None:
        writes = Writes(queue=False)
        writes.writes.settle(*ANN, ["a"])
        assert not writes.writes.is_unsettled(*ANN, "a")


class TestNotes:
    @pytest.mark.parametrize("kind", ["now", "future", "coroutine"])
    async def test_are_told_whenever_the_ledger_answers(self, kind: str) -> None:
        writes = Writes()
        writes.ledger.kind = kind
        writes.writes.note(writes.ledger.expect, "acme", "id", ("ann",))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert writes.ledger.expected == [("id", False)]

    @pytest.mark.parametrize("kind", ["now", "future", "coroutine"])
    async def test_that_are_lost_are_told(self, kind: str) -> None:
        writes = Writes()
        writes.ledger.kind, writes.ledger.error = kind, away()
        writes.writes.note(writes.ledger.expect, "acme", "id", ("ann",))
        for _ in range(3):
            await asyncio.sleep(0)
        assert [each.retry_after for each in writes.unavailable] == [1]

    async def test_a_fault_of_ours_is_seen(self) -> None:
        writes = Writes()
        writes.ledger.kind, writes.ledger.error = "future", ZeroDivisionError()
        seen: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context))
        writes.writes.note(writes.ledger.expect, "acme", "id", ("ann",))
        for _ in range(3):
            await asyncio.sleep(0)
        assert [type(each["exception"]) for each in seen] == [ZeroDivisionError]


class TestTheEnd:
    async def test_waits_for_what_is_under_way_and_tries_what_waits(self) -> None:
        writes = Writes()
        writes.logs.down = True
        anns, bobs = some(2), some(1)
        writes.give_back(*anns)
        writes.logs.down, writes.logs.late = False, True
        writes.give_back(*bobs, user_id="bob")
        finishing = asyncio.ensure_future(writes.writes.finish(5))
        await asyncio.sleep(0)
        writes.logs.late = False
        writes.logs.answer()
        assert await finishing == 0
        assert writes.logs.stored == {("acme", "bob"): ids(bobs), ANN: ids(anns)}

    async def test_counts_what_no_store_has(self) -> None:
        writes = Writes()
        writes.logs.down = True
        writes.give_back(*some(2))
        assert await writes.writes.finish(0.05) == 2

    async def test_asks_a_store_that_is_away_until_it_is_back(self) -> None:
        writes = Writes()
        writes.logs.down = True
        two = some(2)
        writes.give_back(*two)
        finishing = asyncio.ensure_future(writes.writes.finish(20))
        await asyncio.sleep(0)
        writes.logs.down = False
        assert await finishing == 0
        assert writes.logs.stored == {ANN: ids(two)}

    async def test_a_store_that_hangs_is_waited_for_no_longer(self) -> None:
        writes = Writes()
        writes.logs.late = True
        writes.give_back(*some(3))
        assert await writes.writes.finish(0.01) == 3
        writes.logs.answer()
        await writes.done()
