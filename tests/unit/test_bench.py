"""The load client against a tiny server that can lose, double and disorder what it delivers."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bench.compile import compile_tool
from bench.errors import BenchError
from bench.load import (
    FanResult,
    Load,
    ProbeResult,
    Publishing,
    Subscribers,
    Transport,
    kernel_limit,
)
from bench.report import Row, write_results
from bench.scenarios import Ratios

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

CONNECTIONS = 10
BODY = '{"payload":{"mark":"{mark}"}}'
CORE = min(os.sched_getaffinity(0))


@dataclass
class TinyServer:
    """Accepts /ws and /sse, delivers each POST to all, and misbehaves towards subscriber 3.

    `lose`, `double` and `swap` name publishes by their number from 0; `swap` delivers one after
    its successor.
    """

    lose: frozenset[int] = frozenset()
    double: frozenset[int] = frozenset()
    swap: frozenset[int] = frozenset()
    status: str = "200 OK"
    chunked: bool = False
    port: int = 0
    pongs: int = 0
    _writers: list[tuple[Transport, asyncio.StreamWriter]] = field(default_factory=list)
    _published: int = 0
    _kept: bytes | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await self._request(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()  # the client is done

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        path = head.split(" ")[1]
        if path.startswith("/ws"):
            key = fields["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            accept = base64.b64encode(hashlib.sha1(key.encode()).digest())  # noqa: S324 - RFC 6455
            writer.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n"
            )
            writer.write(_frame(b'{"type":"connected"}') + b"\x89\x02hi")
            self._writers.append(("ws", writer))
            await self._frames(reader, writer)
        elif path.startswith("/sse"):
            coding = b"Transfer-Encoding: chunked\r\n" if self.chunked else b""
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + coding)
            writer.write(b"\r\n" + self._event(b"event: connected\ndata: {}\n\n"))
            self._writers.append(("sse", writer))
            await reader.readexactly(1)
        else:
            body = await reader.readexactly(int(fields.get("Content-Length", 0)))
            answer = f"HTTP/1.1 {self.status}\r\nContent-Length: 2\r\n\r\n{{}}"
            self._publish(body)
            writer.write(answer.encode())

    async def _frames(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            first, second = await reader.readexactly(2)
            assert second & 0x80, "a client masks"
            key = await reader.readexactly(4)
            masked = await reader.readexactly(second & 0x7F)
            payload = bytes(b ^ key[i % 4] for i, b in enumerate(masked))
            if first & 0x0F == 10:
                assert payload == b"hi"
                self.pongs += 1
            elif b'"Ping"' in payload:
                writer.write(_frame(b'{"type":"pong"}'))
            elif b'"Subscribe"' in payload:
                writer.write(_frame(b'{"type":"subscribed"}'))

    def _publish(self, body: bytes) -> None:
        number = self._published
        self._published += 1
        for i, (transport, writer) in enumerate(self._writers):
            sent = (
                _frame(body) if transport == "ws" else self._event(b"data: " + body + b"\r\n\r\n")
            )
            if i == 3:
                sent = self._misbehave(number, sent)
            writer.write(sent)

    def _misbehave(self, number: int, sent: bytes) -> bytes:
        if number in self.lose:
            return b""
        if number in self.swap:
            self._kept = sent
            return b""
        if self._kept is not None:
            sent, self._kept = sent + self._kept, None
        return sent * 2 if number in self.double else sent

    def _event(self, event: bytes) -> bytes:
        if not self.chunked:
            return event
        half = len(event) // 2  # a chunk may end anywhere
        return b"".join(b"%X\r\n%b\r\n" % (len(p), p) for p in (event[:half], event[half:]))


def _frame(payload: bytes) -> bytes:
    length = len(payload)
    size = bytes([length]) if length < 126 else b"\x7e" + length.to_bytes(2, "big")
    return b"\x81" + size + payload


@asynccontextmanager
async def running(server: TinyServer) -> AsyncIterator[int]:
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with listener:
        server.port = listener.sockets[0].getsockname()[1]
        yield server.port


async def fan(
    server: TinyServer,
    directory: Path,
    *,
    transport: Transport = "ws",
    connections: int = CONNECTIONS,
    publishing: Publishing | None = None,
) -> FanResult:
    subscribers = Subscribers(
        transport,
        [f"/{transport}?token={i}" for i in range(connections)],
        subscribe='{"type":"Subscribe"}' if transport == "ws" else None,
        ready='"subscribed"' if transport == "ws" else "event: connected",
        parallel=1,  # so that subscriber 3 is the fourth to connect
    )
    asked = publishing or Publishing("/publish", BODY, publishers=2, rate=100)
    load = Load(directory, core=CORE)
    async with running(server) as port:
        return await asyncio.to_thread(
            load.run_fan, port, subscribers, asked, seconds=0.3, warmup=0.05, drain=2
        )


@pytest.mark.parametrize("transport", ["ws", "sse"])
async def test_counts_what_all_received(tmp_path: Path, transport: Transport) -> None:
    server = TinyServer()

    result = await fan(server, tmp_path, transport=transport)

    assert result.published > 10
    assert result.answered == result.published
    assert result.received == result.published * CONNECTIONS
    assert result.deliveries_per_s > 0
    assert 0 < result.p50_ms <= result.p99_ms <= result.max_ms
    assert (result.lost, result.duplicated, result.disordered, result.unknown) == (0, 0, 0, 0)
    assert (result.refused, result.closed, result.gave_up) == (0, 0, False)
    assert server.pongs == (CONNECTIONS if transport == "ws" else 0)


async def test_reads_chunked_event_streams(tmp_path: Path) -> None:
    result = await fan(TinyServer(chunked=True), tmp_path, transport="sse")

    assert result.received == result.published * CONNECTIONS > 0
    assert result.lost == 0


async def test_a_closed_loop_waits_for_everybody(tmp_path: Path) -> None:
    publishing = Publishing("/publish", BODY, publishers=4, window=4)

    result = await fan(TinyServer(), tmp_path, publishing=publishing)

    assert result.received == result.published * CONNECTIONS > 0
    assert not result.gave_up


async def test_notices_a_loss(tmp_path: Path) -> None:
    result = await fan(TinyServer(lose=frozenset({4, 5, 9})), tmp_path)

    assert (result.lost, result.duplicated, result.disordered) == (3, 0, 0)


async def test_a_closed_loop_gives_up_after_a_loss(tmp_path: Path) -> None:
    publishing = Publishing("/publish", BODY)

    server = TinyServer(lose=frozenset({1}))
    load = Load(tmp_path, core=CORE)
    subscribers = Subscribers(paths=["/ws"] * 4, ready='"connected"', parallel=1)
    async with running(server) as port:
        result = await asyncio.to_thread(
            load.run_fan, port, subscribers, publishing, seconds=30, warmup=0, stall=0.2
        )

    assert result.gave_up
    assert result.lost == 1


async def test_notices_a_duplicate(tmp_path: Path) -> None:
    result = await fan(TinyServer(double=frozenset({4, 7})), tmp_path)

    assert (result.lost, result.duplicated, result.disordered) == (0, 2, 0)


async def test_notices_disorder(tmp_path: Path) -> None:
    publishing = Publishing("/publish", BODY, publishers=1, rate=100)

    result = await fan(TinyServer(swap=frozenset({4})), tmp_path, publishing=publishing)

    assert (result.lost, result.duplicated, result.disordered) == (0, 0, 1)


async def test_order_between_publishing_connections_is_free(tmp_path: Path) -> None:
    # Two publishers take turns, so a publish and its successor are of different ones.
    result = await fan(TinyServer(swap=frozenset({4})), tmp_path)

    assert (result.lost, result.duplicated, result.disordered) == (0, 0, 0)


async def test_counts_requests_without_subscribers_and_refusals(tmp_path: Path) -> None:
    publishing = Publishing("/publish", BODY, publishers=4)

    good = await fan(TinyServer(), tmp_path, connections=0, publishing=publishing)
    bad = await fan(
        TinyServer(status="503 Service Unavailable"),
        tmp_path,
        connections=0,
        publishing=publishing,
    )

    assert good.answered == good.published > 0
    assert good.answers_per_s > 0
    assert good.samples > 0
    assert good.refused == 0
    assert bad.refused == bad.answered > 0


async def test_a_subscriber_that_never_reads_is_left_out(tmp_path: Path) -> None:
    subscribers = Subscribers(paths=["/ws"] * 5, ready='"connected"', stalled=1)
    publishing = Publishing("/publish", BODY, rate=100)
    load = Load(tmp_path, core=CORE)
    async with running(TinyServer()) as port:
        result = await asyncio.to_thread(
            load.run_fan, port, subscribers, publishing, seconds=0.2, warmup=0
        )

    assert result.received == result.published * 4
    assert result.lost == 0


async def test_holds_connections_until_told(tmp_path: Path) -> None:
    server = TinyServer()
    load = Load(tmp_path, core=CORE)

    def hold(port: int) -> int:
        subscribers = Subscribers(paths=["/ws"] * 5, ready='"connected"', connect_rate=1000)
        with load.hold(port, subscribers) as session:
            assert session.running
            return session.connected.connected

    async with running(server) as port:
        assert await asyncio.to_thread(hold, port) == 5


async def test_probes_round_trips(tmp_path: Path) -> None:
    load = Load(tmp_path, core=CORE)

    def probe(port: int) -> ProbeResult:
        return load.probe(port, "/ws", rate=200, seconds=0.2)

    async with running(TinyServer()) as port:
        result = await asyncio.to_thread(probe, port)

    assert result.pings == result.pongs > 10
    assert 0 < result.p50_ms <= result.max_ms


async def test_says_why_a_subscriber_was_refused(tmp_path: Path) -> None:
    load = Load(tmp_path, core=CORE)

    def hold(port: int) -> None:
        with load.hold(port, Subscribers(paths=["/nowhere"])):
            pytest.fail("connected")

    async with running(TinyServer(status="404 Not Found")) as port:
        with pytest.raises(BenchError, match="404 Not Found"):
            await asyncio.to_thread(hold, port)


def test_measures_the_kernels_limit() -> None:
    cores = sorted(os.sched_getaffinity(0))

    result = kernel_limit(10, 290, seconds=0.05, server_core=cores[0], load_core=cores[-1])

    assert result.sends_per_s > 0
    assert result.cpu_us_per_send > 0


def test_compiles_once() -> None:
    binary = compile_tool("limit")
    built = binary.stat().st_mtime_ns

    assert compile_tool("limit") == binary
    assert binary.stat().st_mtime_ns == built


def test_a_ratio_counts_by_its_median() -> None:
    at_least = Ratios(0.7, True, [0.6, 0.72, 0.9])
    at_most = Ratios(1.5, False, [1.0, 3.0, 1.8])

    assert at_least.met
    assert at_least.near
    assert not at_most.met
    assert not at_most.near
    assert at_least.row("x", "").measured == "0.72 (0.60-0.90)"


def test_writes_a_table_that_names_no_machine(tmp_path: Path) -> None:
    rows = [
        Row("deliveries/s", "≥ 0.7", "0.75", True, "150k of 200k"),
        Row("nchan", "none", "not installed", None),
    ]

    write_results(
        tmp_path / "results.md",
        rows,
        {"Python": "3.11.7"},
        None,
        took={"fanout-1": 61.4},
        missing=["full"],
    )

    text = (tmp_path / "results.md").read_text()
    assert "| deliveries/s | ≥ 0.7 | 0.75 | met |" in text
    assert "| nchan | none | not installed | - |" in text
    assert "Incomplete: full did not run." in text
    assert "It took fanout-1 61 s." in text
    assert os.uname().nodename not in text.split()
