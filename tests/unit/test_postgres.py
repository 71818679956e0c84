"""What of notifyd.postgres needs no server; the rest stands in tests/adversity/test_postgres.py."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from notifyd.errors import ConfigurationError, Unavailable
from notifyd.options import BreakerSettings
from notifyd.postgres import Postgres, Turn, load_migrations, load_queries
from notifyd.resilience import CircuitBreaker


class Call:
    def __init__(self, name: str = "", weight: int = 1) -> None:
        self.name = name
        self.weight = weight
        self.deadline = 0.0
        self.future: asyncio.Future[str] = asyncio.get_running_loop().create_future()


def take(most: int) -> Callable[[deque[Call]], Sequence[Call]]:
    return lambda waiting: [waiting.popleft() for _ in range(min(most, len(waiting)))]


class Store:
    """Answers batches when it is let."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.at_work = 0
        self.most_at_work = 0
        self.go = asyncio.Event()
        self.go.set()
        self.error: BaseException | None = None

    async def answer(self, batch: Sequence[Call]) -> None:
        self.batches.append([call.name for call in batch])
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        await self.go.wait()
        self.at_work -= 1
        if self.error is not None:
            raise self.error
        for call in batch:
            if not call.future.done():
                call.future.set_result(call.name)


def calls(turn: Turn[Call], names: str) -> list[asyncio.Future[str]]:
    made = [Call(name) for name in names]
    for call in made:
        turn.add(call)
    return [call.future for call in made]


class TestTurn:
    async def test_calls_of_one_turn_share_a_batch(self) -> None:
        store = Store()
        turn = Turn(store.answer, timeout=60, take=take(100))
        assert await asyncio.gather(*calls(turn, "abc")) == ["a", "b", "c"]
        assert store.batches == [["a", "b", "c"]]

    async def test_what_comes_meanwhile_is_the_next_batch(self) -> None:
        store = Store()
        store.go.clear()
        turn = Turn(store.answer, timeout=60, take=take(2))
        waiting = calls(turn, "a")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting += calls(turn, "bcd")
        store.go.set()
        await asyncio.gather(*waiting)
        assert store.batches == [["a"], ["b", "c"], ["d"]]
        assert store.most_at_work == 1

    async def test_several_batches_at_once_where_order_does_not_matter(self) -> None:
        store = Store()
        store.go.clear()
        turn = Turn(store.answer, timeout=60, take=take(1), at_once=2)
        waiting = calls(turn, "abcd")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert store.at_work == 2
        store.go.set()
        await asyncio.gather(*waiting)
        assert (store.most_at_work, sum(store.batches, [])) == (2, list("abcd"))  # noqa: RUF017  # four of them

    async def test_each_caller_of_a_failed_batch_has_his_own_exception(self) -> None:
        store = Store()
        store.error = Unavailable("away", retry_after=7)
        turn = Turn(store.answer, timeout=60, take=take(100))
        first, second = await asyncio.gather(*calls(turn, "ab"), return_exceptions=True)
        assert isinstance(first, Unavailable)
        assert isinstance(second, Unavailable)
        assert first is not second
        assert first.retry_after == second.retry_after == 7

    async def test_who_waits_behind_a_store_that_hangs_fails_with_it(self) -> None:
        store = Store()
        store.go.clear()
        store.error = Unavailable("away")
        store.error.__cause__ = TimeoutError()
        turn = Turn(store.answer, timeout=60, take=take(1))
        waiting = calls(turn, "abc")
        await asyncio.sleep(0)
        store.go.set()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in outcomes] == [Unavailable] * 3
        assert store.batches == [["a"]]

    async def test_who_waits_behind_one_that_refused_is_tried(self) -> None:
        store = Store()
        store.error = Unavailable("away")
        turn = Turn(store.answer, timeout=60, take=take(1))
        await asyncio.gather(*calls(turn, "ab"), return_exceptions=True)
        assert store.batches == [["a"], ["b"]]

    async def test_a_fault_of_ours_reaches_the_caller(self) -> None:
        store = Store()
        store.error = ZeroDivisionError()
        turn = Turn(store.answer, timeout=60, take=take(100))
        (outcome,) = await asyncio.gather(*calls(turn, "a"), return_exceptions=True)
        assert isinstance(outcome, ZeroDivisionError)

    async def test_those_who_hang_are_told_with_those_behind_them(self) -> None:
        store = Store()
        store.go.clear()
        store.error = Unavailable("away")
        store.error.__cause__ = TimeoutError()
        hung: list[int] = []
        turn = Turn(store.answer, timeout=60, take=take(1), on_hung=hung.append)
        waiting = calls(turn, "abc")
        await asyncio.sleep(0)
        store.go.set()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert hung == [2]
        assert turn.weight == 0

    async def test_none_waits_longer_than_it_may(self) -> None:
        store = Store()
        store.go.clear()
        turn = Turn(store.answer, timeout=0.01, take=take(1))
        made = [Call(name) for name in "abc"]
        for call in made:
            turn.add(call)
        first, *behind = [call.future for call in made]
        # What came at about the same moment is given up together.
        made[2].deadline += 0.05
        await asyncio.wait(behind, return_when=asyncio.FIRST_COMPLETED)
        assert [type(each.exception()) for each in behind] == [Unavailable] * 2
        assert turn.weight == 0
        store.go.set()
        assert await first == "a"
        assert await asyncio.gather(*calls(turn, "d")) == ["d"]
        assert store.batches == [["a"], ["d"]]

    async def test_so_much_waits_and_no_more(self) -> None:
        store = Store()
        turn = Turn(store.answer, timeout=60, take=take(100))
        large = Call("large", weight=500)
        turn.add(large, most=100)  # Alone it has room, or it never would.
        with pytest.raises(Unavailable, match="keep up"):
            turn.add(Call("one too many"), most=500)
        other = Call("other")
        turn.add(other, most=501)
        assert [await each.future for each in (large, other)] == ["large", "other"]
        assert turn.weight == 0

    async def test_who_gave_up_stops_nobody(self) -> None:
        store = Store()
        turn = Turn(store.answer, timeout=60, take=take(100))
        first, second = calls(turn, "ab")
        first.cancel()
        assert await second == "b"

    async def test_closing_fails_those_at_work_and_those_who_wait(self) -> None:
        store = Store()
        store.go.clear()
        turn = Turn(store.answer, timeout=60, take=take(1))
        waiting = calls(turn, "ab")
        await asyncio.sleep(0)
        await turn.aclose()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in outcomes] == [Unavailable] * 2

    async def test_closing_gives_those_at_work_and_those_who_wait_some_time(self) -> None:
        store = Store()
        store.go.clear()
        turn = Turn(store.answer, timeout=60, take=take(1))
        waiting = calls(turn, "ab")
        closing = asyncio.ensure_future(turn.aclose(60))
        await asyncio.sleep(0)
        store.go.set()
        await closing
        assert [each.result() for each in waiting] == ["a", "b"]


class TestFiles:
    def test_queries_by_name_without_their_sentences(self, tmp_path: Path) -> None:
        file = tmp_path / "queries.sql"
        file.write_text(
            "-- A file.\n\n-- name: one\n-- Says one.\nSELECT 1\n\n"
            "-- name: two_lines\n-- Says more.\nSELECT 1,\n    2\n"
        )
        assert load_queries(file) == {"one": "SELECT 1", "two_lines": "SELECT 1,\n    2"}

    def test_migrations_by_number(self, tmp_path: Path) -> None:
        for name in ("0002_b.sql", "0001_a.sql", "0010_c.sql", "notes.txt", "1_x.sql"):
            (tmp_path / name).write_text(f"SELECT '{name}'")
        found = load_migrations(tmp_path)
        assert [(each.number, each.name) for each in found] == [
            (1, "0001_a.sql"),
            (2, "0002_b.sql"),
            (10, "0010_c.sql"),
        ]
        assert found[0].sql == "SELECT '0001_a.sql'"


def a_postgres(url: str) -> Postgres:
    return Postgres(
        url, CircuitBreaker(BreakerSettings()), migrations=(), command_timeout_seconds=1
    )


class TestStarting:
    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://nobody@127.0.0.1:1/none",
            "mysql://127.0.0.1/none",
            "postgresql://127.0.0.1:port/none",
        ],
    )
    async def test_what_cannot_be_had_stops_the_start(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match=r"postgres\.url"):
            await a_postgres(url).start()

    async def test_before_the_start_there_is_nothing(self) -> None:
        postgres = a_postgres("postgresql://127.0.0.1/none")
        assert not postgres.up
        with pytest.raises(Unavailable):
            await postgres.transaction(lambda connection: connection.fetchval("SELECT 1"))
        with pytest.raises(ConfigurationError):
            await postgres.check()
        await postgres.aclose()
