"""Nodes of one cluster in the test's own process, each a server on a port of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, Protocol
from uuid import uuid4

import pytest

from tests.front_door import Host, running


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
            settings = node_settings(url, prefix, **{**given, "cluster": cluster})
            made.append(await stack.enter_async_context(running("sockets", **settings)))
        await knowing_each_other(made)
        return made

    return start


async def knowing_each_other(hosts: list[Host]) -> None:
    """Wait until each node knows of all of them."""
    for host in hosts:
        cluster = host.notifyd.cluster
        assert cluster is not None
        while len(cluster.alive()) < len(hosts):
            await asyncio.sleep(0.005)


@pytest.fixture
async def nodes(start_nodes: StartNodes) -> list[Host]:
    """Three of them."""
    return await start_nodes(3)
