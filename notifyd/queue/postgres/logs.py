"""The users' logs in PostgreSQL."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any, TypeAlias

import msgspec

from notifyd.errors import Unavailable
from notifyd.identifiers import is_canonical_uuid
from notifyd.notification import Notification
from notifyd.postgres import Connection, Postgres, Turn
from notifyd.queue.base import Entry, Overflow, Page, Rejection, entry_bytes
from notifyd.queue.codec import CorruptEntry, decode_entry, encode_entry
from notifyd.queue.corrupt import CorruptLog
from notifyd.queue.postgres.calls import (
    BYTES_PER_BATCH,
    CALL_BYTES,
    QUERIES,
    ROW_BYTES,
    ROWS_PER_BATCH,
    ROWS_PER_SWEEP,
    Call,
    Shards,
    UserKey,
    columns,
    resolve,
    take_some,
)

USERS_PER_READ = 64
READS_AT_ONCE = 2
LOGS_PER_SWEEP = 5000
EMPTY_LOG_SECONDS = 3600.0


class _Enqueue(Call, eq=False):
    """One notification for some users; answered by a rejection or None for each."""

    tenant: str
    recipients: Sequence[str]
    notification: Notification
    body: bytes
    expires_at: float
    owed: bool

    @property
    def keys(self) -> Iterable[UserKey]:
        """Whose logs it goes to."""
        return ((self.tenant, user_id) for user_id in self.recipients)

    @property
    def weight(self) -> int:
        return CALL_BYTES + ROW_BYTES * len(self.recipients) + len(self.body)


class _Settle(Call, eq=False):
    key: UserKey
    ids: Sequence[str]
    heard: bool

    @property
    def weight(self) -> int:
        return CALL_BYTES + ROW_BYTES * len(self.ids)


class _Erase(Call, eq=False):
    key: UserKey


class _Read(Call, eq=False):
    key: UserKey
    after: int
    max_bytes: int


_Write: TypeAlias = "_Enqueue | _Settle | _Erase"


def _take_writes(waiting: deque[_Write]) -> Sequence[_Write]:
    """What may be done in one go: all that is stored, then all that is settled. What would change
    a user's order by that, or erases, waits for the next, and so does what a user is sent again:
    what becomes of it hangs on what became of it before."""
    batch: list[_Write] = [waiting.popleft()]
    if isinstance(batch[0], _Erase):
        while waiting and isinstance(waiting[0], _Erase):
            batch.append(waiting.popleft())
        return batch
    settled: set[UserKey] = set()
    stored: dict[str, set[UserKey]] = {}
    rows = size = 0
    call: _Write = batch[0]
    while True:
        if isinstance(call, _Enqueue):
            rows += len(call.recipients)
            size += len(call.recipients) * len(call.body)
            stored.setdefault(call.notification.id, set()).update(call.keys)
        elif isinstance(call, _Settle):
            rows += len(call.ids)
            settled.add(call.key)
        if not waiting:
            return batch
        call = waiting[0]
        if isinstance(call, _Erase) or rows >= ROWS_PER_BATCH or size >= BYTES_PER_BATCH:
            return batch
        if isinstance(call, _Enqueue):
            before = stored.get(call.notification.id)
            if settled and not settled.isdisjoint(call.keys):
                return batch
            if before is not None and not before.isdisjoint(call.keys):
                return batch
        batch.append(waiting.popleft())


class _Item(msgspec.Struct, eq=False):
    """One notification for one user, on its way into his log."""

    call: int
    place: int
    log: _Log
    offset: int = 0


class _Log(msgspec.Struct, eq=False):
    """A log that a batch stores to. `known`: the ids in this batch, and, where it is full, those
    of them that are pending."""

    expires_first: float
    id: int = 0
    added: int = 0
    next_offset: int = 0
    pending: int = 0
    known: set[str] = msgspec.field(default_factory=set)
    least: list[tuple[int, int, _Item | None]] = msgspec.field(default_factory=list)
    given_up: list[int] = msgspec.field(default_factory=list)
    looked_through: bool = False


class Room(msgspec.Struct):
    """What a batch may still store, over all users, and what it gave up for that."""

    max_size_per_user: int
    max_messages: float
    depth: float
    victims: list[tuple[int, int]] = msgspec.field(default_factory=list)
    dropped: int = 0


def _admit(item: _Item, rank: int, room: Room) -> tuple[bool, _Item | None]:
    """Make room for an entry in its log: whether it is stored, and which other one of this batch
    was given up for it."""
    log = item.log
    loser: _Item | None = None
    if log.pending >= room.max_size_per_user or room.depth >= room.max_messages:
        if not log.least or rank < log.least[0][0]:
            return False, None
        _, offset, loser = heappop(log.least)
        if loser is None:
            room.victims.append((log.id, offset))
        log.given_up.append(offset)
        log.pending -= 1
        room.depth -= 1
        room.dropped += 1
    heappush(log.least, (rank, item.offset, item))
    log.pending += 1
    room.depth += 1
    return True, loser


class PostgresUserLogs:
    """`UserLogs` in PostgreSQL, shared by all who use the same database.

    `max_messages` bounds all users together; writers at the same moment may each go over it by a
    batch. `on_dropped` is called for each entry that a full log gave up, `on_corrupt(reason)` for
    each that could not be read and was set aside.
    """

    def __init__(
        self,
        postgres: Postgres,
        *,
        max_size_per_user: int,
        max_messages: int | None,
        message_ttl_seconds: float,
        clock: Callable[[], float],
        on_dropped: Callable[[], None],
        on_corrupt: Callable[[str], None],
    ) -> None:
        self._postgres = postgres
        self._max_size_per_user = max_size_per_user
        self._max_messages = inf if max_messages is None else max_messages
        self._message_ttl_seconds = message_ttl_seconds
        self._clock = clock
        self._on_dropped = on_dropped
        self._corrupt = CorruptLog(on_corrupt)
        self._shards = Shards()
        self._epoch = secrets.token_hex(4)
        self._writes: Turn[_Write] = postgres.turn(self._write, take=_take_writes)
        self._reads: Turn[_Read] = postgres.turn(
            self._read, take=take_some(USERS_PER_READ), at_once=READS_AT_ONCE
        )
        self._expired_uncounted = 0
        self._looked_at = 0

    async def aclose(self) -> None:
        """Fail what waits. What is under way may be stored all the same."""
        await self._writes.aclose()
        await self._reads.aclose()

    # --- calls ---

    def enqueue(
        self,
        tenant: str,
        recipients: Sequence[str],
        notification: Notification,
        *,
        owed: bool = False,
    ) -> Awaitable[Sequence[Rejection | None]]:
        """See `UserLogs.enqueue`. A notification that is pending already is not stored twice.

        Raises Unavailable; where only some of many recipients could be stored, the others are
        `unavailable`. Cancelling the answer takes nothing back.
        """
        body = encode_entry(notification)
        expires_at = self._clock() + self._message_ttl_seconds
        if notification.expires_at is not None:
            expires_at = min(expires_at, notification.expires_at)
        most = max(1, min(ROWS_PER_BATCH, BYTES_PER_BATCH // len(body)))
        if len(recipients) <= most:
            call = _Enqueue(tenant, recipients, notification, body, expires_at, owed)
            self._writes.add(call)
            return call.future
        calls = []
        for start in range(0, len(recipients), most):
            some = recipients[start : start + most]
            call = _Enqueue(tenant, some, notification, body, expires_at, owed)
            calls.append(call)
            try:
                self._writes.add(call)
            except Unavailable as error:
                call.future.set_exception(error.again())
        return asyncio.ensure_future(_together(calls))

    def read(
        self, tenant: str, user_id: str, *, after: int = 0, max_bytes: int = 65536
    ) -> Awaitable[Page]:
        """See `UserLogs.read`. Raises Unavailable."""
        call = _Read((tenant, user_id), after, max_bytes)
        self._reads.add(call)
        return call.future

    def settle(
        self, tenant: str, user_id: str, ids: Sequence[str], *, heard: bool = False
    ) -> Awaitable[frozenset[str]]:
        """See `UserLogs.settle`. Raises Unavailable; cancelling the answer takes nothing back."""
        call = _Settle((tenant, user_id), [id for id in ids if is_canonical_uuid(id)], heard)
        if call.ids:
            self._writes.add(call)
        else:
            call.future.set_result(frozenset())
        return call.future

    def erase(self, tenant: str, user_id: str) -> Awaitable[int]:
        """See `UserLogs.erase`. Raises Unavailable."""
        call = _Erase((tenant, user_id))
        self._writes.add(call)
        return call.future

    # --- storing ---

    async def _write(self, batch: Sequence[_Write]) -> None:
        enqueues = [call for call in batch if isinstance(call, _Enqueue)]
        settles = [call for call in batch if isinstance(call, _Settle)]
        erases = [call for call in batch if isinstance(call, _Erase)]
        if enqueues:
            await self._store(enqueues)
        if settles:
            await self._settle(settles)
        if erases:
            await self._erase(erases)

    async def _store(self, calls: Sequence[_Enqueue]) -> None:
        answers: list[list[Rejection | None]] = [[None] * len(call.recipients) for call in calls]
        logs: dict[UserKey, _Log] = {}
        items: list[_Item] = []
        for number, call in enumerate(calls):
            id = call.notification.id
            for place, user_id in enumerate(call.recipients):
                key = (call.tenant, user_id)
                log = logs.get(key)
                if log is None:
                    log = logs[key] = _Log(call.expires_at)
                elif id in log.known:
                    continue
                elif call.expires_at < log.expires_first:
                    log.expires_first = call.expires_at
                log.known.add(id)
                log.added += 1
                items.append(_Item(number, place, log))
        if items:
            await self._store_items(calls, logs, items, answers)
        for call, answer in zip(calls, answers, strict=True):
            resolve(call.future, answer)

    async def _store_items(
        self,
        calls: Sequence[_Enqueue],
        logs: dict[UserKey, _Log],
        items: Sequence[_Item],
        answers: list[list[Rejection | None]],
    ) -> None:
        now = self._clock()

        async def work(connection: Connection) -> tuple[int, int]:
            depth = await self._lock_logs(connection, logs, now)
            stale = await self._drop_stale(connection, calls, items, now)
            depth -= stale
            crowded = depth + len(items) > self._max_messages
            full = {
                log.id: log
                for log in logs.values()
                if crowded or log.pending > self._max_size_per_user
            }
            kept, dead, room = items, 0, None
            if full:
                room = Room(
                    max_size_per_user=self._max_size_per_user,
                    max_messages=self._max_messages if crowded else inf,
                    depth=depth,
                )
                kept, dead = await self._make_room(connection, calls, items, full, room, answers)
            dead += stale
            await self._insert(connection, calls, logs, kept, dead, room)
            return dead, 0 if room is None else room.dropped

        dead, dropped = await self._postgres.transaction(work, calls=len(calls))
        self._expired_uncounted += dead
        for _ in range(dropped):
            self._on_dropped()

    async def _lock_logs(
        self, connection: Connection, logs: dict[UserKey, _Log], now: float
    ) -> int:
        """Give the logs their ids, counts and offsets; returns how many entries there are in all,
        those of this batch not counted."""
        rows = await connection.fetch(
            QUERIES["lock_logs"],
            *columns(logs, 2),
            [log.added for log in logs.values()],
            [log.expires_first for log in logs.values()],
            self._epoch,
            int(now * 1000),
            now,
        )
        depth = 0
        for log_id, tenant, user_id, next_offset, pending, expires_first, depth in rows:  # noqa: B007  # the same in every row
            log = logs[tenant, user_id]
            log.id = log_id
            log.next_offset = next_offset - log.added
            log.pending = pending
            log.looked_through = expires_first <= now
        return depth

    async def _drop_stale(
        self,
        connection: Connection,
        calls: Sequence[_Enqueue],
        items: Sequence[_Item],
        now: float,
    ) -> int:
        """Take out what is dead and comes anew; how many. Asks only where something may be dead."""
        wanted = [
            (item.log.id, calls[item.call].notification.id)
            for item in items
            if item.log.looked_through
        ]
        if not wanted:
            return 0
        gone = await connection.fetch(QUERIES["drop_stale"], *columns(wanted, 2), now)
        counts: dict[int, int] = {row["log_id"]: row["count"] for row in gone}
        for log in {item.log.id: item.log for item in items}.values():
            log.pending -= counts.get(log.id, 0)
        return sum(counts.values())

    async def _make_room(
        self,
        connection: Connection,
        calls: Sequence[_Enqueue],
        items: Sequence[_Item],
        full: dict[int, _Log],
        room: Room,
        answers: list[list[Rejection | None]],
    ) -> tuple[list[_Item], int]:
        """Decide, entry by entry in the order of the calls, what full logs keep; returns what is
        to be stored, and how many dead entries made room."""
        await self._find_pending(connection, calls, items, full)
        dead = 0
        if looked_through := [log.id for log in full.values() if log.looked_through]:
            gone = await connection.fetch(QUERIES["drop_dead"], looked_through, self._clock())
            for log_id, count in gone:
                full[log_id].pending -= count
                dead += count
        room.depth -= dead
        least = await connection.fetch(
            QUERIES["find_least"], list(full), [log.added for log in full.values()]
        )
        for log in full.values():
            log.pending -= log.added
        for log_id, priority, offset in least:
            full[log_id].least.append((priority, offset, None))
        for log in full.values():
            heapify(log.least)
        kept: dict[_Item, None] = {}
        for item in items:
            call = calls[item.call]
            log = item.log
            item.offset = log.next_offset
            log.next_offset += 1
            if log.id not in full:
                kept[item] = None
                continue
            if call.notification.id not in log.known:
                continue
            stored, loser = _admit(item, call.notification.priority.rank, room)
            if loser is not None:
                del kept[loser]
            if stored:
                kept[item] = None
            else:
                answers[item.call][item.place] = "queue_full"
                if call.owed:
                    log.given_up.append(item.offset)
        await self._update_full_logs(connection, full, room)
        return list(kept), dead

    async def _find_pending(
        self,
        connection: Connection,
        calls: Sequence[_Enqueue],
        items: Sequence[_Item],
        full: dict[int, _Log],
    ) -> None:
        """Leave only those in `known` that full logs have not got already."""
        wanted = [
            (item.log.id, calls[item.call].notification.id) for item in items if item.log.id in full
        ]
        pending = await connection.fetch(QUERIES["find_pending"], *columns(wanted, 2))
        for log_id, id in pending:
            full[log_id].known.discard(str(id))

    async def _update_full_logs(
        self, connection: Connection, full: dict[int, _Log], room: Room
    ) -> None:
        if room.victims:
            await connection.execute(QUERIES["give_up"], *columns(room.victims, 2))
        logs = full.values()
        await connection.execute(
            QUERIES["update_full_logs"],
            list(full),
            [log.pending for log in logs],
            [len(log.given_up) for log in logs],
            [min(log.given_up, default=0) for log in logs],
            [max(log.given_up, default=0) for log in logs],
            [log.looked_through for log in logs],
            [log.expires_first for log in logs],
        )

    async def _insert(
        self,
        connection: Connection,
        calls: Sequence[_Enqueue],
        logs: dict[UserKey, _Log],
        kept: Sequence[_Item],
        dead: int,
        room: Room | None,
    ) -> None:
        if room is None:
            for item in kept:
                log = item.log
                item.offset = log.next_offset
                log.next_offset += 1
        notifications = [call.notification for call in calls]
        stored = await connection.fetchval(
            QUERIES["insert_entries"],
            [item.log.id for item in kept],
            [item.offset for item in kept],
            [item.call + 1 for item in kept],
            [notification.id for notification in notifications],
            [notification.priority.rank for notification in notifications],
            [entry_bytes(notification) for notification in notifications],
            [call.expires_at for call in calls],
            [call.body for call in calls],
            dead + (0 if room is None else len(room.victims)),
            self._shards.next(),
        )
        if stored != len(kept):
            await connection.execute(QUERIES["recount_logs"], [log.id for log in logs.values()])

    # --- taking out ---

    async def _lock_known(
        self, connection: Connection, keys: Iterable[UserKey]
    ) -> dict[UserKey, int]:
        rows = await connection.fetch(QUERIES["lock_known_logs"], *columns(set(keys), 2))
        return {(tenant, user_id): log_id for log_id, tenant, user_id in rows}

    async def _settle(self, calls: Sequence[_Settle]) -> None:
        async def work(connection: Connection) -> tuple[dict[UserKey, int], set[tuple[int, str]]]:
            logs = await self._lock_known(connection, (call.key for call in calls))
            wanted = {(logs[call.key], id) for call in calls if call.key in logs for id in call.ids}
            if not wanted:
                return logs, set()
            heard = {logs[call.key] for call in calls if call.heard and call.key in logs}
            rows = await connection.fetch(
                QUERIES["settle"], *columns(wanted, 2), self._shards.next(), list(heard)
            )
            return logs, {(log_id, str(id)) for log_id, id in rows}

        logs, gone = await self._postgres.transaction(work, calls=len(calls))
        for call in calls:
            log_id = logs.get(call.key, 0)
            found = [id for id in call.ids if (log_id, id) in gone]
            # Settling twice is settling once, within a batch too.
            gone.difference_update((log_id, id) for id in found)
            resolve(call.future, frozenset(found))

    async def _erase(self, calls: Sequence[_Erase]) -> None:
        async def work(connection: Connection) -> dict[UserKey, int]:
            logs = await self._lock_known(connection, (call.key for call in calls))
            if not logs:
                return {}
            rows = await connection.fetch(
                QUERIES["erase"], list(logs.values()), self._shards.next()
            )
            counts = {row["log_id"]: row["count"] for row in rows}
            return {key: counts.get(log_id, 0) for key, log_id in logs.items()}

        gone = await self._postgres.transaction(work, calls=len(calls))
        for call in calls:
            resolve(call.future, gone.pop(call.key, 0))

    # --- reading ---

    async def _read(self, calls: Sequence[_Read]) -> None:
        now = self._clock()

        async def work(connection: Connection) -> list[_PageRows]:
            pages = [_PageRows() for _ in calls]
            rows = await connection.fetch(
                QUERIES["read_pages"],
                [call.key[0] for call in calls],
                [call.key[1] for call in calls],
                [call.after for call in calls],
                [call.max_bytes for call in calls],
                now,
            )
            for number, log_id, overflow_count, offset, body, follows in rows:
                page = pages[number - 1]
                page.log_id = log_id
                page.tells = overflow_count > 0 and calls[number - 1].after == 0
                if offset is not None:
                    page.add(offset, body, follows=follows)
            if any(page.tells or page.corrupt for page in pages):
                await self._tell_and_set_aside(connection, calls, pages)
            return pages

        pages = await self._postgres.transaction(work, calls=len(calls))
        for call, page in zip(calls, pages, strict=True):
            for offset, error in page.corrupt:
                self._tell_corrupt(offset, error)
            resolve(call.future, Page(page.entries, page.cursor, page.overflow))

    async def _tell_and_set_aside(
        self, connection: Connection, calls: Sequence[_Read], pages: Sequence[_PageRows]
    ) -> None:
        await self._lock_known(
            connection,
            (
                call.key
                for call, page in zip(calls, pages, strict=True)
                if page.tells or page.corrupt
            ),
        )
        if telling := [page for page in pages if page.tells]:
            empty = {page.log_id: not page.entries and not page.corrupt for page in telling}
            rows = await connection.fetch(QUERIES["tell_overflow"], *columns(empty.items(), 2))
            told = {log_id: Overflow(*overflow) for log_id, *overflow in rows}
            for page in telling:
                page.overflow = told.get(page.log_id)
        aside = [
            (page.log_id, offset, error.reason) for page in pages for offset, error in page.corrupt
        ]
        if aside:
            await connection.execute(QUERIES["set_aside"], *columns(aside, 3), self._shards.next())

    def _tell_corrupt(self, offset: int, error: CorruptEntry) -> None:
        self._corrupt.tell(
            "an entry of a queue cannot be read and was set aside",
            error.reason,
            error,
            offset=offset,
            table="notifyd_entries",
        )

    # --- sweeping ---

    async def expire(self) -> int:
        """See `UserLogs.expire`. Works in small transactions, and leaves logs that others are at
        work on for the next time; cancelled, it has done a part. Raises Unavailable.
        """
        now = self._clock()
        expired, self._expired_uncounted = self._expired_uncounted, 0
        try:
            more = True
            while more:
                pending, more = await self._expire_some(now)
                expired += pending
            await self._forget_some(now - EMPTY_LOG_SECONDS)
        except BaseException:
            # Told next time.
            self._expired_uncounted += expired
            raise
        return expired

    async def _expire_some(self, now: float) -> tuple[int, bool]:
        async def work(connection: Connection) -> tuple[int, bool]:
            found = await connection.fetch(QUERIES["find_expired"], now, ROWS_PER_SWEEP)
            locked = await connection.fetch(
                QUERIES["lock_free_logs"], list({log_id for log_id, _ in found})
            )
            free = {log_id for (log_id,) in locked}
            rows = [(log_id, offset) for log_id, offset in found if log_id in free]
            if not rows:
                return 0, False
            gone: Any = await connection.fetchrow(
                QUERIES["delete_expired"], *columns(rows, 2), now, self._shards.next()
            )
            return gone["pending"], len(found) == ROWS_PER_SWEEP and gone["rows"] > 0

        return await self._postgres.transaction(work)

    async def _forget_some(self, before: float) -> None:
        """A part of the logs each time, so that it never takes long."""

        async def work(connection: Connection) -> int:
            last: int | None = await connection.fetchval(
                QUERIES["forget_logs"], self._looked_at, LOGS_PER_SWEEP, before
            )
            return last or 0

        self._looked_at = await self._postgres.transaction(work)

    async def depth(self) -> int:
        """See `UserLogs.depth`. Raises Unavailable."""

        async def work(connection: Connection) -> int:
            count: int = await connection.fetchval(QUERIES["depth"])
            return count

        return await self._postgres.transaction(work)


class _PageRows(msgspec.Struct, eq=False):
    """A page as it is put together."""

    log_id: int = 0
    entries: list[Entry] = msgspec.field(default_factory=list)
    corrupt: list[tuple[int, CorruptEntry]] = msgspec.field(default_factory=list)
    cursor: int | None = None
    overflow: Overflow | None = None
    tells: bool = False

    def add(self, offset: int, body: bytes, *, follows: bool) -> None:
        self.cursor = offset if follows else None
        try:
            self.entries.append(Entry(offset, decode_entry(body)))
        except CorruptEntry as error:
            self.corrupt.append((offset, error))


async def _together(calls: Sequence[_Enqueue]) -> list[Rejection | None]:
    """The answers of one send that was stored in parts."""
    answers: list[Rejection | None] = []
    failed: list[BaseException] = []
    for call, outcome in zip(
        calls,
        await asyncio.gather(*(call.future for call in calls), return_exceptions=True),
        strict=True,
    ):
        if isinstance(outcome, Unavailable):
            failed.append(outcome)
            answers += ["unavailable"] * len(call.recipients)
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            answers += outcome
    if len(failed) == len(calls):
        raise failed[0]
    return answers
