"""Servers in processes of their own, whose log and memory are looked at."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from tests.adversity.hosting import Hosted, free_port
from tests.front_door import ADMIN_KEY, SECRET, Lane
from tests.stores import environment_of_a_server

START_SECONDS = 20.0


class Spawned(Hosted):
    """A server in another process: there is no `notifyd` to look into."""

    def __init__(self, lane: Lane, port: int, pid: int, log: Path) -> None:
        super().__init__(lane, port, None)  # type: ignore[arg-type]  # see above
        self.pid = pid
        self.log = log

    def resident_bytes(self) -> int:
        """The process's memory (RSS), as the kernel counts it."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def sockets(self) -> int:
        """Its open sockets."""
        count = 0
        for each in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                count += str(each.readlink()).startswith("socket:")
        return count


@contextlib.asynccontextmanager
async def spawned(lane: Lane, directory: Path, **environment: str) -> AsyncIterator[Spawned]:
    """`notifyd serve`, or stock uvicorn with its access log; what they log goes to a file.

    What `serve` prints, a command with its key, is for the developer at the terminal, and no log.
    """
    process = ServerProcess(lane, directory, environment)
    try:
        yield await process.start()
    finally:
        await process.terminate()


class ServerProcess:
    """The same for tests that kill it and start it again, on the same port."""

    def __init__(self, lane: Lane, directory: Path, environment: Mapping[str, str]) -> None:
        self.port = free_port()
        self.log = directory / f"{lane}.log"
        self._lane: Lane = lane
        self._directory = directory
        self._environment = environment_of_a_server() | {
            "NOTIFYD_AUTH__JWT_SECRET": SECRET,
            "NOTIFYD_AUTH__API_KEY": ADMIN_KEY,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            **environment,
        }
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> Spawned:
        """Run it until it listens."""
        if self._lane == "sockets":
            arguments = ["-m", "notifyd", "serve"]
        else:
            arguments = ["-m", "uvicorn", "--factory", "tests.adversity.application:make"]
        with self.log.open("ab") as output:
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                "--port",
                str(self.port),
                stdin=DEVNULL,
                stdout=DEVNULL if self._lane == "sockets" else output,
                stderr=output,
                cwd=self._directory,
                env=self._environment,
            )
        server = Spawned(self._lane, self.port, process.pid, self.log)
        async with asyncio.timeout(START_SECONDS):
            await _listens(server, process)
        return server

    async def kill(self) -> None:
        """End it without a warning (SIGKILL)."""
        process, self._process = self._process, None
        assert process is not None
        process.kill()
        await process.wait()

    async def terminate(self) -> None:
        """End it in good order, if it runs; it must not have failed by itself."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 60)
        assert process.returncode in (0, -signal.SIGTERM), self.log.read_text()


async def _listens(server: Spawned, process: asyncio.subprocess.Process) -> None:
    while True:
        assert process.returncode is None, server.log.read_text()
        with contextlib.suppress(ConnectionError):
            async with server.connected():
                return
        await asyncio.sleep(0.02)
