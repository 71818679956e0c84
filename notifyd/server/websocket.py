"""A WebSocket on its own socket (RFC 6455): no task, no ASGI, nothing kept while it is silent.

Whole, final, masked frames are read here; everything else (fragments, half frames, closes, what is
wrong) goes to the `websockets` package's sans-I/O parser, which lives as long as a message or a
close is in progress.
"""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle
from collections.abc import Callable
from typing import ClassVar, cast

from websockets.frames import Opcode
from websockets.protocol import State as ParserState
from websockets.server import ServerProtocol

from notifyd import wire
from notifyd.connections.connection import Connection
from notifyd.connections.lifecycle import NOTHING_HEARD, Lifecycle, reason_for
from notifyd.server.door import Timeouts
from notifyd.server.unbuffered import unbuffered

try:
    from websockets.speedups import apply_mask as unmask
except ImportError:  # pragma: no cover  # a platform that websockets has no wheel for
    from websockets.utils import apply_mask as unmask

MESSAGES_PER_TURN = 64
"""A flood of small messages yields to the other connections after so many."""

_LATER = 1 << 62
"""More bytes than ever arrive: the rest is read in a later turn, whatever arrives meanwhile."""

_TEXT, _BINARY, _PING, _PONG = 0x81, 0x82, 0x89, 0x8A
_WHOLE = (_TEXT, _BINARY, _PING, _PONG)


class WebSocketProtocol(asyncio.Protocol):
    """One client's socket after the handshake: the sink of its connection's outbox."""

    __slots__ = (
        "_closing",
        "_connection",
        "_lifecycle",
        "_max_message_bytes",
        "_needed",
        "_on_gone",
        "_parser",
        "_parts",
        "_rest",
        "_text",
        "_timeouts",
        "_timer",
        "_transport",
        "write",
    )

    def __init__(
        self,
        transport: asyncio.Transport,
        lifecycle: Lifecycle,
        *,
        max_message_bytes: int,
        timeouts: Timeouts,
        on_gone: Callable[[], None],
    ) -> None:
        self._transport = transport
        # Taken directly: a method in between would cost a tenth of a delivery.
        self.write = transport.write
        self._lifecycle = lifecycle
        self._max_message_bytes = max_message_bytes
        self._timeouts = timeouts
        self._on_gone = on_gone
        self._connection: Connection | None = None
        self._parser: ServerProtocol | None = None
        self._parts: list[bytes] | None = None
        self._text = False
        self._rest: bytes | bytearray = b""
        self._needed = 0
        self._timer: TimerHandle | None = None
        self._closing = False

    pings: ClassVar[bool] = True

    def begin(self, connection: Connection) -> None:
        """From here on the socket speaks for this connection."""
        self._connection = connection
        connection.outbox.write_to(unbuffered(self._transport))

    # --- the sink ---

    def close(self, code: int, reason: str) -> None:
        """Send a Close and wait for the client's, for a while (RFC 6455, section
        7.1.2).
        """
        if self._closing or self._transport.is_closing():
            return
        self._closing = True
        parser = self._parser
        if parser is None:
            parser = self._parser = self._new_parser()
        if parser.state is ParserState.OPEN:
            parser.send_close(code, _bounded(reason))
        self._transport.resume_reading()
        self._drain_parser(parser)
        self._restart_timer(self._timeouts.close, self._transport.abort)

    # --- the transport ---

    def pause_writing(self) -> None:
        """The client reads too slowly; while it does, nothing more is taken from it."""
        if self._connection is not None:
            self._connection.outbox.pause()
        if not self._closing:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The client caught up."""
        if self._connection is not None:
            self._connection.outbox.resume()
        self._go_on()

    def _go_on(self) -> None:
        """Read again, after what kept from it is over."""
        if self._needed == _LATER:
            asyncio.get_running_loop().call_soon(self._continue)
        elif not self._paused():
            self._transport.resume_reading()

    def eof_received(self) -> None:
        """Half-closed is closed."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone, whoever ended it."""
        self._stop_timer()
        self._drop_parser()
        self._rest, self._needed = b"", 0
        connection, self._connection = self._connection, None
        if connection is not None:
            self._lifecycle.lost(connection)
            connection.outbox.let_connection_go()
        self._on_gone()

    def data_received(self, data: bytes) -> None:
        """Frames, whole or not."""
        if self._rest:
            if type(self._rest) is not bytearray:
                self._rest = bytearray(self._rest)
            self._rest += data
            if len(self._rest) < self._needed:
                return
            data, self._rest = bytes(self._rest), b""
        self._read(data)

    def _read(self, data: bytes) -> None:
        connection = self._connection
        if connection is None:
            self._read_frames(data)
            return
        outbox = connection.outbox
        outbox.will_flush()
        try:
            self._read_frames(data)
        finally:
            # A reply does not wait behind a broadcast that is being flushed.
            outbox.flush()

    def _read_frames(self, data: bytes) -> None:
        position, end = 0, len(data)
        turns = MESSAGES_PER_TURN
        between_messages = False
        while position < end:
            if self._parser is None:
                position, turns = self._read_whole_frames(data, position, turns)
                if position == end:
                    break
                between_messages = between_messages or (position > 0 and self._parser is None)
            elif self._parser.parser_exc is not None or self._parser.close_rcvd is not None:
                # What follows a failure or a Close is not looked at (RFC 6455, section 7.1.7).
                return
            if not turns:
                self._continue_later(data[position:])
                break
            stop = self._end_of_frame(data, position)
            if stop > end:
                self._rest, self._needed = data[position:], stop - position
                break
            if self._parser is None:
                self._parser = self._new_parser()
            self._feed(self._parser, data[position:stop])
            position = stop
            turns = 0 if self._connection is not None and self._connection.must_wait else turns - 1
            between_messages = between_messages or self._parser is None
        connection = self._connection
        if connection is not None and connection.must_wait and not self._closing:
            connection.on_answered = self._go_on
            if self._needed != _LATER:
                self._continue_later(self._rest)
        if not self._closing:
            self._watch_message(begun=between_messages)

    def _read_whole_frames(self, data: bytes, position: int, turns: int) -> tuple[int, int]:
        """Read whole messages while there is nothing special about them.

        Returns where that ended, and how many more may be read in this turn.
        """
        connection = cast(Connection, self._connection)
        lifecycle = self._lifecycle
        end = len(data)
        while turns and end - position >= 6:
            opcode, length = data[position], data[position + 1] - 128
            start = position + 6
            if length == 126 and end - position >= 8:
                length = data[position + 2] << 8 | data[position + 3]
                start = position + 8
                if length < 126:
                    break
            elif not 0 <= length < 126:
                break
            stop = start + length
            if stop > end or opcode not in _WHOLE or length > self._max_message_bytes:
                break
            payload = unmask(data[start:stop], data[start - 4 : start])
            if opcode == _TEXT:
                try:
                    text = payload.decode()
                except UnicodeDecodeError:
                    break
                lifecycle.receive(connection, text)
                if connection.must_wait:
                    return stop, 0
            elif length > wire.MAX_CONTROL_PAYLOAD and opcode != _BINARY:
                break
            elif opcode == _PONG:
                lifecycle.pong(connection, payload)
            elif opcode == _PING:
                lifecycle.heard(connection)
                connection.outbox.put_ahead(wire.pong_frame(payload))
            else:
                lifecycle.unsupported(connection)
            position = stop
            turns -= 1
            if self._closing:
                break
        return position, turns

    def _end_of_frame(self, data: bytes, position: int) -> int:
        """Where the frame that begins at `position` ends, or how far its head must be there to tell
        (RFC 6455, section 5.2). A frame over the limit is refused for its head alone, and ends with
        what is there."""
        end = len(data)
        if end - position < 2:
            return position + 2
        length = data[position + 1] & 0x7F
        start = position + (6 if data[position + 1] & 0x80 else 2)
        if length > 125:
            size = 2 if length == 126 else 8
            if end - position < 2 + size:
                return position + 2 + size
            length = int.from_bytes(data[position + 2 : position + 2 + size], "big")
            start += size
        return end if length > self._max_message_bytes else start + length

    def _continue_later(self, rest: bytes | bytearray) -> None:
        self._rest, self._needed = rest, _LATER
        self._transport.pause_reading()
        asyncio.get_running_loop().call_soon(self._continue)

    def _continue(self) -> None:
        if self._needed != _LATER or self._transport.is_closing():
            return
        if self._paused():
            # Who does not read is not read from, nor who waits for answers: `_go_on` comes back.
            return
        rest, self._rest, self._needed = bytes(self._rest), b"", 0
        self._read(rest)
        if self._needed != _LATER and not self._paused() and not self._transport.is_closing():
            self._transport.resume_reading()

    def _paused(self) -> bool:
        connection = self._connection
        return (
            connection is not None
            and (connection.outbox.paused or connection.must_wait)
            and not self._closing
        )

    # --- what needs a parser ---

    def _new_parser(self) -> ServerProtocol:
        return ServerProtocol(state=ParserState.OPEN, max_size=self._max_message_bytes)

    def _drop_parser(self) -> None:
        parser, self._parser, self._parts = self._parser, None, None
        if parser is not None:
            # It refers to itself, by its generator and by the traceback of its error.
            parser.parser.close()
            parser.parser_exc = None

    def _feed(self, parser: ServerProtocol, data: bytes) -> None:
        parser.receive_data(data)
        for event in parser.events_received():
            self._handle(self._connection, event)
        if parser.parser_exc is not None and not self._closing:
            self._fail(parser)
            return
        self._drain_parser(parser)
        if not self._closing and parser.current_size is None:
            # It was fed whole frames only, and no message is in progress.
            self._drop_parser()

    def _handle(self, connection: Connection | None, event: object) -> None:
        opcode = event.opcode  # type: ignore[attr-defined]  # a server in state OPEN emits frames only
        data = bytes(event.data)  # type: ignore[attr-defined]
        if opcode is Opcode.CLOSE:
            self._closing = True
            if connection is not None:
                # What it said before is answered before.
                connection.outbox.flush()
                self._lifecycle.lost(connection, "client")
        elif self._closing or connection is None:
            return
        elif opcode is Opcode.PONG:
            self._lifecycle.pong(connection, data)
        elif opcode is Opcode.PING:
            self._lifecycle.heard(connection)
        else:
            self._lifecycle.heard(connection)
            self._take_part(connection, opcode, data, final=event.fin)  # type: ignore[attr-defined]

    def _take_part(
        self, connection: Connection, opcode: Opcode, data: bytes, *, final: bool
    ) -> None:
        if opcode is not Opcode.CONT:
            self._text = opcode is Opcode.TEXT
            self._parts = []
        parts = self._parts if self._parts is not None else []
        if data:
            parts.append(data)
        if not final:
            self._parts = parts
            return
        message, self._parts = b"".join(parts), None
        if not self._text:
            self._lifecycle.unsupported(connection)
            return
        try:
            text = message.decode()
        except UnicodeDecodeError:
            self._end(1007, "invalid UTF-8")
            return
        self._lifecycle.receive(connection, text)

    def _fail(self, parser: ServerProtocol) -> None:
        """The client broke the protocol: the parser wrote a Close, and the socket ends with it."""
        self._closing = True
        code = parser.close_sent.code if parser.close_sent is not None else 1002
        if self._connection is not None:
            self._connection.outbox.flush_all()
            self._lifecycle.lost(self._connection, reason_for(code))
        self._transport.resume_reading()
        self._drain_parser(parser)

    def _end(self, code: int, reason: str) -> None:
        if self._connection is not None:
            self._lifecycle.close(self._connection, code, reason)

    def _drain_parser(self, parser: ServerProtocol) -> None:
        for frame in parser.data_to_send():
            if not frame:
                # A server closes the TCP connection (RFC 6455, sections 7.1.1 and 7.1.7). A client
                # that did not say Close may be sending still: closing with bytes unread would reset
                # the connection, and our Close be lost with it.
                if parser.close_rcvd is None and self._transport.can_write_eof():
                    self._transport.write_eof()
                else:
                    self._transport.close()
                self._restart_timer(self._timeouts.close, self._transport.abort)
            elif self._closing or self._connection is None:
                self._transport.write(frame)
            else:
                self._connection.outbox.put_ahead(frame)

    # --- the one timer, for a message or for a close ---

    def _watch_message(self, *, begun: bool) -> None:
        """See that what is in progress is finished in time; `begun`: it began just now."""
        if self._parser is None and not (self._rest and self._needed != _LATER):
            self._stop_timer()
        elif begun or self._timer is None:
            self._restart_timer(self._timeouts.message, self._message_timed_out)

    def _message_timed_out(self) -> None:
        self._end(NOTHING_HEARD, "a message was not finished in time")

    def _restart_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(seconds, callback)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _bounded(reason: str) -> str:
    """As much of a reason as a Close can carry (RFC 6455, section 5.5.1)."""
    return reason.encode()[: wire.MAX_CONTROL_PAYLOAD - 2].decode("utf-8", "ignore")
