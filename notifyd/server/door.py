"""Every socket from accept to its end: how many there may be, and how long they may say nothing.

A socket that has not sent a byte costs a transport and one small object; only then does it get an
HTTP parser. All deadlines before a connection is established are swept by one timer. A TLS
handshake comes behind the count, and within the deadline of the first byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from asyncio import Future, Task, TimerHandle
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from time import perf_counter
from typing import Protocol, cast

import structlog

from notifyd.identifiers import request_id

MANY_LEFT = 2000
"""So many sockets fewer, and at most half of what there were: the system gets their memory back."""

NEW_SECONDS = 0.004
"""What fresh sockets say first, a handshake most often, is heard for so long in one turn of the
event loop; the others wait for the next. A thousand who connect at once would else keep everybody
else waiting until the last of them is in."""

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\n"
    b"connection: close\r\ncontent-length: 82\r\nx-request-id: %b\r\n\r\n"
    b'{"error":{"code":"UNAVAILABLE","message":"The server has too many open sockets."}}'
)


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """How long a client may take, in seconds.

    `first_byte` from its accept, with the TLS handshake; `head` and `body` of a request, from their
    first bytes; `keep_alive` between two requests; `message` for a WebSocket message that was
    begun; `close` for the answer to a Close (of TLS too), and for reading what was written before
    it. `sweep` is how often the first four are looked at.
    """

    first_byte: float = 10.0
    head: float = 10.0
    body: float = 30.0
    keep_alive: float = 75.0
    message: float = 10.0
    close: float = 5.0
    sweep: float = 1.0


class Waiting(Protocol):
    """A socket with a deadline, in the event loop's seconds; infinite while the server itself
    works.
    """

    deadline: float

    def timed_out(self) -> None:
        """The deadline passed."""


class Door:
    """Counts sockets, and sweeps those that wait."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        max_sockets: int,
        timeouts: Timeouts,
        on_many_left: Callable[[], None],
    ) -> None:
        self.loop = loop
        self.max_sockets = max_sockets
        self.timeouts = timeouts
        self.sockets = 0
        self._most = 0
        self._on_many_left = on_many_left
        self.detached = 0
        self._emptied: Future[None] | None = None
        self.waiting: dict[Waiting, None] = {}
        self.handshakes: set[Task[None]] = set()
        self._timer: TimerHandle | None = None
        self._log = structlog.get_logger("notifyd.server")
        self._full = False
        # Who has spoken and was not heard yet, in order; and until when this turn hears somebody.
        self._line: deque[Callable[[], None]] = deque()
        self._heard_until = 0.0

    def start(self) -> None:
        """Begin to sweep."""
        self._timer = self.loop.call_later(self.timeouts.sweep, self._sweep)

    def stop(self) -> None:
        """No sweep after this."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def enter(self) -> bool:
        """One more socket; False where there are too many."""
        self.sockets += 1
        self._most = max(self._most, self.sockets)
        if self.sockets <= self.max_sockets:
            self._full = False
            return True
        if not self._full:
            self._full = True
            self._log.warning(
                "as many sockets as server.max_sockets allows", sockets=self.max_sockets
            )
        return False

    def leave(self) -> None:
        """A socket is gone."""
        self.sockets -= 1

    def hears(self) -> bool:
        """Whether what a fresh socket says is heard at once, and not by `hear_later`."""
        if not self._heard_until:
            self._heard_until = perf_counter() + NEW_SECONDS
            self.loop.call_soon(self._hear_next)
        return not self._line and perf_counter() < self._heard_until

    def hear_later(self, be_heard: Callable[[], None]) -> None:
        """Call this when all who came before have been heard."""
        self._line.append(be_heard)

    def _hear_next(self) -> None:
        line = self._line
        if not line:
            self._heard_until = 0.0
            return
        self.loop.call_soon(self._hear_next)
        self._heard_until = perf_counter() + NEW_SECONDS
        while line:
            line.popleft()()
            if perf_counter() >= self._heard_until:
                break

    def detach(self) -> None:
        """A socket went over from HTTP to a protocol of its own."""
        self.detached += 1

    def leave_detached(self) -> None:
        """Such a socket is gone."""
        self.detached -= 1
        self.sockets -= 1
        if not self.detached and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)

    async def wait_until_none_detached(self) -> None:
        """Wait for the end of the sockets that have a protocol of their own."""
        if self.detached:
            self._emptied = self.loop.create_future()
            await self._emptied

    def _sweep(self) -> None:
        self._timer = self.loop.call_later(self.timeouts.sweep, self._sweep)
        now = self.loop.time()
        for each in [each for each in self.waiting if each.deadline <= now]:
            each.timed_out()
        if self._most - self.sockets >= MANY_LEFT and self.sockets * 2 <= self._most:
            self._most = self.sockets
            self._on_many_left()

    def close_silent(self) -> None:
        """The server stops: sockets that were not heard need no answer."""
        for handshake in self.handshakes:
            handshake.cancel()
        for each in list(self.waiting):
            if isinstance(each, Doorman):
                each.timed_out()


class Doorman(asyncio.Protocol):
    """Stands at a fresh socket until its first bytes come."""

    __slots__ = ("_door", "_make_guest", "_transport", "deadline")

    def __init__(self, door: Door, make_guest: Callable[[], asyncio.Protocol]) -> None:
        self._door = door
        self._make_guest = make_guest
        self._transport: asyncio.Transport | None = None
        self.deadline = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the socket in, or turn it away."""
        # uvloop's transports are not asyncio's by class.
        self._transport = socket = cast(asyncio.Transport, transport)
        if not self._door.enter():
            socket.write(_FULL % request_id(None).encode())
            socket.close()
            return
        self.deadline = self._door.loop.time() + self._door.timeouts.first_byte
        self._door.waiting[self] = None

    def data_received(self, data: bytes) -> None:
        """Hand the socket over to who can read it."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._door.hears():
            self._hand_over(transport, data)
        else:
            # What it says meanwhile stays with the kernel.
            transport.pause_reading()
            self.deadline = inf
            self._door.hear_later(partial(self._be_heard, transport, data))

    def _be_heard(self, transport: asyncio.Transport, data: bytes) -> None:
        """Its turn came."""
        if not transport.is_closing():
            transport.resume_reading()
            self._hand_over(transport, data)

    def _hand_over(self, transport: asyncio.Transport, data: bytes) -> None:
        self._door.waiting.pop(self, None)
        guest = self._make_guest()
        guest.connection_made(transport)
        transport.set_protocol(guest)
        guest.data_received(data)

    def eof_received(self) -> None:
        """It left without a word."""

    def timed_out(self) -> None:
        """It said nothing, and is owed no answer, nor TLS's goodbye."""
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._door.waiting.pop(self, None)
        self._door.leave()


class TlsDoorman(asyncio.Protocol):
    """Stands at a fresh socket that is to speak TLS: counts it, and sees its handshake through.

    An event loop that is asked for TLS calls a protocol after the handshake only, and never where
    there is none.
    """

    __slots__ = ("_door", "_make_guest", "_tls")

    def __init__(
        self, door: Door, make_guest: Callable[[], asyncio.Protocol], tls: ssl.SSLContext
    ) -> None:
        self._door = door
        self._make_guest = make_guest
        self._tls = tls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the socket in, or turn it away; without TLS it can be told nothing."""
        door = self._door
        # The socket goes on to a transport with TLS before this one has read a byte of it.
        try:
            accepted = transport.get_extra_info("socket").dup()
        finally:
            cast(asyncio.Transport, transport).abort()
        if not door.enter():
            accepted.close()
            door.leave()
            return
        task = door.loop.create_task(self._secure(accepted))
        door.handshakes.add(task)
        task.add_done_callback(door.handshakes.discard)

    async def _secure(self, accepted: socket.socket) -> None:
        door, timeouts = self._door, self._door.timeouts
        doorman = _SecuredDoorman(door, self._make_guest)
        doorman.deadline = door.loop.time() + timeouts.first_byte
        # It may leave, speak no TLS, or not speak in time.
        try:
            with contextlib.suppress(OSError):
                await door.loop.connect_accepted_socket(
                    lambda: doorman,
                    accepted,
                    ssl=self._tls,
                    ssl_handshake_timeout=timeouts.first_byte,
                    ssl_shutdown_timeout=timeouts.close,
                )
        finally:
            if not doorman.came:
                door.leave()


class _SecuredDoorman(Doorman):
    """Stands at a socket that was counted before its handshake, and has a deadline since."""

    __slots__ = ()

    @property
    def came(self) -> bool:
        """Whether the handshake was ever finished."""
        return self._transport is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for its first bytes."""
        self._transport = cast(asyncio.Transport, transport)
        self._door.waiting[self] = None
