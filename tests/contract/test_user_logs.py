"""What `UserLogs` promises, whatever keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from notifyd.eventually import Eventually, settled
from notifyd.identifiers import new_uuid
from notifyd.notification import Notification, Priority
from notifyd.queue.base import Entry, Overflow, UserLogs, entry_bytes
from tests.contract.backends import Backend, Clock, a_notification


async def enqueue(
    logs: UserLogs, notification: Notification, *users: str, tenant: str = "acme"
) -> list[str | None]:
    return list(await settled(logs.enqueue(tenant, users or ("ann",), notification)))


async def fill(logs: UserLogs, count: int, user: str = "ann") -> list[Notification]:
    notifications = [a_notification() for _ in range(count)]
    for notification in notifications:
        assert await enqueue(logs, notification, user) == [None]
    return notifications


async def entries(logs: UserLogs, user: str = "ann", tenant: str = "acme") -> list[Entry]:
    """All pages of a user's log."""
    found: list[Entry] = []
    cursor: int | None = 0
    while cursor is not None:
        page = await settled(logs.read(tenant, user, after=cursor))
        found += page.entries
        cursor = page.cursor
    return found


async def ids(logs: UserLogs, user: str = "ann", tenant: str = "acme") -> list[str]:
    return [entry.notification.id for entry in await entries(logs, user, tenant)]


async def all_settled(calls: Sequence[Eventually[Any]]) -> list[Any]:
    """What calls answer that were made together."""
    answers = await asyncio.gather(*(settled(call) for call in calls))
    return [list(each) if isinstance(each, list | tuple) else each for each in answers]


async def overflow(logs: UserLogs, user: str = "ann") -> Overflow | None:
    return (await settled(logs.read("acme", user))).overflow


class TestStoring:
    async def test_entries_come_back_whole_and_in_order(self, backend: Backend) -> None:
        logs = await backend.logs()
        whole = a_notification(
            payload='{"text":"ä {\\"b\\"}","n":12345678901234567890.10}'.encode(),
            priority=Priority.HIGH,
            ttl=900,
            correlation_id="c",
            source="billing",
            require_ack=True,
        )
        plain = a_notification()
        for each in (whole, plain):
            await enqueue(logs, each)
        assert [entry.notification for entry in await entries(logs)] == [whole, plain]

    async def test_reading_removes_nothing(self, backend: Backend) -> None:
        logs = await backend.logs()
        stored = await fill(logs, 3)
        for _ in range(2):
            assert await ids(logs) == [each.id for each in stored]
        assert await settled(logs.depth()) == 3

    async def test_several_recipients_each_have_their_own(self, backend: Backend) -> None:
        logs = await backend.logs()
        notification = a_notification()
        assert await enqueue(logs, notification, "ann", "bob", "cleo") == [None, None, None]
        await settled(logs.settle("acme", "bob", [notification.id]))
        assert await ids(logs, "ann") == await ids(logs, "cleo") == [notification.id]
        assert await ids(logs, "bob") == []
        assert await settled(logs.depth()) == 2

    async def test_what_is_pending_already_is_not_stored_twice(self, backend: Backend) -> None:
        logs = await backend.logs(max_size_per_user=2)
        first, second = await fill(logs, 2)
        assert await enqueue(logs, first) == [None]
        assert await ids(logs) == [first.id, second.id]
        assert await settled(logs.depth()) == 2
        assert backend.told.dropped == 0

    async def test_tenants_are_apart(self, backend: Backend) -> None:
        logs = await backend.logs()
        here, there = a_notification(), a_notification()
        await enqueue(logs, here, tenant="acme")
        await enqueue(logs, there, tenant="globex")
        assert await ids(logs, tenant="acme") == [here.id]
        assert await ids(logs, tenant="globex") == [there.id]
        assert await settled(logs.settle("globex", "ann", [here.id])) == frozenset()
        assert await settled(logs.erase("globex", "ann")) == 1
        assert await ids(logs, tenant="acme") == [here.id]

    @pytest.mark.parametrize("user", ["a:b", "a*", "a/b", "{a}", "ä", " ", "x" * 256])
    async def test_any_user_id_is_only_itself(self, backend: Backend, user: str) -> None:
        logs = await backend.logs()
        notification = a_notification()
        await enqueue(logs, notification, user)
        await enqueue(logs, a_notification(), "ann")
        assert await ids(logs, user) == [notification.id]

    async def test_nobody_has_nothing(self, backend: Backend) -> None:
        logs = await backend.logs()
        page = await settled(logs.read("acme", "nobody"))
        assert (list(page.entries), page.cursor, page.overflow) == ([], None, None)
        assert await settled(logs.settle("acme", "nobody", [new_uuid()])) == frozenset()
        assert await settled(logs.erase("acme", "nobody")) == 0
        assert await settled(logs.depth()) == 0


class TestReadingMany:
    async def test_a_page_of_many_of_several_priorities_is_in_order(self, backend: Backend) -> None:
        """More than a store looks at in one go, of each priority."""
        logs = await backend.logs(max_size_per_user=1_000)
        priorities = [Priority.NORMAL, Priority.NORMAL, Priority.CRITICAL]
        stored = [a_notification(priority=priorities[n % 3]) for n in range(400)]
        await all_settled([logs.enqueue("acme", ["ann"], each) for each in stored])
        page = await settled(logs.read("acme", "ann", max_bytes=1 << 24))
        assert [entry.notification for entry in page.entries] == stored
        assert page.cursor is None
        assert await ids(logs) == [each.id for each in stored]


class TestAtOnce:
    """Calls that are made before those before them were answered are done in their order."""

    async def test_the_order_is_that_of_the_calls(self, backend: Backend) -> None:
        logs = await backend.logs()
        notifications = [a_notification() for _ in range(60)]
        calls = []
        for number, notification in enumerate(notifications):
            users = ["ann"] if number % 3 else ["bob", "ann", f"other-{number}"]
            calls.append(logs.enqueue("acme", users, notification))
            if number % 7 == 0:
                await asyncio.sleep(0)
        await all_settled(calls)
        assert await ids(logs) == [each.id for each in notifications]
        assert await ids(logs, "bob") == [each.id for each in notifications[::3]]

    async def test_what_is_sent_again_at_the_same_moment_is_judged_anew(
        self, backend: Backend
    ) -> None:
        """Nothing is called stored that is not."""
        logs = await backend.logs(max_size_per_user=1)
        low, normal = a_notification(priority=Priority.LOW), a_notification()
        calls = [logs.enqueue("acme", ["ann"], each) for each in (low, normal, low)]
        assert await all_settled(calls) == [[None], [None], ["queue_full"]]
        assert await ids(logs) == [normal.id]
        assert backend.told.dropped == 1

    async def test_what_is_being_stored_can_be_settled(self, backend: Backend) -> None:
        logs = await backend.logs()
        first, second = a_notification(), a_notification()
        calls: list[Any] = [
            logs.enqueue("acme", ["ann"], first),
            logs.settle("acme", "ann", [first.id]),
            logs.enqueue("acme", ["ann"], second),
        ]
        assert await all_settled(calls) == [[None], {first.id}, [None]]
        assert await ids(logs) == [second.id]
        assert await settled(logs.depth()) == 1

    async def test_erasing_takes_what_was_stored_before_it(self, backend: Backend) -> None:
        logs = await backend.logs()
        before, after = a_notification(), a_notification()
        calls: list[Any] = [
            logs.enqueue("acme", ["ann", "bob"], before),
            logs.erase("acme", "ann"),
            logs.enqueue("acme", ["ann"], after),
        ]
        assert await all_settled(calls) == [[None, None], 1, [None]]
        assert await ids(logs) == [after.id]
        assert await ids(logs, "bob") == [before.id]
        assert await settled(logs.depth()) == 2

    async def test_what_is_stored_again_for_want_of_an_answer_is_stored_once(
        self, backend: Backend
    ) -> None:
        logs = await backend.logs(max_size_per_user=2)
        one = a_notification()
        calls = [logs.enqueue("acme", ["ann", "bob"], one) for _ in range(3)]
        assert await all_settled(calls) == [[None, None]] * 3
        assert await ids(logs) == [one.id]
        assert await settled(logs.depth()) == 2

    async def test_who_gives_up_waiting_changes_nothing_for_others(self, backend: Backend) -> None:
        logs = await backend.logs()
        notifications = [a_notification() for _ in range(6)]
        calls = [asyncio.ensure_future(enqueue(logs, each, "ann", "bob")) for each in notifications]
        await asyncio.sleep(0)
        calls[2].cancel()
        await asyncio.wait(calls)
        found = await ids(logs)
        kept = [each.id for each in notifications if each.id in found]
        assert found == kept
        assert {each.id for each in notifications} - set(found) <= {notifications[2].id}
        assert await settled(logs.depth()) == len(found) + len(await ids(logs, "bob"))


class TestPages:
    async def test_a_page_has_one_entry_then_as_many_as_fit(self, backend: Backend) -> None:
        logs = await backend.logs()
        stored = [a_notification(payload=b'"%s"' % (b"x" * size)) for size in (500, 10, 10, 10)]
        for each in stored:
            await enqueue(logs, each)
        sizes = [entry_bytes(each) for each in stored]
        pages = []
        cursor: int | None = 0
        while cursor is not None:
            page = await settled(
                logs.read("acme", "ann", after=cursor, max_bytes=sizes[1] + sizes[2])
            )
            pages.append([entry.notification.id for entry in page.entries])
            assert page.cursor is None or page.cursor == page.entries[-1].offset
            cursor = page.cursor
        assert pages == [[stored[0].id], [stored[1].id, stored[2].id], [stored[3].id]]

    async def test_what_fits_exactly_is_one_page(self, backend: Backend) -> None:
        logs = await backend.logs()
        stored = await fill(logs, 3)
        size = sum(map(entry_bytes, stored))
        page = await settled(logs.read("acme", "ann", max_bytes=size))
        assert (len(page.entries), page.cursor) == (3, None)
        page = await settled(logs.read("acme", "ann", max_bytes=size - 1))
        assert (len(page.entries), page.cursor) == (2, page.entries[1].offset)

    async def test_settling_what_was_read_loses_nothing_that_follows(
        self, backend: Backend
    ) -> None:
        logs = await backend.logs()
        stored = await fill(logs, 4)
        one = entry_bytes(stored[0])
        page = await settled(logs.read("acme", "ann", max_bytes=2 * one))
        await settled(logs.settle("acme", "ann", [each.notification.id for each in page.entries]))
        assert page.cursor is not None
        late = await fill(logs, 1)
        rest = await settled(logs.read("acme", "ann", after=page.cursor))
        assert [entry.notification.id for entry in rest.entries] == [
            each.id for each in stored[2:] + late
        ]

    async def test_offsets_grow_even_over_an_empty_log(self, backend: Backend) -> None:
        logs = await backend.logs()
        stored = await fill(logs, 3)
        before = [entry.offset for entry in await entries(logs)]
        assert before == sorted(set(before))
        assert before[0] > 0
        await settled(logs.settle("acme", "ann", [each.id for each in stored]))
        assert await entries(logs) == []
        (new,) = await fill(logs, 1)
        page = await settled(logs.read("acme", "ann", after=before[-1]))
        assert [entry.notification.id for entry in page.entries] == [new.id]


class TestSettling:
    async def test_settles_once_and_says_what_was_pending(self, backend: Backend) -> None:
        logs = await backend.logs()
        first, second, third = await fill(logs, 3)
        unknown = new_uuid()
        wanted = [first.id, third.id, unknown, first.id]
        assert await settled(logs.settle("acme", "ann", wanted)) == {first.id, third.id}
        assert await settled(logs.settle("acme", "ann", wanted)) == frozenset()
        assert await ids(logs) == [second.id]
        assert await settled(logs.depth()) == 1

    async def test_of_nothing_is_nothing(self, backend: Backend) -> None:
        logs = await backend.logs()
        await fill(logs, 1)
        assert await settled(logs.settle("acme", "ann", [])) == frozenset()

    async def test_erasing_forgets_one_user(self, backend: Backend) -> None:
        logs = await backend.logs()
        await fill(logs, 3, "ann")
        await fill(logs, 2, "bob")
        assert await settled(logs.erase("acme", "ann")) == 3
        assert await settled(logs.erase("acme", "ann")) == 0
        assert (await ids(logs, "ann"), len(await ids(logs, "bob"))) == ([], 2)
        assert await settled(logs.depth()) == 2


class TestOverflow:
    async def test_lowest_first_then_oldest_and_critical_last(self, backend: Backend) -> None:
        logs = await backend.logs(max_size_per_user=4)
        order = [Priority.CRITICAL, Priority.NORMAL, Priority.LOW, Priority.NORMAL]
        critical, normal, low, newer = (a_notification(priority=each) for each in order)
        for each in (critical, normal, low, newer):
            await enqueue(logs, each)
        remaining = [[critical, normal, newer], [critical, newer], [critical]]
        came: list[Notification] = []
        for kept in remaining:
            came.append(a_notification(priority=Priority.CRITICAL))
            assert await enqueue(logs, came[-1]) == [None]
            assert await ids(logs) == [each.id for each in kept + came]
        last = a_notification(priority=Priority.CRITICAL)
        assert await enqueue(logs, last) == [None]
        assert await ids(logs) == [each.id for each in [*came, last]]
        assert backend.told.dropped == 4
        assert await settled(logs.depth()) == 4

    async def test_the_new_one_may_be_the_least(self, backend: Backend) -> None:
        logs = await backend.logs(max_size_per_user=1)
        high = a_notification(priority=Priority.HIGH)
        await enqueue(logs, high)
        for priority in (Priority.NORMAL, Priority.LOW):
            low = a_notification(priority=priority)
            assert await enqueue(logs, low) == ["queue_full"]
        assert await ids(logs) == [high.id]
        assert await overflow(logs) is None

    async def test_the_new_one_is_told_where_it_was_owed(self, backend: Backend) -> None:
        logs = await backend.logs(max_size_per_user=2)
        high = [a_notification(priority=Priority.HIGH) for _ in range(2)]
        for each in high:
            await enqueue(logs, each)
        offsets = [entry.offset for entry in await entries(logs)]
        calls = [
            logs.enqueue("acme", ["ann", "bob"], a_notification(priority=Priority.LOW), owed=True)
            for _ in range(2)
        ]
        assert await all_settled(calls) == [["queue_full", None]] * 2
        assert await enqueue(logs, a_notification(priority=Priority.LOW)) == ["queue_full"]
        page = await settled(logs.read("acme", "ann"))
        assert [entry.notification.id for entry in page.entries] == [each.id for each in high]
        assert page.overflow is not None
        assert page.overflow.count == 2
        assert offsets[-1] < page.overflow.first < page.overflow.last
        assert await overflow(logs, "bob") is None
        # He who sent it counts it, and not the log, which never had it.
        assert backend.told.dropped == 0
        last = page.overflow.last
        await settled(logs.settle("acme", "ann", [each.id for each in high]))
        (later,) = await fill(logs, 1)
        assert [each.offset > last for each in await entries(logs)] == [True]
        assert await ids(logs) == [later.id]

    async def test_what_was_owed_and_pending_already_is_not_refused(self, backend: Backend) -> None:
        logs = await backend.logs(max_size_per_user=1)
        (stored,) = await fill(logs, 1)
        assert list(await settled(logs.enqueue("acme", ["ann"], stored, owed=True))) == [None]
        assert await overflow(logs) is None

    async def test_of_equals_the_oldest_goes(self, backend: Backend) -> None:
        logs = await backend.logs(max_size_per_user=2)
        stored = await fill(logs, 3)
        assert await ids(logs) == [each.id for each in stored[1:]]

    async def test_is_told_with_its_count_and_range_until_who_was_told_settles_something(
        self, backend: Backend
    ) -> None:
        logs = await backend.logs(max_size_per_user=3)
        await fill(logs, 3)
        offsets = [entry.offset for entry in await entries(logs)]
        await fill(logs, 2)
        page = await settled(logs.read("acme", "ann"))
        assert page.overflow == Overflow(2, offsets[0], offsets[1])
        assert len(page.entries) == 3
        # Whoever read it may have died before he heard of it.
        assert await overflow(logs) == page.overflow
        await settled(logs.settle("acme", "ann", [new_uuid()], heard=True))
        assert await overflow(logs) == page.overflow
        await settled(logs.settle("acme", "ann", [page.entries[0].notification.id]))
        # Another device confirmed that one.
        assert await overflow(logs) == page.overflow
        await settled(logs.settle("acme", "ann", [page.entries[-1].notification.id], heard=True))
        assert await overflow(logs) is None
        await fill(logs, 3)
        told = await overflow(logs)
        assert told is not None
        assert told.count == 1

    async def test_settling_forgets_only_what_was_told(self, backend: Backend) -> None:
        logs = await backend.logs(max_size_per_user=2)
        stored = await fill(logs, 3)
        await settled(logs.settle("acme", "ann", [stored[1].id], heard=True))
        first = await overflow(logs)
        assert first is not None
        more = await fill(logs, 2)
        await settled(logs.settle("acme", "ann", [more[0].id], heard=True))
        told = await overflow(logs)
        assert told is not None
        assert (told.count, told.first) == (2, first.first)
        await settled(logs.settle("acme", "ann", [more[1].id], heard=True))
        assert await overflow(logs) is None

    async def test_is_told_by_the_first_page_only(self, backend: Backend) -> None:
        logs = await backend.logs(max_size_per_user=3)
        stored = await fill(logs, 4)
        first = (await entries_without_telling(logs, stored))[0].offset
        later = await settled(logs.read("acme", "ann", after=first))
        assert later.overflow is None
        assert await overflow(logs) is not None

    async def test_is_told_even_where_nothing_is_left(self, backend: Backend) -> None:
        logs = await backend.logs(max_size_per_user=2)
        stored = await fill(logs, 3)
        await settled(logs.settle("acme", "ann", [each.id for each in stored]))
        told = await overflow(logs)
        assert told is not None
        assert told.count == 1
        assert await overflow(logs) is None

    async def test_each_users_own(self, backend: Backend) -> None:
        logs = await backend.logs(max_size_per_user=1)
        await fill(logs, 2, "ann")
        await fill(logs, 1, "bob")
        assert await overflow(logs, "bob") is None
        assert await overflow(logs, "ann") is not None

    async def test_one_full_log_of_several(self, backend: Backend) -> None:
        logs = await backend.logs(max_size_per_user=1)
        await enqueue(logs, a_notification(priority=Priority.CRITICAL), "ann")
        notification = a_notification()
        assert await enqueue(logs, notification, "ann", "bob") == ["queue_full", None]
        assert await ids(logs, "bob") == [notification.id]

    async def test_the_bound_over_all_users(self, backend: Backend) -> None:
        logs = await backend.logs(max_messages=3)
        await fill(logs, 2, "ann")
        (kept,) = await fill(logs, 1, "bob")
        assert await enqueue(logs, a_notification(), "cleo") == ["queue_full"]
        # Who has some gives up his own.
        (newer,) = await fill(logs, 1, "bob")
        assert await ids(logs, "bob") == [newer.id]
        assert kept.id not in await ids(logs, "bob")
        assert len(await ids(logs, "ann")) == 2
        assert await settled(logs.depth()) == 3
        await settled(logs.erase("acme", "ann"))
        await fill(logs, 2, "cleo")
        assert await settled(logs.depth()) == 3
        # Who has none is told what he was owed.
        owed = logs.enqueue("acme", ["dora"], a_notification(), owed=True)
        assert list(await settled(owed)) == ["queue_full"]
        told = await overflow(logs, "dora")
        assert told is not None
        assert told.count == 1
        assert await settled(logs.depth()) == 3

    async def test_what_is_dead_makes_room_before_what_is_alive(
        self, backend: Backend, clock: Clock
    ) -> None:
        logs = await backend.logs(max_size_per_user=2)
        alive = a_notification(priority=Priority.LOW)
        dead = a_notification(priority=Priority.CRITICAL, ttl=10)
        for each in (dead, alive):
            await enqueue(logs, each)
        clock.now += 20
        new = a_notification(priority=Priority.LOW, now=clock.now)
        assert await enqueue(logs, new) == [None]
        assert await ids(logs) == [alive.id, new.id]
        assert await overflow(logs) is None
        assert backend.told.dropped == 0
        assert await settled(logs.depth()) == 2
        assert await settled(logs.expire()) == 1


async def entries_without_telling(logs: UserLogs, stored: list[Notification]) -> list[Entry]:
    """A user's entries, read from behind the first, which tells no overflow."""
    page = await settled(logs.read("acme", "ann", after=1))
    assert {entry.notification.id for entry in page.entries} <= {each.id for each in stored}
    return list(page.entries)


class TestExpiry:
    async def test_by_its_own_ttl(self, backend: Backend, clock: Clock) -> None:
        logs = await backend.logs()
        short, long = a_notification(ttl=10), a_notification(ttl=20)
        for each in (short, long):
            await enqueue(logs, each)
        clock.now += 10
        assert await ids(logs) == [long.id]
        assert await settled(logs.expire()) == 1
        assert await settled(logs.depth()) == 1
        clock.now += 10
        assert await ids(logs) == []
        assert await settled(logs.expire()) == 1
        assert await settled(logs.depth()) == 0

    async def test_by_the_queues_ttl_from_when_it_was_stored(
        self, backend: Backend, clock: Clock
    ) -> None:
        logs = await backend.logs(message_ttl_seconds=100)
        sent = a_notification(ttl=10_000)
        clock.now += 500
        await enqueue(logs, sent)
        clock.now += 99
        assert await ids(logs) == [sent.id]
        clock.now += 1
        assert await ids(logs) == []
        assert await settled(logs.expire()) == 1

    async def test_nothing_to_expire(self, backend: Backend) -> None:
        logs = await backend.logs()
        await fill(logs, 2)
        assert await settled(logs.expire()) == 0
        assert await settled(logs.depth()) == 2

    async def test_is_no_overflow(self, backend: Backend, clock: Clock) -> None:
        logs = await backend.logs()
        await enqueue(logs, a_notification(ttl=1))
        clock.now += 2
        await settled(logs.expire())
        assert await overflow(logs) is None

    async def test_of_many_users(self, backend: Backend, clock: Clock) -> None:
        logs = await backend.logs()
        users = [f"user-{n}" for n in range(1200)]
        await enqueue(logs, a_notification(ttl=10), *users)
        await enqueue(logs, a_notification(), "user-7")
        clock.now += 20
        assert await settled(logs.expire()) == 1200
        assert await settled(logs.depth()) == 1
