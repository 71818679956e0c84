"""`notifyd serve`: uvicorn with our protocols, our sockets, our way to stop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import signal
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any, Protocol

import structlog
import uvicorn
from sse_starlette.sse import AppStatus
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from notifyd.errors import ConfigurationError
from notifyd.server.door import Door, Doorman, TlsDoorman
from notifyd.server.http import TESTED_UVICORN, Beginning, HttpProtocol, Services
from notifyd.server.websocket import WebSocketProtocol
from notifyd.server.workers import Supervisor, Work, reserve

BACKLOG = 4096

# A connection is a dozen objects that live for hours. The default threshold would walk through all
# of them again and again while they come.
GC_THRESHOLDS = (50_000, 20, 50)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is served: an application for ASGI, what the sockets' own protocols need, and `drain`,
    which tells every client and lets them go."""

    app: ASGIApp
    services: Services
    drain: Callable[[], Awaitable[None]]


class ServeOptions(Protocol):
    """The section `server` of the settings."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def tls_cert(self) -> str | None: ...
    @property
    def tls_key(self) -> str | None: ...
    @property
    def shutdown_grace_seconds(self) -> float: ...
    @property
    def max_sockets(self) -> int: ...


class WorkersOptions(ServeOptions, Protocol):
    """The same, with the number of processes."""

    @property
    def workers(self) -> int: ...


class Server(uvicorn.Server):
    """uvicorn's server with our listening socket, and a drain before its own shutdown."""

    def __init__(
        self,
        config: uvicorn.Config,
        serving: Serving,
        *,
        max_sockets: int,
        grace_seconds: float,
        announce: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._serving = serving
        self._max_sockets = max_sockets
        self._grace_seconds = grace_seconds
        self._announce = announce
        self._log = structlog.get_logger("notifyd.server")
        self.door: Door | None = None
        self._make_doorman: Callable[[], asyncio.Protocol]
        self._draining: asyncio.Future[None] | None = None

    def make_protocol(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> asyncio.Protocol:
        """What uvicorn puts at each accepted socket."""
        door = self.door
        if door is None:
            door = self.door = Door(
                asyncio.get_running_loop(),
                max_sockets=self._max_sockets,
                timeouts=self._serving.services.timeouts,
                on_many_left=_give_memory_back,
            )
            door.start()
            beginning = Beginning(config, server_state, app_state, _loop)
            make_guest = partial(HttpProtocol, self._serving.services, door, beginning)
            tls = config.tls if isinstance(config, _ConfigBehindDoor) else None
            self._make_doorman = (
                partial(Doorman, door, make_guest)
                if tls is None
                else partial(TlsDoorman, door, make_guest, tls)
            )
        return self._make_doorman()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nobody, drain, then let uvicorn finish what is being answered."""
        for server in self.servers:
            server.close()
        self._draining = asyncio.ensure_future(self._drained())
        done, _ = await asyncio.wait({self._draining}, timeout=self._grace_seconds)
        for drained in done:
            if not drained.cancelled() and (error := drained.exception()) is not None:
                self._log.error("draining failed", exc_info=error)
        if not done:
            self._draining.cancel()
            self._log.warning("clients were still connected at the end of the grace period")
        if self.door is not None:
            self.door.stop()
            self.door.close_silent()
        await super().shutdown(sockets)

    async def _drained(self) -> None:
        await self._serving.drain()
        # Sockets of our own are not among uvicorn's connections: wait for their closes here.
        if self.door is not None:
            await self.door.wait_until_none_detached()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop gracefully, and a graceful stop is no failure: unlike uvicorn,
        the signal is not raised again afterwards."""
        handlers = {
            each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for each, handler in handlers.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops gracefully, the second at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        if self.force_exit and self._draining is not None:
            self._draining.get_loop().call_soon_threadsafe(self._draining.cancel)


def _give_memory_back() -> None:
    """glibc keeps what was freed below anything still in use; malloc_trim(3) gives its pages back.

    It takes some milliseconds, after thousands of sockets went.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


class _ConfigBehindDoor(uvicorn.Config):
    """A configuration whose TLS is not uvicorn's to begin, but the TlsDoorman's."""

    tls: ssl.SSLContext | None = None

    def load(self) -> None:
        """Load all of it, the certificate and its key too."""
        super().load()
        self.tls, self.ssl = self.ssl, None


class _Application:
    """An application that says why it cannot start: of that, uvicorn makes a traceback in the log
    and an exit code of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.cannot_start: ConfigurationError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        failed: list[Message] = []

        async def hold_failures(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed":
                failed.append(message)
            else:
                await send(message)

        try:
            await self._app(scope, receive, hold_failures)
        except ConfigurationError as error:
            self.cannot_start = error
            await send({"type": "lifespan.startup.failed", "message": ""})
        except BaseException:
            for message in failed:
                await send(message)
            raise


def url_of(bound: socket.socket, options: ServeOptions) -> str:
    """Where a bound socket is reached."""
    scheme = "https" if options.tls_cert else "http"
    host, port = bound.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def supervise(
    work: Callable[[int], Work], options: WorkersOptions, *, announce: Callable[[str], None]
) -> int:
    """Serve with several processes until a signal; returns the exit code.

    `work` gives what each of them does, for the port that they share. `announce` gets the URL once
    all listen.
    """
    log = structlog.get_logger("notifyd.server")
    try:
        holder = reserve(options.host, options.port)
    except OSError as error:
        _tell_cannot_listen(options, error)
        return 1
    url = url_of(holder, options)

    def started() -> None:
        log.info("all workers listen", url=url, workers=options.workers)
        announce(url)

    with holder:
        supervisor = Supervisor(
            work(holder.getsockname()[1]),
            options.workers,
            grace_seconds=options.shutdown_grace_seconds,
            announce=started,
        )
        return supervisor.run()


def _tell_cannot_listen(options: ServeOptions, error: OSError) -> None:
    structlog.get_logger("notifyd.server").error(
        "cannot listen", host=options.host, port=options.port, reason=error.strerror or str(error)
    )


def serve(
    serving: Serving,
    options: ServeOptions,
    *,
    idle_timeout: float,
    announce: Callable[[str], None],
    share_port: bool = False,
) -> int:
    """Serve until a signal; returns the exit code. `announce` gets the URL once the server
    listens. `share_port`: other processes listen on it too. Raises ConfigurationError where a
    backend that was chosen cannot be used.
    """
    log = structlog.get_logger("notifyd.server")
    # sse-starlette would end ASGI streams at the signal, before our drain could tell them anything.
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]  # theirs
    try:
        listener = listen(options.host, options.port, idle_timeout, share_port=share_port)
    except OSError as error:
        _tell_cannot_listen(options, error)
        return 1
    url = url_of(listener, options)

    def started() -> None:
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        log.info("listening", url=url)
        announce(url)

    application = _Application(serving.app)
    server = make_server(replace(serving, app=application), options, announce=started)
    with listener:
        try:
            server.run(sockets=[listener])
        except SystemExit:
            # So uvicorn ends where the application did not start; it has said the rest.
            if application.cannot_start is not None:
                raise application.cannot_start from None
    return 0 if server.started else 1


def make_server(serving: Serving, options: ServeOptions, *, announce: Callable[[], None]) -> Server:
    """A server that is ready to run on sockets of `listen`; `announce` is called once it does."""
    common: dict[str, Any] = {
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        # One function of ours decides the client's address, for all lanes.
        "proxy_headers": False,
        "server_header": False,
        "backlog": BACKLOG,
        "timeout_graceful_shutdown": max(1, round(options.shutdown_grace_seconds)),
        "ssl_certfile": options.tls_cert,
        "ssl_keyfile": options.tls_key,
        "loop": "asyncio" if sys.platform == "win32" else "uvloop",
    }
    server: Server

    def make_protocol(**arguments: Any) -> asyncio.Protocol:
        return server.make_protocol(**arguments)

    config: uvicorn.Config
    if uvicorn.__version__.startswith(f"{TESTED_UVICORN}."):
        config = _ConfigBehindDoor(serving.app, http=make_protocol, ws=WebSocketProtocol, **common)  # type: ignore[arg-type]  # a factory is all that uvicorn needs
    else:
        structlog.get_logger("notifyd.server").warning(
            "this uvicorn is not tested with notifyd's own protocols: serving through ASGI, slower",
            uvicorn=uvicorn.__version__,
            tested=TESTED_UVICORN,
        )
        config = uvicorn.Config(serving.app, http="httptools", ws="websockets-sansio", **common)
    server = Server(
        config,
        serving,
        max_sockets=options.max_sockets,
        grace_seconds=options.shutdown_grace_seconds,
        announce=announce,
    )
    return server


def listen(host: str, port: int, idle_timeout: float, *, share_port: bool = False) -> socket.socket:
    """A listening socket. Raises OSError.

    What is set on it, its accepted sockets inherit: the kernel gives up a peer that acknowledges
    nothing for `idle_timeout` seconds (RFC 5482), which is the only way to notice for SSE.
    """
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.create_server(
        (str(address[0]), int(address[1])),
        family=family,
        backlog=BACKLOG,
        reuse_port=share_port,
        dualstack_ipv6=family == socket.AF_INET6
        and address[0] == "::"
        and socket.has_dualstack_ipv6(),
    )
    # asyncio turns Nagle's algorithm off for sockets that name their protocol, which those of
    # create_server do not: there, an answer in two writes would wait for a delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(idle_timeout * 1000))
    return listener
