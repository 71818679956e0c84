"""A subscription in Redis that lasts: one connection of its own, read in batches, and restored.

What arrives is parsed by hiredis as it comes and handed on at once, so that a message costs two
microseconds here and no task. Nothing is read ahead: while the receiver has enough, the socket is
not read, and Redis keeps what comes (as much as its `client-output-buffer-limit pubsub` says).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, NoReturn, cast

import hiredis
import structlog

from notifyd.errors import Unavailable
from notifyd.log import RateLimitedLog
from notifyd.redis_client import Redis, pack
from notifyd.resilience import Backoff, BreakerState

BATCH = 128
BATCH_SECONDS = 0.003
"""Messages handed on in one turn of the event loop, and how long that may take: one to a channel of
thousands takes as long as a hundred others."""

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""A message that is longer ends the connection: it is never whole in memory."""

PROBE_AGAIN_SECONDS = 1.0

Receive = Callable[[bytes, bytes, bytes], bool]
"""Given pattern (empty where the channel itself was subscribed to), channel and data; whether more
may come now."""


class RedisSubscriber:
    """Keeps a subscription to `patterns` and `channels`. Belongs to one event loop.

    `receive` is called for each message, in order, and must not raise; where it says False, nothing
    comes until `resume`. After `silence` seconds without a word a message of our own is published
    by `redis` to a channel of ours; where it does not come back in `probe_timeout` seconds (a
    replica that was detached stays connected and hears nothing), the subscription is made anew.
    `on_up` is told whether there is a subscription, `on_lost` why one ended.
    """

    def __init__(
        self,
        redis: Redis,
        receive: Receive,
        *,
        probe_prefix: str,
        patterns: Sequence[str] = (),
        channels: Sequence[str] = (),
        silence: float = 30.0,
        probe_timeout: float = 2.0,
        connect_timeout: float = 5.0,
        backoff: Backoff | None = None,
        on_up: Callable[[bool], None] = lambda up: None,
        on_lost: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.up = False
        """Whether there is a subscription."""
        self._redis = redis
        self._receive = receive
        self._probe_channel = f"{probe_prefix}:{secrets.token_hex(8)}"
        self._patterns = tuple(patterns)
        self._channels = tuple(channels)
        self._silence = silence
        self._probe_timeout = probe_timeout
        self._connect_timeout = connect_timeout
        self._backoff = backoff or Backoff(0.1, 5.0)
        self._on_up = on_up
        self._on_lost = on_lost
        self._log = RateLimitedLog(structlog.get_logger("notifyd"))
        self._link: _Subscription | None = None

    def resume(self) -> None:
        """More may come again."""
        if self._link is not None:
            self._link.resume()

    async def run(self) -> NoReturn:
        """Subscribe, and again whenever the subscription ends, until cancelled."""
        while True:
            await self._breaker_closed()
            period = self._redis.breaker.period
            try:
                link = await self._subscribe()
            except (OSError, TimeoutError) as error:
                self._redis.breaker.failed(period)
                self._tell("no subscription can be had from Redis", _text(error))
            else:
                self._redis.breaker.succeeded(period)
                self._backoff.reset()
                await self._keep(link)
            await asyncio.sleep(self._backoff.next())

    async def _breaker_closed(self) -> None:
        """Wait until Redis counts as up; who finds that out is `Redis.watch`."""
        breaker, changed = self._redis.breaker, asyncio.Event()

        def wake(_: BreakerState) -> None:
            changed.set()

        breaker.subscribe(wake)
        try:
            while breaker.state is not BreakerState.CLOSED:
                changed.clear()
                await changed.wait()
        finally:
            breaker.unsubscribe(wake)

    async def _subscribe(self) -> _Subscription:
        """Connect and subscribe to all of it. Raises OSError or TimeoutError."""
        probe_channel = self._probe_channel.encode()
        async with asyncio.timeout(self._connect_timeout):
            link = await self._redis.open(lambda: _Subscription(self._receive, probe_channel))
            try:
                greeting = self._redis.greeting()
                words = [pack(("SUBSCRIBE", self._probe_channel, *self._channels))]
                if self._patterns:
                    words.append(pack(("PSUBSCRIBE", *self._patterns)))
                answers = len(greeting) + 1 + len(self._channels) + len(self._patterns)
                await link.begin(b"".join([*greeting, *words]), answers)
            except BaseException:
                link.drop(ConnectionAbortedError("not subscribed"))
                raise
        return link

    async def _keep(self, link: _Subscription) -> None:
        """Return when the subscription has ended; probes it where it is silent."""
        self._link = link
        self._set_up(True)
        try:
            while not link.lost.done():
                quiet_until = link.heard_at + self._silence
                await asyncio.wait([link.lost], timeout=max(0.0, quiet_until - _now()))
                if link.lost.done() or link.heard_at + self._silence > _now():
                    continue
                if link.paused:
                    await asyncio.wait([link.lost], timeout=PROBE_AGAIN_SECONDS)
                elif not await self._is_heard(link):
                    link.drop(ConnectionError("its own message did not come back"))
            self._tell("the subscription in Redis is lost", str(link.lost.result()))
        finally:
            self._link = None
            self._set_up(False)
            link.drop(ConnectionAbortedError("closed"))

    async def _is_heard(self, link: _Subscription) -> bool:
        """Whether the subscription hears what is published, as far as can be said."""
        chunks = link.chunks
        try:
            await self._redis.command("PUBLISH", self._probe_channel, "")
        except Unavailable:
            # Redis is away for everybody: that says nothing of the subscription.
            await asyncio.wait([link.lost], timeout=PROBE_AGAIN_SECONDS)
            return True
        deadline = _now() + self._probe_timeout
        while link.chunks == chunks and not link.lost.done() and not link.paused:
            if _now() >= deadline:
                return False
            await asyncio.wait([link.lost], timeout=self._probe_timeout / 20)
        return True

    def _tell(self, what: str, reason: str) -> None:
        self._log.warning(what, reason=reason)
        self._on_lost(reason)

    def _set_up(self, up: bool) -> None:
        self.up = up
        self._on_up(up)


class _Subscription(asyncio.Protocol):
    """One connection. `lost` has why it ended, `heard_at` the loop's time when something came last,
    `chunks` how often something came."""

    _transport: asyncio.Transport

    def __init__(self, receive: Receive, probe_channel: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[Exception] = loop.create_future()
        self.heard_at = loop.time()
        self.chunks = 0
        self.paused = False
        self._loop = loop
        self._receive = receive
        self._probe_channel = probe_channel
        self._reader = hiredis.Reader(replyError=_RefusalError)
        self._begun: asyncio.Future[None] | None = None
        self._answers_missing = 0
        self._incomplete = 0
        self._reading = True
        self._scheduled = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but their class.
        self._transport = cast(asyncio.Transport, transport)

    async def begin(self, commands: bytes, answers: int) -> None:
        """Send these and wait for their answers. Raises ConnectionError."""
        self._begun = self._loop.create_future()
        self._answers_missing = answers
        self._transport.write(commands)
        either: list[asyncio.Future[Any]] = [self._begun, self.lost]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self.lost.done():
            raise ConnectionError(_text(self.lost.result()))

    def data_received(self, data: bytes) -> None:
        self.chunks += 1
        self.heard_at = self._loop.time()
        self._reader.feed(data)
        self._incomplete += len(data)
        if not self._scheduled and not self.paused:
            self._hand_on()
        if self._incomplete > MAX_MESSAGE_BYTES:
            self.drop(ConnectionError("a message is longer than any may be"))

    def _hand_on(self) -> None:
        """Hand on a batch of what has arrived; the rest waits for another turn of the loop."""
        self._scheduled = False
        if self.lost.done():
            return
        gets, receive = self._reader.gets, self._receive
        until = monotonic() + BATCH_SECONDS
        try:
            for _ in range(BATCH):
                if self.paused:
                    self._read(False)
                    return
                answer = gets()
                if answer is False:
                    self._read(True)
                    return
                self._incomplete = 0
                if type(answer) is list and answer[0] == b"pmessage":
                    self.paused = not receive(answer[1], answer[2], answer[3])
                else:
                    self._other(answer)
                if monotonic() >= until:
                    break
        except (hiredis.ProtocolError, IndexError, TypeError) as error:
            self.drop(ConnectionError(f"not an answer of Redis: {_text(error)}"))
            return
        self._read(False)
        self._scheduled = True
        self._loop.call_soon(self._hand_on)

    def _other(self, answer: Any) -> None:
        if isinstance(answer, _RefusalError):
            self.drop(ConnectionError(_text(answer)))
        elif type(answer) is list and answer[0] == b"message":
            # The probe is heard by having come.
            if answer[1] != self._probe_channel:
                self.paused = not self._receive(b"", answer[1], answer[2])
        elif self._answers_missing > 0:
            self._answers_missing -= 1
            if self._answers_missing == 0 and self._begun is not None:
                self._begun.set_result(None)

    def _read(self, wanted: bool) -> None:
        if wanted != self._reading and not self.lost.done():
            self._reading = wanted
            if wanted:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def resume(self) -> None:
        """Go on with what has arrived, in another turn of the loop."""
        if self.paused:
            self.paused = False
            if not self._scheduled:
                self._scheduled = True
                self._loop.call_soon(self._hand_on)

    def connection_lost(self, error: Exception | None) -> None:
        self.drop(error or ConnectionResetError("Redis closed the connection"))

    def drop(self, error: Exception) -> None:
        """Give the connection up."""
        if not self.lost.done():
            self.lost.set_result(error)
            self._transport.abort()


class _RefusalError(Exception):
    """An error that Redis answered with."""


def _now() -> float:
    return asyncio.get_running_loop().time()


def _text(error: BaseException) -> str:
    return str(error).rstrip(".") or type(error).__name__
