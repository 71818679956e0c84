"""What is memory's own; what every backend promises stands in tests/contract."""

from __future__ import annotations

import asyncio

from notifyd.eventually import is_awaitable
from notifyd.queue.memory import (
    ACK_TIME_SAMPLES,
    LEDGER_RETENTION_SECONDS,
    LOGS_PER_TURN,
    RECORDS_PER_TURN,
    MemoryAckLedger,
    MemoryUserLogs,
    _all_of,
)
from tests.unit.connected import Clock, a_notification


def user_logs(clock: Clock, **bounds: int) -> MemoryUserLogs:
    return MemoryUserLogs(
        max_size_per_user=bounds.get("max_size_per_user", 100),
        max_messages=bounds.get("max_messages", 100_000),
        message_ttl_seconds=1000,
        clock=clock,
        on_dropped=lambda: None,
    )


def ack_ledger(clock: Clock, *, max_pending: int = 100_000) -> MemoryAckLedger:
    return MemoryAckLedger(
        timeout_seconds=30,
        max_pending=max_pending,
        clock=clock,
        on_acknowledged=lambda seconds: None,
        on_expired=lambda count: None,
    )


class TestUserLogs:
    def test_answers_at_once(self) -> None:
        logs = user_logs(Clock())
        notification = a_notification()
        answers: list[object] = [
            logs.enqueue("t", ["u"], notification),
            logs.read("t", "u"),
            logs.settle("t", "u", [notification.id]),
            logs.erase("t", "u"),
            logs.depth(),
        ]
        assert not any(is_awaitable(answer) for answer in answers)

    def test_a_log_without_entries_is_forgotten(self) -> None:
        clock = Clock()
        logs = user_logs(clock, max_size_per_user=1)
        first, second = a_notification(), a_notification()
        logs.enqueue("t", ["u"], first)
        logs.enqueue("t", ["u"], second)
        logs.settle("t", "u", [second.id])
        # What it gave up is still to be told.
        assert logs._logs != {}
        assert logs.read("t", "u").overflow is not None
        assert logs._logs == {}

    async def test_expiring_leaves_turns_to_others(self) -> None:
        clock = Clock()
        logs = user_logs(clock)
        users = [f"u{n}" for n in range(LOGS_PER_TURN * 2)]
        logs.enqueue("t", users, a_notification(ttl=10))
        clock.now += 20
        expiring = asyncio.ensure_future(logs.expire())
        await asyncio.sleep(0)
        assert logs.depth() == LOGS_PER_TURN
        assert await expiring == LOGS_PER_TURN * 2
        assert (logs.depth(), logs._logs) == (0, {})

    async def test_what_is_erased_meanwhile_is_counted_off_once(self) -> None:
        clock = Clock()
        logs = user_logs(clock)
        users = [f"u{n}" for n in range(LOGS_PER_TURN + 2)]
        logs.enqueue("t", users, a_notification(ttl=10))
        clock.now += 20
        expiring = asyncio.ensure_future(logs.expire())
        await asyncio.sleep(0)
        last = users[-1]
        assert logs.erase("t", last) == 1
        alive = a_notification(now=clock.now)
        logs.enqueue("t", [last], alive)
        assert await expiring == LOGS_PER_TURN + 1
        assert logs.depth() == 1
        assert [entry.notification for entry in logs.read("t", last).entries] == [alive]

    async def test_cancelled_it_has_done_a_part(self) -> None:
        clock = Clock()
        logs = user_logs(clock)
        users = [f"u{n}" for n in range(LOGS_PER_TURN * 2)]
        logs.enqueue("t", users, a_notification(ttl=10))
        clock.now += 20
        expiring = asyncio.ensure_future(logs.expire())
        await asyncio.sleep(0)
        expiring.cancel()
        await asyncio.wait({expiring})
        assert logs.depth() == LOGS_PER_TURN
        assert await logs.expire() == LOGS_PER_TURN


class TestAckLedger:
    def test_keeps_nothing_beyond_its_bound(self) -> None:
        clock = Clock()
        ledger = ack_ledger(clock, max_pending=100)
        for n in range(1000):
            ledger.expect("t", f"n{n}", ["ann", "bob"])
            ledger.expect_anyone("t", f"a{n}")
            assert ledger._size <= 100
            assert len(ledger._sent) <= 100
        assert ledger._size == sum(1 + len(_all_of(each)) for each in ledger._records.values())
        assert len(ledger._order) == len(ledger._records)

    def test_a_full_one_makes_room_for_many(self) -> None:
        ledger = ack_ledger(Clock(), max_pending=1280)
        for n in range(1280):
            ledger.expect_anyone("t", f"n{n}")
        assert ledger._size == 1280
        ledger.expect_anyone("t", "one too many")
        assert ledger._size == len(ledger._records) == len(ledger._order) == 1270

    def test_keeps_nothing_beyond_its_bound_of_many_at_once(self) -> None:
        ledger = ack_ledger(Clock(), max_pending=100)
        for n in range(100):
            ledger.expect_each("t", [(f"n{n}-{m}", "ann") for m in range(70)])
            assert ledger._size == 2 * len(ledger._records) == 2 * len(ledger._order) <= 100
            assert len(ledger._sent) == len(ledger._sent_at) <= 100
        assert ledger.stats().pending == 50
        assert ledger.stats().expired == 7000 - 50

    async def test_an_hour_later_nothing_is_left(self) -> None:
        clock = Clock()
        ledger = ack_ledger(clock)
        for n in range(RECORDS_PER_TURN * 2):
            ledger.expect("t", f"n{n}", ["ann"])
        ledger.acknowledge("t", "ann", ["n1"])
        clock.now += 31
        assert await ledger.expire() == RECORDS_PER_TURN * 2 - 1
        clock.now += LEDGER_RETENTION_SECONDS
        assert await ledger.expire() == 0
        assert (ledger._size, ledger._records, len(ledger._order)) == (0, {}, 0)
        assert ledger._sent == type(ledger._sent)()

    def test_ack_times_are_those_of_late(self) -> None:
        clock = Clock()
        ledger = ack_ledger(clock)
        for n in range(ACK_TIME_SAMPLES * 2):
            ledger.expect("t", f"n{n}", ["ann"])
        clock.now += 100
        ledger.acknowledge("t", "ann", [f"n{n}" for n in range(ACK_TIME_SAMPLES)])
        for n in range(ACK_TIME_SAMPLES, ACK_TIME_SAMPLES * 2):
            ledger.expect("t", f"n{n}", ["ann"])
        clock.now += 1
        ledger.acknowledge(
            "t", "ann", [f"n{n}" for n in range(ACK_TIME_SAMPLES, ACK_TIME_SAMPLES * 2)]
        )
        assert ledger.stats().p95_ms == 1000
