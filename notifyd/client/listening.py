"""How a listener lives: connect, subscribe, hear, confirm, renew its token, come back. No I/O.

`Listening.steps` is a generator: it yields what is to be done and is sent what came of it.
`streams` does it, blocking or awaiting. A step that was cancelled can simply be done again.
"""

from __future__ import annotations

import logging
import math
import random as randomness
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias, TypeVar, assert_never

import msgspec

from notifyd.client import messages
from notifyd.client.credentials import Credentials, FetchToken, Wait
from notifyd.client.errors import (
    ConnectError,
    ConnectionClosed,
    NotifydClientError,
    StatusError,
    TransportError,
)
from notifyd.client.messages import (
    Acked,
    Connected,
    Disconnected,
    Event,
    NotificationMessage,
    Problem,
    Refreshed,
    Shutdown,
    Told,
    Unsubscribed,
)
from notifyd.client.retry import Backoff

_log = logging.getLogger("notifyd.client")

# A connection is given up after this many heartbeat intervals of silence.
_SILENT_INTERVALS = 2.5
# A new token is shown this long before the old one expires, or a fifth of its life if that is less.
_REFRESH_MARGIN = 60.0
# The least time between two new tokens, so that a clock that is wrong does not ask without end.
_LEAST_REFRESH = 5.0
_IDS_PER_MESSAGE = 100

_FORBIDDEN = 4003
_FINAL_CODES = frozenset({1002, 1007, _FORBIDDEN, 4009})
_TOKEN_CODES = frozenset({4001, 4010})
_LATER = 4029
# A handshake refused with one of these may be let in later; with another, not without a change.
_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Reconnect:
    """How a listener comes back.

    `attempts` bounds connections that fail one after the other (None: it never gives up), `tokens`
    those refused for their token. `longest_wait` bounds what a server can ask for, in seconds.
    `remember` is how many ids are kept to tell duplicates, and how many acks to be sent again.
    """

    backoff: Backoff = field(default_factory=lambda: Backoff(initial=0.5, maximum=30.0))
    attempts: int | None = None
    tokens: int = 3
    longest_wait: float = 300.0
    remember: int = 10_000


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a WebSocket; answered by Opened, Refused or Failed."""

    url: str
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Send:
    """Send a text message. One that cannot be sent is lost; the next Receive tells why."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait at most `timeout` seconds; answered by the message, Silence or Closed."""

    timeout: float


@dataclass(frozen=True, slots=True)
class Close:
    """Drop the WebSocket."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """Give this to the caller."""

    message: NotificationMessage


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell the caller's `on_event`."""

    event: Event


Step: TypeAlias = FetchToken | Connect | Send | Receive | Wait | Close | Deliver | Tell


@dataclass(frozen=True, slots=True)
class Opened:
    """The WebSocket is open."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The handshake was answered with an HTTP error."""

    error: StatusError


@dataclass(frozen=True, slots=True)
class Failed:
    """Nothing answered, here or where tokens are fetched."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Closed:
    """The WebSocket is closed: with the server's code, or 1006 (RFC 6455 7.1.5) where none came."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Silence:
    """The time of a Receive is over."""


Ending: TypeAlias = Refused | Failed | Closed
Reply: TypeAlias = Opened | Ending | Silence | str | bytes | None

R = TypeVar("R")
Steps: TypeAlias = Generator[Step, Reply, R]


class Listening:
    """One listener, over all its connections.

    `clock` is monotonic, `now` in Unix seconds, `random` gives 0 to 1. Not thread-safe: a shell
    used by several threads takes a lock around the generator and around each method.
    """

    def __init__(
        self,
        url: str,
        credentials: Credentials,
        *,
        channels: Iterable[str] = (),
        policy: Reconnect | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        random: Callable[[], float] = randomness.random,
    ) -> None:
        self.url = url
        self._credentials = credentials
        self._policy = policy or Reconnect()
        self._clock = clock
        self._now = now
        self._random = random
        self._channels = dict.fromkeys(_names(channels))
        # Left on this connection and not answered yet; how often each of them was asked for again
        # before the answer.
        self._leaving: set[str] = set()
        self._returning: Counter[str] = Counter()
        self._connection_id: str | None = None
        # id -> whether the caller acked it, the one heard of last at the end.
        self._seen: OrderedDict[str, bool] = OrderedDict()
        # Acks that the server has not answered yet.
        self._unanswered: OrderedDict[str, bool] = OrderedDict()
        self._failures = 0  # connections that were not made or did not last, for the backoff
        self._unreached = 0  # connections that were not made
        self._tokens_refused = 0
        self._session = messages.Session()
        self._refresh_at = math.inf
        # What the connection that just ended said about coming back.
        self._told_by_shutdown: float | None = None
        self._told_by_limit: float | None = None

    @property
    def connection_id(self) -> str | None:
        """The connection that stands, None between two; what `exclude_connection` takes."""
        return self._connection_id

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels that are asked for on every connection."""
        return tuple(self._channels)

    # At the caller's wish, between two steps: each returns what is to be sent now.

    def subscribe(self, channels: Iterable[str]) -> list[bytes]:
        """Ask for channels, on this connection and on those to come."""
        names = _names(channels)
        self._channels.update(dict.fromkeys(names))
        again = self._leaving.intersection(names)
        self._returning.update(again)
        self._leaving -= again
        return self._to_send(messages.subscribe, names)

    def unsubscribe(self, channels: Iterable[str]) -> list[bytes]:
        """Ask for channels no longer."""
        names = _names(channels)
        if self._connection_id is not None:
            self._leaving.update(self._channels.keys() & set(names))
        for name in names:
            self._channels.pop(name, None)
        return self._to_send(messages.unsubscribe, names)

    def ack(self, notification_ids: Iterable[str]) -> list[bytes]:
        """Confirm notifications; again on the next connection, unless this one answers."""
        ids = _names(notification_ids)
        for id in ids:
            if id in self._seen:
                self._seen[id] = True
            self._remember(self._unanswered, id)
        return self._to_send(messages.ack, ids)

    def _to_send(self, encode: Callable[[list[str]], bytes], names: list[str]) -> list[bytes]:
        if self._connection_id is None:
            return []
        return [encode(portion) for portion in _portions(names)]

    def _remember(self, kept: OrderedDict[str, bool], id: str) -> None:
        kept[id] = kept.pop(id, False)
        if len(kept) > self._policy.remember:
            kept.popitem(last=False)

    # The life.

    def steps(self) -> Steps[None]:
        """Listen until the protocol says that one must not come back.

        Returns after 4009; raises ConnectionClosed for the other final close codes, StatusError for
        a handshake refused for good, ConnectError when `attempts` are used up.
        """
        while True:
            ending = yield from self._connection()
            delay = self._delay(ending)
            ended = Disconnected(*_described(ending), delay)
            _log.log(
                logging.INFO if ended.code in {1000, 1001, 4009, 4010} else logging.WARNING,
                "listening to %s ended with %d %s; %s",
                self.url,
                ended.code,
                ended.reason,
                "not to come back" if delay is None else f"again in {delay:.1f} s",
            )
            yield Tell(ended)
            if delay is None:
                break
            yield Wait(delay)
        error = _final_error(ending)
        if error is not None:
            raise error from (ending.error if isinstance(ending, Failed) else None)

    def _connection(self) -> Steps[Ending]:
        """One connection, from its token to its end."""
        if self._credentials.token is None:
            fetched = yield FetchToken()
            if isinstance(fetched, Failed):
                return fetched
            self._credentials.token = _expect(fetched, str)
        reply = yield Connect(self.url, self._credentials.token)
        if isinstance(reply, Refused | Failed):
            return reply
        _expect(reply, Opened)
        opened_at = self._clock()
        self._told_by_shutdown = self._told_by_limit = None
        self._session = messages.Session()
        self._refresh_at = math.inf
        ending = yield from self._hear()
        self._connection_id = None
        if self._clock() - opened_at >= self._policy.backoff.maximum:
            self._failures = 0
        return ending

    def _hear(self) -> Steps[Closed]:
        """Hear until the connection ends, or is silent for too long."""
        # The caller's time with a notification is not the server's silence.
        waiting_since = self._clock()
        while True:
            if self._clock() >= self._refresh_at:
                yield from self._refresh()
                waiting_since = self._clock()
            given_up_at = waiting_since + self._session.heartbeat_interval * _SILENT_INTERVALS
            wake_at = min(given_up_at, self._refresh_at)
            reply = yield Receive(max(0.0, wake_at - self._clock()))
            if isinstance(reply, Closed):
                return reply
            if isinstance(reply, Silence):
                if self._clock() >= given_up_at:
                    yield Close()
                    return Closed(1006, "nothing heard from the server")
                continue
            yield from self._heard(_expect(reply, bytes))
            waiting_since = self._clock()

    def _heard(self, data: bytes) -> Steps[None]:
        try:
            message = messages.parse(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            # It was a whole frame, so the connection is sound.
            _log.warning("ignored a message that the protocol does not know: %s", error)
            return
        if message is None:
            return
        for text in self._take_in(message):
            yield Send(text)
        if not isinstance(message, NotificationMessage):
            yield Tell(message)
        elif message.id not in self._seen:
            self._remember(self._seen, message.id)
            yield Deliver(message)

    def _take_in(self, message: Told) -> list[bytes]:
        """Change our state by a message; what is to be sent for it."""
        match message:
            case NotificationMessage(id=id) if id in self._seen:
                self._seen.move_to_end(id)
                # Settled by the caller, though the server did not hear it: he will not see this
                # again, so the ack is ours to repeat.
                return self.ack([id]) if self._seen[id] else []
            case Connected():
                self._connection_id = message.connection_id
                self._session = message.session
                self._unreached = self._tokens_refused = 0
                self._plan_refresh(message.session.expires_at)
                self._leaving.clear()
                self._returning.clear()
                return [
                    *self._to_send(messages.ack, list(self._unanswered)),
                    *self._to_send(messages.subscribe, list(self._channels)),
                ]
            case Refreshed():
                self._plan_refresh(message.expires_at)
            case Acked():
                settled = [*message.notification_ids, *message.refused]
                if message.notification_id is not None:
                    settled.append(message.notification_id)
                for id in settled:
                    self._unanswered.pop(id, None)
            case Unsubscribed():
                for name in message.channels:
                    if self._returning[name]:
                        # To what was said before it was asked for again.
                        self._returning[name] -= 1
                    else:
                        self._leaving.discard(name)
                        self._channels.pop(name, None)
            case Shutdown():
                self._told_by_shutdown = message.reconnect_after_seconds
            case Problem() if message.retry_after_seconds is not None:
                self._told_by_limit = message.retry_after_seconds
            case _:
                pass
        return []

    def _plan_refresh(self, expires_at: datetime | None) -> None:
        self._refresh_at = math.inf
        if expires_at is not None and self._credentials.renewable:
            left = expires_at.timestamp() - self._now()
            margin = min(_REFRESH_MARGIN, left / 5)
            self._refresh_at = self._clock() + max(_LEAST_REFRESH, left - margin)

    def _refresh(self) -> Steps[None]:
        """Show a new token; the session's new end comes with `refreshed`, or with 4010."""
        fetched = yield FetchToken()
        if isinstance(fetched, Failed):
            _log.warning("no new token could be fetched: %s", fetched.error)
            self._refresh_at = self._clock() + _LEAST_REFRESH
            return
        self._credentials.token = _expect(fetched, str)
        self._refresh_at = math.inf
        yield Send(messages.auth(self._credentials.token))

    # Coming back.

    def _delay(self, ending: Ending) -> float | None:
        """Seconds until the next connection, None to stay away."""
        self._failures += 1
        delay = self._policy.backoff.delay(self._failures, self._random)
        told: float | None = None
        match ending:
            case Closed(code=code):
                if code in _FINAL_CODES or (code in _TOKEN_CODES and not self._renew()):
                    return None
                told = self._told_by_shutdown
                if code == _LATER:
                    told = self._told_by_limit
                    delay = max(delay, self._policy.backoff.maximum * (0.5 + self._random() / 2))
            case Refused(error=error):
                self._unreached += 1
                if error.status == 401:
                    if not self._renew():
                        return None
                elif error.status not in _PASSING_STATUS:
                    return None
                told = error.retry_after
            case Failed():
                self._unreached += 1
            case _:
                assert_never(ending)
        if self._policy.attempts is not None and self._unreached >= self._policy.attempts:
            return None
        if told is None:
            return delay
        return min(told + self._random() * self._policy.backoff.initial, self._policy.longest_wait)

    def _renew(self) -> bool:
        """Let go of a refused token; False where no other is to be had."""
        if not self._credentials.renewable or self._tokens_refused >= self._policy.tokens:
            return False
        self._tokens_refused += 1
        self._credentials.token = None
        return True


def _names(names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"a list of names is needed, not one: [{names!r}]")
    return list(names)


def _portions(names: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), _IDS_PER_MESSAGE):
        yield names[start : start + _IDS_PER_MESSAGE]


def _expect(reply: object, kind: type[R]) -> R:
    if not isinstance(reply, kind):
        raise TypeError(f"a step was answered with {type(reply).__name__}, not {kind.__name__}")
    return reply


def _described(ending: Ending) -> tuple[int, str]:
    match ending:
        case Closed():
            return ending.code, ending.reason
        case Refused():
            status = ending.error.status
            return status, str(ending.error).removeprefix(f"{status} ")
        case Failed():
            return 1006, str(ending.error) or type(ending.error).__name__
        case _:
            assert_never(ending)


def _final_error(ending: Ending) -> NotifydClientError | None:
    """What a listener that must not come back raises; None after 4009, which is no fault."""
    match ending:
        case Closed(code=4009):
            return None
        case Closed():
            return ConnectionClosed(ending.code, ending.reason)
        case Refused():
            return ending.error
        case Failed():
            if isinstance(ending.error, TransportError):
                return ending.error
            return ConnectError(str(ending.error) or type(ending.error).__name__)
        case _:
            assert_never(ending)
