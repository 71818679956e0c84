"""What comes from Redis to a cluster: dispatched by one node at a time, once to everybody."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis.asyncio
from websockets.exceptions import WebSocketException

from notifyd.dispatch.dispatcher import Dispatcher
from notifyd.eventually import settled
from notifyd.notification import Target
from tests.cluster.conftest import StartNodes, cluster_of
from tests.cluster.processes import NodeProcess
from tests.front_door import Host, WebSocketListener, until
from tests.server.test_redis_sources import EVENT, ID, left_at_work
from tests.stores import RedisServer
from tests.unit.connected import a_notification

STREAM = "stream"
PREFIX = "cluster"
LEASE = f"{PREFIX}:{{trigger}}:lease"


class Processes:
    """Nodes in processes of their own, on a Redis that the test may break."""

    def __init__(self, directory: Path, server: RedisServer, **variables: str) -> None:
        self._directory = directory
        self._server = server
        self._variables = variables
        self.nodes: list[NodeProcess] = []

    async def start(self) -> NodeProcess:
        name = f"node-{len(self.nodes)}"
        log = self._directory / f"{name}.log"
        node = NodeProcess(name, self._server.url, PREFIX, log, **self._variables)
        self.nodes.append(node)
        await node.start()
        return node

    async def holder(self) -> NodeProcess:
        """Who has the lease, once somebody has it."""
        await until(lambda: self._holder is not None, "a holder of the lease", 20)
        assert self._holder is not None
        return self._holder

    @property
    def _holder(self) -> NodeProcess | None:
        for node in self.nodes:
            told = [line for line in node.log.read_text().splitlines() if "the trigger" in line]
            if told and "runs the trigger now" in told[-1]:
                return node
        return None


@pytest.fixture
async def processes(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Processes]:
    """With both sources."""
    made = Processes(
        tmp_path,
        redis_server,
        NOTIFYD_REDIS__TRIGGER_ENABLED="true",
        NOTIFYD_REDIS__STREAM_KEY=STREAM,
    )
    yield made
    for node in made.nodes:
        await node.close()


class Reading:
    """What comes on one connection, acked as it comes."""

    def __init__(self, listener: WebSocketListener) -> None:
        self.listener = listener
        self.payloads: list[Any] = []
        self.replayed: list[Any] = []
        self.after_acked: list[str] = []
        self._acked: set[str] = set()
        self._task = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        with suppress(WebSocketException):
            while (message := await self.listener.next_message()) is not None:
                if message["type"] == "notification":
                    self.payloads.append(message["payload"])
                    if "replayed" in message["metadata"]:
                        self.replayed.append(message["payload"])
                    if message["id"] in self._acked:
                        self.after_acked.append(message["id"])
                    if message["event_type"] != "news":
                        await self.listener.send("Ack", {"notification_id": message["id"]})
                elif message["type"] == "acked":
                    self._acked.add(message["notification_id"])

    async def close(self) -> None:
        self._task.cancel()
        await self.listener.close()


def once_in_order(payloads: list[int]) -> None:
    assert [each for each, times in Counter(payloads).items() if times > 1] == []
    assert payloads == sorted(payloads)


def news(number: int) -> str:
    return json.dumps({"event_type": "news", "payload": number})


async def test_what_is_published_is_dispatched_once_whoever_dies_or_is_forgotten(
    processes: Processes, redis_server: RedisServer
) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(processes.start())
    holder = await processes.holder()
    await until(lambda: int(redis_server.command("PUBSUB", "NUMPAT")) > 0, "the subscription")
    here = [node for node in processes.nodes if node is not holder]
    readings = [Reading(await node.websocket("anna")) for node in here]
    for reading in readings:
        await reading.listener.send("Subscribe", {"channels": ["news"]})
    published = 0

    async with redis.asyncio.Redis.from_url(redis_server.url) as client:

        async def publish_until(done: Callable[[], bool], seconds: float = 10) -> None:
            nonlocal published
            async with asyncio.timeout(seconds):
                while not done():
                    await client.publish("notification:channel:news", news(published))
                    published += 1
                    await asyncio.sleep(0.005)

        def all_came() -> bool:
            return all(each.payloads[-1:] == [published - 1] for each in readings)

        # Until both are subscribed.
        await publish_until(lambda: all(each.payloads for each in readings))
        await until(all_came)
        first = max(each.payloads[0] for each in readings)
        for _ in range(3):
            # Whoever looks first finds that nobody has the lease.
            await client.flushall()
            await publish_until(lambda: redis_server.command("EXISTS", LEASE) == 1)
        await until(all_came)
        for reading in readings:
            once_in_order(reading.payloads)
            assert reading.payloads[reading.payloads.index(first) :] == [*range(first, published)]
        await holder.kill()
        killed_at = time.monotonic()
        before = published
        await publish_until(lambda: all(each.payloads[-1] >= before for each in readings))
        assert time.monotonic() - killed_at < 5
        await until(all_came)
    for reading in readings:
        once_in_order(reading.payloads)
        await reading.close()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_an_entry_comes_once_and_never_after_it_was_acked(
    processes: Processes, redis_server: RedisServer, fault: signal.Signals
) -> None:
    """10,000 of them, and the node that reads them dies, or wakes up when another reads them."""
    count, users = 10_000, 4
    first = await processes.start()
    await processes.holder()
    second = await processes.start()
    readings = [Reading(await second.websocket(f"u{n}", "?acks=1")) for n in range(users)]
    for reading in readings:
        await reading.listener.send("Subscribe", {"channels": ["news"]})
    async with redis.asyncio.Redis.from_url(redis_server.url) as client:
        adding = client.pipeline(transaction=False)
        for n in range(count):
            if n % 10 == 9:
                message = {"type": "channel", "target": "news", "event_type": "news", "payload": n}
            else:
                message = {**EVENT, "type": "user", "target": f"u{n % users}", "payload": n}
            adding.xadd(STREAM, {"data": json.dumps(message)})
        await adding.execute()

        def came() -> int:
            return sum(len(each.payloads) for each in readings)

        await until(lambda: came() > 1000, "some of them", 20)
        first.signal(fault)
        reached = came()
        await until(lambda: came() > reached + 2000, "the next reader", 20)
        if fault is signal.SIGSTOP:
            first.signal(signal.SIGCONT)
        for number, reading in enumerate(readings):
            his_own = [n for n in range(count) if n % 10 != 9 and n % users == number]
            of_all = [*range(9, count, 10)]
            all = len(his_own) + len(of_all)
            await until(lambda r=reading, all=all: len(r.payloads) >= all, "all of them", 30)  # type: ignore[misc]  # bound now
            assert sorted(reading.payloads) == sorted(his_own + of_all)
            # Each stream has an order of its own, but for what was in a queue meanwhile.
            came_live = [n for n in reading.payloads if n not in reading.replayed]
            once_in_order([n for n in came_live if n % 10 != 9])
            once_in_order([n for n in came_live if n % 10 == 9])
            assert reading.after_acked == []
        async with asyncio.timeout(10):
            while (await client.xpending(STREAM, PREFIX))["pending"]:  # noqa: ASYNC110  # Redis tells nobody
                await asyncio.sleep(0.02)
    for reading in readings:
        await reading.close()


# --- nodes in the test's own process --------------------------------------------------------------


async def test_the_next_takes_what_is_published_as_soon_as_one_stops(
    start_nodes: StartNodes, redis_url: str
) -> None:
    patterns = [f"{uuid4().hex}:user:*"]
    wanted = {"trigger_enabled": True, "trigger_patterns": patterns}
    (first,) = await start_nodes(1, redis=wanted)
    await until(lambda: active(first), "the subscription", 10)
    (second,) = await start_nodes(1, redis=wanted)
    sources = second.notifyd._sources
    assert sources is not None
    assert sources._lease is not None
    assert sources._renewing is not None
    # By itself it does not look again.
    sources._renewing.cancel()
    assert not await sources._lease.renew()
    await first.stop()
    await until(lambda: active(second), "the subscription")
    sources._renewing = asyncio.ensure_future(sources._lease.run())
    # What a dead node was at work on keeps nobody waiting.
    listener = await second.websocket("u1")
    message = {**EVENT, "id": ID}
    left = await left_at_work(second, "redis", json.dumps(message))
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        channel = patterns[0].replace("*", "u1")
        for each in (message, message, EVENT):
            await client.publish(channel, json.dumps(each))
    assert (await listener.notifications(2))[0]["id"] == ID
    await listener.nothing_came()
    del left


def active(host: Host) -> bool:
    return host.notifyd.metrics.redis_trigger_active.value == 1


@pytest.mark.parametrize("mode", ["offline", "always"])
@pytest.mark.parametrize("sender", [0, 1])
async def test_an_entry_that_is_dispatched_again_is_known_by_who_has_it(
    start_nodes: StartNodes, mode: str, sender: int
) -> None:
    nodes = await start_nodes(2, queue={"mode": mode})
    anna = await nodes[0].websocket("anna", query="acks=1")
    await anna.subscribe("news")
    entries = [
        (Target("user", ("anna",)), a_notification(entry="a")),
        (Target("users", ("anna", "ben")), a_notification(entry="b")),
        (Target("channel", ("news",)), a_notification(entry="c")),
    ]
    ids: list[str] = []
    for reader in (nodes[sender], nodes[1 - sender]):
        dispatcher = cluster_of(reader).receiver
        assert isinstance(dispatcher, Dispatcher)
        for target, entry in entries:
            receipt = await settled(dispatcher.dispatch("default", target, entry, source="test"))
            assert receipt.delivered_to == 1
        if not ids:
            ids = [each["id"] for each in await anna.notifications(3)]
            await anna.ack(*ids[:2])
    assert ids == [entry.id for _, entry in entries]
    await anna.nothing_came()
    # Nor would his log bring it.
    logs = nodes[0].notifyd._logs
    assert logs is not None
    async with asyncio.timeout(5):
        while (await settled(logs.read("default", "anna"))).entries:  # noqa: ASYNC110  # Redis tells nobody
            await asyncio.sleep(0.01)
