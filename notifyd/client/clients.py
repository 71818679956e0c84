"""`Client` and `AsyncClient`: the same calls, performed at once or when awaited.

What a call is stands in `calls`, when it is repeated in `retry`, how a listener lives in
`listening`; here bytes are moved.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from functools import update_wrapper, wraps
from types import TracebackType
from typing import Any, Generic, ParamSpec, Protocol, Self, TypeVar, assert_never, cast, overload

import httpx

from notifyd.client import calls
from notifyd.client.calls import Call, Message
from notifyd.client.credentials import Credentials, FetchToken, Wait
from notifyd.client.listening import Listening, Reconnect
from notifyd.client.messages import Event
from notifyd.client.results import Receipt
from notifyd.client.retry import Attempt, Reply, Retry, exchange
from notifyd.client.streams import AsyncStream, Stream

P = ParamSpec("P")
T = TypeVar("T")

_DEFAULT_TIMEOUT = httpx.Timeout(5.0)


class AsyncPerformer(Protocol):
    """What performs calls when awaited: an AsyncClient, or a server in its own process."""

    async def perform(self, call: Call[T]) -> T:
        """Make a call and return its answer."""
        ...


class Endpoint(Generic[P, T]):
    """A call as a method: of a Client it returns the answer, of an AsyncClient a coroutine of it.

    So each call is written once, in `calls`, for both.
    """

    def __init__(self, build: Callable[P, Call[T]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[P, Call[T]]: ...
    @overload
    def __get__(self, instance: Client, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(
        self, instance: AsyncPerformer, owner: type
    ) -> Callable[P, Coroutine[Any, Any, T]]: ...

    def __get__(
        self, instance: Client | AsyncPerformer | None, owner: type
    ) -> Callable[P, Call[T]] | Callable[P, T] | Callable[P, Coroutine[Any, Any, T]]:
        if instance is None:
            return self._build
        client = instance

        @wraps(self._build)
        def perform(*args: P.args, **kwargs: P.kwargs) -> T | Coroutine[Any, Any, T]:
            return client.perform(self._build(*args, **kwargs))

        return cast("Callable[P, T] | Callable[P, Coroutine[Any, Any, T]]", perform)


def _sends(message: Callable[P, Message]) -> Endpoint[P, Receipt]:
    """`send` takes what a Message takes, declared there once."""

    def send(*args: P.args, **kwargs: P.kwargs) -> Call[Receipt]:
        return calls.send(message(*args, **kwargs))

    update_wrapper(send, message, assigned=(), updated=())
    send.__doc__ = f"{calls.send.__doc__}\n\n{message.__doc__}"
    return Endpoint(send)


class PublishingCalls:
    """The calls that publish."""

    send = _sends(Message)
    batch = Endpoint(calls.batch)


class Calls(PublishingCalls):
    """The HTTP API. What each call raises is told in `notifyd.client.errors`."""

    notification_acks = Endpoint(calls.notification_acks)
    ack = Endpoint(calls.ack)
    list_channels = Endpoint(calls.list_channels)
    get_channel = Endpoint(calls.get_channel)
    user_subscriptions = Endpoint(calls.user_subscriptions)
    user_connections = Endpoint(calls.user_connections)
    subscribe_user = Endpoint(calls.subscribe_user)
    unsubscribe_user = Endpoint(calls.unsubscribe_user)
    disconnect_user = Endpoint(calls.disconnect_user)
    disconnect = Endpoint(calls.disconnect)
    presence = Endpoint(calls.presence)
    create_token = Endpoint(calls.create_token)
    create_template = Endpoint(calls.create_template)
    replace_template = Endpoint(calls.replace_template)
    list_templates = Endpoint(calls.list_templates)
    get_template = Endpoint(calls.get_template)
    delete_template = Endpoint(calls.delete_template)
    list_tenants = Endpoint(calls.list_tenants)
    get_tenant = Endpoint(calls.get_tenant)
    set_tenant_limits = Endpoint(calls.set_tenant_limits)
    stats = Endpoint(calls.stats)
    ack_stats = Endpoint(calls.ack_stats)
    health = Endpoint(calls.health)


class Client(Calls):
    """A notifyd server, for code that blocks. Threads may share one.

    `api_key` is for a backend's calls, for `tenant` where the key is bound to none; `token` (a
    user's JWT, or a function that fetches one) for `listen` and `ack`. `timeout`, `verify` and
    `transport` are httpx's (a listener's handshake has the connect timeout), `retry` bounds how
    calls are repeated. `clock` is monotonic; it, `sleep` and `random` are there for tests. Close
    it, or use it in a `with` block: that ends its listeners too.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        tenant: str | None = None,
        token: str | Callable[[], str] | None = None,
        timeout: httpx.Timeout | float | None = _DEFAULT_TIMEOUT,
        retry: Retry | None = None,
        headers: Mapping[str, str] | None = None,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.BaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._credentials = _credentials(api_key, tenant, token)
        self._fetch_token = token if callable(token) else None
        self._retry = retry or Retry()
        self._clock = clock
        self._sleep = sleep
        self._random = random
        self._verify = verify
        self._http = httpx.Client(
            base_url=base_url, timeout=timeout, headers=headers, verify=verify, transport=transport
        )
        self._streams: list[Stream] = []

    def perform(self, call: Call[T]) -> T:
        """Make a call that `notifyd.client.calls` built, as the methods of this class do."""
        flow = exchange(
            call, self._credentials, policy=self._retry, clock=self._clock, random=self._random
        )
        reply: Reply = None
        while True:
            try:
                step = flow.send(reply)
            except StopIteration as done:
                answer: T = done.value
                return answer
            match step:
                case Attempt():
                    try:
                        reply = self._http.send(_request(self._http, step))
                    except httpx.TransportError as error:
                        reply = error
                case FetchToken():
                    reply = _function(self._fetch_token)()
                case Wait():
                    self._sleep(step.seconds)
                    reply = None
                case _:
                    assert_never(step)

    def listen(
        self,
        channels: Iterable[str] = (),
        *,
        acks: bool = True,
        on_event: Callable[[Event], None] | None = None,
        reconnect: Reconnect | None = None,
    ) -> Stream:
        """Notifications as they come, over as many connections as it takes; see `Stream`.

        With `acks` the server keeps what goes to the user until `notification.ack()`. Control
        messages go to `on_event`. Raises ValueError where the client has no token.
        """
        listening = Listening(
            _listening_url(self._http.base_url, acks=acks),
            _user(self._credentials),
            channels=channels,
            policy=reconnect,
            clock=self._clock,
            random=self._random,
        )
        stream = Stream(
            listening,
            fetch_token=self._fetch_token,
            on_event=on_event,
            open_timeout=self._http.timeout.connect,
            headers=_listening_headers(self._http),
            ssl_context=_ssl_context(listening.url, self._verify),
        )
        # One that a loop broke out of is still connected: whoever closes the client closes it.
        self._streams = [*(other for other in self._streams if not other.closed), stream]
        return stream

    def close(self) -> None:
        """End the listeners and let go of the connections."""
        for stream in self._streams:
            stream.close()
        self._http.close()

    def __enter__(self) -> Self:
        self._http.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClient(Calls):
    """A notifyd server, for code on asyncio. Tasks may share one.

    As `Client`, but that every call is awaited, and `token` may be a coroutine function. Cancelling
    a call drops its connection; whether the server acted is then unknown.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        tenant: str | None = None,
        token: str | Callable[[], str | Awaitable[str]] | None = None,
        timeout: httpx.Timeout | float | None = _DEFAULT_TIMEOUT,
        retry: Retry | None = None,
        headers: Mapping[str, str] | None = None,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._credentials = _credentials(api_key, tenant, token)
        self._fetch_token = token if callable(token) else None
        self._retry = retry or Retry()
        self._clock = clock
        self._sleep = sleep
        self._random = random
        self._verify = verify
        self._http = httpx.AsyncClient(
            base_url=base_url, timeout=timeout, headers=headers, verify=verify, transport=transport
        )
        self._streams: list[AsyncStream] = []

    async def perform(self, call: Call[T]) -> T:
        """Make a call that `notifyd.client.calls` built, as the methods of this class do."""
        flow = exchange(
            call, self._credentials, policy=self._retry, clock=self._clock, random=self._random
        )
        reply: Reply = None
        while True:
            try:
                step = flow.send(reply)
            except StopIteration as done:
                answer: T = done.value
                return answer
            match step:
                case Attempt():
                    try:
                        reply = await self._http.send(_request(self._http, step))
                    except httpx.TransportError as error:
                        reply = error
                case FetchToken():
                    token = _function(self._fetch_token)()
                    reply = token if isinstance(token, str) else await token
                case Wait():
                    await self._sleep(step.seconds)
                    reply = None
                case _:
                    assert_never(step)

    def listen(
        self,
        channels: Iterable[str] = (),
        *,
        acks: bool = True,
        on_event: Callable[[Event], Awaitable[None] | None] | None = None,
        reconnect: Reconnect | None = None,
    ) -> AsyncStream:
        """Notifications as they come, over as many connections as it takes; see `AsyncStream`.

        With `acks` the server keeps what goes to the user until `notification.ack()`. Control
        messages go to `on_event`. Raises ValueError where the client has no token.
        """
        listening = Listening(
            _listening_url(self._http.base_url, acks=acks),
            _user(self._credentials),
            channels=channels,
            policy=reconnect,
            clock=self._clock,
            random=self._random,
        )
        stream = AsyncStream(
            listening,
            fetch_token=self._fetch_token,
            on_event=on_event,
            open_timeout=self._http.timeout.connect,
            headers=_listening_headers(self._http),
            ssl_context=_ssl_context(listening.url, self._verify),
        )
        # One that a loop broke out of is still connected: whoever closes the client closes it.
        self._streams = [*(other for other in self._streams if not other.closed), stream]
        return stream

    async def aclose(self) -> None:
        """End the listeners and let go of the connections."""
        for stream in self._streams:
            await stream.aclose()
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


def _credentials(api_key: str | None, tenant: str | None, token: object) -> Credentials:
    return Credentials(
        api_key=api_key,
        tenant=tenant,
        token=token if isinstance(token, str) else None,
        renewable=callable(token),
    )


F = TypeVar("F")


def _function(fetch_token: F | None) -> F:
    if fetch_token is None:
        raise ValueError("this call speaks for a user: give the client a token")
    return fetch_token


def _request(http: httpx.Client | httpx.AsyncClient, attempt: Attempt) -> httpx.Request:
    return http.build_request(
        attempt.method, attempt.path, headers=attempt.headers, content=attempt.content
    )


def _user(credentials: Credentials) -> Credentials:
    if credentials.token is None and not credentials.renewable:
        raise ValueError("to listen is to be a user: give the client a token")
    return credentials


def _listening_url(base: httpx.URL, *, acks: bool) -> str:
    scheme = {"http": "ws", "https": "wss"}[base.scheme]
    path = base.path.rstrip("/") + "/ws"
    return str(base.copy_with(scheme=scheme, path=path, query=b"acks=1" if acks else None))


def _listening_headers(http: httpx.Client | httpx.AsyncClient) -> dict[str, str]:
    """The headers of the caller's own; httpx's defaults are about HTTP bodies and connections."""
    own = {"accept", "accept-encoding", "connection", "user-agent"}
    return {name: value for name, value in http.headers.items() if name.lower() not in own}


def _ssl_context(url: str, verify: ssl.SSLContext | bool) -> ssl.SSLContext | None:
    if not url.startswith("wss:"):
        return None
    return httpx.create_ssl_context(verify=verify)
