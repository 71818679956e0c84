"""What a connection has yet to write. Dispatch never waits for a socket.

`put` appends and never awaits; the first put of a loop turn schedules one flush, which joins what
has gathered and writes it. While the transport is paused nothing is written and the outbox grows up
to its bounds; beyond them its connection is a slow consumer.
"""

from __future__ import annotations

import os
from asyncio import AbstractEventLoop, Future, TimerHandle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import length_hint
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from notifyd.connections.connection import Connection
    from notifyd.wire import Message

WRITE_BYTES = 65536
"""At most this is handed to a transport at a time."""

SLICE_SECONDS = 0.002
"""Flushing yields to the event loop after this long, so that a broadcast delays a ping by
milliseconds."""

CHECK_EVERY = 16

FRAMING_BYTES = 32
"""At most this many bytes are written around a message's JSON."""

LINGER_SECONDS = 0.005
LINGER_FOR = 100
"""Under load, messages for so many connections wait so long at most for what other nodes have for
the same: a write costs as much as twenty messages in it."""

MAX_FAN_OUTS = 8
"""Fan-outs per tenant at once; a further one waits, which slows a fast sender down."""


class Sink(Protocol):
    """Where an outbox writes: a socket of ours, or an ASGI server's connection.

    `pings`: Pings go out and Pongs come in (RFC 6455, section 5.5), so that silence means
    something.
    """

    pings: ClassVar[bool]

    def write(self, data: bytes) -> None:
        """Take whole frames or events; never blocks."""

    def close(self, code: int, reason: str) -> None:
        """Tell the client why, as the transport can, and end the connection."""


class Bounds:
    """What one outbox may hold, and all of them together."""

    __slots__ = ("max_bytes", "max_messages", "total_bytes")

    def __init__(self, *, max_bytes: int, max_messages: int, total_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.max_messages = max_messages
        self.total_bytes = total_bytes


class Outboxes:
    """Outboxes of one transport that get the same, and where each of them stands."""

    __slots__ = ("_places", "all")

    def __init__(self, outboxes: Iterable[Outbox]) -> None:
        self.all = tuple(outboxes)
        self._places: dict[Outbox, int] | None = None

    def place(self, outbox: Outbox) -> int | None:
        """Where it stands, None where it is not among them."""
        places = self._places
        if places is None:
            places = self._places = {each: place for place, each in enumerate(self.all)}
        return places.get(outbox)


class Recipients:
    """Connections of one tenant that get the same, their outboxes by transport. It stands for this
    very set: where the same name later reaches others, there is another one.
    """

    __slots__ = ("_streams", "_websockets", "connections")

    def __init__(self, connections: Iterable[Connection]) -> None:
        self.connections = tuple(connections)
        self._websockets = self._outboxes("websocket")
        self._streams = self._outboxes("sse")

    def _outboxes(self, transport: str) -> Outboxes:
        return Outboxes(each.outbox for each in self.connections if each.transport == transport)

    @property
    def tenant(self) -> str:
        """Whose connections they are."""
        return self.connections[0].identity.tenant if self.connections else ""

    @property
    def websockets(self) -> int:
        """How many of them are WebSockets."""
        return len(self._websockets.all)

    @property
    def streams(self) -> int:
        """How many of them are SSE streams."""
        return len(self._streams.all)

    def __contains__(self, outbox: Outbox) -> bool:
        return any(each.place(outbox) is not None for each in (self._websockets, self._streams))

    def fan_outs(self, messages: Sequence[Message]) -> Iterator[FanOut]:
        """The messages, joined, for each transport that is among them."""
        if self._websockets.all:
            data = b"".join([message.websocket for message in messages])
            yield FanOut(self._websockets, data, len(messages))
        if self._streams.all:
            data = b"".join([message.sse for message in messages])
            yield FanOut(self._streams, data, len(messages))


class FanOut:
    """The same bytes for many outboxes, `messages` messages of them. `rest` gives who has yet to
    get them, each once, and None in the place of one that was given them before his turn.
    """

    __slots__ = ("_places", "_row", "data", "messages", "rest")

    def __init__(self, outboxes: Outboxes, data: bytes, messages: int) -> None:
        self._places = outboxes
        self._row: list[Outbox | None] = list(outboxes.all)
        self.rest = iter(self._row)
        self.data = data
        self.messages = messages

    def take_out(self, outbox: Outbox) -> bool:
        """Whether it has yet to get this; from now on it has."""
        place = self._places.place(outbox)
        if place is None or place < len(self._row) - length_hint(self.rest):
            return False
        waits, self._row[place] = self._row[place] is not None, None
        return waits


class Flusher:
    """Flushes the outboxes that took something, once each loop turn, in slices."""

    loop: AbstractEventLoop

    def __init__(self, bounds: Bounds, *, on_slow: Callable[[Outbox], None]) -> None:
        self.bounds = bounds
        self.on_slow = on_slow
        self.waiting_bytes = 0
        self._dirty: deque[Outbox] = deque()
        self._scheduled = False
        self._paused: set[Outbox] = set()
        self._gathered_for: Recipients | None = None
        self._gathered: list[Message] = []
        self._gathered_bytes = 0
        # Of each tenant in order; of tenants, the one whose turn it is first.
        self._fan_outs: dict[str, deque[FanOut]] = {}
        self.gathers = False
        """Whether something is on its way to many."""
        self._answers_due = 0
        self._lingering: TimerHandle | None = None
        self._lingered = False
        self._joined = 1

    def start(self, loop: AbstractEventLoop) -> None:
        """Flush in this loop's turns."""
        self.loop = loop

    def schedule(self, outbox: Outbox) -> None:
        """Flush this outbox in the coming loop turn."""
        self._dirty.append(outbox)
        self._schedule_run()

    def put_all(self, recipients: Recipients, message: Message) -> None:
        """`Outbox.put` for many: what goes to the same recipients in one loop turn is joined once
        for all of them, and put when the turn ends, a slice at a time.
        """
        if recipients is not self._gathered_for:
            self._join_gathered()
            self._gathered_for = recipients
            self.gathers = True
        self._gathered.append(message)
        self._gathered_bytes += len(message.json)
        if self._gathered_bytes > WRITE_BYTES:
            self._join_gathered()
        self._schedule_run()

    def answer_is_due(self) -> None:
        """Other nodes were told of something for many; `answer_came` follows, whatever happens.

        Under load they have something for the same many, and it comes before their answers. So what
        gathers here lingers until the first of these, and goes out joined with it.
        """
        self._answers_due += 1

    def answer_came(self) -> None:
        """Other nodes answered, or it was time."""
        self._answers_due -= 1
        if self._lingering is not None:
            self._go_on()

    def _lingers(self, recipients: Recipients) -> bool:
        """Whether what is gathered for them is yet to wait. One message after the other never
        does."""
        if (
            self._lingered
            or not self._answers_due
            or len(self._gathered) == self._joined == 1
            or len(recipients.connections) < LINGER_FOR
        ):
            return False
        if self._lingering is None:
            self._lingering = self.loop.call_later(LINGER_SECONDS, self._go_on)
        return True

    def _go_on(self) -> None:
        self._end_lingering()
        self._lingered = True
        self._schedule_run()

    def _end_lingering(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None

    def give_up_full(self, recipients: Recipients, message: Message) -> int:
        """Give up those of them whose transports are paused and whose outboxes have no room for
        this message; how many. Before `put_all`, which could not tell any more.
        """
        if not self._paused:
            return 0
        under_way = self._fan_outs.get(recipients.tenant, ())
        # What is on its way to an outbox is in it at the latest when it is looked at closely.
        messages = len(self._gathered) + sum([each.messages for each in under_way]) + 1
        size = self._gathered_bytes + sum([len(each.data) for each in under_way])
        size += (messages + 1) * FRAMING_BYTES + len(message.json)
        most, most_messages = self.bounds.max_bytes, self.bounds.max_messages
        given_up = 0
        for outbox in tuple(self._paused):
            surely_has_room = outbox.size + size <= most and (
                outbox.messages + messages <= most_messages
            )
            if surely_has_room or outbox not in recipients:
                continue
            if self.spread_to(outbox):
                if outbox.connection.transport == "websocket":
                    data = message.websocket
                else:
                    data = message.sse
                if outbox.size + len(data) > most or outbox.messages >= most_messages:
                    self.on_slow(outbox)
            given_up += outbox.closed
        return given_up

    def spread_to(self, outbox: Outbox) -> bool:
        """Put into this one what is on its way to many and has not reached it; False where it is
        closed, or was just found too slow. Called before anything else is put into it, so that
        order holds; the others get it in their turn.
        """
        if outbox.closed:
            return False
        if self._gathered_for is not None and outbox in self._gathered_for:
            self._join_gathered()
        if self._fan_outs:
            for fan_out in tuple(self._fan_outs.get(outbox.connection.identity.tenant, ())):
                if fan_out.take_out(outbox):
                    self._put(outbox, fan_out.data, fan_out.messages)
                    self._schedule_run()
        return not outbox.closed

    def _join_gathered(self) -> None:
        recipients, messages = self._gathered_for, self._gathered
        self._gathered_for, self._gathered, self._gathered_bytes = None, [], 0
        self._lingered = False
        self._end_lingering()
        if recipients is None or not recipients.connections:
            return
        self._joined = len(messages)
        tenant = recipients.tenant
        under_way = self._fan_outs.setdefault(tenant, deque())
        under_way.extend(recipients.fan_outs(messages))
        while len(under_way) > MAX_FAN_OUTS:
            oldest = under_way[0]
            for outbox in oldest.rest:
                if outbox is not None:
                    self._put(outbox, oldest.data, oldest.messages)
            self._ended(tenant, oldest)

    def _ended(self, tenant: str, fan_out: FanOut) -> None:
        under_way = self._fan_outs.get(tenant)
        if under_way is None or fan_out not in under_way:
            return  # Who was found too slow in it made the server say so to many.
        under_way.remove(fan_out)
        if not under_way:
            del self._fan_outs[tenant]
        if self.waiting_bytes > self.bounds.total_bytes:
            self.relieve()

    def _put(self, outbox: Outbox, data: bytes, messages: int) -> None:
        if outbox.closed:
            return
        outbox._frames.append(data)
        length = len(data)
        self.waiting_bytes += length
        size = outbox.size = outbox.size + length
        waiting = outbox.messages = outbox.messages + messages
        if not outbox._scheduled:
            outbox._scheduled = True
            self._dirty.append(outbox)
        if size > self.bounds.max_bytes or waiting > self.bounds.max_messages:
            outbox.is_slow()

    def _schedule_run(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._run)

    def _run(self) -> None:
        deadline = self.loop.time() + SLICE_SECONDS
        try:
            # What is for one first: it must not wait for what another tenant sends to many.
            if self._flush_some(deadline):
                self._fan_out_some(deadline)
        finally:
            # Also where one sink failed: the others must not wait for ever.
            self.gathers = bool(self._fan_outs) or self._gathered_for is not None
            waits = self._gathered_for is not None and self._lingering is None
            if self._dirty or self._fan_outs or waits:
                self.loop.call_soon(self._run)
            else:
                self._scheduled = False

    def _flush_some(self, deadline: float) -> bool:
        """Flush what took something, until the deadline; whether all of it was."""
        dirty = self._dirty
        countdown = CHECK_EVERY
        while dirty:
            outbox = dirty.popleft()
            frames = outbox._frames
            if len(frames) == 1 and outbox._unhindered:
                outbox._scheduled = False
                data = frames[0]
                frames.clear()
                self.waiting_bytes -= outbox.size
                outbox.size = outbox.messages = 0
                outbox._write(data)
            else:
                outbox.flush()
            countdown -= 1
            if not countdown:
                if self.loop.time() >= deadline:
                    return not dirty
                countdown = CHECK_EVERY
        return True

    def _fan_out_some(self, deadline: float) -> None:
        """Go on with what is for many until the deadline, then it is another tenant's turn."""
        countdown = CHECK_EVERY
        while self._fan_outs or self._gathered_for is not None:
            gathered = self._gathered_for
            if gathered is not None and gathered.tenant not in self._fan_outs:
                # Not earlier: what comes while a fan-out goes on is one fan-out behind it.
                if not self._lingers(gathered):
                    self._join_gathered()
                    continue
                if not self._fan_outs:
                    return
            tenant, under_way = next(iter(self._fan_outs.items()))
            fan_out = under_way[0]
            data, messages = fan_out.data, fan_out.messages
            length = len(data)
            for outbox in fan_out.rest:
                if outbox is None:
                    continue
                if not outbox._unhindered or outbox.size:
                    self._put(outbox, data, messages)
                elif outbox._descriptor < 0:
                    outbox._write(data)
                else:
                    # By far the most common case: nothing waits, so nothing is put.
                    try:
                        written = os.write(outbox._descriptor, data)
                    except OSError:
                        # The transport meets the same, and knows what to do.
                        written = 0
                    if written < length:
                        outbox._write(data[written:])
                countdown -= 1
                if not countdown:
                    if self.loop.time() >= deadline:
                        # Taken out and put back, it stands last.
                        self._fan_outs[tenant] = self._fan_outs.pop(tenant)
                        return
                    countdown = CHECK_EVERY
            self._ended(tenant, fan_out)

    def paused(self, outbox: Outbox) -> None:
        """This outbox's transport takes nothing more for now."""
        self._paused.add(outbox)

    def resumed(self, outbox: Outbox) -> None:
        """It takes again, or it is gone."""
        self._paused.discard(outbox)

    def relieve(self) -> None:
        """All outboxes together hold too much: the slow ones are given up, the largest first, until
        they do not."""
        for outbox in sorted(self._paused, key=lambda each: each.size, reverse=True):
            if self.waiting_bytes <= self.bounds.total_bytes:
                break
            self.on_slow(outbox)


class Outbox:
    """Frames in order, not yet written.

    While a replay is on (`hold_back`), what is `put` waits behind what is `put_ahead`.
    """

    __slots__ = (
        "_ahead",
        "_descriptor",
        "_drained",
        "_flusher",
        "_frames",
        "_scheduled",
        "_unhindered",
        "_write",
        "closed",
        "connection",
        "messages",
        "paused",
        "sink",
        "size",
    )

    def __init__(self, flusher: Flusher, sink: Sink) -> None:
        self._flusher = flusher
        self._frames: list[bytes] = []
        self._ahead: list[bytes] | None = None
        self.size = 0
        self.messages = 0
        self.sink = sink
        self._write = sink.write
        self._descriptor = -1
        # Not closed nor paused, no replay on, nobody waits for it to drain.
        self._unhindered = True
        self.paused = False
        self.closed = False
        self._scheduled = False
        self._drained: Future[None] | None = None
        self.connection: Connection

    def write_to(self, descriptor: int) -> None:
        """Fan-outs go to this descriptor of a socket, past its transport; -1: through it.

        The transport must pause this outbox as soon as it keeps a single byte back, and the outbox
        must be closed before the socket is.
        """
        self._descriptor = descriptor

    def put(self, data: bytes) -> bool:
        """Take whole frames; False where the connection is closed, or was just found too slow."""
        if self.closed:
            return False
        flusher = self._flusher
        if flusher.gathers and not flusher.spread_to(self):
            return False
        length = len(data)
        self._frames.append(data)
        size = self.size = self.size + length
        messages = self.messages = self.messages + 1
        waiting = flusher.waiting_bytes = flusher.waiting_bytes + length
        if not self._scheduled:
            self._scheduled = True
            flusher.schedule(self)
        bounds = flusher.bounds
        if size > bounds.max_bytes or messages > bounds.max_messages:
            return not self.is_slow()
        if waiting > bounds.total_bytes:
            flusher.relieve()
            return not self.closed
        return True

    def is_slow(self) -> bool:
        """Over a bound, where many came in one loop turn: slow is only who does not take them now,
        and he is given up."""
        self._write_all()
        bounds = self._flusher.bounds
        if self.size <= bounds.max_bytes and self.messages <= bounds.max_messages:
            return False
        self._flusher.on_slow(self)
        return True

    def put_ahead(self, data: bytes) -> bool:
        """Take what may not wait behind a replay: the replay itself, and replies."""
        # First, because what was sent to many is live and belongs behind the replay.
        self._flusher.spread_to(self)
        if self._ahead is None:
            return self.put(data)
        self._frames, held_back = self._ahead, self._frames
        accepted = self.put(data)
        if not self.closed:
            self._frames, self._ahead = held_back, self._frames
        return accepted

    def hold_back(self) -> None:
        """From here on, what is `put` waits until `let_go`."""
        if self._ahead is not None:
            return
        # What was sent to many before belongs before it, too.
        self._flusher.spread_to(self)
        self._unhindered = False
        self._ahead, self._frames = self._frames, []

    def let_go(self) -> None:
        """The replay is over: what was held back follows it."""
        if self._ahead is not None:
            self._frames, self._ahead = self._ahead + self._frames, None
            self._look_whether_hindered()
            self._schedule()

    def let_first_go(self, count: int) -> None:
        """So many writes of what was held back may be written; the others still wait."""
        if self._ahead is not None and count:
            self._ahead += self._frames[:count]
            del self._frames[:count]
            self._schedule()

    @property
    def held_back(self) -> int:
        """How many writes wait behind the replay."""
        return 0 if self._ahead is None else len(self._frames)

    @property
    def holds_back(self) -> bool:
        """Whether a replay is on."""
        return self._ahead is not None

    def will_flush(self) -> None:
        """What is put from here on is written by the caller's `flush`, which follows in this loop
        turn whatever happens: nothing has to be scheduled for it."""
        self._scheduled = True

    def flush(self) -> None:
        """Write up to 64 KiB of what has gathered, unless the transport is paused."""
        self._scheduled = False
        if self.paused or self.closed:
            return
        frames = self._frames if self._ahead is None else self._ahead
        if not frames:
            # Only what is held back is left: the replay that waits goes on.
            self._tell_drained()
            return
        if len(frames) == 1:
            data = frames[0]
            frames.clear()
        elif self.size <= WRITE_BYTES:
            data = b"".join(frames)
            frames.clear()
        else:
            data = _take(frames)
        size = self.size
        self.size -= len(data)
        # What was gathered stands here joined, so that the messages left can only be reckoned.
        self.messages = self.messages * self.size // size
        self._flusher.waiting_bytes -= len(data)
        self._write(data)
        if frames:
            self._schedule()
        elif self._drained is not None:
            self._tell_drained()

    def flush_all(self) -> None:
        """Write everything before a close; nothing to a transport that takes nothing."""
        self._flusher.spread_to(self)
        self.let_go()
        self._write_all()

    def _write_all(self) -> None:
        frames = self._frames if self._ahead is None else self._ahead
        while frames and not self.paused and not self.closed:
            self.flush()

    def _look_whether_hindered(self) -> None:
        self._unhindered = (
            not self.closed and not self.paused and self._ahead is None and self._drained is None
        )

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._flusher.schedule(self)

    def pause(self) -> None:
        """The transport's buffer is full (`pause_writing`)."""
        self.paused = True
        self._unhindered = False
        if not self.closed:
            self._flusher.paused(self)

    def resume(self) -> None:
        """The transport takes again (`resume_writing`)."""
        self.paused = False
        self._look_whether_hindered()
        self._flusher.resumed(self)
        if self._frames or self._ahead:
            self._schedule()
        elif self._drained is not None:
            self._tell_drained()

    def close(self) -> None:
        """Drop what was not written; nothing is taken any more."""
        self.closed = True
        self._unhindered = False
        self._descriptor = -1
        self._frames.clear()
        self._ahead = None
        self._flusher.waiting_bytes -= self.size
        self.size = self.messages = 0
        self._flusher.resumed(self)
        self._tell_drained()

    def let_connection_go(self) -> None:
        """Its transport is gone: a connection and its outbox keep each other alive no longer.

        With as few collections as a server of many connections can have, what refers to itself
        would stay for hours.
        """
        del self.connection

    async def drained(self) -> None:
        """Wait until what may be written has been, or the connection is closed. One waiter at a
        time.
        """
        if self.closed or not (
            self.paused or self._ahead or (self._ahead is None and self._frames)
        ):
            return
        self._unhindered = False
        self._drained = self._flusher.loop.create_future()
        await self._drained

    def _tell_drained(self) -> None:
        drained, self._drained = self._drained, None
        self._look_whether_hindered()
        if drained is not None and not drained.done():
            drained.set_result(None)


def _take(frames: list[bytes]) -> bytes:
    """Remove and join as many leading frames as fit into one write, at least one."""
    size = 0
    for count, frame in enumerate(frames):
        size += len(frame)
        if size > WRITE_BYTES and count:
            break
    else:
        count = len(frames)
    data = b"".join(frames[:count])
    del frames[:count]
    return data
