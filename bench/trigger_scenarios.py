"""The rows about what comes from Redis.

Whoever receives is stopped (SIGSTOP) while everything is put into Redis, and then drains it: so no
publisher is waited for. What counts is how many messages a second of the receiver's own CPU time is
enough for, of redis-py and of notifyd in turn.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import hiredis

from bench.errors import BenchError
from bench.scenarios import Bench, Ratios, Rows, repeat
from bench.servers import Server, free_port
from bench.subjects import CONTENT, child_environ
from tests.stores import RedisServer, serving

MESSAGES = 100_000
AT_ONCE = 1_000
STREAM = "notifications"
CHANNEL = "notification:channel:nobody"

Command = Sequence[str]


def trigger(bench: Bench) -> Rows:
    """Messages from Redis to a channel without subscribers, against redis-py with hiredis that
    takes them and does nothing: published to Redis channels, and from a stream."""
    count = MESSAGES // 10 if bench.quick else MESSAGES
    pubsub, stream = Ratios(0.7, True), Ratios(0.34, True)
    theirs: list[float] = []
    published: list[float] = []
    streamed: list[float] = []

    def bare() -> float:
        with _redis(bench) as redis, _draining(bench, redis) as server:
            return _drain(redis, server, ("PUBLISH", CHANNEL, _flat()), count)

    def ours(settings: str, command: Command) -> float:
        with (
            _redis(bench) as redis,
            bench.notifyd.server(f'[redis]\nurl = "{redis.url}"\n{settings}') as server,
        ):
            _wait_for(
                server, bench.notifyd.key, "redis_trigger_active", 1 if "trigger" in settings else 0
            )
            rate = _drain(redis, server, command, count)
            _wait_for(server, bench.notifyd.key, "notifications_total", count)
            return rate

    def measure(swapped: bool) -> None:
        publishing = ("PUBLISH", CHANNEL, _flat())
        adding = ("XADD", STREAM, "*", "data", _with_target())
        runs: list[Callable[[], None]] = [
            lambda: theirs.append(bare()),
            lambda: published.append(ours("trigger_enabled = true", publishing)),
            lambda: streamed.append(ours(f'stream_key = "{STREAM}"', adding)),
        ]
        for run in reversed(runs) if swapped else runs:
            run()
        pubsub.values.append(published[-1] / theirs[-1])
        stream.values.append(streamed[-1] / published[-1])

    repeat(bench, [pubsub, stream], measure)
    row = pubsub.row(
        "messages published to Redis channels, dispatched, a second of CPU time of one node, "
        "against redis-py with hiredis that only takes them",
        "≥ 25,000/s are asked where redis-py takes 36,000/s",
    )
    yield replace(
        row,
        measured=f"{row.measured}: {statistics.median(published):,.0f}/s, redis-py "
        f"{statistics.median(theirs):,.0f}/s",
    )
    yield stream.row(
        "the same from a stream, acknowledged, against those published",
        f"{statistics.median(streamed):,.0f} a second of CPU time",
    )


def _flat() -> str:
    return json.dumps(CONTENT, separators=(",", ":"))


def _with_target() -> str:
    target = {"type": "channel", "target": "nobody", "event": CONTENT}
    return json.dumps(target, separators=(",", ":"))


@contextmanager
def _redis(bench: Bench) -> Iterator[RedisServer]:
    """A fresh one on the load's core that keeps what a subscriber does not read yet."""
    with serving(RedisServer) as redis:
        redis.pin(bench.cores.load)
        redis.command("CONFIG", "SET", "client-output-buffer-limit", "pubsub 0 0 0")
        yield redis


@contextmanager
def _draining(bench: Bench, redis: RedisServer) -> Iterator[Server]:
    port = free_port()
    with Server(
        [sys.executable, "-m", "bench.redis_drain", redis.url, str(port)],
        port=port,
        core=bench.cores.server,
        log=bench.directory / f"drain-{port}.log",
        environ=child_environ(),
    ) as server:
        yield server


def _drain(redis: RedisServer, server: Server, command: Command, count: int) -> float:
    """Messages that are taken in a second of the server's CPU time."""
    before = server.settled_cpu_seconds()
    os.kill(server.running.pid, signal.SIGSTOP)
    try:
        _pipeline(redis.port, command, count)
    finally:
        os.kill(server.running.pid, signal.SIGCONT)
    used = server.settled_cpu_seconds() - before
    return count / used


def _pipeline(port: int, command: Command, count: int) -> None:
    packed = hiredis.pack_command(tuple(command))  # type: ignore[arg-type]  # its type says one word
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(count // AT_ONCE):
            connection.sendall(packed * AT_ONCE)
            reader, answered = hiredis.Reader(), 0
            while answered < AT_ONCE:
                reader.feed(connection.recv(65536))
                while (answer := reader.gets()) is not False:
                    if answer == 0 or isinstance(answer, Exception):
                        raise BenchError(f"Redis answered {answer}: nobody hears")
                    answered += 1


def _wait_for(server: Server, key: str, name: str, least: float) -> None:
    """Until the server says so of itself: the sum over a metric's samples."""
    deadline = time.monotonic() + 20
    while _metric(server, name, key) < least:
        if time.monotonic() > deadline:
            raise BenchError(f"{name} did not come to {least:g}")
        time.sleep(0.1)


def _metric(server: Server, name: str, key: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request("GET", "/metrics", headers={"X-API-Key": key})
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    found = re.findall(rf"^notifyd_{name}(?:{{.*}})? (.*)$", text, re.MULTILINE)
    return sum(map(float, found))


TRIGGER_SCENARIOS: dict[str, Callable[[Bench], Rows]] = {"trigger": trigger}
