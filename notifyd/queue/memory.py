"""User logs and the ledger in this process's memory: the default, and gone with the process."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Literal

import msgspec

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
SEVERAL = ""
ACK_TIME_SAMPLES = 1024
LOGS_PER_TURN = 500
RECORDS_PER_TURN = 1000
CONFIRMED_AT_ONCE = 128


class _Stored(Entry, frozen=True, gc=False):
    """An entry, and when it is dead (Unix seconds). One object and not two, and nothing for the
    garbage collector to walk through: there may be millions."""

    expires_at: float


class _Log:
    """One user's pending entries, by notification id in the order of their offsets."""

    __slots__ = ("entries", "next_offset", "overflow", "told")

    def __init__(self, next_offset: int) -> None:
        self.entries: dict[str, _Stored] = {}
        self.next_offset = next_offset
        self.overflow: Overflow | None = None
        self.told = False

    def gave_up(self, offset: int) -> None:
        before = self.overflow or Overflow(0, offset, offset)
        self.overflow = Overflow(
            before.count + 1, min(before.first, offset), max(before.last, offset)
        )
        self.told = False


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
        self,
        tenant: str,
        recipients: Sequence[str],
        notification: Notification,
        *,
        owed: bool = False,
    ) -> Sequence[Rejection | None]:
        """See `UserLogs.enqueue`. A notification that is pending already is not stored twice."""
        expires_at = self._clock() + self._message_ttl_seconds
        if notification.expires_at is not None:
            expires_at = min(expires_at, notification.expires_at)
        answers = [self._store(tenant, user_id, notification, expires_at) for user_id in recipients]
        if owed:
            for user_id, rejection in zip(recipients, answers, strict=True):
                if rejection is not None:
                    self._note_refused(tenant, user_id)
        return answers

    def _store(
        self, tenant: str, user_id: str, notification: Notification, expires_at: float
    ) -> Rejection | None:
        log = self._logs.get((tenant, user_id))
        if log is None:
            if self._depth >= self._max_messages:
                return "queue_full"
            log = self._logs[(tenant, user_id)] = _Log(self._last_offset + 1)
        elif (pending := log.entries.get(notification.id)) is not None:
            if pending.expires_at > self._clock():
                return None
            # One that is dead is no reason not to store it anew.
            del log.entries[notification.id]
            self._depth -= 1
            self._expired_uncounted += 1
        if self._full(log):
            # What is dead already makes room before what is alive.
            self._expired_uncounted += self._drop_expired(log, self._clock())
            if self._full(log) and not self._give_up_one(log, notification):
                return "queue_full"
        offset = log.next_offset
        log.entries[notification.id] = _Stored(offset, notification, expires_at)
        log.next_offset = offset + 1
        self._last_offset = max(self._last_offset, offset)
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
        least = min(entry.notification.priority.rank for entry in log.entries.values())
        if newcomer.priority.rank < least:
            return False
        victim = next(
            entry for entry in log.entries.values() if entry.notification.priority.rank == least
        )
        del log.entries[victim.notification.id]
        self._depth -= 1
        log.gave_up(victim.offset)
        self._on_dropped()
        return True

    def _note_refused(self, tenant: str, user_id: str) -> None:
        log = self._logs.get((tenant, user_id))
        if log is None:
            if len(self._logs) >= self._max_messages:
                return
            log = self._logs[(tenant, user_id)] = _Log(self._last_offset + 1)
        log.gave_up(log.next_offset)
        self._last_offset = max(self._last_offset, log.next_offset)
        log.next_offset += 1

    def read(self, tenant: str, user_id: str, *, after: int = 0, max_bytes: int = 65536) -> Page:
        """See `UserLogs.read`."""
        log = self._logs.get((tenant, user_id))
        if log is None:
            return Page(())
        now = self._clock()
        overflow = None
        if after == 0:
            overflow = log.overflow
            log.told = True
        page: list[Entry] = []
        size = 0
        for entry in log.entries.values():
            if entry.offset <= after or entry.expires_at <= now:
                continue
            size += entry_bytes(entry.notification)
            if page and size > max_bytes:
                return Page(page, page[-1].offset, overflow)
            page.append(entry)
        if after == 0 and not page:
            log.overflow = None
        self._forget_if_empty(tenant, user_id, log)
        return Page(page, None, overflow)

    def settle(
        self, tenant: str, user_id: str, ids: Sequence[str], *, heard: bool = False
    ) -> frozenset[str]:
        """See `UserLogs.settle`."""
        log = self._logs.get((tenant, user_id))
        if log is None:
            return frozenset()
        found = frozenset(id for id in ids if log.entries.pop(id, None) is not None)
        self._depth -= len(found)
        if found and heard and log.told:
            log.overflow = None
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


class _Recipient(msgspec.Struct, gc=False):
    """Who is expected to confirm, and whether he has. `recorded_at` is when the ledger first heard
    of the notification, `sent_at` when it was sent to him last (Unix seconds).

    Most notifications have one recipient, who is then all that the ledger keeps of them. Those of
    several who stand alike share one of these, with SEVERAL in the place of the user id; it is
    replaced for one of them, and never changed. What is shared by those of several notifications
    says nothing of when those were recorded and sent.
    """

    user_id: str
    recorded_at: float
    sent_at: float
    state: Literal["queued", "pending", "confirmed", "expired"]
    confirmed_at: float | None = None
    by: Literal["ack", "transport"] | None = None


class _Recipients(msgspec.Struct, gc=False):
    """A notification with several recipients, by user id. `pending` is what those share who were
    sent it in the beginning.
    """

    recorded_at: float
    by_user: dict[str, _Recipient]
    pending: _Recipient

    def own(self, user_id: str) -> _Recipient | None:
        """What is known of one of them, in a record that is shared with nobody."""
        recipient = self.by_user.get(user_id)
        if recipient is not None and recipient.user_id == SEVERAL:
            recipient = msgspec.structs.replace(
                recipient, user_id=user_id, recorded_at=self.recorded_at
            )
            self.by_user[user_id] = recipient
        return recipient


_NOBODY = _Recipient(SEVERAL, 0, 0, "queued")


class _Anyone(msgspec.Struct, gc=False):
    """A notification that expects nobody in particular."""

    recorded_at: float
    acks: int = 0


_Record = _Recipient | _Recipients | _Anyone


class MemoryAckLedger:
    """`AckLedger` in dictionaries.

    Bounded by `max_pending` recipients over all notifications: beyond it the oldest notifications
    are let go of, up to a 128th of them at once, and every one an hour after it was sent.
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
        # Nobody is let go of before he is late.
        self._retention = max(LEDGER_RETENTION_SECONDS, timeout_seconds)
        self._max_pending = max_pending
        # Where it is full, a part is let go of at once: most calls then find room.
        self._room = max_pending - max_pending // 128
        self._clock = clock
        self._on_acknowledged = on_acknowledged
        self._on_expired = on_expired
        self._records: dict[tuple[str, str], _Record] = {}
        self._order: deque[tuple[str, str]] = deque()
        # What was sent, and when: two columns, so that nothing is made for a row.
        self._sent: deque[tuple[str, str]] = deque()
        self._sent_at: deque[float] = deque()
        self._size = 0
        self._pending = 0
        self._acknowledged = 0
        self._expired = 0
        self._total_seconds = 0.0
        # Those who were sent the same confirm the same one after the other. What was confirmed
        # last, its records, and who did it is noted here, until there are many or others ask.
        self._confirmed_ids: tuple[str, ...] | None = None
        self._confirmed_tenant = ""
        self._confirmed: list[_Record] = []
        self._confirmed_by: list[tuple[str, _Recipient]] = []
        self._recent_seconds: deque[float] = deque(maxlen=ACK_TIME_SAMPLES)

    def expect(
        self, tenant: str, notification_id: str, recipients: Sequence[str], *, queued: bool = False
    ) -> None:
        """See `AckLedger.expect`."""
        now = self._clock()
        key = (tenant, notification_id)
        record = self._records.get(key)
        if record is None:
            state: Literal["queued", "pending"] = "queued" if queued else "pending"
            if len(recipients) == 1:
                count = 1
                record = _Recipient(recipients[0], now, now, state)
            else:
                shared = _Recipient(SEVERAL, now, now, state)
                by_user = dict.fromkeys(recipients, shared)
                count = len(by_user)
                record = _Recipients(now, by_user, _NOBODY if queued else shared)
            self._keep(key, record, 1 + count)
            if not queued:
                self._pending += count
        elif not isinstance(record, _Anyone):
            self._expect_more(key, record, recipients, now, queued=queued)
        if not queued:
            self._sent.append(key)
            self._sent_at.append(now)

    def expect_each(self, tenant: str, sent: Sequence[tuple[str, str]]) -> None:
        """See `AckLedger.expect_each`."""
        now = self._clock()
        records = self._records
        new = []
        for notification_id, user_id in sent:
            key = (tenant, notification_id)
            if key in records:
                self.expect(tenant, notification_id, (user_id,))
            else:
                records[key] = _Recipient(user_id, now, now, "pending")
                new.append(key)
        self._order += new
        self._sent += new
        self._sent_at += repeat(now, len(new))
        self._pending += len(new)
        self._size += 2 * len(new)
        if self._size > self._max_pending:
            self._let_go_of_the_oldest()

    def resent(self, tenant: str, user_id: str, ids: Sequence[str]) -> None:
        """See `AckLedger.resent`."""
        self.expect_each(tenant, [(id, user_id) for id in ids])

    def note_resent(self, tenant: str, ids: Sequence[str]) -> None:
        """Nothing is left for later."""

    def expect_anyone(self, tenant: str, notification_id: str) -> None:
        """See `AckLedger.expect_anyone`."""
        key = (tenant, notification_id)
        if key not in self._records:
            self._keep(key, _Anyone(self._clock()), 1)

    def _keep(self, key: tuple[str, str], record: _Record, size: int) -> None:
        self._records[key] = record
        self._order.append(key)
        self._size += size
        if self._size > self._max_pending:
            self._let_go_of_the_oldest()

    def _expect_more(
        self,
        key: tuple[str, str],
        record: _Recipient | _Recipients,
        recipients: Sequence[str],
        now: float,
        *,
        queued: bool,
    ) -> None:
        """A notification that is known already: sent again, or to somebody else."""
        self._records_change()
        if isinstance(record, _Recipient):
            record = _Recipients(record.recorded_at, {record.user_id: record}, _NOBODY)
            self._records[key] = record
        for user_id in recipients:
            recipient = record.own(user_id)
            if recipient is None:
                recipient = _Recipient(user_id, record.recorded_at, now, "queued")
                record.by_user[user_id] = recipient
                self._size += 1
            if queued:
                if recipient.state == "pending":
                    recipient.state = "queued"
                    self._pending -= 1
            elif recipient.state != "confirmed":
                self._pending += recipient.state != "pending"
                recipient.state = "pending"
                recipient.sent_at = now
        if self._size > self._max_pending:
            self._let_go_of_the_oldest()

    def acknowledge(self, tenant: str, user_id: str, ids: Sequence[str]) -> frozenset[str]:
        """See `AckLedger.acknowledge`."""
        self._note_confirmed()
        now = self._clock()
        known = set()
        for notification_id in ids:
            record = self._records.get((tenant, notification_id))
            if isinstance(record, _Anyone):
                record.acks += 1
                self._count(now - record.recorded_at)
            else:
                recipient = _recipient(record, user_id)
                if recipient is None:
                    continue
                self._confirm(recipient, now, "ack")
            known.add(notification_id)
        return frozenset(known)

    def confirm(self, tenant: str, user_id: str, ids: Sequence[str]) -> None:
        """See `AckLedger.confirm`."""
        now = self._clock()
        ids = tuple(ids)
        if ids != self._confirmed_ids or tenant != self._confirmed_tenant:
            self._note_confirmed()
            records = self._records
            found = [records.get((tenant, notification_id)) for notification_id in ids]
            self._confirmed = [record for record in found if record is not None]
            # What is not there yet is looked for again.
            self._confirmed_ids = ids if len(self._confirmed) == len(found) else None
            self._confirmed_tenant = tenant
        self._confirmed_by.append(
            (user_id, _Recipient(SEVERAL, now, now, "confirmed", now, "transport"))
        )
        if self._confirmed_ids is None or len(self._confirmed_by) >= CONFIRMED_AT_ONCE:
            self._note_confirmed()

    def _note_confirmed(self) -> None:
        """Everything below asks for this first, and whatever lets go of records or replaces them
        finds them anew afterwards."""
        confirmed_by, self._confirmed_by = self._confirmed_by, []
        if not confirmed_by:
            return
        count = 0
        everybody = dict(confirmed_by)
        for record in self._confirmed:
            if type(record) is _Recipients:
                by_user, pending = record.by_user, record.pending
                if list(map(by_user.get, everybody)).count(pending) == len(confirmed_by):
                    # Nearly always, while many get the same: no loop, for it would be of each.
                    by_user.update(everybody)
                    count += len(confirmed_by)
                    continue
                for user_id, confirmed in confirmed_by:
                    if by_user.get(user_id) is pending:
                        by_user[user_id] = confirmed
                        count += 1
                    else:
                        self._confirm_one(record, user_id, confirmed)
                continue
            for user_id, confirmed in confirmed_by:
                if (
                    type(record) is _Recipient
                    and record.state == "pending"
                    and record.user_id == user_id
                ):
                    # Nearly always: no calls, for a Pong confirms many at once.
                    record.state = "confirmed"
                    record.confirmed_at = confirmed.confirmed_at
                    record.by = "transport"
                    count += 1
                else:
                    self._confirm_one(record, user_id, confirmed)
        self._pending -= count

    def _confirm_one(self, record: _Record, user_id: str, confirmed: _Recipient) -> None:
        recipient = _recipient(record, user_id)
        if recipient is not None and confirmed.confirmed_at is not None:
            self._confirm(recipient, confirmed.confirmed_at, "transport")

    def _records_change(self) -> None:
        """Records that were found are about to be let go of, or to be replaced."""
        self._note_confirmed()
        self._confirmed_ids, self._confirmed = None, []

    def _confirm(self, recipient: _Recipient, now: float, by: Literal["ack", "transport"]) -> None:
        """What he confirmed before counts once."""
        if recipient.state == "confirmed":
            if recipient.by == "ack" or by == "transport":
                return
            waited = now - recipient.recorded_at
        elif recipient.state == "pending":
            self._pending -= 1
            waited = now - recipient.sent_at
        else:
            waited = now - recipient.recorded_at
        recipient.state = "confirmed"
        recipient.confirmed_at = now
        recipient.by = by
        if by == "ack":
            self._count(waited)

    def _count(self, seconds: float) -> None:
        # A clock that was set back makes no ack come before what it answers.
        seconds = max(0.0, seconds)
        self._acknowledged += 1
        self._total_seconds += seconds
        self._recent_seconds.append(seconds)
        self._on_acknowledged(seconds)

    def report(self, tenant: str, notification_id: str) -> AckReport | None:
        """See `AckLedger.report`."""
        self._note_confirmed()
        record = self._records.get((tenant, notification_id))
        if record is None:
            return None
        recipients = [
            Confirmation(user_id, each.state, each.confirmed_at, each.by)
            for user_id, each in _all_of(record)
        ]
        acks = record.acks if isinstance(record, _Anyone) else 0
        return AckReport(notification_id, record.recorded_at, recipients, acks)

    async def expire(self) -> int:
        """See `AckLedger.expire`. Yields to the event loop on the way; cancelled, it has done a
        part.
        """
        now = self._clock()
        total = 0
        while self._sent and self._sent_at[0] + self._timeout_seconds <= now:
            self._note_confirmed()
            sent_at = self._sent_at.popleft()
            record = self._records.get(self._sent.popleft())
            if record is None:
                continue
            late = 0
            for user_id, recipient in _all_of(record):
                if recipient.state == "pending" and recipient.sent_at == sent_at:
                    self._is_late(record, user_id)
                    late += 1
            self._pending -= late
            self._count_expired(late)
            total += late
            if len(self._sent) % RECORDS_PER_TURN == 0:
                await asyncio.sleep(0)
        while self._order:
            record = self._records[self._order[0]]
            if record.recorded_at + self._retention > now:
                break
            self._records_change()
            self._let_go(self._order.popleft())
            if len(self._order) % RECORDS_PER_TURN == 0:
                await asyncio.sleep(0)
        return total

    @staticmethod
    def _is_late(record: _Record, user_id: str) -> None:
        recipient = _recipient(record, user_id)
        if recipient is not None:
            recipient.state = "expired"

    def _let_go_of_the_oldest(self) -> None:
        sent, records, order = self._sent, self._records, self._order
        self._records_change()
        size, room, late = self._size, self._room, 0
        while size > room and order:
            key = order.popleft()
            if sent and sent[0] is key:
                sent.popleft()
                self._sent_at.popleft()
            record = records[key]
            if type(record) is _Recipient:
                # Nearly always, and then no call is made for each.
                del records[key]
                size -= 2
                late += record.state == "pending"
            else:
                self._size = size
                self._let_go(key)
                size = self._size
        self._size = size
        self._pending -= late
        self._count_expired(late)
        # Entries of notifications that are gone; without this they would outlive the bound.
        while sent and sent[0] not in records:
            sent.popleft()
            self._sent_at.popleft()

    def _let_go(self, key: tuple[str, str]) -> None:
        """Forget a notification; `_records_change` comes before it."""
        record = self._records.pop(key)
        if type(record) is _Recipient:
            self._size -= 2
            if record.state != "pending":
                return
            never_confirmed = 1
        else:
            everybody = record.by_user.values() if isinstance(record, _Recipients) else ()
            self._size -= 1 + len(everybody)
            never_confirmed = sum([each.state == "pending" for each in everybody])
        if never_confirmed:
            self._pending -= never_confirmed
            self._count_expired(never_confirmed)

    def _count_expired(self, count: int) -> None:
        if count:
            self._expired += count
            self._on_expired(count)

    def stats(self) -> AckStats:
        """See `AckLedger.stats`."""
        self._note_confirmed()
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


def _recipient(record: _Record | None, user_id: str) -> _Recipient | None:
    if isinstance(record, _Recipient):
        return record if record.user_id == user_id else None
    return record.own(user_id) if isinstance(record, _Recipients) else None


def _all_of(record: _Record) -> Sequence[tuple[str, _Recipient]]:
    """Each recipient with his user id."""
    if isinstance(record, _Recipient):
        return ((record.user_id, record),)
    return tuple(record.by_user.items()) if isinstance(record, _Recipients) else ()
