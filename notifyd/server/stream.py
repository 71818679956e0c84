"""An SSE stream on its own socket: the head, then bytes until somebody ends it."""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle
from collections.abc import Callable
from typing import ClassVar

from notifyd.connections.connection import Connection
from notifyd.connections.lifecycle import Lifecycle
from notifyd.server.unbuffered import unbuffered


class StreamProtocol(asyncio.Protocol):
    """One client's socket after its request: the sink of its connection's outbox."""

    __slots__ = (
        "_close_seconds",
        "_connection",
        "_lifecycle",
        "_on_gone",
        "_timer",
        "_transport",
        "write",
    )

    def __init__(
        self,
        transport: asyncio.Transport,
        lifecycle: Lifecycle,
        *,
        close_seconds: float,
        on_gone: Callable[[], None],
    ) -> None:
        self._transport = transport
        self.write = transport.write
        self._lifecycle = lifecycle
        self._close_seconds = close_seconds
        self._on_gone = on_gone
        self._connection: Connection | None = None
        self._timer: TimerHandle | None = None

    pings: ClassVar[bool] = False

    def begin(self, connection: Connection) -> None:
        """From here on the socket speaks for this connection."""
        self._connection = connection
        connection.outbox.write_to(unbuffered(self._transport))

    def close(self, code: int, reason: str) -> None:
        """End the stream; why was told by its last event. What a client does not read in time
        is dropped."""
        if self._timer is None:
            self._transport.close()
            self._timer = asyncio.get_running_loop().call_later(
                self._close_seconds, self._transport.abort
            )

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        if self._connection is not None:
            self._connection.outbox.pause()

    def resume_writing(self) -> None:
        """The client caught up."""
        if self._connection is not None:
            self._connection.outbox.resume()

    def data_received(self, data: bytes) -> None:
        """A stream has nothing to say after its request."""

    def eof_received(self) -> None:
        """Half-closed is closed."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone, whoever ended it."""
        if self._timer is not None:
            self._timer.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            self._lifecycle.lost(connection)
            connection.outbox.let_connection_go()
        self._on_gone()
