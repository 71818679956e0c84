"""Memory's logs, which the other backends are held against, held against plain lists."""

from __future__ import annotations

import asyncio
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from notifyd.notification import Notification, Priority
from notifyd.queue.base import Overflow, entry_bytes
from notifyd.queue.memory import MemoryUserLogs
from tests.unit.connected import Clock, a_notification

USERS = st.sampled_from(["ann", "bob", "cleo"])
NUMBERS = st.integers(0, 12)
TTL = 50


class Kept:
    """What a list has of a notification."""

    def __init__(self, number: int, offset: int, notification: Notification, until: float) -> None:
        self.number = number
        self.offset = offset
        self.notification = notification
        self.until = until


class UserLogsMachine(RuleBasedStateMachine):
    """Every step is done to both; what they answer must be the same."""

    @initialize(most=st.integers(1, 5), in_all=st.sampled_from([4, 1000]))
    def start(self, most: int, in_all: int) -> None:
        self.most, self.in_all = most, in_all
        self.clock = Clock()
        self.dropped = self.gave_up = 0
        self.lists: dict[str, list[Kept]] = {"ann": [], "bob": [], "cleo": []}
        # What each gave up, and whether that was told since.
        self.overflows: dict[str, tuple[int, bool]] = {}
        self.logs = MemoryUserLogs(
            max_size_per_user=most,
            max_messages=in_all,
            message_ttl_seconds=TTL,
            clock=self.clock,
            on_dropped=self.on_dropped,
        )

    def on_dropped(self) -> None:
        self.dropped += 1

    def alive(self, user: str) -> list[Kept]:
        return [each for each in self.lists[user] if each.until > self.clock.now]

    def is_full(self, user: str) -> bool:
        return len(self.lists[user]) >= self.most or self.all_kept() >= self.in_all

    def all_kept(self) -> int:
        return sum(map(len, self.lists.values()))

    def note_overflow(self, user: str) -> None:
        self.overflows[user] = (self.overflows.get(user, (0, False))[0] + 1, False)

    @rule(
        user=USERS,
        number=NUMBERS,
        priority=st.sampled_from(Priority),
        ttl=st.none() | st.integers(1, 80),
        owed=st.booleans(),
    )
    def enqueue(
        self, user: str, number: int, priority: Priority, ttl: int | None, owed: bool
    ) -> None:
        notification = a_notification(
            id=f"n{number}", priority=priority, ttl=ttl, now=self.clock.now
        )
        (answer,) = self.logs.enqueue("acme", [user], notification, owed=owed)
        kept = self.lists[user]
        # One that is dead does not stand in the way of the same notification, sent again.
        kept[:] = [each for each in kept if each.number != number or each.until > self.clock.now]
        expected = None
        if number not in [each.number for each in kept]:
            if self.is_full(user):
                kept[:] = self.alive(user)
            if self.is_full(user):
                least = min(
                    kept,
                    key=lambda each: (each.notification.priority.rank, each.offset),
                    default=None,
                )
                if least is None or priority.rank < least.notification.priority.rank:
                    expected = "queue_full"
                    if owed:
                        self.note_overflow(user)
                else:
                    kept.remove(least)
                    self.gave_up += 1
                    self.note_overflow(user)
            if expected is None:
                offset = max((each.offset for each in kept), default=0) + 1
                until = self.clock.now + min(TTL, TTL if ttl is None else ttl)
                kept.append(Kept(number, offset, notification, until))
        assert answer == expected

    @rule(user=USERS, max_bytes=st.integers(1, 1500))
    def read(self, user: str, max_bytes: int) -> None:
        found: list[Notification] = []
        told: Overflow | None = None
        cursor: int | None = 0
        while cursor is not None:
            page = self.logs.read("acme", user, after=cursor, max_bytes=max_bytes)
            told = told or page.overflow
            assert all(each.offset > cursor for each in page.entries)
            found += [each.notification for each in page.entries]
            assert (
                len(page.entries) <= 1
                or sum(entry_bytes(each.notification) for each in page.entries) <= max_bytes
            )
            assert page.cursor is None or page.cursor == page.entries[-1].offset
            cursor = page.cursor
        assert found == [each.notification for each in self.alive(user)]
        count, _ = self.overflows.get(user, (0, False))
        assert (0 if told is None else told.count) == count
        if count and found:
            self.overflows[user] = (count, True)
        else:
            self.overflows.pop(user, None)

    @rule(user=USERS, numbers=st.lists(NUMBERS, max_size=4), heard=st.booleans())
    def settle(self, user: str, numbers: list[int], heard: bool) -> None:
        ids = [f"n{number}" for number in numbers]
        settled = self.logs.settle("acme", user, ids, heard=heard)
        kept = self.lists[user]
        gone = {each.number for each in kept} & set(numbers)
        assert settled == {f"n{number}" for number in gone}
        kept[:] = [each for each in kept if each.number not in gone]
        if gone and heard and self.overflows.get(user, (0, False))[1]:
            del self.overflows[user]

    @rule(user=USERS)
    def erase(self, user: str) -> None:
        assert self.logs.erase("acme", user) == len(self.lists[user])
        self.lists[user].clear()
        self.overflows.pop(user, None)

    @rule()
    def expire(self) -> None:
        asyncio.run(self.logs.expire())
        for user, kept in self.lists.items():
            kept[:] = self.alive(user)

    @rule(seconds=st.integers(1, 30))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @invariant()
    def counts(self) -> None:
        assert self.logs.depth() == self.all_kept()
        assert self.dropped == self.gave_up

    @invariant()
    def tenants_are_apart(self) -> None:
        assert not self.logs.read("globex", "ann").entries


TestUserLogs: Any = UserLogsMachine.TestCase
TestUserLogs.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
