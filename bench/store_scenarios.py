"""The rows about stores: what it costs to keep notifications in memory, Redis and PostgreSQL.

A store runs on the load's core, and the load client beside it never sleeps; so what counts is how
many notifications a second of the server's own CPU time is enough for. That is scaled to a machine
where the bare Starlette route answers 20,000 requests a second, and measured in turn with it.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import secrets
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from bench.errors import BenchError
from bench.load import FanResult, ProbeResult, Publishing, Subscribers, fan_result
from bench.report import Row
from bench.scenarios import PUBLISHERS, Bench, Ratios, Rows, repeat
from bench.servers import Server
from bench.subjects import CONTENT
from notifyd.backends import Backends
from notifyd.eventually import settled
from notifyd.identifiers import new_uuid
from notifyd.metrics import Metrics
from notifyd.notification import Notification
from notifyd.options import (
    AckSettings,
    PostgresSettings,
    QueueSettings,
    RedisSettings,
    Settings,
)
from tests.stores import PostgresServer, RedisServer, StoreServer, serving

Kind = Literal["memory", "redis", "postgres"]
NAMES: dict[Kind, str] = {"memory": "memory", "redis": "Redis", "postgres": "PostgreSQL"}

SCALE = 20_000
"""Requests a second of the bare Starlette route on the machine that the bars are for."""

FULL_USERS = 50_000
FULL_ENTRIES = 1_000_000
QUEUED = 100
"""Notifications that wait for each user who returns."""

UNHELD = (sys.executable, "-m", "bench.unheld", "serve", "--config", "{config}")


@dataclass(frozen=True, slots=True)
class Kept:
    """A store that runs, and the settings of a server that keeps everything there."""

    kind: Kind
    store: StoreServer | None

    def settings(self, mode: Literal["offline", "always"] = "offline") -> str:
        """As TOML."""
        text = (
            f'[queue]\nbackend = "{self.kind}"\nmode = "{mode}"\n[ack]\nbackend = "{self.kind}"\n'
        )
        if self.store is not None:
            text += f'[{self.kind}]\nurl = "{self.store.url}"\n'
        return text

    def fill(self) -> None:
        """A million entries over fifty thousand users."""
        assert self.store is not None
        asyncio.run(_fill(self.kind, self.store.url))


async def _fill(kind: Kind, url: str) -> None:
    chosen = Settings(
        queue=QueueSettings(backend=kind),
        ack=AckSettings(enabled=False),
        redis=RedisSettings(url=url, command_timeout_seconds=60),
        postgres=PostgresSettings(url=url, command_timeout_seconds=60),
    )
    backends = Backends(chosen, Metrics(), clock=time.time, on_acknowledged=lambda _: None)
    await backends.start()
    logs = backends.logs
    assert logs is not None
    payload = msgspec.Raw(json.dumps(CONTENT["payload"]).encode())
    at_once = 500
    try:
        for _ in range(FULL_ENTRIES // FULL_USERS):
            for first in range(0, FULL_USERS, at_once):
                users = [f"full-{number:05d}" for number in range(first, first + at_once)]
                notification = Notification(new_uuid(), time.time(), "order.created", payload)
                rejections = await settled(logs.enqueue("default", users, notification))
                if any(rejections):
                    raise BenchError("a log was full that should not be")
    finally:
        await backends.aclose()


@contextmanager
def _keeping(bench: Bench, kind: Kind) -> Iterator[Kept]:
    """A fresh store on the load's core."""
    if kind == "memory":
        yield Kept(kind, None)
        return
    with serving(RedisServer if kind == "redis" else PostgresServer) as store:
        store.pin(bench.cores.load)
        yield Kept(kind, store)


# ------------------------------------------------------------------ enqueuing


@dataclass(slots=True)
class Pace:
    """Notifications a second of the server's CPU, over several measurements."""

    bar: float
    values: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def row(self, title: str, bare: float) -> Row:
        """Scaled from this machine's bare Starlette route to the one of the bars."""
        rate = statistics.median(self.values)
        scaled = rate * SCALE / bare
        return Row(
            title,
            f"≥ {self.bar:,.0f}/s",
            f"{scaled:,.0f}/s",
            scaled >= self.bar,
            f"{rate:,.0f} a second of the server's CPU time here, where the bare Starlette route "
            f"answers {bare:,.0f}; {statistics.median(self.wall):,.0f} a second by the clock, with "
            "store and load client on one core",
        )


def _enqueue(bench: Bench, server: Server, publishing: Publishing, each: int, pace: Pace) -> None:
    before = server.cpu_seconds()
    started = time.perf_counter()
    result = bench.load.run_fan(
        server.port, Subscribers(), publishing, seconds=bench.seconds, warmup=0
    )
    seconds = time.perf_counter() - started
    used = server.cpu_seconds() - before
    if result.refused:
        raise BenchError(f"{result.refused} of {result.answered} requests were refused")
    pace.values.append(result.answered * each / used)
    pace.wall.append(result.answered * each / seconds)


def bare_requests(bench: Bench) -> float:
    """Requests a second of the bare Starlette route, which are its CPU's: it never waits."""
    values = []
    with bench.starlette.server() as server:
        for _ in range(bench.repeats):
            before = server.cpu_seconds()
            result = bench.load.run_fan(
                server.port,
                Subscribers(),
                bench.starlette.publishing(publishers=PUBLISHERS),
                seconds=bench.seconds,
                warmup=0,
            )
            values.append(result.answered / (server.cpu_seconds() - before))
    return statistics.median(values)


def _paces(bench: Bench, kept: Kept, single: float | None, batched: float) -> dict[str, Pace]:
    """Enqueuing through the front door for users who are away, over 50,000 of them."""
    paces = {"batches": Pace(batched)}
    if single is not None:
        paces["single sends"] = Pace(single)
    subject = bench.notifyd
    for _ in range(bench.repeats):
        # A server for each: what the one has filled must not weigh on the other.
        with subject.server(kept.settings()) as server:
            many = subject.batches_to_absent(FULL_USERS // 100, publishers=PUBLISHERS)
            _enqueue(bench, server, many, 100, paces["batches"])
        if single is not None:
            with subject.server(kept.settings()) as server:
                one = subject.to_absent(FULL_USERS, publishers=PUBLISHERS)
                _enqueue(bench, server, one, 1, paces["single sends"])
    return paces


BARS: dict[Kind, tuple[float | None, float]] = {
    "memory": (None, 50_000),
    "redis": (8_000, 30_000),
    "postgres": (3_000, 15_000),
}


def enqueue(bench: Bench) -> Rows:
    """Notifications for users who are away, through the front door, 32 requests in flight: by
    single sends and by batches of a hundred; with Redis and PostgreSQL again when the store holds a
    million entries of fifty thousand users already."""
    bare = bare_requests(bench)
    for kind, (single, batched) in BARS.items():
        with _keeping(bench, kind) as kept:
            paces = _paces(bench, kept, single, batched)
            for way, pace in paces.items():
                title = f"enqueued in {NAMES[kind]} by {way}, on one core of the server"
                yield pace.row(title, bare)
            if kept.store is None or bench.quick:
                continue
            kept.fill()
            again = _paces(bench, kept, single, batched)
            for way, pace in again.items():
                yield _slowed(
                    f"the same in {NAMES[kind]} by {way}, with a million entries there already",
                    statistics.median(paces[way].values) / statistics.median(pace.values),
                )


def _slowed(title: str, factor: float) -> Row:
    return Row(title, "≤ 1.2", f"{factor:.2f}", factor <= 1.2, "times as long as without them")


# ------------------------------------------------------------------ what modes and holding cost


def _cost(
    bench: Bench, settings: str, publishing: Publishing, count: int, command: Sequence[str] | None
) -> float:
    """The server's CPU time for one delivery, in µs."""
    subscribers = bench.notifyd.subscribers("ws", count, channel=False)
    with bench.notifyd.server(settings, command=command) as server:
        return bench.checked_fan(server, subscribers, publishing)[1]


def _costs(
    bench: Bench, ratios: Ratios, ours: Callable[[], float], reference: Callable[[], float]
) -> tuple[list[float], list[float]]:
    mine: list[float] = []
    others: list[float] = []

    def measure(swapped: bool) -> None:
        if swapped:
            others.append(reference())
            mine.append(ours())
        else:
            mine.append(ours())
            others.append(reference())
        ratios.values.append(mine[-1] / others[-1])

    repeat(bench, [ratios], measure)
    return mine, others


def always(bench: Bench) -> Rows:
    """The server's CPU time for a notification to a connected user, 32 single sends in flight,
    everything in Redis: mode `always` against mode `offline`."""
    sends = bench.notifyd.single_sends(publishers=PUBLISHERS)
    ratio = Ratios(2, False)

    def cost(mode: Literal["offline", "always"]) -> float:
        # A Redis for each: what the one left unconfirmed must not be replayed by the other.
        with _keeping(bench, "redis") as kept:
            return _cost(bench, kept.settings(mode), sends, 100, None)

    mine, others = _costs(bench, ratio, lambda: cost("always"), lambda: cost("offline"))
    yield ratio.row(
        "mode `always` to connected users against mode `offline`, server CPU (Redis, 32 in flight)",
        f"{statistics.median(mine):.1f} µs against {statistics.median(others):.1f} µs",
    )


def holding(bench: Bench) -> Rows:
    """The server's CPU time for a delivery of one notification to 1,000 connected users, against
    a server that holds nothing until it is confirmed."""
    fan = bench.notifyd.to_users(1_000)
    ratio = Ratios(1.1, False)
    mine, others = _costs(
        bench,
        ratio,
        lambda: _cost(bench, "", fan, 1_000, None),
        lambda: _cost(bench, "", fan, 1_000, UNHELD),
    )
    yield ratio.row(
        "fan-out to 1,000 users with holding until confirmed, against without, server CPU",
        f"{statistics.median(mine):.2f} µs against {statistics.median(others):.2f} µs a delivery",
    )


# ------------------------------------------------------------------ who returns


def _queue_for(bench: Bench, server: Server, users: Sequence[str]) -> None:
    """A hundred notifications for each user, who is away."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {"X-API-Key": bench.notifyd.key, "Content-Type": "application/json"}
    for first in range(0, len(users), 100):
        items = [
            {"target": {"type": "user", "value": user}, **CONTENT}
            for user in users[first : first + 100]
        ]
        body = json.dumps({"notifications": items})
        for _ in range(QUEUED):
            connection.request("POST", "/api/v1/notifications/batch", body, headers)
            answer = connection.getresponse()
            summary = json.loads(answer.read())["summary"]
            if summary["succeeded"] != len(items):
                raise BenchError(f"not everything was queued: {summary}")
    connection.close()


def _return(bench: Bench, server: Server, user: str) -> float:
    """Seconds from connecting to `caught_up`."""
    key = base64.b64encode(secrets.token_bytes(16)).decode()
    request = (
        f"GET /ws?token={bench.notifyd.token(user)} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: {key}\r\n\r\n"
    ).encode()
    received = bytearray()
    started = time.perf_counter()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(request)
        while b'"caught_up"' not in received:
            data = client.recv(65536)
            if not data:
                raise BenchError("the server closed a returning user's connection")
            received += data
        seconds = time.perf_counter() - started
    if received.count(b'"replayed":true') != QUEUED:
        raise BenchError("not everything was replayed")
    return seconds


def _returns(bench: Bench, kept: Kept, name: str) -> list[float]:
    users = [f"{name}-{number}" for number in range(10 if bench.quick else 100)]
    with bench.notifyd.server(kept.settings()) as server:
        _queue_for(bench, server, users)
        # The first ones warm up what both sides only do once.
        return [_return(bench, server, user) * 1e3 for user in users][2:]


def returning(bench: Bench) -> Rows:
    """Users who return one after the other to a hundred queued notifications each, in Redis: from
    connecting to `caught_up`; and again when it holds a million entries. Then 1,000 users with a
    hundred each return at once, while another connection sends a Ping 200 times a second."""
    with _keeping(bench, "redis") as kept:
        times = _returns(bench, kept, "returning")
        p99 = _p99(times)
        yield Row(
            "replay of 100 queued to a returning user (Redis), p99",
            "≤ 10 ms",
            f"{p99:.2f} ms",
            p99 <= 10,
            f"from connecting to caught_up; median {statistics.median(times):.2f} ms, most "
            f"{max(times):.2f} ms",
        )
        yield from _storm(bench, kept)
        if bench.quick:
            return
        kept.fill()
        again = _returns(bench, kept, "again")
        yield _slowed(
            "the same replay, with a million entries there already",
            statistics.median(again) / statistics.median(times),
        )


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def _storm(bench: Bench, kept: Kept) -> Rows:
    count = 100 if bench.quick else 1_000
    subscribers = bench.notifyd.subscribers("ws", count, channel=False)
    everybody = Subscribers(
        "ws", subscribers.paths, ready='"caught_up"', parallel=len(subscribers.paths)
    )
    found: list[ProbeResult] = []
    with bench.notifyd.server(kept.settings()) as server, ExitStack() as stack:
        _queue_for(bench, server, [f"user-{number:05d}" for number in range(count)])

        def probe() -> None:
            path = bench.notifyd.probe_path()
            found.append(bench.load.probe(server.port, path, rate=200, seconds=2))

        probing = threading.Thread(target=probe)
        probing.start()
        time.sleep(0.3)  # it connects before the others do
        storm = stack.enter_context(bench.load.hold(server.port, everybody))
        probing.join()
    if not found:
        raise BenchError("the probe failed")
    (pings,) = found
    seconds = storm.connected.connect_s
    yield Row(
        f"{count:,} users with 100 queued each return at once (Redis): all caught up",
        "≤ 5 s",
        f"{seconds:.2f} s",
        seconds <= 5,
    )
    yield Row(
        "round trip of a `Ping` meanwhile, p99",
        "≤ 50 ms",
        f"{pings.p99_ms:.1f} ms",
        pings.p99_ms <= 50 and pings.pongs == pings.pings,
        f"most {pings.max_ms:.1f} ms, {pings.pongs} of {pings.pings} answered",
    )


# ------------------------------------------------------------------ a store that is down


def outage(bench: Bench) -> Rows:
    """99 % of the notifications to a hundred connected users take so long at most, at 1,000 single
    sends a second, with everything in Redis: Redis stopped (SIGSTOP) as they begin, against Redis
    well."""
    subscribers = bench.notifyd.subscribers("ws", 100, channel=False)
    sends = bench.notifyd.single_sends(publishers=PUBLISHERS, rate=1_000)
    ratio = Ratios(2, False)
    down: list[FanResult] = []
    well: list[FanResult] = []

    def run(kept: Kept, *, stopped: bool) -> FanResult:
        assert kept.store is not None
        with (
            bench.notifyd.server(kept.settings()) as server,
            bench.load.fan(server.port, subscribers, sends, seconds=bench.seconds) as session,
        ):
            if stopped:
                kept.store.stop()
            try:
                return bench.checks.add(fan_result(session))
            finally:
                kept.store.cont()

    def measure(swapped: bool) -> None:
        for stopped in (not swapped, swapped):
            with _keeping(bench, "redis") as kept:
                (down if stopped else well).append(run(kept, stopped=stopped))
        ratio.values.append(down[-1].p99_ms / well[-1].p99_ms)

    repeat(bench, [ratio], measure)
    yield ratio.row(
        "p99 of online publishing with the store down, against what it was (Redis)",
        f"{statistics.median(r.p99_ms for r in down):.2f} ms against "
        f"{statistics.median(r.p99_ms for r in well):.2f} ms",
    )


STORE_SCENARIOS: dict[str, Callable[[Bench], Rows]] = {
    "enqueue": enqueue,
    "always": always,
    "holding": holding,
    "returning": returning,
    "outage": outage,
}
