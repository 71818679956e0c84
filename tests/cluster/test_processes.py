"""Three real processes and one real Redis: nodes are killed, restarted and rolled over."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import Counter
from typing import Any

import httpx
import pytest
import redis.asyncio
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import WebSocketException

from tests.cluster.conftest import StartProcesses, beside
from tests.cluster.processes import START_SECONDS, NodeProcess
from tests.front_door import WebSocketListener, channel, token, until, user

PRESENCE_TTL = 3.0


async def test_every_target_from_any_process_reaches_every_connection_once(
    start_processes: StartProcesses,
) -> None:
    nodes = await start_processes(3)
    anna = [await node.websocket("anna") for node in nodes]
    for listener in anna:
        await listener.subscribe("news", "sport")
    targets: list[dict[str, Any]] = [
        user("anna"),
        {"type": "users", "value": ["anna", "ben"]},
        channel("news"),
        {"type": "channels", "value": ["news", "sport"]},
        {"type": "broadcast"},
    ]
    sent = []
    for node in nodes:
        for target in targets:
            answer = await node.publish(target)
            assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 3), target
            sent.append(answer["notification_id"])
    for listener in anna:
        got = [each["id"] for each in await listener.notifications(len(sent))]
        assert got == sent
        await listener.nothing_came()


async def test_streams_are_served_from_other_processes_too(start_processes: StartProcesses) -> None:
    nodes = await start_processes(2)
    stream = await nodes[0].sse("anna", "?channels=news")
    await stream.expect("subscribed")
    targets = (channel("news"), user("anna"), {"type": "users", "value": ["anna", "ben"]})
    sent = []
    for target in targets:
        answer = await nodes[1].publish(target)
        assert (answer["outcome"], answer["delivered_to"]) == ("delivered", 1)
        sent.append(answer["notification_id"])
    assert [each["id"] for each in await stream.notifications(3)] == sent
    await stream.close()
    # What it had not confirmed is in the queue of its user, and comes over there.
    again = await nodes[1].sse("anna")
    got = await again.notifications(2)
    assert [each["id"] for each in got] == sent[1:]
    assert all(each["metadata"]["replayed"] for each in got)
    await again.close()


@pytest.mark.parametrize("mode", ["offline", "always"])
async def test_the_users_of_a_killed_node_are_offline_within_the_lease(
    start_processes: StartProcesses, redis_url: str, mode: str
) -> None:
    nodes = await start_processes(3, NOTIFYD_QUEUE__MODE=mode)
    anna = await nodes[0].websocket("anna", "?acks=1")
    held = await nodes[1].publish(user("anna"), 1)
    await anna.expect("notification")
    found = (await nodes[1].call("GET", "/api/v1/cluster/users/anna")).json()["nodes"]
    await nodes[0].kill()
    killed_at = time.monotonic()
    # Redis knows at once that nobody listens there: when it next looks at its sockets, and not
    # before it has done what it found on the others.
    await nobody_listens(redis_url, found[0]["node_id"])
    queued = await nodes[1].publish(user("anna"), 2)
    assert queued["outcome"] == "queued"
    while (await nodes[2].call("GET", "/api/v1/cluster/users/anna")).json()["connections"]:
        assert time.monotonic() - killed_at < PRESENCE_TTL + 1
        await asyncio.sleep(0.05)
    while (await nodes[2].call("GET", "/api/v1/cluster/status")).json()["totals"]["nodes"] > 2:
        assert time.monotonic() - killed_at < 2 * PRESENCE_TTL
        await asyncio.sleep(0.05)
    assert (await nodes[2].publish(user("anna"), 3))["outcome"] == "queued"
    again = await nodes[2].websocket("anna")
    expected = [held["notification_id"]] if mode == "always" else []
    expected.append(queued["notification_id"])
    got = [each["id"] for each in await again.notifications(len(expected) + 1)]
    assert got[:-1] == expected
    await again.expect("caught_up")


async def nobody_listens(redis_url: str, node_id: str) -> None:
    """Wait until Redis knows that this node hears nothing."""
    async with redis.asyncio.Redis.from_url(redis_url) as client, asyncio.timeout(1):
        while await client.pubsub_channels(f"*:node:{node_id}"):
            pass


async def test_the_users_of_a_node_that_was_frozen_are_found_again(
    start_processes: StartProcesses,
) -> None:
    frozen, other = await start_processes(
        2, NOTIFYD_CLUSTER__PRESENCE_TTL_SECONDS="1", NOTIFYD_WEBSOCKET__HEARTBEAT_INTERVAL="0.5"
    )
    anna = await frozen.websocket("anna")
    frozen.signal(signal.SIGSTOP)
    deadline = time.monotonic() + START_SECONDS
    while (await other.call("GET", "/api/v1/cluster/users/anna")).json()["connections"]:
        assert time.monotonic() < deadline
    queued = await other.publish(user("anna"))
    assert queued["outcome"] == "queued"
    # Whoever comes to a node that was frozen may come before it renews anything.
    asked = [await asked_for_a_websocket(frozen, name) for name in (beside("anna"), "ben", "carl")]
    frozen.signal(signal.SIGCONT)
    for reader, _ in asked:
        assert (await reader.readline()).startswith(b"HTTP/1.1 101 ")
    while (got := await anna.receive())["type"] == "gap":
        pass  # Calls that Redis answered while the node was frozen took too long.
    assert got["id"] == queued["notification_id"]
    while (await other.publish(user("anna"), ttl=0))["outcome"] == "nobody":
        assert time.monotonic() < deadline
    for _, writer in asked:
        writer.close()
        await writer.wait_closed()


async def asked_for_a_websocket(
    node: NodeProcess, user_id: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """What answers a handshake that the system has taken in, whether the node is awake or not."""
    reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
    writer.write(
        f"GET /ws?token={token(user_id)} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    await writer.drain()
    return reader, writer


class Follower:
    """A user who comes back to another node whenever his goes away."""

    def __init__(self, user_id: str, nodes: list[NodeProcess]) -> None:
        self.user_id = user_id
        self.seen: Counter[int] = Counter()
        self.twice: list[int] = []
        self.connections = 0
        self._nodes = nodes

    async def follow(self) -> None:
        """Until cancelled."""
        turn = hash(self.user_id)
        while True:
            turn += 1
            with contextlib.suppress(OSError, WebSocketException, AssertionError):
                await self._listen(self._nodes[turn % len(self._nodes)])
            await asyncio.sleep(0.05)

    async def _listen(self, node: NodeProcess) -> None:
        listener = await node.websocket(self.user_id, "?acks=1")
        self.connections += 1
        on_this_one: set[str] = set()
        try:
            while (message := await listener.next_message()) is not None:
                if message["type"] == "notification":
                    if message["id"] in on_this_one:
                        self.twice.append(message["payload"])
                    on_this_one.add(message["id"])
                    self.seen[message["payload"]] += 1
                    await listener.send("Ack", {"notification_id": message["id"]})
        finally:
            await listener.close()


async def test_a_rolling_restart_loses_nothing(start_processes: StartProcesses) -> None:
    nodes = await start_processes(3)
    followers = [Follower(f"u{number}", nodes) for number in range(5)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each.follow()) for each in followers]
        rolling = group.create_task(_roll(nodes))
        for number in range(1000):
            await _publish_somewhere(nodes, f"u{number % 5}", number)
        await rolling
        await until(
            lambda: sum(len(each.seen) for each in followers) == 1000, "all that was sent", 30
        )
        for task in tasks:
            task.cancel()
    for index, follower in enumerate(followers):
        assert sorted(follower.seen) == list(range(index, 1000, 5))
        assert follower.twice == []
        assert follower.connections > 1


async def _roll(nodes: list[NodeProcess]) -> None:
    for node in nodes:
        assert await node.stop() == 0, node.log.read_text()
        await node.start()


async def _publish_somewhere(nodes: list[NodeProcess], user_id: str, number: int) -> None:
    """At the first node that takes it; the id is the caller's, so that he may repeat it."""
    id = f"00000000-0000-4000-8000-{number:012d}"
    for attempt in range(200):
        node = nodes[(number + attempt) % len(nodes)]
        with contextlib.suppress(httpx.TransportError, AssertionError):
            answer = await node.publish(user(user_id), number, id=id)
            assert answer["outcome"] in ("delivered", "queued", "routed"), answer
            return
        await asyncio.sleep(0.02)
    raise AssertionError("no node takes a notification")


# --- workers ---


async def both_serve(server: NodeProcess) -> list[dict[str, Any]]:
    """Wait until two workers answer each other; the nodes as one of them sees them."""
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(httpx.TransportError):
            nodes = (await server.call("GET", "/api/v1/cluster/status")).json()["nodes"]
            answering = [node for node in nodes if node["connections"] is not None]
            if len(answering) == 2:
                return answering
        assert time.monotonic() < deadline, server.log.read_text()
        await asyncio.sleep(0.05)


async def all_workers_are_counted(server: NodeProcess, connections: int) -> None:
    """Whichever worker is asked, it tells what each counts, and once what the store says."""
    asked = set()
    for _ in range(100):
        metrics = (await server.call("GET", "/metrics")).text
        families = {each.name: each for each in text_string_to_metric_families(metrics)}
        workers = {each.labels.get("worker") for each in families["notifyd_connections"].samples}
        assert workers == {"0", "1"}
        assert sum(each.value for each in families["notifyd_connections"].samples) == connections
        # Each to a user, and one to all.
        delivered = families["notifyd_deliveries"].samples
        assert sum(each.value for each in delivered) == 2 * connections
        (queued,) = families["notifyd_queue_messages"].samples
        assert queued.labels == {}
        requests = families["notifyd_http_requests"].samples
        asked |= {each.labels["worker"] for each in requests if each.labels["route"] == "/metrics"}
        if asked == {"0", "1"}:
            return
    raise AssertionError("one worker got all requests")


async def test_workers_share_a_port_and_are_one_server(start_processes: StartProcesses) -> None:
    (server,) = await start_processes(1, NOTIFYD_SERVER__WORKERS="2")
    listeners: list[WebSocketListener] = []
    status = await both_serve(server)
    assert {node["name"] for node in status} == {"node-0-0", "node-0-1"}
    while not all(node["connections"] for node in await both_serve(server)):
        # The kernel deals them out.
        listeners.append(await server.websocket(f"u{len(listeners)}"))
        assert len(listeners) < 200
    answer = await server.publish({"type": "broadcast"})
    assert answer["delivered_to"] == len(listeners)
    for number, listener in enumerate(listeners):
        await listener.expect("notification")
        assert (await server.publish(user(f"u{number}")))["delivered_to"] == 1
        await listener.expect("notification")
    await all_workers_are_counted(server, len(listeners))
    assert await server.stop() == 0
    for listener in listeners:
        code, told = await listener.closed()
        assert code == 1001
        assert told[-1]["type"] == "shutdown"


async def test_a_worker_that_dies_is_started_again(start_processes: StartProcesses) -> None:
    (server,) = await start_processes(1, NOTIFYD_SERVER__WORKERS="2")
    before = await both_serve(server)
    workers = server.workers()
    assert len(workers) == 2
    workers[0].kill()
    await until(
        lambda: len(server.workers()) == 2 and workers[0] not in server.workers(),
        "another worker",
        20,
    )
    deadline = time.monotonic() + 20
    while {each["id"] for each in await both_serve(server)} == {each["id"] for each in before}:
        assert time.monotonic() < deadline
    assert await server.stop() == 0


async def test_workers_end_with_a_supervisor_that_was_killed(
    start_processes: StartProcesses,
) -> None:
    (server,) = await start_processes(1, NOTIFYD_SERVER__WORKERS="2")
    workers = server.workers()
    await server.kill()
    await until(lambda: not any(each.is_running() for each in workers), "their end", 10)


async def test_workers_that_cannot_start_end_the_server(start_processes: StartProcesses) -> None:
    (server,) = await start_processes(1)
    # Its port is taken, by a server that does not share it.
    other = server.twin(NOTIFYD_SERVER__WORKERS="2")
    await other.spawn()
    assert await other.ended() == 1
    assert "cannot listen" in other.log.read_text()
    # Redis is not there.
    other = server.twin(
        NOTIFYD_SERVER__WORKERS="2",
        NOTIFYD_SERVER__PORT="0",
        NOTIFYD_REDIS__URL="redis://127.0.0.1:1",
    )
    await other.spawn()
    assert await other.ended() == 1
    assert "a worker cannot start" in other.log.read_text()
    await other.close()
