"""The core without sockets: sinks that record, a clock and a loop that tests advance."""

from __future__ import annotations

import asyncio
import heapq
import json
from asyncio import AbstractEventLoop, Handle, TimerHandle
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from typing import Any, ClassVar

import msgspec

from notifyd import wire
from notifyd.auth import Origins, TokenVerifier
from notifyd.channel_rules import ChannelRules
from notifyd.connections.admission import Admission, Handshake
from notifyd.connections.connection import Connection, Transport
from notifyd.connections.heartbeat import Heartbeat
from notifyd.connections.lifecycle import Lifecycle, Limits
from notifyd.connections.outbox import Bounds, Flusher, Outbox
from notifyd.connections.registry import Registry
from notifyd.connections.replay import Replayer
from notifyd.dispatch.confirmation import Confirmations
from notifyd.dispatch.dispatcher import Dispatcher
from notifyd.dispatch.store_writes import StoreWrites
from notifyd.errors import Unavailable
from notifyd.eventually import Eventually
from notifyd.identifiers import new_uuid
from notifyd.identity import Identity
from notifyd.metrics import Metrics
from notifyd.notification import Notification, Priority, Receipt, Target
from notifyd.options import AuthSettings, ChannelRule, RateLimitSettings
from notifyd.queue.memory import MemoryAckLedger, MemoryUserLogs
from notifyd.ratelimit.bucket import Rate
from notifyd.ratelimit.limits import RateLimits, Rates
from notifyd.ratelimit.local import LocalLimit
from notifyd.tenants import TenantLimits

NOW = 1_800_000_000.0
SECRET = "s" * 64


class Clock:
    """Unix seconds that stand still until a test says otherwise."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class ManualLoop(AbstractEventLoop):
    """An event loop whose turns and time are the test's."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.now = 0.0
        self.clock = clock
        self.ready: list[Handle] = []
        self.timers: list[tuple[float, int, TimerHandle]] = []
        self.failures: list[dict[str, Any]] = []
        self._order = 0

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.failures.append(context)

    def call_soon(  # type: ignore[override]  # no need for its type variables
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        handle = Handle(callback, args, self, context)
        self.ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]  # no need for its type variables
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]  # no need for its type variables
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> TimerHandle:
        handle = TimerHandle(when, callback, args, self, context)
        self._order += 1
        heapq.heappush(self.timers, (when, self._order, handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        """Coroutines of an asynchronous test wait on the loop that runs it."""
        return asyncio.get_running_loop().create_future()

    def _timer_handle_cancelled(self, handle: TimerHandle) -> None:
        """asyncio's own bookkeeping; ours skips what was cancelled when its time comes."""

    def turn(self) -> None:
        """One loop turn: what was ready when it began."""
        ready, self.ready = self.ready, []
        for handle in ready:
            if not handle.cancelled():
                handle._run()

    def settle(self) -> None:
        """Turns until nothing is ready."""
        while self.ready:
            self.turn()

    def advance(self, seconds: float) -> None:
        """Let time pass, timer by timer; the clock of the test goes along."""
        end = self.now + seconds
        self.settle()
        while self.timers and self.timers[0][0] <= end:
            when, _, handle = heapq.heappop(self.timers)
            self._set(max(when, self.now))
            if not handle.cancelled():
                handle._run()
            self.settle()
        self._set(end)

    def _set(self, when: float) -> None:
        if self.clock is not None:
            self.clock.now += when - self.now
        self.now = when


def manual_loop(clock: Clock | None = None) -> ManualLoop:
    return ManualLoop(clock)  # type: ignore[abstract]  # asyncio's own base class is not


class RecordingSink:
    """Takes everything and remembers it; after `pauses_after` bytes it pauses, as a socket does."""

    pings: ClassVar[bool] = True

    def __init__(self, *, pauses_after: int | None = None) -> None:
        self.pauses_after = pauses_after
        self.outbox: Outbox | None = None
        self.writes: list[bytes] = []
        self.closed: tuple[int, str] | None = None
        self.closes = 0

    def write(self, data: bytes) -> None:
        assert self.closed is None, "nothing is written after a close"
        self.writes.append(data)
        if self.pauses_after is not None and self.outbox is not None:
            self.pauses_after -= len(data)
            if self.pauses_after <= 0:
                self.outbox.pause()

    def close(self, code: int, reason: str) -> None:
        self.closes += 1
        self.closed = (code, reason)

    @property
    def data(self) -> bytes:
        return b"".join(self.writes)

    def messages(self) -> list[dict[str, Any]]:
        """What a client would have read so far; SSE events get their name as `type`."""
        if self.data.startswith((b"event:", b"retry:")):
            return list(_events(self.data))
        return [json.loads(text) for text in wire.texts_of_frames(self.data)]

    def types(self) -> list[str]:
        return [message["type"] for message in self.messages()]

    def notifications(self) -> list[str]:
        return [each["id"] for each in self.messages() if each["type"] == "notification"]

    def pinged(self) -> list[bytes]:
        """The payloads of the Pings that were written."""
        return list(_pings(self.data))

    def clear(self) -> None:
        self.writes.clear()


class RecordingStream(RecordingSink):
    """The same without Pings: an SSE stream, or a WebSocket behind an ASGI server."""

    pings: ClassVar[bool] = False


def _events(data: bytes) -> list[dict[str, Any]]:
    events = []
    for block in data.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        if "retry" in fields:
            events.append({"type": "retry", "milliseconds": int(fields["retry"])})
        if "event" in fields:
            events.append({"type": fields["event"], **json.loads(fields["data"])})
    return events


def _pings(data: bytes) -> list[bytes]:
    found, position = [], 0
    while position < len(data):
        opcode, length = data[position] & 15, data[position + 1]
        position += 2
        if length > 125:
            size = 2 if length == 126 else 8
            length = int.from_bytes(data[position : position + size], "big")
            position += size
        if opcode == 9:
            found.append(data[position : position + length])
        position += length
    return found


def outbox_of(
    flusher: Flusher, sink: RecordingSink | None = None, *, transport: Transport = "websocket"
) -> Outbox:
    """An outbox with its connection, as everything has it."""
    sink = sink or RecordingSink()
    outbox = sink.outbox = Outbox(flusher, sink)
    Connection(new_uuid(), transport, outbox, address="", user_agent="", acks=False, now=NOW)
    return outbox


def a_notification(
    *,
    id: str | None = None,
    payload: bytes = b'{"n":1}',
    priority: Priority = Priority.NORMAL,
    now: float = NOW,
    **fields: Any,
) -> Notification:
    return Notification(
        id or new_uuid(), now, "order.created", msgspec.Raw(payload), priority=priority, **fields
    )


class World:
    """Registry, outboxes, queue, ledger, dispatcher and lifecycle, put together as app.py does.

    On a ManualLoop by default; with `loop` given, on that one. Coroutines that the core spawns run
    as tasks of the running loop and can be awaited by `tasks_done`.
    """

    def __init__(
        self,
        *,
        loop: AbstractEventLoop | None = None,
        queue: bool = True,
        ledger: bool = True,
        logs: Any = None,
        ack_ledger: Any = None,
        max_pending: int = 1000,
        max_waiting: int = 1000,
        store_first: bool = False,
        max_size_per_user: int = 100,
        bounds: Bounds | None = None,
        idle_timeout: float = 120.0,
        heartbeat_interval: float = 30.0,
        limits: Limits | None = None,
        page_bytes: int = 65536,
        rules: dict[str, ChannelRule] | None = None,
        verify: Callable[[str], Eventually[Identity]] | None = None,
        auth: AuthSettings | None = None,
        origins: Sequence[str] = (),
        ratelimit: RateLimitSettings | None = None,
    ) -> None:
        self.clock = Clock()
        self.manual = manual_loop(self.clock)
        self.loop = loop or self.manual
        self.metrics = Metrics()
        self.registry = Registry(self.clock)
        self.acked: list[float] = []
        self.lost: list[Notification] = []
        self.notes_lost: list[Unavailable] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.lateness: list[float] = []
        self.logs = logs
        if logs is None and queue:
            self.logs = MemoryUserLogs(
                max_size_per_user=max_size_per_user,
                max_messages=10_000,
                message_ttl_seconds=1000,
                clock=self.clock,
                on_dropped=self.metrics.queue_dropped_total.inc,
            )
        self.ledger = ack_ledger
        if ack_ledger is None and ledger:
            self.ledger = MemoryAckLedger(
                timeout_seconds=30,
                max_pending=max_pending,
                clock=self.clock,
                on_acknowledged=self.acked.append,
                on_expired=self.metrics.ack_expired_total.inc,
            )
        self.flusher = Flusher(
            bounds or Bounds(max_bytes=1 << 20, max_messages=1000, total_bytes=1 << 30),
            on_slow=self._too_slow,
        )
        self.writes = StoreWrites(
            self.logs,
            self.ledger,
            max_waiting=max_waiting,
            clock=self.clock,
            spawn=self.spawn,
            on_lost=self.lost.append,
            on_unavailable=self.notes_lost.append,
        )
        self.confirmations = Confirmations(
            self.registry,
            self.logs,
            self.ledger,
            max_pending=max_pending,
            idle_timeout=idle_timeout,
            clock=self.clock,
            writes=self.writes,
        )
        self.heartbeat = Heartbeat(
            self.confirmations,
            interval=heartbeat_interval,
            idle_timeout=idle_timeout,
            leeway=30.0,
            clock=self.clock,
            on_idle=self._idle,
            on_expired=self._expired,
            on_late=self.lateness.append,
        )
        self.replayer = Replayer(
            self.logs,
            self.ledger,
            self.writes,
            self.confirmations,
            self.metrics,
            page_bytes=page_bytes,
            spawn=self.spawn,
        )
        self.verifier = TokenVerifier(
            auth or AuthSettings(jwt_secret=SECRET), production=True, clock=self.clock
        )
        cookie_name = auth.cookie_name if auth else None
        self.lifecycle = Lifecycle(
            registry=self.registry,
            flusher=self.flusher,
            confirmations=self.confirmations,
            replayer=self.replayer,
            heartbeat=self.heartbeat,
            admission=Admission(
                self.verifier, Origins(origins, development=False), cookie_name=cookie_name
            ),
            verify=verify or self.verifier.verify,
            rules=ChannelRules(rules if rules is not None else {"*": ChannelRule(subscribe="any")}),
            limits=limits or limits_of(),
            metrics=self.metrics,
            clock=self.clock,
            spread=lambda low, high: (low + high) / 2,
            spawn=self.spawn,
            rate_limits=None
            if ratelimit is None
            else RateLimits(Rates(ratelimit, AuthSettings()), self._limit, self.metrics),
        )
        self.writes.on_returned = self._returned
        self.dispatcher = Dispatcher(
            self.registry,
            self.flusher,
            self.confirmations,
            self.logs,
            self.ledger,
            self.writes,
            self.metrics,
            self.clock,
            store_first=store_first,
        )
        self.flusher.start(self.loop)
        self.heartbeat.start(self.loop)

    def _returned(
        self, tenant: str, user_id: str, *, before_live: bool = False, here: bool = True
    ) -> None:
        if here:
            self.lifecycle.replay_again(tenant, user_id, before_live=before_live)

    def _too_slow(self, outbox: Outbox) -> None:
        self.lifecycle.too_slow(outbox)

    def _idle(self, connection: Connection) -> None:
        self.lifecycle.idle(connection)

    def _expired(self, connection: Connection) -> None:
        self.lifecycle.token_expired(connection)

    def _limit(self, name: str, rate: Rate) -> LocalLimit:
        return LocalLimit(rate, clock=self.clock, max_buckets=1000)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.append(task)
        return task

    async def tasks_done(self) -> None:
        """Flush and wait until everything that was spawned has ended."""
        while any(not task.done() for task in self.tasks):
            self.manual.settle()
            await asyncio.sleep(0)
        self.manual.settle()
        for task in self.tasks:
            task.result()

    def connect(
        self,
        user_id: str = "u1",
        *,
        sink: RecordingSink | None = None,
        transport: Transport = "websocket",
        acks: bool = False,
        channels: Sequence[str] = (),
        identity: Identity | None = None,
        anonymous: bool = False,
        address: str = "192.0.2.1",
        **claims: Any,
    ) -> Connected:
        """A connection as its handshake made it; what it was told so far is forgotten."""
        if sink is None:
            sink = RecordingSink() if transport == "websocket" else RecordingStream()
        query = "&".join([f"acks={int(acks)}", *([f"channels={','.join(channels)}"])])
        handshake = Handshake(transport, query.encode(), [], address)
        who = None if anonymous else identity or Identity(user_id, **claims)
        connection = self.lifecycle.connect(handshake, who, sink)
        sink.outbox = connection.outbox
        return Connected(self, connection, sink)

    def flush(self) -> None:
        self.manual.settle()

    def dispatch(
        self,
        target: Target | str,
        notification: Notification | None = None,
        *,
        tenant: str = "default",
        exclude_connection: str | None = None,
        **fields: Any,
    ) -> Eventually[Receipt]:
        if isinstance(target, str):
            target = Target("user", (target,))
        if notification is None:
            notification = a_notification(now=self.clock(), **fields)
        return self.dispatcher.dispatch(
            tenant,
            target,
            notification,
            exclude_connection=exclude_connection,
            source="http-api",
        )

    def send(self, target: Target | str, *args: Any, **fields: Any) -> Receipt:
        """A dispatch that needs no store to be awaited."""
        receipt = self.dispatch(target, *args, **fields)
        assert isinstance(receipt, Receipt)
        return receipt


class Connected:
    """A connection and its recording sink."""

    def __init__(self, world: World, connection: Connection, sink: RecordingSink) -> None:
        self.world = world
        self.connection = connection
        self.sink = sink

    @property
    def id(self) -> str:
        return self.connection.id

    def read(self) -> list[dict[str, Any]]:
        """What came since the last read."""
        self.world.flush()
        messages = self.sink.messages()
        self.sink.clear()
        return messages

    def read_types(self) -> list[str]:
        return [message["type"] for message in self.read()]

    def read_notifications(self) -> list[str]:
        return [each["id"] for each in self.read() if each["type"] == "notification"]

    def say(self, type: str, **payload: Any) -> None:
        message = {"type": type, "payload": payload} if payload else {"type": type}
        self.world.lifecycle.receive(self.connection, json.dumps(message))

    def ask(self, type: str, **payload: Any) -> list[dict[str, Any]]:
        """Say something and read the answer."""
        self.world.flush()
        self.sink.clear()
        self.say(type, **payload)
        return self.read()

    def pong_last(self) -> None:
        """Answer the last Ping that was written."""
        self.world.flush()
        self.world.lifecycle.pong(self.connection, self.sink.pinged()[-1])

    def held(self) -> list[str]:
        return list(self.connection.unconfirmed or ())

    def lose(self) -> None:
        self.world.lifecycle.lost(self.connection)


def limits_of(
    *,
    max_connections: int = 1000,
    max_connections_of_tenant: int = 1000,
    max_connections_per_user: int = 20,
    evict_on_user_limit: bool = True,
    max_subscriptions_per_connection: int = 50,
) -> Limits:
    of_each = TenantLimits(
        max_connections_of_tenant, max_connections_per_user, max_subscriptions_per_connection
    )
    return Limits(
        max_connections=max_connections,
        evict_on_user_limit=evict_on_user_limit,
        heartbeat_interval=30,
        of_tenant=lambda name: of_each,
    )
