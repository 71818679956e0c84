"""The rows about several nodes: what workers, and the way to another node, cost.

All nodes run on the server's core, Redis on the load's; so what counts is the nodes' CPU time, and
latencies are those of one notification at a time.
"""

from __future__ import annotations

import base64
import http.client
import json
import secrets
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench.errors import BenchError
from bench.load import Publishing, Subscribers
from bench.report import Row
from bench.scenarios import PUBLISHERS, Bench, Ratios, Rows, repeat
from bench.servers import Server
from bench.store_scenarios import SCALE, bare_requests
from bench.subjects import CONTENT, DEFAULT_COMMAND
from tests.stores import RedisServer, serving

SUBSCRIBERS = 1_000
USERS = 100
SENDS = 3_000


@contextmanager
def _redis(bench: Bench) -> Iterator[RedisServer]:
    """A fresh one on the load's core."""
    with serving(RedisServer) as redis:
        redis.pin(bench.cores.load)
        yield redis


def _settings(redis: RedisServer) -> str:
    return (
        f'[redis]\nurl = "{redis.url}"\n[queue]\nbackend = "redis"\n[ack]\nbackend = "redis"\n'
        "[cluster]\nenabled = true\n"
    )


def _wait_for_nodes(bench: Bench, server: Server, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(_status(bench, server)["nodes"]) < count:
        if time.monotonic() > deadline:
            raise BenchError("the nodes do not find each other")
        time.sleep(0.1)


def _status(bench: Bench, server: Server) -> dict[str, list[object]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        headers = {"X-API-Key": bench.notifyd.key}
        connection.request("GET", "/api/v1/cluster/status", headers=headers)
        status: dict[str, list[object]] = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    return status


def workers(bench: Bench) -> Rows:
    """The server's CPU time for a delivery to a channel of 1,000 subscribers: two workers against
    one, with one publish in flight; and with 32, where one process joins more into a write than
    each of two can."""
    subscribers = bench.notifyd.subscribers("ws", SUBSCRIBERS)
    for in_flight in (1, PUBLISHERS):
        publishing = bench.notifyd.to_channel(publishers=in_flight, window=in_flight)
        ratio = Ratios(1.15, False)
        two: list[float] = []
        one: list[float] = []

        def cost(count: int, publishing: Publishing = publishing) -> float:
            command = (*DEFAULT_COMMAND, "--workers", str(count))
            with (
                _redis(bench) as redis,
                bench.notifyd.server(_settings(redis), command=command) as server,
            ):
                _wait_for_nodes(bench, server, count)
                return bench.checked_fan(server, subscribers, publishing)[1]

        def measure(
            swapped: bool,
            cost: Callable[[int], float] = cost,
            costs: tuple[list[float], list[float]] = (one, two),
            ratio: Ratios = ratio,
        ) -> None:
            for count in (1, 2) if swapped else (2, 1):
                costs[count - 1].append(cost(count))
            ratio.values.append(costs[1][-1] / costs[0][-1])

        repeat(bench, [ratio], measure)
        title = (
            "server CPU for a delivery with two workers against one, a channel of 1,000 "
            f"subscribers, {in_flight} in flight"
        )
        details = f"{statistics.median(two):.2f} µs against {statistics.median(one):.2f} µs"
        yield ratio.row(title, details)


class _Watcher:
    """A user's WebSocket, by hand: as little as possible between a frame and the clock."""

    def __init__(self, bench: Bench, server: Server, user: str) -> None:
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        request = (
            f"GET /ws?token={bench.notifyd.token(user)} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {key}\r\n\r\n"
        )
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        self._socket.sendall(request.encode())
        self.wait(b'"connected"')

    def wait(self, text: bytes) -> None:
        """Read until this comes."""
        received = b""
        while text not in received:
            data = self._socket.recv(65536)
            if not data:
                raise BenchError("the server closed the connection")
            received += data

    def close(self) -> None:
        self._socket.close()


def _latencies(bench: Bench, publisher: Server, holder: Server, user: str) -> list[float]:
    """Milliseconds from a request to its frame, one after the other."""
    watcher = _Watcher(bench, holder, user)
    connection = http.client.HTTPConnection("127.0.0.1", publisher.port, timeout=10)
    headers = {"X-API-Key": bench.notifyd.key, "Content-Type": "application/json"}
    taken = []
    for number in range(SENDS // 10 if bench.quick else SENDS):
        marked = {**CONTENT, "correlation_id": f"mark-{number:06d}"}
        body = json.dumps({"target_user_id": user, **marked})
        started = time.perf_counter()
        connection.request("POST", "/api/v1/notifications/send", body, headers)
        watcher.wait(f"mark-{number:06d}".encode())
        taken.append((time.perf_counter() - started) * 1e3)
        answer = json.loads(connection.getresponse().read())
        if answer["outcome"] != "delivered":
            raise BenchError(f"not delivered: {answer}")
    connection.close()
    watcher.close()
    return taken


def _p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def routed(bench: Bench) -> Rows:
    """A notification to a user whom another node holds: what it adds to the time until he has it,
    and what it costs the node that it was published to, in batches of a hundred."""
    with (
        _redis(bench) as redis,
        bench.notifyd.server(_settings(redis)) as sender,
        bench.notifyd.server(_settings(redis)) as holder,
    ):
        _wait_for_nodes(bench, sender, 2)
        there: list[float] = []
        here: list[float] = []
        medians: list[float] = []
        for number in range(bench.repeats):
            far = _latencies(bench, sender, holder, f"there-{number}")
            near = _latencies(bench, sender, sender, f"here-{number}")
            there.append(_p99(far))
            here.append(_p99(near))
            medians.append(statistics.median(far) - statistics.median(near))
        added = statistics.median(there) - statistics.median(here)
        yield Row(
            "a user on another node has it later than one on the same node by, p99",
            "≤ 3 ms",
            f"{added:.2f} ms",
            added <= 3,
            f"{statistics.median(there):.2f} ms against {statistics.median(here):.2f} ms, one "
            f"after the other; half of them by {statistics.median(medians):.2f} ms",
        )
        bare = bare_requests(bench)
        cost = [_batch_cost(bench, sender, holder) for _ in range(bench.repeats)]
        scaled = statistics.median(cost) * bare / SCALE
        yield Row(
            "server CPU of the sending node for a routed notification, in batches of 100",
            "≤ 40 µs",
            f"{scaled:.1f} µs",
            scaled <= 40,
            f"{statistics.median(cost):.1f} µs here, where the bare Starlette route answers "
            f"{bare:,.0f} requests a second",
        )


def _batch_cost(bench: Bench, sender: Server, holder: Server) -> float:
    """CPU time of the sender for one notification, in µs."""
    subscribers = bench.notifyd.subscribers("ws", USERS, channel=False)
    batches: Publishing = bench.notifyd.batches(USERS, publishers=PUBLISHERS)
    with bench.load.hold(holder.port, subscribers):
        before = sender.cpu_seconds()
        result = bench.load.run_fan(
            sender.port, Subscribers(), batches, seconds=bench.seconds, warmup=0
        )
        used = sender.cpu_seconds() - before
    if result.refused:
        raise BenchError(f"{result.refused} of {result.answered} requests were refused")
    return used * 1e6 / (result.answered * USERS)


CLUSTER_SCENARIOS: dict[str, Callable[[Bench], Rows]] = {"workers": workers, "cluster": routed}
