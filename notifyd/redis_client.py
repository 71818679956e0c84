"""The one place that knows how to talk to Redis: one connection, calls gathered into pipelines, and
a breaker.

A connection of our own on hiredis, because gathering is all that we need and redis-py's asyncio
pipeline costs more for a call than Redis itself does. Calls are answered in the order in which they
were sent (RESP2), so a connection whose answer is late is closed: the answer must not be taken for
another call's. A call that was sent is never sent again, but for NOSCRIPT, which did nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable, Sequence
from importlib.resources.abc import Traversable
from typing import Any, NoReturn, TypeVar, cast
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import hiredis
import msgspec
import structlog

from notifyd.errors import ConfigurationError, Unavailable
from notifyd.eventually import retrieve
from notifyd.log import RateLimitedLog
from notifyd.resilience import Backoff, BreakerState, CircuitBreaker, Guarded

MAX_UNSENT_BYTES = 64 * 1024 * 1024
"""Bytes that may wait for Redis to read them; beyond, calls are refused."""

REJECTED_PER_TURN = 50
"""So many callers are told in one turn of the event loop that a connection is lost: less than a
millisecond's work."""

SENTINEL_PORT = 26379
SENTINEL_SECONDS = 0.5
"""A sentinel that does not answer for so long is passed over."""

_LATE_SECONDS = 0.02
_CLOSE_SECONDS = 2.0
_UNCOUNTED = -1
_AT_ONCE = struct.pack("ii", 1, 0)

# Answers by which a Redis says that it cannot do its work; any other error is about one call.
_FAILURES = (
    "OOM command not allowed",
    "READONLY ",
    "LOADING ",
    "MASTERDOWN ",
    "MISCONF ",
    "NOREPLICAS ",
    "CLUSTERDOWN ",
    "BUSY ",
    "NOAUTH ",
    "NOPERM ",
    "max number of clients",
)

ProtocolT = TypeVar("ProtocolT", bound=asyncio.Protocol)
Convert = Callable[[Any], Any]
Word = str | bytes | int | float

# Its type says a tuple of one.
pack: Callable[[tuple[Word, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]


class Script:
    """A Lua script, known to Redis by the SHA-1 of its text."""

    __slots__ = ("load", "name", "sha")

    def __init__(self, name: str, source: bytes) -> None:
        self.name = name
        self.sha = hashlib.sha1(source, usedforsecurity=False).hexdigest()
        self.load: bytes = pack(("SCRIPT", "LOAD", source))

    @classmethod
    def read(cls, file: Traversable) -> Script:
        """The script in a file."""
        return cls(file.name, file.read_bytes())


class RedisAddress(msgspec.Struct, frozen=True):
    """Where a Redis is and how to get in; `path` is a Unix socket's and stands for host and port,
    and so do `sentinels`, who know where `master` is."""

    host: str = "localhost"
    port: int = 6379
    path: str | None = None
    username: str | None = None
    password: str | None = None
    database: int = 0
    tls: bool = False
    ca_file: str | None = None
    sentinels: tuple[tuple[str, int], ...] = ()
    master: str = ""
    sentinel_username: str | None = None
    sentinel_password: str | None = None

    @classmethod
    def parse(cls, url: str) -> RedisAddress:
        """`redis://[[user]:password@]host[:port][/database]`, `rediss://` for TLS (`?ssl_ca_certs=`
        names a file of authorities), `unix://[user:password@]/path[?db=0]`,
        `redis+sentinel://[[user]:password@]host[:port],host[:port]/master[/database]`, where user
        and password are the master's, `?sentinel_username=` and `?sentinel_password=` those of the
        sentinels.

        Raises ConfigurationError, which never quotes the URL: there may be a password in it.
        """
        try:
            parts = urlsplit(url)
            if parts.scheme == "redis+sentinel":
                return cls._behind_sentinels(parts)
            options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
            database = options.pop("db", "0")
            if parts.scheme in ("redis", "rediss") and parts.path.strip("/"):
                database = parts.path.strip("/")
            address = cls(
                parts.hostname or "localhost",
                parts.port or 6379,
                unquote(parts.path) if parts.scheme == "unix" else None,
                unquote(parts.username) if parts.username else None,
                unquote(parts.password) if parts.password else None,
                int(database),
                parts.scheme == "rediss",
                options.pop("ssl_ca_certs", None),
            )
        except ValueError as error:
            raise ConfigurationError("redis.url: this is not a URL of a Redis.") from error
        if parts.scheme not in ("redis", "rediss", "unix") or address.path == "":
            raise ConfigurationError(
                "redis.url: must begin with redis://, rediss://, unix:/// or redis+sentinel://."
            )
        if options:
            raise ConfigurationError(f"redis.url: unknown option {min(options)!r}.")
        return address

    @classmethod
    def _behind_sentinels(cls, parts: SplitResult) -> RedisAddress:
        """Raises ValueError."""
        whom, _, hosts = parts.netloc.rpartition("@")
        user, _, password = whom.partition(":")
        sentinels = []
        for each in hosts.split(","):
            one = urlsplit(f"//{each}")
            if not one.hostname:
                raise ValueError("a sentinel without a host")
            sentinels.append((one.hostname, one.port or SENTINEL_PORT))
        master, _, database = parts.path.strip("/").partition("/")
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        sentinel_username = options.pop("sentinel_username", None)
        sentinel_password = options.pop("sentinel_password", None)
        if not master or options or (sentinel_username and not sentinel_password):
            raise ValueError("no name of a master, unknown options, or a name without a password")
        return cls(
            username=unquote(user) or None,
            password=unquote(password) or None,
            database=int(database or "0"),
            sentinels=tuple(sentinels),
            master=unquote(master),
            sentinel_username=sentinel_username,
            sentinel_password=sentinel_password,
        )

    async def located(self) -> tuple[str, int]:
        """Host and port, as the first sentinel to answer says now. Raises OSError where none of
        them knows.

        All are asked at once: in turn, those that are silent would use up the time of connecting,
        again at each attempt.
        """
        if not self.sentinels:
            return self.host, self.port
        asked = [asyncio.ensure_future(self._ask_sentinel(*each)) for each in self.sentinels]
        reason: Exception | None = None
        try:
            for answer in asyncio.as_completed(asked):
                try:
                    return await answer
                except (OSError, TimeoutError) as error:
                    reason = error
        finally:
            for each in asked:
                each.cancel()
                each.add_done_callback(retrieve)
        raise ConnectionError(f"no sentinel tells the master: {_text(reason or OSError())}")

    async def _ask_sentinel(self, host: str, port: int) -> tuple[str, int]:
        """Where the master is. Raises OSError where this sentinel does not say it, TimeoutError
        where it says nothing."""
        words: list[tuple[Word, ...]] = [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.master)]
        if self.sentinel_password is not None:
            names = () if self.sentinel_username is None else (self.sentinel_username,)
            words.insert(0, ("AUTH", *names, self.sentinel_password))
        async with asyncio.timeout(SENTINEL_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"".join(map(pack, words)))
                parser = hiredis.Reader(replyError=_error_answer)
                for _ in words:
                    while (answer := parser.gets()) is False:
                        data = await reader.read(4096)
                        if not data:
                            raise ConnectionResetError("the sentinel closed the connection")
                        parser.feed(data)
                    if isinstance(answer, _AnswerError):
                        raise ConnectionError(_text(answer))
            except hiredis.ProtocolError as error:
                raise ConnectionError(f"not an answer of a sentinel: {error}") from error
            finally:
                writer.transport.abort()
        if not isinstance(answer, list) or len(answer) != 2:
            raise ConnectionError("it does not know one of this name")
        return answer[0].decode(), int(answer[1])


class _Call:
    """One command on its way. `period` is the breaker's when it was sent."""

    __slots__ = ("convert", "deadline", "future", "packed", "period", "repeated", "script")

    def __init__(
        self,
        packed: bytes,
        future: asyncio.Future[Any],
        convert: Convert | None,
        script: Script | None,
    ) -> None:
        self.packed = packed
        self.future = future
        self.convert = convert
        self.script = script
        self.deadline = 0.0
        self.period = _UNCOUNTED
        self.repeated = False


class _Link(asyncio.Protocol):
    """A connection: pairs answers with calls, and ends when one is late."""

    transport: asyncio.Transport

    def __init__(self, redis: Redis) -> None:
        self.unanswered: deque[_Call] = deque()
        self.loaded: set[str] = set()
        self.full = False
        self._redis = redis
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(replyError=_error_answer)
        self._timer: asyncio.TimerHandle | None = None
        self._late = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but their class.
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)
        carrier = transport.get_extra_info("socket")
        if hasattr(socket, "TCP_USER_TIMEOUT") and carrier.family != socket.AF_UNIX:
            # Bytes of a call that was given up must not arrive later, behind those of its repeat.
            milliseconds = max(1, math.ceil(self._redis.timeout * 1000))
            carrier.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False

    def send(self, calls: Sequence[_Call], deadline: float, period: int) -> None:
        chunks: list[bytes] = []
        for call in calls:
            script = call.script
            if script is not None and script.sha not in self.loaded:
                self.loaded.add(script.sha)
                loading = _Call(script.load, self._loop.create_future(), None, None)
                loading.future.add_done_callback(retrieve)
                loading.deadline = deadline
                self.unanswered.append(loading)
                chunks.append(script.load)
            call.deadline = deadline
            call.period = period
            self.unanswered.append(call)
            chunks.append(call.packed)
        self.transport.write(b"".join(chunks))
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._look_at_the_time)

    def _look_at_the_time(self) -> None:
        self._timer = None
        if not self.unanswered:
            return
        deadline = self.unanswered[0].deadline
        if deadline > self._loop.time():
            self._late = False
        elif self._late:
            self.drop(TimeoutError("no answer in time"))
            return
        else:
            # Perhaps it was this loop that was late: what has arrived meanwhile is read first.
            self._late = True
            deadline = self._loop.time() + _LATE_SECONDS
        self._timer = self._loop.call_at(deadline, self._look_at_the_time)

    def data_received(self, data: bytes) -> None:
        reader, unanswered = self._reader, self.unanswered
        try:
            reader.feed(data)
            answer = reader.gets()
            while answer is not False:
                self._redis.answered(self, unanswered.popleft(), answer)
                answer = reader.gets()
        except (hiredis.ProtocolError, IndexError) as error:
            self.drop(ConnectionError(f"not an answer of Redis: {error}"))
        self._redis.read()

    def connection_lost(self, error: Exception | None) -> None:
        self.drop(error or ConnectionResetError("Redis closed the connection"))

    def drop(self, error: Exception) -> None:
        """Give the connection up, and all calls that are not answered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.transport.is_closing():
            # The system forgets what it has not sent, instead of trying on for minutes.
            carrier = self.transport.get_extra_info("socket")
            carrier.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self.transport.abort()
        calls = list(self.unanswered)
        self.unanswered.clear()
        self._redis.lost(self, calls, error)


class Redis:
    """One Redis behind a breaker. Belongs to one event loop.

    Calls of one turn of the loop go out together, and wait while a connection is being made. Each
    is given up after `timeout` seconds, and with it the connection. `on_up` is told whether there
    is a connection, `on_reconnect` each new one after the first.
    """

    def __init__(
        self,
        url: str,
        breaker: CircuitBreaker,
        *,
        timeout: float = 2,
        probe_key: str = "notifyd:probe",
        backoff: Backoff | None = None,
        on_up: Callable[[bool], None] = lambda up: None,
        on_reconnect: Callable[[], None] = lambda: None,
    ) -> None:
        self.breaker = breaker
        self.up = False
        """Whether there is a connection."""
        self._url = url
        self._address = RedisAddress.parse(url)
        self.timeout = timeout
        """Seconds after which a call is given up."""
        self._backoff = backoff or Backoff(0.1, 5.0)
        self._on_up = on_up
        self._on_reconnect = on_reconnect
        # Written and not only asked: a Redis that is full, or a replica, still answers a PING.
        self._probe_command = ("SET", probe_key, "1", "PX", 60_000)
        self._guarded = Guarded(breaker, "Redis")
        self._log = RateLimitedLog(structlog.get_logger("notifyd"))
        self._link: _Link | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._waiting: list[_Call] = []
        self._repeated: list[_Call] = []
        self._flushing = False
        self._gathering: list[Callable[[], None]] = []
        self._good_period: int | None = None
        self._was_up = False
        self._closed = False

    @property
    def database(self) -> int:
        """The number of the database, which pub/sub knows nothing of."""
        return self._address.database

    # --- calls ---

    def run(
        self,
        script: Script,
        keys: Sequence[str],
        args: Sequence[Word],
        convert: Convert | None = None,
        future: asyncio.Future[Any] | None = None,
    ) -> asyncio.Future[Any]:
        """Run a script; its answer, through `convert`, is the future's: that of the caller, or a
        new one.

        Raises Unavailable, at once or from the future: the breaker is open, Redis did not answer in
        time, or not with what was asked for. Cancelled, the call is made all the same unless it has
        not been sent. It is sent at the end of this turn, awaited or not.
        """
        packed = pack(("EVALSHA", script.sha, len(keys), *keys, *args))
        return self._put(packed, convert, script, future)

    def command(self, *words: Word, convert: Convert | None = None) -> asyncio.Future[Any]:
        """Make one call that is no script, in the manner of `run`."""
        return self._put(pack(words), convert, None)

    def _put(
        self,
        packed: bytes,
        convert: Convert | None,
        script: Script | None,
        future: asyncio.Future[Any] | None = None,
    ) -> asyncio.Future[Any]:
        link = self._link
        if self.breaker.state is not BreakerState.CLOSED or self._closed:
            self._guarded.refuse()
        if link is None:
            self._connect_soon()
        elif link.full:
            raise Unavailable("Redis does not keep up.", retry_after=1)
        loop = asyncio.get_running_loop()
        if future is None:
            future = loop.create_future()
        self._waiting.append(_Call(packed, future, convert, script))
        if not self._flushing and link is not None:
            self._flushing = True
            loop.call_soon(self._flush)
        return future

    def gather(self, send: Callable[[], None]) -> None:
        """Call `send` once, when the calls of this turn are about to go out; those that it makes go
        with them."""
        self._gathering.append(send)
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = True
        # What sends may gather more.
        while self._gathering:
            gathering, self._gathering = self._gathering, []
            for send in gathering:
                try:
                    send()
                except Exception as error:  # noqa: BLE001  # costs what it had to send, and is logged
                    self._log.warning(
                        "what was to be sent to Redis failed",
                        reason=f"failed: {type(error).__name__}",
                        error=str(error)[:200],
                        exc_info=True,
                    )
        self._flushing = False
        link = self._link
        if link is None:
            return  # They wait for the connection that is being made.
        calls = [call for call in self._waiting if not call.future.done()]
        self._waiting.clear()
        if calls:
            link.send(calls, asyncio.get_running_loop().time() + self.timeout, self.breaker.period)

    # --- what a connection tells ---

    def answered(self, link: _Link, call: _Call, answer: Any) -> None:
        """An answer arrived."""
        future = call.future
        if isinstance(answer, Exception):
            self._refused(link, call, str(answer))
            return
        if call.period != _UNCOUNTED:
            self._good_period = call.period
        if call.convert is not None:
            # Even where the caller was cancelled: what is counted there has been done.
            try:
                answer = call.convert(answer)
            except Exception as error:  # noqa: BLE001  # the caller's; other answers are behind it
                if not future.done():
                    future.set_exception(error)
                return
        if not future.done():
            future.set_result(answer)

    def read(self) -> None:
        """All that arrived at once was told."""
        if self._good_period is not None:
            self.breaker.succeeded(self._good_period)
            self._good_period = None
        if self._repeated:
            self._waiting[:0] = self._repeated
            self._repeated.clear()
            self._flush()

    def lost(self, link: _Link, calls: Sequence[_Call], error: Exception) -> None:
        """A connection is gone, and with it the answers to these calls."""
        if link is self._link:
            self._link = None
            self._set_up(False)
            if not self._closed:
                self._log.warning("the connection to Redis is lost", reason=_text(error))
                self._connect_soon()
        # Each call that is late is a failure; the loss of a connection is one, for all on it.
        self._fail(calls, error, once=not isinstance(error, TimeoutError))

    def _refused(self, link: _Link, call: _Call, text: str) -> None:
        if text.startswith("NOSCRIPT") and call.script is not None and not call.repeated:
            # Somebody emptied its cache of scripts; nothing was done yet.
            link.loaded.discard(call.script.sha)
            call.repeated = True
            self._repeated.append(call)
            return
        error = ConnectionError(text)
        if any(failure in text for failure in _FAILURES):
            self.read()
            self._fail([call], error)
            if "READONLY " in text and link is self._link:
                # The master has become a replica; its name may lead to the new one by now.
                asyncio.get_running_loop().call_soon(link.drop, error)
        else:
            if call.period != _UNCOUNTED:
                self._good_period = call.period
            self._reject(call, error)
        if call.script is not None:
            self._log.warning("Redis refused a call", reason=text, script=call.script.name)

    def _fail(self, calls: Sequence[_Call], error: Exception, *, once: bool = False) -> None:
        periods = [call.period for call in calls if call.period != _UNCOUNTED]
        for period in periods[:1] if once else periods:
            self.breaker.failed(period)
        if self._closed:
            for call in calls:
                self._reject(call, error)
        else:
            self._reject_some(calls, error)

    def _reject_some(self, calls: Sequence[_Call], error: Exception) -> None:
        """Tell callers a few in each turn of the event loop: where Redis hung there are thousands,
        and whoever publishes meanwhile would wait for all of them."""
        for call in calls[:REJECTED_PER_TURN]:
            self._reject(call, error)
        rest = calls[REJECTED_PER_TURN:]
        if rest:
            asyncio.get_running_loop().call_soon(self._reject_some, rest, error)

    def _reject(self, call: _Call, cause: Exception) -> None:
        if not call.future.done():
            seconds = max(1, math.ceil(self.breaker.retry_after()))
            error = Unavailable("Redis does not answer.", retry_after=seconds)
            error.__cause__ = cause
            call.future.set_exception(error)

    # --- connecting ---

    async def start(self) -> None:
        """Connect. Raises ConfigurationError, naming what is wrong, where that cannot be done."""
        try:
            await self._connect()
        except (OSError, TimeoutError) as error:
            raise ConfigurationError(f"redis.url: Redis cannot be used: {_text(error)}.") from error

    async def eviction_policy(self) -> str | None:
        """By which policy keys are given up when its memory is full; None where none are, or where
        it does not say (INFO may be forbidden).
        """
        if self._link is None:
            return None
        loop = asyncio.get_running_loop()
        call = _Call(pack(("INFO", "memory")), loop.create_future(), None, None)
        self._link.send([call], loop.time() + self.timeout, _UNCOUNTED)
        try:
            answer: bytes = await call.future
        except Unavailable:
            return None
        said = dict(line.split(":", 1) for line in answer.decode().splitlines() if ":" in line)
        policy = said.get("maxmemory_policy", "noeviction")
        return None if policy == "noeviction" or said.get("maxmemory", "0") == "0" else policy

    async def watch(self) -> NoReturn:
        """Look whether Redis is back while the breaker is not closed, until cancelled."""
        await self._guarded.watch(self._probe, self.timeout)

    async def _probe(self) -> None:
        while self._link is None:
            self._connect_soon(probing=True)
            assert self._connecting is not None  # noqa: S101  # for the type checker
            await asyncio.shield(self._connecting)
            if self._link is None:
                raise ConnectionError("no connection")
        future = asyncio.get_running_loop().create_future()
        call = _Call(pack(self._probe_command), future, None, None)
        deadline = asyncio.get_running_loop().time() + self.timeout
        self._link.send([call], deadline, _UNCOUNTED)
        await future

    def _connect_soon(self, *, probing: bool = False) -> None:
        """See that a connection is being made. While the breaker is not closed, only by probes."""
        if self._connecting is None and not self._closed:
            if self._again is not None:
                self._again.cancel()
                self._again = None
            if probing or self.breaker.state is BreakerState.CLOSED:
                self._connecting = asyncio.ensure_future(self._try_to_connect())

    async def _try_to_connect(self) -> None:
        period = self.breaker.period
        try:
            await self._connect()
        except (OSError, TimeoutError) as error:
            self._log.warning("Redis cannot be reached", reason=_text(error))
            calls, self._waiting = self._waiting, []
            for call in calls:
                call.period = period
            self._fail(calls, error)
            if not calls:
                self.breaker.failed(period)
            if self.breaker.state is BreakerState.CLOSED and not self._closed:
                loop = asyncio.get_running_loop()
                self._again = loop.call_later(self._backoff.next(), self._connect_soon)
        finally:
            self._connecting = None

    async def _connect(self) -> None:
        """Make a connection and send what waits for it. Raises OSError or TimeoutError."""
        async with asyncio.timeout(self.timeout):
            link = await self.open(lambda: _Link(self))
            try:
                await self._shake_hands(link)
            except BaseException:
                link.transport.abort()
                raise
        self._link = link
        self._backoff.reset()
        self._set_up(True)
        self._flush()

    async def open(self, make: Callable[[], ProtocolT]) -> ProtocolT:
        """Another connection to the same Redis, its caller's own. Raises OSError.

        What `greeting` says is to be sent first.
        """
        address = self._address
        loop = asyncio.get_running_loop()
        if address.path is not None:
            return (await loop.create_unix_connection(make, address.path))[1]
        tls = ssl.create_default_context(cafile=address.ca_file) if address.tls else None
        host, port = await address.located()
        return (await loop.create_connection(make, host, port, ssl=tls))[1]

    def greeting(self) -> list[bytes]:
        """The commands that a new connection begins with, packed; each has one answer."""
        address = self._address
        commands: list[tuple[Word, ...]] = [("CLIENT", "SETNAME", "notifyd"), ("PING",)]
        if address.database:
            commands.insert(0, ("SELECT", address.database))
        if address.password is not None:
            names = () if address.username is None else (address.username,)
            commands.insert(0, ("AUTH", *names, address.password))
        return [pack(each) for each in commands]

    def another(self, *, timeout: float) -> Redis:
        """A client of the same Redis with a connection of its own, for calls that block.

        Its answers may take `timeout` seconds. The breaker is shared, so that it needs no `watch`.
        """
        return Redis(self._url, self.breaker, timeout=timeout)

    async def _shake_hands(self, link: _Link) -> None:
        loop = asyncio.get_running_loop()
        calls = [_Call(each, loop.create_future(), None, None) for each in self.greeting()]
        link.send(calls, loop.time() + self.timeout, _UNCOUNTED)
        answers = await asyncio.gather(*(call.future for call in calls), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, Unavailable):
                raise ConnectionError(_text(answer.__cause__ or answer))

    def _set_up(self, up: bool) -> None:
        self.up = up
        if up:
            if self._was_up:
                self._on_reconnect()
            self._was_up = True
        self._on_up(up)

    async def aclose(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Wait for the answers that are out, `seconds` at most, and close the connection."""
        link = self._link
        if link is not None:
            self._flush()
            pending = [call.future for call in link.unanswered if not call.future.done()]
            if pending and seconds > 0:
                await asyncio.wait(pending, timeout=seconds)
        self._closed = True
        if self._again is not None:
            self._again.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if self._link is not None:
            self._link.drop(ConnectionAbortedError("closed"))
        calls, self._waiting = self._waiting, []
        self._fail(calls, ConnectionAbortedError("closed"))


class _AnswerError(Exception):
    """An error that Redis answered with."""


def _error_answer(text: str) -> _AnswerError:
    return _AnswerError(text)


def _text(error: BaseException) -> str:
    return str(error).rstrip(".") or type(error).__name__
