"""One timer for all connections: heartbeats, silence, expiry, confirmations.

Connections stand in as many slots as a heartbeat interval has ticks; each tick visits one slot, so
that the work is spread evenly and nobody has a timer of his own.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, TimerHandle
from collections.abc import Callable

from notifyd import wire
from notifyd.connections.connection import Connection, State
from notifyd.dispatch.confirmation import Confirmations

TICK_SECONDS = 1.0

_WEBSOCKET_HEARTBEAT = wire.HEARTBEAT.websocket + wire.ping_frame()


def _heartbeat_asking(counter: int) -> bytes:
    return wire.HEARTBEAT.websocket + wire.ping_frame(counter.to_bytes(4, "big"))


class Heartbeat:
    """Beats for every connection it was given, until told to forget it.

    `on_idle` and `on_expired` close a connection; `on_late(seconds)` is told how late each tick
    came.
    """

    _loop: AbstractEventLoop

    def __init__(
        self,
        confirmations: Confirmations,
        *,
        interval: float,
        idle_timeout: float,
        leeway: float,
        clock: Callable[[], float],
        on_idle: Callable[[Connection], None],
        on_expired: Callable[[Connection], None],
        on_late: Callable[[float], None],
    ) -> None:
        self._confirmations = confirmations
        self._interval = interval
        self._idle_timeout = idle_timeout
        self._leeway = leeway
        self._clock = clock
        self._on_idle = on_idle
        self._on_expired = on_expired
        self._on_late = on_late
        count = max(1, round(interval / TICK_SECONDS))
        self._tick_seconds = interval / count
        self._slots: list[dict[Connection, None]] = [{} for _ in range(count)]
        self._current = 0
        self._expiring: dict[int, dict[Connection, None]] = {}
        self._silent: dict[int, list[Connection]] = {}
        self._timer: TimerHandle | None = None
        self._due = 0.0

    def start(self, loop: AbstractEventLoop) -> None:
        """Begin to tick."""
        self._loop = loop
        self._due = self._loop.time() + self._tick_seconds
        self._timer = self._loop.call_at(self._due, self._tick)

    def stop(self) -> None:
        """No tick after this."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def add(self, connection: Connection) -> None:
        """Beat for this connection, the first time after one interval."""
        connection.beat = self._current
        self._slots[self._current][connection] = None
        self.watch_expiry(connection)

    def watch_expiry(self, connection: Connection) -> None:
        """Tell when the token of this connection, which may be a new one, expires."""
        second = self._expiry_second(connection)
        if second is not None:
            self._expiring.setdefault(second, {})[connection] = None

    def forget_expiry(self, connection: Connection) -> None:
        """The connection's token is about to be replaced."""
        second = self._expiry_second(connection)
        if second is not None and second in self._expiring:
            self._expiring[second].pop(connection, None)
            if not self._expiring[second]:
                del self._expiring[second]

    def discard(self, connection: Connection) -> None:
        """Beat no more for this connection."""
        self._slots[connection.beat].pop(connection, None)
        self.forget_expiry(connection)

    def _expiry_second(self, connection: Connection) -> int | None:
        expires_at = connection.identity.expires_at
        return None if expires_at is None else int(expires_at + self._leeway) + 1

    def _tick(self) -> None:
        late = self._loop.time() - self._due
        self._on_late(max(0.0, late))
        # A loop that was held up catches up with the clock, not with the missed ticks.
        self._due = max(self._due + self._tick_seconds, self._loop.time())
        self._timer = self._loop.call_at(self._due, self._tick)
        self._current = (self._current + 1) % len(self._slots)
        now = self._clock()
        sse_heartbeat = wire.sse_heartbeat(now)
        for connection in list(self._slots[self._current]):
            if connection.state is State.OPEN:
                self._beat(connection, now, sse_heartbeat)
        for second in [second for second in self._expiring if second <= now]:
            for connection in list(self._expiring.get(second, ())):
                self._on_expired(connection)
            self._expiring.pop(second, None)
        for second in [second for second in self._silent if second <= now]:
            for connection in self._silent.pop(second):
                self._check_silence(connection, now)
        self._confirmations.ask_waiting()

    def _check_silence(self, connection: Connection, now: float) -> None:
        if connection.must_wait:
            # What it says is not read; that is no silence of its own.
            connection.last_heard = now
        if connection.state is State.OPEN and now - connection.last_heard >= self._idle_timeout:
            self._on_idle(connection)

    def _beat(self, connection: Connection, now: float, sse_heartbeat: bytes) -> None:
        if connection.outbox.sink.pings:
            # A client may answer only the last of several Pings (RFC 6455, section 5.5.3), so one
            # that is out is repeated, not overtaken.
            asked = connection.asked
            connection.outbox.put_ahead(
                _WEBSOCKET_HEARTBEAT if asked is None else _heartbeat_asking(asked[0])
            )
            # Where silence would end before the next visit, it is looked at in its own second.
            silent_at = connection.last_heard + self._idle_timeout
            if silent_at < now + self._interval:
                self._silent.setdefault(int(silent_at) + 1, []).append(connection)
        else:
            if not connection.outbox.paused:
                connection.last_heard = now
            self._confirmations.confirm_outlived(connection, now)
            websocket = connection.transport == "websocket"
            connection.outbox.put_ahead(wire.HEARTBEAT.websocket if websocket else sse_heartbeat)
