"""A probe of its own process: how long a single notification takes from its call to its user.

    python -m bench.single PORT KEY TENANT USER TOKEN RATE SECONDS

It sends one notification at a time over one connection, and reads it from one WebSocket, so many
times a second; each is timed from the moment it really was sent. It takes a real-time priority
where it may, because it shares a core with the load. Prints one JSON object.
"""

from __future__ import annotations

import base64
import os
import secrets
import select
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from bench.errors import BenchError

ANSWER_SECONDS = 10.0


class SingleResult(msgspec.Struct, frozen=True):
    """Milliseconds of those that arrived; `sent` of them were sent."""

    sent: int
    arrived: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    real_time: bool


@dataclass(slots=True)
class Stream:
    """A socket and what was read of it and not looked at yet."""

    socket: socket.socket
    waiting: bytes = b""

    def read(self) -> None:
        """Read what there is; raises BenchError at the end."""
        data = self.socket.recv(65536)
        if not data:
            raise BenchError("the server closed the probe's connection")
        self.waiting += data


def measure(
    port: int, key: str, tenant: str, user: str, token: str, *, rate: float, seconds: float
) -> SingleResult:
    """Send `rate` a second for so long. Raises BenchError where something is refused."""
    listening = _listen(port, token)
    calling = Stream(_connected(port))
    body = msgspec.json.encode(
        {
            "target": {"type": "user", "value": user},
            "event_type": "order.created",
            "payload": {"order_id": "A-10042"},
            "ttl": 0,
        }
    )
    request = (
        f"POST /api/v1/notifications HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nX-API-Key: {key}\r\n"
        f"X-Tenant-ID: {tenant}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    times: list[float] = []
    began = time.perf_counter()
    sent = 0
    while (due := began + sent / rate) < began + seconds:
        time.sleep(max(0.0, due - time.perf_counter()))
        sent += 1
        times.append(_one(calling, listening, request))
    times.sort()
    return SingleResult(
        sent,
        len(times),
        times[len(times) // 2] * 1e3,
        times[len(times) * 99 // 100] * 1e3,
        times[-1] * 1e3,
        os.sched_getscheduler(0) == os.SCHED_FIFO,
    )


def _one(calling: Stream, listening: Stream, request: bytes) -> float:
    started = time.perf_counter()
    calling.socket.sendall(request)
    arrived: float | None = None
    answered = False
    while arrived is None or not answered:
        ready, _, _ = select.select([calling.socket, listening.socket], [], [], ANSWER_SECONDS)
        if not ready:
            raise BenchError("a single notification did not arrive")
        if listening.socket in ready:
            listening.read()
            if arrived is None and b'"type":"notification"' in listening.waiting:
                arrived = time.perf_counter() - started
                listening.waiting = b""
        if calling.socket in ready:
            calling.read()
            head, found, rest = calling.waiting.partition(b"\r\n\r\n")
            if found and rest.endswith(b"}"):
                if not head.startswith(b"HTTP/1.1 200 "):
                    raise BenchError(f"a single notification was refused: {rest[:200]!r}")
                calling.waiting = b""
                answered = True
    return arrived


def _connected(port: int) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _listen(port: int, token: str) -> Stream:
    stream = Stream(_connected(port))
    nonce = base64.b64encode(secrets.token_bytes(16)).decode()
    stream.socket.sendall(
        (
            f"GET /ws?token={token} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {nonce}\r\n\r\n"
        ).encode()
    )
    while b'"connected"' not in stream.waiting:
        stream.read()
        if not stream.waiting.startswith(b"HTTP/1.1 101 "):
            raise BenchError(f"the probe was refused: {stream.waiting[:200]!r}")
    stream.waiting = b""
    return stream


def main() -> None:
    """See the module."""
    port, key, tenant, user, token, rate, seconds = sys.argv[1:]
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    result = measure(int(port), key, tenant, user, token, rate=float(rate), seconds=float(seconds))
    print(msgspec.json.encode(result).decode())


if __name__ == "__main__":
    main()
