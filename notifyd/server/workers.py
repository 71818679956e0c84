"""Several processes on one port: started, watched, and stopped as one server.

Each listens on the same port by itself (SO_REUSEPORT) and the kernel deals connections out among
them. One that dies is started again, and so is one that hangs, whose share of the connections
nobody would answer; signals go to all of them.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType

import structlog

from notifyd.resilience import Backoff

READY = b"ready"
ALIVE = b"alive"
ALIVE_SECONDS = 1.0
"""How often a worker's event loop says that it turns."""

HANGS_AFTER_SECONDS = 30.0
"""A worker that says nothing for so long is killed; it is as long as gunicorn waits."""

WOKEN_SECONDS = 5.0
"""Where the supervisor itself was stopped, workers have so long to say something."""

LIVED_LONG_SECONDS = 10.0
KILL_AFTER_SECONDS = 5.0

Work = Callable[[int, Callable[[], None]], int]
"""Serves in a process of its own until a signal; given its number and what to call once it listens,
in its event loop. Returns an exit code. Must be picklable."""


def reserve(host: str, port: int) -> socket.socket:
    """A socket that holds a port for workers, and takes no connection itself. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    holder = socket.socket(family)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(address)
    return holder


class _Worker:
    """One place in the row, and the process that has it now."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: BaseProcess | None = None
        self.told: Connection | None = None
        self.ready = False
        self.heard_at = 0.0
        self.started_at = 0.0
        self.start_at = 0.0
        self.backoff = Backoff(0.2, 5.0)


class Supervisor:
    """Runs `count` workers until a signal. `announce` is called once, when all of them listen."""

    def __init__(
        self,
        work: Work,
        count: int,
        *,
        grace_seconds: float,
        announce: Callable[[], None],
        hangs_after: float = HANGS_AFTER_SECONDS,
    ) -> None:
        self._work = work
        self._workers = [_Worker(number) for number in range(count)]
        self._grace_seconds = grace_seconds
        self._hangs_after = hangs_after
        self._announce: Callable[[], None] | None = announce
        self._context = multiprocessing.get_context("spawn")
        self._log = structlog.get_logger("notifyd.server")
        self._stopping = 0
        self._kill_at = float("inf")
        self._exit_code = 0

    def run(self) -> int:
        """Returns an exit code: that of a worker which could not start, 0 after a graceful stop."""
        wakes, woken = socket.socketpair()
        wakes.setblocking(False)
        woken.setblocking(False)
        before = {
            each: signal.signal(each, self._signalled) for each in (signal.SIGINT, signal.SIGTERM)
        }
        old = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        try:
            with wakes, woken:
                self._loop(woken)
        finally:
            signal.set_wakeup_fd(old)
            for each, handler in before.items():
                signal.signal(each, handler)
        return self._exit_code

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        """The first time gracefully, the second at once, as each worker does it."""
        self._stopping += 1
        if self._stopping == 1:
            self._kill_at = time.monotonic() + self._grace_seconds + KILL_AFTER_SECONDS
        for worker in self._workers:
            if worker.process is not None and worker.process.is_alive():
                worker.process.terminate()

    def _loop(self, woken: socket.socket) -> None:
        while True:
            now = time.monotonic()
            for worker in self._workers:
                if worker.process is None and not self._stopping and worker.start_at <= now:
                    self._start(worker)
            if self._stopping and all(each.process is None for each in self._workers):
                return
            overslept = self._wait(woken, now)
            for worker in self._workers:
                if overslept:
                    # Whoever stopped this process, or the machine, may have stopped them too.
                    soon = time.monotonic() - self._hangs_after + WOKEN_SECONDS
                    worker.heard_at = max(worker.heard_at, soon)
                self._look_at(worker)
            self._kill_hanging()
            if time.monotonic() >= self._kill_at:
                self._kill()

    def _start(self, worker: _Worker) -> None:
        told, tells = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_run, args=(self._work, worker.number, tells), name=f"worker-{worker.number}"
        )
        process.start()
        tells.close()
        worker.process, worker.told, worker.ready = process, told, False
        worker.started_at = time.monotonic()
        if self._stopping:
            # The signal came meanwhile, and could not be passed on to this one.
            process.terminate()

    def _wait(self, woken: socket.socket, now: float) -> bool:
        """Until there is something to do; whether that took much longer than it should have."""
        next_start = min(
            (each.start_at for each in self._workers if each.process is None), default=float("inf")
        )
        until = min(self._kill_at, float("inf") if self._stopping else next_start)
        if not self._stopping:
            hanging = [each.heard_at + self._hangs_after for each in self._workers if each.ready]
            until = min(until, *hanging, float("inf"))
        waited = [each.process.sentinel for each in self._workers if each.process is not None]
        told = [each.told for each in self._workers if each.told is not None]
        timeout = None if until == float("inf") else max(0.0, until - now)
        if woken in wait([*waited, *told, woken], timeout):
            woken.recv(4096)
        return time.monotonic() > until + ALIVE_SECONDS

    def _look_at(self, worker: _Worker) -> None:
        while worker.told is not None and worker.told.poll():
            try:
                self._hear(worker, worker.told.recv_bytes())
            except EOFError:
                # At its end its process says so, below.
                worker.told.close()
                worker.told = None
        process = worker.process
        if process is not None and process.exitcode is not None:
            self._ended(worker, process.exitcode)

    def _hear(self, worker: _Worker, word: bytes) -> None:
        worker.heard_at = time.monotonic()
        if word != READY:
            return
        worker.ready = True
        if self._announce is not None and all(each.ready for each in self._workers):
            announce, self._announce = self._announce, None
            announce()

    def _kill_hanging(self) -> None:
        silent_since = time.monotonic() - self._hangs_after
        for worker in self._workers:
            process = worker.process
            if process is None or not worker.ready or self._stopping:
                continue
            if worker.heard_at <= silent_since:
                self._log.error(
                    "a worker hangs and was killed",
                    worker=worker.number,
                    silent_seconds=round(self._hangs_after),
                )
                worker.heard_at = float("inf")  # it need not be killed twice
                process.kill()

    def _ended(self, worker: _Worker, exit_code: int) -> None:
        worker.process = None
        if worker.told is not None:
            worker.told.close()
            worker.told = None
        if self._stopping:
            # Ended by our own signal before it could catch it, it served nobody.
            if exit_code not in (0, -signal.SIGTERM):
                self._exit_code = self._exit_code or 1
            return
        if self._announce is not None and not worker.ready:
            self._log.error("a worker cannot start", worker=worker.number, exit_code=exit_code)
            self._exit_code = exit_code if exit_code > 0 else 1
            self._stop()
            return
        if time.monotonic() - worker.started_at > LIVED_LONG_SECONDS:
            worker.backoff.reset()
        pause = worker.backoff.next()
        worker.start_at = time.monotonic() + pause
        self._log.error(
            "a worker died and is being restarted",
            worker=worker.number,
            exit_code=exit_code,
            in_seconds=round(pause, 2),
        )

    def _kill(self) -> None:
        self._kill_at = float("inf")
        for worker in self._workers:
            if worker.process is not None:
                self._log.warning("a worker did not exit and was killed", worker=worker.number)
                worker.process.kill()


def _run(work: Work, number: int, tells: Connection) -> None:
    """What a worker's process does."""
    # A signal of the terminal goes to all of its group: workers hear of it by their supervisor.
    os.setsid()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()

    def ready() -> None:
        tells.send_bytes(READY)
        os.set_blocking(tells.fileno(), False)
        _go_on_telling(asyncio.get_running_loop(), tells)

    raise SystemExit(work(number, ready))


def _go_on_telling(loop: asyncio.AbstractEventLoop, tells: Connection) -> None:
    # Who does not listen may be stopped for now, or gone; of the latter, others take note.
    with suppress(OSError):
        tells.send_bytes(ALIVE)
    loop.call_later(ALIVE_SECONDS, _go_on_telling, loop, tells)


def _end_with(parent: BaseProcess) -> None:
    """A supervisor that was killed leaves nobody behind."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
