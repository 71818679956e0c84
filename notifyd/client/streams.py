"""What `listen` returns: `Stream` blocks, `AsyncStream` awaits; how they live is in `listening`."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import Self, assert_never

import httpx
import websockets.asyncio.client
import websockets.sync.client
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from notifyd.client.credentials import FetchToken, Wait
from notifyd.client.errors import TransportError, status_error
from notifyd.client.listening import (
    Close,
    Closed,
    Connect,
    Deliver,
    Failed,
    Listening,
    Opened,
    Receive,
    Refused,
    Reply,
    Send,
    Silence,
    Step,
    Tell,
)
from notifyd.client.messages import Event, Notification

# A server that does not answer a Close is not waited for longer, in seconds.
_CLOSE_TIMEOUT = 2.0

# What a token function raises when the place it asks is away, and a handshake when the server is:
# both are tried again. Anything else a token function raises comes out of the iteration.
_AWAY = (OSError, httpx.TransportError, TransportError)
_NO_HANDSHAKE = (OSError, EOFError, InvalidHandshake, ConnectionClosed)


class AsyncStream:
    """Notifications as they come: `async for notification in client.listen(...)`.

    It connects when it is first iterated over and comes back by itself; each id is yielded once.
    Nothing is read while the caller works on a notification, so a slow caller slows the server
    down, not his own memory. Iterating ends after `aclose`, or when this connection was given up
    because the user has too many (4009). Raises ConnectionClosed and StatusError where the server
    forbids to come back, ConnectError when `Reconnect.attempts` are used up, and what the token
    function raised. A cancelled iteration keeps its connection and may be taken up again;
    `aclose`, `async with`, or the client's end closes it. One task iterates, any may do the rest.
    """

    def __init__(
        self,
        listening: Listening,
        *,
        fetch_token: Callable[[], str | Awaitable[str]] | None = None,
        on_event: Callable[[Event], Awaitable[None] | None] | None = None,
        open_timeout: float | None = 5.0,
        headers: Mapping[str, str] | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._listening = listening
        self._steps = listening.steps()
        self._step: Step | None = None
        self._fetch_token = fetch_token
        self._on_event = on_event
        self._open_timeout = open_timeout
        self._headers = dict(headers or {})
        self._ssl_context = ssl_context
        self._connection: websockets.asyncio.client.ClientConnection | None = None
        self._closing = asyncio.Event()

    @property
    def connection_id(self) -> str | None:
        """The connection that stands, None between two; what `exclude_connection` takes."""
        return self._listening.connection_id

    @property
    def closed(self) -> bool:
        """Whether it yields no more: closed, ended, or failed."""
        ended = inspect.getgeneratorstate(self._steps) == inspect.GEN_CLOSED
        return ended or self._closing.is_set()

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels that are asked for on every connection."""
        return self._listening.channels

    async def subscribe(self, *channels: str) -> None:
        """Ask for more channels; what the server says to it goes to `on_event`."""
        await self._send_all(self._listening.subscribe(channels))

    async def unsubscribe(self, *channels: str) -> None:
        """Ask for channels no longer."""
        await self._send_all(self._listening.unsubscribe(channels))

    async def ack(self, *notification_ids: str) -> None:
        """Confirm notifications; what finds no connection is sent over the next one."""
        await self._send_all(self._listening.ack(notification_ids))

    async def aclose(self) -> None:
        """Close the connection and end the iteration, another task's too."""
        self._closing.set()
        await self._drop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Notification[Awaitable[None]]:
        reply: Reply = None
        while True:
            if self._closing.is_set():
                self._steps.close()
                await self._drop()
                raise StopAsyncIteration
            # A step stays until it is done, so that a cancelled one is done again.
            if self._step is None:
                try:
                    self._step = self._steps.send(reply)
                except StopIteration:
                    await self._drop()
                    raise StopAsyncIteration from None
            step = self._step
            if isinstance(step, Deliver):
                self._step = None
                return Notification.of(step.message, self.ack)
            reply = await self._do(step)
            self._step = None

    async def _do(self, step: Step) -> Reply:
        match step:
            case Receive():
                return await self._receive(step.timeout)
            case Send():
                await self._send_all([step.data])
            case Connect():
                return await self._connect(step)
            case Tell():
                told = self._on_event(step.event) if self._on_event is not None else None
                if told is not None:
                    await told
            case FetchToken():
                return await self._token()
            case Wait():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(step.seconds):
                        await self._closing.wait()
            case Close():
                await self._drop()
            case Deliver():
                raise TypeError("a notification is for the caller")
            case _:
                assert_never(step)
        return None

    async def _connect(self, step: Connect) -> Reply:
        try:
            self._connection = await websockets.asyncio.client.connect(
                step.url,
                additional_headers={**self._headers, "Authorization": f"Bearer {step.token}"},
                open_timeout=self._open_timeout,
                ssl=self._ssl_context,
                close_timeout=_CLOSE_TIMEOUT,
                compression=None,
                ping_interval=None,
            )
        except InvalidStatus as error:
            return _refused(error)
        except _NO_HANDSHAKE as error:
            return Failed(error)
        return Opened()

    async def _receive(self, timeout: float) -> Reply:
        if self._connection is None:
            return Closed(1006, "no connection")
        try:
            async with asyncio.timeout(timeout):
                return await self._connection.recv(decode=False)
        except TimeoutError:
            return Silence()
        except ConnectionClosed as error:
            return _closed(error)

    async def _token(self) -> Reply:
        if self._fetch_token is None:
            raise TypeError("there is no function to fetch a token with")
        try:
            token = self._fetch_token()
            return token if isinstance(token, str) else await token
        except _AWAY as error:
            return Failed(error)

    async def _send_all(self, texts: Iterable[bytes]) -> None:
        connection = self._connection
        if connection is None:
            return
        # Why it closed is told by recv(); what must not get lost is sent again by Listening.
        with contextlib.suppress(ConnectionClosed):
            for text in texts:
                await connection.send(text, text=True)

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


class Stream:
    """Notifications as they come: `for notification in client.listen(...)`.

    As `AsyncStream`, blocking. One thread iterates; any may subscribe, ack and close.
    """

    def __init__(
        self,
        listening: Listening,
        *,
        fetch_token: Callable[[], str] | None = None,
        on_event: Callable[[Event], None] | None = None,
        open_timeout: float | None = 5.0,
        headers: Mapping[str, str] | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._listening = listening
        self._steps = listening.steps()
        self._step: Step | None = None
        self._fetch_token = fetch_token
        self._on_event = on_event
        self._open_timeout = open_timeout
        self._headers = dict(headers or {})
        self._ssl_context = ssl_context
        self._connection: websockets.sync.client.ClientConnection | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()  # around Listening, which never blocks

    @property
    def connection_id(self) -> str | None:
        """The connection that stands, None between two; what `exclude_connection` takes."""
        return self._listening.connection_id

    @property
    def closed(self) -> bool:
        """Whether it yields no more: closed, ended, or failed."""
        ended = inspect.getgeneratorstate(self._steps) == inspect.GEN_CLOSED
        return ended or self._closing.is_set()

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels that are asked for on every connection."""
        with self._lock:
            return self._listening.channels

    def subscribe(self, *channels: str) -> None:
        """Ask for more channels; what the server says to it goes to `on_event`."""
        with self._lock:
            texts = self._listening.subscribe(channels)
        self._send_all(texts)

    def unsubscribe(self, *channels: str) -> None:
        """Ask for channels no longer."""
        with self._lock:
            texts = self._listening.unsubscribe(channels)
        self._send_all(texts)

    def ack(self, *notification_ids: str) -> None:
        """Confirm notifications; what finds no connection is sent over the next one."""
        with self._lock:
            texts = self._listening.ack(notification_ids)
        self._send_all(texts)

    def close(self) -> None:
        """Close the connection and end the iteration, another thread's too."""
        self._closing.set()
        self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Notification[None]:
        reply: Reply = None
        while True:
            if self._closing.is_set():
                self._steps.close()
                self._drop()
                raise StopIteration
            # A step stays until it is done, so that an interrupted one is done again.
            if self._step is None:
                try:
                    with self._lock:
                        self._step = self._steps.send(reply)
                except StopIteration:
                    self._drop()
                    raise
            step = self._step
            if isinstance(step, Deliver):
                self._step = None
                return Notification.of(step.message, self.ack)
            reply = self._do(step)
            self._step = None

    def _do(self, step: Step) -> Reply:
        match step:
            case Receive():
                return self._receive(step.timeout)
            case Send():
                self._send_all([step.data])
            case Connect():
                return self._connect(step)
            case Tell():
                if self._on_event is not None:
                    self._on_event(step.event)
            case FetchToken():
                return self._token()
            case Wait():
                self._closing.wait(step.seconds)
            case Close():
                self._drop()
            case Deliver():
                raise TypeError("a notification is for the caller")
            case _:
                assert_never(step)
        return None

    def _connect(self, step: Connect) -> Reply:
        try:
            # From websockets 17 on, only entering it connects; close() is all that leaving does.
            self._connection = contextlib.ExitStack().enter_context(
                websockets.sync.client.connect(
                    step.url,
                    additional_headers={**self._headers, "Authorization": f"Bearer {step.token}"},
                    open_timeout=self._open_timeout,
                    ssl=self._ssl_context,
                    close_timeout=_CLOSE_TIMEOUT,
                    compression=None,
                    ping_interval=None,
                )
            )
        except InvalidStatus as error:
            return _refused(error)
        except _NO_HANDSHAKE as error:
            return Failed(error)
        return Opened()

    def _receive(self, timeout: float) -> Reply:
        connection = self._connection
        if connection is None:
            return Closed(1006, "no connection")
        try:
            return connection.recv(timeout, decode=False)
        except TimeoutError:
            return Silence()
        except ConnectionClosed as error:
            return _closed(error)

    def _token(self) -> Reply:
        if self._fetch_token is None:
            raise TypeError("there is no function to fetch a token with")
        try:
            return self._fetch_token()
        except _AWAY as error:
            return Failed(error)

    def _send_all(self, texts: Iterable[bytes]) -> None:
        connection = self._connection
        if connection is None:
            return
        # Why it closed is told by recv(); what must not get lost is sent again by Listening.
        with contextlib.suppress(ConnectionClosed):
            for text in texts:
                connection.send(text, text=True)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _refused(error: InvalidStatus) -> Refused:
    response = error.response
    return Refused(
        status_error(response.status_code, response.headers, bytes(response.body or b""))
    )


def _closed(error: ConnectionClosed) -> Closed:
    """Only a code that the server sent says what to do; our own end of it is no order."""
    if error.rcvd is None:
        return Closed(1006, str(error))
    return Closed(error.rcvd.code, error.rcvd.reason)
