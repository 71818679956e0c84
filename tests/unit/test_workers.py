"""The supervisor of workers, where processes would be too slow to meet the moment, or would have to
be waited for too long."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from structlog.testing import capture_logs

from notifyd.server.workers import Supervisor


class FakeProcess:
    """Is told to end while it starts: the signal comes before anybody knows of it."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self.terminated = 0

    def start(self) -> None:
        self._supervisor._stop()

    def terminate(self) -> None:
        self.terminated += 1

    def is_alive(self) -> bool:
        return True


class FakeContext:
    def __init__(self, process: FakeProcess) -> None:
        self._process = process

    def Pipe(self, duplex: bool) -> tuple[Any, Any]:  # as multiprocessing has it
        return self, self

    def Process(self, **given: Any) -> FakeProcess:  # as above
        return self._process

    def close(self) -> None:
        pass


def test_a_worker_that_is_being_started_hears_of_the_end_too() -> None:
    supervisor = Supervisor(lambda number, ready: 0, 1, grace_seconds=1, announce=lambda: None)
    process = FakeProcess(supervisor)
    supervisor._context = FakeContext(process)  # type: ignore[assignment]  # as far as it is used
    supervisor._start(supervisor._workers[0])
    assert process.terminated == 1


def serve_or_hang(number: int, ready: Callable[[], None]) -> int:
    """The first of them blocks its event loop as soon as it listens."""

    async def serve() -> None:
        ready()
        if number == 0:
            signal.pause()
        await asyncio.Event().wait()

    asyncio.run(serve())
    return 0


class Watched(Supervisor):
    """Tells when a worker is started again."""

    starts = 0

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.again = threading.Event()

    def _start(self, worker: Any) -> None:
        super()._start(worker)
        self.starts += 1
        if self.starts > len(self._workers):
            self.again.set()


def test_a_worker_that_hangs_is_killed_and_started_again_and_no_other() -> None:
    started = threading.Event()
    supervisor = Watched(serve_or_hang, 2, grace_seconds=5, announce=started.set, hangs_after=5)
    woken, wakes = socket.socketpair()
    with woken, wakes, capture_logs() as logs:
        loop = threading.Thread(target=supervisor._loop, args=(woken,))
        loop.start()
        assert started.wait(30)
        hanging, serving = (each.process for each in supervisor._workers)
        assert hanging is not None
        assert supervisor.again.wait(30)
        first, second = (each.process for each in supervisor._workers)
        assert first is not hanging
        assert second is serving
        supervisor._stop()
        wakes.send(b".")
        loop.join(20)
        assert not loop.is_alive()
    told = [each for each in logs if each["log_level"] == "error"]
    assert [each["event"] for each in told] == [
        "a worker hangs and was killed",
        "a worker died and is being restarted",
    ]
    assert [each["worker"] for each in told] == [0, 0]
