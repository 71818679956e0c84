"""The supervisor of workers, where processes would be too slow to meet the moment."""

from __future__ import annotations

from typing import Any

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
