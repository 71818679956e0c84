"""What comes from Redis while Redis, the network and nodes fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import hiredis
import pytest
import redis.asyncio

from notifyd.cluster.lease import Lease
from notifyd.dispatch import redis_sources
from notifyd.dispatch.redis_trigger import BadMessages, RedisTrigger
from notifyd.metrics import Metrics
from notifyd.options import BreakerSettings
from notifyd.queue.redis import RedisUserLogs
from notifyd.queue.redis_keys import RedisKeys
from notifyd.redis_client import Redis
from notifyd.resilience import CircuitBreaker
from tests.conftest import StartServer
from tests.front_door import ADMIN_KEY, SECRET, Host, WebSocketListener, until
from tests.stores import RedisServer, environment_of_a_server, free_port, proxy, serving

EVENT = {"event_type": "order.created", "payload": {"n": 1}}
STREAM = "notifications"
FAST = {
    "failure_threshold": 2,
    "backoff_initial_ms": 10,
    "backoff_max_ms": 50,
    "success_threshold": 1,
}


def to(user: str, **more: Any) -> str:
    return json.dumps({"type": "user", "target": user, **EVENT, **more})


async def ready(host: Host) -> None:
    await until(lambda: active(host) == 1, "the subscription", 10)


def active(host: Host) -> float:
    return host.notifyd.metrics.redis_trigger_active.value


async def started(start_on: StartServer, url: str) -> Host:
    """A server that notices soon."""
    wanted = {
        "url": url,
        "trigger_enabled": True,
        "stream_key": STREAM,
        "command_timeout_seconds": 0.3,
    }
    host = await start_on(redis=wanted, breaker=FAST)
    await ready(host)
    return host


async def arrives(websocket: WebSocketListener, url: str, text: str, *, stream: bool) -> None:
    """Send, on a channel again and again, until it arrives."""
    async with redis.asyncio.Redis.from_url(url) as client:
        if stream:
            await client.xadd(STREAM, {"data": text})
            await websocket.expect("notification", wait=10)
            return
        receiving = asyncio.ensure_future(websocket.expect("notification", wait=10))
        while not receiving.done():
            await client.publish("notification:user:u1", text)
            await asyncio.wait([receiving], timeout=0.1)
        await receiving


class TestFaults:
    async def test_the_connection_is_killed(
        self, start_on: StartServer, redis_server: RedisServer
    ) -> None:
        host = await started(start_on, redis_server.url)
        websocket = await host.websocket("u1")
        for _ in range(3):
            redis_server.command("CLIENT", "KILL", "TYPE", "pubsub")
            redis_server.cut_connections()
            await arrives(websocket, redis_server.url, to("u1"), stream=True)
            await ready(host)
        redis_server.command("PUBLISH", "notification:user:u1", to("u1"))
        await websocket.expect("notification")
        await websocket.nothing_came()

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("fault", ["freeze", "restart", "kill"])
    async def test_redis_is_away(
        self, start_on: StartServer, redis_server: RedisServer, fault: str, stream: bool
    ) -> None:
        host = await started(start_on, redis_server.url)
        websocket = await host.websocket("u1")
        assert host.notifyd._backends.redis is not None
        breaker = host.notifyd._backends.redis.breaker
        if fault == "restart":
            await asyncio.to_thread(redis_server.restart)
        else:
            redis_server.stop() if fault == "freeze" else redis_server.kill()
            await until(lambda: breaker.state != 0, "an open breaker", 10)
            await asyncio.to_thread(redis_server.recover)
        await arrives(websocket, redis_server.url, to("u1"), stream=stream)
        await until(lambda: active(host) == 1, "the subscription", 10)

    async def test_a_subscription_on_a_server_that_nobody_publishes_to_is_found_out(
        self, start_on: StartServer, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As after a failover: new connections lead to another Redis, the old one stays open."""
        monkeypatch.setattr(redis_sources, "SILENCE_SECONDS", 0.3)
        with serving(RedisServer) as other:
            async with proxy(redis_server.port) as between:
                host = await started(start_on, f"redis://127.0.0.1:{between.port}")
                websocket = await host.websocket("u1")
                between._target = other.port
                redis_server.cut_connections()
                await arrives(websocket, other.url, to("u1"), stream=False)
                assert not redis_server.command("PUBSUB", "NUMPAT")
                await host.stop()

    async def test_a_silent_subscription_that_hears_is_left_alone(
        self, start_on: StartServer, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis_sources, "SILENCE_SECONDS", 0.05)
        async with proxy(redis_server.port) as between:
            host = await started(start_on, f"redis://127.0.0.1:{between.port}")
            accepted = between.accepted
            await until(lambda: _calls(redis_server, "publish") >= 3, "three probes")
            assert between.accepted == accepted
            # The network goes silent for all: nobody can say who hears.
            between.hold()
            client = host.notifyd._backends.redis
            assert client is not None
            await until(lambda: not client.up, "a lost connection")
            between.release()
            websocket = await host.websocket("u1")
            await arrives(websocket, redis_server.url, to("u1"), stream=False)
            await host.stop()


def _calls(server: RedisServer, command: str) -> int:
    told = server.command("INFO", "commandstats")
    return int(told.get(f"cmdstat_{command}", {}).get("calls", 0))


# --- the lease ------------------------------------------------------------------------------------


class Recorder:
    """Stands for a node's intake: what it was given to dispatch."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []

    def prepare(self, data: bytes, said: object, channel: bytes) -> Any:
        self.taken.append(data)
        raise AssertionError("taken")


class Node:
    """A trigger with a lease."""

    def __init__(self, url: str, name: str) -> None:
        self.redis = Redis(url, CircuitBreaker(BreakerSettings()), timeout=0.3)
        self.lease = Lease(self.redis, "k:lease", name, time_to_live=0.6, interval=0.1)
        self.recorder = Recorder()
        metrics = Metrics()
        self.trigger = RedisTrigger(
            self.redis,
            self.recorder,  # type: ignore[arg-type]  # see there
            metrics,
            BadMessages(metrics),
            patterns=("news:*",),
            probe_prefix="k:probe",
            lease=self.lease,
        )
        self.renewing: asyncio.Task[Any] | None = None

    async def start(self) -> None:
        await self.redis.start()
        self.trigger.start()
        self.renewing = asyncio.ensure_future(self.lease.run())

    def hang(self) -> None:
        """Renew no more."""
        assert self.renewing is not None
        self.renewing.cancel()

    async def stop(self) -> None:
        self.hang()
        await self.trigger.aclose()
        await self.redis.aclose()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_of_two_nodes_one_takes_what_is_published(redis_server: RedisServer) -> None:
    nodes = [Node(redis_server.url, name) for name in ("a", "b")]
    try:
        for node in nodes:
            await node.start()
        await until(lambda: any(node.trigger.subscriber.up for node in nodes))
        holder, other = nodes if nodes[0].lease.held else nodes[::-1]
        assert (holder.lease.held, other.lease.held) == (True, False)
        redis_server.command("PUBLISH", "news:1", "first")
        await until(lambda: holder.recorder.taken == [b"first"])
        holder.hang()
        # It goes before the other comes.
        await until(lambda: not holder.trigger.subscriber.up)
        await until(lambda: other.trigger.subscriber.up)
        redis_server.command("PUBLISH", "news:1", "second")
        await until(lambda: other.recorder.taken == [b"second"])
        assert holder.recorder.taken == [b"first"]
    finally:
        for node in nodes:
            await node.stop()


# --- nodes in processes of their own --------------------------------------------------------------


class Server:
    """`notifyd serve` with its queue in Redis, which a test may kill."""

    def __init__(self, process: Process, port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log

    @property
    def has_lease(self) -> bool:
        said = [line for line in self.log.read_text().splitlines() if "the trigger" in line]
        return bool(said) and "runs the trigger now" in said[-1]

    def listens(self) -> bool:
        """Whether it is up."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


class Servers:
    """Nodes that share a Redis."""

    def __init__(self, directory: Path, url: str, **environment: str) -> None:
        self._directory = directory
        self._environment = {
            **environment_of_a_server(),
            "NOTIFYD_AUTH__JWT_SECRET": SECRET,
            "NOTIFYD_AUTH__API_KEY": ADMIN_KEY,
            "NOTIFYD_REDIS__URL": url,
            "NOTIFYD_QUEUE__BACKEND": "redis",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            **environment,
        }
        self.alive: list[Server] = []
        self._frozen: list[Server] = []
        self._started = 0

    async def add(self) -> Server:
        port = free_port()
        self._started += 1
        log = self._directory / f"{self._started}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "notifyd", "serve", "--port", str(port)),
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=output,
                cwd=self._directory,
                env=self._environment,
            )
        server = Server(process, port, log)
        self.alive.append(server)
        return server

    async def kill(self, server: Server) -> None:
        self.alive.remove(server)
        await server.kill()

    def freeze(self, server: Server) -> None:
        """Stop it where it is: it believes that it has the lease."""
        server.process.send_signal(signal.SIGSTOP)
        self.alive.remove(server)
        self._frozen.append(server)

    def thaw(self) -> None:
        """Let all that are frozen go on."""
        for server in self._frozen:
            server.process.send_signal(signal.SIGCONT)
            self.alive.append(server)
        self._frozen.clear()

    @property
    def holder(self) -> Server | None:
        return next((server for server in self.alive if server.has_lease), None)

    async def held(self) -> Server:
        await until(lambda: self.holder is not None, "a holder of the lease", 20)
        holder = self.holder
        assert holder is not None
        return holder


@pytest.fixture
async def servers(tmp_path: Path, redis_server: RedisServer) -> AsyncIterator[Servers]:
    made = Servers(
        tmp_path,
        redis_server.url,
        NOTIFYD_REDIS__STREAM_KEY=STREAM,
        NOTIFYD_REDIS__TRIGGER_ENABLED="true",
    )
    yield made
    made.thaw()
    for server in list(made.alive):
        with contextlib.suppress(ProcessLookupError):
            await made.kill(server)


def pipelined(port: int, commands: Iterator[tuple[str, ...]]) -> int:
    """Send commands as fast as Redis takes them; how many."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        reader, sent, answered = hiredis.Reader(), 0, 0
        batch: list[bytes] = []
        for command in commands:
            batch.append(hiredis.pack_command(command))  # type: ignore[arg-type]  # any words
            sent += 1
            if len(batch) == 500:
                connection.sendall(b"".join(batch))
                batch.clear()
                while answered < sent:
                    reader.feed(connection.recv(65536))
                    while reader.gets() is not False:
                        answered += 1
        connection.sendall(b"".join(batch))
        while answered < sent:
            reader.feed(connection.recv(65536))
            while reader.gets() is not False:
                answered += 1
    return sent


async def test_another_node_takes_over_within_five_seconds(
    servers: Servers, redis_server: RedisServer
) -> None:
    first = await servers.add()
    await servers.held()
    await servers.add()
    await until(servers.alive[1].listens, "the second node", 20)
    redis_server.command("XADD", STREAM, "*", "data", to("u1"))
    await until(lambda: _depth(redis_server) == 1, "the first entry")
    await servers.kill(first)
    killed_at = time.monotonic()
    redis_server.command("XADD", STREAM, "*", "data", to("u1"))
    await until(lambda: _depth(redis_server) == 2, "the second entry")
    assert time.monotonic() - killed_at < 5


def _depth(server: RedisServer) -> int:
    """Notifications in the logs of all users."""
    depths = server.command("MGET", *(bucket.depth for bucket in RedisKeys("notifyd").buckets))
    return sum(int(depth or 0) for depth in depths)


async def test_ten_thousand_entries_while_nodes_are_killed_and_frozen(
    servers: Servers, redis_server: RedisServer
) -> None:
    count, users = 10_000, 100
    for _ in range(3):
        await servers.add()
    await servers.held()
    commands = (("XADD", STREAM, "*", "data", to(f"u{n % users}", payload=n)) for n in range(count))
    adding = asyncio.ensure_future(asyncio.to_thread(pipelined, redis_server.port, commands))
    for fault in ("kill", "freeze", "kill"):
        holder = await servers.held()
        behind = _depth(redis_server)
        at = behind + random.randrange(300, 1500)
        await until(lambda at=at: _depth(redis_server) >= min(at, count), "progress", 15)  # type: ignore[misc]
        if fault == "kill":
            await servers.kill(holder)
            await servers.add()
        else:
            servers.freeze(holder)
    # One that wakes in the middle of its work finds that it is another's.
    servers.thaw()
    assert await adding == count
    await until(lambda: _depth(redis_server) >= count, "all of them", 20)
    await until(lambda: _pending(redis_server) == 0, "all acknowledged", 10)
    client = Redis(redis_server.url, CircuitBreaker(BreakerSettings()), timeout=5)
    await client.start()
    corrupt: list[str] = []
    logs = RedisUserLogs(
        client,
        RedisKeys("notifyd"),
        max_size_per_user=1000,
        message_ttl_seconds=3600,
        on_dropped=Metrics().queue_dropped_total.inc,
        on_corrupt=corrupt.append,
    )
    for user in range(users):
        found: list[int] = []
        cursor: int | None = 0
        while cursor is not None:
            page = await logs.read("default", f"u{user}", after=cursor)
            found += [json.loads(bytes(entry.notification.payload)) for entry in page.entries]
            cursor = page.cursor
        # Each once, and in the order in which they were added.
        assert found == list(range(user, count, users))
    await client.aclose()
    assert redis_server.command("EXISTS", f"{STREAM}:dead") == 0


def _pending(server: RedisServer) -> int:
    return int(server.command("XPENDING", STREAM, "notifyd")["pending"])


async def test_a_flood_is_left_in_redis(servers: Servers, redis_server: RedisServer) -> None:
    """A store that is slower than the flood: messages wait in Redis, not in the server."""
    redis_server.command("CONFIG", "SET", "client-output-buffer-limit", "pubsub 0 0 0")
    server = await servers.add()
    await until(lambda: _patterns(redis_server) > 0, "the subscription", 20)
    before = server.resident_bytes()
    payload = "x" * 300
    commands = (
        ("PUBLISH", f"notification:user:u{n % 1000}", to(f"u{n % 1000}", payload=payload))
        for n in range(100_000)
    )
    publishing = asyncio.ensure_future(asyncio.to_thread(pipelined, redis_server.port, commands))
    most = 0
    while not publishing.done():
        most = max(most, server.resident_bytes())
        await asyncio.wait([publishing], timeout=0.02)
    assert await publishing == 100_000
    start = _depth(redis_server)
    await until(lambda: _depth(redis_server) > start + 1000, "progress")
    most = max(most, server.resident_bytes())
    assert most - before < 48 * 1024 * 1024
    assert server.process.returncode is None


def _patterns(server: RedisServer) -> int:
    return int(server.command("PUBSUB", "NUMPAT"))
