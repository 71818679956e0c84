"""Nodes of one cluster in the test's own process, each a server on a port of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import pytest

from notifyd.cluster.router import Cluster
from notifyd.queue.redis_keys import bucket_of, member
from tests.cluster.processes import NodeProcess
from tests.front_door import Host, running, settings_of, until


class StartNodes(Protocol):
    """Starts nodes that end with the test; they share Redis and a key prefix."""

    async def __call__(self, count: int = 3, **given: dict[str, Any]) -> list[Host]: ...


def node_settings(url: str, prefix: str, **given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of a node's settings."""
    made: dict[str, dict[str, Any]] = {
        "redis": {"url": url, "key_prefix": prefix, "command_timeout_seconds": 1},
        "queue": {"backend": "redis"},
        "ack": {"backend": "redis"},
        "cluster": {"enabled": True, "presence_ttl_seconds": 3},
        "websocket": {"heartbeat_interval": 1},
    }
    for section, values in given.items():
        made[section] = {**made.get(section, {}), **values}
    return made


@pytest.fixture
async def start_nodes(redis_url: str) -> AsyncIterator[StartNodes]:
    """Start nodes on the Redis that tests share."""
    async with AsyncExitStack() as stack:
        prefix = f"test-{uuid4().hex}"
        yield _starter(stack, redis_url, prefix)


def _starter(stack: AsyncExitStack, url: str, prefix: str) -> StartNodes:
    names = iter(range(1000))

    async def start(count: int = 3, **given: dict[str, Any]) -> list[Host]:
        made = []
        for _ in range(count):
            cluster = {"node_id": f"node-{next(names)}", **given.get("cluster", {})}
            sections = node_settings(url, prefix, **{**given, "cluster": cluster})
            node = running("sockets", settings=settings_of(**sections))
            made.append(await stack.enter_async_context(node))
        await knowing_each_other(made)
        return made

    return start


async def knowing_each_other(hosts: list[Host]) -> None:
    """Wait until each node knows of all of them."""
    for host in hosts:
        cluster = cluster_of(host)
        await until(lambda cluster=cluster: len(cluster.alive()) >= len(hosts))  # type: ignore[misc]  # bound now


def cluster_of(host: Host) -> Cluster:
    """A node's part in the cluster."""
    cluster = host.notifyd.cluster
    assert cluster is not None
    return cluster


def beside(user_id: str, tenant: str = "default") -> str:
    """Another user, who is kept in the same bucket."""
    bucket = bucket_of(member(tenant, user_id))
    names = (f"{user_id}-{number}" for number in count())
    return next(name for name in names if bucket_of(member(tenant, name)) == bucket)


@pytest.fixture
async def nodes(start_nodes: StartNodes) -> list[Host]:
    """Three of them."""
    return await start_nodes(3)


class StartProcesses(Protocol):
    """Starts nodes in processes of their own, which end with the test."""

    async def __call__(self, count: int = 3, **variables: str) -> list[NodeProcess]: ...


@pytest.fixture
async def start_processes(redis_url: str, tmp_path: Path) -> AsyncIterator[StartProcesses]:
    """Start nodes as `notifyd serve`, on the Redis that tests share."""
    async with AsyncExitStack() as stack:
        prefix = f"test-{uuid4().hex}"

        async def start(count: int = 3, **variables: str) -> list[NodeProcess]:
            made = []
            for number in range(count):
                name = f"node-{number}"
                node = NodeProcess(name, redis_url, prefix, tmp_path / f"{name}.log", **variables)
                stack.push_async_callback(node.close)
                made.append(node)
            async with asyncio.TaskGroup() as group:
                for node in made:
                    group.create_task(node.start())
            return made

        yield start
