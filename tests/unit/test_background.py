from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from notifyd.background import BackgroundTasks


@pytest.fixture
def logged() -> Any:
    structlog.reset_defaults()
    with capture_logs() as entries:
        yield entries


class TestSpawn:
    async def test_runs_what_it_is_given_and_keeps_nothing(self) -> None:
        tasks = BackgroundTasks()
        done = asyncio.Event()

        async def work() -> None:
            done.set()

        await tasks.spawn(work())
        assert done.is_set()
        await asyncio.sleep(0)
        assert tasks._tasks == set()

    async def test_a_failure_is_logged(self, logged: list[dict[str, Any]]) -> None:
        tasks = BackgroundTasks()

        async def work() -> None:
            raise ValueError("broken")

        task = tasks.spawn(work())
        await asyncio.wait({task})
        await asyncio.sleep(0)
        assert [(each["event"], str(each["exc_info"])) for each in logged] == [
            ("a background task failed", "broken")
        ]
        assert tasks._tasks == set()


class TestEvery:
    async def test_again_and_again_also_after_a_failure(self, logged: list[dict[str, Any]]) -> None:
        tasks = BackgroundTasks()
        thrice = asyncio.Event()
        turns = 0

        async def work() -> None:
            nonlocal turns
            turns += 1
            if turns == 1:
                raise ValueError("once")
            if turns == 3:
                thrice.set()

        tasks.every(0, work, "counting")
        await asyncio.wait_for(thrice.wait(), 5)
        await tasks.aclose()
        assert [(each["event"], each["work"]) for each in logged] == [
            ("background work failed", "counting")
        ]


class TestClose:
    async def test_cancels_and_waits(self, logged: list[dict[str, Any]]) -> None:
        tasks = BackgroundTasks()
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.set()

        tasks.spawn(work())
        await asyncio.sleep(0)
        await tasks.aclose()
        assert ended.is_set()
        assert logged == []
        assert tasks._tasks == set()
        await tasks.aclose()
