"""Too much of everything. Others keep their latencies, and the memory comes back.

The server is a process of its own here: what it costs is measured from outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import pytest_asyncio

from tests.adversity.raw import (
    CONTINUATION,
    PING,
    TEXT,
    RawClient,
    frame,
    handshake,
    request,
    text,
)
from tests.adversity.spawning import Spawned, spawned
from tests.adversity.test_bodies import BATCH, CHANNEL, GOOD, SEND
from tests.front_door import token

# Where fewer files may be open, fewer.
SILENT = min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 500)
MEMORY_BYTES = 10 << 20
PATIENT = 30.0
NOBODY = b'{"channel":"nobody","event_type":"e","payload":{}}'
LATENCY = 1.0
"""Seconds that a bystander's Ping may take at worst, on a machine that others load too."""


@pytest_asyncio.fixture
async def server(tmp_path: Path, many_files: None) -> AsyncIterator[Spawned]:
    """`notifyd serve`."""
    async with spawned("sockets", tmp_path) as running:
        yield running
    assert "Traceback" not in running.log.read_text()


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many open files as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def report(text: str) -> None:
    """Tell what was measured (`pytest -s`)."""
    print(text)  # noqa: T201  # a measurement is to be seen


class Bystander:
    """Asks for a pong again and again while something else goes on."""

    def __init__(self, client: RawClient) -> None:
        self._client = client
        self.seconds: list[float] = []

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            asked = time.perf_counter()
            await self._client.pings()
            self.seconds.append(time.perf_counter() - asked)
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def beside(server: Spawned, what: str) -> AsyncIterator[None]:
    """A bystander is served while the block runs; prints how fast (`pytest -s`)."""
    async with server.websocket("bystander") as client:
        bystander = Bystander(client)
        task = asyncio.create_task(bystander.run())
        try:
            await asyncio.sleep(0)
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    seconds = sorted(bystander.seconds)
    assert seconds, "no pong came at all"
    worst, median = seconds[-1], seconds[len(seconds) // 2]
    report(
        f"{what}: pongs {len(seconds)}, median {median * 1e3:.1f} ms, worst {worst * 1e3:.1f} ms"
    )
    assert worst < LATENCY


async def settled(server: Spawned, sockets: int) -> None:
    """Wait until the server has as many sockets again as before."""
    async with asyncio.timeout(PATIENT):
        while server.sockets() > sockets:  # noqa: ASYNC110  # another process tells of no event
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def memory_comes_back(server: Spawned, what: str) -> AsyncIterator[None]:
    """Assert that the block leaves no more than 10 MB behind; prints what it left."""
    await warm_up(server)
    sockets, before = server.sockets(), server.resident_bytes()
    yield
    await settled(server, sockets)
    async with asyncio.timeout(PATIENT):
        while (after := server.resident_bytes()) > before + MEMORY_BYTES:
            await server.serves()
            await asyncio.sleep(0.1)
    report(f"{what}: {before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB after")


async def warm_up(server: Spawned) -> None:
    """What a server keeps once it has worked is not what an attack leaves behind."""
    for _ in range(3):
        await server.serves()
        async with server.stream():
            pass
        await server.call("POST", SEND, GOOD)


# --- silence ---


async def test_ten_thousand_sockets_that_say_nothing(server: Spawned) -> None:
    async with memory_comes_back(server, f"{SILENT} silent sockets"):
        silent: list[socket.socket] = []
        try:
            async with beside(server, f"{SILENT} silent sockets"):
                loop = asyncio.get_running_loop()
                for number in range(SILENT):
                    one = socket.socket()
                    one.setblocking(False)
                    silent.append(one)
                    await loop.sock_connect(one, ("127.0.0.1", server.port))
                    if number % 50 == 0:
                        await asyncio.sleep(0)
                async with asyncio.timeout(PATIENT):
                    while server.sockets() < SILENT:  # noqa: ASYNC110  # as above
                        await asyncio.sleep(0.02)
                report(f"with them: {server.resident_bytes() / 2**20:.1f} MiB")
                await server.serves()
                assert (await server.call("POST", SEND, GOOD)).status == 200
        finally:
            for one in silent:
                one.close()


# --- floods ---


async def test_ten_thousand_subscribes_in_a_second(server: Spawned) -> None:
    async with memory_comes_back(server, "10,000 Subscribes"), server.websocket("eager") as client:
        async with beside(server, "10,000 Subscribes"):
            began = time.perf_counter()
            messages = [
                text(json.dumps({"type": "Subscribe", "payload": {"channels": [f"c{n % 50}"]}}))
                for n in range(10_000)
            ]
            writing = asyncio.create_task(client.send(*messages))
            for number in range(10_000):
                answer = await client.message("subscribed", "error")
                assert answer == {"type": "subscribed", "payload": [f"c{number % 50}"]}
            await writing
            report(f"answered in {time.perf_counter() - began:.2f} s")
        await client.pings()


@pytest.mark.parametrize("between_fragments", [False, True])
async def test_pings_by_a_client_that_does_not_read(
    server: Spawned, between_fragments: bool
) -> None:
    """It is not read from either; once it reads, it is answered to the last Ping."""
    what = "Pings without reading" + (" between fragments" if between_fragments else "")
    async with (
        memory_comes_back(server, what),
        server.websocket("deaf", receive_buffer=8192) as client,
    ):
        before = server.resident_bytes()
        payload = b"%c" * 100 % tuple(range(100))
        count = 200_000
        flood = frame(PING, payload) * count
        if between_fragments:
            flood = frame(TEXT, b'{"type":', fin=False) + flood + frame(CONTINUATION, b'"Ping"}')
        transport = client.writer.transport
        async with beside(server, what):
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            sending = asyncio.create_task(client.send(flood))
            taken = -1
            # Until the server takes no more of it.
            while (left := transport.get_write_buffer_size()) != taken:
                taken = left
                await asyncio.sleep(0.3)
            assert left > 0, "the server read everything"
            held = server.resident_bytes() - before
            report(f"while nobody reads: {held / 2**20:.1f} MiB more")
            assert held < MEMORY_BYTES
        client.reader._transport.resume_reading()  # type: ignore[attr-defined]
        pong = b"\x8a\x64" + payload
        for _ in range(count // 1000):
            assert await client.reader.readexactly(len(pong) * 1000) == pong * 1000
        await sending
        await client.pings()


async def test_large_messages_by_a_client_that_does_not_read(server: Spawned) -> None:
    """A read has too few of them for its turn to end: that the socket is full keeps from more."""
    ids = [str(uuid4()) for _ in range(100)]
    ack = json.dumps({"type": "Ack", "payload": {"notification_ids": ids}})
    count = 3000
    async with server.websocket("deaf", receive_buffer=8192) as client:
        transport = client.writer.transport
        async with beside(server, f"{count} acks without reading"):
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            sending = asyncio.create_task(client.send(text(ack.ljust(8000)) * count))
            taken = -1
            # Until the server takes no more of it.
            while (left := transport.get_write_buffer_size()) != taken:
                taken = left
                await asyncio.sleep(0.3)
            assert left > 0, "the server read everything"
        client.reader._transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(count):
            assert (await client.message())["type"] == "acked"
        await sending


async def test_a_flood_of_pings_between_fragments_delays_nobody(server: Spawned) -> None:
    count = 200_000
    async with (
        server.websocket("storm") as client,
        beside(server, f"{count} empty Pings between fragments"),
    ):
        sending = asyncio.create_task(
            client.send(frame(TEXT, b"{", fin=False), frame(PING) * count)
        )
        for _ in range(count // 1000):
            assert await client.reader.readexactly(2000) == b"\x8a\0" * 1000
        await sending


async def test_everything_at_once_leaves_no_memory_behind(server: Spawned) -> None:
    """Bodies, batches, heads, frames, half of each, and clients that vanish."""
    batch = b'{"notifications":[%b]}' % b",".join([b'{"x":"%b"}' % (b"y" * 10_000)] * 100)
    deep = GOOD.replace(b"{}", b"[" * 30_000 + b"]" * 30_000)

    async def one(number: int) -> None:
        kind = number % 8
        async with server.connected() as client:
            if kind == 0:
                await client.send(server.request("POST", BATCH, body=batch))
                await client.response()
            elif kind == 1:
                await client.send(server.request("POST", SEND, body=deep))
                await client.response()
            elif kind == 2:
                await client.send(b"GET /health HTTP/1.1\r\nX: " + b"x" * 30_000)
                await client.rest()
            elif kind == 3:
                await client.send(server.request("POST", SEND, "Content-Length: 60000"), b"{" * 999)
            elif kind == 4:
                await client.send(handshake(f"/ws?token={token(f'u{number}')}"))
                await client.response()
                await client.send(frame(TEXT, b"x" * 60_000, fin=False))
            elif kind == 5:
                await client.send(handshake(f"/ws?token={token(f'u{number}')}"))
                await client.response()
                await client.send(frame(TEXT, b"x" * 65_537))
                await client.close_code()
            elif kind == 6:
                await client.send(request("GET", f"/sse?token={token(f'u{number}')}"))
                await client.response_head()
            else:
                # To a channel of nobody: what is sent to a user is kept for him.
                await client.send(*[server.request("POST", CHANNEL, body=NOBODY)] * 200)
                await client.response()

    what = "everything at once"
    async with memory_comes_back(server, what), beside(server, what):
        for start in range(0, 800, 40):
            await asyncio.gather(*[one(number) for number in range(start, start + 40)])
