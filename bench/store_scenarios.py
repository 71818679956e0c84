"""The rows about stores: what it costs to keep notifications in memory, Redis and PostgreSQL.

A store runs on the load's core, and the load client beside it never sleeps; so what counts is how
many notifications a second of the server's own CPU time is enough for. That is scaled to a machine
where the bare Starlette route answers 20,000 requests a second, and measured in turn with it.
"""

from __future__ import annotations

import base64
import http.client
import itertools
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
from functools import partial
from typing import Literal

from bench.errors import BenchError
from bench.load import ProbeResult, Publishing, Subscribers, fan_result
from bench.report import Row
from bench.scenarios import PUBLISHERS, Bench, Ratios, Rows, repeat
from bench.servers import Server
from bench.subjects import CONTENT
from tests.stores import PostgresServer, RedisServer, StoreServer, serving

Kind = Literal["memory", "redis", "postgres"]
STORES: tuple[Kind, ...] = ("redis", "postgres")
NAMES: dict[Kind, str] = {"memory": "memory", "redis": "Redis", "postgres": "PostgreSQL"}

SCALE = 20_000
"""Requests a second of the bare Starlette route on the machine that the bars are for."""

FULL_USERS = 50_000
QUICK_USERS = 1_000
ENTRIES_EACH = 20
MOST_IN_MEMORY = 4_000_000
SLOWED = 1.2
"""As much longer may something take with a full store."""
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
            f'[queue]\nbackend = "{self.kind}"\nmode = "{mode}"\n'
            f'max_messages = {MOST_IN_MEMORY}\n[ack]\nbackend = "{self.kind}"\n'
        )
        if self.store is not None:
            text += f'[{self.kind}]\nurl = "{self.store.url}"\n'
        return text


def _fill(bench: Bench, server: Server) -> str:
    """What `batches_to_absent` and `to_absent` publish to gets twenty entries each, through the
    front door; how many that are in all, as a row says it."""
    users = QUICK_USERS if bench.quick else FULL_USERS
    at_once = 500
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"X-API-Key": bench.notifyd.key, "Content-Type": "application/json"}
    for _ in range(ENTRIES_EACH):
        for first in range(0, users, at_once):
            absent = [f"absent-{i // 100:05d}-{i % 100:02d}" for i in range(first, first + at_once)]
            body = json.dumps({"target_user_ids": absent, **CONTENT})
            connection.request("POST", "/api/v1/notifications/send-to-users", body, headers)
            answer = json.loads(connection.getresponse().read())
            if answer.get("queued") != at_once:
                raise BenchError(f"not everything was queued: {str(answer)[:500]}")
    connection.close()
    return f"{users * ENTRIES_EACH:,}"


@contextmanager
def _keeping(bench: Bench, kind: Kind) -> Iterator[Kept]:
    """A fresh store on the load's core."""
    if kind == "memory":
        yield Kept(kind, None)
        return
    with serving(RedisServer if kind == "redis" else PostgresServer) as store:
        store.pin(bench.cores.load)
        if isinstance(store, RedisServer):
            # Where a core is free for it, Redis writes its file anew without disturbing anybody;
            # here that would be on the load's, in the middle of some measurement.
            store.command("CONFIG", "SET", "auto-aof-rewrite-percentage", 0)
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
    single sends and by batches of a hundred."""
    bare = bare_requests(bench)
    for kind, (single, batched) in BARS.items():
        with _keeping(bench, kind) as kept:
            paces = _paces(bench, kept, single, batched)
            for way, pace in paces.items():
                title = f"enqueued in {NAMES[kind]} by {way}, on one core of the server"
                yield pace.row(title, bare)


# ------------------------------------------------------------------ what modes and holding cost


def _cost(
    bench: Bench, settings: str, publishing: Publishing, count: int, command: Sequence[str] | None
) -> float:
    """The server's CPU time for one delivery, in µs."""
    with bench.notifyd.server(settings, command=command) as server:
        return _cost_at(bench, server, publishing, count)


def _cost_at(
    bench: Bench, server: Server, publishing: Publishing, count: int, name: str = "user"
) -> float:
    subscribers = bench.notifyd.subscribers("ws", count, channel=False, name=name)
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


def _queue_for(bench: Bench, server: Server, users: Sequence[str], each: int) -> None:
    """So many notifications for each user, who is away."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {"X-API-Key": bench.notifyd.key, "Content-Type": "application/json"}
    for first in range(0, len(users), 100):
        items = [
            {"target": {"type": "user", "value": user}, **CONTENT}
            for user in users[first : first + 100]
        ]
        body = json.dumps({"notifications": items})
        for _ in range(each):
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
        _queue_for(bench, server, users, QUEUED)
        # The first ones warm up what both sides only do once.
        return [_return(bench, server, user) * 1e3 for user in users][2:]


def returning(bench: Bench) -> Rows:
    """Users who return one after the other to a hundred queued notifications each, in Redis: from
    connecting to `caught_up`. Then 1,000 users with a hundred each return at once, while another
    connection sends a Ping 200 times a second."""
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
        storm = _storm(bench, kept, "user")
    yield Row(
        f"{storm.count:,} users with 100 queued each return at once (Redis): all caught up",
        "≤ 5 s",
        f"{storm.seconds:.2f} s",
        storm.seconds <= 5,
    )
    pings = storm.pings
    yield Row(
        "round trip of a `Ping` meanwhile, p99",
        "≤ 50 ms",
        f"{pings.p99_ms:.1f} ms",
        pings.p99_ms <= 50 and pings.pongs == pings.pings,
        f"most {pings.max_ms:.1f} ms, {pings.pongs} of {pings.pings} answered",
    )


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


@dataclass(frozen=True, slots=True)
class Storm:
    """How long it took until so many who returned at once had everything, and Pings meanwhile."""

    count: int
    seconds: float
    pings: ProbeResult


def _storm(bench: Bench, kept: Kept, name: str) -> Storm:
    count = 100 if bench.quick else 1_000
    subscribers = bench.notifyd.subscribers("ws", count, channel=False, name=name)
    everybody = Subscribers(
        "ws", subscribers.paths, ready='"caught_up"', parallel=len(subscribers.paths)
    )
    found: list[ProbeResult] = []
    with bench.notifyd.server(kept.settings()) as server, ExitStack() as stack:
        _queue_for(bench, server, [f"{name}-{number:05d}" for number in range(count)], QUEUED)

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
    return Storm(count, storm.connected.connect_s, pings)


# ------------------------------------------------------------------ a store that is down


def outage(bench: Bench) -> Rows:
    """99 % of the notifications to a hundred connected users take so long at most, at 1,000 single
    sends a second, with everything in Redis, and in PostgreSQL: the store stopped (SIGSTOP) as they
    begin, when all users have read their queues, against the store well; each the median of
    three."""
    for kind in STORES:
        yield _outage(bench, kind)


def _outage(bench: Bench, kind: Kind) -> Row:
    def p99(*, stopped: bool) -> float:
        with _keeping(bench, kind) as kept:
            return _p99_of_sends(bench, kept, stopped=stopped)

    ratio = Ratios(2, False)
    down, well = _costs(bench, ratio, lambda: p99(stopped=True), lambda: p99(stopped=False))
    return ratio.row(
        f"p99 of online publishing with the store down, against what it was ({NAMES[kind]})",
        f"{statistics.median(down):.2f} ms against {statistics.median(well):.2f} ms",
    )


def _p99_of_sends(bench: Bench, kept: Kept, *, stopped: bool, name: str = "user") -> float:
    """The median of three: what the machine itself keeps the server from for milliseconds at a time
    comes near to one in a hundred."""
    runs = [
        _p99_of_one(bench, kept, stopped=stopped, name=f"{name}-{number}")
        for number in range(bench.repeats)
    ]
    return statistics.median(runs)


def _p99_of_one(bench: Bench, kept: Kept, *, stopped: bool, name: str) -> float:
    assert kept.store is not None
    paths = bench.notifyd.subscribers("ws", 100, channel=False, name=name).paths
    # Who is still about to read his queue waits a second for a store that stopped, and so does what
    # is live behind it: that is no online publishing yet.
    subscribers = Subscribers("ws", paths, ready='"caught_up"')
    sends = bench.notifyd.single_sends(publishers=PUBLISHERS, rate=1_000, name=name)
    with bench.notifyd.server(kept.settings()) as server, ExitStack() as stack:
        _queue_for(bench, server, [f"{name}-{number:05d}" for number in range(100)], 1)
        fan = bench.load.fan(server.port, subscribers, sends, seconds=bench.seconds)
        session = stack.enter_context(fan)
        if stopped:
            kept.store.stop()
        try:
            return bench.checks.add(fan_result(session)).p99_ms
        finally:
            kept.store.cont()


# ------------------------------------------------------------------ a store that is full


@dataclass(slots=True)
class _Slowed:
    """What a full store slows: measured in turn with a fresh one, by users who are new to both."""

    bench: Bench
    kind: Kind
    entries: str
    _runs: Iterator[int] = field(default_factory=itertools.count)

    def name(self) -> str:
        """Users whom nothing waits for, as long as `user`."""
        return f"u{next(self._runs):03d}"

    def row(
        self, title: str, unit: str, full: Callable[[], float], empty: Callable[[], float]
    ) -> Row:
        """How much longer it takes with the full one."""
        ratio = Ratios(SLOWED, False)
        with_them, without = _costs(self.bench, ratio, full, empty)
        return self.of(ratio, title, unit, with_them, without)

    def of(
        self,
        ratio: Ratios,
        title: str,
        unit: str,
        with_them: Sequence[float],
        without: Sequence[float],
    ) -> Row:
        """The row of ratios that were measured."""
        return ratio.row(
            f"{title} ({NAMES[self.kind]}), with {self.entries} entries there already, against "
            "without",
            f"{statistics.median(with_them):.2f} {unit} against "
            f"{statistics.median(without):.2f} {unit}",
        )


def full(bench: Bench) -> Rows:
    """The rows above with a log of a million entries over fifty thousand users, each in turn with
    the same in a fresh store: each store is filled once, by way of the front door."""
    yield from _full_memory(bench)
    for kind in STORES:
        try:
            with _keeping(bench, kind) as kept:
                with bench.notifyd.server(kept.settings()) as server:
                    slowed = _Slowed(bench, kind, _fill(bench, server))
                yield from _full_store(slowed, kept)
        except BenchError as e:
            # The other store is measured all the same.
            reason = str(e).splitlines()[0]
            yield Row(f"full ({NAMES[kind]})", "measured", "failed", False, reason)


def _enqueue_cost(bench: Bench, server: Server, *, batched: bool) -> float:
    """The server's CPU time to enqueue one, in µs."""
    subject, pace = bench.notifyd, Pace(0)
    users = QUICK_USERS if bench.quick else FULL_USERS
    if batched:
        many = subject.batches_to_absent(users // 100, publishers=PUBLISHERS)
        _enqueue(bench, server, many, 100, pace)
    else:
        one = subject.to_absent(users, publishers=PUBLISHERS)
        _enqueue(bench, server, one, 1, pace)
    return 1e6 / pace.values[-1]


def _full_memory(bench: Bench) -> Rows:
    settings = Kept("memory", None).settings()
    with bench.notifyd.server(settings) as there:
        slowed = _Slowed(bench, "memory", _fill(bench, there))

        def fan(server: Server) -> float:
            name = slowed.name()
            return _cost_at(bench, server, bench.notifyd.to_users(1_000, name=name), 1_000, name)

        def enqueue_batches(server: Server) -> float:
            return _enqueue_cost(bench, server, batched=True)

        def fresh(measure: Callable[[Server], float]) -> float:
            with bench.notifyd.server(settings) as server:
                return measure(server)

        yield slowed.row(
            "fan-out to 1,000 users with holding until confirmed, server CPU",
            "µs",
            lambda: fan(there),
            lambda: fresh(fan),
        )
        yield slowed.row(
            "enqueued by batches, server CPU",
            "µs",
            lambda: enqueue_batches(there),
            lambda: fresh(enqueue_batches),
        )


def _full_store(slowed: _Slowed, there: Kept) -> Rows:
    bench, kind = slowed.bench, slowed.kind

    def fresh(measure: Callable[[Kept], float]) -> float:
        with _keeping(bench, kind) as kept:
            return measure(kept)

    def against(title: str, unit: str, measure: Callable[[Kept], float]) -> Row:
        return slowed.row(title, unit, lambda: measure(there), lambda: fresh(measure))

    def enqueued(kept: Kept, *, batched: bool) -> float:
        with bench.notifyd.server(kept.settings()) as server:
            return _enqueue_cost(bench, server, batched=batched)

    def always_cost(kept: Kept) -> float:
        name = slowed.name()
        sends = bench.notifyd.single_sends(publishers=PUBLISHERS, name=name)
        with bench.notifyd.server(kept.settings("always")) as server:
            return _cost_at(bench, server, sends, 100, name)

    for way in ("batches", "single sends"):
        yield against(
            f"enqueued by {way}, server CPU",
            "µs",
            partial(enqueued, batched=way == "batches"),
        )
    yield against(
        "p99 of online publishing with the store down",
        "ms",
        lambda kept: _p99_of_sends(bench, kept, stopped=True, name=slowed.name()),
    )
    if kind != "redis":
        return  # the rows that are left are about Redis alone
    yield against("mode `always` to connected users, server CPU", "µs", always_cost)
    yield against(
        "replay of 100 queued to a returning user, median",
        "ms",
        lambda kept: statistics.median(_returns(bench, kept, slowed.name())),
    )
    yield from _full_storm(slowed, there)


def _full_storm(slowed: _Slowed, there: Kept) -> Rows:
    bench = slowed.bench
    caught_up, pings = Ratios(SLOWED, False), Ratios(SLOWED, False)
    full: list[Storm] = []
    empty: list[Storm] = []

    def measure(swapped: bool) -> None:
        for is_full in (not swapped, swapped):
            if is_full:
                full.append(_storm(bench, there, slowed.name()))
            else:
                with _keeping(bench, slowed.kind) as kept:
                    empty.append(_storm(bench, kept, slowed.name()))
        caught_up.values.append(full[-1].seconds / empty[-1].seconds)
        pings.values.append(full[-1].pings.p99_ms / empty[-1].pings.p99_ms)

    repeat(bench, [caught_up, pings], measure)
    yield slowed.of(
        caught_up,
        f"{full[0].count:,} users with 100 queued each return at once: all caught up",
        "s",
        [storm.seconds for storm in full],
        [storm.seconds for storm in empty],
    )
    yield slowed.of(
        pings,
        "round trip of a `Ping` meanwhile, p99",
        "ms",
        [storm.pings.p99_ms for storm in full],
        [storm.pings.p99_ms for storm in empty],
    )


STORE_SCENARIOS: dict[str, Callable[[Bench], Rows]] = {
    "enqueue": enqueue,
    "always": always,
    "holding": holding,
    "returning": returning,
    "outage": outage,
    "full": full,
}
