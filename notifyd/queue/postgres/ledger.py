"""The ledger of acknowledgements in PostgreSQL."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from math import inf
from typing import Any, Literal, TypeAlias

import msgspec

from notifyd.identifiers import is_canonical_uuid
from notifyd.postgres import CLOSE_SECONDS, MAX_WAITING_BYTES, Connection, Postgres, Turn
from notifyd.queue.base import AckReport, AckStats, Confirmation
from notifyd.queue.postgres.calls import (
    CALL_BYTES,
    QUERIES,
    ROW_BYTES,
    ROWS_PER_BATCH,
    ROWS_PER_SWEEP,
    Call,
    Shards,
    columns,
    resolve,
)

LEDGER_RETENTION_SECONDS = 3600.0
RECORDS_PER_SWEEP = 200

MAX_NOTES_BYTES = MAX_WAITING_BYTES // 4
"""So much of what nobody waits for may wait for the ledger: acks have room beside it."""

_SAMPLES = 64

_QUEUED, _PENDING, _CONFIRMED, _EXPIRED = range(4)
_STATES: tuple[Literal["queued", "pending", "confirmed", "expired"], ...] = (
    "queued",
    "pending",
    "confirmed",
    "expired",
)


class _Expect(Call, eq=False):
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


class _Confirm(Call, eq=False):
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
        self._shards = Shards()
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

    def resent(self, tenant: str, user_id: str, ids: Sequence[str]) -> Awaitable[None]:
        """See `AckLedger.resent`. Raises Unavailable."""
        return self._expected(tenant, [(id, (user_id,)) for id in ids])

    def note_resent(self, tenant: str, ids: Sequence[str]) -> None:
        """Nothing is left for later."""

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
                *columns(wanted, 2),
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
            resolve(call.future, None)

    async def _find(
        self, connection: Connection, wanted: Sequence[tuple[int, str]]
    ) -> dict[tuple[int, str], _Known]:
        if not wanted:
            return {}
        rows = await connection.fetch(QUERIES["find_acks"], *columns(wanted, 2))
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
            await connection.execute(QUERIES["correct_recipients"], *columns(counts.items(), 2))
        if put:
            await connection.execute(QUERIES["put_acks"], *columns(put, 4))

    async def _add(self, connection: Connection, change: _Change) -> None:
        """Bring the figures up to date, and let go of the oldest beyond the bound."""
        # One row of totals for all of it: two transactions with several could wait for each other.
        shard = self._shards.next()
        excess = await self._add_up(connection, change, shard) - self._max_pending
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
            gone = await self._let_go(connection, going, shard)
            excess += gone.size
            change.expired += gone.expired

    async def _add_up(self, connection: Connection, change: _Change, shard: int) -> int:
        """Returns the size of the ledger with the change."""
        before: int = await connection.fetchval(
            QUERIES["add_to_ledger"],
            shard,
            change.size,
            change.pending,
            len(change.seconds),
            change.expired,
            sum(change.seconds),
            change.seconds[: -_SAMPLES - 1 : -1],
        )
        return before + change.size

    async def _let_go(self, connection: Connection, ids: Sequence[int], shard: int) -> _Change:
        gone: Any = await connection.fetchrow(QUERIES["let_go"], ids)
        pending = gone["pending"]
        change = _Change(size=-gone["size"], pending=-pending, expired=pending)
        await self._add_up(connection, change, shard)
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
            rows = await connection.fetch(QUERIES["lock_known_records"], *columns(keys, 2))
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
            resolve(call.future, frozenset(answer) if call.by_ack else None)

    async def _put_confirmed(self, connection: Connection, judged: _Judged) -> None:
        confirmed = judged.confirmed
        if confirmed:
            await connection.execute(
                QUERIES["confirm_acks"],
                *columns(confirmed, 2),
                [call.at for call in confirmed.values()],
                [call.by_ack for call in confirmed.values()],
            )
        if judged.anyones:
            await connection.execute(
                QUERIES["count_anyones_acks"], *columns(judged.anyones.items(), 2)
            )
        if judged.change.pending or judged.change.seconds:
            await self._add_up(connection, judged.change, self._shards.next())

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
            late: int = await connection.fetchval(QUERIES["expire_acks"], *columns(rows, 2), before)
            change = _Change(pending=-late, expired=late)
            await self._add_up(connection, change, self._shards.next())
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
            ids = [row["id"] for row in oldest]
            change = await self._let_go(connection, ids, self._shards.next())
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
                    self._took(call, record.sent_at)
            elif (ack := known.get((record.id, call.user_id))) is None:
                continue
            else:
                self._confirm(call, record, ack)
            answer.add(id)
        return answer

    def _took(self, call: _Confirm, since: float) -> None:
        # Another server's clock may be ahead of this one's.
        self.change.seconds.append(max(0.0, call.at - since))

    def _confirm(self, call: _Confirm, record: _Record, ack: _Known) -> None:
        if ack.state == _CONFIRMED and (ack.by_ack or not call.by_ack):
            return
        if call.by_ack:
            self._took(call, ack.sent_at if ack.state == _PENDING else record.sent_at)
        self.change.pending -= ack.state == _PENDING
        ack.state = _CONFIRMED
        ack.by_ack = call.by_ack
        self.confirmed[record.id, call.user_id] = call


def _confirmation(row: Any) -> Confirmation:
    if row["state"] != _CONFIRMED:
        return Confirmation(row["user_id"], _STATES[row["state"]])
    by: Literal["ack", "transport"] = "ack" if row["by_ack"] else "transport"
    return Confirmation(row["user_id"], "confirmed", row["confirmed_at"], by)
