"""User logs, the ledger, templates, idempotency keys and what is kept of tenants, in PostgreSQL.

What is asked is in sql/queries.sql, a sentence each; here stands in which order. All calls of one
turn of the event loop, and all that come while a batch is under way, share one transaction. It
follows the same steps everywhere: lock the rows that stand for what is changed (logs, records), in
the order of their names; look; decide; write; bring the totals up to date.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from importlib.resources import files
from math import inf
from typing import Any, Literal, TypeAlias

import msgspec
import structlog

from notifyd.errors import Conflict, NotFound, RateLimited, Unavailable, ValidationError
from notifyd.idempotency import MAX_WAITERS, Fresh, KeptAnswer, Replay, Scope, Wait
from notifyd.identifiers import is_canonical_uuid
from notifyd.log import RateLimitedLog
from notifyd.notification import Notification, Priority
from notifyd.postgres import (
    CLOSE_SECONDS,
    MAX_WAITING_BYTES,
    Connection,
    Postgres,
    Turn,
    load_migrations,
    load_queries,
)
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
from notifyd.queue.codec import CorruptEntry, decode_entry, encode_entry
from notifyd.templates import MAX_TEMPLATES, Template
from notifyd.tenants import MAX_TENANTS, Counts, Figures, Kept, LimitChanges, too_many

_SQL = files("notifyd.queue").joinpath("sql")
MIGRATIONS = load_migrations(_SQL.joinpath("migrations"))
QUERIES = load_queries(_SQL.joinpath("queries.sql"))

ROWS_PER_BATCH = 2000
BYTES_PER_BATCH = 4 * 1024 * 1024
"""A transaction stores about so much at most; a send to more users is stored in several."""

CALL_BYTES = 1024
ROW_BYTES = 128
"""What a call that waits takes of memory, and each user or id that it names, about."""

MAX_NOTES_BYTES = MAX_WAITING_BYTES // 4
"""So much of what nobody waits for may wait for the ledger: acks have room beside it."""

USERS_PER_READ = 64
READS_AT_ONCE = 2
ROWS_PER_SWEEP = 1000
LOGS_PER_SWEEP = 5000
EMPTY_LOG_SECONDS = 3600.0
LEDGER_RETENTION_SECONDS = 3600.0
RECORDS_PER_SWEEP = 200
LEASE_SECONDS = 60.0
"""Who works on an idempotency key and does not end loses it after so long."""

_SHARDS = 16
_SAMPLES = 64
_LOG_SECONDS = 60.0
_POLL_FIRST_SECONDS = 0.05
_POLL_LONGEST_SECONDS = 1.0

UserKey: TypeAlias = tuple[str, str]

_QUEUED, _PENDING, _CONFIRMED, _EXPIRED = range(4)
_STATES: tuple[Literal["queued", "pending", "confirmed", "expired"], ...] = (
    "queued",
    "pending",
    "confirmed",
    "expired",
)


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


def _resolve(future: asyncio.Future[Any], answer: object) -> None:
    if not future.done():
        future.set_result(answer)


def _columns(rows: Iterable[Sequence[Any]], count: int) -> Sequence[Sequence[Any]]:
    """Rows of `count` values as the arrays that `unnest` takes."""
    return [*zip(*rows, strict=True)] or [()] * count


class _Shards:
    """Rows of totals to write to, in turn, from a random one on: writers rarely meet."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = random.randrange(_SHARDS)  # noqa: S311  # spreads load, keeps no secret

    def next(self) -> int:
        self._next = (self._next + 1) % _SHARDS
        return self._next


# --- logs -----------------------------------------------------------------------------------------


class _Call(msgspec.Struct, eq=False, kw_only=True):
    """One call, until the batch that it takes part in answers it."""

    future: asyncio.Future[Any] = msgspec.field(default_factory=_future)
    deadline: float = 0.0

    @property
    def weight(self) -> int:
        """See `Answerable`."""
        return CALL_BYTES


class _Enqueue(_Call, eq=False):
    """One notification for some users; answered by a rejection or None for each."""

    tenant: str
    recipients: Sequence[str]
    notification: Notification
    body: bytes
    expires_at: float
    owed: bool

    @property
    def weight(self) -> int:
        return CALL_BYTES + ROW_BYTES * len(self.recipients) + len(self.body)


class _Settle(_Call, eq=False):
    key: UserKey
    ids: Sequence[str]
    heard: bool

    @property
    def weight(self) -> int:
        return CALL_BYTES + ROW_BYTES * len(self.ids)


class _Erase(_Call, eq=False):
    key: UserKey


class _Read(_Call, eq=False):
    key: UserKey
    after: int
    max_bytes: int


_Write: TypeAlias = "_Enqueue | _Settle | _Erase"


def _take_writes(waiting: deque[_Write]) -> Sequence[_Write]:
    """What may be done in one go: all that is stored, then all that is settled. What would change
    a user's order by that, or erases, waits for the next."""
    batch: list[_Write] = [waiting.popleft()]
    if isinstance(batch[0], _Erase):
        while waiting and isinstance(waiting[0], _Erase):
            batch.append(waiting.popleft())
        return batch
    settled: set[UserKey] = set()
    rows = size = 0
    call: _Write = batch[0]
    while True:
        if isinstance(call, _Enqueue):
            rows += len(call.recipients)
            size += len(call.recipients) * len(call.body)
        elif isinstance(call, _Settle):
            rows += len(call.ids)
            settled.add(call.key)
        if not waiting:
            return batch
        call = waiting[0]
        if isinstance(call, _Erase) or rows >= ROWS_PER_BATCH or size >= BYTES_PER_BATCH:
            return batch
        if (
            settled
            and isinstance(call, _Enqueue)
            and any((call.tenant, user_id) in settled for user_id in call.recipients)
        ):
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
        self._on_corrupt = on_corrupt
        self._corrupt_logged_at = -inf
        self._log = structlog.get_logger("notifyd")
        self._shards = _Shards()
        self._epoch = secrets.token_hex(4)
        self._writes: Turn[_Write] = postgres.turn(self._write, take=_take_writes)
        self._reads: Turn[_Read] = postgres.turn(
            self._read, take=_take_some(USERS_PER_READ), at_once=READS_AT_ONCE
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
                call.future.set_exception(error)
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
            _resolve(call.future, answer)

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
            *_columns(logs, 2),
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
        gone = await connection.fetch(QUERIES["drop_stale"], *_columns(wanted, 2), now)
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
        pending = await connection.fetch(QUERIES["find_pending"], *_columns(wanted, 2))
        for log_id, id in pending:
            full[log_id].known.discard(str(id))

    async def _update_full_logs(
        self, connection: Connection, full: dict[int, _Log], room: Room
    ) -> None:
        if room.victims:
            await connection.execute(QUERIES["give_up"], *_columns(room.victims, 2))
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
        rows = await connection.fetch(QUERIES["lock_known_logs"], *_columns(set(keys), 2))
        return {(tenant, user_id): log_id for log_id, tenant, user_id in rows}

    async def _settle(self, calls: Sequence[_Settle]) -> None:
        async def work(connection: Connection) -> tuple[dict[UserKey, int], set[tuple[int, str]]]:
            logs = await self._lock_known(connection, (call.key for call in calls))
            wanted = {(logs[call.key], id) for call in calls if call.key in logs for id in call.ids}
            if not wanted:
                return logs, set()
            heard = {logs[call.key] for call in calls if call.heard and call.key in logs}
            rows = await connection.fetch(
                QUERIES["settle"], *_columns(wanted, 2), self._shards.next(), list(heard)
            )
            return logs, {(log_id, str(id)) for log_id, id in rows}

        logs, gone = await self._postgres.transaction(work, calls=len(calls))
        for call in calls:
            log_id = logs.get(call.key, 0)
            found = [id for id in call.ids if (log_id, id) in gone]
            # Settling twice is settling once, within a batch too.
            gone.difference_update((log_id, id) for id in found)
            _resolve(call.future, frozenset(found))

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
            _resolve(call.future, gone.pop(call.key, 0))

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
                self._count_corrupt(offset, error)
            _resolve(call.future, Page(page.entries, page.cursor, page.overflow))

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
            rows = await connection.fetch(QUERIES["tell_overflow"], *_columns(empty.items(), 2))
            told = {log_id: Overflow(*overflow) for log_id, *overflow in rows}
            for page in telling:
                page.overflow = told.get(page.log_id)
        aside = [
            (page.log_id, offset, error.reason) for page in pages for offset, error in page.corrupt
        ]
        if aside:
            await connection.execute(QUERIES["set_aside"], *_columns(aside, 3), self._shards.next())

    def _count_corrupt(self, offset: int, error: CorruptEntry) -> None:
        self._on_corrupt(error.reason)
        now = time.monotonic()
        if now - self._corrupt_logged_at >= _LOG_SECONDS:
            self._corrupt_logged_at = now
            self._log.error(
                "an entry of a user's log cannot be read and was set aside",
                reason=error.reason,
                error=str(error),
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
                QUERIES["delete_expired"], *_columns(rows, 2), now, self._shards.next()
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


def _take_some(most: int) -> Callable[[deque[Any]], Sequence[Any]]:
    def take(waiting: deque[Any]) -> Sequence[Any]:
        return [waiting.popleft() for _ in range(min(most, len(waiting)))]

    return take


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


# --- the ledger -----------------------------------------------------------------------------------


class _Expect(_Call, eq=False):
    """`sent`: notifications and whom they were sent to; None: anyone."""

    tenant: str
    sent: Sequence[tuple[str, Sequence[str] | None]]
    at: float
    queued: bool

    @property
    def rows(self) -> int:
        return sum(len(recipients or ()) for _, recipients in self.sent)

    @property
    def weight(self) -> int:
        return CALL_BYTES + ROW_BYTES * (len(self.sent) + self.rows)

    @property
    def ids(self) -> Iterable[str]:
        return (id for id, _ in self.sent)


class _Confirm(_Call, eq=False):
    tenant: str
    user_id: str
    ids: Sequence[str]
    at: float
    by_ack: bool

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def weight(self) -> int:
        return CALL_BYTES + ROW_BYTES * len(self.ids)


_LedgerCall: TypeAlias = "_Expect | _Confirm"


def _take_ledger_calls(waiting: deque[_LedgerCall]) -> Sequence[_LedgerCall]:
    """Acks first, with all that is to be noted of the same notifications: somebody waits for
    them."""
    batch: list[_LedgerCall] = []
    rows = 0
    acked: set[tuple[str, str]] = set()
    for call in waiting:
        if isinstance(call, _Confirm) and call.by_ack and rows < ROWS_PER_BATCH:
            acked.update((call.tenant, id) for id in call.ids)
            rows += call.rows
    if acked:
        others: list[_LedgerCall] = []
        for call in waiting:
            tenant = call.tenant
            first = any((tenant, id) in acked for id in call.ids)
            (batch if first else others).append(call)
        waiting.clear()
        waiting.extend(others)
        rows = sum(call.rows for call in batch)
    while waiting and (not batch or rows < ROWS_PER_BATCH):
        call = waiting.popleft()
        batch.append(call)
        rows += call.rows
    return batch


class _Change(msgspec.Struct):
    """What a transaction changed of the ledger's figures."""

    size: int = 0
    pending: int = 0
    expired: int = 0
    seconds: list[float] = msgspec.field(default_factory=list)


class _Record(msgspec.Struct, gc=False):
    id: int
    sent_at: float
    anyone: bool


class _Known(msgspec.Struct, gc=False):
    """A recipient as the ledger has him."""

    state: int
    sent_at: float
    by_ack: bool


class PostgresAckLedger:
    """`AckLedger` in PostgreSQL; figures are those of all who use the same database.

    `on_acknowledged(seconds)` and `on_expired(count)` tell what this process noted.
    """

    def __init__(
        self,
        postgres: Postgres,
        *,
        timeout_seconds: float,
        max_pending: int,
        clock: Callable[[], float],
        on_acknowledged: Callable[[float], None],
        on_expired: Callable[[int], None],
    ) -> None:
        self._postgres = postgres
        self._timeout_seconds = timeout_seconds
        # Nobody is let go of before he is late.
        self._retention = max(LEDGER_RETENTION_SECONDS, timeout_seconds)
        self._max_pending = max_pending
        self._clock = clock
        self._on_acknowledged = on_acknowledged
        self._on_expired = on_expired
        self._shards = _Shards()
        self._calls: Turn[_LedgerCall] = postgres.turn(self._note, take=_take_ledger_calls)

    async def aclose(self) -> None:
        """Note what waits, for two seconds at most. What is under way then may be noted all the
        same."""
        await self._calls.aclose(CLOSE_SECONDS)

    # --- calls ---

    def expect(
        self, tenant: str, notification_id: str, recipients: Sequence[str], *, queued: bool = False
    ) -> Awaitable[None]:
        """See `AckLedger.expect`. Raises Unavailable."""
        return self._expected(tenant, [(notification_id, recipients)], queued=queued)

    def expect_each(self, tenant: str, sent: Sequence[tuple[str, str]]) -> Awaitable[None]:
        """See `AckLedger.expect_each`. Raises Unavailable."""
        return self._expected(tenant, [(id, (user_id,)) for id, user_id in sent])

    def expect_anyone(self, tenant: str, notification_id: str) -> Awaitable[None]:
        """See `AckLedger.expect_anyone`. Raises Unavailable."""
        return self._expected(tenant, [(notification_id, None)])

    def _expected(
        self,
        tenant: str,
        sent: Sequence[tuple[str, Sequence[str] | None]],
        *,
        queued: bool = False,
    ) -> Awaitable[None]:
        call = _Expect(tenant, sent, self._clock(), queued=queued)
        self._calls.add(call, most=MAX_NOTES_BYTES)
        return call.future

    def acknowledge(
        self, tenant: str, user_id: str, ids: Sequence[str]
    ) -> Awaitable[frozenset[str]]:
        """See `AckLedger.acknowledge`. Raises Unavailable."""
        return self._confirmation(tenant, user_id, ids, by_ack=True)

    def confirm(self, tenant: str, user_id: str, ids: Sequence[str]) -> Awaitable[None]:
        """See `AckLedger.confirm`. Raises Unavailable."""
        return self._confirmation(tenant, user_id, ids, by_ack=False)

    def _confirmation(
        self, tenant: str, user_id: str, ids: Sequence[str], *, by_ack: bool
    ) -> asyncio.Future[Any]:
        ids = [id for id in ids if is_canonical_uuid(id)]
        call = _Confirm(tenant, user_id, ids, self._clock(), by_ack=by_ack)
        if ids:
            self._calls.add(call, most=MAX_WAITING_BYTES if by_ack else MAX_NOTES_BYTES)
        else:
            call.future.set_result(frozenset() if by_ack else None)
        return call.future

    async def _note(self, batch: Sequence[_LedgerCall]) -> None:
        """First whom to expect, then who confirmed: whichever came first, he has confirmed."""
        expects = [call for call in batch if isinstance(call, _Expect)]
        confirms = [call for call in batch if isinstance(call, _Confirm)]
        if expects:
            await self._expect(expects)
        if confirms:
            await self._confirm(confirms)

    # --- expecting ---

    async def _expect(self, calls: Sequence[_Expect]) -> None:
        wanted: dict[tuple[str, str], dict[str, _Expect]] = {}
        first: dict[tuple[str, str], float] = {}
        anyones: set[tuple[str, str]] = set()
        for call in calls:
            for id, recipients in call.sent:
                key = (call.tenant, id)
                if key not in first:
                    first[key] = call.at
                    if recipients is None:
                        anyones.add(key)
                users = wanted.setdefault(key, {})
                for user_id in recipients or ():
                    # Of two calls, the last says what he is.
                    users[user_id] = call

        async def work(connection: Connection) -> _Change:
            change = _Change()
            rows = await connection.fetch(
                QUERIES["lock_records"],
                *_columns(wanted, 2),
                list(first.values()),
                [key in anyones for key in first],
                [0 if key in anyones else len(users) for key, users in wanted.items()],
            )
            records: dict[int, dict[str, _Expect]] = {}
            before: list[int] = []
            for record_id, tenant, id, anyone, fresh in rows:
                change.size += fresh
                if anyone:
                    # What anybody may ack expects nobody in particular later either.
                    continue
                records[record_id] = wanted[tenant, str(id)]
                if not fresh:
                    before.append(record_id)
            known = await self._find(
                connection, [(id, user_id) for id in before for user_id in records[id]]
            )
            await self._put(connection, records, known, change)
            await self._add(connection, change)
            return change

        change = await self._postgres.transaction(work, calls=len(calls))
        self._tell(change)
        for call in calls:
            _resolve(call.future, None)

    async def _find(
        self, connection: Connection, wanted: Sequence[tuple[int, str]]
    ) -> dict[tuple[int, str], _Known]:
        if not wanted:
            return {}
        rows = await connection.fetch(QUERIES["find_acks"], *_columns(wanted, 2))
        return {
            (record_id, user_id): _Known(state, sent_at, by_ack)
            for record_id, user_id, state, sent_at, by_ack in rows
        }

    async def _put(
        self,
        connection: Connection,
        records: dict[int, dict[str, _Expect]],
        known: dict[tuple[int, str], _Known],
        change: _Change,
    ) -> None:
        put: list[tuple[int, str, int, float]] = []
        for record_id, users in records.items():
            for user_id, call in users.items():
                before = known.get((record_id, user_id))
                if before is None:
                    change.size += 1
                elif before.state == _CONFIRMED or (call.queued and before.state != _PENDING):
                    continue
                else:
                    change.pending -= before.state == _PENDING
                change.pending += not call.queued
                state = _QUEUED if call.queued else _PENDING
                put.append((record_id, user_id, state, call.at))
        if known:
            counts: defaultdict[int, int] = defaultdict(int)
            for record_id, _ in known:
                counts[record_id] += 1
            await connection.execute(QUERIES["correct_recipients"], *_columns(counts.items(), 2))
        if put:
            await connection.execute(QUERIES["put_acks"], *_columns(put, 4))

    async def _add(self, connection: Connection, change: _Change) -> None:
        """Bring the figures up to date, and let go of the oldest beyond the bound."""
        excess = await self._add_up(connection, change) - self._max_pending
        while excess > 0:
            oldest = await connection.fetch(QUERIES["lock_oldest_records"], RECORDS_PER_SWEEP, inf)
            going: list[int] = []
            freed = 0
            for record_id, recipients in oldest:
                if freed >= excess:
                    break
                freed += 1 + recipients
                going.append(record_id)
            if not going:
                # Others are letting go of them.
                return
            gone = await self._let_go(connection, going)
            excess += gone.size
            change.expired += gone.expired

    async def _add_up(self, connection: Connection, change: _Change) -> int:
        """Returns the size of the ledger with the change."""
        before: int = await connection.fetchval(
            QUERIES["add_to_ledger"],
            self._shards.next(),
            change.size,
            change.pending,
            len(change.seconds),
            change.expired,
            sum(change.seconds),
            change.seconds[: -_SAMPLES - 1 : -1],
        )
        return before + change.size

    async def _let_go(self, connection: Connection, ids: Sequence[int]) -> _Change:
        gone: Any = await connection.fetchrow(QUERIES["let_go"], ids)
        pending = gone["pending"]
        change = _Change(size=-gone["size"], pending=-pending, expired=pending)
        await self._add_up(connection, change)
        return change

    def _tell(self, change: _Change) -> None:
        for seconds in change.seconds:
            self._on_acknowledged(seconds)
        if change.expired:
            self._on_expired(change.expired)

    # --- confirming ---

    async def _confirm(self, calls: Sequence[_Confirm]) -> None:
        keys = list(dict.fromkeys((call.tenant, id) for call in calls for id in call.ids))

        async def work(connection: Connection) -> tuple[list[set[str]], _Change]:
            rows = await connection.fetch(QUERIES["lock_known_records"], *_columns(keys, 2))
            records = {
                (tenant, str(id)): _Record(record_id, sent_at, anyone)
                for record_id, tenant, id, sent_at, anyone in rows
            }
            if not records:
                return [set() for _ in calls], _Change()
            known = await self._find(
                connection,
                list(
                    {
                        (record.id, call.user_id): None
                        for call in calls
                        for id in call.ids
                        if (record := records.get((call.tenant, id))) is not None
                        and not record.anyone
                    }
                ),
            )
            judged = _Judged()
            answers = [judged.judge(call, records, known) for call in calls]
            await self._put_confirmed(connection, judged)
            return answers, judged.change

        answers, change = await self._postgres.transaction(work, calls=len(calls))
        self._tell(change)
        for call, answer in zip(calls, answers, strict=True):
            _resolve(call.future, frozenset(answer) if call.by_ack else None)

    async def _put_confirmed(self, connection: Connection, judged: _Judged) -> None:
        confirmed = judged.confirmed
        if confirmed:
            await connection.execute(
                QUERIES["confirm_acks"],
                *_columns(confirmed, 2),
                [call.at for call in confirmed.values()],
                [call.by_ack for call in confirmed.values()],
            )
        if judged.anyones:
            await connection.execute(
                QUERIES["count_anyones_acks"], *_columns(judged.anyones.items(), 2)
            )
        if judged.change.pending or judged.change.seconds:
            await self._add_up(connection, judged.change)

    # --- looking ---

    async def report(self, tenant: str, notification_id: str) -> AckReport | None:
        """See `AckLedger.report`. Raises Unavailable."""
        if not is_canonical_uuid(notification_id):
            return None

        async def work(connection: Connection) -> Sequence[Any]:
            rows: Sequence[Any] = await connection.fetch(QUERIES["report"], tenant, notification_id)
            return rows

        rows = await self._postgres.transaction(work)
        if not rows:
            return None
        return AckReport(
            notification_id,
            rows[0]["sent_at"],
            [_confirmation(row) for row in rows if row["user_id"] is not None],
            rows[0]["acks"],
        )

    async def stats(self) -> AckStats:
        """See `AckLedger.stats`. Raises Unavailable."""

        async def work(connection: Connection) -> Any:
            return await connection.fetchrow(QUERIES["ledger_figures"])

        row = await self._postgres.transaction(work)
        acknowledged = row["acknowledged"]
        recent = sorted(row["recent"])
        return AckStats(
            pending=row["pending"],
            acknowledged=acknowledged,
            expired=row["expired"],
            average_ms=row["seconds"] / acknowledged * 1000 if acknowledged else None,
            p95_ms=recent[int(len(recent) * 0.95)] * 1000 if recent else None,
        )

    # --- sweeping ---

    async def expire(self) -> int:
        """See `AckLedger.expire`. Works in small transactions, and leaves what others are at work
        on for the next time; cancelled, it has done a part. Raises Unavailable.
        """
        now = self._clock()
        total = 0
        more = True
        while more:
            late, more = await self._expire_some(now - self._timeout_seconds)
            total += late
        while await self._let_go_of_some(now - self._retention):
            pass
        return total

    async def _expire_some(self, before: float) -> tuple[int, bool]:
        async def work(connection: Connection) -> tuple[int, bool]:
            found = await connection.fetch(QUERIES["find_late"], before, ROWS_PER_SWEEP)
            locked = await connection.fetch(
                QUERIES["lock_free_records"], list({record_id for record_id, _ in found})
            )
            free = {record_id for (record_id,) in locked}
            rows = [(record_id, user_id) for record_id, user_id in found if record_id in free]
            if not rows:
                return 0, False
            late: int = await connection.fetchval(
                QUERIES["expire_acks"], *_columns(rows, 2), before
            )
            await self._add_up(connection, _Change(pending=-late, expired=late))
            return late, late > 0 and len(found) == ROWS_PER_SWEEP

        late, more = await self._postgres.transaction(work)
        self._tell(_Change(expired=late))
        return late, more

    async def _let_go_of_some(self, before: float) -> bool:
        """Of the oldest records; whether there may be more."""

        async def work(connection: Connection) -> tuple[_Change, bool]:
            oldest = await connection.fetch(
                QUERIES["lock_oldest_records"], RECORDS_PER_SWEEP, before
            )
            if not oldest:
                return _Change(), False
            change = await self._let_go(connection, [row["id"] for row in oldest])
            return change, len(oldest) == RECORDS_PER_SWEEP

        change, more = await self._postgres.transaction(work)
        self._tell(change)
        return more


class _Judged(msgspec.Struct, eq=False):
    """Confirmations held against what the ledger knows, call by call."""

    confirmed: dict[tuple[int, str], _Confirm] = msgspec.field(default_factory=dict)
    anyones: dict[int, int] = msgspec.field(default_factory=dict)
    change: _Change = msgspec.field(default_factory=_Change)

    def judge(
        self,
        call: _Confirm,
        records: dict[tuple[str, str], _Record],
        known: dict[tuple[int, str], _Known],
    ) -> set[str]:
        """Which of its ids this user may ack; what he confirmed before counts once."""
        answer = set()
        for id in call.ids:
            record = records.get((call.tenant, id))
            if record is None:
                continue
            if record.anyone:
                if call.by_ack:
                    self.anyones[record.id] = self.anyones.get(record.id, 0) + 1
                    self.change.seconds.append(call.at - record.sent_at)
            elif (ack := known.get((record.id, call.user_id))) is None:
                continue
            else:
                self._confirm(call, record, ack)
            answer.add(id)
        return answer

    def _confirm(self, call: _Confirm, record: _Record, ack: _Known) -> None:
        if ack.state == _CONFIRMED and (ack.by_ack or not call.by_ack):
            return
        if call.by_ack:
            since = ack.sent_at if ack.state == _PENDING else record.sent_at
            self.change.seconds.append(call.at - since)
        self.change.pending -= ack.state == _PENDING
        ack.state = _CONFIRMED
        ack.by_ack = call.by_ack
        self.confirmed[record.id, call.user_id] = call


def _confirmation(row: Any) -> Confirmation:
    if row["state"] != _CONFIRMED:
        return Confirmation(row["user_id"], _STATES[row["state"]])
    by: Literal["ack", "transport"] = "ack" if row["by_ack"] else "transport"
    return Confirmation(row["user_id"], "confirmed", row["confirmed_at"], by)


# --- templates ------------------------------------------------------------------------------------


class _StoredTemplate(msgspec.Struct, gc=False, omit_defaults=True):
    v: int
    id: str
    name: str
    event_type: str
    payload: msgspec.Raw
    updated_at: float
    priority: Priority = Priority.NORMAL
    ttl: int | None = None


_TEMPLATE_VERSION = 1
_decode_template = msgspec.json.Decoder(_StoredTemplate).decode


def _encode_template(template: Template) -> bytes:
    return msgspec.json.encode(
        _StoredTemplate(
            _TEMPLATE_VERSION,
            template.id,
            template.name,
            template.event_type,
            template.payload_template,
            template.updated_at,
            template.priority,
            template.ttl,
        )
    )


class PostgresTemplates:
    """`TemplateStore` in PostgreSQL. One that cannot be read is told to `on_corrupt(reason)`, and
    is as if it were not there."""

    def __init__(
        self,
        postgres: Postgres,
        *,
        on_corrupt: Callable[[str], None],
        max_per_tenant: int = MAX_TEMPLATES,
    ) -> None:
        self._postgres = postgres
        self._on_corrupt = on_corrupt
        self._max_per_tenant = max_per_tenant
        self._log = structlog.get_logger("notifyd")
        self._corrupt_logged_at = -inf

    async def get(self, tenant: str, id: str) -> Template:
        """Raises NotFound, Unavailable."""

        async def work(connection: Connection) -> Any:
            return await connection.fetchrow(QUERIES["get_template"], tenant, id)

        row = await self._postgres.transaction(work)
        template = None if row is None else self._template(row)
        if template is None:
            raise NotFound("There is no template with this id.")
        return template

    async def list(self, tenant: str) -> Sequence[Template]:
        """All of a tenant's templates, by id. Raises Unavailable."""

        async def work(connection: Connection) -> Sequence[Any]:
            rows: Sequence[Any] = await connection.fetch(QUERIES["list_templates"], tenant)
            return rows

        rows = await self._postgres.transaction(work)
        return [template for row in rows if (template := self._template(row)) is not None]

    async def create(self, tenant: str, template: Template) -> Template:
        """Raises Conflict for an id that is taken, or when the tenant has as many as it may;
        Unavailable."""
        body = _encode_template(template)

        async def work(connection: Connection) -> Any:
            await connection.execute(QUERIES["lock_templates"], tenant)
            return await connection.fetchrow(
                QUERIES["create_template"],
                tenant,
                template.id,
                template.created_at,
                body,
                self._max_per_tenant,
            )

        row = await self._postgres.transaction(work)
        if row["taken"]:
            raise Conflict(f"There is a template '{template.id}' already.", field="id")
        if row["full"]:
            raise Conflict(f"There are {self._max_per_tenant} templates already, the maximum.")
        return template

    async def replace(self, tenant: str, template: Template) -> Template:
        """Put `template` in place of its namesake, whose `created_at` stays; raises NotFound,
        Unavailable."""
        body = _encode_template(template)

        async def work(connection: Connection) -> float | None:
            created_at: float | None = await connection.fetchval(
                QUERIES["replace_template"], tenant, template.id, body
            )
            return created_at

        created_at = await self._postgres.transaction(work)
        if created_at is None:
            raise NotFound("There is no template with this id.")
        return msgspec.structs.replace(template, created_at=created_at)

    async def delete(self, tenant: str, id: str) -> None:
        """Raises NotFound, Unavailable."""

        async def work(connection: Connection) -> str | None:
            deleted: str | None = await connection.fetchval(QUERIES["delete_template"], tenant, id)
            return deleted

        if await self._postgres.transaction(work) is None:
            raise NotFound("There is no template with this id.")

    def _template(self, row: Any) -> Template | None:
        try:
            stored = _decode_template(row["body"])
        except msgspec.MsgspecError as error:
            self._count_corrupt("shape", str(error))
            return None
        if stored.v != _TEMPLATE_VERSION:
            self._count_corrupt("version", f"version {stored.v} and not {_TEMPLATE_VERSION}")
            return None
        return Template(
            stored.id,
            stored.name,
            stored.event_type,
            stored.payload,
            stored.priority,
            stored.ttl,
            row["created_at"],
            stored.updated_at,
        )

    def _count_corrupt(self, reason: str, text: str) -> None:
        self._on_corrupt(reason)
        now = time.monotonic()
        if now - self._corrupt_logged_at >= _LOG_SECONDS:
            self._corrupt_logged_at = now
            self._log.error("a template cannot be read", reason=reason, error=text)


# --- idempotency keys -----------------------------------------------------------------------------


class _Claim(_Call, eq=False):
    scope: Scope
    digest: bytes
    fingerprint: bytes
    alone: bool


class _End(_Call, eq=False):
    """`answer` None: without one that is kept."""

    scope: Scope
    digest: bytes
    answer: KeptAnswer | None

    @property
    def weight(self) -> int:
        return CALL_BYTES + (0 if self.answer is None else len(self.answer.body))


_KeyCall: TypeAlias = "_Claim | _End"


class _Key(msgspec.Struct, frozen=True, gc=False):
    """What is known of a key that was not given."""

    fingerprint: bytes
    answer: KeptAnswer | None


def _digest(scope: Scope) -> bytes:
    """32 bytes for a scope, whose parts cannot run into each other."""
    digest = blake2b(digest_size=32)
    for part in scope:
        text = part.encode()
        digest.update(len(text).to_bytes(8, "big"))
        digest.update(text)
    return digest.digest()


class PostgresIdempotencyKeys:
    """`IdempotencyKeys` in PostgreSQL, shared by all who use the same database.

    Who claims a key has it for 60 s; if it did not end by then (its process died), the next one
    works. Who waits for another process's answer looks again after 50 ms, later once a second.
    `clock` is in Unix seconds.
    """

    def __init__(
        self,
        postgres: Postgres,
        *,
        window_seconds: float,
        clock: Callable[[], float],
        max_waiters: int = MAX_WAITERS,
    ) -> None:
        self._postgres = postgres
        self._window_seconds = window_seconds
        self._clock = clock
        self._max_waiters = max_waiters
        self._owner = os.urandom(16)
        self._working: set[Scope] = set()
        self._waiting: dict[Scope, set[asyncio.Future[None]]] = {}
        self._calls: Turn[_KeyCall] = postgres.turn(self._work, take=_take_some(ROWS_PER_BATCH))

    async def aclose(self) -> None:
        """Keep the answers that wait, for two seconds at most; keys that are still at work are
        given up as their lease runs out."""
        await self._calls.aclose(CLOSE_SECONDS)

    def claim(
        self, scope: Scope, fingerprint: bytes, *, alone: bool = False
    ) -> Awaitable[Fresh | Replay | Wait]:
        """Who works on this key.

        Raises ValidationError where its body was another one, Unavailable. Cancelled, it gives the
        key up if it just got it.
        """
        call = _Claim(scope, _digest(scope), fingerprint, alone)
        self._calls.add(call)
        return call.future

    async def wait(self, scope: Scope, fingerprint: bytes) -> Fresh | Replay:
        """What `Wait.outcome` says. Raises Unavailable too."""
        if len(self._waiting.get(scope, ())) >= self._max_waiters:
            raise RateLimited(
                "Too many calls wait for the answer of one idempotency key.", retry_after=1
            )
        pause = _POLL_FIRST_SECONDS
        while True:
            # Listens before it claims, so that it misses no end that comes after that.
            ended = _future()
            self._waiting.setdefault(scope, set()).add(ended)
            try:
                claim = await self.claim(scope, fingerprint)
                if not isinstance(claim, Wait):
                    return claim
                here = scope in self._working
                await asyncio.wait((ended,), timeout=_POLL_LONGEST_SECONDS if here else pause)
                pause = min(2 * pause, _POLL_LONGEST_SECONDS)
            finally:
                self._stop_waiting(scope, ended)

    def _stop_waiting(self, scope: Scope, ended: asyncio.Future[None]) -> None:
        waiting = self._waiting[scope]
        waiting.discard(ended)
        if not waiting:
            del self._waiting[scope]

    def keep(self, claim: Fresh, answer: KeptAnswer) -> Awaitable[None]:
        """What `Fresh.complete` says, of an answer that is kept. Raises Unavailable."""
        return self._end(claim, answer)

    def release(self, claim: Fresh) -> Awaitable[None]:
        """What `Fresh.abandon` says. Raises Unavailable: the key is free when its lease ends."""
        return self._end(claim, None)

    def lost(self, claim: Fresh) -> None:
        """The claim went away without an end: release it, or leave it to its lease."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        # Whoever lost it waits for nothing; where this fails, the lease runs out.
        with suppress(Unavailable):
            self._end(claim, None).add_done_callback(asyncio.Future.exception)

    def _end(self, claim: Fresh, answer: KeptAnswer | None) -> asyncio.Future[None]:
        scope = claim.scope
        call = _End(scope, _digest(scope), answer)
        # Also where it never gets as far as the store.
        call.future.add_done_callback(lambda _: self._working.discard(scope))
        try:
            self._calls.add(call)
        except Unavailable:
            call.future.cancel()
            raise
        return call.future

    async def _work(self, batch: Sequence[_KeyCall]) -> None:
        """First what ends, then what begins, so that a key can go from one to the next."""
        ends = [call for call in batch if isinstance(call, _End)]
        claims = [call for call in batch if isinstance(call, _Claim)]
        if ends:
            await self._put_ends(ends)
        if claims:
            await self._give(claims)

    async def _put_ends(self, calls: Sequence[_End]) -> None:
        kept = [(call.digest, call.answer) for call in calls if call.answer is not None]
        released = [call.digest for call in calls if call.answer is None]

        async def work(connection: Connection) -> None:
            await connection.fetch(QUERIES["lock_keys"], [call.digest for call in calls])
            if kept:
                await connection.execute(
                    QUERIES["keep_answers"],
                    [digest for digest, _ in kept],
                    [answer.status for _, answer in kept],
                    [answer.body for _, answer in kept],
                    self._clock() + self._window_seconds,
                    self._owner,
                )
            if released:
                await connection.execute(QUERIES["release_keys"], released, self._owner)

        try:
            await self._postgres.transaction(work, calls=len(calls))
        finally:
            for call in calls:
                self._working.discard(call.scope)
        for call in calls:
            _resolve(call.future, None)
            for waiter in self._waiting.get(call.scope, ()):
                _resolve(waiter, None)

    async def _give(self, calls: Sequence[_Claim]) -> None:
        first: dict[bytes, _Claim] = {}
        for call in calls:
            first.setdefault(call.digest, call)
        now = self._clock()

        async def work(connection: Connection) -> tuple[set[bytes], dict[bytes, _Key]]:
            rows = await connection.fetch(
                QUERIES["claim_keys"],
                list(first),
                [call.fingerprint for call in first.values()],
                self._owner,
                now + LEASE_SECONDS,
                now,
                [digest for digest, call in first.items() if call.alone],
            )
            given = {row["scope"] for row in rows}
            taken = [digest for digest in first if digest not in given]
            known = {}
            if taken:
                for digest, fingerprint, status, body in await connection.fetch(
                    QUERIES["find_keys"], taken
                ):
                    answer = None if status is None else KeptAnswer(status, body)
                    known[digest] = _Key(fingerprint, answer)
            await connection.execute(QUERIES["forget_keys"], now, 2 * len(first))
            return given, known

        given, known = await self._postgres.transaction(work, calls=len(calls))
        for call in calls:
            self._answer(call, first[call.digest], given, known)

    def _answer(
        self, call: _Claim, first: _Claim, given: set[bytes], known: dict[bytes, _Key]
    ) -> None:
        if call.digest in given:
            if call is first:
                self._working.add(call.scope)
                # Where nobody takes it any more, it is lost and released.
                _resolve(call.future, Fresh(self, call.scope))
                return
            key = _Key(first.fingerprint, None)
        else:
            # One that is gone again was released just now: whoever waits will get it.
            key = known.get(call.digest, _Key(call.fingerprint, None))
        if call.future.done():
            return
        if key.fingerprint != call.fingerprint:
            call.future.set_exception(
                ValidationError(
                    "This idempotency key was used for another body.",
                    field="idempotency_key",
                    constraint="one body for each key",
                )
            )
        elif key.answer is not None:
            call.future.set_result(Replay(key.answer))
        else:
            call.future.set_result(Wait(self, call.scope, call.fingerprint))


# --- tenants --------------------------------------------------------------------------------------

_encode_limits = msgspec.json.Encoder().encode
_decode_limits = msgspec.json.Decoder(LimitChanges).decode


class PostgresTenants:
    """`TenantStore` in PostgreSQL. Limits that cannot be read are told to `on_corrupt(reason)`, and
    are as if they had not been set."""

    def __init__(
        self,
        postgres: Postgres,
        *,
        on_corrupt: Callable[[str], None],
        max_tenants: int = MAX_TENANTS,
    ) -> None:
        self._postgres = postgres
        self._on_corrupt = on_corrupt
        self._max_tenants = max_tenants
        self._log = RateLimitedLog(structlog.get_logger("notifyd"))
        self._month: date | None = None

    async def read(self, known: int | None) -> Kept | None:
        """See `TenantStore.read`. Raises Unavailable."""

        async def work(connection: Connection) -> tuple[int, Sequence[Any]]:
            version: int = await connection.fetchval(QUERIES["limits_version"])
            if version == known:
                return version, ()
            return version, await connection.fetch(QUERIES["read_limits"])

        version, rows = await self._postgres.transaction(work)
        if version == known:
            return None
        limits = {row["id"]: self._decoded(row["limits"]) for row in rows}
        return Kept(version, {name: each for name, each in limits.items() if each is not None})

    def _decoded(self, body: bytes) -> LimitChanges | None:
        try:
            return _decode_limits(body)
        except msgspec.MsgspecError as error:
            self._on_corrupt("limits")
            self._log.warning("a tenant's limits cannot be read", reason="limits", error=str(error))
            return None

    async def put(self, tenant: str, limits: LimitChanges) -> None:
        """See `TenantStore.put`. Raises Unavailable."""

        async def work(connection: Connection) -> str | None:
            await connection.execute(QUERIES["change_limits"])
            kept: str | None = await connection.fetchval(
                QUERIES["put_limits"], tenant, _encode_limits(limits), self._max_tenants
            )
            return kept

        if await self._postgres.transaction(work) is None:
            raise too_many(self._max_tenants)

    async def add(self, day: date, counts: Mapping[str, Counts]) -> None:
        """See `TenantStore.add`. Raises Unavailable."""
        month = day.replace(day=1)

        async def work(connection: Connection) -> None:
            await connection.execute(
                QUERIES["add_counts"],
                day,
                list(counts),
                [each.notifications for each in counts.values()],
                [each.deliveries for each in counts.values()],
            )
            if self._month != month:
                await connection.execute(QUERIES["forget_counts"], month)

        await self._postgres.transaction(work)
        self._month = month

    async def figures(self, day: date, tenant: str | None = None) -> Mapping[str, Figures]:
        """See `TenantStore.figures`. Raises Unavailable."""

        async def work(connection: Connection) -> Sequence[Any]:
            rows: Sequence[Any] = await connection.fetch(QUERIES["tenant_figures"], day, tenant)
            return rows

        return {
            row["tenant"]: Figures(
                Counts(row["notifications_today"], row["deliveries_today"]),
                Counts(row["notifications"], row["deliveries"]),
            )
            for row in await self._postgres.transaction(work)
        }
