"""Drives the load client (load.c) and the kernel's limit (limit.c), and decodes what they print."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import msgspec

from bench.compile import compile_tool
from bench.errors import BenchError
from bench.machine import on_core

Transport = Literal["ws", "sse"]
MARK_LENGTH = len("mark=00000000-0000-00000000")
"""What `{mark}` in a body becomes long."""


@dataclass(frozen=True, slots=True)
class Subscribers:
    """N connections: the request path of each, and what makes it a subscriber.

    `ready` is a text that the server tells a subscriber once it has everything it asked for.
    The last `stalled` of them never read.
    """

    transport: Transport = "ws"
    paths: Sequence[str] = ()
    subscribe: str | None = None
    ready: str | None = None
    stalled: int = 0
    parallel: int = 16
    connect_rate: float = 0


@dataclass(frozen=True, slots=True)
class Publishing:
    """What is published: in a body, `{mark}` is replaced by the mark, `{to}` by the recipient.

    `rate` (a second) makes the loop an open one; otherwise a publish goes out when everybody got
    the one `window` before. `to_one`: number n goes to subscriber n modulo their number; where
    nobody subscribes, to recipient n modulo `spread`.
    """

    path: str
    body: str
    headers: Sequence[str] = ()
    publishers: int = 1
    window: int = 1
    rate: float = 0
    to_one: bool = False
    spread: int = 1
    status: int = 200


class FanResult(msgspec.Struct, frozen=True):
    """What `load fan` saw; latencies are of deliveries, or of answers where nobody subscribes."""

    elapsed_s: float
    published: int
    answered: int
    refused: int
    received: int
    lost: int
    duplicated: int
    disordered: int
    unknown: int
    closed: int
    close_code: int
    gave_up: bool
    deliveries_per_s: float
    answers_per_s: float
    bytes_per_delivery: float
    samples: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    busy_share: float
    client_us_per_delivery: float
    client_us_per_answer: float


class ProbeResult(msgspec.Struct, frozen=True):
    """Round trips of Ping messages. `priority` is what the probe was given on the load's core."""

    priority: Literal["fifo", "nice", "none"]
    pings: int
    pongs: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    own_lateness_p99_ms: float


class LimitResult(msgspec.Struct, frozen=True):
    """The kernel's limit: how often one core calls send(), and what one call costs it."""

    sends_per_s: float
    cpu_us_per_send: float
    cpu_share: float


class Connected(msgspec.Struct, frozen=True):
    """All subscribers are there."""

    connected: int
    connect_s: float


class HeldResult(msgspec.Struct, frozen=True):
    """How held connections ended: `closed` by the server, instead of by us."""

    closed: int


@dataclass(slots=True)
class Session:
    """A load client that says when it is connected and then waits to be told to go on."""

    connected: Connected
    _process: subprocess.Popen[str]
    _timeout: float
    _told: bool = field(default=False)

    def go_on(self) -> None:
        """Lets a fan publish, or held connections end."""
        if self._process.stdin is None:
            raise BenchError("a load client without standard input")
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._told = True

    @property
    def running(self) -> bool:
        """False once the load client has ended."""
        return self._process.poll() is None

    def result(self) -> str:
        """Its last line. Raises BenchError where it failed or took too long."""
        if not self._told:
            self.go_on()
        try:
            out, error = self._process.communicate(timeout=self._timeout)
        except subprocess.TimeoutExpired as e:
            raise BenchError(f"the load client took more than {self._timeout:.0f} s") from e
        if self._process.returncode:
            raise BenchError(f"the load client failed: {error.strip()}")
        return out.strip().rpartition("\n")[2]


class Load:
    """The load client on its core; its files are in a directory of the caller's."""

    def __init__(self, directory: Path, *, core: int) -> None:
        self._tool = str(compile_tool("load"))
        self._directory = directory
        self._core = core

    @contextmanager
    def fan(
        self,
        port: int,
        subscribers: Subscribers,
        publishing: Publishing,
        *,
        seconds: float,
        warmup: float = 0.5,
        stall: float = 5,
        drain: float = 5,
    ) -> Iterator[Session]:
        """Connects the subscribers; `Session.go_on` then publishes for `seconds`.

        What is missing afterwards has `drain` seconds to arrive; a closed loop in which nothing
        moves for `stall` seconds is given up.
        """
        arguments = [
            *("fan", "--wait", "--seconds", str(seconds), "--warmup", str(warmup)),
            *("--stall", str(stall), "--drain", str(drain)),
            *("--publish-path", publishing.path, "--body", self._file(publishing.body)),
            *("--publishers", str(publishing.publishers), "--window", str(publishing.window)),
            *("--rate", str(publishing.rate), "--status", str(publishing.status)),
            *("--target", "one" if publishing.to_one else "all"),
            *("--spread", str(publishing.spread)),
        ]
        for header in publishing.headers:
            arguments += ["--header", header]
        arguments += self._subscribe(port, subscribers)
        with self._session(arguments, timeout=seconds + warmup + stall + drain + 60) as session:
            yield session

    def run_fan(
        self,
        port: int,
        subscribers: Subscribers,
        publishing: Publishing,
        *,
        seconds: float,
        warmup: float = 0.5,
        stall: float = 5,
        drain: float = 5,
    ) -> FanResult:
        """A fan from beginning to end."""
        with self.fan(
            port,
            subscribers,
            publishing,
            seconds=seconds,
            warmup=warmup,
            stall=stall,
            drain=drain,
        ) as session:
            return fan_result(session)

    @contextmanager
    def hold(self, port: int, subscribers: Subscribers) -> Iterator[Session]:
        """Connections that only stay, until the context ends."""
        arguments = ["hold", *self._subscribe(port, subscribers)]
        with self._session(arguments, timeout=60) as session:
            yield session
            msgspec.json.decode(session.result(), type=HeldResult)

    def probe(self, port: int, path: str, *, rate: float, seconds: float) -> ProbeResult:
        """Pings `rate` times a second over one WebSocket of its own."""
        subscribers = Subscribers(paths=[path], ready='"connected"')
        arguments = ["probe", "--rate", str(rate), "--seconds", str(seconds)]
        arguments += self._subscribe(port, subscribers)
        with self._session(arguments, timeout=seconds + 60) as session:
            return msgspec.json.decode(session.result(), type=ProbeResult)

    def _subscribe(self, port: int, subscribers: Subscribers) -> list[str]:
        arguments = [
            *("--port", str(port), "--transport", subscribers.transport),
            *("--connections", str(len(subscribers.paths))),
            *("--stalled", str(subscribers.stalled), "--parallel", str(subscribers.parallel)),
            *("--connect-rate", str(subscribers.connect_rate)),
        ]
        if subscribers.paths:
            arguments += ["--paths", self._file("\n".join(subscribers.paths) + "\n")]
        if subscribers.subscribe is not None:
            arguments += ["--subscribe", subscribers.subscribe]
        if subscribers.ready is not None:
            arguments += ["--ready", subscribers.ready]
        return arguments

    def _file(self, text: str) -> str:
        with tempfile.NamedTemporaryFile("w", dir=self._directory, delete=False) as file:
            file.write(text)
        return file.name

    @contextmanager
    def _session(self, arguments: Sequence[str], *, timeout: float) -> Iterator[Session]:
        process = subprocess.Popen(
            [self._tool, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=on_core(self._core),  # noqa: PLW1509 - this process has one thread
        )
        try:
            line = _stream(process.stdout).readline()
            if not line:
                error = _stream(process.stderr).read().strip()
                raise BenchError(f"the load client failed: {error}")
            yield Session(msgspec.json.decode(line, type=Connected), process, timeout)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None and not stream.closed:
                    stream.close()


def fan_result(session: Session) -> FanResult:
    """What a fan saw, once it is over."""
    return msgspec.json.decode(session.result(), type=FanResult)


def kernel_limit(
    connections: int, size: int, *, seconds: float, server_core: int, load_core: int
) -> LimitResult:
    """The kernel's limit for messages of `size` bytes to that many connections."""
    command = [str(compile_tool("limit")), str(connections), str(size), str(seconds)]
    done = subprocess.run(
        [*command, str(server_core), str(load_core)],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds + 60,
    )
    if done.returncode:
        raise BenchError(f"the C loop failed: {done.stderr.strip()}")
    return msgspec.json.decode(done.stdout, type=LimitResult)


def _stream(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise BenchError("a load client without its pipes")
    return stream
