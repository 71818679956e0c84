"""The servers of stores.py do what a test asks of them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import asyncpg
import psutil
import pytest
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, ReadOnlyError

from tests.stores import PostgresServer, RedisServer, StoreServer, proxy, schema, serving

ONCE = Retry(NoBackoff(), 0)


class Client:
    """Writes and reads one value, in either store."""

    def __init__(self, server: StoreServer) -> None:
        self.server = server

    async def put(self, value: str) -> None:
        if isinstance(self.server, RedisServer):
            async with redis.asyncio.Redis(port=self.server.port, retry=ONCE) as client:
                await client.set("value", value)
            return
        connection = await asyncpg.connect(self.server.url, timeout=5)
        await connection.execute("CREATE TABLE IF NOT EXISTS kept (value text)")
        await connection.execute("INSERT INTO kept VALUES ($1)", value)
        await connection.close()

    async def get(self) -> str:
        if isinstance(self.server, RedisServer):
            async with redis.asyncio.Redis(
                port=self.server.port, decode_responses=True, retry=ONCE
            ) as client:
                return str(await client.get("value"))
        connection = await asyncpg.connect(self.server.url, timeout=5)
        value = str(await connection.fetchval("SELECT value FROM kept"))
        await connection.execute("DROP TABLE kept")
        await connection.close()
        return value


@pytest.fixture(params=["redis_server", "postgres_server"])
def server(request: pytest.FixtureRequest) -> StoreServer:
    made: StoreServer = request.getfixturevalue(request.param)
    return made


async def test_a_frozen_server_takes_connections_and_answers_once_it_is_thawed(
    server: StoreServer,
) -> None:
    client = Client(server)
    await client.put("first")
    server.stop()
    reading = asyncio.create_task(client.get())
    done, _ = await asyncio.wait([reading], timeout=0.1)
    assert not done
    server.cont()
    assert await reading == "first"


async def test_what_was_written_outlives_a_kill_and_a_restart(server: StoreServer) -> None:
    client = Client(server)
    await client.put("first")
    server.kill()
    assert not server.running
    with pytest.raises((OSError, redis.ConnectionError)):
        await client.get()
    server.restart()
    server.stop()
    server.restart()
    assert await client.get() == "first"


async def test_it_is_well_again_after_any_fault(server: StoreServer) -> None:
    server.kill()
    server.recover()
    server.stop()
    server.recover()
    await Client(server).put("second")
    assert await Client(server).get() == "second"


async def test_faults_that_only_redis_has(redis_server: RedisServer) -> None:
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        await client.set("a", "1")
        with redis_server.out_of_memory(), pytest.raises(OutOfMemoryError):
            await client.set("b", "2")
        with redis_server.read_only(), pytest.raises(ReadOnlyError):
            await client.set("b", "2")
        await client.set("b", "2")
    reader, writer = await asyncio.open_connection("127.0.0.1", redis_server.port)
    writer.write(b"PING\r\n")
    assert await reader.readline() == b"+PONG\r\n"
    redis_server.cut_connections()
    assert await reader.read() == b""
    writer.close()


async def test_a_schema_is_the_tests_own(running_postgres: PostgresServer) -> None:
    async with schema(running_postgres.url) as one, schema(running_postgres.url) as other:
        for url in (one, other):
            connection = await asyncpg.connect(url)
            await connection.execute("CREATE TABLE mine (n int)")
            await connection.close()
    connection = await asyncpg.connect(running_postgres.url)
    found = await connection.fetch(
        "SELECT nspname FROM pg_namespace WHERE nspname = ANY($1)",
        [url.rpartition("=")[2] for url in (one, other)],
    )
    await connection.close()
    assert found == []


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionResetError):
        while data := await reader.read(100):
            writer.write(data)
    writer.transport.abort()


async def test_a_proxy_cuts_holds_and_refuses() -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server, proxy(server.sockets[0].getsockname()[1]) as between:
        reader, writer = await asyncio.open_connection("127.0.0.1", between.port)
        writer.write(b"one")
        assert await reader.read(100) == b"one"
        between.hold()
        writer.write(b"two")
        reading = asyncio.create_task(reader.read(100))
        done, _ = await asyncio.wait([reading], timeout=0.05)
        assert not done
        between.release()
        assert await reading == b"two"
        between.cut()
        with pytest.raises(ConnectionResetError):
            await reader.read(100)
        writer.close()
        await between.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", between.port)
        await between.accept()
        reader, writer = await asyncio.open_connection("127.0.0.1", between.port)
        writer.write(b"three")
        assert await reader.read(100) == b"three"
        writer.close()
        assert between.accepted == 2


def test_nothing_stays_behind() -> None:
    with serving(RedisServer) as server:
        process, directory = server._process, server.directory
        assert process is not None
        assert directory.exists()
    assert not psutil.pid_exists(process.pid)
    assert not directory.exists()


SOMEBODYS = """
import sys, time
from tests.stores import RedisServer
server = RedisServer()
server.start()
print(server._process.pid, server.directory, flush=True)
time.sleep(60)
"""


def test_nothing_stays_behind_a_test_run_that_was_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", SOMEBODYS], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        pid, directory = run.stdout.readline().decode().split()
        os.kill(run.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(pid)) or Path(directory).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
