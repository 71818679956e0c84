"""Tasks that nobody awaits: their failures are logged, and they end with the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog


class BackgroundTasks:
    """Owns tasks from `spawn` to their end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("notifyd")

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in the background."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def every(self, seconds: float, work: Callable[[], Awaitable[object]], name: str) -> None:
        """Do `work` again and again; a failure is logged and the next turn comes all the same."""
        self.spawn(self._repeat(seconds, work, name))

    async def _repeat(
        self, seconds: float, work: Callable[[], Awaitable[object]], name: str
    ) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except Exception:  # noqa: BLE001  # the next turn may do better, and this one is logged
                self._log.exception("background work failed", work=name)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("a background task failed", exc_info=error)

    async def aclose(self) -> None:
        """Cancel what still runs and wait for it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
