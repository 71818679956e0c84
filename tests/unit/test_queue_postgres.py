"""What of notifyd.queue.postgres needs no server; what it promises stands in tests/contract."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Sequence
from pathlib import Path

import pytest

import notifyd.queue
from notifyd.errors import Unavailable
from notifyd.idempotency import key_scope
from notifyd.identifiers import new_uuid
from notifyd.options import BreakerSettings
from notifyd.postgres import Postgres
from notifyd.queue.postgres.calls import MIGRATIONS, QUERIES, ROWS_PER_BATCH
from notifyd.queue.postgres.idempotency import _digest
from notifyd.queue.postgres.ledger import (
    MAX_NOTES_BYTES,
    PostgresAckLedger,
    _Confirm,
    _Expect,
    _take_ledger_calls,
)
from notifyd.queue.postgres.logs import (
    Room,
    _admit,
    _Enqueue,
    _Erase,
    _Item,
    _Log,
    _Settle,
    _take_writes,
    _Write,
)
from notifyd.resilience import CircuitBreaker
from tests.unit.connected import NOW, a_notification

QUEUE = Path(notifyd.queue.__file__).parent


def an_enqueue(*users: str, size: int = 100) -> _Enqueue:
    return _Enqueue("acme", users, a_notification(), b"x" * size, 0.0, owed=False)


def a_settle(user: str) -> _Settle:
    return _Settle(("acme", user), ["id"], heard=False)


def an_erase(user: str) -> _Erase:
    return _Erase(("acme", user))


def batches(*calls: _Write) -> list[list[int]]:
    """The numbers of the calls in each batch."""
    waiting = deque(calls)
    found = []
    while waiting:
        batch: Sequence[_Write] = _take_writes(waiting)
        found.append([calls.index(call) for call in batch])
    return found


class TestBatches:
    async def test_what_does_not_depend_on_each_other_goes_together(self) -> None:
        assert batches(
            an_enqueue("ann"), a_settle("bob"), an_enqueue("cleo", "ann"), a_settle("ann")
        ) == [[0, 1, 2, 3]]

    async def test_what_is_stored_after_settling_stays_after_it(self) -> None:
        assert batches(a_settle("ann"), an_enqueue("bob"), an_enqueue("cleo", "ann")) == [
            [0, 1],
            [2],
        ]

    async def test_erasing_goes_by_itself(self) -> None:
        assert batches(an_enqueue("ann"), an_erase("ann"), an_erase("bob"), an_enqueue("ann")) == [
            [0],
            [1, 2],
            [3],
        ]

    async def test_are_bounded_by_rows_and_bytes(self) -> None:
        many = [str(n) for n in range(ROWS_PER_BATCH - 1)]
        assert batches(an_enqueue(*many), an_enqueue("a"), an_enqueue("b")) == [[0, 1], [2]]
        large = 3 * 1024 * 1024
        assert batches(*(an_enqueue("ann", size=large) for _ in range(3))) == [[0, 1], [2]]


def an_expect(*ids: str) -> _Expect:
    return _Expect("acme", [(id, ("ann",)) for id in ids], 0.0, False)


def a_confirm(*ids: str, by_ack: bool) -> _Confirm:
    return _Confirm("acme", "ann", ids, 0.0, by_ack)


class TestLedgerBatches:
    async def test_of_nothing(self) -> None:
        assert list(_take_ledger_calls(deque())) == []

    async def test_without_acks_are_in_order_and_bounded(self) -> None:
        many = an_expect(*(str(n) for n in range(ROWS_PER_BATCH - 1)))
        calls: list[_Expect | _Confirm] = [many, an_expect("a"), a_confirm("a", by_ack=False)]
        waiting = deque(calls)
        assert list(_take_ledger_calls(waiting)) == calls[:2]
        assert list(waiting) == calls[2:]

    async def test_an_ack_overtakes_what_waits_but_not_what_is_noted_of_the_same(self) -> None:
        several = [an_expect(*(f"{n}-{m}" for m in range(ROWS_PER_BATCH))) for n in range(3)]
        its_own = an_expect("other", "acked")
        confirmed = a_confirm("acked", by_ack=False)
        ack = a_confirm("acked", by_ack=True)
        another_tenants = _Expect("other", [("acked", ("ann",))], 0.0, False)
        calls: list[_Expect | _Confirm] = [*several, its_own, another_tenants, confirmed, ack]
        waiting = deque(calls)
        batch = _take_ledger_calls(waiting)
        assert list(batch) == [its_own, confirmed, ack, several[0]]
        assert list(waiting) == [*several[1:], another_tenants]


async def test_acks_have_room_where_notes_have_none() -> None:
    postgres = Postgres("postgresql:///none", CircuitBreaker(BreakerSettings()), migrations=())
    ledger = PostgresAckLedger(
        postgres,
        timeout_seconds=30,
        max_pending=1000,
        clock=lambda: NOW,
        on_acknowledged=lambda seconds: None,
        on_expired=lambda count: None,
    )
    sent = [(new_uuid(), "ann") for _ in range(1000)]
    waiting: list[Awaitable[object]] = []

    def note() -> None:
        while True:
            waiting.append(ledger.expect_each("acme", sent))

    with pytest.raises(Unavailable, match="keep up"):
        note()
    assert MAX_NOTES_BYTES / 2 < ledger._calls.weight <= MAX_NOTES_BYTES
    with pytest.raises(Unavailable, match="keep up"):
        ledger.confirm("acme", "ann", [id for id, _ in sent] * 10)
    waiting.append(ledger.acknowledge("acme", "ann", [id for id, _ in sent] * 10))
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(each) for each in outcomes} == {Unavailable}


class Full:
    """A full log, and what comes to it: ranks in the order of their offsets."""

    def __init__(self, *ranks: int, size: int, depth: int = 0, most: float = 1000) -> None:
        self.log = _Log(0.0)
        self.log.id = 1
        self.log.pending = len(ranks)
        self.log.least = sorted((rank, offset, None) for offset, rank in enumerate(ranks, 1))
        self.next_offset = len(ranks) + 1
        self.room = Room(max_size_per_user=size, max_messages=most, depth=depth or len(ranks))

    def add(self, rank: int) -> tuple[bool, int | None]:
        item = _Item(0, 0, self.log)
        item.offset = self.next_offset
        self.next_offset += 1
        stored, loser = _admit(item, rank, self.room)
        return stored, None if loser is None else loser.offset


class TestMakingRoom:
    def test_the_least_goes_first_and_of_those_the_oldest(self) -> None:
        full = Full(1, 0, 1, 0, size=4)
        for _ in range(3):
            assert full.add(1) == (True, None)
        assert full.room.victims == [(1, 2), (1, 4), (1, 1)]
        assert (full.room.dropped, full.log.pending, full.room.depth) == (3, 4, 4)

    def test_the_new_one_may_be_the_least(self) -> None:
        full = Full(2, 2, size=2)
        assert full.add(1) == (False, None)
        assert (full.room.victims, full.room.dropped) == ([], 0)

    def test_one_of_the_same_batch_may_be_given_up(self) -> None:
        full = Full(2, size=2)
        assert full.add(0) == (True, None)
        assert full.add(1) == (True, 2)
        assert (full.room.victims, full.log.given_up, full.room.dropped) == ([], [2], 1)

    def test_over_the_bound_of_all_users_who_has_none_gets_none(self) -> None:
        assert Full(size=10, depth=5, most=5).add(3) == (False, None)
        own = Full(1, size=10, depth=5, most=5)
        assert own.add(1) == (True, None)
        assert own.room.victims == [(1, 1)]


class TestFiles:
    def test_every_query_has_a_sentence_and_is_used(self) -> None:
        text = (QUEUE / "sql" / "queries.sql").read_text()
        described = re.findall(r"^-- name: ([a-z_]+)\n-- [A-Z]", text, re.MULTILINE)
        code = "".join(each.read_text() for each in (QUEUE / "postgres").glob("*.py"))
        used = re.findall(r'QUERIES\["([a-z_]+)"\]', code)
        assert described == list(QUERIES)
        assert set(used) == set(QUERIES)

    def test_migrations_are_numbered_without_a_gap(self) -> None:
        assert [each.number for each in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))

    def test_every_migration_says_what_it_is_for(self) -> None:
        assert all(each.sql.startswith("-- ") for each in MIGRATIONS)


def test_scopes_do_not_run_into_each_other() -> None:
    scopes = [("a", "bc", "/r", "k"), ("ab", "c", "/r", "k"), ("a", "bc/", "r", "k")]
    assert len({_digest(key_scope(*scope)) for scope in scopes}) == 3
