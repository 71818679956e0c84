"""Server processes: started on their core, waited for, measured through /proc, and ended."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.errors import BenchError
from bench.machine import on_core

STOP_SECONDS = 3.0
TICKS = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Server:
    """One server under measurement, with the processes that it started itself.

    A context manager; leaving it ends the process group: SIGTERM, and SIGKILL after
    `STOP_SECONDS`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        core: int,
        log: Path,
        environ: Mapping[str, str],
        ready_path: str | None = None,
    ) -> None:
        self.port = port
        self._command = list(command)
        self._core = core
        self._log = log
        self._environ = environ
        self._ready_path = ready_path
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self._environ),
                cwd=self._log.parent,
                start_new_session=True,
                preexec_fn=on_core(self._core),  # noqa: PLW1509 - this process has one thread
            )
        try:
            self._wait_until_ready(timeout=20)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    @property
    def running(self) -> subprocess.Popen[bytes]:
        """The process. Raises BenchError where it was not started."""
        if self._process is None:
            raise BenchError("the server was not started")
        return self._process

    def cpu_seconds(self) -> float:
        """User and system time of all its processes so far."""
        return sum(_cpu_seconds(pid) for pid in self._pids())

    def settled_cpu_seconds(self) -> float:
        """`cpu_seconds`, once the server has nothing left to do: under 2 % in half a second."""
        before = self.cpu_seconds()
        for _ in range(60):
            time.sleep(0.5)
            after = self.cpu_seconds()
            if after - before < 0.01:
                return after
            before = after
        raise BenchError("the server does not come to rest")

    def memory_bytes(self) -> int:
        """Resident memory of all its processes."""
        total = 0
        for pid in self._pids():
            status = Path(f"/proc/{pid}/status").read_text()
            found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
            total += int(found[1]) * 1024 if found else 0
        return total

    def open_files(self) -> int:
        """Open file descriptors of all its processes."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self._pids())

    def _pids(self) -> list[int]:
        pids = [self.running.pid]
        for pid in pids:  # grows while it is walked
            children = Path(f"/proc/{pid}/task/{pid}/children")
            pids.extend(int(child) for child in children.read_text().split())
        return pids

    def _wait_until_ready(self, timeout: float) -> None:
        def ready() -> bool:
            if self.running.poll() is not None:
                raise BenchError(f"the server ended at once:\n{self._tail()}")
            if self._ready_path is None:
                return _accepts(self.port)
            return _answers_200(self.port, self._ready_path)

        if not _eventually(ready, timeout):
            raise BenchError(f"the server was not ready in {timeout:.0f} s:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    def _stop(self) -> None:
        process = self.running
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, number)
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    continue


def _cpu_seconds(pid: int) -> float:
    # schedstat counts nanoseconds of each thread; stat counts ticks of 10 ms, and is there always.
    threads = list(Path(f"/proc/{pid}/task").glob("*/schedstat"))
    nanoseconds = sum(int(thread.read_text().split()[0]) for thread in threads)
    if nanoseconds:
        return nanoseconds / 1e9
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _answers_200(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False  # not listening yet
    finally:
        connection.close()


def _eventually(condition: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
