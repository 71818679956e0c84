"""Every row of the table as a scenario.

A scenario measures notifyd and what it is compared with in turn, several times, and compares
each measurement with its neighbour in time; the median of these ratios counts. The order within
a pair alternates. A median within 10 % of its bar is measured two more times.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import msgspec

from bench.errors import BenchError
from bench.load import (
    FanResult,
    LimitResult,
    Load,
    Publishing,
    Subscribers,
    Transport,
    fan_result,
    kernel_limit,
)
from bench.machine import Cores, on_core
from bench.report import Row
from bench.servers import Server
from bench.single import SingleResult
from bench.subjects import NotifydSubject, StarletteSubject, child_environ, find_nchan

Rows = Iterator[Row]

FAN_CONNECTIONS = 1_000
MEMORY_CONNECTIONS = 5_000
BROADCAST_CONNECTIONS = 10_000
CONNECT_RATE = 1_000
"""New connections a second where accepting is measured: less than any of the servers can do."""
PUBLISHERS = 32
BATCH_USERS = 100


@dataclass(slots=True)
class Checks:
    """What went wrong with deliveries, over all fan-outs of notifyd in this run."""

    received: int = 0
    lost: int = 0
    duplicated: int = 0
    disordered: int = 0
    unknown: int = 0
    refused: int = 0
    closed: int = 0
    runs: int = 0

    def add(self, result: FanResult) -> FanResult:
        """Counts a result in, and hands it on."""
        self.runs += 1
        self.received += result.received
        self.lost += result.lost
        self.duplicated += result.duplicated
        self.disordered += result.disordered
        self.unknown += result.unknown
        self.refused += result.refused
        self.closed += result.closed
        return result

    @property
    def row(self) -> Row:
        """The row about all of them."""
        wrong = self.lost + self.duplicated + self.disordered
        return Row(
            "lost, duplicated, or (from one publishing connection) out of order, in all of these",
            "0",
            f"{self.lost}, {self.duplicated}, {self.disordered}",
            wrong + self.unknown + self.refused + self.closed == 0,
            f"{self.received:,} deliveries checked in {self.runs} runs; {self.unknown} never "
            f"published, {self.refused} publishes refused, {self.closed} connections closed",
        )


@dataclass(frozen=True, slots=True)
class Bench:
    """What every scenario works with. `quick` measures once and briefly, to see that it works."""

    directory: Path
    cores: Cores
    load: Load
    notifyd: NotifydSubject
    starlette: StarletteSubject
    quick: bool
    checks: Checks = field(default_factory=Checks)

    @property
    def seconds(self) -> float:
        """How long one measurement takes."""
        return 1.5 if self.quick else 4.0

    @property
    def repeats(self) -> int:
        """How often a pair is measured at least."""
        return 1 if self.quick else 3

    def checked_fan(
        self, server: Server, subscribers: Subscribers, publishing: Publishing
    ) -> tuple[FanResult, float]:
        """A fan-out of notifyd, counted into the checks, and the server's CPU time for one
        delivery in µs."""
        with self.load.fan(server.port, subscribers, publishing, seconds=self.seconds) as session:
            before = server.cpu_seconds()
            result = self.checks.add(fan_result(session))
            used = server.cpu_seconds() - before
        return result, used * 1e6 / max(1, result.received)

    def limit(self, size: float) -> LimitResult:
        """The kernel's limit for as many connections as the fan-outs have."""
        return kernel_limit(
            FAN_CONNECTIONS,
            round(size),
            seconds=self.seconds / 2,
            server_core=self.cores.server,
            load_core=self.cores.load,
        )


@contextmanager
def open_bench(cores: Cores, command: Sequence[str], *, quick: bool) -> Iterator[Bench]:
    """A bench in a temporary directory of its own."""
    with tempfile.TemporaryDirectory(prefix="notifyd-bench-") as name:
        directory = Path(name)
        yield Bench(
            directory,
            cores,
            Load(directory, core=cores.load),
            NotifydSubject(directory, cores, command),
            StarletteSubject(directory, cores),
            quick,
        )


@dataclass(slots=True)
class Ratios:
    """Ratios of neighbouring measurements, against a bar."""

    bar: float
    at_least: bool
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """What counts."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool:
        """Whether the median meets the bar."""
        return self.median >= self.bar if self.at_least else self.median <= self.bar

    @property
    def near(self) -> bool:
        """Whether it is so near to the bar that it should be measured again."""
        return abs(self.median / self.bar - 1) < 0.1

    def row(self, title: str, details: str) -> Row:
        """The row of the table."""
        span = f" ({min(self.values):.2f}-{max(self.values):.2f})" if len(self.values) > 1 else ""
        bar = f"{'≥' if self.at_least else '≤'} {self.bar:g}"
        return Row(title, bar, f"{self.median:.2f}{span}", self.met, details)


def repeat(bench: Bench, ratios: Sequence[Ratios], measure: Callable[[bool], None]) -> None:
    """Calls `measure` as often as needed; it appends to the ratios. Every other call is told to
    take the reference first."""
    for i in range(bench.repeats):
        measure(bool(i % 2))
    if not bench.quick and any(r.near for r in ratios):
        for i in range(2):
            measure(bool(i % 2))


T = TypeVar("T")
U = TypeVar("U")


def _in_order(first: Callable[[], T], second: Callable[[], U], *, swapped: bool) -> tuple[T, U]:
    if swapped:
        b = second()
        return first(), b
    return first(), second()


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _thousands(values: Sequence[float]) -> str:
    return f"{_median(values) / 1000:,.1f}k"


# ------------------------------------------------------------------ fan-out


def _fanout(bench: Bench, in_flight: int, bar: float, title: str) -> Rows:
    publishing = bench.notifyd.to_channel(publishers=in_flight, window=in_flight)
    subscribers: dict[Transport, Subscribers] = {
        "ws": bench.notifyd.subscribers("ws", FAN_CONNECTIONS),
        "sse": bench.notifyd.subscribers("sse", FAN_CONNECTIONS),
    }
    against_c, against_ws = Ratios(bar, True), Ratios(0.85, True)
    ws_results: list[FanResult] = []
    sse_results: list[FanResult] = []
    limits: list[LimitResult] = []
    costs: list[float] = []

    with bench.notifyd.server() as server:

        def websocket() -> FanResult:
            result, cost = bench.checked_fan(server, subscribers["ws"], publishing)
            costs.append(cost)
            return result

        def sse() -> FanResult:
            return bench.checked_fan(server, subscribers["sse"], publishing)[0]

        def measure(swapped: bool) -> None:
            ws, event_stream = _in_order(websocket, sse, swapped=swapped)
            limit = bench.limit(ws.bytes_per_delivery)
            ws_results.append(ws)
            sse_results.append(event_stream)
            limits.append(limit)
            against_c.values.append(ws.deliveries_per_s / limit.sends_per_s)
            against_ws.values.append(event_stream.deliveries_per_s / ws.deliveries_per_s)

        repeat(bench, [against_c, against_ws], measure)

    yield against_c.row(
        title,
        f"{_thousands([r.deliveries_per_s for r in ws_results])} deliveries/s of "
        f"{_median([r.bytes_per_delivery for r in ws_results]):.0f} bytes, C loop "
        f"{_thousands([r.sends_per_s for r in limits])} sends/s; p99 "
        f"{_median([r.p99_ms for r in ws_results]):.1f} ms; server "
        f"{_median(costs):.2f} µs of CPU a delivery, C loop "
        f"{_median([r.cpu_us_per_send for r in limits]):.2f} µs; {_client(ws_results)}",
    )
    yield against_ws.row(
        f"the same over SSE, against WebSocket ({in_flight} in flight)",
        f"{_thousands([r.deliveries_per_s for r in sse_results])} deliveries/s of "
        f"{_median([r.bytes_per_delivery for r in sse_results]):.0f} bytes; p99 "
        f"{_median([r.p99_ms for r in sse_results]):.1f} ms; {_client(sse_results)}",
    )
    limit = _median([r.sends_per_s for r in limits])
    size = _median([r.bytes_per_delivery for r in ws_results])
    yield _nchan_row(bench, in_flight, limit, round(size))
    if in_flight == 1:
        yield _starlette_row(bench, limit)


def _client(results: Sequence[FanResult]) -> str:
    cost = _median([r.client_us_per_delivery for r in results])
    share = _median([r.busy_share for r in results])
    bottleneck = " (it was the bottleneck)" if share > 0.95 else ""
    return f"load client {cost:.2f} µs a delivery, busy {share:.0%}{bottleneck}"


def _nchan_row(bench: Bench, in_flight: int, limit: float, size: int) -> Row:
    title = f"for comparison: nchan, {in_flight} in flight, against the C loop"
    nchan = find_nchan(bench.directory, bench.cores)
    if nchan is None:
        return Row(title, "none", "not installed", None)
    try:
        with nchan.server() as server:
            result = bench.load.run_fan(
                server.port,
                nchan.subscribers(FAN_CONNECTIONS),
                nchan.publishing(size, publishers=in_flight, window=in_flight),
                seconds=bench.seconds,
            )
    except BenchError as e:  # a broken nginx says nothing about us
        return Row(title, "none", "failed", None, str(e).splitlines()[0])
    details = (
        f"{_thousands([result.deliveries_per_s])} deliveries/s of "
        f"{result.bytes_per_delivery:.0f} bytes; p99 {result.p99_ms:.1f} ms; {_client([result])}"
    )
    return Row(title, "none", f"{result.deliveries_per_s / limit:.2f}", None, details)


def _starlette_row(bench: Bench, limit: float) -> Row:
    with bench.starlette.server() as server:
        result = bench.load.run_fan(
            server.port,
            bench.starlette.subscribers(FAN_CONNECTIONS),
            bench.starlette.fanout(),
            seconds=bench.seconds,
        )
    return Row(
        "for comparison: Starlette's send_text() in a loop, 1 in flight, against the C loop",
        "none",
        f"{result.deliveries_per_s / limit:.2f}",
        None,
        f"{_thousands([result.deliveries_per_s])} deliveries/s; p99 {result.p99_ms:.1f} ms",
    )


def fanout_1(bench: Bench) -> Rows:
    """One publish at a time to 1,000 subscribers of a channel: deliveries a second against the
    rate at which a C loop calls send() with as many bytes; SSE against WebSocket."""
    title = "deliveries/s to 1,000 WebSockets, one publish at a time, against the C loop"
    return _fanout(bench, 1, 0.70, title)


def fanout_32(bench: Bench) -> Rows:
    """The same with 32 publishes in flight, from 32 publishing connections."""
    title = "the same with 32 publishes in flight from 32 connections, against the C loop's sends/s"
    return _fanout(bench, PUBLISHERS, 8, title)


# ------------------------------------------------------------------ connections


def memory(bench: Bench) -> Rows:
    """Resident memory of the server with 5,000 users connected, a token each and one channel,
    less what it was before: at once, and after each has had a heartbeat and answered its Ping;
    the larger counts. A few connections come and go before, so that what is loaded only once is
    not counted."""
    bars: dict[Transport, float] = {"ws": 4.5, "sse": 6.0}
    names = {"ws": "WebSocket", "sse": "SSE"}
    for transport, bar in bars.items():
        with bench.notifyd.server() as server:
            with bench.load.hold(server.port, bench.notifyd.subscribers(transport, 20)):
                pass
            server.settled_cpu_seconds()
            before = server.memory_bytes()
            subscribers = bench.notifyd.subscribers(transport, MEMORY_CONNECTIONS)
            with bench.load.hold(server.port, subscribers):
                server.settled_cpu_seconds()
                at_once = server.memory_bytes() - before
                if not bench.quick:
                    time.sleep(35)  # the default heartbeat_interval is 30
                    server.settled_cpu_seconds()
                later = server.memory_bytes() - before
        most = max(at_once, later) / MEMORY_CONNECTIONS / 1024
        yield Row(
            "memory per idle connection, server RSS, 5,000 users with a token each and one "
            f"channel: {names[transport]}",
            f"≤ {bar:g} KB",
            f"{most:.2f} KB",
            most <= bar,
            f"at once {at_once / MEMORY_CONNECTIONS / 1024:.2f} KB, after a heartbeat "
            f"{later / MEMORY_CONNECTIONS / 1024:.2f} KB; {before / 2**20:.0f} MB before",
        )


def accept(bench: Bench) -> Rows:
    """CPU time of the server for 5,000 WebSockets that connect at 1,000 a second: with a token
    that it never saw and a Subscribe, then again with the same tokens, against what plain
    Starlette on stock uvicorn takes to accept."""
    count = 1_000 if bench.quick else 5_000
    new, seen = Ratios(0.65, False), Ratios(0.45, False)
    ours: list[tuple[float, float]] = []
    theirs: list[float] = []

    def connect(server: Server, subscribers: Subscribers) -> float:
        before = server.settled_cpu_seconds()
        with bench.load.hold(server.port, subscribers):
            return (server.settled_cpu_seconds() - before) * 1e6 / count

    def notifyd() -> tuple[float, float]:
        subscribers = bench.notifyd.subscribers("ws", count, connect_rate=CONNECT_RATE)
        with bench.notifyd.server() as server:
            first = connect(server, subscribers)
            return first, connect(server, subscribers)

    def starlette() -> float:
        with bench.starlette.server() as server:
            return connect(server, bench.starlette.subscribers(count, connect_rate=CONNECT_RATE))

    def measure(swapped: bool) -> None:
        (first, second), reference = _in_order(notifyd, starlette, swapped=swapped)
        ours.append((first, second))
        theirs.append(reference)
        new.values.append(first / reference)
        seen.values.append(second / reference)

    repeat(bench, [new, seen], measure)
    title = (
        "server CPU to accept one with its HS256 token and its Subscribe, against plain "
        "Starlette's accept on stock uvicorn"
    )
    reference = f"Starlette {_median(theirs):.0f} µs"
    yield new.row(f"{title}: new token", f"{_median([a for a, _ in ours]):.0f} µs, {reference}")
    yield seen.row(f"{title}: seen token", f"{_median([b for _, b in ours]):.0f} µs, {reference}")


# ------------------------------------------------------------------ publishing


def _requests(bench: Bench, server: Server, publishing: Publishing) -> FanResult:
    nobody = Subscribers()
    result = bench.load.run_fan(server.port, nobody, publishing, seconds=bench.seconds)
    if result.refused:
        raise BenchError(f"{result.refused} of {result.answered} requests were refused")
    return result


def _gain(
    bench: Bench, bar: float, reference: Server, asked: Publishing
) -> tuple[Ratios, list[FanResult], list[FanResult]]:
    """Publishes to a channel without subscribers, against the reference's requests a second."""
    ratios = Ratios(bar, True)
    lane: list[FanResult] = []
    references: list[FanResult] = []
    channel = bench.notifyd.to_channel(publishers=PUBLISHERS, window=PUBLISHERS, channel="empty")
    with bench.notifyd.server() as ours, reference as theirs:

        def measure(swapped: bool) -> None:
            mine, other = _in_order(
                lambda: _requests(bench, ours, channel),
                lambda: _requests(bench, theirs, asked),
                swapped=swapped,
            )
            lane.append(mine)
            references.append(other)
            ratios.values.append(mine.answers_per_s / other.answers_per_s)

        repeat(bench, [ratios], measure)
    return ratios, lane, references


def publish(bench: Bench) -> Rows:
    """Requests a second over 32 connections that each wait for their answer: publishes to a
    channel that nobody subscribed to, against a bare Starlette route on stock uvicorn that
    decodes the same body and answers."""
    ratios, lane, bare = _gain(
        bench,
        1.8,
        bench.starlette.server(),
        bench.starlette.publishing(publishers=PUBLISHERS),
    )
    share = _median([r.busy_share for r in lane])
    yield ratios.row(
        "`POST …/channel` to a channel without subscribers, requests/s on one core over 32 "
        "connections, against a bare Starlette route on stock uvicorn that only decodes and "
        "answers",
        f"{_thousands([r.answers_per_s for r in lane])} requests/s, p99 "
        f"{_median([r.p99_ms for r in lane]):.2f} ms; Starlette "
        f"{_thousands([r.answers_per_s for r in bare])}; load client "
        f"{_median([r.client_us_per_answer for r in lane]):.2f} µs a request, busy {share:.0%}",
    )


def embedded(bench: Bench) -> Rows:
    """The same requests through `Notifyd.app` on stock uvicorn, for what the fast lane gains."""
    ratios, lane, through_app = _gain(
        bench,
        2.5,
        bench.notifyd.embedded(),
        bench.notifyd.to_channel(publishers=PUBLISHERS, window=PUBLISHERS, channel="empty"),
    )
    yield ratios.row(
        "the same through `Notifyd.app` on stock uvicorn: the fast lane's gain over it",
        f"{_thousands([r.answers_per_s for r in lane])} requests/s against "
        f"{_thousands([r.answers_per_s for r in through_app])}",
    )


def batch(bench: Bench) -> Rows:
    """Notifications a second to 100 connected users, in batches of one to each, against one a
    request; 32 requests in flight from 32 connections for both. Each notification counts when
    its user has it."""
    gain = Ratios(4, True)
    batches: list[FanResult] = []
    singles: list[FanResult] = []
    subscribers = bench.notifyd.subscribers("ws", BATCH_USERS, channel=False)

    def run(publishing: Publishing) -> FanResult:
        # A server for each: what the one leaves held must not weigh on the other.
        with bench.notifyd.server() as server:
            return bench.checked_fan(server, subscribers, publishing)[0]

    def measure(swapped: bool) -> None:
        many, one = _in_order(
            lambda: run(bench.notifyd.batches(BATCH_USERS, publishers=PUBLISHERS)),
            lambda: run(bench.notifyd.single_sends(publishers=PUBLISHERS)),
            swapped=swapped,
        )
        batches.append(many)
        singles.append(one)
        gain.values.append(many.deliveries_per_s / one.deliveries_per_s)

    repeat(bench, [gain], measure)
    yield gain.row(
        "`…/batch` of 100 to 100 connected users, notifications/s, against single sends",
        f"{_thousands([r.deliveries_per_s for r in batches])} against "
        f"{_thousands([r.deliveries_per_s for r in singles])} notifications/s; "
        f"{_client(batches)} with batches",
    )


# ------------------------------------------------------------------ fairness


def ping(bench: Bench) -> Rows:
    """One WebSocket sends a Ping 200 times a second while broadcasts to 10,000 run without a
    pause. The probe is a process of its own with a real-time priority on the load's core, and
    times each round trip from the moment it really sent; so what it measures is the server's."""
    count = 2_000 if bench.quick else BROADCAST_CONNECTIONS
    seconds = 3.0 if bench.quick else 12.0
    with bench.notifyd.server() as server:
        subscribers = bench.notifyd.subscribers("ws", count, channel=False)
        with bench.load.fan(
            server.port, subscribers, bench.notifyd.broadcast(), seconds=seconds + 2
        ) as session:
            session.go_on()
            # The probe's connection gets the broadcasts too; it is one more than the load counts.
            result = bench.load.probe(
                server.port, bench.notifyd.probe_path(), rate=200, seconds=seconds
            )
            overlapped = session.running
            fan = bench.checks.add(fan_result(session))
    if not overlapped:
        raise BenchError("the broadcasts ended before the probe did")
    answered = result.pongs == result.pings
    yield Row(
        f"round trip of a `Ping` while broadcasts to {count:,} connections run, p99",
        "≤ 10 ms",
        f"{result.p99_ms:.2f} ms",
        result.p99_ms <= 10 and answered,
        f"p50 {result.p50_ms:.2f} ms, most {result.max_ms:.2f} ms, {result.pongs} of "
        f"{result.pings} answered; the probe ran with priority {result.priority} and was late "
        f"by {result.own_lateness_p99_ms:.2f} ms at p99; {fan.deliveries_per_s / 1000:,.1f}k "
        f"deliveries/s meanwhile",
    )


def stalled(bench: Bench) -> Rows:
    """99 % of the deliveries to 999 subscribers take so long at most, at 50 publishes a second,
    with and without one more that stops reading. It runs until that one's outbox is full and
    the server closes it; each run has a server of its own."""
    seconds = 5.0 if bench.quick else 30.0
    # More than the kernel's buffers take in that time.
    publishing = bench.notifyd.to_channel(publishers=1, window=1, rate=50, padding=5000)
    ratio = Ratios(1.5, False)
    with_one: list[FanResult] = []
    without: list[FanResult] = []

    closed = 0

    def run(count: int, silent: int) -> FanResult:
        nonlocal closed
        subscribers = bench.notifyd.subscribers("ws", count, stalled=silent)
        with (
            bench.notifyd.server() as server,
            bench.load.fan(server.port, subscribers, publishing, seconds=seconds) as session,
        ):
            session.go_on()
            time.sleep(1)  # the publishing connection is there now
            before = server.open_files()
            time.sleep(seconds - 1)  # with the warm-up, half a second is left
            if session.running:
                closed += before - server.open_files()
            return bench.checks.add(fan_result(session))

    def measure(swapped: bool) -> None:
        slow, plain = _in_order(
            lambda: run(FAN_CONNECTIONS, 1), lambda: run(FAN_CONNECTIONS - 1, 0), swapped=swapped
        )
        with_one.append(slow)
        without.append(plain)
        ratio.values.append(slow.p99_ms / plain.p99_ms)

    repeat(bench, [ratio], measure)
    row = ratio.row(
        "one peer that stops reading among 1,000: the p99 of the other 999 against what it was "
        "without it",
        f"{_median([r.p99_ms for r in with_one]):.2f} ms against "
        f"{_median([r.p99_ms for r in without]):.2f} ms; the server closed the silent one in "
        f"{closed} of {len(with_one)} runs",
    )
    # Too short for that.
    yield row if bench.quick else replace(row, met=row.met and closed == len(with_one))


def tenants(bench: Bench) -> Rows:
    """One tenant sends single notifications to its one user, 100 a second and each when the one
    before has arrived, while another broadcasts to 10,000 without a pause; the same before that,
    alone."""
    count = 2_000 if bench.quick else BROADCAST_CONNECTIONS
    seconds = 3.0 if bench.quick else 12.0
    settings = "[tenant]\nenabled = true\nmax_connections = 20000\n"
    token = bench.notifyd.token("single", tenant_id="other")
    with bench.notifyd.server(settings) as server:

        def probe() -> SingleResult:
            arguments = (server.port, bench.notifyd.key, "other", "single", token, 100, seconds)
            done = subprocess.run(
                [sys.executable, "-m", "bench.single", *map(str, arguments)],
                capture_output=True,
                text=True,
                timeout=seconds + 60,
                env=child_environ(),
                preexec_fn=on_core(bench.cores.load),
                check=False,
            )
            if done.returncode:
                raise BenchError(f"the probe failed: {done.stderr[-500:]}")
            return msgspec.json.decode(done.stdout, type=SingleResult)

        alone = probe()
        subscribers = bench.notifyd.subscribers("ws", count, channel=False)
        broadcasting = bench.notifyd.broadcast(tenant="default")
        with bench.load.fan(server.port, subscribers, broadcasting, seconds=seconds + 3) as session:
            session.go_on()
            result = probe()
            overlapped = session.running
            fan = bench.checks.add(fan_result(session))
    if not overlapped:
        raise BenchError("the broadcasts ended before the probe did")
    priority = "real-time" if result.real_time else "no"
    yield Row(
        f"a single notification of one tenant while another broadcasts to {count:,} connections, "
        "from its call to its arrival, p99",
        "≤ 20 ms",
        f"{result.p99_ms:.2f} ms",
        result.p99_ms <= 20,
        f"p50 {result.p50_ms:.2f} ms, most {result.max_ms:.2f} ms of {result.arrived}; alone p99 "
        f"{alone.p99_ms:.2f} ms; the probe ran with {priority} priority; "
        f"{fan.deliveries_per_s / 1000:,.1f}k deliveries/s meanwhile",
    )


SCENARIOS: dict[str, Callable[[Bench], Rows]] = {
    "fanout-1": fanout_1,
    "fanout-32": fanout_32,
    "memory": memory,
    "accept": accept,
    "publish": publish,
    "embedded": embedded,
    "batch": batch,
    "ping": ping,
    "stalled": stalled,
    "tenants": tenants,
}
