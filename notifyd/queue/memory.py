"""User logs and the ledger in this process's memory: the default, and gone with the process."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from notifyd.notification import Notification
from notifyd.queue.base import (
    AckReport,
    AckStats,
    Confirmation,
    Entry,
    Overflow,
    Page,
    Rejection,
    entry_bytes,
)

LEDGER_RETENTION_SECONDS = 3600
ACK_TIME_SAMPLES = 1024
LOGS_PER_TURN = 500
RECORDS_PER_TURN = 1000


class _Stored:
    __slots__ = ("entry", "expires_at")

    def __init__(self, entry: Entry, expires_at: float) -> None:
        self.entry = entry
        self.expires_at = expires_at


class _Log:
    """One user's pending entries, by notification id in the order of their offsets."""

    __slots__ = ("entries", "next_offset", "overflow")

    def __init__(self, next_offset: int) -> None:
        self.entries: dict[str, _Stored] = {}
        self.next_offset = next_offset
        self.overflow: Overflow | None = None


class MemoryUserLogs:
    """`UserLogs` in dictionaries. Bounded by `max_size_per_user` and `max_messages`."""

    def __init__(
        self,
        *,
        max_size_per_user: int,
        max_messages: int,
        message_ttl_seconds: float,
        clock: Callable[[], float],
        on_dropped: Callable[[], None],
    ) -> None:
        self.epoch = secrets.token_hex(4)
        self._max_size_per_user = max_size_per_user
        self._max_messages = max_messages
        self._message_ttl_seconds = message_ttl_seconds
        self._clock = clock
        self._on_dropped = on_dropped
        self._logs: dict[tuple[str, str], _Log] = {}
        # A log that is empty is forgotten; its user's next one begins above all that there were, so
        # that no cursor stands beyond it.
        self._last_offset = 0
        self._depth = 0
        self._expired_uncounted = 0

    def enqueue(
        self, tenant: str, recipients: Sequence[str], notification: Notification
    ) -> Sequence[Rejection | None]:
        """See `UserLogs.enqueue`. A notification that is pending already is not stored twice."""
        expires_at = self._clock() + self._message_ttl_seconds
        if notification.expires_at is not None:
            expires_at = min(expires_at, notification.expires_at)
        return [self._store(tenant, user_id, notification, expires_at) for user_id in recipients]

    def _store(
        self, tenant: str, user_id: str, notification: Notification, expires_at: float
    ) -> Rejection | None:
        log = self._logs.get((tenant, user_id))
        if log is None:
            if self._depth >= self._max_messages:
                return "queue_full"
            log = self._logs[(tenant, user_id)] = _Log(self._last_offset + 1)
        elif notification.id in log.entries:
            return None
        if self._full(log):
            # What is dead already makes room before what is alive.
            self._expired_uncounted += self._drop_expired(log, self._clock())
            if self._full(log) and not self._give_up_one(log, notification):
                return "queue_full"
        log.entries[notification.id] = _Stored(Entry(log.next_offset, notification), expires_at)
        self._last_offset = max(self._last_offset, log.next_offset)
        log.next_offset += 1
        self._depth += 1
        return None

    def _full(self, log: _Log) -> bool:
        return len(log.entries) >= self._max_size_per_user or self._depth >= self._max_messages

    def _drop_expired(self, log: _Log, now: float) -> int:
        late = [id for id, stored in log.entries.items() if stored.expires_at <= now]
        for id in late:
            del log.entries[id]
        self._depth -= len(late)
        return len(late)

    def _give_up_one(self, log: _Log, newcomer: Notification) -> bool:
        """Make room below the newcomer's priority or at it; False where it is the least itself."""
        if not log.entries:
            return False
        least = min(stored.entry.notification.priority.rank for stored in log.entries.values())
        if newcomer.priority.rank < least:
            return False
        victim = next(
            stored.entry
            for stored in log.entries.values()
            if stored.entry.notification.priority.rank == least
        )
        del log.entries[victim.notification.id]
        self._depth -= 1
        told = log.overflow
        log.overflow = (
            Overflow(1, victim.offset, victim.offset)
            if told is None
            else Overflow(
                told.count + 1, min(told.first, victim.offset), max(told.last, victim.offset)
            )
        )
        self._on_dropped()
        return True

    def read(self, tenant: str, user_id: str, *, after: int = 0, max_bytes: int = 65536) -> Page:
        """See `UserLogs.read`."""
        log = self._logs.get((tenant, user_id))
        if log is None:
            return Page(())
        now = self._clock()
        overflow = None
        if after == 0:
            overflow, log.overflow = log.overflow, None
        page: list[Entry] = []
        size = 0
        for stored in log.entries.values():
            entry = stored.entry
            if entry.offset <= after or stored.expires_at <= now:
                continue
            size += entry_bytes(entry.notification)
            if page and size > max_bytes:
                return Page(page, page[-1].offset, overflow)
            page.append(entry)
        self._forget_if_empty(tenant, user_id, log)
        return Page(page, None, overflow)

    def settle(self, tenant: str, user_id: str, ids: Sequence[str]) -> frozenset[str]:
        """See `UserLogs.settle`."""
        log = self._logs.get((tenant, user_id))
        if log is None:
            return frozenset()
        found = frozenset(id for id in ids if log.entries.pop(id, None) is not None)
        self._depth -= len(found)
        self._forget_if_empty(tenant, user_id, log)
        return found

    def _forget_if_empty(self, tenant: str, user_id: str, log: _Log) -> None:
        if not log.entries and log.overflow is None:
            self._logs.pop((tenant, user_id), None)

    def erase(self, tenant: str, user_id: str) -> int:
        """See `UserLogs.erase`."""
        log = self._logs.pop((tenant, user_id), None)
        if log is None:
            return 0
        self._depth -= len(log.entries)
        return len(log.entries)

    async def expire(self) -> int:
        """See `UserLogs.expire`. Yields to the event loop on the way; cancelled, it has done a
        part.
        """
        now = self._clock()
        expired, self._expired_uncounted = self._expired_uncounted, 0
        for visited, ((tenant, user_id), log) in enumerate(list(self._logs.items())):
            # Not one that was erased meanwhile: its entries are counted off already.
            if self._logs.get((tenant, user_id)) is log:
                expired += self._drop_expired(log, now)
                self._forget_if_empty(tenant, user_id, log)
            if visited % LOGS_PER_TURN == LOGS_PER_TURN - 1:
                await asyncio.sleep(0)
        return expired

    def depth(self) -> int:
        """See `UserLogs.depth`."""
        return self._depth


class _Record:
    """What the ledger knows of one notification.

    `recipients` maps a user to when he was sent it (Unix seconds; he is pending), or to what became
    of it; `pending` counts the former. `anyone` marks a notification that expects nobody in
    particular.
    """

    __slots__ = ("acks", "anyone", "pending", "recipients", "sent_at")

    def __init__(self, sent_at: float, *, anyone: bool) -> None:
        self.sent_at = sent_at
        self.recipients: dict[str, float | Confirmation] = {}
        self.pending = 0
        self.anyone = anyone
        self.acks = 0


class MemoryAckLedger:
    """`AckLedger` in dictionaries.

    Bounded by `max_pending` recipients over all notifications: the oldest notification is let go of
    first, and every one an hour after it was sent.
    """

    def __init__(
        self,
        *,
        timeout_seconds: float,
        max_pending: int,
        clock: Callable[[], float],
        on_acknowledged: Callable[[float], None],
        on_expired: Callable[[int], None],
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._max_pending = max_pending
        self._clock = clock
        self._on_acknowledged = on_acknowledged
        self._on_expired = on_expired
        self._records: dict[tuple[str, str], _Record] = {}
        self._order: deque[tuple[str, str]] = deque()
        self._sent: deque[tuple[float, tuple[str, str], Sequence[str]]] = deque()
        self._size = 0
        self._pending = 0
        self._acknowledged = 0
        self._expired = 0
        self._total_seconds = 0.0
        self._recent_seconds: deque[float] = deque(maxlen=ACK_TIME_SAMPLES)

    def _record(
        self, tenant: str, notification_id: str, now: float, *, anyone: bool = False
    ) -> _Record:
        key = (tenant, notification_id)
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = _Record(now, anyone=anyone)
            self._order.append(key)
            self._size += 1
        return record

    def expect(
        self, tenant: str, notification_id: str, recipients: Sequence[str], *, queued: bool = False
    ) -> None:
        """See `AckLedger.expect`."""
        now = self._clock()
        key = (tenant, notification_id)
        if not queued and key not in self._records:
            # By far the most common case, and the hot path: nobody is known of it yet.
            record = self._records[key] = _Record(now, anyone=False)
            record.recipients = dict.fromkeys(recipients, now)
            record.pending = len(record.recipients)
            self._pending += record.pending
            self._size += 1 + record.pending
            self._order.append(key)
            self._sent.append((now, key, recipients))
            if self._size > self._max_pending:
                self._let_go_of_the_oldest()
            return
        record = self._record(tenant, notification_id, now)
        known = record.recipients
        before = len(known)
        if queued:
            for user_id in recipients:
                if not isinstance(known.get(user_id), Confirmation):
                    self._no_more_pending(record, user_id in known)
                    known[user_id] = Confirmation(user_id, "queued")
        else:
            sent = [
                user_id
                for user_id in recipients
                if not (
                    isinstance(state := known.get(user_id), Confirmation)
                    and state.state == "confirmed"
                )
            ]
            more = len(sent) - sum(isinstance(known.get(user_id), float) for user_id in sent)
            self._no_more_pending(record, -more)
            known.update(dict.fromkeys(sent, now))
            self._sent.append((now, key, sent))
        self._size += len(known) - before
        if self._size > self._max_pending:
            self._let_go_of_the_oldest()

    def expect_anyone(self, tenant: str, notification_id: str) -> None:
        """See `AckLedger.expect_anyone`."""
        self._record(tenant, notification_id, self._clock(), anyone=True)
        if self._size > self._max_pending:
            self._let_go_of_the_oldest()

    def acknowledge(self, tenant: str, user_id: str, ids: Sequence[str]) -> frozenset[str]:
        """See `AckLedger.acknowledge`."""
        now = self._clock()
        known = set()
        for notification_id in ids:
            record = self._records.get((tenant, notification_id))
            if record is None:
                continue
            if record.anyone:
                record.acks += 1
                self._count(now - record.sent_at)
            elif not self._confirm(record, user_id, now, "ack"):
                continue
            known.add(notification_id)
        return frozenset(known)

    def confirm(self, tenant: str, user_id: str, ids: Sequence[str]) -> None:
        """See `AckLedger.confirm`."""
        now = self._clock()
        for notification_id in ids:
            record = self._records.get((tenant, notification_id))
            if record is not None:
                self._confirm(record, user_id, now, "transport")

    def _confirm(
        self, record: _Record, user_id: str, now: float, by: Literal["ack", "transport"]
    ) -> bool:
        """Whether this user was expected; what he confirmed before counts once."""
        state = record.recipients.get(user_id)
        if state is None:
            return False
        if isinstance(state, Confirmation):
            if state.state == "confirmed" and (state.by == "ack" or by == "transport"):
                return True
        else:
            self._no_more_pending(record, 1)
        record.recipients[user_id] = Confirmation(user_id, "confirmed", now, by)
        if by == "ack":
            self._count(now - (state if isinstance(state, float) else record.sent_at))
        return True

    def _count(self, seconds: float) -> None:
        self._acknowledged += 1
        self._total_seconds += seconds
        self._recent_seconds.append(seconds)
        self._on_acknowledged(seconds)

    def report(self, tenant: str, notification_id: str) -> AckReport | None:
        """See `AckLedger.report`."""
        record = self._records.get((tenant, notification_id))
        if record is None:
            return None
        recipients = [
            state if isinstance(state, Confirmation) else Confirmation(user_id, "pending")
            for user_id, state in record.recipients.items()
        ]
        return AckReport(notification_id, record.sent_at, recipients, record.acks)

    async def expire(self) -> int:
        """See `AckLedger.expire`. Yields to the event loop on the way; cancelled, it has done a
        part.
        """
        now = self._clock()
        total = 0
        while self._sent and self._sent[0][0] + self._timeout_seconds <= now:
            sent_at, key, recipients = self._sent.popleft()
            record = self._records.get(key)
            if record is None:
                continue
            late = [user_id for user_id in recipients if record.recipients.get(user_id) == sent_at]
            for user_id in late:
                record.recipients[user_id] = Confirmation(user_id, "expired")
            self._no_more_pending(record, len(late))
            self._count_expired(len(late))
            total += len(late)
            if len(self._sent) % RECORDS_PER_TURN == 0:
                await asyncio.sleep(0)
        while self._order:
            record = self._records[self._order[0]]
            if record.sent_at + LEDGER_RETENTION_SECONDS > now:
                break
            self._let_go(self._order.popleft())
            if len(self._order) % RECORDS_PER_TURN == 0:
                await asyncio.sleep(0)
        return total

    def _let_go_of_the_oldest(self) -> None:
        while self._size > self._max_pending and self._order:
            self._let_go(self._order.popleft())
        # Entries of notifications that are gone; without this they would outlive the bound.
        while self._sent and self._sent[0][1] not in self._records:
            self._sent.popleft()

    def _let_go(self, key: tuple[str, str]) -> None:
        record = self._records.pop(key)
        self._size -= 1 + len(record.recipients)
        if record.pending:
            self._pending -= record.pending
            self._count_expired(record.pending)

    def _no_more_pending(self, record: _Record, count: int) -> None:
        record.pending -= count
        self._pending -= count

    def _count_expired(self, count: int) -> None:
        if count:
            self._expired += count
            self._on_expired(count)

    def stats(self) -> AckStats:
        """See `AckLedger.stats`."""
        recent = sorted(self._recent_seconds)
        return AckStats(
            pending=self._pending,
            acknowledged=self._acknowledged,
            expired=self._expired,
            average_ms=self._total_seconds / self._acknowledged * 1000
            if self._acknowledged
            else None,
            p95_ms=recent[int(len(recent) * 0.95)] * 1000 if recent else None,
        )
